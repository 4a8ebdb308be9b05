"""Bags of pairs as a PyTorch dataset: what a model is adapted on, without ground truth."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from xview_loc.bags.recovery import BagError
from xview_loc.camera import ImageError, normalise, prepare_ground
from xview_loc.datasets.base import DatasetError, PairSample
from xview_loc.imagery import AerialTile
from xview_loc.models.base import ModelSpec
from xview_loc.pairs import PairBag


class PairDataset(Dataset[PairSample]):
    """The pairs of one or more bags, for a model of ``spec``; decoded when asked for, wherever that is.

    A worker of a data loader holds one pair and its tile at a time, and the bags' index. The stored tiles
    must be of the spec's size and ground sample distance.
    Raises BagError where a bag cannot be read, DatasetError where its tiles do not fit.
    """

    def __init__(self, folders: Sequence[Path], spec: ModelSpec) -> None:
        if spec.aerial_up != "north":
            raise DatasetError(f"{spec.name} needs tiles turned to the heading, which pairs do not have")
        self._spec = spec
        self._bags = [PairBag(folder) for folder in folders]
        self._camera_yaws = [float(bag.session().get("camera_yaw", 0.0)) for bag in self._bags]
        self._ends = list(accumulate(len(bag) for bag in self._bags))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> PairSample:
        """Raises IndexError, BagError for a damaged pair, DatasetError for one that does not fit."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        bag = self._bags[number]
        within = index - (self._ends[number - 1] if number else 0)
        pair, tile = bag[within], bag.tile(within)
        if tile is None:
            raise DatasetError(
                f"pair {within} of {bag.folder} has no tile: "
                f"give it one with xview-loc pairs {bag.folder} --map"
            )
        self._check(tile, bag.folder)
        try:
            ground = prepare_ground(
                pair.image(),
                self._spec,
                heading=pair.heading if self._spec.camera == "panorama" else None,
                camera=pair.camera,
                mount_yaw=self._camera_yaws[number],
            )
        except ImageError as error:
            raise BagError(f"pair {within} of {bag.folder} is damaged: {error}") from None
        row, col = tile.enu_to_pixel(*tile.projection.forward(pair.lat, pair.lon))
        return {
            "ground": ground[0],
            "aerial": normalise(tile.image)[0],
            "fix": torch.tensor([row, col], dtype=torch.float32),
            "fix_std": torch.tensor(_std(pair.fix_covariance), dtype=torch.float32),
            "heading_known": torch.tensor(pair.heading is not None),
            "meters_per_pixel": torch.tensor(tile.gsd, dtype=torch.float32),
            "index": torch.tensor(index),
        }

    def _check(self, tile: AerialTile, folder: Path) -> None:
        spec = self._spec
        if tile.size_px != spec.aerial_size or not math.isclose(tile.gsd, spec.gsd, rel_tol=1e-6):
            raise DatasetError(
                f"the tiles of {folder} have {tile.size_px} px at {tile.gsd:g} m/px, {spec.name} needs "
                f"{spec.aerial_size} px at {spec.gsd:g} m/px: cut them anew with xview-loc pairs"
            )


def _std(covariance: NDArray[np.float64] | None) -> float:
    """Along either axis, m: the root mean square of the two."""
    return math.nan if covariance is None else math.sqrt((covariance[0, 0] + covariance[1, 1]) / 2)
