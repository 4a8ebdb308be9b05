"""How sure a mean of measurements along a drive is, where neighbours are alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Consecutive frames show the same street: they are drawn together.
_STRETCH = 10
_DRAWS = 2000
# Fewer measurements are too few stretches: the bootstrap would be sure of anything.
LEAST = 60
# How sure evidence must be.
SURE = 0.95


def bootstrap_means(differences: Array, seed: int = 0) -> Array:
    """Means of resampled stretches of ten consecutive ``differences`` (N,), which may hold not-a-numbers."""
    count = max(1, len(differences) // _STRETCH)
    stretches = np.array_split(differences, count)
    sums = np.array([np.nansum(s) for s in stretches])
    counts = np.array([np.isfinite(s).sum() for s in stretches])
    drawn = np.random.default_rng(seed).integers(0, count, (_DRAWS, count))
    return np.asarray(sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1), np.float64)
