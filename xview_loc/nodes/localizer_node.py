"""The ``localizer`` node: camera, GNSS and heading in, a pose on the aerial map out.

The executor's thread collects inputs and pairs them by their stamps; one worker thread decodes, localises
and publishes. The newest image wins: what the worker cannot keep up with is dropped and counted.
"""

from __future__ import annotations

import concurrent.futures
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import rclpy.task
import torch
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import OccupancyGrid, Odometry
from numpy.typing import NDArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time
from sensor_msgs.msg import Image, NavSatFix
from std_msgs.msg import Float64, Header
from std_srvs.srv import Trigger

from xview_loc.bags import ros_types
from xview_loc.camera import CameraError
from xview_loc.errors import UserError, reason
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.localizer import (
    LocalizationError,
    Localizer,
    Observation,
    PoseEstimate,
    required_tile_px,
)
from xview_loc.estimation.overlay import draw_overlay
from xview_loc.estimation.position_filter import FilterOptions, PositionFilter
from xview_loc.estimation.shadow import FrameComparison
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.images import ImageError
from xview_loc.maps.base import MapError, NoImageryError
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_checkpoint, shipped_checkpoint
from xview_loc.models.graph import RuntimeUnavailableError
from xview_loc.models.runtimes import choose_backend
from xview_loc.nodes import outputs as messages
from xview_loc.nodes import parameters
from xview_loc.nodes.diagnostics import WARN
from xview_loc.nodes.frame_worker import FrameWorker
from xview_loc.nodes.running import run
from xview_loc.nodes.shadow_runner import FIGURES, ShadowOptions, ShadowRunner
from xview_loc.nodes.vehicle_node import Input, Job, VehicleNode
from xview_loc.vehicle import messages as input_messages
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry as Velocities
from xview_loc.vehicle.synchronisation import GnssFix, RejectedInput

# Odometry with longer gaps says nothing about the motion in between.
MAX_ODOMETRY_GAP_S = 1.0
STATUS = ("latency_ms", "inference_ms", "confidence", "tile_age_s", "fix_offset_m")


class LocalizerNode(VehicleNode):
    """See config/localizer.yaml for the parameters and docs/diagnostics.md for what it reports."""

    table = parameters.LOCALIZER
    ok_message = "localising"

    def __init__(self) -> None:
        self._outputs: list[Any] = []
        self._swap: CheckpointSwap | None = None
        self._filter: PositionFilter | None = None
        self._shadow: ShadowRunner | None = None
        self._naming = False
        super().__init__("localizer")
        self.add_on_set_parameters_callback(self._on_parameters)
        # While one of these waits for its verdict, the node's own group goes on with frames.
        waiting = MutuallyExclusiveCallbackGroup()
        for name, call in (("reload", self._on_reload), ("rollback", self._on_rollback)):
            self.create_service(Trigger, f"~/{name}", call, callback_group=waiting)

    def configure(self) -> None:
        """Open map and model, create the outputs."""
        p = self._params
        if p["torch_threads"]:
            torch.set_num_threads(p["torch_threads"])
        model, path, sha256 = self._load_model()
        if not p["map"]:
            raise parameters.ParameterError("parameter map is empty: name an aerial map")
        self._open_map(required_tile_px(model.spec), model.spec.gsd, snap_m=model.half_extent_m / 2)
        localizer = self._first_localizer(model)
        self._swap = CheckpointSwap(Deployed(localizer, path, sha256), self._build_localizer)
        self._health.value("checkpoint", self._swap.active)
        self._needs_camera_info = model.spec.camera == "pinhole"
        fixed = math.isfinite(p["datum_lat"])
        self._datum = LocalProjection(p["datum_lat"], p["datum_lon"]) if fixed else None
        self._show_datum()
        self._odometry = Velocities(MAX_ODOMETRY_GAP_S)
        self._filter = PositionFilter(self._odometry, self._filter_options()) if p["filter"] else None
        self._tile_key, self._tile_since = "", 0.0
        self._shown_at: dict[str, float] = {}
        self._tf: Any = self._make_tf_buffer() if p["camera_frame"] or p["antenna_frame"] else None
        self._broadcaster: Any = self._make_broadcaster() if p["publish_tf"] else None
        self._advertise()
        self._shadow = ShadowRunner(
            self._swap,
            self._odometry,
            # As tile centres are apart by default: their middles move as much as the places.
            model.half_extent_m / 2,
            self._shadow_options,
            self._health,
            self.get_logger(),
            self._publish_comparison,
            self._promote,
        )
        if p["shadow_checkpoint"]:
            self._shadow.start(Path(p["shadow_checkpoint"]))

    def make_worker(self) -> FrameWorker[Job]:
        """The newest image wins: what the worker cannot keep up with is dropped and counted."""
        return FrameWorker(self._localize_safely)

    def wants_heading(self) -> bool:
        """Unless it is to be searched."""
        return bool(self._params["heading_mode"] != "unknown")

    def needs_fix(self) -> bool:
        """Until the filter knows where the vehicle is."""
        return self._filter is None or not self._filter.started

    def extra_inputs(self) -> list[Input]:
        """Odometry where something asks for it."""
        inputs = super().extra_inputs()
        asked = self._params["filter"] or self.get_parameter("shadow_checkpoint").value
        return [*inputs, Input(Odometry, "odom", self._on_odom)] if asked else inputs

    def _listen_to_odometry(self, for_candidate: bool) -> None:
        """Where a candidate comes or goes while the node is active."""
        asked = self._params["filter"] or for_candidate
        if self._inputs and asked != ("odom" in self._inputs):
            if asked:
                self._listen(Odometry, "odom", self._on_odom)
            else:
                self._unlisten("odom")

    def release(self) -> None:
        """Let go of the outputs and of a checkpoint being loaded."""
        if self._shadow is not None:
            self._shadow.stop()
        if self._swap is not None:
            self._swap.close()
        self._swap = self._shadow = None
        for publisher in self._outputs:
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = []

    def _load_model(self) -> tuple[CrossViewModel, str, str]:
        """The parameters' model with its checkpoint's path and SHA-256, "" for random weights."""
        name = self._params["model"]
        path = self._params["checkpoint"] or shipped_checkpoint(name)
        if path:
            checkpoint = load_checkpoint(path, name or None)
            self._health.clear("untrained")
            return checkpoint.model, str(path), checkpoint.sha256
        model = create_model(name)
        text = f"no checkpoint: {name} runs with random weights, its poses mean nothing"
        self.get_logger().warning(text)
        self._health.condition("untrained", WARN, text)
        return model, "", ""

    def _first_localizer(self, model: CrossViewModel) -> Localizer:
        """Warm; its backend serves the checkpoints after it as well."""
        self._backend = choose_backend(self._params["backend"], self._params["device"])
        try:
            localizer = self._build_localizer(model)
            localizer.warm_up()
        except RuntimeUnavailableError as error:
            if self._params["backend"] != "auto" or self._backend == "torch":
                raise
            self.get_logger().warning(f"torch instead of {self._backend}: {error}")
            self._backend = "torch"
            localizer = self._build_localizer(model)
            localizer.warm_up()
        self._health.value("backend", f"{self._backend} {self._params['precision']}")
        return localizer

    def _build_localizer(self, model: CrossViewModel) -> Localizer:
        """With the open map and the parameters' settings."""
        p = self._params
        assert self._tiles is not None
        prior = {"known": 0.0, "prior": p["heading_prior_deg"], "unknown": None}[p["heading_mode"]]
        radius, floor = p["search_radius_m"], p["covariance_floor_m"]
        return Localizer(
            self._tiles,
            model,
            heading_prior_deg=prior,
            search_radius_m=None if radius < 0 else radius or "covariance",
            min_valid_fraction=p["min_valid_fraction"],
            covariance_floor_m=None if floor < 0 else floor,
            device=p["device"],
            backend=self._backend,
            precision=p["precision"],
        )

    # Another checkpoint on the running vehicle

    def _on_parameters(self, changes: list[Any]) -> SetParametersResult:
        """``checkpoint`` and ``shadow_checkpoint`` may change while the node serves.

        A checkpoint is verified and swapped in behind its back. Nothing is done where one value is refused.
        """
        if self._naming:
            return SetParametersResult(successful=True)
        values = {change.name: change.value for change in changes}
        try:
            parameters.check_choices(self.table, values)
        except parameters.ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._swap is not None and values.get("checkpoint") == "":
            return SetParametersResult(successful=False, reason="name a checkpoint's file")
        if self._swap is not None and "checkpoint" in values:
            self._change(self._swap.load(Path(values["checkpoint"])))
        if self._shadow is not None and "shadow_checkpoint" in values:
            path = values["shadow_checkpoint"]
            self._listen_to_odometry(bool(path))
            if path:
                self._shadow.start(Path(path))
            else:
                self._shadow.stop()
        return SetParametersResult(successful=True)

    def _name(self, **values: str) -> None:
        """Let parameters say what is in use, without their change changing anything."""
        self._naming = True
        try:
            self.set_parameters([Parameter(name, value=value) for name, value in values.items()])
        finally:
            self._naming = False

    async def _on_reload(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Load the file that the parameter ``checkpoint`` names once more."""
        path = self.get_parameter("checkpoint").value
        if self._swap is None or not path:
            response.message = "not configured" if self._swap is None else "parameter checkpoint is empty"
            return response
        return await self._verdict(self._swap.load(Path(path)), response)

    async def _on_rollback(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Go back to the checkpoint that was in use before."""
        if self._swap is None:
            response.message = "not configured"
            return response
        change = self._swap.rollback()
        response = await self._verdict(change, response)
        if response.success:
            self._name(checkpoint=change.result().path)
        return response

    def _promote(self, change: concurrent.futures.Future[Deployed]) -> None:
        """The candidate becomes the checkpoint, and there is no candidate any more."""

        def name() -> None:
            self._name(checkpoint=change.result().path, shadow_checkpoint="")
            self._listen_to_odometry(False)

        def ended(verdict: tuple[bool, str]) -> None:
            # Told by the loading thread; parameters and subscriptions are the executor's.
            if verdict[0] and self.executor is not None:
                self.executor.create_task(name)

        self._change(change, ended)

    async def _verdict(
        self, change: concurrent.futures.Future[Deployed], response: Trigger.Response
    ) -> Trigger.Response:
        # The executor goes on with frames until the loading thread says that it is done.
        done: Any = rclpy.task.Future(executor=self.executor)
        self._change(change, done.set_result)
        response.success, response.message = await done
        return response

    def _change(
        self,
        change: concurrent.futures.Future[Deployed],
        tell: Callable[[tuple[bool, str]], object] = lambda verdict: None,
    ) -> None:
        """Report what becomes of a change of checkpoint, in /diagnostics, the log and to ``tell``."""

        def ended(change: concurrent.futures.Future[Deployed]) -> None:
            if change.cancelled():
                tell((False, "the node is closing"))
                return
            error = change.exception()
            if error is None:
                text = f"in use: {change.result()}"
                self._health.value("checkpoint", change.result())
                self._health.clear("untrained")
                self._health.clear("checkpoint_refused")
                self.get_logger().info(text)
            else:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._health.condition("checkpoint_refused", WARN, text)
                self.get_logger().warning(text)
            tell((error is None, text))

        change.add_done_callback(ended)

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
        self._shadow_pubs = {
            name: self.create_lifecycle_publisher(Float64, f"~/shadow/{name}", 10) for name in FIGURES
        }
        self._outputs = [
            self._pose_pub,
            self._fix_pub,
            self._heat_pub,
            self._overlay_pub,
            *self._status_pubs.values(),
            *self._shadow_pubs.values(),
        ]
        if self._filter is not None:
            self._filtered_pub = self.create_lifecycle_publisher(
                PoseWithCovarianceStamped, "~/odometry_filtered_pose", 10
            )
            self._outputs.append(self._filtered_pub)

    def _on_odom(self, message: Odometry) -> None:
        self._health.count("odom_received")
        try:
            velocity = input_messages.velocity_from_odometry(message)
        except RejectedInput as error:
            self._refuse("odom", error)
            return
        frame, base = message.child_frame_id, self._params["base_frame"]
        if frame and frame != base:
            text = f"odom's velocities are those of {frame}; they are taken as those of {base}"
            if self._health.condition("odom_frame", WARN, text):
                self.get_logger().warning(text)
        else:
            self._health.clear("odom_frame")
        if self._odometry.add(velocity):
            self._health.clear("odom")
        else:
            self._health.count("odom_rejected/stamp_not_newer")

    def _mounting(self) -> Mounting:
        p = self._params
        antenna, camera = (p["antenna_x"], p["antenna_y"]), (p["camera_x"], p["camera_y"])
        yaw = math.radians(p["camera_yaw_deg"])
        if p["antenna_frame"]:
            antenna, _ = self._look_up(p["antenna_frame"])
        if p["camera_frame"]:
            camera, yaw = self._look_up(p["camera_frame"])
        return Mounting(antenna, camera, yaw)

    def _look_up(self, frame: str) -> tuple[tuple[float, float], float]:
        try:
            found = self._tf.lookup_transform(self._params["base_frame"], frame, Time()).transform
        except Exception as error:  # tf2's exceptions share no base that is importable without it
            raise RejectedInput("extrinsics_missing", f"tf: {error}") from None
        q = found.rotation
        # An optical frame (REP-103) looks along its z axis, any other along x.
        if "optical" in frame:
            yaw = math.atan2(2.0 * (q.y * q.z - q.w * q.x), 2.0 * (q.x * q.z + q.w * q.y))
        else:
            yaw = input_messages.yaw_of(q)
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
        image = self._image(job)
        mounting = self._mounting()
        fix, heading = job.fix, job.heading
        if self._filter is not None:
            fix = self._filter.move(job.frame.stamp_ns, fix, heading, mounting)
            if fix is not job.fix:
                self._say_why_not_the_fix(job)
        if fix is None:
            raise RejectedInput("fix_missing", "no usable fix, and the filter does not know the place either")
        if self._datum is None:
            self._datum = LocalProjection(fix.lat, fix.lon)
            self._show_datum()
        self._prefetch(fix)
        observation = self._observation(job, fix, image, mounting)
        assert self._swap is not None
        try:
            # Taken once: a change of checkpoint takes effect between two frames.
            estimate = self._swap.active.localizer.localize(observation)
            if self._filter is not None:
                self._filter.observe(estimate, mounting, heading is not None)
        finally:
            # Also where this image gave no pose: odometry has moved the belief on.
            self._publish_filtered(job)
        try:
            self._answer(job, fix, mounting, estimate)
        finally:
            # Also where the pose is withheld; last, so that none waits for it.
            if self._shadow is not None:
                self._shadow.saw(observation, job.fix, heading, mounting)

    def _image(self, job: Job) -> Any:
        kind = "CompressedImage" if self._params["image_transport"] == "compressed" else "Image"
        try:
            message = ros_types.deserialize(f"sensor_msgs/msg/{kind}", job.frame.image)
        except Exception as error:  # whatever damaged bytes lead to
            raise RejectedInput("image_invalid", f"damaged message: {reason(error)}") from None
        return input_messages.rgb_from_image(message)

    def _observation(self, job: Job, fix: GnssFix, image: Any, mounting: Mounting) -> Observation:
        heading = job.heading
        lat, lon = fix.lat, fix.lon
        looks = None
        if heading is not None:
            # The core localises the camera; the receiver measured the antenna.
            lat, lon = mounting.camera_from_antenna(lat, lon, heading.yaw)
            looks = mounting.looking(heading.yaw)
        return Observation(
            image=image,
            lat=lat,
            lon=lon,
            fix_covariance=None if fix.covariance is None else fix.covariance[:2, :2],
            heading=looks,
            heading_std=0.0 if heading is None else heading.std,
            camera=job.frame.camera,
            stamp_ns=job.frame.stamp_ns,
        )

    def _answer(self, job: Job, fix: GnssFix, mounting: Mounting, estimate: PoseEstimate) -> None:
        if estimate.confidence < self._params["min_confidence"]:
            raise RejectedInput(
                "low_confidence",
                f"confidence {estimate.confidence:.3f} is below {self._params['min_confidence']:g}",
            )
        if estimate.at_search_border:
            self._health.count("frames_at_search_border")
            text = "the likeliest place lies on the edge of the search area; the true one may be outside"
            self._health.condition("search_border", WARN, text, for_s=3.0)
        self._publish(job, fix, mounting, estimate)
        self._health.accepted()
        self._publish_status(job, estimate)

    def _publish(self, job: Job, fix: GnssFix, mounting: Mounting, estimate: PoseEstimate) -> None:
        yaw, variance = None, estimate.heading_variance
        lat, lon, covariance = estimate.lat, estimate.lon, estimate.covariance
        if estimate.heading is not None:
            yaw = mounting.heading(estimate.heading)
            lat, lon = mounting.base_from_camera(lat, lon, yaw)
            covariance = mounting.base_covariance(covariance, yaw, variance)
        pose = self._pose_message(job, lat, lon, covariance, yaw, variance)
        self._pose_pub.publish(pose)
        base = self._header(job, self._params["base_frame"])
        self._fix_pub.publish(messages.fix_message(base, lat, lon, covariance, fix))
        if self._broadcaster is not None and yaw is not None:
            self._broadcast(pose)
        if self._datum is not None and self._due("heat_map"):
            self._heat_pub.publish(messages.heat_map_message(pose.header, estimate.heat_map, self._datum))
        if self._overlay_pub.get_subscription_count() and self._due("overlay"):
            self._overlay_pub.publish(messages.image_message(base, draw_overlay(estimate, fix.lat, fix.lon)))

    def _due(self, output: str) -> bool:
        """Whether it is the turn of an output with a rate of its own."""
        now, rate = time.monotonic(), self._params[f"{output}_rate"]
        if rate <= 0 or now - self._shown_at.get(output, -math.inf) < 1.0 / rate:
            return False
        self._shown_at[output] = now
        return True

    def _header(self, job: Job, frame: str) -> Header:
        return Header(stamp=Time(nanoseconds=job.frame.stamp_ns).to_msg(), frame_id=frame)

    def _pose_message(
        self,
        job: Job,
        lat: float,
        lon: float,
        covariance: NDArray[np.float64],
        heading: float | None,
        variance: float,
    ) -> PoseWithCovarianceStamped:
        """A pose of base_link, its covariance in ENU axes, as one in the map frame."""
        assert self._datum is not None
        convergence = self._datum.convergence(lat, lon)
        cos, sin = math.cos(convergence), math.sin(convergence)
        turn = np.array([[cos, -sin], [sin, cos]])
        return messages.pose_message(
            self._header(job, self._params["map_frame"]),
            self._datum.forward(lat, lon),
            turn @ covariance @ turn.T,
            None if heading is None else wrap_angle(heading + convergence),
            variance,
        )

    # A candidate in the shadow

    def _shadow_options(self) -> ShadowOptions:
        every, frames, policy = (
            self.get_parameter(f"shadow_{name}").value for name in ("every", "frames", "policy")
        )
        return ShadowOptions(every, frames, policy == "promote")

    def _publish_comparison(self, comparison: FrameComparison) -> None:
        for name, publisher in self._shadow_pubs.items():
            publisher.publish(Float64(data=getattr(comparison, name)))

    # The filter over time

    def _filter_options(self) -> FilterOptions:
        p = self._params
        return FilterOptions(p["filter_outlier"], p["filter_drift_m"], p["filter_decorrelation_m"])

    def _say_why_not_the_fix(self, job: Job) -> None:
        if job.fix is None:
            text = "no usable fix: the filter goes on with odometry and heat maps"
        else:
            text = "the fix lies far from where the filter is, which looks at its own place"
        self._health.condition("filter", WARN, text, for_s=3.0)

    def _publish_filtered(self, job: Job) -> None:
        pose = None if self._filter is None else self._filter.pose
        if pose is not None:
            self._filtered_pub.publish(
                self._pose_message(
                    job, pose.lat, pose.lon, pose.covariance, pose.heading, pose.heading_variance
                )
            )

    def _broadcast(self, pose: PoseWithCovarianceStamped) -> None:
        from geometry_msgs.msg import TransformStamped

        message = TransformStamped(header=pose.header, child_frame_id=self._params["base_frame"])
        message.transform.translation.x = pose.pose.pose.position.x
        message.transform.translation.y = pose.pose.pose.position.y
        message.transform.rotation = pose.pose.pose.orientation
        self._broadcaster.sendTransform(message)

    def _publish_status(self, job: Job, estimate: PoseEstimate) -> None:
        now = time.monotonic()
        if estimate.tile.key != self._tile_key:
            self._tile_key, self._tile_since = estimate.tile.key, now
        # From the fix itself; where the filter chose the place, that says nothing.
        offset = (math.nan, math.nan)
        if job.fix is not None:
            offset = LocalProjection(job.fix.lat, job.fix.lon).forward(estimate.lat, estimate.lon)
        values = {
            "latency_ms": (time.monotonic_ns() - job.frame.arrived_ns) / 1e6,
            # The model alone, on the tile where that is new and on the image.
            "inference_ms": estimate.timings_ms["encode"] + estimate.timings_ms["match"],
            "confidence": estimate.confidence,
            "tile_age_s": now - self._tile_since,
            "fix_offset_m": math.hypot(*offset),
        }
        for name, value in values.items():
            self._status_pubs[name].publish(Float64(data=float(value)))
            self._health.value(name, f"{value:.3f}")

    def _show_datum(self) -> None:
        self._health.value(
            "datum",
            "not set yet" if self._datum is None else f"{self._datum.lat:.9f} {self._datum.lon:.9f}",
        )


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to stop; the exit code."""
    return run(LocalizerNode, args)


if __name__ == "__main__":
    sys.exit(main())
