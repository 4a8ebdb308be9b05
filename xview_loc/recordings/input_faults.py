"""Find contradictions between the fixes, headings and odometry of a recording."""

from __future__ import annotations

import math

import numpy as np

from xview_loc.recordings.pair_reader import PairBag
from xview_loc.vehicle.heading_check import HeadingCheck
from xview_loc.vehicle.motion_check import MotionCheck
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

# Longest gap that odometry is interpolated over, seconds; as in the node.
_ODOMETRY_GAP_S = 1.0
# Share of the pairs at which a fault must hold.
_MOSTLY = 0.5


def input_faults(bag: PairBag) -> list[str]:
    """Return what the node's checks found wrong at most pairs, in words. Raises BagError if it is damaged."""
    odometry = Odometry(_ODOMETRY_GAP_S)
    headings, motion = HeadingCheck(odometry), MotionCheck(odometry)
    found: list[tuple[str, ...]] = []
    velocities = bag.velocities()
    velocity = next(velocities, None)
    for stamp_ns, lat, lon, sigma, yaw in bag.poses():
        while velocity is not None and velocity.stamp_ns <= stamp_ns:
            odometry.add(velocity)
            velocity = next(velocities, None)
        if yaw is not None:
            headings.add_heading(HeadingSample(stamp_ns, yaw, 0.0))
        covariance = None if math.isnan(sigma) else sigma**2 * np.eye(3)
        fix = GnssFix(stamp_ns, lat, lon, 0.0, covariance)
        headings.add_fix(fix)
        motion.add(fix)
        faults = str(headings.fault or ""), motion.odom_still, motion.fix_still, motion.odom_disagrees
        found.append(faults)
    return [
        next(text for text in reversed(texts) if text)
        for texts in zip(*found, strict=True)
        if sum(map(bool, texts)) > _MOSTLY * len(texts)
    ]
