"""A candidate checkpoint beside the one in use, on the same frames: which of them believes itself?

Nobody knows the true place on a vehicle. What is known: how far the vehicle moved by its odometry, and that
the true place lies near the coarse fix. Fixes move as the vehicle does: a model that looks at nothing and
answers with the place where its search begins would agree with the odometry. So both models are given places
displaced at random, from frame to frame others; who follows these disagrees.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields, replace

import numpy as np

from xview_loc.estimation.calibration import mahalanobis
from xview_loc.estimation.checkpoint_swap import Deployed
from xview_loc.estimation.localizer import SEARCH_SIGMAS, Observation, PoseEstimate
from xview_loc.geodesy import LocalProjection
from xview_loc.statistics import LEAST, SURE, bootstrap_means
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

# One wild estimate must not decide over a checkpoint: a disagreement counts no more than this, metres.
_MOST_M = 20.0
# A shorter step between two estimates says more about their errors than about the motion.
_STEP_M = 10.0
# Whose steps a better candidate's must agree with the odometry better than: than the last two, which take no
# model at all, by a twentieth.
_RIVALS = {
    "motion_m_active": ("the one in use", 1.0),
    "motion_m_given": ("the places given", 0.95),
    "motion_m_standing": ("standing still", 0.95),
}

Place = tuple[float, float]


@dataclass(frozen=True)
class FrameComparison:
    """One frame seen by both; ``_active`` is the checkpoint in use. Not-a-number where it cannot be told.

    distance_m: between the two estimates. entropy: of the heat map, nats. motion_m: how far the step from
    the last compared frame differs from the odometry's, at most 20; ``_given`` is that of the displaced
    places which both were given, ``_standing`` that of no step at all. fix_sigmas: distance from the fix.
    """

    distance_m: float
    entropy: float
    entropy_active: float
    motion_m: float
    motion_m_active: float
    motion_m_given: float
    motion_m_standing: float
    fix_sigmas: float
    fix_sigmas_active: float


_NAMES = [f.name for f in fields(FrameComparison)]


@dataclass(frozen=True)
class ShadowVerdict:
    """Whether the candidate is surely better, and the evidence in one line."""

    promote: bool
    text: str


class ShadowTrial:
    """Compares a candidate with the checkpoint in use; for use by one thread.

    It looks at every ``every``-th frame and ends after ``frames`` of those. ``spread_m``: side of the square
    that places are displaced in, metres.
    """

    def __init__(
        self,
        active: Deployed,
        candidate: Deployed,
        odometry: Odometry,
        *,
        every: int,
        frames: int,
        spread_m: float,
    ) -> None:
        self.active = active
        self.candidate = candidate
        self.frames = frames
        self.failures = 0
        self._odometry = odometry
        self._every = every
        self._spread_m = spread_m
        self._rng = np.random.default_rng(0)
        self._offered = 0
        self._compared: list[tuple[float, ...]] = []
        self._sums = np.zeros(len(_NAMES))
        self._told = np.zeros(len(_NAMES))
        # Of the last compared frame: its stamp and the places of base_link: in use, candidate, given.
        self._last: tuple[int, tuple[Place, ...]] | None = None

    def __len__(self) -> int:
        """How many frames were compared, or would have been had the candidate not failed."""
        return len(self._compared) + self.failures

    def wants(self, stamp_ns: int) -> bool:
        """Whether to compare the next frame: not while the vehicle is where the last one was compared."""
        self._offered += 1
        if self._offered % self._every:
            return False
        driven = None if self._last is None else self._odometry.between(self._last[0], stamp_ns)
        return driven is None or driven.length >= _STEP_M

    def displaced(self, observation: Observation) -> Observation:
        """The same frame with a worse coarse place: what to show to both."""
        place = LocalProjection(observation.lat, observation.lon)
        lat, lon = place.inverse(*self._rng.uniform(-0.5, 0.5, 2) * self._spread_m)
        covariance = observation.fix_covariance
        if covariance is not None:
            # Worse by the variance of a uniform distribution.
            covariance = covariance + np.eye(2) * self._spread_m**2 / 12.0
        return replace(observation, lat=float(lat), lon=float(lon), fix_covariance=covariance)

    def failed(self) -> None:
        """The candidate has no estimate of a frame that the checkpoint in use has one of."""
        self.failures += 1

    def compare(
        self,
        observation: Observation,
        active: PoseEstimate,
        candidate: PoseEstimate,
        fix: GnssFix | None,
        heading: HeadingSample | None,
        mounting: Mounting,
    ) -> FrameComparison:
        """Compare two estimates of one displaced observation; ``fix`` is the receiver's.

        Without a measured heading the motion cannot be compared.
        """
        yaw = 0.0 if heading is None else heading.yaw
        places = tuple(mounting.base_from_camera(p.lat, p.lon, yaw) for p in (active, candidate, observation))
        motion = [math.nan] * 4
        if self._last is not None and heading is not None:
            stamp_ns, before = self._last
            driven = self._odometry.between(stamp_ns, observation.stamp_ns)
            if driven is not None:
                step = in_enu((driven.forward, driven.left), yaw - driven.turn)
                steps = [LocalProjection(*a).forward(*b) for a, b in zip(before, places, strict=True)]
                motion = [min(_MOST_M, math.dist(s, step)) for s in (*steps, (0.0, 0.0))]
        self._last = (observation.stamp_ns, places)
        sigmas = [_from_fix(fix, estimate, mounting, yaw) for estimate in (active, candidate)]
        comparison = FrameComparison(
            distance_m=math.hypot(*LocalProjection(*places[0]).forward(*places[1])),
            entropy=candidate.heat_map.entropy,
            entropy_active=active.heat_map.entropy,
            motion_m=motion[1],
            motion_m_active=motion[0],
            motion_m_given=motion[2],
            motion_m_standing=motion[3],
            fix_sigmas=sigmas[1],
            fix_sigmas_active=sigmas[0],
        )
        self._compared.append(astuple(comparison))
        values = np.array(astuple(comparison))
        self._sums += np.nan_to_num(values)
        self._told += np.isfinite(values)
        return comparison

    def means(self) -> dict[str, float]:
        """Of every figure, over the frames where it can be told."""
        return {
            name: float(total / told) if told else math.nan
            for name, total, told in zip(_NAMES, self._sums, self._told, strict=True)
        }

    def verdict(self) -> ShadowVerdict | None:
        """After all the frames; None before.

        The candidate is to replace the one in use where it never failed, its steps surely agree better with
        the odometry than those of the one in use, of the places given and of no motion, and not surely more
        of its estimates lie further than three sigma from their fix.
        """
        if len(self) < self.frames:
            return None
        if self.failures:
            return ShadowVerdict(False, f"it failed on {self.failures} of {len(self)} frames")
        values = dict(zip(_NAMES, np.array(self._compared).T, strict=True))
        told = int(np.isfinite(values["motion_m"]).sum())
        if told < LEAST:
            text = f"motion could be compared in {told} frames, {LEAST} are needed (odometry and heading)"
            return ShadowVerdict(False, text)
        means = self.means()
        promote = True
        rivals = []
        for name, (who, share) in _RIVALS.items():
            better = float((bootstrap_means(values["motion_m"] - share * values[name]) < 0).mean())
            promote = promote and better >= SURE
            rivals.append(f"{who} by {means[name]:.2f} m (better with {better:.0%} certainty)")
        text = f"its steps differ from odometry by {means['motion_m']:.2f} m, {', '.join(rivals)}; "
        far, far_active = (
            np.where(np.isfinite(values[name]), values[name] > SEARCH_SIGMAS, math.nan)
            for name in ("fix_sigmas", "fix_sigmas_active")
        )
        if np.isnan(far).all():
            return ShadowVerdict(promote, f"{text}the fixes have no covariance to compare with")
        strays = float((bootstrap_means(far - far_active) > 0).mean())
        text += (
            f"{np.nanmean(far):.1%} of the estimates lie far from their fix instead of "
            f"{np.nanmean(far_active):.1%}"
        )
        return ShadowVerdict(promote and strays < SURE, text)


def _from_fix(fix: GnssFix | None, estimate: PoseEstimate, mounting: Mounting, yaw: float) -> float:
    """Standard deviations of the fix between it and an estimate; not-a-number without a covariance."""
    if fix is None or fix.covariance is None:
        return math.nan
    camera = mounting.camera_from_antenna(fix.lat, fix.lon, yaw)
    offset = np.array(LocalProjection(*camera).forward(estimate.lat, estimate.lon))
    return mahalanobis(offset, fix.covariance[:2, :2])
