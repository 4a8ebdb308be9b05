"""What the localizer publishes: its publishers, and the conversion of estimates into ROS messages."""

from __future__ import annotations

import array
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from geometry_msgs.msg import Pose, PoseWithCovarianceStamped, Quaternion
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time
from sensor_msgs.msg import Image, NavSatFix, NavSatStatus, PointCloud2
from std_msgs.msg import Float64, Header

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.estimation.observation import PoseEstimate
from xview_loc.estimation.overlay import draw_overlay
from xview_loc.estimation.position_filter import FilteredPose
from xview_loc.estimation.shadow import FrameComparison
from xview_loc.geodesy import LocalProjection, distance_m, wrap_angle
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.nodes.optional import cloud_maker
from xview_loc.nodes.shadow_runner import FIGURES
from xview_loc.nodes.transforms import MapTransform, Transforms
from xview_loc.nodes.vehicle_node import PairedFrame
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.synchronisation import GnssFix

UNKNOWN_VARIANCE = 1e6
# ~/hypotheses: the likeliest cells with this share of the probability, at most so many.
HYPOTHESES_SHARE, MAX_HYPOTHESES = 0.95, 2000
# How far poses may be from the datum: the error of the plane's scale is 1.5 m there.
FARTHEST_M = 50_000.0
STATUS = ("latency_ms", "inference_ms", "confidence", "tile_age_s", "fix_offset_m")


class Outputs:
    """The publishers of a configured localizer; ``datum`` is the origin of the map frame, once known."""

    def __init__(
        self, node: LifecycleNode, params: Mapping[str, Any], health: Health, transforms: Transforms | None
    ) -> None:
        """``transforms``: tf, if ``publish_tf`` is not none."""
        self._node = node
        self._params = params
        self._health = health
        self.datum: LocalProjection | None = None
        health.value("datum", "not set yet")
        if math.isfinite(params["datum_lat"]):
            self.set_datum(params["datum_lat"], params["datum_lon"])
        self._tile_key, self._tile_since = "", 0.0
        self._published_at: dict[str, float] = {}
        self._tf: MapTransform | None = None
        if transforms is not None and params["publish_tf"] != "none":
            self._tf = MapTransform(node, params, transforms, health)
        self._publishers: list[Any] = []
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._pose = self._advertise(PoseWithCovarianceStamped, "pose", 10)
        self._fix = self._advertise(NavSatFix, "fix", 10)
        self._heat_map = self._advertise(OccupancyGrid, "heat_map", latched)
        self._make_cloud = cloud_maker()
        self._hypotheses = None if self._make_cloud is None else self._advertise(PointCloud2, "hypotheses", 1)
        self._overlay = self._advertise(Image, "overlay", 1)
        self._status = {name: self._advertise(Float64, f"status/{name}", 10) for name in STATUS}
        self._shadow = {name: self._advertise(Float64, f"shadow/{name}", 10) for name in FIGURES}
        if params["filter"]:
            self._filtered_pose = self._advertise(PoseWithCovarianceStamped, "odometry_filtered_pose", 10)

    def close(self) -> None:
        """Destroy the publishers."""
        for publisher in self._publishers:
            self._node.destroy_lifecycle_publisher(publisher)
        self._publishers = []
        if self._tf is not None:
            self._tf.close()
            self._tf = None

    def set_datum(self, lat: float, lon: float) -> None:
        """Put the origin of the map frame at a position in degrees."""
        self.datum = LocalProjection(lat, lon)
        self._health.value("datum", f"{lat:.9f} {lon:.9f}")

    def from_datum_m(self, lat: float, lon: float) -> float:
        """Return how far a position, degrees, is from the datum."""
        assert self.datum is not None
        return distance_m(self.datum.lat, self.datum.lon, lat, lon)

    def publish_estimate(
        self, paired: PairedFrame, fix: GnssFix, mounting: Mounting, estimate: PoseEstimate
    ) -> None:
        """Publish pose, fix, transform, heat map and overlay; ``fix`` is where the search began."""
        yaw, variance = None, estimate.heading_variance
        lat, lon, covariance = estimate.lat, estimate.lon, estimate.covariance
        if estimate.heading is not None:
            yaw = mounting.heading(estimate.heading)
            lat, lon = mounting.base_from_camera(lat, lon, yaw)
            covariance = mounting.base_covariance(covariance, yaw, variance)
        pose = self._map_pose(paired.frame.stamp_ns, lat, lon, covariance, yaw, variance)
        self._pose.publish(pose)
        base = _header(paired.frame.stamp_ns, self._params["base_frame"])
        self._fix.publish(fix_message(base, lat, lon, covariance, fix))
        if self._params["publish_tf"] == "map_to_base":
            self._send_tf(pose, yaw)
        if self.datum is not None and self._due("heat_map"):
            self._heat_map.publish(heat_map_message(pose.header, estimate.heat_map, self.datum))
            if self._make_cloud and self._hypotheses and self._hypotheses.get_subscription_count():
                points = hypotheses(estimate.heat_map, self.datum)
                self._hypotheses.publish(self._make_cloud(pose.header, points))
        if self._overlay.get_subscription_count() and self._due("overlay"):
            self._overlay.publish(image_message(base, draw_overlay(estimate, fix.lat, fix.lon)))

    def publish_status(self, paired: PairedFrame, estimate: PoseEstimate) -> None:
        """Publish the figures of one frame, and show them in the diagnostics."""
        now = time.monotonic()
        if estimate.tile.key != self._tile_key:
            self._tile_key, self._tile_since = estimate.tile.key, now
        # The receiver's fix, not a position that the filter chose.
        offset = (math.nan, math.nan)
        if paired.fix is not None:
            offset = LocalProjection(paired.fix.lat, paired.fix.lon).forward(estimate.lat, estimate.lon)
        values = {
            "latency_ms": (time.monotonic_ns() - paired.frame.arrived_ns) / 1e6,
            "inference_ms": estimate.timings_ms["encode"] + estimate.timings_ms["match"],
            "confidence": estimate.confidence,
            "tile_age_s": now - self._tile_since,
            "fix_offset_m": math.hypot(*offset),
        }
        for name, value in values.items():
            self._status[name].publish(Float64(data=float(value)))
            self._health.value(name, f"{value:.3f}")

    def publish_filtered(self, pose: FilteredPose) -> None:
        """Publish the filter's pose of base_link, once there is a datum."""
        if self.datum is None or self.from_datum_m(pose.lat, pose.lon) > FARTHEST_M:
            return
        place = pose.stamp_ns, pose.lat, pose.lon, pose.covariance
        message = self._map_pose(*place, pose.heading, pose.heading_variance)
        self._filtered_pose.publish(message)
        if self._params["publish_tf"] == "map_to_odom":
            self._send_tf(message, pose.heading)

    def publish_comparison(self, comparison: FrameComparison) -> None:
        """Publish the figures of a frame that a shadow trial compared."""
        for name, publisher in self._shadow.items():
            publisher.publish(Float64(data=getattr(comparison, name)))

    def _send_tf(self, pose: PoseWithCovarianceStamped, yaw: float | None) -> None:
        if self._tf is None:
            return
        if yaw is None:
            self._health.condition("tf", WARN, "nothing is published: the heading is unknown", for_s=3.0)
        else:
            self._tf.send(pose)

    def _advertise(self, kind: type, topic: str, qos: QoSProfile | int) -> Any:
        publisher: Any = self._node.create_lifecycle_publisher(kind, f"~/{topic}", qos)
        self._publishers.append(publisher)
        return publisher

    def _due(self, topic: str) -> bool:
        """Return True if a topic with a rate of its own is to be published now."""
        now, rate = time.monotonic(), self._params[f"{topic}_rate"]
        if rate <= 0 or now - self._published_at.get(topic, -math.inf) < 1.0 / rate:
            return False
        self._published_at[topic] = now
        return True

    def _map_pose(
        self,
        stamp_ns: int,
        lat: float,
        lon: float,
        covariance: NDArray[np.float64],
        heading: float | None,
        variance: float,
    ) -> PoseWithCovarianceStamped:
        """Convert a pose of base_link with covariance in ENU axes to the map frame."""
        assert self.datum is not None
        convergence = self.datum.convergence(lat, lon)
        cos, sin = math.cos(convergence), math.sin(convergence)
        turn = np.array([[cos, -sin], [sin, cos]])
        return pose_message(
            _header(stamp_ns, self._params["map_frame"]),
            self.datum.forward(lat, lon),
            turn @ covariance @ turn.T,
            None if heading is None else wrap_angle(heading + convergence),
            variance,
        )


def _header(stamp_ns: int, frame: str) -> Header:
    return Header(stamp=Time(nanoseconds=stamp_ns).to_msg(), frame_id=frame)


def quaternion_of(yaw: float) -> Quaternion:
    """Return a rotation about z by ``yaw`` radians."""
    return Quaternion(z=math.sin(yaw / 2.0), w=math.cos(yaw / 2.0))


def pose_message(
    header: Header,
    position: tuple[float, float],
    covariance: NDArray[np.float64],
    yaw: float | None,
    yaw_variance: float,
) -> PoseWithCovarianceStamped:
    """Return a pose in the plane of ``header.frame_id``; unknown axes have the variance 1e6.

    position: (x, y), metres. covariance: (2, 2), m^2. yaw: radians, None if unknown.
    """
    message = PoseWithCovarianceStamped(header=header)
    message.pose.pose.position.x, message.pose.pose.position.y = map(float, position)
    message.pose.pose.orientation = quaternion_of(yaw or 0.0)
    full = np.diag([0.0, 0.0, *[UNKNOWN_VARIANCE] * 4])
    full[:2, :2] = covariance
    if yaw is not None:
        full[5, 5] = yaw_variance
    message.pose.covariance = full.ravel().tolist()
    return message


def fix_message(
    header: Header, lat: float, lon: float, covariance: NDArray[np.float64], source: GnssFix
) -> NavSatFix:
    """Return a fix with known covariance (2, 2), ENU, m^2; altitude and its variance are from ``source``."""
    message = NavSatFix(header=header, latitude=lat, longitude=lon, altitude=source.altitude)
    message.status.status = NavSatStatus.STATUS_FIX
    full = np.zeros((3, 3))
    full[:2, :2] = covariance
    full[2, 2] = UNKNOWN_VARIANCE if source.covariance is None else source.covariance[2, 2]
    message.position_covariance = full.ravel().tolist()
    message.position_covariance_type = NavSatFix.COVARIANCE_TYPE_KNOWN
    return message


def heat_map_message(header: Header, heat_map: HeatMap, datum: LocalProjection) -> OccupancyGrid:
    """Return the heat map as a grid in the datum's plane, 100 at its peak.

    A grid's first cell is its lower left one, so rows are reversed. The grid's origin is that cell's outer
    corner, turned by the angle between the tile's axes and the plane's.
    """
    probability, grid, tile = heat_map.probability, heat_map.grid, heat_map.tile
    height, width = probability.shape
    x, y = datum.forward(*heat_map.to_latlon(height - 0.5, -0.5))
    message = OccupancyGrid(header=header)
    message.info.map_load_time = header.stamp
    message.info.resolution = float(grid.scale * tile.gsd)
    message.info.width, message.info.height = width, height
    origin = Pose()
    origin.position.x, origin.position.y = float(x), float(y)
    origin.orientation = quaternion_of(tile.rotation + datum.convergence(tile.lat, tile.lon))
    message.info.origin = origin
    peak = float(probability.max())
    cells = np.rint(probability[::-1] * (100.0 / peak if peak > 0 else 0.0)).astype(np.int8)
    message.data = array.array("b", cells.tobytes())
    return message


def hypotheses(heat_map: HeatMap, datum: LocalProjection) -> NDArray[np.float32]:
    """Return x, y, z = 0 in the datum's plane and probability (n, 4) of the heat map's likely cells."""
    rows, cols = heat_map.likely(HYPOTHESES_SHARE, MAX_HYPOTHESES)
    x, y = datum.forward(*heat_map.to_latlon(rows, cols))
    return np.stack([x, y, np.zeros(len(rows)), heat_map.probability[rows, cols]], 1).astype(np.float32)


def image_message(header: Header, image: NDArray[np.uint8]) -> Image:
    """Return an RGB picture as rgb8."""
    height, width = image.shape[:2]
    message = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
    message.data = array.array("B", image.tobytes())
    return message
