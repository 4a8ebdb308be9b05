"""Camera images: decoding, lens distortion, and the ground input that a cross-view model expects.

Images are RGB, uint8 (height, width, 3). Pixel (row, col) names the pixel's centre.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD, ModelSpec

Image = NDArray[np.uint8]


class CameraError(ValueError):
    """The camera's calibration cannot be used; the message is one clear line."""


class ImageError(ValueError):
    """The image cannot be decoded or used; the message is one clear line."""


# Bytes per pixel and OpenCV's conversion to RGB. OpenCV names Bayer patterns after the 2x2 cell one row
# down and one column to the right of the first pixel, ROS after the first pixel's.
_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "bayer_rggb8": (1, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr8": (1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg8": (1, cv2.COLOR_BayerGB2RGB),
}
ENCODINGS = tuple(_ENCODINGS)


def decode_image(encoding: str, height: int, width: int, step: int, data: Any) -> Image:
    """RGB of a raw image as ``sensor_msgs/Image`` carries it.

    ``step`` is the length of a row in bytes, padding included; ``data`` is anything with a buffer of
    bytes. An rgb8 image is a view of it, not to be written to. Raises ImageError.
    """
    if encoding not in _ENCODINGS:
        raise ImageError(f"image encoding {encoding!r} is not supported; use one of {', '.join(ENCODINGS)}")
    channels, conversion = _ENCODINGS[encoding]
    if height < 1 or width < 1:
        raise ImageError(f"the image is empty ({width} x {height} pixels)")
    if step < width * channels:
        raise ImageError(f"image step is {step} bytes, but {width} {encoding} pixels take {width * channels}")
    try:
        flat = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError(f"image data is not a buffer of bytes: {error}") from None
    if flat.size < step * height:
        raise ImageError(
            f"image data has {flat.size} bytes, but {height} rows of {step} bytes take {step * height}"
        )
    rows = flat[: step * height].reshape(height, step)[:, : width * channels]
    pixels = rows if channels == 1 else rows.reshape(height, width, channels)
    if conversion is None:
        return pixels
    if encoding.startswith("bayer") and (height < 4 or width < 4):
        raise ImageError(f"a {width} x {height} image is too small for a Bayer pattern")
    return cv2.cvtColor(np.ascontiguousarray(pixels), conversion).astype(np.uint8, copy=False)


def decode_compressed(data: Any) -> Image:
    """RGB of a JPEG or PNG file's bytes, as ``sensor_msgs/CompressedImage`` carries it.

    Truncated files are refused: OpenCV would fill what is missing with grey without a word. An EXIF
    orientation is ignored, since the camera's calibration is for the pixels as they lie. Raises ImageError.
    """
    try:
        content = bytes(memoryview(data))
    except TypeError:
        raise ImageError("compressed image data is not a buffer of bytes") from None
    if content.startswith(b"\xff\xd8"):
        kind, whole = "JPEG", _jpeg_is_whole(content)
    elif content.startswith(_PNG_SIGNATURE):
        kind, whole = "PNG", _png_is_whole(content)
    elif not content:
        raise ImageError("the compressed image is empty")
    else:
        raise ImageError(f"the compressed image is neither JPEG nor PNG (it starts with {content[:4].hex()})")
    if not whole:
        raise ImageError(f"the {kind} image is truncated or damaged ({len(content)} bytes)")
    try:
        pixels = cv2.imdecode(
            np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ImageError(f"the {kind} image cannot be decoded ({len(content)} bytes)")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What ends entropy-coded data: a marker that is neither a stuffed zero, a restart nor a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA


def encode_jpeg(image: Image, quality: int) -> bytes:
    """JPEG bytes of an RGB image, ``quality`` 1 to 100."""
    return bytes(
        cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    )


def _jpeg_is_whole(content: bytes) -> bool:
    """Whether the segments lead to the end marker.

    They are walked one by one, since a thumbnail inside a segment has an end marker of its own.
    """
    position, scans = 2, 0
    while position + 4 <= len(content) or content[position : position + 2] == b"\xff\xd9":
        if content[position] != 0xFF:
            return False
        marker = content[position + 1]
        if marker == 0xFF:  # fill byte before a marker
            position += 1
            continue
        if marker == _JPEG_END:
            return scans > 0
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == _JPEG_SCAN:
            scans += 1
            found = _JPEG_MARKER.search(content, position)
            if found is None:
                return False
            position = found.start()
    return False


def _png_is_whole(content: bytes) -> bool:
    """Whether every chunk up to the last is there with the right checksum."""
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        if end > len(content):
            return False
        body = content[position + 4 : end - 4]
        if zlib.crc32(body) != int.from_bytes(content[end - 4 : end], "big"):
            return False
        if body[:4] == b"IEND":
            return True
        position = end
    return False


# Numbers of distortion coefficients that each model takes, as OpenCV orders them.
_COEFFICIENTS = {"plumb_bob": (0, 4, 5), "rational_polynomial": (0, 8, 12, 14), "equidistant": (0, 4)}


@dataclass(frozen=True)
class CameraModel:
    """A calibrated pinhole or fisheye camera, as ``sensor_msgs/CameraInfo`` describes it.

    width, height: the size in pixels that the calibration is for. k: the nine intrinsics, row by row (any
    3x3 or flat sequence is taken). distortion: coefficients in OpenCV's order, possibly none.
    distortion_model: ``plumb_bob``, ``rational_polynomial`` or ``equidistant`` (fisheye).
    Hashable, so that undistortion maps can be kept. Raises CameraError.
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
        if len(k) != 9 or not all(map(math.isfinite, k)):
            raise CameraError("the camera's intrinsics are not a finite 3x3 matrix")
        if not (k[0] > 0.0 and k[4] > 0.0):
            raise CameraError(f"the camera is not calibrated (focal lengths {k[0]:g}, {k[4]:g})")
        if model not in _COEFFICIENTS:
            raise CameraError(
                f"distortion model {model!r} is not supported; use one of {', '.join(_COEFFICIENTS)}"
            )
        if len(distortion) not in _COEFFICIENTS[model] or not all(map(math.isfinite, distortion)):
            raise CameraError(f"{model} does not take these distortion coefficients: {distortion}")

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The intrinsics, 3x3."""
        return np.array(self.k).reshape(3, 3)

    @property
    def distorts(self) -> bool:
        """Whether images differ from a pinhole's; a fisheye's do whatever its coefficients."""
        return self.distortion_model == "equidistant" or any(self.distortion)

    def undistort(self, image: Image) -> Image:
        """The image that a pinhole camera with the same intrinsics would take; outside the view is black.

        Raises ImageError where the image's size is not the calibration's.
        """
        self._check_size(image)
        if not self.distorts:
            return image
        maps = _undistortion_maps(self)
        return cv2.remap(image, maps[0], maps[1], cv2.INTER_LINEAR).astype(np.uint8, copy=False)

    def scaled_matrix(self, width: int, height: int) -> NDArray[np.float64]:
        """Intrinsics (3x3) of this camera's undistorted images resized to ``width`` x ``height``."""
        across, down = width / self.width, height / self.height
        # Resizing keeps the image's edges in place, and these lie half a pixel before the first centre.
        scale = np.array(
            [[across, 0.0, (across - 1.0) / 2.0], [0.0, down, (down - 1.0) / 2.0], [0.0, 0.0, 1.0]]
        )
        return scale @ self.matrix

    def _check_size(self, image: Image) -> None:
        height, width = image.shape[:2]
        if (width, height) != (self.width, self.height):
            raise ImageError(
                f"the image has {width} x {height} pixels, but its calibration is for "
                f"{self.width} x {self.height}"
            )


@lru_cache(maxsize=4)
def _undistortion_maps(camera: CameraModel) -> Sequence[NDArray[Any]]:
    size = (camera.width, camera.height)
    matrix = camera.matrix
    if camera.distortion_model == "equidistant":
        coefficients = np.array(camera.distortion or (0.0,) * 4)
        return cv2.fisheye.initUndistortRectifyMap(
            matrix, coefficients, np.eye(3), matrix, size, cv2.CV_16SC2
        )
    coefficients = np.array(camera.distortion)
    return cv2.initUndistortRectifyMap(matrix, coefficients, np.eye(3), matrix, size, cv2.CV_16SC2)


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
