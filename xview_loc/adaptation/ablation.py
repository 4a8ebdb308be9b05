"""Ablation of the adaptation on your own data: the paper's Table 2 and Figures 5 and 6."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xview_loc.adaptation.distillation import Distillation, Student
from xview_loc.adaptation.labels import reliable
from xview_loc.adaptation.report import error_table
from xview_loc.datasets.base import PairSource
from xview_loc.evaluation.errors import Errors
from xview_loc.files import write_whole
from xview_loc.models.checkpoint import Checkpoint
from xview_loc.report import Page, finite

Array = NDArray[np.float64]
KEEPS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TABLE = ("Teacher", "Student-M-OF", "Student+M-OF", "Student+M+OF")


@dataclass(frozen=True)
class Row:
    """True errors of one model; levels (K') and keep (T) are None for the teacher."""

    name: str
    levels: int | None
    keep: float | None
    errors: Errors


def run_ablation(distillation: Distillation, measured: tuple[PairSource, Array] | None = None) -> list[Row]:
    """Measure the rows of Table 2 (:data:`TABLE`), then sweep K' and T.

    Student-M-OF learns from the teacher's heat maps instead of their maxima. ``measured`` are the pairs to
    measure errors on, with metres (N, 2) from their coarse fixes to their true positions; default: the
    held-out pairs, whose true positions must be known.
    """
    labels = distillation.teacher_labels()

    def errors(checkpoint: Checkpoint) -> Errors:
        if measured is None:
            held_out = distillation.held_out_labels(checkpoint).plain
            assert distillation.true_from_fix is not None  # required
            return distillation.true_errors(held_out, distillation.true_from_fix)
        source, true_from_fix = measured
        return distillation.true_errors(distillation.labels_of(checkpoint, "test", source), true_from_fix)

    def student(levels: int, keep: float, mode_based: bool = True) -> Student:
        loss = distillation.loss(levels, mode_based)
        auxiliary = distillation.student(labels, loss, f"student K'={levels} T=100%")
        if keep == 1:
            return auxiliary
        other = distillation.labels_of(auxiliary.load(), f"labels K'={levels}").of(labels.index)
        kept = labels.rows(reliable(labels, other, keep))
        return distillation.student(kept, loss, f"student K'={levels} T={keep:.0%}")

    levels, keep, _ = distillation.recipe(smoothed=False)
    rows = [Row(TABLE[0], None, None, errors(distillation.teacher))]
    for name, share, mode_based in zip(TABLE[1:], (1.0, 1.0, keep), (False, True, True), strict=True):
        rows.append(Row(name, levels, share, errors(student(levels, share, mode_based).load())))
    for count in range(1, distillation.teacher.model.level_count + 1):
        rows.append(Row(f"K' = {count}", count, keep, errors(student(count, keep).load())))
    for share in KEEPS:
        rows.append(Row(f"T = {share:.0%}", levels, share, errors(student(levels, share).load())))
    return rows


def write_ablation(rows: Sequence[Row], distillation: Distillation, folder: Path) -> None:
    """Write ``ablation.json`` and ``ablation.html``, with the table and both sweeps."""
    content = [{**asdict(row), "errors": finite(asdict(row.errors))} for row in rows]
    write_whole(folder / "ablation.json", json.dumps(content, indent=1, allow_nan=False).encode())
    page = Page(f"Ablation of {distillation.teacher.model.spec.name}")
    page.text(f"Errors on {rows[0].errors.frames} pairs; adapted to {distillation.source.name}.")
    page.heading("Parts (Table 2 of the paper)")
    page.table(*error_table({r.name: finite(asdict(r.errors)) for r in rows if r.name in TABLE}))
    for symbol, title in (("K'", "Supervised levels K' (Figure 5)"), ("T", "Share kept T (Figure 6)")):
        page.heading(title)
        page.figure(_sweep([r for r in rows if r.name.startswith(f"{symbol} =")], rows[0], symbol), title)
    page.write(folder / "ablation.html")


def _sweep(rows: Sequence[Row], teacher: Row, symbol: str) -> Figure:
    figure = Figure(figsize=(8, 3.2))
    values: list[Any] = [row.levels if symbol == "K'" else row.keep for row in rows]
    for number, statistic in enumerate(("mean", "median"), start=1):
        axes = figure.add_subplot(1, 2, number)
        axes.plot(values, [getattr(row.errors, statistic) for row in rows], "o-", label="student")
        axes.axhline(getattr(teacher.errors, statistic), color="0.5", linestyle="--", label="teacher")
        axes.set(xlabel=symbol, ylabel=f"{statistic} error, m", xticks=values)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
