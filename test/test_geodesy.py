from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Geod

from xview_loc.geodesy import (
    LocalProjection,
    azimuth_from_yaw,
    snap_to_grid,
    true_yaw,
    wrap_angle,
    wrap_longitude,
    yaw_from_azimuth,
)
from xview_loc.maps.base import AerialTile

GEOD = Geod(ellps="WGS84")
LATITUDES = st.floats(-84.0, 84.0)
LONGITUDES = st.floats(-180.0, 180.0)
ANGLES = st.floats(-50.0, 50.0)


def metres_between(a, b):
    return GEOD.inv(a[1], a[0], b[1], b[0])[2]


@given(LATITUDES, LONGITUDES, st.floats(-5000.0, 5000.0), st.floats(-5000.0, 5000.0))
def test_metres_survive_the_round_trip(lat, lon, east, north):
    plane = LocalProjection(lat, lon)
    back = plane.forward(*plane.inverse(east, north))
    assert math.hypot(back[0] - east, back[1] - north) < 1e-3


@given(LATITUDES, LONGITUDES, st.floats(0.0, 20_000.0), st.floats(0.0, 360.0))
def test_places_survive_the_round_trip(lat, lon, distance, azimuth):
    lon1, lat1, _ = GEOD.fwd(lon, lat, azimuth, distance)
    plane = LocalProjection(lat, lon)
    assert metres_between((lat1, lon1), plane.inverse(*plane.forward(lat1, lon1))) < 1e-3


@given(LATITUDES, LONGITUDES, st.floats(0.01, 71.0), st.floats(0.0, 360.0))
def test_agrees_with_the_geodesic_over_a_tile(lat, lon, distance, azimuth):
    lon1, lat1, _ = GEOD.fwd(lon, lat, azimuth, distance)
    east, north = LocalProjection(lat, lon).forward(lat1, lon1)
    a = math.radians(azimuth)
    assert math.hypot(east - distance * math.sin(a), north - distance * math.cos(a)) < 0.01


@given(LATITUDES, LONGITUDES, st.floats(-40.0, 551.0), st.floats(-40.0, 551.0), ANGLES)
def test_pixels_survive_the_round_trip(lat, lon, row, col, rotation):
    tile = AerialTile(np.zeros((512, 512, 3), np.uint8), lat, lon, 0.14, rotation=rotation)
    assert tile.latlon_to_pixel(*tile.pixel_to_latlon(row, col)) == pytest.approx((row, col), abs=1e-3 / 0.14)
    # ... and by way of a map frame with another datum.
    datum = LocalProjection(lat * 0.999, lon)
    place = datum.inverse(*datum.forward(*tile.pixel_to_latlon(row, col)))
    assert tile.latlon_to_pixel(*place) == pytest.approx((row, col), abs=1e-3 / 0.14)


def test_across_the_antimeridian():
    plane = LocalProjection(-16.8, 179.9999)
    east, north = plane.forward(-16.8, -179.9999)
    assert east == pytest.approx(21.3, abs=0.1) and north == pytest.approx(0.0, abs=0.01)
    lat, lon = plane.inverse(east, north)
    assert metres_between((lat, lon), (-16.8, -179.9999)) < 1e-3 and -180.0 <= lon < -179.0
    assert plane.forward(-16.8, 180.0) == pytest.approx(plane.forward(-16.8, -180.0))
    # Longitudes that were never wrapped mean the same place.
    assert LocalProjection(-16.8, 539.9999).forward(-16.8, -179.9999)[0] == pytest.approx(east, abs=1e-3)


def test_arrays_and_floats():
    plane = LocalProjection(48.0, 16.0)
    east, north = plane.forward(np.array([48.0, 48.001]), np.array([16.0, 16.001]))
    assert east.shape == north.shape == (2,)
    assert isinstance(plane.forward(48.0, 16.0)[0], float)
    assert plane.convergence(np.array([48.0, 48.0]), np.array([16.0, 16.1])).shape == (2,)
    assert isinstance(plane.convergence(48.0, 16.0), float)


@pytest.mark.parametrize("place", [(91.0, 0.0), (math.nan, 0.0), (0.0, math.inf)])
def test_not_a_place(place):
    with pytest.raises(ValueError, match="not a place"):
        LocalProjection(*place)


def test_convergence_turns_true_yaws_into_the_planes():
    plane = LocalProjection(48.0, 16.0)
    assert plane.convergence(48.0, 16.0) == pytest.approx(0.0, abs=1e-9)
    assert plane.convergence(48.0, 16.1) == pytest.approx(
        math.radians(0.1) * math.sin(math.radians(48)), rel=1e-3
    )
    assert plane.convergence(48.0, 15.9) < 0.0
    assert LocalProjection(-48.0, 16.0).convergence(-48.0, 16.1) < 0.0


@given(st.floats(-80.0, 80.0), LONGITUDES, ANGLES)
def test_convergence_is_what_a_short_step_shows(lat, lon, yaw):
    plane = LocalProjection(lat, lon)
    at_lat, at_lon = plane.inverse(8000.0, 5000.0)
    ahead_lon, ahead_lat, _ = GEOD.fwd(at_lon, at_lat, math.degrees(azimuth_from_yaw(yaw)), 10.0)
    e0, n0 = plane.forward(at_lat, at_lon)
    e1, n1 = plane.forward(ahead_lat, ahead_lon)
    expected = yaw + plane.convergence(at_lat, at_lon)
    assert abs(wrap_angle(math.atan2(n1 - n0, e1 - e0) - expected)) < 1e-5


def test_headings():
    assert yaw_from_azimuth(0.0) == pytest.approx(math.pi / 2)  # north
    assert yaw_from_azimuth(math.pi / 2) == pytest.approx(0.0)  # east
    assert yaw_from_azimuth(math.pi) == pytest.approx(-math.pi / 2)  # south
    assert azimuth_from_yaw(math.pi) == pytest.approx(1.5 * math.pi)  # west
    # The needle points 5 degrees east of north: what reads north is azimuth 5, yaw 85 degrees.
    assert true_yaw(math.radians(90.0), math.radians(5.0)) == pytest.approx(math.radians(85.0))


@given(ANGLES)
def test_angles_wrap(angle):
    wrapped = wrap_angle(angle)
    assert -math.pi < wrapped <= math.pi
    assert math.cos(wrapped - angle) == pytest.approx(1.0)
    assert math.cos(yaw_from_azimuth(azimuth_from_yaw(angle)) - angle) == pytest.approx(1.0)
    assert 0.0 <= azimuth_from_yaw(angle) < 2.0 * math.pi


def test_wraps_at_the_ends():
    assert wrap_angle(-math.pi) == wrap_angle(math.pi) == math.pi
    assert wrap_longitude(-180.0) == wrap_longitude(540.0) == 180.0


@given(LATITUDES, LONGITUDES, st.sampled_from([5.0, 18.0, 100.0]))
def test_snapping(lat, lon, step):
    node = snap_to_grid(lat, lon, step)
    plane = LocalProjection(*node)
    east, north = plane.forward(lat, lon)
    assert abs(east) <= step / 2.0 * 1.001 and abs(north) <= step / 2.0 * 1.001
    assert snap_to_grid(*node, step) == node
    assert -180.0 < node[1] <= 180.0


def test_snapping_at_the_antimeridian_and_the_poles():
    assert snap_to_grid(10.0, 180.0, 18.0) == snap_to_grid(10.0, -180.0, 18.0)
    assert snap_to_grid(10.0, 179.99999, 18.0) == snap_to_grid(10.0, -179.99999, 18.0)
    for lat in (-90.0, 90.0):
        assert abs(snap_to_grid(lat, 12.0, 18.0)[0]) <= 90.0
    with pytest.raises(ValueError, match="positive"):
        snap_to_grid(0.0, 0.0, 0.0)


def test_threads_share_projections():
    planes = [LocalProjection(10.0 + i / 2, 20.0) for i in range(100)]  # more than a thread's cache holds
    expected = [plane.forward(plane.lat + 0.001, 20.001) for plane in planes]
    wrong: list[object] = []

    def work():
        for _ in range(10):
            got = [plane.forward(plane.lat + 0.001, 20.001) for plane in planes]
            if got != expected:
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
