"""Pseudo ground truth: the positions that training takes as true (ECCV 2024, Section 3.2)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from xview_loc.datasets.base import PairSource, PoseDataset, Sample
from xview_loc.errors import UserError
from xview_loc.files import read_hashed, write_hashed

if TYPE_CHECKING:
    from typing_extensions import Self


class AdaptationError(UserError):
    """Adaptation cannot start or go on; the message is one clear line."""


@dataclass(frozen=True, eq=False)
class PairTable:
    """Arrays with one row per pair of ``index``, int64 (N,), ascending."""

    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, chosen: NDArray[Any]) -> Self:
        """Return the rows that a mask or positions select."""
        return type(self)(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def of(self, index: NDArray[np.int64]) -> Self:
        """Return the rows of the given pairs, leaving out pairs without a row."""
        return self.rows(np.isin(self.index, index))

    def save(self, path: Path) -> None:
        """Write an NPZ file, complete or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **{f.name: getattr(self, f.name) for f in fields(self)})
        write_hashed(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read what :meth:`save` wrote; None if the file is missing, damaged or of another kind."""
        try:
            with np.load(io.BytesIO(read_hashed(path))) as content:
                return cls(*(content[f.name] for f in fields(cls)))
        except (OSError, KeyError, ValueError):
            return None

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Concatenate tables."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@dataclass(frozen=True, eq=False)
class PseudoLabels(PairTable):
    """Maxima of a model's heat maps; all columns but the index are float32.

    Heat maps are limited to three standard deviations around the coarse fix, where these are known.
    ``position`` and ``fix`` (N, 2) are (row, col) of the maximum and the coarse fix in tile pixels,
    ``fix_std`` is the fix's standard deviation, m. ``heading`` is that of the stored image's centre column,
    radians: nominal where the pair's heading is known, else that of the best heading bin at the maximum.
    ``stray_sigmas`` is the distance from the fix to the maximum of the whole heat map, in ``fix_std``,
    ``entropy`` that of the finest map, nats, ``peak_mass`` the probability within two metres of the maximum.
    ``turn`` is the direction in which the tile's columns grow, radians counter-clockwise from east.
    """

    position: NDArray[np.float32]
    heading: NDArray[np.float32]
    fix: NDArray[np.float32]
    fix_std: NDArray[np.float32]
    meters_per_pixel: NDArray[np.float32]
    stray_sigmas: NDArray[np.float32]
    entropy: NDArray[np.float32]
    peak_mass: NDArray[np.float32]
    turn: NDArray[np.float32]

    @property
    def from_fix(self) -> NDArray[np.float64]:
        """Metres (N, 2) east and north from the coarse fix to the label."""
        down, right = (self.position - self.fix).astype(np.float64).T * self.meters_per_pixel
        return turned(np.stack([right, -down], 1), self.turn)

    def at(self, from_fix: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the positions (N, 2) in tile pixels of places ``from_fix`` (N, 2), metres east and north."""
        right, up = turned(from_fix, -self.turn).T / self.meters_per_pixel
        return np.asarray(self.fix + np.stack([-up, right], 1), np.float32)

    def errors_m(self, true_from_fix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distances (N,) from the true positions, metres.

        ``true_from_fix`` (M, 2): metres east and north from the coarse fixes of all pairs of the source.
        """
        return np.asarray(np.linalg.norm(self.from_fix - true_from_fix[self.index], axis=1), np.float64)

    def errors_on_tile_m(self, true_from_fix: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same errors (N, 2) to the right and up on the tile: ahead and to the left on turned ones."""
        return turned(self.from_fix - true_from_fix[self.index], -self.turn)


def turned(vectors: NDArray[np.float64], angle: NDArray[np.floating]) -> NDArray[np.float64]:
    """Turn vectors (N, 2) counter-clockwise by ``angle`` (N,), radians."""
    x, y = vectors.T
    cos, sin = np.cos(angle, dtype=np.float64), np.sin(angle, dtype=np.float64)
    return np.stack([cos * x - sin * y, sin * x + cos * y], 1)


def distance_m(a: PseudoLabels, b: PseudoLabels) -> NDArray[np.float64]:
    """Distances (N,) between two labels of the same pairs, metres."""
    pixels = np.linalg.norm(a.position.astype(np.float64) - b.position, axis=1)
    return np.asarray(pixels * a.meters_per_pixel, np.float64)


def reliable(teacher: PseudoLabels, auxiliary: PseudoLabels, keep: float) -> NDArray[np.bool_]:
    """Select the labels (N,) on which teacher and auxiliary student agree (Section 3.2).

    Keeps distances up to their ``keep`` quantile. The published code keeps those below it, but maxima are
    whole pixels: where most models agree to the pixel, that would leave none.
    """
    distances = distance_m(teacher, auxiliary)
    return np.asarray(distances <= np.quantile(distances, keep), bool)


class LabelledPairs(PoseDataset):
    """Pairs with pseudo ground truth in place of true poses, one per row of ``labels``."""

    def __init__(
        self,
        source: PairSource,
        labels: PseudoLabels,
        name: str,
        std_m: NDArray[np.float64] | None = None,
    ) -> None:
        """``name`` identifies the labels; ``std_m`` (N,) are their standard deviations along an axis."""
        self.name = f"{source.name} {name}"
        self._source, self._labels, self._std_m = source, labels, std_m

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> Sample:
        sample: Sample = {
            **self._source[int(self._labels.index[row])],
            "position": torch.from_numpy(self._labels.position[row]),
            "heading": torch.tensor(self._labels.heading[row]),
        }
        if self._std_m is not None:
            sample["label_std"] = torch.tensor(self._std_m[row], dtype=torch.float32)
        return sample
