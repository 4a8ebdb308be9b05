"""Is a model better in an area whose true positions nobody knows? What its heat maps say by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.adaptation.pseudo_labels import (
    AdaptationError,
    PairReader,
    PseudoLabels,
    distance_m,
    label_batch,
)
from xview_loc.datasets.base import PairSource, Track
from xview_loc.models.base import CrossViewModel
from xview_loc.training import Batch

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
    model: CrossViewModel,
    source: PairSource,
    index: NDArray[np.int64],
    *,
    heading_prior_deg: float | None = 0.0,
    batch_size: int = 16,
    workers: int = 0,
) -> Views:
    """Label the pairs ``index`` of a source in every view. Raises AdaptationError where none can be read."""
    device = next(model.parameters()).device
    plain, shifted, turned = [], [], []
    reader = PairReader(source, index, batch_size, workers)
    for batch in reader:
        batch = {name: value.to(device) for name, value in batch.items()}
        turns = view_turns(batch, heading_prior_deg)
        start = turns if heading_prior_deg != 0 else None
        features = model.encode_aerial(batch["aerial"])
        plain.append(label_batch(model, batch, heading_prior_deg, features, start)[0])
        if model.spec.camera == "panorama":
            further = turns if start is None else (turns + batch["ground"].shape[3] // 3)
            turned.append(label_batch(model, batch, heading_prior_deg, features, further)[0])
        step = round(model.spec.aerial_size * _TILE_SHIFT)
        moved = label_batch(
            model, {**batch, "aerial": _shift(batch["aerial"], step)}, heading_prior_deg, None, start
        )
        shifted.append(_moved_back(moved[0], step))
    if not plain:
        raise AdaptationError(f"none of {len(index)} held-out pairs can be used: {reader.first_failure}")
    join = PseudoLabels.joined
    return Views(join(plain), join(shifted), join(turned) if turned else None)


def view_turns(batch: Batch, heading_prior_deg: float | None) -> NDArray[np.int64]:
    """Columns (B,) by which panoramas are turned: any, by the pair's index, where the heading is unknown;
    else a few degrees to either side by turns."""
    width = batch["ground"].shape[3]
    index = batch["index"].cpu().numpy()
    if heading_prior_deg is None:
        return index * 7919 % width
    few = max(1, round(_TURN_DEG / 360 * width))
    return np.where(index % 2 == 0, few, -few)


def _shift(aerial: Tensor, step: int) -> Tensor:
    """The tile's content ``step`` pixels further down and right; its first row and column fill the gap."""
    return F.pad(aerial, (step, 0, step, 0), mode="replicate")[..., : aerial.shape[2], : aerial.shape[3]]


def _moved_back(labels: PseudoLabels, step: int) -> PseudoLabels:
    return replace(labels, position=labels.position - np.float32(step))


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
        """What :attr:`score` is the mean of, (N,)."""
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
    latitude = np.radians(track.lat[1:])
    # Short steps: the local metres per degree of the WGS-84 ellipsoid.
    e2 = 6.69437999014e-3
    curve = 1 - e2 * np.sin(latitude) ** 2
    north = np.radians(np.diff(track.lat)) * 6378137.0 * (1 - e2) / curve**1.5
    east = np.radians(np.diff(track.lon)) * 6378137.0 / np.sqrt(curve) * np.cos(latitude)
    step = np.stack([east, north], 1) + np.diff(labels.from_fix, axis=0)
    off = np.full(len(labels), math.nan)
    off[1:] = np.minimum(np.linalg.norm(step - track.moved[1:], axis=1), _MOST_M)
    return off


class LabelFreeValidation:
    """Picks the best epoch without ground truth: the least :attr:`Indicators.score` on held-out pairs."""

    def __init__(
        self,
        source: PairSource,
        index: NDArray[np.int64],
        track: Track | None,
        heading_prior_deg: float | None,
        batch_size: int,
        workers: int,
        extra: Callable[[Views], Mapping[str, float]] = lambda views: {},
    ) -> None:
        """``extra``: further figures for the history, which do not count."""
        self.name = f"{len(index)} of {source.name}"
        self._source, self._index, self._track = source, index, track
        self._prior, self._batch_size, self._workers = heading_prior_deg, batch_size, workers
        self._extra = extra

    def __call__(self, model: CrossViewModel) -> dict[str, float]:
        """The means of the indicators."""
        views = look(
            model,
            self._source,
            self._index,
            heading_prior_deg=self._prior,
            batch_size=self._batch_size,
            workers=self._workers,
        )
        return {**Indicators.of(views, self._track).summary(), **self._extra(views)}
