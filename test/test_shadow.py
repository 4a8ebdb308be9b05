"""A candidate judged against the checkpoint in use, on drives whose estimates a test makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xview_loc.estimation.observation import Observation
from xview_loc.estimation.shadow import ShadowTrial
from xview_loc.geodesy import LocalProjection
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

NS = 1_000_000_000
PLANE = LocalProjection(48.2, 16.37)
# base_link goes round a circle while the camera is in front of it: only together do they agree with odometry.
MOUNTING = Mounting(antenna=(-1.0, 0.0), camera=(2.0, 0.5))
SPREAD_M = 20.0
IMAGE = np.zeros((1, 1, 3), np.uint8)

Array = np.ndarray[Any, np.dtype[np.float64]]
# The camera's place that a model answers with, of the true one and the one that it is given; in the plane.
Answer = Callable[[Array, Array], Array]


def near(error_m: float, seed: int = 0) -> Answer:
    """A model that looks: the true place with an error on each axis."""
    rng = np.random.default_rng(seed)
    return lambda true, given: true + error_m * rng.normal(size=2)


def the_place_given(true: Array, given: Array) -> Array:
    return given


def the_middle_of_the_tile(true: Array, given: Array) -> Array:
    return np.asarray(np.round(given / SPREAD_M) * SPREAD_M)


def the_nearest_crossing(true: Array, given: Array) -> Array:
    return np.asarray(np.round(true / 70.0) * 70.0)


def estimate(place: Array) -> Any:
    lat, lon = PLANE.inverse(*place)
    return SimpleNamespace(lat=lat, lon=lon, heat_map=SimpleNamespace(entropy=place[0]))


def new_trial(odometry: Odometry, every: int = 1, frames: int = 80) -> ShadowTrial:
    return ShadowTrial(None, None, odometry, every=every, frames=frames, spread_m=SPREAD_M)  # type: ignore[arg-type]


def trial(
    active: Answer,
    candidate: Answer,
    *,
    frames: int = 80,
    odometry: bool = True,
    heading: bool = True,
    failures: int = 0,
) -> ShadowTrial:
    """After ten metres' steps round a circle; the candidate fails on the first frames."""
    wheels = Odometry(2.0)
    it = new_trial(wheels, frames=frames)
    for i in range(frames):
        assert it.verdict() is None
        stamp, yaw = NS * (i + 1), 0.1 * i
        base = 100.0 * np.array([math.sin(yaw), 1.0 - math.cos(yaw)])
        if odometry:
            wheels.add(VelocitySample(stamp, 10.001, 0.0, 0.1))
        assert it.wants(stamp)
        true = base + in_enu(MOUNTING.camera, yaw)
        # The fix's error hardly changes: alone, it agrees with the odometry.
        observation = it.displaced(Observation(IMAGE, *PLANE.inverse(*(true + 5.0)), stamp_ns=stamp))
        given = np.array(PLANE.forward(observation.lat, observation.lon))
        if i < failures:
            it.failed()
            continue
        fix = GnssFix(stamp, *PLANE.inverse(*(base + 5.0)), 0.0, np.diag([100.0, 100.0, 1.0]))
        it.compare(
            observation,
            estimate(active(true, given)),
            estimate(candidate(true, given)),
            fix,
            HeadingSample(stamp, yaw, 0.03) if heading else None,
            MOUNTING,
        )
    return it


def test_a_candidate_that_agrees_better_with_the_motion_is_promoted() -> None:
    better = trial(near(3.0), near(0.5, seed=1))
    verdict = better.verdict()
    assert verdict is not None and verdict.promote, verdict
    means = better.means()
    # Steps between two estimates with normal errors on each axis.
    assert means["motion_m_active"] == pytest.approx(3.0 * math.sqrt(math.pi), rel=0.2)
    assert means["motion_m"] == pytest.approx(0.5 * math.sqrt(math.pi), rel=0.2)
    assert means["motion_m_given"] == pytest.approx(0.52 * SPREAD_M, rel=0.2)
    assert means["motion_m_standing"] == pytest.approx(10.0, rel=0.01)
    assert "the one in use" in verdict.text and "100% certainty" in verdict.text


def test_perfect_estimates_agree_with_the_odometry_of_a_turning_vehicle() -> None:
    assert trial(near(0.0), near(0.0)).means()["motion_m"] == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(
    ("active", "candidate"),
    [
        (near(0.5), near(3.0, seed=1)),
        (near(1.0), near(1.0, seed=1)),
        (near(3.0), lambda true, given: true + 40.0),
    ],
    ids=["worse", "alike", "consistent, but far from every fix"],
)
def test_others_are_not(active: Answer, candidate: Answer) -> None:
    verdict = trial(active, candidate).verdict()
    assert verdict is not None and not verdict.promote, verdict


@pytest.mark.parametrize("blind", [the_place_given, the_middle_of_the_tile, the_nearest_crossing])
def test_a_candidate_that_does_not_look_at_the_image_is_not_promoted(blind: Answer) -> None:
    it = trial(near(15.0), blind, frames=200)
    means, verdict = it.means(), it.verdict()
    # Though its steps are better than those of the checkpoint in use.
    assert means["motion_m"] < means["motion_m_active"] - 1.0
    assert verdict is not None and not verdict.promote, verdict


def test_a_candidate_that_fails_is_not_promoted() -> None:
    it = trial(near(3.0), near(0.0), failures=2)
    verdict = it.verdict()
    assert verdict is not None and not verdict.promote and "failed on 2 of 80 frames" in verdict.text


@pytest.mark.parametrize("missing", ["odometry", "heading"])
def test_without_motion_nothing_is_promoted(missing: str) -> None:
    verdict = trial(near(3.0), near(0.5), **{missing: False}).verdict()  # type: ignore[arg-type]
    assert verdict is not None and not verdict.promote
    assert "0 frames, 60 are needed" in verdict.text


def test_a_worse_place_is_given_and_says_so() -> None:
    it = new_trial(Odometry(1.0))
    observation = Observation(IMAGE, 48.2, 16.37, fix_covariance=np.eye(2) * 4.0, heading=0.3, stamp_ns=7)
    seen = [it.displaced(observation) for _ in range(400)]
    assert {(o.heading, o.stamp_ns) for o in seen} == {(0.3, 7)}
    places = np.array([PLANE.forward(o.lat, o.lon) for o in seen])
    assert np.abs(places).max() < SPREAD_M / 2 and np.abs(places).max() > 0.45 * SPREAD_M
    assert np.mean(places**2) == pytest.approx(SPREAD_M**2 / 12, rel=0.1)
    assert seen[0].fix_covariance == pytest.approx(np.eye(2) * (4.0 + SPREAD_M**2 / 12))


def test_a_standing_vehicle_is_not_compared() -> None:
    wheels = Odometry(1.0)
    it = new_trial(wheels, every=2)
    mounting, here = Mounting(), np.zeros(2)
    wanted = []
    for i in range(40):  # a tenth of a second each: standing for two seconds, then at 10 m/s
        stamp = NS + i * NS // 10
        wheels.add(VelocitySample(stamp, 10.0 if i >= 20 else 0.0, 0.0, 0.0))
        if it.wants(stamp):
            wanted.append(i)
            observation = it.displaced(Observation(IMAGE, *PLANE.inverse(*here), stamp_ns=stamp))
            it.compare(observation, estimate(here), estimate(here), None, None, mounting)
    assert wanted == [1, 31]
