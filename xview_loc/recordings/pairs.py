"""Target-area pairs: a ground image, the vehicle's state when it was taken, and the aerial tile around it.

A bag of pairs is a rosbag2 directory of standard messages (docs/pair_format.md). Only this module knows the
meaning of its topics.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from mcap.data_stream import ReadDataStream
from mcap.reader import McapReader, make_reader
from mcap.records import MessageIndex
from numpy.typing import NDArray

from xview_loc import __version__
from xview_loc.bags.recovery import BagError, bag_files
from xview_loc.bags.ros_types import (
    COVARIANCE_KNOWN,
    camera_info,
    deserialize,
    header,
    message,
    nav_sat_fix,
    quaternion,
    serialize,
    stamp_ns,
)
from xview_loc.bags.writer import BagLimits, BagWriter
from xview_loc.camera import CameraError, CameraModel
from xview_loc.errors import reason
from xview_loc.files import open_regular
from xview_loc.images import (
    Image,
    ImageError,
    check_complete,
    check_size,
    decode_compressed,
    decode_with_alpha,
)
from xview_loc.maps.base import AerialTile
from xview_loc.recordings.rig_messages import (
    camera_names,
    check_cameras,
    check_rig,
    decode_mask,
    image_topic,
    make_rig,
    mask_message,
    read_cameras,
    rig_messages,
    rig_topics,
)
from xview_loc.rig import Mask, MountedCamera, Rig
from xview_loc.vehicle.messages import camera_from_info, cdr_stamp_ns, yaw_of
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample
from xview_loc.vehicle.tilt import TiltSample

IMAGE, FIX, HEADING, TILT, CAMERA, TILE, OWN_MASK = (
    f"/pair/{name}" for name in ("image", "fix", "heading", "tilt", "camera_info", "tile", "own_mask")
)
TILE_IMAGE, TILE_GEOREFERENCE = "/tile/image", "/tile/georeference"
ODOMETRY, SESSION = "/odom", "/session"
TOPICS = {
    IMAGE: "sensor_msgs/msg/CompressedImage",
    FIX: "sensor_msgs/msg/NavSatFix",
    HEADING: "sensor_msgs/msg/Imu",
    TILT: "geometry_msgs/msg/Vector3Stamped",
    CAMERA: "sensor_msgs/msg/CameraInfo",
    OWN_MASK: "sensor_msgs/msg/CompressedImage",
    TILE: "std_msgs/msg/Header",
    TILE_IMAGE: "sensor_msgs/msg/CompressedImage",
    TILE_GEOREFERENCE: "std_msgs/msg/String",
    ODOMETRY: "nav_msgs/msg/Odometry",
    SESSION: "std_msgs/msg/String",
}
# Topics of a single camera.
_SINGLE = (IMAGE, CAMERA, OWN_MASK)
CONVENTIONS = {
    "pixel_origin": "pixel (row, col) names the pixel's centre; (0, 0) is the upper left one",
    "tile": "north-up square in the transverse Mercator plane (k = 1, WGS-84) about its lat and lon, which "
    "lie at pixel ((size - 1) / 2, (size - 1) / 2); gsd is metres per pixel",
    "heading": "ENU yaw of the vehicle's x axis from true north's east, counter-clockwise, radians",
    "tilt": "roll (x) and pitch (y) of the vehicle as in REP-103, radians: positive with the right side and "
    "the nose down; frame_id says where they come from",
    "rig": "camera_info, own_mask (white: the vehicle's own parts) and the optical frames in base_link "
    "(/tf_static, named after the cameras) hold for all pairs; base_height is base_link's above the ground",
    "mounting": "antenna and camera are (forward, left) of the vehicle's origin, metres",
    "panorama": "columns run clockwise; the centre column looks camera_yaw left of the vehicle's x axis",
    "fix": "WGS-84 degrees of the GNSS antenna at the image's stamp, covariance in ENU m^2",
}
_FORMAT = 1
_UNKNOWN = -1.0  # sensor_msgs/Imu: this quantity is not measured


@dataclass(frozen=True, eq=False)
class Pair:
    """One target-area pair without ground truth.

    image_format, image_bytes: as in ``sensor_msgs/CompressedImage``; empty if the pair is of a rig: then
    ``images`` are CompressedImages of all its cameras, or of those that had one. lat, lon: the coarse fix in
    degrees, with its 2x2 or 3x3 ENU covariance in m^2 (None if unknown). heading: true-north ENU yaw of the
    vehicle, radians, None if unknown. camera: None if no calibration was received. tile_id: key of the aerial
    tile, "" without one. tilt: the vehicle's, None if unknown; tilt_source: where it comes from, such as
    "imu".
    """

    stamp_ns: int
    image_format: str
    image_bytes: bytes
    lat: float
    lon: float
    altitude: float = 0.0
    fix_covariance: NDArray[np.float64] | None = None
    heading: float | None = None
    heading_std: float = 0.0
    camera: CameraModel | None = None
    tile_id: str = ""
    images: tuple[CameraImage, ...] = ()
    tilt: TiltSample | None = None
    tilt_source: str = ""

    @classmethod
    def of(
        cls,
        stamp_ns: int,
        image_format: str,
        image_bytes: bytes,
        fix: GnssFix,
        heading: HeadingSample | None,
        camera: CameraModel | None,
    ) -> Pair:
        """Make a pair of a vehicle's inputs at the image's stamp."""
        yaw, std = (None, 0.0) if heading is None else (heading.yaw, heading.std)
        place = fix.lat, fix.lon, fix.altitude, fix.covariance
        return cls(stamp_ns, image_format, image_bytes, *place, yaw, std, camera)

    def image(self) -> Image:
        """Decode the ground image to RGB. Raises ImageError if it is damaged."""
        return decode_compressed(self.image_bytes)

    def decode(self, rig: Rig) -> dict[str, Image]:
        """Decode the images of a rig's cameras to RGB. Raises ImageError if one is damaged or too large."""
        decoded = {}
        for image in self.images:
            try:
                if image.name not in rig.cameras:
                    raise ImageError("it has no calibration")
                content = deserialize(image.type, image.data).data.tobytes()
                camera = rig.cameras[image.name].camera
                check_complete(content)
                check_size(content, camera.width * camera.height)
                decoded[image.name] = decode_compressed(content)
            except Exception as error:  # damaged bytes raise anything
                raise ImageError(f"camera {image.name}: {reason(error)}") from None
        return decoded


def encode_tile(tile: AerialTile) -> bytes:
    """Encode a tile as PNG, with an alpha channel if only a part of it has imagery."""
    image = cv2.cvtColor(tile.image, cv2.COLOR_RGB2BGR)
    if tile.valid is not None and not tile.valid.all():
        image = np.dstack([image, np.where(tile.valid, 255, 0).astype(np.uint8)])
    return bytes(cv2.imencode(".png", image)[1])


def decode_tile(data: bytes, georeference: Mapping[str, Any]) -> AerialTile:
    """Inverse of :func:`encode_tile`. Raises ValueError on damaged bytes."""
    image = decode_with_alpha(data)
    valid = image[..., 3] > 0 if image.shape[2] == 4 else None
    return AerialTile(
        np.ascontiguousarray(image[..., :3]),
        float(georeference["lat"]),
        float(georeference["lon"]),
        float(georeference["gsd"]),
        float(georeference["valid_fraction"]),
        float(georeference["rotation"]),
        valid,
    )


class PairWriter:
    """Writes a new bag of pairs; any thread may call it. Errors are :class:`BagWriter`'s."""

    def __init__(
        self,
        folder: Path,
        session: Mapping[str, Any],
        limits: BagLimits | None = None,
        rig: Rig | None = None,
        own_mask: Mask | None = None,
        cameras: Iterable[str] = (),
    ) -> None:
        """``session``: facts about the recording (vehicle, map, licence ...), JSON values.

        ``rig``: what takes the images of pairs with several; ``cameras``: the names of its cameras, if the
        rig is not known yet, see :meth:`set_rig`. ``own_mask``: where a single camera sees the vehicle
        itself. Raises CameraError if the cameras cannot be recorded.
        """
        if rig is not None:
            check_rig(rig.cameras)
            cameras = rig.cameras
        self._cameras = list(cameras)
        check_cameras(self._cameras)
        self._types = dict(TOPICS)
        if self._cameras:
            images = {image_topic(name): TOPICS[IMAGE] for name in self._cameras}
            several = {topic: kind for topic, kind in TOPICS.items() if topic not in _SINGLE}
            self._types = several | images | rig_topics(self._cameras)
        self._rig, self._own_mask = rig, own_mask
        # What a pair's last message is written to: a pair that has it is complete.
        self._last_topic = TILE if self._cameras else IMAGE
        self.bag = BagWriter(folder, self._types, limits)
        # Written at the beginning of each file; may be completed before the first.
        self.session = {
            "format": _FORMAT,
            "software": f"xview_loc {__version__}",
            "conventions": CONVENTIONS,
            **session,
        }
        self._lock = threading.Lock()
        self._file = ""
        self._tiles: dict[str, int] = {}
        self._last_stamp = 0
        self._pairs = 0

    @property
    def pairs(self) -> int:
        """Number of pairs written; without those of a file that was deleted under the writer."""
        return self.bag.count(self._last_topic) if self.bag.lost else self._pairs

    def set_rig(self, rig: Rig) -> None:
        """Say what takes the images, before the first pair; it may lack cameras that are not known yet.

        Set again, pairs begin a new file. Raises CameraError if it cannot be recorded.
        """
        check_rig(rig.cameras)
        if strangers := [name for name in rig.cameras if name not in self._cameras]:
            raise CameraError(f"camera {strangers[0]} is not one that the bag was begun with")
        with self._lock:
            if self._file:
                self.bag.split()
            self._rig = rig

    def add(self, pair: Pair, tile: AerialTile | None, raw_image: bytes | None = None) -> None:
        """Write a pair and, the first time in each file, its tile.

        ``raw_image``: CDR bytes of the image's CompressedImage, written unchanged; default: made from the
        pair's image.
        """
        stamp = pair.stamp_ns
        head = header(stamp, "")
        with self._lock:
            if stamp <= self._last_stamp:
                # Time started again, and a pair's stamp must be unique within a file.
                self.bag.split()
            self._begin(stamp)
            tile_stamp, tile_id = 0, ""
            if tile is not None:
                tile_id = tile.key
                tile_stamp = self._tiles.get(tile_id, 0) or self._add_tile(tile, stamp)
            self._write(FIX, stamp, nav_sat_fix(head, pair.lat, pair.lon, pair.altitude, _full(pair)))
            self._write(HEADING, stamp, _imu(head, pair.heading, pair.heading_std))
            if pair.camera is not None:
                camera = pair.camera
                size, lens = (camera.width, camera.height), (camera.distortion, camera.distortion_model)
                self._write(CAMERA, stamp, camera_info(head, *size, camera.k, *lens))
            if pair.tilt is not None:
                tilt = message("geometry_msgs/msg/Vector3", x=pair.tilt.roll, y=pair.tilt.pitch, z=0.0)
                self._write(
                    TILT, stamp, message(TOPICS[TILT], header=header(stamp, pair.tilt_source), vector=tilt)
                )
            for camera_image in pair.images:
                self.bag.write(image_topic(camera_image.name), stamp, camera_image.data, may_split=False)
            # The tile was written with the stamp of the first pair in the file that uses it.
            self._write(TILE, stamp, header(tile_stamp, tile_id))
            if not self._cameras:
                raw_image = raw_image or serialize(
                    TOPICS[IMAGE], _image(head, pair.image_format, pair.image_bytes)
                )
                self.bag.write(IMAGE, stamp, raw_image, may_split=False)
            self._last_stamp = stamp
            self._pairs += 1

    def add_odometry(self, stamp: int, data: bytes) -> None:
        """Write the CDR bytes of a ``nav_msgs/Odometry`` unchanged."""
        with self._lock:
            self._begin(stamp)
            self.bag.write(ODOMETRY, stamp, data, may_split=False)

    def split(self) -> None:
        """Begin a new file."""
        with self._lock:
            self.bag.split()

    def close(self) -> None:
        """Complete the bag."""
        with self._lock:
            self.bag.close()

    def _begin(self, stamp: int) -> None:
        """Split if it is due, which here tears no pair apart.

        Each file of the bag can be read alone: it has the session, the rig and the tiles of its pairs.
        """
        self.bag.split_if_due()
        if self.bag.current_file != self._file:
            self._file = self.bag.current_file
            self._tiles = {}
            facts = self.session if self._rig is None else {**self.session, "base_height": self._rig.height}
            self._write(SESSION, stamp, message("std_msgs/msg/String", data=json.dumps(facts)))
            for topic, value in rig_messages(self._rig, stamp) if self._rig else ():
                self._write(topic, stamp, value)
            if self._own_mask is not None:
                self._write(OWN_MASK, stamp, mask_message(self._own_mask, stamp))

    def _add_tile(self, tile: AerialTile, stamp: int) -> int:
        georeference = {
            "id": tile.key,
            "lat": tile.lat,
            "lon": tile.lon,
            "gsd": tile.gsd,
            "size": tile.size_px,
            "rotation": tile.rotation,
            "valid_fraction": tile.valid_fraction,
        }
        self._write(TILE_IMAGE, stamp, _image(header(stamp, tile.key), "png", encode_tile(tile)))
        self._write(TILE_GEOREFERENCE, stamp, message("std_msgs/msg/String", data=json.dumps(georeference)))
        self._tiles[tile.key] = stamp
        return stamp

    def _write(self, topic: str, stamp: int, value: Any) -> None:
        self.bag.write(topic, stamp, serialize(self._types[topic], value), may_split=False)


def _full(pair: Pair) -> NDArray[np.float64] | None:
    if pair.fix_covariance is None:
        return None
    full = np.diag([0.0, 0.0, 1e6])
    size = pair.fix_covariance.shape[0]
    full[:size, :size] = pair.fix_covariance
    return full


def _image(head: Any, image_format: str, data: bytes) -> Any:
    return message(TOPICS[IMAGE], header=head, format=image_format, data=np.frombuffer(data, np.uint8))


def _imu(head: Any, heading: float | None, std: float) -> Any:
    zero = message("geometry_msgs/msg/Vector3", x=0.0, y=0.0, z=0.0)
    unmeasured = np.array([_UNKNOWN, *[0.0] * 8])
    covariance = unmeasured if heading is None else np.diag([1e6, 1e6, std**2]).reshape(9)
    return message(
        TOPICS[HEADING],
        header=head,
        orientation=quaternion(heading or 0.0),
        orientation_covariance=covariance,
        angular_velocity=zero,
        angular_velocity_covariance=unmeasured,
        linear_acceleration=zero,
        linear_acceleration_covariance=unmeasured,
    )


class PairBag:
    """Random access to a bag of pairs: ``bag[i]`` is the i-th pair by stamp.

    Only the index is held in memory. Not thread-safe; a copy in another process (a data loader's worker)
    opens its own files. Raises BagError if the bag cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = bag_files(folder)
        self._open: dict[int, tuple[IO[bytes], McapReader]] = {}
        self._process = os.getpid()
        # Of each file; none in bags of a single camera.
        self._cameras = [self._camera_names(number) for number in range(len(self._paths))]
        # (stamp, number of its file) of every pair.
        self._index = sorted(
            (stamp, number) for number in range(len(self._paths)) for stamp in self._stamps(number)
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Pair:
        """Raises IndexError, and BagError if the pair is damaged."""
        stamp, number = self._index[index]
        names = {image_topic(name): name for name in self._cameras[number]}
        with _readable(f"pair {index} of {self.folder} is damaged"):
            topics = (FIX, HEADING, TILT, TILE, *(names or (IMAGE, CAMERA)))
            data = dict(self._messages(number, stamp, topics))
            found = {topic: deserialize(TOPICS[topic], data[topic]) for topic in data if topic not in names}
            images = tuple(
                CameraImage(name, cdr_stamp_ns(data[topic]), TOPICS[IMAGE], data[topic])
                for topic, name in names.items()
                if topic in data
            )
            if names and not images:
                raise ValueError("it has no image")
            return _pair(stamp, found, images)

    def tile(self, index: int) -> AerialTile | None:
        """Return the aerial tile of a pair, None if it was stored without one. Raises as ``bag[index]``."""
        stamp, number = self._index[index]
        with _readable(f"pair {index} of {self.folder} has no usable tile"):
            reference = deserialize(TOPICS[TILE], self._one(number, stamp, TILE))
            if not reference.frame_id:
                return None
            tile_stamp = stamp_ns(reference)
            image = georeference = None
            # A stamp may have two tiles.
            for topic, data in self._messages(number, tile_stamp, (TILE_IMAGE, TILE_GEOREFERENCE)):
                value = deserialize(TOPICS[topic], data)
                if topic == TILE_IMAGE and value.header.frame_id == reference.frame_id:
                    image = bytes(value.data)
                elif topic == TILE_GEOREFERENCE:
                    content = json.loads(value.data)
                    georeference = content if content["id"] == reference.frame_id else georeference
            if image is None or georeference is None:
                raise ValueError("its tile is missing")
            return decode_tile(image, georeference)

    def session(self) -> dict[str, Any]:
        """Return the facts about the recording. Raises BagError without them."""
        for number in range(len(self._paths)):
            with _readable(f"the session in {self._paths[number]} is damaged"):
                for _, _, found in self._reader(number).iter_messages(topics=[SESSION]):
                    return dict(json.loads(deserialize(TOPICS[SESSION], found.data).data))
        raise BagError(f"{self.folder} is not a bag of pairs: it has no {SESSION}")

    def rig(self) -> Rig | None:
        """Return the rig that took the images, None if it was a single camera. Raises BagError."""
        cameras: dict[str, MountedCamera] = {}
        own: dict[str, Mask] = {}
        for number, names in enumerate(self._cameras):
            if not names:
                continue
            with _readable(f"the rig in {self._paths[number]} cannot be used"):
                topics = rig_topics(names)
                found: dict[str, Any] = {}
                for _, channel, one in self._reader(number).iter_messages(topics=list(topics)):
                    if channel.topic not in found:
                        found[channel.topic] = deserialize(topics[channel.topic], one.data)
                described, masks = read_cameras(names, found)
                # A camera may be described in later files only.
                cameras, own = {**described, **cameras}, {**masks, **own}
        if not any(self._cameras):
            return None
        with _readable(f"the rig in {self.folder} cannot be used"):
            height = float(self.session().get("base_height", 0.0))
            return make_rig(dict(sorted(cameras.items())), own, height)

    def own_mask(self) -> Mask | None:
        """Return where a single camera sees the vehicle itself; None if it is not said. Raises BagError."""
        for number, path in enumerate(self._paths):
            with _readable(f"the mask in {path} cannot be used"):
                for _, _, found in self._reader(number).iter_messages(topics=[OWN_MASK]):
                    return decode_mask(deserialize(TOPICS[OWN_MASK], found.data).data.tobytes())
        return None

    def raw_image(self, index: int) -> bytes:
        """Return the CDR bytes of a single camera's image message. Raises as ``bag[index]``."""
        stamp, number = self._index[index]
        with _readable(f"pair {index} of {self.folder} is damaged"):
            return self._one(number, stamp, IMAGE)

    def odometry(self) -> Iterator[tuple[int, bytes]]:
        """Yield the drive's (stamp in nanoseconds, CDR bytes of a ``nav_msgs/Odometry``). Raises BagError."""
        for number, path in enumerate(self._paths):
            with _readable(f"the odometry in {path} is damaged"):
                for _, _, found in self._reader(number).iter_messages(topics=[ODOMETRY]):
                    yield found.log_time, found.data

    def poses(self) -> list[tuple[int, float, float, float | None]]:
        """Return every pair's stamp (ns), lat, lon (degrees) and heading (radians or None), in order.

        Reads each file once from end to end. Raises BagError if the bag is damaged.
        """
        fixes: dict[tuple[int, int], Any] = {}
        headings: dict[tuple[int, int], Any] = {}
        for number, path in enumerate(self._paths):
            with _readable(f"{path} is damaged"):
                for _, channel, found in self._reader(number).iter_messages(topics=[FIX, HEADING]):
                    kind = fixes if channel.topic == FIX else headings
                    kind[found.log_time, number] = deserialize(TOPICS[channel.topic], found.data)
        try:
            return [
                (key[0], fixes[key].latitude, fixes[key].longitude, _measured_yaw(headings[key]))
                for key in self._index
            ]
        except KeyError:
            raise BagError(f"{self.folder} is damaged: a pair has no fix or heading") from None

    def digest(self) -> str:
        """Return a digest of the pairs' stamps and the files' sizes, the same wherever the bag lies."""
        sizes = [path.stat().st_size for path in self._paths]
        return hashlib.sha256(repr((self._index, sizes)).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _reader(self, number: int) -> McapReader:
        if self._process != os.getpid():
            # After a fork, the parent's open files share their position with these.
            self._open, self._process = {}, os.getpid()
        if number not in self._open:
            path = self._paths[number]
            try:
                file = open_regular(path)
                reader = make_reader(file, validate_crcs=True)
                summary = reader.get_summary()
            except Exception as error:
                raise BagError(
                    f"{path} cannot be read ({reason(error)}): run xview-loc bag recover {self.folder}"
                ) from None
            if summary is None:
                raise BagError(f"{path} was not closed: run xview-loc bag recover {self.folder}")
            self._open[number] = (file, reader)
        return self._open[number][1]

    def _camera_names(self, number: int) -> list[str]:
        summary = self._reader(number).get_summary()
        assert summary is not None
        with _readable(f"the rig in {self._paths[number]} cannot be used"):
            return camera_names(channel.topic for channel in summary.channels.values())

    def _stamps(self, number: int) -> Iterator[int]:
        """Yield the stamps of a file's pairs, reading only its index."""
        reader = self._reader(number)
        summary = reader.get_summary()
        assert summary is not None
        last = TILE if self._cameras[number] else IMAGE
        channels = {c.id for c in summary.channels.values() if c.topic == last}
        file = self._open[number][0]
        for chunk in summary.chunk_indexes:
            for channel in channels & chunk.message_index_offsets.keys():
                file.seek(chunk.message_index_offsets[channel] + 9)  # past the record's opcode and length
                try:
                    stamps = [stamp for stamp, _ in MessageIndex.read(ReadDataStream(file)).records]
                except Exception as error:
                    raise BagError(
                        f"the index of {self._paths[number]} is damaged ({reason(error)}): "
                        f"run xview-loc bag recover {self.folder}"
                    ) from None
                yield from stamps

    def _one(self, number: int, stamp: int, topic: str) -> bytes:
        return next(data for _, data in self._messages(number, stamp, (topic,)))

    def _messages(self, number: int, stamp: int, topics: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        found = self._reader(number).iter_messages(topics=topics, starting_at=stamp, ending_at=stamp)
        for _, channel, one in found:
            yield channel.topic, one.data


@contextmanager
def _readable(problem: str) -> Iterator[None]:
    """Turn any failure to read, but a BagError, into a BagError that begins with ``problem``."""
    try:
        yield
    except (BagError, MemoryError):
        raise
    except Exception as error:
        raise BagError(f"{problem}: {reason(error)}") from None


def _pair(stamp: int, found: Mapping[str, Any], images: tuple[CameraImage, ...]) -> Pair:
    fix, imu, tilt = found[FIX], found[HEADING], found.get(TILT)
    known = fix.position_covariance_type == COVARIANCE_KNOWN
    heading = _measured_yaw(imu)
    sample = None
    if tilt is not None:
        sample = TiltSample(stamp, tilt.vector.x, tilt.vector.y)
        if not max(abs(sample.roll), abs(sample.pitch)) < math.pi / 2:  # NaN as well
            raise ValueError(f"no vehicle has a roll of {sample.roll} and a pitch of {sample.pitch}")
    return Pair(
        stamp_ns=stamp,
        image_format="" if images else found[IMAGE].format,
        image_bytes=b"" if images else found[IMAGE].data.tobytes(),
        lat=fix.latitude,
        lon=fix.longitude,
        altitude=fix.altitude,
        fix_covariance=fix.position_covariance.reshape(3, 3) if known else None,
        heading=heading,
        heading_std=0.0 if heading is None else math.sqrt(imu.orientation_covariance[8]),
        camera=camera_from_info(found[CAMERA]) if CAMERA in found else None,
        tile_id=found[TILE].frame_id,
        images=images,
        tilt=sample,
        tilt_source="" if tilt is None else tilt.header.frame_id,
    )


def _measured_yaw(imu: Any) -> float | None:
    return None if imu.orientation_covariance[0] == _UNKNOWN else yaw_of(imu.orientation)
