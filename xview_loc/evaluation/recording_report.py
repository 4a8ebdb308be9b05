"""Figures, files and an HTML page of recordings that were replayed beside true positions."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from xview_loc.datasets.pairs import PairDataset
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.overlay import draw_overlay
from xview_loc.evaluation.errors import Errors
from xview_loc.evaluation.replay import Poses, Replay, look_again
from xview_loc.files import write_whole
from xview_loc.maps.base import AerialMap, MapError
from xview_loc.report import Page, finite
from xview_loc.statistics import coverage
from xview_loc.vehicle.mounting import in_enu

Array = NDArray[np.float64]

# What is compared with the truth, and its name on a page.
SOURCES = {"fix": "coarse fix", "single": "single images", "filtered": "filtered"}
_COLOURS = {"fix": "tab:red", "single": "tab:orange", "filtered": "tab:blue"}
# Edges of the classes of speed, m/s, and of the fix's error, metres.
_SPEEDS = (0.0, 1.0, 5.0, 10.0, 20.0, math.inf)
_FIX_ERRORS = (0.0, 3.0, 10.0, 20.0, 40.0, math.inf)
# Longest side of the drawn map, pixels, and its margin, metres.
_MAP_PX, _MARGIN_M = 1200, 40.0


def joined(replays: Sequence[Replay], source: str) -> dict[str, Array]:
    """Return error, along, across and sigmas of one source, each (N,), for the images of all recordings."""
    columns: dict[str, list[Array]] = {"error": [], "along": [], "across": [], "sigmas": []}
    for one in replays:
        poses: Poses = getattr(one, source)
        along, across = one.along_across(poses)
        values = poses.errors(one.truth), along, across, poses.sigmas(one.truth)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def summary(replays: Sequence[Replay]) -> dict[str, Any]:
    """Return the figures of all recordings together, JSON values; None where nothing is known."""
    every = {source: joined(replays, source) for source in SOURCES}
    speed = np.concatenate([one.speed for one in replays])
    figures: dict[str, Any] = {"images": len(speed)}
    common = np.isfinite(every["filtered"]["error"])
    figures["fix_where_filtered"] = asdict(Errors.of(every["fix"]["error"][common]))
    figures["images_with_truth"] = int(sum(np.isfinite(one.truth[:, 0]).sum() for one in replays))
    for source, columns in every.items():
        turned = np.isfinite(columns["along"])
        parts = tuple(np.where(turned, columns[name], math.nan) for name in ("along", "across"))
        errors = asdict(Errors.of(columns["error"]))
        for name, part in zip(("longitudinal", "lateral"), parts, strict=True):
            moving = np.abs(part[np.isfinite(part)])
            if len(moving):
                errors |= {f"{name}_mean": float(moving.mean()), f"{name}_median": float(np.median(moving))}
        known = columns["error"][np.isfinite(columns["error"])]
        errors["rmse"] = float(np.sqrt((known**2).mean())) if len(known) else math.nan
        errors["max"] = float(known.max()) if len(known) else math.nan
        sigmas = columns["sigmas"][np.isfinite(columns["sigmas"])]
        if len(sigmas):
            errors |= {f"coverage_{percent}": coverage(sigmas, percent / 100) for percent in (50, 68, 95)}
            errors["nees"] = float((sigmas**2).mean())
        errors["by_speed"] = _classes(columns["error"], speed, _SPEEDS)
        errors["by_fix_error"] = _classes(columns["error"], every["fix"]["error"], _FIX_ERRORS)
        figures[source] = errors
    return figures


def _classes(errors: Array, values: Array, edges: Sequence[float]) -> list[dict[str, float]]:
    rows = []
    for low, high in pairwise(edges):
        inside = (values >= low) & (values < high)
        if (row := Errors.of(errors[inside])).frames:
            figures = {"frames": row.frames, "mean": row.mean, "median": row.median, "p95": row.p95}
            rows.append({"from": low, "to": high, **figures})
    return rows


def table(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the main table."""
    heads = ["metres", "mean", "median", "95 %", "max", "along", "across", "in 95 %"]
    rows = []
    for source, name in SOURCES.items():
        errors = figures[source]
        cells = [errors[key] for key in ("mean", "median", "p95", "max")]
        cells += [errors["longitudinal_median"], errors["lateral_median"]]
        texts = ["" if not math.isfinite(cell) else f"{cell:.2f}" for cell in cells]
        rows.append([name, *texts, f"{errors['coverage_95']:.1%}" if "coverage_95" in errors else ""])
    return heads, rows


def write_metrics(figures: dict[str, Any], folder: Path) -> None:
    """Write metrics.json."""
    write_whole(folder / "metrics.json", json.dumps(finite(figures), indent=1, allow_nan=False).encode())


def write_recording(one: Replay, folder: Path) -> None:
    """Write errors.csv and trajectories in TUM's format of one recording, into a folder of its name."""
    below = folder / one.name
    below.mkdir(parents=True, exist_ok=True)
    write_whole(below / "errors.csv", _csv(one).encode())
    heading = np.where(np.isfinite(one.single.heading), one.single.heading, one.filtered.heading)
    write_whole(below / "truth.tum", _tum(one.stamp_ns, one.truth, heading).encode())
    for source in SOURCES:
        poses: Poses = getattr(one, source)
        write_whole(below / f"{source}.tum", _tum(one.stamp_ns, poses.place, poses.heading).encode())


def _tum(stamp_ns: NDArray[np.int64], place: Array, heading: Array) -> str:
    """Return lines of stamp (s), x, y, z (m), and a quaternion, which is that of no turn if unknown."""
    lines = []
    for stamp, (x, y), yaw in zip(stamp_ns.tolist(), place, np.nan_to_num(heading), strict=True):
        if math.isfinite(x):
            seconds, part = divmod(stamp, 1_000_000_000)
            quaternion = f"0 0 {math.sin(yaw / 2):.9f} {math.cos(yaw / 2):.9f}"
            lines.append(f"{seconds}.{part:09d} {x:.4f} {y:.4f} 0 {quaternion}\n")
    return "".join(lines)


def _csv(one: Replay) -> str:
    buffer = io.StringIO()
    names = ["stamp", "true_lat", "true_lon", "speed"]
    columns: list[Array] = [*map(np.asarray, one.plane.inverse(*one.truth.T)), one.speed]
    for source in SOURCES:
        poses: Poses = getattr(one, source)
        names += [f"{source}_{name}" for name in ("error", "along", "across", "sigmas")]
        columns += [poses.errors(one.truth), *one.along_across(poses), poses.sigmas(one.truth)]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "refused"])
    for stamp, values, refused in zip(one.stamp_ns.tolist(), np.array(columns).T, one.refused, strict=True):
        cells = ["" if not math.isfinite(value) else f"{value:.8g}" for value in values[2:]]
        place = ["" if not math.isfinite(value) else f"{value:.9f}" for value in values[:2]]
        seconds, part = divmod(stamp, 1_000_000_000)
        writer.writerow([f"{seconds}.{part:09d}", *place, *cells, refused])
    return buffer.getvalue()


def page(
    replays: Sequence[Replay],
    figures: dict[str, Any],
    facts: dict[str, str],
    aerial: AerialMap,
    worst: Sequence[tuple[Figure, str]],
) -> Page:
    """Return the report. facts: the settings, by name. worst: pictures of images that misled the model."""
    result = Page("Localisation beside true positions: " + ", ".join(one.name for one in replays))
    for line in verdict(figures):
        result.text(line)
    result.table(*table(figures))
    result.text(
        "Errors are horizontal distances of base_link from the true positions; along and across are the "
        "medians of their parts in the direction of motion and across it. An honest covariance holds the "
        "truth in its 95 % ellipse 95 times in 100. Images that gave no pose are left out."
    )
    result.figure(_curves(replays), "Share of images with an error below")
    for one in replays:
        result.heading(one.name)
        result.figure(_map(one, aerial), "The drive on the aerial image")
        result.figure(_over_time(one), "Errors over time")
    for key, what in (("by_speed", "Errors by speed, m/s"), ("by_fix_error", "Errors by that of the fix, m")):
        result.heading(what)
        result.table(*_class_table(figures, key))
    if worst:
        result.heading("Images that show the wrong place")
        for figure, caption in worst:
            result.figure(figure, caption)
    if refused := _refusals(replays):
        result.heading("Images that gave no pose of their own")
        result.table(["reason", "images"], refused)
    result.heading("Settings")
    result.table(["", "value"], [[name, value] for name, value in facts.items()])
    return result


def verdict(figures: dict[str, Any]) -> list[str]:
    """Say in plain words how good the localisation is, and what to do."""
    filtered, single = figures["filtered"], figures["single"]
    if not filtered["frames"]:
        return ["The filter had no position: check that the recording has odometry, fixes and headings."]
    ratio = figures["fix_where_filtered"]["mean"] / filtered["mean"]
    gain = f"{ratio:.1f} times as precise as the coarse fix" if ratio >= 1.0 else "worse than the coarse fix"
    lines = [
        f"Filtered over time, positions are {filtered['mean']:.2f} m off on average (95 %: "
        f"{filtered['p95']:.2f} m), {gain} of the same images "
        f"({figures['fix_where_filtered']['mean']:.2f} m). {filtered['frames']} of "
        f"{figures['images_with_truth']} images have such a position."
    ]
    if single["frames"]:
        share = single["frames"] / figures["images_with_truth"]
        lines.append(
            f"{share:.0%} of the images gave one by themselves, {single['median']:.2f} m off in the median."
        )
    else:
        lines.append("No image gave a pose by itself: the filter rests on odometry and fixes alone.")
    if ratio < 1.0:
        lines.append(
            "Do not use it here as it is: check map, heading and odometry (docs/diagnostics.md), and adapt "
            "the model to this area (xview-loc adapt)."
        )
    elif single["frames"] and single["mean"] > 2.0 * filtered["mean"]:
        lines.append(
            "Many images show a wrong place by themselves: adapt the model to this area (xview-loc adapt)."
        )
    if "nees" in filtered and not 0.9 <= filtered["coverage_95"] <= 0.995:
        kind = "too small" if filtered["coverage_95"] < 0.95 else "too large"
        lines.append(
            f"The filter's covariance is {kind}: its 95 % ellipse holds {filtered['coverage_95']:.0%}."
        )
    return lines


def draw_image(
    one: Replay, i: int, dataset: PairDataset, localizer: Localizer, use_heading: bool
) -> tuple[Figure, str]:
    """Draw an image beside its heat map, with a caption."""
    observation, estimate, mounting = look_again(i, dataset, localizer, use_heading)
    lever = (
        (0.0, 0.0)
        if estimate.heading is None
        else in_enu(mounting.camera, mounting.heading(estimate.heading))
    )
    lat, lon = (float(v) for v in one.plane.inverse(*(one.truth[i] + lever)))
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.imshow(observation.image)
    right.imshow(draw_overlay(estimate, lat, lon))
    for axes in (left, right):
        axes.set_axis_off()
    seconds = (one.stamp_ns[i] - one.stamp_ns[0]) / 1e9
    error = float(one.single.errors(one.truth)[i])
    return figure, f"{one.name}, {seconds:.1f} s: {error:.1f} m off; the cross is the true position"


def _class_table(figures: dict[str, Any], key: str) -> tuple[list[str], list[list[str]]]:
    bounds = sorted({(row["from"], row["to"]) for source in SOURCES for row in figures[source][key]})
    rows = []
    for low, high in bounds:
        cells = [f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"]
        for source in SOURCES:
            row = next((row for row in figures[source][key] if row["from"] == low), None)
            cells.append("" if row is None else f"{row['mean']:.2f} / {row['median']:.2f} ({row['frames']})")
        rows.append(cells)
    return ["mean / median (images)", *SOURCES.values()], rows


def _refusals(replays: Sequence[Replay]) -> list[list[str]]:
    # Without the figures in them, so that equal reasons are counted together.
    reasons = Counter(re.sub(r"\d[\d.]*", "N", reason) for one in replays for reason in one.refused if reason)
    return [[name, str(count)] for name, count in reasons.most_common(10)]


def _curves(replays: Sequence[Replay]) -> Figure:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    for source, name in SOURCES.items():
        errors = np.sort(joined(replays, source)["error"])
        errors = errors[np.isfinite(errors)]
        axes.plot(
            errors, np.arange(1, len(errors) + 1) / max(1, len(errors)), label=name, color=_COLOURS[source]
        )
    axes.set(xlabel="error, m", ylabel="share of images", xlim=(0, 30), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _over_time(one: Replay) -> Figure:
    figure = Figure(figsize=(8, 3))
    axes = figure.add_subplot()
    seconds = (one.stamp_ns - one.stamp_ns[0]) / 1e9
    for source, name in SOURCES.items():
        errors = getattr(one, source).errors(one.truth)
        axes.plot(seconds, errors, ".-", markersize=2, linewidth=0.6, label=name, color=_COLOURS[source])
    axes.set(xlabel="seconds", ylabel="error, m", yscale="symlog", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _map(one: Replay, aerial: AerialMap) -> Figure:
    figure = Figure(figsize=(8, 8))
    axes = figure.add_subplot()
    places = np.concatenate([one.truth, one.fix.place, one.filtered.place])
    low, high = np.nanmin(places, 0) - _MARGIN_M, np.nanmax(places, 0) + _MARGIN_M
    middle, side = (low + high) / 2, float((high - low).max())
    lat, lon = (float(v) for v in one.plane.inverse(*middle))
    try:
        tile = aerial.tile(lat, lon, _MAP_PX, side / _MAP_PX)
        (left, right), (bottom, top) = ((m - side / 2, m + side / 2) for m in middle)
        axes.imshow(tile.image, extent=(left, right, bottom, top))
    except MapError:
        pass  # the tracks alone
    axes.plot(*one.truth.T, color="white", linewidth=2.5)
    axes.plot(*one.truth.T, color="black", linewidth=1.2, label="true positions")
    for source, name in SOURCES.items():
        axes.plot(*getattr(one, source).place.T, ".", markersize=3, label=name, color=_COLOURS[source])
    axes.set(xlabel="east, m", ylabel="north, m", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.set_aspect("equal")
    axes.legend()
    return figure
