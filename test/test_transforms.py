"""Chains of transforms against 4x4 matrices, random ones and those of a recorded drive."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from xview_loc.bags.ros_types import stamp_ns
from xview_loc.vehicle.transforms import Transform, TransformBuffer, TransformError

NS = 1_000_000_000
RECORDED = Path(__file__).parents[2] / "shared" / "data" / "tracks" / "robot_localization_test1.bag"


def random_pose(rng: np.random.Generator, turn: float = math.pi) -> np.ndarray:
    matrix = np.eye(4)
    axis = rng.normal(size=3)
    matrix[:3, :3] = cv2.Rodrigues(axis / np.linalg.norm(axis) * rng.uniform(0.0, turn))[0]
    matrix[:3, 3] = rng.normal(size=3) * 10.0
    return matrix


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """Of a rotation matrix, by its axis and angle."""
    vector = cv2.Rodrigues(rotation)[0].ravel()
    angle = float(np.linalg.norm(vector))
    axis = vector / angle if angle else vector
    return np.append(axis * math.sin(angle / 2.0), math.cos(angle / 2.0))


def transform(matrix: np.ndarray) -> Transform:
    x, y, z, w = quaternion(matrix[:3, :3])
    t = SimpleNamespace(**dict(zip("xyz", matrix[:3, 3], strict=True)))
    return Transform.of(SimpleNamespace(translation=t, rotation=SimpleNamespace(x=x, y=y, z=z, w=w)))


def between(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Interpolate on a straight line and about a fixed axis."""
    matrix = np.eye(4)
    matrix[:3, 3] = a[:3, 3] + share * (b[:3, 3] - a[:3, 3])
    turn = cv2.Rodrigues(a[:3, :3].T @ b[:3, :3])[0]
    matrix[:3, :3] = a[:3, :3] @ cv2.Rodrigues(share * turn)[0]
    return matrix


def assert_same(pose: Transform, matrix: np.ndarray) -> None:
    np.testing.assert_allclose(pose.translation, matrix[:3, 3], atol=1e-9)
    np.testing.assert_allclose(pose.matrix, matrix[:3, :3], atol=1e-9)


def test_chains_of_moving_and_static_frames_are_products_of_matrices() -> None:
    rng = np.random.default_rng(3)
    buffer = TransformBuffer()
    # map -> odom -> base -> (camera -> optical, antenna); odom and base move, at different times.
    static = {"camera": "base", "optical": "camera", "antenna": "base"}
    fixed = {child: random_pose(rng) for child in static}
    for child, parent in static.items():
        buffer.add(0, parent, child, transform(fixed[child]), static=True)
    moving = {"odom": [random_pose(rng, 1.0) for _ in range(5)], "base": [random_pose(rng) for _ in range(9)]}
    period = {"odom": 2 * NS, "base": NS}
    for child, parent in (("odom", "map"), ("base", "odom")):
        for number in range(len(moving[child])):
            buffer.add(number * period[child], f"/{parent}", child, transform(moving[child][number]))

    def expected(frame: str, stamp: float) -> np.ndarray:
        """Pose in map."""
        if frame == "map":
            return np.eye(4)
        if frame in static:
            return expected(static[frame], stamp) @ fixed[frame]
        number, share = divmod(stamp * NS / period[frame], 1.0)
        poses = moving[frame]
        own = between(poses[int(number)], poses[min(int(number) + 1, len(poses) - 1)], share)
        return own if frame == "odom" else expected("odom", stamp) @ own

    frames = ["map", "odom", "base", "camera", "optical", "antenna"]
    for target in frames:
        for source in frames:
            for stamp in (0.0, 0.4, 3.0, 7.9, 8.0):
                matrix = np.linalg.inv(expected(target, stamp)) @ expected(source, stamp)
                assert_same(buffer.lookup(target, source, round(stamp * NS)), matrix)
    assert_same(buffer.lookup("map", "optical"), expected("optical", 8.0))
    inside = np.linalg.inv(fixed["antenna"]) @ fixed["camera"] @ fixed["optical"]
    assert_same(buffer.lookup("antenna", "optical"), inside)
    # Both move until 8 s; nothing moves between two static frames.
    stamp, pose = buffer.latest("map", "optical")
    assert stamp == 8 * NS
    assert_same(pose, expected("optical", 8.0))
    assert buffer.latest("antenna", "optical")[0] == 0


def test_directions_in_the_plane() -> None:
    assert Transform.planar(1.0, 2.0, 0.3).yaw == pytest.approx(0.3)
    # An optical frame of a camera that looks to the left: z forward, x right.
    left = np.eye(4)
    left[:3, :3] = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    assert transform(left).direction(2) == pytest.approx(math.pi / 2.0)


@pytest.mark.skipif(not RECORDED.exists(), reason="the real data is not beside the repository")
def test_a_recorded_drive_is_interpolated_to_where_it_was() -> None:
    with AnyReader([RECORDED]) as reader:
        drive = [
            reader.deserialize(data, connection.msgtype)
            for connection, _, data in reader.messages(reader.connections)
            if connection.topic.endswith("/odom")
        ]
    mount = random_pose(np.random.default_rng(1))
    mount[:3, 3] *= 0.1
    errors = []
    buffer = TransformBuffer()
    buffer.add(0, "base_link", "imu", transform(mount), static=True)
    for before, here, after in zip(drive[:-2:2], drive[1:-1:2], drive[2::2], strict=True):
        for message in (before, after):
            pose = SimpleNamespace(
                translation=message.pose.pose.position, rotation=message.pose.pose.orientation
            )
            buffer.add(stamp_ns(message.header), "odom", "base_link", Transform.of(pose))
        p, q = here.pose.pose.position, here.pose.pose.orientation
        true = np.eye(4)
        true[:3, 3] = p.x, p.y, p.z
        turn = 2.0 * math.atan2(q.z, q.w)  # the recorded wheels know the plane only
        true[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
        found = buffer.lookup("odom", "imu", stamp_ns(here.header))
        errors.append(np.linalg.norm(found.translation - (true @ mount)[:3, 3]))
    # A message comes every tenth of a second, and its stamp is some hundredths late.
    print(f"{len(errors)} poses: median {np.median(errors):.4f} m, largest {max(errors):.4f} m")
    assert len(errors) > 1900 and max(errors) < 0.05


def test_what_is_unknown_is_said() -> None:
    buffer = TransformBuffer(keep_s=10.0)
    here = Transform.planar(1.0, 0.0, 0.0)
    for second in range(20):
        buffer.add(second * NS, "odom", "base", here)
    buffer.add(0, "earth", "map", here, static=True)
    for frames, stamp, text in (
        (("odom", "base"), 20 * NS, "odom -> base ends 1.000 s before the wanted stamp"),
        (("odom", "base"), 8 * NS, "odom -> base begins 1.000 s after the wanted stamp"),
        (("odom", "camera"), None, "frame 'camera' is unknown"),
        (("map", "base"), None, "frames map and base are not connected"),
    ):
        with pytest.raises(TransformError) as error:
            buffer.lookup(*frames, stamp)
        assert text in str(error.value)
    # What comes late by less than half a second is put in its place; earlier, time started again.
    buffer.add(round(18.6 * NS), "odom", "base", Transform.planar(2.0, 0.0, 0.0))
    assert buffer.lookup("odom", "base", round(18.8 * NS)).translation[0] == pytest.approx(1.5)
    buffer.add(3 * NS, "odom", "base", here)
    buffer.add(4 * NS, "odom", "base", here)
    with pytest.raises(TransformError, match="ends"):
        buffer.lookup("odom", "base", 18 * NS)
    # A frame has one parent.
    assert buffer.add(5 * NS, "map", "base", here) == "odom"
    assert buffer.lookup("earth", "base").translation[0] == 2.0
    buffer.add(0, "base", "earth", here, static=True)
    with pytest.raises(TransformError, match="loop: map -> earth -> base -> map"):
        buffer.lookup("map", "base")
    for parent, child in (("odom", "odom"), ("", "base")):
        with pytest.raises(TransformError, match="makes no sense"):
            buffer.add(0, parent, child, here)
    bad = SimpleNamespace(x=0.0, y=0.0, z=math.nan, w=0.0)
    with pytest.raises(TransformError, match="unusable"):
        Transform.of(SimpleNamespace(translation=bad, rotation=bad))
