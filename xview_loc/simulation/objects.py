"""Objects of a simulated city, one row each, and drawing their outlines into its rasters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# OpenCV's stubs promise no element type, so these names carry it for the reader only.
Image = NDArray[Any]  # uint8
Floats = NDArray[Any]  # float32

CAR_SIZE = (4.4, 1.8)  # length and width of a middle-class car, metres
_OCCUPIED = 0.55  # share of the parking slots
_CAR_COLOURS = np.frombuffer(bytes.fromhex("e4e4e4 1e1e22 787c82 aaacb0 961e1e 263e78 545c4c"), np.uint8)
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


@dataclass(frozen=True)
class Boxes:
    """Upright boxes: buildings, machinery on roofs, hedges.

    Centres in ENU metres (n, 2), unit directions of the long side (n, 2), half length and half width (n, 2),
    wall and window colours (n, 3), storey height (0: no windows), distance between windows, and height over
    the street, metres (n,).
    """

    centre: Array
    axis: Array
    half: Array
    wall: Floats
    glass: Floats
    floor_m: Floats
    window_m: Floats
    height: Floats


@dataclass(frozen=True)
class Trees:
    """Crowns on trunks: places in ENU metres (n, 2), crown radii, tops and lower edges in metres, tints.

    ``in_aerial`` and ``in_ground`` select the trees that each view shows.
    """

    centre: Array
    radius: Floats
    top: Floats
    bottom: Floats
    tint: Floats
    in_aerial: NDArray[np.bool_]
    in_ground: NDArray[np.bool_]


@dataclass(frozen=True)
class Cars:
    """Cars: places in ENU metres (n, 2), unit directions (n, 2), colours (n, 3), and sizes.

    Sizes are relative to ``CAR_SIZE``.
    """

    centre: Array
    axis: Array
    colour: Floats
    scale: Floats


def car_looks(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw colours (count, 3) and sizes relative to ``CAR_SIZE``."""
    colours = _CAR_COLOURS.reshape(-1, 3).astype(np.float32)
    colour = colours[rng.integers(0, len(colours), count)]
    colour = np.clip(colour * rng.uniform(0.8, 1.15, (count, 1)), 0, 255).astype(np.float32)
    return colour, rng.uniform(0.88, 1.15, count).astype(np.float32)


def park_cars(slots: Array, rng: np.random.Generator) -> Cars:
    """Draw the cars parked in ``slots`` (n, 5): place, direction, and turn in radians."""
    chosen = slots[rng.random(len(slots)) < _OCCUPIED]
    count = len(chosen)
    turn = chosen[:, 4] + np.where(rng.random(count) < 0.15, math.pi, 0.0)
    cos, sin = np.cos(turn), np.sin(turn)
    axis = np.stack(
        [chosen[:, 2] * cos - chosen[:, 3] * sin, chosen[:, 2] * sin + chosen[:, 3] * cos], axis=1
    )
    centre = chosen[:, :2] + axis * rng.normal(0, 0.3, (count, 1))
    return Cars(centre, axis, *car_looks(count, rng))


class Canvas:
    """Draw polygons in ENU metres into north-up rasters of ``size`` pixels a side, ``gsd`` metres each."""

    def __init__(self, half: float, gsd: float, size: int) -> None:
        self.half, self.gsd, self.size = half, gsd, size

    def _points(self, enu: Array, zoom: int = 1) -> NDArray[np.int32]:
        """Convert ENU metres (n, 2) to OpenCV's fixed-point pixels, in a raster ``zoom`` times as fine."""
        gsd = self.gsd / zoom
        x = (enu[:, 0] + self.half) / gsd - 0.5
        y = (self.half - enu[:, 1]) / gsd - 0.5
        return np.round(np.stack([x, y], axis=1) * (1 << _SHIFT)).astype(np.int32)

    def fill(self, raster: NDArray[Any], polygon: Array, value: Any) -> None:
        """Fill a polygon (n, 2) with ``value``."""
        cv2.fillPoly(raster, [self._points(polygon)], value, cv2.LINE_8, _SHIFT)

    def paint(self, raster: NDArray[Any], polygon: Array, value: int = 255) -> None:
        """Fill a polygon (n, 2) with smooth edges in a raster twice as fine."""
        cv2.fillPoly(raster, [self._points(polygon, 2)], value, cv2.LINE_AA, _SHIFT)

    def disc(self, raster: NDArray[Any], centre: Array, radius: float, value: Any) -> None:
        """Fill a disc; ``radius`` is in metres."""
        (point,) = self._points(centre[None])
        cv2.circle(raster, point.tolist(), int(radius / self.gsd * 16), value, -1, cv2.LINE_8, _SHIFT)

    def window(self, polygon: Array) -> tuple[slice, slice]:
        """Return the rows and columns around a polygon; empty if it lies outside."""
        points = self._points(polygon) >> _SHIFT
        low = np.maximum(points.min(axis=0) - 1, 0)
        high = np.maximum(low, np.minimum(points.max(axis=0) + 2, self.size))
        return slice(low[1], high[1]), slice(low[0], high[0])

    def mask(self, polygon: Array, window: tuple[slice, slice]) -> NDArray[np.bool_]:
        """Return the mask of a polygon in a window."""
        rows, cols = window
        mask = np.zeros((rows.stop - rows.start, cols.stop - cols.start), np.uint8)
        if mask.size:
            points = self._points(polygon) - (np.array([cols.start, rows.start]) << _SHIFT)
            cv2.fillPoly(mask, [points.astype(np.int32)], 1, cv2.LINE_8, _SHIFT)
        return mask > 0

    def along(self, centre: Array, axis: Array, window: tuple[slice, slice]) -> tuple[Array, Array]:
        """Return how far the pixels of a window lie from ``centre`` along and across ``axis``, metres."""
        rows, cols = window
        east = (np.arange(cols.start, cols.stop) + 0.5) * self.gsd - self.half - centre[0]
        north = self.half - (np.arange(rows.start, rows.stop)[:, None] + 0.5) * self.gsd - centre[1]
        return east * axis[0] + north * axis[1], -east * axis[1] + north * axis[0]


def rectangle(centre: Array, axis: Array, half: Array) -> Array:
    """Return the corners (4, 2) of a rectangle with half sides ``half``, the first along ``axis``."""
    side = np.array([-axis[1], axis[0]])
    a, b = axis * half[0], side * half[1]
    return np.stack([centre + a + b, centre - a + b, centre - a - b, centre + a - b])
