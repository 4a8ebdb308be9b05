"""Where a localizer without fixes searches: as requests, fixes and the way driven say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from test_place_search import HALF_M, NS, PLANE, Vehicle

from xview_loc.estimation.place_search import SearchArea
from xview_loc.estimation.position_filter import FilteredPose, PositionFilter
from xview_loc.maps.base import MapUnavailableError
from xview_loc.models.base import Calibration
from xview_loc.nodes import place_finder as place_finder_module
from xview_loc.nodes.diagnostics import Health
from xview_loc.nodes.place_finder import PlaceFinder
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample, RejectedInput


class Rig:
    """A place finder with a vehicle that drives at (0, 0), and what a node would give it."""

    def __init__(self, **parameters: Any) -> None:
        self.parameters = {"start_lat": np.nan, "start_lon": np.nan, "start_radius_m": 100.0}
        self.parameters |= {"place_persist": False, **parameters}
        log = SimpleNamespace(info=print, warning=lambda text, **_: print(text))
        node = SimpleNamespace(
            get_parameter=lambda name: SimpleNamespace(value=self.parameters[name]),
            get_logger=lambda: log,
            get_fully_qualified_name=lambda: "/localizer",
        )
        self.vehicle = Vehicle()
        self.filter = PositionFilter(self.vehicle.odometry)
        self.health = Health("fine")
        self.finder = PlaceFinder(node, self.health, self.vehicle.odometry, HALF_M, self.filter)  # type: ignore[arg-type]
        self.found: list[FilteredPose] = []
        self.reason = ""
        self.scored: list[tuple[float, float]] = []

    def score(self, lat: float, lon: float) -> Any:
        self.scored.append((lat, lon))
        return self.vehicle.score(lat, lon)

    def see(self, score: Any = None, **options: Any) -> str:
        """An image where the vehicle is; return why there is no pose, "" if it is found."""
        self.scored.clear()
        heading = HeadingSample(self.vehicle.ns, self.vehicle.yaw, 0.03)
        inputs = self.vehicle.ns, heading, score or self.score, Calibration(), Mounting()
        try:
            self.finder.step(*inputs, take=self.found.append, **options)
        except RejectedInput as error:
            return error.reason
        return ""

    def drive(self, seconds: float, **options: Any) -> list[str]:
        """Images every second."""
        reasons = []
        for _ in range(round(seconds)):
            self.vehicle.drive(1.0)
            reasons.append(self.see(**options))
        return reasons

    @property
    def text(self) -> str:
        return self.health.report("").message

    def count(self, key: str) -> int:
        return next((int(v.value) for v in self.health.report("").values if v.key == key), 0)

    def fix(self, east: float, north: float, sigma: float) -> GnssFix:
        lat, lon = (float(v) for v in PLANE.inverse(*(self.vehicle.at + np.array([east, north]))))
        return GnssFix(self.vehicle.ns, lat, lon, 0.0, np.diag([sigma**2, sigma**2, 1.0]))


def at(east: float, north: float, radius_m: float) -> SearchArea:
    lat, lon = (float(v) for v in PLANE.inverse(east, north))
    return SearchArea(lat, lon, radius_m)


def test_nothing_is_searched_before_there_is_a_place_and_odometry() -> None:
    rig = Rig()
    assert rig.drive(8.0) == ["fix_missing"] * 8 and not rig.finder.possible
    rig.finder.expect(at(0.0, 0.0, 80.0))
    assert rig.finder.possible
    rig.vehicle.odometry._samples.clear()
    for _ in range(8):
        rig.vehicle.ns += NS
        last = rig.see()
    # Its disc does not grow: a vehicle whose odometry has not begun stands.
    assert last == "odometry_missing" and "within 80 m" in rig.text


def test_the_place_is_found_once_there_has_been_no_fix_for_five_seconds() -> None:
    rig = Rig()
    rig.finder.expect(at(40.0, 20.0, 80.0))
    reasons, places = [], {}
    while not rig.found:
        reasons += rig.drive(1.0)
        places[rig.vehicle.ns] = rig.vehicle.at
    assert reasons[0] == "fix_missing" and "searching" in reasons and rig.filter.started
    found = rig.found[0]
    assert np.hypot(*(np.array(PLANE.forward(found.lat, found.lon)) - places[found.stamp_ns])) < 5.0


def test_a_request_during_a_scan_wins() -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 80.0))
    rig.drive(9.0)
    pose = FilteredPose(48.0, 16.0, np.eye(2), None, 1.0, 0)

    def interrupted(lat: float, lon: float) -> Any:
        rig.finder.start_from(pose)
        return rig.vehicle.score(lat, lon)

    rig.vehicle.drive(1.0)
    assert rig.see(interrupted) == "searching" and not rig.found
    rig.filter.move(rig.vehicle.ns, None, None, Mounting())
    assert rig.filter.pose is not None and abs(rig.filter.pose.lat - 48.0) < 1e-6


def test_what_is_forgotten_is_searched_in_a_wider_area_where_the_vehicle_is_now() -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 60.0))
    rig.drive(4.0)
    start = rig.vehicle.at
    rig.drive(20.0, score=lambda lat, lon: None)
    area = rig.finder.forget()
    assert area is not None and area.radius_m >= 120.0
    assert (
        np.hypot(*(np.array(PLANE.forward(area.lat, area.lon)) - rig.vehicle.at)) < 40.0 + area.radius_m / 8
    )
    assert np.hypot(*(rig.vehicle.at - start)) > 100.0


def test_a_search_without_odometry_grows() -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 60.0))
    rig.drive(8.0)
    for _ in range(4):
        rig.vehicle.ns += 5 * NS
        assert rig.see() == "odometry_missing"
    assert "within 360 m" in rig.text


def test_coarse_fixes_replace_neither_a_request_nor_a_search() -> None:
    rig = Rig()
    rig.finder.around(rig.fix(0.0, 0.0, 40.0))
    rig.vehicle.drive(1.0)
    rig.see()  # at once
    assert "within 120 m" in rig.text and rig.scored
    rig.finder.around(rig.fix(300.0, 0.0, 100.0))
    rig.vehicle.drive(1.0)
    rig.see()
    assert "within 120 m" in rig.text
    rig.finder.expect(at(0.0, 0.0, 90.0))
    rig.finder.around(rig.fix(300.0, 0.0, 100.0))
    rig.drive(7.0)
    assert "within 90 m" in rig.text


def test_areas_are_widened_up_to_a_limit_and_not_beside_a_filter() -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 200.0))
    rig.drive(12.0, score=lambda lat, lon: None)
    assert rig.count("searches_widened") == 2 and "within 500 m" in rig.text
    beside = Rig()
    beside.finder.expect(at(0.0, 0.0, 200.0))
    beside.drive(12.0, score=lambda lat, lon: None, beside=True)
    assert beside.count("searches_widened") == 0 and "within 200 m" in beside.text


def test_beside_a_filter_fewer_images_are_compared() -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 60.0))
    rig.drive(6.0, beside=True)
    before = rig.count("images_searched")
    rig.drive(10.0, beside=True)  # 80 m
    assert rig.count("images_searched") - before == 3


def test_tiles_that_cannot_be_loaded_leave_an_image_out_if_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 150.0))
    rig.drive(5.0)
    failures: list[int] = []

    def failing(lat: float, lon: float) -> Any:
        failures.append(1)
        if len(failures) % share == 0:
            raise MapUnavailableError("the server is down")
        return rig.vehicle.score(lat, lon)

    share = 20
    rig.vehicle.drive(1.0)
    assert rig.see(failing) == "searching" and rig.count("images_searched") == 1
    share = 2
    rig.vehicle.drive(3.0)
    with pytest.raises(MapUnavailableError):
        rig.see(failing)
    assert rig.count("images_searched") == 1
    # No time at all: only what is likeliest.
    monkeypatch.setattr(place_finder_module, "SLOWEST_S", -1.0)
    rig.vehicle.drive(3.0)
    rig.see()
    assert not rig.scored and rig.count("searches_slow") == 1
    # That does not say that the vehicle is elsewhere.
    rig.vehicle.drive(3.0)
    rig.see()
    assert rig.count("searches_widened") == 0 and "set a smaller start_radius_m" in rig.text


def test_the_radius_can_be_changed_until_a_search_begins_and_zero_ends_it(tmp_path: Path) -> None:
    lat, lon = (float(v) for v in PLANE.inverse(0.0, 0.0))
    rig = Rig(start_lat=lat, start_lon=lon)
    rig.parameters["start_radius_m"] = 50.0
    rig.drive(7.0)
    assert "within 50 m" in rig.text
    rig.parameters["start_radius_m"] = 0.0
    assert not rig.finder.possible and rig.finder.forget() is None
    assert rig.drive(1.0) == ["fix_missing"] and "searching" not in rig.text


def test_a_pose_ends_the_search_unless_it_is_to_be_forgotten() -> None:
    rig = Rig()
    rig.finder.expect(at(0.0, 0.0, 60.0))
    rig.drive(7.0)
    pose = FilteredPose(48.2, 16.37, np.eye(2), None, 1.0, rig.vehicle.ns)
    assert not rig.finder.settled(pose) and "searching" in rig.text
    rig.finder.start_from(pose)
    rig.finder.settled(pose)
    assert "searching" not in rig.text
