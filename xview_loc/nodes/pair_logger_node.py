"""The ``pair_logger`` node: records target-area pairs into a bag, to adapt a model with later.

Runs no model. The executor's thread picks the keyframes; one thread cuts their tiles and writes.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import rclpy
import rclpy.task
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from std_srvs.srv import Trigger

from xview_loc.bags import ros_types
from xview_loc.bags.writer import BagFullError, BagLimits, BagLostError
from xview_loc.camera import CameraError, reduce_width
from xview_loc.images import Image, ImageError, encode_jpeg
from xview_loc.maps.base import AerialTile, redact
from xview_loc.models.specs import SPECS
from xview_loc.nodes import parameters
from xview_loc.nodes.cameras import image_size
from xview_loc.nodes.diagnostics import ERROR, WARN
from xview_loc.nodes.inputs import Input
from xview_loc.nodes.process import run
from xview_loc.nodes.recorder import Keyframe, OdometryMessage, Recorder, Stop
from xview_loc.nodes.vehicle_node import PairedFrame, VehicleNode
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import IMAGE, ODOMETRY, TOPICS
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.rig import Rig, check_size
from xview_loc.vehicle.input_types import COURSE
from xview_loc.vehicle.keyframes import KeyframeRule, Keyframes, WheelMotion
from xview_loc.vehicle.messages import cdr_stamp_ns, odometry_cdr, rgb_from_cdr
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.synchronisation import GnssFix, RejectedInput

# How long a pair waits for its tile; without one it can be filled in later.
TILE_WAIT_S = 0.3
SLOW_DISK_SHOWN_S = 10.0
# Odometry whose stamps are further than this from the images' runs on another clock (such as uptime).
ODOMETRY_CLOCK_NS = 60 * 1_000_000_000


class PairLoggerNode(VehicleNode):
    """See config/pair_logger.yaml for the parameters and docs/pair_format.md for what it writes."""

    table = parameters.PAIR_LOGGER
    ok_message = "recording"

    def __init__(self) -> None:
        # The bag that keyframes are accepted for. What the executor queues carries the bag it belongs to.
        self._writer: PairWriter | None = None
        self._failed: PairWriter | None = None
        self._failing = threading.Lock()
        # Whether the bag's session says where antenna and camera are.
        self._mounted = False
        # The bag that knows a rig's cameras, and these.
        self._recorded: tuple[PairWriter, Rig] | None = None
        super().__init__("pair_logger")
        self.create_service(Trigger, "~/start", self._on_start)
        self.create_service(Trigger, "~/split", self._on_split)
        # While stop waits for the disk, the node's own group goes on with messages.
        waiting = MutuallyExclusiveCallbackGroup()
        self.create_service(Trigger, "~/stop", self._on_stop, callback_group=waiting)

    # Hooks of the base

    def configure(self) -> None:
        """Open the map; without it, or while it is out of reach, pairs are recorded without tiles."""
        p = self._params
        self._spec = SPECS[p["model"]]
        if self._reckons_headings() and not p["use_odometry"]:
            raise parameters.ParameterError(
                "headings are neither recorded nor can they be reckoned from odometry: set use_odometry, or "
                "use_heading and a heading_source other than course"
            )
        self._attribution = ""
        for problem in ("no_map", "map"):
            self._health.clear(problem)
        if p["map"]:
            tiles = self._open_map(self._spec.tile_px, self._spec.gsd, self._spec.snap_m)
            self._attribution = tiles.map.attribution
        else:
            self._health.condition("no_map", WARN, "no map is named: pairs are stored without tiles")
        self._keyframes = Keyframes(self._keyframe_rule())
        self._wheels = WheelMotion()
        self._rate = (time.monotonic(), 0)

    def apply_parameters(self, values: dict[str, Any]) -> None:
        """Change the keyframe rule; the quality of JPEG is read where it is used."""
        super().apply_parameters(values)
        self._keyframes.rule = self._keyframe_rule()

    def _keyframe_rule(self) -> KeyframeRule:
        p = self._params
        return KeyframeRule(
            p["keyframe_distance_m"], p["keyframe_interval_s"], math.radians(p["keyframe_turn_deg"])
        )

    def make_worker(self) -> Recorder:
        """Return the thread that writes."""
        if self._params["record_on_start"]:
            self._begin()
        self._recorder = Recorder(self._process)
        return self._recorder

    def wants_heading(self) -> bool:
        """Return True if headings are recorded; those of odometry and fixes are found in the recording."""
        return bool(self._params["use_heading"]) and self._params["heading_source"] != COURSE

    def extra_inputs(self) -> list[Input]:
        """Add odometry if it is to be recorded."""
        inputs = super().extra_inputs()
        if self._params["use_odometry"]:
            source, optional = self._params["odom_source"], not self._reckons_headings()
            inputs.append(Input("odom", self._on_odom, source, raw=True, optional=optional))
        return inputs

    def _reckons_headings(self) -> bool:
        """Return True if headings will be needed that are not recorded."""
        needed = self._params["use_heading"] or self._spec.aerial_up == "left"
        return bool(needed) and not self.wants_heading()

    def hand_over(self, paired: PairedFrame) -> bool:
        """Queue a frame if it is a keyframe; return True if it was dropped because too many wait."""
        writer = self._writer
        if writer is None or not self._knows_mounting(writer) or not self._is_keyframe(paired):
            return False
        dropped = self._recorder.put(Keyframe(writer, paired))
        if dropped:
            text = "keyframes come faster than the disk takes them, and some are dropped"
            if self._health.condition("disk_slow", WARN, text, for_s=SLOW_DISK_SHOWN_S):
                self.get_logger().warning(text)
        return dropped

    def stopped(self) -> None:
        """Complete the bag."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._complete_bag(writer)
            self._health.value("pairs", writer.pairs)
            self._health.value("pairs_per_s", "0.00")

    def before_report(self) -> None:
        """Report pairs, rate and size."""
        writer = self._writer
        if writer is not None and isinstance(writer.bag.failure, BagLostError):
            self._recording_failed(writer, writer.bag.failure)
            writer = self._writer
        self._health.value("recording", "no" if writer is None else str(writer.bag.folder))
        if writer is None:
            return
        now, pairs = time.monotonic(), writer.pairs
        since, before = self._rate
        self._rate = (now, pairs)
        self._health.value("pairs", pairs)
        self._health.value("pairs_per_s", f"{max(0, pairs - before) / max(now - since, 1e-3):.2f}")
        self._health.value("size_mb", f"{writer.bag.size_bytes / 1e6:.1f}")
        self._health.value("files_deleted", writer.bag.files_deleted)

    # Recording on and off: the executor's thread

    def _begin(self) -> Path:
        """Begin a bag and return its folder. Raises OSError."""
        p = self._params
        session = {
            "vehicle": p["vehicle"],
            "map": _without_key(p["map"]),
            "licence": p["map_licence"] or self._attribution,
            "model": self._spec.name,
            "tile": {"size": self._spec.tile_px, "gsd": self._spec.gsd},
            "map_shift": "" if self._map is None else self._map.info().shift,
            "keyframes": {
                "distance_m": p["keyframe_distance_m"],
                "interval_s": p["keyframe_interval_s"],
                "turn": math.radians(p["keyframe_turn_deg"]),
            },
        }
        if self._cameras.names:
            session["base_height"] = p["base_height_m"]
        if self._cameras.elevation_deg is not None:
            session["panorama_elevation_deg"] = list(self._cameras.elevation_deg)
        split = p["split_mb"] * 1_000_000
        if p["when_full"] == "delete_oldest" and p["quota_mb"]:
            # Only whole files can be deleted.
            split = min(split or math.inf, p["quota_mb"] * 1_000_000 // 4)
        limits = BagLimits(
            split_bytes=int(split),
            split_seconds=p["split_s"],
            quota_bytes=p["quota_mb"] * 1_000_000,
            min_free_bytes=p["min_free_mb"] * 1_000_000,
            when_full=p["when_full"],
        )
        first = Path(p["directory"]).expanduser() / time.strftime("pairs_%Y_%m_%d-%H_%M_%S")
        for number in range(1000):  # other recordings in the same second, of other loggers too
            folder = first.with_name(f"{first.name}_{number}") if number else first
            try:
                cameras = self._cameras
                own, names = cameras.own_mask, cameras.names
                writer = PairWriter(folder, session, limits, own_mask=own, cameras=names)
                break
            except OSError as error:
                problem = f"cannot record into {folder}: {error.strerror or error}"
                if not isinstance(error, FileExistsError):
                    raise OSError(problem) from None
        else:
            raise OSError(problem)
        self._writer, self._mounted = writer, False
        self._rate = (time.monotonic(), 0)
        for problem in ("stopped", "disk", "disk_full", "file_lost"):
            self._health.clear(problem)
        self.get_logger().info(f"recording into {folder}")
        return folder

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._state != "active":
            response.message = "the node is not active"
        elif self._writer is not None:
            response.message = f"recording already, into {self._writer.bag.folder}"
        else:
            try:
                response.message = f"recording into {self._begin()}"
                response.success = True
            except OSError as error:
                response.message = str(error)
        return response

    async def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Accept no more keyframes; answer when those accepted are written and the bag is complete."""
        writer, self._writer = self._writer, None
        if writer is None:
            response.message = "not recording"
            return response
        complete: Any = rclpy.task.Future(executor=self.executor)
        self._recorder.stop(writer, complete.set_result)
        response.success = await complete
        response.message = f"recorded {writer.pairs} pairs into {writer.bag.folder}"
        self._health.condition("stopped", WARN, "recording was stopped")
        return response

    def _on_split(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.message = "not recording"
        if (writer := self._writer) is not None:
            try:
                writer.split()
                response.success, response.message = True, writer.bag.current_file
            except OSError as error:
                response.message = str(error)
        return response

    # Inputs: the executor's thread

    def _on_odom(self, data: bytes) -> None:
        assert self._inputs is not None  # they call this
        stamp = cdr_stamp_ns(data)
        away = abs(stamp - self._pairing.last_frame_ns)
        if self._pairing.last_frame_ns and away > ODOMETRY_CLOCK_NS:
            raise RejectedInput("other_clock", f"its stamps are {away / 1e9:.0f} s from the images'")
        kind = self._inputs.type_of("odom")
        message = ros_types.deserialize(kind, data)
        velocity = self._read_velocity(message)
        if velocity is not None:
            self._wheels.add(velocity)
        # Odometry from before the first image is of no use.
        if self._writer is None or not self._pairing.last_frame_ns or not self._mounted:
            return
        if kind != TOPICS[ODOMETRY]:
            data = odometry_cdr(message)
        if self._recorder.put(OdometryMessage(self._writer, stamp, data)):
            self._health.count("odom_dropped")

    def _knows_mounting(self, writer: PairWriter) -> bool:
        """Complete a new bag's session, and return True, once tf knows what it is asked for."""
        if not self._mounted:
            try:
                writer.session.update(self._mounting().facts())
                if not self._cameras.names:
                    rotation = self._cameras.pose("", self._transforms).rotation
                    writer.session["camera_rotation"] = rotation.tolist()
            except RejectedInput as error:
                self._reject(error.reason, str(error))
                return False
            self._mounted = True
        return True

    def _is_keyframe(self, paired: PairedFrame) -> bool:
        assert paired.fix is not None  # this node needs fixes
        stamp, yaw = paired.frame.stamp_ns, self._wheels.yaw if paired.heading is None else paired.heading.yaw
        return self._keyframes.wants(stamp, paired.fix.lat, paired.fix.lon, yaw, self._wheels.at(stamp))

    # Writing: the worker's thread

    def _process(self, item: Keyframe | OdometryMessage | Stop) -> None:
        try:
            if isinstance(item, Stop):
                item.done(item.writer is not self._failed and self._complete_bag(item.writer))
            elif isinstance(item, OdometryMessage):
                self._write(item, lambda: item.writer.add_odometry(item.stamp_ns, item.data))
            else:
                self._record(item)
        except RejectedInput as error:
            self._reject(error.reason, str(error))
        except ImageError as error:
            self._reject("image_invalid", str(error))
        except CameraError as error:
            self._reject("camera_info_invalid", str(error))
        except Exception as error:  # the node must outlive a bug
            self._reject("internal_error", f"{type(error).__name__}: {error}")

    def _record(self, item: Keyframe) -> None:
        paired, raw = item.paired, None
        assert paired.fix is not None  # this node needs fixes
        if self._cameras.names:
            shots = self._record_rig(item)
            if shots is None:
                return
            pair = Pair.of(paired.frame.stamp_ns, "", b"", paired.fix, paired.heading, None)
            pair = replace(pair, images=shots)
        else:
            (image,) = paired.frame.images
            # A CompressedImage is written byte for byte, and decoded only to refuse what is damaged.
            raw = image.data if image.type == TOPICS[IMAGE] else None
            pixels = rgb_from_cdr(image.type, image.data, self._decode_other)
            self._cameras.check_mask("", image_size(pixels))
            jpeg, camera = b"", paired.frame.camera
            if camera is not None:
                check_size("", pixels, camera)
            self._check_panorama(paired.frame, pixels)
            if raw is None:
                # A mask is stored as it is, in the size of the images.
                width = 0 if self._cameras.own_mask is not None else self._params["max_width"]
                pixels, camera = reduce_width(pixels, camera, width)
                jpeg = encode_jpeg(pixels, self._params["jpeg_quality"])
            pair = Pair.of(paired.frame.stamp_ns, "jpeg", jpeg, paired.fix, paired.heading, camera)
        pair = self._with_tilt(pair, paired)
        tile = self._tile(paired.fix)
        if self._write(item, lambda: item.writer.add(pair, tile, raw)):
            self._health.accepted()
            if tile is None:
                self._health.count("pairs_without_tile")

    def _record_rig(self, item: Keyframe) -> tuple[CameraImage, ...] | None:
        """Return a rig's images as they are written, and describe cameras that the bag does not know.

        None if the bag cannot be written.
        """
        frame = item.paired.frame
        pixels, rig = self._cameras.see(frame, self._transforms, self._decode_other)
        before = self._recorded[1] if self._recorded and self._recorded[0] is item.writer else None
        known = before.cameras if before else {}
        # Places are not compared: a camera that tf moves would begin a file with every keyframe.
        for name in known.keys() & rig.cameras.keys():
            if known[name].camera != rig.cameras[name].camera:
                text = f"the calibration of camera {name} changed in a recording: call ~/stop and ~/start"
                raise RejectedInput("camera_info_invalid", text)
        if not rig.cameras.keys() <= known.keys():
            own = {**rig.own, **(before.own if before else {})}
            whole = Rig({**rig.cameras, **known}, rig.height, own)
            x, y, _ = whole.centre.tolist()
            item.writer.session.update(camera=(x, y), camera_yaw=0.0)
            if not self._write(item, lambda: item.writer.set_rig(whole)):
                return None
            self._recorded = item.writer, whole
        return tuple(
            image if image.type == TOPICS[IMAGE] else self._compressed(image, pixels[image.name])
            for image in frame.images
            if image.name in pixels
        )

    def _compressed(self, image: CameraImage, pixels: Image) -> CameraImage:
        data = np.frombuffer(encode_jpeg(pixels, self._params["jpeg_quality"]), np.uint8)
        head = ros_types.header(image.stamp_ns, "")
        message = ros_types.message(TOPICS[IMAGE], header=head, format="jpeg", data=data)
        return replace(image, type=TOPICS[IMAGE], data=ros_types.serialize(TOPICS[IMAGE], message))

    def _with_tilt(self, pair: Pair, paired: PairedFrame) -> Pair:
        """Return the pair with the tilt that is measured, or else fixed; none if it is not known."""
        tilt, source = paired.tilt, self._tilt.source
        if tilt is None:
            tilt, source = self._tilt.of(paired), "fixed"
        known = paired.tilt is not None or bool(tilt.roll or tilt.pitch)
        return replace(pair, tilt=tilt, tilt_source=source) if known else pair

    def _tile(self, fix: GnssFix) -> AerialTile | None:
        if self._tiles is None:
            return None
        try:
            self._prefetch(fix)
            tile = self._tiles.around(fix.lat, fix.lon, TILE_WAIT_S)
        except Exception as error:  # whatever it is, the pair counts
            text = f"pairs are stored without tiles: {error}"
            if self._health.condition("map", WARN, text):
                self.get_logger().warning(text)
            return None
        self._health.clear("map")
        return tile

    def _write(self, item: Keyframe | OdometryMessage, write: Callable[[], None]) -> bool:
        """Write an item, or count it as dropped; a failure ends the recording."""
        writer = item.writer
        if writer is not self._failed:
            try:
                write()
                return True
            except OSError as error:
                self._recording_failed(writer, error)
        self._health.count("frames_dropped" if isinstance(item, Keyframe) else "odom_dropped")
        return False

    def _recording_failed(self, writer: PairWriter, error: OSError) -> None:
        """End a recording; begin another one if its file was deleted. Called by either thread."""
        with self._failing:
            if writer is self._failed:
                return
            self._failed = writer
        lost = isinstance(error, BagLostError)
        key = "file_lost" if lost else "disk_full" if isinstance(error, BagFullError) else "disk"
        text = f"recording ended after {writer.pairs} pairs: {error.strerror or error}"
        self._health.condition(key, ERROR, text)
        self.get_logger().error(text)
        if self._writer is writer:
            self._writer = None
            if lost and self.executor is not None:
                self.executor.create_task(lambda: self._begin_after(text))
        self._complete_bag(writer)

    def _begin_after(self, text: str) -> None:
        """Record into a new bag after ``text`` happened; in the executor's thread."""
        if self._state != "active" or self._writer is not None:
            return
        try:
            self._begin()
        except OSError as error:
            self._health.condition("disk", ERROR, str(error))
            self.get_logger().error(str(error))
        else:
            self._health.condition("file_lost", ERROR, f"{text}; now into another bag")

    def _complete_bag(self, writer: PairWriter) -> bool:
        try:
            writer.close()
        except OSError as error:
            self._health.condition("disk", ERROR, f"{error}; run xview-loc bag recover")
            if rclpy.ok():
                self.get_logger().error(str(error))
            return False
        if rclpy.ok():  # on Ctrl-C the context is gone already
            self.get_logger().info(f"recorded {writer.pairs} pairs into {writer.bag.folder}")
        return True


def _without_key(source: str) -> str:
    """Return a map's name without what may hold a key: only the host of a tile server."""
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.hostname}" if "://" in source else redact(source)


def main(args: list[str] | None = None) -> int:
    """Run the node until it is asked to stop; return the exit code."""
    return run(PairLoggerNode, args)


if __name__ == "__main__":
    sys.exit(main())
