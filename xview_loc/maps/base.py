"""The interface of aerial maps, their tiles and errors."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.errors import UserError
from xview_loc.geodesy import LocalProjection, wrap_angle

SECRET = "***"
KEY_PREFIX = "XVIEW_LOC_"
# A segment of a path that is no name: long, of letters and digits; names of images may be that, too.
_RANDOM_SEGMENT = re.compile(
    r"(?!.*\.(?:tiff?|vrt|jp2|png|jpe?g|webp|img|zip)$)(?=.*\d)(?=.*[A-Za-z])[\w.~%+=-]{16,}"
)
_NAME = r"(?i:[\w-]{0,40}(?:key|token|password|passwd|pwd|secret|signature))"
_SECRET_NAME = re.compile(_NAME)
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/?#'\"<>]*@)?(?P<host>[^\s/?#'\"<>]*)"
    r"(?P<path>[^\s?#'\"<>]*)(?P<query>[?#][^\s'\"<>]*)?"
)
# Name and value, quoted or not: ``password='a b'``, ``"key": "abc"``, ``<Password>abc``.
_NAMED = re.compile(
    rf"({_NAME}(?:\s*=\s*|[\"']\s*:\s*|>))"
    # Up to a closing quote that ends a word: there may be others, escaped or not.
    r"""\\*(?:(["']).*?\2(?=[\s&;,)\]}]|$)|["']?[^\s&;,<"'/?]+)"""
)
# ``/vsicurl?url=...``, and the databases whose names begin with user and password.
_VSI_OPTIONS = re.compile(r"(/vsi\w+)\?[^\s'\"<>]*")
_LOGIN = re.compile(r"(?i)\b((?:OCI|GEOR|GEORASTER):)[^\s'\"<>]+")


class MapError(UserError):
    """Base class of map errors; the message is one clear line."""


class MapOpenError(MapError):
    """The map cannot be opened: missing, not georeferenced, or of an unsupported kind."""


class NoImageryError(MapError):
    """The map has no imagery at the requested position."""


class MapUnavailableError(MapError):
    """The map may have imagery, but cannot be read now: the server fails, or a file is damaged."""


def default_cache_dir() -> Path:
    """Return the default directory of downloaded tiles (under XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xview_loc" / "tiles"


def api_key(variable: str) -> str | None:
    """Return the key that an environment variable holds, None for "". Raises MapOpenError.

    Variables without KEY_PREFIX are not read: the map's server would receive what they hold.
    """
    if not variable:
        return None
    if not variable.startswith(KEY_PREFIX):
        raise MapOpenError(
            f"the key is not read from {variable}: name a variable that begins with {KEY_PREFIX}"
        )
    if variable not in os.environ:
        raise MapOpenError(f"environment variable {variable} is not set")
    return os.environ[variable]


def is_file_name(source: str) -> bool:
    """Return True if a map's source is a plain path: no URL, nothing that GDAL reads otherwise."""
    return not (source.lower().startswith("/vsi") or any(mark in source for mark in ":<"))


@dataclass(frozen=True)
class MapOptions:
    """Options for reading a map; most are for tile servers.

    ``api_key`` replaces ``{key}`` in the URL. Tiles finer than ``max_zoom`` are enlarged from it. In the disk
    cache ``cache_dir`` (None: no cache) the least recently used tiles are deleted above ``cache_mb``;
    ``offline`` reads the cache only. ``deadline_s`` is the longest wait for an aerial tile, all requests and
    retries included. ``attribution`` replaces the one that the map itself gives. ``confined``: a VRT may show
    images of its own folder only, and none over the network.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    api_key: str | None = field(default=None, repr=False)
    user_agent: str = "xview_loc"
    max_zoom: int | None = None
    cache_dir: Path | None = field(default_factory=default_cache_dir)
    cache_mb: float = 2000.0
    deadline_s: float = 10.0
    offline: bool = False
    attribution: str = ""
    confined: bool = True


@dataclass(frozen=True)
class MapInfo:
    """Properties of a map; ``bounds`` are (south, west, north, east) in degrees.

    shift: its shift, which is taken out; "" if none was measured.
    """

    kind: str
    crs: str
    bounds: tuple[float, float, float, float] | None
    resolution_m: float | None
    zooms: tuple[int, int] | None
    attribution: str
    shift: str = ""


@dataclass(frozen=True, eq=False)
class AerialTile:
    """A square RGB image (H, W, 3), metric in the true-north plane about its centre in any map.

    Pixel coordinates (row, col) are those of pixel centres; the tile's centre (``lat``, ``lon`` in degrees)
    is ((H - 1) / 2, (W - 1) / 2). ``gsd`` is the ground sample distance in metres per pixel, ``rotation`` the
    ENU direction in which columns increase, in radians; 0 is north-up. ``valid`` (H, W) marks pixels with
    imagery, None if not known per pixel, and ``valid_fraction`` is their share.
    """

    image: NDArray[np.uint8]
    lat: float
    lon: float
    gsd: float
    valid_fraction: float = 1.0
    rotation: float = 0.0
    valid: NDArray[np.bool_] | None = None

    @property
    def size_px(self) -> int:
        """Side length in pixels."""
        return int(self.image.shape[0])

    @cached_property
    def projection(self) -> LocalProjection:
        """Local projection about the tile's centre."""
        return LocalProjection(self.lat, self.lon)

    @cached_property
    def key(self) -> str:
        """Cache key: equal for equal centre, size, ground sample distance and rotation."""
        return f"{self.lat:.9f},{self.lon:.9f},{self.size_px},{self.gsd:.9g},{self.rotation:.6f}"

    def pixel_to_enu(self, row: Any, col: Any) -> tuple[Any, Any]:
        """Return (east, north) in metres from the tile's centre."""
        right = (col - (self.image.shape[1] - 1) / 2.0) * self.gsd
        down = (row - (self.image.shape[0] - 1) / 2.0) * self.gsd
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        return right * cos + down * sin, right * sin - down * cos

    def enu_to_pixel(self, east: Any, north: Any) -> tuple[Any, Any]:
        """Return (row, col) of a position in metres from the tile's centre."""
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        right, down = east * cos + north * sin, east * sin - north * cos
        row = down / self.gsd + (self.image.shape[0] - 1) / 2.0
        return row, right / self.gsd + (self.image.shape[1] - 1) / 2.0

    def pixel_to_latlon(self, row: Any, col: Any) -> tuple[Any, Any]:
        """Return (lat, lon) in degrees."""
        return self.projection.inverse(*self.pixel_to_enu(row, col))

    def latlon_to_pixel(self, lat: Any, lon: Any) -> tuple[Any, Any]:
        """Return (row, col) of a position in degrees, which may lie outside the tile."""
        return self.enu_to_pixel(*self.projection.forward(lat, lon))

    def rotated(self, rotation: float, size_px: int) -> AerialTile:
        """Return the tile rotated so that columns increase in the ENU direction ``rotation`` (radians).

        Pixels outside this tile are invalid: to avoid them, start from a tile sqrt(2) times as large.
        """
        rotation = wrap_angle(rotation)
        centre = (size_px - 1) / 2.0
        own_row, own_col = (self.image.shape[0] - 1) / 2.0, (self.image.shape[1] - 1) / 2.0
        turn = rotation - self.rotation
        cos, sin = math.cos(turn), math.sin(turn)
        # New (col, row) -> this tile's (col, row), both measured from the common centre; rows point down.
        matrix = np.array(
            [
                [cos, sin, own_col - cos * centre - sin * centre],
                [-sin, cos, own_row + sin * centre - cos * centre],
            ]
        )
        shape = (size_px, size_px)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = cv2.warpAffine(self.image, matrix, shape, flags=flags).astype(np.uint8, copy=False)
        mask = np.uint8(255) * (np.ones(self.image.shape[:2], bool) if self.valid is None else self.valid)
        valid = cv2.warpAffine(mask, matrix, shape, flags=flags) > 127
        fraction = float(valid.mean())
        if self.valid is None:
            fraction *= self.valid_fraction
        return AerialTile(image, self.lat, self.lon, self.gsd, fraction, rotation, valid)


class AerialMap:
    """Base class of maps. Methods may be called from several threads."""

    attribution: str = ""

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        """Cut a north-up tile of ``size_px`` pixels of ``gsd`` metres, centred on a position in degrees.

        Pixels without imagery are black. Raises NoImageryError if no pixel has imagery, and
        MapUnavailableError if the map cannot be read now.
        """
        raise NotImplementedError

    def info(self) -> MapInfo:
        """Return the map's properties."""
        raise NotImplementedError

    def close(self) -> None:
        """Close files and connections; the map cannot be used afterwards."""

    def __enter__(self) -> AerialMap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Hide what may be a key in a map's source or in a message about it.

    Hidden are ``secrets``, quoted for URLs or not; queries, credentials and random-looking path segments of
    URLs; options of GDAL's names; values of what is called a key, password or token.
    """
    for secret in secrets:
        if secret:
            text = re.sub(_quoted_or_not(secret), SECRET, text)
    for pattern in (_NAMED, _LOGIN):
        text = pattern.sub(rf"\1{SECRET}", text)
    return _URL.sub(_without_credentials, _VSI_OPTIONS.sub(rf"\1?{SECRET}", text))


def _without_credentials(url: re.Match[str]) -> str:
    segments = url["path"].split("/")
    for i, segment in enumerate(segments):
        if _RANDOM_SEGMENT.fullmatch(segment) or (i and _SECRET_NAME.fullmatch(segments[i - 1])):
            segments[i] = SECRET
    return f"{url['scheme']}{url['host']}{'/'.join(segments)}" + (f"?{SECRET}" if url["query"] else "")


def _quoted_or_not(secret: str) -> str:
    """Return the pattern of a text of which any character may be percent-encoded."""
    characters = []
    for c in secret:
        encoded = "".join(f"%{byte:02x}" for byte in c.encode())
        characters.append(f"(?:{re.escape(c)}|(?i:{encoded}){'|[+]' if c == ' ' else ''})")
    return "".join(characters)


class LogRedactor(logging.Filter):
    """Hides secrets of map URLs in log records of the libraries that fetch them."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace secrets in the record; no record is dropped."""
        record.msg, record.args = redact(record.getMessage(), self.secrets), None
        return True

    def watch(self, library: str) -> None:
        """Redact the records of an imported library: filters of a logger do not see those of its children."""
        for name in [library, *logging.root.manager.loggerDict]:
            if name == library or name.startswith(f"{library}."):
                logging.getLogger(name).addFilter(self)


LOG_REDACTOR = LogRedactor()
