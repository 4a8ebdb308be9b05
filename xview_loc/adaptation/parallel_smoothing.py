"""Smooth drives side by side: shared out over the processes of a run, and over worker processes of each."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, Dataset

from xview_loc.adaptation.heat_map_store import HeatMapStore
from xview_loc.adaptation.labelling import gather_rows
from xview_loc.adaptation.labels import PseudoLabels
from xview_loc.adaptation.smoothing import Smoothed, smooth
from xview_loc.datasets.base import Track


def smooth_drives(
    fabric: Fabric,
    track: Track,
    teacher: PseudoLabels,
    heat_maps: HeatMapStore,
    workers: int = 0,
    on_pairs: Callable[[int, int], object] = lambda done, of: None,
    *,
    by_fixes: bool = False,
) -> Smoothed:
    """Smooth the teacher's labels drive by drive; every process returns those of all drives.

    ``workers``: further processes of each process. ``on_pairs`` receives the numbers of this process's pairs
    done and in all. ``by_fixes``: as in :func:`smooth`.
    """
    drive = track.drive[teacher.index]
    numbers, counts = np.unique(drive, return_counts=True)
    # The longest first, so that all end at about the same time.
    numbers = numbers[np.argsort(-counts, kind="stable")]
    own = [teacher.rows(drive == number) for number in numbers[fabric.global_rank :: fabric.world_size]]
    done, total = 0, sum(map(len, own))

    def on_pair(of_drive: int, passes: int) -> None:
        on_pairs(done + of_drive * len(own[len(tables)]) // passes, total)

    tables: list[Smoothed] = []
    drives = _Drives(
        track, own, heat_maps, on_pair if workers == 0 else lambda done, of: None, by_fixes=by_fixes
    )
    # Forked, so that nothing must be copied.
    context = "fork" if workers else None
    for table in DataLoader(
        drives,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_one_thread,
        multiprocessing_context=context,
    ):
        done += len(own[len(tables)])
        tables.append(table)
        on_pairs(done, total)
    found = gather_rows(fabric, tables)
    assert found is not None
    return found


class _Drives(Dataset[Smoothed]):
    """The labels of each drive, smoothed when asked for."""

    def __init__(
        self,
        track: Track,
        teacher: list[PseudoLabels],
        heat_maps: HeatMapStore,
        on_pairs: Callable[[int, int], object],
        *,
        by_fixes: bool,
    ) -> None:
        self._track, self._teacher, self._heat_maps, self._on_pairs = track, teacher, heat_maps, on_pairs
        self._by_fixes = by_fixes

    def __len__(self) -> int:
        return len(self._teacher)

    def __getitem__(self, number: int) -> Smoothed:
        own = self._teacher[number]
        return smooth(self._track, own, self._heat_maps, self._on_pairs, by_fixes=self._by_fixes)


def _one_thread(worker: int) -> None:
    # A forked process has no threads of OpenCV's.
    cv2.setNumThreads(0)
