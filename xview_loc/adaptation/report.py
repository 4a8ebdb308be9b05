"""What an adaptation leaves for people and machines: checkpoint, figures, and a page that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xview_loc.adaptation.distill import Adapted, Distillation
from xview_loc.adaptation.indicators import Indicators, base_turns
from xview_loc.adaptation.pseudo_labels import distance_m, label_batch
from xview_loc.adaptation.sequence import Smoothed
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.datasets.base import PairSample
from xview_loc.evaluation import Errors
from xview_loc.files import write_whole
from xview_loc.geodesy import LocalProjection
from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD, CrossViewModel
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.report import Page, finite

STUDENT_FILE, METRICS_FILE, REPORT_FILE = "student.safetensors", "metrics.json", "report.html"
_SHOWN = 4
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
    settings = asdict(options)
    metrics: dict[str, Any] = {
        "model": distillation.teacher.model.spec.name,
        "data": distillation.source.name,
        "pairs": len(distillation.source),
        "unreadable": len(distillation.training_index) - len(adapted.teacher),
        "trained_on": int(adapted.kept.sum()),
        "held_out": len(adapted.before.plain),
        "teacher_to_auxiliary_m": _spread(distance_m(adapted.teacher, adapted.auxiliary)),
        "furthest_kept_m": float(distance_m(adapted.teacher, adapted.auxiliary)[adapted.kept].max()),
        "teacher_to_student_held_out_m": _spread(distance_m(adapted.before.plain, adapted.after.plain)),
        "options": settings,
        "indicators": {"teacher": before.summary(), "student": after.summary()},
        "epochs": {
            "auxiliary_student": distillation.history(adapted.auxiliary_student),
            "student": distillation.history(adapted.student),
        },
        "verdict": asdict(verdict),
    }
    if adapted.smoothed is not None:
        metrics["smoothing"] = _smoothing(distillation, adapted.smoothed)
    if distillation.true_from_fix is not None:
        errors = {
            "teacher, held out": distillation.true_errors_m(adapted.before.plain),
            "student, held out": distillation.true_errors_m(adapted.after.plain),
            "pseudo ground truth": distillation.true_errors_m(adapted.teacher),
            "pseudo ground truth, kept": distillation.true_errors_m(adapted.teacher.rows(adapted.kept)),
        }
        if adapted.smoothed is not None:
            maxima = distillation.teacher_labels().of(adapted.teacher.index)
            errors["teacher's maxima of the same pairs"] = distillation.true_errors_m(maxima)
        metrics["true_errors"] = {name: finite(asdict(Errors.of(e))) for name, e in errors.items()}
        metrics["epoch_picks"] = _epoch_picks(metrics["epochs"]["student"])
    return metrics


def _smoothing(distillation: Distillation, smoothed: Smoothed) -> dict[str, Any]:
    """What the drives made of the teacher's labels."""
    maxima = distillation.teacher_labels().of(smoothed.index)
    moved = distance_m(maxima, replace(maxima, position=smoothed.position))
    known = smoothed.supported
    return {
        "pairs": len(smoothed),
        "fell_back": int((~known).sum()),
        "off_map": int((~smoothed.on_map).sum()),
        "teacher_wrong": float(smoothed.wrong[known].mean()) if known.any() else None,
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
    if "smoothing" in metrics:
        _smoothing_text(page, metrics["smoothing"])
    for reason in verdict.reasons:
        page.text(reason)
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
        page.figure(_error_curves(distillation, adapted), "Share of held-out pairs with at most this error")
    page.heading("Outlier filter")
    page.figure(
        _distance_histogram(adapted, distillation.options.keep),
        "Distance between teacher and auxiliary student; pairs to the right of the line are left out",
    )
    if distillation.track is not None:
        page.heading("Along the drives")
        page.figure(
            _track_map(distillation, adapted), "Held-out pairs, coloured by how far the estimate has moved, m"
        )
    page.heading("Where the estimate has moved most")
    for figure, caption in _heat_maps(distillation, adapted, student):
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


def _smoothing_text(page: Page, smoothing: Mapping[str, Any]) -> None:
    corrected = smoothing["pairs"] - smoothing["fell_back"]
    page.text(
        f"Whole drives corrected {corrected} of {smoothing['pairs']} labels; they moved by "
        f"{smoothing['moved_m']['median']:.1f} m in the median. {smoothing['fell_back']} labels stayed the "
        "teacher's, as the rest of the drive gave no grounds to move them; "
        f"{smoothing['off_map']} lay off the map and were left out."
    )
    if smoothing["teacher_wrong"] is not None:
        page.text(
            f"Of the teacher's maxima, {smoothing['teacher_wrong']:.0%} are held for wrong by more than five "
            "metres where the drive says anything of them."
        )


def _error_curves(distillation: Distillation, adapted: Adapted) -> Figure:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    for name, views in (("teacher", adapted.before), ("student", adapted.after)):
        errors = distillation.true_errors_m(views.plain)
        errors = np.sort(errors[np.isfinite(errors)])
        axes.plot(errors, np.arange(1, len(errors) + 1) / max(1, len(errors)), label=name)
    axes.set(xlabel="error, m", ylabel="share", xlim=(0, 30), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _distance_histogram(adapted: Adapted, keep: float) -> Figure:
    distances = distance_m(adapted.teacher, adapted.auxiliary)
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    axes.hist(distances, bins=60)
    if keep < 1:
        axes.axvline(float(np.quantile(distances, keep)), color="tab:red", label=f"T = {keep:.0%}")
        axes.legend()
    axes.set(xlabel="distance, m", ylabel="pairs", yscale="log")
    return figure


def _track_map(distillation: Distillation, adapted: Adapted) -> Figure:
    track, labels = distillation.track, adapted.after.plain
    assert track is not None
    middle = LocalProjection(float(track.lat.mean()), float(track.lon.mean()))
    east, north = np.array([middle.forward(*place) for place in zip(track.lat, track.lon, strict=True)]).T
    place = np.stack([east, north], 1)[labels.index] + labels.from_fix
    figure = Figure(figsize=(7, 7))
    axes = figure.add_subplot()
    axes.plot(east, north, ".", color="0.8", markersize=2, label="coarse fixes")
    moved = distance_m(adapted.before.plain, labels)
    colours = np.minimum(moved, 20.0)
    dots = axes.scatter(place[:, 0], place[:, 1], s=9, c=colours, cmap="viridis", label="student")
    figure.colorbar(dots, ax=axes, shrink=0.7)
    axes.set(xlabel="east, m", ylabel="north, m")
    axes.set_aspect("equal")
    axes.legend()
    return figure


def _heat_maps(
    distillation: Distillation, adapted: Adapted, student: CrossViewModel
) -> list[tuple[Figure, str]]:
    """Ground image and both heat maps of the held-out pairs whose estimate has moved most."""
    moved = distance_m(adapted.before.plain, adapted.after.plain)
    figures = []
    for row in np.argsort(-moved)[:_SHOWN]:
        index = int(adapted.after.plain.index[row])
        sample = distillation.source[index]
        maps = [
            _probability(model, sample, distillation.options.heading_prior_deg)
            for model in (distillation.teacher.model, student)
        ]
        places = [views.plain.position[row] for views in (adapted.before, adapted.after)]
        figures.append(
            (
                _draw_pair(distillation, sample, maps, places),
                f"Pair {index}: the estimate has moved {moved[row]:.1f} m; "
                "circle: estimate, plus: coarse fix"
                + (", cross: truth" if distillation.true_from_fix is not None else ""),
            )
        )
    return figures


def _probability(
    model: CrossViewModel, sample: PairSample, prior: float | None
) -> tuple[NDArray[np.float32], tuple[float, float, float, float]]:
    """A pair's heat map and where it lies on the tile (left, right, bottom, top in pixels)."""
    model = model.eval().cpu()
    batch = {name: value[None] for name, value in sample.items() if isinstance(value, torch.Tensor)}
    maps = label_batch(model, batch, prior, turns=base_turns(batch, prior))[1]
    share = torch.softmax(maps.logits[0].float().flatten(), 0).view_as(maps.logits[0])
    (row, col), scale, side = maps.grid.origin, maps.grid.scale, share.shape[0]
    first, last = -0.5 * scale, (side - 0.5) * scale
    return share.numpy(), (col + first, col + last, row + last, row + first)


def _draw_pair(
    distillation: Distillation, sample: PairSample, maps: list[Any], places: list[NDArray[np.float32]]
) -> Figure:
    def picture(image: torch.Tensor) -> NDArray[np.float32]:
        plain = image * IMAGENET_STD[:, None, None] + IMAGENET_MEAN[:, None, None]
        return np.asarray(plain.clamp(0, 1).permute(1, 2, 0).numpy(), np.float32)

    figure = Figure(figsize=(8, 6))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 2.6))
    above = figure.add_subplot(grid[0, :])
    above.imshow(picture(sample["ground"]))
    above.axis("off")
    aerial = picture(sample["aerial"])
    for column, ((share, extent), place) in enumerate(zip(maps, places, strict=True)):
        axes = figure.add_subplot(grid[1, column], title=("teacher", "student")[column])
        axes.imshow(aerial)
        strength = np.sqrt(share / share.max())
        axes.imshow(strength, extent=extent, cmap="inferno", alpha=0.75 * strength)
        axes.plot(place[1], place[0], "o", markersize=12, fillstyle="none", color="cyan")
        fix = sample["fix"].numpy()
        axes.plot(fix[1], fix[0], "+", color="white", markersize=10)
        if distillation.true_from_fix is not None:
            offset = distillation.true_from_fix[int(sample["index"])] / float(sample["meters_per_pixel"])
            axes.plot(fix[1] + offset[0], fix[0] - offset[1], "x", color="lime", markersize=10)
        axes.set(xlim=(-0.5, aerial.shape[1] - 0.5), ylim=(aerial.shape[0] - 0.5, -0.5))
        axes.axis("off")
    return figure
