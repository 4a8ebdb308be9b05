"""Makes bags of pairs from ordinary recordings (ROS 1 and ROS 2), and completes bags of pairs with tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection

from xview_loc.bags.recovery import BagError, check_files
from xview_loc.bags.ros_types import STORE, deserialize, header, serialize
from xview_loc.bags.ros_types import message as ros_message
from xview_loc.bags.writer import BagLimits
from xview_loc.camera import CameraError, CameraModel
from xview_loc.errors import reason, shown
from xview_loc.files import whole_folder
from xview_loc.images import Image, ImageError, encode_jpeg
from xview_loc.maps.base import AerialMap, AerialTile, MapError, NoImageryError
from xview_loc.maps.store import TileStore
from xview_loc.models.specs import SPECS, ModelSpec
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import ODOMETRY, TILE, TOPICS
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.recordings.recorded_rig import ALL, StaticTransforms, find_cameras, read_rig, uncalibrated
from xview_loc.recordings.rig_messages import BASE_FRAME, rig_mounting
from xview_loc.rig import Mask, Rig, check_size
from xview_loc.vehicle.input_types import INPUT_TYPES
from xview_loc.vehicle.keyframes import KeyframeRule, Keyframes, WheelMotion
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
from xview_loc.vehicle.mounting import Mounting, Offset
from xview_loc.vehicle.pairing import Paired, Pairing
from xview_loc.vehicle.rig_assembly import CameraImage, RigAssembly, middle_ns
from xview_loc.vehicle.rig_file import CameraEntry
from xview_loc.vehicle.synchronisation import RejectedInput
from xview_loc.vehicle.tilt import TiltSample, tilt_from_imu
from xview_loc.vehicle.transforms import Transform, TransformError

# Types that an input has only on the topic named after it, or on a topic chosen: elsewhere they are often
# something else, such as a commanded twist or a pose without true north.
_CHOSEN_ONLY = {
    "heading": ("pose_with_covariance", "odometry", "degrees"),
    "odom": ("twist", "twist_with_covariance"),
}
_COMPRESSED, _IMU = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Imu"
# How long an image waits for a later fix and heading, in the recording's time, and how many may wait.
_WAIT_S = 1.5
_WAITING = 256
_JPEG_QUALITY = 95
_DEFAULT_SPEC = SPECS["ccvpe-small"]
# Consecutive tiles that fail before the map counts as out of reach.
_MAP_FAILURES = 3


@dataclass(frozen=True)
class ImportOptions:
    """How to make pairs of a recording.

    topics: topics of the inputs in :data:`INPUT_TYPES`; default: the topic named after the input (``/fix``),
    else the only one of its type. use_heading: pair headings. heading: how they are counted. antenna, camera:
    where they are in base_link (forward, left), metres, and camera_yaw, where the image's middle looks,
    radians left of forward; None: 0, or as a bag of pairs says. cameras: those of a rig,
    see :func:`find_cameras`; none: a single camera. rig_file: what a rig file says of them. own_mask: where a
    single camera sees the vehicle itself. imu: topic of an Imu that gives roll and pitch; "": they are
    ``tilt``, None if unknown. spec: of the model that tiles are cut for; None: a bag of
    pairs' own, else ccvpe-small. The others are the pair_logger's
    parameters.
    """

    topics: Mapping[str, str] = field(default_factory=dict)
    use_heading: bool = True
    heading: HeadingConvention = field(default_factory=HeadingConvention)
    antenna: Offset | None = None
    camera: Offset | None = None
    camera_yaw: float | None = None
    panorama_elevation_deg: tuple[float, float] | None = None
    cameras: Sequence[str] = ()
    rig_file: Mapping[str, CameraEntry] = field(default_factory=dict)
    rig_tolerance_s: float = 0.05
    base_height_m: float = 0.0
    own_mask: Mask | None = None
    imu: str = ""
    tilt: tuple[float, float] | None = None
    rectified: bool = False
    fix_min_status: int = 0
    fix_max_jump_m: float = 40.0
    max_fix_age_s: float = 2.0
    max_heading_age_s: float = 0.5
    keyframes: KeyframeRule = field(default_factory=KeyframeRule)
    spec: ModelSpec | None = None

    @property
    def fit_pairs(self) -> bool:
        """Whether they fit a bag of pairs: they say nothing but the tiles and the mounting."""
        anew = ("antenna", "camera", "camera_yaw", "panorama_elevation_deg", "spec")
        kept = {name: getattr(self, name) for name in anew}
        return self.own_mask is None and self == ImportOptions(**kept)

    def mounting(self, known: Mounting) -> Mounting:
        """Return the mounting: what they say, and the rest as ``known``."""
        given = {name: getattr(self, name) for name in ("antenna", "camera", "camera_yaw")}
        return replace(known, **{name: value for name, value in given.items() if value is not None})


@dataclass
class ImportResult:
    """Outcome of an import.

    pairs: number of pairs made. without_tile: those without a tile, because there is no map, no imagery, or
    a failure. failed_tiles: tiles that could not be read from the map. tile_failure: the last reason.
    without_camera: pairs without the image of a rig's camera. without_tilt: pairs without the tilt asked for.
    unplaced_imu: frame of an Imu that is taken as base_link's, as no transform says where it is; "" for none.
    uncalibrated: topics of images left out of a rig of all cameras, as no camera_info is beside them.
    read: messages by input. dropped: messages and frames by reason.
    """

    pairs: int = 0
    without_tile: int = 0
    failed_tiles: int = 0
    tile_failure: str = ""
    without_camera: Counter[str] = field(default_factory=Counter)
    without_tilt: int = 0
    unplaced_imu: str = ""
    uncalibrated: list[str] = field(default_factory=list)
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
    with tiles cut for pairs that have none that fits the model. ``aerial`` None: pairs without tiles.
    ``on_progress`` gets the fraction done. ``out`` appears when it is complete; if it exists, nothing is done
    and the result is None. Raises BagError if the recording cannot be used, MapError if the map is out of
    reach, OSError if ``out`` cannot be written.
    """
    if out.exists():
        if out.resolve() == source.resolve():
            raise BagError(f"{out} is the recording itself: choose another folder for the pairs")
        return None
    options = options or ImportOptions()
    result = ImportResult()
    with whole_folder(out) as partial, _reading(source) as reader, ExitStack() as resources:
        bag = None
        if TILE in {connection.topic for connection in reader.connections}:
            bag = PairBag(source)
        spec = options.spec or (_own_spec(bag.session()) if bag else _DEFAULT_SPEC)
        tiles = resources.enter_context(closing(TileCutter(aerial, spec, result)))
        if bag is not None:
            _complete(bag, partial, tiles, options, result, on_progress)
        else:
            _import_recording(source, reader, partial, tiles, options, result, on_progress)
    return result


def _own_spec(session: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of the model that a bag's tiles were cut for."""
    named, tile = SPECS.get(str(session.get("model"))), session.get("tile")
    if named is None and isinstance(tile, dict):
        size = tile.get("size"), tile.get("gsd")
        named = next((spec for spec in SPECS.values() if (spec.tile_px, spec.gsd) == size), None)
    return named or _DEFAULT_SPEC


class TileCutter:
    """Cuts the pairs' tiles, and counts those that fail."""

    def __init__(self, aerial: AerialMap | None, spec: ModelSpec, result: ImportResult) -> None:
        self._store = TileStore(aerial, spec.tile_px, spec.gsd, spec.snap_m) if aerial else None
        self._result = result
        self._failures_in_a_row = 0
        self.has_map = aerial is not None
        self.spec = spec
        self.licence = aerial.attribution if aerial else ""
        self.shift = aerial.info().shift if aerial else ""

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

    def facts(self) -> dict[str, Any]:
        """Return what a bag's session says about the tiles."""
        return {
            "model": self.spec.name,
            "tile": {"size": self.spec.tile_px, "gsd": self.spec.gsd},
            "map_shift": self.shift,
        }

    def close(self) -> None:
        """End the reading of tiles; the map stays open."""
        if self._store is not None:
            self._store.close()


@contextmanager
def _reading(source: Path) -> Iterator[AnyReader]:
    if not source.exists():
        raise BagError(f"cannot read {source}: no such file")
    check_files(source)
    try:
        # Bags of ROS 2 Humble and earlier hold no message definitions.
        reader = AnyReader([source], default_typestore=STORE)
        reader.open()
    except Exception as error:  # damaged files raise anything
        raise BagError(f"cannot read {source}: {reason(error)}") from None
    with closing(reader):
        yield reader


def _complete(
    bag: PairBag,
    partial: Path,
    tiles: TileCutter,
    options: ImportOptions,
    result: ImportResult,
    on_progress: Callable[[float], object],
) -> None:
    """Copy a bag of pairs, cutting the tiles that are missing, damaged, or of another size."""
    if not options.fit_pairs:
        raise BagError(
            f"{bag.folder} is a bag of pairs: only --map, --model, --camera, --camera-yaw, --antenna "
            "and --panorama-elevation can be given anew, the other options are for recordings"
        )
    before, rig = bag.session(), bag.rig()
    session = {**before, **_panorama_facts(options)}
    if tiles.has_map:
        session.update(tiles.facts(), licence=tiles.licence or before.get("licence", ""))
        session.pop("map", None)
    single = options.camera, options.camera_yaw, options.panorama_elevation_deg
    if rig is not None and single != (None, None, None):
        raise BagError(
            f"{bag.folder} has several cameras, with places of their own: leave out what is for a single one"
        )
    known = bag.mounting()
    mounting = options.mounting(known)
    if options.camera_yaw is not None:
        turn = Transform.planar(0.0, 0.0, options.camera_yaw - known.camera_yaw)
        turned = turn @ Transform(np.zeros(3), np.array(bag.camera_rotation()))
        session["camera_rotation"] = turned.rotation.tolist()
    session.update((mounting if rig is None else rig_mounting(rig, mounting.antenna)).facts())
    odometry = _readable(bag.odometry(), result)
    waiting = next(odometry, None)
    writer = PairWriter(partial, session, BagLimits(min_free_bytes=0), rig, bag.own_mask(), bag.cameras)
    with closing(writer):
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
            if tile is None or (tiles.has_map and not tiles.spec.takes_tile(tile.size_px, tile.gsd)):
                tile = tiles.around(pair.lat, pair.lon)
            writer.add(pair, tile, raw)
            result.pairs += 1
            result.without_tile += tile is None
        while waiting is not None:
            writer.add_odometry(*waiting)
            waiting = next(odometry, None)


def _panorama_facts(options: ImportOptions) -> dict[str, Any]:
    """Return what a session says of a single camera's panoramas, if it is given."""
    edges = options.panorama_elevation_deg
    return {} if edges is None else {"panorama_elevation_deg": list(edges)}


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
        if name in ("image", "camera_info") and options.cameras:
            continue
        # Elevations are of a panorama, whatever is published for it.
        if name == "camera_info" and options.panorama_elevation_deg:
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
            hint = ", or all with --cameras all" if name == "image" else ""
            raise BagError(f"{source} has several topics for {name}, choose one{hint}: {', '.join(topics)}")
        if topics:
            (chosen[name],) = topics.values()
        elif name in ("fix", "heading"):
            hint = " (or do without it)" if name == "heading" else ""
            raise BagError(f"{source} has no topic for {name}{hint}")
    if "image" not in chosen and not options.cameras:
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
    tiles: TileCutter,
    options: ImportOptions,
    result: ImportResult,
    on_progress: Callable[[float], object],
) -> None:
    spec, inputs = tiles.spec, _choose(source, reader, options)
    if spec.aerial_up == "left" and not options.use_heading and "odom" not in inputs:
        needs = f"{spec.name} needs tiles turned to the heading"
        raise BagError(f"{needs}: import headings or odometry too")
    calibrated = options.cameras or options.panorama_elevation_deg or "camera_info" in inputs
    if spec.camera == "pinhole" and not calibrated:
        raise BagError(f"{source} has no camera_info, and {spec.name} needs it")
    mounting = options.mounting(Mounting())
    try:
        rig, transforms = None, StaticTransforms()
        if options.cameras or options.imu:
            transforms.read(reader)
        if options.cameras:
            cameras = find_cameras(reader.connections, options.cameras)
            if list(options.cameras) == [ALL]:
                result.uncalibrated = uncalibrated(reader.connections)
            lens = options.rectified, options.base_height_m
            rig = read_rig(reader, cameras, transforms, options.rig_file, *lens)
            inputs |= {_image_of(name): camera.images for name, camera in cameras.items()}
            mounting = rig_mounting(rig, mounting.antenna)
    except BagError as error:
        raise BagError(f"{source}: {error}") from None
    if options.imu:
        inputs["imu"] = [c for c in reader.connections if c.topic == options.imu and c.msgtype == _IMU]
        if not inputs["imu"]:
            topics = ", ".join(_by_topic(c for c in reader.connections if c.msgtype == _IMU)) or "none"
            raise BagError(f"{source} has no Imu on {shown(options.imu, 200)}; its Imus: {shown(topics)}")
    # An Imu may give both heading and tilt.
    names: dict[str, list[str]] = {}
    for name, connections in inputs.items():
        names.setdefault(connections[0].topic, []).append(name)
    by_topic = {connections[0].topic: connections for connections in inputs.values()}
    chosen = [connection for connections in by_topic.values() for connection in connections]
    session = {
        "recording": source.name,
        "licence": tiles.licence,
        **tiles.facts(),
        **_panorama_facts(options),
        **mounting.facts(),
    }
    span = max(1, reader.end_time - reader.start_time)
    with closing(PairWriter(partial, session, BagLimits(min_free_bytes=0), rig, options.own_mask)) as writer:
        importer = _Importer(reader, writer, tiles, rig, transforms, options, result, "camera_info" in inputs)
        for connection, now, data in _messages(reader, chosen, result):
            for name in names[connection.topic]:
                importer.take(name, connection, data, now)
            on_progress((now - reader.start_time) / span)
        importer.finish()


def _image_of(camera: str) -> str:
    """Return the name of the input that a rig's camera is."""
    return f"{camera}/image"


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
    """Images of one instant, as recorded: of a single camera, or of a rig's."""

    stamp_ns: int
    images: tuple[CameraImage, ...]
    camera: CameraModel | None


class _Importer:
    """Pairs the messages of an ordinary recording as the nodes do."""

    def __init__(
        self,
        reader: AnyReader,
        writer: PairWriter,
        tiles: TileCutter,
        rig: Rig | None,
        transforms: StaticTransforms,
        options: ImportOptions,
        result: ImportResult,
        calibrated: bool,
    ) -> None:
        self._reader, self._writer, self._tiles = reader, writer, tiles
        self._rig, self._transforms = rig, transforms
        self._options, self._result = options, result
        self._assembly = RigAssembly(tuple(rig.cameras), options.rig_tolerance_s) if rig else None
        self._pairing: Pairing[_Frame] = Pairing(
            max_fix_age_s=options.max_fix_age_s,
            max_heading_age_s=options.max_heading_age_s,
            fix_max_jump_m=options.fix_max_jump_m,
            max_wait_s=_WAIT_S,
            use_heading=options.use_heading,
            use_tilt=bool(options.imu),
            on_restart=self._on_restart,
            capacity=_WAITING // (len(rig.cameras) if rig else 1),
        )
        self._keyframes = Keyframes(options.keyframes)
        self._camera: CameraModel | None = None
        # Images of a camera that is calibrated, but not yet, would be taken for panoramas.
        self._uncalibrated = rig is not None or not calibrated
        self._velocities, self._wheels = VelocityReader(), WheelMotion()

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
            # Zeros say that a camera is not calibrated: drivers of panorama cameras send them.
            self._uncalibrated = self._tiles.spec.camera == "panorama" and not any(message.k)
            self._camera = None if self._uncalibrated else camera_from_info(message, options.rectified)
        elif name == "odom":
            stamp = valid_stamp_ns(message)
            velocity = self._velocities.read(message)
            if velocity is not None:
                self._wheels.add(velocity)
            unchanged = self._reader.is2 and connection.msgtype == TOPICS[ODOMETRY]
            self._writer.add_odometry(stamp, data if unchanged else odometry_cdr(message))
        elif name == "imu":
            self._pairing.add_tilt(tilt_from_imu(message, self._imu_mounting(message.header.frame_id)))
        else:
            camera = name.removesuffix("image").rstrip("/")
            image = CameraImage(camera, valid_stamp_ns(message), connection.msgtype, data, now_ns)
            if self._assembly is None:
                if self._camera is None and not self._uncalibrated:
                    raise RejectedInput("camera_info_missing", "no usable camera_info came before")
                self._pairing.add_frame(_Frame(image.stamp_ns, (image,), self._camera), now_ns)
            else:
                self._add_sets(self._assembly.add(image))

    def _add_sets(self, sets: Iterable[tuple[CameraImage, ...]]) -> None:
        for images in sets:
            try:
                arrived_ns = max(image.arrived_ns for image in images)
                self._pairing.add_frame(_Frame(middle_ns(images), images, None), arrived_ns)
            except RejectedInput as error:
                self._result.dropped[error.reason] += 1

    def _imu_mounting(self, frame: str) -> NDArray[np.float64]:
        """Return the rotation from an Imu's frame to base_link; without transforms they are the same."""
        try:
            return self._transforms.pose(frame).matrix
        except TransformError:
            if frame.lstrip("/") not in ("", BASE_FRAME):
                self._result.unplaced_imu = frame
            return np.eye(3)

    def _on_restart(self, name: str, dropped: int) -> None:
        self._result.dropped["time_restarted"] += dropped

    def _write_ready(self, now_ns: int) -> None:
        if self._assembly is not None:
            self._add_sets(self._assembly.overdue(now_ns))
        for result in self._pairing.ready(now_ns):
            if isinstance(result, RejectedInput):
                self._result.dropped[result.reason] += 1
                continue
            self._write(result)

    def _write(self, paired: Paired[_Frame]) -> None:
        frame, fix, heading = paired.frame, paired.fix, paired.heading
        assert fix is not None  # required
        yaw = self._wheels.yaw if heading is None else heading.yaw
        speed = self._wheels.at(frame.stamp_ns)
        if not self._keyframes.wants(frame.stamp_ns, fix.lat, fix.lon, yaw, speed):
            return
        encoded = tuple(filter(None, (self._encoded(image, frame.camera) for image in frame.images)))
        if not encoded:
            return
        tile = self._tiles.around(fix.lat, fix.lon)
        if self._rig is None:
            message, raw = deserialize(_COMPRESSED, encoded[0].data), encoded[0].data
            pair = Pair.of(frame.stamp_ns, message.format, message.data.tobytes(), fix, heading, frame.camera)
        else:
            raw = None
            pair = replace(Pair.of(frame.stamp_ns, "", b"", fix, heading, None), images=encoded)
            there = {image.name for image in encoded}
            self._result.without_camera.update(name for name in self._rig.cameras if name not in there)
        self._writer.add(self._tilted(pair, paired.tilt), tile, raw)
        self._result.pairs += 1
        self._result.without_tile += tile is None

    def _tilted(self, pair: Pair, measured: TiltSample | None) -> Pair:
        if measured is not None:
            return replace(pair, tilt=measured, tilt_source="imu")
        self._result.without_tilt += bool(self._options.imu)
        if self._options.tilt is None:
            return pair
        return replace(pair, tilt=TiltSample(pair.stamp_ns, *self._options.tilt), tilt_source="fixed")

    def _encoded(self, image: CameraImage, camera: CameraModel | None) -> CameraImage | None:
        """Return an image as a CompressedImage: unchanged if it is one; None, and counted, if damaged."""
        try:
            message: Any = self._reader.deserialize(image.data, image.type)
            pixels = rgb_from_image(message)
            self._check_size(image.name, pixels, camera)
        except (ImageError, CameraError):
            self._result.dropped[f"{image.name}/image_invalid".lstrip("/")] += 1
            return None
        if image.type == _COMPRESSED and self._reader.is2:
            return image
        is_compressed = hasattr(message, "format")
        image_format = message.format if is_compressed else "jpeg"
        data = message.data if is_compressed else np.frombuffer(encode_jpeg(pixels, _JPEG_QUALITY), np.uint8)
        head = header(image.stamp_ns, message.header.frame_id)
        made = ros_message(_COMPRESSED, header=head, format=image_format, data=data)
        return replace(image, type=_COMPRESSED, data=serialize(_COMPRESSED, made))

    def _check_size(self, name: str, pixels: Image, camera: CameraModel | None) -> None:
        mask, lens = self._options.own_mask, camera if self._rig is None else self._rig.cameras[name].camera
        if lens is not None:
            check_size(name, pixels, lens)
        if mask is not None and mask.shape != pixels.shape[:2]:
            sizes = (f"{width} x {height}" for height, width in (mask.shape, pixels.shape[:2]))
            text = "{}: the mask of the vehicle has {} pixels, but the images have {}"
            raise BagError(text.format(self._reader.paths[0], *sizes))
