"""A simulated world that is a checkerboard, and its corners in images."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.views import CameraPose

SQUARE = 2.0


def paved() -> City:
    """A flat city paved with squares of 2 m, corners at even metres, and nothing else in it."""
    city = build_city(5, "source", size_m=150.0, gsd=0.125)
    side = city.height.shape[0]
    metres = (np.arange(side) + 0.5) * city.gsd - city.size_m / 2
    parity = np.floor(metres[None, :] / SQUARE) + np.floor(metres[::-1, None] / SQUARE)
    squares = np.repeat((60 + 140 * (parity % 2))[..., None], 3, -1).astype(np.uint8)
    trees = replace(city.trees, in_ground=np.zeros(len(city.trees.centre), bool))
    cars = replace(city.cars, centre=city.cars.centre + 1e4)
    return replace(
        city,
        style=replace(city.style, camera_blur=0.0, haze_m=1e6),
        ground=squares,
        ground_far=cv2.resize(squares, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA),
        marking=np.zeros_like(city.marking),
        light=np.full_like(city.light, 255),
        height=np.zeros_like(city.height),
        objects=np.zeros_like(city.objects),
        trees=trees,
        cars=cars,
        poles=np.zeros((0, 2)),
    )


def corners(pose: CameraPose, reach: float = 10.0) -> np.ndarray:
    """Corners of squares (n, 3) around ``pose`` in level axes about its place: forward, left, up."""
    east = np.arange(math.ceil((pose.east - reach) / SQUARE), (pose.east + reach) / SQUARE) * SQUARE
    north = np.arange(math.ceil((pose.north - reach) / SQUARE), (pose.north + reach) / SQUARE) * SQUARE
    x, y = (v.ravel() for v in np.meshgrid(east - pose.east, north - pose.north))
    cos, sin = math.cos(pose.heading), math.sin(pose.heading)
    points = np.stack([cos * x + sin * y, -sin * x + cos * y, 0 * x - pose.height], 1)
    return points[np.hypot(x, y) < reach]


def found(image: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Corners (n, 2) found near ``expected`` ones, from which the search starts 1.5 pixels away."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    start = (expected + np.array([1.5, 0.0])).astype(np.float32).reshape(-1, 1, 2)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-3)
    return cv2.cornerSubPix(grey, start, (6, 6), (-1, -1), criteria)[:, 0]
