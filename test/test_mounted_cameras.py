"""The poses of cameras' optical frames, whatever their drivers call their frames."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xview_loc.vehicle.mounted_cameras import optical, optical_pose, rig_frames
from xview_loc.vehicle.transforms import Transform, TransformBuffer, TransformError


def housing(yaw_deg: float, pitch_deg: float) -> Transform:
    """Pose of a camera's housing: x forward, z up; positive pitch looks down."""
    half = math.radians(pitch_deg) / 2.0
    pitched = Transform(np.zeros(3), np.array([0.0, math.sin(half), 0.0, math.cos(half)]))
    return Transform.planar(1.0, 0.5, math.radians(yaw_deg)) @ pitched


def rolled(pose: Transform, degrees: float) -> Transform:
    """An optical frame turned about its z axis: the camera is mounted on its side, or upside down."""
    half = math.radians(degrees) / 2.0
    return pose @ Transform(np.zeros(3), np.array([0.0, 0.0, math.sin(half), math.cos(half)]))


def found(name: str, pose: Transform) -> Transform:
    buffer = TransformBuffer()
    buffer.add(0, "base_link", name, pose, static=True)
    return optical_pose(lambda frame: buffer.lookup("base_link", frame), [name])


@pytest.mark.parametrize("yaw", [0.0, 90.0, -135.0, 180.0])
@pytest.mark.parametrize("pitch", [-40.0, 0.0, 20.0, 55.0])
def test_a_housing_looks_along_its_x_axis(yaw: float, pitch: float) -> None:
    pose = housing(yaw, pitch)
    camera = found("front_camera", pose)
    assert camera.matrix[:, 2] == pytest.approx(pose.matrix[:, 0])
    # The image's right side is the vehicle's right side of the camera.
    assert camera.matrix[:, 0] == pytest.approx(-pose.matrix[:, 1])
    assert camera.translation == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("roll", [0.0, 90.0, 180.0])
@pytest.mark.parametrize(("yaw", "pitch"), [(0.0, 0.0), (90.0, 80.0), (-135.0, -25.0)])
def test_an_optical_frame_need_not_say_so(roll: float, yaw: float, pitch: float) -> None:
    pose = rolled(optical(housing(yaw, pitch)), roll)
    assert found("CAM_FRONT", pose).matrix == pytest.approx(pose.matrix)


def test_a_frame_that_says_so_is_optical_wherever_it_looks() -> None:
    up = optical(housing(0.0, -90.0))
    assert up.matrix[:, 2] == pytest.approx([0.0, 0.0, 1.0])
    assert found("sky_optical_frame", up).matrix == pytest.approx(up.matrix)


def test_the_first_frame_that_is_known_counts() -> None:
    buffer = TransformBuffer()
    buffer.add(0, "base_link", "head_camera", housing(0.0, 0.0), static=True)

    def pose_of(frame: str) -> Transform:
        return buffer.lookup("base_link", frame)

    frames = rig_frames("front", "head_camera")
    assert frames == ["front_optical_frame", "head_camera"]
    assert optical_pose(pose_of, frames).matrix == pytest.approx(optical(housing(0.0, 0.0)).matrix)
    buffer.add(0, "base_link", "front_optical_frame", optical(housing(90.0, 0.0)), static=True)
    assert optical_pose(pose_of, frames).matrix == pytest.approx(optical(housing(90.0, 0.0)).matrix)
    with pytest.raises(TransformError, match="left_optical_frame"):
        optical_pose(pose_of, rig_frames("left", ""))
