"""What datasets give to training, adaptation and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from xview_loc.errors import UserError
from xview_loc.geodesy import LocalProjection

T = TypeVar("T")
# Samples stacked field by field, by the names of PairSample and Sample.
Batch = dict[str, Tensor]


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
    fix_std: float32 (), its standard deviation along its larger axis, m (not-a-number if unknown).
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


@dataclass(frozen=True, eq=False)
class Track:
    """Where and when a source's pairs were taken, in their order; one row for each.

    drive: (N,), numbers the recordings. stamp_ns: (N,). lat, lon: (N,), the coarse fixes, degrees.
    moved: (N, 2), metres east and north driven since the drive's previous pair by its odometry; not-a-number
    where that is not known.
    """

    drive: NDArray[np.int64]
    stamp_ns: NDArray[np.int64]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    moved: NDArray[np.float64]

    def rows(self, index: NDArray[np.int64]) -> Track:
        """Those of some pairs, in ascending order; what was driven to a pair whose predecessor is not among
        them is unknown."""
        moved = self.moved[index].copy()
        moved[~np.isin(index - 1, index)] = np.nan
        return Track(self.drive[index], self.stamp_ns[index], self.lat[index], self.lon[index], moved)

    @property
    def fix_steps(self) -> NDArray[np.float64]:
        """Metres (N, 2) east and north from the previous coarse fix; zero for the first."""
        latitude = np.radians(self.lat[1:])
        # Short steps: the local metres per degree of the WGS-84 ellipsoid.
        e2 = 6.69437999014e-3
        curve = 1 - e2 * np.sin(latitude) ** 2
        north = np.radians(np.diff(self.lat)) * 6378137.0 * (1 - e2) / curve**1.5
        east = np.radians(np.diff(self.lon)) * 6378137.0 / np.sqrt(curve) * np.cos(latitude)
        steps = np.zeros((len(self.lat), 2))
        steps[1:] = np.stack([east, north], 1)
        return steps


def true_from_fix(track: Track, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres (N, 2) east and north from each coarse fix of a track to the true place (degrees, (N,) each)."""
    offsets = [
        LocalProjection(fix_lat, fix_lon).forward(*place)
        for fix_lat, fix_lon, *place in zip(track.lat, track.lon, lat, lon, strict=True)
    ]
    return np.array(offsets, np.float64).reshape(-1, 2)


class PairSource(Dataset[PairSample]):
    """Ground images with coarse fixes and aerial tiles.

    A sample is a function of its index and the ``epoch`` (set it before making a DataLoader's workers),
    whatever the order in which samples are read: what a run that was cut off needs to go on as it was.
    ``name`` says what the source is, and differs where its samples do.
    """

    name: str
    epoch: int = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> PairSample:
        raise NotImplementedError

    def track(self) -> Track | None:
        """Where the pairs come from a vehicle's drives: along which."""
        return None


def clearly(batches: Iterable[T]) -> Iterator[T]:
    """A loader's batches; an error of its worker processes is said in one line, as without them."""
    try:
        yield from batches
    except UserError as error:
        # A worker's comes with its traceback, which ends with the error's type and message.
        message = str(error).strip().splitlines()[-1]
        raise DatasetError(
            message.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        ) from None


class PoseDataset(PairSource):
    """Pairs with known poses."""

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def true_from_fix(self) -> NDArray[np.float64]:
        """Metres (N, 2) from each coarse fix to the true place: east and north, on a north-up tile."""
        offsets = []
        for index in range(len(self)):
            sample = self[index]
            down, right = ((sample["position"] - sample["fix"]) * sample["meters_per_pixel"]).tolist()
            offsets.append((right, -down))
        return np.array(offsets, np.float64).reshape(-1, 2)
