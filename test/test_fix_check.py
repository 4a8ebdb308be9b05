"""Fixes that the heat maps contradict, and fixes that they do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from xview_loc.estimation.fix_check import FixCheck
from xview_loc.geodesy import LocalProjection

PLANE = LocalProjection(48.2, 16.37)


def image(east: float, log_share: float) -> Any:
    """Heat map and observation of a vehicle so far east, with so much of the map where the fix may be."""
    lat, lon = PLANE.inverse(east, 0.0)
    fix = SimpleNamespace(lat=float(lat), lon=float(lon), fix_covariance=1e-4 * np.eye(2))
    return cast(Any, (SimpleNamespace(log_share=log_share, search=fix), fix))


@pytest.mark.parametrize("seed", range(20))
def test_discs_that_heat_maps_contradict_image_after_image_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check, faults = FixCheck(), []
    # Mostly right; every tenth heat map sees the vehicle elsewhere.
    for k in range(200):
        check.add(*image(6.0 * k, -4.0 if k % 10 == 0 else rng.uniform(-1.0, 0.0)))
        faults.append(bool(check.fault))
    assert not any(faults)
    for k in range(200, 220):
        check.add(*image(6.0 * k, rng.uniform(-5.0, -3.0)))
        faults.append(bool(check.fault))
    assert all(faults[204:220])
    for k in range(220, 230):
        check.add(*image(6.0 * k, 0.0))
    assert not check.fault


def test_one_image_is_enough_if_it_is_sure_and_standing_adds_no_evidence() -> None:
    check = FixCheck()
    check.add(*image(0.0, -20.0))
    assert "5 m around the fix" in check.fault
    # Driving on with right fixes.
    for k in range(1, 4):
        check.add(*image(6.0 * k, 0.0))
    assert not check.fault
    # A fix without a covariance claims nothing, and what was before it counts no more.
    check.add(*image(18.0, -20.0))
    heat_map, fix = image(18.0, 0.0)
    check.add(heat_map, cast(Any, SimpleNamespace(lat=fix.lat, lon=fix.lon, fix_covariance=None)))
    assert not check.fault
    check.add(*image(18.0, -4.0))
    assert not check.fault
    check = FixCheck()
    for _ in range(100):
        check.add(*image(0.0, -4.0))
        assert not check.fault
