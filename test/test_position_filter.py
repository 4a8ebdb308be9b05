"""The filter over time, on drives with heat maps that a test makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.estimation.position_filter import FilteredPose, FilterOptions, PositionFilter
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import HeatMapGrid
from xview_loc.statistics import mahalanobis
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

NS = 1_000_000_000
START = 1_700_000_000 * NS
PLANE = LocalProjection(48.2, 16.37)
SIDE, GSD = 96, 0.75
SIGMA_M = 1.0
RATE_HZ = 4


@dataclass
class Moment:
    """An instant of a drive around a bend at 8 m/s: the truth in PLANE."""

    stamp_ns: int
    place: np.ndarray
    yaw: float


def drive(seconds: float, start_s: float = 0.0) -> Iterator[Moment]:
    for i in range(int(seconds * RATE_HZ)):
        t = start_s + i / RATE_HZ
        yaw = 0.05 * t
        place = 8.0 / 0.05 * np.array([math.sin(yaw), 1.0 - math.cos(yaw)])
        yield Moment(START + round(t * NS), place, yaw)


class Vehicle:
    """Feeds a filter what a vehicle would know.

    errors: its pose's, metres. sigmas: what it says of these. distances: errors in standard deviations.
    """

    def __init__(self, seed: int = 0, mounting: Mounting | None = None, **options: float) -> None:
        self.odometry = Odometry(1.0)
        self.filter = PositionFilter(self.odometry, FilterOptions(**options))
        self.mounting = mounting or Mounting()
        self.rng = np.random.default_rng(seed)
        self.bias = self.rng.normal(size=2) * 8.0
        self.errors: list[float] = []
        self.sigmas: list[float] = []
        self.distances: list[float] = []

    def fix(self, moment: Moment, jump_m: float = 0.0) -> GnssFix:
        antenna = moment.place + self.lever(self.mounting.antenna, moment.yaw)
        lat, lon = PLANE.inverse(*(antenna + self.bias + jump_m))
        return GnssFix(moment.stamp_ns, lat, lon, 170.0, np.diag([100.0, 100.0, 400.0]))

    def heat_map(self, moment: Moment, around: GnssFix, wrong: bool) -> HeatMap:
        """With one summit at the camera, or at a wrong place."""
        tile = AerialTile(np.zeros((SIDE, SIDE, 3), np.uint8), around.lat, around.lon, GSD)
        camera = moment.place + self.lever(self.mounting.camera, moment.yaw)
        row, col = tile.latlon_to_pixel(*PLANE.inverse(*(camera + self.error())))
        if wrong:
            row, col = self.rng.uniform(10, SIDE - 10, 2)
        rows, cols = np.mgrid[:SIDE, :SIDE]
        squared = (rows - row) ** 2 + (cols - col) ** 2
        return HeatMap.from_logits(
            np.maximum(-squared * GSD**2 / (2 * SIGMA_M**2), -20.0), HeatMapGrid(), tile
        )

    def error(self) -> np.ndarray:
        """Error of a heat map (2,), metres."""
        return SIGMA_M * self.rng.normal(size=2)

    def see(
        self,
        moment: Moment,
        *,
        wrong: bool = False,
        fix: bool = True,
        jump_m: float = 0.0,
        odometry: bool = True,
        heading: bool = True,
        image: bool = True,
        speed: float = 8.0,
    ) -> GnssFix | None:
        """An image of this moment; where the filter looked for it."""
        if odometry:
            self.odometry.add(VelocitySample(moment.stamp_ns, 1.01 * speed, 0.0, 0.05 if speed else 0.0))
        looked = self.filter.move(
            moment.stamp_ns,
            self.fix(moment, jump_m) if fix else None,
            HeadingSample(moment.stamp_ns, moment.yaw, math.radians(2.0)) if heading else None,
            self.mounting,
        )
        if looked is not None and image:
            measured = moment.yaw + self.mounting.camera_yaw + math.radians(20.0) * self.rng.normal()
            estimate = SimpleNamespace(
                heat_map=self.heat_map(moment, looked, wrong),
                # A wrong place comes with a wrong heading, as sure of itself as the others.
                heading=self.rng.uniform(-3.0, 3.0) if wrong else measured,
                heading_variance=0.1,
            )
            self.filter.observe(estimate, self.mounting, heading)  # type: ignore[arg-type]
        pose = self.filter.pose
        if pose is not None:
            assert pose.stamp_ns == moment.stamp_ns
            self.errors.append(math.dist(PLANE.forward(pose.lat, pose.lon), moment.place))
            self.sigmas.append(math.sqrt(pose.covariance.trace() / 2))
            offset = np.array(PLANE.forward(pose.lat, pose.lon)) - moment.place
            self.distances.append(mahalanobis(offset, pose.covariance))
        return looked

    @staticmethod
    def lever(offset: tuple[float, float], yaw: float) -> np.ndarray:
        cos, sin = math.cos(yaw), math.sin(yaw)
        return np.array([cos * offset[0] - sin * offset[1], sin * offset[0] + cos * offset[1]])


def test_wrong_heat_maps_are_outvoted() -> None:
    vehicle = Vehicle()
    for moment in drive(40.0):
        vehicle.see(moment, wrong=vehicle.rng.random() < 0.3)
    assert np.mean(vehicle.errors[20:]) < 0.6
    assert max(vehicle.errors[20:]) < 2.0
    # A single image is a metre off on each axis, and wrong by far three times in ten.
    assert np.mean(vehicle.sigmas[20:]) < 1.5


@pytest.mark.parametrize("wrong, image", [(True, True), (False, True), (False, False)])
def test_it_doubts_a_place_that_images_do_not_show(wrong: bool, image: bool) -> None:
    vehicle = Vehicle()
    for moment in drive(10.0):
        vehicle.see(moment)
    for moment in drive(10.0, 10.0):
        vehicle.see(moment, fix=False, wrong=wrong, image=image)
        assert not vehicle.filter.doubtful
    for moment in drive(14.0, 20.0):
        vehicle.see(moment, fix=False, wrong=wrong, image=image)
    assert vehicle.filter.doubtful == wrong
    # A fix that confirms the place is believed.
    vehicle.see(Moment(moment.stamp_ns + NS // 4, moment.place, moment.yaw))
    assert not vehicle.filter.doubtful


class UsualVehicle(Vehicle):
    """Its heat maps err as those of a calibrated model: alike over 10 m, with half the variance."""

    last = np.zeros(2)

    def error(self) -> np.ndarray:
        kept = math.exp(-8.0 / RATE_HZ / 10.0)
        self.last = kept * self.last + math.sqrt(1.0 - kept**2) * super().error() / math.sqrt(2.0)
        return self.last


def test_its_covariance_says_how_far_off_it_is() -> None:
    squared: list[float] = []
    for seed in range(5):
        vehicle = UsualVehicle(seed)
        for moment in drive(60.0):
            vehicle.see(moment)
        squared += [distance**2 for distance in vehicle.distances[40:]]
    # 2 for errors that are normal and just as large as it says.
    assert 1.0 < np.mean(squared) < 3.0
    assert max(squared) < 5.0**2


def test_right_after_a_start_and_without_images_it_is_less_sure() -> None:
    vehicle = Vehicle()
    for moment in drive(20.0):
        vehicle.see(moment)
    settled = vehicle.sigmas[-1]
    assert vehicle.sigmas[20] > 1.3 * settled
    for moment in drive(4.0, 20.0):
        vehicle.see(moment, image=False)
    assert vehicle.sigmas[-1] > 1.5 * settled


def test_it_goes_on_without_fixes_and_says_where_to_look() -> None:
    vehicle = Vehicle()
    for moment in drive(20.0):
        assert vehicle.see(moment) is not None
    for moment in drive(40.0, 20.0):
        looked = vehicle.see(moment, fix=False, wrong=vehicle.rng.random() < 0.15)
        assert looked is not None and looked.altitude == 170.0
        assert math.dist(PLANE.forward(looked.lat, looked.lon), moment.place) < 5.0
    assert max(vehicle.errors[20:]) < 2.0


def test_without_images_the_covariance_grows_as_the_error_may() -> None:
    vehicle = Vehicle()
    for moment in drive(20.0):
        vehicle.see(moment)
    for moment in drive(30.0, 20.0):
        vehicle.see(moment, fix=False, image=False)
    assert vehicle.sigmas[-1] > 3.0 * vehicle.sigmas[79]
    assert vehicle.errors[-1] < 3.0 * vehicle.sigmas[-1]


def test_a_fix_that_contradicts_is_not_believed_while_images_support_the_belief() -> None:
    vehicle = Vehicle()
    for moment in drive(15.0):
        vehicle.see(moment)
    for moment in drive(30.0, 15.0):
        looked = vehicle.see(moment, jump_m=100.0)
        assert looked is not None
        assert math.dist(PLANE.forward(looked.lat, looked.lon), moment.place) < 5.0
    assert max(vehicle.errors[20:]) < 2.0


def test_lost_it_starts_again_from_the_fixes() -> None:
    vehicle = Vehicle()
    for moment in drive(15.0):
        vehicle.see(moment)
    # Carried 300 m away: the images show it nowhere near.
    for moment in drive(60.0, 15.0):
        elsewhere = Moment(moment.stamp_ns, moment.place + 300.0, moment.yaw)
        vehicle.see(elsewhere)
    assert vehicle.errors[15 * RATE_HZ + 8] > 100.0
    assert max(vehicle.errors[-60:]) < 2.0


def test_nothing_is_known_before_the_first_fix_and_after_time_starts_again() -> None:
    vehicle = Vehicle()
    for moment in drive(3.0):
        assert vehicle.see(moment, fix=False) is None
    for moment in drive(10.0, 3.0):
        vehicle.see(moment)
    assert vehicle.filter.started
    assert vehicle.see(next(drive(1.0)), fix=False) is None
    assert not vehicle.filter.started and vehicle.filter.pose is None


def test_standing_still_does_not_make_it_surer() -> None:
    vehicle = Vehicle()
    for moment in drive(10.0):
        vehicle.see(moment)
    last = moment
    sure = vehicle.sigmas[-1]
    for i in range(1, 80):
        vehicle.see(Moment(last.stamp_ns + i * NS // RATE_HZ, last.place, last.yaw), speed=0.0, fix=False)
    assert vehicle.sigmas[-1] == pytest.approx(sure, rel=0.15)


def test_without_odometry_images_and_fixes_still_count() -> None:
    vehicle = Vehicle()
    for moment in drive(30.0):
        vehicle.see(moment, odometry=False)
    assert np.mean(vehicle.errors[20:]) < 2.0
    # Nothing at all is known of where it goes: soon nothing is known of where it is.
    for moment in drive(20.0, 30.0):
        looked = vehicle.see(moment, odometry=False, fix=False, image=False)
    assert looked is None and not vehicle.filter.started


def test_after_seconds_unseen_it_starts_again_from_the_fix() -> None:
    vehicle = Vehicle()
    for moment in drive(15.0):
        vehicle.see(moment)
    vehicle.errors.clear()
    # Meanwhile it drove 56 m.
    for moment in drive(10.0, 22.0):
        looked = vehicle.see(moment)
        assert looked is not None
        assert math.dist(PLANE.forward(looked.lat, looked.lon), moment.place) < 25.0
    assert max(vehicle.errors[8:]) < 2.0


def test_headings_may_come_from_the_images_alone() -> None:
    vehicle = Vehicle(mounting=Mounting(camera_yaw=0.5))
    for moment in drive(60.0):
        vehicle.see(moment, heading=False, wrong=vehicle.rng.random() < 0.15)
    assert np.mean(vehicle.errors[60:]) < 1.5
    pose = vehicle.filter.pose
    assert pose is not None and pose.heading is not None
    assert abs(math.remainder(pose.heading - moment.yaw, 2 * math.pi)) < math.radians(12.0)


def test_lever_arms_are_taken_off() -> None:
    vehicle = Vehicle(mounting=Mounting(antenna=(-3.0, 0.5), camera=(4.0, -1.0)))
    for moment in drive(40.0):
        looked = vehicle.see(moment)
    assert np.mean(vehicle.errors[20:]) < 0.7
    looked = vehicle.see(next(drive(1.0, 40.0)), fix=False)
    assert looked is not None
    antenna = moment.place + vehicle.lever((-3.0, 0.5), moment.yaw)
    assert math.dist(PLANE.forward(looked.lat, looked.lon), antenna) < 3.5


def test_it_starts_from_a_given_pose_without_fixes_and_forgets_it_on_request() -> None:
    vehicle = Vehicle()
    moments = list(drive(20.0))
    # Given for a place 2 s before the first image; the odometry since then is known.
    given = moments[0]
    for moment in moments[:8]:
        vehicle.odometry.add(VelocitySample(moment.stamp_ns, 8.08, 0.0, 0.05))
    lat, lon = PLANE.inverse(*(given.place + np.array([2.0, -1.0])))
    start = FilteredPose(lat, lon, np.eye(2) * 9.0, given.yaw, 0.05, given.stamp_ns)
    assert not vehicle.filter.started
    vehicle.filter.restart(start)
    assert vehicle.filter.started
    for moment in moments[8:40]:
        assert vehicle.see(moment, fix=False, heading=False) is not None
    # It begins with the error given, of a place that moved on with the vehicle.
    assert vehicle.errors[0] < 3.5 and max(vehicle.errors[8:]) < 2.0
    pose = vehicle.filter.pose
    assert pose is not None and pose.heading == pytest.approx(moments[39].yaw, abs=0.2)
    vehicle.filter.restart()
    assert not vehicle.filter.started
    assert vehicle.see(moments[40], fix=False) is None and vehicle.filter.pose is None
    for moment in moments[41:60]:
        vehicle.see(moment)
    assert vehicle.filter.started and max(vehicle.errors[-8:]) < 2.0
