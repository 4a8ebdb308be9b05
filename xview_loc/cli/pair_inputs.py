"""Options on pairs that several commands share: headings and true positions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from xview_loc.cli.console import UsageError, console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xview_loc.datasets.base import PairSource


def heading_prior(text: str) -> float | None:
    """Return the heading prior, degrees, that ``known``, ``unknown`` or a number means; None: unknown."""
    if text in ("known", "unknown"):
        return 0.0 if text == "known" else None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 180:
        raise UsageError(f"--heading must be known, unknown or 0 to 180 degrees, not {text!r}")
    return value


def true_positions(
    source: PairSource, truth: Path | None, topic: str | None, verbose: bool
) -> NDArray[np.float64] | None:
    """Metres (N, 2) east and north from the coarse fixes; None without ground truth."""
    from xview_loc.datasets.base import PoseDataset, true_from_fix
    from xview_loc.recordings.tracks import read_timed_track

    if isinstance(source, PoseDataset):
        if truth is not None:
            raise UsageError(f"{source.name} has its own true positions: leave out {truth}")
        return source.true_from_fix()
    if truth is None:
        return None
    track = source.track()
    assert track is not None
    positions = true_from_fix(track, *read_timed_track(truth, topic).at(track.stamp_ns))
    known = int(sum(map(math.isfinite, positions[:, 0])))
    if not known:
        raise UsageError(f"{truth} has no position at the time of any pair")
    if verbose:
        console.print(f"true positions known for {known} of {len(positions)} pairs", soft_wrap=True)
    return positions
