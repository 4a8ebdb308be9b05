"""ROS messages <-> core types. No node state in here."""

from __future__ import annotations

import array
import math
from typing import Any

import numpy as np
from geometry_msgs.msg import Pose, PoseWithCovarianceStamped, Quaternion
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, NavSatFix, NavSatStatus
from std_msgs.msg import Header

from xview_loc.camera import CameraModel, decode_compressed, decode_image
from xview_loc.geodesy import LocalProjection, true_yaw
from xview_loc.heatmap import HeatMap
from xview_loc.nodes.input_sync import GnssFix, HeadingSample

UNKNOWN_VARIANCE = 1e6
# A direction nothing is known about: the variance of the uniform distribution on the circle.
_UNIFORM_STD = math.pi / math.sqrt(3.0)


class RejectedInput(Exception):  # noqa: N818 - it says what happened to the message
    """A message that must not be used; ``reason`` is a short key for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def stamp_ns(message: Any) -> int:
    """The header's stamp in nanoseconds; RejectedInput where it was never set."""
    stamp = message.header.stamp
    ns = int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)
    if ns == 0:
        raise RejectedInput("no_stamp", "the message's stamp is zero")
    return ns


def rgb_from_image(message: Image | CompressedImage) -> NDArray[np.uint8]:
    """Decode to RGB; raises the camera module's ValueErrors on anything malformed."""
    if isinstance(message, CompressedImage):
        return decode_compressed(bytes(message.data))
    return decode_image(message.encoding, message.height, message.width, message.step, message.data)


def camera_from_info(message: CameraInfo) -> CameraModel:
    """The camera's intrinsics; RejectedInput where they are not calibrated or not finite."""
    try:
        return CameraModel(
            width=int(message.width),
            height=int(message.height),
            k=tuple(float(value) for value in message.k),
            distortion=tuple(float(value) for value in message.d),
            distortion_model=message.distortion_model,
        )
    except ValueError as error:
        raise RejectedInput("camera_info_invalid", f"camera_info: {error}") from None


def fix_from_navsat(message: NavSatFix, min_status: int, max_sigma_m: float) -> GnssFix:
    """The fix, gated: RejectedInput on no fix, a status below ``min_status``, NaN, or a sigma too large.

    ``max_sigma_m`` limits the horizontal standard deviation (the larger axis); 0 does not limit it.
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
    if message.position_covariance_type != NavSatFix.COVARIANCE_TYPE_UNKNOWN:
        covariance = np.array(message.position_covariance, float).reshape(3, 3)
        horizontal = covariance[:2, :2]
        if not np.isfinite(horizontal).all() or (np.diag(horizontal) < 0).any():
            raise RejectedInput("fix_covariance", "fix has a covariance that is not one")
        if not horizontal.any():
            covariance = None
        elif max_sigma_m > 0:
            sigma = math.sqrt(max(0.0, float(np.linalg.eigvalsh(horizontal)[-1])))
            if sigma > max_sigma_m:
                raise RejectedInput("fix_sigma", f"fix sigma {sigma:.1f} m is above {max_sigma_m:g} m")
    altitude = message.altitude if math.isfinite(message.altitude) else 0.0
    return GnssFix(stamp_ns(message), lat, lon, altitude, covariance)


def heading_from_message(message: Any, declination: float, default_std: float) -> HeadingSample:
    """Heading of an Imu, QuaternionStamped or PoseStamped; RejectedInput where it holds none.

    ``declination`` (radians, positive east) is what the source's north lies east of true north;
    ``default_std`` (radians) holds where the message has no covariance.
    """
    std = default_std
    if hasattr(message, "orientation_covariance"):
        covariance = message.orientation_covariance
        if covariance[0] == -1.0:
            raise RejectedInput("heading_unavailable", "the Imu says that it has no orientation")
        if math.isfinite(covariance[8]) and covariance[8] > 0.0:
            std = min(math.sqrt(covariance[8]), _UNIFORM_STD)
        q = message.orientation
    elif hasattr(message, "pose"):
        q = message.pose.orientation
    else:
        q = message.quaternion
    norm = math.sqrt(q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w)
    if not abs(norm - 1.0) < 0.1:  # NaN as well
        raise RejectedInput("heading_not_unit", f"heading quaternion has norm {norm:.3g}, not 1")
    return HeadingSample(stamp_ns(message), true_yaw(yaw_of(q), declination), std)


def yaw_of(q: Quaternion) -> float:
    """Yaw (radians) of a quaternion of any length but zero."""
    return math.atan2(2.0 * (q.w * q.z + q.x * q.y), q.w * q.w + q.x * q.x - q.y * q.y - q.z * q.z)


def quaternion_of(yaw: float) -> Quaternion:
    """A turn about z."""
    return Quaternion(z=math.sin(yaw / 2.0), w=math.cos(yaw / 2.0))


def pose_message(
    header: Header,
    position: tuple[float, float],
    covariance: NDArray[np.float64],
    yaw: float | None,
    yaw_variance: float,
) -> PoseWithCovarianceStamped:
    """A pose in the plane of ``header.frame_id``; what is not known has the variance 1e6.

    ``position`` is (x, y) in metres with its 2x2 ``covariance`` in m^2; yaw in radians, None if unknown.
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
    """A fix with known covariance (2x2 ENU m^2); altitude and its variance are the source fix's."""
    message = NavSatFix(header=header, latitude=lat, longitude=lon, altitude=source.altitude)
    message.status.status = NavSatStatus.STATUS_FIX
    full = np.zeros((3, 3))
    full[:2, :2] = covariance
    full[2, 2] = UNKNOWN_VARIANCE if source.covariance is None else source.covariance[2, 2]
    message.position_covariance = full.ravel().tolist()
    message.position_covariance_type = NavSatFix.COVARIANCE_TYPE_KNOWN
    return message


def heat_map_message(header: Header, heat_map: HeatMap, datum: LocalProjection) -> OccupancyGrid:
    """The heat map as a grid in the datum's plane, 100 at its peak.

    A grid's first cell is its lower left one, so rows are turned over; its origin is that cell's outer
    corner, turned by what the tile's axes differ from the plane's.
    """
    probability, grid, tile = heat_map.probability, heat_map.grid, heat_map.tile
    height, width = probability.shape
    corner = (
        grid.origin[0] + grid.scale * (height - 0.5),
        grid.origin[1] + grid.scale * -0.5,
    )
    message = OccupancyGrid(header=header)
    x, y = datum.forward(*tile.pixel_to_latlon(*corner))
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


def image_message(header: Header, image: NDArray[np.uint8]) -> Image:
    """An RGB picture as rgb8."""
    height, width = image.shape[:2]
    message = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
    message.data = array.array("B", image.tobytes())
    return message
