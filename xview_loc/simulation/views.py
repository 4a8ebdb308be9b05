"""Street views of a simulated city, as a vehicle's cameras take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.camera import CameraModel, Lens, PanoramaCamera
from xview_loc.rig import MountedCamera, tilt_matrix
from xview_loc.simulation.city import City
from xview_loc.simulation.objects import Cars, Image
from xview_loc.simulation.solids import RayGrid
from xview_loc.simulation.styles import Style, colour_matrix
from xview_loc.simulation.tracing import trace

# Larger tilts of panoramas, radians, are rendered exactly. Drives draw tilts of 0.01 (standard deviation),
# and their images stay as they are, since models were trained on them.
_SMALL_TILT = 0.06
# Greatest angle between rays that are resampled, radians: coarser images would become blurred.
_COARSEST = 2 * math.pi / 1024


@dataclass(frozen=True)
class CameraPose:
    """Pose of a camera, or of ``base_link``: metres in the city's plane and over the ground; radians.

    ``heading`` is the ENU yaw.

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

    @property
    def camera(self) -> PanoramaCamera:
        """Camera that takes such images."""
        edges = math.radians(self.top_deg), math.radians(self.bottom_deg)
        return PanoramaCamera(self.width, self.height, *edges)


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

    @property
    def camera(self) -> CameraModel:
        """Camera that takes such images."""
        return CameraModel(self.width, self.height, tuple(self.matrix.flat))


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

    ``traffic`` are moving cars; ``rng`` draws the camera's noise (None: no noise). A tilt below 0.06 rad only
    moves each column up or down, which is off by about tilt x tan(elevation); a larger one is exact.
    """
    view = view or PanoramaView()
    if max(abs(pose.roll), abs(pose.pitch)) > _SMALL_TILT:
        return render_camera(city, pose, MountedCamera(view.camera), traffic=traffic, rng=rng)
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

    ``traffic`` and ``rng`` as in :func:`render_panorama`.
    """
    camera = (view or PinholeView()).camera
    return render_camera(city, pose, MountedCamera(camera), traffic=traffic, rng=rng)


def render_camera(
    city: City,
    pose: CameraPose,
    mounted: MountedCamera,
    *,
    traffic: Cars | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """Render the RGB image (height, width, 3) of a camera on a vehicle whose ``base_link`` is at ``pose``.

    Exact under any tilt: a level grid of rays around those of the camera is traced at its resolution, then
    resampled. Pixels beyond the lens's view are black. ``traffic`` and ``rng`` as in :func:`render_panorama`.
    """
    level = tilt_matrix(pose.roll, pose.pitch)
    forward, left, up = (level @ mounted.position).tolist()
    cos, sin = math.cos(pose.heading), math.sin(pose.heading)
    east, north = pose.east + cos * forward - sin * left, pose.north + sin * forward + cos * left
    rays, seen = _rays(mounted.camera)
    rays = rays @ (level @ mounted.axes).T.astype(np.float32)
    turn = np.arctan2(-rays[..., 1], rays[..., 0])  # clockwise from the heading
    elevation = np.arctan2(rays[..., 2], np.hypot(rays[..., 0], rays[..., 1]))

    step = min(1.0 / mounted.camera.pixels_per_radian, _COARSEST)
    start, width = _arc(turn[seen])
    columns, full = math.ceil(width / step) + 2, False
    if columns * step >= 2 * math.pi:
        columns, full = math.ceil(2 * math.pi / step), True
    column_step = 2 * math.pi / columns if full else step
    first = start - column_step
    top = min(float(elevation[seen].max()) + step, math.pi / 2)
    rows = min(math.ceil((top - float(elevation[seen].min())) / step) + 1, int((top + math.pi / 2) / step))
    yaw = (pose.heading - (first + (np.arange(columns) + 0.5) * column_step)).astype(np.float32)
    origin, offset = (east, north, pose.height + up), np.zeros(columns, np.float32)
    vehicle = (pose.east, pose.north)
    traced = trace(city, RayGrid(*origin, yaw, top, step, rows, offset, full, vehicle), traffic)
    x = (turn - first) % (2 * math.pi) / column_step - 0.5
    y = np.clip((top - elevation) / step - 0.5, 0, rows - 1)
    border = cv2.BORDER_WRAP if full else cv2.BORDER_REPLICATE
    image = cv2.remap(traced, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=border)
    image = _expose(image, city.style, rng)
    image[~seen] = 0
    return image


@lru_cache(maxsize=16)
def _rays(camera: Lens) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return camera.rays()


def _arc(turn: NDArray[np.floating]) -> tuple[float, float]:
    """Return start and width of the shortest arc, to a degree, that holds all of ``turn``, radians."""
    degrees = np.unique(np.floor(np.degrees(turn)).astype(int) % 360)
    gaps = np.diff(degrees, append=degrees[0] + 360)
    widest = int(gaps.argmax())
    return math.radians(degrees[(widest + 1) % len(degrees)]), math.radians(361 - gaps[widest])


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
