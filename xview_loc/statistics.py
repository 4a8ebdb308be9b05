"""Statistics of position errors, angles, and paired measurements along a drive."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Fewer measurements hold too few stretches for the bootstrap, which would then be certain of anything.
MIN_MEASUREMENTS = 60
# Certainty from which a difference counts as significant.
SIGNIFICANT = 0.95
# Consecutive frames show the same street, so they are resampled together.
_STRETCH = 10
_DRAWS = 2000


def mahalanobis(offset: Array, covariance: Array) -> float:
    """Return the length of ``offset`` (2,) in standard deviations of ``covariance`` (2, 2)."""
    return math.sqrt(float(offset @ np.linalg.solve(covariance, offset)))


def coverage(distances: Array, probability: float) -> float:
    """Return the share of Mahalanobis ``distances`` inside the ellipse that should hold ``probability``."""
    # The squared distance of a normal distribution in the plane is exponentially distributed.
    return float((distances**2 <= -2.0 * math.log(1.0 - probability)).mean())


def coverage_of_axis(deviations: Array, probability: float) -> float:
    """Return the share of ``deviations``, in sigma, in the interval that should hold ``probability``."""
    return float((np.abs(deviations) <= NormalDist().inv_cdf((1.0 + probability) / 2.0)).mean())


def wrapped_variance(resultant: float) -> float:
    """Return the variance (rad^2) of the wrapped normal distribution with this mean resultant (0..1)."""
    return -2.0 * math.log(max(resultant, 1e-12))


def bootstrap_means(differences: Array, seed: int = 0) -> Array:
    """Return means of resampled stretches of ten consecutive ``differences`` (N,), ignoring NaN."""
    count = max(1, len(differences) // _STRETCH)
    stretches = np.array_split(differences, count)
    sums = np.array([np.nansum(s) for s in stretches])
    counts = np.array([np.isfinite(s).sum() for s in stretches])
    drawn = np.random.default_rng(seed).integers(0, count, (_DRAWS, count))
    return np.asarray(sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1), np.float64)


def certainty_of_decrease(differences: Array) -> float:
    """Return how certain it is (0..1) that the mean of ``differences`` (N,) is below zero."""
    return float((bootstrap_means(differences) < 0).mean())
