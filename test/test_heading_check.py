"""Headings compared with the course of the fixes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.vehicle.course import CourseHeadings
from xview_loc.vehicle.heading_check import HeadingCheck, HeadingFault, OffsetCheck
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample

START = 1_700_000_000 * NS
PLANE = LocalProjection(48.2, 16.37)
TRACK = Path(__file__).parents[1].parent / "shared/data/tracks/comma2k19"
Wrong = Callable[[float], float]


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """A minute and a half among streets, with the errors of an ordinary receiver and compass."""
    city = build_city(301, size_m=620.0, gsd=0.6)
    return list(drive(city, 450, 2, options=DriveOptions(heading_noise=math.radians(4.0)), view=None))


def judge(frames: list[Frame], wrong: Wrong) -> list[HeadingFault | None]:
    """The faults found in a drive whose headings are changed by ``wrong``, one after the other."""
    odometry = Odometry(1.0)
    check = HeadingCheck(odometry)
    found: list[HeadingFault | None] = [None]
    for frame in frames:
        ns = START + frame.stamp_ns
        for one in frame.wheels:
            odometry.add(VelocitySample(START + one.stamp_ns, one.speed, 0.0, one.yaw_rate))
        check.add_heading(HeadingSample(ns, wrap_angle(wrong(frame.heading)), 0.05))
        covariance = np.eye(3)
        covariance[:2, :2] = frame.fix.covariance
        check.add_fix(GnssFix(ns, frame.fix.lat, frame.fix.lon, 0.0, covariance))
        if check.fault != found[-1]:
            found.append(check.fault)
    return found


def test_an_ordinary_drive_raises_no_alarm(frames: list[Frame]) -> None:
    assert judge(frames, lambda yaw: yaw) == [None]


@pytest.mark.parametrize(
    ("wrong", "cause", "says"),
    [
        (lambda yaw: yaw + math.pi / 2, "offset", r"heading is \+(8|9)\d deg off"),
        (lambda yaw: yaw + math.pi, "offset", r"heading is [+-]1[78]\d deg off"),
        (lambda yaw: math.pi / 2 - yaw, "sign", "turns the wrong way round"),
        (lambda yaw: 0.3, "constant", "does not change in turns"),
    ],
)
def test_the_cause_of_a_wrong_heading_is_named(
    frames: list[Frame], wrong: Wrong, cause: str, says: str
) -> None:
    fault = judge(frames, wrong)[-1]
    assert fault is not None and fault.cause == cause and fault.sure
    assert re.search(says, str(fault))


def test_without_a_turn_the_cause_is_open() -> None:
    check = straight(heading=math.pi / 2)
    assert check.fault is not None and not check.fault.sure and "turns will tell" in str(check.fault)


def test_reversing_and_standing_are_no_faults() -> None:
    assert straight(heading=math.pi, speed=-5.0).fault is None
    # Fixes wander about a vehicle that stands, without odometry.
    rng = np.random.default_rng(5)
    wander = np.cumsum(rng.normal(0.0, 1.5, (900, 2)), 0) @ (1.0, 1j)
    assert straight(heading=1.0, places=list(wander)).fault is None


def straight(heading: float, speed: float | None = None, places: list[complex] | None = None) -> HeadingCheck:
    """A check after fixes without covariance, one a second, by default 300 m to the east."""
    odometry = Odometry(1.0)
    check = HeadingCheck(odometry)
    for k, place in enumerate(places or [complex(5.0 * k) for k in range(60)]):
        ns = START + k * NS
        if speed is not None:
            odometry.add(VelocitySample(ns, speed, 0.0, 0.0))
        check.add_heading(HeadingSample(ns, heading, 0.05))
        check.add_fix(GnssFix(ns, *PLANE.inverse(place.real, place.imag), 0.0, None))
    return check


@pytest.mark.skipif(not TRACK.exists(), reason="the recordings are not here")
@pytest.mark.parametrize("turned", [0.0, math.pi / 2])
def test_a_real_drive(turned: float) -> None:
    """A kilometre of comma2k19: a consumer receiver's fixes, and the heading of a fused trajectory."""
    fixes = np.load(TRACK / "live_gnss_ublox_value")
    at, times = np.load(TRACK / "live_gnss_ublox_t").ravel(), np.load(TRACK / "frame_times")
    w, x, y, z = np.load(TRACK / "frame_orientations").T
    forward = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], 1)
    lat, lon = np.radians(fixes[0, :2])
    east = forward @ (-math.sin(lon), math.cos(lon), 0.0)
    north = forward @ (-math.sin(lat) * math.cos(lon), -math.sin(lat) * math.sin(lon), math.cos(lat))
    check = HeadingCheck(Odometry(1.0))
    alarms, next_fix = 0, 0
    for time, yaw in zip(times, np.arctan2(north, east), strict=True):
        check.add_heading(HeadingSample(round(time * NS), wrap_angle(yaw + turned), 0.02))
        while next_fix < len(at) and at[next_fix] <= time:
            check.add_fix(GnssFix(round(at[next_fix] * NS), *fixes[next_fix, :2], 0.0, None))
            alarms += check.fault is not None
            next_fix += 1
    assert (alarms == 0) if not turned else (check.fault is not None and abs(check.fault.angle) > 1.4)


@pytest.mark.parametrize("offset_deg", [0.0, 15.0, -18.0])
def test_odometry_and_fixes_tell_a_small_offset(frames: list[Frame], offset_deg: float) -> None:
    odometry = Odometry(1.0)
    course, check = CourseHeadings(odometry), OffsetCheck()
    found: list[HeadingFault | None] = []
    for frame in frames:
        ns = START + frame.stamp_ns
        covariance = np.eye(3)
        covariance[:2, :2] = frame.fix.covariance
        course.add_fix(GnssFix(ns, frame.fix.lat, frame.fix.lon, 0.0, covariance))
        for one in frame.wheels:
            sample = VelocitySample(START + one.stamp_ns, one.speed, 0.0, one.yaw_rate)
            odometry.add(sample)
            course.add_velocity(sample)
        reckoned, motion = course.at(ns), odometry.between(ns - 10**9 // 5, ns)
        if reckoned is not None and motion is not None:
            measured = wrap_angle(frame.heading + math.radians(offset_deg))
            check.add(HeadingSample(ns, measured, 0.05), reckoned, motion.length)
        found.append(check.fault)
    if offset_deg == 0.0:
        assert not any(found)
        return
    first = next(k for k, fault in enumerate(found) if fault)
    assert frames[first].stamp_ns < 80 * 10**9 and all(found[first:])
    assert all(abs(math.degrees(fault.angle) - offset_deg) < 8.0 for fault in found[first:] if fault)
