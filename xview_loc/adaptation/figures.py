"""Pictures of an adaptation: error curves, the drives on their aerial tiles, pairs with their heat maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from numpy.typing import NDArray

from xview_loc.adaptation.distillation import Adapted, Distillation
from xview_loc.adaptation.indicators import base_turns
from xview_loc.adaptation.labels import PseudoLabels, distance_m, label_batch, turns_of
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.datasets.base import Batch, PairSample, Track
from xview_loc.geodesy import LocalProjection
from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD, CrossViewModel

Array = NDArray[np.float64]
Captioned = tuple[Figure, str]

# Pairs shown with their heat maps.
_SHOWN = 4
# Pairs of the stretch of a drive that is shown from near.
_STRETCH = 40
# A tile is laid under a drive where the middle of every other one is further away, in shares of its side; and
# how many pixels wide a drive's tiles are drawn in all.
_TILE_SPACING, _MAP_PX = 0.4, 1500


def error_curves(distillation: Distillation, adapted: Adapted) -> Figure:
    """Share of the held-out pairs with at most so large an error, teacher and student."""
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
    """Of the distances between labels and the auxiliary student's maxima, m, and where the filter cuts."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    axes.hist(distances, bins=60)
    axes.axvline(float(np.quantile(distances, keep)), color="tab:red", label=f"T = {keep:.0%}")
    axes.legend()
    axes.set(xlabel="distance, m", ylabel="pairs", yscale="log")
    return figure


def track_map(distillation: Distillation, adapted: Adapted) -> Figure:
    """The held-out pairs' estimates, coloured by how far they have moved."""
    track, labels = distillation.track, adapted.after.plain
    assert track is not None
    fixes = _fixes(track)
    place = fixes[labels.index] + labels.from_fix
    figure = Figure(figsize=(7, 7))
    axes = figure.add_subplot()
    axes.plot(*fixes.T, ".", color="0.8", markersize=2, label="coarse fixes")
    colours = np.minimum(distance_m(adapted.before.plain, labels), 20.0)
    dots = axes.scatter(place[:, 0], place[:, 1], s=9, c=colours, cmap="viridis", label="student")
    figure.colorbar(dots, ax=axes, shrink=0.7)
    _metres(axes)
    axes.legend()
    return figure


def smoothed_drive(distillation: Distillation, maxima: PseudoLabels, smoothed: Smoothed) -> list[Captioned]:
    """The stretch whose labels moved most, and the whole drive that it is of: before and after smoothing."""
    track = distillation.track
    assert track is not None
    after = replace(maxima, position=smoothed.position)
    whole, stretch = most_moved(track.drive[maxima.index], distance_m(maxima, after))
    figures = []
    for rows, what in (
        (stretch, "The stretch of a drive whose labels moved most"),
        (whole, "The whole drive"),
    ):
        figure = Figure(figsize=(12, 6.2), layout="compressed")
        panels = (("maxima", maxima.rows(rows)), ("smoothed", after.rows(rows[smoothed.usable[rows]])))
        tiles = _tiles(distillation, maxima.index[rows])
        for axes, (title, labels) in zip(
            figure.subplots(1, 2, sharex=True, sharey=True), panels, strict=True
        ):
            axes.set_title(title)
            _draw_drive(axes, distillation, labels, tiles)
        known = distillation.true_from_fix is not None
        caption = f"{what}: labels red, coarse fixes blue" + (", truth green" if known else "")
        figures.append((figure, caption))
    return figures


def most_moved(drive: NDArray[np.int64], moved: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of pairs' drives and how far their labels moved, both (N,): the rows of the drive with the stretch that
    moved most in all, and of that stretch."""
    found: list[tuple[float, NDArray[np.int64], NDArray[np.int64]]] = []
    for number in np.unique(drive):
        rows = np.flatnonzero(drive == number)
        length = min(_STRETCH, len(rows))
        sums = np.convolve(moved[rows], np.ones(length), "valid")
        start = int(sums.argmax())
        found.append((float(sums[start]), rows, rows[start : start + length]))
    return max(found, key=lambda entry: entry[0])[1:]


def moved_pairs(distillation: Distillation, adapted: Adapted, student: CrossViewModel) -> list[Captioned]:
    """The held-out pairs whose estimate has moved most, with both models' heat maps."""
    before, after = adapted.before.plain, adapted.after.plain
    moved, prior = distance_m(before, after), distillation.options.heading_prior_deg
    figures = []
    for row in np.argsort(-moved)[:_SHOWN]:
        index = int(after.index[row])
        sample = distillation.source[index]
        turns = base_turns(_batch(sample), prior)
        panels = [
            _Panel(name, *_probability(model, sample, prior, turns), labels.position[row])
            for name, model, labels in (
                ("teacher", distillation.teacher.model, before),
                ("student", student, after),
            )
        ]
        caption = f"Pair {index}: the estimate has moved {moved[row]:.1f} m; circle: estimate"
        figures.append(_pair(distillation, sample, panels, caption))
    return figures


def moved_labels(
    distillation: Distillation, adapted: Adapted, smoothed: Smoothed, student: CrossViewModel
) -> list[Captioned]:
    """The pairs whose label smoothing has moved most, with both models' heat maps."""
    maxima = adapted.maxima.of(smoothed.index)
    moved = np.where(smoothed.usable, distance_m(maxima, replace(maxima, position=smoothed.position)), -1.0)
    prior, seed = distillation.options.heading_prior_deg, distillation.options.training.seed
    figures = []
    for row in np.argsort(-moved)[:_SHOWN]:
        index = int(smoothed.index[row])
        sample = distillation.source[index]
        pixels = float(sample["meters_per_pixel"])
        label = smoothed.position[row], smoothed.covariance[row].astype(np.float64) / pixels**2
        turns = turns_of(_batch(sample), prior, seed)
        panels = [
            _Panel(name, *_probability(model, sample, prior, turns), place, *label)
            for name, model, place in (
                ("model that labelled", adapted.labeller.model, maxima.position[row]),
                ("student", student, None),
            )
        ]
        caption = (
            f"Pair {index}: the label has moved {moved[row]:.1f} m; circle: the heat map's maximum, square "
            "and ellipse: the drive's label and its 95 %"
        )
        figures.append(_pair(distillation, sample, panels, caption))
    return figures


def _fixes(track: Track) -> Array:
    """Coarse fixes (N, 2), metres east and north of their middle."""
    middle = LocalProjection(float(track.lat.mean()), float(track.lon.mean()))
    return np.stack(middle.forward(track.lat, track.lon), 1)


def _metres(axes: Axes) -> None:
    axes.set(xlabel="east, m", ylabel="north, m")
    axes.set_aspect("equal")


@dataclass(frozen=True, eq=False)
class _Tile:
    """A picture and where it lies: west, east, south and north border, metres."""

    image: NDArray[np.float32]
    extent: tuple[float, float, float, float]


def _tiles(distillation: Distillation, index: NDArray[np.int64]) -> list[_Tile]:
    """Aerial tiles under the coarse fixes of some pairs, as many as cover the way."""
    assert distillation.track is not None
    fixes = _fixes(distillation.track)
    size = float(np.ptp(fixes[index], axis=0).max())
    tiles: list[_Tile] = []
    covered = np.zeros((0, 2))
    spec = distillation.teacher.model.spec
    apart = _TILE_SPACING * spec.aerial_size * spec.gsd
    for k in index:
        if len(covered) and np.hypot(*(covered - fixes[k]).T).min() < apart:
            continue
        covered = np.vstack([covered, fixes[k]])
        sample = distillation.source[int(k)]
        gsd, (row, col) = float(sample["meters_per_pixel"]), sample["fix"].tolist()
        image = _picture(sample["aerial"])
        side = image.shape[0]
        west, north = fixes[k] + gsd * np.array([-0.5 - col, row + 0.5])
        every = max(1, int(size / gsd / _MAP_PX))
        extent = (west, west + side * gsd, north - side * gsd, north)
        tiles.append(_Tile(image[::every, ::every].copy(), extent))
    return tiles


def _draw_drive(axes: Axes, distillation: Distillation, labels: PseudoLabels, tiles: list[_Tile]) -> None:
    assert distillation.track is not None
    for tile in tiles:
        axes.imshow(tile.image, extent=tile.extent)
    fixes = _fixes(distillation.track)[labels.index]
    place = fixes + labels.from_fix
    axes.plot(*fixes.T, ".", color="tab:blue", markersize=4)
    if distillation.true_from_fix is not None:
        axes.plot(*(fixes + distillation.true_from_fix[labels.index]).T, "-", color="lime", linewidth=1.5)
    axes.plot(*place.T, "-", color="red", linewidth=0.4)
    axes.plot(*place.T, ".", color="red", markersize=3)
    _metres(axes)


@dataclass(frozen=True, eq=False)
class _Panel:
    """A heat map on its tile (left, right, bottom, top in pixels), an estimate, and a label with its
    covariance; places are (row, col)."""

    title: str
    share: NDArray[np.float32]
    extent: tuple[float, float, float, float]
    estimate: NDArray[np.float32] | None
    label: NDArray[np.float32] | None = None
    covariance: Array | None = None


def _batch(sample: PairSample) -> Batch:
    return {name: value[None] for name, value in sample.items() if isinstance(value, torch.Tensor)}


def _probability(
    model: CrossViewModel, sample: PairSample, prior: float | None, turns: NDArray[np.int64] | None
) -> tuple[NDArray[np.float32], tuple[float, float, float, float]]:
    """A pair's heat map and where it lies on the tile (left, right, bottom, top in pixels)."""
    maps = label_batch(model.eval().cpu(), _batch(sample), prior, turns=turns)[1]
    share = torch.softmax(maps.logits[0].float().flatten(), 0).view_as(maps.logits[0])
    (row, col), scale, side = maps.grid.origin, maps.grid.scale, share.shape[0]
    first, last = -0.5 * scale, (side - 0.5) * scale
    return share.numpy(), (col + first, col + last, row + last, row + first)


def _picture(image: torch.Tensor) -> NDArray[np.float32]:
    plain = image * IMAGENET_STD[:, None, None] + IMAGENET_MEAN[:, None, None]
    return np.asarray(plain.clamp(0, 1).permute(1, 2, 0).numpy(), np.float32)


def _pair(distillation: Distillation, sample: PairSample, panels: list[_Panel], caption: str) -> Captioned:
    """The ground image above heat maps on the aerial tile."""
    figure = Figure(figsize=(8, 6))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 2.6))
    above = figure.add_subplot(grid[0, :])
    above.imshow(_picture(sample["ground"]))
    above.axis("off")
    aerial = _picture(sample["aerial"])
    row, col = sample["fix"].tolist()
    caption += ", plus: coarse fix"
    if distillation.true_from_fix is not None:
        east, north = distillation.true_from_fix[int(sample["index"])] / float(sample["meters_per_pixel"])
        caption += ", cross: truth"
    for column, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1, column], title=panel.title)
        axes.imshow(aerial)
        strength = np.sqrt(panel.share / panel.share.max())
        axes.imshow(strength, extent=panel.extent, cmap="inferno", alpha=0.75 * strength)
        if panel.estimate is not None:
            axes.plot(*panel.estimate[::-1], "o", markersize=12, fillstyle="none", color="cyan")
        if panel.label is not None:
            axes.plot(*panel.label[::-1], "s", markersize=12, fillstyle="none", color="yellow")
        if panel.label is not None and panel.covariance is not None and np.isfinite(panel.covariance).all():
            axes.add_patch(_ellipse(panel.label, panel.covariance))
        axes.plot(col, row, "+", color="white", markersize=10)
        if distillation.true_from_fix is not None:
            axes.plot(col + east, row - north, "x", color="lime", markersize=10)
        axes.set(xlim=(-0.5, aerial.shape[1] - 0.5), ylim=(aerial.shape[0] - 0.5, -0.5))
        axes.axis("off")
    return figure, caption


def _ellipse(place: NDArray[np.float32], covariance: Array) -> Ellipse:
    """Of 95 %; covariance: ENU, pixels squared."""
    values, vectors = np.linalg.eigh(covariance)
    width, height = 2.0 * np.sqrt(5.991 * values.clip(0.0))
    # Rows count down.
    angle = np.degrees(np.arctan2(-vectors[1, 0], vectors[0, 0]))
    return Ellipse((place[1], place[0]), width, height, angle=angle, fill=False, color="yellow")
