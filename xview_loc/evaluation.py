"""How far estimates lie from the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection
from xview_loc.localizer import LocalizationError, Localizer, Observation

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DriveErrors:
    """One localised drive: distances from the truth in metres, one for each frame.

    ``estimate`` is not-a-number where the localizer refused the frame.
    """

    fix: Array
    estimate: Array

    @classmethod
    def joined(cls, drives: Iterable[DriveErrors]) -> DriveErrors:
        """All frames of several drives."""
        parts = list(drives)
        return cls(np.concatenate([p.fix for p in parts]), np.concatenate([p.estimate for p in parts]))


@dataclass(frozen=True)
class Errors:
    """Mean, median and 95th percentile of distances in metres, over ``frames`` of them."""

    frames: int
    mean: float
    median: float
    p95: float

    @classmethod
    def of(cls, distances: Array) -> Errors:
        """Over the finite ones; all not-a-number where there is none."""
        finite = distances[np.isfinite(distances)]
        if not len(finite):
            return cls(0, math.nan, math.nan, math.nan)
        median, p95 = np.percentile(finite, [50, 95])
        return cls(len(finite), float(finite.mean()), float(median), float(p95))


def distance_m(lat: float, lon: float, true_lat: float, true_lon: float) -> float:
    """Metres between two places a few kilometres apart at most, degrees."""
    return math.hypot(*LocalProjection(true_lat, true_lon).forward(lat, lon))


def localize_drive(
    localizer: Localizer, frames: Iterable[tuple[Observation, tuple[float, float]]]
) -> DriveErrors:
    """Localise each observation by itself and compare with its true (lat, lon).

    A frame that the localizer refuses stays in the figures as not-a-number.
    """
    fix, estimate = [], []
    for observation, (lat, lon) in frames:
        fix.append(distance_m(observation.lat, observation.lon, lat, lon))
        try:
            pose = localizer.localize(observation)
        except LocalizationError:
            estimate.append(math.nan)
        else:
            estimate.append(distance_m(pose.lat, pose.lon, lat, lon))
    return DriveErrors(np.array(fix), np.array(estimate))
