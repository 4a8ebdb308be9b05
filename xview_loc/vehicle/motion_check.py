"""Compares the motion of the fixes with that of the odometry. Free of ROS."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

from xview_loc.geodesy import LocalProjection
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import NS, GnssFix

# Distance between places that differ for certain: at least this, and this many sigma of the fixes.
_APART_M, _APART_SIGMAS = 15.0, 4.0
# What tells driving from a fix that jumps or wanders: so many steps from place to place, none longer than
# this, with the distance from end to end a share of their sum.
_STEPS, _LONGEST_NS, _STRAIGHT_SHARE = 3, 20 * NS, 0.7
# Share of the fixes' way below which the odometry stands still.
_STILL_SHARE = 0.1
# Way after which a fix cannot be exactly the same, and how often that is examined.
_SAME_FIX_M, _EXAMINE_NS = 100.0, NS
# Odometry and fixes are compared over this time; they contradict each other if their ways from end to end
# differ by this much, and so many sigma of either fix.
_COMPARED_NS, _APART_BOTH_M, _APART_BOTH_SIGMAS = 5 * NS, 40.0, 5.0


class MotionCheck:
    """Finds odometry that stands still while the fixes move, and a fix that does while the odometry moves.

    Also odometry and fixes that move far apart within seconds. ``odom_still``, ``fix_still`` and
    ``odom_disagrees`` say so in words, until the two agree again; "" for nothing. Not thread-safe.
    """

    def __init__(self, odometry: Odometry) -> None:
        self._odometry = odometry
        self._places: deque[GnssFix] = deque(maxlen=_STEPS + 1)
        self._same: GnssFix | None = None
        self._examined_ns = 0
        self._recent: deque[GnssFix] = deque()
        self.odom_still = self.fix_still = self.odom_disagrees = ""

    def add(self, fix: GnssFix) -> None:
        """Take a fix, later than the last one."""
        self._see_odometry(fix)
        self._see_fix(fix)
        self._compare(fix)

    def _compare(self, fix: GnssFix) -> None:
        recent = self._recent
        recent.append(fix)
        while fix.stamp_ns - recent[0].stamp_ns > _COMPARED_NS:
            recent.popleft()
        motion = self._odometry.between(recent[0].stamp_ns, fix.stamp_ns)
        if motion is None:
            return
        driven, moved = math.hypot(motion.forward, motion.left), _distance(recent[0], fix)
        sigma = max(recent[0].sigma, fix.sigma)
        apart = max(_APART_BOTH_M, _APART_BOTH_SIGMAS * sigma)
        if abs(driven - moved) > apart:
            seconds = (fix.stamp_ns - recent[0].stamp_ns) / NS
            self.odom_disagrees = (
                f"in {seconds:.0f} s odometry went {driven:.0f} m and the fixes {moved:.0f} m: "
                "one of them is wrong"
            )
        elif abs(driven - moved) < apart / 2.0 and fix.stamp_ns - recent[0].stamp_ns > _COMPARED_NS / 2:
            self.odom_disagrees = ""

    def _see_odometry(self, fix: GnssFix) -> None:
        places = self._places
        if not places or fix.stamp_ns - places[-1].stamp_ns > _LONGEST_NS:
            places.clear()
            places.append(fix)
        elif _distance(places[-1], fix) >= _apart(places[-1], fix):
            places.append(fix)
            moved = _distance(places[0], fix)
            way = sum(_distance(a, b) for a, b in pairwise(places))
            if len(places) <= _STEPS or moved < _STRAIGHT_SHARE * way:
                return
            motion = self._odometry.between(places[0].stamp_ns, fix.stamp_ns)
            if motion is None:
                return
            self.odom_still = ""
            if motion.length < _STILL_SHARE * moved:
                seconds = (fix.stamp_ns - places[0].stamp_ns) / NS
                self.odom_still = (
                    f"fixes moved {moved:.0f} m in {seconds:.0f} s, odometry {motion.length:.1f} m: it "
                    "does not measure this vehicle's motion"
                )

    def _see_fix(self, fix: GnssFix) -> None:
        same = self._same
        if same is None or (same.lat, same.lon) != (fix.lat, fix.lon):
            self._same, self.fix_still = fix, ""
        elif fix.stamp_ns - self._examined_ns >= _EXAMINE_NS:
            self._examined_ns = fix.stamp_ns
            motion = self._odometry.between(same.stamp_ns, fix.stamp_ns)
            if motion is not None and motion.length >= _SAME_FIX_M:
                self.fix_still = (
                    f"odometry moved {motion.length:.0f} m while the fix stayed exactly the same: the "
                    "receiver or its driver hangs"
                )


def _distance(a: GnssFix, b: GnssFix) -> float:
    return math.hypot(*LocalProjection(a.lat, a.lon).forward(b.lat, b.lon))


def _apart(a: GnssFix, b: GnssFix) -> float:
    return max(_APART_M, _APART_SIGMAS * a.sigma, _APART_SIGMAS * b.sigma)
