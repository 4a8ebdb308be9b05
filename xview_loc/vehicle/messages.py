"""Converts and checks a vehicle's messages, those of rclpy and those read from bags. Free of ROS."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.bags import ros_types
from xview_loc.camera import CameraModel
from xview_loc.errors import reason
from xview_loc.geodesy import true_yaw, wrap_angle, yaw_from_azimuth
from xview_loc.images import ENCODINGS, ImageError, check_content, decode_compressed, decode_image
from xview_loc.vehicle.odometry import VelocitySample
from xview_loc.vehicle.synchronisation import (
    NS,
    RESTART_NS,
    TOP_SPEED,
    TOP_YAW_RATE,
    GnssFix,
    HeadingSample,
    RejectedInput,
    StampNotNewerError,
)

# Standard deviation of an unknown direction: that of the uniform distribution on the circle.
_UNIFORM_STD = math.pi / math.sqrt(3.0)
_LEAST_FIX_VARIANCE = 0.01**2
_LARGEST_SIGMA_M = 10_000.0
_COVARIANCE_UNKNOWN = 0  # sensor_msgs/NavSatFix.COVARIANCE_TYPE_UNKNOWN


def valid_stamp_ns(message: Any) -> int:
    """Return the header's stamp in nanoseconds. Raises RejectedInput if it was never set, or is none."""
    stamp = message.header.stamp
    return _checked_stamp(int(stamp.sec), int(stamp.nanosec))


def cdr_stamp_ns(data: bytes) -> int:
    """Return the stamp of CDR bytes that begin with a header. Raises as :func:`valid_stamp_ns`."""
    if len(data) < 12:
        raise RejectedInput("too_short", "the message is too short to hold a stamp")
    if data[0] or data[1] > 1:
        raise RejectedInput("damaged", f"the message is no plain CDR: it begins with {data[:4].hex()}")
    # Byte 1 of the encapsulation gives the byte order.
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return _checked_stamp(seconds, nanoseconds)


def _checked_stamp(seconds: int, nanoseconds: int) -> int:
    if nanoseconds >= NS:
        raise RejectedInput("damaged", f"the message's stamp has {nanoseconds} nanoseconds in a second")
    ns = seconds * NS + nanoseconds
    if ns <= 0:
        what = "zero" if ns == 0 else "negative"
        raise RejectedInput("no_stamp", f"the message's stamp is {what}")
    return ns


def rgb_from_cdr(
    kind: str, data: bytes, decode_other: Callable[[Any], NDArray[np.uint8]] | None = None
) -> NDArray[np.uint8]:
    """Decode the CDR bytes of a message of type ``kind`` as :func:`rgb_from_image` does."""
    try:
        message = ros_types.deserialize(kind, data)
    except Exception as error:  # damaged bytes lead to any of them
        raise ImageError(f"damaged message: {reason(error)}") from None
    return rgb_from_image(message, decode_other)


def rgb_from_image(
    message: Any, decode_other: Callable[[Any], NDArray[np.uint8]] | None = None
) -> NDArray[np.uint8]:
    """Decode an Image or a CompressedImage to RGB. Raises ImageError, also if it shows nothing.

    decode_other: decodes an Image whose encoding is not among ``ENCODINGS``.
    """
    if hasattr(message, "format"):
        image = decode_compressed(bytes(message.data))
    elif decode_other is not None and message.encoding not in ENCODINGS:
        image = decode_other(message)
    else:
        size = (message.height, message.width, message.step)
        image = decode_image(message.encoding, *size, message.data, bool(message.is_bigendian))
    check_content(image)
    return image


def camera_from_info(message: Any, rectified: bool = False) -> CameraModel:
    """Return the intrinsics of the images that a CameraInfo belongs to.

    The message is about the whole sensor: the images are its region of interest, then binned. rectified: they
    are free of distortion, and P is their camera matrix. Raises RejectedInput if the intrinsics are not
    calibrated or not finite.
    """
    roi = message.roi
    across, down = max(1, message.binning_x), max(1, message.binning_y)
    if roi.x_offset + roi.width > message.width or roi.y_offset + roi.height > message.height:
        raise RejectedInput("camera_info_invalid", "camera_info: the region of interest leaves the sensor")
    width, height = roi.width or message.width - roi.x_offset, roi.height or message.height - roi.y_offset
    matrix = np.array(_field(message, "k"), float).reshape(3, 3)
    if rectified:
        matrix = np.array(_field(message, "p"), float).reshape(3, 4)[:, :3]
    # A bin's centre lies between those of its pixels.
    matrix[0, 2] -= roi.x_offset + (across - 1) / 2.0
    matrix[1, 2] -= roi.y_offset + (down - 1) / 2.0
    matrix[0] /= across
    matrix[1] /= down
    try:
        return CameraModel(
            width=int(width) // across,
            height=int(height) // down,
            k=tuple(float(value) for value in matrix.flat),
            distortion=() if rectified else tuple(float(value) for value in _field(message, "d")),
            distortion_model="plumb_bob" if rectified else message.distortion_model,
        )
    except ValueError as error:
        raise RejectedInput("camera_info_invalid", f"camera_info: {error}") from None


def fix_from_navsat(message: Any, min_status: int, max_sigma_m: float) -> GnssFix:
    """Return the fix. Raises RejectedInput if its status, position or covariance cannot be used.

    min_status: lowest usable NavSatStatus. max_sigma_m: largest horizontal standard deviation along the
    larger axis, metres; 0: no limit.
    """
    if message.status.status < min_status:
        raise RejectedInput("fix_status", f"fix status {message.status.status} is below {min_status}")
    lat, lon = message.latitude, message.longitude
    if not (math.isfinite(lat) and math.isfinite(lon)):
        raise RejectedInput("fix_not_finite", "fix has a latitude or longitude that is not a number")
    if abs(lat) > 90.0 or abs(lon) > 360.0:
        raise RejectedInput("fix_out_of_range", f"fix {lat}, {lon} is not a place on Earth")
    if lat == 0.0 and lon == 0.0:
        raise RejectedInput("fix_zero", "fix is 0, 0: the receiver has no position yet")
    covariance = None
    if message.position_covariance_type != _COVARIANCE_UNKNOWN:
        covariance = np.array(message.position_covariance, float).reshape(3, 3)
        horizontal = covariance[:2, :2]
        if not np.isfinite(horizontal).all():
            raise RejectedInput("fix_covariance", "fix has a covariance that is not finite")
        least, largest = (float(v) for v in np.linalg.eigvalsh(horizontal))
        if least < -1e-6 * abs(largest):
            raise RejectedInput("fix_covariance", "fix has a covariance that is not positive definite")
        if not horizontal.any():
            covariance = None
        else:
            # No receiver is more accurate than a centimetre, in any direction.
            horizontal += max(0.0, _LEAST_FIX_VARIANCE - least) * np.eye(2)
            sigma = math.sqrt(largest)
            if sigma > _LARGEST_SIGMA_M:
                raise RejectedInput("fix_sigma", f"fix sigma is {sigma / 1e3:.0f} km: no position")
            if 0 < max_sigma_m < sigma:
                raise RejectedInput("fix_sigma", f"fix sigma {sigma:.1f} m is above {max_sigma_m:g} m")
    altitude = message.altitude if math.isfinite(message.altitude) else 0.0
    return GnssFix(valid_stamp_ns(message), lat, lon, altitude, covariance)


@dataclass(frozen=True)
class HeadingConvention:
    """How a source counts headings; radians.

    clockwise: its yaw is a compass azimuth, clockwise from north, not counter-clockwise from east. offset: to
    be added, counter-clockwise. declination: from true north to the source's north, positive east. std:
    standard deviation of headings that come without one.
    """

    clockwise: bool = False
    offset: float = 0.0
    declination: float = 0.0
    std: float = math.radians(3.0)

    def true(self, yaw: float, clockwise: bool) -> float:
        """Convert a source's yaw to the ENU yaw from true north."""
        return true_yaw((yaw_from_azimuth(yaw) if clockwise else yaw) + self.offset, self.declination)


def heading_from_message(message: Any, convention: HeadingConvention, received_ns: int) -> HeadingSample:
    """Return the heading of a message of any of the types of INPUT_TYPES.

    A Float64 is an azimuth in degrees, clockwise from north whatever the convention says; it has no stamp and
    gets ``received_ns``. Raises RejectedInput without a heading.
    """
    if hasattr(message, "data"):
        if not math.isfinite(message.data):
            raise RejectedInput("heading_not_finite", "the heading is not a number")
        yaw = convention.true(math.radians(message.data % 360.0), clockwise=True)
        return HeadingSample(received_ns, yaw, convention.std)
    variance = 0.0
    if hasattr(message, "orientation"):
        covariance = message.orientation_covariance
        if covariance[0] == -1.0:
            raise RejectedInput("heading_unavailable", "the Imu has no orientation")
        variance, q = covariance[8], message.orientation
    elif hasattr(message, "quaternion"):
        q = message.quaternion
    elif hasattr(message.pose, "covariance"):
        variance, q = message.pose.covariance[35], message.pose.pose.orientation
    else:
        q = message.pose.orientation
    known = math.isfinite(variance) and variance > 0.0
    std = min(math.sqrt(variance), _UNIFORM_STD) if known else convention.std
    norm = math.sqrt(q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w)
    if not abs(norm - 1.0) < 0.1:  # NaN as well
        raise RejectedInput("heading_not_unit", f"heading quaternion has norm {norm:.3g}, not 1")
    return HeadingSample(valid_stamp_ns(message), convention.true(yaw_of(q), convention.clockwise), std)


class VelocityReader:
    """Reads base_link's velocity from the messages of one odometry, in the order of their stamps.

    They are of any of the types of INPUT_TYPES. Many lidar and visual odometries leave the twist of an
    Odometry empty. Until a twist differs from zero, the velocity is the difference of consecutive poses; from
    then on it is the twist, and poses, which may drift, are ignored.
    """

    def __init__(self) -> None:
        self._has_twist = False
        self._last: _PlanarPose | None = None

    def read(self, message: Any) -> VelocitySample | None:
        """Return the velocity, None for a first pose without a twist.

        The difference of two poses is stamped halfway between them. Raises RejectedInput for a velocity that
        is not finite, above ``TOP_SPEED`` or ``TOP_YAW_RATE``, StampNotNewerError between poses.
        """
        stamp, twist = valid_stamp_ns(message), _twist_of(message)
        velocity = (float(twist.linear.x), float(twist.linear.y), float(twist.angular.z))
        self._has_twist |= any(velocity) or not hasattr(message, "pose")
        sample: VelocitySample | None = VelocitySample(stamp, *velocity)
        if not self._has_twist:
            sample = self._moved(_PlanarPose.of(stamp, message.pose.pose))
        return None if sample is None else _plausible(sample)

    def _moved(self, pose: _PlanarPose) -> VelocitySample | None:
        last, self._last = self._last, pose
        if last is None or pose.stamp_ns < last.stamp_ns - RESTART_NS:
            return None
        if pose.stamp_ns <= last.stamp_ns:
            self._last = last
            raise StampNotNewerError("odom")
        elapsed_ns = pose.stamp_ns - last.stamp_ns
        turn = wrap_angle(pose.yaw - last.yaw)
        # The chord of an arc lies in the direction halfway through the turn.
        yaw, seconds = last.yaw + turn / 2.0, elapsed_ns / NS
        x, y = (pose.x - last.x) / seconds, (pose.y - last.y) / seconds
        cos, sin = math.cos(yaw), math.sin(yaw)
        stamp = last.stamp_ns + elapsed_ns // 2
        return VelocitySample(stamp, cos * x + sin * y, cos * y - sin * x, turn / seconds)


@dataclass(frozen=True)
class _PlanarPose:
    stamp_ns: int
    x: float
    y: float
    yaw: float

    @classmethod
    def of(cls, stamp: int, pose: Any) -> _PlanarPose:
        x, y, yaw = float(pose.position.x), float(pose.position.y), yaw_of(pose.orientation)
        if not all(math.isfinite(v) for v in (x, y, yaw)):
            raise RejectedInput("odom_not_finite", "odometry has no twist, and a pose that is not a number")
        return cls(stamp, x, y, yaw)


def _plausible(sample: VelocitySample) -> VelocitySample:
    if not all(math.isfinite(v) for v in (sample.forward, sample.left, sample.yaw_rate)):
        raise RejectedInput("odom_not_finite", "odometry has a velocity that is not a number")
    if abs(sample.yaw_rate) > TOP_YAW_RATE:
        text = f"odometry turns by {sample.yaw_rate:.1f} rad/s, more than {TOP_YAW_RATE:g}"
        raise RejectedInput("odom_turns_too_fast", text)
    speed = math.hypot(sample.forward, sample.left)
    if speed > TOP_SPEED:
        raise RejectedInput("odom_too_fast", f"odometry says {speed:.0f} m/s, more than {TOP_SPEED:.0f}")
    return sample


def _twist_of(message: Any) -> Any:
    return message.twist.twist if hasattr(message.twist, "twist") else message.twist


def velocity_frame(message: Any) -> str:
    """Return the frame in whose axes an odometry message's velocity is."""
    return str(message.child_frame_id if hasattr(message, "pose") else message.header.frame_id)


def odometry_cdr(message: Any) -> bytes:
    """Return an odometry message of any of the types of INPUT_TYPES as the CDR bytes of an Odometry."""
    kind = "nav_msgs/msg/Odometry"
    if hasattr(message, "pose"):
        return ros_types.serialize(kind, message)
    unset = np.zeros(36)
    pose = ros_types.message(
        "geometry_msgs/msg/Pose",
        position=ros_types.message("geometry_msgs/msg/Point", x=0.0, y=0.0, z=0.0),
        orientation=ros_types.quaternion(0.0),
    )
    twist = message.twist
    if not hasattr(twist, "twist"):
        twist = ros_types.message("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=unset)
    odometry = ros_types.message(
        kind,
        header=message.header,
        child_frame_id=message.header.frame_id,
        pose=ros_types.message("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=unset),
        twist=twist,
    )
    return ros_types.serialize(kind, odometry)


def yaw_of(q: Any) -> float:
    """Return the yaw of a quaternion of any norm but zero, radians."""
    return math.atan2(2.0 * (q.w * q.z + q.x * q.y), q.w * q.w + q.x * q.x - q.y * q.y - q.z * q.z)


def _field(message: Any, name: str) -> Any:
    """Return a field whose name ROS 1 capitalises."""
    return getattr(message, name) if hasattr(message, name) else getattr(message, name.upper())
