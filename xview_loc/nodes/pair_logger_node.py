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
from pathlib import Path
from typing import Any

import cv2
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger

from xview_loc.bags.writer import BagFullError, BagLimits
from xview_loc.camera import CameraError, ImageError
from xview_loc.imagery import AerialTile, MapError
from xview_loc.input_messages import RejectedInput, cdr_stamp_ns, rgb_from_image
from xview_loc.keyframes import KeyframeRule, Keyframes
from xview_loc.nodes import parameters
from xview_loc.nodes.diagnostics import ERROR, WARN
from xview_loc.nodes.vehicle_node import Job, VehicleNode, run
from xview_loc.pairs import Pair, PairWriter

# Keyframes that wait for a slow disk or map; at 10 a second this is several seconds of them.
QUEUE_LENGTH = 64
# A speed older than this says nothing about standing.
SPEED_AGE_NS = 1_000_000_000
# A map out of reach is asked again after so long; the pairs in between are stored without tiles.
MAP_RETRY_S = 5.0


class _PairWorker:
    """Works on keyframes one after another; none is replaced by a newer one."""

    def __init__(self, work: Callable[[Job], None]) -> None:
        self._work = work
        self._jobs: queue.Queue[Job | None] = queue.Queue(QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> bool:
        """Hand over a job; True where it had to be dropped because too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return True
        return False

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._work(job)


class PairLoggerNode(VehicleNode):
    """See config/pair_logger.yaml for the parameters and docs/pair_format.md for what it writes."""

    table = parameters.PAIR_LOGGER
    doing = "recording"
    raw_images = True
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
        p = self._p
        self._map_failed_at = -math.inf
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
        self._speed: tuple[int, float] | None = None
        self._rate = (time.monotonic(), 0)

    def make_worker(self) -> _PairWorker:
        """Every keyframe counts: they wait for each other."""
        if self._p["record_on_start"]:
            self._begin()
        return _PairWorker(self._record_safely)

    def wants_heading(self) -> bool:
        """As the parameter says."""
        return bool(self._p["use_heading"])

    def more_inputs(self) -> list[tuple[Any, str, Callable[[Any], None], bool]]:
        """camera_info where somebody publishes it, odometry where it is asked for."""
        inputs: list[tuple[Any, str, Callable[[Any], None], bool]] = [
            (CameraInfo, "camera_info", self._on_camera_info, False)
        ]
        if self._p["use_odometry"]:
            inputs.append((Odometry, "odom", self._on_odom, True))
        return inputs

    def stopped(self) -> None:
        """Complete the bag."""
        self._end()

    def release(self) -> None:
        """Map and inputs are all there is to let go of."""

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
        p = self._p
        parent = Path(p["directory"]).expanduser()
        name = time.strftime("pairs_%Y_%m_%d-%H_%M_%S")
        folder = parent / name
        for number in range(1, 1000):  # a second recording in the same second
            if not folder.exists():
                break
            folder = parent / f"{name}_{number}"
        session = {
            "vehicle": p["vehicle"],
            "map": _without_query(p["map"]),
            "licence": p["map_licence"] or self._attribution,
            "tile": {"size": p["tile_px"], "gsd": p["tile_gsd"]},
            "camera_yaw": math.radians(p["camera_yaw_deg"]),
            "keyframes": {
                "distance_m": p["keyframe_distance_m"],
                "interval_s": p["keyframe_interval_s"],
                "turn": math.radians(p["keyframe_turn_deg"]),
            },
        }
        limits = BagLimits(
            split_bytes=p["split_mb"] * 1_000_000,
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
                writer.close()
                self.get_logger().info(f"recorded {writer.pairs} pairs into {writer.bag.folder}")
        return writer

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = False
        if self._state != "active":
            response.message = "the node is not active"
        elif self._writer is not None:
            response.message = f"recording already, into {self._writer.bag.folder}"
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
                writer.bag.split()
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
            speed = math.hypot(*_velocity(deserialize_message(data, Odometry)))
        except RejectedInput as error:
            self._refuse("odom", error)
            return
        if math.isfinite(speed):
            self._speed = (stamp, speed)
        with self._written:
            if self._writer is not None:
                self._write(lambda writer: writer.add_odometry(stamp, data))

    def accept(self, job: Job) -> bool:
        """Whether a paired frame is a keyframe."""
        if self._writer is None:
            return False
        speed = None
        if self._speed is not None and abs(job.frame.stamp_ns - self._speed[0]) <= SPEED_AGE_NS:
            speed = self._speed[1]
        yaw = None if job.heading is None else job.heading.yaw
        return self._keyframes.wants(job.frame.stamp_ns, job.fix.lat, job.fix.lon, yaw, speed)

    # Writing: the worker's thread

    def _record_safely(self, job: Job) -> None:
        try:
            self._record(job)
        except ImageError as error:
            self._reject("image_invalid", str(error))
        except CameraError as error:
            self._reject("camera_info_invalid", str(error))
        except Exception as error:
            # The node must outlive a bug; this is where it is told.
            self._reject("internal_error", f"{type(error).__name__}: {error}")

    def _record(self, job: Job) -> None:
        compressed = self._p["image_transport"] == "compressed"
        data: bytes = job.frame.image
        image_format, image_bytes, raw = "jpeg", b"", None
        if compressed:
            # As it came, bytes and all: the message is only looked at by those who read the bag.
            raw = data
        else:
            rgb = rgb_from_image(deserialize_message(data, Image))
            quality = [cv2.IMWRITE_JPEG_QUALITY, self._p["jpeg_quality"]]
            done, encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
            if not done:
                raise ImageError("the image cannot be compressed")
            image_bytes = encoded.tobytes()
        fix, heading = job.fix, job.heading
        pair = Pair(
            stamp_ns=job.frame.stamp_ns,
            image_format=image_format,
            image_bytes=image_bytes,
            lat=fix.lat,
            lon=fix.lon,
            altitude=fix.altitude,
            fix_covariance=fix.covariance,
            heading=None if heading is None else heading.yaw,
            heading_std=0.0 if heading is None else heading.std,
            camera=job.frame.camera,
        )
        tile = self._tile(job)
        with self._written:
            if self._writer is not None and self._write(lambda writer: writer.add(pair, tile, raw)):
                self._health.accepted()
                if tile is None:
                    self._health.count("pairs_without_tile")

    def _tile(self, job: Job) -> AerialTile | None:
        if self._tiles is None or time.monotonic() - self._map_failed_at < MAP_RETRY_S:
            return None
        try:
            self._prefetch(job.fix)
            tile = self._tiles.around(job.fix.lat, job.fix.lon)
        except MapError as error:
            self._map_failed_at = time.monotonic()
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
            writer.close()
            return False
        return True


def _without_query(source: str) -> str:
    """A tile server's URL without what may hold a key."""
    return source.partition("?")[0] if "://" in source else source


def _velocity(odometry: Odometry) -> tuple[float, float]:
    linear = odometry.twist.twist.linear
    return linear.x, linear.y


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to stop; the exit code."""
    return run(PairLoggerNode, args)


if __name__ == "__main__":
    sys.exit(main())
