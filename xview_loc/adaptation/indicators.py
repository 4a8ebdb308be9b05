"""Is a model better in an area whose true positions nobody knows? What its heat maps say by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.adaptation.labels import (
    AdaptationError,
    PairReader,
    PseudoLabels,
    distance_m,
    encode_tiles,
    gathered,
    label_batch,
    ready,
)
from xview_loc.datasets.base import Batch, PairSource, Track
from xview_loc.models.base import CrossViewModel

Array = NDArray[np.float64]

# The tile is moved by this share of its side, down and to the right.
_TILE_SHIFT = 1 / 16
# A panorama of known heading is turned by about this much, which its heading's error is anyway.
_TURN_DEG = 3.0
# One wild estimate must not decide over a model: a disagreement counts no more than this.
_MOST_M = 20.0


@dataclass(frozen=True)
class Views:
    """A model's labels of the same pairs, seen in several ways.

    plain: as they are. shifted: on tiles moved by a sixteenth of their side, in the unmoved tile's pixels.
    turned: with the panorama turned, None where it cannot be.
    """

    plain: PseudoLabels
    shifted: PseudoLabels
    turned: PseudoLabels | None


@torch.inference_mode()
def look(
    fabric: Fabric,
    model: CrossViewModel,
    source: PairSource,
    index: NDArray[np.int64],
    *,
    heading_prior_deg: float | None = 0.0,
    batch_size: int = 16,
    workers: int = 0,
) -> Views:
    """Label the pairs ``index`` of a source in every view; several processes share the work.

    Raises AdaptationError where no pair can be used.
    """
    model = ready(fabric, model)
    plain, shifted, turned = [], [], []
    share = index[fabric.global_rank :: fabric.world_size]
    reader = PairReader(source, share, heading_prior_deg, batch_size, workers)
    step = round(model.spec.aerial_size * _TILE_SHIFT)
    for batch in reader:
        batch = fabric.to_device(batch)
        turns = base_turns(batch, heading_prior_deg)
        features = encode_tiles(model, batch["aerial"])
        plain.append(label_batch(model, batch, heading_prior_deg, features, turns)[0])
        if model.spec.camera == "panorama":
            further = further_turns(batch, heading_prior_deg)
            turned.append(label_batch(model, batch, heading_prior_deg, features, further)[0])
        moved = {**batch, "aerial": _shift(batch["aerial"], step), "fix": batch["fix"] + step}
        labels, _ = label_batch(model, moved, heading_prior_deg, turns=turns)
        shifted.append(_moved_back(labels, step))
    views = [gathered(fabric, labels) for labels in (plain, shifted, turned)]
    if views[0] is None or views[1] is None:
        raise AdaptationError(f"none of {len(index)} held-out pairs can be used: {reader.first_failure}")
    return Views(views[0], views[1], views[2])


def base_turns(batch: Batch, heading_prior_deg: float | None) -> NDArray[np.int64] | None:
    """Columns (B,) by which panoramas are turned in every view: any, by the pair's index, where the heading
    is unknown; else None."""
    if heading_prior_deg is not None:
        return None
    return np.asarray(batch["index"].cpu().numpy() * 7919 % batch["ground"].shape[3], np.int64)


def further_turns(batch: Batch, heading_prior_deg: float | None) -> NDArray[np.int64]:
    """Columns (B,) of the turned view: a third of a turn more where the heading is unknown; else a few
    degrees to either side by turns."""
    width = batch["ground"].shape[3]
    base = base_turns(batch, heading_prior_deg)
    if base is not None:
        return base + width // 3
    few = max(1, round(_TURN_DEG / 360 * width))
    return np.where(batch["index"].cpu().numpy() % 2 == 0, few, -few)


def _shift(aerial: Tensor, step: int) -> Tensor:
    """The tile's content ``step`` pixels further down and right; its first row and column fill the gap."""
    return F.pad(aerial, (step, 0, step, 0), mode="replicate")[..., : aerial.shape[2], : aerial.shape[3]]


def _moved_back(labels: PseudoLabels, step: int) -> PseudoLabels:
    back = np.float32(step)
    return replace(labels, position=labels.position - back, fix=labels.fix - back)


@dataclass(frozen=True)
class Indicators:
    """What speaks for or against a model, pair by pair (N,), metres unless said otherwise.

    tile_shift, turn: how far the estimate moves with the tile's cut and the panorama's turn, at most 20.
    motion: how far the step from the previous pair's estimate differs from the odometry's, at most 20;
    not-a-number without. stray_sigmas: distance from the coarse fix, in its standard deviations, of the
    maximum that is not bound to be near it. entropy: nats. peak_mass: probability within two metres of the
    maximum.
    """

    tile_shift: Array
    turn: Array
    motion: Array
    stray_sigmas: Array
    entropy: Array
    peak_mass: Array

    @classmethod
    def of(cls, views: Views, track: Track | None) -> Indicators:
        """From a model's views; ``track`` of the same source (all its pairs)."""
        plain = views.plain
        unknown = np.full(len(plain), math.nan)

        def disagreement(other: PseudoLabels) -> Array:
            return np.minimum(distance_m(plain, other), _MOST_M)

        return cls(
            tile_shift=disagreement(views.shifted),
            turn=unknown if views.turned is None else disagreement(views.turned),
            motion=unknown if track is None else _motion(plain, track.rows(plain.index)),
            stray_sigmas=plain.stray_sigmas.astype(np.float64),
            entropy=plain.entropy.astype(np.float64),
            peak_mass=plain.peak_mass.astype(np.float64),
        )

    def score_terms(self) -> Array:
        """What the score is the mean of, (N,)."""
        terms = np.stack([self.tile_shift, self.turn, self.motion])
        return np.asarray(np.nanmean(terms, axis=0), np.float64)

    def summary(self) -> dict[str, float]:
        """Means over the pairs that have them; ``score`` (m, the smaller the better) judges the model."""
        figures = {}
        for name in ("tile_shift", "turn", "motion", "stray_sigmas", "entropy", "peak_mass"):
            values = getattr(self, name)
            if np.isfinite(values).any():
                figures[name] = float(np.nanmean(values))
        return {**figures, "score": float(np.nanmean(self.score_terms()))}


def _motion(labels: PseudoLabels, track: Track) -> Array:
    """Metres (N,) between the step from the previous estimate and the odometry's."""
    step = track.fix_steps[1:] + np.diff(labels.from_fix, axis=0)
    off = np.full(len(labels), math.nan)
    off[1:] = np.minimum(np.linalg.norm(step - track.moved[1:], axis=1), _MOST_M)
    return off


class LabelFreeValidation:
    """Picks the best epoch without ground truth: the least score on held-out pairs.

    ``folder`` keeps each epoch's labels of them (:func:`held_out_file`), for who knows the truth.
    """

    def __init__(
        self,
        fabric: Fabric,
        source: PairSource,
        index: NDArray[np.int64],
        track: Track | None,
        folder: Path,
        heading_prior_deg: float | None,
        workers: int,
    ) -> None:
        self.name = f"{len(index)} of {source.name}"
        self._fabric, self._source, self._index, self._track = fabric, source, index, track
        self._folder, self._prior, self._workers = folder, heading_prior_deg, workers

    def __call__(self, model: CrossViewModel, epoch: int) -> dict[str, float]:
        """The means of the indicators."""
        views = look(
            self._fabric,
            model,
            self._source,
            self._index,
            heading_prior_deg=self._prior,
            workers=self._workers,
        )
        if self._fabric.is_global_zero:
            views.plain.save(held_out_file(self._folder, epoch))
        return Indicators.of(views, self._track).summary()


def held_out_file(folder: Path, epoch: int) -> Path:
    """Where a student's labels of the held-out pairs after an epoch are kept."""
    return folder / f"held-out-{epoch}.npz"
