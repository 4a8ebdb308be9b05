"""Label-free indicators: judge a model in an area without true positions, from its own heat maps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from numpy.typing import NDArray

from xview_loc.adaptation.labelling import (
    PairReader,
    ReadOptions,
    encode_tiles,
    gather_rows,
    label_batch,
    prepare_model,
)
from xview_loc.adaptation.labels import AdaptationError, PseudoLabels, distance_m
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.datasets.base import Batch, PairSource, Track
from xview_loc.models.base import CrossViewModel

Array = NDArray[np.float64]

# Shift of the tile down and to the right, as a share of its side.
_TILE_SHIFT = 1 / 16
# Turn of a panorama of known heading: about the error that its heading has anyway.
_TURN_DEG = 3.0
# Cap on a disagreement, so that one wild estimate does not decide about a model.
MAX_DISAGREEMENT_M = 20.0


@dataclass(frozen=True)
class LabelsByView:
    """A model's labels of the same pairs in three views: unchanged, shifted and turned.

    ``shifted`` is on tiles shifted by a sixteenth of their side, in pixels of the unshifted tile. ``turned``
    is of turned panoramas; None for other cameras.
    """

    plain: PseudoLabels
    shifted: PseudoLabels
    turned: PseudoLabels | None


@torch.inference_mode()
def label_views(
    fabric: Fabric, model: CrossViewModel, source: PairSource, index: NDArray[np.int64], options: ReadOptions
) -> LabelsByView:
    """Label the pairs ``index`` of a source in every view; processes share the work.

    Raises AdaptationError if no pair can be used.
    """
    model = prepare_model(fabric, model)
    prior = options.heading_prior_deg
    plain, shifted, turned = [], [], []
    reader = PairReader(fabric, source, index, options)
    step = round(model.spec.aerial_size * _TILE_SHIFT)
    for batch in reader:
        turns = base_turns(batch, prior)
        features = encode_tiles(model, batch["aerial"])
        plain.append(label_batch(model, batch, prior, features, turns)[0])
        if model.spec.camera == "panorama":
            further = _further_turns(batch, prior)
            turned.append(label_batch(model, batch, prior, features, further)[0])
        # Down and to the right; the first row and column fill the gap.
        aerial = F.pad(batch["aerial"], (step, 0, step, 0), mode="replicate")[..., :-step, :-step]
        moved = {**batch, "aerial": aerial, "fix": batch["fix"] + step}
        labels, _ = label_batch(model, moved, prior, turns=turns)
        back = np.float32(step)
        shifted.append(replace(labels, position=labels.position - back, fix=labels.fix - back))
    views = [gather_rows(fabric, labels) for labels in (plain, shifted, turned)]
    if views[0] is None or views[1] is None:
        raise AdaptationError(f"none of {len(index)} held-out pairs can be used: {reader.first_failure}")
    return LabelsByView(views[0], views[1], views[2])


def base_turns(batch: Batch, heading_prior_deg: float | None) -> NDArray[np.int64] | None:
    """Return the columns (B,) by which panoramas are turned in every view.

    Any angle, a function of the pair's index, where the heading is unknown; else None.
    """
    if heading_prior_deg is not None:
        return None
    return np.asarray(batch["index"].cpu().numpy() * 7919 % batch["ground"].shape[3], np.int64)


def _further_turns(batch: Batch, heading_prior_deg: float | None) -> NDArray[np.int64]:
    """Return the columns (B,) of the turned view.

    A third of a turn beyond :func:`base_turns` where the heading is unknown; else a few degrees, left
    and right alternately.
    """
    width = batch["ground"].shape[3]
    base = base_turns(batch, heading_prior_deg)
    if base is not None:
        return base + width // 3
    few = max(1, round(_TURN_DEG / 360 * width))
    return np.where(batch["index"].cpu().numpy() % 2 == 0, few, -few)


@dataclass(frozen=True)
class Indicators:
    """Label-free evidence for or against a model, one value per pair (N,), in metres unless noted.

    ``tile_shift`` and ``turn`` are how far the estimate moves with the shifted tile and the turned panorama,
    ``motion`` the difference between the step from the previous estimate and odometry's, ``drive`` the
    distance of the estimate from where the whole drive places the pair, all at most 20 and NaN where unknown.
    ``stray_sigmas`` and ``peak_mass`` are as in :class:`PseudoLabels`, ``entropy`` is in nats.
    """

    tile_shift: Array
    turn: Array
    motion: Array
    drive: Array
    stray_sigmas: Array
    entropy: Array
    peak_mass: Array

    @classmethod
    def of(cls, views: LabelsByView, track: Track | None, placed: Smoothed | None = None) -> Indicators:
        """Compute the indicators of a model's labels.

        ``track`` holds all pairs of their source, ``placed`` those that whole drives place.
        """
        plain = views.plain
        unknown = np.full(len(plain), math.nan)

        def disagreement(other: PseudoLabels) -> Array:
            return np.minimum(distance_m(plain, other), MAX_DISAGREEMENT_M)

        return cls(
            tile_shift=disagreement(views.shifted),
            turn=unknown if views.turned is None else disagreement(views.turned),
            motion=unknown if track is None else _motion(plain, track.rows(plain.index)),
            drive=unknown if placed is None else _from_placed(plain, placed),
            stray_sigmas=plain.stray_sigmas.astype(np.float64),
            entropy=plain.entropy.astype(np.float64),
            peak_mass=plain.peak_mass.astype(np.float64),
        )

    def self_terms(self) -> Array:
        """Return by how much estimates (N,) contradict themselves, m: mean of the first three."""
        return np.asarray(np.nanmean(np.stack([self.tile_shift, self.turn, self.motion]), axis=0), np.float64)

    def score_terms(self) -> Array:
        """Return each pair's contribution (N,) to the score.

        :meth:`self_terms`, averaged with drive where that is known: an estimate can be consistent and wrong.
        """
        return np.asarray(np.nanmean(np.stack([self.self_terms(), self.drive]), axis=0), np.float64)

    def summary(self) -> dict[str, float]:
        """Return means over the pairs; ``score`` (m, smaller is better) judges the model."""
        columns = {name: values for name, values in vars(self).items() if np.isfinite(values).any()}
        figures = {name: float(np.nanmean(values)) for name, values in columns.items()}
        return {**figures, "score": float(np.nanmean(self.score_terms()))}


def _motion(labels: PseudoLabels, track: Track) -> Array:
    """Distances (N,) between the step from the previous estimate and odometry's, metres."""
    step = track.fix_steps[1:] + np.diff(labels.from_fix, axis=0)
    off = np.full(len(labels), math.nan)
    off[1:] = np.minimum(np.linalg.norm(step - track.moved[1:], axis=1), MAX_DISAGREEMENT_M)
    return off


def _from_placed(labels: PseudoLabels, placed: Smoothed) -> Array:
    """Distances (N,) from where whole drives place the pairs, metres; NaN where they do not."""
    off = np.full(len(labels), math.nan)
    placed = placed.rows(placed.usable).of(labels.index)
    rows = np.isin(labels.index, placed.index)
    distance = distance_m(labels.rows(rows), replace(labels.rows(rows), position=placed.position))
    off[rows] = np.minimum(distance, MAX_DISAGREEMENT_M)
    return off


class LabelFreeValidation:
    """Select the best epoch without ground truth: the one with the lowest score on held-out pairs.

    ``folder`` keeps the labels of each epoch (:func:`held_out_file`), to compare with the truth if known.
    """

    def __init__(
        self,
        fabric: Fabric,
        source: PairSource,
        index: NDArray[np.int64],
        track: Track | None,
        folder: Path,
        options: ReadOptions,
        placed: Smoothed | None = None,
    ) -> None:
        self.name = f"{len(index)} of {source.name}"
        self._fabric, self._source, self._index, self._track = fabric, source, index, track
        self._folder, self._options, self._placed = folder, options, placed

    def __call__(self, model: CrossViewModel, epoch: int) -> dict[str, float]:
        """Return the means of the indicators."""
        views = label_views(self._fabric, model, self._source, self._index, self._options)
        if self._fabric.is_global_zero:
            views.plain.save(held_out_file(self._folder, epoch))
        return Indicators.of(views, self._track, self._placed).summary()


def held_out_file(folder: Path, epoch: int) -> Path:
    """Return the file of a student's labels of the held-out pairs after an epoch."""
    return folder / f"held-out-{epoch}.npz"
