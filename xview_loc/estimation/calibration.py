"""Fits what makes a model's probabilities and covariances honest, on frames whose true places are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.errors import UserError
from xview_loc.estimation.heat_map import HeatMap
from xview_loc.models.base import Calibration

Array = NDArray[np.float64]

# What share of the truths the 95 % ellipse is made to hold.
COVERAGE = 0.95
# Fewer frames say too little about the one in twenty that lies outside.
LEAST_FRAMES = 200
_CONTRASTS = (0.1, 1000.0)
_STEPS = 30
# Pixels that much less likely (nats) than the best one say nothing; maps that are flattened have hardly any.
_DEPTH = 30.0


class CalibrationError(UserError):
    """The frames cannot calibrate anything; the message is one clear line."""


@dataclass(frozen=True, eq=False)
class CalibrationFrame:
    """What is kept of an uncalibrated heat map, 6 bytes a pixel at most.

    Its likelier pixels' logits below the largest, their indices, the affine map (2, 3) from (row, col, 1) to
    metres (east, north) from the peak, and the true place's metres from the peak.
    """

    logits: NDArray[np.float16]
    pixels: NDArray[np.int32]
    width: int
    to_metres: Array
    contrast: float
    truth: Array

    @classmethod
    def of(cls, heat_map: HeatMap, truth: tuple[float, float]) -> CalibrationFrame:
        """``truth``: the camera's true (lat, lon), degrees."""
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

    def moment(self, calibration: Calibration) -> Array:
        """The map's covariance without a floor, as :meth:`HeatMap.covariance` gives it, m^2."""
        weight = np.exp(self.logits.astype(np.float32) / calibration.temperature(self.contrast))
        rows, cols = np.divmod(self.pixels, self.width)
        offsets = self.to_metres @ np.stack([rows, cols, np.ones_like(rows)])
        own = (self.to_metres[:, :2] ** 2).sum() / 2.0 / 12.0
        return np.asarray((offsets * weight) @ offsets.T / weight.sum() + own * np.eye(2), float)


def mahalanobis(offset: Array, covariance: Array) -> float:
    """Length of ``offset`` (2,) in standard deviations of a 2x2 ``covariance``."""
    return math.sqrt(float(offset @ np.linalg.solve(covariance, offset)))


def coverage(distances: Array, probability: float) -> float:
    """Share of Mahalanobis distances within the plane's normal ellipse of that probability."""
    # The squared distance of a normal distribution in the plane is exponentially distributed.
    return float((distances**2 <= -2.0 * math.log(1.0 - probability)).mean())


def fit_calibration(frames: Sequence[CalibrationFrame]) -> Calibration:
    """From the heat maps of an uncalibrated model and the true places of their cameras.

    The contrast is the one with which the 95 % ellipse holds 95 % of the truths; the floor is how far the
    tenth of the estimates that are surest of themselves lies off (standard deviation on each axis, from
    their median). Raises CalibrationError on fewer than 200 frames, and where no contrast does it.
    """
    if len(frames) < LEAST_FRAMES:
        raise CalibrationError(
            f"{len(frames)} frames are too few to calibrate with, {LEAST_FRAMES} are needed"
        )
    low, high = (math.log(contrast) for contrast in _CONTRASTS)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found, share = _with_contrast(frames, math.exp(middle))
        # A larger contrast makes flatter maps and larger ellipses.
        low, high = (middle, high) if share < COVERAGE else (low, middle)
    if not abs(share - COVERAGE) < 0.02:
        raise CalibrationError(
            f"no calibration makes the 95 % ellipse hold 95 % of the truths (it held {share:.0%}): "
            "are these the true places, and is the model trained?"
        )
    return found


def _with_contrast(frames: Sequence[CalibrationFrame], contrast: float) -> tuple[Calibration, float]:
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
