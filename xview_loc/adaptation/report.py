"""Write the results of an adaptation: checkpoint, metrics and an HTML report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation import figures
from xview_loc.adaptation.data_check import DataCheck
from xview_loc.adaptation.distillation import UNCERTAIN_M, Adapted, Distillation
from xview_loc.adaptation.held_out import share_near_others
from xview_loc.adaptation.indicators import Indicators
from xview_loc.adaptation.labels import PseudoLabels, distance_m
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.adaptation.verdict import Verdict, judge, refused
from xview_loc.datasets.base import JoinedPairs
from xview_loc.files import write_whole
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.report import Page, finite
from xview_loc.statistics import MIN_MEASUREMENTS

STUDENT_FILE, METRICS_FILE, REPORT_FILE = "student.safetensors", "metrics.json", "report.html"
# Share of held-out pairs on streets of others from which on that is said.
_MOSTLY = 0.5
_SYMBOLS = "The plus is the coarse fix, the cross the true position where it is known."
# Descriptions of the indicators.
_INDICATORS = {
    "score": "inconsistency, m: mean of the next three, averaged with the fourth",
    "tile_shift": "distance by which an estimate moves when the tile is shifted, m",
    "turn": "distance by which it moves when the panorama is turned, m",
    "motion": "distance of steps between estimates from those of odometry, m",
    "drive": "distance of an estimate from where the whole drive places the pair, m",
    "stray_sigmas": "distance of the whole heat map's maximum from the coarse fix, sigma",
    "entropy": "entropy of the heat map, nats",
    "peak_mass": "probability within 2 m of the maximum",
}


def write_results(
    distillation: Distillation,
    adapted: Adapted,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    check: DataCheck | None = None,
) -> dict[str, Any]:
    """Write ``student.safetensors``, ``metrics.json`` and ``report.html``; return the metrics.

    ``extra`` is added to the checkpoint's metadata (software version, command ...). ``check``: what was found
    wrong with the pairs.
    """
    before, after = map(distillation.indicators, (adapted.before, adapted.after))
    verdict = judge(before, after)
    if check is not None and check.faults:
        verdict = refused(verdict, check.faults)
    metrics = _metrics(distillation, adapted, before, after, verdict)
    if check is not None:
        metrics["data_check"] = asdict(check)
    student = adapted.student.load()
    metadata = {**(extra or {}), "parent": distillation.teacher.sha256, "adaptation": metrics}
    metrics = {**metrics, "student_sha256": save_checkpoint(student.model, folder / STUDENT_FILE, metadata)}
    write_whole(folder / METRICS_FILE, json.dumps(metrics, indent=1).encode())
    page = _page(distillation, adapted, metrics, verdict, student.model, before, after)
    page.write(folder / REPORT_FILE)
    return metrics


def _metrics(
    distillation: Distillation, adapted: Adapted, before: Indicators, after: Indicators, verdict: Verdict
) -> dict[str, Any]:
    """Summarise inputs and outcome as JSON values."""
    options = distillation.options
    options = replace(options, training=options.student_training(adapted.recipe))
    metrics: dict[str, Any] = {
        "model": distillation.teacher.model.spec.name,
        "data": distillation.source.name,
        "pairs": len(distillation.source),
        "unreadable": len(distillation.training_index) - len(adapted.maxima),
        "recipe": _recipe(distillation, adapted),
        "replayed": 0 if distillation.replay is None else len(distillation.replay),
        "trained_on": int(adapted.kept.sum()),
        "held_out": len(adapted.before.plain),
        "held_out_on_training_streets": None
        if distillation.track is None
        else share_near_others(distillation.track, distillation.held_out_index),
        "teacher_to_student_held_out_m": _spread(distance_m(adapted.before.plain, adapted.after.plain)),
        "options": {**asdict(options), **adapted.recipe._asdict()},
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
        labelled = {
            "teacher, held out": adapted.before.plain,
            "student, held out": adapted.after.plain,
            "pseudo ground truth": adapted.labels,
            "pseudo ground truth, kept": adapted.labels.rows(adapted.kept),
        }
        if adapted.smoothed is not None:
            labelled["maxima of the same pairs"] = adapted.maxima.of(adapted.labels.index)
        true = distillation.true_from_fix
        errors = {name: distillation.true_errors(labels, true) for name, labels in labelled.items()}
        metrics["true_errors"] = {name: finite(asdict(e)) for name, e in errors.items()}
        metrics["epoch_picks"] = _epoch_picks(metrics["epochs"]["student"])
    return metrics


def _recipe(distillation: Distillation, adapted: Adapted) -> dict[str, Any]:
    """Name the recipe, and give the reasons where it was chosen automatically."""
    options, smoothed = distillation.options, adapted.smoothed
    drives = smoothed is not None and smoothed.mostly_usable
    reasons = []
    if options.smooth is None and not distillation.smoothing:
        why = "The pairs do not come from drives"
        if isinstance(distillation.source, JoinedPairs):
            why = "Drives are not used with a validation dataset"
        reasons.append(f"{why}, so the labels are the teacher's maxima.")
    if options.smooth is None and drives:
        reasons.append("The pairs come from drives, which correct the labels.")
    if options.rounds is None and drives and smoothed is not None:
        uncertainty = f"The labels are uncertain by {smoothed.uncertainty_m:.1f} m on average"
        if smoothed.uncertainty_m <= UNCERTAIN_M:
            reasons.append(f"{uncertainty}: another round would gain nothing.")
        elif len(distillation.held_out_index) < MIN_MEASUREMENTS:
            needed = f"needs {MIN_MEASUREMENTS} held-out pairs"
            reasons.append(f"{uncertainty}: another round could gain, but {needed}.")
        else:
            reasons.append(f"{uncertainty} after the last round that was kept.")
    name = "geodistill" if options.geodistill else "drives" if drives else "paper"
    return {"name": name, "reasons": reasons}


def _smoothing(maxima: PseudoLabels, smoothed: Smoothed) -> dict[str, Any]:
    moved = distance_m(maxima, replace(maxima, position=smoothed.position))
    known = smoothed.supported
    return {
        "pairs": len(smoothed),
        "used": smoothed.mostly_usable,
        "without_grounds": int((~known).sum()),
        "off_map": int((known & ~smoothed.on_map).sum()),
        "maxima_wrong": float(smoothed.wrong[known].mean()) if known.any() else None,
        "moved_m": _spread(moved),
        "std_m": _spread(smoothed.std_m[known]) if known.any() else None,
        "uncertainty_m": finite(smoothed.uncertainty_m),
    }


def _spread(distances: NDArray[np.float64]) -> dict[str, float]:
    quantiles = np.quantile(distances, [0.5, 0.8, 0.95])
    return dict(zip(("median", "80 %", "95 %"), map(float, quantiles), strict=True))


def _epoch_picks(history: list[dict[str, float]]) -> dict[str, float]:
    """Compare the label-free choice of the epoch with the best one by true errors."""
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
    before: Indicators,
    after: Indicators,
) -> Page:
    page = Page("Deploy the student" if verdict.deploy else "Do not deploy the student")
    page.text(verdict.summary)
    page.text(f"Next: {verdict.advice}")
    page.text(
        f"{metrics['model']} was adapted to {len(distillation.training_index)} pairs; "
        f"{metrics['trained_on']} of them trained the student, {metrics['held_out']} others were held out to "
        f"judge it, and {metrics['unreadable']} could not be read."
    )
    if distillation.replay is not None:
        page.text(
            f"The student was trained on {metrics['replayed']} pairs of {distillation.replay.name} as well."
        )
    for line in metrics.get("data_check", {}).get("remarks", ()):
        page.text(f"Note: {line}.")
    for line in outcome_lines(metrics):
        page.text(line)
    if "true_errors" in metrics:
        page.heading("Distance from the true positions")
        page.table(*error_table(metrics["true_errors"]))
        page.figure(figures.error_curves(distillation, adapted), "Share of held-out pairs by error")
    page.heading("Evidence without true positions")
    page.text(
        "A good model finds the same position however the street is shown. So the estimates of the held-out "
        "pairs are compared with those from a shifted tile and a turned panorama, with odometry, and with "
        "where all of a drive's images, odometry and fixes together place the pair: where they differ, at "
        "least one is wrong. Differences count at most 20 m; the inconsistency is the mean of the first "
        "three, averaged with the fourth. "
        "It decides, together with the coarse fixes. Entropy and probability decide nothing, since a student "
        "is confident, right or wrong."
    )
    teacher, pupil = metrics["indicators"]["teacher"], metrics["indicators"]["student"]
    rows = [
        [text, *(f"{side[name]:.2f}" if name in side else "unknown" for side in (teacher, pupil))]
        for name, text in _INDICATORS.items()
    ]
    page.table(["mean over the held-out pairs", "teacher", "student"], rows)
    for line in verdict.reasons:
        page.text(f"{line[0].upper()}{line[1:]}.")
    if distillation.track is not None:
        drawn = figures.both_tracks(distillation, adapted, before, after)
        page.figure(drawn, "Estimates of the held-out pairs by their inconsistency; coarse fixes white")
    if adapted.smoothed is not None:
        page.heading("Labels smoothed along drives")
        smoothing = metrics["smoothing"]
        page.text(smoothing_line(smoothing))
        if smoothing["used"]:
            page.text(
                f"Labels moved by {smoothing['moved_m']['median']:.1f} m in the median; an estimated "
                f"{smoothing['maxima_wrong']:.0%} of the maxima are wrong by more than five metres."
            )
            maxima = adapted.maxima.of(adapted.smoothed.index)
            shown = figures.smoothed_drive(distillation, maxima, adapted.smoothed)
            shown += figures.moved_labels(distillation, adapted, adapted.smoothed, student)
            page.text(
                "Below are the labels that moved most, first the part of a drive and the whole drive, then "
                "pairs with the heat maps of the model that labelled them and of the student. Circles are "
                f"maxima of heat maps, squares and ellipses labels with their 95 % regions. {_SYMBOLS}"
            )
            for figure, caption in shown:
                page.figure(figure, caption)
    if adapted.auxiliary is not None:
        page.heading("Outlier filter")
        distances = distance_m(adapted.labels, adapted.auxiliary.labels)
        caption = "Distance between label and auxiliary student; pairs to the right of the line are left out"
        page.figure(figures.distance_histogram(distances, adapted.recipe.keep), caption)
    page.heading("The student's worst held-out pairs")
    page.text(f"Circles are the estimates, on the heat maps of both models. {_SYMBOLS}")
    for figure, caption in figures.worst_pairs(distillation, adapted, student, after):
        page.figure(figure, caption)
    page.heading("Held-out pairs whose estimate moved most, from teacher to student")
    for figure, caption in figures.moved_pairs(distillation, adapted, student):
        page.figure(figure, caption)
    page.heading("Epochs")
    for name, history in metrics["epochs"].items():
        columns = list(history[0])
        rows = [["", *(f"{entry.get(c, math.nan):.4g}" for c in columns)] for entry in history]
        page.table([name.replace("_", " "), *columns], rows)
    page.heading("Settings")
    settings = {"recipe": metrics["recipe"]["name"], **metrics["options"], **metrics["options"]["training"]}
    del settings["training"], settings["smooth"]
    settings["rounds"] = settings["rounds"] or "while labels are uncertain"
    rows = [[name, str(value)] for name, value in settings.items()]
    rows += [["data", metrics["data"]], ["parent", distillation.teacher.sha256]]
    page.table(["", "value"], rows)
    return page


def error_table(errors: Mapping[str, Mapping[str, float | None]]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the metrics' ``true_errors``; by direction where that is known."""
    columns = {"mean": "mean", "median": "median", "95 %": "p95"}
    # Short names, so that the table fits a terminal.
    parts = {
        "along mean": "longitudinal_mean",
        "along median": "longitudinal_median",
        "across mean": "lateral_mean",
        "across median": "lateral_median",
    }
    if any(e[part] is not None for e in errors.values() for part in parts.values()):
        columns |= parts
    rows = [
        [name, str(e["frames"]), *("" if v is None else f"{v:.2f}" for v in map(e.get, columns.values()))]
        for name, e in errors.items()
    ]
    return ["metres", "pairs", *columns], rows


def outcome_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Say which recipe was chosen, how further rounds ended, and on which streets the student was judged."""
    lines = [*metrics["recipe"]["reasons"], *round_lines(metrics.get("rounds", ()))]
    known = metrics["held_out_on_training_streets"]
    if known is not None and known > _MOSTLY:
        lines.append(
            f"{known:.0%} of the held-out pairs lie on streets of other pairs: the verdict is about these "
            "streets. Record further ones to know how good the student is elsewhere."
        )
    return lines


def round_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the outcome of each further round, from the metrics' ``rounds``."""
    return [
        f"round {number}: {'; '.join(verdict['reasons'])}; "
        + ("its student is kept" if verdict["deploy"] else "the previous round's student is kept")
        for number, verdict in enumerate(verdicts, start=2)
    ]


def smoothing_line(smoothing: Mapping[str, Any]) -> str:
    """Describe the outcome of smoothing, from the metrics' ``smoothing``."""
    pairs, without = smoothing["pairs"], smoothing["without_grounds"]
    if not smoothing["used"]:
        return (
            f"drives were not used, but the teacher's maxima and the paper's recipe: {without} of {pairs} "
            "labels are not supported by the rest of their drive (check odometry, stamps and fixes)"
        )
    return (
        f"smoothing corrected {pairs - without - smoothing['off_map']} of {pairs} labels; {without} not "
        f"supported by their drive and {smoothing['off_map']} off their heat map were left out"
    )
