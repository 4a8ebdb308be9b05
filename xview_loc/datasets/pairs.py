"""Bags of pairs as a PyTorch dataset without ground truth, for adaptation."""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from xview_loc.bags.recovery import BagError
from xview_loc.camera import CameraError, CameraModel, Lens, PanoramaCamera
from xview_loc.datasets.base import DatasetError, PairSample, PairSource, Track
from xview_loc.errors import shown
from xview_loc.images import Image, ImageError
from xview_loc.maps.base import AerialTile
from xview_loc.models.inputs import ground_image, is_upright, normalise
from xview_loc.models.panoramas import panorama_elevation, panorama_fault
from xview_loc.models.specs import ModelSpec
from xview_loc.recordings.drive import Drive, find_headings, read_drive
from xview_loc.recordings.input_faults import input_faults
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.rig_messages import rig_mounting
from xview_loc.rig import LEAST_SEEN, NOTHING_SEEN, MountedCamera, Rig
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.tilt import TiltSample

# Disk space left to others.
_LEAVE_FREE_BYTES = 1 << 30


class RecordCache:
    """Numbered records of one NumPy type, in a temporary file that is deleted when the process ends.

    Forked processes, such as a data loader's workers, share it. If the disk is full or cannot be written,
    records are silently not kept.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        # The byte after a record is set once the record is complete.
        self._stride = dtype.itemsize + 1
        try:
            self._file: IO[bytes] | None = tempfile.TemporaryFile(prefix="xview_loc-", buffering=0)  # noqa: SIM115
        except OSError:
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the file: a copy in a process that was not forked keeps nothing."""
        return {**self.__dict__, "_file": None}

    def get(self, number: int) -> np.void | None:
        """Return a record, None if it was not kept."""
        if self._file is None:
            return None
        data = os.pread(self._file.fileno(), self._stride, number * self._stride)
        if len(data) < self._stride or not data[-1]:
            return None
        record: np.void = np.frombuffer(bytearray(data), self._dtype, 1)[0]
        return record

    def put(self, number: int, record: np.void) -> None:
        """Keep a record if the disk allows it."""
        if self._file is None:
            return
        descriptor, start, data = self._file.fileno(), number * self._stride, record.tobytes()
        with suppress(OSError):
            disk = os.fstatvfs(descriptor)
            free = disk.f_bavail * disk.f_frsize
            if free >= _LEAVE_FREE_BYTES and os.pwrite(descriptor, data, start) == len(data):
                os.pwrite(descriptor, b"\1", start + len(data))


class PairDataset(PairSource):
    """Pairs of one or more bags, prepared for a model of ``spec`` and decoded on first use.

    Images become those of the spec's lens: levelled by the pair's tilt, cut to its elevations, made of all
    images of a rig, with the mean colour where no camera sees. Decoded images are kept on disk in the model's
    size (:class:`RecordCache`), so a data loader's worker holds the bags' index and one pair with its tile at
    a time. Stored tiles must have the spec's ground sample distance and at least its size; larger ones are
    cropped to their middle, or turned to the camera's heading, as the spec says.
    Raises BagError if a bag cannot be read, DatasetError if its tiles do not fit. ``remarks`` say of each bag
    without measured headings how many it has nevertheless.
    """

    def __init__(self, folders: Sequence[Path], spec: ModelSpec) -> None:
        self._spec = spec
        self._bags = [PairBag(folder) for folder in folders]
        digest = hashlib.sha256("".join(bag.digest() for bag in self._bags).encode()).hexdigest()
        self._rigs: list[Rig | None] = []
        for bag in self._bags:
            rig = bag.rig()
            # Drives of one vehicle share its rig, which keeps large look-up tables.
            self._rigs.append(next((known for known in self._rigs if _same(known, rig)), rig))
        self._mountings = list(map(_mounting, self._bags, self._rigs))
        # Of bags without measured headings.
        self._drives: dict[int, Drive] = {}
        self.remarks: list[str] = []
        for number, bag in enumerate(self._bags):
            drive, text = find_headings(bag, self._mountings[number])
            if drive is not None:
                self._drives[number] = drive
            if text != "measured":
                self.remarks.append(f"{bag.folder}: headings: {text}")
        reckoned = any(np.isfinite(drive.heading).any() for drive in self._drives.values())
        self.name = f"pairs:{digest[:16]}{'-reckoned' if reckoned else ''}"
        self._elevations = list(map(_elevation, self._bags))
        self._rotations = [bag.camera_rotation() for bag in self._bags]
        self._masks = [bag.own_mask() for bag in self._bags]
        self._last_rig: tuple[int, Lens, Rig] | None = None
        self._ends = list(accumulate(len(bag) for bag in self._bags))
        side = spec.aerial_size
        content: list[Any] = [("fix", np.float32, (2,)), ("fix_std", np.float32)]
        content += [("meters_per_pixel", np.float32), ("turn", np.float32), ("heading_known", np.bool_)]
        content += [("ground", np.uint8, (*spec.ground_size, 3)), ("aerial", np.uint8, (side, side, 3))]
        self._dtype = np.dtype(content)
        self._decoded = RecordCache(self._dtype)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> PairSample:
        """Return a pair. Raises IndexError, BagError if it is damaged, DatasetError if it does not fit."""
        self._place(index)
        record = self._decoded.get(index)
        if record is None:
            record = self._decode(index)
            self._decoded.put(index, record)
        sample: PairSample = {
            "ground": normalise(record["ground"], self._spec)[0],
            "aerial": normalise(record["aerial"], self._spec)[0],
            "fix": torch.from_numpy(record["fix"]),
            "fix_std": torch.tensor(record["fix_std"]),
            "heading_known": torch.tensor(record["heading_known"]),
            "meters_per_pixel": torch.tensor(record["meters_per_pixel"]),
            "turn": torch.tensor(record["turn"]),
            "index": torch.tensor(index),
        }
        if isinstance(lens := self._spec.lens, CameraModel):
            sample["intrinsics"] = torch.tensor(lens.matrix, dtype=torch.float32)
        return sample

    def look(self, index: int) -> tuple[Pair, Image, Mounting, float]:
        """Return a pair, what the model's lens sees of it, where antenna and lens are, and the share seen.

        The image is upright; panoramas are as recorded, not turned north. Raises IndexError, BagError if the
        pair is damaged, ImageError or CameraError if its images do not fit the model.
        """
        number, within = self._place(index)
        pair, mounting = self._pair(number, within), self._mountings[number]
        image, looking, seen = self._look(number, pair)
        return pair, image, replace(mounting, camera_yaw=looking), seen

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a pair's bag, and the pair's number in it. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _decode(self, index: int) -> np.void:
        number, within = self._place(index)
        bag = self._bags[number]
        pair, tile = self._pair(number, within), bag.tile(within)
        if tile is None:
            raise DatasetError(f"pair {within} of {bag.folder} has no tile: {self._tiles_of(bag.folder)}")
        self._check_tile(tile, bag.folder)
        mounting, lat, lon = self._mountings[number], pair.lat, pair.lon
        if pair.heading is not None:
            lat, lon = mounting.camera_from_antenna(lat, lon, pair.heading)
        record: np.void = np.zeros(1, self._dtype)[0]
        spec = self._spec
        try:
            image, looking, _ = self._look(number, pair)
            record["ground"] = ground_image(image, spec, heading=pair.heading, camera=None, mount_yaw=looking)
        except (CameraError, ImageError) as error:
            raise BagError(f"pair {within} of {bag.folder} is damaged: {error}") from None
        if spec.aerial_up == "left":
            if pair.heading is None:
                needs = f"{spec.name} needs tiles turned to it"
                reckoned = "nor do odometry and fixes give one"
                raise BagError(f"pair {within} of {bag.folder} has no heading, {reckoned}, and {needs}")
            tile = tile.rotated(pair.heading + looking, spec.aerial_size)
        cut, side = (tile.size_px - spec.aerial_size) // 2, spec.aerial_size
        record["aerial"] = tile.image[cut : cut + side, cut : cut + side]
        record["fix"] = [x - cut for x in tile.enu_to_pixel(*tile.projection.forward(lat, lon))]
        record["turn"] = tile.rotation
        covariance = pair.fix_covariance
        variance = math.nan if covariance is None else float(np.linalg.eigvalsh(covariance[:2, :2])[-1])
        record["fix_std"] = math.sqrt(variance)
        record["heading_known"] = pair.heading is not None
        record["meters_per_pixel"] = tile.gsd
        return record

    def _pair(self, number: int, within: int) -> Pair:
        """Return a pair of a bag, with its reckoned heading if none was measured."""
        pair, drive = self._bags[number][within], self._drives.get(number)
        if pair.heading is not None or drive is None or math.isnan(drive.heading[within]):
            return pair
        heading, std = float(drive.heading[within]), float(drive.reckoned_std[within])
        return replace(pair, heading=heading, heading_std=std)

    def _look(self, number: int, pair: Pair) -> tuple[Image, float, float]:
        """Return what the model's lens sees, where it looks (radians left of forward), and the share seen.

        Raises CameraError, ImageError.
        """
        spec, rig, yaw = self._spec, self._rigs[number], self._mountings[number].camera_yaw
        images = {"": pair.image()} if rig is None else pair.decode(rig)
        tilt = pair.tilt or TiltSample(pair.stamp_ns, 0.0, 0.0)
        angles = {"roll": tilt.roll, "pitch": tilt.pitch}
        if rig is None:
            rig = self._rig_of_one(number, pair.camera, images[""])
            if is_upright(rig, spec, **angles):
                return images[""], yaw, 1.0
        level, mask = rig.view(images, spec.lens, **angles)
        if mask.mean() < LEAST_SEEN:
            raise ImageError(NOTHING_SEEN)
        return level, rig.direction(spec.lens), float(mask.mean())

    def _rig_of_one(self, number: int, camera: CameraModel | None, image: Image) -> Rig:
        """Return the rig of a bag's only camera; the last one serves again, with its look-up tables."""
        given = self._elevations[number]
        # Whatever the calibration says, a camera whose elevations are given takes panoramas.
        lens: Lens | None = None if given else camera
        if lens is None and not given and self._spec.camera == "pinhole":
            raise ImageError(f"its image has no calibration, and {self._spec.name} needs one")
        if lens is None:
            if not given and (fault := panorama_fault(image, self._spec)):
                raise ImageError(fault)
            edges = map(math.radians, given or panorama_elevation(image, self._spec))
            lens = PanoramaCamera(image.shape[1], image.shape[0], *edges)
        if self._last_rig is None or self._last_rig[:2] != (number, lens):
            mask = self._masks[number]
            mounted = MountedCamera(lens, rotation=self._rotations[number])
            self._last_rig = number, lens, Rig({"": mounted}, own={} if mask is None else {"": mask})
        return self._last_rig[2]

    def track(self) -> Track:
        """See :meth:`PairSource.track`; each bag is a drive. Raises BagError if a pair is damaged."""
        bags = enumerate(zip(self._bags, self._mountings, strict=True))
        drives = {n: self._drives[n] if n in self._drives else read_drive(bag, m) for n, (bag, m) in bags}
        parts = [_track(number, drive, self._mountings[number]) for number, drive in drives.items()]
        return Track(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Track)))

    def input_faults(self) -> list[str]:
        """See :meth:`PairSource.input_faults`. Raises BagError if a pair is damaged."""
        return [f"{bag.folder}: {text}" for bag in self._bags for text in input_faults(bag)]

    def _check_tile(self, tile: AerialTile, folder: Path) -> None:
        """Raise DatasetError if the model's tile cannot be cut from this one."""
        spec = self._spec
        if not spec.takes_tile(tile.size_px, tile.gsd):
            raise DatasetError(
                f"the tiles of {folder} have {tile.size_px} px at {tile.gsd:g} m/px, {spec.name} needs "
                f"{spec.tile_px} px at {spec.gsd:g} m/px: {self._tiles_of(folder)}"
            )

    def _tiles_of(self, folder: Path) -> str:
        words = f"xview-loc pairs {folder} --map MAP --model {self._spec.name} --out NEW"
        return f"give --map MAP, or cut its tiles with {words}"


def _same(a: Rig | None, b: Rig | None) -> bool:
    if a is None or b is None:
        return a is b
    masks = a.own.keys() == b.own.keys() and all(np.array_equal(a.own[name], b.own[name]) for name in a.own)
    return masks and (a.cameras, a.height) == (b.cameras, b.height)


def _mounting(bag: PairBag, rig: Rig | None) -> Mounting:
    mounting = bag.mounting()
    return mounting if rig is None else rig_mounting(rig, mounting.antenna)


def _elevation(bag: PairBag) -> tuple[float, float] | None:
    """Return the elevations of the edges of a single camera's panoramas, degrees; None if it is not said."""
    given = bag.session().get("panorama_elevation_deg")
    # As parameters say what they do not know.
    if given is None or given == [0.0, 0.0]:
        return None
    try:
        top, bottom = map(float, given)
    except (TypeError, ValueError):
        top = bottom = math.nan
    if not -90.0 <= bottom < top <= 90.0:  # NaN as well
        text = f"{bag.folder} has no usable panorama_elevation_deg, such as [90, -90]: {shown(given, 80)}"
        raise BagError(text)
    return top, bottom


def _track(number: int, drive: Drive, mounting: Mounting) -> Track:
    """Return the camera's track, as far as headings are known: fixes are the antenna's."""
    moved = drive.moved.copy()
    # The camera swings about the vehicle's origin.
    moved[1:] += np.diff(complex(*mounting.camera) * np.exp(1j * drive.heading))
    cameras = [
        (lat, lon) if math.isnan(yaw) else mounting.camera_from_antenna(lat, lon, yaw)
        for lat, lon, yaw in zip(drive.lat, drive.lon, drive.heading, strict=True)
    ]
    lat, lon = np.array(cameras).reshape(-1, 2).T
    steps = np.stack([moved.real, moved.imag], 1)
    return Track(np.full(len(steps), number), drive.stamp_ns, lat, lon, steps)
