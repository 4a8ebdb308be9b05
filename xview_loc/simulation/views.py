"""Street views of a simulated city: panoramas and pinhole images, as a vehicle's camera takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.city import City
from xview_loc.simulation.objects import Cars, Image
from xview_loc.simulation.solids import RayGrid
from xview_loc.simulation.styles import Style, colour_matrix
from xview_loc.simulation.tracing import trace


@dataclass(frozen=True)
class CameraPose:
    """Pose of the camera: metres in the city's plane and over the ground; ENU yaw and tilt in radians.

    ``pitch`` is positive with the nose down and ``roll`` with the right side down, as in REP-103.
    """

    east: float
    north: float
    heading: float
    height: float = 1.7
    pitch: float = 0.0
    roll: float = 0.0


@dataclass(frozen=True)
class PanoramaView:
    """An equirectangular image of all directions, from ``top_deg`` down to ``bottom_deg`` elevation.

    The border between the two middle columns looks along the heading; columns to the right look clockwise.
    The default, 128 x 512 from +30 to -60 degrees, has square pixels of 0.70 degrees.
    """

    height: int = 128
    width: int = 512
    top_deg: float = 30.0
    bottom_deg: float = -60.0


@dataclass(frozen=True)
class PinholeView:
    """An ideal pinhole image along the heading; ``fov_deg`` is the horizontal field of view."""

    height: int = 256
    width: int = 1024
    fov_deg: float = 80.0

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Camera matrix K (3, 3), in pixel-centre coordinates."""
        focal = self.width / 2 / math.tan(math.radians(self.fov_deg) / 2)
        return np.array([[focal, 0, (self.width - 1) / 2], [0, focal, (self.height - 1) / 2], [0, 0, 1]])


def _expose(image: Image, style: Style, rng: np.random.Generator | None) -> Image:
    """Return the image with the blur, gain, saturation, noise and raindrops of the camera."""
    if style.camera_blur > 0.15:
        image = cv2.GaussianBlur(image, (0, 0), style.camera_blur)
    gain = style.camera_gain
    if rng is not None:
        exposure = float(np.exp(0.07 * rng.normal()))
        gain = (gain[0] * exposure, gain[1] * exposure, gain[2] * exposure)
    image = cv2.transform(image, colour_matrix(gain, style.camera_saturation))
    if rng is None:
        return image
    if style.rain > 0.02:
        drops = np.zeros(image.shape[:2], np.uint8)
        for _ in range(rng.poisson(14 * style.rain)):
            centre = (int(rng.integers(image.shape[1])), int(rng.integers(image.shape[0])))
            cv2.circle(drops, centre, int(rng.integers(2, 6) * image.shape[0] / 128), 255, -1)
        soft = cv2.blur(drops, (3, 3))[..., None].astype(np.float32) / 255
        blurred = cv2.GaussianBlur(image, (0, 0), 3.0)
        image = (image + soft * (blurred.astype(np.float32) * 1.06 - image)).clip(0, 255).astype(np.uint8)
    if style.camera_noise > 0.05:
        noise = rng.standard_normal(image.shape, np.float32)
        noise *= style.camera_noise
        image = cv2.add(image, np.round(noise).astype(np.int16), dtype=cv2.CV_8U)
    return np.asarray(image)


def render_panorama(
    city: City,
    pose: CameraPose,
    view: PanoramaView | None = None,
    *,
    traffic: Cars | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """Render an RGB panorama (height, width, 3) from ``pose``.

    ``traffic`` are moving cars; ``rng`` draws the camera's noise (None: no noise). A tilt moves each column
    up or down but does not turn upright edges, which below 0.03 rad is under a pixel.
    """
    view = view or PanoramaView()
    turn = (np.arange(view.width) + 0.5) * (2 * math.pi / view.width) - math.pi  # clockwise from the heading
    step = math.radians(view.top_deg - view.bottom_deg) / view.height
    # With the nose down, each row sees lower ahead.
    offset = -pose.pitch * np.cos(turn) - pose.roll * np.sin(turn)
    yaw, top = (pose.heading - turn).astype(np.float32), math.radians(view.top_deg)
    origin = (pose.east, pose.north, pose.height)
    rays = RayGrid(*origin, yaw, top, step, view.height, offset.astype(np.float32), full=True)
    return _expose(trace(city, rays, traffic), city.style, rng)


def render_pinhole(
    city: City,
    pose: CameraPose,
    view: PinholeView | None = None,
    *,
    traffic: Cars | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """Render an RGB pinhole image (height, width, 3) along the heading, with the pitch and roll of the pose.

    A sector of a panorama is traced at the resolution of the image, then resampled. ``traffic`` and ``rng``
    as in :func:`render_panorama`.
    """
    view = view or PinholeView()
    k = view.matrix
    x, y = np.meshgrid(np.arange(view.width), np.arange(view.height))
    right, down = (x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1]
    # Camera -> vehicle axes (forward, left, up), then roll about forward and pitch about left.
    forward, left, up = np.ones_like(right), -right, -down
    cos, sin = math.cos(pose.roll), math.sin(pose.roll)
    left, up = cos * left - sin * up, sin * left + cos * up
    cos, sin = math.cos(pose.pitch), math.sin(pose.pitch)
    forward, up = cos * forward + sin * up, -sin * forward + cos * up
    turn, elevation = np.arctan2(-left, forward), np.arctan2(up, np.hypot(forward, left))
    step = 1.0 / k[0, 0]
    first, top = float(turn.min()) - step, float(elevation.max()) + step
    columns = math.ceil((float(turn.max()) - first) / step) + 2
    rows = math.ceil((top - float(elevation.min())) / step) + 2
    yaw = pose.heading - (first + (np.arange(columns) + 0.5) * step)
    offset = np.zeros(columns, np.float32)
    origin = (pose.east, pose.north, pose.height)
    sector = trace(city, RayGrid(*origin, yaw.astype(np.float32), top, step, rows, offset, False), traffic)
    map_x, map_y = (turn - first) / step - 0.5, (top - elevation) / step - 0.5
    image = cv2.remap(sector, map_x.astype(np.float32), map_y.astype(np.float32), cv2.INTER_LINEAR)
    return _expose(image, city.style, rng)


def overhead_view(
    panorama: Image, pose: CameraPose, size_px: int, gsd: float, view: PanoramaView | None = None
) -> tuple[Image, NDArray[np.bool_]]:
    """Project a panorama to the ground: return a north-up image and the mask of its visible pixels.

    Everything is assumed to lie on flat ground, so upright objects are smeared outwards.
    """
    view = view or PanoramaView()
    offset = (np.arange(size_px) - (size_px - 1) / 2) * gsd
    east, north = np.meshgrid(offset, -offset)
    turn = (pose.heading - np.arctan2(north, east) + math.pi) % (2 * math.pi)
    tilt = -pose.pitch * np.cos(turn - math.pi) - pose.roll * np.sin(turn - math.pi)
    elevation = -np.arctan2(pose.height, np.hypot(east, north)) - tilt
    step = math.radians(view.top_deg - view.bottom_deg) / view.height
    map_x = turn * (view.width / (2 * math.pi)) - 0.5
    map_y = (math.radians(view.top_deg) - elevation) / step - 0.5
    pixels = (map_x.astype(np.float32), map_y.astype(np.float32))
    image = cv2.remap(panorama, *pixels, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return image, map_y < view.height - 0.5
