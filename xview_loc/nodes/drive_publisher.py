"""Publish a simulated drive live: camera, GNSS, heading, wheel odometry, and the truth."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile

from xview_loc.rig import Rig
from xview_loc.simulation.drives import Frame, Wheels
from xview_loc.simulation.messages import frame_messages, static_message, topics

_POLL_S = 0.05
# Discovery matches subscriptions one after the other: wait this long after the last one.
_SETTLE_S = 1.0
_LAST_MESSAGES_S = 0.5


def publish_drive(frames: Iterable[Frame], rate_hz: float, speed: float = 1.0, rig: Rig | None = None) -> int:
    """Publish frames at ``rate_hz`` times ``speed``; return how many were published.

    Wait for a subscriber to an image, and until no further one has come for a second. Stamps are the times
    of publishing if ``speed`` is 1, else the vehicle's time, counted from the first frame. A frame rendered
    late delays those after it, and its odometry is as much slower. ``rig`` is that of the drive; /tf_static
    needs tf2_msgs. Ends early when ROS shuts down.
    """
    rclpy.init()
    node = Node("drive")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    count = first_ns = last_ns = 0
    try:
        outputs = {}
        for topic, kind in topics(rig).items():
            package, _, name = kind.split("/")
            try:
                message_type = getattr(import_module(f"{package}.msg"), name)
            except ImportError:
                if topic != "/tf_static":
                    raise
                node.get_logger().warning(
                    "tf2_msgs cannot be imported: the cameras' extrinsics are not published on /tf_static"
                )
                continue
            # Relative names, so that namespaces apply; tf has one tree for all.
            latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            if topic == "/tf_static":
                outputs[topic] = node.create_publisher(message_type, topic, latched)
            else:
                outputs[topic] = node.create_publisher(message_type, topic[1:], 10)
        if rig is not None and "/tf_static" in outputs:
            outputs["/tf_static"].publish(static_message(rig, node.get_clock().now().nanoseconds))
        images = [output for topic, output in outputs.items() if "/image" in topic]
        listeners: list[int] = []
        due = 0.0
        while not any(i.get_subscription_count() for i in images) or time.monotonic() < due:
            executor.spin_once(_POLL_S)
            now = [output.get_subscription_count() for output in outputs.values()]
            if now != listeners:
                listeners, due = now, time.monotonic() + _SETTLE_S
        for frame in frames:
            due = max(due, time.monotonic())
            stamp_ns = node.get_clock().now().nanoseconds + round(1e9 * (due - time.monotonic()))
            if speed != 1.0:
                first_ns = first_ns or stamp_ns - frame.stamp_ns
                stamp_ns = first_ns + frame.stamp_ns
            elif last_ns:
                # A late frame's way took longer: odometry must say so.
                share = min(1.0, 1e9 / rate_hz / (stamp_ns - last_ns))
                wheels = [
                    Wheels(
                        frame.stamp_ns - round((frame.stamp_ns - one.stamp_ns) / share),
                        share * one.speed,
                        share * one.yaw_rate,
                    )
                    for one in frame.wheels
                ]
                frame = replace(frame, wheels=tuple(wheels))
            last_ns = stamp_ns
            for topic, at_ns, data in frame_messages(frame, stamp_ns, rig):
                # Odometry comes between frames.
                while (wait := due - (stamp_ns - at_ns) / 1e9 / speed - time.monotonic()) > 0:
                    executor.spin_once(wait)
                outputs[topic].publish(data)
            due += 1.0 / (rate_hz * speed)
            count += 1
        # Messages just published are lost if the process ends at once.
        executor.spin_once(_LAST_MESSAGES_S)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return count
