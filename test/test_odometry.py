"""Velocities between two instants, added up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xview_loc.bags.ros_types import deserialize, header, message, quaternion
from xview_loc.geodesy import LocalProjection
from xview_loc.vehicle.messages import VelocityReader, odometry_cdr, velocity_frame
from xview_loc.vehicle.motion_check import MotionCheck
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import NS, GnssFix, RejectedInput, StampNotNewerError

START = 1_700_000_000 * NS


def driven(speed: float, yaw_rate: float, rate_hz: float = 20.0, seconds: float = 4.0) -> Odometry:
    odometry = Odometry(0.6)
    for i in range(int(seconds * rate_hz) + 1):
        assert odometry.add(VelocitySample(START + round(i / rate_hz * NS), speed, 0.0, yaw_rate))
    return odometry


@given(
    speed=st.floats(-5.0, 30.0),
    yaw_rate=st.floats(-0.6, 0.6),
    start=st.floats(0.0, 2.0),
    length=st.floats(0.0, 2.0),
)
def test_a_circle_is_driven_along_its_arc(speed: float, yaw_rate: float, start: float, length: float) -> None:
    motion = driven(speed, yaw_rate).between(START + round(start * NS), START + round((start + length) * NS))
    assert motion is not None
    angle = yaw_rate * length
    assert motion.turn == pytest.approx(angle, abs=1e-6)
    assert motion.length == pytest.approx(abs(speed) * length, abs=1e-6)
    straight = abs(angle) < 1e-6
    forward = speed * length if straight else speed * math.sin(angle) / yaw_rate
    left = 0.0 if straight else speed * (1 - math.cos(angle)) / yaw_rate
    assert (motion.forward, motion.left) == pytest.approx((forward, left), abs=2e-3)


def test_sideways_motion_counts() -> None:
    odometry = Odometry(0.6)
    for i in range(3):
        odometry.add(VelocitySample(START + i * NS // 2, 1.0, -2.0, 0.0))
    motion = odometry.between(START, START + NS)
    assert motion is not None and (motion.forward, motion.left) == pytest.approx((1.0, -2.0))


def test_a_velocity_is_held_for_a_gap_at_most() -> None:
    odometry = driven(10.0, 0.0, seconds=1.0)
    end = START + NS
    motion = odometry.between(end, end + NS // 2)
    assert motion is not None and motion.forward == pytest.approx(5.0)
    assert odometry.between(end, end + NS) is None
    assert odometry.between(START - NS, START) is None
    odometry.add(VelocitySample(end + 2 * NS, 10.0, 0.0, 0.0))
    assert odometry.between(START, end + 2 * NS) is None  # nothing is known of the time between
    assert Odometry(0.6).between(START, end) is None


def test_two_minutes_are_remembered_however_fast_the_odometry() -> None:
    odometry = driven(1.0, 0.0, rate_hz=100.0, seconds=150.0)
    end = START + 150 * NS
    motion = odometry.between(end - 119 * NS, end)
    assert motion is not None and motion.forward == pytest.approx(119.0)
    assert odometry.between(START, end) is None


def test_old_samples_are_refused_and_time_may_start_again() -> None:
    odometry = driven(10.0, 0.0, seconds=2.0)
    assert not odometry.add(VelocitySample(START + 2 * NS, 99.0, 0.0, 0.0))
    assert not odometry.add(VelocitySample(START + round(1.8 * NS), 99.0, 0.0, 0.0))
    assert odometry.add(VelocitySample(START, 1.0, 0.0, 0.0))  # a bag that loops
    motion = odometry.between(START, START + NS // 2)
    assert motion is not None and motion.forward == pytest.approx(0.5)


def odometry_message(seconds: float, x: float, y: float, yaw: float, speed: float = 0.0) -> Any:
    zero = message("geometry_msgs/msg/Vector3", x=0.0, y=0.0, z=0.0)
    velocity = message("geometry_msgs/msg/Vector3", x=speed, y=0.0, z=0.0)
    twist = message("geometry_msgs/msg/Twist", linear=velocity, angular=zero)
    position = message("geometry_msgs/msg/Point", x=x, y=y, z=0.0)
    pose = message("geometry_msgs/msg/Pose", position=position, orientation=quaternion(yaw))
    return message(
        "nav_msgs/msg/Odometry",
        header=header(START + round(seconds * NS), "odom"),
        child_frame_id="base_link",
        pose=message("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=np.zeros(36)),
        twist=message("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=np.zeros(36)),
    )


def test_poses_without_a_twist_give_the_motion_along_the_arc() -> None:
    # A circle of 20 m at 10 m/s, from a heading of 2 rad, at 10 Hz.
    reader, odometry = VelocityReader(), Odometry(0.6)
    for k in range(41):
        yaw = 2.0 + 0.05 * k
        sample = reader.read(
            odometry_message(k / 10, 300.0 + 20.0 * math.sin(yaw), -20.0 * math.cos(yaw), yaw)
        )
        assert (sample is None) == (k == 0)
        assert sample is None or odometry.add(sample)
    motion = odometry.between(START + NS, START + 3 * NS)
    assert motion is not None
    assert motion.turn == pytest.approx(1.0, abs=1e-6)
    arc = (20.0 * math.sin(1.0), 20.0 * (1.0 - math.cos(1.0)))
    assert (motion.forward, motion.left) == pytest.approx(arc, rel=2e-3)
    with pytest.raises(StampNotNewerError):
        reader.read(odometry_message(3.9, 0.0, 0.0, 0.0))
    with pytest.raises(RejectedInput, match="pose that is not a number"):
        reader.read(odometry_message(4.1, math.nan, 0.0, 0.0))
    assert reader.read(odometry_message(1.0, 0.0, 0.0, 0.0)) is None  # a bag that loops


def test_a_twist_outranks_the_pose_even_while_it_is_zero_again() -> None:
    reader = VelocityReader()
    assert reader.read(odometry_message(0.0, 0.0, 0.0, 0.0)) is None
    standing = reader.read(odometry_message(0.1, 0.0, 0.0, 0.0))
    assert standing is not None and standing.forward == 0.0
    for seconds, speed in ((0.2, 3.0), (0.3, 0.0)):
        sample = reader.read(odometry_message(seconds, 50.0 * seconds, 0.0, 1.0, speed))
        assert sample == VelocitySample(START + round(seconds * NS), speed, 0.0, 0.0)


@pytest.mark.parametrize("covariance", [False, True])
def test_a_twist_alone_is_a_velocity_and_becomes_an_odometry(covariance: bool) -> None:
    kind = "TwistWithCovarianceStamped" if covariance else "TwistStamped"
    for speed in (0.0, 4.0):
        source = odometry_message(3.0, 0.0, 0.0, 0.0, speed)
        twist = source.twist if covariance else source.twist.twist
        sent = message(f"geometry_msgs/msg/{kind}", header=source.header, twist=twist)
        # A first message, also one of a standing vehicle, is a velocity.
        assert VelocityReader().read(sent) == VelocitySample(START + 3 * NS, speed, 0.0, 0.0)
        kept = deserialize("nav_msgs/msg/Odometry", odometry_cdr(sent))
        assert kept.twist.twist.linear.x == speed and kept.header == source.header
        assert velocity_frame(kept) == velocity_frame(sent) == source.header.frame_id


PLANE = LocalProjection(48.2, 16.37)


def check(places: list[complex], speed: float, sigma: float = 0.0) -> MotionCheck:
    """A check that has seen fixes at places (east + i north), one a second, while odometry says ``speed``."""
    odometry = Odometry(1.0)
    found = MotionCheck(odometry)
    for k, place in enumerate(places):
        odometry.add(VelocitySample(START + k * NS, speed, 0.0, 0.0))
        lat, lon = PLANE.inverse(place.real, place.imag)
        covariance = np.eye(3) * sigma**2 if sigma else None
        found.add(GnssFix(START + k * NS, lat, lon, 0.0, covariance))
    return found


def test_odometry_that_stands_while_fixes_drive_is_found() -> None:
    driving = [complex(8.0 * k, 3.0) for k in range(20)]
    assert "fixes moved" in check(driving, 0.2).odom_still
    assert check(driving, 7.0).odom_still == check(driving, 7.0).fix_still == ""
    # A standing vehicle between tall buildings: fixes that wander, or jump there and back.
    assert check([complex(25.0 * (k // 10 % 2)) for k in range(60)], 0.0).odom_still == ""
    assert check(driving[:12], 0.0, sigma=10.0).odom_still == ""
    wander = np.cumsum(np.random.default_rng(3).normal(0.0, 2.0, (600, 2)), 0) @ (1.0, 1j)
    assert check(list(wander), 0.0, sigma=15.0).odom_still == ""


def test_a_fix_that_stays_the_same_while_odometry_drives_is_found() -> None:
    same = [0j] * 15
    assert "odometry moved 100 m" in check([*range(5), *same[:11]], 10.0).fix_still
    assert check(same, 0.0).fix_still == ""
    assert check([*same, 1.0 + 0j], 10.0).fix_still == ""
