"""Fixes and headings at an image's stamp, and how long an image waits for them. No ROS in here.

All stamps are nanoseconds of the messages' own clock; waiting is measured on the caller's steady clock.
Nothing is thread safe: one thread (the executor's) owns these objects.
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
_KEEP = 512
# No vehicle on a road drives faster, in m/s.
TOP_SPEED = 50.0
# A place that fixes jumped to is believed once they have agreed on it for so long.
SETTLED_S = 10.0


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
        """The horizontal standard deviation along its larger axis in metres, 0 if unknown."""
        if self.covariance is None:
            return 0.0
        return math.sqrt(max(0.0, float(np.linalg.eigvalsh(self.covariance[:2, :2])[-1])))


@dataclass(frozen=True)
class HeadingSample:
    """ENU yaw of the vehicle's x axis from true north's east, and its standard deviation, in radians."""

    stamp_ns: int
    yaw: float
    std: float


class _Stamped(Protocol):
    @property
    def stamp_ns(self) -> int: ...


S = TypeVar("S", bound=_Stamped)
F = TypeVar("F")


class SyncError(Exception):
    """No usable sample for an image's stamp ("missing", "stale"), or a sample not to be used ("jump")."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def blend_fix(a: GnssFix, b: GnssFix, t: float) -> GnssFix:
    """The fix on the straight line from ``a`` (t = 0) to ``b`` (t = 1), across the antimeridian too."""
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
    """The heading on the shorter arc from ``a`` (t = 0) to ``b`` (t = 1)."""
    yaw = wrap_angle(a.yaw + t * wrap_angle(b.yaw - a.yaw))
    return HeadingSample(a.stamp_ns + round(t * (b.stamp_ns - a.stamp_ns)), yaw, max(a.std, b.std))


class History(Generic[S]):
    """The latest samples of one input, in the order of their stamps."""

    def __init__(self, name: str, blend: Callable[[S, S, float], S], max_age_s: float) -> None:
        """``max_age_s`` limits how far from an image a sample may be to be used."""
        self.name = name
        self._blend = blend
        self._max_age_ns = round(max_age_s * NS)
        self._samples: deque[S] = deque(maxlen=_KEEP)

    @property
    def last(self) -> S | None:
        """The newest sample."""
        return self._samples[-1] if self._samples else None

    def went_back(self, stamp_ns: int) -> bool:
        """Whether this stamp says that time started again."""
        return bool(self._samples) and stamp_ns < self._samples[-1].stamp_ns - RESTART_NS

    def takes(self, stamp_ns: int) -> bool:
        """Whether a sample of this stamp is newer than the last one."""
        return not self._samples or stamp_ns > self._samples[-1].stamp_ns

    def add(self, sample: S) -> bool:
        """Keep a sample; False where it is not newer than the last one."""
        if not self.takes(sample.stamp_ns):
            return False
        self._samples.append(sample)
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._samples.clear()

    def reaches(self, stamp_ns: int) -> bool:
        """Whether a sample at or after the stamp is here."""
        return bool(self._samples) and self._samples[-1].stamp_ns >= stamp_ns

    def at(self, stamp_ns: int) -> S:
        """The value at a stamp; SyncError where no sample is near enough.

        Between two near samples it is interpolated; after the last one it is extrapolated no further than
        the last two lie apart, and held from there, until the last one is too old.
        """
        if not self._samples:
            raise SyncError("missing", f"no usable {self.name} received")
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
            raise SyncError(
                "stale",
                f"the nearest {self.name} is {gap:.2f} s from the image (limit {self._max_age_ns / NS:g} s)",
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
    """Refuses fixes at places that no vehicle can have driven to since the last good fix.

    Beyond what ``TOP_SPEED`` explains, a fix may lie ``max_jump_m`` from the one before, or three standard
    deviations of the worse of the two where those are more; 0 lets every fix pass. Which of two places is
    right, fixes alone cannot tell: those that agree with each other for ``SETTLED_S`` pass, however far they
    jumped.
    """

    def __init__(self, max_jump_m: float) -> None:
        self._max_jump_m = max_jump_m
        self._good: GnssFix | None = None
        # Of the refused fixes that agree with each other: the first, how far it jumped, and the last.
        self._first: GnssFix | None = None
        self._last: GnssFix | None = None
        self._jump_m = 0.0

    def admit(self, fix: GnssFix) -> float:
        """Let a fix pass; the metres jumped where it is the first to be believed in a new place, else 0.

        Raises SyncError ("jump") where it must not be used.
        """
        jumped_m = 0.0
        if self._max_jump_m > 0.0 and self._good is not None:
            jumped_m = self._jumped(self._good, fix)
        self._good, self._first, self._last = fix, None, None
        return jumped_m

    def clear(self) -> None:
        """Forget everything."""
        self._good = self._first = self._last = None

    def _jumped(self, good: GnssFix, fix: GnssFix) -> float:
        place = LocalProjection(good.lat, good.lon)
        here = np.array(place.forward(fix.lat, fix.lon))
        jump, since_ns, agrees = math.hypot(*here), fix.stamp_ns - good.stamp_ns, False
        if self._first is not None and self._last is not None:
            first, last = (np.array(place.forward(f.lat, f.lon)) for f in (self._first, self._last))
            step, step_ns = math.dist(here, last), fix.stamp_ns - self._last.stamp_ns
            # Is it back? What was driven meanwhile, the refused fixes tell.
            jump, since_ns = (
                math.dist(here, last - first),
                since_ns - (self._last.stamp_ns - self._first.stamp_ns),
            )
            agrees = step <= jump and self._drivable(step, self._last, fix, step_ns)
        if not agrees:
            if self._drivable(jump, good, fix, since_ns):
                return 0.0
            self._first, self._jump_m = fix, jump
        return self._wait(fix)

    def _drivable(self, distance: float, before: GnssFix, fix: GnssFix, since_ns: int) -> bool:
        allowed = max(self._max_jump_m, 3.0 * before.sigma, 3.0 * fix.sigma)
        return distance <= allowed + TOP_SPEED * since_ns / NS

    def _wait(self, fix: GnssFix) -> float:
        """The jump in metres where fixes have agreed for long enough; raises SyncError until then."""
        assert self._first is not None
        self._last = fix
        if fix.stamp_ns - self._first.stamp_ns >= SETTLED_S * NS:
            return self._jump_m
        raise SyncError(
            "jump",
            f"fixes jumped {self._jump_m:.0f} m, further than a vehicle drives; they are believed once they "
            f"agree for {SETTLED_S:g} s",
        )


@dataclass(frozen=True)
class _Waiting(Generic[F]):
    frame: F
    stamp_ns: int
    arrived_ns: int


class WaitingRoom(Generic[F]):
    """Images that wait, for a bounded time, for samples later than they are."""

    def __init__(self, wait_s: float, capacity: int = 16) -> None:
        """``capacity`` bounds the memory: beyond it the oldest image leaves without waiting longer."""
        self._wait_ns = round(wait_s * NS)
        self._capacity = capacity
        self._waiting: deque[_Waiting[F]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, frame: F, stamp_ns: int, now_ns: int) -> None:
        """An image arrived at ``now_ns`` of the caller's steady clock."""
        self._waiting.append(_Waiting(frame, stamp_ns, now_ns))

    def clear(self) -> int:
        """Turn everyone away; how many there were."""
        count = len(self._waiting)
        self._waiting.clear()
        return count

    def ready(self, complete: Callable[[int], bool], now_ns: int) -> list[F]:
        """Take out, oldest first, the images whose samples are ``complete`` or that waited long enough."""
        out: list[F] = []
        while self._waiting:
            first = self._waiting[0]
            late = now_ns - first.arrived_ns >= self._wait_ns or len(self._waiting) > self._capacity
            if not late and not complete(first.stamp_ns):
                break
            out.append(first.frame)
            self._waiting.popleft()
        return out
