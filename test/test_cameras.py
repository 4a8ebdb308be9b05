"""A node's cameras: which are used, where tf says that they are, and what is said of the others."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from map_fixtures import texture

from xview_loc.bags.ros_types import header, message, serialize
from xview_loc.camera import CameraModel
from xview_loc.nodes.cameras import Cameras, Frame
from xview_loc.nodes.parameters import LOCALIZER
from xview_loc.nodes.transforms import Transforms
from xview_loc.vehicle.mounted_cameras import optical
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.synchronisation import RejectedInput
from xview_loc.vehicle.transforms import Transform, TransformBuffer

KIND = "sensor_msgs/msg/CompressedImage"
CAMERA = CameraModel(96, 72, (48.0, 0, 47.5, 0, 48.0, 35.5, 0, 0, 1))
HERE = Transform(np.array([1.0, 0.5, 1.5]), np.array([0.0, 0.0, 0.0, 1.0]))


class Tf(Transforms):
    """What tf says, without a node."""

    def __init__(self, **frames: Transform) -> None:
        self.buffer, self._base = TransformBuffer(), "base_link"
        for name, pose in frames.items():
            self.buffer.add(0, "base_link", name, pose, static=True)


def cameras(**parameters: Any) -> Cameras:
    return Cameras({p.name: p.default for p in LOCALIZER} | parameters)


def frame(*names: str, calibrated: tuple[str, ...] = ("front", "left")) -> Frame:
    jpeg = np.frombuffer(cv2.imencode(".jpg", texture(72, 96))[1].tobytes(), np.uint8)
    data = serialize(KIND, message(KIND, header=header(1, ""), format="jpeg", data=jpeg))
    images = tuple(CameraImage(name, 1, KIND, data) for name in names)
    return Frame(1, 1, images, dict.fromkeys(calibrated, CAMERA))


def test_places_come_from_tf_by_the_cameras_names_or_their_calibrations_frames() -> None:
    both = cameras(cameras=["front", "left"])
    assert both.unplaced == ["front", "left"]
    both.frames["left"] = "head_camera"
    tf = Tf(front_optical_frame=optical(HERE), head_camera=HERE)
    pixels, rig = both.see(frame("front", "left"), tf, None)
    assert pixels.keys() == rig.cameras.keys() == {"front", "left"} and not both.problems
    # The one is an optical frame, the other looks along its x axis: that is the same.
    assert rig.cameras["front"].position == rig.cameras["left"].position == (1.0, 0.5, 1.5)
    assert rig.cameras["front"].rotation == pytest.approx(rig.cameras["left"].rotation)
    assert rig.cameras["front"].axes[:, 2] == pytest.approx([1.0, 0.0, 0.0])
    # Not every optical frame says so.
    tf = Tf(front_optical_frame=optical(HERE), head_camera=optical(HERE))
    again = both.see(frame("front", "left"), tf, None)[1]
    assert again.cameras["left"].rotation == pytest.approx(rig.cameras["left"].rotation)


def test_the_same_cameras_are_the_same_rig_which_keeps_its_tables() -> None:
    both, tf = cameras(cameras=["front", "left"]), Tf(front_optical_frame=HERE, left_optical_frame=HERE)
    rig = both.see(frame("front", "left"), tf, None)[1]
    # An image may be missing.
    assert both.see(frame("left"), tf, None)[1] is rig
    assert both.see(frame("left", calibrated=("left",)), tf, None)[1] is not rig


def test_calibrations_may_change_while_driving() -> None:
    both, tf = cameras(cameras=["front", "left"]), Tf(front_optical_frame=HERE, left_optical_frame=HERE)
    before = frame("front", "left")
    both.see(before, tf, None)
    for changed in (CameraModel(96, 72, (60.0, 0, 47.5, 0, 60.0, 35.5, 0, 0, 1)), CAMERA):
        pixels, rig = both.see(replace(before, cameras={"front": CAMERA, "left": changed}), tf, None)
        assert pixels.keys() == {"front", "left"} and rig.cameras["left"].camera == changed
    # That of a driver that halves its images, before it does.
    half = CameraModel(48, 36, (24.0, 0, 23.5, 0, 24.0, 17.5, 0, 0, 1))
    pixels, rig = both.see(replace(before, cameras={"front": CAMERA, "left": half}), tf, None)
    assert pixels.keys() == {"front"} and rig.cameras.keys() == {"front", "left"}
    assert both.problems["left"] == "the image has 96 x 72 pixels, but its calibration is for 48 x 36"


def test_a_camera_that_tf_does_not_know_is_left_out_and_said() -> None:
    both = cameras(cameras=["front", "left"])
    pixels, rig = both.see(frame("front", "left"), Tf(front_optical_frame=HERE), None)
    assert pixels.keys() == rig.cameras.keys() == {"front"}
    assert both.problems == {
        "left": "tf from base_link to left_optical_frame: frame 'left_optical_frame' is unknown"
    }
    with pytest.raises(RejectedInput, match="camera left: tf from base_link to left_optical_frame") as caught:
        both.see(frame("left"), Tf(front_optical_frame=HERE), None)
    assert caught.value.reason == "extrinsics_missing"


def test_a_damaged_image_leaves_the_rig_as_it_is() -> None:
    both, tf = cameras(cameras=["front", "left"]), Tf(front_optical_frame=HERE, left_optical_frame=HERE)
    whole = frame("front", "left")
    rig = both.see(whole, tf, None)[1]
    damaged = replace(whole, images=(whole.images[0], replace(whole.images[1], data=b"no message")))
    pixels, again = both.see(damaged, tf, None)
    assert pixels.keys() == {"front"} and again is rig
    assert both.problems["left"].startswith("damaged message")


def test_cameras_that_tf_places_off_the_vehicle_are_left_out() -> None:
    far = Transform(np.array([400.0, 300.0, 1.5]), np.array([0.0, 0.0, 0.0, 1.0]))
    both = cameras(cameras=["front", "left"])
    pixels, _ = both.see(frame("front", "left"), Tf(front_optical_frame=HERE, left_optical_frame=far), None)
    assert pixels.keys() == {"front"} and "tf says that it is 500 m from base_frame" in both.problems["left"]


def test_cameras_on_the_ground_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rig.yaml").write_text("cameras: {front: {x: 1}, left: {y: 1, yaw_deg: 90}}")
    given = {"cameras": ["front", "left"], "rig_file": str(tmp_path / "rig.yaml")}
    with pytest.raises(RejectedInput, match=r"0\.00 m above the ground") as caught:
        cameras(**given).see(frame("front", "left"), None, None)
    assert caught.value.reason == "extrinsics_invalid"
    assert cameras(**given, base_height_m=1.4).see(frame("front", "left"), None, None)[0]


def test_a_mask_that_does_not_fit_hides_its_camera(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.eye(36, 48, dtype=np.uint8) * 255)
    (tmp_path / "rig.yaml").write_text("cameras: {front: {x: 1, own_mask: mask.png}, left: {yaw_deg: 90}}")
    both = cameras(cameras=["front", "left"], rig_file=str(tmp_path / "rig.yaml"))
    pixels, _ = both.see(frame("front", "left"), None, None)
    assert pixels.keys() == {"left"}
    assert both.problems == {"front": "its own_mask has 48 x 36 pixels, but its images have 96 x 72"}


def test_a_single_cameras_mask_of_another_size_is_said(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.eye(36, 48, dtype=np.uint8) * 255)
    one = cameras(own_mask=str(tmp_path / "mask.png"))
    for calibrated in ((), ("",)):
        with pytest.raises(RejectedInput, match="its own_mask has 48 x 36 pixels, but its images") as caught:
            one.see(frame("", calibrated=calibrated), None, None)
        assert caught.value.reason == "own_mask_invalid"


def test_images_of_a_rig_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xview_loc.nodes.cameras.MOST_PIXELS", 96 * 72)
    both, tf = cameras(cameras=["front", "left"]), Tf(front_optical_frame=HERE, left_optical_frame=HERE)
    assert both.see(frame("front", "left"), tf, None)[0].keys() == {"front"}
    assert "million pixels together" in both.problems["left"]


def test_a_single_camera_looks_where_the_parameters_say() -> None:
    one = cameras(camera_x=1.0, camera_y=-0.5, camera_yaw_deg=90.0)
    pixels, rig = one.see(frame("", calibrated=()), None, None)
    mounted = rig.cameras[""]
    assert pixels[""].shape == (72, 96, 3)
    assert mounted.position == (1.0, -0.5, 0.0) and mounted.axes[:, 2] == pytest.approx([0.0, 1.0, 0.0])
    # Without a calibration it takes panoramas.
    assert (mounted.camera.top, mounted.camera.bottom) == (math.pi / 2, -math.pi / 2)
    assert one.see(frame("", calibrated=("",)), None, None)[1].cameras[""].camera == CAMERA
