"""A procedural city with known truth, to drive, record, adapt and measure in."""
