"""ROS 2's common message types without ROS: definitions, construction, serialization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_typestore

# These message types are the same in every later distribution.
STORE = get_typestore(Stores.ROS2_HUMBLE)
NS = 1_000_000_000
COVARIANCE_KNOWN = 3  # sensor_msgs/NavSatFix.COVARIANCE_TYPE_KNOWN
UNMEASURED = -1.0  # sensor_msgs/Imu: the first covariance of what is not measured


@cache
def definition(kind: str) -> str:
    """Return the definition of a message type and its parts, as stored in bags."""
    return STORE.generate_msgdef(kind, ros_version=2)[0]


def message(kind: str, **fields: Any) -> Any:
    """Make a message of a type such as sensor_msgs/msg/Imu."""
    return STORE.types[kind](**fields)


def serialize(kind: str, value: Any) -> bytes:
    """Return the CDR bytes of a message."""
    return bytes(STORE.serialize_cdr(value, kind))


def deserialize(kind: str, data: bytes) -> Any:
    """Return a message from its CDR bytes. Damaged bytes raise any exception."""
    return STORE.deserialize_cdr(data, kind)


def header(stamp_ns: int, frame_id: str) -> Any:
    """Make a std_msgs/Header."""
    seconds, nanoseconds = divmod(stamp_ns, NS)
    stamp = message("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
    return message("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)


def stamp_ns(header: Any) -> int:
    """Return a header's stamp in nanoseconds."""
    return int(header.stamp.sec) * NS + int(header.stamp.nanosec)


def quaternion(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Any:
    """Make the quaternion of turns about x by ``roll``, then y by ``pitch``, then z by ``yaw``, radians."""
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(a / 2.0), math.sin(a / 2.0)) for a in (roll, pitch, yaw))
    return message(
        "geometry_msgs/msg/Quaternion",
        x=sr * cp * cy - cr * sp * sy,
        y=cr * sp * cy + sr * cp * sy,
        z=cr * cp * sy - sr * sp * cy,
        w=cr * cp * cy + sr * sp * sy,
    )


def camera_info(
    head: Any, width: int, height: int, k: Sequence[float], distortion: Sequence[float], model: str
) -> Any:
    """Make a sensor_msgs/CameraInfo of a whole sensor: ``k`` (9) row by row, ``model`` of the distortion."""
    projection = np.zeros((3, 4))
    projection[:, :3] = np.reshape(k, (3, 3))
    region = message(
        "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    return message(
        "sensor_msgs/msg/CameraInfo",
        header=head,
        height=height,
        width=width,
        distortion_model=model,
        d=np.array(distortion, float),
        k=np.array(k, float),
        r=np.eye(3).reshape(9),
        p=projection.reshape(12),
        binning_x=0,
        binning_y=0,
        roi=region,
    )


def imu(head: Any, orientation: Any, covariance: Any) -> Any:
    """Make a sensor_msgs/Imu of an orientation alone; its 3x3 covariance is None if it is not measured."""
    unmeasured = np.array([UNMEASURED, *[0.0] * 8])
    zero = message("geometry_msgs/msg/Vector3", x=0.0, y=0.0, z=0.0)
    return message(
        "sensor_msgs/msg/Imu",
        header=head,
        orientation=orientation,
        orientation_covariance=unmeasured if covariance is None else np.asarray(covariance, float).reshape(9),
        angular_velocity=zero,
        angular_velocity_covariance=unmeasured,
        linear_acceleration=zero,
        linear_acceleration_covariance=unmeasured,
    )


def transforms(
    stamp_ns: int, parent: str, poses: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Any:
    """Make a tf2_msgs/TFMessage of positions (x, y, z) and rotations (x, y, z, w) in ``parent``, by frame."""
    stamped = []
    for child, (position, rotation) in poses.items():
        translation, turn = (
            message(f"geometry_msgs/msg/{kind}", **dict(zip("xyzw", map(float, values), strict=False)))
            for kind, values in (("Vector3", position), ("Quaternion", rotation))
        )
        pose = message("geometry_msgs/msg/Transform", translation=translation, rotation=turn)
        kind, head = "geometry_msgs/msg/TransformStamped", header(stamp_ns, parent)
        stamped.append(message(kind, header=head, child_frame_id=child, transform=pose))
    return message("tf2_msgs/msg/TFMessage", transforms=stamped)


def nav_sat_fix(head: Any, lat: float, lon: float, altitude: float, covariance: Any) -> Any:
    """Make a sensor_msgs/NavSatFix: degrees, metres, 3x3 ENU covariance in m^2 (None if unknown)."""
    known = covariance is not None
    return message(
        "sensor_msgs/msg/NavSatFix",
        header=head,
        status=message("sensor_msgs/msg/NavSatStatus", status=0, service=1),
        latitude=lat,
        longitude=lon,
        altitude=altitude,
        position_covariance=np.asarray(covariance, float).reshape(9) if known else np.zeros(9),
        position_covariance_type=COVARIANCE_KNOWN if known else 0,
    )
