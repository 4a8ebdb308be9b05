"""Students are judged on streets that they were not trained on."""

from __future__ import annotations

import math

import numpy as np

from xview_loc.adaptation.held_out import held_out_edges, share_near_others
from xview_loc.datasets.base import Track
from xview_loc.geodesy import LocalProjection

PLANE = LocalProjection(48.2, 16.37)
Place = tuple[float, float]


def track(*drives: list[Place]) -> Track:
    """Drives through places, metres east and north, five seconds from one to the next."""
    places = np.array([place for drive in drives for place in drive])
    number = np.repeat(np.arange(len(drives)), list(map(len, drives)))
    lat, lon = PLANE.inverse(*places.T)
    unknown = np.full((len(places), 2), math.nan)
    return Track(number, np.arange(len(places)) * 5 * 10**9, lat, lon, unknown)


def street(start: Place, end: Place, count: int = 40) -> list[Place]:
    return [(float(x), float(y)) for x, y in np.linspace(start, end, count)]


def test_an_end_of_a_straight_drive_is_held_out() -> None:
    straight = track(street((0, 0), (1000, 0), 100))
    held = held_out_edges(straight, 0.1)
    assert held.tolist() in (list(range(10)), list(range(90, 100)))
    # It begins where the others end.
    assert 0.0 < share_near_others(straight, held) < 0.5


def test_a_street_driven_both_ways_is_held_out_both_ways() -> None:
    there = track(street((0, 0), (800, 0)) + street((800, 0), (0, 0)), street((0, 0), (800, 0)))
    held = held_out_edges(there, 0.1)
    assert len(held) == 12
    assert len(set(np.floor_divide(held, 40))) == 3
    assert share_near_others(there, held) < 0.5
    # As was the end of each drive.
    assert share_near_others(there, np.arange(72, 80)) == 1.0


def test_the_edge_with_streets_of_its_own_is_held_out() -> None:
    """Round and round a block, with one excursion to the south."""
    block = [
        *street((0, 0), (300, 0), 15),
        *street((300, 0), (300, 300), 15),
        *street((300, 300), (0, 300), 15),
        *street((0, 300), (0, 0), 15),
    ]
    excursion = street((150, -30), (150, -400), 14) + street((150, -400), (150, -30), 14)
    drive = track(block + excursion + block)
    held = held_out_edges(drive, 0.1)
    assert held.min() >= 60 and held.max() < 88
    assert share_near_others(drive, held) < 0.25


def test_every_area_is_judged() -> None:
    here, there = street((0, 0), (900, 0)), street((20_000, 0), (20_000, 900), 80)
    drives = track(here, there, street((-30_000, 0), (-30_000, 5), 2))
    held = held_out_edges(drives, 0.25)
    assert np.bincount(drives.drive[held], minlength=3).tolist() == [10, 20, 0]
    assert np.array_equal(held, np.sort(held))


def test_areas_are_told_apart_anywhere_on_earth() -> None:
    """Two towns on either side of the globe, each driven once along a street."""
    lat = np.concatenate([np.linspace(60.0, 60.02, 50), np.linspace(-35.0, -35.02, 50)])
    lon = np.concatenate([np.full(50, 25.0), np.full(50, -150.0)])
    stamps = np.arange(100) * 5 * 10**9
    both = Track(np.repeat([0, 1], 50), stamps, lat, lon, np.full((100, 2), math.nan))
    held = held_out_edges(both, 0.1)
    assert np.bincount(both.drive[held]).tolist() == [5, 5]
    assert share_near_others(both, held) <= 0.2


def test_areas_too_small_for_an_edge_are_held_out_whole() -> None:
    """A hundred places of three pairs each, five kilometres apart."""
    drives = track(*(street((5000.0 * k, 0), (5000.0 * k + 20, 0), 3) for k in range(100)))
    held = held_out_edges(drives, 0.1)
    assert 27 <= len(held) <= 33 and set(np.bincount(drives.drive[held])) <= {0, 3}
    assert share_near_others(drives, held) == 0.0


def test_without_further_streets_the_share_says_so() -> None:
    standing = track([(0.0, 0.0)] * 40)
    held = held_out_edges(standing, 0.1)
    assert len(held) == 4 and share_near_others(standing, held) == 1.0
