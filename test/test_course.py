"""Headings without a compass, of a vehicle on the way and of a recorded drive."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.vehicle.course import MAX_STD, CourseHeadings, headings_of_drive
from xview_loc.vehicle.mounting import Offset, moved
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample

START = 1_700_000_000 * NS
SECONDS = 240


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """Four minutes among streets: fixes some metres off, a gyroscope with noise and a constant error."""
    city = build_city(301, size_m=620.0, gsd=0.6)
    return list(drive(city, SECONDS, 2, options=DriveOptions(rate_hz=1.0), view=None))


def fix_of(frame: Frame, antenna: Offset = (0.0, 0.0)) -> GnssFix:
    covariance = np.eye(3)
    covariance[:2, :2] = frame.fix.covariance
    lat, lon = moved(frame.fix.lat, frame.fix.lon, antenna, frame.truth.heading)
    return GnssFix(START + frame.stamp_ns, lat, lon, 0.0, covariance)


def velocities(frame: Frame) -> list[VelocitySample]:
    return [VelocitySample(START + w.stamp_ns, w.speed, 0.0, w.yaw_rate) for w in frame.wheels]


class Vehicle:
    """Takes fixes and odometry as they come."""

    def __init__(self) -> None:
        self.odometry = Odometry(1.0)
        self.course = CourseHeadings(self.odometry)

    def take(
        self, samples: Iterable[VelocitySample], fix: GnssFix | None, antenna: Offset = (0.0, 0.0)
    ) -> HeadingSample | None:
        heading = None
        if fix is not None:
            self.course.add_fix(fix, antenna)
        for sample in samples:
            if self.odometry.add(sample):
                heading = self.course.add_velocity(sample)
        return heading


def errors_deg(frames: list[Frame], found: list[HeadingSample | None]) -> np.ndarray:
    """Of the known headings; NaN for others."""
    pairs = zip(found, frames, strict=True)
    off = [math.nan if h is None else abs(wrap_angle(h.yaw - f.truth.heading)) for h, f in pairs]
    return np.degrees(off)


def path_of(frames: list[Frame], rate: float = 1.0) -> tuple[np.ndarray, ...]:
    """What :func:`headings_of_drive` takes; yaw rates are ``rate`` times the measured ones."""
    samples = [one for f in frames for one in velocities(f)]
    yaw, place, yaws, places = 0.0, 0j, [], []
    stamps = {START + f.stamp_ns for f in frames}
    for before, after in pairwise([samples[0], *samples]):
        seconds = (after.stamp_ns - before.stamp_ns) / NS
        turn = rate * seconds * (before.yaw_rate + after.yaw_rate) / 2
        place += seconds * (before.forward + after.forward) / 2 * cmath.rect(1.0, yaw + turn / 2)
        yaw += turn
        if after.stamp_ns in stamps:
            yaws.append(yaw)
            places.append(place)
    plane = LocalProjection(frames[0].fix.lat, frames[0].fix.lon)
    fixes = np.array([complex(*plane.forward(f.fix.lat, f.fix.lon)) for f in frames])
    sigma = np.array([math.sqrt(f.fix.covariance[0, 0]) for f in frames])
    return np.array(yaws), np.array(places), fixes, sigma, np.arange(len(frames), dtype=float)


def test_headings_of_an_ordinary_drive(frames: list[Frame]) -> None:
    vehicle = Vehicle()
    found = [vehicle.take(velocities(f), fix_of(f)) for f in frames]
    off = errors_deg(frames, found)
    first = int(np.isfinite(off).argmax())
    assert found[0] is None and first < 30
    assert np.isfinite(off[first:]).all()
    assert np.nanmean(off) < 3.0 and np.nanquantile(off, 0.95) < 8.0
    sigmas = [o / math.degrees(h.std) for o, h in zip(off, found, strict=True) if h is not None]
    assert 0.3 < np.sqrt(np.mean(np.square(sigmas))) < 1.5


def test_steps_after_a_place_count_as_well(frames: list[Frame]) -> None:
    """A recorded drive has headings from its first pair on, better ones than on the way."""
    vehicle = Vehicle()
    live = errors_deg(frames, [vehicle.take(velocities(f), fix_of(f)) for f in frames])
    given = path_of(frames)
    heading, std = headings_of_drive(*given)
    off = np.degrees([abs(wrap_angle(h - f.truth.heading)) for h, f in zip(heading, frames, strict=True)])
    assert std.max() < MAX_STD and np.quantile(off, 0.95) < 6.0
    assert off.mean() < np.nanmean(live)
    unknown = headings_of_drive(*given[:3], np.full(SECONDS, math.nan), given[4])[0]
    assert np.degrees(np.abs(np.angle(np.exp(1j * (unknown - heading))))).mean() < 3.0


def test_a_vehicle_that_stands_has_no_heading(frames: list[Frame]) -> None:
    vehicle, frame = Vehicle(), frames[0]
    for second in range(60):
        at = START + second * NS
        fix = replace(fix_of(frame), stamp_ns=at)
        assert vehicle.take([VelocitySample(at, 0.0, 0.0, 0.0)], fix) is None
    assert vehicle.course.doubt == "drive some tens of metres with fixes"


@pytest.mark.parametrize("rate", [0.0, 0.5, -1.0])
def test_wrong_yaw_rates_are_said(frames: list[Frame], rate: float) -> None:
    """They give headings for a moment at most, on a straight road."""
    vehicle, found, doubts = Vehicle(), [], set()
    for frame in frames:
        samples = [replace(v, yaw_rate=rate * v.yaw_rate) for v in velocities(frame)]
        found.append(vehicle.take(samples, fix_of(frame)))
        doubts.add(vehicle.course.doubt)
    assert np.mean(errors_deg(frames, found) > 20.0) < 0.1
    assert any("turns contradict the course" in doubt for doubt in doubts)
    columns = path_of(frames, rate)
    heading, std = headings_of_drive(*columns)
    off = np.abs([wrap_angle(h - f.truth.heading) for h, f in zip(heading, frames, strict=True)])
    assert np.mean((std <= MAX_STD) & (np.degrees(off) > 20.0)) < 0.1


def test_a_slip_of_odometry_hides_the_headings_around_it(frames: list[Frame]) -> None:
    yaw, place, *rest = path_of(frames)
    yaw[SECONDS // 2 :] += math.radians(60.0)
    place[SECONDS // 2 :] = place[SECONDS // 2] + cmath.rect(1.0, math.radians(60.0)) * (
        place[SECONDS // 2 :] - place[SECONDS // 2]
    )
    heading, std = headings_of_drive(yaw, place, *rest)
    off = np.abs([wrap_angle(h - f.truth.heading) for h, f in zip(heading, frames, strict=True)])
    used = std <= MAX_STD
    assert np.mean(used) > 0.4 and np.degrees(off[used]).max() < 20.0


def test_a_vehicle_that_stands_tells_the_gyroscopes_error(frames: list[Frame]) -> None:
    """Of 40 degrees a minute, as cheap ones have."""
    bias, off = math.radians(40.0) / 60.0, {}
    for stops in (False, True):
        vehicle, found = Vehicle(), []
        if stops:
            for second in range(-20, 0):
                at = START + second * NS
                samples = [VelocitySample(at + k * NS // 10, 0.0, 0.0, bias) for k in range(10)]
                vehicle.take(samples, replace(fix_of(frames[0]), stamp_ns=at))
        for frame in frames:
            samples = [replace(v, yaw_rate=v.yaw_rate + bias) for v in velocities(frame)]
            found.append(vehicle.take(samples, fix_of(frame)))
        off[stops] = errors_deg(frames, found)
    assert np.nanmean(off[True]) < 3.0 < 8.0 < np.nanmean(off[False])
    assert np.isfinite(off[True]).mean() > 0.8


def test_a_vehicle_that_reverses_looks_backwards(frames: list[Frame]) -> None:
    vehicle = Vehicle()
    found = [vehicle.take((replace(v, forward=-v.forward) for v in velocities(f)), fix_of(f)) for f in frames]
    pairs = [(h, f) for h, f in zip(found, frames, strict=True) if h is not None]
    off = [abs(wrap_angle(h.yaw - f.truth.heading - math.pi)) for h, f in pairs]
    assert len(off) > SECONDS / 2 and np.degrees(np.mean(off)) < 3.0


def test_fixes_that_jump_change_little(frames: list[Frame]) -> None:
    vehicle, found = Vehicle(), []
    for second, frame in enumerate(frames):
        fix = fix_of(frame)
        if second % 40 >= 30:
            lat, lon = moved(fix.lat, fix.lon, (60.0, 0.0), second // 40)
            fix = replace(fix, lat=lat, lon=lon)
        found.append(vehicle.take(velocities(frame), fix))
    assert np.nanmean(errors_deg(frames, found)) < 4.0


def test_an_antenna_off_the_origin_swings(frames: list[Frame]) -> None:
    antenna = (-4.0, 1.0)
    vehicle = Vehicle()
    found = [vehicle.take(velocities(f), fix_of(f, antenna), antenna) for f in frames]
    assert np.nanmean(errors_deg(frames, found)) < 3.0


def test_a_gap_in_odometry_begins_anew(frames: list[Frame]) -> None:
    vehicle = Vehicle()
    for frame in frames[:60]:
        known = vehicle.take(velocities(frame), fix_of(frame))
    assert known is not None
    found = [vehicle.take(velocities(f), fix_of(f)) for f in frames[63:]]
    assert found[0] is None and found[-1] is not None
    assert np.nanmean(errors_deg(frames[63:], found)) < 4.0
    # A recording that is played again.
    again = [vehicle.take(velocities(f), fix_of(f)) for f in frames[:60]]
    assert again[1] is None and again[-1] is not None


def test_places_by_images_keep_the_heading_without_fixes(frames: list[Frame]) -> None:
    """The gyroscope drifts by five degrees a minute; images are two metres off, a tenth of them wrong."""
    rng, off = np.random.default_rng(0), {}
    for by_images in (False, True):
        vehicle, found = Vehicle(), []
        for second, frame in enumerate(frames):
            samples = [replace(v, yaw_rate=v.yaw_rate + math.radians(5.0) / 60.0) for v in velocities(frame)]
            found.append(vehicle.take(samples, fix_of(frame) if second < 60 else None))
            if by_images:
                ahead, left = rng.normal(0.0, 30.0 if rng.random() < 0.1 else 2.0, 2)
                lat, lon = moved(frame.truth.lat, frame.truth.lon, (float(ahead), float(left)), 0.0)
                covariance = np.diag([4.0, 4.0, 1.0])
                vehicle.course.add_estimate(GnssFix(START + frame.stamp_ns, lat, lon, 0.0, covariance))
        off[by_images] = errors_deg(frames, found)[-30:]
    assert np.nanmean(off[False]) > 12.0
    assert np.isfinite(off[True]).all() and off[True].mean() < 8.0
