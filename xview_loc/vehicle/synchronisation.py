"""Fixes and headings at an image's stamp. Free of ROS.

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

from xview_loc.geodesy import wrap_angle, wrap_longitude

NS = 1_000_000_000
# A stamp this far before the last one means that time started again (a bag that loops), not jitter.
RESTART_NS = NS // 2
# Samples kept of each input.
_KEEP = 512
# Speed that no vehicle on a road exceeds, m/s.
TOP_SPEED = 50.0
# Rate at which no vehicle turns, rad/s: a small robot on the spot.
TOP_YAW_RATE = 6.0


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
        self.max_age_s = max_age_s
        self._samples: deque[S] = deque(maxlen=_KEEP)

    @property
    def max_age_s(self) -> float:
        """The limit, which may be changed."""
        return self._max_age_ns / NS

    @max_age_s.setter
    def max_age_s(self, value: float) -> None:
        self._max_age_ns = round(value * NS)

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
                f"the nearest {name} is {gap:.2f} s from the image (limit {self.max_age_s:g} s)",
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
