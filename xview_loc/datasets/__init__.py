"""Datasets of ground images, aerial tiles and true poses, for training and evaluation."""

from __future__ import annotations

import math
from pathlib import Path

from xview_loc.datasets.base import DatasetError, PoseDataset, Sample
from xview_loc.datasets.simulated import SimulatedDataset
from xview_loc.models.base import ModelSpec

__all__ = ["DatasetError", "PoseDataset", "Sample", "SimulatedDataset", "open_dataset"]


def open_dataset(
    text: str,
    spec: ModelSpec,
    *,
    reach_m: float = math.inf,
    cache_dir: Path | None = None,
    augment: bool = False,
) -> PoseDataset:
    """The dataset that ``text`` names, for a model of ``spec`` that finds cameras up to ``reach_m`` from a
    tile's centre; DatasetError on what is not one.

    ``simulated:STYLE:CITIES:FRAMES``: cities ``3`` or ``0-23`` of a style, so many frames in each.
    """
    kind, _, rest = text.partition(":")
    if kind == "simulated":
        return SimulatedDataset.parse(rest, spec, reach_m=reach_m, cache_dir=cache_dir, augment=augment)
    raise DatasetError(f"unknown dataset {text!r}; known: simulated:STYLE:CITIES:FRAMES")
