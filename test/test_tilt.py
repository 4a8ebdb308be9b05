"""Roll and pitch of the vehicle."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xview_loc.rig import Quaternion, rotation_matrix, tilt_matrix
from xview_loc.vehicle.synchronisation import RejectedInput
from xview_loc.vehicle.tilt import TiltSample, blend_tilt, tilt_from_imu, tilt_of

LEVEL = np.eye(3)


def about(axis: int, degrees: float) -> np.ndarray:
    half = math.radians(degrees) / 2.0
    vector = [0.0, 0.0, 0.0]
    vector[axis] = math.sin(half)
    return rotation_matrix((*vector, math.cos(half)))


def quaternion(matrix: np.ndarray) -> Quaternion:
    """Of a rotation by less than half a turn."""
    w = math.sqrt(max(0.0, 1.0 + np.trace(matrix))) / 2.0
    x, y, z = (matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1])
    return x / (4 * w), y / (4 * w), z / (4 * w), w


def imu(matrix: np.ndarray, unknown: bool = False, scale: float = 1.0) -> Any:
    """An Imu's message with this rotation from its frame to the world."""
    x, y, z, w = (scale * v for v in quaternion(matrix))
    return SimpleNamespace(
        header=SimpleNamespace(stamp=SimpleNamespace(sec=5, nanosec=0)),
        orientation=SimpleNamespace(x=x, y=y, z=z, w=w),
        orientation_covariance=[-1.0 if unknown else 0.0] * 9,
    )


def degrees(tilt: TiltSample) -> tuple[float, float]:
    return math.degrees(tilt.roll), math.degrees(tilt.pitch)


@pytest.mark.parametrize("yaw", [0.0, 77.0, -130.0])
def test_tilt_of_an_imu_whatever_its_yaw(yaw: float) -> None:
    tilted = tilt_matrix(math.radians(6.0), math.radians(-9.0))
    tilt = tilt_from_imu(imu(about(2, yaw) @ tilted), LEVEL)
    assert degrees(tilt) == pytest.approx((6.0, -9.0))
    assert tilt.stamp_ns == 5_000_000_000


def test_right_side_and_nose_down_are_positive() -> None:
    left, forward = np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0])
    right_down, nose_down = about(0, 10.0), about(1, 10.0)
    assert (right_down @ -left)[2] < 0.0 and (nose_down @ forward)[2] < 0.0
    assert degrees(tilt_of(1, right_down)) == pytest.approx((10.0, 0.0))
    assert degrees(tilt_of(1, nose_down)) == pytest.approx((0.0, 10.0))


@pytest.mark.parametrize(("axis", "angle"), [(2, 90.0), (0, 120.0), (1, -35.0)])
def test_imu_that_is_mounted_otherwise(axis: int, angle: float) -> None:
    mounting = about(axis, angle)
    vehicle = about(2, 40.0) @ tilt_matrix(math.radians(4.0), math.radians(7.0))
    assert degrees(tilt_from_imu(imu(vehicle @ mounting), mounting)) == pytest.approx((4.0, 7.0))


@pytest.mark.parametrize(
    ("message", "reason", "says"),
    [
        (imu(LEVEL, unknown=True), "tilt_unavailable", r"orientation_covariance\[0\] is -1"),
        (imu(LEVEL, scale=0.0), "tilt_not_unit", "norm 0"),
        (imu(LEVEL, scale=math.nan), "tilt_not_unit", "norm nan"),
        (imu(about(0, 31.0)), "tilt_implausible", "31 degrees"),
        (imu(about(1, -50.0)), "tilt_implausible", "50 degrees"),
        (imu(about(0, 170.0)), "tilt_implausible", "170 degrees"),
    ],
)
def test_refused(message: Any, reason: str, says: str) -> None:
    with pytest.raises(RejectedInput, match=says) as caught:
        tilt_from_imu(message, LEVEL)
    assert caught.value.reason == reason


def test_tilt_is_interpolated() -> None:
    a, b = TiltSample(100, 0.1, -0.2), TiltSample(200, 0.3, 0.2)
    assert blend_tilt(a, b, 0.25) == TiltSample(125, pytest.approx(0.15), pytest.approx(-0.1))
