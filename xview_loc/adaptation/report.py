"""What an adaptation leaves for people and machines: checkpoint, figures, and a page that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.distillation import Adapted, Distillation
from xview_loc.adaptation.figures import (
    distance_histogram,
    error_curves,
    moved_labels,
    moved_pairs,
    smoothed_drive,
    track_map,
)
from xview_loc.adaptation.indicators import Indicators
from xview_loc.adaptation.labels import PseudoLabels, distance_m
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.evaluation import Errors
from xview_loc.files import write_whole
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.report import Page, finite

STUDENT_FILE, METRICS_FILE, REPORT_FILE = "student.safetensors", "metrics.json", "report.html"
# What the indicators are called.
_INDICATORS = {
    "score": "contradiction, mean of the next three, m",
    "tile_shift": "moves with the tile's cut, m",
    "turn": "moves with the panorama's turn, m",
    "motion": "step differs from odometry, m",
    "stray_sigmas": "distance of the whole map's maximum from the coarse fix, sigma",
    "entropy": "entropy of the heat map, nats",
    "peak_mass": "probability within 2 m of the maximum",
}


def write_results(
    distillation: Distillation, adapted: Adapted, folder: Path, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write ``student.safetensors``, ``metrics.json`` and ``report.html``; returns the metrics.

    ``extra`` goes into the checkpoint's metadata (software version, command ...).
    """
    track = distillation.track
    before, after = (Indicators.of(views, track) for views in (adapted.before, adapted.after))
    verdict = judge(before, after)
    metrics = _metrics(distillation, adapted, before, after, verdict)
    student = adapted.student.load()
    metadata = {**(extra or {}), "parent": distillation.teacher.sha256, "adaptation": metrics}
    metrics = {**metrics, "student_sha256": save_checkpoint(student.model, folder / STUDENT_FILE, metadata)}
    write_whole(folder / METRICS_FILE, json.dumps(metrics, indent=1).encode())
    _page(distillation, adapted, metrics, verdict, student.model).write(folder / REPORT_FILE)
    return metrics


def _metrics(
    distillation: Distillation, adapted: Adapted, before: Indicators, after: Indicators, verdict: Verdict
) -> dict[str, Any]:
    """JSON values: what went in, what came out."""
    options = distillation.options
    settings = {**asdict(options), **adapted.recipe._asdict()}
    metrics: dict[str, Any] = {
        "model": distillation.teacher.model.spec.name,
        "data": distillation.source.name,
        "pairs": len(distillation.source),
        "unreadable": len(distillation.training_index) - len(adapted.maxima),
        "trained_on": int(adapted.kept.sum()),
        "held_out": len(adapted.before.plain),
        "teacher_to_student_held_out_m": _spread(distance_m(adapted.before.plain, adapted.after.plain)),
        "options": settings,
        "indicators": {"teacher": before.summary(), "student": after.summary()},
        "epochs": {"student": distillation.history(adapted.student)},
        "verdict": asdict(verdict),
    }
    if adapted.auxiliary is not None:
        distances = distance_m(adapted.labels, adapted.auxiliary.labels)
        metrics["teacher_to_auxiliary_m"] = _spread(distances)
        metrics["furthest_kept_m"] = float(distances[adapted.kept].max())
        metrics["epochs"]["auxiliary_student"] = distillation.history(adapted.auxiliary.student)
    if adapted.rounds:
        metrics["rounds"] = [asdict(verdict) for verdict in adapted.rounds]
    if adapted.smoothed is not None:
        metrics["smoothing"] = _smoothing(adapted.maxima.of(adapted.smoothed.index), adapted.smoothed)
    if distillation.true_from_fix is not None:
        errors = {
            "teacher, held out": distillation.true_errors_m(adapted.before.plain),
            "student, held out": distillation.true_errors_m(adapted.after.plain),
            "pseudo ground truth": distillation.true_errors_m(adapted.labels),
            "pseudo ground truth, kept": distillation.true_errors_m(adapted.labels.rows(adapted.kept)),
        }
        if adapted.smoothed is not None:
            maxima = adapted.maxima.of(adapted.labels.index)
            errors["maxima of the same pairs"] = distillation.true_errors_m(maxima)
        metrics["true_errors"] = {name: finite(asdict(Errors.of(e))) for name, e in errors.items()}
        metrics["epoch_picks"] = _epoch_picks(metrics["epochs"]["student"])
    return metrics


def _smoothing(maxima: PseudoLabels, smoothed: Smoothed) -> dict[str, Any]:
    """What the drives made of the teacher's labels."""
    moved = distance_m(maxima, replace(maxima, position=smoothed.position))
    known = smoothed.supported
    return {
        "pairs": len(smoothed),
        "used": smoothed.has_grounds,
        "without_grounds": int((~known).sum()),
        "off_map": int((known & ~smoothed.on_map).sum()),
        "maxima_wrong": float(smoothed.wrong[known].mean()) if known.any() else None,
        "moved_m": _spread(moved),
        "std_m": _spread(smoothed.std_m[known]) if known.any() else None,
    }


def _spread(distances: NDArray[np.float64]) -> dict[str, float]:
    quantiles = np.quantile(distances, [0.5, 0.8, 0.95])
    return dict(zip(("median", "80 %", "95 %"), map(float, quantiles), strict=True))


def _epoch_picks(history: list[dict[str, float]]) -> dict[str, float]:
    """How near the label-free choice of the epoch comes to the choice by the truth."""
    known = [entry for entry in history if "true_mean_m" in entry]
    if not known:
        return {}
    chosen, best = min(known, key=lambda e: e["score"]), min(known, key=lambda e: e["true_mean_m"])
    return {
        "label_free_epoch": chosen["epoch"],
        "label_free_mean_m": chosen["true_mean_m"],
        "best_epoch": best["epoch"],
        "best_mean_m": best["true_mean_m"],
    }


def _page(
    distillation: Distillation,
    adapted: Adapted,
    metrics: Mapping[str, Any],
    verdict: Verdict,
    student: CrossViewModel,
) -> Page:
    page = Page(f"Adaptation of {metrics['model']}: " + ("deploy" if verdict.deploy else "do not deploy"))
    page.text(
        f"{metrics['pairs']} pairs, {metrics['unreadable']} of those to train on unreadable; the student was "
        f"trained on {metrics['trained_on']} of them and judged on {metrics['held_out']} held-out ones."
    )
    for line in (*round_lines(metrics.get("rounds", ())), *verdict.reasons):
        page.text(line)
    page.heading("Held-out pairs, without ground truth")
    teacher, pupil = metrics["indicators"]["teacher"], metrics["indicators"]["student"]
    rows = [
        [text, *(f"{side[name]:.3f}" if name in side else "unknown" for side in (teacher, pupil))]
        for name, text in _INDICATORS.items()
    ]
    page.table(["", "teacher", "student"], rows)
    if "true_errors" in metrics:
        page.heading("Against the truth")
        errors = metrics["true_errors"]
        page.table(
            ["metres", "pairs", "mean", "median", "95 %"],
            [
                [
                    name,
                    str(e["frames"]),
                    *("" if e[k] is None else f"{e[k]:.2f}" for k in ("mean", "median", "p95")),
                ]
                for name, e in errors.items()
            ],
        )
        page.figure(error_curves(distillation, adapted), "Share of held-out pairs with at most this error")
    if adapted.smoothed is not None:
        page.heading("What the drives made of the labels")
        _smoothing_text(page, metrics["smoothing"])
        if metrics["smoothing"]["used"]:
            maxima = adapted.maxima.of(adapted.smoothed.index)
            figures = smoothed_drive(distillation, maxima, adapted.smoothed)
            figures += moved_labels(distillation, adapted, adapted.smoothed, student)
            for figure, caption in figures:
                page.figure(figure, caption)
    if adapted.auxiliary is not None:
        page.heading("Outlier filter")
        distances = distance_m(adapted.labels, adapted.auxiliary.labels)
        page.figure(
            distance_histogram(distances, adapted.recipe.keep),
            "Distance between teacher and auxiliary student; pairs to the right of the line are left out",
        )
    if distillation.track is not None:
        page.heading("Along the drives")
        page.figure(
            track_map(distillation, adapted), "Held-out pairs, coloured by how far the estimate has moved, m"
        )
    page.heading("Where the estimate has moved most")
    for figure, caption in moved_pairs(distillation, adapted, student):
        page.figure(figure, caption)
    page.heading("Epochs")
    for name, history in metrics["epochs"].items():
        columns = list(history[0])
        page.table(
            [name.replace("_", " "), *columns],
            [["", *(f"{entry.get(c, math.nan):.4g}" for c in columns)] for entry in history],
        )
    page.heading("Settings")
    settings = {**metrics["options"], **metrics["options"]["training"]}
    del settings["training"]
    rows = [[name, str(value)] for name, value in settings.items()]
    rows += [["data", metrics["data"]], ["parent", distillation.teacher.sha256]]
    page.table(["", "value"], rows)
    return page


def round_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each further round came to, of the metrics' ``rounds``."""
    return [
        f"round {number}: {'; '.join(verdict['reasons'])}; "
        + ("its student is taken" if verdict["deploy"] else "the student of the round before is kept")
        for number, verdict in enumerate(verdicts, start=2)
    ]


def smoothing_line(smoothing: Mapping[str, Any]) -> str:
    """What became of the labels, of the metrics' ``smoothing``."""
    pairs, without = smoothing["pairs"], smoothing["without_grounds"]
    if not smoothing["used"]:
        return (
            f"fell back to the teacher's maxima and the paper's recipe: for {without} of {pairs} pairs the "
            "rest of the drive gave no grounds to move the label (look at odometry, stamps and fixes)"
        )
    return (
        f"whole drives corrected {pairs - without - smoothing['off_map']} of {pairs} labels; {without}, for "
        f"which they gave no grounds, and {smoothing['off_map']} off their map were left out"
    )


def _smoothing_text(page: Page, smoothing: Mapping[str, Any]) -> None:
    page.text(smoothing_line(smoothing))
    if smoothing["used"]:
        page.text(
            f"Labels moved by {smoothing['moved_m']['median']:.1f} m in the median; "
            f"{smoothing['maxima_wrong']:.0%} of the maxima are held for wrong by more than five metres."
        )
