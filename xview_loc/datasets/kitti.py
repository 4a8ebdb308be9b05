"""KITTI with satellite maps: a forward-looking camera on tiles turned to the vehicle's heading."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from xview_loc.camera import CameraError, CameraModel
from xview_loc.datasets.base import DatasetError, PoseDataset, Sample
from xview_loc.datasets.benchmark import PARTS, digest, part_of, read_image, read_lines
from xview_loc.images import Image
from xview_loc.models.inputs import normalise, prepare_ground
from xview_loc.models.specs import KITTI_GSD, ModelSpec

Intrinsics = Literal["published", "exact"]

# Side in pixels of satellite maps, which are centred on the vehicle's GPS antenna with north up.
MAP_SIZE = 1280
# Position of the left colour camera from the antenna, metres ahead and to the left.
CAMERA_FROM_GPS = (1.08, -0.26)
# Length of a random shift of 1, metres along each axis.
SHIFT_M = 20.0
# Size of most of KITTI's images, by which GGCVT's authors scale the intrinsics of all.
_PUBLISHED_SIZE = (1242, 375)
_CAMERA = "image_02"
_PROJECTION = "P_rect_02"
# Number of fields in a line of the inertial system's data, and index of the heading.
_OXTS_FIELDS, _OXTS_YAW = 30, 5

_FILES = {split: f"{split}_files.txt" for split in ("train", "test1", "test2")}
_FILES |= {part: "test2_files.txt" for part in PARTS}
SPLITS = tuple(_FILES)


class _Frame(NamedTuple):
    """One line of a split file, with an image's name, DAY/DRIVE/NUMBER.png.

    ``shift`` is ahead and to the left of the tile's centre, in units of SHIFT_M, and a turn in units of the
    greatest one; None if they are drawn anew in every epoch.
    """

    line: int
    image: Path
    shift: tuple[float, float, float] | None


class KittiDataset(PoseDataset):
    """KITTI's left colour camera on satellite tiles that are turned and shifted at random.

    ``root`` holds raw_data/DAY/DRIVE/image_02/data/*.png, raw_data/DAY/DRIVE/oxts/data/*.txt,
    raw_data/DAY/calib_cam_to_cam.txt, satmap/DAY/DRIVE/*.png, and the benchmark's split files
    ``train_files.txt``, ``test1_files.txt`` (the training area) and ``test2_files.txt`` (other areas).

    ``split``: ``train``, ``test1``, ``test2``; ``adapt``, ``validation`` and ``test`` are 70, 10 and 20 % of
    ``test2`` (:func:`xview_loc.datasets.benchmark.part_of`).

    The vehicle's heading points right on a tile, and the tile's centre is up to 20 m from the camera along
    and across the heading. Then the tile is turned about its centre by up to ``rotation_deg`` degrees either
    way (0: known heading). Shift and turn come from the split file; for ``train`` they depend on index and
    epoch. The coarse fix is the tile's centre.

    ``intrinsics`` of the resized image are ``"published"``, as GGCVT was trained: the camera matrix times the
    ratio of sizes, as if all images had 1242 x 375 pixels; or ``"exact"``: by the image's own size, with
    pixel centres at whole numbers before and after.

    Raises DatasetError if the model does not take a pinhole camera on turned tiles, on unknown splits,
    missing files and malformed lines.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        spec: ModelSpec,
        *,
        rotation_deg: float = 0.0,
        intrinsics: Intrinsics = "published",
    ) -> None:
        if spec.camera != "pinhole" or spec.aerial_up != "left":
            raise DatasetError(
                f"KITTI has a pinhole camera on tiles turned to the heading, which {spec.name} does not take"
            )
        if split not in _FILES:
            raise DatasetError(f"KITTI has no split {split!r}; choose from {', '.join(SPLITS)}")
        if intrinsics not in get_args(Intrinsics):
            raise DatasetError(f"intrinsics are published or exact, not {intrinsics}")
        if not 0.0 <= rotation_deg <= 180.0:
            raise DatasetError(f"tiles are turned by 0 to 180 degrees, not {rotation_deg:g}")
        self._root = root.expanduser()
        self._spec = spec
        self._rotation = math.radians(rotation_deg)
        self._intrinsics = intrinsics
        self._file = self._root / _FILES[split]
        lines = enumerate(read_lines(self._file), start=1)
        frames = [_parse(self._file, number, line, split == "train") for number, line in lines]
        self._frames = [frames[i] for i in part_of(split, len(frames))] if split in PARTS else frames
        self.name = f"kitti:{split}:{digest((rotation_deg, intrinsics, *self._frames))}"

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample. Raises IndexError, and DatasetError if a file is missing or damaged."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        frame, spec = self._frames[index], self._spec
        place = f"{self._file} line {frame.line}"
        raw = self._root / "raw_data"
        drive = raw / frame.image.parent
        image = read_image(drive / _CAMERA / "data" / frame.image.name, place)
        # The images are rectified.
        matrix = _projection(raw / frame.image.parts[0] / "calib_cam_to_cam.txt")
        camera = CameraModel(image.shape[1], image.shape[0], matrix)
        shift, turn = self._pose(index)
        path = self._root / "satmap" / frame.image
        satellite = read_image(path, place)
        if satellite.shape[:2] != (MAP_SIZE, MAP_SIZE):
            raise DatasetError(
                f"{path} has {satellite.shape[1]} x {satellite.shape[0]} pixels, a satellite map has "
                f"{MAP_SIZE} x {MAP_SIZE} (named in {place})"
            )
        heading = _heading(drive / "oxts" / "data" / f"{frame.image.stem}.txt")
        right, up = _turned(turn) @ shift / spec.gsd
        middle = (spec.aerial_size - 1) / 2
        return {
            "ground": prepare_ground(image, spec, heading=None, camera=camera)[0],
            "aerial": normalise(_cut(satellite, spec, heading, shift, turn), spec)[0],
            "fix": torch.full((2,), middle),
            "fix_std": torch.tensor(SHIFT_M / math.sqrt(3)),  # of a uniform distribution
            "heading_known": torch.tensor(self._rotation == 0.0),
            "meters_per_pixel": torch.tensor(spec.gsd),
            "index": torch.tensor(index),
            "intrinsics": torch.tensor(self._scaled(camera), dtype=torch.float32),
            "position": torch.tensor([middle - up, middle + right], dtype=torch.float32),
            # Clockwise from the tile's top edge; the turn is counter-clockwise from the right.
            "heading": torch.tensor(math.pi / 2 - turn),
        }

    def _scaled(self, camera: CameraModel) -> NDArray[np.float64]:
        height, width = self._spec.ground_size
        if self._intrinsics == "exact":
            return camera.scaled_matrix(width, height)
        return np.diag([width / _PUBLISHED_SIZE[0], height / _PUBLISHED_SIZE[1], 1.0]) @ camera.matrix

    def true_from_fix(self) -> NDArray[np.float64]:
        """See :meth:`PoseDataset.true_from_fix`; right and up on each turned tile."""
        poses = (self._pose(index) for index in range(len(self)))
        return np.array([_turned(turn) @ shift for shift, turn in poses]).reshape(-1, 2)

    def _pose(self, index: int) -> tuple[NDArray[np.float64], float]:
        """Return metres (ahead, left) from the tile's centre to the camera, and the tile's turn, radians."""
        drawn = self._frames[index].shift or np.random.default_rng([index, self.epoch]).uniform(-1, 1, 3)
        return SHIFT_M * np.array(drawn[:2]), float(drawn[2]) * self._rotation


def _cut(satellite: Image, spec: ModelSpec, heading: float, shift: NDArray[np.float64], turn: float) -> Image:
    """Cut the model's tile out of a satellite map, in one interpolation.

    ``heading`` is the vehicle's ENU yaw, ``turn`` the angle counter-clockwise from the tile's right to it,
    radians; ``shift`` is metres (ahead, left) from the tile's centre to the camera.
    """
    # Metres (right, up) from the tile's centre -> metres (east, north) from the antenna.
    turned = _turned(heading - turn)
    centre = _turned(heading) @ (np.array(CAMERA_FROM_GPS) - shift)
    # (column, row) from the centres of both images; rows grow downwards.
    flip = np.diag([1.0, -1.0])
    linear = flip @ turned @ flip * (spec.gsd / KITTI_GSD)
    offset = (MAP_SIZE - 1) / 2 + flip @ centre / KITTI_GSD - linear @ np.full(2, (spec.aerial_size - 1) / 2)
    matrix, size = np.column_stack([linear, offset]), (spec.aerial_size, spec.aerial_size)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(satellite, matrix, size, flags=flags).astype(np.uint8, copy=False)


def _turned(angle: float) -> NDArray[np.float64]:
    """Return the matrix that turns (x, y), y up, counter-clockwise by ``angle`` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _parse(path: Path, number: int, line: str, train: bool) -> _Frame:
    """Parse ``DAY/DRIVE/NUMBER.png``, in test files followed by shift ahead, shift to the left and turn."""
    fields = line.split()
    wanted = "an image's name" if train else "an image's name and three numbers from -1 to 1"
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        values = [math.nan]
    image = Path(fields[0]) if fields else Path()
    usable = len(image.parts) == 3 and image.suffix == ".png" and len(values) == (0 if train else 3)
    if not usable or not all(abs(value) <= 1.0 for value in values):
        raise DatasetError(f"{path} line {number} is not {wanted}: {line[:80]!r}")
    return _Frame(number, image, None if train else (values[0], values[1], values[2]))


def _heading(path: Path) -> float:
    """Read the vehicle's ENU yaw, radians, from a file of the inertial system's data."""
    line = read_lines(path)[0]
    try:
        fields = [float(field) for field in line.split()]
    except ValueError:
        fields = []
    if len(fields) != _OXTS_FIELDS or not math.isfinite(fields[_OXTS_YAW]):
        raise DatasetError(f"{path} line 1 does not hold the inertial system's {_OXTS_FIELDS} numbers")
    return fields[_OXTS_YAW]


@lru_cache(maxsize=16)  # one file for each day
def _projection(path: Path) -> tuple[float, ...]:
    """Read the nine intrinsics of the rectified left colour camera."""
    for number, line in enumerate(read_lines(path), start=1):
        name, _, values = line.partition(":")
        if name == _PROJECTION:
            try:
                # Three rows of four numbers; the last column is the offset from the first camera.
                matrix = np.array([float(value) for value in values.split()]).reshape(3, 4)[:, :3]
                return CameraModel(1, 1, tuple(matrix.ravel())).k
            except (ValueError, CameraError):
                raise DatasetError(f"{path} line {number} is not a camera matrix: {line[:80]!r}") from None
    raise DatasetError(f"{path} has no line {_PROJECTION}")
