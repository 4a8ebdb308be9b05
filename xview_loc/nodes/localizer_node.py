"""The ``localizer`` node: camera, GNSS and heading in, a pose on the aerial map out.

The executor's thread collects inputs and pairs them by their stamps; one worker thread decodes, localises
and publishes. The newest image wins: what the worker cannot keep up with is dropped and counted.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped, QuaternionStamped
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.publisher import Publisher
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu, NavSatFix
from std_msgs.msg import Float64, Header

from xview_loc.camera import CameraError, CameraModel, ImageError
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.imagery import AerialMap, MapError, MapOptions, NoImageryError
from xview_loc.localizer import (
    LocalizationError,
    Localizer,
    Observation,
    PoseEstimate,
    required_tile_px,
)
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint, shipped_checkpoint
from xview_loc.mounting import Mounting
from xview_loc.nodes import messages, parameters
from xview_loc.nodes.diagnostics import ERROR, WARN, Health
from xview_loc.nodes.frame_worker import FrameWorker
from xview_loc.nodes.input_sync import (
    NS,
    RESTART_NS,
    GnssFix,
    HeadingSample,
    History,
    SyncError,
    WaitingRoom,
    blend_fix,
    blend_heading,
)
from xview_loc.nodes.messages import RejectedInput
from xview_loc.overlay import draw_overlay
from xview_loc.tile_store import TileStore

HEADING_TYPES = {"imu": Imu, "quaternion": QuaternionStamped, "pose": PoseStamped}
RESTART_SHOWN_S = 10.0
SILENT_AFTER_S = 3.0
# The motion that tiles are fetched ahead of is measured over so many metres, within so many seconds.
MOTION_M, MOTION_S = 10.0, 10.0
STATUS = ("latency_ms", "inference_ms", "confidence", "tile_age_s", "fix_offset_m")


@dataclass(frozen=True)
class Frame:
    """One image with what was known when it was taken."""

    image: Image | CompressedImage
    stamp_ns: int
    arrived_ns: int
    camera: CameraModel | None


@dataclass(frozen=True)
class Job:
    """A frame, paired and ready to be localised."""

    frame: Frame
    fix: GnssFix
    heading: HeadingSample | None
    mounting: Mounting


class LocalizerNode(LifecycleNode):
    """See config/localizer.yaml for the parameters and docs/diagnostics.md for what it reports."""

    def __init__(self) -> None:
        super().__init__("localizer")
        parameters.declare(self, parameters.LOCALIZER)
        self._health = Health()
        self._state = "unconfigured"
        self._p: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._worker: FrameWorker[Job] | None = None
        self._map: AerialMap | None = None
        self._tiles: TileStore | None = None
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._report)

    # Lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Open map and model, create the outputs. rclpy swallows exceptions here, so we tell them."""
        try:
            self._configure()
        except Exception as error:
            self._close()
            text = " ".join(str(error).split())
            if not isinstance(error, (MapError, CheckpointError, ValueError)):
                text = f"{type(error).__name__}: {text}"
            self.get_logger().error(f"cannot configure: {text}")
            self._health.condition("not_configured", ERROR, text)
            return TransitionCallbackReturn.FAILURE
        self._health.clear("not_configured")
        self._state = "inactive"
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to listen."""
        result = super().on_activate(state)
        self._worker = FrameWorker(self._localize_safely)
        self._subscribe()
        self._state = "active"
        self._active_since = time.monotonic()
        self.get_logger().info("active")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the frame in work is finished."""
        self._stop()
        self._state = "inactive"
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of map, model and outputs."""
        self._close()
        self._state = "unconfigured"
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything."""
        self._close()
        self._state = "finalized"
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """End the threads, whatever state the node is in."""
        self._stop()
        self._close_map()

    def _configure(self) -> None:
        p = self._p = parameters.read(self, parameters.LOCALIZER)
        if p["torch_threads"]:
            torch.set_num_threads(p["torch_threads"])
        model = self._load_model()
        if not p["map"]:
            raise parameters.ParameterError("parameter map is empty: name an aerial map")
        self._map = AerialMap.open(p["map"], self._map_options())
        self._localizer = self._make_localizer(model)
        self._needs_camera_info = model.spec.camera == "pinhole"
        fixed = math.isfinite(p["datum_lat"])
        self._datum = LocalProjection(p["datum_lat"], p["datum_lon"]) if fixed else None
        self._show_datum()
        self._fixes: History[GnssFix] = History("fix", blend_fix, p["max_fix_age_s"])
        self._headings: History[HeadingSample] = History("heading", blend_heading, p["max_heading_age_s"])
        self._waiting: WaitingRoom[Frame] = WaitingRoom(p["max_wait_s"])
        self._camera: CameraModel | None = None
        self._motion_start: GnssFix | None = None
        self._last_image_ns = 0
        self._last_image_at: float | None = None
        self._tile_key, self._tile_since = "", 0.0
        self._heat_map_at = -math.inf
        self._tf: Any = self._make_tf_buffer() if p["camera_frame"] or p["antenna_frame"] else None
        self._broadcaster: Any = self._make_broadcaster() if p["publish_tf"] else None
        self._advertise()

    def _load_model(self) -> CrossViewModel:
        name = self._p["model"]
        path = self._p["checkpoint"] or shipped_checkpoint(name)
        if path:
            checkpoint = load_checkpoint(path, name or None)
            self._health.clear("untrained")
            self._health.value("checkpoint", f"{path} sha256:{checkpoint.sha256[:12]}")
            return checkpoint.model
        model = create_model(name)
        text = f"no checkpoint: {name} runs with random weights, its poses mean nothing"
        self.get_logger().warning(text)
        self._health.condition("untrained", WARN, text)
        self._health.value("checkpoint", "none")
        return model

    def _make_localizer(self, model: CrossViewModel) -> Localizer:
        p, spec = self._p, model.spec
        assert self._map is not None
        self._tiles = TileStore(self._map, required_tile_px(spec), spec.gsd, p["snap_m"] or None)
        prior = {"known": 0.0, "prior": p["heading_prior_deg"], "unknown": None}[p["heading_mode"]]
        radius = p["search_radius_m"]
        localizer = Localizer(
            self._tiles,
            model,
            heading_prior_deg=prior,
            search_radius_m=None if radius < 0 else radius or "covariance",
            min_valid_fraction=p["min_valid_fraction"],
            covariance_floor_m=p["covariance_floor_m"],
            device=p["device"],
        )
        localizer.warm_up()
        return localizer

    def _map_options(self) -> MapOptions:
        p = self._p
        headers = {}
        for line in filter(None, p["map_headers"]):
            name, colon, value = line.partition(":")
            if not colon:
                raise parameters.ParameterError("map_headers must each read 'Name: value'")
            headers[name.strip()] = value.strip()
        key = None
        if p["map_api_key_env"] and (key := os.environ.get(p["map_api_key_env"])) is None:
            raise parameters.ParameterError(f"environment variable {p['map_api_key_env']} is not set")
        options: dict[str, Any] = {"cache_dir": Path(p["map_cache_dir"])} if p["map_cache_dir"] else {}
        return MapOptions(
            headers=headers,
            api_key=key,
            max_zoom=p["map_max_zoom"] or None,
            deadline_s=p["map_deadline_s"],
            offline=p["map_offline"],
            **options,
        )

    def _make_tf_buffer(self) -> Any:
        try:
            import tf2_ros
        except ImportError:
            raise parameters.ParameterError(
                "camera_frame or antenna_frame is set, but tf2_ros cannot be imported"
            ) from None
        buffer = tf2_ros.Buffer()
        self._tf_listener = tf2_ros.TransformListener(buffer, self, spin_thread=False)
        return buffer

    def _make_broadcaster(self) -> Any:
        try:
            import tf2_ros
        except ImportError:
            raise parameters.ParameterError("publish_tf is set, but tf2_ros cannot be imported") from None
        return tf2_ros.TransformBroadcaster(self)

    def _advertise(self) -> None:
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._pose_pub = self.create_lifecycle_publisher(PoseWithCovarianceStamped, "~/pose", 10)
        self._fix_pub = self.create_lifecycle_publisher(NavSatFix, "~/fix", 10)
        self._heat_pub = self.create_lifecycle_publisher(OccupancyGrid, "~/heat_map", latched)
        self._overlay_pub = self.create_lifecycle_publisher(Image, "~/overlay", 1)
        self._status_pubs = {
            name: self.create_lifecycle_publisher(Float64, f"~/status/{name}", 10) for name in STATUS
        }
        self._outputs: list[Publisher] = [
            self._pose_pub,
            self._fix_pub,
            self._heat_pub,
            self._overlay_pub,
            *self._status_pubs.values(),
        ]

    def _subscribe(self) -> None:
        p = self._p
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=p["qos_depth"],
            reliability=ReliabilityPolicy.RELIABLE
            if p["qos_reliability"] == "reliable"
            else ReliabilityPolicy.BEST_EFFORT,
        )
        image = CompressedImage if p["image_transport"] == "compressed" else Image
        wanted = [(image, "image", self._on_image), (NavSatFix, "fix", self._on_fix)]
        if p["heading_mode"] != "unknown":
            wanted.append((HEADING_TYPES[p["heading_source"]], "heading", self._on_heading))
        if self._needs_camera_info:
            wanted.append((CameraInfo, "camera_info", self._on_camera_info))
        self._inputs = [self.create_subscription(kind, name, call, qos) for kind, name, call in wanted]
        self._wait_timer = self.create_timer(0.02, self._release, autostart=False)

    def _stop(self) -> None:
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        if self._inputs:
            self.destroy_timer(self._wait_timer)
        self._inputs = []
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _close(self) -> None:
        self._stop()
        for publisher in getattr(self, "_outputs", []):
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = []
        self._close_map()

    def _close_map(self) -> None:
        if self._tiles is not None:
            self._tiles.close()
            self._tiles = None
        if self._map is not None:
            self._map.close()
            self._map = None

    # Inputs: the executor's thread

    def _on_fix(self, message: NavSatFix) -> None:
        self._health.count("fix_received")
        try:
            fix = messages.fix_from_navsat(message, self._p["fix_min_status"], self._p["fix_max_sigma_m"])
        except RejectedInput as error:
            self._refuse("fix", error)
            return
        self._restart_if(self._fixes.went_back(fix.stamp_ns), "fix")
        if self._fixes.add(fix):
            self._health.clear("fix")
            self._release()
        else:
            self._health.count("fix_rejected/stamp_not_newer")

    def _on_heading(self, message: Any) -> None:
        self._health.count("heading_received")
        p = self._p
        try:
            heading = messages.heading_from_message(
                message, math.radians(p["magnetic_declination_deg"]), math.radians(p["heading_std_deg"])
            )
        except RejectedInput as error:
            self._refuse("heading", error)
            return
        self._restart_if(self._headings.went_back(heading.stamp_ns), "heading")
        if self._headings.add(heading):
            self._health.clear("heading")
            if len(self._waiting):
                self._release()
        else:
            self._health.count("heading_rejected/stamp_not_newer")

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._health.count("camera_info_received")
        try:
            self._camera = messages.camera_from_info(message)
        except RejectedInput as error:
            self._camera = None
            self._refuse("camera_info", error)
            return
        self._health.clear("camera_info")

    def _on_image(self, message: Image | CompressedImage) -> None:
        self._health.count("image_received")
        self._last_image_at = time.monotonic()
        try:
            stamp = messages.stamp_ns(message)
        except RejectedInput as error:
            self._reject(error.reason, str(error))
            return
        self._restart_if(stamp < self._last_image_ns - RESTART_NS, "image")
        if stamp <= self._last_image_ns:
            self._reject("image_stamp_not_newer", "the image's stamp is not after the last one's")
            return
        self._last_image_ns = stamp
        delay = (self.get_clock().now().nanoseconds - stamp) / NS
        if abs(delay) > self._p["max_image_delay_s"]:
            text = f"image stamps differ {delay:.1f} s from the node's clock (clocks, or use_sim_time)"
            self._health.condition("image_delay", WARN, text, for_s=3.0)
        now = time.monotonic_ns()
        self._waiting.add(Frame(message, stamp, now, self._camera), stamp, now)
        self._wait_timer.reset()
        self._release()

    def _refuse(self, topic: str, error: RejectedInput) -> None:
        self._health.count(f"{topic}_rejected/{error.reason}")
        if self._health.condition(topic, WARN, f"last {topic} refused: {error}"):
            self.get_logger().warning(f"{topic} refused: {error}")

    def _reject(self, reason: str, text: str) -> None:
        if self._health.rejected(reason, text):
            self.get_logger().warning(f"frame rejected: {reason}: {text}")

    def _restart_if(self, went_back: bool, topic: str) -> None:
        """A stamp went back: whatever was collected belongs to another time."""
        if not went_back:
            return
        self._fixes.clear()
        self._headings.clear()
        self._last_image_ns = 0
        for _ in range(self._waiting.clear()):
            self._health.count("frames_dropped")
        self._health.count("time_restarts")
        text = f"{topic} stamps went back in time; collected inputs were forgotten"
        self.get_logger().warning(text)
        self._health.condition("time_restart", WARN, text, for_s=RESTART_SHOWN_S)

    def _complete(self, stamp_ns: int) -> bool:
        known = self._p["heading_mode"] == "unknown" or self._headings.reaches(stamp_ns)
        return known and self._fixes.reaches(stamp_ns)

    def _release(self) -> None:
        for frame in self._waiting.ready(self._complete, time.monotonic_ns()):
            self._pair(frame)
        if not len(self._waiting):
            self._wait_timer.cancel()

    def _pair(self, frame: Frame) -> None:
        try:
            fix = self._at(self._fixes, frame.stamp_ns)
            unknown = self._p["heading_mode"] == "unknown"
            heading = None if unknown else self._at(self._headings, frame.stamp_ns)
            if self._needs_camera_info and frame.camera is None:
                raise RejectedInput("camera_info_missing", "no usable camera_info received")
            mounting = self._mounting()
        except RejectedInput as error:
            self._reject(error.reason, str(error))
            return
        if self._worker is not None and self._worker.put(Job(frame, fix, heading, mounting)):
            self._health.count("frames_dropped")

    def _at(self, history: History[Any], stamp_ns: int) -> Any:
        try:
            return history.at(stamp_ns)
        except SyncError as error:
            raise RejectedInput(f"{history.name}_{error.reason}", str(error)) from None

    def _mounting(self) -> Mounting:
        p = self._p
        antenna, camera = (p["antenna_x"], p["antenna_y"]), (p["camera_x"], p["camera_y"])
        yaw = math.radians(p["camera_yaw_deg"])
        if p["antenna_frame"]:
            antenna, _ = self._look_up(p["antenna_frame"])
        if p["camera_frame"]:
            camera, yaw = self._look_up(p["camera_frame"])
        return Mounting(antenna, camera, yaw)

    def _look_up(self, frame: str) -> tuple[tuple[float, float], float]:
        try:
            found = self._tf.lookup_transform(self._p["base_frame"], frame, rclpy.time.Time()).transform
        except Exception as error:  # tf2's exceptions share no base that is importable without it
            raise RejectedInput("extrinsics_missing", f"tf: {error}") from None
        q = found.rotation
        # An optical frame (REP-103) looks along its z axis, any other along x.
        if "optical" in frame:
            yaw = math.atan2(2.0 * (q.y * q.z - q.w * q.x), 2.0 * (q.x * q.z + q.w * q.y))
        else:
            yaw = messages.yaw_of(q)
        return (found.translation.x, found.translation.y), yaw

    # Localising and publishing: the worker's thread

    def _localize_safely(self, job: Job) -> None:
        try:
            self._localize(job)
        except RejectedInput as error:
            self._reject(error.reason, str(error))
        except ImageError as error:
            self._reject("image_invalid", str(error))
        except CameraError as error:
            self._reject("camera_info_invalid", str(error))
        except NoImageryError as error:
            self._reject("no_imagery", str(error))
        except MapError as error:
            self._reject("map_unavailable", str(error))
        except LocalizationError as error:
            # HeadingRequiredError -> heading_required
            name = type(error).__name__.removesuffix("Error")
            self._reject(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), str(error))
        except Exception as error:
            # The node must outlive a bug; this is where it is told.
            if rclpy.ok():
                self._reject("internal_error", f"{type(error).__name__}: {error}")

    def _localize(self, job: Job) -> None:
        started = time.monotonic_ns()
        image = messages.rgb_from_image(job.frame.image)
        fix, heading = job.fix, job.heading
        self._prefetch(fix)
        lat, lon = fix.lat, fix.lon
        looks = None
        if heading is not None:
            # The core localises the camera; the receiver measured the antenna.
            lat, lon = job.mounting.camera_from_antenna(lat, lon, heading.yaw)
            looks = job.mounting.looking(heading.yaw)
        estimate = self._localizer.localize(
            Observation(
                image=image,
                lat=lat,
                lon=lon,
                fix_covariance=None if fix.covariance is None else fix.covariance[:2, :2],
                heading=looks,
                heading_std=0.0 if heading is None else heading.std,
                camera=job.frame.camera,
                stamp_ns=job.frame.stamp_ns,
            )
        )
        if estimate.confidence < self._p["min_confidence"]:
            raise RejectedInput(
                "low_confidence",
                f"confidence {estimate.confidence:.3f} is below {self._p['min_confidence']:g}",
            )
        if estimate.at_search_border:
            self._health.count("frames_at_search_border")
            text = "the likeliest place lies on the edge of the search area; the true one may be outside"
            self._health.condition("search_border", WARN, text, for_s=3.0)
        done = time.monotonic_ns()
        self._publish(job, estimate)
        self._health.accepted()
        self._publish_status(job, estimate, (done - started) / 1e6)

    def _prefetch(self, fix: GnssFix) -> None:
        """Load tiles ahead of the motion, measured over a distance that noise does not reach."""
        start, tiles = self._motion_start, self._tiles
        if start is None or tiles is None or not 0.0 < (fix.stamp_ns - start.stamp_ns) / NS < MOTION_S:
            self._motion_start = fix
            return
        moved = LocalProjection(start.lat, start.lon).forward(fix.lat, fix.lon)
        if math.hypot(*moved) >= MOTION_M:
            seconds = (fix.stamp_ns - start.stamp_ns) / NS
            tiles.prefetch(fix.lat, fix.lon, (moved[0] / seconds, moved[1] / seconds))
            self._motion_start = fix

    def _publish(self, job: Job, estimate: PoseEstimate) -> None:
        stamp = job.frame.image.header.stamp
        if self._datum is None:
            self._datum = LocalProjection(job.fix.lat, job.fix.lon)
            self._show_datum()
        yaw, variance = None, estimate.heading_variance
        lat, lon, covariance = estimate.lat, estimate.lon, estimate.covariance
        if estimate.heading is not None:
            yaw = job.mounting.heading(estimate.heading)
            lat, lon = job.mounting.base_from_camera(lat, lon, yaw)
            covariance = job.mounting.base_covariance(covariance, yaw, variance)
        x, y = self._datum.forward(lat, lon)
        convergence = self._datum.convergence(lat, lon)
        cos, sin = math.cos(convergence), math.sin(convergence)
        turn = np.array([[cos, -sin], [sin, cos]])
        in_map = Header(stamp=stamp, frame_id=self._p["map_frame"])
        pose = messages.pose_message(
            in_map,
            (x, y),
            turn @ covariance @ turn.T,
            None if yaw is None else wrap_angle(yaw + convergence),
            variance,
        )
        self._pose_pub.publish(pose)
        base = Header(stamp=stamp, frame_id=self._p["base_frame"])
        self._fix_pub.publish(messages.fix_message(base, lat, lon, covariance, job.fix))
        if self._broadcaster is not None and yaw is not None:
            self._broadcast(pose)
        now = time.monotonic()
        rate = self._p["heat_map_rate"]
        if rate > 0 and now - self._heat_map_at >= 1.0 / rate:
            self._heat_map_at = now
            self._heat_pub.publish(messages.heat_map_message(in_map, estimate.heat_map, self._datum))
        if self._overlay_pub.get_subscription_count():
            self._publish_overlay(base, job, estimate)

    def _publish_overlay(self, header: Header, job: Job, estimate: PoseEstimate) -> None:
        self._overlay_pub.publish(
            messages.image_message(header, draw_overlay(estimate, job.fix.lat, job.fix.lon))
        )

    def _broadcast(self, pose: PoseWithCovarianceStamped) -> None:
        from geometry_msgs.msg import TransformStamped

        message = TransformStamped(header=pose.header, child_frame_id=self._p["base_frame"])
        message.transform.translation.x = pose.pose.pose.position.x
        message.transform.translation.y = pose.pose.pose.position.y
        message.transform.rotation = pose.pose.pose.orientation
        self._broadcaster.sendTransform(message)

    def _publish_status(self, job: Job, estimate: PoseEstimate, inference_ms: float) -> None:
        now = time.monotonic()
        if estimate.tile.key != self._tile_key:
            self._tile_key, self._tile_since = estimate.tile.key, now
        offset = LocalProjection(job.fix.lat, job.fix.lon).forward(estimate.lat, estimate.lon)
        values = {
            "latency_ms": (time.monotonic_ns() - job.frame.arrived_ns) / 1e6,
            "inference_ms": inference_ms,
            "confidence": estimate.confidence,
            "tile_age_s": now - self._tile_since,
            "fix_offset_m": math.hypot(*offset),
        }
        for name, value in values.items():
            self._status_pubs[name].publish(Float64(data=float(value)))
            self._health.value(name, f"{value:.3f}")

    # Diagnostics: once a second

    def _show_datum(self) -> None:
        self._health.value(
            "datum",
            "not set yet" if self._datum is None else f"{self._datum.lat:.9f} {self._datum.lon:.9f}",
        )

    def _report(self) -> None:
        self._check_publishers()
        if self._state == "active":
            silent = time.monotonic() - (self._last_image_at or self._active_since)
            if silent > SILENT_AFTER_S:
                self._health.condition("no_image", WARN, f"no image for {silent:.0f} s")
            else:
                self._health.clear("no_image")
        self._health.value("state", self._state)
        status = self._health.report(self.get_fully_qualified_name().lstrip("/"))
        if status.message == "localising" and self._state != "active":
            status.level, status.message = WARN, f"not active: {self._state}"
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)

    def _check_publishers(self) -> None:
        names = {"image", "fix", "heading", "camera_info"}
        for subscription in self._inputs:
            name = next(n for n in names if subscription.callback == getattr(self, f"_on_{n}"))
            key = f"{name}_topic"
            problem = self._hearing_problem(subscription)
            if problem is None:
                self._health.clear(key)
            elif self._health.condition(key, WARN, problem):
                self.get_logger().warning(problem)

    def _hearing_problem(self, subscription: Any) -> str | None:
        topic = subscription.topic_name
        own = subscription.msg_type
        type_name = f"{own.__module__.split('.')[0]}/msg/{own.__name__}"
        publishers = self.get_publishers_info_by_topic(topic)
        if not publishers:
            return f"{topic} has no publisher"
        for info in publishers:
            who = f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            if info.topic_type != type_name:
                return f"{topic}: {who} publishes {info.topic_type}, {type_name} is expected"
            verdict, why = qos_check_compatible(info.qos_profile, subscription.qos_profile)
            if verdict == QoSCompatibility.ERROR:
                return f"{topic}: {who} cannot be heard, its QoS is incompatible: {' '.join(why.split())}"
        return None


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to stop; the exit code."""
    node: LocalizerNode | None = None
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.init(args=args)
        node = LocalizerNode()
        try:
            if (
                node.get_parameter("autostart").value
                and node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            ):
                node.trigger_activate()
            rclpy.spin(node)
        except Exception:
            # A signal in the middle of a transition shuts the context down under it.
            if rclpy.ok():
                raise
    if node is not None:
        node.close()
        node.destroy_node()
    rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
