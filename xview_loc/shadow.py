"""A candidate checkpoint beside the one in use, on the same frames: which of them believes itself?

Nobody knows the true place on a vehicle. What is known: how far the vehicle moved by its odometry, and that
the true place lies near the coarse fix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from xview_loc.bootstrap import LEAST, SURE, bootstrap_means
from xview_loc.calibration import mahalanobis
from xview_loc.checkpoint_swap import Deployed
from xview_loc.geodesy import LocalProjection
from xview_loc.input_sync import GnssFix, HeadingSample
from xview_loc.localizer import SEARCH_SIGMAS, PoseEstimate
from xview_loc.mounting import Mounting, in_enu
from xview_loc.odometry import Odometry

# One wild estimate must not decide over a checkpoint: a disagreement counts no more than this, metres.
_MOST_M = 20.0

Place = tuple[float, float]


@dataclass(frozen=True)
class FrameComparison:
    """One frame seen by both; ``_active`` is the checkpoint in use. Not-a-number where it cannot be told.

    distance_m: between the two estimates. entropy: of the heat map, nats. motion_m: how far the step from
    the last compared frame differs from the odometry's, at most 20. fix_sigmas: distance from the fix.
    """

    distance_m: float
    entropy: float
    entropy_active: float
    motion_m: float
    motion_m_active: float
    fix_sigmas: float
    fix_sigmas_active: float


@dataclass(frozen=True)
class ShadowVerdict:
    """Whether the candidate is surely better, and the evidence in one line."""

    promote: bool
    text: str


class ShadowTrial:
    """Compares a candidate with the checkpoint in use over ``frames`` frames; for use by one thread."""

    def __init__(self, active: Deployed, candidate: Deployed, frames: int, odometry: Odometry) -> None:
        self.active = active
        self.candidate = candidate
        self.frames = frames
        self._odometry = odometry
        self._compared: list[FrameComparison] = []
        # Of the last compared frame: its stamp and both places of base_link, the active one first.
        self._last: tuple[int, tuple[Place, Place]] | None = None

    def __len__(self) -> int:
        """How many frames were compared."""
        return len(self._compared)

    def compare(
        self,
        active: PoseEstimate,
        candidate: PoseEstimate,
        fix: GnssFix,
        heading: HeadingSample | None,
        mounting: Mounting,
    ) -> FrameComparison:
        """Compare two estimates of one frame. Without a measured heading the motion cannot be compared."""
        yaw = 0.0 if heading is None else heading.yaw
        places = (
            mounting.base_from_camera(active.lat, active.lon, yaw),
            mounting.base_from_camera(candidate.lat, candidate.lon, yaw),
        )
        motion = [math.nan, math.nan]
        if self._last is not None and heading is not None:
            stamp_ns, before = self._last
            driven = self._odometry.between(stamp_ns, active.stamp_ns)
            if driven is not None:
                step = in_enu((driven.forward, driven.left), yaw - driven.turn)
                motion = [
                    min(_MOST_M, math.dist(LocalProjection(*a).forward(*b), step))
                    for a, b in zip(before, places, strict=True)
                ]
        self._last = (active.stamp_ns, places)
        sigmas = [_from_fix(fix, estimate, mounting, yaw) for estimate in (active, candidate)]
        comparison = FrameComparison(
            distance_m=math.hypot(*LocalProjection(*places[0]).forward(*places[1])),
            entropy=candidate.heat_map.entropy,
            entropy_active=active.heat_map.entropy,
            motion_m=motion[1],
            motion_m_active=motion[0],
            fix_sigmas=sigmas[1],
            fix_sigmas_active=sigmas[0],
        )
        self._compared.append(comparison)
        return comparison

    def means(self) -> dict[str, float]:
        """Of every figure, over the frames where it can be told."""
        return {
            f.name: float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
            for f in fields(FrameComparison)
            for values in [self._values(f.name)]
        }

    def verdict(self) -> ShadowVerdict | None:
        """After all the frames; None before.

        The candidate is to replace the one in use where its steps surely agree better with the odometry, and
        not surely more of its estimates lie further than three sigma from their fix.
        """
        if len(self) < self.frames:
            return None
        change = self._values("motion_m") - self._values("motion_m_active")
        told = int(np.isfinite(change).sum())
        if told < LEAST:
            text = f"motion could be compared in {told} frames, {LEAST} are needed (odometry and heading)"
            return ShadowVerdict(False, text)
        better = float((bootstrap_means(change) < 0).mean())
        means = self.means()
        text = (
            f"steps differ from odometry by {means['motion_m']:.2f} m instead of "
            f"{means['motion_m_active']:.2f} m (better with {better:.0%} certainty); "
        )
        sigmas = [self._values(name) for name in ("fix_sigmas", "fix_sigmas_active")]
        far, far_active = (np.where(np.isfinite(s), s > SEARCH_SIGMAS, math.nan) for s in sigmas)
        if np.isnan(far).all():
            return ShadowVerdict(better >= SURE, f"{text}the fixes have no covariance to compare with")
        strays = float((bootstrap_means(far - far_active) > 0).mean())
        text += (
            f"{np.nanmean(far):.1%} of the estimates lie far from their fix instead of "
            f"{np.nanmean(far_active):.1%}"
        )
        return ShadowVerdict(better >= SURE and strays < SURE, text)

    def _values(self, name: str) -> NDArray[np.float64]:
        return np.array([getattr(comparison, name) for comparison in self._compared], float)


def _from_fix(fix: GnssFix, estimate: PoseEstimate, mounting: Mounting, yaw: float) -> float:
    """Standard deviations of the fix between it and an estimate; not-a-number without a covariance."""
    if fix.covariance is None:
        return math.nan
    camera = mounting.camera_from_antenna(fix.lat, fix.lon, yaw)
    offset = np.array(LocalProjection(*camera).forward(estimate.lat, estimate.lon))
    return mahalanobis(offset, fix.covariance[:2, :2])
