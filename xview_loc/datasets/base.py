"""What every dataset with known poses gives to training and evaluation."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from xview_loc.errors import UserError


class DatasetError(UserError):
    """A dataset that cannot be used; the message is one clear line."""


class Sample(TypedDict):
    """One ground image on its aerial tile; batches stack each field.

    ground: float32 (3, h, w), normalised; a panorama faces north as far as the measured heading knows.
    aerial: float32 (3, S, S), normalised. position: float32 (2,), the camera's (row, col) in tile pixels.
    heading: float32 (), the true angle of the image's centre column in the convention of
    :attr:`xview_loc.models.base.HeatMaps.orientation`, radians. meters_per_pixel: float32 (), the tile's
    ground sample distance.
    """

    ground: Tensor
    aerial: Tensor
    position: Tensor
    heading: Tensor
    meters_per_pixel: Tensor


class PoseDataset(Dataset[Sample]):
    """Ground images with known poses.

    A sample is a function of its index and the ``epoch`` (set it before making a DataLoader's workers),
    whatever the order in which samples are read: what a run that was cut off needs to go on as it was.
    """

    name: str
    epoch: int = 0

    def __len__(self) -> int:
        raise NotImplementedError
