"""A procedural city to drive, log, adapt and measure in, with known truth."""
