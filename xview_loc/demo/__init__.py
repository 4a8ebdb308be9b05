"""``make demo`` and ``make demo-adapt``: the nodes run in a simulated city, and a page shows the results."""
