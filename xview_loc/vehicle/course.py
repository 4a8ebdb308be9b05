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
from xview_loc.vehicle.synchronisation import (
    NS,
    GnssFix,
    HeadingSample,
    History,
    RejectedInput,
    blend_heading,
)

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

# Correlation time of a receiver's errors, seconds, and the independent noise of each fix, metres.
FIX_CORRELATION_S = 30.0
_FIX_NOISE_M = 0.7
# Standard deviation of a fix that comes without one, metres.
_UNKNOWN_SIGMA_M = 15.0
# A step is this long; one that takes longer does not count.
_STEP_M, _LONGEST_STEP_S = 10.0, 20.0
# Variance that odometry's drift adds to the angle, rad^2 / s.
_DRIFT = math.radians(0.3) ** 2
# Standard deviations beyond which the length of a step shows that the fix jumped.
_SIGMAS = 5.0
# Squared deviation, in variances, from which on a step is a surprise.
_SURPRISE = 9.0
# After this many surprises in a row, steps are believed.
_SURPRISES = 3
# Number of steps that the recent past is made of.
_RECENT = 5
# Squared difference, in variances, of the recent past's angle from the whole past's that is a contradiction.
_CONTRADICTION = 9.0
# Number of steps after which a contradiction counts half, and the heading is trusted again.
_FORGIVEN = 35
# Speed, m/s, and yaw rate, rad/s, below which a vehicle stands: its yaw rate is then the gyroscope's error,
# averaged over this time.
_STANDING, _STANDING_RATE, _BIAS_S = 0.05, math.radians(2.0), 5.0
# Longest time between a stamp and the heading used for it.
_MAX_AGE_S = 0.5
# Standard deviation from which on a heading is of use: models bear errors of ten degrees.
MAX_STD = math.radians(8.0)


def fix_step_variance(sigma: Any, seconds: Any) -> Any:
    """Return the variance per axis of the step between two fixes, m^2, from their sigma, metres.

    The error of a fix is a slow random walk, so a step is more precise than a position.
    """
    return 2.0 * sigma**2 * np.minimum(seconds / FIX_CORRELATION_S, 1.0) + 2.0 * _FIX_NOISE_M**2


def stands(forward: Any, left: Any, yaw_rate: Any) -> Any:
    """Return True where a vehicle stands by its odometry, m/s and rad/s, but for the gyroscope's error."""
    return (np.hypot(forward, left) < _STANDING) & (np.abs(yaw_rate) < _STANDING_RATE)


class Alignment:
    """The angle by which a reckoned path is turned to lie true to north; unknown at first.

    ``resultant`` has the angle's mean as its phase and the inverse of its variance as its length.
    """

    def __init__(self) -> None:
        self.resultant = 0j
        self._recent = 0j
        self._surprises = 0
        # How often the angle has changed lately, though odometry did not say so.
        self._contradictions = 0.0

    @property
    def contradicted(self) -> bool:
        """True if odometry's turns contradicted the course within the last steps."""
        return self._contradictions > 0.5

    @property
    def std(self) -> float:
        """Standard deviation of the angle, radians; infinite if nothing is known."""
        return 1.0 / math.sqrt(abs(self.resultant)) if self.resultant else math.inf

    def drift(self, seconds: float) -> None:
        """Let odometry drift for a time."""
        self.resultant /= 1.0 + abs(self.resultant) * _DRIFT * seconds
        self._recent /= 1.0 + abs(self._recent) * _DRIFT * seconds

    def add(self, reckoned: complex, seen: complex, variance: float) -> None:
        """Add a step of the path and the same step between fixes, metres; variance per axis, m^2.

        A step that surprises, or has another length than the path's, is left out as a jump of the fixes.
        """
        if (abs(seen) - abs(reckoned)) ** 2 > _SIGMAS**2 * variance:
            return
        if self.resultant:
            off = seen - reckoned * self.resultant / abs(self.resultant)
            squared = abs(off) ** 2 / (2.0 * variance + abs(reckoned) ** 2 * self.std**2)
            self._surprises = self._surprises + 1 if squared > _SURPRISE else 0
            if 0 < self._surprises < _SURPRISES:
                return
        step = reckoned.conjugate() * seen / variance
        self._recent += step - self._recent / _RECENT
        self.resultant += step
        self._contradictions *= 0.5 ** (1.0 / _FORGIVEN)
        if _apart(self._recent, self.resultant) > _CONTRADICTION:
            self.resultant = self._recent
            self._contradictions += 1.0


def _apart(a: Any, b: Any) -> Any:
    """Return the squared difference of two angles over its variance; both as resultants."""
    return np.angle(a * np.conj(b)) ** 2 / (1.0 / np.abs(a) + 1.0 / np.abs(b))


class _Fix(NamedTuple):
    """A position of a place on the vehicle: by GNSS, or by an image, whose errors are independent."""

    fix: GnssFix
    place: Offset
    by_image: bool

    @property
    def stamp_ns(self) -> int:
        return self.fix.stamp_ns


class _Start(NamedTuple):
    """Where a step begins; the yaw is in odometry's axes."""

    fix: GnssFix
    yaw: float


class CourseHeadings:
    """Headings of a vehicle on the way, from its odometry and positions as they come.

    Odometry must give yaw rates. ``odometry`` is what keeps the samples that :meth:`add_velocity` takes. For
    one thread; another may call :meth:`add_estimate` and :meth:`add_heading`.
    """

    def __init__(self, odometry: Odometry) -> None:
        self._odometry = odometry
        self._waiting: deque[_Fix | HeadingSample] = deque(maxlen=100)
        self._known = History("heading", blend_heading, _MAX_AGE_S)
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._alignment = Alignment()
        # Whether images have found the heading, and fixes have not confirmed it.
        self._by_images = False
        self._waiting.clear()
        self._known.clear()
        # By source: whether the positions are those of images.
        self._starts: dict[bool, _Start] = {}
        # Heading in odometry's axes, and when; the gyroscope's constant error, rad/s; the last fix.
        self._yaw, self._stamp_ns = 0.0, 0
        self._bias = 0.0
        self._fixed_ns = 0

    @property
    def contradicted(self) -> bool:
        """True if odometry's turns contradicted the course within the last steps."""
        return self._alignment.contradicted

    @property
    def doubt(self) -> str:
        """Why the heading is not known; "" if it is."""
        alignment = self._alignment
        if alignment.contradicted:
            return (
                "odometry's turns contradict the course of the fixes: its yaw rates are missing, scaled or "
                "of the wrong sign, or its stamps differ from those of the fixes"
            )
        if alignment.std <= MAX_STD:
            return ""
        if not self._starts:
            return "it takes odometry without gaps of a second, and fixes by the same clock"
        return "drive some tens of metres with fixes"

    def add_fix(self, fix: GnssFix, antenna: Offset = (0.0, 0.0)) -> None:
        """Take a fix; ``antenna`` is its place on the vehicle."""
        self._waiting.append(_Fix(fix, antenna, False))

    def add_estimate(self, fix: GnssFix) -> None:
        """Take base_link's position by an image: such positions keep the heading where there are no fixes.

        With fixes they are left out: in an unfamiliar city a model may be sure and wrong.
        """
        self._waiting.append(_Fix(fix, (0.0, 0.0), True))

    def add_heading(self, heading: HeadingSample) -> None:
        """Take a heading that images have found; what was known before is forgotten."""
        self._waiting.append(heading)

    def forget_found(self) -> None:
        """Forget a heading that images have found; one of odometry and fixes is kept."""
        if self._by_images:
            self._alignment, self._starts, self._by_images = Alignment(), {}, False
            self._known.clear()

    def add_velocity(self, sample: VelocitySample) -> HeadingSample | None:
        """Take a sample that odometry keeps already; return the heading then, None while it is unknown."""
        for _ in range(len(self._waiting)):
            one = self._waiting.popleft()
            if one.stamp_ns > sample.stamp_ns:
                self._waiting.append(one)
                continue
            self._turn(max(one.stamp_ns, self._stamp_ns))
            since = self._odometry.between(one.stamp_ns, self._stamp_ns)
            if since is None:
                continue
            # As in _turn, backwards.
            yaw = self._yaw - since.turn + self._bias * (self._stamp_ns - one.stamp_ns) / NS
            if isinstance(one, HeadingSample):
                self._alignment, self._by_images = Alignment(), True
                # With a larger deviation it would count as unknown; images make it more precise soon.
                std = min(one.std, 0.75 * MAX_STD)
                self._alignment.resultant = cmath.rect(1.0 / std**2, one.yaw - yaw)
            else:
                self._take(one, yaw)
        seconds = (sample.stamp_ns - self._stamp_ns) / NS
        self._turn(sample.stamp_ns)
        if stands(sample.forward, sample.left, sample.yaw_rate):
            self._bias += min(1.0, max(0.0, seconds / _BIAS_S)) * (sample.yaw_rate - self._bias)
        if self.doubt:
            return None
        yaw = wrap_angle(self._yaw + cmath.phase(self._alignment.resultant))
        heading = HeadingSample(sample.stamp_ns, yaw, self._alignment.std)
        self._known.add(heading)
        return heading

    def at(self, stamp_ns: int) -> HeadingSample | None:
        """Return the heading at a recent stamp; None if it was unknown."""
        try:
            return self._known.at(stamp_ns)
        except RejectedInput:
            return None

    def _turn(self, stamp_ns: int) -> None:
        """Go on to a stamp."""
        motion = self._odometry.between(self._stamp_ns, stamp_ns) if self._stamp_ns else None
        if motion is None:
            self._alignment, self._starts = Alignment(), {}
            self._known.clear()
        else:
            seconds = (stamp_ns - self._stamp_ns) / NS
            self._yaw += motion.turn - self._bias * seconds
            self._alignment.drift(seconds)
        self._stamp_ns = stamp_ns

    def _take(self, one: _Fix, yaw: float) -> None:
        fix, start = one.fix, self._starts.get(one.by_image)
        here = _Start(fix, yaw)
        if not one.by_image:
            self._fixed_ns, self._by_images = fix.stamp_ns, False
        elif fix.stamp_ns - self._fixed_ns < _LONGEST_STEP_S * NS:
            start = None
        motion, seconds = None, 0.0
        if start is not None:
            seconds = (fix.stamp_ns - start.fix.stamp_ns) / NS
            if 0.0 < seconds <= _LONGEST_STEP_S:
                motion = self._odometry.between(start.fix.stamp_ns, fix.stamp_ns)
        if start is None or motion is None:
            self._starts[one.by_image] = here
            return
        before, after = cmath.rect(1.0, start.yaw), cmath.rect(1.0, here.yaw)
        # The antenna swings about the vehicle's origin.
        reckoned = complex(motion.forward, motion.left) * before + complex(*one.place) * (after - before)
        if abs(reckoned) < _STEP_M:
            return
        seen = complex(*LocalProjection(start.fix.lat, start.fix.lon).forward(fix.lat, fix.lon))
        sigmas = start.fix.sigma or _UNKNOWN_SIGMA_M, fix.sigma or _UNKNOWN_SIGMA_M
        variance = sigmas[0] ** 2 + sigmas[1] ** 2
        if not one.by_image:
            variance = float(fix_step_variance(max(sigmas), seconds))
        self._alignment.add(reckoned, seen, variance)
        self._starts[one.by_image] = here


def headings_of_drive(
    yaw: Array, path: Complex, fixes: Complex, sigma: Array, seconds: Array
) -> tuple[Array, Array]:
    """Return true-north headings (N,) along a recorded drive, and their standard deviations, radians.

    Steps before and after each place count; where these contradict each other, or odometry, deviations are
    infinite. ``yaw`` and ``path`` are the vehicle's heading and the antenna's place by odometry, without
    gaps; ``fixes`` east + i north, ``sigma`` of these or NaN, metres.
    """
    count = len(yaw)
    known = np.where(np.isnan(sigma), _UNKNOWN_SIGMA_M, sigma)

    def pass_over(order: Iterable[int]) -> tuple[Complex, NDArray[np.bool_]]:
        alignment, resultants, contradicted = Alignment(), np.zeros(count, complex), np.zeros(count, bool)
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
            resultants[k], contradicted[k], last = alignment.resultant, alignment.contradicted, k
        return resultants, contradicted

    (before, early), (after, late) = pass_over(range(count)), pass_over(range(count - 1, -1, -1))
    resultant = before + after
    with np.errstate(divide="ignore"):
        std = 1.0 / np.sqrt(np.abs(resultant))
        # Where odometry slips, either side is sure of its own angle.
        std[(early & late) | (_apart(before, after) > _CONTRADICTION)] = math.inf
    return np.angle(np.exp(1j * (yaw + np.angle(resultant)))), std
