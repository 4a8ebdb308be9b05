"""VIGOR: street panoramas and overlapping aerial tiles of four American cities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from xview_loc.datasets.base import DatasetError, PoseDataset, Sample
from xview_loc.datasets.benchmark import PARTS, digest, part_of, read_image, read_lines, turns
from xview_loc.images import Image
from xview_loc.models.inputs import normalise, prepare_ground
from xview_loc.models.specs import ModelSpec

Labels = Literal["corrected", "original"]

# Labels are in raw pixels, those of tiles of this side; metres per raw pixel.
RAW_SIZE = 640
RAW_GSD = {"NewYork": 0.113248, "Seattle": 0.100817, "SanFrancisco": 0.118141, "Chicago": 0.111262}
# A panorama's positive tile is the one whose central quarter it was taken in: at most this many raw pixels
# from the centre along rows and columns (a little more in Seattle).
_RAW_REACH = 160

_ALL_CITIES = ("NewYork", "Seattle", "SanFrancisco", "Chicago")
_TARGET = ("SanFrancisco", "Chicago")
# For each split: its cities, in the order of index files, and the stem of its label files.
_SPLITS = {
    "same-train": (_ALL_CITIES, "same_area_balanced_train"),
    "same-test": (_ALL_CITIES, "same_area_balanced_test"),
    "cross-train": (("NewYork", "Seattle"), "pano_label_balanced"),
    "cross-test": (_TARGET, "pano_label_balanced"),
    **{part: (_TARGET, "pano_label_balanced") for part in PARTS},
}
SPLITS = tuple(_SPLITS)
# Folders of label files and ends of their names; the first file that exists is read. The authors of CCVPE and
# GGCVT keep the corrected labels in splits_new, under either name.
_LAYOUTS: dict[Labels, tuple[tuple[str, str], ...]] = {
    "corrected": (("splits__corrected", "__corrected"), ("splits_new", "__corrected"), ("splits_new", "")),
    "original": (("splits", ""),),
}


class _Label(NamedTuple):
    """One label line: panorama, positive tile, and the camera's raw pixels south and east of its centre."""

    file: Path
    line: int
    city: str
    panorama: str
    tile: str
    south: float
    east: float

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.file} line {self.line}"


class VigorDataset(PoseDataset):
    """VIGOR's panoramas on their positive tiles, in the original folders under ``root``.

    Images are ROOT/CITY/panorama/*.jpg and ROOT/CITY/satellite/*.png. Labels are ROOT/splits/CITY/*.txt
    (``"original"``), or those by SliceMatch's authors, who corrected the ground resolution (``"corrected"``):
    ROOT/splits__corrected/CITY/*__corrected.txt, else ROOT/splits_new/CITY/*__corrected.txt or *.txt. Lists
    of tiles are not needed.

    ``split``: ``same-train`` and ``same-test`` (all cities); ``cross-train`` (New York, Seattle) and
    ``cross-test`` (San Francisco, Chicago); ``adapt``, ``validation`` and ``test`` are 70, 10 and 20 % of
    ``cross-test``, by the adaptation paper's permutation or the one in the file ``order``
    (:func:`xview_loc.datasets.benchmark.part_of`).

    Panoramas face north. Without ``heading_known``, each is turned by a fixed random share of a whole turn:
    the adaptation paper's, or those in the file ``rolls``, one for each panorama of the split (of
    ``cross-test`` for its parts). The coarse fix is the tile's centre; its standard deviation is that of
    positions uniform over the tile's central quarter.

    Raises DatasetError if the model does not take panoramas, and on unknown splits, missing files and
    malformed lines.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        spec: ModelSpec,
        *,
        labels: Labels = "corrected",
        heading_known: bool = True,
        order: Path | None = None,
        rolls: Path | None = None,
    ) -> None:
        if spec.camera != "panorama" or spec.aerial_up != "north":
            raise DatasetError(f"VIGOR has panoramas on tiles with north up, which {spec.name} does not take")
        if split not in _SPLITS:
            raise DatasetError(f"VIGOR has no split {split!r}; choose from {', '.join(SPLITS)}")
        if labels not in get_args(Labels):
            raise DatasetError(f"VIGOR has no {labels!r} labels; choose from {', '.join(get_args(Labels))}")
        self._root = root.expanduser()
        self._spec = spec
        cities, stem = _SPLITS[split]
        self._labels = [label for city in cities for label in _read(self._root, city, stem, labels)]
        count = len(self._labels)
        self._turns = np.zeros(count) if heading_known else turns(count, rolls)
        self._heading_known = heading_known
        self._chosen = part_of(split, count, order) if split in PARTS else np.arange(count)
        # The samples without their files' location.
        samples = digest((*self._labels[i][2:], self._turns[i]) for i in self._chosen)
        self.name = f"vigor:{split}:{samples}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample. Raises IndexError, and DatasetError if an image is missing or damaged."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(self._chosen[index])
        label, turn = self._labels[number], float(self._turns[number])
        folder, size = self._root / label.city, self._spec.aerial_size
        panorama = read_image(folder / "panorama" / label.panorama, label.place)
        tile = self._tile(folder / "satellite" / label.tile, label.place)
        ground = prepare_ground(panorama, self._spec, heading=None, camera=None)[0]
        middle, scale = (size - 1) / 2, size / RAW_SIZE
        gsd = RAW_GSD[label.city] / scale
        position = (middle + label.south * scale, middle + label.east * scale)
        return {
            # Content rolled to the right comes from the left: the image's centre turns counter-clockwise.
            "ground": ground.roll(round(turn * ground.shape[2]), dims=2),
            "aerial": normalise(tile, self._spec)[0],
            "fix": torch.full((2,), middle),
            "fix_std": torch.tensor(_RAW_REACH / math.sqrt(3) * RAW_GSD[label.city]),
            "heading_known": torch.tensor(self._heading_known),
            "meters_per_pixel": torch.tensor(gsd),
            "index": torch.tensor(index),
            "position": torch.tensor(position),
            "heading": torch.tensor(turn * 2 * math.pi),
        }

    def true_from_fix(self) -> NDArray[np.float64]:
        """See :meth:`PoseDataset.true_from_fix`; computed from the labels, without reading images."""
        labels = [self._labels[i] for i in self._chosen]
        offsets = [(label.east, -label.south) for label in labels]
        scales = [RAW_GSD[label.city] for label in labels]
        return np.array(offsets, np.float64).reshape(-1, 2) * np.array(scales)[:, None]

    def _tile(self, path: Path, place: str) -> Image:
        image, size = read_image(path, place), self._spec.aerial_size
        height, width = image.shape[:2]
        if height != width:
            raise DatasetError(f"{path} has {width} x {height} pixels, a tile is square (named in {place})")
        how = cv2.INTER_AREA if height >= size else cv2.INTER_LINEAR
        return cv2.resize(image, (size, size), interpolation=how).astype(np.uint8, copy=False)


def _read(root: Path, city: str, stem: str, labels: Labels) -> Iterator[_Label]:
    files = [root / folder / city / f"{stem}{end}.txt" for folder, end in _LAYOUTS[labels]]
    path = next((file for file in files if file.exists()), files[0])
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        # A panorama, then four tiles, each with the panorama's position on it; the first is the positive one.
        try:
            rows, cols = float(fields[2]), float(fields[3])
        except (IndexError, ValueError):
            rows = cols = math.nan
        if len(fields) != 13 or not max(abs(rows), abs(cols)) <= RAW_SIZE / 2:
            raise DatasetError(f"{path} line {number} is not a VIGOR label: {line[:80]!r}")
        # Rows count to the south, columns to the west.
        yield _Label(path, number, city, fields[0], fields[1], rows, -cols)
