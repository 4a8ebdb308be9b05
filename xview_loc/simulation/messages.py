"""A simulated drive as serialized ROS 2 messages: what a bag holds and what goes over DDS. Needs no ROS."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from xview_loc.simulation.drive import Frame

_STORE = get_typestore(Stores.ROS2_HUMBLE)
_T = _STORE.types
# A bag of a simulated drive starts at this time (14 November 2023), so that it is the same every time; zero
# stands for no time in ROS.
START_NS = 1_700_000_000 * 1_000_000_000
_COVARIANCE_KNOWN = 3  # sensor_msgs/NavSatFix.COVARIANCE_TYPE_KNOWN
CAMERA_FRAME, ANTENNA_FRAME, BASE_FRAME, ODOM_FRAME = "camera", "antenna", "base_link", "odom"
TOPICS = {
    "/image": "sensor_msgs/msg/Image",
    "/fix": "sensor_msgs/msg/NavSatFix",
    "/heading": "geometry_msgs/msg/QuaternionStamped",
    "/odom": "nav_msgs/msg/Odometry",
    "/truth/fix": "sensor_msgs/msg/NavSatFix",
    "/truth/heading": "geometry_msgs/msg/QuaternionStamped",
}


class Message(NamedTuple):
    """One serialized message: topic, type, CDR bytes."""

    topic: str
    kind: str
    data: bytes


def frame_messages(frame: Frame, stamp_ns: int) -> list[Message]:
    """The frame's messages, stamped ``stamp_ns``; the image comes last, when all that belongs to it is out.

    Headings are true-north ENU yaws. ``/odom`` has the wheels' twist alone: its pose is marked as unknown.
    """
    fix, truth = frame.fix, frame.truth
    messages = [
        ("/odom", _odometry(frame, stamp_ns)),
        ("/truth/fix", _fix(stamp_ns, truth.lat, truth.lon, np.zeros((2, 2)), BASE_FRAME)),
        ("/truth/heading", _heading(stamp_ns, truth.heading)),
        ("/heading", _heading(stamp_ns, frame.heading)),
        ("/fix", _fix(stamp_ns, fix.lat, fix.lon, fix.covariance, ANTENNA_FRAME)),
    ]
    if frame.image is not None:
        messages.append(("/image", _image(stamp_ns, frame.image)))
    return [
        Message(topic, TOPICS[topic], bytes(_STORE.serialize_cdr(message, TOPICS[topic])))
        for topic, message in messages
    ]


def write_bag(frames: Iterable[Frame], folder: Path, start_ns: int = START_NS) -> None:
    """Write a drive into a new rosbag2 (MCAP); stamps count from ``start_ns``.

    Raises FileExistsError where ``folder`` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=_STORE) for topic, kind in TOPICS.items()
        }
        for frame in frames:
            stamp = start_ns + frame.stamp_ns
            for message in frame_messages(frame, stamp):
                writer.write(connections[message.topic], stamp, message.data)


def _header(stamp_ns: int, frame_id: str) -> Any:
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    stamp = _T["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
    return _T["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _yaw(yaw: float) -> Any:
    return _T["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=math.sin(yaw / 2), w=math.cos(yaw / 2))


def _heading(stamp_ns: int, yaw: float) -> Any:
    return _T["geometry_msgs/msg/QuaternionStamped"](
        header=_header(stamp_ns, BASE_FRAME), quaternion=_yaw(yaw)
    )


def _fix(stamp_ns: int, lat: float, lon: float, covariance: Any, frame_id: str) -> Any:
    full = np.zeros((3, 3))
    full[:2, :2] = covariance
    # Receivers' heights are about twice as uncertain as their positions.
    full[2, 2] = 4.0 * max(covariance[0, 0], covariance[1, 1])
    return _T["sensor_msgs/msg/NavSatFix"](
        header=_header(stamp_ns, frame_id),
        status=_T["sensor_msgs/msg/NavSatStatus"](status=0, service=1),
        latitude=lat,
        longitude=lon,
        altitude=0.0,
        position_covariance=full.reshape(9),
        position_covariance_type=_COVARIANCE_KNOWN,
    )


def _odometry(frame: Frame, stamp_ns: int) -> Any:
    vector = _T["geometry_msgs/msg/Vector3"]
    pose = _T["geometry_msgs/msg/Pose"](
        position=_T["geometry_msgs/msg/Point"](x=0.0, y=0.0, z=0.0), orientation=_yaw(0.0)
    )
    unknown = np.diag(np.full(6, 1e6)).reshape(36)
    twist = _T["geometry_msgs/msg/Twist"](
        linear=vector(x=frame.speed, y=0.0, z=0.0), angular=vector(x=0.0, y=0.0, z=frame.yaw_rate)
    )
    noise = np.diag([0.05**2, 0.01**2, 1e6, 1e6, 1e6, 0.005**2]).reshape(36)
    return _T["nav_msgs/msg/Odometry"](
        header=_header(stamp_ns, ODOM_FRAME),
        child_frame_id=BASE_FRAME,
        pose=_T["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=unknown),
        twist=_T["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=noise),
    )


def _image(stamp_ns: int, image: Any) -> Any:
    height, width = image.shape[:2]
    return _T["sensor_msgs/msg/Image"](
        header=_header(stamp_ns, CAMERA_FRAME),
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=image.reshape(-1),
    )
