"""Compare a candidate checkpoint with the active one on the same frames, without ground truth.

Two things are known on a vehicle: how far it moved, from odometry, and that it is near the coarse fix. Fixes
move with the vehicle, so a model that ignores the image and returns the centre of its search would agree with
odometry. Both models are therefore given positions displaced at random in every frame; a model that follows
them disagrees with odometry.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields, replace

import numpy as np

from xview_loc.estimation.checkpoint_swap import Deployed
from xview_loc.estimation.localizer import SEARCH_SIGMAS
from xview_loc.estimation.observation import Observation, PoseEstimate
from xview_loc.geodesy import LocalProjection
from xview_loc.statistics import MIN_MEASUREMENTS, SIGNIFICANT, certainty_of_decrease, mahalanobis
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

# Largest disagreement that is counted, metres: one wild estimate must not decide.
_MAX_DISAGREEMENT_M = 20.0
# Distance between compared frames, metres: shorter steps show the estimates' errors rather than the motion.
_STEP_M = 10.0
# What the candidate's steps must agree with odometry better than, and the share of the rival's disagreement
# to stay below. The last two need no model, so they must be beaten by a twentieth.
_RIVALS = {
    "motion_m_active": ("the one in use", 1.0),
    "motion_m_given": ("the positions given", 0.95),
    "motion_m_standing": ("standing still", 0.95),
}

Place = tuple[float, float]


@dataclass(frozen=True)
class FrameComparison:
    """Figures of one frame, of the candidate and (``_active``) of the active checkpoint; NaN if unknown.

    distance_m: between the two estimates. entropy: of the heat map, nats. motion_m: difference between the
    step since the last compared frame and odometry's, at most 20 m; ``_given``: the same for the displaced
    positions that both were given; ``_standing``: for no step at all. fix_sigmas: distance from the fix.
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
    """``promote``: the candidate is significantly better. ``text``: the evidence in one line."""

    promote: bool
    text: str


class ShadowTrial:
    """Compares a candidate with the active checkpoint; for use by one thread.

    every: compare every n-th frame. frames: number of comparisons before the verdict. spread_m: side of the
    square within which positions are displaced, metres.
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
        # Last compared frame: stamp, and positions of base_link by active, candidate and as given.
        self._last: tuple[int, tuple[Place, ...]] | None = None

    def __len__(self) -> int:
        """Number of frames compared, those on which the candidate failed included."""
        return len(self._compared) + self.failures

    def wants(self, stamp_ns: int) -> bool:
        """Return True if the next frame should be compared: its turn has come and the vehicle has moved."""
        self._offered += 1
        if self._offered % self._every:
            return False
        driven = None if self._last is None else self._odometry.between(self._last[0], stamp_ns)
        return driven is None or driven.length >= _STEP_M

    def displaced(self, observation: Observation) -> Observation:
        """Return the frame with its coarse position displaced at random, to be shown to both models."""
        place = LocalProjection(observation.lat, observation.lon)
        lat, lon = place.inverse(*self._rng.uniform(-0.5, 0.5, 2) * self._spread_m)
        covariance = observation.fix_covariance
        if covariance is not None:
            # Plus the variance of a uniform distribution.
            covariance = covariance + np.eye(2) * self._spread_m**2 / 12.0
        return replace(observation, lat=float(lat), lon=float(lon), fix_covariance=covariance)

    def failed(self) -> None:
        """Count a frame that only the active checkpoint could localise."""
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
        """Compare two estimates of one displaced observation; ``fix`` is the original fix.

        Motion is not compared without a measured heading.
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
                motion = [min(_MAX_DISAGREEMENT_M, math.dist(s, step)) for s in (*steps, (0.0, 0.0))]
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
        return comparison

    def means(self) -> dict[str, float]:
        """Return the mean of every figure over the frames where it is known."""
        values = np.array(self._compared).reshape(-1, len(_NAMES))
        sums, known = np.nan_to_num(values).sum(0), np.isfinite(values).sum(0)
        return {n: float(s / k) if k else math.nan for n, s, k in zip(_NAMES, sums, known, strict=True)}

    def verdict(self) -> ShadowVerdict | None:
        """Return the verdict after all frames, None before.

        The candidate is promoted if it never failed, its steps agree significantly better with odometry than
        those of the active checkpoint, of the positions given and of standing still, and not significantly
        more of its estimates lie further than three sigma from their fix.
        """
        if len(self) < self.frames:
            return None
        if self.failures:
            return ShadowVerdict(False, f"it failed on {self.failures} of {len(self)} frames")
        values = dict(zip(_NAMES, np.array(self._compared).T, strict=True))
        compared = int(np.isfinite(values["motion_m"]).sum())
        if compared < MIN_MEASUREMENTS:
            needed = f"{MIN_MEASUREMENTS} are needed (odometry and heading)"
            return ShadowVerdict(False, f"motion could be compared in {compared} frames, {needed}")
        means = self.means()
        promote = True
        rivals = []
        for name, (who, share) in _RIVALS.items():
            better = certainty_of_decrease(values["motion_m"] - share * values[name])
            promote = promote and better >= SIGNIFICANT
            rivals.append(f"{who} by {means[name]:.2f} m (better with {better:.0%} certainty)")
        text = f"its steps differ from odometry by {means['motion_m']:.2f} m, {', '.join(rivals)}; "
        far, far_active = (
            np.where(np.isfinite(values[name]), values[name] > SEARCH_SIGMAS, math.nan)
            for name in ("fix_sigmas", "fix_sigmas_active")
        )
        if np.isnan(far).all():
            return ShadowVerdict(promote, f"{text}the fixes have no covariance to compare with")
        more_strays = certainty_of_decrease(far_active - far)
        text += (
            f"{np.nanmean(far):.1%} of the estimates lie far from their fix instead of "
            f"{np.nanmean(far_active):.1%}"
        )
        return ShadowVerdict(promote and more_strays < SIGNIFICANT, text)


def _from_fix(fix: GnssFix | None, estimate: PoseEstimate, mounting: Mounting, yaw: float) -> float:
    """Return the distance of an estimate from the fix in the fix's standard deviations; NaN if unknown."""
    if fix is None or fix.covariance is None:
        return math.nan
    camera = mounting.camera_from_antenna(fix.lat, fix.lon, yaw)
    offset = np.array(LocalProjection(*camera).forward(estimate.lat, estimate.lon))
    return mahalanobis(offset, fix.covariance[:2, :2])
