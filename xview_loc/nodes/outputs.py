"""Core types -> ROS messages. No node state in here."""

from __future__ import annotations

import array
import math

import numpy as np
from geometry_msgs.msg import Pose, PoseWithCovarianceStamped, Quaternion
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray
from sensor_msgs.msg import Image, NavSatFix, NavSatStatus
from std_msgs.msg import Header

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection
from xview_loc.vehicle.synchronisation import GnssFix

UNKNOWN_VARIANCE = 1e6


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
