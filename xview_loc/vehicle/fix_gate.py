"""The gate for GNSS fixes that jump. Free of ROS."""

from __future__ import annotations

import math

import numpy as np

from xview_loc.geodesy import LocalProjection
from xview_loc.vehicle.synchronisation import NS, TOP_SPEED, GnssFix, RejectedInput

# What fixes that agree with each other may be apart, beyond driving.
AGREEING_M = 40.0
# Fixes that jumped are believed once they have agreed with each other for this long.
SETTLED_S = 10.0


class AgreeingFixes:
    """Measures how long the latest fixes have agreed with each other. Not thread-safe."""

    def __init__(self) -> None:
        self._gate = JumpGate(AGREEING_M)
        self._first_ns: int | None = None
        self.seconds = 0.0

    def add(self, fix: GnssFix) -> None:
        """Take a fix, later than the last one."""
        try:
            self._gate.admit(fix)
        except RejectedInput:
            # Nobody knows which of them is right.
            self._gate.clear()
            self._gate.admit(fix)
            self._first_ns = None
        if self._first_ns is None:
            self._first_ns = fix.stamp_ns
        self.seconds = (fix.stamp_ns - self._first_ns) / NS

    def clear(self) -> None:
        """Forget all fixes."""
        self._gate.clear()
        self._first_ns, self.seconds = None, 0.0


class JumpGate:
    """Refuses fixes in places that no vehicle can have reached since the last good fix.

    Beyond what ``TOP_SPEED`` explains, a fix may lie ``max_jump_m`` from the one before, or three standard
    deviations of the worse of the two if that is more; 0 lets every fix pass. Fixes alone cannot tell which
    of two places is right: those that agree with each other for ``SETTLED_S`` pass, however far they jumped.
    """

    def __init__(self, max_jump_m: float) -> None:
        self.max_jump_m = max_jump_m
        self._good: GnssFix | None = None
        # The first and the last of the refused fixes that agree with each other, and how far they jumped.
        self._first: GnssFix | None = None
        self._last: GnssFix | None = None
        self._jump_m = 0.0

    def admit(self, fix: GnssFix) -> float:
        """Let a fix pass; return the metres jumped if it is the first believed in a new place, else 0.

        Raises RejectedInput ("fix_jump") if the fix must not be used.
        """
        jumped_m = 0.0
        if self.max_jump_m > 0.0 and self._good is not None:
            jumped_m = self._jumped(self._good, fix)
        self._good, self._first, self._last = fix, None, None
        return jumped_m

    def clear(self) -> None:
        """Forget all fixes."""
        self._good = self._first = self._last = None

    def _jumped(self, good: GnssFix, fix: GnssFix) -> float:
        place = LocalProjection(good.lat, good.lon)
        here = np.array(place.forward(fix.lat, fix.lon))
        jump, since_ns, agrees = math.hypot(*here), fix.stamp_ns - good.stamp_ns, False
        if self._first is not None and self._last is not None:
            first, last = (np.array(place.forward(f.lat, f.lon)) for f in (self._first, self._last))
            step, step_ns = math.dist(here, last), fix.stamp_ns - self._last.stamp_ns
            # To see whether the fix is back at the good place, subtract what the refused fixes drove.
            jump, since_ns = (
                math.dist(here, last - first),
                since_ns - (self._last.stamp_ns - self._first.stamp_ns),
            )
            agrees = step <= jump and self._drivable(step, self._last, fix, step_ns)
        if not agrees:
            if self._drivable(jump, good, fix, since_ns):
                return 0.0
            self._first, self._jump_m = fix, jump
        assert self._first is not None  # the fix, or one that it agrees with
        self._last = fix
        if fix.stamp_ns - self._first.stamp_ns >= SETTLED_S * NS:
            return self._jump_m
        raise RejectedInput(
            "fix_jump",
            f"fixes jumped {self._jump_m:.0f} m, further than a vehicle drives; they are believed once they "
            f"agree for {SETTLED_S:g} s",
        )

    def _drivable(self, distance: float, before: GnssFix, fix: GnssFix, since_ns: int) -> bool:
        allowed = max(self.max_jump_m, 3.0 * before.sigma, 3.0 * fix.sigma)
        return distance <= allowed + TOP_SPEED * since_ns / NS
