"""Compares headings with the course of the fixes. Free of ROS."""

from __future__ import annotations

import cmath
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import NS, TOP_SPEED, GnssFix, HeadingSample

# A leg is driven between two fixes at least so far apart, and so many sigma of either (sigma of fixes without
# covariance), within this time and, without odometry, at this speed.
_LEG_M, _LEG_SIGMAS, _UNKNOWN_SIGMA_M, _LEG_NS, _LEG_SPEED = 12.0, 2.0, 15.0, 20 * NS, 2.0
# Change of heading within a leg that makes it a curve, whose course is not the heading.
_CURVE = math.radians(35.0)
# Odometry's way forward at least, and its way at most, as shares of the leg; else it reverses or the fix
# jumped.
_LEAST_FORWARD, _MOST_DRIVEN = 0.7, 1.5
# Legs and metres needed for a verdict; legs that it rests on; legs that tell an offset.
_LEAST_LEGS, _LEAST_M, _LEGS, _RECENT_LEGS = 5, 60.0, 20, 6
# Difference of heading and course that is a fault, that is none any more, and that needs no explanation.
_FAULT, _RIGHT, _ERRATIC = math.radians(20.0), math.radians(15.0), math.radians(45.0)
# Mean deviations below which a heading counts as constant, and an offset.
_CONSTANT, _CONSTANT_OFFSET = math.radians(8.0), math.radians(25.0)
# Offset from the headings of odometry and fixes that is too large, and one that legs tell. Way over which it
# is averaged, so that a slip of odometry is no fault. Shares of the way that make a fault, and end it.
_OFFSET, _LEGS_TELL = math.radians(10.0), math.radians(22.0)
_OFFSET_M, _OFTEN, _SELDOM = 100.0, 0.8, 0.3
# Distance over which one plane serves.
_PLANE_M = 5000.0


@dataclass(frozen=True)
class HeadingFault:
    """What is wrong with the headings.

    cause: "offset", "sign" (counted the wrong way round), "constant" (the heading does not change while the
    course does), "erratic", or "small offset" (from the heading of odometry and fixes). angle: radians; of an
    offset, heading minus course, else the mean difference.
    sure: False if the other causes fit the offset as well, as the course has not changed enough.
    """

    cause: str
    angle: float
    sure: bool = True

    def __str__(self) -> str:
        degrees = math.degrees(self.angle)
        if self.cause == "small offset":
            return (
                f"heading is {degrees:+.0f} deg off that of odometry and fixes: the sensor is mounted "
                "turned, or declination (heading_offset_deg), or odometry's yaw rates are wrong"
            )
        if self.cause == "offset":
            unsure = "" if self.sure else "; or a constant value, or the wrong sign: turns will tell"
            return (
                f"heading is {degrees:+.0f} deg off the course of the fixes: the sensor is mounted turned, "
                f"or declination (heading_offset_deg){unsure}"
            )
        cause = {
            "sign": "it turns the wrong way round (heading_clockwise)",
            "constant": "it does not change in turns (no magnetometer, or stuck)",
            "erratic": "it is not constant, nor is its difference or its sum with the course",
        }[self.cause]
        return f"heading differs from the course of the fixes by {degrees:.0f} deg: {cause}"


class _Place(NamedTuple):
    fix: GnssFix
    at: complex  # metres, east + i north


class _Leg(NamedTuple):
    heading: float
    course: float
    length: float


class HeadingCheck:
    """Judges headings on the last straight legs that the vehicle drove, each longer than the fixes' noise.

    Legs on which odometry reverses or contradicts the fixes do not count. Not thread-safe.
    """

    def __init__(self, odometry: Odometry) -> None:
        self.fault: HeadingFault | None = None
        self._odometry = odometry
        self._headings: deque[HeadingSample] = deque()
        self._places: deque[_Place] = deque()
        self._plane: LocalProjection | None = None
        # Legs that may wait for headings.
        self._driven: deque[tuple[_Place, _Place]] = deque(maxlen=_LEGS)
        self._legs: deque[_Leg] = deque(maxlen=_LEGS)

    def add_heading(self, heading: HeadingSample) -> None:
        """Take a heading, later than the last one; :attr:`fault` may change with it."""
        self._headings.append(heading)
        while self._headings[0].stamp_ns < heading.stamp_ns - 2 * _LEG_NS:
            self._headings.popleft()
        self._take_legs()

    def add_fix(self, fix: GnssFix) -> None:
        """Take a fix, later than the last one; :attr:`fault` may change with it."""
        here = self._place(fix)
        while self._places and self._places[0].fix.stamp_ns < fix.stamp_ns - _LEG_NS:
            self._places.popleft()
        start = next((place for place in reversed(self._places) if _apart(place, here)), None)
        if start is not None:
            self._places.clear()
            self._driven.append((start, here))
        self._places.append(here)
        self._take_legs()

    def _take_legs(self) -> None:
        """Judge the legs whose headings are all here."""
        newest_ns = self._headings[-1].stamp_ns if self._headings else 0
        while self._driven and self._driven[0][1].fix.stamp_ns <= newest_ns:
            leg = self._leg(*self._driven.popleft())
            if leg is not None:
                self._legs.append(leg)
                self._judge()

    def _place(self, fix: GnssFix) -> _Place:
        east, north = (0.0, 0.0) if self._plane is None else self._plane.forward(fix.lat, fix.lon)
        if self._plane is None or math.hypot(east, north) > _PLANE_M:
            self._plane, east, north = LocalProjection(fix.lat, fix.lon), 0.0, 0.0
            self._places.clear()
        return _Place(fix, complex(east, north))

    def _leg(self, start: _Place, end: _Place) -> _Leg | None:
        first_ns, last_ns = start.fix.stamp_ns, end.fix.stamp_ns
        step = end.at - start.at
        motion = self._odometry.between(first_ns, last_ns)
        if motion is None:
            if not _LEG_SPEED <= abs(step) * NS / (last_ns - first_ns) <= TOP_SPEED:
                return None
        elif motion.forward < _LEAST_FORWARD * abs(step) or motion.length > _MOST_DRIVEN * abs(step):
            return None
        yaws = [h.yaw for h in self._headings if first_ns <= h.stamp_ns <= last_ns]
        if not yaws:
            return None
        mean = _mean(np.array(yaws))
        if max(abs(wrap_angle(yaw - mean)) for yaw in yaws) > _CURVE:
            return None
        return _Leg(mean, cmath.phase(step), abs(step))

    def _judge(self) -> None:
        heading, course, length = np.array(self._legs).T
        if len(heading) < _LEAST_LEGS or length.sum() < _LEAST_M:
            return
        offset, total = heading - course, heading + course
        angle = _mean_size(offset)
        # What is constant explains the difference; on a straight road all three are.
        constant, sign = _deviation(heading) < _CONSTANT, _deviation(total) < _deviation(offset) / 2.0
        if angle > _FAULT and _deviation(offset) > _FAULT and (constant or sign):
            self.fault = HeadingFault("constant" if constant else "sign", angle)
            return
        recent = offset[-_RECENT_LEGS:]
        mean, angle = _mean(recent), _mean_size(recent)
        if abs(mean) > _FAULT and _deviation(recent) < _CONSTANT_OFFSET:
            sure = not constant and _deviation(total) > 2.0 * _deviation(offset)
            self.fault = HeadingFault("offset", mean, sure)
        elif angle > _ERRATIC:
            self.fault = HeadingFault("erratic", angle)
        elif angle < _RIGHT:
            self.fault = None


class OffsetCheck:
    """Compares headings with those of odometry and fixes, which tell smaller offsets than legs do.

    Larger offsets that legs do not tell are rather odometry's.
    """

    def __init__(self) -> None:
        self.fault: HeadingFault | None = None
        # Averages over the way: the offset, and the share of the way on which it is too large.
        self._offset, self._large = 0j, 0.0

    def add(self, heading: HeadingSample, reckoned: HeadingSample, driven_m: float) -> None:
        """Take both headings after a way driven; :attr:`fault` may change with it."""
        share = min(1.0, driven_m / _OFFSET_M)
        offset = wrap_angle(heading.yaw - reckoned.yaw)
        least = max(_OFFSET, 3.0 * reckoned.std, 2.0 * heading.std)
        self._offset += share * (cmath.rect(1.0, offset) - self._offset)
        self._large += share * ((least < abs(offset) < _LEGS_TELL) - self._large)
        if self._large > _OFTEN:
            self.fault = HeadingFault("small offset", cmath.phase(self._offset))
        elif self._large < _SELDOM:
            self.fault = None


def _apart(a: _Place, b: _Place) -> bool:
    sigma = max(a.fix.sigma or _UNKNOWN_SIGMA_M, b.fix.sigma or _UNKNOWN_SIGMA_M)
    return abs(b.at - a.at) >= max(_LEG_M, _LEG_SIGMAS * sigma)


def _mean(angles: NDArray[np.float64]) -> float:
    return cmath.phase(np.exp(1j * angles).mean())


def _mean_size(angles: NDArray[np.float64]) -> float:
    return float(np.abs(np.angle(np.exp(1j * angles))).mean())


def _deviation(angles: NDArray[np.float64]) -> float:
    return _mean_size(angles - _mean(angles))
