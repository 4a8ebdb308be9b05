"""Find a vehicle in an area of some hundred metres, without fixes, from images and odometry.

Every image is matched with all tiles that may show its place. A bank of grids, one for each hypothesis of the
heading, holds what images have left of the area; odometry moves it along with the vehicle.
"""

from __future__ import annotations

import cmath
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
from xview_loc.vehicle.synchronisation import NS, HeadingSample

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
APART_M = 20.0
# An image nearer than this to the one before is not worth a scan, metres.
LEAST_APART_M = 2.0
# Speed that a vehicle may have had where its motion is not known, m/s.
_UNSEEN_SPEED = 15.0
# Prior probability that the vehicle is not in the area, and that it is not in one that was widened: the first
# guess was wrong then.
_ELSEWHERE, _ELSEWHERE_AGAIN = 0.05, 0.5
# The place is found if this share lies within this distance of the maximum, after so many images, or
# so many in an area that was widened: the vehicle may be outside again, and images then agree by chance ...
FOUND_SHARE, FOUND_M, FOUND_IMAGES, FOUND_IMAGES_AGAIN = 0.999, 10.0, 4, 8
# ... with an unknown heading, of this standard deviation, radians ...
_FOUND_HEADING = math.radians(10.0)
# ... and the area is given up once images make what tiles show less likely than elsewhere by this factor.
# Images confirm unknown headings later than measured ones.
_GIVEN_UP, _GIVEN_UP_UNKNOWN = 19.0, 1900.0


@dataclass(frozen=True)
class SearchArea:
    """A disc that the vehicle is in: degrees, metres."""

    lat: float
    lon: float
    radius_m: float

    def larger(self, by_m: float) -> SearchArea:
        """Return the disc of a larger radius, at most ``LARGEST_M``."""
        return replace(self, radius_m=max(self.radius_m, min(self.radius_m + by_m, LARGEST_M)))


class PlaceSearch:
    """Belief about a position in an area, moved on from image to image; for use by one thread.

    Call :meth:`move` for each image. If the vehicle has ``driven`` at least ``LEAST_APART_M`` since the last
    one, scan the tiles around :meth:`centres`, then call :meth:`observe`.
    """

    def __init__(
        self, area: SearchArea, odometry: Odometry, spacing_m: float, options: FilterOptions | None = None
    ) -> None:
        """area: that of the first image. spacing_m: that of the scanned tiles, metres."""
        self._odometry = odometry
        self._spacing_m = spacing_m
        self._options = options or FilterOptions()
        # Disc at first. Then the way driven, and base_link's yaw: true to north if headings are measured,
        # else in the axes that each layer turns by its angle.
        self._first = area
        self._plane = LocalProjection(area.lat, area.lon)
        self._way, self._yaw, self._measured = 0j, 0.0, False
        self._stamp_ns: int | None = None
        self._layers: list[_Layer] = []
        self._prior, self._least_images = _ELSEWHERE, FOUND_IMAGES
        # Metres driven since the last image that was observed.
        self.elsewhere, self.images, self.driven = self._prior, 0.0, math.inf
        # Probability of the places that tiles have shown.
        self._shown = 1.0 - self._prior

    @property
    def area(self) -> SearchArea:
        """A disc that the vehicle is in now if it was in the first one; at most ``LARGEST_M`` large."""
        if not self._measured:
            return self._first.larger(abs(self._way))
        lat, lon = (float(v) for v in self._plane.inverse(self._way.real, self._way.imag))
        return SearchArea(lat, lon, self._first.radius_m)

    def move(self, stamp_ns: int, heading: HeadingSample | None) -> bool:
        """Move on to an image's stamp; return False if the motion is not known: the search begins anew."""
        began, self._stamp_ns = self._stamp_ns, stamp_ns
        motion = None if began is None else self._odometry.between(began, stamp_ns)
        if heading is not None and not self._measured and motion is not None:
            # The whole way is true to north now.
            self._way *= cmath.exp(1j * (heading.yaw - motion.turn - self._yaw))
            self._yaw, self._measured = heading.yaw - motion.turn, True
            self.restart()
        if motion is None or (heading is not None) != self._measured:
            area = self.area
            if motion is None and began is not None:
                area = area.larger(_UNSEEN_SPEED * abs(stamp_ns - began) / NS)
            self._first, self._plane = area, LocalProjection(area.lat, area.lon)
            self._way, self._measured = 0j, heading is not None
            self._yaw = 0.0 if heading is None else heading.yaw
            self.restart()
            return motion is not None or began is None
        before = self._yaw if heading is None else heading.yaw - motion.turn
        step = complex(motion.forward, motion.left) * cmath.exp(1j * before)
        self._way += step
        self._yaw = before + motion.turn
        variance = _WIDTH**2 / 12.0 if heading is None else heading.std**2
        rate = self._options.drift_m**2 / 100.0 + HEADING_CORRELATION_M * variance / 2.0
        for layer in self._layers:
            shift = layer.turned(step)
            layer.belief.move(shift, rate * motion.length, corner=layer.belief.corner + shift)
        self.driven += motion.length
        return True

    def widen(self) -> None:
        """Begin anew in the disc of twice the radius, which the vehicle may have been in instead."""
        self._first, self._prior = self._first.larger(self._first.radius_m), _ELSEWHERE_AGAIN
        self._least_images = FOUND_IMAGES_AGAIN
        self.restart()

    def centres(self, mounting: Mounting) -> list[tuple[float, float]]:
        """Return the camera's positions (lat, lon), degrees, to scan tiles around; the likeliest first."""
        shares: dict[tuple[int, int], float] = {}
        for layer in self._layers:
            lever = in_enu(mounting.camera, layer.angle + self._yaw)
            (columns, right), (rows, up) = (
                _runs((axis + offset) / self._spacing_m)
                for axis, offset in zip(layer.belief.axes, lever, strict=True)
            )
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
        weight = min(1.0, self.driven / APART_M)
        if not scan:
            self._shown = 0.0
        if not scan or weight == 0.0:
            return
        self.driven = 0.0
        self.images += weight
        mosaic = _Mosaic(scan, calibration, self._plane, self._spacing_m)
        outlier = self._options.outlier
        for layer in self._layers:
            yaw = layer.angle + self._yaw
            lever = np.array(in_enu(mounting.camera, yaw))
            looking = None if self._measured else mounting.looking(yaw)
            likelihood, shown = mosaic.likelihood(layer.belief, lever, looking)
            layer.weight *= layer.belief.multiply(((1.0 - outlier) * likelihood + outlier) ** weight)
            layer.shown = float((layer.belief.probability * shown).sum())
        total = sum(layer.weight for layer in self._layers) + self.elsewhere
        for layer in self._layers:
            layer.weight /= total
        self.elsewhere /= total
        self._shown = sum(layer.weight * layer.shown for layer in self._layers)
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
            direction += float(mass.sum()) * cmath.exp(1j * (layer.angle + self._yaw))
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
        if self.images < self._least_images or not self._layers:
            return None
        pose, share = self.best
        sure = share >= FOUND_SHARE and (self._measured or pose.heading_variance < _FOUND_HEADING**2)
        return pose if sure else None

    @property
    def given_up(self) -> bool:
        """True if the vehicle is not in the area."""
        factor = _GIVEN_UP if self._measured else _GIVEN_UP_UNKNOWN
        return not factor * self._shown * self._prior >= (1.0 - self._prior) * self.elsewhere

    def restart(self) -> None:
        """Forget all images: all places in the disc, which has moved along, are likely."""
        radius = self._first.radius_m
        cells = 2 * math.ceil((radius + _MARGIN_M) / _CELL_M) + 1
        corner = np.full(2, -(cells - 1) / 2 * _CELL_M)
        axis = corner[0] + np.arange(cells) * _CELL_M
        disc = (axis[None, :] ** 2 + axis[:, None] ** 2 <= radius**2).astype(np.float32)
        disc /= disc.sum()
        angles = [0.0] if self._measured else [k * _WIDTH for k in range(_HEADINGS)]
        share = (1.0 - self._prior) / len(angles)
        self._layers = [_Layer(BeliefGrid(disc, corner, _CELL_M), angle, share) for angle in angles]
        for layer in self._layers:
            layer.belief.corner = corner + layer.turned(self._way)
        self.elsewhere, self.images, self.driven = self._prior, 0.0, math.inf
        self._shown = 1.0 - self._prior


@dataclass
class _Layer:
    """Belief under one hypothesis of the heading.

    angle: radians. weight: its probability. shown: share of the belief that tiles have shown.
    """

    belief: BeliefGrid
    angle: float
    weight: float
    shown: float = 1.0

    def turned(self, step: complex) -> Array:
        """Return a step (x, y) under this hypothesis, metres."""
        step *= cmath.exp(1j * self.angle)
        return np.array([step.real, step.imag])


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

    def likelihood(self, belief: BeliefGrid, lever: Array, yaw: float | None) -> tuple[Grid, Grid]:
        """Return likelihoods of the cells of ``belief``, for a camera that looks along ``yaw``.

        Also return how much of each cell a map shows, 0..1.
        """
        right, up = (belief.corner + lever - self.corner) / _CELL_M
        to_pixel = np.array([[1.0, 0.0, right], [0.0, 1.0, up]])
        relative = belief.resampled(self.relative, to_pixel)
        shown = 1.0 - belief.resampled((~self.shown).astype(np.float32), to_pixel)
        if self.cos is None or self.sin is None or yaw is None:
            return relative, shown
        aligned = math.cos(yaw) * self.cos + math.sin(yaw) * self.sin
        density = np.exp(_CONCENTRATION * (aligned - 1.0)) * _PEAK
        density = (1.0 - _HEADING_OUTLIER) * density + _HEADING_OUTLIER
        density[~self.shown] = 1.0
        return relative * belief.resampled(density.astype(np.float32), to_pixel), shown


# Density of the model's headings at the right one, relative to a uniform one.
_PEAK = math.sqrt(2.0 * math.pi * _CONCENTRATION)


def _runs(values: Array) -> tuple[NDArray[np.intp], list[int]]:
    """Return where runs of values with the same nearest integer begin, and these integers."""
    nearest = np.round(values).astype(int)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(nearest) != 0]))
    return starts, nearest[starts].tolist()
