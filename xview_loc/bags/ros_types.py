"""ROS 2's common message types without ROS: definitions, building, serializing."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_typestore

# The common messages of pairs and drives are the same in every distribution since.
STORE = get_typestore(Stores.ROS2_HUMBLE)
NS = 1_000_000_000
COVARIANCE_KNOWN = 3  # sensor_msgs/NavSatFix.COVARIANCE_TYPE_KNOWN


@cache
def definition(kind: str) -> str:
    """The text of a message type and of all that it is made of, as bags carry it."""
    return STORE.generate_msgdef(kind, ros_version=2)[0]


def message(kind: str, **fields: Any) -> Any:
    """A message of a type such as sensor_msgs/msg/Imu."""
    return STORE.types[kind](**fields)


def serialize(kind: str, value: Any) -> bytes:
    """CDR bytes of a message."""
    return bytes(STORE.serialize_cdr(value, kind))


def deserialize(kind: str, data: bytes) -> Any:
    """A message from its CDR bytes; raises whatever damaged bytes lead to."""
    return STORE.deserialize_cdr(data, kind)


def header(stamp_ns: int, frame_id: str) -> Any:
    """A std_msgs/Header."""
    seconds, nanoseconds = divmod(stamp_ns, NS)
    stamp = message("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
    return message("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)


def stamp_ns(value: Any) -> int:
    """Nanoseconds of a header's stamp."""
    return int(value.stamp.sec) * NS + int(value.stamp.nanosec)


def quaternion(yaw: float) -> Any:
    """A turn about z."""
    return message("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=math.sin(yaw / 2.0), w=math.cos(yaw / 2.0))


def nav_sat_fix(head: Any, lat: float, lon: float, altitude: float, covariance: Any) -> Any:
    """A sensor_msgs/NavSatFix; degrees, metres, 3x3 ENU m^2 or None where it is not known."""
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
