"""Planes, headings and the grid of tile centres, over the globe."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyproj
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xview_loc.geodesy import (
    LocalProjection,
    azimuth_from_yaw,
    snap_to_grid,
    true_yaw,
    wrap_angle,
    yaw_from_azimuth,
)
from xview_loc.imagery import AerialTile

GEOD = pyproj.Geod(ellps="WGS84")
lats = st.floats(-84.0, 84.0)
lons = st.floats(-180.0, 180.0)
offsets = st.floats(-5000.0, 5000.0)
angles = st.floats(-10.0, 10.0)


def distance(a, b) -> float:
    return GEOD.inv(a[1], a[0], b[1], b[0])[2]


@given(lats, lons, offsets, offsets)
def test_plane_round_trip_is_below_a_millimetre(lat, lon, east, north):
    plane = LocalProjection(lat, lon)
    back = plane.forward(*plane.inverse(east, north))
    assert math.hypot(back[0] - east, back[1] - north) < 1e-3


@given(lats, lons, st.floats(-20.0, 532.0), st.floats(-20.0, 532.0), st.floats(-4.0, 4.0))
def test_tile_pixel_round_trip_is_below_a_millimetre(lat, lon, row, col, rotation):
    tile = AerialTile(np.zeros((512, 512, 3), np.uint8), lat, lon, 0.14, 1.0, rotation)
    back = tile.latlon_to_pixel(*tile.pixel_to_latlon(row, col))
    assert math.hypot(back[0] - row, back[1] - col) * tile.gsd < 1e-3


@given(lats, lons, st.floats(-50.0, 50.0), st.floats(-50.0, 50.0))
def test_distances_and_directions_over_a_tile_are_geodesic(lat, lon, east, north):
    plane = LocalProjection(lat, lon)
    place = plane.inverse(east, north)
    assert abs(distance((lat, lon), place) - math.hypot(east, north)) < 0.01
    # Between any two places of the tile, not only from its centre.
    other = plane.inverse(-north, east)
    assert abs(distance(other, place) - math.hypot(east + north, north - east)) < 0.01
    if math.hypot(east, north) > 1.0:
        azimuth = GEOD.inv(lon, lat, place[1], place[0])[0]
        assert abs(wrap_angle(yaw_from_azimuth(math.radians(azimuth)) - math.atan2(north, east))) < 1e-4


@pytest.mark.parametrize(("lon", "east"), [(179.9999, 100.0), (-179.9999, -100.0), (180.0, 30.0)])
def test_antimeridian(lon, east):
    plane = LocalProjection(12.0, lon)
    lat, across = plane.inverse(east, 0.0)
    assert -180.0 <= across <= 180.0
    assert abs(distance((12.0, lon), (lat, across)) - abs(east)) < 0.01
    assert plane.forward(lat, across)[0] == pytest.approx(east, abs=1e-3)


@given(st.floats(-80.0, 80.0), lons, offsets, offsets)
def test_convergence_turns_true_north_into_the_planes_axes(lat, lon, east, north):
    plane = LocalProjection(lat, lon)
    place = plane.inverse(east, north)
    x, y = plane.forward(place[0] + 1e-4, place[1])  # a little to the north of it
    seen = math.atan2(y - north, x - east)
    assert abs(wrap_angle(math.pi / 2 + plane.convergence(*place) - seen)) < 1e-5


@given(angles)
def test_yaw_and_azimuth_are_inverse(angle):
    assert wrap_angle(azimuth_from_yaw(yaw_from_azimuth(angle)) - angle) == pytest.approx(0.0, abs=1e-9)
    assert -math.pi < wrap_angle(angle) <= math.pi


def test_heading_conventions():
    assert yaw_from_azimuth(math.radians(90.0)) == pytest.approx(0.0)  # east
    assert yaw_from_azimuth(0.0) == pytest.approx(math.pi / 2)  # north
    # Magnetic north 10 deg east of true north: a compass that reads north looks at azimuth 10.
    assert azimuth_from_yaw(true_yaw(math.pi / 2, math.radians(10.0))) == pytest.approx(math.radians(10.0))


@given(lats, lons, st.floats(5.0, 50.0))
def test_snapped_centres_are_near_and_stay(lat, lon, step):
    snapped = snap_to_grid(lat, lon, step)
    assert distance((lat, lon), snapped) < 0.75 * step + 0.01
    again = snap_to_grid(*snapped, step)
    assert distance(snapped, again) < 1e-3
    assert snapped == snap_to_grid(lat, lon, step)


def test_many_threads_get_the_same_numbers():
    places = [(lat, lon) for lat in range(-80, 81, 20) for lon in range(-170, 171, 20)]

    def work(_: int) -> list[tuple[float, float]]:
        return [LocalProjection(*p).inverse(12.5, -7.5) for p in places]

    expected = work(0)
    with ThreadPoolExecutor(8) as pool:
        assert all(result == expected for result in pool.map(work, range(32)))
