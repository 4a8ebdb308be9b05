"""Training losses on a model's heat maps, as defined by the models' authors.

Positions are (row, col) pixel-centre coordinates of a square map. Headings are angles of the ground image's
centre column in the convention of :attr:`xview_loc.models.base.HeatMaps.orientation`, radians.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xview_loc.estimation.localizer import MIN_SEARCH_M, SEARCH_SIGMAS
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.ggcvt import ranking_loss
from xview_loc.training.turned_panoramas import turn_back

TEMPERATURE = 0.1
# Cells with a larger label are positives.
POSITIVE = 1e-2


def gaussian_label(position: Tensor, size: int, sigma: float | Tensor) -> Tensor:
    """Draw Gaussians of peak 1 at ``position`` (B, 2), (row, col): (B, size, size).

    ``sigma`` in pixels, for all or (B,).
    """
    axis = torch.arange(size, device=position.device, dtype=position.dtype)
    width = torch.as_tensor(sigma, device=position.device, dtype=position.dtype).expand(len(position))
    rows, cols = (torch.exp(-0.5 * ((axis - position[:, i, None]) / width[:, None]) ** 2) for i in (0, 1))
    return rows[:, :, None] * cols[:, None, :]


def bin_weights(heading: Tensor, count: int) -> Tensor:
    """Distribute ``heading`` (B,) linearly over the nearest two of ``count`` bins: weights (B, count).

    Bins count clockwise from north, as CCVPE's do: bin i is the heading -2 pi i / count.
    """
    position = (heading % (2 * math.pi)) * (count / (2 * math.pi))
    index = position.floor()
    ratio = position - index
    near = (count - index.long()) % count
    far = (count - index.long() - 1) % count
    weights = torch.zeros(len(heading), count, device=heading.device, dtype=heading.dtype)
    weights.scatter_add_(1, near[:, None], (1 - ratio)[:, None])
    weights.scatter_add_(1, far[:, None], ratio[:, None])
    return weights


def pool_label(label: Tensor, side: int) -> Tensor:
    """Max-pool the finest map's ``label`` (B, n, n) to a coarser level (B, side, side) of the same centre."""
    stride = round(label.shape[1] / side)
    # GGCVT's coarse windows are a little larger; if the difference is odd, cells are centred on a pixel.
    spare = stride * side - label.shape[1]
    odd = spare % 2
    label = F.pad(label[:, None], ((spare + odd) // 2,) * 4)
    return F.max_pool2d(label, stride + odd, stride)[:, 0]


def info_nce(scores: Tensor, label: Tensor, bins: Tensor, positive: float = POSITIVE) -> Tensor:
    """Compute CCVPE's InfoNCE loss of one level's ``scores`` (B, n, h, w) (T-PAMI 2023, section on losses).

    ``label`` (B, H, W), not negative, has the finest map's size and is max-pooled to the level; ``bins``
    (B, n) are weights of the heading bins. Cells with a label above ``positive`` are weighted by it.
    """
    target = bins[:, :, None, None] * pool_label(label, scores.shape[2])[:, None]
    target = torch.where(target > positive, target, 0.0)
    log_share = F.log_softmax(scores.float().flatten(1) / TEMPERATURE, dim=1)
    return -(log_share * target.flatten(1)).sum() / target.sum().clamp_min(1e-12)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Compute the mean cross-entropy of ``logits`` (B, H, W) against ``label`` (B, H, W), normalised here."""
    log_share = F.log_softmax(logits.float().flatten(1), dim=1)
    share = label / label.sum((1, 2), keepdim=True).clamp_min(1e-12)
    return -(log_share * share.flatten(1)).sum(1).mean()


def orientation_error(field: Tensor, heading: Tensor, label: Tensor) -> Tensor:
    """Sum the squared error of the (cos, sin) ``field`` (B, 2, H, W), weighted by ``label`` (B, H, W).

    Returns the mean over the batch. As published, the label is not normalised.
    """
    target = torch.stack([heading.cos(), heading.sin()], 1)[:, :, None, None]
    error = (field.float() - target).square().sum(1)
    return (error * label).sum((1, 2)).mean()


class HeatMapLoss(ABC):
    """A loss of a model on a batch (fields of :class:`xview_loc.datasets.base.Sample`)."""

    @abstractmethod
    def __call__(
        self, model: CrossViewModel, batch: Mapping[str, Tensor], heading_prior_deg: float | None
    ) -> Tensor:
        """Run the model, as far as needed, and return the scalar loss of the batch."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return name and settings, for a checkpoint's metadata."""

    @property
    def moving_teacher(self) -> CrossViewModel | None:
        """The model that :meth:`end_epoch` changes, and that an interrupted run must keep."""
        return None

    def end_epoch(self, model: CrossViewModel) -> None:  # noqa: B027
        """Follow the trained model after each epoch; most losses do not."""


@dataclass(frozen=True)
class CCVPELoss(HeatMapLoss):
    """CCVPE's supervised loss: cross-entropy of the finest map, InfoNCE of every level, orientation.

    ``sigma`` is the label's standard deviation in tile pixels (the authors' 4 are 0.56 m on VIGOR's tiles);
    uncertain positions, with the batch's ``label_std``, get wider labels. The weights are the authors'.
    """

    sigma: float = 4.0
    level_weight: float = 1e4
    orientation_weight: float = 10.0

    def __call__(
        self, model: CrossViewModel, batch: Mapping[str, Tensor], heading_prior_deg: float | None
    ) -> Tensor:
        """See :class:`HeatMapLoss`; the orientation is included unless the prior is 0."""
        assert isinstance(model, CCVPE)
        prior = model.spec.matching_prior(heading_prior_deg)
        features = model.encode_aerial(batch["aerial"])
        maps = model.match(batch["ground"], features, prior, orientation=prior != 0)
        sigma = torch.full_like(batch["heading"], self.sigma)
        if "label_std" in batch:
            sigma = sigma.maximum(batch["label_std"] / batch["meters_per_pixel"])
        label = gaussian_label(batch["position"], model.spec.aerial_size, sigma)
        bins = bin_weights(batch["heading"], model.spec.bins)[:, model.prior_bins(prior)]
        levels = [info_nce(scores, label, bins) for scores in maps.levels]
        total = cross_entropy(maps.logits, label) + self.level_weight * torch.stack(levels).mean()
        if maps.orientation is not None:
            # The error sums over the label, whose area grows with its width.
            even = label * (self.sigma / sigma)[:, None, None].square()
            error = orientation_error(maps.orientation, batch["heading"], even)
            total = total + self.orientation_weight * error
        return total

    def to_json(self) -> dict[str, Any]:
        """See :class:`HeatMapLoss`."""
        return {"name": "ccvpe", **asdict(self)}


@dataclass(frozen=True)
class GGCVTLoss(HeatMapLoss):
    """GGCVT's supervised loss (:func:`xview_loc.models.ggcvt.ranking_loss`)."""

    def __call__(
        self, model: CrossViewModel, batch: Mapping[str, Tensor], heading_prior_deg: float | None
    ) -> Tensor:
        """See :class:`HeatMapLoss`."""
        maps = _match(model, batch, heading_prior_deg)
        return ranking_loss(maps, batch["position"], model.spec.aerial_size)

    def to_json(self) -> dict[str, Any]:
        """See :class:`HeatMapLoss`."""
        return {"name": "ggcvt"}


def _match(model: CrossViewModel, batch: Mapping[str, Tensor], heading_prior_deg: float | None) -> HeatMaps:
    extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
    prior = model.spec.matching_prior(heading_prior_deg)
    return model.match(batch["ground"], model.encode_aerial(batch["aerial"]), prior, **extra)


def search_radius(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the localizer's search radius (B,) in tile pixels: 3 ``fix_std``, NaN where that is NaN."""
    return (SEARCH_SIGMAS * batch["fix_std"]).clamp_min(MIN_SEARCH_M) / batch["meters_per_pixel"]


@dataclass(frozen=True)
class DistillationLoss(HeatMapLoss):
    """Coarse-only supervision by pseudo ground truth (ECCV 2024, Sections 3.1 and 3.2).

    The mean over the first ``levels`` levels of the InfoNCE loss against the pseudo ground truth X: a
    Gaussian of ``sigma`` tile pixels (Equation 6) about the batch's ``position``, or the ``teacher``'s heat
    map with the heading prior ``teacher_prior_deg``. For CCVPE, labels are distributed over the heading bins
    by the batch's ``heading``.
    """

    levels: int
    sigma: float = 4.0
    teacher: CrossViewModel | None = None
    teacher_prior_deg: float | None = None
    weight: ClassVar[float] = 1e4  # as published

    def __call__(
        self, model: CrossViewModel, batch: Mapping[str, Tensor], heading_prior_deg: float | None
    ) -> Tensor:
        """See :class:`HeatMapLoss`."""
        extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
        features = model.encode_aerial(batch["aerial"])
        # All bins are scored, whatever the prior: those of wrong headings are negatives too.
        prior = None if isinstance(model, CCVPE) else heading_prior_deg
        maps = model.match_levels(batch["ground"], features, prior, self.levels, **extra)
        label = self._label(model, batch)
        bins = torch.ones_like(batch["heading"])[:, None]
        if isinstance(model, CCVPE):
            bins = bin_weights(batch["heading"], model.spec.bins)
        values = [info_nce(scores, label, bins, positive=0.0) for scores in maps]
        return self.weight * torch.stack(values).mean()

    def to_json(self) -> dict[str, Any]:
        """See :class:`HeatMapLoss`."""
        mode_based = self.teacher is None
        target = {"sigma": self.sigma} if mode_based else {"teacher_prior_deg": self.teacher_prior_deg}
        return {"name": "distillation", "levels": self.levels, "mode_based": mode_based, **target}

    def _label(self, model: CrossViewModel, batch: Mapping[str, Tensor]) -> Tensor:
        if self.teacher is None:
            grid = model.grid
            cell = (batch["position"] - batch["position"].new_tensor(grid.origin)) / grid.scale
            return gaussian_label(cell, model.map_size, self.sigma / grid.scale)
        teacher, prior = self.teacher.eval().to(batch["ground"].device), self.teacher_prior_deg
        if prior is not None and model.spec.camera == "panorama":
            # The student's panoramas may be turned further than the teacher is to search.
            batch = turn_back(batch)
        with torch.no_grad():
            maps = _match(teacher, batch, prior)
            logits = maps.within(batch["fix"], search_radius(batch)).logits
            share: Tensor = logits.float().flatten(1).softmax(1).view_as(logits)
        return share


@dataclass(frozen=True)
class GeoDistillLoss(HeatMapLoss):
    """GeoDistill's loss (ICCV 2025): a student that sees a sector learns a teacher's heat maps of the whole.

    The mean cross-entropy over the first ``levels`` levels, both heat maps sharpened by one ``temperature``.
    After every epoch the ``teacher``'s weights are the exponential moving average of themselves and the
    student's; its batch statistics stay, as published. So are ``decay`` and temperature.
    """

    levels: int
    teacher: CrossViewModel
    temperature: float = 0.06
    decay: float = 0.9

    def __call__(
        self, model: CrossViewModel, batch: Mapping[str, Tensor], heading_prior_deg: float | None
    ) -> Tensor:
        """See :class:`HeatMapLoss`; the teacher sees the batch's ``whole`` panoramas, if it has them."""
        whole = {**batch, "ground": batch.get("whole", batch["ground"])}
        with torch.no_grad():
            teacher = self.teacher.eval().to(batch["ground"].device)
            targets = self._levels(teacher, whole, heading_prior_deg)
        values = [
            -(target.softmax(1) * scores.log_softmax(1)).sum(1).mean()
            for scores, target in zip(self._levels(model, batch, heading_prior_deg), targets, strict=True)
        ]
        return torch.stack(values).mean()

    def _levels(
        self, model: CrossViewModel, batch: Mapping[str, Tensor], prior: float | None
    ) -> list[Tensor]:
        extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
        features = model.encode_aerial(batch["aerial"])
        prior = model.spec.matching_prior(prior)
        levels = model.match_levels(batch["ground"], features, prior, self.levels, **extra)
        return [level.float().flatten(1) / self.temperature for level in levels]

    @property
    def moving_teacher(self) -> CrossViewModel | None:
        """See :class:`HeatMapLoss`."""
        return self.teacher

    def end_epoch(self, model: CrossViewModel) -> None:
        """See :class:`HeatMapLoss`."""
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), model.parameters(), strict=True):
                own.lerp_(other.detach().to(own.device), 1.0 - self.decay)

    def to_json(self) -> dict[str, Any]:
        """See :class:`HeatMapLoss`."""
        constants = {"temperature": self.temperature, "decay": self.decay}
        return {"name": "geodistill", "levels": self.levels, **constants}


def loss_for(model: CrossViewModel) -> HeatMapLoss:
    """Return the loss of a model's authors."""
    return CCVPELoss() if isinstance(model, CCVPE) else GGCVTLoss()
