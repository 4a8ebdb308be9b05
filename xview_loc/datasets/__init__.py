"""Datasets of ground images, aerial tiles and true poses, for training and evaluation."""

from __future__ import annotations

import math
import re
from pathlib import Path

from xview_loc.datasets.base import DatasetError, PoseDataset, Sample
from xview_loc.datasets.kitti import Intrinsics, KittiDataset
from xview_loc.datasets.simulated import SimulatedDataset, parse_cities
from xview_loc.datasets.vigor import Labels, VigorDataset
from xview_loc.models.specs import ModelSpec

__all__ = [
    "DatasetError",
    "KittiDataset",
    "PoseDataset",
    "Sample",
    "SimulatedDataset",
    "VigorDataset",
    "open_dataset",
]

# The benchmark's own test with an unknown heading turns tiles by up to this angle either way.
_KITTI_ROTATION_DEG = 10.0
_FORMS = "simulated:STYLE:CITIES:FRAMES[:any-camera], vigor:ROOT:SPLIT, kitti:ROOT:SPLIT"


def open_dataset(
    text: str,
    spec: ModelSpec,
    *,
    half_extent_m: float = math.inf,
    cache_dir: Path | None = None,
    augment: bool = False,
    heading_known: bool = True,
) -> PoseDataset:
    """Open the dataset named by ``text`` for a model of ``spec``. Raises DatasetError.

    ``simulated:STYLE:CITIES:FRAMES``: FRAMES frames in each of the cities ``3`` or ``0-23`` of a style, see
    :class:`SimulatedDataset`, which gets ``half_extent_m`` (half the side of the square that the model
    searches), ``cache_dir`` and ``augment``; with ``:any-camera`` at the end, random cameras see a part of
    each panorama.
    ``vigor:ROOT:SPLIT``: a split of :class:`VigorDataset`; ``vigor:ROOT:SPLIT:original`` uses the original
    labels. Without ``heading_known``, panoramas are turned at random.
    ``kitti:ROOT:SPLIT``: a split of :class:`KittiDataset`; ``kitti:ROOT:SPLIT:exact`` uses exact intrinsics.
    Without ``heading_known``, tiles are turned by up to 10 degrees either way.
    """
    kind, _, rest = text.partition(":")
    if kind == "simulated":
        match = re.fullmatch(r"(\w+):([^:]+):(\d+)(:any-camera)?", rest)
        if not match:
            raise DatasetError(
                f"a simulated dataset is written STYLE:CITIES:FRAMES[:any-camera], not {rest!r}"
            )
        return SimulatedDataset(
            match[1],
            parse_cities(match[2]),
            int(match[3]),
            spec,
            half_extent_m=half_extent_m,
            cache_dir=cache_dir,
            augment=augment,
            any_camera=bool(match[4]),
        )
    variant = {"vigor": ":original", "kitti": ":exact"}.get(kind, "")
    root, colon, split = rest.removesuffix(variant).rpartition(":")
    if kind == "vigor" and colon:
        labels: Labels = "original" if rest.endswith(variant) else "corrected"
        return VigorDataset(Path(root), split, spec, labels=labels, heading_known=heading_known)
    if kind == "kitti" and colon:
        rotation = 0.0 if heading_known else _KITTI_ROTATION_DEG
        intrinsics: Intrinsics = "exact" if rest.endswith(variant) else "published"
        return KittiDataset(Path(root), split, spec, rotation_deg=rotation, intrinsics=intrinsics)
    raise DatasetError(f"unknown dataset {text!r}; known: {_FORMS}")
