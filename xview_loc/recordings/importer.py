"""Makes bags of pairs from ordinary recordings (ROS 1 and ROS 2), and completes bags of pairs with tiles."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection

from xview_loc.bags.recovery import BagError
from xview_loc.bags.ros_types import serialize
from xview_loc.bags.writer import BagLimits
from xview_loc.camera import CameraError, CameraModel
from xview_loc.errors import reason
from xview_loc.images import ImageError, encode_jpeg
from xview_loc.maps.base import AerialMap, AerialTile, MapError, NoImageryError
from xview_loc.maps.store import TileStore
from xview_loc.recordings.pairs import IMAGE, Pair, PairBag, PairWriter
from xview_loc.vehicle.keyframes import KeyframeRule, Keyframes, WheelSpeed
from xview_loc.vehicle.messages import (
    RejectedInput,
    camera_from_info,
    fix_from_navsat,
    heading_from_message,
    rgb_from_image,
    stamp_ns,
)
from xview_loc.vehicle.synchronisation import (
    RESTART_NS,
    GnssFix,
    HeadingSample,
    History,
    SyncError,
    WaitingRoom,
    blend_fix,
    blend_heading,
)

# What each input may be, and its types in the order of preference.
TYPES = {
    "image": ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"),
    "fix": ("sensor_msgs/msg/NavSatFix",),
    "heading": (
        "sensor_msgs/msg/Imu",
        "geometry_msgs/msg/QuaternionStamped",
        "geometry_msgs/msg/PoseStamped",
    ),
    "camera_info": ("sensor_msgs/msg/CameraInfo",),
    "odom": ("nav_msgs/msg/Odometry",),
}
# How long an image waits for a later fix and heading, in the recording's time.
_WAIT_S = 1.5
_JPEG_QUALITY = 95
# So many tiles in a row that cannot be had are not the odd one that a server lost.
_MAP_FAILURES = 3


@dataclass(frozen=True)
class ImportOptions:
    """How to make pairs of a recording.

    topics: names for the inputs of :data:`TYPES`; for one that is not named the topic that is called as the
    input (``/fix``) is taken, else the only one of its type.
    use_heading: pairs have a heading. declination: where the heading's north lies east of true north,
    radians. The others mean what the pair_logger's parameters do.
    """

    topics: Mapping[str, str] = field(default_factory=dict)
    use_heading: bool = True
    declination: float = 0.0
    heading_std: float = math.radians(3.0)
    fix_min_status: int = 0
    max_fix_age_s: float = 2.0
    max_heading_age_s: float = 0.5
    keyframes: KeyframeRule = field(default_factory=KeyframeRule)
    tile_px: int = 512
    tile_gsd: float = 0.14
    licence: str = ""


@dataclass
class ImportResult:
    """What became of a recording: pairs, those without a tile, messages read, and why some were dropped."""

    pairs: int = 0
    without_tile: int = 0
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


def import_bag(
    source: Path,
    out: Path,
    aerial: AerialMap | None,
    options: ImportOptions | None = None,
    on_progress: Callable[[float], object] = lambda share: None,
) -> ImportResult | None:
    """Make the bag of pairs ``out`` from one recording: a rosbag2 directory, a ROS 1 .bag, a bag of pairs.

    A recording's images become keyframes with fix and heading at their stamps; the pairs of a bag of pairs
    are copied, with tiles for those that lack one. ``aerial`` None: pairs without tiles. ``on_progress`` is
    told the share done. ``out`` appears when it is complete; where it exists already, nothing is done and
    the result is None.
    Raises BagError where the recording cannot be used, MapError where the map is out of reach, OSError where
    ``out`` cannot be written.
    """
    if out.exists():
        if out.resolve() == source.resolve():
            raise BagError(f"{out} is the recording itself: choose another folder for the pairs")
        return None
    options = options or ImportOptions()
    # A bag's files carry its name: it is made under the same name elsewhere on the disk.
    partial = out.parent / ".partial" / out.name
    if partial.exists():
        shutil.rmtree(partial)
    result = ImportResult()
    with _reading(source) as reader, closing(_Tiles(aerial, options)) as tiles:
        if IMAGE in {connection.topic for connection in reader.connections}:
            _complete(source, partial, tiles, result, on_progress)
        else:
            _Importer(source, reader, partial, tiles, options, result).run(on_progress)
    partial.rename(out)
    with suppress(OSError):  # another import may be under way
        partial.parent.rmdir()
    return result


class _Tiles:
    """The map's tiles; none where there is no map, or no imagery."""

    def __init__(self, aerial: AerialMap | None, options: ImportOptions) -> None:
        self._store = TileStore(aerial, options.tile_px, options.tile_gsd) if aerial else None
        self._failures = 0
        self.licence = options.licence or (aerial.attribution if aerial else "")
        self.size, self.gsd = options.tile_px, options.tile_gsd

    def around(self, lat: float, lon: float) -> AerialTile | None:
        """The tile, None where the map has no imagery. Raises MapError where it is out of reach for long."""
        if self._store is None:
            return None
        try:
            tile = self._store.around(lat, lon)
        except NoImageryError:
            return None
        except MapError:
            self._failures += 1
            if self._failures >= _MAP_FAILURES:
                raise
            return None
        self._failures = 0
        return tile

    @property
    def cuts(self) -> bool:
        """Whether there is a map to cut tiles from."""
        return self._store is not None

    def fits(self, tile: AerialTile) -> bool:
        """Whether a tile has the size and ground sample distance asked for."""
        return tile.size_px == self.size and math.isclose(tile.gsd, self.gsd, rel_tol=1e-6)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def session(self, source: Path) -> dict[str, Any]:
        return {
            "recording": source.name,
            "licence": self.licence,
            "tile": {"size": self.size, "gsd": self.gsd},
        }


@contextmanager
def _reading(source: Path) -> Iterator[AnyReader]:
    if not source.exists():
        raise BagError(f"cannot read {source}: no such file")
    reader = AnyReader([source])
    try:
        reader.open()
    except Exception as error:  # damaged files raise anything
        raise BagError(f"cannot read {source}: {reason(error)}") from None
    try:
        yield reader
    finally:
        reader.close()


def _complete(
    source: Path, partial: Path, tiles: _Tiles, result: ImportResult, on_progress: Callable[[float], object]
) -> None:
    """Copy a bag of pairs, cutting the tiles that are missing, damaged, or of another size."""
    bag = PairBag(source)
    before = bag.session()
    session = {**before, "licence": tiles.licence or before.get("licence", "")}
    if tiles.cuts:
        session["tile"] = {"size": tiles.size, "gsd": tiles.gsd}
    odometry = _readable(bag.odometry(), result)
    waiting = next(odometry, None)
    writer = PairWriter(partial, session, BagLimits(min_free_bytes=0))
    try:
        for index in range(len(bag)):
            on_progress(index / len(bag))
            try:
                pair, raw = bag[index], bag.raw_image(index)
            except BagError:
                result.dropped["pair_damaged"] += 1
                continue
            while waiting is not None and waiting[0] <= pair.stamp_ns:
                writer.add_odometry(*waiting)
                waiting = next(odometry, None)
            try:
                tile = bag.tile(index)
            except BagError:
                tile = None
            if tile is None or (tiles.cuts and not tiles.fits(tile)):
                tile = tiles.around(pair.lat, pair.lon)
            writer.add(pair, tile, raw)
            result.pairs += 1
            result.without_tile += tile is None
        while waiting is not None:
            writer.add_odometry(*waiting)
            waiting = next(odometry, None)
    finally:
        writer.close()


def _readable(odometry: Iterator[tuple[int, bytes]], result: ImportResult) -> Iterator[tuple[int, bytes]]:
    try:
        yield from odometry
    except BagError:
        result.dropped["odometry_damaged"] += 1


@dataclass(frozen=True)
class _Frame:
    connection: Connection
    data: bytes
    stamp_ns: int
    camera: CameraModel | None


class _Importer:
    """One pass over an ordinary recording, pairing as the nodes do."""

    def __init__(
        self,
        source: Path,
        reader: AnyReader,
        partial: Path,
        tiles: _Tiles,
        options: ImportOptions,
        result: ImportResult,
    ) -> None:
        self._source, self._reader, self._partial = source, reader, partial
        self._tiles, self._options, self._result = tiles, options, result
        self._fixes: History[GnssFix] = History("fix", blend_fix, options.max_fix_age_s)
        self._headings: History[HeadingSample] = History("heading", blend_heading, options.max_heading_age_s)
        self._waiting: WaitingRoom[_Frame] = WaitingRoom(_WAIT_S, capacity=256)
        self._keyframes = Keyframes(options.keyframes)
        self._camera: CameraModel | None = None
        self._wheels = WheelSpeed()
        self._last_image_ns = 0

    def run(self, on_progress: Callable[[float], object]) -> None:
        """Read the recording through. Raises BagError where it has nothing to pair."""
        inputs = self._choose()
        by_topic = {connections[0].topic: name for name, connections in inputs.items()}
        chosen = [connection for connections in inputs.values() for connection in connections]
        span = max(1, self._reader.end_time - self._reader.start_time)
        writer: PairWriter | None = None
        if "image" in inputs:
            session = self._tiles.session(self._source)
            writer = PairWriter(self._partial, session, BagLimits(min_free_bytes=0))
        try:
            for connection, now, data in self._messages(chosen):
                name = by_topic[connection.topic]
                self._result.read[name] += 1
                try:
                    self._take(name, connection, data, now, writer)
                except RejectedInput as error:
                    self._result.dropped[error.reason] += 1
                except OSError:
                    raise
                except Exception as error:  # damaged bytes raise anything
                    self._result.dropped[f"{name}_damaged/{type(error).__name__}"] += 1
                self._release(now, writer)
                on_progress((now - self._reader.start_time) / span)
            self._release(2**62, writer)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            counts = ", ".join(f"{self._result.read[n]} of {n}" for n in inputs) or "nothing of use"
            raise BagError(f"{self._source} has no images to pair (read: {counts})")

    def _messages(self, chosen: list[Connection]) -> Iterator[tuple[Connection, int, bytes]]:
        """What can be read of the recording."""
        messages = self._reader.messages(connections=chosen)
        while True:
            try:
                found = next(messages)
            except StopIteration:
                return
            except Exception as error:  # damaged files raise anything
                self._result.dropped[f"rest_of_recording_damaged/{type(error).__name__}"] += 1
                return
            yield found

    def _choose(self) -> dict[str, list[Connection]]:
        """The connections of each input; a topic has several where a publisher was started again."""
        chosen = {}
        for name, types in TYPES.items():
            if name == "heading" and not self._options.use_heading:
                continue
            wanted = self._options.topics.get(name)
            topics: dict[str, list[Connection]] = {}
            for kind in types:
                for c in self._reader.connections:
                    if c.msgtype == kind and wanted in (None, c.topic):
                        topics.setdefault(c.topic, []).append(c)
                if topics:
                    break  # the next types are second choice
            if f"/{name}" in topics:  # what the nodes subscribe to by default
                topics = {f"/{name}": topics[f"/{name}"]}
            if wanted and not topics:
                raise BagError(f"{self._source} has no {name} topic {wanted} of a type that fits")
            if len(topics) > 1:
                raise BagError(
                    f"{self._source} has several topics for {name}, choose one: {', '.join(topics)}"
                )
            if topics:
                (chosen[name],) = topics.values()
            elif name in ("fix", "heading"):
                hint = " (or do without it)" if name == "heading" else ""
                raise BagError(f"{self._source} has no topic for {name}{hint}")
        return chosen

    def _take(
        self, name: str, connection: Connection, data: bytes, now: int, writer: PairWriter | None
    ) -> None:
        message: Any = self._reader.deserialize(data, connection.msgtype)
        if name == "fix":
            fix = fix_from_navsat(message, self._options.fix_min_status, 0.0)
            if self._fixes.went_back(fix.stamp_ns):
                self._restart()
            if not self._fixes.add(fix):
                raise RejectedInput("fix_stamp_not_newer", "")
        elif name == "heading":
            heading = heading_from_message(message, self._options.declination, self._options.heading_std)
            if self._headings.went_back(heading.stamp_ns):
                self._restart()
            if not self._headings.add(heading):
                raise RejectedInput("heading_stamp_not_newer", "")
        elif name == "camera_info":
            self._camera = camera_from_info(message)
        elif name == "odom":
            stamp = stamp_ns(message)
            velocity = message.twist.twist.linear
            self._wheels.saw(stamp, math.hypot(velocity.x, velocity.y))
            if writer is not None:
                writer.add_odometry(stamp, data if self._ros2 else serialize(TYPES["odom"][0], message))
        else:
            stamp = stamp_ns(message)
            if stamp < self._last_image_ns - RESTART_NS:
                self._restart()
            if stamp <= self._last_image_ns:
                raise RejectedInput("image_stamp_not_newer", "")
            self._last_image_ns = stamp
            self._waiting.add(_Frame(connection, data, stamp, self._camera), stamp, now)

    @property
    def _ros2(self) -> bool:
        return self._reader.is2

    def _restart(self) -> None:
        """Time started again in the recording."""
        self._fixes.clear()
        self._headings.clear()
        self._result.dropped["time_restarted"] += self._waiting.clear()
        self._last_image_ns = 0

    def _complete(self, stamp: int) -> bool:
        heading = not self._options.use_heading or self._headings.reaches(stamp)
        return heading and self._fixes.reaches(stamp)

    def _release(self, now: int, writer: PairWriter | None) -> None:
        for frame in self._waiting.ready(self._complete, now):
            assert writer is not None
            try:
                self._pair(frame, writer)
            except RejectedInput as error:
                self._result.dropped[error.reason] += 1
            except (ImageError, CameraError):
                self._result.dropped["image_invalid"] += 1

    def _pair(self, frame: _Frame, writer: PairWriter) -> None:
        fix = self._at(self._fixes, frame.stamp_ns)
        heading = self._at(self._headings, frame.stamp_ns) if self._options.use_heading else None
        yaw = None if heading is None else heading.yaw
        stamp = frame.stamp_ns
        if not self._keyframes.wants(stamp, fix.lat, fix.lon, yaw, self._wheels.at(stamp)):
            return
        message: Any = self._reader.deserialize(frame.data, frame.connection.msgtype)
        compressed = hasattr(message, "format")
        rgb = rgb_from_image(message)  # also where it stays as it is: a damaged image is no pair
        if compressed:
            image_format, data = message.format, message.data.tobytes()
        else:
            image_format, data = "jpeg", encode_jpeg(rgb, _JPEG_QUALITY)
        tile = self._tiles.around(fix.lat, fix.lon)
        pair = Pair.of(stamp, image_format, data, fix, heading, frame.camera)
        writer.add(pair, tile, frame.data if compressed and self._ros2 else None)
        self._result.pairs += 1
        self._result.without_tile += tile is None

    def _at(self, history: History[Any], stamp: int) -> Any:
        try:
            return history.at(stamp)
        except SyncError as error:
            raise RejectedInput(f"{history.name}_{error.reason}", str(error)) from None
