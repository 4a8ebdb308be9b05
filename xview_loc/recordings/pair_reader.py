"""Reads bags of pairs, in any order."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mcap.data_stream import ReadDataStream
from mcap.reader import McapReader, make_reader
from mcap.records import Chunk, ChunkIndex, Message, MessageIndex
from mcap.stream_reader import breakup_chunk

from xview_loc.bags.recovery import BagError, bag_files
from xview_loc.bags.ros_types import deserialize, stamp_ns
from xview_loc.errors import reason, shown
from xview_loc.files import open_regular
from xview_loc.maps.base import AerialTile
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import (
    CAMERA,
    FIX,
    HEADING,
    IMAGE,
    ODOMETRY,
    OWN_MASK,
    SESSION,
    TILE,
    TILE_GEOREFERENCE,
    TILE_IMAGE,
    TILT,
    TOPICS,
    decode_tile,
    read_heading,
    read_pair,
    read_sigma,
)
from xview_loc.recordings.rig_messages import (
    camera_names,
    decode_mask,
    image_topic,
    make_rig,
    read_cameras,
    rig_topics,
)
from xview_loc.rig import Mask, MountedCamera, Quaternion, Rig, facing
from xview_loc.vehicle.messages import VelocityReader, cdr_stamp_ns
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import VelocitySample
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.synchronisation import RejectedInput

# Messages of a chunk, by topic and stamp.
Chunked = dict[tuple[str, int], list[bytes]]
# The latest chunks of all bags, by bag, number of the file, and offset. A pair and its tile may lie in two.
_recent: dict[tuple[object, int, int], Chunked] = {}
_CHUNKS = 2


class PairBag:
    """Random access to a bag of pairs: ``bag[i]`` is the i-th pair by stamp.

    Only the index is held in memory, and the latest chunks of all bags. Not thread-safe; a copy in another
    process (a data loader's worker) opens its own files. Raises BagError if the bag cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = bag_files(folder)
        self._open: dict[int, tuple[IO[bytes], McapReader]] = {}
        self._key = object()
        self._process = os.getpid()
        # Of each file; none in bags of a single camera.
        self._cameras = [self._camera_names(number) for number in range(len(self._paths))]
        # (stamp, number of its file) of every pair.
        self._index = sorted(
            (stamp, number) for number in range(len(self._paths)) for stamp in self._stamps(number)
        )

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras of a rig, also those without a calibration; none: a single camera."""
        return sorted({name for names in self._cameras for name in names})

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
            return read_pair(stamp, found, images)

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

    def tile_sizes(self) -> set[tuple[int, float] | None]:
        """Return the sides (pixels) and resolutions (m/px) of the tiles, and None if a pair has none.

        Reads each file once from end to end. Raises BagError if the bag is damaged.
        """
        sizes: set[tuple[int, float] | None] = set()
        for number, path in enumerate(self._paths):
            with _readable(f"{path} is damaged"):
                topics = [TILE, TILE_GEOREFERENCE]
                for _, channel, found in self._reader(number).iter_messages(topics=topics):
                    value = deserialize(TOPICS[channel.topic], found.data)
                    if channel.topic == TILE_GEOREFERENCE:
                        content = json.loads(value.data)
                        sizes.add((int(content["size"]), float(content["gsd"])))
                    elif not value.frame_id:
                        sizes.add(None)
        return sizes

    def session(self) -> dict[str, Any]:
        """Return the facts about the recording. Raises BagError without them."""
        for number in range(len(self._paths)):
            with _readable(f"the session in {self._paths[number]} is damaged"):
                for _, _, found in self._reader(number).iter_messages(topics=[SESSION]):
                    return dict(json.loads(deserialize(TOPICS[SESSION], found.data).data))
        text = f"{self.folder} is not a bag of pairs: it has no {SESSION}; xview-loc pairs makes one of it"
        raise BagError(text)

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
        if not self.cameras:
            return None
        with _readable(f"the rig in {self.folder} cannot be used"):
            height = float(self.session().get("base_height", 0.0))
            return make_rig(dict(sorted(cameras.items())), own, height)

    def mounting(self) -> Mounting:
        """Return where antenna and camera are, 0 if the bag does not say it. Raises BagError."""
        with _readable(f"the mounting in the session of {self.folder} cannot be used"):
            return Mounting.of(self.session())

    def camera_rotation(self) -> Quaternion:
        """Return the rotation of a single camera's optical frame; it is level if the bag does not say it.

        Raises BagError if what it says is no rotation.
        """
        session = self.session()
        given = session.get("camera_rotation")
        if given is None:
            return facing(self.mounting().camera_yaw)
        try:
            x, y, z, w = map(float, given)
        except (TypeError, ValueError):
            x = y = z = w = math.nan
        if not abs(math.hypot(x, y, z, w) - 1.0) < 0.1:  # NaN as well
            text = f"{self.folder} has no usable camera_rotation, a quaternion: {shown(given, 80)}"
            raise BagError(text)
        return x, y, z, w

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

    def velocities(self) -> Iterator[VelocitySample]:
        """Yield the velocities of the odometry, without messages that say nothing. Raises BagError."""
        reader = VelocityReader()
        for _, data in self.odometry():
            with suppress(RejectedInput):
                velocity = reader.read(deserialize(TOPICS[ODOMETRY], data))
                if velocity is not None:
                    yield velocity

    def poses(self) -> list[tuple[int, float, float, float, float | None]]:
        """Return every pair's (stamp, lat, lon, sigma, heading), in order.

        Nanoseconds and degrees; the fix's standard deviation in metres, NaN if unknown; radians or None.

        Reads each file once from end to end. Raises BagError if the bag is damaged.
        """
        # Numbers alone: the messages of a long recording would fill the memory.
        fixes: dict[tuple[int, int], tuple[float, float, float]] = {}
        headings: dict[tuple[int, int], float | None] = {}
        for number, path in enumerate(self._paths):
            with _readable(f"{path} is damaged"):
                for _, channel, found in self._reader(number).iter_messages(topics=[FIX, HEADING]):
                    key, value = (found.log_time, number), deserialize(TOPICS[channel.topic], found.data)
                    if channel.topic == FIX:
                        fixes[key] = value.latitude, value.longitude, read_sigma(value)
                    else:
                        headings[key] = read_heading(value)
        try:
            return [(key[0], *fixes[key], headings[key]) for key in self._index]
        except KeyError:
            raise BagError(f"{self.folder} is damaged: a pair has no fix or heading") from None

    def digest(self) -> str:
        """Return a digest of the pairs' stamps and the files' sizes, the same wherever the bag lies."""
        sizes = [path.stat().st_size for path in self._paths]
        return hashlib.sha256(repr((self._index, sizes)).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_key": object()}

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
        summary = self._reader(number).get_summary()
        assert summary is not None
        channels = {number for number, channel in summary.channels.items() if channel.topic in topics}
        for chunk in summary.chunk_indexes:
            within = chunk.message_start_time <= stamp <= chunk.message_end_time
            if within and channels & chunk.message_index_offsets.keys():
                content = self._chunk(number, chunk)
                for topic in topics:
                    yield from ((topic, data) for data in content.get((topic, stamp), ()))

    def _chunk(self, number: int, chunk: ChunkIndex) -> Chunked:
        """Return the messages of a chunk; the latest are kept, as neighbouring pairs share them."""
        key = self._key, number, chunk.chunk_start_offset
        content = _recent.pop(key, None)
        if content is None:
            summary, file = self._reader(number).get_summary(), self._open[number][0]
            assert summary is not None
            file.seek(chunk.chunk_start_offset + 9)  # past the record's opcode and length
            content = {}
            for record in breakup_chunk(Chunk.read(ReadDataStream(file)), validate_crc=True):
                if isinstance(record, Message):
                    topic = summary.channels[record.channel_id].topic
                    content.setdefault((topic, record.log_time), []).append(record.data)
        _recent[key] = content
        while len(_recent) > _CHUNKS:
            del _recent[next(iter(_recent))]
        return content


@contextmanager
def _readable(problem: str) -> Iterator[None]:
    """Turn any failure to read, but a BagError, into a BagError that begins with ``problem``."""
    try:
        yield
    except (BagError, MemoryError):
        raise
    except Exception as error:
        raise BagError(f"{problem}: {reason(error)}") from None
