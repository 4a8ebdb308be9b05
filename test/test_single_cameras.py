"""A panorama camera that is tilted, or shows more than the model looks at; one pinhole camera instead."""

from __future__ import annotations

import array
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from localizer_rig import Rig, running
from ros_harness import NodeProcess, bench, pick_domain
from sensor_msgs.msg import Image, Imu
from test_camera_rigs import NS, Spot, Vehicle, off, scene, tilt_quaternion

from xview_loc.camera import PanoramaCamera
from xview_loc.rig import directions, tilt_matrix
from xview_loc.vehicle.mounted_cameras import optical
from xview_loc.vehicle.transforms import Transform

DOMAIN = pick_domain()
WIDTH, HEIGHT, FOCAL = 128, 64, 40.0
K = [FOCAL, 0.0, (WIDTH - 1) / 2, 0.0, FOCAL, (HEIGHT - 1) / 2, 0.0, 0.0, 1.0]
YAW_DEG = 20.0


class Eye(Rig):
    """A vehicle with one camera, which looks 20 degrees to the left."""

    spot: Spot = (10.0, -10.0)
    tilt = (0.0, 0.0)
    edges: tuple[float, float] | None = (90.0, -90.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.imu = self.bench.publisher(Imu, "/imu")

    found = Vehicle.found

    def send_image(self, ns: int, **changes: Any) -> None:
        for at in (ns - NS // 50, ns + NS // 50):
            turn = tilt_quaternion(*map(math.radians, self.tilt))
            self.imu.publish(self.header(Imu(orientation=turn), at))
        pose = Transform.planar(0.0, 0.0, math.radians(YAW_DEG))
        if self.edges is None:
            u, v = np.meshgrid(np.arange(WIDTH) - K[2], np.arange(HEIGHT) - K[5])
            rays = np.stack([u / FOCAL, v / FOCAL, np.ones_like(u)], -1) @ optical(pose).matrix.T
        else:
            top, bottom = map(math.radians, self.edges)
            rays = directions(PanoramaCamera(WIDTH, HEIGHT, top, bottom)) @ pose.matrix.T
        pixels = scene(rays @ tilt_matrix(*map(math.radians, self.tilt)).T, self.spot)
        data = array.array("B", pixels.tobytes())
        image = Image(width=WIDTH, height=HEIGHT, encoding="rgb8", step=3 * WIDTH, data=data)
        self.image.publish(self.header(image, ns))

    def send_info(self, ns: int, **more: Any) -> None:
        super().send_info(ns, **{"width": WIDTH, "height": HEIGHT, "k": K, **more})


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Eye]:
    folder = tmp_path_factory.mktemp("eye")
    # The roof, at the bottom.
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[52:] = 255
    cv2.imwrite(str(folder / "roof.png"), mask)
    parameters = {"model": "stub-pointing", "search_radius_m": -1.0, "camera_yaw_deg": YAW_DEG}
    with running(DOMAIN, folder, vehicle=Eye, own_mask=str(folder / "roof.png"), **parameters) as r:
        yield r


@pytest.fixture(autouse=True)
def _as_usual(eye: Eye) -> Iterator[None]:
    eye.spot, eye.tilt, eye.edges = (10.0, -10.0), (0.0, 0.0), (90.0, -90.0)
    yield


@pytest.mark.parametrize("spot", [(10.0, -10.0), (-150.0, 15.0), (100.0, -40.0)])
def test_a_panorama_of_all_directions_is_cut_to_those_of_the_model(eye: Eye, spot: Spot) -> None:
    eye.spot = spot
    assert off(eye.found(), spot) < 1.0


def test_elevations_may_be_given(eye: Eye) -> None:
    eye.edges, eye.spot = (60.0, -70.0), (10.0, 10.0)
    with eye.configured(panorama_elevation_deg=[60.0, -70.0], camera_yaw_deg=YAW_DEG):
        assert off(eye.found(), eye.spot) < 1.0
    assert off(eye.found(), eye.spot) > 2.0


def test_a_tilted_panorama_is_levelled(eye: Eye) -> None:
    eye.spot, eye.tilt = (-80.0, 5.0), (10.0, 4.0)
    level = off(eye.found(), eye.spot)
    with eye.configured(tilt_source="imu"):
        assert off(eye.found(), eye.spot) < 1.0 < 2.0 < level


def test_one_pinhole_camera_is_a_rig_of_one(eye: Eye) -> None:
    eye.edges = None
    with eye.configured():
        # Its driver is there, but has said nothing yet: its images are no panoramas.
        eye.bench.wait(eye.info.get_subscription_count, what="the camera_info's subscription")
        while "camera_info_missing: camera_info has a publisher, but no usable" not in eye.bench.text():
            eye.send_frame()
            eye.bench.wait_diagnosis()
        eye.send_info(eye.ns)
        assert off(eye.found(), eye.spot) < 1.0
        eye.bench.wait_diagnosis()
        assert 0.1 < float(eye.bench.value("seen")) < 0.4
        eye.edges = (90.0, -90.0)


def test_a_driver_that_calls_a_camera_uncalibrated_means_a_panorama(eye: Eye) -> None:
    with eye.configured():
        eye.bench.wait(eye.info.get_subscription_count, what="the camera_info's subscription")
        eye.send_info(eye.ns, k=[0.0] * 9)
        assert off(eye.found(), eye.spot) < 1.0


def test_a_calibration_of_another_size_is_said(eye: Eye) -> None:
    with eye.configured():
        eye.bench.wait(eye.info.get_subscription_count, what="the camera_info's subscription")
        eye.send_info(eye.ns, width=WIDTH // 2, height=HEIGHT // 2)
        text = "image_invalid: the image has 128 x 64 pixels, but its calibration is for 64 x 32"
        while text not in eye.bench.text():
            eye.send_frame()
            eye.bench.wait_diagnosis()


@pytest.mark.parametrize("module", ["", "xview_loc.nodes.pair_logger_node"])
def test_two_cameras_with_one_topic(tmp_path: Path, module: str) -> None:
    (tmp_path / "rig.yaml").write_text("cameras: {front: {x: 1}, left: {yaw_deg: 90}}")
    parameters = {"cameras": ["front", "left"], "rig_file": str(tmp_path / "rig.yaml")}
    arguments = ("-r", "left/image:=front/image")
    says = "not_configured: cameras front and left have one topic: /front/image"
    refused(DOMAIN + 1, tmp_path / "log", parameters, says, *arguments, module=module)


@pytest.mark.skipif(find_spec("tf2_msgs") is not None, reason="tf2_msgs is installed: tf may say it")
def test_a_camera_whose_place_nobody_says(tmp_path: Path) -> None:
    (tmp_path / "rig.yaml").write_text("cameras: {front: {x: 1}}")
    parameters = {"cameras": ["front", "left"], "rig_file": str(tmp_path / "rig.yaml")}
    says = "rig_file does not say where camera left is, and tf2_msgs cannot be imported"
    refused(DOMAIN + 2, tmp_path / "log", parameters, says)


def refused(
    domain: int, log: Path, parameters: dict[str, Any], says: str, *arguments: str, module: str = ""
) -> None:
    node = NodeProcess(domain, log, parameters, *arguments, module=module)
    try:
        with bench(domain) as b:
            assert b.wait_diagnosis(says).level == b"\x02"
    finally:
        assert node.stop() == 0, node.log
    assert "Traceback" not in node.log, node.log
