"""Inputs of cross-view models from RGB images, uint8 (height, width, 3)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.camera import CameraModel, PanoramaCamera
from xview_loc.images import Image, ImageError
from xview_loc.models.base import NORMALISATIONS
from xview_loc.models.specs import ModelSpec
from xview_loc.rig import LEAST_SEEN, NOTHING_SEEN, MountedCamera, Rig, tilt_matrix

# Panoramas that lean by less are level, radians.
_LEVEL = math.radians(0.05)


def prepare_ground(
    image: Image, spec: ModelSpec, *, heading: float | None, camera: CameraModel | None
) -> Tensor:
    """Return a model's ground input, float32 (1, 3, h, w): the normalised :func:`ground_image`."""
    return normalise(ground_image(image, spec, heading=heading, camera=camera), spec)


def ground_image(
    image: Image,
    spec: ModelSpec,
    *,
    heading: float | None,
    camera: CameraModel | None,
    mount_yaw: float = 0.0,
) -> Image:
    """Return a pinhole image as the model's lens takes it, or rotate and resize a panorama: (h, w, 3).

    Pinhole images are warped from ``camera`` to the model's lens, with the mean colour where nothing is seen;
    without a camera they are only resized. Panoramas are equirectangular over 360 degrees, with columns
    clockwise; they are resized to the model's aspect ratio, as VIGOR's 2:1 panoramas were, and rotated so
    that the centre column faces north, to half a pixel of the model's input. ``heading`` is the vehicle's
    true-north ENU yaw in radians (None leaves panoramas as recorded), ``mount_yaw`` the direction of a
    panorama's centre column, in radians to the left of the vehicle's x axis. Raises ImageError if the image
    is not RGB, not of the calibration's size, or shows nothing that the model looks at.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ImageError(f"the image must be RGB, uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if spec.camera == "pinhole":
        if camera is None or (camera == spec.lens and image.shape[:2] == spec.ground_size):
            return _resize(image, spec.ground_size)
        level, mask = _level_rig(camera).view({"": image}, spec.lens)
        if mask.mean() < LEAST_SEEN:
            raise ImageError(NOTHING_SEEN)
        return level
    shift = 0.0 if heading is None else (math.pi / 2.0 - heading - mount_yaw) / (2.0 * math.pi)
    # Rotated at the larger of the two widths, where rounding to whole pixels costs less.
    if image.shape[1] > spec.ground_size[1]:
        return _resize(_roll(_average_rows(image, spec.ground_size[0]), shift), spec.ground_size)
    return _roll(_resize(image, spec.ground_size), shift)


def is_upright(rig: Rig, spec: ModelSpec, *, roll: float = 0.0, pitch: float = 0.0) -> bool:
    """Return True if images are panoramas that a model takes as they are: nothing to level, cut or hide."""
    lens, mounted = spec.lens, next(iter(rig.cameras.values()))
    one = len(rig.cameras) == 1 and not rig.own
    if not (one and isinstance(lens, PanoramaCamera) and isinstance(mounted.camera, PanoramaCamera)):
        return False
    # The optical frame's y axis points down.
    down = (tilt_matrix(roll, pitch) @ mounted.axes)[2, 1]
    edges = (mounted.camera.top, mounted.camera.bottom) == (lens.top, lens.bottom)
    return edges and bool(down < -math.cos(_LEVEL))


@lru_cache(maxsize=4)
def _level_rig(camera: CameraModel) -> Rig:
    return Rig({"": MountedCamera(camera)})


def normalise(image: Image, spec: ModelSpec) -> Tensor:
    """Normalise an RGB image as a model expects it: float32 (1, 3, H, W), channels last in memory."""
    height, width, _ = image.shape
    mean, deviation = NORMALISATIONS[spec.normalisation]
    # Broadcasting whole rows is many times faster than broadcasting three values.
    values = image.reshape(height, -1).astype(np.float32)
    values *= np.tile((1.0 / (255.0 * deviation)).numpy(), width)
    values += np.tile((-mean / deviation).numpy(), width)
    return torch.from_numpy(values.reshape(image.shape)).permute(2, 0, 1)[None]


def denormalise(image: Tensor, spec: ModelSpec) -> NDArray[np.float32]:
    """Undo :func:`normalise` for an image (3, H, W): RGB in [0, 1], (H, W, 3)."""
    mean, deviation = NORMALISATIONS[spec.normalisation]
    plain = image * deviation[:, None, None] + mean[:, None, None]
    return np.asarray(plain.clamp(0, 1).permute(1, 2, 0).numpy(), np.float32)


def _roll(image: NDArray[Any], turns: float) -> NDArray[Any]:
    """Shift columns to the right by a fraction of the width, cyclically."""
    columns = round(turns * image.shape[1]) % image.shape[1]
    return np.roll(image, columns, axis=1) if columns else image


def _average_rows(image: Image, height: int) -> NDArray[Any]:
    """Average groups of rows: float32 (height, W, 3), or the image itself if the rows do not divide evenly.

    OpenCV's area interpolation is then up to five times faster, with the same result.
    """
    count = image.shape[0] // height
    # The sum of more rows would overflow.
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
        # Area interpolation avoids aliasing, but is nearest-neighbour when enlarging.
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(image, (width, height), interpolation=how))
    return image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8)
