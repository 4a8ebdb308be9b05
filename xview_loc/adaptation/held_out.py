"""Choose the pairs on which a student is judged: stretches of drives on streets of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from xview_loc.datasets.base import Track
from xview_loc.geodesy import LocalProjection

# Pairs closer than about this show the same street.
_NEAR_M = 25.0
# Candidates for a drive's stretch: one begins every so many of its lengths.
_STEP = 0.25

Cell = tuple[int, int]


def held_out_stretches(track: Track, share: float) -> NDArray[np.int64]:
    """Return the pairs of one stretch of each drive, about ``share`` of its pairs, ascending.

    Of all stretches of a drive, the one is taken that has the fewest pairs near others of any drive: on
    streets that a student was trained on, it seems better than it is. The last of equals.
    """
    cells = _cells(track)
    everywhere = Counter(cells)
    held: list[NDArray[np.int64]] = []
    for number in np.unique(track.drive):
        rows = np.flatnonzero(track.drive == number)
        length = round(len(rows) * share)
        if not length:
            continue
        starts = range(len(rows) - length, -1, -max(1, round(length * _STEP)))
        best = min(starts, key=lambda start: _seen(cells, rows[start : start + length], everywhere))
        held.append(rows[best : best + length])
    return np.concatenate(held) if held else np.zeros(0, np.int64)


def share_near_others(track: Track, held_out: NDArray[np.int64]) -> float:
    """Return the share of held-out pairs near others: a verdict from these is about known streets."""
    cells, held = _cells(track), set(held_out.tolist())
    known = {near for row, cell in enumerate(cells) if row not in held for near in _around(*cell)}
    return sum(cells[row] in known for row in held) / max(1, len(held))


def _cells(track: Track) -> list[Cell]:
    plane = LocalProjection(float(track.lat.mean()), float(track.lon.mean()))
    places = np.stack(plane.forward(track.lat, track.lon), 1)
    return [(int(x), int(y)) for x, y in np.floor(places / _NEAR_M)]


def _seen(cells: list[Cell], rows: Iterable[int], everywhere: Counter[Cell]) -> int:
    """Count the pairs of a stretch that are near others outside it."""
    own = [cells[row] for row in rows]
    inside = Counter(own)
    near = {(x, y): any(everywhere[c] > inside[c] for c in _around(x, y)) for x, y in inside}
    return sum(near[cell] for cell in own)


def _around(x: int, y: int) -> list[Cell]:
    return [(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
