"""A belief about where something is: probabilities on a metric grid that moves along with it."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection

Array = NDArray[np.float64]
Grid = NDArray[np.float32]


_ANGLES = 120
_ANGLE_STEP = 2.0 * math.pi / _ANGLES


class BeliefGrid:
    """Probabilities (n, n) of square cells in a plane; row and column grow with y and x, metres.

    ``corner`` is the centre (x, y) of cell (0, 0). Driving moves the corner, not the cells, so that nothing
    is lost by interpolation; what is uncertain about the motion spreads the probabilities.
    """

    def __init__(self, probability: Grid, corner: Array, cell_m: float) -> None:
        self.probability = probability
        self.corner = corner
        self.cell_m = cell_m

    @classmethod
    def normal(cls, mean: Array, covariance: Array, cells: int = 256, cell_m: float = 0.5) -> BeliefGrid:
        """A normal distribution (metres, m^2) on a grid centred on its mean."""
        corner = mean - (cells - 1) / 2 * cell_m
        belief = cls(np.ones((cells, cells), np.float32), corner, cell_m)
        # At least a cell wide, or it could fall between the cells.
        belief.multiply(belief.normal_likelihood(mean, covariance + cell_m**2 * np.eye(2)))
        return belief

    @property
    def mean(self) -> Array:
        """(x, y), metres."""
        x, y = self.axes
        total = self.probability.sum(dtype=np.float64)
        columns, rows = self.probability.sum(0, dtype=np.float64), self.probability.sum(1, dtype=np.float64)
        return np.array([columns @ x, rows @ y]) / total

    @property
    def covariance(self) -> Array:
        """2x2 about the mean, m^2."""
        x, y = self.axes
        mean_x, mean_y = self.mean
        p = self.probability.astype(np.float64)
        p /= p.sum()
        dx, dy = x - mean_x, y - mean_y
        cross = dy @ p @ dx
        # Within a cell the place is unknown as well.
        own = self.cell_m**2 / 12.0
        return np.array([[p.sum(0) @ dx**2 + own, cross], [cross, p.sum(1) @ dy**2 + own]])

    def move(self, displacement: Array, variance: float, corner: Array | None = None) -> None:
        """The thing moved by ``displacement`` (x, y) metres, give or take ``variance`` m^2 on each axis.

        The cells move by whole ones so that the mean stays in the middle, or, where ``corner`` is given, so
        that cell (0, 0) comes to the place nearest to it.
        """
        self.corner = self.corner + displacement
        spread = variance / self.cell_m**2
        # A sampled Gaussian has the variance asked for only where it is wider than a cell; three taps always.
        if spread > 1.0:
            kernel = cv2.getGaussianKernel(2 * math.ceil(3.0 * math.sqrt(spread)) + 1, math.sqrt(spread))
        else:
            kernel = np.array([spread / 2, 1.0 - spread, spread / 2])
        self.probability = np.asarray(
            cv2.sepFilter2D(self.probability, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT), np.float32
        )
        if corner is None:
            self._recentre()
        else:
            right, up = ((corner - self.corner) / self.cell_m).round().astype(int)
            self._shift(int(right), int(up))

    def blend(self, share: float) -> None:
        """With this probability the thing is anywhere on the grid; the others add up to one before."""
        self.probability = (1.0 - np.float32(share)) * self.probability + np.float32(
            share / self.probability.size
        )

    def multiply(self, likelihood: Grid, weight: float = 1.0) -> float:
        """Bayes' rule with a likelihood (n, n) to the power ``weight``; the mean likelihood beforehand."""
        total = float(self.probability.sum(dtype=np.float64))
        evidence = float((self.probability * likelihood).sum(dtype=np.float64)) / total
        product = self.probability * likelihood**weight
        self.probability = (product / product.sum(dtype=np.float64)).astype(np.float32)
        return evidence

    def normal_likelihood(self, mean: Array, covariance: Array) -> Grid:
        """Of a measured place (x, y): 1 at it, falling as its normal distribution does."""
        x, y = self.axes
        precision = np.linalg.inv(covariance)
        dx, dy = (x - mean[0])[None, :], (y - mean[1])[:, None]
        squared = precision[0, 0] * dx**2 + 2.0 * precision[0, 1] * dx * dy + precision[1, 1] * dy**2
        return np.exp(-0.5 * squared).astype(np.float32)

    def heat_map_likelihood(
        self, heat_map: HeatMap, plane: LocalProjection, offset: tuple[float, float] = (0.0, 0.0)
    ) -> Grid:
        """Each cell's probability in ``heat_map``, in multiples of what it would be if all were alike.

        ``plane`` is the one that the grid lies in; ``offset`` (x, y) is from the thing to the camera, metres.
        Cells outside the map get 0.
        """
        pixels = heat_map.probability * float(heat_map.searched)
        # Area averages first where several pixels fall into a cell.
        step = max(1, round(self.cell_m / heat_map.metres_per_pixel))
        height, width = (side // step for side in pixels.shape)
        means = cv2.resize(
            pixels[: height * step, : width * step], (width, height), interpolation=cv2.INTER_AREA
        )
        # Between two planes of a place that differ by a turn and a scale, an affine map is exact to a
        # millimetre over a grid.
        cells = np.array([[0, 0], [len(self.probability), 0], [0, len(self.probability)]], float)
        x, y = (self.corner + offset + cells * self.cell_m).T
        row, col = heat_map.from_latlon(*plane.inverse(x, y))
        source = (np.stack([col, row], 1) + 0.5) / step - 0.5
        to_pixel = cv2.getAffineTransform(cells.astype(np.float32), source.astype(np.float32))
        return self.resampled(np.asarray(means, np.float32), np.asarray(to_pixel, np.float64))

    def resampled(self, image: Grid, to_pixel: Array, outside: float = 0.0) -> Grid:
        """An image's values at the cells, linear between its pixels, ``outside`` where it ends.

        ``to_pixel`` (2, 3): the affine map from a cell's (column, row) to the image's.
        """
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = self.probability.shape[::-1]
        return np.asarray(cv2.warpAffine(image, to_pixel, size, flags=flags, borderValue=outside), np.float32)

    @property
    def axes(self) -> tuple[Array, Array]:
        """x of each column and y of each row, metres."""
        steps = np.arange(len(self.probability)) * self.cell_m
        return self.corner[0] + steps, self.corner[1] + steps

    def _recentre(self) -> None:
        """Move the cells by whole ones so that the mean stays in the middle eighth of the grid."""
        side = len(self.probability)
        away = (self.mean - self.corner) / self.cell_m - (side - 1) / 2
        if np.abs(away).max() < side / 16:
            return
        right, up = (math.trunc(x) for x in away)
        self._shift(right, up)

    def _shift(self, right: int, up: int) -> None:
        """The same belief on cells that lie so many further right and up; it is zero on new ones."""
        if right == up == 0:
            return
        shift = np.array([[1, 0, -right], [0, 1, -up]], float)
        self.probability = np.asarray(
            cv2.warpAffine(self.probability, shift, self.probability.shape, flags=cv2.INTER_NEAREST),
            np.float32,
        )
        self.corner = self.corner + np.array([right, up]) * self.cell_m


class HeadingBelief:
    """Probabilities of an angle in cells of three degrees, on a circle that turns along; at first equal."""

    def __init__(self) -> None:
        self._probability = np.full(_ANGLES, 1.0 / _ANGLES)
        self._angle = np.arange(_ANGLES) * _ANGLE_STEP

    @property
    def mean(self) -> float:
        """The circular mean, radians."""
        return float(np.angle(self._resultant))

    @property
    def variance(self) -> float:
        """Of the normal distribution that, wrapped around the circle, has this resultant, rad^2."""
        return -2.0 * math.log(max(abs(self._resultant), 1e-9))

    def turn(self, angle: float, variance: float) -> None:
        """It turned by ``angle`` radians, give or take ``variance`` rad^2."""
        self._angle = self._angle + angle
        # As a diffusion around the circle, exact for any variance.
        order = np.arange(_ANGLES // 2 + 1)
        spectrum = np.fft.rfft(self._probability) * np.exp(-(order**2) * variance / 2.0)
        self._probability = np.maximum(np.fft.irfft(spectrum, _ANGLES), 1e-12)

    def multiply(self, angle: float, variance: float, outlier: float, weight: float) -> None:
        """Bayes' rule with a measured angle that says nothing in a share ``outlier`` of the cases."""
        offset = np.angle(np.exp(1j * (self._angle - angle)))
        peak = math.sqrt(2.0 * math.pi / variance)
        likelihood = (1.0 - outlier) * peak * np.exp(-(offset**2) / (2.0 * variance)) + outlier
        self._probability = self._probability * likelihood**weight
        self._probability /= self._probability.sum()

    @property
    def _resultant(self) -> complex:
        return complex(self._probability @ np.exp(1j * self._angle)) / float(self._probability.sum())
