"""From an observation to a pose with its uncertainty, one frame at a time and over time."""
