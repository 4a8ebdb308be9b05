"""Fixes and headings at an image's stamp, and the gate for fixes that jump. Free of ROS.

Stamps are nanoseconds of the messages' own clock. Nothing here is thread-safe.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection, wrap_angle, wrap_longitude

NS = 1_000_000_000
# A stamp this far before the last one means that time started again (a bag that loops), not jitter.
RESTART_NS = NS // 2
# Samples kept of each input.
_KEEP = 512
# Speed that no vehicle on a road exceeds, m/s.
TOP_SPEED = 50.0
# Fixes that jumped are believed once they have agreed with each other for this long.
SETTLED_S = 10.0


class RejectedInput(Exception):  # noqa: N818 - it names what happened to the message
    """A message that must not be used; ``reason`` is a short key for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StampNotNewerError(RejectedInput):
    """A message whose stamp is not after the last one of its input."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}_stamp_not_newer", f"the {name}'s stamp is not after the last one's")


@dataclass(frozen=True)
class GnssFix:
    """A position in WGS-84 degrees; altitude in metres; 3x3 ENU covariance in m^2, None if unknown."""

    stamp_ns: int
    lat: float
    lon: float
    altitude: float
    covariance: NDArray[np.float64] | None

    @property
    def sigma(self) -> float:
        """Horizontal standard deviation along the larger axis in metres, 0 if unknown."""
        if self.covariance is None:
            return 0.0
        return math.sqrt(max(0.0, float(np.linalg.eigvalsh(self.covariance[:2, :2])[-1])))


@dataclass(frozen=True)
class HeadingSample:
    """True-north ENU yaw of the vehicle's x axis and its standard deviation, radians."""

    stamp_ns: int
    yaw: float
    std: float


class Stamped(Protocol):
    """Anything with a stamp in nanoseconds."""

    @property
    def stamp_ns(self) -> int: ...  # noqa: D102


S = TypeVar("S", bound=Stamped)


def blend_fix(a: GnssFix, b: GnssFix, t: float) -> GnssFix:
    """Interpolate from ``a`` (t = 0) to ``b`` (t = 1) on a straight line, across the antimeridian too."""
    lon = wrap_longitude(a.lon + t * wrap_longitude(b.lon - a.lon))
    nearer = a if t < 0.5 else b
    return GnssFix(
        a.stamp_ns + round(t * (b.stamp_ns - a.stamp_ns)),
        a.lat + t * (b.lat - a.lat),
        lon,
        a.altitude + t * (b.altitude - a.altitude),
        nearer.covariance,
    )


def blend_heading(a: HeadingSample, b: HeadingSample, t: float) -> HeadingSample:
    """Interpolate from ``a`` (t = 0) to ``b`` (t = 1) along the shorter arc."""
    yaw = wrap_angle(a.yaw + t * wrap_angle(b.yaw - a.yaw))
    return HeadingSample(a.stamp_ns + round(t * (b.stamp_ns - a.stamp_ns)), yaw, max(a.std, b.std))


class History(Generic[S]):
    """The latest samples of one input, in the order of their stamps."""

    def __init__(self, name: str, blend: Callable[[S, S, float], S], max_age_s: float) -> None:
        """``max_age_s``: how far from an image a sample may be and still be used."""
        self._name = name
        self._blend = blend
        self._max_age_ns = round(max_age_s * NS)
        self._samples: deque[S] = deque(maxlen=_KEEP)

    def went_back(self, stamp_ns: int) -> bool:
        """Return True if a sample of this stamp means that time started again."""
        return bool(self._samples) and stamp_ns < self._samples[-1].stamp_ns - RESTART_NS

    def check_newer(self, stamp_ns: int) -> None:
        """Raise StampNotNewerError unless the stamp is after the last sample's."""
        if self.reaches(stamp_ns):
            raise StampNotNewerError(self._name)

    def add(self, sample: S) -> None:
        """Keep a sample. Raises StampNotNewerError."""
        self.check_newer(sample.stamp_ns)
        self._samples.append(sample)

    def clear(self) -> None:
        """Forget all samples."""
        self._samples.clear()

    def reaches(self, stamp_ns: int) -> bool:
        """Return True if there is a sample at or after the stamp."""
        return bool(self._samples) and self._samples[-1].stamp_ns >= stamp_ns

    def at(self, stamp_ns: int) -> S:
        """Return the value at a stamp: interpolated between samples, extrapolated after the last.

        The extrapolation ends as far after the last sample as the one before lies before it; from there the
        value is held until the last sample is too old. Raises RejectedInput ("<name>_missing",
        "<name>_stale") if no sample is near enough.
        """
        name = self._name
        if not self._samples:
            raise RejectedInput(f"{name}_missing", f"no usable {name} received")
        after: S | None = None
        before: S | None = None
        earlier: S | None = None
        for sample in reversed(self._samples):
            if sample.stamp_ns >= stamp_ns:
                after = sample
            elif before is None:
                before = sample
            else:
                earlier = sample
                break
        usable = [s for s in (before, after) if s and abs(s.stamp_ns - stamp_ns) <= self._max_age_ns]
        if not usable:
            gap = min(abs(s.stamp_ns - stamp_ns) for s in (before, after) if s) / NS
            raise RejectedInput(
                f"{name}_stale",
                f"the nearest {name} is {gap:.2f} s from the image (limit {self._max_age_ns / NS:g} s)",
            )
        if len(usable) == 2:
            return self._along(usable[0], usable[1], stamp_ns)
        if before is not None and before is usable[0] and earlier is not None:
            spacing = before.stamp_ns - earlier.stamp_ns
            if spacing <= self._max_age_ns:
                return self._along(earlier, before, min(stamp_ns, before.stamp_ns + spacing))
        return usable[0]

    def _along(self, a: S, b: S, stamp_ns: int) -> S:
        return self._blend(a, b, (stamp_ns - a.stamp_ns) / (b.stamp_ns - a.stamp_ns))


class JumpGate:
    """Refuses fixes in places that no vehicle can have reached since the last good fix.

    Beyond what ``TOP_SPEED`` explains, a fix may lie ``max_jump_m`` from the one before, or three standard
    deviations of the worse of the two if that is more; 0 lets every fix pass. Fixes alone cannot tell which
    of two places is right: those that agree with each other for ``SETTLED_S`` pass, however far they jumped.
    """

    def __init__(self, max_jump_m: float) -> None:
        self._max_jump_m = max_jump_m
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
        if self._max_jump_m > 0.0 and self._good is not None:
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
        allowed = max(self._max_jump_m, 3.0 * before.sigma, 3.0 * fix.sigma)
        return distance <= allowed + TOP_SPEED * since_ns / NS
