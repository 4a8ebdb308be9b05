"""``make demo`` and ``make demo-adapt``: the nodes at work in the simulated city, shown on a page."""
