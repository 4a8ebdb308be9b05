"""Hide a sector of each panorama at random: training with a limited field of view."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from xview_loc.datasets.base import Batch


def hide_sectors(
    batch: Mapping[str, Tensor], rng: np.random.Generator, field_of_view_deg: tuple[float, float]
) -> Batch:
    """Keep one sector of each panorama, of a random width within the limits; the rest has the mean colour.

    The panoramas as they were become ``whole``.
    """
    ground = batch["ground"]
    count, width = len(ground), ground.shape[3]
    seen = rng.uniform(*field_of_view_deg, count) * (width / 360.0)
    start = rng.uniform(0.0, width, count)
    columns = (np.arange(width) - start[:, None]) % width
    keep = torch.as_tensor(columns < seen[:, None], device=ground.device)
    # Images are normalised: zero is the mean colour.
    return {**batch, "ground": ground * keep[:, None, None], "whole": ground}
