"""Web Mercator tile pyramids as aerial maps: tile servers (XYZ), MBTiles and PMTiles files.

Our own fetcher instead of GDAL's: a total deadline, named causes, single missing tiles, a cache whose
contents are verified. A pyramid becomes an ``AerialTile`` by pasting the tiles that cover the place
together and resampling once through a coarse grid of exact projections.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def check_encoded(data: bytes) -> str | None:
    """Why ``data`` is not a whole PNG, JPEG or WebP file; None if it is.

    Decoders return the upper part of a truncated image without an error, so look for its end.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return None if b"IEND\xaeB`\x82" in data[-64:] else "truncated PNG"
    if data[:3] == b"\xff\xd8\xff":
        return None if b"\xff\xd9" in data[-64:] else "truncated JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return None if len(data) >= int.from_bytes(data[4:8], "little") + 8 else "truncated WebP"
    if data.lstrip()[:1] in (b"<", b"{"):
        return "a text document (HTML, XML or JSON) instead of an image"
    return "empty" if not data else "not a PNG, JPEG or WebP image"


Image = NDArray[np.uint8]


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
