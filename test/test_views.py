"""Views of the simulated city are exact for every camera, wherever it is mounted and however it tilts."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

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
SQUARE = 2.0
FLAT = CameraPose(3.0, -7.0, 0.4, 0.0)


@pytest.fixture(scope="module")
def board() -> City:
    """A flat city paved with squares of 2 m, corners at even metres, and nothing else in it."""
    city = build_city(5, "source", size_m=150.0, gsd=0.125)
    side = city.height.shape[0]
    metres = (np.arange(side) + 0.5) * city.gsd - city.size_m / 2
    parity = np.floor(metres[None, :] / SQUARE) + np.floor(metres[::-1, None] / SQUARE)
    squares = np.repeat((60 + 140 * (parity % 2))[..., None], 3, -1).astype(np.uint8)
    trees = replace(city.trees, in_ground=np.zeros(len(city.trees.centre), bool))
    cars = replace(city.cars, centre=city.cars.centre + 1e4)
    return replace(
        city,
        style=replace(city.style, camera_blur=0.0, haze_m=1e6),
        ground=squares,
        ground_far=cv2.resize(squares, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA),
        marking=np.zeros_like(city.marking),
        light=np.full_like(city.light, 255),
        height=np.zeros_like(city.height),
        objects=np.zeros_like(city.objects),
        trees=trees,
        cars=cars,
        poles=np.zeros((0, 2)),
    )


def corners(pose: CameraPose, reach: float = 10.0) -> np.ndarray:
    """Corners of squares (n, 3) around ``pose`` in level axes about its place: forward, left, up."""
    east = np.arange(math.ceil((pose.east - reach) / SQUARE), (pose.east + reach) / SQUARE) * SQUARE
    north = np.arange(math.ceil((pose.north - reach) / SQUARE), (pose.north + reach) / SQUARE) * SQUARE
    x, y = (v.ravel() for v in np.meshgrid(east - pose.east, north - pose.north))
    cos, sin = math.cos(pose.heading), math.sin(pose.heading)
    points = np.stack([cos * x + sin * y, -sin * x + cos * y, 0 * x - pose.height], 1)
    return points[np.hypot(x, y) < reach]


def found(image: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Corners (n, 2) found near ``expected`` ones, from which the search starts 1.5 pixels away."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    start = (expected + np.array([1.5, 0.0])).astype(np.float32).reshape(-1, 1, 2)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-3)
    return cv2.cornerSubPix(grey, start, (6, 6), (-1, -1), criteria)[:, 0]


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
    upright, _ = rig.panorama({"all": image}, (128, 512), ELEVATION, roll=0.2, pitch=-0.15)
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
