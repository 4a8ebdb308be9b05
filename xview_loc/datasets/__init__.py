"""Datasets of ground images, aerial tiles and true poses, for training and evaluation."""

from __future__ import annotations

import math
from pathlib import Path

from xview_loc.datasets.base import DatasetError, PoseDataset, Sample
from xview_loc.datasets.kitti import KittiDataset
from xview_loc.datasets.simulated import SimulatedDataset
from xview_loc.datasets.vigor import Labels, VigorDataset
from xview_loc.models.base import ModelSpec

__all__ = [
    "DatasetError",
    "KittiDataset",
    "PoseDataset",
    "Sample",
    "SimulatedDataset",
    "VigorDataset",
    "open_dataset",
]

# The benchmark's own test turns tiles by up to so much where the heading is not known.
_KITTI_ROTATION_DEG = 10.0
_FORMS = "simulated:STYLE:CITIES:FRAMES, vigor:ROOT:SPLIT, kitti:ROOT:SPLIT"


def open_dataset(
    text: str,
    spec: ModelSpec,
    *,
    half_extent_m: float = math.inf,
    cache_dir: Path | None = None,
    augment: bool = False,
    heading_known: bool = True,
) -> PoseDataset:
    """Open the dataset that ``text`` names for a model of ``spec``; DatasetError if ``text`` names none.

    ``half_extent_m``: half the side of the square that the model searches.

    ``simulated:STYLE:CITIES:FRAMES``: cities ``3`` or ``0-23`` of a style, so many frames in each;
    ``half_extent_m``, ``cache_dir`` and ``augment`` are :class:`SimulatedDataset`'s.
    ``vigor:ROOT:SPLIT``: a split of :class:`VigorDataset`, ``vigor:ROOT:SPLIT:original`` with the original
    labels; unless ``heading_known``, panoramas are turned at random.
    ``kitti:ROOT:SPLIT``: a split of :class:`KittiDataset`; unless ``heading_known``, tiles are turned by up
    to 10 degrees either way.
    """
    kind, _, rest = text.partition(":")
    if kind == "simulated":
        return SimulatedDataset.parse(
            rest, spec, half_extent_m=half_extent_m, cache_dir=cache_dir, augment=augment
        )
    labels: Labels = "original" if kind == "vigor" and rest.endswith(":original") else "corrected"
    root, colon, split = rest.removesuffix(":original").rpartition(":")
    if kind == "vigor" and colon:
        return VigorDataset(Path(root), split, spec, labels=labels, heading_known=heading_known)
    if kind == "kitti" and colon:
        rotation = 0.0 if heading_known else _KITTI_ROTATION_DEG
        return KittiDataset(Path(root), split, spec, rotation_deg=rotation)
    raise DatasetError(f"unknown dataset {text!r}; known: {_FORMS}")
