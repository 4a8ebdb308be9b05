"""Check pairs before training: do images fit their tiles, headings their drives, and stamps each other?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.adaptation.distillation import Distillation
from xview_loc.adaptation.labelling import ReadOptions, encode_tiles, match_batch, prepare_model, tabulate
from xview_loc.adaptation.labels import PairTable, PseudoLabels
from xview_loc.adaptation.motion import links
from xview_loc.adaptation.smoothing import FIX_STD
from xview_loc.datasets.base import Batch, PairSource, Track
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.statistics import certainty_of_decrease
from xview_loc.vehicle.course import FIX_CORRELATION_S

Array = NDArray[np.float64]

# Pairs that are compared, those that are needed at least, and the certainty that is asked for.
_PAIRS, _LEAST_PAIRS, _CERTAIN = 384, 192, 0.99
# Turns that may explain why images do not fit.
_TURNS_DEG = (90, 180, 270)
# Delay of the fixes from which on it is told, seconds, and standard deviations.
_LEAST_DELAY_S, _SIGMAS = 0.4, 3.0
# Least number of stretches of the drives that tell a delay.
_LEAST_STRETCHES = 12
# Slower pairs tell nothing about delays, m/s.
_LEAST_SPEED = 2.0


@dataclass(frozen=True, eq=False)
class _Fit(PairTable):
    """Probability (N, views) that heat maps give to the coarse fix, averaged over its errors.

    The views are the pair, the tile with another pair's image, and the pair with its image turned.
    """

    near_fix: NDArray[np.float32]


@dataclass(frozen=True)
class DataCheck:
    """What is wrong with pairs, in words: ``faults`` spoil a student, ``remarks`` do not."""

    faults: list[str]
    remarks: list[str]


def check_data(run: Distillation) -> DataCheck:
    """Check the pairs of an adaptation before students are trained; the labels it needs are kept for it.

    Drives that predict their heat maps prove that images fit the map; else a sample of the pairs must.
    """
    faults: list[str] = run.fabric.broadcast(run.source.input_faults() if run.fabric.is_global_zero else [])
    remarks: list[str] = []
    labels, proven = run.teacher_labels(), False
    if run.drives:
        smoothed = run.smoothed(run.teacher).of(labels.index)
        proven = smoothed.mostly_usable
        if proven:
            labels = smoothed.labels(labels.of(smoothed.index))
    if not proven:
        progress = partial(run.on_progress, "check of the pairs")
        fault = match_fault(
            run.fabric, run.teacher.model, run.source, run.training_index, run.reading, progress
        )
        if fault == "" and run.drives:
            fault = (
                "single images fit the map, but whole drives do not explain them: check odometry, and the "
                "stamps of images and fixes"
            )
        faults.append(fault or "")
    if run.track is not None and run.drives:
        remarks.append(fix_delay(run.track, labels))
    return DataCheck(list(filter(None, faults)), list(filter(None, remarks)))


def match_fault(
    fabric: Fabric,
    model: CrossViewModel,
    source: PairSource,
    index: NDArray[np.int64],
    options: ReadOptions,
    on_pairs: Callable[[int, int], object] = lambda done, of: None,
) -> str | None:
    """Say in words how images contradict their tiles; "" for not at all, None if too few pairs can tell.

    An image must fit its own tile better than the images of other pairs do, and than when turned. Fixes so
    uncertain that all of their tile is near them tell nothing. ``on_pairs`` receives the numbers of pairs
    done and in all.
    """
    model = prepare_model(fabric, model)
    chosen = np.random.default_rng(0).permutation(index)[:_PAIRS]
    prior = options.heading_prior_deg
    turnable = model.spec.camera == "panorama" and prior is not None and prior < _TURNS_DEG[0] / 2

    def table_of(batch: Batch, turns: NDArray[np.int64] | None) -> _Fit:
        features = encode_tiles(model, batch["aerial"])
        others: Batch = {name: batch[name].roll(1, 0) for name in ("ground", "intrinsics") if name in batch}
        views = [batch, {**batch, **others}]
        if turnable:
            width = batch["ground"].shape[3]
            views += [{**batch, "ground": batch["ground"].roll(width * t // 360, 3)} for t in _TURNS_DEG]
        near = [_near_fix(match_batch(model, view, prior, features, turns)[0], batch) for view in views]
        return _Fit(batch["index"].cpu().numpy(), torch.stack(near, 1).cpu().numpy())

    with torch.inference_mode():
        fit, _ = tabulate(fabric, source, chosen, options, table_of, lambda done: on_pairs(done, len(chosen)))
    fit = None if fit is None else fit.rows(np.isfinite(fit.near_fix[:, 0]))
    if fit is None or len(fit) < _LEAST_PAIRS:
        return None
    better = (fit.near_fix[:, :1] - fit.near_fix[:, 1:]).astype(np.float64)
    if turnable:
        best = int(better[:, 1:].mean(0).argmin())
        # The best of several is so by chance more often.
        if certainty_of_decrease(better[:, 1 + best]) > 1.0 - (1.0 - _CERTAIN) / len(_TURNS_DEG):
            return (
                f"images fit their aerial tiles better when turned by {_TURNS_DEG[best]} degrees: check "
                "headings, camera_yaw_deg and the camera's transform"
            )
    if certainty_of_decrease(-better[:, 0]) > _CERTAIN:
        return ""
    return (
        f"images fit their own aerial tiles no better than images of other places do ({len(fit)} compared): "
        "check map, headings and stamps, and whether the model suits the camera and the map"
    )


def _near_fix(maps: HeatMaps, batch: Batch) -> Tensor:
    """Return the probability (B,) of the coarse fix's place by the heat maps, averaged over its errors.

    NaN for fixes whose standard deviation exceeds a third of the map's side.
    """
    axis = torch.arange(maps.logits.shape[1], device=maps.logits.device) * maps.grid.scale
    down, right = (axis + origin - batch["fix"][:, k, None] for k, origin in enumerate(maps.grid.origin))
    sigma = batch["fix_std"].nan_to_num(FIX_STD) / batch["meters_per_pixel"]
    wide = sigma > maps.logits.shape[1] * maps.grid.scale / 3.0
    # At least a cell wide: a precise fix would fall between the cells.
    sigma = sigma.clamp_min(maps.grid.scale)
    near = torch.exp(
        -(down.square()[:, :, None] + right.square()[:, None, :]) / (2.0 * sigma.square()[:, None, None])
    )
    return (maps.logits.float().flatten(1).softmax(1) * near.flatten(1)).sum(1).masked_fill(wide, math.nan)


def fix_delay(track: Track, labels: PseudoLabels) -> str:
    """Say in words by how much the fixes are late, or early; "" if that is not sure.

    ``labels``: of pairs along the drives of ``track``, which holds all pairs of their source. The offset of
    labels from fixes is that of a delay, of the antenna in the vehicle's axes, and of the map: a delay is
    told from these by different speeds and courses (least squares).
    """
    track = track.rows(labels.index)
    place = np.cumsum(track.fix_steps, axis=0) + labels.from_fix
    seconds, linked = links(track)
    # The velocity at a pair comes from its neighbours.
    inside = np.append(linked[1:], False) & linked
    ahead, behind = (np.roll(place, shift, axis=0) for shift in (-1, 1))
    lasted = np.where(inside, np.roll(seconds, -1) + seconds, 1.0)
    velocity = (ahead - behind) / lasted[:, None]
    inside &= np.hypot(*velocity.T) > _LEAST_SPEED
    # Errors of fixes last, so stretches of the drive vary, not single pairs.
    stretch = np.cumsum(seconds.clip(0.0)) // (2.0 * FIX_CORRELATION_S) + 1e6 * track.drive
    number = np.unique(stretch[inside], return_inverse=True)[1]
    if not len(number) or number.max() + 1 < _LEAST_STRETCHES:
        return ""
    moving, offset = velocity[inside], labels.from_fix[inside]
    forward = moving / np.hypot(*moving.T)[:, None]
    left = np.stack([-forward[:, 1], forward[:, 0]], 1)
    east = np.broadcast_to([1.0, 0.0], forward.shape)
    # (N, 2, 5): what a second, and a metre forward, left, east and north do to the offset.
    effects = np.stack([moving, forward, left, east, east[:, ::-1]], 2)
    inverse = np.linalg.pinv(np.einsum("nai,naj->ij", effects, effects))
    found = inverse @ np.einsum("nai,na->i", effects, offset)
    residual = np.einsum("nai,na->ni", effects, offset - effects @ found)
    by_stretch = np.stack([np.bincount(number, column) for column in residual.T], 1)
    delay, std = found[0], math.sqrt((inverse @ by_stretch.T @ by_stretch @ inverse)[0, 0])
    if abs(delay) < max(_LEAST_DELAY_S, _SIGMAS * std):
        return ""
    return (
        f"fixes are {abs(delay):.1f} +- {std:.1f} s {'late' if delay > 0 else 'early'} against the images: "
        "check both clocks, and the receiver's latency"
    )
