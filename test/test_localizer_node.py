"""The localizer as a process of its own, fed over DDS; the tests share one, configured again where needed."""

from __future__ import annotations

import array
import importlib.util
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import PoseWithCovarianceStamped
from lifecycle_msgs.msg import Transition
from localizer_rig import (
    DATUM,
    LAT,
    LON,
    PATIENCE_S,
    START,
    STOP,
    YAW,
    Rig,
    picture,
    running,
    stamp,
    true_place,
)
from map_fixtures import TileServer, texture, write_geotiff
from nav_msgs.msg import Odometry
from rclpy.serialization import serialize_message
from ros_harness import environment, pick_domain
from sensor_msgs.msg import Image, Imu, NavSatFix
from std_msgs.msg import Float64
from stub_node import GSD, SeeingModel, write_stub

from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.nodes import outputs
from xview_loc.nodes.deployment import DeploymentError, deploy
from xview_loc.nodes.inputs import message_class
from xview_loc.nodes.parameters import LOCALIZER, PAIR_LOGGER
from xview_loc.vehicle import messages as input_messages
from xview_loc.vehicle.input_types import INPUT_TYPES
from xview_loc.vehicle.mounting import moved

ROOT = Path(__file__).parent.parent
DOMAIN = pick_domain()


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Iterator[Rig]:
    with running(DOMAIN, tmp_path_factory.mktemp("localizer")) as r:
        yield r


def test_position_heading_and_stamp(rig):
    pose = rig.good_frame()
    rig.bench.wait(lambda: rig.fixes and rig.fixes[-1].header.stamp == pose.header.stamp)
    fix = rig.fixes[-1]
    lat, lon = true_place()
    off = LocalProjection(lat, lon).forward(fix.latitude, fix.longitude)
    assert math.hypot(*off) < 0.05
    assert fix.position_covariance_type == NavSatFix.COVARIANCE_TYPE_KNOWN
    x, y = DATUM.forward(lat, lon)
    p = pose.pose.pose.position
    assert math.hypot(p.x - x, p.y - y) < 0.05
    assert pose.header.frame_id == "map"
    assert pose.header.stamp.sec * 10**9 + pose.header.stamp.nanosec == rig.ns
    expected = YAW + DATUM.convergence(lat, lon)
    assert input_messages.yaw_of(pose.pose.pose.orientation) == pytest.approx(expected, abs=1e-3)
    covariance = np.array(pose.pose.covariance).reshape(6, 6)
    assert 0.1 < covariance[0, 0] < 100.0 and covariance[2, 2] == 1e6
    rig.bench.wait(lambda: rig.latency, what="the latency")  # published after the pose
    assert 0.0 < rig.latency[-1].data < 5000.0
    print(f"latency ms: {[round(v.data, 1) for v in rig.latency]}")


def test_heat_map_peaks_at_the_pose(rig):
    pose = rig.good_frame()
    rig.bench.wait(lambda: rig.grids, what="a heat map")
    grid = rig.grids[-1]
    cells = np.array(grid.data).reshape(grid.info.height, grid.info.width)
    row, col = np.unravel_index(cells.argmax(), cells.shape)
    yaw = input_messages.yaw_of(grid.info.origin.orientation)
    right, up = (col + 0.5) * grid.info.resolution, (row + 0.5) * grid.info.resolution
    x = grid.info.origin.position.x + math.cos(yaw) * right - math.sin(yaw) * up
    y = grid.info.origin.position.y + math.sin(yaw) * right + math.cos(yaw) * up
    p = pose.pose.pose.position
    assert math.hypot(x - p.x, y - p.y) < GSD


def test_overlay_is_drawn_once_it_is_asked_for(rig):
    pictures = rig.bench.listen(Image, "/localizer/overlay", 1)
    rig.bench.wait(lambda: rig.bench.node.count_publishers("/localizer/overlay"))
    rig.good_frame()
    while not pictures:
        rig.good_frame()
    assert pictures[-1].encoding == "rgb8" and any(pictures[-1].data)
    assert pictures[-1].header.stamp in [pose.header.stamp for pose in rig.poses]


def test_pictures_come_at_their_own_rate(rig):
    with rig.configured(heat_map_rate=0.001, overlay_rate=0.001):
        pictures = rig.bench.listen(Image, "/localizer/overlay", 1)
        rig.grids.clear()
        while not (pictures and rig.grids):
            rig.good_frame()
        for _ in range(3):
            rig.good_frame()
        assert len(pictures) == len(rig.grids) == 1


def test_untrained_weights_are_said(rig):
    rig.bench.wait_diagnosis("random weights")


def test_fix_stale(rig):
    ns = rig.step()
    rig.send_heading(ns)
    rig.send_image(ns)
    rig.expect_rejection("fix_stale")


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"lat": math.nan}, "not a number"), ({"status": -1}, "status -1"), ({"lat": 0.0, "lon": 0.0}, "0, 0")],
)
def test_bad_fix(rig, bad, says):
    ns = rig.step()
    rig.send_fix(ns, **bad)
    rig.send_heading(ns)
    rig.send_image(ns)
    rig.expect_rejection("fix_stale", says)


def test_fix_without_imagery(rig):
    ns = rig.step()
    rig.send_fix(ns, lat=10.0)
    rig.send_heading(ns)
    rig.send_image(ns)
    rig.expect_rejection("no_imagery")


def test_heading_stale(rig):
    ns = rig.step()
    rig.send_fix(ns)
    rig.send_image(ns)
    rig.expect_rejection("heading_stale")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"step": 10}, "step"),
        ({"height": 400}, "bytes"),
        ({"height": 16}, "bytes"),
        ({"encoding": "yuv9"}, "encoding 'yuv9'"),
    ],
)
def test_bad_image(rig, bad, says):
    ns = rig.step()
    rig.send_fix(ns)
    rig.send_heading(ns)
    rig.send_image(ns, **bad)
    rig.expect_rejection("image_invalid", says)


def test_an_image_in_no_panoramas_shape_is_said(rig):
    """Such as that of a camera without a calibration; panoramas follow."""
    says = "no_panorama: an image of 64 x 24 pixels is no panorama from 90 to -90 degrees: publish its"
    while says not in rig.bench.text():
        ns = rig.step()
        rig.send_fix(ns)
        rig.send_heading(ns)
        pixels = picture(ns // 1_000_000)[:24]
        rig.send_image(ns, height=24, data=array.array("B", pixels.tobytes()))
        rig.bench.wait_diagnosis()
    rig.good_frame()
    rig.bench.wait(lambda: "no_panorama" not in rig.bench.text(), what="the condition's end")


def test_damaged_image_message(rig):
    ns = rig.step()
    rig.send_fix(ns)
    rig.send_heading(ns)
    whole = Image(height=32, width=64, encoding="rgb8", step=192, data=array.array("B", bytes(6144)))
    rig.image.publish(serialize_message(rig.header(whole, ns))[:30])
    rig.expect_rejection("image_invalid", "damaged")
    rig.good_frame()


@pytest.mark.parametrize("source", INPUT_TYPES["heading"])
def test_the_type_of_the_heading_is_the_one_published(rig, source):
    node = rig.bench.node
    node.destroy_publisher(rig.heading)
    kind = message_class(INPUT_TYPES["heading"][source])
    rig.heading = node.create_publisher(kind, "/heading", 50)

    def send(ns, yaw=YAW):
        message = kind()
        if source == "degrees":
            message.data = 90.0 - math.degrees(yaw)  # an azimuth
        else:
            rig.header(message, ns)
            part = message
            while hasattr(part, "pose"):
                part = part.pose
            field = "quaternion" if source == "quaternion" else "orientation"
            setattr(part, field, outputs.quaternion_of(yaw))
        rig.heading.publish(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig, "send_heading", send)
        if source == "degrees":  # stamped when it arrives
            patch.setattr(rig, "step", lambda seconds=3.0: time.time_ns())
        pose = rig.good_frame()
    p = pose.pose.pose
    lat, lon = (float(v) for v in DATUM.inverse(p.position.x, p.position.y))
    expected = YAW + DATUM.convergence(lat, lon)
    assert input_messages.yaw_of(p.orientation) == pytest.approx(expected, abs=1e-3)
    node.destroy_publisher(rig.heading)
    rig.heading = rig.bench.publisher(Imu, "/heading")
    rig.good_frame()


def test_stamps_going_back(rig):
    rig.good_frame()
    rig.ns -= 60_000_000_000
    rig.good_frame()
    rig.bench.wait_diagnosis("went back in time")
    assert int(rig.bench.value("time_restarts")) >= 1


def test_a_node_that_is_not_active_says_so_beside_what_else_is_wrong(rig):
    rig.change_state(Transition.TRANSITION_DEACTIVATE)
    status = rig.bench.wait_diagnosis("random weights", "not active: inactive")
    assert status.level == b"\x01"
    rig.change_state(Transition.TRANSITION_ACTIVATE)
    rig.ready()
    rig.good_frame()
    rig.bench.wait_diagnosis("random weights")
    assert "not active" not in rig.bench.text()


def rows_moved(pose: PoseWithCovarianceStamped) -> float:
    """How far south of the stub's own peak a pose is, in its rows."""
    north = DATUM.forward(*true_place())[1]
    return (north - pose.pose.pose.position.y) / GSD


def test_checkpoints_are_swapped_on_the_running_node(rig, tmp_path):
    first, second = (
        write_stub(tmp_path / "first.safetensors", 0),
        write_stub(tmp_path / "second.safetensors", 8),
    )
    for path in (first, second):
        assert rig.bench.set_parameter("/localizer", "checkpoint", str(path)) == ""
        rig.bench.wait(
            lambda path=path: path.name in rig.bench.value("checkpoint"), what="the new checkpoint"
        )
    assert rows_moved(rig.good_frame()) == pytest.approx(8, abs=0.1)
    ok, text = rig.bench.trigger("/localizer/rollback")
    assert ok and "first.safetensors" in text and rows_moved(rig.good_frame()) == pytest.approx(0, abs=0.1)
    rig.bench.wait(lambda: "first.safetensors" in rig.bench.value("checkpoint"), what="the rollback's report")
    # The parameter names what is in use.
    ok, text = rig.bench.trigger("/localizer/reload")
    assert ok and "first.safetensors" in text and rows_moved(rig.good_frame()) == pytest.approx(0, abs=0.1)
    assert rig.bench.set_parameter("/localizer", "checkpoint", str(second)) == ""
    rig.bench.wait(lambda: "second.safetensors" in rig.bench.value("checkpoint"), what="the new checkpoint")
    second.write_bytes(second.read_bytes()[:-1])
    ok, text = rig.bench.trigger("/localizer/reload")
    assert not ok and "second.safetensors" in text
    rig.bench.wait_diagnosis("second.safetensors")
    assert rows_moved(rig.good_frame()) == pytest.approx(8, abs=0.1)
    assert "name a checkpoint" in rig.bench.set_parameter("/localizer", "checkpoint", "")
    rig.bench.set_parameter("/localizer", "checkpoint", str(first))
    rig.bench.wait(lambda: "first.safetensors" in rig.bench.value("checkpoint"), what="the new checkpoint")
    assert rows_moved(rig.good_frame()) == pytest.approx(0, abs=0.1)


def test_a_refused_checkpoint_leaves_the_node_as_it_was(rig, tmp_path):
    good, bad = write_stub(tmp_path / "good.safetensors", 8), tmp_path / "bad.safetensors"
    bad.write_bytes(b"rubbish")
    with rig.configured(checkpoint=str(good)):
        assert rig.bench.set_parameter("/localizer", "checkpoint", str(bad)) == ""
        rig.bench.wait_diagnosis("checkpoint_refused", "bad.safetensors")
        rig.bench.wait(lambda: rig.parameter("checkpoint") == str(good), what="the name of what is in use")
        # What was asked for last is tried again.
        ok, text = rig.bench.trigger("/localizer/reload")
        assert not ok and "bad.safetensors" in text
        rig.change_state(*STOP)
        rig.change_state(*START)
        assert rows_moved(rig.good_frame()) == pytest.approx(8, abs=0.1)
        write_stub(bad, 4)
        assert rig.bench.set_parameter("/localizer", "checkpoint", str(bad)) == ""
        rig.bench.wait(lambda: "bad.safetensors" in rig.bench.value("checkpoint"), what="the new checkpoint")
        assert rig.parameter("checkpoint") == str(bad)


def test_a_parameter_set_while_the_node_runs_applies_at_once(rig):
    b = rig.bench

    def put(name: str, value: Any) -> str:
        return b.set_parameter("/localizer", name, value)

    def late_frame() -> int:
        """Send a frame whose fix and heading are 0.3 s old."""
        ns = rig.step()
        rig.send_fix(ns - 300_000_000)
        rig.send_heading(ns - 300_000_000)
        rig.send_image(ns)
        return ns

    with rig.configured(max_wait_s=0.5):
        rig.good_frame()
        ns = late_frame()
        b.wait(lambda: stamp(rig.poses[-1]) == ns, what="a pose all the same")
        for name, value, before, says in (
            ("min_confidence", 1.0, 0.0, "low_confidence"),
            ("fix_min_status", 2, 0, "fix_stale"),
            ("max_fix_age_s", 0.1, 2.0, "fix_stale"),
            ("max_heading_age_s", 0.1, 0.5, "heading_stale"),
        ):
            assert put(name, value) == ""
            late_frame()
            b.wait_diagnosis(says)
            assert put(name, before) == ""
            rig.good_frame()
        assert put("map", "another.tif") == "map needs cleanup and configure"
        # The camera ahead of base_link, the covariance's floor, the search's radius, the grid's rate.
        here = rig.good_frame().pose
        assert put("camera_x", 2.0) == "" and put("covariance_floor_m", 5.0) == ""
        there = rig.good_frame().pose
        moved = there.pose.position.x - here.pose.position.x, there.pose.position.y - here.pose.position.y
        assert math.hypot(*moved) == pytest.approx(2.0, abs=0.1)
        assert there.covariance[0] > here.covariance[0] + 15.0
        assert put("search_radius_m", 1.0) == "" and put("heat_map_rate", 0.0) == ""
        rig.good_frame()
        b.wait_diagnosis("search_border")
        rig.grids.clear()
        rig.good_frame()
        rig.good_frame()
        assert not rig.grids


def test_deploy_waits_for_the_verdict(rig, tmp_path, monkeypatch):
    good, bad = write_stub(tmp_path / "good.safetensors", 8), tmp_path / "bad.safetensors"
    bad.write_bytes(b"rubbish")
    for name, value in environment(DOMAIN).items():
        monkeypatch.setenv(name, value)
    assert "in use" in deploy(good, "/localizer", 300.0) and "good.safetensors" in rig.parameter("checkpoint")
    assert rows_moved(rig.good_frame()) == pytest.approx(8, abs=0.1)
    with pytest.raises(DeploymentError, match="no localizer answers as /nobody"):
        deploy(good, "/nobody", 1.0)
    command = [sys.executable, "-m", "xview_loc.cli", "deploy", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and "bad.safetensors" in done.stderr and len(done.stderr.splitlines()) == 1
    assert rows_moved(rig.good_frame()) == pytest.approx(8, abs=0.1)
    assert rig.bench.trigger("/localizer/rollback")[0]


def test_swaps_under_load_lose_no_frame(rig, tmp_path):
    """Every frame gets the pose of one checkpoint or the other, though the weights change all the time."""
    paths = [write_stub(tmp_path / f"{rows}.safetensors", rows) for rows in (0, 8)]
    rig.good_frame()
    rig.poses.clear()
    start = rig.step()
    swaps, sent = 0, 0

    def send_frame() -> None:
        nonlocal sent
        rig.ns = start + sent * 100_000_000
        rig.send_fix(rig.ns)
        rig.send_heading(rig.ns)
        rig.send_image(rig.ns)
        sent += 1
        rig.bench.wait(lambda: len(rig.poses) >= sent, PATIENCE_S, "a pose for every frame")

    while swaps < 20:
        call = rig.bench.begin_set_parameter("/localizer", "checkpoint", str(paths[swaps % 2]))
        while not call.done():
            send_frame()
        swaps += 1
    rig.bench.wait(lambda: "8.safetensors" in rig.bench.value("checkpoint"), what="the last checkpoint")
    # So far all may have been faster than the swaps.
    send_frame()
    moved = [rows_moved(pose) for pose in rig.poses]
    assert len(moved) == sent and {round(m) for m in moved} == {0, 8}
    assert all(min(abs(m), abs(m - 8)) < 0.1 for m in moved)
    assert rig.bench.set_parameter("/localizer", "checkpoint", str(paths[0])) == ""
    rig.bench.wait(lambda: "0.safetensors" in rig.bench.value("checkpoint"), what="the first checkpoint")


def test_truncated_jpeg_and_tile_server_faults(rig, tmp_path):
    b = rig.bench
    with TileServer(None) as server:
        options = {"map": server.url, "map_max_zoom": 18, "map_cache_dir": str(tmp_path / "cache")}
        with rig.configured(**options, map_deadline_s=1.0, image_transport="compressed"):
            rig.good_frame()
            ns = rig.step()
            rig.send_fix(ns)
            rig.send_heading(ns)
            jpeg = cv2.imencode(".jpg", texture(32, 64))[1].tobytes()
            rig.send_image(ns, data=array.array("B", jpeg[:-40]))
            rig.expect_rejection("image_invalid", "truncated")
            # After an outage the map is not asked again for a while: the missing tile comes first.
            for i, fault in enumerate(("404", "500", "hang")):
                server.fault = fault
                rig.send_frame(lat=LAT + 0.005 * (i + 1))  # a place not seen so far
                b.wait_diagnosis("no_imagery" if fault == "404" else "map_unavailable")
                server.fault = None
                rig.good_frame()


def test_a_hanging_tile_server_does_not_delay_the_filtered_pose(rig, tmp_path):
    b = rig.bench
    with TileServer(None) as server:
        options = {"map": server.url, "map_max_zoom": 18, "map_cache_dir": str(tmp_path / "cache")}
        with rig.configured(**options, map_deadline_s=120.0, filter=True):
            server.fault = "hang"
            before = len(rig.poses)
            rig.filtered.clear()
            while not rig.filtered:  # DDS may take a moment
                rig.send_frame(0.5)
                b.wait_diagnosis()
            for _ in range(3):
                ns = rig.send_frame(0.5)
                b.wait(lambda ns=ns: stamp(rig.filtered[-1]) == ns, what="the image's filtered pose")
            # No answer has come: neither tile nor error.
            b.wait_diagnosis("map_unavailable", "not answered within")
            assert len(rig.poses) == before
            server.fault = None
            rig.good_frame()
            stamps = [stamp(pose) for pose in rig.filtered]
            assert len(stamps) == len(set(stamps)), "one filtered pose for each image"


def test_no_fix_no_heading_no_camera_info_and_unheard_publisher(rig):
    b = rig.bench
    with rig.configured(model="stub-pinhole"):
        before = len(rig.poses)
        # A stamp without any fix of its time; DDS may take a moment to deliver the first image.
        ns = rig.step()
        rig.bench.wait(rig.info.get_subscription_count, what="the camera_info's subscription")
        rig.send_image(ns)
        b.wait_diagnosis("fix_missing")
        ns = rig.step()
        rig.send_fix(ns)
        rig.send_image(ns)
        b.wait_diagnosis("heading_missing")
        rig.send_frame()
        b.wait_diagnosis("camera_info_missing")
        assert len(rig.poses) == before
        deaf = b.publisher(NavSatFix, "/fix", reliable=False)
        b.wait_diagnosis("cannot be heard")
        b.node.destroy_publisher(deaf)
        rig.send_info(rig.ns)
        rig.good_frame()


def test_odometry_and_fixes_give_the_heading(rig):
    b, yaw, lat, lon = rig.bench, math.radians(-50.0), LAT, LON
    with rig.configured(heading_source="course"):
        b.wait(rig.odom.get_subscription_count, what="the odometry's subscription")
        before = len(rig.poses)
        rig.step(60.0)

        def drive_on() -> None:
            """Drive five metres, with odometry, a fix and an image."""
            nonlocal lat, lon
            for _ in range(5):
                send_odometry(rig, 10.0)
            lat, lon = moved(lat, lon, (5.0, 0.0), yaw)
            rig.send_fix(rig.ns, lat, lon)
            rig.send_image(rig.ns)
            b.wait_diagnosis()

        drive_on()
        drive_on()
        b.wait_diagnosis("the heading is not known: drive some tens of metres")
        # The model searches all headings meanwhile.
        b.wait(lambda: len(rig.poses) > before and b.value("heading_from") == "none", what="poses")
        for _ in range(100):
            drive_on()
            if b.value("heading_from") == "course":
                break
        before = len(rig.poses)
        drive_on()
        b.wait(lambda: len(rig.poses) > before, what="a pose along odometry's heading")
        q = rig.poses[-1].pose.pose.orientation
        found = 2.0 * math.atan2(q.z, q.w) - DATUM.convergence(lat, lon)
        assert abs(wrap_angle(found - yaw)) < math.radians(3.0)
        b.wait_diagnosis()
        assert "not known" not in b.text() and not rig.heading.get_subscription_count()


def send_odometry(rig: Rig, speed: float, yaw_rate: float = 0.0) -> None:
    """A tenth of a second later."""
    twist = Odometry(child_frame_id="base_link")
    twist.twist.twist.linear.x, twist.twist.twist.angular.z = speed, yaw_rate
    rig.odom.publish(rig.header(twist, rig.step(0.1)))


def test_a_compass_that_is_off_is_replaced(rig):
    """By odometry and fixes, which the filter hears. The vehicle drives in a circle, and images come last."""
    b, yaw, lat, lon = rig.bench, math.radians(-50.0), LAT, LON
    with rig.configured(filter=True, qos_depth=1000, max_wait_s=5.0):
        b.wait(rig.odom.get_subscription_count, what="the odometry's subscription")
        rig.step(60.0)

        def drive_on() -> None:
            """Drive five metres."""
            nonlocal lat, lon, yaw
            for _ in range(5):
                lat, lon = moved(lat, lon, (1.0, 0.0), yaw)
                yaw += 0.01
                send_odometry(rig, 10.0, 0.1)
                rig.send_heading(rig.ns, yaw + math.radians(16.0))
            rig.send_fix(rig.ns, lat, lon)

        for _ in range(60):
            for _ in range(10):
                drive_on()
            b.wait_diagnosis()
            if "heading_disagrees" in b.text():
                break
        assert re.search(r"heading is \+1\d deg off that of odometry", b.text())
        before = len(rig.poses)
        for _ in range(20):
            drive_on()
            rig.send_image(rig.ns)
            b.wait_diagnosis()
            if len(rig.poses) > before:
                break
        assert len(rig.poses) > before and b.value("heading_from") == "course"
        q = rig.poses[-1].pose.pose.orientation
        found = 2.0 * math.atan2(q.z, q.w) - DATUM.convergence(lat, lon)
        # Images may lag behind by a step of five metres.
        assert abs(wrap_angle(found - yaw)) < math.radians(8.0)


def test_images_missing_between_stamps_are_counted_and_said(rig):
    with rig.configured(qos_depth=100):
        for k in range(100):
            # A camera with 10 Hz that loses every fifth of the last sixty images.
            rig.step(0.1)
            if k < 40 or k % 5:
                rig.send_frame(0.0)
        rig.bench.wait_diagnosis("images_lost: ", "every 100 ms")
        rig.bench.wait(lambda: rig.bench.value("images_lost") == "12", what="the count")
        # After a pause it starts again.
        rig.send_frame(60.0)
        rig.bench.wait(lambda: "images_lost" not in rig.bench.text(), what="the condition's end")
        assert rig.bench.value("images_lost") == "12"


def test_fixes_that_jump_are_refused_until_they_stay(rig):
    b = rig.bench
    with rig.configured(fix_max_jump_m=40.0):
        rig.good_frame()
        b.wait_diagnosis()
        refused, late = (int(b.value(f"fix_rejected/{why}") or 0) for why in ("fix_jump", "stamp_not_newer"))
        there = LAT + 0.002  # 222 m north
        for _ in range(4):
            rig.send_frame(lat=there)
            status = b.wait_diagnosis("fix_stale", "fixes jumped")
            assert status.level == b"\x02"
        assert int(b.value("fix_rejected/fix_jump")) == refused + 4
        # A late one is late, wherever it is.
        rig.send_fix(rig.ns - 12_100_000_000, lat=LAT - 0.002)
        b.wait(lambda: b.value("fix_rejected/stamp_not_newer") == str(late + 1), what="the late fix")
        assert int(b.value("fix_rejected/fix_jump")) == refused + 4
        before = len(rig.poses)
        rig.send_frame(lat=there)
        b.wait(lambda: len(rig.poses) > before, what="a pose at the new place")
        assert b.wait_diagnosis("fix_jump", "right or wrong").level == b"\x01"


def test_bad_configuration_is_said_and_survived(rig, tmp_path):
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x10nonsense" * 40)
    faults: list[tuple[dict[str, Any], str]] = [
        ({"checkpoint": str(tmp_path / "missing.safetensors")}, "missing.safetensors"),
        ({"checkpoint": str(corrupt)}, "corrupt.safetensors"),
        ({"map": str(tmp_path / "none.tif")}, "none.tif"),
        ({"map": ""}, "map is empty"),
        ({"model": "nonesuch"}, "unknown model 'nonesuch'; choose from ccvpe-vigor"),
        (
            {"model": "ccvpe-vigor", "allow_untrained": False},
            "no weights are shipped for ccvpe-vigor: give a checkpoint (docs/benchmarks.md says where the "
            "authors' are), or choose ccvpe-small or ccvpe-rig-small or ccvpe-pinhole-small or ggcvt-small",
        ),
        ({"datum_lat": math.nan}, "both datum_lat and datum_lon"),
    ]
    faults += [({"publish_tf": "map_to_odom"}, "set filter: true")]
    if not importlib.util.find_spec("tf2_msgs"):
        faults += [({"camera_frame": "camera"}, "tf2_msgs"), ({"publish_tf": "map_to_base"}, "tf2_msgs")]
    rig.change_state(*STOP)
    for parameters, says in faults:
        rig.set_parameters(**parameters)
        with pytest.raises(AssertionError):
            rig.change_state(Transition.TRANSITION_CONFIGURE)
        status = rig.bench.wait_diagnosis("not_configured", says)
        assert status.level == b"\x02" and rig.bench.value("state") == "unconfigured"
    rig.set_parameters()
    rig.change_state(*START)
    rig.ready()
    rig.good_frame()


def test_the_filter_goes_on_without_fixes(rig):
    b, odom = rig.bench, rig.odom
    with rig.configured(filter=True, max_fix_age_s=0.5):
        b.wait(odom.get_subscription_count, what="the odometry's subscription")
        b.wait_diagnosis()
        received = int(b.value("odom_received") or 0)
        too_fast = int(b.value("odom_rejected/odom_too_fast") or 0)
        rig.good_frame()

        def frames(count: int, fix: bool) -> None:
            for _ in range(count):
                ns = rig.step(0.2)
                odom.publish(rig.header(Odometry(child_frame_id="base_link"), ns))  # it stands still
                if fix:
                    rig.send_fix(ns)
                rig.send_heading(ns)
                before = len(rig.poses)
                rig.send_image(ns)
                b.wait(lambda before=before: len(rig.poses) > before, what="a pose")

        frames(5, fix=True)
        first = rig.filtered[-1].pose.pose.position
        x, y = DATUM.forward(*true_place())
        assert math.hypot(first.x - x, first.y - y) < 3.0
        assert rig.filtered[-1].header.frame_id == "map"
        # No fix for longer than one is of use.
        frames(10, fix=False)
        b.wait(lambda: stamp(rig.filtered[-1]) == stamp(rig.poses[-1]), what="its pose as well")
        status = b.wait_diagnosis("goes on with odometry")
        assert status.level == b"\x01" and int(b.value("odom_received")) == received + 15
        last = rig.filtered[-1].pose
        assert math.hypot(last.pose.position.x - first.x, last.pose.position.y - first.y) < 1.0
        assert 0.0 < last.covariance[0] < 100.0  # standing, it hardly learns
        yaw = 2.0 * math.atan2(last.pose.orientation.z, last.pose.orientation.w)
        assert yaw == pytest.approx(YAW + DATUM.convergence(LAT, LON), abs=1e-3)
        odom.publish(rig.header(Odometry(child_frame_id="wheels"), rig.step(0.2)))
        assert b.wait_diagnosis("odom_frame", "wheels").level == b"\x01"
        odom.publish(rig.header(Odometry(child_frame_id="base_link"), rig.step(0.2)))
        b.wait(lambda: "odom_frame" not in b.text(), what="the right frame")
        fast = Odometry(child_frame_id="base_link")
        fast.twist.twist.linear.x, fast.twist.twist.linear.y = 300.0, 400.0
        odom.publish(rig.header(fast, rig.step(0.2)))
        assert b.wait_diagnosis("odometry says 500 m/s").level == b"\x01"
        assert b.value("odom_rejected/odom_too_fast") == str(too_fast + 1)
        # Without odometry for so long nothing is known of where it is.
        ns = rig.step(60.0)
        rig.send_heading(ns)
        rig.send_image(ns)
        b.wait_diagnosis("fix_missing")


def test_a_wrong_heading_is_reported_and_on_request_rejected(rig):
    b = rig.bench
    compass = {"heading_clockwise": True, "heading_offset_deg": 30.0, "heading_reject": True}
    with rig.configured(**compass, qos_depth=1000, max_wait_s=5.0):
        at = [0.0, 0.0]

        def street(course: float, azimuth: float) -> None:
            """300 m, 15 m at a time; ``azimuth`` is the sensor's, which is mounted turned by 30 degrees."""
            for _ in range(20):
                at[0] += 15.0 * math.cos(course)
                at[1] += 15.0 * math.sin(course)
                ns = rig.step(1.0)
                rig.send_heading(ns, azimuth + math.radians(30.0))
                rig.send_fix(ns, *HERE.inverse(*at))

        def corner(sign: float) -> int:
            """East, then north; the stamp of a frame there."""
            at[:] = [0.0, 0.0]
            street(0.0, math.pi / 2)
            street(math.pi / 2, math.pi / 2 - sign * math.pi / 2)
            ns = rig.step(1.0)
            rig.send_heading(ns, math.pi / 2 - sign * math.pi / 2 + math.radians(30.0))
            rig.send_fix(ns)
            rig.send_image(ns)
            return ns

        corner(-1.0)
        status = b.wait_diagnosis("frames rejected: heading_disagrees", "turns the wrong way round")
        assert status.level == b"\x02" and b.value("frames_rejected/heading_disagrees") == "1"
        ns = corner(1.0)
        b.wait(lambda: rig.poses and stamp(rig.poses[-1]) == ns, what="a pose")
        b.wait(lambda: "heading_disagrees" not in b.text(), what="the end of the warning")


@dataclass
class Circle:
    """A vehicle on a map whose colour tells the place, in a circle of 40 m, 12 m a frame."""

    rig: Rig
    frames: int = 0
    at: tuple[float, float] = (0.0, 0.0)

    def drive(self) -> None:
        """Send a frame and wait for its pose."""
        before = len(self.rig.poses)
        self.send()
        self.rig.bench.wait(lambda: len(self.rig.poses) > before, what="a pose")

    def send(self) -> None:
        """The next frame, with all that belongs to it."""
        rig = self.rig
        self.frames += 1
        ns, yaw = rig.step(0.5), 0.3 * self.frames
        self.at = (40.0 * math.sin(yaw), -40.0 * math.cos(yaw))
        twist = Odometry()
        twist.twist.twist.linear.x, twist.twist.twist.angular.z = 24.0, 0.6
        rig.odom.publish(rig.header(twist, ns))
        rig.send_fix(ns, *HERE.inverse(*self.at))
        rig.send_heading(ns, yaw)
        pixels = picture(self.frames, colour(*self.at))
        rig.send_image(ns, data=array.array("B", pixels.tobytes()))

    def south_m(self) -> float:
        """How far the last pose is south of the vehicle."""
        x, y = DATUM.forward(*HERE.inverse(*self.at))
        position = self.rig.poses[-1].pose.pose.position
        assert abs(position.x - x) < 1.5
        return float(y - position.y)


HERE = LocalProjection(LAT, LON)
COLOURED_M = 250.0


def colour(east: Any, north: Any) -> Any:
    """Of a place in metres from the middle of the coloured map."""
    east, north = np.broadcast_arrays(east, north)
    levels = [(v / COLOURED_M + 0.5) * 255.0 for v in (east, north)]
    return np.stack([*levels, np.full(east.shape, 128.0)], -1).round().astype(np.uint8)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    """A map of 250 m whose colour tells the place."""
    axis = (np.arange(500) + 0.5) * 0.5 - COLOURED_M / 2
    path = tmp_path_factory.mktemp("map") / "coloured.tif"
    crs = f"+proj=tmerc +lat_0={LAT} +lon_0={LON} +k=1 +datum=WGS84"
    return write_geotiff(path, colour(axis, -axis[:, None]), LAT, LON, 0.5, crs)


@dataclass
class Shadow:
    """A node whose poses are 4 m to the north and the south by turns, and a calm candidate 4 m south."""

    circle: Circle
    shaken: Path
    calm: Path

    def begin(self) -> None:
        """Start the trial of the candidate."""
        rig, b = self.circle.rig, self.circle.rig.bench
        assert b.set_parameter("/localizer", "shadow_checkpoint", str(self.calm)) == ""
        b.wait(rig.odom.get_subscription_count, what="the odometry's subscription")
        b.wait(lambda: "0 of 100 frames" in b.value("shadow"), what="the candidate")


@pytest.fixture
def shadow(rig, coloured, tmp_path) -> Iterator[Shadow]:
    circle = Circle(rig)
    shadow = Shadow(circle, tmp_path / "shaken.safetensors", tmp_path / "calm.safetensors")
    write_stub(shadow.shaken, 0, shaken=8, model=SeeingModel())
    write_stub(shadow.calm, 8, model=SeeingModel())
    with rig.configured(
        map=str(coloured),
        model="stub-seeing",
        checkpoint=str(shadow.shaken),
        shadow_every=1,
        shadow_frames=100,
    ):
        rig.good_frame()
        yield shadow


def test_a_candidate_in_the_shadow_is_compared_judged_and_promoted(shadow, tmp_path):
    circle, rig, b = shadow.circle, shadow.circle.rig, shadow.circle.rig.bench
    distances = b.listen(Float64, "/localizer/shadow/distance_m", 200)
    circle.drive()
    assert abs(circle.south_m()) == pytest.approx(4, abs=1.0)
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    assert b.set_parameter("/localizer", "shadow_checkpoint", str(tmp_path / "bad.safetensors")) == ""
    b.wait_diagnosis("shadow: ", "bad.safetensors")
    assert "choose from report, promote" in b.set_parameter("/localizer", "shadow_policy", "perhaps")
    for policy in ("report", "promote"):
        shadow.begin()
        # Whatever it is at the end.
        assert b.set_parameter("/localizer", "shadow_policy", policy) == ""
        for _ in range(100):
            circle.drive()
            assert abs(circle.south_m()) == pytest.approx(4, abs=1.0)
        b.wait(lambda: "is better" in b.value("shadow_verdict"), what="the verdict")
        b.wait(lambda: len(distances) == 100, what="the comparisons")
        distances.clear()
        if policy == "report":
            b.wait_diagnosis()
            assert "shaken.safetensors" in b.value("checkpoint")
    b.wait(lambda: "calm.safetensors" in b.value("checkpoint"), what="the better checkpoint")
    b.wait(lambda: b.value("checkpoint_by") == "shadow", what="who put it there")
    circle.drive()
    assert circle.south_m() == pytest.approx(4, abs=1.0)
    # It is the checkpoint now, and no candidate any more.
    b.wait(lambda: not rig.odom.get_subscription_count(), what="the odometry's end")
    ok, text = b.trigger("/localizer/reload")
    assert ok and "calm.safetensors" in text
    rig.change_state(*STOP)
    b.wait(lambda: not b.value("shadow_verdict"), what="the verdict's end")
    rig.change_state(*START)
    rig.ready()
    b.wait_diagnosis()
    assert "calm.safetensors" in b.value("checkpoint") and not b.value("shadow")


def test_a_trial_survives_a_pause_and_ends_where_it_is_told_to(shadow):
    circle, rig, b = shadow.circle, shadow.circle.rig, shadow.circle.rig.bench

    def frames() -> int:
        return int(re.findall(r" (\d+) of 100 frames", b.value("shadow"))[0])

    def compare() -> None:
        """Drive until one more frame is compared: a busy node leaves frames out."""
        before, last = frames(), circle.frames + 20
        while frames() == before and circle.frames < last:
            circle.drive()
            b.wait_diagnosis()
        assert before < frames() <= circle.frames

    circle.drive()
    shadow.begin()
    compare()
    compare()
    so_far = frames()
    rig.change_state(Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_ACTIVATE)
    rig.ready()
    b.wait(rig.odom.get_subscription_count, what="the odometry's subscription")
    assert frames() == so_far
    compare()
    # One value that is refused, and nothing is done.
    assert "choose from" in b.set_parameters(
        "/localizer", shadow_checkpoint=str(shadow.shaken), shadow_policy="perhaps"
    )
    compare()
    # Without odometry nothing can be said; that is no matter any more once the trial is over.
    b.node.destroy_publisher(rig.odom)
    b.wait_diagnosis("odom_topic")
    assert b.set_parameter("/localizer", "shadow_checkpoint", "") == ""
    b.wait(lambda: not any(v.key.startswith("shadow") for v in b.status.values), what="the trial's end")
    assert "odom" not in b.text()
    rig.odom = b.publisher(Odometry, "/odom")
    rig.change_state(Transition.TRANSITION_DEACTIVATE)
    for topic in ("/fix", "/heading"):
        assert topic not in b.wait_diagnosis("not active").message
    rig.change_state(Transition.TRANSITION_ACTIVATE)


def test_poses_that_are_withheld_are_compared(shadow):
    circle, rig = shadow.circle, shadow.circle.rig
    checkpoint = str(shadow.shaken)
    rig.restart(
        **{"map": rig.parameter("map"), "model": "stub-seeing", "checkpoint": checkpoint},
        shadow_every=1,
        shadow_frames=100,
        min_confidence=1.0,
    )
    before = len(rig.poses)
    shadow.begin()
    circle.send()
    rig.bench.wait_diagnosis("low_confidence")
    rig.bench.wait(lambda: " 1 of 100 frames" in rig.bench.value("shadow"), what="a comparison")
    assert len(rig.poses) == before


@pytest.mark.parametrize(("name", "table"), [("localizer", LOCALIZER), ("pair_logger", PAIR_LOGGER)])
def test_yaml_lists_every_parameter_with_its_default(name, table):
    text = (ROOT / "config" / f"{name}.yaml").read_text()
    written = yaml.safe_load(text)["/**"]["ros__parameters"]
    assert list(written) == [p.name for p in table]
    live = re.findall(r" Live\.\n    (\w+):", text)
    assert live == [p.name for p in table if p.live]
    start_only = re.findall(r" At the start only\.\n    (\w+):", text)
    assert start_only == [p.name for p in table if p.start_only]
    for p in table:
        value = written[p.name]
        assert value == p.default or (math.isnan(value) and math.isnan(p.default)), p.name
        assert type(value) is type(p.default) and p.description in text, p.name
