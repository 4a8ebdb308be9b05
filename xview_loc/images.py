"""Encoded and raw images: completeness checks, decoding to RGB, JPEG encoding."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

# RGB, (height, width, 3).
Image = NDArray[np.uint8]


class ImageError(ValueError):
    """The image cannot be decoded or used; the message is one clear line."""


@dataclass(frozen=True)
class _Encoding:
    """Values per pixel in a row, OpenCV's conversion to RGB, and bits per value.

    block: width and height are multiples of it. chroma: rows of colour follow, half as many as the image has.
    """

    channels: int
    conversion: int | None
    bits: int = 8
    block: tuple[int, int] = (1, 1)
    chroma: bool = False


_COLOURS = {
    "rgb": _Encoding(3, None),
    "bgr": _Encoding(3, cv2.COLOR_BGR2RGB),
    "rgba": _Encoding(4, cv2.COLOR_RGBA2RGB),
    "bgra": _Encoding(4, cv2.COLOR_BGRA2RGB),
    "mono": _Encoding(1, cv2.COLOR_GRAY2RGB),
    # OpenCV names Bayer patterns after the 2x2 cell one row down and one column to the right of the first
    # pixel, ROS after the first pixel's.
    "bayer_rggb": _Encoding(1, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr": _Encoding(1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg": _Encoding(1, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg": _Encoding(1, cv2.COLOR_BayerGB2RGB),
}
_UYVY = _Encoding(2, cv2.COLOR_YUV2RGB_UYVY, block=(2, 1))
_YUYV = _Encoding(2, cv2.COLOR_YUV2RGB_YUYV, block=(2, 1))
_ENCODINGS: dict[str, _Encoding] = {
    **{f"{name}8": encoding for name, encoding in _COLOURS.items()},
    **{f"{name}16": replace(encoding, bits=16) for name, encoding in _COLOURS.items()},
    # OpenCV's types, in its order of colours.
    "8UC1": _COLOURS["mono"],
    "8UC3": _COLOURS["bgr"],
    "8UC4": _COLOURS["bgra"],
    "yuv422": _UYVY,
    "uyvy": _UYVY,
    "yuv422_yuy2": _YUYV,
    "yuy2": _YUYV,
    "yuyv": _YUYV,
    "nv12": _Encoding(1, cv2.COLOR_YUV2RGB_NV12, block=(2, 2), chroma=True),
    "nv21": _Encoding(1, cv2.COLOR_YUV2RGB_NV21, block=(2, 2), chroma=True),
}
ENCODINGS = tuple(_ENCODINGS)

# Rows end at multiples of 256 bytes at most. More means that the encoding is another one.
_LONGEST_PADDING = 256
# At most one part in so many of a buffer follows the last row.
_LARGEST_SPARE = 8

# What a camera's image shows: photographs in daylight have a contrast of 170 and more and a noise of 0.03 at
# most, at an eighth of their light, with the noise of a sensor, 24 and 0.17.
_LEAST_SIDE, _LEAST_CONTRAST, _MOST_NOISE = 16, 5.0, 0.7
# About so many rows and columns are examined.
_ROWS, _COLUMNS = 64, 256

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8"
_EXTRA_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_PADDING_BYTES = 8
# Markers that end entropy-coded data: neither a stuffed zero, a restart nor a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
# Start of a frame: C0 to CF without the tables DHT, JPG and DAC. Markers without a length: TEM, RST0 to SOI.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
# Most pixels of an image: 8192 x 8192, twice those of a panorama of 8192 x 4096.
MAX_PIXELS = 1 << 26


def decode_image(
    encoding: str, height: int, width: int, step: int, data: Any, big_endian: bool = False
) -> Image:
    """Decode a raw image of a ``sensor_msgs/Image`` message to RGB.

    ``step`` is the length of a row in bytes, padding included; ``data`` is any buffer of bytes. Of 16 bits,
    in the order ``big_endian``, the upper 8 are used. An rgb8 image is a view of the data: do not write to
    it. Raises ImageError if the encoding is not one of ``ENCODINGS`` or the sizes do not fit together.
    """
    if encoding not in _ENCODINGS:
        raise ImageError(f"image encoding {encoding!r} is not supported; use one of {', '.join(ENCODINGS)}")
    kind = _ENCODINGS[encoding]
    if height < 1 or width < 1:
        raise ImageError(f"the image is empty ({width} x {height} pixels)")
    if width % kind.block[0] or height % kind.block[1]:
        raise ImageError(f"a {width} x {height} image cannot be {encoding}, which halves the colour")
    row_bytes = width * kind.channels * kind.bits // 8
    if step < row_bytes:
        raise ImageError(f"image step is {step} bytes, but {width} {encoding} pixels take {row_bytes}")
    if step >= 2 * row_bytes and step - row_bytes > _LONGEST_PADDING:
        raise ImageError(
            f"image step is {step} bytes, far more than {width} {encoding} pixels take: {row_bytes}"
        )
    try:
        flat = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError(f"image data is not a buffer of bytes: {error}") from None
    lines = height + height // 2 if kind.chroma else height
    # Drivers pad buffers to whole pages or blocks of rows; much more means a wrong height.
    if not 0 <= flat.size - step * lines <= max(step, flat.size // _LARGEST_SPARE):
        raise ImageError(
            f"image data has {flat.size} bytes, but {lines} rows of {step} bytes take {step * lines}"
        )
    rows = flat[: step * lines].reshape(lines, step)[:, :row_bytes]
    if kind.bits == 16:
        rows = rows[:, 0 if big_endian else 1 :: 2]
    pixels = rows if kind.channels == 1 else rows.reshape(lines, width, kind.channels)
    if kind.conversion is None:
        return pixels
    if encoding.startswith("bayer") and (height < 4 or width < 4):
        raise ImageError(f"a {width} x {height} image is too small for a Bayer pattern")
    return cv2.cvtColor(np.ascontiguousarray(pixels), kind.conversion).astype(np.uint8, copy=False)


def decode_compressed(data: Any) -> Image:
    """Decode a JPEG, PNG or WebP file to RGB.

    The EXIF orientation is ignored: a camera's calibration is for the pixels as stored. Raises ImageError if
    the file is truncated, damaged or no image.
    """
    try:
        content = bytes(memoryview(data))
    except TypeError:
        raise ImageError("compressed image data is not a buffer of bytes") from None
    check_complete(content)
    check_size(content)
    if content.startswith(_JPEG_SIGNATURE):
        return _decode_jpeg(content)
    pixels = _decode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def decode_with_alpha(content: bytes) -> Image:
    """Decode a JPEG, PNG or WebP file to RGB, or to RGBA (height, width, 4) if it has an alpha channel.

    Raises ImageError if the file is truncated, damaged or no image.
    """
    check_complete(content)
    check_size(content)
    if content.startswith(_JPEG_SIGNATURE):
        return _decode_jpeg(content)
    pixels = _decode(content, cv2.IMREAD_UNCHANGED)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    conversion = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[channels]
    return cv2.cvtColor(pixels, conversion).astype(np.uint8, copy=False)


def check_content(image: Image) -> None:
    """Raise ImageError if an image of a camera shows nothing: blank, noise alone, or hardly a pixel."""
    height, width = image.shape[:2]
    if min(height, width) < _LEAST_SIDE:
        raise ImageError(f"the image has only {width} x {height} pixels")
    rows = image[:: max(1, height // _ROWS), :, 1].astype(np.int16)
    low, high = np.percentile(rows[:, :: max(1, width // _COLUMNS)], (5, 95))
    if high - low < _LEAST_CONTRAST:
        raise ImageError(f"the image is blank: most of it has a brightness of {low:.0f} to {high:.0f}")
    # Neighbours of independent values differ by twice their variance.
    if np.diff(rows, axis=1).var() > _MOST_NOISE * 2.0 * rows.var():
        raise ImageError("the image is noise: neighbouring pixels have nothing in common")


def encode_jpeg(image: Image, quality: int) -> bytes:
    """Encode an RGB image as JPEG; ``quality`` is 1 to 100."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1])


def check_complete(content: bytes) -> None:
    """Raise ImageError unless the bytes are a complete JPEG, PNG or WebP file.

    Decoders return the upper part of a truncated image without an error.
    """
    if content.startswith(_PNG_SIGNATURE):
        kind, complete = "PNG", _png_is_complete(content)
    elif content.startswith(_JPEG_SIGNATURE):
        kind, complete = "JPEG", _jpeg_is_complete(content)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        kind, complete = "WebP", len(content) >= 8 + int.from_bytes(content[4:8], "little")
    elif not content:
        raise ImageError("the image is empty")
    elif content.lstrip()[:1] in (b"<", b"{"):
        raise ImageError(f"a text document (HTML, XML or JSON, {len(content)} bytes) instead of an image")
    else:
        raise ImageError(f"not a JPEG, PNG or WebP image (it starts with {content[:4].hex()})")
    if not complete:
        raise ImageError(f"the {kind} image is truncated or damaged ({len(content)} bytes)")


def check_size(content: bytes, limit: int = MAX_PIXELS) -> None:
    """Raise ImageError if a JPEG, PNG or WebP file declares more than ``limit`` pixels, or no size.

    A file of 100 kB may decode to gigabytes.
    """
    width, height = declared_size(content)
    if width < 1 or height < 1:
        raise ImageError(f"the image declares no size ({len(content)} bytes)")
    if width * height > limit:
        raise ImageError(
            f"the image has {width} x {height} pixels, at most {limit / 1e6:.0f} million are decoded"
        )


def declared_size(content: bytes) -> tuple[int, int]:
    """Return width and height from the header of a JPEG, PNG or WebP file, 0 where it has none."""
    if content.startswith(_PNG_SIGNATURE + b"\x00\x00\x00\rIHDR"):
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    if content.startswith(_JPEG_SIGNATURE):
        return _jpeg_size(content)
    kind, start = content[12:16], content[20:30]
    if kind == b"VP8X":  # 24 bits each, minus one
        return 1 + int.from_bytes(start[4:7], "little"), 1 + int.from_bytes(start[7:10], "little")
    if kind == b"VP8L":  # 14 bits each, minus one, after a signature byte
        bits = int.from_bytes(start[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":  # 14 bits each, after frame tag and start code
        return int.from_bytes(start[6:8], "little") & 0x3FFF, int.from_bytes(start[8:10], "little") & 0x3FFF
    return 0, 0


def _jpeg_size(content: bytes) -> tuple[int, int]:
    position = 2
    while position + 9 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker in _JPEG_FRAMES:
            height, width = content[position + 5 : position + 7], content[position + 7 : position + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        if marker == 0xFF:  # fill byte before a marker
            position += 1
        elif marker in _JPEG_BARE:
            position += 2
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return 0, 0


def _decode_jpeg(content: bytes) -> Image:
    """Decode a JPEG file; libjpeg's warnings, which OpenCV hides, count as damage."""
    try:
        return _rgb(simplejpeg.decode_jpeg(content, "RGB"))
    except ValueError as error:
        text = str(error)
    # Some cameras pad the data by a few bytes.
    extra = _EXTRA_BYTES.search(text)
    if extra is None or int(extra[1]) > _PADDING_BYTES:
        raise ImageError(f"the JPEG image is damaged ({len(content)} bytes): {text}")
    return _rgb(simplejpeg.decode_jpeg(content, "RGB", strict=False))


def _rgb(pixels: Any) -> Image:
    return np.asarray(pixels, np.uint8)


def _decode(content: bytes, flags: int) -> NDArray[Any]:
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ImageError(f"the image cannot be decoded ({len(content)} bytes)")
    return pixels


def _jpeg_is_complete(content: bytes) -> bool:
    # From segment to segment by their lengths: a thumbnail in a segment has an end marker of its own.
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


def _png_is_complete(content: bytes) -> bool:
    """Return True if all chunks are there, each with the right checksum."""
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
