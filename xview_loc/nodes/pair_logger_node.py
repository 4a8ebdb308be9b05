"""The ``pair_logger`` node: records target-area pairs into a bag, to adapt a model with later.

Needs no model and no GPU. The executor's thread picks the keyframes; one thread cuts their tiles and writes.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import rclpy
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger

from xview_loc.bags.writer import BagFullError, BagLimits
from xview_loc.camera import CameraError
from xview_loc.images import ImageError, encode_jpeg
from xview_loc.maps.base import AerialTile
from xview_loc.nodes import parameters
from xview_loc.nodes.diagnostics import ERROR, WARN
from xview_loc.nodes.running import run
from xview_loc.nodes.vehicle_node import Input, Job, VehicleNode
from xview_loc.recordings.pairs import Pair, PairWriter
from xview_loc.vehicle.keyframes import KeyframeRule, Keyframes, WheelSpeed
from xview_loc.vehicle.messages import cdr_stamp_ns, rgb_from_image
from xview_loc.vehicle.synchronisation import GnssFix, RejectedInput

# Keyframes that wait for a slow disk; at 10 a second this is several seconds of them.
KEYFRAMES_WAITING = 64
ODOMETRY_WAITING = 4096
# How long a pair waits for its tile; without one it can be filled in later.
TILE_WAIT_S = 0.3
# Odometry of another clock (uptime) is of no use beside images.
ODOMETRY_CLOCK_NS = 60 * 1_000_000_000


@dataclass(frozen=True)
class _Odometry:
    """CDR bytes of an odometry message."""

    stamp_ns: int
    data: bytes


class _Recorder:
    """Works on keyframes and odometry one after another; none is replaced by a newer one."""

    def __init__(self, work: Callable[[Job | _Odometry], None]) -> None:
        self._work = work
        self._queue: queue.Queue[Job | _Odometry | None] = queue.Queue(ODOMETRY_WAITING)
        # Images are what needs the memory.
        self._room = threading.BoundedSemaphore(KEYFRAMES_WAITING)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def put(self, job: Job | _Odometry) -> bool:
        """Hand something over; True where it had to be dropped because too much waits."""
        image = not isinstance(job, _Odometry)
        if image and not self._room.acquire(blocking=False):
            return True
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            if image:
                self._room.release()
            return True
        return False

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if not isinstance(job, _Odometry):
                self._room.release()
            self._work(job)


class PairLoggerNode(VehicleNode):
    """See config/pair_logger.yaml for the parameters and docs/pair_format.md for what it writes."""

    table = parameters.PAIR_LOGGER
    ok_message = "recording"
    optional_inputs = frozenset({"camera_info", "odom"})

    def __init__(self) -> None:
        self._writer: PairWriter | None = None
        self._written = threading.Lock()
        super().__init__("pair_logger")
        for name, call in (("start", self._on_start), ("stop", self._on_stop), ("split", self._on_split)):
            self.create_service(Trigger, f"~/{name}", call)

    # What a VehicleNode asks for

    def configure(self) -> None:
        """Open the map. One that is out of reach is no reason not to record: tiles can be filled in later."""
        p = self._params
        self._attribution = ""
        if p["map"]:
            tiles = self._open_map(p["tile_px"], p["tile_gsd"])
            self._attribution = tiles.map.attribution
        else:
            self._health.condition("no_map", WARN, "no map is named: pairs are stored without tiles")
        rule = KeyframeRule(
            p["keyframe_distance_m"], p["keyframe_interval_s"], math.radians(p["keyframe_turn_deg"])
        )
        self._keyframes = Keyframes(rule)
        self._wheels = WheelSpeed()
        self._rate = (time.monotonic(), 0)

    def make_worker(self) -> _Recorder:
        """Every keyframe counts: they wait for each other."""
        if self._params["record_on_start"]:
            self._begin()
        return _Recorder(self._record_safely)

    def wants_heading(self) -> bool:
        """As the parameter says."""
        return bool(self._params["use_heading"])

    def extra_inputs(self) -> list[Input]:
        """camera_info, which need not be published, and odometry if it is to be recorded."""
        inputs = [Input(CameraInfo, "camera_info", self._on_camera_info)]
        if self._params["use_odometry"]:
            inputs.append(Input(Odometry, "odom", self._on_odom, raw=True))
        return inputs

    def stopped(self) -> None:
        """Complete the bag."""
        self._end()

    def release(self) -> None:
        """Nothing but the map is opened, and the base class closes it."""

    def before_report(self) -> None:
        """Pairs, megabytes and rate."""
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

    # Recording on and off: the executor's thread, and the worker's where the disk is full

    def _begin(self) -> Path:
        """Begin a bag; its folder. Raises OSError."""
        p = self._params
        parent = Path(p["directory"]).expanduser()
        name = time.strftime("pairs_%Y_%m_%d-%H_%M_%S")
        folder = parent / name
        for number in range(1, 1000):  # a second recording in the same second
            if not folder.exists():
                break
            folder = parent / f"{name}_{number}"
        session = {
            "vehicle": p["vehicle"],
            "map": _without_key(p["map"]),
            "licence": p["map_licence"] or self._attribution,
            "tile": {"size": p["tile_px"], "gsd": p["tile_gsd"]},
            "camera_yaw": math.radians(p["camera_yaw_deg"]),
            "keyframes": {
                "distance_m": p["keyframe_distance_m"],
                "interval_s": p["keyframe_interval_s"],
                "turn": math.radians(p["keyframe_turn_deg"]),
            },
        }
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
        try:
            writer = PairWriter(folder, session, limits)
        except OSError as error:
            raise OSError(f"cannot record into {folder}: {error.strerror or error}") from None
        with self._written:
            self._writer = writer
        self._rate = (time.monotonic(), 0)
        for problem in ("stopped", "disk", "disk_full"):
            self._health.clear(problem)
        self.get_logger().info(f"recording into {folder}")
        return folder

    def _end(self) -> PairWriter | None:
        with self._written:
            writer, self._writer = self._writer, None
            if writer is not None:
                self._complete_bag(writer)
        return writer

    def _complete_bag(self, writer: PairWriter) -> None:
        try:
            writer.close()
        except OSError as error:
            self._health.condition("disk", ERROR, f"{error}; run xview-loc bag recover")
            if rclpy.ok():
                self.get_logger().error(str(error))
        if rclpy.ok():  # on Ctrl-C the context is gone already
            self.get_logger().info(f"recorded {writer.pairs} pairs into {writer.bag.folder}")

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = False
        if self._state != "active":
            response.message = "the node is not active"
        elif (writer := self._writer) is not None:
            response.message = f"recording already, into {writer.bag.folder}"
        else:
            try:
                folder = self._begin()
            except OSError as error:
                response.message = str(error)
            else:
                response.success, response.message = True, f"recording into {folder}"
        return response

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        writer = self._end()
        response.success = writer is not None
        response.message = "not recording"
        if writer is not None:
            response.message = f"recorded {writer.pairs} pairs into {writer.bag.folder}"
            self._health.condition("stopped", WARN, "recording was stopped")
        return response

    def _on_split(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        writer = self._writer
        try:
            if writer is not None:
                writer.split()
        except OSError as error:
            response.success, response.message = False, str(error)
            return response
        response.success = writer is not None
        response.message = "not recording" if writer is None else writer.bag.current_file
        return response

    # Inputs: the executor's thread

    def _on_odom(self, data: bytes) -> None:
        self._health.count("odom_received")
        try:
            stamp = cdr_stamp_ns(data)
            away = abs(stamp - self._pairing.last_frame_ns)
            if self._pairing.last_frame_ns and away > ODOMETRY_CLOCK_NS:
                raise RejectedInput("other_clock", f"its stamps are {away / 1e9:.0f} s from the images'")
            velocity = deserialize_message(data, Odometry).twist.twist.linear
        except RejectedInput as error:
            self._refuse("odom", error)
            return
        self._health.clear("odom")
        self._wheels.saw(stamp, math.hypot(velocity.x, velocity.y))
        # Without an image there is nothing that it could be the motion of.
        if self._writer is None or self._worker is None or not self._pairing.last_frame_ns:
            return
        if self._worker.put(_Odometry(stamp, data)):
            self._health.count("odom_dropped")

    def accept(self, job: Job) -> bool:
        """Whether a paired frame is a keyframe."""
        if self._writer is None:
            return False
        assert job.fix is not None  # this node needs fixes
        stamp, yaw = job.frame.stamp_ns, None if job.heading is None else job.heading.yaw
        return self._keyframes.wants(stamp, job.fix.lat, job.fix.lon, yaw, self._wheels.at(stamp))

    # Writing: the worker's thread

    def _record_safely(self, job: Job | _Odometry) -> None:
        try:
            if not isinstance(job, _Odometry):
                self._record(job)
                return
            with self._written:
                if self._writer is not None:
                    self._write(lambda writer: writer.add_odometry(job.stamp_ns, job.data))
        except ImageError as error:
            self._reject("image_invalid", str(error))
        except CameraError as error:
            self._reject("camera_info_invalid", str(error))
        except Exception as error:
            # The node must outlive a bug; this is where it is told.
            self._reject("internal_error", f"{type(error).__name__}: {error}")

    def _record(self, job: Job) -> None:
        data = job.frame.image
        # A CompressedImage stays as it came, bytes and all: only who reads the bag looks into it.
        raw = data if self._params["image_transport"] == "compressed" else None
        jpeg = b""
        if raw is None:
            jpeg = encode_jpeg(rgb_from_image(deserialize_message(data, Image)), self._params["jpeg_quality"])
        frame = job.frame
        assert job.fix is not None  # this node needs fixes
        pair = Pair.of(frame.stamp_ns, "jpeg", jpeg, job.fix, job.heading, frame.camera)
        tile = self._tile(job.fix)
        with self._written:
            if self._writer is not None and self._write(lambda writer: writer.add(pair, tile, raw)):
                self._health.accepted()
                if tile is None:
                    self._health.count("pairs_without_tile")

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

    def _write(self, write: Callable[[PairWriter], None]) -> bool:
        """Write under the lock; a recording that cannot go on is ended, and told."""
        writer = self._writer
        assert writer is not None
        try:
            write(writer)
        except OSError as error:
            full = isinstance(error, BagFullError)
            text = f"recording ended after {writer.pairs} pairs: {error.strerror or error}"
            self._health.condition("disk_full" if full else "disk", ERROR, text)
            self.get_logger().error(text)
            self._writer = None
            self._complete_bag(writer)
            return False
        return True


def _without_key(source: str) -> str:
    """A map's name without what may hold a key: of a tile server, the host alone."""
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.hostname}" if "://" in source else source


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to stop; the exit code."""
    return run(PairLoggerNode, args)


if __name__ == "__main__":
    sys.exit(main())
