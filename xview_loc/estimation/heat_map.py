"""Turn a model's finest map into a position: probabilities, sub-pixel peak, winning mode, covariance.

(row, col) are pixel centres of the heat map unless stated otherwise; its grid and tile convert them to metres
and degrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.maps.base import AerialTile
from xview_loc.models.base import Calibration, HeatMapGrid

# Ripples finer than this do not split a mode: standard deviation of the smoothing Gaussian, metres.
MODE_SMOOTHING_M = 0.5
UNCALIBRATED = Calibration()
LN_10 = math.log(10.0)


class HeatMapError(ValueError):
    """A heat map gives no position; the message is one clear line."""


@dataclass(frozen=True)
class SearchDisc:
    """Disc that the search is limited to: centre in degrees, radius in metres."""

    lat: float
    lon: float
    radius_m: float


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Probability of the camera's position on an aerial tile.

    probability: float32 (H, W), sums to 1, zero outside ``search``. grid: where the map lies on the tile.
    search: disc that it is limited to, or None. searched: number of pixels in the disc. contrast: largest
    logit in the disc minus the mean of all logits. log_share: decimal logarithm of the disc's share of the
    probability on the whole map; 0 if the disc has the map's maximum.

    The position is the sub-pixel maximum. The *winning mode* is the maximum's basin of attraction: all pixels
    from which climbing to the highest of the eight neighbours, on the map smoothed by ``MODE_SMOOTHING_M``,
    leads to the same summit as from the maximum. Other summits and their slopes are other modes.
    """

    probability: NDArray[np.float32]
    grid: HeatMapGrid
    tile: AerialTile
    search: SearchDisc | None
    searched: int
    contrast: float
    log_share: float = 0.0

    @classmethod
    def from_logits(
        cls,
        logits: NDArray[Any],
        grid: HeatMapGrid,
        tile: AerialTile,
        search: SearchDisc | None = None,
        calibration: Calibration = UNCALIBRATED,
    ) -> HeatMap:
        """Return the calibrated softmax of ``logits`` (H, W) over the search disc, or over the whole map.

        Raises HeatMapError if a logit is not finite, or no pixel lies in the disc.
        """
        values = np.array(logits, np.float32)
        if not np.isfinite(values).all():
            raise HeatMapError("the heat map has values that are not finite")
        mean = float(values.mean(dtype=np.float64))
        searched, log_share = values.size, 0.0
        if search is not None:
            rows, cols = np.ogrid[: values.shape[0], : values.shape[1]]
            inside = _distance(rows, cols, grid, tile, search) <= search.radius_m
            searched = int(np.count_nonzero(inside))
            if not searched:
                raise HeatMapError("the search disc does not touch the heat map")
            within, largest = values[inside], float(values.max())
            if within.max() < largest:
                temperature = calibration.temperature(largest - mean)
                disc, whole = _log_sum_exp(within / temperature), _log_sum_exp(values / temperature)
                log_share = (disc - whole) / LN_10
            values[~inside] = -np.inf
        contrast = float(values.max()) - mean
        values -= values.max()
        values /= calibration.temperature(contrast)
        np.exp(values, out=values)
        values /= values.sum(dtype=np.float64)
        return cls(values, grid, tile, search, searched, contrast, log_share)

    @property
    def metres_per_pixel(self) -> float:
        """Side of a heat-map pixel, metres."""
        return self.grid.scale * self.tile.gsd

    @cached_property
    def peak_pixel(self) -> tuple[int, int]:
        """(row, col) of the largest probability; the first of several."""
        row, col = np.unravel_index(int(self.probability.argmax()), self.probability.shape)
        return int(row), int(col)

    @cached_property
    def peak(self) -> tuple[float, float]:
        """Sub-pixel (row, col) of the maximum: summit of a parabola through its 3x3 neighbourhood.

        The parabola is fitted to log-probabilities, so the peak of a Gaussian is exact. The summit stays
        within half a pixel of the largest pixel. An axis along which the map or the search disc ends next to
        that pixel is not refined.
        """
        row, col = self.peak_pixel
        around = np.pad(self.probability, 1)[row : row + 3, col : col + 3]
        down, right = _summit(around.astype(np.float64))
        return row + down, col + right

    @cached_property
    def relative(self) -> NDArray[np.float32]:
        """Probability (H, W) relative to a uniform map's; 1 outside the disc, of which nothing is known."""
        relative = self.probability * np.float32(self.searched)
        if self.search is not None:
            rows, cols = np.ogrid[: relative.shape[0], : relative.shape[1]]
            outside = _distance(rows, cols, self.grid, self.tile, self.search) > self.search.radius_m
            relative[outside] = 1.0
        return relative

    @cached_property
    def mode(self) -> NDArray[np.bool_]:
        """Mask (H, W) of the winning mode."""
        return winning_mode(self.probability, self.metres_per_pixel)

    def likely(self, share: float, at_most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and columns of the likeliest cells, in order, that hold ``share`` of the mass."""
        flat = self.probability.ravel()
        order = np.argsort(-flat, kind="stable")[:at_most]
        count = int(np.searchsorted(np.cumsum(flat[order], dtype=np.float64), share)) + 1
        rows, cols = np.unravel_index(order[:count], self.probability.shape)
        return rows, cols

    @cached_property
    def confidence(self) -> float:
        """Probability of the winning mode, 0..1."""
        return min(1.0, float(self.probability[self.mode].sum(dtype=np.float64)))

    def covariance(self, floor_m: float = 0.0) -> NDArray[np.float64]:
        """Return the covariance (2, 2) in ENU axes, m^2: second moment about the peak + floor^2 I.

        The moment is the whole map's, so that other modes make it large, plus the variance within a pixel.
        """
        peak_row, peak_col = self.peak
        # Moments in pixels first, then to metres by the same linear map as every offset between pixels.
        weight = self.probability.astype(np.float64)
        down, right = np.arange(weight.shape[0]) - peak_row, np.arange(weight.shape[1]) - peak_col
        cross = down @ weight @ right
        pixels = np.array([[weight.sum(1) @ down**2, cross], [cross, weight.sum(0) @ right**2]])
        corner, one_down, one_right = (np.array(self.to_enu(*place)) for place in ((0, 0), (1, 0), (0, 1)))
        to_metres = np.stack([one_down - corner, one_right - corner], 1)
        moment = to_metres @ pixels @ to_metres.T / weight.sum()
        return moment + (floor_m**2 + self.metres_per_pixel**2 / 12.0) * np.eye(2)

    @property
    def entropy(self) -> float:
        """Shannon entropy in nats: 0 for a single pixel, log(pixels) for a flat map."""
        values = self.probability[self.probability > 0.0].astype(np.float64)
        return float(-(values * np.log(values)).sum())

    @cached_property
    def at_border(self) -> bool:
        """True if the maximum lies on the edge of disc or map: the true position may then be outside."""
        row, col = self.peak_pixel
        height, width = self.probability.shape
        if row in (0, height - 1) or col in (0, width - 1):
            return True
        if self.search is None:
            return False
        rows, cols = np.mgrid[row - 1 : row + 2, col - 1 : col + 2]
        distance = _distance(rows, cols, self.grid, self.tile, self.search)
        return bool((distance > self.search.radius_m).any())

    def log_share_of(self, disc: SearchDisc) -> float:
        """Return the decimal logarithm of a disc's share of the probability, of a map without search disc."""
        rows, cols = np.ogrid[: self.probability.shape[0], : self.probability.shape[1]]
        inside = _distance(rows, cols, self.grid, self.tile, disc) <= disc.radius_m
        share = float(self.probability[inside].sum(dtype=np.float64))
        return math.log10(share) if share > 0.0 else -math.inf

    def to_tile(self, row: Any, col: Any) -> tuple[Any, Any]:
        """Convert to (row, col) on the aerial tile."""
        return self.grid.origin[0] + self.grid.scale * row, self.grid.origin[1] + self.grid.scale * col

    def to_enu(self, row: Any, col: Any) -> tuple[Any, Any]:
        """Convert to (east, north), metres from the tile's centre."""
        return self.tile.pixel_to_enu(*self.to_tile(row, col))

    def to_latlon(self, row: Any, col: Any) -> tuple[Any, Any]:
        """Convert to (lat, lon), degrees."""
        return self.tile.pixel_to_latlon(*self.to_tile(row, col))

    def from_latlon(self, lat: Any, lon: Any) -> tuple[Any, Any]:
        """Convert degrees to (row, col), which may lie off the map."""
        return _from_latlon(self.grid, self.tile, lat, lon)


@dataclass(frozen=True, eq=False)
class TileScores:
    """A model's scores of the places on a tile: logits (H, W), as of :meth:`HeatMap.from_logits`.

    cos, sin (H, W): the heading of the image's centre column there (ENU); None if it was known.
    """

    logits: NDArray[np.float32]
    grid: HeatMapGrid
    tile: AerialTile
    cos: NDArray[np.float32] | None = None
    sin: NDArray[np.float32] | None = None


def joint_heat_maps(scores: Sequence[TileScores], calibration: Calibration = UNCALIBRATED) -> list[HeatMap]:
    """Return heat maps of one image on several tiles; their probabilities sum to 1 together.

    Raises HeatMapError if a logit is not finite.
    """
    values = np.stack([one.logits for one in scores]).astype(np.float32)
    if not np.isfinite(values).all():
        raise HeatMapError("the heat map has values that are not finite")
    contrast = float(values.max()) - float(values.mean(dtype=np.float64))
    values = np.exp((values - values.max()) / calibration.temperature(contrast))
    values /= values.sum(dtype=np.float64)
    return [
        HeatMap(value, one.grid, one.tile, None, values.size, contrast)
        for value, one in zip(values, scores, strict=True)
    ]


def winning_mode(probability: NDArray[np.float32], metres_per_pixel: float) -> NDArray[np.bool_]:
    """Return the mask (H, W) of the winning mode, as of :class:`HeatMap`."""
    possible = probability > 0.0
    # The search disc's bounding box is enough.
    rows, cols = _extent(possible, axis=0), _extent(possible, axis=1)
    sigma = MODE_SMOOTHING_M / metres_per_pixel
    smooth = np.asarray(
        cv2.GaussianBlur(probability[rows, cols], (0, 0), sigma, borderType=cv2.BORDER_CONSTANT), np.float32
    )
    # Smoothing must not extend the mode beyond the disc.
    smooth[~possible[rows, cols]] = 0.0
    summits = _summits(smooth)
    mode = np.zeros_like(possible)
    mode[rows, cols] = summits == summits.flat[int(probability[rows, cols].argmax())]
    return mode & possible


def room_around(shape: tuple[int, int], grid: HeatMapGrid, tile: AerialTile, lat: float, lon: float) -> float:
    """Return the distance from a position to the nearest edge of a heat map, metres; negative outside."""
    row, col = _from_latlon(grid, tile, lat, lon)
    height, width = shape
    pixels = min(row + 0.5, height - 0.5 - row, col + 0.5, width - 0.5 - col)
    return float(pixels * grid.scale * tile.gsd)


def _from_latlon(grid: HeatMapGrid, tile: AerialTile, lat: Any, lon: Any) -> tuple[Any, Any]:
    row, col = tile.latlon_to_pixel(lat, lon)
    return (row - grid.origin[0]) / grid.scale, (col - grid.origin[1]) / grid.scale


def _log_sum_exp(values: NDArray[np.float32]) -> float:
    largest = values.max()
    return float(largest) + math.log(np.exp(values - largest).sum(dtype=np.float64))


def _distance(
    rows: NDArray[Any], cols: NDArray[Any], grid: HeatMapGrid, tile: AerialTile, search: SearchDisc
) -> NDArray[np.float64]:
    """Return the distances of heat-map pixels from the disc's centre, metres."""
    row, col = _from_latlon(grid, tile, search.lat, search.lon)
    # np.hypot would take three times as long on a whole map.
    return np.asarray(np.sqrt((rows - row) ** 2 + (cols - col) ** 2) * (grid.scale * tile.gsd))


def _summit(around: NDArray[np.float64]) -> tuple[float, float]:
    """Return the offset (row, col), within +-0.5, of the summit of a log-parabola through 3x3 pixels."""
    with np.errstate(divide="ignore"):
        log = np.log(around)
    gradient, curvature = np.zeros(2), -np.eye(2)
    for axis, (before, here, after) in enumerate((log[:, 1], log[1])):
        if np.isfinite([before, after]).all():
            gradient[axis] = (after - before) / 2.0
            curvature[axis, axis] = after - 2.0 * here + before
    if np.isfinite(log).all():
        curvature[0, 1] = curvature[1, 0] = (log[2, 2] - log[2, 0] - log[0, 2] + log[0, 0]) / 4.0
    diagonal = curvature.diagonal()
    if curvature[0, 0] < 0.0 and np.linalg.det(curvature) > 0.0:
        offset = -np.linalg.solve(curvature, gradient)
    else:
        # Flat or saddle-shaped: refine each axis by itself, if it bends down.
        offset = np.where(diagonal < 0.0, -gradient / np.where(diagonal < 0.0, diagonal, -1.0), 0.0)
    down, right = np.clip(offset, -0.5, 0.5)
    return float(down), float(right)


def _extent(used: NDArray[np.bool_], axis: int) -> slice:
    """Return the range of rows (axis 0) or columns (axis 1) with a true element."""
    indices = np.flatnonzero(used.any(axis=1 - axis))
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _summits(heights: NDArray[np.float32]) -> NDArray[np.integer]:
    """Return for each pixel the flat index of the summit that steepest ascent leads to."""
    rows, cols = heights.shape
    padded = np.full((rows + 2, cols + 2), -1.0, np.float32)
    padded[1:-1, 1:-1] = heights
    best = heights
    step = np.zeros((rows, cols), np.int32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            stride = down * cols + right
            if stride == 0:
                continue
            neighbour = padded[1 + down : 1 + down + rows, 1 + right : 1 + right + cols]
            # On a plateau only towards the lower index, so that no path runs in circles.
            higher = neighbour > best if stride > 0 else neighbour >= best
            best = np.maximum(best, neighbour)
            step = np.where(higher, np.int32(stride), step)
    target = np.arange(rows * cols) + step.ravel()
    # Each round doubles the length of the paths followed.
    while not np.array_equal(further := target.take(target), target):
        target = further
    return target.reshape(rows, cols)
