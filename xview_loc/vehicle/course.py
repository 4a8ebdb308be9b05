"""Headings without a compass: odometry's turns, aligned with the course of the fixes. Free of ROS.

Odometry gives a path and a heading up to an unknown angle, which its drift changes slowly. The step between
two fixes is the path's step turned by this angle, plus normal errors. The angle then has a von Mises
distribution, whose parameters are one complex number, to which each step adds.
"""

from __future__ import annotations

import cmath
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.vehicle.mounting import Offset
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

# Correlation time of a receiver's errors, seconds, and the independent noise of each fix, metres.
FIX_CORRELATION_S = 30.0
_FIX_NOISE_M = 0.7
# Standard deviation of a fix that comes without one, metres.
_UNKNOWN_SIGMA_M = 15.0
# A step is this long, unless that takes longer than the time.
_STEP_M, _LONGEST_STEP_S = 10.0, 20.0
# Variance that odometry's drift adds to the angle, rad^2 / s.
_DRIFT = math.radians(0.3) ** 2
# Standard deviations beyond which the length of a step shows that the fix jumped.
_SIGMAS = 5.0
# Steps over which the misfit of odometry and fixes is averaged.
_MISFIT_STEPS = 10
# Standard deviation from which on a heading is of use: models bear errors of ten degrees.
MAX_STD = math.radians(8.0)


def fix_step_variance(sigma: Any, seconds: Any) -> Any:
    """Return the variance per axis of the step between two fixes, m^2, from their sigma, metres.

    The error of a fix is a slow random walk, so a step is more precise than a position.
    """
    return 2.0 * sigma**2 * np.minimum(seconds / FIX_CORRELATION_S, 1.0) + 2.0 * _FIX_NOISE_M**2


class Alignment:
    """The angle by which a reckoned path is turned to lie true to north; unknown at first.

    ``resultant`` has the angle's mean as its phase and the inverse of its variance as its length.
    """

    def __init__(self) -> None:
        self.resultant = 0j
        # Mean squared residual per axis over its variance, at least 1: how odometry and fixes fit.
        self.misfit = 1.0

    @property
    def std(self) -> float:
        """Standard deviation of the angle, radians; infinite if nothing is known."""
        concentration = abs(self.resultant)
        return math.sqrt(max(1.0, self.misfit) / concentration) if concentration > 0.0 else math.inf

    def drift(self, seconds: float) -> None:
        """Let odometry drift for a time."""
        self.resultant /= 1.0 + abs(self.resultant) * _DRIFT * seconds

    def add(self, reckoned: complex, seen: complex, variance: float) -> None:
        """Add a step of the path and the same step between fixes, metres; variance per axis, m^2.

        A step of another length than the path's is a jump of the fixes, and is left out.
        """
        if (abs(seen) - abs(reckoned)) ** 2 > _SIGMAS**2 * variance:
            return
        if self.resultant:
            direction = self.resultant / abs(self.resultant)
            squared = abs(seen - direction * reckoned) ** 2 / (
                2.0 * variance + abs(reckoned) ** 2 * self.std**2
            )
            self.misfit += (squared - self.misfit) / _MISFIT_STEPS
        self.resultant += reckoned.conjugate() * seen / variance


class _Place(NamedTuple):
    fix: GnssFix
    yaw: float  # in odometry's axes


class CourseHeadings:
    """Headings of a vehicle on the way, from its odometry and fixes as they come. Not thread-safe.

    Odometry must give yaw rates. ``odometry`` is what keeps the samples that :meth:`add_velocity` takes.
    """

    def __init__(self, odometry: Odometry) -> None:
        self._odometry = odometry
        # Fixes later than odometry, with the antenna's place on the vehicle.
        self._waiting: deque[tuple[GnssFix, Offset]] = deque(maxlen=100)
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._alignment = Alignment()
        self._waiting.clear()
        self._start: _Place | None = None
        # Heading in odometry's axes, and when.
        self._yaw, self._stamp_ns = 0.0, 0

    @property
    def std(self) -> float:
        """Standard deviation of headings now, radians; infinite before the vehicle moved."""
        return self._alignment.std

    def add_fix(self, fix: GnssFix, antenna: Offset = (0.0, 0.0)) -> None:
        """Take a fix; ``antenna`` is its place on the vehicle."""
        self._waiting.append((fix, antenna))

    def add_velocity(self, sample: VelocitySample) -> HeadingSample | None:
        """Take a sample that odometry keeps already; return the heading then, None while it is unknown."""
        while self._waiting and self._waiting[0][0].stamp_ns <= sample.stamp_ns:
            fix, antenna = self._waiting.popleft()
            self._turn(max(fix.stamp_ns, self._stamp_ns))
            self._take(fix, antenna)
        self._turn(sample.stamp_ns)
        if self.std > MAX_STD:
            return None
        yaw = wrap_angle(self._yaw + cmath.phase(self._alignment.resultant))
        return HeadingSample(sample.stamp_ns, yaw, self.std)

    def _turn(self, stamp_ns: int) -> None:
        """Go on to a stamp."""
        motion = self._odometry.between(self._stamp_ns, stamp_ns) if self._stamp_ns else None
        if motion is None:
            self._alignment, self._start = Alignment(), None
        else:
            self._yaw += motion.turn
            self._alignment.drift((stamp_ns - self._stamp_ns) / NS)
        self._stamp_ns = stamp_ns

    def _take(self, fix: GnssFix, antenna: Offset) -> None:
        since = self._odometry.between(fix.stamp_ns, self._stamp_ns)
        if since is None:
            return
        here, start = _Place(fix, self._yaw - since.turn), self._start
        seconds = 0.0 if start is None else (fix.stamp_ns - start.fix.stamp_ns) / NS
        if start is None or not 0.0 < seconds <= _LONGEST_STEP_S:
            self._start = here
            return
        motion = self._odometry.between(start.fix.stamp_ns, fix.stamp_ns)
        if motion is None:
            self._start = here
            return
        before, after = cmath.rect(1.0, start.yaw), cmath.rect(1.0, here.yaw)
        # The antenna swings about the vehicle's origin.
        reckoned = complex(motion.forward, motion.left) * before + complex(*antenna) * (after - before)
        if abs(reckoned) >= _STEP_M:
            seen = complex(*LocalProjection(start.fix.lat, start.fix.lon).forward(fix.lat, fix.lon))
            sigma = max(start.fix.sigma or _UNKNOWN_SIGMA_M, fix.sigma or _UNKNOWN_SIGMA_M)
            self._alignment.add(reckoned, seen, float(fix_step_variance(sigma, seconds)))
            self._start = here


def headings_of_drive(
    yaw: Array, path: Complex, fixes: Complex, sigma: Array, seconds: Array
) -> tuple[Array, Array]:
    """Return true-north headings (N,) along a recorded drive, and their standard deviations, radians.

    Steps before and after each place count. ``yaw`` and ``path`` are the vehicle's heading and the antenna's
    place by odometry, without gaps; ``fixes`` east + i north, ``sigma`` of these or NaN, metres.
    """
    count = len(yaw)
    known = np.where(np.isnan(sigma), _UNKNOWN_SIGMA_M, sigma)

    def pass_over(order: Iterable[int]) -> tuple[Complex, Array]:
        alignment, resultants, misfits = Alignment(), np.zeros(count, complex), np.ones(count)
        start = last = None
        for k in order:
            if start is None or last is None:
                start = last = k
                continue
            alignment.drift(abs(seconds[k] - seconds[last]))
            step_s, step = abs(seconds[k] - seconds[start]), path[k] - path[start]
            if abs(step) >= _STEP_M and step_s <= _LONGEST_STEP_S:
                variance = fix_step_variance(max(known[k], known[start]), step_s)
                alignment.add(complex(step), complex(fixes[k] - fixes[start]), float(variance))
                start = k
            elif step_s > _LONGEST_STEP_S:
                start = k
            resultants[k], misfits[k], last = alignment.resultant, alignment.misfit, k
        return resultants, misfits

    (before, misfit), (after, other) = pass_over(range(count)), pass_over(range(count - 1, -1, -1))
    resultant = before + after
    with np.errstate(divide="ignore"):
        std = np.sqrt(np.maximum(1.0, np.maximum(misfit, other)) / np.abs(resultant))
    return np.angle(np.exp(1j * (yaw + np.angle(resultant)))), std
