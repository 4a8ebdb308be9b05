"""Interface of the datasets for training, adaptation and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from xview_loc.errors import UserError
from xview_loc.geodesy import LocalProjection, steps_between

T = TypeVar("T")
# Stacked samples: the fields of PairSample or Sample.
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

    ``ground`` (3, h, w) and ``aerial`` (3, S, S) are normalised, float32; panoramas face north according to
    the measured heading. ``fix`` (2,) is the coarse fix's (row, col) in tile pixels, ``fix_std`` its standard
    deviation along its larger axis, m (NaN if unknown). ``meters_per_pixel`` is the tile's ground sample
    distance, ``index`` the sample's in the dataset. ``intrinsics`` (3, 3) is the camera matrix in pixels of
    ``ground``, for pinhole cameras only. ``turn`` is the direction in which the tile's columns grow, radians
    counter-clockwise from east. Without it, true positions are given in the tile's own axes.
    """

    intrinsics: Tensor
    turn: Tensor


class _Sample(PairSample):
    position: Tensor
    heading: Tensor


class Sample(_Sample, total=False):
    """A pair with its true pose: the camera's ``position`` (2,), (row, col) in tile pixels, and ``heading``.

    The heading is the angle of the image's centre column in the convention of
    :attr:`xview_loc.models.base.HeatMaps.orientation`, radians. ``label_std`` is the position's standard
    deviation along an axis, m, where it is not exact.
    """

    label_std: Tensor


@dataclass(frozen=True, eq=False)
class Track:
    """Times and positions of a source's pairs, one row for each pair, in their order.

    ``drive`` numbers the recordings; ``lat`` and ``lon`` are coarse fixes, degrees. ``moved`` (N, 2) is the
    distance driven since the drive's previous pair, metres east and north, from odometry; NaN if unknown.
    """

    drive: NDArray[np.int64]
    stamp_ns: NDArray[np.int64]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    moved: NDArray[np.float64]

    def rows(self, index: NDArray[np.int64]) -> Track:
        """Select pairs, in ascending order; ``moved`` becomes NaN for pairs whose predecessor is left out."""
        moved = self.moved[index].copy()
        moved[~np.isin(index - 1, index)] = np.nan
        return Track(self.drive[index], self.stamp_ns[index], self.lat[index], self.lon[index], moved)

    @property
    def fix_steps(self) -> NDArray[np.float64]:
        """Metres (N, 2) east and north from the previous coarse fix; zero for the first pair."""
        return steps_between(self.lat, self.lon)


def true_from_fix(track: Track, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return metres (N, 2) east and north from a track's coarse fixes to the true ``lat``, ``lon`` (N,)."""
    offsets = [
        LocalProjection(fix_lat, fix_lon).forward(*position)
        for fix_lat, fix_lon, *position in zip(track.lat, track.lon, lat, lon, strict=True)
    ]
    return np.array(offsets, np.float64).reshape(-1, 2)


class PairSource(Dataset[PairSample]):
    """Ground images with coarse fixes and aerial tiles.

    A sample depends only on its index and on ``epoch`` (set it before starting a DataLoader's workers), not
    on the order in which samples are read, so that interrupted runs can be resumed exactly.
    ``name`` identifies the samples: sources with different samples have different names.
    """

    name: str
    epoch: int = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> PairSample:
        raise NotImplementedError

    def track(self) -> Track | None:
        """Return the drives that the pairs were taken on; None if they are not from drives."""
        return None

    def input_faults(self) -> list[str]:
        """Say in words how fixes, headings and odometry contradict each other."""
        return []


class Readable(Dataset[PairSample | UserError]):
    """The samples ``index`` of a source, in this order; one that cannot be read comes as its error."""

    def __init__(self, source: PairSource, index: Sequence[int] | NDArray[np.int64]) -> None:
        self._source, self._index = source, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> PairSample | UserError:
        try:
            return self._source[int(self._index[row])]
        except UserError as error:
            return error


def load_readable(
    samples: Readable, batch_size: int, workers: int
) -> Iterator[tuple[Batch | None, list[UserError]]]:
    """Yield stacked samples, at most ``batch_size``, and the errors of those that cannot be read.

    None: no sample of the batch can be read. ``workers`` are processes that load data.
    """
    for items in DataLoader(samples, batch_size, num_workers=workers, collate_fn=list):
        errors = [item for item in items if isinstance(item, UserError)]
        good = [item for item in items if not isinstance(item, UserError)]
        yield (default_collate(good) if good else None), errors


class JoinedPairs(PairSource):
    """The pairs of one source, followed by those of another, without their drives."""

    def __init__(self, first: PairSource, second: PairSource) -> None:
        self.name = f"{first.name} and {second.name}"
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, index: int) -> PairSample:
        count = len(self._first)
        sample = self._first[index] if index < count else self._second[index - count]
        return {"turn": torch.tensor(0.0), **sample, "index": torch.tensor(index)}

    def input_faults(self) -> list[str]:
        """Return the faults of both."""
        return self._first.input_faults() + self._second.input_faults()


def load_batches(batches: Iterable[T]) -> Iterator[T]:
    """Iterate over a loader's batches. Raises DatasetError with the one-line message of a worker's error."""
    try:
        yield from batches
    except UserError as error:
        # A worker's error is a whole traceback, which ends with the error's type and message.
        message, module = str(error).strip().splitlines()[-1], type(error).__module__
        raise DatasetError(message.removeprefix(f"{module}.{type(error).__name__}: ")) from None


class PoseDataset(PairSource):
    """Pairs with known poses."""

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def true_from_fix(self) -> NDArray[np.float64]:
        """Return metres (N, 2) right and up on the tile (east and north with north up) from fix to truth."""
        offsets = []
        for index in range(len(self)):
            sample = self[index]
            down, right = ((sample["position"] - sample["fix"]) * sample["meters_per_pixel"]).tolist()
            offsets.append((right, -down))
        return np.array(offsets, np.float64).reshape(-1, 2)


class JoinedPoses(PoseDataset):
    """The pairs of one data set with known poses, followed by those of another."""

    def __init__(self, first: PoseDataset, second: PoseDataset) -> None:
        self._parts, self._joined = (first, second), JoinedPairs(first, second)
        self.name = self._joined.name

    def __len__(self) -> int:
        return len(self._joined)

    def __getitem__(self, index: int) -> Sample:
        for part in self._parts:
            part.epoch = self.epoch
        return cast(Sample, self._joined[index])
