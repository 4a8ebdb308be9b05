"""Picks the images of a drive that are worth keeping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.vehicle.odometry import VelocitySample

# Speed below which a vehicle counts as standing, m/s.
STANDING_SPEED = 0.3
# Motion of a fix that may be noise, metres; decides without odometry.
STANDING_M = 1.0
# How far from an image a speed may have been measured.
SPEED_AGE_NS = 1_000_000_000


@dataclass(frozen=True)
class KeyframeRule:
    """When a keyframe is due: after any of these since the last one, while the vehicle moves; 0 disables one.

    distance_m: metres driven. interval_s: seconds. turn: change of heading, radians.
    """

    distance_m: float = 2.0
    interval_s: float = 0.0
    turn: float = math.radians(15.0)


@dataclass(frozen=True)
class _Keyframe:
    stamp_ns: int
    place: LocalProjection
    yaw: float | None


class WheelMotion:
    """The latest speed of the wheels, and the sum of their turns."""

    def __init__(self) -> None:
        self._latest: tuple[int, float] | None = None
        # Radians, from any start.
        self.yaw = 0.0

    def add(self, velocity: VelocitySample) -> None:
        """Keep the speed of a velocity, and turn by its yaw rate since the one before."""
        if self._latest is not None and 0 < velocity.stamp_ns - self._latest[0] <= SPEED_AGE_NS:
            self.yaw += velocity.yaw_rate * (velocity.stamp_ns - self._latest[0]) / 1e9
        self._latest = (velocity.stamp_ns, math.hypot(velocity.forward, velocity.left))

    def at(self, stamp_ns: int) -> float | None:
        """Return the speed in m/s at a stamp, None if none was measured near it."""
        if self._latest is None or abs(stamp_ns - self._latest[0]) > SPEED_AGE_NS:
            return None
        return self._latest[1]


class Keyframes:
    """Picks keyframes from frames in the order of their stamps.

    Distance and standstill come from the wheels' speed if it is known, as the fixes of a standing vehicle
    wander by more than the distance between keyframes; else from the fixes. ``rule`` may be changed.
    """

    def __init__(self, rule: KeyframeRule) -> None:
        self.rule = rule
        self._last: _Keyframe | None = None
        self._seen_ns: int | None = None
        self._driven = 0.0

    def wants(
        self, stamp_ns: int, lat: float, lon: float, yaw: float | None = None, speed: float | None = None
    ) -> bool:
        """Return True if this frame is a keyframe; the next one is measured from it.

        lat, lon: degrees. yaw: radians, from any direction; None if unknown. speed: of the wheels, m/s, None
        if unknown.
        """
        if self._seen_ns is not None and speed is not None:
            self._driven += abs(speed) * (stamp_ns - self._seen_ns) / 1e9
        self._seen_ns = stamp_ns
        last, rule = self._last, self.rule
        if last is not None and stamp_ns >= last.stamp_ns:  # else time started again
            if speed is not None:
                driven, moves = self._driven, abs(speed) >= STANDING_SPEED
            else:
                driven = math.hypot(*last.place.forward(lat, lon))
                moves = driven >= STANDING_M
            turned = 0.0 if yaw is None or last.yaw is None else abs(wrap_angle(yaw - last.yaw))
            due = (
                0.0 < rule.distance_m <= driven
                or 0.0 < rule.interval_s <= (stamp_ns - last.stamp_ns) / 1e9
                or 0.0 < rule.turn <= turned
            )
            if not (moves and due):
                return False
        self._last = _Keyframe(stamp_ns, LocalProjection(lat, lon), yaw)
        self._driven = 0.0
        return True
