"""Cross-view localisation: where a vehicle is, from its camera image and an aerial image."""

__version__ = "0.1.0"
