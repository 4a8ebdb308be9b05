"""Roll and pitch of base_link, from an Imu's orientation or from tf. Free of ROS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import wrap_angle
from xview_loc.rig import rotation_matrix
from xview_loc.vehicle.messages import valid_stamp_ns
from xview_loc.vehicle.synchronisation import RejectedInput

# No vehicle on a road leans further, radians: a sensor that says so is mounted otherwise than its frame says.
MOST_TILT = math.radians(30.0)


@dataclass(frozen=True)
class TiltSample:
    """Roll and pitch as in REP-103, radians: positive with the right side and the nose down."""

    stamp_ns: int
    roll: float
    pitch: float


def blend_tilt(a: TiltSample, b: TiltSample, t: float) -> TiltSample:
    """Interpolate from ``a`` (t = 0) to ``b`` (t = 1)."""
    roll, pitch = a.roll + t * wrap_angle(b.roll - a.roll), a.pitch + t * (b.pitch - a.pitch)
    return TiltSample(a.stamp_ns + round(t * (b.stamp_ns - a.stamp_ns)), roll, pitch)


def tilt_of(stamp_ns: int, rotation: NDArray[np.float64]) -> TiltSample:
    """Return the tilt of a rotation matrix (3, 3) from base_link to axes whose z points up.

    Raises RejectedInput ("tilt_implausible") above 30 degrees.
    """
    up = rotation[2]
    leaning = math.atan2(math.hypot(up[0], up[1]), up[2])
    if not leaning <= MOST_TILT:
        text = (
            f"base_link is tilted by {math.degrees(leaning):.0f} degrees, more than a vehicle on a road "
            f"({math.degrees(MOST_TILT):.0f}): check how the sensor is mounted, and that its z axis points up"
        )
        raise RejectedInput("tilt_implausible", text)
    return TiltSample(stamp_ns, math.atan2(up[1], up[2]), math.asin(-up[0]))


def tilt_from_imu(message: Any, mounting: NDArray[np.float64]) -> TiltSample:
    """Return base_link's tilt as an Imu's orientation says; its yaw plays no role.

    mounting: rotation matrix (3, 3) from the Imu's frame to base_link. Raises RejectedInput without an
    orientation, or as :func:`tilt_of`.
    """
    stamp = valid_stamp_ns(message)
    if message.orientation_covariance[0] == -1.0:
        text = "the Imu has no orientation (orientation_covariance[0] is -1): use one that has"
        raise RejectedInput("tilt_unavailable", text)
    q = message.orientation
    norm = math.sqrt(q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w)
    if not abs(norm - 1.0) < 0.1:  # NaN as well
        raise RejectedInput("tilt_not_unit", f"the Imu's quaternion has norm {norm:.3g}, not 1")
    return tilt_of(stamp, rotation_matrix((q.x, q.y, q.z, q.w)) @ mounting.T)
