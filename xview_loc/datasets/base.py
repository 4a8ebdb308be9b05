"""What datasets give to training, adaptation and evaluation."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from xview_loc.errors import UserError


class DatasetError(UserError):
    """A dataset that cannot be used; the message is one clear line."""


class _PairSample(TypedDict):
    ground: Tensor
    aerial: Tensor
    fix: Tensor
    fix_std: Tensor
    heading_known: Tensor
    meters_per_pixel: Tensor
    index: Tensor


class PairSample(_PairSample, total=False):
    """One ground image and the aerial tile around its coarse fix; batches stack each field.

    ground: float32 (3, h, w), normalised; a panorama faces north as far as the measured heading knows.
    aerial: float32 (3, S, S), normalised. fix: float32 (2,), the coarse fix's (row, col) in tile pixels.
    fix_std: float32 (), its standard deviation along either axis, m (not-a-number if unknown).
    heading_known: bool (). meters_per_pixel: float32 (), of the tile. index: int64 (), in the dataset.
    intrinsics: float32 (3, 3), the camera matrix in pixels of ``ground``; of pinhole cameras only.
    """

    intrinsics: Tensor


class Sample(PairSample):
    """A pair with its true pose.

    position: float32 (2,), the camera's (row, col) in tile pixels. heading: float32 (), the true angle of
    the image's centre column in the convention of :attr:`xview_loc.models.base.HeatMaps.orientation`,
    radians.
    """

    position: Tensor
    heading: Tensor


class PoseDataset(Dataset[Sample]):
    """Ground images with known poses.

    A sample is a function of its index and the ``epoch`` (set it before making a DataLoader's workers),
    whatever the order in which samples are read: what a run that was cut off needs to go on as it was.
    """

    name: str
    epoch: int = 0

    def __len__(self) -> int:
        raise NotImplementedError
