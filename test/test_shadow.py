"""A candidate judged against the checkpoint in use, on drives whose estimates a test makes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xview_loc.geodesy import LocalProjection
from xview_loc.input_sync import GnssFix, HeadingSample
from xview_loc.mounting import Mounting
from xview_loc.odometry import Odometry, VelocitySample
from xview_loc.shadow import ShadowTrial

NS = 1_000_000_000
PLANE = LocalProjection(48.2, 16.37)
# base_link goes round a circle while the camera is in front of it: only together do they agree with odometry.
MOUNTING = Mounting(antenna=(-1.0, 0.0), camera=(2.0, 0.5))


def estimate(stamp_ns: int, place: np.ndarray, yaw: float, rng: np.random.Generator, error_m: float) -> Any:
    cos, sin = math.cos(yaw), math.sin(yaw)
    forward, left = MOUNTING.camera
    camera = place + (cos * forward - sin * left, sin * forward + cos * left) + error_m * rng.normal(size=2)
    lat, lon = PLANE.inverse(*camera)
    return SimpleNamespace(lat=lat, lon=lon, stamp_ns=stamp_ns, heat_map=SimpleNamespace(entropy=error_m))


def trial(
    active_m: float,
    candidate_m: float,
    *,
    frames: int = 80,
    stray_m: float = 0.0,
    odometry: bool = True,
    heading: bool = True,
) -> ShadowTrial:
    """After a drive with these errors; ``stray_m``: the candidate lies so far off everywhere alike."""
    rng = np.random.default_rng(0)
    wheels = Odometry(2.0)
    it = ShadowTrial(None, None, frames, wheels)  # type: ignore[arg-type]
    for i in range(frames):
        assert it.verdict() is None
        stamp, yaw = NS * (i + 1), 0.1 * i
        place = 50.0 * np.array([math.sin(yaw), 1.0 - math.cos(yaw)])
        if odometry:
            wheels.add(VelocitySample(stamp, 5.0, 0.0, 0.1))
        fix = GnssFix(stamp, *PLANE.inverse(*(place + 5.0)), 0.0, np.diag([100.0, 100.0, 1.0]))
        comparison = it.compare(
            estimate(stamp, place, yaw, rng, active_m),
            estimate(stamp, place + stray_m, yaw, rng, candidate_m),
            fix,
            HeadingSample(stamp, yaw, 0.03) if heading else None,
            MOUNTING,
        )
        assert comparison.entropy == candidate_m and comparison.entropy_active == active_m
    return it


def test_a_candidate_that_agrees_better_with_the_motion_is_promoted() -> None:
    better = trial(3.0, 0.5)
    verdict = better.verdict()
    assert verdict is not None and verdict.promote, verdict
    means = better.means()
    # Steps between two estimates with normal errors on each axis.
    assert means["motion_m_active"] == pytest.approx(3.0 * math.sqrt(math.pi), rel=0.2)
    assert means["motion_m"] == pytest.approx(0.5 * math.sqrt(math.pi), rel=0.2)
    assert "100% certainty" in verdict.text


def test_perfect_estimates_agree_with_the_odometry_of_a_turning_vehicle() -> None:
    # The pole is one metre behind base_link and two in front of it: swinging, all of it moves differently.
    assert trial(0.0, 0.0).means()["motion_m"] == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(
    ("active_m", "candidate_m", "stray_m"),
    [(0.5, 3.0, 0.0), (1.0, 1.0, 0.0), (3.0, 0.5, 40.0)],
    ids=["worse", "alike", "consistent, but far from every fix"],
)
def test_others_are_not(active_m: float, candidate_m: float, stray_m: float) -> None:
    verdict = trial(active_m, candidate_m, stray_m=stray_m).verdict()
    assert verdict is not None and not verdict.promote, verdict


@pytest.mark.parametrize("missing", ["odometry", "heading"])
def test_without_motion_nothing_is_promoted(missing: str) -> None:
    verdict = trial(3.0, 0.5, **{missing: False}).verdict()
    assert verdict is not None and not verdict.promote
    assert "0 frames, 60 are needed" in verdict.text
