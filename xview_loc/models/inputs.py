"""Camera images: decoding, lens distortion, and the ground input that a cross-view model expects.

Images are RGB, uint8 (height, width, 3). Pixel (row, col) names the pixel's centre.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.camera import CameraModel
from xview_loc.images import Image, ImageError
from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD, ModelSpec


def prepare_ground(
    image: Image,
    spec: ModelSpec,
    *,
    heading: float | None,
    camera: CameraModel | None,
    mount_yaw: float = 0.0,
) -> Tensor:
    """The model's ground input, float32 (1, 3, h, w): the normalised :func:`ground_image`, whose errors it
    raises."""
    return normalise(ground_image(image, spec, heading=heading, camera=camera, mount_yaw=mount_yaw))


def ground_image(
    image: Image,
    spec: ModelSpec,
    *,
    heading: float | None,
    camera: CameraModel | None,
    mount_yaw: float = 0.0,
) -> Image:
    """What a model is to see of an RGB image, in its size (h, w, 3).

    Panorama models take an equirectangular image over 360 degrees whose columns run clockwise and whose
    centre column looks ``mount_yaw`` radians to the left of the vehicle's x axis. With the vehicle's
    ``heading`` (true-north ENU yaw, radians) it is turned so that its centre column faces north, to within
    half a pixel of the model's input; with None it stays as it is. It is resized in one go, whatever its
    aspect, as VIGOR's 2:1 panoramas were.

    Pinhole models take an image of ``camera`` (None: one without distortion), undistorted and resized.
    Raises ImageError.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ImageError(f"an RGB image of uint8 is needed, not {image.dtype} of shape {image.shape}")
    if spec.camera == "pinhole":
        return _resize(camera.undistort(image) if camera else image, spec.ground_size)
    shift = 0.0 if heading is None else (math.pi / 2.0 - heading - mount_yaw) / (2.0 * math.pi)
    # Turned at the larger of the two widths, where rounding to whole pixels costs less.
    if image.shape[1] > spec.ground_size[1]:
        return _resize(_roll(_average_rows(image, spec.ground_size[0]), shift), spec.ground_size)
    return _roll(_resize(image, spec.ground_size), shift)


def normalise(image: Image) -> Tensor:
    """Model input, float32 (1, 3, H, W) with ImageNet's mean and deviation taken out, of an RGB image.

    In memory the channels are last.
    """
    height, width, _ = image.shape
    # By whole rows: many times faster than three values at a time.
    values = image.reshape(height, -1).astype(np.float32)
    values *= np.tile((1.0 / (255.0 * IMAGENET_STD)).numpy(), width)
    values += np.tile((-IMAGENET_MEAN / IMAGENET_STD).numpy(), width)
    return torch.from_numpy(values.reshape(image.shape)).permute(2, 0, 1)[None]


def _roll(image: NDArray[Any], turns: float) -> NDArray[Any]:
    """Columns moved to the right by a fraction of the width, around the back."""
    columns = round(turns * image.shape[1]) % image.shape[1]
    return np.roll(image, columns, axis=1) if columns else image


def _average_rows(image: Image, height: int) -> NDArray[Any]:
    """Float32 (height, W, 3), averages of as many rows each; the image itself where that does not work out.

    Up to five times faster than OpenCV's averaging over areas, which then has few rows left, and the same.
    """
    count = image.shape[0] // height
    # More rows would overflow their sum.
    if image.shape[0] % height or not 1 < count <= 257:
        return image
    sums = np.add.reduce(image.reshape(height, count, -1), axis=1, dtype=np.uint16)
    return np.asarray(sums.reshape(height, -1, 3) / np.float32(count), np.float32)


def _resize(image: NDArray[Any], size: tuple[int, int]) -> Image:
    height, width = size
    if image.shape[:2] != size:
        shrinks = image.shape[0] >= height and image.shape[1] >= width
        if shrinks and image.dtype == np.uint8:
            image = _average_rows(image, height)
        # Averaging areas avoids aliasing, but is nearest-neighbour when enlarging.
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(image, (width, height), interpolation=how))
    return image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)
