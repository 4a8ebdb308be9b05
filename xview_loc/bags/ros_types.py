"""ROS 2's common message types without ROS: definitions, construction, serialization."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_typestore

# These message types are the same in every later distribution.
STORE = get_typestore(Stores.ROS2_HUMBLE)
NS = 1_000_000_000
COVARIANCE_KNOWN = 3  # sensor_msgs/NavSatFix.COVARIANCE_TYPE_KNOWN


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


def quaternion(yaw: float) -> Any:
    """Make the quaternion of a turn about z by ``yaw`` radians."""
    return message("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=math.sin(yaw / 2.0), w=math.cos(yaw / 2.0))


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
