"""Which images of a drive are worth keeping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xview_loc.geodesy import LocalProjection, wrap_angle

# Slower than this by its odometry, a vehicle stands.
STANDING_SPEED = 0.3
# Without odometry, a fix that moved less than this may be noise.
STANDING_M = 1.0
# A speed further from an image says nothing about it.
SPEED_AGE_NS = 1_000_000_000


@dataclass(frozen=True)
class KeyframeRule:
    """A keyframe is due after any of these since the last one, while the vehicle moves; 0 switches one off.

    distance_m: metres driven. interval_s: seconds. turn: change of heading in radians.
    """

    distance_m: float = 2.0
    interval_s: float = 0.0
    turn: float = math.radians(15.0)


@dataclass(frozen=True)
class _Keyframe:
    stamp_ns: int
    place: LocalProjection
    yaw: float | None


class WheelSpeed:
    """The latest speed of the wheels, for as long as it says anything."""

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None

    def saw(self, stamp_ns: int, speed: float) -> None:
        """Odometry was received; ``speed`` in m/s, left out where it is not finite."""
        if math.isfinite(speed):
            self._seen = (stamp_ns, speed)

    def at(self, stamp_ns: int) -> float | None:
        """The speed in m/s at a stamp, None where none was seen near it."""
        if self._seen is None or abs(stamp_ns - self._seen[0]) > SPEED_AGE_NS:
            return None
        return self._seen[1]


class Keyframes:
    """Picks keyframes out of frames shown in the order of their stamps.

    Distance and standing come from the wheels' speed where it is known: GNSS fixes of a vehicle that stands
    wander by more than the distance between keyframes. Without it they come from the fixes.
    """

    def __init__(self, rule: KeyframeRule) -> None:
        self._rule = rule
        self._last: _Keyframe | None = None
        self._seen_ns: int | None = None
        self._driven = 0.0

    def wants(
        self, stamp_ns: int, lat: float, lon: float, yaw: float | None = None, speed: float | None = None
    ) -> bool:
        """Whether this frame is a keyframe, which it then counts as.

        lat, lon: degrees; yaw: radians, None if unknown; speed: of the wheels in m/s, None if unknown.
        """
        if self._seen_ns is not None and speed is not None:
            self._driven += abs(speed) * (stamp_ns - self._seen_ns) / 1e9
        self._seen_ns = stamp_ns
        if self._last is not None and not self._due(self._last, stamp_ns, lat, lon, yaw, speed):
            return False
        self._last = _Keyframe(stamp_ns, LocalProjection(lat, lon), yaw)
        self._driven = 0.0
        return True

    def _due(
        self, last: _Keyframe, stamp_ns: int, lat: float, lon: float, yaw: float | None, speed: float | None
    ) -> bool:
        if stamp_ns < last.stamp_ns:
            return True  # time started again
        if speed is not None:
            driven, moves = self._driven, abs(speed) >= STANDING_SPEED
        else:
            driven = math.hypot(*last.place.forward(lat, lon))
            moves = driven >= STANDING_M
        rule = self._rule
        turned = 0.0 if yaw is None or last.yaw is None else abs(wrap_angle(yaw - last.yaw))
        return moves and (
            0.0 < rule.distance_m <= driven
            or 0.0 < rule.interval_s <= (stamp_ns - last.stamp_ns) / 1e9
            or 0.0 < rule.turn <= turned
        )
