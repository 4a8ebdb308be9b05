"""Velocities between two instants, added up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xview_loc.vehicle.odometry import Odometry, VelocitySample

NS = 1_000_000_000
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
