"""What the nodes with a vehicle's inputs share: lifecycle, subscriptions, pairing by stamps, diagnostics.

The executor's thread collects inputs and pairs them by their stamps; a worker thread processes the frames.
"""

from __future__ import annotations

import gc
import math
import time
from functools import partial
from typing import Any, Protocol

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, NavSatFix

from xview_loc.camera import CameraModel
from xview_loc.errors import shown
from xview_loc.geodesy import LocalProjection
from xview_loc.images import Image
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialMap
from xview_loc.maps.store import TileStore
from xview_loc.models.panoramas import panorama_fault
from xview_loc.models.specs import ModelSpec
from xview_loc.nodes import parameters
from xview_loc.nodes.cameras import Cameras, Frame
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN, Health
from xview_loc.nodes.input_checks import InputChecks
from xview_loc.nodes.inputs import Input, Inputs
from xview_loc.nodes.optional import cv_bridge_decoder
from xview_loc.nodes.permissions import Permissions
from xview_loc.nodes.tilt_input import TiltInput
from xview_loc.nodes.transforms import Transforms
from xview_loc.nodes.transitions import transition
from xview_loc.vehicle import messages as input_messages
from xview_loc.vehicle.course import CourseHeadings
from xview_loc.vehicle.fix_gate import AgreeingFixes
from xview_loc.vehicle.input_types import COURSE
from xview_loc.vehicle.mounting import Mounting, Offset
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.pairing import Paired, Pairing
from xview_loc.vehicle.rig_assembly import CameraImage, RigAssembly, middle_ns
from xview_loc.vehicle.synchronisation import NS, GnssFix, RejectedInput, StampNotNewerError
from xview_loc.vehicle.transforms import Transform

# States in which parameters are in use.
CONFIGURED = ("inactive", "active")
HEADING_CONVENTION = ("heading_offset_deg", "heading_clockwise", "magnetic_declination_deg")
PAIRING_LIMITS = ("max_fix_age_s", "max_heading_age_s", "fix_max_jump_m", "max_wait_s")
RESTART_SHOWN_S = 10.0
FIX_JUMP_SHOWN_S = 60.0
SILENT_AFTER_S = 3.0
# Tiles are fetched ahead of the motion, measured over MOTION_M metres driven within MOTION_S seconds.
MOTION_M, MOTION_S = 10.0, 10.0
# Longer gaps in odometry leave the motion unknown.
MAX_ODOMETRY_GAP_S = 1.0


PairedFrame = Paired[Frame]


class Worker(Protocol):
    """Processes frames in a thread of its own."""

    def put(self, item: Any) -> bool:
        """Hand over an item; return True if one was dropped for it."""
        ...

    def close(self) -> None:
        """End the thread."""
        ...


class VehicleNode(LifecycleNode):
    """Base of the lifecycle nodes that take images, fixes, headings and camera_info.

    table: the node's parameters. ok_message: the diagnostics' message while nothing is wrong.
    """

    table: tuple[parameters.Parameter, ...]
    ok_message: str
    # What the node's model takes.
    _spec: ModelSpec

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # What is wrong with parameters given at the start, until they are set to something else.
        self._faults = parameters.declare(self, self.table)
        self._permissions = Permissions({p.name: self.get_parameter(p.name).value for p in self.table})
        self._health = Health(self.ok_message)
        self._state = "unconfigured"
        self._params: dict[str, Any] = {}
        # By camera, "" for a single one. Replaced when one changes: frames keep those of their time.
        self._calibrations: dict[str, CameraModel] = {}
        # Whether a single camera's driver says that it is not calibrated.
        self._uncalibrated = False
        self._inputs: Inputs | None = None
        self._worker: Worker | None = None
        self._wait_timer: Any = None
        # Cameras of a rig that are not used.
        self._faulty: set[str] = set()
        self._map: AerialMap | None = None
        self._tiles: TileStore | None = None
        self._transforms: Transforms | None = None
        self._decode_other = cv_bridge_decoder(self.get_logger())
        self.add_on_set_parameters_callback(self._on_parameters)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Timers of this clock go on while use_sim_time waits for /clock.
        self.steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._report, clock=self.steady)

    # Lifecycle

    @transition("configure", "not_configured")
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Get everything ready."""
        try:
            self._configure()
        except Exception:
            self.close()
            raise
        _freeze_objects()
        self._state = "inactive"
        return TransitionCallbackReturn.SUCCESS

    @transition("become active", "not_active")
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start to listen."""
        try:
            self._worker = self.make_worker()
            self._subscribe()
        except Exception:
            self._stop()
            raise
        self._state = "active"
        self._active_since = time.monotonic()
        self.get_logger().info("active")
        return super().on_activate(state)

    @transition("become inactive", "not_deactivated")
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening, and finish the frame in work."""
        self._stop()
        self._state = "inactive"
        return super().on_deactivate(state)

    @transition("clean up", "not_cleaned_up")
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything that configuring made."""
        self.close()
        self._state = "unconfigured"
        return TransitionCallbackReturn.SUCCESS

    @transition("shut down", "not_shut_down")
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything; the node ends finalized, also if that fails."""
        self._state = "finalized"
        self.close()
        return TransitionCallbackReturn.SUCCESS

    @transition("recover from an error", "not_recovered")
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything, so that the node can be configured again; if that fails it is finalized."""
        self._state = "finalized"
        self.close()
        self._state = "unconfigured"
        return TransitionCallbackReturn.SUCCESS

    def destroy_node(self) -> None:
        """Release everything, in any state, and destroy the node."""
        self.close()
        super().destroy_node()

    # Hooks of the two nodes

    def configure(self) -> None:
        """Set ``_spec``, and open what the node needs beyond its inputs. Raises UserError or ValueError."""
        raise NotImplementedError

    def make_worker(self) -> Worker:
        """Return the worker of an active node. Raises OSError."""
        raise NotImplementedError

    def wants_heading(self) -> bool:
        """Return True if every frame needs a heading."""
        raise NotImplementedError

    def takes_course(self) -> bool:
        """Return True if odometry and fixes give the heading."""
        return self.wants_heading() and bool(self._params["heading_source"] == COURSE)

    def needs_fix(self) -> bool:
        """Return True if every frame needs a fix."""
        return True

    def needs_heading(self) -> bool:
        """Return True if a frame without a fix needs a heading, where headings are used."""
        return True

    def extra_inputs(self) -> list[Input]:
        """Return inputs besides image, fix and heading."""
        # Elevations are of a panorama, whatever is published for it.
        names = () if self._cameras.elevation_deg else self._cameras.names or ("",)
        required = self._spec.camera == "pinhole"
        calibrations = [
            Input(
                _topic(name, "camera_info"),
                partial(self._on_camera_info, name),
                optional=not (name or required),
            )
            for name in names
        ]
        return [*calibrations, *self._tilt.inputs()]

    def _calibration_missing(self, frame: Frame) -> str:
        """Return why a frame cannot be used without a calibration; "" if it can.

        A pinhole model needs one; for others the image is a panorama, unless a calibration is published.
        """
        if self._cameras.lens_known(frame):
            return ""
        hint = "if the camera takes panoramas, set panorama_elevation_deg"
        if self._spec.camera == "pinhole":
            return f"no usable camera_info received; {hint}"
        if self._uncalibrated or not self.count_publishers(self.resolve_topic_name("camera_info")):
            return ""
        return f"camera_info has a publisher, but no usable message came; {hint}"

    def hand_over(self, paired: PairedFrame) -> bool:
        """Give a paired frame to the worker; return True if one was dropped for it."""
        return self._worker is not None and self._worker.put(paired)

    def stopped(self) -> None:
        """Called after the inputs and the worker of an active node ended."""

    def release(self) -> None:
        """Release what :meth:`configure` opened; may be called again, and after a failure."""

    def before_report(self) -> None:
        """Set values of the diagnostics; called before every report."""

    def check_parameters(self, values: dict[str, Any]) -> None:
        """Raise ParameterError if these values cannot be set now; types and ranges are right."""
        parameters.check_choices(self.table, values)
        if self._state in CONFIGURED:
            parameters.check_live(self.table, values, self._params)
        self._permissions.check(values)

    def apply_parameters(self, values: dict[str, Any]) -> None:
        """Put changed parameters of a configured node, in ``_params`` already, to use."""
        self._pairing.set_limits(**{name: self._params[name] for name in PAIRING_LIMITS})
        self._assembly.tolerance_s = self._params["rig_tolerance_s"]
        if any(name in values for name in HEADING_CONVENTION):
            # Headings so far were read otherwise.
            self._checks.restart()

    # Set-up

    def _on_parameters(self, changes: list[Any]) -> SetParametersResult:
        """Refuse all of the changes, or apply them: nothing else can refuse them afterwards."""
        values = {change.name: change.value for change in changes}
        try:
            self.check_parameters(values)
        except parameters.ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        for name in values:
            self._faults.pop(name, None)
        if self._state in CONFIGURED:
            self._params.update((name, value) for name, value in values.items() if name in self._params)
            self.apply_parameters(values)
        return SetParametersResult(successful=True)

    def _configure(self) -> None:
        if self._faults:
            raise parameters.ParameterError("; ".join(self._faults.values()))
        p = self._params = parameters.read(self, self.table)
        self._pairing: Pairing[Frame] = Pairing(
            **{name: p[name] for name in PAIRING_LIMITS},
            use_heading=self.wants_heading(),
            use_tilt=p["tilt_source"] != "none",
            on_restart=self._on_restart,
        )
        self._odometry = Odometry(MAX_ODOMETRY_GAP_S)
        self._velocities = input_messages.VelocityReader()
        # The heading, or what a measured one is compared with.
        self._course = CourseHeadings(self._odometry) if self.wants_heading() else None
        self._agreeing = AgreeingFixes()
        self._checks = InputChecks(self._odometry, self._course, self._health, self.get_logger())
        self._cameras = self._named_cameras()
        if unused := self._cameras.unused:
            text = f"cameras does not name {', '.join(unused)}, which rig_file describes: not used"
            self.get_logger().warning(shown(text))
        self._assembly = RigAssembly(self._cameras.names, p["rig_tolerance_s"])
        for name in self._calibrations:
            self._health.clear(_topic(name, "rectified"))
        self._calibrations, self._uncalibrated = {}, False
        self._motion_start: GnssFix | None = None
        self._last_image_at: float | None = None
        self._last_odometry_at = 0.0
        for name in ("antenna_frame", "camera_frame", "heading_frame"):
            if p[name]:
                self.listen_to_tf(f"{name} is set")
        for name in self._cameras.unplaced:
            self.listen_to_tf(f"rig_file does not say where camera {name} is")
        self._tilt = TiltInput(p, self._pairing, self._health, self.listen_to_tf, self._refuse)
        self.configure()

    def _named_cameras(self) -> Cameras:
        """Return the cameras of the parameters. Raises ParameterError, UserError."""
        cameras = Cameras(self._params)
        topics: dict[str, str] = {}
        for name in cameras.names:
            topic = self.resolve_topic_name(_topic(name, "image"))
            if topic in topics:
                raise parameters.ParameterError(f"cameras {topics[topic]} and {name} have one topic: {topic}")
            topics[topic] = name
        return cameras

    def listen_to_tf(self, why: str) -> Transforms:
        """Return tf, listened to from now on; for the executor's thread. Raises ParameterError.

        why: what needs it.
        """
        if self._transforms is None:
            self._transforms = Transforms(self, self._params["base_frame"], self._health, why)
        return self._transforms

    def _mounting(self) -> Mounting:
        """Return where antenna and camera are now. Raises RejectedInput if tf does not know."""
        camera = self._cameras.pose("", self._transforms)
        # An optical frame looks along its z axis.
        return Mounting(self._antenna(), _across(camera), camera.direction(2))

    def _antenna(self) -> Offset:
        """Return where the antenna is now. Raises RejectedInput if tf does not know."""
        p = self._params
        if self._transforms is not None and p["antenna_frame"]:
            return _across(self._transforms.pose(p["antenna_frame"]))
        return p["antenna_x"], p["antenna_y"]

    def _open_map(self, size_px: int, gsd: float, snap_m: float) -> TileStore:
        """Open the parameters' map for tiles of this size; ``snap_m``: spacing if the parameter is 0."""
        p = self._params
        self._map = open_map(p["map"], parameters.map_options(p))
        if shift := self._map.info().shift:
            self.get_logger().info(f"the map shows the ground too far {shift}: that is taken out")
        self._health.value("map_shift", shift or "not measured")
        self._tiles = TileStore(self._map, size_px, gsd, p["snap_m"] or snap_m)
        return self._tiles

    def _subscribe(self) -> None:
        p = self._params
        reliability = ReliabilityPolicy[p["qos_reliability"].upper()]
        qos = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=p["qos_depth"], reliability=reliability)
        # Runs while images wait. Humble and Iron cannot create a timer that is not running.
        self._wait_timer = self.create_timer(0.02, self._release, clock=self.steady)
        self._wait_timer.cancel()
        self._inputs = Inputs(self, self.steady, self._health, qos, self._refuse)
        # First the others: of messages that arrive together these are taken first, so that an image that a
        # fix completes finds them.
        for wanted in self.extra_inputs():
            self._inputs.listen(wanted)
        self._assembly = RigAssembly(self._cameras.names, p["rig_tolerance_s"])
        for name in self._cameras.names or ("",):
            topic = _topic(name, "image")
            take, lose = partial(self._on_image, name), partial(self._checks.lose_images, camera=name)
            # Remapping the topics of all cameras would be tedious.
            compressed = f"{topic}/compressed" if name else ""
            image = Input(topic, take, p["image_transport"], raw=True, lost=lose, or_topic=compressed)
            self._inputs.listen(image)
        self._inputs.listen(Input("fix", self._on_fix))
        if self._course is not None and self.takes_course():
            self._show_course_unknown(self._course.doubt)
        elif self.wants_heading():
            self._inputs.listen(Input("heading", self._on_heading, p["heading_source"]))

    def _stop(self) -> None:
        if self._wait_timer is not None:
            self.destroy_timer(self._wait_timer)
            self._wait_timer = None
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            self._checks.restart()
            if self._course is not None:
                self._course.restart()
            self._health.clear("course_unknown")
            self.stopped()

    def close(self) -> None:
        """End the threads and release everything, in any state."""
        self._stop()
        self.release()
        if self._transforms is not None:
            self._transforms.close()
            self._transforms = None
        if self._tiles is not None:
            self._tiles.close()
            self._tiles = None
        if self._map is not None:
            self._map.close()
            self._map = None

    # Inputs: the executor's thread

    def _on_fix(self, message: NavSatFix) -> None:
        p = self._params
        fix = input_messages.fix_from_navsat(message, p["fix_min_status"], p["fix_max_sigma_m"])
        jumped_m = self._pairing.add_fix(fix)
        if jumped_m > 0.0:
            text = f"fixes jumped {jumped_m:.0f} m and stayed there; they are believed again, right or wrong"
            self._health.condition("fix_jump", WARN, text, for_s=FIX_JUMP_SHOWN_S)
            self.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        self._health.clear("fix")
        self._agreeing.add(fix)
        self._checks.add_fix(fix)
        self._release()
        if self._course is not None:
            self._course.add_fix(fix, self._antenna())

    def _on_heading(self, message: Any) -> None:
        now = self.get_clock().now().nanoseconds
        heading = input_messages.heading_from_message(message, self._heading_convention(), now)
        self._pairing.add_heading(heading)
        self._checks.add_heading(heading)
        self._health.clear("heading")
        if self._pairing.waiting:
            self._release()

    def _heading_convention(self) -> input_messages.HeadingConvention:
        """Return how headings are counted. Raises RejectedInput if tf does not know the sensor's frame."""
        p = self._params
        offset = math.radians(p["heading_offset_deg"])
        if self._transforms is not None and p["heading_frame"]:
            # The sensor's x axis looks this far left of the vehicle's.
            offset -= self._transforms.pose(p["heading_frame"]).yaw
        return input_messages.HeadingConvention(
            p["heading_clockwise"],
            offset,
            math.radians(p["magnetic_declination_deg"]),
            math.radians(p["heading_std_deg"]),
        )

    def _read_velocity(self, message: Any) -> VelocitySample | None:
        """Return what odometry says, and keep it; None if that is nothing yet. Raises RejectedInput."""
        velocity = self._velocities.read(message)
        if velocity is not None and not self._odometry.add(velocity):
            raise StampNotNewerError("odom")
        self._health.clear("odom")
        self._last_odometry_at = time.monotonic()
        if velocity is not None and self._course is not None:
            self._reckon_heading(self._course, velocity)
        return velocity

    def _reckon_heading(self, course: CourseHeadings, velocity: VelocitySample) -> None:
        heading = course.add_velocity(velocity)
        if not self.takes_course():
            return
        if heading is None:
            self._show_course_unknown(course.doubt)
            return
        self._health.clear("course_unknown")
        self._pairing.add_heading(heading)
        if self._pairing.waiting:
            self._release()

    def _show_course_unknown(self, doubt: str) -> None:
        text = f"the heading is not known: {doubt}"
        if self._health.condition("course_unknown", WARN, text):
            self.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)

    def _on_camera_info(self, name: str, message: CameraInfo) -> None:
        others = {other: camera for other, camera in self._calibrations.items() if other != name}
        topic, key = self.resolve_topic_name(_topic(name, "image")), _topic(name, "rectified")
        # Zeros say that a camera is not calibrated: drivers of panorama cameras send them.
        self._uncalibrated = not name and self._spec.camera == "panorama" and not any(message.k)
        if self._uncalibrated:
            self._calibrations = {}
            for condition in ("camera_info", key):
                self._health.clear(condition)
            return
        try:
            camera = input_messages.camera_from_info(message, self._params["rectified"])
        except RejectedInput:
            self._calibrations = others
            self._health.clear(key)
            raise
        self._calibrations = {**others, name: camera}
        self._cameras.frames[name] = message.header.frame_id
        self._health.clear(_topic(name, "camera_info"))
        if camera.distorts and "image_rect" in topic:
            text = f"images on {topic} are corrected by the distortion in camera_info; if they are rectified "
            text += "already, set rectified"
            if self._health.condition(key, WARN, text):
                self.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        else:
            self._health.clear(key)

    def _on_image(self, name: str, message: bytes) -> None:
        self._last_image_at = time.monotonic()
        now = time.monotonic_ns()
        assert self._inputs is not None  # they call this
        topic = _topic(name, "image")
        try:
            stamp = input_messages.cdr_stamp_ns(message)
            image = CameraImage(name, stamp, self._inputs.type_of(topic), message, now)
            if name:
                for images in self._assembly.add(image):
                    self._add_set(images)
            else:
                self._pairing.add_frame(Frame(stamp, now, (image,), self._calibrations), now)
        except RejectedInput as error:
            if name:
                raise
            self._reject(error.reason, str(error))
            return
        self._health.clear(topic)
        self._checks.add_image(stamp, message, name)
        delay = (self.get_clock().now().nanoseconds - stamp) / NS
        if abs(delay) > self._params["max_image_delay_s"]:
            text = f"image stamps differ {delay:.1f} s from the node's clock (clocks, or use_sim_time)"
            self._health.condition("image_delay", WARN, text, for_s=3.0)
        self._wait_timer.reset()
        self._release()

    def _add_set(self, images: tuple[CameraImage, ...]) -> None:
        """Make a frame of images of a rig, without those of cameras that hang."""
        for name in self._assembly.missing(images):
            self._health.count(f"images_missing/{name}")
        good = tuple(image for image in images if not self._checks.image_fault(image.name))
        arrived_ns = max(image.arrived_ns for image in images)
        try:
            if not good:
                raise RejectedInput("image_still", self._checks.image_fault(images[0].name))
            frame = Frame(middle_ns(good), arrived_ns, good, self._calibrations)
            self._pairing.add_frame(frame, arrived_ns)
        except RejectedInput as error:
            self._reject(error.reason, str(error))

    def _refuse(self, topic: str, error: RejectedInput) -> None:
        if isinstance(error, StampNotNewerError):
            self._health.count(f"{topic}_rejected/stamp_not_newer")
            return
        self._health.count(f"{topic}_rejected/{error.reason}")
        if self._health.condition(topic, WARN, f"last {topic} refused: {error}"):
            self.get_logger().warning(
                shown(f"{topic} refused: {error}"), throttle_duration_sec=LOG_INTERVAL_S
            )

    def _reject(self, reason: str, text: str) -> None:
        if self._health.rejected(reason, text):
            self.get_logger().warning(
                shown(f"frame rejected: {reason}: {text}"), throttle_duration_sec=LOG_INTERVAL_S
            )

    def _on_restart(self, topic: str, dropped: int) -> None:
        for _ in range(dropped):
            self._health.count("frames_dropped")
        self._health.count("time_restarts")
        self._velocities = input_messages.VelocityReader()
        self._agreeing.clear()
        self._checks.restart()
        if self._course is not None:
            self._course.restart()
        text = f"{topic} stamps went back in time; collected inputs were discarded"
        self.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        self._health.condition("time_restart", WARN, text, for_s=RESTART_SHOWN_S)

    def _show_fault(self, key: str, fault: str) -> None:
        if fault:
            self._health.condition(key, WARN, fault)
        else:
            self._health.clear(key)

    def _check_panorama(self, frame: Frame, image: Image | None) -> None:
        """Show if a single camera's image is taken for a panorama, but does not look like one."""
        fault = ""
        if image is not None and not self._cameras.lens_known(frame):
            fault = panorama_fault(image, self._spec)
        self._show_fault("no_panorama", fault)

    def _release(self) -> None:
        for images in self._assembly.overdue(time.monotonic_ns()):
            self._add_set(images)
        required = {"fix_required": self.needs_fix(), "heading_required": self.needs_heading()}
        for result in self._pairing.ready(time.monotonic_ns(), **required):
            if isinstance(result, RejectedInput):
                self._reject(result.reason, str(result))
                continue
            self._tilt.show_missing(result)
            if problem := self._calibration_missing(result.frame):
                self._reject("camera_info_missing", problem)
            elif fault := self._checks.image_fault(""):
                self._reject("image_still", fault)
            elif result.heading and self._params["heading_reject"] and self._checks.heading_fault:
                self._reject("heading_disagrees", self._checks.heading_fault)
            elif self.hand_over(result):
                self._health.count("frames_dropped")
        if not (self._pairing.waiting or self._assembly.waiting):
            self._wait_timer.cancel()

    def _prefetch(self, fix: GnssFix) -> None:
        """Load tiles ahead of the motion, measured over a distance beyond the fixes' noise."""
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

    def _show_cameras(self) -> None:
        """Show which cameras of a rig are not used, and why."""
        faults: dict[str, str] = {}
        if self._state == "active":
            faults = {**self._cameras.problems, **self._assembly.faults()}
        for name in self._faulty - faults.keys():
            self._health.clear(f"camera/{name}")
        for name, fault in faults.items():
            text = f"{fault}; what it would show is hidden"
            self._health.condition(f"camera/{name}", WARN, text)
            # Figures change all the time.
            if name not in self._faulty:
                self.get_logger().warning(shown(f"camera {name}: {text}"))
        self._faulty = set(faults)

    def _report(self) -> None:
        if self._inputs is not None:
            self._inputs.check_publishers()
        self.before_report()
        self._show_cameras()
        if self.get_clock().now().nanoseconds == 0:
            self._health.condition("no_clock", WARN, "use_sim_time is set, but /clock is silent")
        else:
            self._health.clear("no_clock")
        if self._state == "active" and self.takes_course():
            silent = time.monotonic() - max(self._last_odometry_at, self._active_since)
            if silent > SILENT_AFTER_S:
                self._show_course_unknown(f"no odometry for {silent:.0f} s")
        if self._state == "active":
            silent = time.monotonic() - (self._last_image_at or self._active_since)
            if silent > SILENT_AFTER_S:
                self._health.condition("no_image", WARN, f"no image for {silent:.0f} s")
            else:
                self._health.clear("no_image")
        self._health.value("state", self._state)
        status = self._health.report(self.get_fully_qualified_name().lstrip("/"))
        if self._state != "active":
            known = "" if status.message == self.ok_message else f"{status.message}; "
            status.message = f"{known}not active: {self._state}"
            status.level = max(status.level, WARN)
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)


def _across(pose: Transform) -> tuple[float, float]:
    """Return where a frame is, (forward, left), metres."""
    forward, left, _ = pose.translation.tolist()
    return forward, left


def _topic(camera: str, name: str) -> str:
    """Return the topic of a camera's input; ``camera``: "" for a single one."""
    return f"{camera}/{name}" if camera else name


def _freeze_objects() -> None:
    """Exempt all objects made so far from garbage collection.

    Libraries and weights are 200,000 objects and more: examining them stops every thread for 0.1 s.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
