"""Fuse heat maps and fixes over time in a histogram filter that odometry moves.

Heat maps with several summits, or a wrong one, are outvoted by the others. Without fixes, the filter's own
position is where the next image is searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xview_loc.estimation.belief import BeliefGrid, HeadingBelief
from xview_loc.estimation.localizer import SEARCH_SIGMAS, UNKNOWN_HEADING_VARIANCE
from xview_loc.estimation.observation import PoseEstimate
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.statistics import mahalanobis
from xview_loc.vehicle.course import FIX_CORRELATION_S
from xview_loc.vehicle.mounting import Mounting, in_enu, moved
from xview_loc.vehicle.odometry import Motion, Odometry
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample

Array = NDArray[np.float64]

# Variance added without odometry, per second on each axis, m^2 / s.
_UNSEEN_MOTION = 8.0**2
# Variance of a fix without a covariance, m^2.
_FIX_VARIANCE = 15.0**2
# Added to the belief's variance for a search around it, so that images can correct it, m^2.
_SEARCH_VARIANCE = 10.0**2
_UNKNOWN_ALTITUDE = 1e6
# Distance in standard deviations from which a fix is rejected ...
_FIX_SIGMAS = 5.0
# ... until fixes have been rejected for this long while heat maps did not support the belief: then the filter
# is lost, and starts from the fix. Heat maps support the belief if the log of their evidence, averaged over
# about this many images, exceeds this: the true position is then twice as likely as others.
_LOST_AFTER_S = 20.0
_SUPPORT, _SUPPORT_IMAGES = math.log(2.0), 10
# After so many independent images without support, the belief is doubtful. (A wrong one is hardly ever
# contradicted: it spreads until it agrees with anything.)
_DOUBTFUL = 15.0
# Lower limit of a fix's likelihood: distant positions stay possible.
_LEAST_LIKELIHOOD = np.float32(1e-4)
# The belief's variance over that of its errors, in steady driving. Both of its inputs allow for more than
# their errors: heat maps are calibrated for their 95 % ellipse, and near its maximum their variance is about
# twice that of the errors; errors of odometry and headings are steadier than the noise that stands for them.
# A common factor leaves the mean as it is. Driving is not steady for the first metres after a start, if the
# last heat map is too far back, or while heat maps do not support the belief.
_WIDER = 2.5
_SETTLED_M, _BLIND_M = 50.0, 20.0
# Correlation length of a heading's error.
HEADING_CORRELATION_M = 100.0
# Standard deviation above which the belief is dropped: it is useless, and would not fit its grid.
WIDEST_M = 25.0
# Variance added to the yaw per second with odometry and without, rad^2 / s; least variance of an image's yaw.
_YAW_DRIFT, _UNSEEN_TURN = math.radians(1.0) ** 2, math.radians(20.0) ** 2
_LEAST_YAW_VARIANCE = math.radians(10.0) ** 2
# Probability that an image's heading is random.
_YAW_OUTLIER = 0.5
# Variance below which a heading is precise enough to give the direction of a step, rad^2.
_SURE_YAW = math.radians(15.0) ** 2


@dataclass(frozen=True)
class FilterOptions:
    """Error model of the filter's inputs.

    outlier: probability that a heat map shows only wrong positions. drift_m: standard deviation of odometry's
    error after 100 m, metres. decorrelation_m: distance after which the errors of heat maps are independent;
    closer images count less.
    """

    outlier: float = 0.1
    drift_m: float = 2.0
    decorrelation_m: float = 10.0


@dataclass(frozen=True, eq=False)
class FilteredPose:
    """Pose of base_link.

    lat, lon: degrees. covariance: (2, 2) in ENU axes, m^2. heading: true-north ENU yaw, radians; None if
    unknown. heading_variance: rad^2.
    """

    lat: float
    lon: float
    covariance: Array
    heading: float | None
    heading_variance: float
    stamp_ns: int


class PositionFilter:
    """Belief about the position of base_link, moved on from image to image.

    Call :meth:`move` for each image, then :meth:`observe` if it was localised. For use by one thread; others
    may replace ``options``, read ``started`` and call :meth:`restart`.
    """

    def __init__(self, odometry: Odometry, options: FilterOptions | None = None) -> None:
        self._odometry = odometry
        self.options = options or FilterOptions()
        # Plane at the first fix that the belief lies in; yaws are in its axes.
        self._plane: LocalProjection | None = None
        self._belief: BeliefGrid | None = None
        self._altitude = 0.0
        self._stamp_ns = 0
        self._fix_ns = 0
        self._trusted_ns = 0
        # Metres driven since the last heat map, and since the first one without a gap.
        self._driven, self._followed = math.inf, 0.0
        self._support = 0.0
        # Independent images since the belief was last supported.
        self._unsupported = 0.0
        self._yaw, self._yaw_variance = 0.0, UNKNOWN_HEADING_VARIANCE
        # Heading from odometry and images, for use without measured headings.
        self._headings = HeadingBelief()
        # What to start from at the next image: (pose,), or (None,) for a fix.
        self._start: tuple[FilteredPose | None] | None = None

    @property
    def started(self) -> bool:
        """True if the filter has a position."""
        start = self._start
        return self._belief is not None if start is None else start[0] is not None

    def restart(self, pose: FilteredPose | None = None) -> None:
        """Forget the position at the next image; start from ``pose``, or else from the next fix.

        From the pose's stamp on, odometry moves it; a pose without a stamp (0) is that of the next image.
        """
        self._start = (pose,)

    def lose(self) -> None:
        """Forget the position at the next image, unless another start was asked for meanwhile."""
        if self._start is None:
            self._start = (None,)

    @property
    def doubtful(self) -> bool:
        """True if neither fixes nor many heat maps have supported the belief."""
        return self._belief is not None and self._unsupported > _DOUBTFUL

    @property
    def pose(self) -> FilteredPose | None:
        """Mean and honest covariance at the last image's stamp; None without a belief."""
        pose = self._wide_pose
        settled = self._followed >= _SETTLED_M and self._driven <= _BLIND_M and self._support > _SUPPORT
        return replace(pose, covariance=pose.covariance / _WIDER) if pose and settled else pose

    @property
    def _wide_pose(self) -> FilteredPose | None:
        """Pose with the covariance of the belief."""
        if self._belief is None or self._plane is None:
            return None
        lat, lon = (float(x) for x in self._plane.inverse(*self._belief.mean))
        convergence = self._convergence()
        cos, sin = math.cos(convergence), math.sin(convergence)
        turn = np.array([[cos, sin], [-sin, cos]])
        known = self._yaw_variance < UNKNOWN_HEADING_VARIANCE
        return FilteredPose(
            lat,
            lon,
            turn @ self._belief.covariance @ turn.T,
            wrap_angle(self._yaw - convergence) if known else None,
            min(self._yaw_variance, UNKNOWN_HEADING_VARIANCE),
            self._stamp_ns,
        )

    def move(
        self, stamp_ns: int, fix: GnssFix | None, heading: HeadingSample | None, mounting: Mounting
    ) -> GnssFix | None:
        """Move on to an image's stamp, and return the position to search around.

        That is the fix if it is accepted, else the filter's own antenna position, or None if there is none.
        A stamp before the last one restarts the filter. A fix that contradicts the belief is rejected, unless
        that goes on while heat maps do not support the belief either: then the filter starts anew from it.
        """
        start, self._start = self._start, None
        if start is not None or stamp_ns < self._stamp_ns:
            self._belief = self._plane = None
            self._headings = HeadingBelief()
        if start is not None and start[0] is not None:
            self._begin(start[0], stamp_ns)
        if self._plane is None and fix is not None:
            self._plane = LocalProjection(fix.lat, fix.lon)
        if self._plane is None:
            self._stamp_ns = stamp_ns
            return None
        motion = self._odometry.between(self._stamp_ns, stamp_ns)
        seconds, self._stamp_ns = (stamp_ns - self._stamp_ns) / NS, stamp_ns
        self._turn(motion, heading, seconds)
        self._advance(motion, seconds)
        if fix is not None:
            self._altitude = fix.altitude
            if self._accepts(fix, mounting):
                return fix
        pose = self._wide_pose
        if pose is None:
            return None
        lat, lon = moved(pose.lat, pose.lon, mounting.antenna, pose.heading or 0.0)
        covariance = np.diag([_SEARCH_VARIANCE, _SEARCH_VARIANCE, _UNKNOWN_ALTITUDE])
        covariance[:2, :2] += pose.covariance
        return GnssFix(stamp_ns, lat, lon, self._altitude, covariance)

    def observe(self, estimate: PoseEstimate, mounting: Mounting, heading_measured: bool) -> None:
        """Fuse the image at the last stamp: its heat map, and its heading if none was measured."""
        if self._belief is None or self._plane is None:
            return
        weight = min(1.0, self._driven / self.options.decorrelation_m)
        if not heading_measured and estimate.heading is not None:
            yaw = mounting.heading(estimate.heading) + self._convergence()
            variance = max(estimate.heading_variance, _LEAST_YAW_VARIANCE)
            self._headings.multiply(yaw, variance, _YAW_OUTLIER, weight)
            self._yaw, self._yaw_variance = self._headings.mean, self._headings.variance
        if self._driven > _BLIND_M:
            self._followed = 0.0
        self._driven = 0.0
        lever = in_enu(mounting.camera, self._yaw)
        likelihood = self._belief.heat_map_likelihood(estimate.heat_map, self._plane, lever)
        outlier = self.options.outlier
        evidence = self._belief.multiply((1.0 - outlier) * likelihood + outlier, weight)
        self._support += (math.log(evidence) - self._support) / _SUPPORT_IMAGES
        self._unsupported += weight
        if self._support > _SUPPORT:
            self._trust()

    def _begin(self, pose: FilteredPose, stamp_ns: int) -> None:
        """Start from a pose, at its stamp or that of an image before it."""
        self._stamp_ns = min(pose.stamp_ns or stamp_ns, stamp_ns)
        self._plane = LocalProjection(pose.lat, pose.lon)
        self._belief = BeliefGrid.normal(np.zeros(2), pose.covariance)
        self._fix_ns = self._stamp_ns
        self._trust()
        self._driven, self._support = math.inf, 0.0
        if pose.heading is not None:
            variance = max(pose.heading_variance, _LEAST_YAW_VARIANCE)
            self._headings.multiply(pose.heading, variance, 0.0, 1.0)

    def _trust(self) -> None:
        self._trusted_ns, self._unsupported = self._stamp_ns, 0.0

    def _convergence(self) -> float:
        """Return the angle to add to a true-north yaw at the belief for a yaw in the plane's axes."""
        if self._plane is None or self._belief is None:
            return 0.0
        return float(self._plane.convergence(*self._plane.inverse(*self._belief.mean)))

    def _turn(self, motion: Motion | None, heading: HeadingSample | None, seconds: float) -> None:
        if heading is not None:
            self._yaw = heading.yaw + self._convergence()
            self._yaw_variance = heading.std**2
            self._headings = HeadingBelief()
            self._headings.multiply(self._yaw, max(self._yaw_variance, _LEAST_YAW_VARIANCE), 0.0, 1.0)
            return
        turn, drift = (0.0, _UNSEEN_TURN) if motion is None else (motion.turn, _YAW_DRIFT)
        self._headings.turn(turn, drift * seconds)
        self._yaw, self._yaw_variance = self._headings.mean, self._headings.variance

    def _advance(self, motion: Motion | None, seconds: float) -> None:
        if self._belief is None:
            return
        if motion is None:
            # In a long gap the vehicle may have driven straight on.
            self._spread(np.zeros(2), _UNSEEN_MOTION * seconds * max(1.0, seconds))
            self._driven = math.inf
        else:
            step = np.array(in_enu((motion.forward, motion.left), self._yaw - motion.turn))
            # A heading's error is correlated, so it adds up along the way, whatever the image rate.
            rate = self.options.drift_m**2 / 100.0
            if self._yaw_variance < _SURE_YAW:
                rate += HEADING_CORRELATION_M * self._yaw_variance / 2.0
                self._spread(step, rate * motion.length)
            else:
                # In an uncertain direction: the mean step, and the variance of unseen motion.
                mean = math.exp(-self._yaw_variance / 2.0)
                speed = motion.length / max(seconds, 1e-3)
                unseen = min(_UNSEEN_MOTION, speed**2) * seconds * (1.0 - mean**2)
                self._spread(mean * step, rate * motion.length + unseen)
            self._driven += motion.length
            self._followed += motion.length

    def _spread(self, step: Array, variance: float) -> None:
        """Move the belief, and drop it once it is too wide."""
        assert self._belief is not None
        if variance < WIDEST_M**2:
            self._belief.move(step, variance)
        if variance >= WIDEST_M**2 or self._belief.covariance.trace() / 2.0 > WIDEST_M**2:
            self._belief = None

    def _accepts(self, fix: GnssFix, mounting: Mounting) -> bool:
        """Fuse a fix, or start from it; return True if images should be searched around it."""
        assert self._plane is not None
        antenna = in_enu(mounting.antenna, self._yaw)
        place = np.array(self._plane.forward(fix.lat, fix.lon)) - antenna
        covariance = np.eye(2) * _FIX_VARIANCE if fix.covariance is None else fix.covariance[:2, :2]
        if self._belief is not None:
            offset = place - self._belief.mean
            # At least a cell wide: a precise fix could fall between the cells.
            covariance = covariance + self._belief.cell_m**2 * np.eye(2)
            far = mahalanobis(offset, covariance + self._belief.covariance) > _FIX_SIGMAS
            if not far:
                weight = min(1.0, (self._stamp_ns - self._fix_ns) / NS / FIX_CORRELATION_S)
                likelihood = self._belief.normal_likelihood(place, covariance)
                self._belief.multiply(np.maximum(likelihood, _LEAST_LIKELIHOOD), weight)
                self._fix_ns = self._stamp_ns
                self._trust()
                # If a search around the fix would not reach the belief, the belief is the better centre.
                return mahalanobis(offset, covariance) <= SEARCH_SIGMAS
            if (self._stamp_ns - self._trusted_ns) / NS <= _LOST_AFTER_S:
                return False
        if covariance.trace() / 2.0 > WIDEST_M**2:
            self._belief = None
            return True  # too coarse to start from, but the best centre for a search
        self._belief = BeliefGrid.normal(place, covariance)
        self._fix_ns = self._stamp_ns
        self._trust()
        self._driven, self._support = math.inf, 0.0
        return True
