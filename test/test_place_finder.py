"""A localizer that finds its place without fixes: on a simulated drive, over DDS."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import PoseWithCovarianceStamped
from lifecycle_msgs.msg import Transition
from rclpy.serialization import deserialize_message
from ros_harness import Bench, NodeProcess, bench, pick_domain
from sensor_msgs.msg import NavSatFix

from xview_loc.geodesy import LocalProjection, distance_m
from xview_loc.nodes.inputs import message_class
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.messages import TOPICS, frame_messages
from xview_loc.simulation.views import PanoramaView

DOMAIN = pick_domain()
RATE_HZ = 1.0
INPUTS = ("/image", "/heading", "/odom", "/fix")
FOUND_M, NS = 3.0, 1_000_000_000


@pytest.fixture(scope="module")
def city() -> City:
    return build_city(941, "source", size_m=600.0)


@pytest.fixture(scope="module")
def frames(city: City) -> list[Frame]:
    return list(drive(city, 70, 1, options=DriveOptions(rate_hz=RATE_HZ), view=PanoramaView(64, 256)))


@pytest.fixture(scope="module")
def aerial(city: City, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(city.write_geotiff(tmp_path_factory.mktemp("map") / "city.tif"))


class Drivers:
    """A vehicle's drivers, which send frame after frame, each when the one before has been taken."""

    def __init__(self, b: Bench, frames: Iterator[Frame], *, fixes: bool = False) -> None:
        self.bench, self.frames, self.fixes = b, frames, fixes
        self.outputs = {topic: b.publisher(message_class(TOPICS[topic]), topic) for topic in INPUTS}
        self.found = b.listen(NavSatFix, "/localizer/fix")
        self.start_ns = time.time_ns()
        self.sent: dict[int, Frame] = {}

    def connect(self, *unused: str) -> None:
        wanted = [output for topic, output in self.outputs.items() if topic not in unused]
        self.bench.wait(lambda: all(o.get_subscription_count() for o in wanted), what="the inputs")

    def send(self) -> None:
        """Send the next frame, until the node has taken it."""
        frame, known = next(self.frames), accounted(self.bench)
        stamp_ns = self.start_ns + frame.stamp_ns
        self.sent[stamp_ns] = frame
        while True:
            for topic, _, data in frame_messages(frame, stamp_ns):
                if topic in INPUTS and (self.fixes or topic != "/fix"):
                    kind = message_class(TOPICS[topic])
                    self.outputs[topic].publish(deserialize_message(data, kind))
            self.bench.wait_diagnosis()
            if accounted(self.bench) > known:
                return

    def error(self) -> float:
        """Of the last pose, metres."""
        last, stamp = self.found[-1], self.found[-1].header.stamp
        truth = self.sent[NS * stamp.sec + stamp.nanosec].truth
        return float(distance_m(last.latitude, last.longitude, truth.lat, truth.lon))


def accounted(b: Bench) -> int:
    """Frames that gave a pose, or none; not those that were sent again."""
    counts = {} if b.status is None else {v.key: v.value for v in b.status.values}
    counts.pop("frames_rejected/image_stamp_not_newer", None)
    return sum(int(v) for key, v in counts.items() if key.startswith(("frames_accepted", "frames_rejected")))


def localizer(log: Path, aerial: str, **parameters: Any) -> NodeProcess:
    common = {
        "map": aerial,
        "filter": True,
        "qos_reliability": "reliable",
        "qos_depth": 100,
        "max_wait_s": 0.2,
        "torch_threads": 1,
        "backend": "torch",
    }
    module = "xview_loc.nodes.localizer_node"
    return NodeProcess(DOMAIN, log, {**common, **parameters}, module=module)


def away(frame: Frame, east: float, north: float) -> tuple[float, float]:
    lat, lon = LocalProjection(frame.truth.lat, frame.truth.lon).inverse(east, north)
    return float(lat), float(lon)


def drive_until_found(drivers: Drivers, b: Bench) -> None:
    """Wait for a fix, then search the place without; nothing is published before it is found."""
    drivers.connect()
    texts = []
    while not drivers.found:
        drivers.send()
        texts.append(b.text())
    searching = "searching: no fix to start from: searching for the vehicle within 100 m of"
    for part in ("the search without fixes begins in", searching):
        assert any(part in text for text in texts), texts
    assert drivers.error() < FOUND_M
    drivers.send()
    assert "searching: no fix" not in b.text()


def test_the_place_is_found_and_remembered(frames: list[Frame], aerial: str, tmp_path: Path) -> None:
    lat, lon = away(frames[0], 50.0, -30.0)
    node = localizer(tmp_path / "log", aerial, start_lat=lat, start_lon=lon)
    drives = iter(frames)
    try:
        with bench(DOMAIN) as b:
            drivers = Drivers(b, drives)
            drive_until_found(drivers, b)
            assert b.value("datum") and int(b.value("images_searched")) >= 4
            b.change_state("/localizer", Transition.TRANSITION_DEACTIVATE)
            b.change_state("/localizer", Transition.TRANSITION_CLEANUP)
            place = json.loads((tmp_path / "ros" / "xview_loc" / "localizer.place.json").read_text())
            truth = list(drivers.sent.values())[-1].truth
            assert distance_m(place["lat"], place["lon"], truth.lat, truth.lon) < FOUND_M
            # The next start knows no other place.
            assert not b.set_parameter("/localizer", "start_lat", math.nan)
            assert not b.set_parameter("/localizer", "start_lon", math.nan)
            b.change_state("/localizer", Transition.TRANSITION_CONFIGURE)
            b.change_state("/localizer", Transition.TRANSITION_ACTIVATE)
            drivers.found.clear()
            drive_until_found(drivers, b)
    finally:
        assert node.stop() == 0, node.log
    assert "Traceback" not in node.log, node.log


def test_place_and_heading_are_found_without_a_compass(
    frames: list[Frame], aerial: str, tmp_path: Path
) -> None:
    lat, lon = away(frames[0], 20.0, 10.0)
    place = {"start_lat": lat, "start_lon": lon, "start_radius_m": 40.0}
    node = localizer(tmp_path / "log", aerial, heading_source="course", **place)
    try:
        with bench(DOMAIN) as b:
            drivers = Drivers(b, iter(frames))
            drivers.connect("/heading")
            while not drivers.found:
                drivers.send()
            assert drivers.error() < FOUND_M and b.value("heading_from") == "course"
            drivers.send()
            assert "course_unknown" not in b.text()
    finally:
        assert node.stop() == 0, node.log


def test_a_wrong_initial_pose_is_left_for_the_right_place(
    frames: list[Frame], aerial: str, tmp_path: Path
) -> None:
    lat, lon = away(frames[0], 0.0, 0.0)
    node = localizer(tmp_path / "log", aerial, datum_lat=lat, datum_lon=lon)
    try:
        with bench(DOMAIN) as b:
            drivers = Drivers(b, iter(frames))
            click = b.publisher(PoseWithCovarianceStamped, "initialpose")
            drivers.connect()
            b.wait(click.get_subscription_count, what="the initial pose's subscription")
            pose = PoseWithCovarianceStamped()
            pose.header.frame_id = "map"
            pose.pose.pose.position.x = 70.0
            pose.pose.pose.orientation.w = 1.0
            pose.pose.covariance = (4.0 * np.eye(6)).ravel()
            click.publish(pose)
            b.wait(lambda: b.value("initialpose_received") == "1", what="the pose")
            while not drivers.found or drivers.error() > 20.0:
                drivers.send()
            assert drivers.error() < FOUND_M and int(b.value("images_searched")) >= 4
    finally:
        assert node.stop() == 0, node.log


def test_a_fix_ends_the_search(frames: list[Frame], aerial: str, tmp_path: Path) -> None:
    lat, lon = away(frames[0], 200.0, 0.0)
    node = localizer(tmp_path / "log", aerial, start_lat=lat, start_lon=lon, start_radius_m=50.0)
    try:
        with bench(DOMAIN) as b:
            drivers = Drivers(b, iter(frames))
            drivers.connect()
            while "searching: no fix" not in b.text():
                drivers.send()
            assert not drivers.found
            drivers.fixes = True
            while not drivers.found:
                drivers.send()
            b.wait(lambda: "searching" not in b.text(), what="its end")
    finally:
        assert node.stop() == 0, node.log


@pytest.mark.parametrize("parameters", [{}, {"start_radius_m": 0.0, "start_lat": 48.1, "start_lon": 11.6}])
def test_nothing_is_searched_without_a_place(
    frames: list[Frame], aerial: str, tmp_path: Path, parameters: dict[str, float]
) -> None:
    node = localizer(tmp_path / "log", aerial, **parameters)
    try:
        with bench(DOMAIN) as b:
            drivers = Drivers(b, iter(frames))
            drivers.connect()
            for _ in range(8):
                drivers.send()
            assert "frames rejected: fix" in b.text() and "search" not in b.text()
    finally:
        assert node.stop() == 0, node.log
