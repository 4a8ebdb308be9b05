"""Training losses on a model's heat maps, as the models' authors define them.

Positions are (row, col) pixel-centre coordinates of a square map; headings are angles of the ground image's
centre column, radians, counter-clockwise from north (see :class:`xview_loc.models.base.HeatMaps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.ggcvt import ranking_loss

TEMPERATURE = 0.1
# Cells whose label is larger than this count as positives.
POSITIVE = 1e-2


def gaussian_label(position: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussian bumps (B, size, size) of peak 1 at ``position`` (B, 2), (row, col); ``sigma`` in pixels."""
    axis = torch.arange(size, device=position.device, dtype=position.dtype)
    rows, cols = (torch.exp(-0.5 * ((axis - position[:, i, None]) / sigma) ** 2) for i in (0, 1))
    return rows[:, :, None] * cols[:, None, :]


def bin_weights(heading: Tensor, count: int) -> Tensor:
    """Share (B, count) of each of ``count`` heading bins in ``heading`` (B,), linear between the nearest two.

    The bins count clockwise from north, as CCVPE's do: bin i is the heading -2 pi i / count.
    """
    place = (heading % (2 * math.pi)) * (count / (2 * math.pi))
    index = place.floor()
    ratio = place - index
    near = (count - index.long()) % count
    far = (count - index.long() - 1) % count
    weights = torch.zeros(len(heading), count, device=heading.device, dtype=heading.dtype)
    weights.scatter_add_(1, near[:, None], (1 - ratio)[:, None])
    weights.scatter_add_(1, far[:, None], ratio[:, None])
    return weights


def info_nce(scores: Tensor, label: Tensor, bins: Tensor) -> Tensor:
    """CCVPE's InfoNCE of one level (T-PAMI 2023, section on the losses).

    scores: (B, n, h, w), the level's heat map. label: (B, H, W), peak 1, of a size that is a multiple of
    (h, w); it is max-pooled to the level. bins: (B, n), share of each heading bin (ones where there is one).
    """
    pooled = F.adaptive_max_pool2d(label, scores.shape[2:])
    target = bins[:, :, None, None] * pooled[:, None]
    target = torch.where(target > POSITIVE, target, 0.0)
    log_share = F.log_softmax(scores.float().flatten(1) / TEMPERATURE, dim=1)
    return -(log_share * target.flatten(1)).sum() / target.sum().clamp_min(1e-12)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy of the finest map (B, H, W) against ``label`` (B, H, W), normalised here."""
    log_share = F.log_softmax(logits.float().flatten(1), dim=1)
    return -(log_share * _normalised(label).flatten(1)).sum(1).mean()


def orientation_error(field: Tensor, heading: Tensor, label: Tensor) -> Tensor:
    """Squared error of the (cos, sin) ``field`` (B, 2, H, W), weighted by the normalised ``label``."""
    target = torch.stack([heading.cos(), heading.sin()], 1)[:, :, None, None]
    error = (field.float() - target).square().sum(1)
    return (error * _normalised(label)).sum((1, 2)).mean()


def _normalised(label: Tensor) -> Tensor:
    return label / label.sum((1, 2), keepdim=True).clamp_min(1e-12)


class HeatMapLoss(Protocol):
    """A loss on what a model makes of a batch (fields of :class:`xview_loc.datasets.base.Sample`).

    ``orientation``: whether it wants the orientation field where the heading is not known.
    """

    orientation: ClassVar[bool]

    def __call__(
        self,
        model: CrossViewModel,
        maps: HeatMaps,
        batch: Mapping[str, Tensor],
        heading_prior_deg: float | None,
    ) -> Tensor:
        """The scalar loss of one batch."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Name and settings, for a checkpoint's metadata."""
        ...


@dataclass(frozen=True)
class CCVPELoss:
    """CCVPE's supervised loss: cross-entropy of the finest map, InfoNCE of every level, orientation.

    ``sigma`` is the label's standard deviation in tile pixels (the authors' 4 are 0.56 m on VIGOR's tiles);
    the weights are the authors'.
    """

    sigma: float = 4.0
    level_weight: float = 1e4
    orientation_weight: float = 10.0
    orientation: ClassVar[bool] = True

    def __call__(
        self,
        model: CrossViewModel,
        maps: HeatMaps,
        batch: Mapping[str, Tensor],
        heading_prior_deg: float | None,
    ) -> Tensor:
        """The scalar loss of one batch."""
        assert isinstance(model, CCVPE)
        label = gaussian_label(batch["position"], model.spec.aerial_size, self.sigma)
        bins = bin_weights(batch["heading"], model.spec.bins)[:, model.prior_bins(heading_prior_deg)]
        levels = [info_nce(scores, label, bins) for scores in maps.levels]
        total = cross_entropy(maps.logits, label) + self.level_weight * torch.stack(levels).mean()
        if maps.orientation is not None:
            error = orientation_error(maps.orientation, batch["heading"], label)
            total = total + self.orientation_weight * error
        return total

    def to_json(self) -> dict[str, Any]:
        """Name and settings, for a checkpoint's metadata."""
        return {"name": "ccvpe", **asdict(self)}


@dataclass(frozen=True)
class GGCVTLoss:
    """GGCVT's supervised loss (:func:`xview_loc.models.ggcvt.ranking_loss`)."""

    orientation: ClassVar[bool] = False

    def __call__(
        self,
        model: CrossViewModel,
        maps: HeatMaps,
        batch: Mapping[str, Tensor],
        heading_prior_deg: float | None,
    ) -> Tensor:
        """The scalar loss of one batch."""
        return ranking_loss(maps, batch["position"], model.spec.aerial_size)

    def to_json(self) -> dict[str, Any]:
        """The name, for a checkpoint's metadata."""
        return {"name": "ggcvt"}


def loss_for(model: CrossViewModel) -> HeatMapLoss:
    """The authors' loss of a model."""
    return CCVPELoss() if isinstance(model, CCVPE) else GGCVTLoss()
