"""Level panoramas, and views of a pinhole lens, from the images of one or several calibrated cameras."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.camera import CameraError, CameraModel, Lens, PanoramaCamera
from xview_loc.images import Image, ImageError

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Quaternion = tuple[float, float, float, float]

# What no camera sees is the mean colour of ImageNet, which normalisation turns into zeros.
UNSEEN = (124, 116, 104)
# A view of which the cameras show a smaller share shows nothing.
LEAST_SEEN = 0.005
# Share of a panorama that counts as all of it: the vehicle itself hides a little.
WHOLE = 0.9
NOTHING_SEEN = f"the cameras show less than {100 * LEAST_SEEN:g} % of what the model looks at"
# Rotates a camera that looks along x with z up (REP-103's optical frame in the body's), as (x, y, z, w).
FORWARD: Quaternion = (-0.5, 0.5, -0.5, 0.5)
# Walls, trees and the sky are taken to be this far from the rig's centre, the ground at most, metres. Both
# figures are the best in simulated cities (docs/cameras.md).
_RANGE_M = 25.0
# Cameras are at least so high above the ground, metres.
LEAST_HEIGHT_M = 0.1
# Neighbouring images are blended where their distances from the border differ by less, in shorter sides.
_SEAM = 0.3
# Tilts are rounded to this, so that look-up tables serve again, radians.
_TILT_STEP = math.radians(0.1)
_TABLES = 16
# OpenCV's remap takes images of at most this width and height.
_LONGEST_SIDE = 32_000


@dataclass(frozen=True)
class MountedCamera:
    """A camera and its place on the vehicle: that of its optical frame (z forward, x right) in ``base_link``.

    ``position`` in metres, ``rotation`` a quaternion (x, y, z, w).
    """

    camera: Lens
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: Quaternion = FORWARD

    @property
    def axes(self) -> NDArray[np.float64]:
        """Rotation matrix (3, 3) from the optical frame to ``base_link``."""
        return rotation_matrix(self.rotation)


@dataclass(frozen=True)
class _Table:
    """Where pixels of a view lie in a camera's (reduced) image.

    ``box`` are the view's rows and columns that may show it, ``x`` and ``y`` pixels of the image,
    ``depth`` their distance from the image's border, in shorter sides, negative where it is not seen.
    """

    box: tuple[slice, slice]
    size: tuple[int, int]
    x: Floats
    y: Floats
    depth: Floats


class Rig:
    """Cameras that together make one level view, seen from the middle of their positions.

    Below the horizon pixels are taken to be on level ground, ``height`` metres below ``base_link``, at most
    25 m away; all others 25 m away. ``own`` are images that hide the vehicle's own parts, by camera: True
    where the camera sees them, in the size of its images. Raises CameraError if a mask has another size.
    """

    def __init__(
        self,
        cameras: Mapping[str, MountedCamera],
        height: float = 0.0,
        own: Mapping[str, Mask] | None = None,
    ) -> None:
        self.cameras = dict(cameras)
        self.centre = np.mean([camera.position for camera in self.cameras.values()], axis=0)
        self.height = height
        self.own = dict(own or {})
        for name, mask in self.own.items():
            camera = self.cameras[name].camera
            if mask.shape != (camera.height, camera.width):
                sizes = f"{mask.shape[1]} x {mask.shape[0]}", f"{camera.width} x {camera.height}"
                who = f"camera {name}" if name else "the camera"
                raise CameraError(f"{who} has a mask of {sizes[0]} pixels, but images of {sizes[1]}")
        self._table = lru_cache(maxsize=_TABLES * len(self.cameras))(self._make_table)
        self._points = lru_cache(maxsize=1)(self._make_points)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also in other processes, make their own look-up tables."""
        return Rig, (self.cameras, self.height, self.own)

    def direction(self, lens: Lens) -> float:
        """Return where a view looks, radians to the left of the vehicle's x axis.

        A pinhole lens looks where the camera looks if there is only one, a pinhole or fisheye camera.
        All other views look along the x axis.
        """
        first = next(iter(self.cameras.values()))
        if (
            len(self.cameras) > 1
            or not isinstance(lens, CameraModel)
            or not isinstance(first.camera, CameraModel)
        ):
            return 0.0
        x, y, _ = first.axes[:, 2].tolist()
        return math.atan2(y, x)

    def view(
        self,
        images: Mapping[str, Image],
        lens: Lens,
        *,
        roll: float = 0.0,
        pitch: float = 0.0,
    ) -> tuple[Image, Mask]:
        """Return what a level camera with this lens sees, RGB, and the mask of the pixels that a camera sees.

        It stands in the middle of the cameras and looks in the lens's :meth:`direction`. ``roll`` and
        ``pitch`` are the vehicle's, radians as in REP-103: positive with the right side and the nose down.
        What no image of ``images`` shows has the mean colour. Raises ImageError if an image does not have its
        calibration's size.
        """
        tilt = round(roll / _TILT_STEP), round(pitch / _TILT_STEP)
        size = lens.height, lens.width
        tables = {name: self._table(name, lens, tilt) for name in images}
        nearest = np.zeros(size, np.float32)
        for table in tables.values():
            np.maximum(nearest[table.box], table.depth, out=nearest[table.box])
        total = np.zeros(size, np.float32)
        colour = np.zeros((*size, 3), np.float32)
        for name, table in tables.items():
            camera, image = self.cameras[name].camera, images[name]
            check_size(name, image, camera)
            if not table.x.size:
                continue
            if image.shape[:2] != table.size:
                reduced = cv2.resize(image, table.size[::-1], interpolation=cv2.INTER_AREA)
                image = np.asarray(reduced, np.uint8)
            border = cv2.BORDER_WRAP if isinstance(camera, PanoramaCamera) else cv2.BORDER_REPLICATE
            pixels = cv2.remap(image, table.x, table.y, cv2.INTER_LINEAR, borderMode=border)
            weight = np.clip(1.0 + (table.depth - nearest[table.box]) / _SEAM, 0.0, 1.0)
            weight *= table.depth > 0.0
            total[table.box] += weight
            colour[table.box] += weight[..., None] * pixels
        mask = total > 0.0
        result = np.full((*size, 3), UNSEEN, np.uint8)
        result[mask] = np.rint(colour[mask] / total[mask][:, None])
        return result, mask

    def _make_points(self, lens: Lens, tilt: tuple[int, int]) -> Floats:
        """Return the points (height, width, 3), in ``base_link``, that a view's pixels are taken to show."""
        level = tilt_matrix(tilt[0] * _TILT_STEP, tilt[1] * _TILT_STEP)
        rays = directions(lens) @ _turn(self.direction(lens)).T
        across = np.hypot(rays[..., 0], rays[..., 1])
        distance = _RANGE_M / np.maximum(across, 1e-6)
        above = float((level @ self.centre)[2]) + self.height
        down = rays[..., 2] < -1e-6
        distance[down] = np.minimum(distance[down], max(above, LEAST_HEIGHT_M) / -rays[..., 2][down])
        # From level axes about the centre to those of base_link.
        return np.asarray(rays * distance[..., None] @ level + self.centre, np.float32)

    def _make_table(self, name: str, lens: Lens, tilt: tuple[int, int]) -> _Table:
        mounted = self.cameras[name]
        camera = mounted.camera
        points = self._points(lens, tilt) - np.asarray(mounted.position, np.float32)
        ahead = points @ mounted.axes[:, 2].astype(np.float32)
        near = ahead >= math.cos(camera.half_angle) * np.sqrt(np.einsum("...i,...i", points, points))
        box = _box(near)
        pixels, seen = camera.project(points[box] @ mounted.axes)
        if name in self.own:
            inside = np.clip(np.rint(pixels), 0, (camera.width - 1, camera.height - 1)).astype(int)
            seen &= ~self.own[name][inside[..., 1], inside[..., 0]]
        x, y = pixels[..., 0], pixels[..., 1]
        edge = np.minimum(y + 0.5, camera.height - 0.5 - y)
        if isinstance(camera, CameraModel):
            edge = np.minimum(edge, np.minimum(x + 0.5, camera.width - 0.5 - x))
        depth = np.where(seen, edge / min(camera.width, camera.height) + 1e-6, -1.0)
        # Coarser images are reduced first: sampled pixel by pixel, fine ones would alias.
        factor = max(1, math.floor(camera.pixels_per_radian / lens.pixels_per_radian))
        sides = round(camera.height / factor), round(camera.width / factor)
        reduced = np.clip(sides, 1, _LONGEST_SIDE).tolist()
        x = (x + 0.5) * (reduced[1] / camera.width) - 0.5
        y = np.clip((y + 0.5) * (reduced[0] / camera.height) - 0.5, 0, reduced[0] - 1)
        x, y, depth = (np.ascontiguousarray(v, np.float32) for v in (x, y, depth))
        return _Table(box, (reduced[0], reduced[1]), x, y, depth)


def _box(mask: Mask) -> tuple[slice, slice]:
    """Return the rows and columns in which a mask is set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@lru_cache(maxsize=8)
def directions(lens: Lens) -> NDArray[np.float64]:
    """Return the unit rays (height, width, 3) of a level lens that looks forward: x forward, z up."""
    rays = np.asarray(lens.rays()[0] @ rotation_matrix(FORWARD).T)
    rays.flags.writeable = False
    return rays


def look_aside(image: Image, camera: CameraModel, angle: float) -> Image:
    """Return what a level camera without distortion would see if it looked ``angle`` radians further left.

    What the image does not show has the mean colour.
    """
    c, s = math.cos(angle), math.sin(angle)
    to_image = camera.matrix @ [[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]] @ np.linalg.inv(camera.matrix)
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = camera.width, camera.height
    return np.asarray(cv2.warpPerspective(image, to_image, size, flags=how, borderValue=UNSEEN), np.uint8)


def facing(yaw: float) -> Quaternion:
    """Return the rotation of a level camera that looks ``yaw`` radians left of the vehicle's x axis."""
    c, s = math.cos(yaw / 2.0), math.sin(yaw / 2.0)
    return (-(c + s) / 2.0, (c - s) / 2.0, (s - c) / 2.0, (c + s) / 2.0)


def _turn(yaw: float) -> NDArray[np.float64]:
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def tilt_matrix(roll: float, pitch: float) -> NDArray[np.float64]:
    """Return the rotation (3, 3) from a tilted vehicle to level axes of the same heading."""
    (cr, sr), (cp, sp) = ((math.cos(a), math.sin(a)) for a in (roll, pitch))
    about_y = np.array([[cp, 0.0, sp], [0.0, 1.0, 0.0], [-sp, 0.0, cp]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, cr, -sr], [0.0, sr, cr]])
    return about_y @ about_x


def rotation_matrix(quaternion: Quaternion | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix (3, 3) of a quaternion (x, y, z, w), which is normalised first."""
    x, y, z, w = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def check_size(name: str, image: Image, camera: Lens) -> None:
    """Raise ImageError if an image of the camera ``name`` does not have its calibration's size."""
    height, width = image.shape[:2]
    if (width, height) != (camera.width, camera.height):
        of = f" of camera {name}" if name else ""
        raise ImageError(
            f"the image{of} has {width} x {height} pixels, but its calibration is for "
            f"{camera.width} x {camera.height}"
        )
