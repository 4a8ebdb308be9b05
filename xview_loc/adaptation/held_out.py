"""Choose the pairs on which a student is judged: the edge of each area, with streets of their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from xview_loc.datasets.base import Track
from xview_loc.geodesy import LocalProjection

# Pairs closer than about this show the same street.
_NEAR_M = 25.0
# Cells of this size, degrees, that touch are one area.
_AREA_DEG = 0.01
# Directions in which an area's edge is looked for.
_DIRECTIONS = 16
# Number of cells between one row of an area's cells and the next: more than an area is wide.
_ROW = 1 << 24

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


def held_out_edges(track: Track, share: float) -> Index:
    """Return the pairs beyond a line through each area, about ``share`` of its pairs, ascending.

    Of 16 directions, the one is taken whose line cuts off the fewest pairs near others: on streets that a
    student was trained on, it seems better than it is. Of areas too small for that, some are held out whole.
    """
    held: list[Index] = []
    small = small_held = 0
    for rows, places in _areas(track):
        count = round(len(rows) * share)
        if not count:
            small += len(rows)
            if small_held + len(rows) / 2 <= small * share:
                small_held += len(rows)
                held.append(rows)
            continue
        angles = np.arange(_DIRECTIONS) * 2.0 * np.pi / _DIRECTIONS
        along = places @ np.stack([np.cos(angles), np.sin(angles)])
        furthest = np.argsort(along, axis=0, kind="stable")[-count:]
        beyond = np.zeros(along.shape, bool)
        np.put_along_axis(beyond, furthest, True, axis=0)
        near = [int(_near_others(places, edge).sum()) for edge in beyond.T]
        held.append(rows[beyond[:, np.argmin(near)]])
    return np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)


def share_near_others(track: Track, held_out: Index) -> float:
    """Return the share of held-out pairs near others: a verdict from these is about known streets."""
    near = 0
    for rows, places in _areas(track):
        near += int(_near_others(places, np.isin(rows, held_out)).sum())
    return near / max(1, len(held_out))


def _areas(track: Track) -> Iterator[tuple[Index, NDArray[np.float64]]]:
    """Yield each area's pairs, and their places (N, 2), metres."""
    degrees = np.stack([track.lat, track.lon], 1)
    cells, member = np.unique(np.floor(degrees / _AREA_DEG).astype(int), axis=0, return_inverse=True)
    cell_of = {(x, y): number for number, (x, y) in enumerate(cells.tolist())}
    area = np.full(len(cells), -1)
    for first in range(len(cells)):
        to_do = [first] if area[first] < 0 else []
        while to_do:
            number = to_do.pop()
            area[number] = first
            x, y = cells[number].tolist()
            around = ((x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1))
            to_do += [cell_of[c] for c in around if c in cell_of and area[cell_of[c]] < 0]
    area_of = area[member.reshape(-1)]
    for number in np.unique(area):
        rows = np.flatnonzero(area_of == number)
        lat, lon = degrees[rows].T
        yield rows, np.stack(LocalProjection(float(lat.mean()), float(lon.mean())).forward(lat, lon), 1)


def _near_others(places: NDArray[np.float64], held: Mask) -> Mask:
    """Return which of the held-out places are near others."""
    code = np.floor(places / _NEAR_M).astype(np.int64) @ (_ROW, 1)
    others = np.unique(code[~held])
    around = (_ROW * i + j for i in (-1, 0, 1) for j in (-1, 0, 1))
    return np.any([np.isin(code[held] + step, others) for step in around], axis=0)
