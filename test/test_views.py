"""Views of the simulated city are exact for every camera, wherever it is mounted and however it tilts."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from checkerboard import corners, found, paved

from xview_loc.camera import CameraModel, PanoramaCamera
from xview_loc.rig import MountedCamera, Rig, tilt_matrix
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.views import CameraPose, PanoramaView, render_camera, render_panorama

ELEVATION = (math.radians(30.0), math.radians(-60.0))
K = (300, 0, 320, 0, 300, 240, 0, 0, 1)
CAMERAS = {
    "pinhole": CameraModel(640, 480, K),
    "plumb_bob": CameraModel(640, 480, K, (-0.28, 0.07, 1e-3, -5e-4, 0.0)),
    "rational": CameraModel(640, 480, K, (0.2, 0.1, 1e-3, 0, 0, 0.3, 0.1, 0.01), "rational_polynomial"),
    "fisheye": CameraModel(640, 480, (190, 0, 320, 0, 190, 240, 0, 0, 1), (-0.01, 1e-3, 0, 0), "equidistant"),
    "panorama": PanoramaCamera(512, 128, *ELEVATION),
}
FLAT = CameraPose(3.0, -7.0, 0.4, 0.0)


@pytest.fixture(scope="module")
def board() -> City:
    return paved()


@pytest.mark.parametrize("name", CAMERAS)
def test_rays_are_what_projects_on_the_pixels(name: str) -> None:
    rays, seen = CAMERAS[name].rays()
    assert seen.mean() > 0.9 and np.linalg.norm(rays, axis=-1) == pytest.approx(1.0)
    pixels, again = CAMERAS[name].project(5.0 * rays)
    inner = np.zeros_like(seen)
    inner[1:-1, 1:-1] = seen[1:-1, 1:-1]
    assert again[inner].all()
    difference = np.abs(pixels - np.stack(np.indices(seen.shape)[::-1], -1))
    assert np.median(difference[inner]) < 1e-3 and difference[inner].max() < 0.11


@pytest.mark.parametrize("name", CAMERAS)
def test_cameras_show_the_world_where_they_project_it(board: City, name: str) -> None:
    """Level and under 12 degrees of roll and pitch, from a place beside the vehicle's middle."""
    camera = CAMERAS[name]
    if isinstance(camera, PanoramaCamera):
        camera = PanoramaCamera(2048, 512, *ELEVATION)
    mounted = MountedCamera(camera, (1.0, -0.6, 1.5), (-0.6, 0.5, -0.4, 0.48))
    for roll, pitch in ((0.0, 0.0), (0.21, -0.21)):
        pose = replace(FLAT, roll=roll, pitch=pitch)
        points = corners(pose) @ tilt_matrix(roll, pitch) - mounted.position
        pixels, seen = camera.project(points @ mounted.axes)
        far = np.linalg.norm(points, axis=1)
        clear = seen & (far > 3.5) & (far < 8.0)
        clear &= (pixels > 10).all(1) & (pixels < (camera.width - 11, camera.height - 11)).all(1)
        assert clear.sum() >= 6
        image = render_camera(board, pose, mounted)
        error = np.linalg.norm(found(image, pixels[clear]) - pixels[clear], axis=1)
        assert np.median(error) < 0.3 and np.percentile(error, 80) < 0.6, error


def test_a_tilted_panorama_is_the_level_one_tilted() -> None:
    """Levelled again, it agrees with the level panorama; moving columns would not."""
    city = build_city(5, "source", size_m=420.0)
    whole = PanoramaView(512, 1024, 90.0, -90.0)
    level = CameraPose(20.0, 10.0, 0.3)
    tilted = replace(level, roll=0.2, pitch=-0.15)
    image = render_panorama(city, tilted, whole)
    rig = Rig({"all": MountedCamera(whole.camera)}, height=1.7)
    upright, _ = rig.view({"all": image}, PanoramaCamera(512, 128, *ELEVATION), roll=0.2, pitch=-0.15)
    direct = render_panorama(city, level, PanoramaView(256, 1024))
    direct = cv2.resize(direct, (512, 128), interpolation=cv2.INTER_AREA)
    blurred = [cv2.GaussianBlur(i, (0, 0), 1.0).astype(int) for i in (upright, direct)]
    assert np.abs(blurred[0] - blurred[1]).mean() < 3.0


def test_what_a_lens_does_not_see_is_black() -> None:
    city = build_city(5, "source", size_m=150.0)
    camera = CameraModel(200, 200, (50, 0, 99.5, 0, 50, 99.5, 0, 0, 1), (-0.06, 0, 0, 0), "equidistant")
    image = render_camera(city, CameraPose(5.0, 5.0, 0.0), MountedCamera(camera))
    _, seen = camera.rays()
    assert not seen.all() and not image[~seen].any() and image[seen].any(-1).mean() > 0.99
