"""Fit a model's calibration, so that its covariances are honest, on frames whose true positions are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xview_loc.errors import UserError
from xview_loc.estimation.heat_map import HeatMap, winning_mode
from xview_loc.models.base import CALIBRATION_BOUNDS, Calibration
from xview_loc.statistics import coverage, mahalanobis

Array = NDArray[np.float64]

# Share of the true positions that the 95 % ellipse is fitted to hold.
COVERAGE = 0.95
# Share of the frames that are less confident than ``min_confidence``.
_LEAST_CONFIDENT = 0.01
# Fewer frames say too little about the one in twenty that lies outside.
MIN_FRAMES = 200
_CONTRASTS = (0.1, 1000.0)
_STEPS = 30
# Pixels this much less likely than the best one (nats) are dropped: they add nothing, even when flattened.
_DEPTH = 30.0


class CalibrationError(UserError):
    """The frames do not allow a calibration; the message is one clear line."""


@dataclass(frozen=True, eq=False)
class CalibrationFrame:
    """What the fit needs of an uncalibrated heat map, at most 6 bytes a pixel.

    logits: of the likelier pixels, relative to the largest. pixels: their flat indices. width: of the map.
    to_metres: affine map (2, 3) from (row, col, 1) to metres (east, north) from the peak. contrast: of the
    map. truth: true position, metres (east, north) from the peak.
    """

    logits: NDArray[np.float16]
    pixels: NDArray[np.int32]
    width: int
    to_metres: Array
    contrast: float
    truth: Array

    @classmethod
    def of(cls, heat_map: HeatMap, truth: tuple[float, float]) -> CalibrationFrame:
        """Reduce a heat map; ``truth`` is the camera's true (lat, lon), degrees."""
        peak = np.array(heat_map.to_enu(*heat_map.peak))
        corner, down, right = (np.array(heat_map.to_enu(*place)) for place in ((0, 0), (1, 0), (0, 1)))
        pixels = np.flatnonzero(heat_map.probability)
        logits = np.log(heat_map.probability.ravel()[pixels])
        logits -= logits.max()
        kept = logits > -_DEPTH
        return cls(
            logits[kept].astype(np.float16),
            pixels[kept].astype(np.int32),
            heat_map.probability.shape[1],
            np.stack([down - corner, right - corner, corner - peak], 1),
            heat_map.contrast,
            np.array(heat_map.to_enu(*heat_map.from_latlon(*truth))) - peak,
        )

    def covariance(self, calibration: Calibration) -> Array:
        """Return the calibrated map's covariance (2, 2) without a floor, m^2, as HeatMap.covariance does."""
        weight = self._weight(calibration)
        rows, cols = np.divmod(self.pixels, self.width)
        offsets = self.to_metres @ np.stack([rows, cols, np.ones_like(rows)])
        within_pixel = (self.to_metres[:, :2] ** 2).sum() / 2.0 / 12.0
        return np.asarray((offsets * weight) @ offsets.T / weight.sum() + within_pixel * np.eye(2), float)

    def confidence(self, calibration: Calibration) -> float:
        """Return the calibrated map's confidence, as HeatMap.confidence does."""
        weight = self._weight(calibration)
        probability = np.zeros((int(self.pixels.max()) // self.width + 1, self.width), np.float32)
        probability.flat[self.pixels] = weight / weight.sum()
        mode = winning_mode(probability, float(np.hypot(*self.to_metres[:, 0])))
        return float(probability[mode].sum(dtype=np.float64))

    def _weight(self, calibration: Calibration) -> NDArray[np.float32]:
        """Return the probabilities of the pixels, not normalised."""
        return np.exp(self.logits.astype(np.float32) / calibration.temperature(self.contrast))


def fit_calibration(frames: Sequence[CalibrationFrame]) -> Calibration:
    """Fit a calibration to the heat maps of an uncalibrated model.

    The contrast makes the 95 % ellipse hold 95 % of the true positions. The floor is the error of the most
    certain tenth of the estimates: standard deviation on each axis, from their median. 99 % of the frames
    reach the least confidence. Raises CalibrationError with fewer than 200 frames, or if no contrast reaches
    that coverage.
    """
    if len(frames) < MIN_FRAMES:
        raise CalibrationError(f"{len(frames)} frames are too few to calibrate with, {MIN_FRAMES} are needed")
    low, high = (math.log(contrast) for contrast in _CONTRASTS)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found, share = _with_contrast(frames, math.exp(middle))
        # A larger contrast makes flatter maps and larger ellipses.
        low, high = (middle, high) if share < COVERAGE else (low, middle)
    if not abs(share - COVERAGE) < 0.02:
        raise CalibrationError(
            f"no calibration makes the 95 % ellipse hold 95 % of the true positions (it held {share:.0%}): "
            "check the positions, and that the model is trained"
        )
    confidences = [frame.confidence(found) for frame in frames]
    return replace(found, min_confidence=float(np.quantile(confidences, _LEAST_CONFIDENT)))


def _with_contrast(frames: Sequence[CalibrationFrame], contrast: float) -> tuple[Calibration, float]:
    """Return the calibration with this contrast and its floor, and the share inside its 95 % ellipse."""
    calibration = Calibration(contrast, 0.0)
    covariances = np.array([frame.covariance(calibration) for frame in frames])
    truths = np.array([frame.truth for frame in frames])
    most_certain = np.argsort(np.trace(covariances, axis1=1, axis2=2))[: len(frames) // 10]
    # The median distance of a normal distribution in the plane is 1.177 standard deviations of an axis.
    floor = float(np.median(np.hypot(*truths[most_certain].T))) / math.sqrt(2.0 * math.log(2.0))
    floor = min(floor, CALIBRATION_BOUNDS["floor_m"][1])
    covariances += floor**2 * np.eye(2)
    distances = np.array([mahalanobis(*pair) for pair in zip(truths, covariances, strict=True)])
    return Calibration(contrast, floor), coverage(distances, COVERAGE)
