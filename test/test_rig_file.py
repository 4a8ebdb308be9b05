"""Rig files: where cameras are, and their masks."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from xview_loc.errors import UserError
from xview_loc.rig import rotation_matrix
from xview_loc.simulation.rigs import RIGS
from xview_loc.vehicle.rig_file import CameraEntry, read_rig_file, write_rig_file

PLACE = "{x: 0.1, y: 0.2, z: 1.5}"


def read(folder: Path, text: str) -> dict[str, CameraEntry]:
    (folder / "rig.yaml").write_text(text)
    return read_rig_file(folder / "rig.yaml")


def looks(entry: CameraEntry) -> tuple[np.ndarray, np.ndarray]:
    """Where a camera looks, and where the right side of its images is, in base_link."""
    assert entry.pose is not None
    axes = rotation_matrix(tuple(entry.pose.rotation))
    return axes[:, 2], axes[:, 0]


def test_cameras_look_where_the_angles_say(tmp_path: Path) -> None:
    rig = read(
        tmp_path,
        "cameras:\n  ahead: {x: 1.5, z: 1.2}\n  left: {yaw_deg: 90}\n  down: {pitch_deg: 30}\n"
        "  turned: {roll_deg: 90}\n  rear: {yaw_deg: 180, pitch_deg: 30}\n",
    )
    assert rig["ahead"].pose is not None and rig["ahead"].pose.translation.tolist() == [1.5, 0.0, 1.2]
    s, c = math.sin(math.radians(30)), math.cos(math.radians(30))
    for name, forward, right in (
        ("ahead", [1, 0, 0], [0, -1, 0]),
        ("left", [0, 1, 0], [1, 0, 0]),
        ("down", [c, 0, -s], [0, -1, 0]),
        # Its right side is down.
        ("turned", [1, 0, 0], [0, 0, -1]),
        ("rear", [-c, 0, -s], [0, 1, 0]),
    ):
        for found, wanted in zip(looks(rig[name]), (forward, right), strict=True):
            assert found == pytest.approx(wanted, abs=1e-9), name


def test_a_quaternion_is_the_optical_frames_as_tf_says_it(tmp_path: Path) -> None:
    rig = read(tmp_path, "cameras: {front: {quaternion: [-0.5, 0.5, -0.5, 0.5]}}")
    forward, right = looks(rig["front"])
    assert forward == pytest.approx([1, 0, 0]) and right == pytest.approx([0, -1, 0])


def test_simulated_rigs_are_read_as_they_were_written(tmp_path: Path) -> None:
    cameras = RIGS["eight"]
    write_rig_file(tmp_path / "rig.yaml", cameras)
    entries = read_rig_file(tmp_path / "rig.yaml")
    assert list(entries) == list(cameras)
    for name, entry in entries.items():
        assert entry.pose is not None and entry.own is None
        assert entry.pose.translation == pytest.approx(cameras[name].position)
        assert rotation_matrix(tuple(entry.pose.rotation)) == pytest.approx(cameras[name].axes)


def test_masks_lie_beside_the_file_and_places_may_be_left_to_tf(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[40:] = 255
    cv2.imwrite(str(tmp_path / "bonnet.png"), mask)
    rig = read(tmp_path, "cameras: {front: {own_mask: bonnet.png}}")
    assert rig["front"].pose is None
    assert rig["front"].own is not None and np.array_equal(rig["front"].own, mask > 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no cameras"),
        ("front: {x: 1}", "has no cameras"),
        ("cameras: []", "has no cameras"),
        ("cameras: {front: 1}", "camera front: write x, y, z"),
        ("cameras: {front: {X: 1}}", "camera front: X is unknown; it may have own_mask, pitch_deg"),
        ("cameras: {front: {x: a}}", "camera front: x is no number: a"),
        ("cameras: {front: {x: .nan}}", "x is no number: nan"),
        ("cameras: {front: {x: true}}", "x is no number"),
        ("cameras: {front: {x: 500}}", "within 100 m of base_link"),
        ("cameras: {front: {quaternion: [0, 0, 1]}}", "quaternion must be four numbers"),
        ("cameras: {front: {quaternion: [0, 0, 0, 0]}}", "no norm of 1"),
        ("cameras: {front: {quaternion: [0, 0, 0, 1], yaw_deg: 3}}", "not both"),
        ("cameras: {front: {own_mask: none.png}}", "own_mask .*none.png cannot be read"),
        ("cameras: {front: {own_mask: white.png}}", "white all over: it hides the whole image"),
        ("cameras: {front: {own_mask: red.png}}", "red.png has no white: it hides nothing"),
        ("cameras: {front: {own_mask: rig.yaml}}", "own_mask .* cannot be read: not a JPEG"),
        ("cameras: {front: {x: 1}, front: {x: 2}}", "cannot be read: .*duplicate key"),
        ("cameras: {front: " + "[" * 20_000, "cannot be read"),
        ("cameras: !!python/object:os.system {}", "cannot be read"),
        ("#" * 200_000, "cannot be read: .* at most 0 MB"),
        ('cameras: {"a\\e[31m": {x: a}}', r"camera a\\x1b\[31m: x is no number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    cv2.imwrite(str(tmp_path / "white.png"), np.full((48, 64), 255, np.uint8))
    cv2.imwrite(str(tmp_path / "red.png"), np.full((48, 64, 3), (0, 0, 255), np.uint8))
    with pytest.raises(UserError, match=rf"^rig_file .*rig.yaml.*{says}") as caught:
        read(tmp_path, text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_rig_file(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        read_rig_file(tmp_path)
