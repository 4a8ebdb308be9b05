"""Figures of an adaptation: error curves, drives on their aerial tiles, pairs with their heat maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from numpy.typing import NDArray

from xview_loc.adaptation.distillation import Adapted, Distillation
from xview_loc.adaptation.indicators import MAX_DISAGREEMENT_M, Indicators, base_turns
from xview_loc.adaptation.labelling import ReadOptions, label_batch, turns_of
from xview_loc.adaptation.labels import PseudoLabels, distance_m, turned
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.datasets.base import Batch, PairSample, Track
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import CrossViewModel
from xview_loc.models.inputs import denormalise

Array = NDArray[np.float64]
Captioned = tuple[Figure, str]
# An image and its extent: left, right, bottom and top.
Placed = tuple[NDArray[Any], tuple[float, float, float, float]]

# Number of pairs shown with their heat maps, and the least number of pairs between them.
_SHOWN, _NEIGHBOURS = 4, 5
# Length in pairs of the stretch of a drive that is shown enlarged.
_STRETCH = 40
# Least distance between the tiles drawn under a drive, as a share of their side.
_TILE_SPACING = 0.4
# Number of tiles along the longer side of a drawn area, at most.
_TILES_ACROSS = 40
# Width in pixels at which all tiles of a drive are drawn.
_MAP_PX = 1500


def error_curves(distillation: Distillation, adapted: Adapted) -> Figure:
    """Plot the cumulative distribution of true held-out errors, for teacher and student."""
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


def distance_histogram(distances: Array, keep: float) -> Figure:
    """Plot the distances between labels and auxiliary student, m, and the filter's threshold."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    axes.hist(distances, bins=60)
    axes.axvline(float(np.quantile(distances, keep)), color="tab:red", label=f"T = {keep:.0%}")
    axes.legend()
    axes.set(xlabel="distance, m", ylabel="pairs", yscale="log")
    return figure


def both_tracks(
    distillation: Distillation, adapted: Adapted, before: Indicators, after: Indicators
) -> Figure:
    """Draw both models' held-out estimates on the aerial tiles, coloured by their inconsistency."""
    assert distillation.track is not None
    figure = Figure(figsize=(12, 6.2), layout="compressed")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    tiles = _tiles(distillation, adapted.after.plain.index)
    models = ("teacher", adapted.before, before), ("student", adapted.after, after)
    for axes, (name, views, indicators) in zip(panels, models, strict=True):
        for image, extent in tiles:
            axes.imshow(image, extent=extent)
        fixes = _fixes(distillation.track)[views.plain.index]
        axes.plot(*fixes.T, ".", color="white", markersize=2)
        places, colours = fixes + views.plain.from_fix, indicators.score_terms()
        scale: dict[str, Any] = {"cmap": "plasma", "vmin": 0.0, "vmax": MAX_DISAGREEMENT_M}
        dots = axes.scatter(*places.T, s=16, c=colours, edgecolors="black", linewidths=0.3, **scale)
        axes.set_title(name)
        axes.autoscale_view()
        _metres(axes)
    figure.colorbar(dots, ax=panels, shrink=0.7, label="inconsistency, m")
    return figure


def smoothed_drive(distillation: Distillation, maxima: PseudoLabels, smoothed: Smoothed) -> list[Captioned]:
    """Draw labels before and after smoothing: the stretch where they moved most, and its whole drive."""
    track = distillation.track
    assert track is not None
    after = replace(maxima, position=smoothed.position)
    whole, stretch = most_moved(track.drive[maxima.index], distance_m(maxima, after))
    figures = []
    for rows, what in ((stretch, "The part of a drive whose labels moved most"), (whole, "The whole drive")):
        figure = Figure(figsize=(12, 6.2), layout="compressed")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        tiles = _tiles(distillation, maxima.index[rows])
        _draw_drive(left, "maxima", distillation, maxima.rows(rows), tiles)
        _draw_drive(right, "smoothed", distillation, after.rows(rows[smoothed.usable[rows]]), tiles)
        truth = "" if distillation.true_from_fix is None else ", truth green"
        figures.append((figure, f"{what}: labels red, coarse fixes blue{truth}"))
    return figures


def most_moved(drive: NDArray[np.int64], moved: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the stretch of a drive whose labels moved most in total; return the drive's rows and its rows.

    ``drive`` (N,) numbers each pair's drive; ``moved`` (N,) are the distances that labels moved.
    """
    found: list[tuple[float, NDArray[np.int64], NDArray[np.int64]]] = []
    for number in np.unique(drive):
        rows = np.flatnonzero(drive == number)
        length = min(_STRETCH, len(rows))
        sums = np.convolve(moved[rows], np.ones(length), "valid")
        start = int(sums.argmax())
        found.append((float(sums[start]), rows, rows[start : start + length]))
    return max(found, key=lambda entry: entry[0])[1:]


def worst_pairs(
    distillation: Distillation, adapted: Adapted, student: CrossViewModel, after: Indicators
) -> list[Captioned]:
    """Show the student's worst held-out pairs: by true errors where known, else by inconsistency."""
    errors, what = distillation.true_errors_m(adapted.after.plain), "from the true position"
    if np.isnan(errors).all():
        errors, what = after.score_terms(), "of inconsistency"
    return [
        _both_models(distillation, adapted, student, row, f"{errors[row]:.1f} m {what}")
        for row in _largest(errors)
    ]


def moved_pairs(distillation: Distillation, adapted: Adapted, student: CrossViewModel) -> list[Captioned]:
    """Show the held-out pairs whose estimate moved most, with both models' heat maps."""
    moved = distance_m(adapted.before.plain, adapted.after.plain)
    return [
        _both_models(distillation, adapted, student, row, f"the estimate moved by {moved[row]:.1f} m")
        for row in _largest(moved)
    ]


def _largest(values: Array) -> list[int]:
    """Return the rows of the largest known values, apart if they can be: neighbours show the same street."""
    order = [row for row in np.argsort(-np.nan_to_num(values, nan=-1.0)).tolist() if values[row] >= 0.0]
    apart: list[int] = []
    for row in order:
        if all(abs(row - other) > _NEIGHBOURS for other in apart):
            apart.append(row)
    return [*apart, *(row for row in order if row not in apart)][:_SHOWN]


def _both_models(
    distillation: Distillation, adapted: Adapted, student: CrossViewModel, row: int, what: str
) -> Captioned:
    """Draw a held-out pair with the heat maps of teacher and student."""
    prior, index = distillation.options.heading_prior_deg, int(adapted.after.plain.index[row])
    sample = distillation.source[index]
    turns = base_turns(_batch(sample), prior)
    models = (
        ("teacher", distillation.teacher.model, adapted.before.plain),
        ("student", student, adapted.after.plain),
    )
    panels = [
        _Panel(name, _heat_map(model, sample, prior, turns), labels.position[row])
        for name, model, labels in models
    ]
    return _pair(distillation, sample, panels, f"Pair {index}: {what}")


def moved_labels(
    distillation: Distillation, adapted: Adapted, smoothed: Smoothed, student: CrossViewModel
) -> list[Captioned]:
    """Show the pairs whose label moved most by smoothing, with both models' heat maps."""
    maxima = adapted.maxima.of(smoothed.index)
    moved = np.where(smoothed.usable, distance_m(maxima, replace(maxima, position=smoothed.position)), -1.0)
    prior, seed = distillation.options.heading_prior_deg, distillation.options.training.seed
    figures = []
    for row in _largest(moved):
        index = int(smoothed.index[row])
        sample = distillation.source[index]
        pixels = float(sample["meters_per_pixel"])
        label = smoothed.position[row], smoothed.covariance[row].astype(np.float64) / pixels**2
        turns = turns_of(_batch(sample), ReadOptions(prior, seed))
        first, second = (
            _heat_map(model, sample, prior, turns) for model in (adapted.labeller.model, student)
        )
        panels = [
            _Panel("labelling model", first, maxima.position[row], *label),
            _Panel("student", second, None, *label),
        ]
        caption = f"Pair {index}: the label moved by {moved[row]:.1f} m"
        figures.append(_pair(distillation, sample, panels, caption))
    return figures


def _fixes(track: Track) -> Array:
    """Return coarse fixes (N, 2), metres east and north of their mean."""
    middle = LocalProjection(float(track.lat.mean()), float(track.lon.mean()))
    return np.stack(middle.forward(track.lat, track.lon), 1)


def _metres(axes: Axes) -> None:
    axes.set(xlabel="east, m", ylabel="north, m")
    axes.set_aspect("equal")


def _tiles(distillation: Distillation, index: NDArray[np.int64]) -> list[Placed]:
    """Return the aerial tiles around the coarse fixes of some pairs, enough to cover them; metres."""
    assert distillation.track is not None
    fixes = _fixes(distillation.track)
    size = float(np.ptp(fixes[index], axis=0).max())
    tiles: list[Placed] = []
    covered = np.zeros((0, 2))
    spec = distillation.teacher.model.spec
    # A large area gets fewer tiles: with these it is covered about as well as it can be seen.
    apart = max(_TILE_SPACING * spec.aerial_size * spec.gsd, size / _TILES_ACROSS)
    for k in index:
        if len(covered) and np.hypot(*(covered - fixes[k]).T).min() < apart:
            continue
        covered = np.vstack([covered, fixes[k]])
        sample = distillation.source[int(k)]
        gsd, (row, col) = float(sample["meters_per_pixel"]), sample["fix"].tolist()
        image = np.rint(255.0 * denormalise(sample["aerial"], spec)).astype(np.uint8)
        middle, half, turn = (len(image) - 1) / 2, len(image) * gsd / 2, _turn(sample)
        # Corners that a turned tile does not show are transparent.
        north_up = AerialTile(image, 0.0, 0.0, gsd, rotation=float(turn[0])).rotated(0.0, len(image))
        picture = np.dstack([north_up.image, np.uint8(255) * north_up.valid])
        (east, north), *_ = fixes[k] + turned(gsd * np.array([[middle - col, row - middle]]), turn)
        every = max(1, int(size / gsd / _MAP_PX))
        extent = (east - half, east + half, north - half, north + half)
        tiles.append((picture[::every, ::every].copy(), extent))
    return tiles


def _draw_drive(
    axes: Axes, title: str, distillation: Distillation, labels: PseudoLabels, tiles: list[Placed]
) -> None:
    """Draw tiles, coarse fixes, labels and the truth if known."""
    assert distillation.track is not None
    axes.set_title(title)
    for image, extent in tiles:
        axes.imshow(image, extent=extent)
    fixes = _fixes(distillation.track)[labels.index]
    positions = fixes + labels.from_fix
    axes.plot(*fixes.T, ".", color="tab:blue", markersize=4)
    if distillation.true_from_fix is not None:
        axes.plot(*(fixes + distillation.true_from_fix[labels.index]).T, "-", color="lime", linewidth=1.5)
    axes.plot(*positions.T, "-", color="red", linewidth=0.4)
    axes.plot(*positions.T, ".", color="red", markersize=3)
    _metres(axes)


@dataclass(frozen=True, eq=False)
class _Panel:
    """A heat map on its tile, with an estimate and a label, if any; positions are (row, col), tile pixels.

    ``covariance`` is that of the label, ENU, pixels squared.
    """

    title: str
    heat_map: Placed
    estimate: NDArray[np.float32] | None
    label: NDArray[np.float32] | None = None
    covariance: Array | None = None


def _batch(sample: PairSample) -> Batch:
    return {name: value[None] for name, value in sample.items() if isinstance(value, torch.Tensor)}


def _turn(sample: PairSample) -> Array:
    """Return the turn (1,) of a pair's tile, radians; zero with north up."""
    return np.array([float(sample.get("turn", 0.0))])


def _heat_map(
    model: CrossViewModel, sample: PairSample, prior: float | None, turns: NDArray[np.int64] | None
) -> Placed:
    """Return a pair's probability on its tile."""
    maps = label_batch(model.eval().cpu(), _batch(sample), prior, turns=turns)[1]
    share = torch.softmax(maps.logits[0].float().flatten(), 0).view_as(maps.logits[0])
    (row, col), scale, side = maps.grid.origin, maps.grid.scale, share.shape[0]
    first, last = -0.5 * scale, (side - 0.5) * scale
    return share.numpy(), (col + first, col + last, row + last, row + first)


def _pair(distillation: Distillation, sample: PairSample, panels: list[_Panel], caption: str) -> Captioned:
    """Draw the ground image above the heat maps on the aerial tile."""
    spec = distillation.teacher.model.spec
    figure = Figure(figsize=(8, 6))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 2.6))
    above = figure.add_subplot(grid[0, :])
    above.imshow(denormalise(sample["ground"], spec))
    above.axis("off")
    aerial = denormalise(sample["aerial"], spec)
    row, col = sample["fix"].tolist()
    if distillation.true_from_fix is not None:
        pixels = distillation.true_from_fix[int(sample["index"])] / float(sample["meters_per_pixel"])
        right, up = turned(pixels[None], -_turn(sample))[0]
    for column, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1, column], title=panel.title)
        axes.imshow(aerial)
        probability, extent = panel.heat_map
        strength = np.sqrt(probability / probability.max())
        axes.imshow(strength, extent=extent, cmap="inferno", alpha=0.75 * strength)
        if panel.estimate is not None:
            axes.plot(*panel.estimate[::-1], "o", markersize=12, fillstyle="none", color="cyan")
        if panel.label is not None:
            axes.plot(*panel.label[::-1], "s", markersize=12, fillstyle="none", color="yellow")
            if panel.covariance is not None and np.isfinite(panel.covariance).all():
                values, vectors = np.linalg.eigh(panel.covariance)
                # Its 95 % region. Rows grow downwards.
                width, height = 2.0 * np.sqrt(5.991 * values.clip(0.0))
                angle = np.degrees(np.arctan2(-vectors[1, 0], vectors[0, 0]) + _turn(sample)[0])
                look = {"angle": angle, "fill": False, "color": "yellow"}
                axes.add_patch(Ellipse(panel.label[::-1].tolist(), width, height, **look))
        axes.plot(col, row, "+", color="white", markersize=10)
        if distillation.true_from_fix is not None:
            axes.plot(col + right, row - up, "x", color="lime", markersize=10)
        axes.set(xlim=(-0.5, aerial.shape[1] - 0.5), ylim=(aerial.shape[0] - 0.5, -0.5))
        axes.axis("off")
    return figure, caption
