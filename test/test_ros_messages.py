"""ROS messages <-> core types."""

import math
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from builtin_interfaces.msg import Time
from sensor_msgs.msg import CameraInfo, Imu, NavSatFix
from std_msgs.msg import Float64, Header

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import HeatMapGrid
from xview_loc.nodes import outputs as messages
from xview_loc.nodes.inputs import message_class
from xview_loc.vehicle import messages as input_messages
from xview_loc.vehicle.input_types import INPUT_TYPES
from xview_loc.vehicle.messages import HeadingConvention
from xview_loc.vehicle.synchronisation import RejectedInput

HEADER = Header(stamp=Time(sec=12, nanosec=5), frame_id="map")


def navsat(**changes) -> NavSatFix:
    fix = NavSatFix(header=HEADER, latitude=48.2, longitude=16.37, altitude=170.0)
    fix.status.status = 0
    for name, value in changes.items():
        setattr(fix, name, value)
    return fix


def reason(call, *arguments) -> str:
    with pytest.raises(RejectedInput) as error:
        call(*arguments)
    return error.value.reason


def test_good_fix():
    fix = input_messages.fix_from_navsat(
        navsat(position_covariance=[4.0, 0, 0, 0, 9.0, 0, 0, 0, 25.0], position_covariance_type=2), 0, 10.0
    )
    assert (fix.lat, fix.lon, fix.stamp_ns) == (48.2, 16.37, 12_000_000_005)
    assert fix.covariance is not None and fix.covariance[1, 1] == 9.0


def test_bad_fixes_are_refused_for_their_own_reason():
    gate = input_messages.fix_from_navsat
    no_fix = navsat()
    no_fix.status.status = -1
    assert reason(gate, no_fix, 0, 0.0) == "fix_status"
    assert reason(gate, navsat(latitude=math.nan), 0, 0.0) == "fix_not_finite"
    assert reason(gate, navsat(latitude=0.0, longitude=0.0), 0, 0.0) == "fix_zero"
    assert reason(gate, navsat(latitude=91.0), 0, 0.0) == "fix_out_of_range"
    wide = navsat(position_covariance=[400.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0], position_covariance_type=2)
    assert reason(gate, wide, 0, 10.0) == "fix_sigma"
    assert reason(gate, navsat(header=Header()), 0, 0.0) == "no_stamp"
    assert reason(gate, navsat(header=Header(stamp=Time(sec=5, nanosec=10**9))), 0, 0.0) == "damaged"


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("0001000005000000ffc99a3b", ""),
        ("000100000500000000ca9a3b", "damaged"),
        ("0201000005000000", "too_short"),
        ("020100000500000000000000", "damaged"),
        ("000100000000000000000000", "no_stamp"),
    ],
)
def test_the_stamp_of_a_message_that_is_not_read(start: str, why: str) -> None:
    data = bytes.fromhex(start)
    if why:
        assert reason(input_messages.cdr_stamp_ns, data) == why
    else:
        assert input_messages.cdr_stamp_ns(data) == 5_999_999_999


def heading_message(source: str, yaw_deg: float, variance: float = 0.0) -> Any:
    """A heading in the type that a source has."""
    message = message_class(INPUT_TYPES["heading"][source])()
    if source == "degrees":
        message.data = 90.0 - yaw_deg
        return message
    message.header = HEADER
    q = messages.quaternion_of(math.radians(yaw_deg))
    if source == "imu":
        message.orientation = q
        message.orientation_covariance[8] = variance
    elif source == "quaternion":
        message.quaternion = q
    elif source == "pose":
        message.pose.orientation = q
    else:
        message.pose.pose.orientation = q
        message.pose.covariance[35] = variance
    return message


@pytest.mark.parametrize("source", INPUT_TYPES["heading"])
def test_heading_of_every_source_is_corrected_for_declination(source):
    convention = HeadingConvention(declination=math.radians(4.0), std=0.05)
    heading = input_messages.heading_from_message(heading_message(source, 100.0), convention, 77)
    assert heading.yaw == pytest.approx(math.radians(96.0))
    assert heading.std == 0.05
    assert heading.stamp_ns == (77 if source == "degrees" else 12_000_000_005)
    heading = input_messages.heading_from_message(heading_message(source, 100.0, 0.01), convention, 77)
    known = source in ("imu", "pose_with_covariance", "odometry")
    assert heading.std == pytest.approx(0.1 if known else 0.05)


@pytest.mark.parametrize(
    ("azimuth", "offset", "yaw"), [(0.0, 0.0, 90.0), (90.0, 0.0, 0.0), (200.0, 30.0, -80.0)]
)
def test_a_yaw_may_be_an_azimuth_and_its_sensor_turned(azimuth, offset, yaw):
    convention = HeadingConvention(clockwise=True, offset=math.radians(offset))
    q = messages.quaternion_of(math.radians(azimuth))
    heading = input_messages.heading_from_message(Imu(header=HEADER, orientation=q), convention, 0)
    assert heading.yaw == pytest.approx(math.radians(yaw))


def test_imu_without_orientation_is_refused():
    no_orientation = Imu(header=HEADER)
    no_orientation.orientation_covariance[0] = -1.0
    read = input_messages.heading_from_message
    assert reason(read, no_orientation, HeadingConvention(), 0) == "heading_unavailable"
    zero = Imu(header=HEADER)
    zero.orientation.w = 0.0
    assert reason(read, zero, HeadingConvention(), 0) == "heading_not_unit"
    assert reason(read, Float64(data=math.nan), HeadingConvention(), 0) == "heading_not_finite"


def test_uncalibrated_camera_info_is_refused():
    assert reason(input_messages.camera_from_info, CameraInfo(width=640, height=480)) == "camera_info_invalid"


def test_intrinsics_are_those_of_the_published_images():
    """A region of the sensor, two by four pixels binned: the middle of the camera stays in its place."""
    k = [400.0, 0.0, 330.3, 0.0, 420.0, 235.1, 0.0, 0.0, 1.0]
    info = CameraInfo(width=640, height=480, k=k, distortion_model="plumb_bob", d=[0.1, 0.0, 0.0, 0.0, 0.0])
    info.binning_x, info.binning_y = 2, 4
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 100, 60, 400, 360
    camera = input_messages.camera_from_info(info)
    assert (camera.width, camera.height) == (200, 90) and camera.distorts
    rows, cols = np.mgrid[:480, :640].astype(np.float32)
    for full, bins, focal, middle in ((cols, 2, 400.0, 330.3), (rows, 4, 420.0, 235.1)):
        row = 0 if full is cols else 1
        # Each pixel of the published image holds the coordinate of its own middle on the sensor.
        image = cv2.resize(full[60:420, 100:500], (200, 90), interpolation=cv2.INTER_AREA)
        line = image[0] if full is cols else image[:, 0]
        assert np.interp(camera.matrix[row, 2], np.arange(len(line)), line) == pytest.approx(middle)
        assert camera.matrix[row, row] == focal / bins


def test_rectified_images_are_not_undistorted_again():
    k, p = np.diag([400.0, 400.0, 1.0]), np.zeros((3, 4))
    k[:2, 2], p[:, :3] = (320.0, 240.0), [[350.0, 0.0, 318.0], [0.0, 352.0, 241.0], [0.0, 0.0, 1.0]]
    info = CameraInfo(width=640, height=480, k=k.ravel(), p=p.ravel(), distortion_model="rational_polynomial")
    info.d = [0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    camera = input_messages.camera_from_info(info, rectified=True)
    assert not camera.distorts and camera.k == tuple(p[:, :3].ravel())
    assert input_messages.camera_from_info(info).k == tuple(k.ravel())
    assert reason(input_messages.camera_from_info, CameraInfo(width=9, height=9, k=k.ravel()), True)


def test_pose_marks_what_is_unknown():
    pose = messages.pose_message(HEADER, (1.0, 2.0), np.diag([4.0, 9.0]), None, 0.0)
    covariance = np.array(pose.pose.covariance).reshape(6, 6)
    assert covariance[0, 0] == 4.0 and covariance[1, 1] == 9.0
    assert (np.diag(covariance)[2:] == 1e6).all()
    known = messages.pose_message(HEADER, (1.0, 2.0), np.eye(2), 0.5, 0.01)
    assert known.pose.covariance[35] == 0.01
    assert input_messages.yaw_of(known.pose.pose.orientation) == pytest.approx(0.5)


@pytest.mark.parametrize("datum", [(48.2, 16.37), (48.25, 16.9)])
@pytest.mark.parametrize("rotation", [0.0, 0.7])
def test_heat_map_cells_lie_where_their_pixels_do(datum, rotation):
    tile = AerialTile(np.zeros((64, 64, 3), np.uint8), 48.2, 16.37, 0.5, rotation=rotation)
    probability = np.zeros((16, 20), np.float32)
    probability[3, 11] = 0.8
    probability[10, 2] = 0.2
    heat_map = HeatMap(probability, HeatMapGrid(2.0, (5.0, 9.0)), tile, None, probability.size, 1.0)
    plane = LocalProjection(*datum)
    grid = messages.heat_map_message(HEADER, heat_map, plane)
    cells = np.array(grid.data).reshape(grid.info.height, grid.info.width)
    row, col = np.unravel_index(cells.argmax(), cells.shape)
    assert cells[row, col] == 100 and sorted(set(cells.ravel())) == [0, 25, 100]
    # A cell's centre as RViz computes it, against the pixel's own way to the plane.
    origin, yaw = grid.info.origin, input_messages.yaw_of(grid.info.origin.orientation)
    right, up = (col + 0.5) * grid.info.resolution, (row + 0.5) * grid.info.resolution
    x = origin.position.x + math.cos(yaw) * right - math.sin(yaw) * up
    y = origin.position.y + math.sin(yaw) * right + math.cos(yaw) * up
    assert (x, y) == pytest.approx(plane.forward(*heat_map.to_latlon(3, 11)), abs=1e-3)
