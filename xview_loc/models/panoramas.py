"""What panoramas show, by their shape and by what a model expects. Does not import torch."""

from __future__ import annotations

from xview_loc.images import Image
from xview_loc.models.specs import ModelSpec

# Share by which a panorama's height may differ from what its elevations say.
_SHAPE = 0.1


def panorama_elevation(image: Image, spec: ModelSpec) -> tuple[float, float]:
    """Return the elevations of a panorama's upper and lower edge, degrees.

    One that is twice as wide as high shows all directions, another one what the model expects.
    """
    height, width = image.shape[:2]
    return (90.0, -90.0) if width == 2 * height else spec.elevation_deg


def panorama_fault(image: Image, spec: ModelSpec) -> str:
    """Return why an image does not look like a panorama of :func:`panorama_elevation`; "" if it does."""
    height, width = image.shape[:2]
    top, bottom = panorama_elevation(image, spec)
    # Panoramas have as many pixels per degree across as down.
    wanted = width * (top - bottom) / 360.0
    if abs(height - wanted) <= _SHAPE * wanted:
        return ""
    return (
        f"an image of {width} x {height} pixels is no panorama from {top:g} to {bottom:g} degrees: publish "
        "its camera_info if it is no panorama, or set panorama_elevation_deg if it shows other elevations"
    )
