"""Camera calibration: intrinsics and lens distortion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.images import MAX_PIXELS, Image, ImageError


class CameraError(ValueError):
    """The camera's calibration cannot be used; the message is one clear line."""


# Valid numbers of distortion coefficients per model, in OpenCV's order.
_COEFFICIENTS = {"plumb_bob": (0, 4, 5), "rational_polynomial": (0, 8, 12, 14), "equidistant": (0, 4)}
_LARGEST_COEFFICIENT = 1e6
# Shortest and longest focal length, and farthest principal point, in sides of the image. A region of interest
# is a small part of its sensor.
_SHORTEST, _LONGEST = 0.02, 1000.0
# An undistorted image shows at least this share of the pixels.
_LEAST_SEEN = 0.1


@dataclass(frozen=True)
class CameraModel:
    """A calibrated pinhole or fisheye camera, as in ``sensor_msgs/CameraInfo``.

    ``k`` holds the nine intrinsics, row by row (any 3x3 or flat sequence), ``distortion`` the coefficients of
    ``distortion_model`` (``plumb_bob``, ``rational_polynomial`` or ``equidistant``, a fisheye's) in OpenCV's
    order; it may be empty. Hashable, so that undistortion maps can be cached. Raises CameraError if the
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

    def undistort(self, image: Image) -> Image:
        """Return the image of a pinhole camera with the same intrinsics; pixels outside the view are black.

        Raises ImageError if the image's size is not the calibration's, CameraError if hardly a pixel is left.
        """
        height, width = image.shape[:2]
        if (width, height) != (self.width, self.height):
            raise ImageError(
                f"the image has {width} x {height} pixels, but its calibration is for "
                f"{self.width} x {self.height}"
            )
        if not self.distorts:
            return image
        maps, seen = _undistortion_maps(self)
        if seen < _LEAST_SEEN:
            raise CameraError(f"the camera's distortion leaves {seen:.0%} of the image: {self.distortion}")
        return cv2.remap(image, maps[0], maps[1], cv2.INTER_LINEAR).astype(np.uint8, copy=False)

    def scaled_matrix(self, width: int, height: int) -> NDArray[np.float64]:
        """Return the intrinsics (3x3) of undistorted images resized to ``width`` x ``height``."""
        across, down = width / self.width, height / self.height
        # Resizing keeps the image's edges, which are half a pixel outside the outermost pixel centres.
        scale = np.array(
            [[across, 0.0, (across - 1.0) / 2.0], [0.0, down, (down - 1.0) / 2.0], [0.0, 0.0, 1.0]]
        )
        return scale @ self.matrix


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


@lru_cache(maxsize=4)
def _undistortion_maps(camera: CameraModel) -> tuple[Sequence[NDArray[Any]], float]:
    """Return OpenCV's maps, and the share of the pixels that they find in the image."""
    size, matrix, coefficients = (camera.width, camera.height), camera.matrix, np.array(camera.distortion)
    coefficients = coefficients if camera.distortion else np.zeros(4)
    arguments = (matrix, coefficients, np.eye(3), matrix, size, cv2.CV_16SC2)
    if camera.distortion_model == "equidistant":
        maps = cv2.fisheye.initUndistortRectifyMap(*arguments)
    else:
        maps = cv2.initUndistortRectifyMap(*arguments)
    return maps, float(((maps[0] >= 0) & (maps[0] < size)).all(-1).mean())
