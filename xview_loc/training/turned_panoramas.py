"""Turn panoramas at random: training and validation with an unknown heading."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.datasets.base import Batch


def turn_panoramas(batch: Mapping[str, Tensor], columns: NDArray[np.int64]) -> Batch:
    """Turn each panorama to the left by ``columns`` (B,), and its heading with it."""
    ground = batch["ground"]
    turned = torch.stack([g.roll(int(c), 2) for g, c in zip(ground, columns, strict=True)])
    angle = torch.as_tensor(columns, dtype=torch.float32, device=ground.device)
    heading = batch["heading"] + angle * (2 * math.pi / ground.shape[3])
    return {**batch, "ground": turned, "heading": heading}


def turn_back(batch: Mapping[str, Tensor]) -> Batch:
    """Turn each panorama north by its heading."""
    columns = batch["heading"] * (batch["ground"].shape[3] / (2 * math.pi))
    return turn_panoramas(batch, -columns.round().long().cpu().numpy())


def random_turns(
    rng: np.random.Generator, count: int, width: int, heading_prior_deg: float | None
) -> NDArray[np.int64]:
    """Draw columns (count,) by which to turn panoramas of ``width`` columns, uniform within the prior."""
    if heading_prior_deg is None:
        return rng.integers(0, width, count)
    most = math.floor(min(heading_prior_deg, 180.0) / 360 * width)
    return rng.integers(-most, most + 1, count)


def turn_at_random(batch: Batch, rng: np.random.Generator, heading_prior_deg: float | None) -> Batch:
    """Turn each panorama by a random angle within the prior, and its heading with it."""
    if heading_prior_deg == 0:
        return batch
    count, width = len(batch["ground"]), batch["ground"].shape[3]
    return turn_panoramas(batch, random_turns(rng, count, width, heading_prior_deg))
