"""Find a vehicle in an area of some hundred metres, without fixes, from images and odometry.

Every image is matched with all tiles that may show its place. A bank of grids, one for each hypothesis of the
heading, holds what images have left of the area; odometry moves it along with the vehicle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xview_loc.estimation.belief import BeliefGrid, Grid
from xview_loc.estimation.heat_map import TileScores, joint_heat_maps
from xview_loc.estimation.position_filter import HEADING_CORRELATION_M, FilteredPose, FilterOptions
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.models.base import Calibration
from xview_loc.statistics import wrapped_variance
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import HeadingSample

Array = NDArray[np.float64]

# Largest radius of an area, metres.
LARGEST_M = 500.0
# Side of a cell, and what is added to an area's radius for the grid, metres.
_CELL_M, _MARGIN_M = 2.0, 20.0
# Number of hypotheses of an unknown heading.
_HEADINGS = 24
_WIDTH = 2.0 * math.pi / _HEADINGS
# Concentration of the model's headings at the right place (15 degrees), and how often they are random.
_CONCENTRATION, _HEADING_OUTLIER = 1.0 / math.radians(15.0) ** 2, 0.5
# Tiles are scanned until they hold this share of the belief. A hypothesis of the heading below the least is
# dropped.
_SCANNED, _LEAST = 0.999, 1e-6
# Distance after which images are independent, metres: more than in the filter, as a whole street can
# resemble another one.
_APART_M = 20.0
# Prior probability that the vehicle is not in the area.
_ELSEWHERE = 0.05
# The place is found if this share lies within this distance of the maximum, after so many images ...
FOUND_SHARE, FOUND_M, FOUND_IMAGES = 0.999, 10.0, 4
# ... and the area is given up once so much lies elsewhere.
GIVEN_UP = 0.99


@dataclass(frozen=True)
class SearchArea:
    """A disc that the vehicle is in: degrees, metres."""

    lat: float
    lon: float
    radius_m: float

    @property
    def widened(self) -> SearchArea:
        """The disc of twice the radius, at most ``LARGEST_M``."""
        return replace(self, radius_m=min(2.0 * self.radius_m, LARGEST_M))


class PlaceSearch:
    """Belief about a position in an area, moved on from image to image; for use by one thread.

    Call :meth:`move` for each image, scan the tiles around :meth:`centres`, then call :meth:`observe`.
    """

    def __init__(
        self, area: SearchArea, odometry: Odometry, spacing_m: float, options: FilterOptions | None = None
    ) -> None:
        """``spacing_m``: that of the scanned tiles, metres."""
        self.area = area
        self._odometry = odometry
        self._spacing_m = spacing_m
        self._options = options or FilterOptions()
        self._plane = LocalProjection(area.lat, area.lon)
        self._stamp_ns: int | None = None
        self._layers: list[_Layer] = []
        self.elsewhere = _ELSEWHERE
        self.images = 0.0
        self._driven = math.inf

    def move(self, stamp_ns: int, heading: HeadingSample | None) -> bool:
        """Move on to an image's stamp; return False if its motion is unknown: the search then starts anew."""
        known = heading is not None
        motion = None if self._stamp_ns is None else self._odometry.between(self._stamp_ns, stamp_ns)
        began, self._stamp_ns = self._stamp_ns, stamp_ns
        if motion is None or any(layer.measured != known for layer in self._layers):
            self._begin(heading)
            return began is None
        rate = self._options.drift_m**2 / 100.0
        for layer in self._layers:
            turn = motion.turn
            yaw = layer.yaw
            layer.yaw = yaw + turn if heading is None else heading.yaw
            variance = _WIDTH**2 / 12.0 if heading is None else heading.std**2
            if heading is not None:
                yaw = layer.yaw - turn
            step = np.array(in_enu((motion.forward, motion.left), yaw))
            spread = (rate + HEADING_CORRELATION_M * variance / 2.0) * motion.length
            layer.belief.move(step, spread, corner=layer.belief.corner + step)
        self._driven += motion.length
        return True

    def centres(self) -> list[tuple[float, float]]:
        """Return the positions (lat, lon), degrees, to scan tiles around; the likeliest first."""
        shares: dict[tuple[int, int], float] = {}
        for layer in self._layers:
            (columns, right), (rows, up) = (_runs(axis / self._spacing_m) for axis in layer.belief.axes)
            sums = np.add.reduceat(np.add.reduceat(layer.belief.probability, rows, 0), columns, 1)
            for i, y in enumerate(up):
                for k, x in enumerate(right):
                    shares[x, y] = shares.get((x, y), 0.0) + layer.weight * float(sums[i, k])
        ordered = sorted(shares, key=lambda square: -shares[square])
        total = np.cumsum([shares[square] for square in ordered])
        count = int(np.searchsorted(total, _SCANNED * total[-1])) + 1
        places = self._plane.inverse(*(np.array(ordered[:count], float).T * self._spacing_m))
        return [(float(lat), float(lon)) for lat, lon in zip(*places, strict=True)]

    def observe(self, scan: Sequence[TileScores], calibration: Calibration, mounting: Mounting) -> None:
        """Take the scores of the tiles around :meth:`centres`, for the image at the last stamp."""
        weight = min(1.0, self._driven / _APART_M)
        if not scan or weight == 0.0:
            return
        self._driven = 0.0
        self.images += weight
        mosaic = _Mosaic(scan, calibration, self._plane, self._spacing_m)
        outlier = self._options.outlier
        for layer in self._layers:
            lever = np.array(in_enu(mounting.camera, layer.yaw))
            yaw = None if layer.measured else mounting.looking(layer.yaw)
            likelihood = mosaic.likelihood(layer.belief, lever, yaw)
            layer.weight *= layer.belief.multiply(((1.0 - outlier) * likelihood + outlier) ** weight)
        total = sum(layer.weight for layer in self._layers) + self.elsewhere
        for layer in self._layers:
            layer.weight /= total
        self.elsewhere /= total
        self._layers = [layer for layer in self._layers if layer.weight > _LEAST]

    @property
    def best(self) -> tuple[FilteredPose, float]:
        """The likeliest place, with its share of the belief; its covariance is that within ``FOUND_M``."""
        top = max(self._layers, key=lambda layer: layer.weight * float(layer.belief.probability.max()))
        row, col = np.unravel_index(int(top.belief.probability.argmax()), top.belief.probability.shape)
        peak = top.belief.corner + np.array([col, row]) * _CELL_M
        share, moment, second, direction = 0.0, np.zeros(2), np.zeros((2, 2)), 0j
        for layer in self._layers:
            x, y = layer.belief.axes
            dx, dy = x - peak[0], y - peak[1]
            near = (dx[None, :] ** 2 + dy[:, None] ** 2) <= FOUND_M**2
            mass = np.where(near, layer.belief.probability, 0.0) * layer.weight
            share += float(mass.sum())
            moment += (mass.sum(0) @ dx, mass.sum(1) @ dy)
            cross = dy @ mass @ dx
            second += [[mass.sum(0) @ dx**2, cross], [cross, mass.sum(1) @ dy**2]]
            direction += float(mass.sum()) * np.exp(1j * layer.yaw)
        mean = moment / share
        covariance = second / share - np.outer(mean, mean) + _CELL_M**2 / 12.0 * np.eye(2)
        lat, lon = (float(v) for v in self._plane.inverse(*(peak + mean)))
        spread = wrapped_variance(min(1.0, abs(direction) / share)) + _WIDTH**2 / 12.0
        assert self._stamp_ns is not None
        pose = FilteredPose(
            lat, lon, covariance, wrap_angle(float(np.angle(direction))), spread, self._stamp_ns
        )
        return pose, share

    @property
    def found(self) -> FilteredPose | None:
        """The pose, once it is sure."""
        if self.images < FOUND_IMAGES or not self._layers:
            return None
        pose, share = self.best
        return pose if share >= FOUND_SHARE else None

    @property
    def given_up(self) -> bool:
        """True if the vehicle is not in the area."""
        return not self.elsewhere <= GIVEN_UP or (not self._layers and self._stamp_ns is not None)

    def _begin(self, heading: HeadingSample | None) -> None:
        cells = 2 * math.ceil((self.area.radius_m + _MARGIN_M) / _CELL_M) + 1
        corner = np.full(2, -(cells - 1) / 2 * _CELL_M)
        axis = corner[0] + np.arange(cells) * _CELL_M
        disc = (axis[None, :] ** 2 + axis[:, None] ** 2 <= self.area.radius_m**2).astype(np.float32)
        disc /= disc.sum()
        yaws = np.arange(_HEADINGS) * _WIDTH if heading is None else [heading.yaw]
        share = (1.0 - _ELSEWHERE) / len(yaws)
        self._layers = [
            _Layer(BeliefGrid(disc, corner, _CELL_M), float(yaw), share, heading is not None) for yaw in yaws
        ]
        self.elsewhere, self.images, self._driven = _ELSEWHERE, 0.0, math.inf


@dataclass
class _Layer:
    """Belief under one hypothesis of base_link's yaw, radians; ``weight``: its probability."""

    belief: BeliefGrid
    yaw: float
    weight: float
    measured: bool


class _Mosaic:
    """Scanned maps in one plane: each cell's probability relative to a uniform one, and the headings there.

    Cells that no map shows get 1: nothing is known of them.
    """

    def __init__(
        self, scan: Sequence[TileScores], calibration: Calibration, plane: LocalProjection, spacing_m: float
    ) -> None:
        # The nearest stored tile may be a quarter of the spacing away.
        half = math.ceil(0.75 * spacing_m / _CELL_M)
        middles = np.array([plane.forward(one.tile.lat, one.tile.lon) for one in scan])
        first = np.round(middles / _CELL_M).astype(int) - half
        low = first.min(0)
        width, height = first.max(0) - low + 2 * half + 1
        self.corner = low * _CELL_M
        self.relative = np.ones((height, width), np.float32)
        self.shown = np.zeros((height, width), bool)
        self.cos: Grid | None = None
        self.sin: Grid | None = None
        if scan[0].cos is not None:
            self.cos, self.sin = np.zeros((2, height, width), np.float32)
        heat_maps = joint_heat_maps(scan, calibration)
        for one, heat_map, (x, y) in zip(scan, heat_maps, first, strict=True):
            side = 2 * half + 1
            window = BeliefGrid(np.ones((side, side), np.float32), np.array([x, y]) * _CELL_M, _CELL_M)
            cells = slice(y - low[1], y - low[1] + side), slice(x - low[0], x - low[0] + side)
            self.relative[cells] = window.heat_map_likelihood(heat_map, plane)
            self.shown[cells] = True
            if self.cos is not None and self.sin is not None and one.cos is not None and one.sin is not None:
                self.cos[cells] = window.averages(one.cos, heat_map, plane)
                self.sin[cells] = window.averages(one.sin, heat_map, plane)

        # Relative to what is shown here, the middles of the tiles: models prefer these.
        self.relative[self.shown] /= self.relative[self.shown].mean()

    def likelihood(self, belief: BeliefGrid, lever: Array, yaw: float | None) -> Grid:
        """Return the likelihood of the cells of ``belief``, for a camera that looks along ``yaw``."""
        right, up = (belief.corner + lever - self.corner) / _CELL_M
        to_pixel = np.array([[1.0, 0.0, right], [0.0, 1.0, up]])
        relative = belief.resampled(self.relative, to_pixel)
        if self.cos is None or self.sin is None or yaw is None:
            return relative
        aligned = math.cos(yaw) * self.cos + math.sin(yaw) * self.sin
        density = np.exp(_CONCENTRATION * (aligned - 1.0)) * _PEAK
        density = (1.0 - _HEADING_OUTLIER) * density + _HEADING_OUTLIER
        density[~self.shown] = 1.0
        return relative * belief.resampled(density.astype(np.float32), to_pixel)


# Density of the model's headings at the right one, relative to a uniform one.
_PEAK = math.sqrt(2.0 * math.pi * _CONCENTRATION)


def _runs(values: Array) -> tuple[NDArray[np.intp], list[int]]:
    """Return where runs of values with the same nearest integer begin, and these integers."""
    nearest = np.round(values).astype(int)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(nearest) != 0]))
    return starts, nearest[starts].tolist()
