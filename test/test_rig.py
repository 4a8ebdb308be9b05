"""A rig's cameras make one upright panorama."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from xview_loc.camera import CameraError, CameraModel, PanoramaCamera
from xview_loc.images import ImageError
from xview_loc.rig import UNSEEN, MountedCamera, Rig, look_aside

ELEVATION = (math.radians(30.0), math.radians(-60.0))
SIZE = (64, 256)
LENS = PanoramaCamera(256, 64, *ELEVATION)


def smooth_panorama(width: int = 1024) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(width // 2, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(np.hstack([noise, noise, noise]), (0, 0), width / 60.0)[:, width : 2 * width]
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def test_panoramas_are_cut_to_the_elevations_asked_for() -> None:
    image = smooth_panorama()
    rig = Rig({"all": MountedCamera(PanoramaCamera(1024, 512), (0.0, 0.0, 1.7))})
    upright, mask = rig.view({"all": image}, LENS)
    wanted = cv2.resize(image[512 // 3 : 512 * 5 // 6], SIZE[::-1], interpolation=cv2.INTER_AREA)
    assert mask.all()
    assert np.abs(upright.astype(int) - wanted).mean() < 1.5


K = (300, 0, 320, 0, 300, 240, 0, 0, 1)


@pytest.mark.parametrize(
    "camera",
    [
        CameraModel(640, 480, K, (-0.28, 0.07, 1e-3, -5e-4, 0.0)),
        CameraModel(640, 480, K, (0.2, 0.1, 0, 0, 0, 0.3, 0.1, 0.01), "rational_polynomial"),
        CameraModel(640, 480, K, (-0.02, 0.004, -0.002, 1e-4), "equidistant"),
    ],
    ids=lambda camera: camera.distortion_model,
)
def test_pixels_are_projected_as_opencv_undistorts_them(camera: CameraModel) -> None:
    fisheye = camera.distortion_model == "equidistant"
    undistort = cv2.fisheye.initUndistortRectifyMap if fisheye else cv2.initUndistortRectifyMap
    lens = camera.matrix, np.array(camera.distortion), np.eye(3), camera.matrix
    x, y = undistort(*lens, (640, 480), cv2.CV_32FC1)
    column, row = np.meshgrid(np.arange(640), np.arange(480))
    rays = np.stack([(column - 320) / 300, (row - 240) / 300, np.ones((480, 640))], -1)
    pixels, seen = camera.project(7.0 * rays)
    assert seen.mean() > 0.9
    assert np.abs(pixels - np.stack([x, y], -1))[seen].max() < 0.01


def test_a_lens_whose_polynomial_bends_back_shows_nothing_twice() -> None:
    camera = CameraModel(640, 480, (300, 0, 320, 0, 300, 240, 0, 0, 1), (-0.4, 0, 0, 0, 0))
    angle = np.radians(np.arange(0.0, 180.0, 0.5))
    pixels, seen = camera.project(np.stack([np.sin(angle), 0 * angle, np.cos(angle)], 1))
    assert seen[:60].all() and not seen[-180:].any()
    assert (np.diff(pixels[seen, 0]) > 0).all()


@pytest.mark.parametrize("angle", [0.03, -0.05])
def test_a_camera_looks_aside(angle: float) -> None:
    image = smooth_panorama()
    lens = CameraModel(320, 120, (160, 0, 159.5, 0, 160, 50, 0, 0, 1))
    rig = Rig({"all": MountedCamera(PanoramaCamera(1024, 512), (0.0, 0.0, 1.7))})
    ahead, _ = rig.view({"all": image}, lens)
    # What lies left of the middle comes to the middle.
    aside, _ = rig.view({"all": np.roll(image, round(angle / (2 * np.pi) * 1024), axis=1)}, lens)
    angle = round(angle / (2 * np.pi) * 1024) / 1024 * 2 * np.pi
    turned = look_aside(ahead, lens, angle)
    inside = slice(12, -12)
    assert np.abs(turned.astype(int) - aside)[:, inside].mean() < 1.5
    assert np.abs(ahead.astype(int) - aside)[:, inside].mean() > 3.0
    edge = 0 if angle > 0 else -1
    assert (turned[:, edge] == UNSEEN).all() and not (turned[:, -1 - edge] == UNSEEN).all(1).any()


def test_a_tilted_panorama_is_levelled() -> None:
    """Levelling what a tilted camera saw gives the level panorama again."""
    image = smooth_panorama()
    whole = PanoramaCamera(1024, 512)
    roll, pitch = math.radians(8.0), math.radians(-5.0)
    camera = PanoramaCamera(1024, 512)
    rig = Rig({"all": MountedCamera(camera, (0.0, 0.0, 1.7))})
    # Nose up by 5 degrees undoes nose down by 5; the order of rotations matters, so each alone.
    for tilt in ({"roll": roll}, {"pitch": pitch}):
        tilted, _ = rig.view({"all": image}, whole, **tilt)
        back = {name: -angle for name, angle in tilt.items()}
        level, mask = rig.view({"all": tilted}, whole, **back)
        assert mask.all()
        difference = np.abs(level.astype(int) - image)[60:-60]
        assert difference.mean() < 1.0
        assert np.abs(tilted.astype(int) - image)[60:-60].mean() > 3.0


def test_roll_and_pitch_have_the_signs_of_rep_103() -> None:
    """With the nose down a camera ahead sees lower: in the level panorama its image moves down."""
    camera = CameraModel(200, 200, (100, 0, 99.5, 0, 100, 99.5, 0, 0, 1))
    rig = Rig({"front": MountedCamera(camera, (0.0, 0.0, 1.5))})
    image = np.full((200, 200, 3), 200, np.uint8)

    def middle(**tilt: float) -> tuple[float, float, float]:
        _, mask = rig.view({"front": image}, PanoramaCamera(360, 180), **tilt)
        rows, columns = np.nonzero(mask)
        left, right = rows[columns < 160].mean(), rows[columns >= 200].mean()
        return float(rows.mean()), float(left), float(right)

    level, down, right_down = middle(), middle(pitch=0.2), middle(roll=0.2)
    assert down[0] - level[0] == pytest.approx(math.degrees(0.2), abs=1.5)
    assert right_down[2] > level[2] + 1.0 and right_down[1] < level[1] - 1.0


def test_what_no_camera_sees_is_masked() -> None:
    camera = CameraModel(200, 200, (100, 0, 99.5, 0, 100, 99.5, 0, 0, 1))
    left = (-0.5, 0.5, -0.5, 0.5)
    own = np.zeros((200, 200), bool)
    own[150:] = True
    rig = Rig(
        {
            "front": MountedCamera(camera, (1.0, 0.0, 1.5)),
            "roof": MountedCamera(camera, (0.0, 0.0, 1.5), left),
        },
        own={"front": own},
    )
    image = np.full((200, 200, 3), 200, np.uint8)
    both, mask = rig.view({"front": image, "roof": image}, LENS)
    alone, mask_alone = rig.view({"front": image}, LENS)
    assert (both[mask] == 200).all() and (both[~mask] == (124, 116, 104)).all()
    assert mask_alone.sum() < mask.sum()
    assert not mask_alone[50:].any(), "the bonnet is hidden"
    assert (alone[~mask_alone] == (124, 116, 104)).all()


def test_images_and_masks_of_another_size_are_refused() -> None:
    camera = CameraModel(200, 100, (100, 0, 99.5, 0, 100, 49.5, 0, 0, 1))
    with pytest.raises(
        CameraError, match="camera front has a mask of 100 x 200 pixels, but images of 200 x 100"
    ):
        Rig({"front": MountedCamera(camera)}, own={"front": np.zeros((200, 100), bool)})
    with pytest.raises(ImageError, match="the image of camera front has 20 x 10 pixels"):
        Rig({"front": MountedCamera(camera)}).view({"front": np.zeros((10, 20, 3), np.uint8)}, LENS)


def test_a_camera_that_sees_nothing_of_the_panorama_adds_nothing() -> None:
    camera = CameraModel(200, 200, (100, 0, 99.5, 0, 100, 99.5, 0, 0, 1))
    rig = Rig({"up": MountedCamera(camera, rotation=(0.0, 0.0, 0.0, 1.0)), "front": MountedCamera(camera)})
    image = np.full((200, 200, 3), 200, np.uint8)
    low = PanoramaCamera(256, 64, math.radians(-10.0), math.radians(-60.0))
    both, mask = rig.view({"up": image, "front": image}, low)
    assert mask.any() and (both[mask] == 200).all()
    assert not rig.view({"up": image}, low)[1].any()
    assert not rig.view({}, low)[1].any()


def test_panoramas_may_have_any_shape() -> None:
    for width, height in ((40_000, 4), (4, 40_000), (1, 1)):
        rig = Rig({"all": MountedCamera(PanoramaCamera(width, height, *ELEVATION))})
        image = np.full((height, width, 3), 200, np.uint8)
        upright, mask = rig.view({"all": image}, LENS, roll=0.05)
        assert mask.mean() > 0.9 and (upright[mask] == 200).all()
