"""Drawing of polygons and discs, given in metres, into the rasters of a simulated city."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.objects import Array

SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


class Canvas:
    """Draw polygons given in ENU metres into north-up rasters of ``gsd`` metres per pixel."""

    def __init__(self, half: float, gsd: float) -> None:
        self.half, self.gsd = half, gsd

    def points(self, enu: Array, zoom: int = 1) -> NDArray[np.int32]:
        """Convert ENU metres (n, 2) to OpenCV's fixed-point pixels, in a raster ``zoom`` times as fine."""
        gsd = self.gsd / zoom
        x = (enu[:, 0] + self.half) / gsd - 0.5
        y = (self.half - enu[:, 1]) / gsd - 0.5
        return np.round(np.stack([x, y], axis=1) * (1 << SHIFT)).astype(np.int32)

    def fill(
        self, raster: NDArray[Any], polygon: Array, value: Any, zoom: int = 1, smooth: bool = False
    ) -> None:
        """Fill a polygon (n, 2) with ``value``."""
        line = cv2.LINE_AA if smooth else cv2.LINE_8
        cv2.fillPoly(raster, [self.points(polygon, zoom)], value, line, SHIFT)

    def disc(self, raster: NDArray[Any], centre: Array, radius: float, value: Any) -> None:
        """Fill a disc; ``radius`` is in metres."""
        (point,) = self.points(centre[None])
        cv2.circle(raster, point.tolist(), int(radius / self.gsd * 16), value, -1, cv2.LINE_8, SHIFT)

    def window(
        self, centre: Array, axis: Array, half: Array, size: int
    ) -> tuple[tuple[slice, slice], Array, Array]:
        """Return the window around a rectangle, and how far its pixels lie along and across the axis.

        ``size`` is the side of the raster in pixels. The window is empty if the rectangle lies outside.
        """
        points = self.points(rectangle(centre, axis, half)) >> SHIFT
        low, high = np.maximum(points.min(axis=0), 0), np.minimum(points.max(axis=0) + 2, size)
        high = np.maximum(low, high)
        east = (np.arange(low[0], high[0]) + 0.5) * self.gsd - self.half - centre[0]
        north = self.half - (np.arange(low[1], high[1])[:, None] + 0.5) * self.gsd - centre[1]
        along, across = east * axis[0] + north * axis[1], -east * axis[1] + north * axis[0]
        return (slice(low[1], high[1]), slice(low[0], high[0])), along, across


def rectangle(centre: Array, axis: Array, half: Array) -> Array:
    """Return the corners (4, 2) of a rectangle with half sides ``half``, the first along ``axis``."""
    side = np.array([-axis[1], axis[0]])
    a, b = axis * half[0], side * half[1]
    return np.stack([centre + a + b, centre - a + b, centre - a - b, centre + a - b])
