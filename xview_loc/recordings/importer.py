"""Makes bags of pairs from ordinary recordings (ROS 1 and ROS 2), and completes bags of pairs with tiles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection

from xview_loc.bags.recovery import BagError, check_files
from xview_loc.bags.ros_types import STORE
from xview_loc.bags.writer import BagLimits
from xview_loc.camera import CameraError, CameraModel
from xview_loc.errors import reason
from xview_loc.files import whole_folder
from xview_loc.images import ImageError, encode_jpeg
from xview_loc.maps.base import AerialMap, AerialTile, MapError, NoImageryError
from xview_loc.maps.store import TileStore
from xview_loc.recordings.pairs import ODOMETRY, TILE, TOPICS, Pair, PairBag, PairWriter
from xview_loc.vehicle.input_types import INPUT_TYPES
from xview_loc.vehicle.keyframes import KeyframeRule, Keyframes, WheelSpeed
from xview_loc.vehicle.messages import (
    HeadingConvention,
    VelocityReader,
    camera_from_info,
    fix_from_navsat,
    heading_from_message,
    odometry_cdr,
    rgb_from_image,
    valid_stamp_ns,
)
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.pairing import Paired, Pairing
from xview_loc.vehicle.synchronisation import RejectedInput

# Types that an input has only on the topic named after it, or on a topic chosen: elsewhere they are often
# something else, such as a commanded twist or a pose without true north.
_CHOSEN_ONLY = {
    "heading": ("pose_with_covariance", "odometry", "degrees"),
    "odom": ("twist", "twist_with_covariance"),
}
# How long an image waits for a later fix and heading, in the recording's time, and how many may wait.
_WAIT_S = 1.5
_WAITING = 256
_JPEG_QUALITY = 95
# Consecutive tiles that fail before the map counts as out of reach.
_MAP_FAILURES = 3


@dataclass(frozen=True)
class ImportOptions:
    """How to make pairs of a recording.

    topics: topics of the inputs in :data:`INPUT_TYPES`; default: the topic named after the input (``/fix``),
    else the only one of its type. use_heading: pair headings. heading: how they are counted. mounting: where
    antenna and camera are; None: at the vehicle's origin, or as a bag of pairs says. The others are the
    pair_logger's parameters.
    """

    topics: Mapping[str, str] = field(default_factory=dict)
    use_heading: bool = True
    heading: HeadingConvention = field(default_factory=HeadingConvention)
    mounting: Mounting | None = None
    rectified: bool = False
    fix_min_status: int = 0
    fix_max_jump_m: float = 40.0
    max_fix_age_s: float = 2.0
    max_heading_age_s: float = 0.5
    keyframes: KeyframeRule = field(default_factory=KeyframeRule)
    tile_px: int = 512
    tile_gsd: float = 0.14


@dataclass
class ImportResult:
    """Outcome of an import.

    pairs: number of pairs made. without_tile: those without a tile, because there is no map, no imagery, or
    a failure. failed_tiles: tiles that could not be read from the map. tile_failure: the last reason.
    read: messages by input. dropped: messages and frames by reason.
    """

    pairs: int = 0
    without_tile: int = 0
    failed_tiles: int = 0
    tile_failure: str = ""
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


def import_bag(
    source: Path,
    out: Path,
    aerial: AerialMap | None,
    options: ImportOptions | None = None,
    on_progress: Callable[[float], object] = lambda share: None,
) -> ImportResult | None:
    """Make the bag of pairs ``out`` from a rosbag2 directory, a ROS 1 .bag, or a bag of pairs.

    A recording's images become keyframes with the fix and heading at their stamps. A bag of pairs is copied,
    with tiles cut for pairs that lack one. ``aerial`` None: pairs without tiles. ``on_progress`` gets the
    fraction done. ``out`` appears when it is complete; if it exists, nothing is done and the result is None.
    Raises BagError if the recording cannot be used, MapError if the map is out of reach, OSError if ``out``
    cannot be written.
    """
    if out.exists():
        if out.resolve() == source.resolve():
            raise BagError(f"{out} is the recording itself: choose another folder for the pairs")
        return None
    options = options or ImportOptions()
    result = ImportResult()
    with (
        whole_folder(out) as partial,
        _reading(source) as reader,
        closing(_TileCutter(aerial, options, result)) as tiles,
    ):
        if TILE in {connection.topic for connection in reader.connections}:
            _complete(source, partial, tiles, options, result, on_progress)
        else:
            _import_recording(source, reader, partial, tiles, options, result, on_progress)
    return result


class _TileCutter:
    """Cuts the pairs' tiles, and counts those that fail."""

    def __init__(self, aerial: AerialMap | None, options: ImportOptions, result: ImportResult) -> None:
        self._store = TileStore(aerial, options.tile_px, options.tile_gsd) if aerial else None
        self._result = result
        self._failures_in_a_row = 0
        self.has_map = aerial is not None
        self.size, self.gsd = options.tile_px, options.tile_gsd
        self.licence = aerial.attribution if aerial else ""

    def around(self, lat: float, lon: float) -> AerialTile | None:
        """Cut a tile; None without a map or imagery. Raises MapError if several tiles in a row fail."""
        if self._store is None:
            return None
        try:
            tile = self._store.around(lat, lon)
        except NoImageryError:
            return None
        except MapError as error:
            self._result.failed_tiles += 1
            self._result.tile_failure = str(error)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= _MAP_FAILURES:
                raise
            return None
        self._failures_in_a_row = 0
        return tile

    def fits(self, tile: AerialTile) -> bool:
        """Return True if a tile has the size and ground sample distance asked for."""
        return tile.size_px == self.size and math.isclose(tile.gsd, self.gsd, rel_tol=1e-6)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


@contextmanager
def _reading(source: Path) -> Iterator[AnyReader]:
    if not source.exists():
        raise BagError(f"cannot read {source}: no such file")
    check_files(source)
    # Bags of ROS 2 Humble and earlier hold no message definitions.
    reader = AnyReader([source], default_typestore=STORE)
    try:
        reader.open()
    except Exception as error:  # damaged files raise anything
        raise BagError(f"cannot read {source}: {reason(error)}") from None
    with closing(reader):
        yield reader


def _complete(
    source: Path,
    partial: Path,
    tiles: _TileCutter,
    options: ImportOptions,
    result: ImportResult,
    on_progress: Callable[[float], object],
) -> None:
    """Copy a bag of pairs, cutting the tiles that are missing, damaged, or of another size."""
    bag = PairBag(source)
    before, rig = bag.session(), bag.rig()
    session = {**before, "licence": tiles.licence or before.get("licence", "")}
    if tiles.has_map:
        session["tile"] = {"size": tiles.size, "gsd": tiles.gsd}
    if options.mounting is not None:
        session.update(options.mounting.facts())
    odometry = _readable(bag.odometry(), result)
    waiting = next(odometry, None)
    with closing(PairWriter(partial, session, BagLimits(min_free_bytes=0), rig)) as writer:
        for index in range(len(bag)):
            on_progress(index / len(bag))
            try:
                pair, raw = bag[index], None if rig else bag.raw_image(index)
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
            if tile is None or (tiles.has_map and not tiles.fits(tile)):
                tile = tiles.around(pair.lat, pair.lon)
            writer.add(pair, tile, raw)
            result.pairs += 1
            result.without_tile += tile is None
        while waiting is not None:
            writer.add_odometry(*waiting)
            waiting = next(odometry, None)


def _readable(odometry: Iterator[tuple[int, bytes]], result: ImportResult) -> Iterator[tuple[int, bytes]]:
    try:
        yield from odometry
    except BagError:
        result.dropped["odometry_damaged"] += 1


def _choose(source: Path, reader: AnyReader, options: ImportOptions) -> dict[str, list[Connection]]:
    """Return the connections of each input; a topic has several if its publisher was started again."""
    chosen = {}
    for name, types in INPUT_TYPES.items():
        if name == "heading" and not options.use_heading:
            continue
        wanted = options.topics.get(name)
        # What the nodes subscribe to by default.
        named = wanted or f"/{name}"
        topics = _by_topic(c for c in reader.connections if c.topic == named and c.msgtype in types.values())
        for choice, kind in types.items():
            if not topics and not wanted and choice not in _CHOSEN_ONLY.get(name, ()):
                topics = _by_topic(c for c in reader.connections if c.msgtype == kind)
        if wanted and not topics:
            raise BagError(f"{source} has no {name} topic {wanted} of a type that fits")
        if len(topics) > 1:
            raise BagError(f"{source} has several topics for {name}, choose one: {', '.join(topics)}")
        if topics:
            (chosen[name],) = topics.values()
        elif name in ("fix", "heading"):
            hint = " (or do without it)" if name == "heading" else ""
            raise BagError(f"{source} has no topic for {name}{hint}")
    if "image" not in chosen:
        counts = ", ".join(f"{sum(c.msgcount for c in found)} of {name}" for name, found in chosen.items())
        raise BagError(f"{source} has no images to pair (messages: {counts})")
    return chosen


def _by_topic(connections: Iterable[Connection]) -> dict[str, list[Connection]]:
    topics: dict[str, list[Connection]] = {}
    for connection in connections:
        topics.setdefault(connection.topic, []).append(connection)
    return topics


def _import_recording(
    source: Path,
    reader: AnyReader,
    partial: Path,
    tiles: _TileCutter,
    options: ImportOptions,
    result: ImportResult,
    on_progress: Callable[[float], object],
) -> None:
    inputs = _choose(source, reader, options)
    names = {connections[0].topic: name for name, connections in inputs.items()}
    chosen = [connection for connections in inputs.values() for connection in connections]
    session = {
        "recording": source.name,
        "licence": tiles.licence,
        "tile": {"size": tiles.size, "gsd": tiles.gsd},
        **(options.mounting or Mounting()).facts(),
    }
    span = max(1, reader.end_time - reader.start_time)
    with closing(PairWriter(partial, session, BagLimits(min_free_bytes=0))) as writer:
        importer = _Importer(reader, writer, tiles, options, result)
        for connection, now, data in _messages(reader, chosen, result):
            importer.take(names[connection.topic], connection, data, now)
            on_progress((now - reader.start_time) / span)
        importer.finish()


def _messages(
    reader: AnyReader, connections: list[Connection], result: ImportResult
) -> Iterator[tuple[Connection, int, bytes]]:
    """Yield the messages up to the first damage."""
    try:
        yield from reader.messages(connections=connections)
    except Exception as error:  # damaged files raise anything
        result.dropped[f"rest_of_recording_damaged/{type(error).__name__}"] += 1


@dataclass(frozen=True)
class _Frame:
    connection: Connection
    data: bytes
    stamp_ns: int
    camera: CameraModel | None


class _Importer:
    """Pairs the messages of an ordinary recording as the nodes do."""

    def __init__(
        self,
        reader: AnyReader,
        writer: PairWriter,
        tiles: _TileCutter,
        options: ImportOptions,
        result: ImportResult,
    ) -> None:
        self._reader, self._writer, self._tiles = reader, writer, tiles
        self._options, self._result = options, result
        self._pairing: Pairing[_Frame] = Pairing(
            max_fix_age_s=options.max_fix_age_s,
            max_heading_age_s=options.max_heading_age_s,
            fix_max_jump_m=options.fix_max_jump_m,
            max_wait_s=_WAIT_S,
            use_heading=options.use_heading,
            on_restart=self._on_restart,
            capacity=_WAITING,
        )
        self._keyframes = Keyframes(options.keyframes)
        self._camera: CameraModel | None = None
        self._velocities, self._wheels = VelocityReader(), WheelSpeed()

    def take(self, name: str, connection: Connection, data: bytes, now_ns: int) -> None:
        """Process a message of an input, recorded at ``now_ns``. Raises MapError and OSError only."""
        self._result.read[name] += 1
        try:
            self._take(name, connection, data, now_ns)
        except RejectedInput as error:
            self._result.dropped[error.reason] += 1
        except OSError:
            raise
        except Exception as error:  # damaged bytes raise anything
            self._result.dropped[f"{name}_damaged/{type(error).__name__}"] += 1
        self._write_ready(now_ns)

    def finish(self) -> None:
        """Write the frames that still wait."""
        self._write_ready(2**62)

    def _take(self, name: str, connection: Connection, data: bytes, now_ns: int) -> None:
        options = self._options
        message: Any = self._reader.deserialize(data, connection.msgtype)
        if name == "fix":
            self._pairing.add_fix(fix_from_navsat(message, options.fix_min_status, 0.0))
        elif name == "heading":
            self._pairing.add_heading(heading_from_message(message, options.heading, now_ns))
        elif name == "camera_info":
            self._camera = camera_from_info(message, options.rectified)
        elif name == "odom":
            stamp = valid_stamp_ns(message)
            velocity = self._velocities.read(message)
            if velocity is not None:
                self._wheels.add(velocity)
            unchanged = self._reader.is2 and connection.msgtype == TOPICS[ODOMETRY]
            self._writer.add_odometry(stamp, data if unchanged else odometry_cdr(message))
        else:
            frame = _Frame(connection, data, valid_stamp_ns(message), self._camera)
            self._pairing.add_frame(frame, now_ns)

    def _on_restart(self, name: str, dropped: int) -> None:
        self._result.dropped["time_restarted"] += dropped

    def _write_ready(self, now_ns: int) -> None:
        for result in self._pairing.ready(now_ns):
            if isinstance(result, RejectedInput):
                self._result.dropped[result.reason] += 1
                continue
            try:
                self._write(result)
            except (ImageError, CameraError):
                self._result.dropped["image_invalid"] += 1

    def _write(self, paired: Paired[_Frame]) -> None:
        frame, fix, heading = paired.frame, paired.fix, paired.heading
        assert fix is not None  # required
        yaw = None if heading is None else heading.yaw
        speed = self._wheels.at(frame.stamp_ns)
        if not self._keyframes.wants(frame.stamp_ns, fix.lat, fix.lon, yaw, speed):
            return
        message: Any = self._reader.deserialize(frame.data, frame.connection.msgtype)
        compressed = hasattr(message, "format")
        rgb = rgb_from_image(message)  # if compressed, only to refuse damaged images
        if compressed:
            image_format, data = message.format, message.data.tobytes()
        else:
            image_format, data = "jpeg", encode_jpeg(rgb, _JPEG_QUALITY)
        tile = self._tiles.around(fix.lat, fix.lon)
        pair = Pair.of(frame.stamp_ns, image_format, data, fix, heading, frame.camera)
        self._writer.add(pair, tile, frame.data if compressed and self._reader.is2 else None)
        self._result.pairs += 1
        self._result.without_tile += tile is None
