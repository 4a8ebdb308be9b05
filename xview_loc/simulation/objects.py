"""What stands in a simulated city above the ground: boxes, trees and cars, one row each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# OpenCV's stubs promise no element type, so these names carry it for the reader only.
Image = NDArray[Any]  # uint8
Floats = NDArray[Any]  # float32

CAR_SIZE = (4.4, 1.8)  # length and width of a middle-class car, metres
_OCCUPIED = 0.55  # share of the parking slots
_CAR_COLOURS = np.array(
    [
        (228, 228, 228),
        (30, 30, 34),
        (120, 124, 130),
        (170, 172, 176),
        (150, 30, 30),
        (38, 62, 120),
        (84, 92, 76),
    ],
    dtype=np.float32,
)


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
    colour = _CAR_COLOURS[rng.integers(0, len(_CAR_COLOURS), count)]
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
