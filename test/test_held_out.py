"""Students are judged on streets that they were not trained on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xview_loc.adaptation.held_out import held_out_stretches, share_near_others
from xview_loc.datasets.base import Track
from xview_loc.geodesy import LocalProjection

PLANE = LocalProjection(48.2, 16.37)


def track(*drives: list[tuple[float, float]]) -> Track:
    """Drives through places, metres east and north, five seconds from one to the next."""
    places = np.array([place for drive in drives for place in drive])
    number = np.repeat(np.arange(len(drives)), list(map(len, drives)))
    lat, lon = PLANE.inverse(*places.T)
    unknown = np.full((len(places), 2), math.nan)
    return Track(number, np.arange(len(places)) * 5 * 10**9, lat, lon, unknown)


def street(
    start: tuple[float, float], end: tuple[float, float], count: int = 40
) -> list[tuple[float, float]]:
    return [tuple(p) for p in np.linspace(start, end, count)]  # type: ignore[misc]


def test_the_end_of_a_drive_without_loops_is_held_out() -> None:
    straight = track(street((0, 0), (1000, 0), 100))
    held = held_out_stretches(straight, 0.1)
    assert held.tolist() == list(range(90, 100))
    # It begins where the others end.
    assert 0.0 < share_near_others(straight, held) < 0.5


def test_a_street_of_its_own_is_held_out() -> None:
    """Out along one street, through a side street, and back along the first."""
    out, side = street((0, 0), (800, 0)), street((800, 100), (800, 500))
    back = street((800, 0), (0, 0), 80)
    there = track(out + side + back)
    held = held_out_stretches(there, 0.1)
    assert len(held) == 16 and held[0] >= 40 and held[-1] < 80
    assert share_near_others(there, np.arange(120, 136)) == 1.0


def test_every_drive_is_judged() -> None:
    drives = track(street((0, 0), (900, 0)), street((0, 300), (900, 300)), street((0, 600), (5, 600), 2))
    held = held_out_stretches(drives, 0.25)
    assert np.bincount(drives.drive[held], minlength=3).tolist() == [10, 10, 0]
    assert np.array_equal(held, np.sort(held))


def test_where_all_streets_are_driven_again_the_end_is_taken() -> None:
    round_trip = street((0, 0), (400, 0)) + street((400, 0), (0, 0))
    twice = track(round_trip, round_trip)
    held = held_out_stretches(twice, 0.1)
    assert held.tolist() == [*range(72, 80), *range(152, 160)]
    assert share_near_others(twice, held) == pytest.approx(1.0)
