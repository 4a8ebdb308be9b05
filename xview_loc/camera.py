"""Camera calibration: intrinsics and lens distortion."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.images import MAX_PIXELS, Image


class CameraError(ValueError):
    """The camera's calibration cannot be used; the message is one clear line."""


# Valid numbers of distortion coefficients per model, in OpenCV's order.
_COEFFICIENTS = {"plumb_bob": (0, 4, 5), "rational_polynomial": (0, 8, 12, 14), "equidistant": (0, 4)}
_LARGEST_COEFFICIENT = 1e6
# Shortest and longest focal length, and farthest principal point, in sides of the image. A region of interest
# is a small part of its sensor.
_SHORTEST, _LONGEST = 0.02, 1000.0


@dataclass(frozen=True)
class CameraModel:
    """A calibrated pinhole or fisheye camera, as in ``sensor_msgs/CameraInfo``.

    ``k`` holds the nine intrinsics, row by row (any 3x3 or flat sequence), ``distortion`` the coefficients of
    ``distortion_model`` (``plumb_bob``, ``rational_polynomial`` or ``equidistant``, a fisheye's) in OpenCV's
    order; it may be empty. Hashable, so that look-up tables can be kept. Raises CameraError if the
    calibration cannot be used.
    """

    width: int
    height: int
    k: tuple[float, ...]
    distortion: tuple[float, ...] = ()
    distortion_model: str = "plumb_bob"

    def __post_init__(self) -> None:
        k = tuple(float(value) for value in np.asarray(self.k, float).ravel())
        distortion = tuple(float(value) for value in self.distortion)
        # Drivers of rectified cameras leave the model's name empty.
        model = self.distortion_model or "plumb_bob"
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "distortion", distortion)
        object.__setattr__(self, "distortion_model", model)
        if self.width < 1 or self.height < 1:
            raise CameraError(f"the camera's size is {self.width} x {self.height} pixels")
        if self.width * self.height > MAX_PIXELS:
            size = f"{self.width} x {self.height}"
            raise CameraError(f"the camera's size is {size} pixels, at most {MAX_PIXELS / 1e6:.0f} million")
        if len(k) != 9 or not all(map(math.isfinite, k)):
            raise CameraError("the camera's intrinsics are not a finite 3x3 matrix")
        if not (k[0] > 0.0 and k[4] > 0.0):
            raise CameraError(f"the camera is not calibrated (focal lengths {k[0]:g}, {k[4]:g})")
        side = max(self.width, self.height)
        near = all(_SHORTEST * side <= k[i] <= _LONGEST * side for i in (0, 4))
        inside = max(abs(k[2]), abs(k[5])) <= _LONGEST * side and abs(k[1]) <= k[0]
        if not (near and inside and np.allclose([k[3], *k[6:]], [0.0, 0.0, 0.0, 1.0])):
            size = f"{self.width} x {self.height}"
            raise CameraError(f"no camera of {size} pixels has the intrinsics {[float(f'{v:g}') for v in k]}")
        if model not in _COEFFICIENTS:
            raise CameraError(
                f"distortion model {model!r} is not supported; use one of {', '.join(_COEFFICIENTS)}"
            )
        if len(distortion) not in _COEFFICIENTS[model]:
            raise CameraError(f"{model} does not take {len(distortion)} distortion coefficients")
        if not all(abs(value) <= _LARGEST_COEFFICIENT for value in distortion):  # NaN as well
            raise CameraError(f"these are no distortion coefficients: {distortion}")

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Intrinsic matrix, 3x3."""
        return np.array(self.k).reshape(3, 3)

    @property
    def distorts(self) -> bool:
        """True if images differ from a pinhole camera's; always for a fisheye camera."""
        return self.distortion_model == "equidistant" or any(self.distortion)

    @property
    def pixels_per_radian(self) -> float:
        """Resolution in the middle of the image: the shorter focal length."""
        return min(self.k[0], self.k[4])

    @property
    def half_angle(self) -> float:
        """Angle from the axis, radians, beyond which the camera sees nothing."""
        return _half_angle(self)

    def project(self, points: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the pixels (..., 2), (x, y), of points (..., 3) in the optical frame, and which it sees.

        The frame's z looks forward, x right and y down; only directions count. Pixels count pixel centres.
        """
        flat = np.asarray(points, np.float64).reshape(-1, 3)
        across, forward = np.hypot(flat[:, 0], flat[:, 1]), flat[:, 2]
        angle = np.arctan2(across, forward)
        seen = angle <= _widest(self)
        pixels = np.full((len(flat), 2), -1.0)
        if self.distortion_model == "equidistant" or not self.distorts:
            scale = _radius(self, angle[seen]) / np.maximum(across[seen], 1e-12)
            x, y = (flat[seen, :2] * scale[:, None]).T
            k = self.k
            pixels[seen] = np.stack([k[0] * x + k[1] * y + k[2], k[4] * y + k[5]], 1)
        elif seen.any():
            zero = np.zeros(3)
            projected, _ = cv2.projectPoints(flat[seen], zero, zero, self.matrix, np.array(self.distortion))
            pixels[seen] = projected[:, 0]
            # OpenCV takes no skew.
            pixels[seen, 0] += self.k[1] / self.k[4] * (pixels[seen, 1] - self.k[5])
        low, high = (-0.5, -0.5), (self.width - 0.5, self.height - 0.5)
        seen &= ((pixels >= low) & (pixels < high)).all(1)
        shape = points.shape[:-1]
        return pixels.reshape(*shape, 2).astype(np.float32), seen.reshape(shape)

    def rays(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the unit rays (height, width, 3) of all pixels in the optical frame, and which see anything.

        The inverse of :meth:`project`. Corners beyond the lens's view see nothing; their rays mean nothing.
        """
        pixels = np.stack(np.meshgrid(np.arange(self.width), np.arange(self.height)), -1)
        focal = self.k[0], self.k[4]
        angles = np.linspace(0.0, _widest(self), 4000)
        radii = _radius(self, angles)
        # Without the terms that are not radial, this would be exact at once.
        plane = (pixels - (self.k[2], self.k[5])) / focal
        for _ in range(10):
            radius = np.hypot(plane[..., 0], plane[..., 1])
            angle = np.interp(radius, radii, angles)
            across = plane * (np.sin(angle) / np.maximum(radius, 1e-12))[..., None]
            rays = np.dstack([across, np.cos(angle)])
            found, seen = self.project(rays)
            error = np.where((seen & (radius < radii[-1]))[..., None], pixels - found, 0.0)
            if np.abs(error).max() < 1e-3:
                break
            plane += error / focal
        # Where no ray leads to the pixel, what was found lies elsewhere.
        seen &= np.abs(pixels - found).max(-1) < 0.1
        return rays.astype(np.float32), seen

    def scaled_matrix(self, width: int, height: int) -> NDArray[np.float64]:
        """Return the intrinsics (3x3) of images resized to ``width`` x ``height``."""
        across, down = width / self.width, height / self.height
        # Resizing keeps the image's edges, which are half a pixel outside the outermost pixel centres.
        scale = np.array(
            [[across, 0.0, (across - 1.0) / 2.0], [0.0, down, (down - 1.0) / 2.0], [0.0, 0.0, 1.0]]
        )
        return scale @ self.matrix


@dataclass(frozen=True)
class PanoramaCamera:
    """An equirectangular camera: all directions, from ``top`` down to ``bottom`` elevation, radians.

    The optical frame's z looks through the middle of the image; columns to the right look clockwise.
    """

    width: int
    height: int
    top: float = math.pi / 2
    bottom: float = -math.pi / 2

    @property
    def pixels_per_radian(self) -> float:
        """The coarser resolution of rows and columns."""
        return min(self.width / (2 * math.pi), self.height / (self.top - self.bottom))

    @property
    def half_angle(self) -> float:
        """See :attr:`CameraModel.half_angle`."""
        return math.pi

    def project(self, points: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """See :meth:`CameraModel.project`."""
        right, down, forward = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        turn = np.arctan2(right, forward)
        elevation = np.arctan2(-down, np.hypot(right, forward))
        x = (turn / (2 * math.pi) + 0.5) * self.width - 0.5
        y = (self.top - elevation) / (self.top - self.bottom) * self.height - 0.5
        return np.stack([x, y], -1).astype(np.float32), (y >= -0.5) & (y <= self.height - 0.5)

    def rays(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """See :meth:`CameraModel.rays`."""
        turn = ((np.arange(self.width) + 0.5) / self.width - 0.5) * 2 * math.pi
        down = (np.arange(self.height) + 0.5) / self.height * (self.top - self.bottom) - self.top
        down, across = down[:, None], np.cos(down)[:, None]
        rays = np.stack([across * np.sin(turn), np.sin(down) + 0 * turn, across * np.cos(turn)], -1)
        return rays.astype(np.float32), np.ones((self.height, self.width), bool)


Lens = CameraModel | PanoramaCamera


def reduce_width(image: Image, camera: CameraModel | None, width: int) -> tuple[Image, CameraModel | None]:
    """Return an image and its calibration, reduced to ``width`` pixels if wider; width 0: as they are."""
    if not 0 < width < image.shape[1]:
        return image, camera
    share = width / image.shape[1]
    height = max(1, round(image.shape[0] * share))
    reduced = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    if camera is None:
        return reduced, None
    # By the image's shares: a calibration for another size stays wrong, and is found out.
    size = round(camera.width * share), max(1, round(camera.height * height / image.shape[0]))
    k = tuple(camera.scaled_matrix(*size).flat)
    return reduced, replace(camera, width=size[0], height=size[1], k=k)


def _radius(camera: CameraModel, angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the radius, in focal lengths, of rays ``angle`` radians from the axis; radial terms only."""
    if camera.distortion_model == "equidistant":
        r2 = angle * angle
        return angle * (1 + sum(k * r2 ** (n + 1) for n, k in enumerate(camera.distortion)))
    r2 = np.tan(angle) ** 2
    k1, k2, _, _, k3, k4, k5, k6 = (*camera.distortion, *[0.0] * 8)[:8]
    numerator = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return np.tan(angle) * numerator / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))


@lru_cache(maxsize=64)
def _half_angle(camera: CameraModel) -> float:
    angles = np.linspace(0.0, _widest(camera), 4000)
    x, y = (
        max(middle + 0.5, side - 0.5 - middle)
        for middle, side in ((camera.k[2], camera.width), (camera.k[5], camera.height))
    )
    # Terms that are not radial, and skew, move corners a little.
    corner = 1.1 * math.hypot(x / camera.k[0], y / camera.k[4])
    return float(np.interp(corner, _radius(camera, angles), angles))


@lru_cache(maxsize=64)
def _widest(camera: CameraModel) -> float:
    """Return the greatest angle from the axis, radians, up to which the radius grows.

    Beyond it the lens's polynomial bends back, and would show the surroundings twice.
    """
    fisheye = camera.distortion_model == "equidistant"
    angle = np.linspace(0.0, math.pi if fisheye else math.radians(88.0), 2000)
    radius = _radius(camera, angle)
    falls = np.flatnonzero(np.diff(radius) <= 0.0)
    return float(angle[falls[0]] if len(falls) else angle[-1])
