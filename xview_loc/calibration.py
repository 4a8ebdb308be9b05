"""Fits what makes a model's probabilities and covariances honest, on frames whose true places are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.errors import UserError
from xview_loc.heatmap import HeatMap
from xview_loc.models.base import Calibration

Array = NDArray[np.float64]

# What share of the truths the 95 % ellipse is made to hold.
COVERAGE = 0.95
# Fewer frames say too little about the one in twenty that lies outside.
LEAST_FRAMES = 200
_CONTRASTS = (0.1, 1000.0)
_STEPS = 30
# Pixels that much less likely (nats) than the best one say nothing at any temperature in use.
_DEPTH = 60.0


class CalibrationError(UserError):
    """The frames cannot calibrate anything; the message is one clear line."""


@dataclass(frozen=True, eq=False)
class _Frame:
    """Of an uncalibrated map: pixels' logits below the largest and their (east, north) from the peak, metres,
    the map's contrast, and the truth from the peak.
    """

    logits: NDArray[np.float32]
    offsets: NDArray[np.float32]
    contrast: float
    truth: Array

    @classmethod
    def of(cls, heat_map: HeatMap, truth: tuple[float, float]) -> _Frame:
        rows, cols = np.nonzero(heat_map.probability)
        logits = np.log(heat_map.probability[rows, cols])
        logits -= logits.max()
        kept = logits > -_DEPTH
        peak = np.array(heat_map.to_enu(*heat_map.peak))
        offsets = np.stack(heat_map.to_enu(rows[kept], cols[kept]), 1) - peak
        place = heat_map.to_enu(*heat_map.from_latlon(*truth))
        return cls(logits[kept], offsets.astype(np.float32), heat_map.contrast, np.array(place) - peak)

    def moment(self, calibration: Calibration) -> Array:
        """The map's second moment about its peak, m^2."""
        weight = np.exp(self.logits / calibration.temperature(self.contrast))
        return np.asarray((self.offsets.T * weight) @ self.offsets / weight.sum(), float)


def mahalanobis(offset: Array, covariance: Array) -> float:
    """Length of ``offset`` (2,) in standard deviations of a 2x2 ``covariance``."""
    return math.sqrt(float(offset @ np.linalg.solve(covariance, offset)))


def coverage(distances: Array, probability: float) -> float:
    """Share of Mahalanobis distances within the plane's normal ellipse of that probability."""
    # The squared distance of a normal distribution in the plane is exponentially distributed.
    return float((distances**2 <= -2.0 * math.log(1.0 - probability)).mean())


def fit_calibration(frames: Iterable[tuple[HeatMap, tuple[float, float]]]) -> Calibration:
    """From the heat maps of an uncalibrated model and the true (lat, lon) of their cameras.

    The contrast is the one with which the 95 % ellipse holds 95 % of the truths; the floor is how far the
    tenth of the estimates that are surest of themselves lies off (standard deviation on each axis, from
    their median). Raises CalibrationError on fewer than 200 frames, and where no contrast does it.
    """
    kept = [_Frame.of(heat_map, truth) for heat_map, truth in frames]
    if len(kept) < LEAST_FRAMES:
        raise CalibrationError(f"{len(kept)} frames are too few to calibrate with, {LEAST_FRAMES} are needed")
    low, high = (math.log(contrast) for contrast in _CONTRASTS)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found, share = _with_contrast(kept, math.exp(middle))
        # A larger contrast makes flatter maps and larger ellipses.
        low, high = (middle, high) if share < COVERAGE else (low, middle)
    if not abs(share - COVERAGE) < 0.02:
        raise CalibrationError(
            f"no calibration makes the 95 % ellipse hold 95 % of the truths, the nearest {share:.0%}: "
            "are these the true places?"
        )
    return found


def _with_contrast(frames: Sequence[_Frame], contrast: float) -> tuple[Calibration, float]:
    """The calibration with this contrast, its floor included, and the share in its 95 % ellipse."""
    calibration = Calibration(contrast, 0.0)
    moments = np.array([frame.moment(calibration) for frame in frames])
    truths = np.array([frame.truth for frame in frames])
    surest = np.argsort(np.trace(moments, axis1=1, axis2=2))[: len(frames) // 10]
    # The median of a plane's normal distribution lies at 1.177 standard deviations of an axis.
    floor = float(np.median(np.hypot(*truths[surest].T))) / math.sqrt(2.0 * math.log(2.0))
    covariances = moments + floor**2 * np.eye(2)
    distances = np.array([mahalanobis(*pair) for pair in zip(truths, covariances, strict=True)])
    return Calibration(contrast, floor), coverage(distances, COVERAGE)
