"""Beliefs over time: probabilities of a position on a metric grid that moves along, and of a heading."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection
from xview_loc.statistics import wrapped_variance

Array = NDArray[np.float64]
Grid = NDArray[np.float32]

_ANGLES = 120
_ANGLE_STEP = 2.0 * math.pi / _ANGLES


class BeliefGrid:
    """Probabilities (n, n) of square cells in a plane; rows grow with y, columns with x.

    corner: centre (x, y) of cell (0, 0), metres. cell_m: side of a cell, metres. Motion moves the corner, not
    the probabilities, so that interpolation blurs nothing; uncertainty of the motion spreads them.
    """

    def __init__(self, probability: Grid, corner: Array, cell_m: float) -> None:
        self.probability = probability
        self.corner = corner
        self.cell_m = cell_m

    @classmethod
    def normal(cls, mean: Array, covariance: Array, cells: int = 256, cell_m: float = 0.5) -> BeliefGrid:
        """Return a normal distribution on a grid centred on its mean (2,), metres; covariance (2, 2), m^2."""
        corner = mean - (cells - 1) / 2 * cell_m
        belief = cls(np.ones((cells, cells), np.float32), corner, cell_m)
        # At least a cell wide: a narrower one could fall between the cells.
        belief.multiply(belief.normal_likelihood(mean, covariance + cell_m**2 * np.eye(2)))
        return belief

    @property
    def mean(self) -> Array:
        """Mean (x, y), metres."""
        x, y = self.axes
        total = self.probability.sum(dtype=np.float64)
        columns, rows = self.probability.sum(0, dtype=np.float64), self.probability.sum(1, dtype=np.float64)
        return np.array([columns @ x, rows @ y]) / total

    @property
    def covariance(self) -> Array:
        """Covariance (2, 2), m^2."""
        x, y = self.axes
        mean_x, mean_y = self.mean
        p = self.probability.astype(np.float64)
        p /= p.sum()
        dx, dy = x - mean_x, y - mean_y
        cross = dy @ p @ dx
        within_cell = self.cell_m**2 / 12.0
        return np.array([[p.sum(0) @ dx**2 + within_cell, cross], [cross, p.sum(1) @ dy**2 + within_cell]])

    def move(self, displacement: Array, variance: float, corner: Array | None = None) -> None:
        """Move the belief by ``displacement`` (x, y), metres, with ``variance`` on each axis, m^2.

        The grid shifts by whole cells so that the mean stays in the middle, or so that cell (0, 0) is as near
        as possible to ``corner`` if that is given.
        """
        self.corner = self.corner + displacement
        spread = variance / self.cell_m**2
        # A sampled Gaussian has the right variance only if it is wider than a cell; three taps always have.
        if spread > 1.0:
            kernel = cv2.getGaussianKernel(2 * math.ceil(3.0 * math.sqrt(spread)) + 1, math.sqrt(spread))
        else:
            kernel = np.array([spread / 2, 1.0 - spread, spread / 2])
        self.probability = np.asarray(
            cv2.sepFilter2D(self.probability, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT), np.float32
        )
        if corner is None:
            # Only once the mean has left the middle eighth.
            side = len(self.probability)
            away = (self.mean - self.corner) / self.cell_m - (side - 1) / 2
            shift = np.trunc(away) if np.abs(away).max() >= side / 16 else np.zeros(2)
        else:
            shift = ((corner - self.corner) / self.cell_m).round()
        self._shift(*(int(cells) for cells in shift))

    def blend(self, share: float) -> None:
        """Mix in a uniform distribution with weight ``share``; the belief must sum to one."""
        self.probability = (1.0 - np.float32(share)) * self.probability + np.float32(
            share / self.probability.size
        )

    def multiply(self, likelihood: Grid, weight: float = 1.0) -> float:
        """Apply Bayes' rule with ``likelihood`` (n, n) to the power ``weight``.

        Return the evidence: the mean of the likelihood under the belief before.
        """
        total = float(self.probability.sum(dtype=np.float64))
        evidence = float((self.probability * likelihood).sum(dtype=np.float64)) / total
        product = self.probability * likelihood**weight
        self.probability = (product / product.sum(dtype=np.float64)).astype(np.float32)
        return evidence

    def normal_likelihood(self, mean: Array, covariance: Array) -> Grid:
        """Return the likelihood (n, n) of a measured position: a normal distribution, 1 at its ``mean``."""
        x, y = self.axes
        precision = np.linalg.inv(covariance)
        dx, dy = (x - mean[0])[None, :], (y - mean[1])[:, None]
        squared = precision[0, 0] * dx**2 + 2.0 * precision[0, 1] * dx * dy + precision[1, 1] * dy**2
        return np.exp(-0.5 * squared).astype(np.float32)

    def heat_map_likelihood(
        self, heat_map: HeatMap, plane: LocalProjection, offset: tuple[float, float] = (0.0, 0.0)
    ) -> Grid:
        """Return the likelihood (n, n) of a heat map: each cell's probability relative to a uniform map's.

        plane: the grid's plane. offset: (x, y) from the tracked point to the camera, metres. Cells outside
        the map or its search disc get 1: nothing is known of them.
        """
        return self.averages(heat_map.relative, heat_map, plane, offset)

    def averages(
        self,
        pixels: Grid,
        heat_map: HeatMap,
        plane: LocalProjection,
        offset: tuple[float, float] = (0.0, 0.0),
    ) -> Grid:
        """Return the values at the cells (n, n) of an image with the pixels of a heat map; 1 beyond it."""
        # Average areas first if several pixels fall into a cell.
        step = max(1, round(self.cell_m / heat_map.metres_per_pixel))
        height, width = (side // step for side in pixels.shape)
        means = cv2.resize(
            pixels[: height * step, : width * step], (width, height), interpolation=cv2.INTER_AREA
        )
        # The two planes differ by a turn and a scale: over a grid, an affine map is exact to a millimetre.
        cells = np.array([[0, 0], [len(self.probability), 0], [0, len(self.probability)]], float)
        x, y = (self.corner + offset + cells * self.cell_m).T
        row, col = heat_map.from_latlon(*plane.inverse(x, y))
        source = (np.stack([col, row], 1) + 0.5) / step - 0.5
        to_pixel = cv2.getAffineTransform(cells.astype(np.float32), source.astype(np.float32))
        return self.resampled(np.asarray(means, np.float32), np.asarray(to_pixel, np.float64))

    def resampled(self, image: Grid, to_pixel: Array) -> Grid:
        """Return a heat map's values at the cells, interpolated linearly; 1 beyond its edges.

        to_pixel: affine map (2, 3) from a cell's (column, row) to the image's.
        """
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = self.probability.shape[::-1]
        return np.asarray(cv2.warpAffine(image, to_pixel, size, flags=flags, borderValue=1.0), np.float32)

    @property
    def axes(self) -> tuple[Array, Array]:
        """x of the columns and y of the rows, metres."""
        steps = np.arange(len(self.probability)) * self.cell_m
        return self.corner[0] + steps, self.corner[1] + steps

    def _shift(self, right: int, up: int) -> None:
        """Shift the grid by whole cells under the belief; new cells get zero."""
        if right == up == 0:
            return
        shift = np.array([[1, 0, -right], [0, 1, -up]], float)
        self.probability = np.asarray(
            cv2.warpAffine(self.probability, shift, self.probability.shape, flags=cv2.INTER_NEAREST),
            np.float32,
        )
        self.corner = self.corner + np.array([right, up]) * self.cell_m


class HeadingBelief:
    """Probabilities of a heading in cells of three degrees; uniform at first. The circle turns along."""

    def __init__(self) -> None:
        self._probability = np.full(_ANGLES, 1.0 / _ANGLES)
        self._angle = np.arange(_ANGLES) * _ANGLE_STEP

    @property
    def mean(self) -> float:
        """Circular mean, radians."""
        return float(np.angle(self._resultant))

    @property
    def variance(self) -> float:
        """Variance of the wrapped normal distribution with the same resultant, rad^2."""
        return wrapped_variance(abs(self._resultant))

    def turn(self, angle: float, variance: float) -> None:
        """Turn the belief by ``angle``, radians, with ``variance``, rad^2."""
        self._angle = self._angle + angle
        # Diffusion around the circle, exact for any variance.
        order = np.arange(_ANGLES // 2 + 1)
        spectrum = np.fft.rfft(self._probability) * np.exp(-(order**2) * variance / 2.0)
        self._probability = np.maximum(np.fft.irfft(spectrum, _ANGLES), 1e-12)

    def multiply(self, angle: float, variance: float, outlier: float, weight: float) -> None:
        """Apply Bayes' rule with a measured angle, which is random with probability ``outlier``."""
        offset = np.angle(np.exp(1j * (self._angle - angle)))
        peak = math.sqrt(2.0 * math.pi / variance)
        likelihood = (1.0 - outlier) * peak * np.exp(-(offset**2) / (2.0 * variance)) + outlier
        self._probability = self._probability * likelihood**weight
        self._probability /= self._probability.sum()

    @property
    def _resultant(self) -> complex:
        return complex(self._probability @ np.exp(1j * self._angle)) / float(self._probability.sum())
