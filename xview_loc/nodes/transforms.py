"""tf of a node: frames looked up in base_link, and the transform of the map published."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from geometry_msgs.msg import PoseWithCovarianceStamped, Quaternion, TransformStamped, Vector3
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time

from xview_loc.bags.ros_types import stamp_ns
from xview_loc.errors import shown
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN, Health
from xview_loc.nodes.parameters import ParameterError
from xview_loc.vehicle.messages import yaw_of
from xview_loc.vehicle.mounted_cameras import optical_pose
from xview_loc.vehicle.synchronisation import NS, RejectedInput
from xview_loc.vehicle.transforms import Transform, TransformBuffer, TransformError

SHOWN_S = 10.0


class Transforms:
    """Listens to /tf and /tf_static until it is closed.

    Raises ParameterError if tf2_msgs is missing; ``why`` says what needs it.
    """

    def __init__(self, node: LifecycleNode, base_frame: str, health: Health, why: str) -> None:
        self.buffer = TransformBuffer()
        self._node, self._base, self._health = node, base_frame, health
        # Called after every message of /tf.
        self.on_new: list[Callable[[], None]] = []
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        kind = tf_message_type(why)
        self._subscriptions = [
            node.create_subscription(kind, "/tf", lambda message: self._add(message, False), 100),
            node.create_subscription(kind, "/tf_static", lambda message: self._add(message, True), latched),
        ]

    def close(self) -> None:
        """Stop listening."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def pose(self, frame: str) -> Transform:
        """Return the pose of a frame in base_link. Raises RejectedInput ("extrinsics_missing")."""
        try:
            return self.buffer.lookup(self._base, frame)
        except TransformError as error:
            raise RejectedInput("extrinsics_missing", f"tf from {self._base} to {frame}: {error}") from None

    def optical_pose(self, frames: list[str]) -> Transform:
        """Return the pose of a camera's optical frame in base_link, see :func:`optical_pose`.

        Raises RejectedInput ("extrinsics_missing") if tf knows none of ``frames``.
        """
        try:
            return optical_pose(partial(self.buffer.lookup, self._base), frames)
        except TransformError as error:
            text = f"tf from {self._base} to {' or '.join(frames)}: {error}"
            raise RejectedInput("extrinsics_missing", text) from None

    def _add(self, message: Any, static: bool) -> None:
        for one in message.transforms:
            frames = one.header.frame_id, one.child_frame_id
            try:
                pose = Transform.of(one.transform)
                other = self.buffer.add(stamp_ns(one.header), *frames, pose, static)
            except TransformError as error:
                self._health.count("tf_rejected")
                text = f"{frames[0]} -> {frames[1]}: {error}"
                self._health.condition("tf_rejected", WARN, text, SHOWN_S)
                continue
            if other:
                text = f"{frames[1]} has two parents, {other} and {frames[0]}: the tree of frames is broken"
                if self._health.condition("tf_parents", WARN, text, SHOWN_S):
                    self._node.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        for call in self.on_new:
            call()


class MapTransform:
    """Publishes where the vehicle is in the map on /tf, as ``publish_tf`` says.

    map_to_base: base_link's pose as it is. map_to_odom: the transform in the plane that puts base_link's x, y
    and yaw where the pose says; z, roll and pitch stay those of the odometry.
    """

    def __init__(
        self, node: LifecycleNode, params: Mapping[str, Any], transforms: Transforms, health: Health
    ) -> None:
        self._params, self._health, self._buffer = params, health, transforms.buffer
        self._lock = threading.Lock()
        # The pose that waits until tf reaches its stamp, and what is missing.
        self._waiting: PoseWithCovarianceStamped | None = None
        self._missing = ""
        self._type = tf_message_type("publish_tf is set")
        self._node = node
        self._publisher: Any = node.create_lifecycle_publisher(self._type, "/tf", 100)
        transforms.on_new.append(self._release)

    def close(self) -> None:
        """Stop publishing."""
        self._node.destroy_lifecycle_publisher(self._publisher)

    def send(self, pose: PoseWithCovarianceStamped) -> None:
        """Publish a pose with a known yaw, or let it wait for odometry instead of the last one."""
        if self._params["publish_tf"] == "map_to_base":
            self._publish(pose, _planar(pose), self._params["base_frame"], stamp_ns(pose.header))
            return
        with self._lock:
            late, self._waiting = self._waiting, pose
        if late is not None:
            self._health.condition("tf", WARN, self._missing)
        self._release()

    def _release(self) -> None:
        odom, base = self._params["odom_frame"], self._params["base_frame"]
        with self._lock:
            pose = self._waiting
            if pose is None:
                return
            stamp = stamp_ns(pose.header)
            try:
                moved = self._buffer.lookup(odom, base, stamp)
            except TransformError as error:
                self._missing = f"{self._params['map_frame']} -> {odom} is not published: {error}"
                return
            self._waiting = None
        flat = Transform.planar(float(moved.translation[0]), float(moved.translation[1]), moved.yaw)
        until = stamp + round(self._params["transform_tolerance"] * NS)
        self._publish(pose, _planar(pose) @ flat.inverse(), odom, until)
        self._health.clear("tf")

    def _publish(self, pose: PoseWithCovarianceStamped, transform: Transform, child: str, stamp: int) -> None:
        message = TransformStamped(child_frame_id=child)
        message.header.frame_id = pose.header.frame_id
        message.header.stamp = Time(nanoseconds=stamp).to_msg()
        t, q = transform.translation.tolist(), transform.rotation.tolist()
        message.transform.translation = Vector3(x=t[0], y=t[1], z=t[2])
        message.transform.rotation = Quaternion(x=q[0], y=q[1], z=q[2], w=q[3])
        self._publisher.publish(self._type(transforms=[message]))


def tf_message_type(why: str) -> Any:
    """Return tf2_msgs' TFMessage; ``why`` says what needs it. Raises ParameterError without it."""
    try:
        return import_module("tf2_msgs.msg").TFMessage
    except ImportError:
        raise ParameterError(f"{why}, and tf2_msgs cannot be imported") from None


def _planar(message: PoseWithCovarianceStamped) -> Transform:
    pose = message.pose.pose
    return Transform.planar(pose.position.x, pose.position.y, yaw_of(pose.orientation))
