"""The search for a place without fixes, with scores that a test makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from xview_loc.estimation.heat_map import HeatMapError, TileScores, joint_heat_maps
from xview_loc.estimation.place_search import FOUND_IMAGES, FOUND_IMAGES_AGAIN, PlaceSearch, SearchArea
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import Calibration, HeatMapGrid
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import HeadingSample

NS = 1_000_000_000
PLANE = LocalProjection(48.2, 16.37)
SIDE, GSD = 80, 0.96
HALF_M = SIDE * GSD / 2.0
SPEED, TURN = 8.0, 0.04


@dataclass
class Vehicle:
    """Drives from a place, and scores tiles: high where it is, and at wrong places of a tile or two."""

    seed: int = 0
    place: tuple[float, float] = (0.0, 0.0)
    known: bool = True
    mounting: Mounting = field(default_factory=Mounting)
    wrong: bool = False

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.odometry = Odometry(1.0)
        self.at, self.yaw, self.ns = np.array(self.place), 0.7, NS
        self.odometry.add(VelocitySample(self.ns, SPEED, 0.0, TURN))

    def drive(self, seconds: float, speed: float = SPEED) -> None:
        for _ in range(round(seconds * 10)):
            self.at = self.at + 0.1 * speed * np.array([math.cos(self.yaw), math.sin(self.yaw)])
            self.yaw += 0.1 * TURN * (speed > 0.0)
            self.ns += NS // 10
            self.odometry.add(VelocitySample(self.ns, speed, 0.0, TURN * (speed > 0.0)))

    def score(self, lat: float, lon: float) -> TileScores:
        tile = AerialTile(np.zeros((SIDE, SIDE, 3), np.uint8), lat, lon, GSD)
        east, north = PLANE.forward(lat, lon)
        rows, cols = np.mgrid[:SIDE, :SIDE]
        x, y = tile.pixel_to_enu(rows, cols)
        logits = np.zeros((SIDE, SIDE), np.float32)
        camera = self.at + in_enu(self.mounting.camera, self.yaw)
        places = [] if self.wrong else [camera + 0.8 * self.rng.normal(size=2)]
        if self.wrong or self.rng.random() < 0.3:
            places.append(np.array([east, north]) + self.rng.uniform(-HALF_M / 2, HALF_M / 2, 2))
        for place in places:
            squared = (x + east - place[0]) ** 2 + (y + north - place[1]) ** 2
            logits = np.maximum(logits, 8.0 * np.exp(-squared / 8.0))
        if self.known:
            return TileScores(logits, HeatMapGrid(), tile)
        # At wrong places the field says anything.
        angles = self.rng.uniform(-math.pi, math.pi, (SIDE, SIDE))
        near = np.hypot(x + east - camera[0], y + north - camera[1]) < 6.0
        looking = self.mounting.looking(self.yaw) + 0.1 * self.rng.normal()
        angles = np.where(near & (not self.wrong), looking, angles)
        cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        return TileScores(logits, HeatMapGrid(), tile, cos, sin)

    def see(self, search: PlaceSearch) -> None:
        heading = HeadingSample(self.ns, self.yaw, math.radians(2.0)) if self.known else None
        search.move(self.ns, heading)
        scan = [self.score(*centre) for centre in search.centres(self.mounting)]
        search.observe(scan, Calibration(), self.mounting)

    def area(self, radius_m: float, away_m: float = 0.0) -> SearchArea:
        angle = self.rng.uniform(-math.pi, math.pi)
        x, y = self.at + away_m * np.array([math.cos(angle), math.sin(angle)])
        return SearchArea(*(float(v) for v in PLANE.inverse(x, y)), radius_m)

    def error(self, search: PlaceSearch) -> float:
        assert search.found is not None
        return float(np.hypot(*(np.array(PLANE.forward(search.found.lat, search.found.lon)) - self.at)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("known", [True, False])
def test_the_place_is_found(seed: int, known: bool) -> None:
    vehicle = Vehicle(seed, known=known, mounting=Mounting(camera=(3.0, 1.0), camera_yaw=0.5))
    search = PlaceSearch(vehicle.area(150.0, away_m=120.0), vehicle.odometry, HALF_M)
    first = None
    for _ in range(12):
        vehicle.see(search)
        first = first or len(search.centres(vehicle.mounting))
        if search.found is not None:
            break
        vehicle.drive(3.0)
    assert search.images >= FOUND_IMAGES and vehicle.error(search) < 3.0
    assert len(search.centres(vehicle.mounting)) <= 2 < first
    pose = search.found
    assert pose is not None and pose.heading is not None and pose.stamp_ns == vehicle.ns
    assert abs(wrap_angle(pose.heading - vehicle.yaw)) < math.radians(10.0)
    assert np.sqrt(pose.covariance.trace()) < 6.0


def test_nothing_is_sure_while_the_vehicle_stands() -> None:
    vehicle = Vehicle(1)
    search = PlaceSearch(vehicle.area(100.0, away_m=50.0), vehicle.odometry, HALF_M)
    for _ in range(20):
        vehicle.see(search)
        assert search.found is None
        vehicle.drive(1.0, speed=0.0)
    assert search.images < 1.1


@pytest.mark.parametrize("known", [True, False])
def test_a_vehicle_elsewhere_is_not_found(known: bool) -> None:
    vehicle = Vehicle(2, known=known, wrong=True)
    search = PlaceSearch(vehicle.area(100.0, away_m=400.0), vehicle.odometry, HALF_M)
    for _ in range(30):
        vehicle.see(search)
        assert search.found is None
        if search.given_up:
            return
        vehicle.drive(3.0)
    raise AssertionError(f"only {search.elsewhere:.2f} lies elsewhere")


@pytest.mark.parametrize("known", [True, False])
def test_the_area_follows_the_vehicle(known: bool) -> None:
    vehicle = Vehicle(3, known=known)
    heading = HeadingSample(vehicle.ns, vehicle.yaw, 0.03) if known else None
    search = PlaceSearch(vehicle.area(100.0), vehicle.odometry, HALF_M)
    start = vehicle.at
    for seconds in (0.0, 10.0, 10.0, 10.0):
        vehicle.drive(seconds)
        if heading is not None:
            heading = HeadingSample(vehicle.ns, vehicle.yaw, 0.03)
        assert search.move(vehicle.ns, heading)
    driven = float(np.hypot(*(vehicle.at - start)))
    assert driven > 150.0
    away = float(np.hypot(*(np.array(PLANE.forward(search.area.lat, search.area.lon)) - vehicle.at)))
    if known:
        assert away < 3.0 and search.area.radius_m == 100.0
    else:
        assert math.isclose(search.area.radius_m, 100.0 + driven, rel_tol=0.02)
    # Twice the area is that of the start, moved along.
    search.widen()
    x, y = PLANE.forward(*np.array(search.centres(Mounting())).T)
    nearest, farthest = (f(np.hypot(x - vehicle.at[0], y - vehicle.at[1])) for f in (np.min, np.max))
    assert nearest < HALF_M and (farthest < 260.0 if known else farthest > 300.0)


def test_a_gap_in_odometry_begins_anew_in_a_larger_area() -> None:
    vehicle = Vehicle(3)
    search = PlaceSearch(vehicle.area(100.0), vehicle.odometry, HALF_M)
    for _ in range(3):
        vehicle.see(search)
        vehicle.drive(3.0)
    assert search.move(vehicle.ns, HeadingSample(vehicle.ns, vehicle.yaw, 0.03))
    vehicle.ns += 5 * NS
    assert not search.move(vehicle.ns, HeadingSample(vehicle.ns, vehicle.yaw, 0.03))
    assert search.images == 0.0 and search.found is None and search.area.radius_m == 175.0


def test_a_vehicle_outside_is_found_in_a_wider_area() -> None:
    vehicle = Vehicle(6)
    search = PlaceSearch(vehicle.area(60.0, away_m=100.0), vehicle.odometry, HALF_M)
    for _ in range(40):
        vehicle.see(search)
        if search.found is not None:
            break
        if search.given_up:
            search.widen()
            # The first guess was wrong: the second may be wrong, too.
            assert search.elsewhere == 0.5
        vehicle.drive(3.0)
    assert vehicle.error(search) < 3.0 and search.images >= FOUND_IMAGES_AGAIN


def test_tiles_are_those_around_the_camera() -> None:
    vehicle = Vehicle(7)
    search = PlaceSearch(vehicle.area(1.0), vehicle.odometry, 1.0)
    search.move(vehicle.ns, HeadingSample(vehicle.ns, vehicle.yaw, 0.03))
    mounting = Mounting(antenna=(-9.0, 3.0), camera=(30.0, 0.0))
    x, y = PLANE.forward(*np.array(search.centres(mounting)).T)
    assert np.hypot(x - 30.0 * math.cos(vehicle.yaw), y - 30.0 * math.sin(vehicle.yaw)).max() < 3.0


def test_an_area_without_imagery_is_given_up() -> None:
    vehicle = Vehicle(8)
    search = PlaceSearch(vehicle.area(100.0), vehicle.odometry, HALF_M)
    search.move(vehicle.ns, HeadingSample(vehicle.ns, vehicle.yaw, 0.03))
    assert not search.given_up
    search.observe([], Calibration(), Mounting())
    assert search.given_up
    search.widen()
    assert not search.given_up
    # One tile on the edge is not enough.
    centres = search.centres(Mounting())
    search.observe([vehicle.score(*centres[-1])], Calibration(), Mounting())
    assert search.given_up


def test_tiles_that_show_nothing_leave_their_places_possible() -> None:
    vehicle = Vehicle(4)
    search = PlaceSearch(vehicle.area(100.0, away_m=60.0), vehicle.odometry, HALF_M)
    search.move(vehicle.ns, HeadingSample(vehicle.ns, vehicle.yaw, 0.03))
    before = search.centres(vehicle.mounting)
    search.observe([], Calibration(), Mounting())
    assert search.centres(vehicle.mounting) == before and search.images == 0.0
    east, north = PLANE.forward(*np.array(before).T)
    far = np.hypot(east - vehicle.at[0], north - vehicle.at[1]) > 80.0
    search.observe([vehicle.score(*before[k]) for k in np.flatnonzero(far)], Calibration(), Mounting())
    # The best of wrong places is not the place.
    assert search.best[1] < 0.9 and len(search.centres(Mounting())) >= np.count_nonzero(~far)


def test_joint_maps_share_their_probability() -> None:
    vehicle = Vehicle(5)
    scores = [vehicle.score(*PLANE.inverse(x, 0.0)) for x in (0.0, 60.0, 120.0)]
    maps = joint_heat_maps(scores)
    shares = [float(one.probability.sum()) for one in maps]
    assert math.isclose(sum(shares), 1.0, rel_tol=1e-4) and shares[0] > 0.2
    assert math.isclose(np.mean([one.relative.mean() for one in maps]), 1.0, rel_tol=1e-4)
    scores[1].logits[3, 3] = np.nan
    with pytest.raises(HeatMapError, match="not finite"):
        joint_heat_maps(scores)
