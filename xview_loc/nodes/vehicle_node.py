"""What every node with a vehicle's inputs shares: lifecycle, subscriptions, pairing by stamps, diagnostics.

The executor's thread collects inputs and pairs them by their stamps; a worker thread does the node's job.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, QuaternionStamped
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import (
    HistoryPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu, NavSatFix

from xview_loc.camera import CameraModel
from xview_loc.errors import UserError
from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialMap, MapOptions
from xview_loc.maps.store import TileStore
from xview_loc.nodes import parameters
from xview_loc.nodes.diagnostics import ERROR, WARN, Health
from xview_loc.vehicle import messages as input_messages
from xview_loc.vehicle.messages import RejectedInput
from xview_loc.vehicle.synchronisation import (
    NS,
    RESTART_NS,
    GnssFix,
    HeadingSample,
    History,
    JumpGate,
    SyncError,
    WaitingRoom,
    blend_fix,
    blend_heading,
)

HEADING_TYPES = {"imu": Imu, "quaternion": QuaternionStamped, "pose": PoseStamped}
RESTART_SHOWN_S = 10.0
FIX_JUMP_SHOWN_S = 60.0
SILENT_AFTER_S = 3.0
# The motion that tiles are fetched ahead of is measured over so many metres, within so many seconds.
MOTION_M, MOTION_S = 10.0, 10.0


@dataclass(frozen=True)
class Frame:
    """One image message's CDR bytes and what was known when it arrived.

    rclpy's message would be several copies of it, made in the executor's thread whether it is used or not.
    """

    image: bytes
    stamp_ns: int
    arrived_ns: int
    camera: CameraModel | None


@dataclass(frozen=True)
class Job:
    """A frame, paired by its stamp and ready for the worker."""

    frame: Frame
    fix: GnssFix | None
    heading: HeadingSample | None


class Worker(Protocol):
    """What does the node's job in a thread of its own."""

    def put(self, job: Any) -> bool:
        """Hand over a job; True where one was dropped for it."""
        ...

    def close(self) -> None:
        """End the thread."""
        ...


class VehicleNode(LifecycleNode):
    """A lifecycle node that takes images, fixes, headings and camera_info.

    A node of this kind names its ``table`` of parameters and what it is ``doing``, and says in
    :meth:`configure`, :meth:`make_worker` and :meth:`release` what else it needs. Without
    ``optional_inputs`` the node does its job as well.
    """

    table: tuple[parameters.Parameter, ...]
    doing: str
    optional_inputs: frozenset[str] = frozenset()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        parameters.declare(self, self.table)
        self._health = Health(self.doing)
        self._state = "unconfigured"
        self._params: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}
        self._worker: Worker | None = None
        self._map: AerialMap | None = None
        self._tiles: TileStore | None = None
        self._needs_camera_info = False
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._report)

    # Lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Get everything ready. rclpy swallows exceptions here, so we tell them."""
        try:
            self._configure()
        except Exception as error:
            self._close()
            text = " ".join(str(error).split())
            if not isinstance(error, (UserError, ValueError, OSError)):
                text = f"{type(error).__name__}: {text}"
            self.get_logger().error(f"cannot configure: {text}")
            self._health.condition("not_configured", ERROR, text)
            return TransitionCallbackReturn.FAILURE
        self._health.clear("not_configured")
        _keep_out_of_collections()
        self._state = "inactive"
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to listen."""
        result = super().on_activate(state)
        try:
            self._worker = self.make_worker()
        except OSError as error:
            self._health.condition("not_active", ERROR, str(error))
            self.get_logger().error(f"cannot become active: {error}")
            return TransitionCallbackReturn.FAILURE
        self._health.clear("not_active")
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
        """Let go of everything that configuring made."""
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

    # For each kind of node

    def configure(self) -> None:
        """Open what the node needs beyond its inputs; raise UserError or ValueError where that fails."""
        raise NotImplementedError

    def make_worker(self) -> Worker:
        """The worker of an active node. Raises OSError where it cannot work."""
        raise NotImplementedError

    def wants_heading(self) -> bool:
        """Whether frames wait for a heading, and are refused without one."""
        raise NotImplementedError

    def needs_fix(self) -> bool:
        """Whether a frame without a fix is refused."""
        return True

    def more_inputs(self) -> list[tuple[Any, str, Callable[[Any], None], bool]]:
        """Further subscriptions: type, name, callback, whether it wants CDR bytes."""
        return [(CameraInfo, "camera_info", self._on_camera_info, False)] if self._needs_camera_info else []

    def accept(self, job: Job) -> bool:
        """Whether a paired frame goes to the worker."""
        return True

    def stopped(self) -> None:
        """Called once inputs and worker of an active node are gone."""

    def release(self) -> None:
        """Let go of what :meth:`configure` opened; may be called again, and after a failure."""
        raise NotImplementedError

    def before_report(self) -> None:
        """Called before every report; set values of the diagnostics here."""

    # Set-up

    def _configure(self) -> None:
        p = self._params = parameters.read(self, self.table)
        self._fixes: History[GnssFix] = History("fix", blend_fix, p["max_fix_age_s"])
        self._headings: History[HeadingSample] = History("heading", blend_heading, p["max_heading_age_s"])
        self._jumps = JumpGate(p["fix_max_jump_m"])
        self._waiting: WaitingRoom[Frame] = WaitingRoom(p["max_wait_s"])
        self._camera: CameraModel | None = None
        self._motion_start: GnssFix | None = None
        self._last_image_ns = 0
        self._last_image_at: float | None = None
        self.configure()

    def _open_map(self, size_px: int, gsd: float, snap_m: float | None = None) -> TileStore:
        """Open the map that the parameters name, for tiles of this size.

        ``snap_m``: spacing of their centres where the parameters leave it open; None: a quarter of a tile.
        """
        self._map = open_map(self._params["map"], self._map_options())
        self._tiles = TileStore(self._map, size_px, gsd, self._params["snap_m"] or snap_m)
        return self._tiles

    def _map_options(self) -> MapOptions:
        p = self._params
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

    def _subscribe(self) -> None:
        p = self._params
        image = CompressedImage if p["image_transport"] == "compressed" else Image
        wanted: list[tuple[Any, str, Callable[[Any], None], bool]] = [
            # First: of messages that are here together, they are taken first, so that an image that a fix
            # completes finds them.
            *self.more_inputs(),
            (image, "image", self._on_image, True),
            (NavSatFix, "fix", self._on_fix, False),
        ]
        if self.wants_heading():
            wanted.append((HEADING_TYPES[p["heading_source"]], "heading", self._on_heading, False))
        for kind, name, call, raw in wanted:
            self._listen(kind, name, call, raw)
        self._wait_timer = self.create_timer(0.02, self._release, autostart=False)

    def _listen(self, kind: Any, name: str, call: Callable[[Any], None], raw: bool = False) -> None:
        """Subscribe an input as the parameters say."""
        p = self._params
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=p["qos_depth"],
            reliability=ReliabilityPolicy.RELIABLE
            if p["qos_reliability"] == "reliable"
            else ReliabilityPolicy.BEST_EFFORT,
        )
        self._inputs[name] = self.create_subscription(kind, name, self._guarded(name, call), qos, raw=raw)

    def _unlisten(self, name: str) -> None:
        """End an input's subscription, and with it what was wrong with the input."""
        self.destroy_subscription(self._inputs.pop(name))
        self._health.clear(name)
        self._health.clear(f"{name}_topic")

    def _guarded(self, name: str, call: Callable[[Any], None]) -> Callable[[Any], None]:
        """A callback that no message can end the node with."""

        def guarded(message: Any) -> None:
            try:
                call(message)
            except Exception as error:
                if rclpy.ok():
                    self._refuse(name, RejectedInput("damaged", f"{type(error).__name__}: {error}"))

        return guarded

    def _stop(self) -> None:
        if self._inputs:
            self.destroy_timer(self._wait_timer)
        for name in list(self._inputs):
            self._unlisten(name)
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            self.stopped()

    def _close(self) -> None:
        self._stop()
        self.release()
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
            fix = input_messages.fix_from_navsat(
                message, self._params["fix_min_status"], self._params["fix_max_sigma_m"]
            )
        except RejectedInput as error:
            self._refuse("fix", error)
            return
        self._restart_if(self._fixes.went_back(fix.stamp_ns), "fix")
        if not self._fixes.takes(fix.stamp_ns):
            self._health.count("fix_rejected/stamp_not_newer")
            return
        try:
            jumped_m = self._jumps.admit(fix)
        except SyncError as error:
            self._refuse("fix", RejectedInput("fix_jump", str(error)))
            return
        if jumped_m > 0.0:
            # Between the two places the vehicle has never been.
            self._fixes.clear()
            text = f"fixes jumped {jumped_m:.0f} m and stayed there; they are believed again, right or wrong"
            self._health.condition("fix_jump", WARN, text, for_s=FIX_JUMP_SHOWN_S)
            self.get_logger().warning(text)
        self._fixes.add(fix)
        self._health.clear("fix")
        self._release()

    def _on_heading(self, message: Any) -> None:
        self._health.count("heading_received")
        p = self._params
        try:
            heading = input_messages.heading_from_message(
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
            self._camera = input_messages.camera_from_info(message)
        except RejectedInput as error:
            self._camera = None
            self._refuse("camera_info", error)
            return
        self._health.clear("camera_info")

    def _on_image(self, message: bytes) -> None:
        self._health.count("image_received")
        self._last_image_at = time.monotonic()
        try:
            stamp = input_messages.cdr_stamp_ns(message)
        except RejectedInput as error:
            self._reject(error.reason, str(error))
            return
        self._restart_if(stamp < self._last_image_ns - RESTART_NS, "image")
        if stamp <= self._last_image_ns:
            self._reject("image_stamp_not_newer", "the image's stamp is not after the last one's")
            return
        self._last_image_ns = stamp
        delay = (self.get_clock().now().nanoseconds - stamp) / NS
        if abs(delay) > self._params["max_image_delay_s"]:
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
        self._jumps.clear()
        self._headings.clear()
        self._last_image_ns = 0
        for _ in range(self._waiting.clear()):
            self._health.count("frames_dropped")
        self._health.count("time_restarts")
        text = f"{topic} stamps went back in time; collected inputs were forgotten"
        self.get_logger().warning(text)
        self._health.condition("time_restart", WARN, text, for_s=RESTART_SHOWN_S)

    def _complete(self, stamp_ns: int) -> bool:
        known = not self.wants_heading() or self._headings.reaches(stamp_ns)
        return known and self._fixes.reaches(stamp_ns)

    def _release(self) -> None:
        for frame in self._waiting.ready(self._complete, time.monotonic_ns()):
            self._pair(frame)
        if not len(self._waiting):
            self._wait_timer.cancel()

    def _pair(self, frame: Frame) -> None:
        try:
            fix = self._fix_at(frame.stamp_ns)
            heading = self._at(self._headings, frame.stamp_ns) if self.wants_heading() else None
            if self._needs_camera_info and frame.camera is None:
                raise RejectedInput("camera_info_missing", "no usable camera_info received")
        except RejectedInput as error:
            self._reject(error.reason, str(error))
            return
        job = Job(frame, fix, heading)
        if self._worker is not None and self.accept(job) and self._worker.put(job):
            self._health.count("frames_dropped")

    def _fix_at(self, stamp_ns: int) -> GnssFix | None:
        try:
            return cast(GnssFix, self._at(self._fixes, stamp_ns))
        except RejectedInput:
            if self.needs_fix():
                raise
            return None

    def _at(self, history: History[Any], stamp_ns: int) -> Any:
        try:
            return history.at(stamp_ns)
        except SyncError as error:
            raise RejectedInput(f"{history.name}_{error.reason}", str(error)) from None

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

    # Diagnostics: once a second

    def _report(self) -> None:
        self._check_publishers()
        self.before_report()
        if self._state == "active":
            silent = time.monotonic() - (self._last_image_at or self._active_since)
            if silent > SILENT_AFTER_S:
                self._health.condition("no_image", WARN, f"no image for {silent:.0f} s")
            else:
                self._health.clear("no_image")
        self._health.value("state", self._state)
        status = self._health.report(self.get_fully_qualified_name().lstrip("/"))
        if self._state != "active":
            known = "" if status.message == self.doing else f"{status.message}; "
            status.message = f"{known}not active: {self._state}"
            status.level = max(status.level, WARN)
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)

    def _check_publishers(self) -> None:
        for name, subscription in self._inputs.items():
            key = f"{name}_topic"
            problem = self._hearing_problem(subscription, name in self.optional_inputs)
            if problem is None:
                self._health.clear(key)
            elif self._health.condition(key, WARN, problem):
                self.get_logger().warning(problem)

    def _hearing_problem(self, subscription: Any, optional: bool) -> str | None:
        topic = subscription.topic_name
        own = subscription.msg_type
        type_name = f"{own.__module__.split('.')[0]}/msg/{own.__name__}"
        publishers = self.get_publishers_info_by_topic(topic)
        if not publishers:
            return None if optional else f"{topic} has no publisher"
        for info in publishers:
            who = f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            if info.topic_type != type_name:
                return f"{topic}: {who} publishes {info.topic_type}, {type_name} is expected"
            verdict, why = qos_check_compatible(info.qos_profile, subscription.qos_profile)
            if verdict == QoSCompatibility.ERROR:
                return f"{topic}: {who} cannot be heard, its QoS is incompatible: {' '.join(why.split())}"
        return None


def run(make: Callable[[], VehicleNode], args: list[str] | None = None) -> int:
    """Run a node until it is told to stop; the exit code."""
    node: VehicleNode | None = None
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.init(args=args)
        node = make()
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


def _keep_out_of_collections() -> None:
    """Let Python's garbage collector pass over what is there by now.

    Libraries and weights are 200,000 objects and more: looking at them all stops every thread for 0.1 s.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
