"""Inputs that would make a wrong pose: it is withheld, and /diagnostics says why."""

from __future__ import annotations

import array
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from map_fixtures import texture

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import PoseWithCovarianceStamped
from localizer_rig import DATUM, LAT, LON, YAW, Rig, picture, running, true_place
from nav_msgs.msg import Odometry
from ros_harness import pick_domain
from sensor_msgs.msg import NavSatFix
from stub_node import GSD, SIZE, StubModel, write_stub

from xview_loc.geodesy import LocalProjection, snap_to_grid
from xview_loc.images import ImageError, decode_compressed
from xview_loc.models.base import Calibration

NS = 10**9
DOMAIN = pick_domain()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(DOMAIN, tmp_path_factory.mktemp("localizer")) as r:
        yield r


def test_a_wrong_first_fix_does_not_become_the_datum(rig: Rig) -> None:
    b = rig.bench
    with rig.configured(datum_lat=math.nan, datum_lon=math.nan):
        before = len(rig.poses)
        for _ in range(2):
            rig.send_frame(lat=-40.0, lon=-168.0)
            b.wait_diagnosis("no_imagery")
        assert b.value("datum") == "not set yet"
        rig.send_frame()
        b.wait_diagnosis("datum_pending")
        assert len(rig.poses) == before
        pose = rig.good_frame()
        b.wait_diagnosis()
        assert [float(v) for v in b.value("datum").split()] == pytest.approx([LAT, LON], abs=1e-6)
        plane = LocalProjection(LAT, LON)
        x, y = plane.forward(*true_place())
        place = pose.pose.pose
        assert math.hypot(place.position.x - x, place.position.y - y) < 1.0
        yaw = 2.0 * math.atan2(place.orientation.z, place.orientation.w)
        assert yaw == pytest.approx(YAW + plane.convergence(LAT, LON), abs=1e-3)


@pytest.mark.parametrize(("lat", "lon"), [(LAT, LON + 90.0), (LAT - 90.0, LON), (-LAT, LON - 180.0)])
def test_a_far_datum_gives_no_pose(rig: Rig, lat: float, lon: float) -> None:
    before = len(rig.poses)
    with rig.configured(datum_lat=lat, datum_lon=lon):
        rig.send_frame()
        status = rig.bench.wait_diagnosis("datum_far", "km away")
        assert status.level == b"\x02" and len(rig.poses) == before


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.zeros((32, 64, 3), np.uint8), "blank"),
        (np.full((32, 64, 3), 250, np.uint8), "blank"),
        (np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8), "noise"),
        (np.zeros((1, 1, 3), np.uint8), "only 1 x 1 pixels"),
    ],
)
def test_an_image_that_shows_nothing_gives_no_pose(rig: Rig, pixels: np.ndarray, says: str) -> None:
    ns = rig.step()
    rig.send_fix(ns)
    rig.send_heading(ns)
    height, width = pixels.shape[:2]
    data = array.array("B", pixels.tobytes())
    rig.send_image(ns, height=height, width=width, step=3 * width, data=data)
    rig.expect_rejection("image_invalid", says)


def test_an_image_that_stays_the_same_while_the_vehicle_moves_gives_no_pose(rig: Rig) -> None:
    same = array.array("B", picture(0).tobytes())
    for k in range(6):
        before = len(rig.poses)
        lat, lon = LocalProjection(LAT, LON).inverse(8.0 * k, 0.0)
        ns = rig.step(1.0)
        rig.send_fix(ns, float(lat), float(lon))
        rig.send_heading(ns)
        rig.send_image(ns, data=same)
        if k < 2:
            rig.bench.wait(lambda before=before: len(rig.poses) > before, what="a pose")
    rig.bench.wait_diagnosis("frames rejected: image_still", "sent the same image")
    assert int(rig.bench.value("frames_rejected/image_still")) >= 2
    rig.good_frame()


def test_a_standing_vehicle_may_see_the_same(rig: Rig) -> None:
    same = array.array("B", picture(3).tobytes())
    rig.bench.wait_diagnosis()
    still = rig.bench.value("frames_rejected/image_still")
    before = len(rig.poses)
    for _ in range(6):
        ns = rig.step(1.0)
        rig.send_fix(ns)
        rig.send_heading(ns)
        rig.send_image(ns, data=same)
        rig.bench.wait(lambda before=before: len(rig.poses) > before, what="a pose")
        before = len(rig.poses)
    rig.bench.wait_diagnosis()
    assert rig.bench.value("frames_rejected/image_still") == still


def test_false_odometry_does_not_carry_the_filter_away(rig: Rig) -> None:
    b = rig.bench

    def second(speed: float, yaw_rate: float = 0.0) -> None:
        """Of a vehicle that stands."""
        for _ in range(10):
            ns = rig.step(0.1)
            odometry = Odometry(child_frame_id="base_link")
            odometry.twist.twist.linear.x, odometry.twist.twist.angular.z = speed, yaw_rate
            rig.odom.publish(rig.header(odometry, ns))
            rig.send_fix(ns)
            rig.send_heading(ns)
        before = len(rig.poses)
        rig.send_image(ns)
        b.wait(lambda: len(rig.poses) > before, what="a pose")

    def off() -> float:
        """How far the last filtered pose is from where the vehicle is."""
        x, y = DATUM.forward(*true_place())
        place = rig.filtered[-1].pose.pose.position
        return math.hypot(place.x - x, place.y - y)

    with rig.configured(filter=True, qos_depth=1000):
        b.wait(rig.odom.get_subscription_count, what="the odometry's topic")
        for _ in range(5):
            second(0.0)
        b.wait(lambda: rig.filtered and off() < 3.0, what="the filtered pose")
        for _ in range(6):
            second(49.9)
        b.wait_diagnosis("odom_disagrees: in", "one of them is wrong")
        said = len(rig.filtered)
        second(49.9)
        assert len(rig.filtered) == said
        while "odom_disagrees" in b.wait_diagnosis().message:
            second(0.0)
        second(0.0)
        b.wait(lambda: len(rig.filtered) > said and off() < 3.0, what="the filter's new start")
        rejected = int(b.value("odom_rejected/odom_turns_too_fast") or 0)
        second(0.0, yaw_rate=100.0)
        b.wait_diagnosis("odometry turns by 100.0 rad/s")
        b.wait(lambda: int(b.value("odom_rejected/odom_turns_too_fast")) == rejected + 10, what="the count")


def calibrated(path: Path, **calibration: float) -> str:
    """A checkpoint of the stub."""
    model = StubModel("panorama")
    model.calibration = Calibration(**calibration)
    return str(write_stub(path, 0.0, model=model))


def test_a_fix_that_is_wrong_but_claims_a_centimetre_is_not_believed(rig: Rig, tmp_path: Path) -> None:
    b = rig.bench
    centre = LocalProjection(*snap_to_grid(LAT, LON, SIZE * GSD / 4.0))
    precise = NavSatFix(position_covariance_type=2)
    precise.status.status = 0
    precise.position_covariance = [1e-4, 0, 0, 0, 1e-4, 0, 0, 0, 1e-4]

    def send(lat: float, lon: float) -> None:
        ns = rig.step()
        precise.latitude, precise.longitude = lat, lon
        rig.fix.publish(rig.header(precise, ns))
        rig.send_heading(ns)
        rig.send_image(ns)

    # The stub's logits keep their scale: its contrast is about 340.
    checkpoint = calibrated(tmp_path / "sure.safetensors", contrast=340.0)
    with rig.configured(checkpoint=checkpoint, search_radius_m=0.0, filter=True):

        def off(pose: PoseWithCovarianceStamped) -> float:
            x, y = DATUM.forward(*true_place())
            place = pose.pose.pose.position
            return math.hypot(place.x - x, place.y - y)

        # 15 m from the heat map's place, on the same tile.
        wrong = tuple(float(v) for v in centre.inverse(-7.0, -7.0))
        before, filtered = len(rig.poses), len(rig.filtered)
        while len(rig.filtered) == filtered:
            send(*wrong)
            b.wait_diagnosis("fix_disagrees", "outside the 5 m around the fix")
        assert len(rig.poses) > before
        assert max(map(off, rig.poses[before:])) < 1.0 and off(rig.filtered[-1]) < 3.0
        # Right again, at two places.
        plane, sides = LocalProjection(*true_place()), itertools.cycle((3.0, -3.0))
        while "fix_disagrees" in b.wait_diagnosis().message:
            send(*(float(v) for v in plane.inverse(next(sides), 0.0)))
        assert off(rig.poses[-1]) < 1.0


def test_the_checkpoint_says_how_confident_a_pose_must_be(rig: Rig, tmp_path: Path) -> None:
    checkpoint = calibrated(tmp_path / "doubtful.safetensors", min_confidence=1.0)
    with rig.configured(checkpoint=checkpoint):
        before = len(rig.poses)
        rig.send_frame()
        rig.bench.wait_diagnosis("low_confidence")
        assert len(rig.poses) == before
    with rig.configured(checkpoint=checkpoint, min_confidence=0.0):
        rig.good_frame()


def test_damaged_jpegs_are_refused_where_libjpeg_notices() -> None:
    rng = np.random.default_rng(0)
    image = np.clip(texture(256, 512).astype(int) + rng.normal(0, 6, (256, 512, 3)), 0, 255).astype(np.uint8)
    whole = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    decode_compressed(whole)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for position in rng.integers(len(whole) // 20, len(whole), 4):
            damaged[position] ^= 1 << int(rng.integers(8))
        try:
            decode_compressed(bytes(damaged))
        except ImageError:
            refused += 1
    print(f"refused {refused} of 200")
    assert refused > 100


def test_cameras_may_pad_their_jpegs() -> None:
    whole: Any = cv2.imencode(".jpg", texture(64, 128))[1].tobytes()
    expected = decode_compressed(whole)
    for extra in (1, 4, 8):
        padded = whole[:-2] + bytes(extra) + whole[-2:]
        np.testing.assert_array_equal(decode_compressed(padded), expected)
