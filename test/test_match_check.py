"""Estimates no better than chance, and estimates that are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from xview_loc.estimation.match_check import MatchCheck
from xview_loc.geodesy import LocalProjection

PLANE = LocalProjection(48.2, 16.37)
ANYWHERE = cast(Any, None)


def estimate(east: float, centre: tuple[float, float], found: tuple[float, float], radius: float) -> Any:
    """Of a vehicle so far east: the disc's middle is off by ``centre``, the estimate by ``found``, metres."""
    lat, lon = PLANE.inverse(east + centre[0], centre[1])
    disc = SimpleNamespace(lat=float(lat), lon=float(lon), radius_m=radius)
    lat, lon = PLANE.inverse(east + found[0], found[1])
    return cast(Any, SimpleNamespace(lat=float(lat), lon=float(lon), heat_map=SimpleNamespace(search=disc)))


def chance(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    angle, distance = rng.uniform(0.0, 2.0 * np.pi), radius * np.sqrt(rng.uniform())
    return float(distance * np.cos(angle)), float(distance * np.sin(angle))


@pytest.mark.parametrize("seed", range(20))
def test_chance_is_found_and_a_wandering_fix_with_outliers_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check, bias = MatchCheck(), rng.normal(size=2) * 10.0
    faults = []
    for k in range(60):
        bias = bias * 0.99 + rng.normal(size=2) * 1.4
        # Every fifth estimate is somewhere in the disc.
        found = chance(rng, 30.0) if k % 5 == 0 else tuple(rng.normal(size=2) * 3.0)
        check.add(estimate(6.0 * k, (float(bias[0]), float(bias[1])), found, 30.0), ANYWHERE)
        faults.append(bool(check.fault))
    assert not any(faults)
    for k in range(60, 100):
        centre = float(bias[0]), float(bias[1])
        away = chance(rng, 30.0)
        check.add(estimate(6.0 * k, centre, (centre[0] + away[0], centre[1] + away[1]), 30.0), ANYWHERE)
        faults.append(bool(check.fault))
    assert any(faults[60:80]) and np.mean(faults[75:]) > 0.8
    # Right again.
    for k in range(100, 120):
        check.add(estimate(6.0 * k, (0.0, 0.0), (1.0, 1.0), 30.0), ANYWHERE)
    assert not check.fault


def test_a_standing_vehicle_and_a_small_disc_say_nothing() -> None:
    rng = np.random.default_rng(0)
    standing, small = MatchCheck(), MatchCheck()
    for k in range(100):
        standing.add(estimate(0.0, (0.0, 0.0), chance(rng, 30.0), 30.0), ANYWHERE)
        small.add(estimate(6.0 * k, (0.0, 0.0), chance(rng, 8.0), 8.0), ANYWHERE)
        assert not standing.fault and not small.fault


@pytest.mark.parametrize("spread", [2.0, 40.0])
def test_whole_heat_maps_are_judged_as_well(spread: float) -> None:
    rng, check = np.random.default_rng(0), MatchCheck()
    for k in range(40):
        one = estimate(6.0 * k, (0.0, 0.0), chance(rng, spread), 0.0)
        place = one.heat_map.search
        one.heat_map = SimpleNamespace(search=None, probability=np.zeros((100, 100)), metres_per_pixel=0.8)
        check.add(one, place)
    assert bool(check.fault) == (spread == 40.0)
