"""Aerial maps: north-up, metric tiles cut from rasters and tile pyramids.

``AerialMap.open`` takes any of them; ``tile`` cuts a square whose pixels are metric in the tile's own
true-north plane, whatever the source's projection. Rasters are handled here, pyramids in ``tile_pyramid``.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform, transform_bounds

from xview_loc.errors import UserError
from xview_loc.geodesy import LocalProjection, wrap_angle

SECRET = "***"


class MapError(UserError):
    """Something is wrong with the aerial map; the message is one clear line."""


class MapOpenError(MapError):
    """The map cannot be opened: not there, not an image with a position, or of an unsupported kind."""


class NoImageryError(MapError):
    """The map has no imagery at the place asked for."""


class MapUnavailableError(MapError):
    """Imagery may exist, but cannot be had now: the server fails, or a file is damaged."""


def default_cache_dir() -> Path:
    """Where downloaded map tiles are kept unless told otherwise (follows XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xview_loc" / "tiles"


@dataclass(frozen=True)
class MapOptions:
    """How to reach a map; only tile servers use more than ``attribution`` and ``deadline_s``.

    headers: sent with every request. api_key: replaces ``{key}`` in the URL. max_zoom: the deepest zoom
    the server has imagery for (finer tiles are enlarged from it). cache_dir: None keeps nothing on disk.
    cache_mb: the least recently used tiles beyond it are deleted. deadline_s: longest wait for one aerial
    tile, everything included. offline: use the disk cache alone.
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


@dataclass(frozen=True)
class MapInfo:
    """What ``xview-loc map info`` prints; bounds are (south, west, north, east) in degrees."""

    kind: str
    crs: str
    bounds: tuple[float, float, float, float] | None
    resolution_m: float | None
    zooms: tuple[int, int] | None
    attribution: str


@dataclass(frozen=True, eq=False)
class AerialTile:
    """A square aerial image, metric in the true-north plane about its centre ``(lat, lon)``.

    image: uint8 (H, W, 3), RGB. gsd: metres per pixel. valid_fraction: share of pixels with imagery;
    valid: which ones, bool (H, W), or None where not known pixel by pixel. rotation: ENU direction
    (radians) in which columns grow; 0 is north-up. Pixel (row, col) names the pixel's centre; the tile's
    centre is at ((H - 1) / 2, (W - 1) / 2).
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
        """Side in pixels."""
        return int(self.image.shape[0])

    @cached_property
    def projection(self) -> LocalProjection:
        """The plane about the tile's centre."""
        return LocalProjection(self.lat, self.lon)

    @cached_property
    def key(self) -> str:
        """Names this cut of a map; equal for equal centre, size, sampling distance and rotation."""
        return f"{self.lat:.9f},{self.lon:.9f},{self.size_px},{self.gsd:.9g},{self.rotation:.6f}"

    def pixel_to_enu(self, row: Any, col: Any) -> tuple[Any, Any]:
        """(east, north) in metres from the tile's centre."""
        right = (col - (self.image.shape[1] - 1) / 2.0) * self.gsd
        down = (row - (self.image.shape[0] - 1) / 2.0) * self.gsd
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        return right * cos + down * sin, right * sin - down * cos

    def enu_to_pixel(self, east: Any, north: Any) -> tuple[Any, Any]:
        """(row, col) of metres from the tile's centre."""
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        right, down = east * cos + north * sin, east * sin - north * cos
        row = down / self.gsd + (self.image.shape[0] - 1) / 2.0
        return row, right / self.gsd + (self.image.shape[1] - 1) / 2.0

    def pixel_to_latlon(self, row: Any, col: Any) -> tuple[Any, Any]:
        """(lat, lon) in degrees."""
        return self.projection.inverse(*self.pixel_to_enu(row, col))

    def latlon_to_pixel(self, lat: Any, lon: Any) -> tuple[Any, Any]:
        """(row, col) of a place in degrees; it may lie outside the tile."""
        return self.enu_to_pixel(*self.projection.forward(lat, lon))

    def rotated(self, rotation: float, size_px: int) -> AerialTile:
        """The same place turned so that columns grow in the ENU direction ``rotation`` (radians).

        Corners that reach beyond this tile count as invalid, so cut the tile sqrt(2) times as large.
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
        mask = (
            np.full(self.image.shape[:2], 255, np.uint8) if self.valid is None else self.valid * np.uint8(255)
        )
        valid = cv2.warpAffine(mask, matrix, shape, flags=flags) > 127
        fraction = float(valid.mean())
        if self.valid is None:
            fraction *= self.valid_fraction
        return AerialTile(image, self.lat, self.lon, self.gsd, fraction, rotation, valid)


class AerialMap:
    """A source of aerial imagery. Methods may be called from several threads."""

    attribution: str = ""

    @staticmethod
    def open(source: str | Path, options: MapOptions | None = None) -> AerialMap:
        """Open a raster GDAL knows, an ``.mbtiles`` or ``.pmtiles`` file, or a ``.../{z}/{x}/{y}`` URL.

        Raises MapOpenError.
        """
        from xview_loc import tile_pyramid  # it builds on this module

        options = options or MapOptions()
        source = os.fspath(source)
        if tile_pyramid.is_pyramid(source):
            return tile_pyramid.open_pyramid(source, options)
        return RasterMap(source, options)

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        """Cut the north-up square of ``size_px`` pixels of ``gsd`` metres about a place in degrees.

        Pixels without imagery are black and lower ``valid_fraction``. Raises NoImageryError where not one
        pixel has imagery, MapUnavailableError where imagery cannot be had now.
        """
        raise NotImplementedError

    def info(self) -> MapInfo:
        """What is known about the map as a whole."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files, connections and threads; the map cannot be used afterwards."""

    def __enter__(self) -> AerialMap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def redact(source: str, secrets: tuple[str, ...] = ()) -> str:
    """``source`` without what may be a key: secrets, the query, credentials, long random-looking parts."""
    for secret in secrets:
        if secret:
            source = source.replace(secret, SECRET)
    if "://" not in source:
        return source
    parts = urlsplit(source)
    host = parts.netloc.rpartition("@")[2]
    path = "/".join(SECRET if _looks_secret(segment) else segment for segment in parts.path.split("/"))
    return f"{parts.scheme}://{host}{path}" + (f"?{SECRET}" if parts.query else "")


def _looks_secret(segment: str) -> bool:
    return bool(re.fullmatch(r"(?=.*\d)(?=.*[A-Za-z])[\w-]{20,}", segment))


class LogRedactor(logging.Filter):
    """Keeps secrets of map URLs out of the log records of the libraries that fetch them."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record where it holds a secret; every record passes."""
        message = record.getMessage()
        clean = message
        for secret in self.secrets:
            clean = clean.replace(secret, SECRET)
        if clean != message:
            record.msg, record.args = clean, None
        return True


LOG_REDACTOR = LogRedactor()
for _name in ("httpx", "rasterio", "rasterio._env", "rasterio._err", "rasterio._io", "rasterio._base"):
    logging.getLogger(_name).addFilter(LOG_REDACTOR)


@dataclass(frozen=True)
class _Bands:
    """Which bands make up the picture: three (or one, grey) colour bands and perhaps alpha; 1-based."""

    colour: tuple[int, ...]
    alpha: int | None


class RasterMap(AerialMap):
    """A georeferenced raster in any projection, through GDAL's on-the-fly warping."""

    def __init__(self, source: str, options: MapOptions) -> None:
        self._source = source
        self._name = redact(source)
        if (query := urlsplit(source).query) and "://" in source:
            LOG_REDACTOR.secrets.add(query)
        self._env = {
            "GDAL_HTTP_TIMEOUT": str(max(1, math.ceil(options.deadline_s))),
            "GDAL_HTTP_MAX_RETRY": "0",
            "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR" if "://" in source else "FALSE",
        }
        # GDAL datasets are not thread safe (sharing one aborts the process): each thread opens its own.
        self._local = threading.local()
        self._opened: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False
        with rasterio.Env(**self._env):
            dataset = self._dataset(first=True)
            self._bands = self._choose_bands(dataset)
            self._scale = self._brightness_range(dataset)
            self._info = self._describe(dataset, options)
        self.attribution = self._info.attribution

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        """See :meth:`AerialMap.tile`."""
        place = LocalProjection(lat, lon)
        half = size_px * gsd / 2.0
        crs = CRS.from_proj4(
            # A datum, not an ellipsoid alone: otherwise PROJ takes the source's datum for WGS 84.
            f"+proj=tmerc +lat_0={place.lat!r} +lon_0={place.lon!r} +k=1 +x_0=0 +y_0=0 +datum=WGS84 +units=m"
        )
        ratio = gsd / self._info.resolution_m if self._info.resolution_m else 1.0
        bands = self._bands
        try:
            with (
                rasterio.Env(**self._env),
                WarpedVRT(
                    self._dataset(),
                    crs=crs,
                    transform=Affine(gsd, 0.0, -half, 0.0, -gsd, half),
                    width=size_px,
                    height=size_px,
                    resampling=_resampling(ratio),
                    tolerance=0.02,
                    add_alpha=bands.alpha is None,
                    UNIFIED_SRC_NODATA="YES",
                ) as warped,
            ):
                alpha = bands.alpha or warped.count
                data = warped.read(indexes=[*bands.colour, alpha])
        except (RasterioError, OSError) as error:
            if self._closed:
                raise MapUnavailableError(f"{self._name}: the map is closed") from None
            if not self._near(lat, lon, half):
                raise NoImageryError(f"{self._name} does not cover {lat:.6f}, {lon:.6f}") from None
            raise MapUnavailableError(f"cannot read {self._name}: {self._reason(error)}") from None
        valid = data[-1] > (127 if data.dtype == np.uint8 else 0)
        fraction = float(valid.mean())
        if fraction == 0.0:
            raise NoImageryError(f"{self._name} has no imagery at {lat:.6f}, {lon:.6f}")
        image = self._to_rgb(data[:-1])
        image[~valid] = 0
        return AerialTile(image, place.lat, place.lon, gsd, fraction, valid=valid)

    def info(self) -> MapInfo:
        """See :meth:`AerialMap.info`."""
        return self._info

    def close(self) -> None:
        """See :meth:`AerialMap.close`."""
        with self._lock:
            self._closed = True
            for dataset in self._opened:
                dataset.close()
            self._opened.clear()

    def _dataset(self, first: bool = False) -> Any:
        dataset = getattr(self._local, "dataset", None)
        if dataset is None:
            try:
                dataset = rasterio.open(self._source)
                if ColorInterp.palette in dataset.colorinterp:
                    # Colours can be interpolated, palette indices cannot.
                    dataset = _expand_palette(dataset)
            except (RasterioError, OSError, ValueError) as error:
                kind = MapOpenError if first else MapUnavailableError
                raise kind(f"cannot open {self._name}: {self._reason(error)}") from None
            self._local.dataset = dataset
            with self._lock:
                self._opened.append(dataset)
        return dataset

    def _reason(self, error: Exception) -> str:
        # What GDAL says may hold the URL, key and all.
        text = (str(error) or type(error).__name__).replace(self._source, self._name)
        if (query := urlsplit(self._source).query) and "://" in self._source:
            text = text.replace(query, SECRET)
        return " ".join(text.split())

    def _choose_bands(self, dataset: Any) -> _Bands:
        if dataset.crs is None:
            raise MapOpenError(f"{self._name} has no coordinate reference system")
        if dataset.transform.is_identity:
            raise MapOpenError(f"{self._name} has no georeference (no position or pixel size)")
        if unsupported := {t for t in dataset.dtypes if t not in ("uint8", "uint16")}:
            raise MapOpenError(
                f"{self._name} has pixels of type {', '.join(sorted(unsupported))};"
                " 8 and 16 bit unsigned are supported"
            )
        roles = list(dataset.colorinterp)
        alpha = roles.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in roles else None
        rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        if all(role in roles for role in rgb):
            return _Bands(tuple(roles.index(role) + 1 for role in rgb), alpha)
        colour = [i + 1 for i in range(dataset.count) if i + 1 != alpha]
        return _Bands(tuple(colour[:3] if len(colour) >= 3 else colour[:1]), alpha)

    def _brightness_range(self, dataset: Any) -> tuple[float, float] | None:
        """Pixel values that become black and white; None for 8-bit data, which stays as it is."""
        if dataset.dtypes[0] == "uint8":
            return None
        # A few windows spread over the raster: its cost does not grow with the file.
        samples = []
        for i in range(4):
            for j in range(4):
                side = 256
                row = int(i / 3 * max(0, dataset.height - side))
                col = int(j / 3 * max(0, dataset.width - side))
                window = rasterio.windows.Window(
                    col, row, min(side, dataset.width), min(side, dataset.height)
                )
                data = dataset.read(indexes=list(self._bands.colour), window=window)
                samples.append(data[:, dataset.dataset_mask(window=window) > 0].ravel())
        values = np.concatenate(samples)
        if values.size == 0:
            return 0.0, 65535.0
        low, high = np.percentile(values, [0.5, 99.5])
        return float(low), max(float(high), float(low) + 1.0)

    def _to_rgb(self, data: NDArray[Any]) -> NDArray[np.uint8]:
        """(bands, H, W) of the source's type -> (H, W, 3) RGB."""
        if self._scale is not None:
            low, high = self._scale
            data = np.clip((data.astype(np.float32) - low) * (255.0 / (high - low)) + 0.5, 0, 255)
            data = data.astype(np.uint8)
        if data.shape[0] == 1:
            return cv2.cvtColor(data[0], cv2.COLOR_GRAY2RGB)
        return np.ascontiguousarray(np.moveaxis(data, 0, -1))

    def _describe(self, dataset: Any, options: MapOptions) -> MapInfo:
        try:
            west, south, east, north = transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
        except RasterioError as error:
            raise MapOpenError(f"{self._name}: {self._reason(error)}") from None
        # Metres on the ground per source pixel at the middle, whatever unit the source's projection is in.
        row, col = dataset.height // 2, dataset.width // 2
        xs, ys = zip(dataset.xy(row, col), dataset.xy(row + 1, col + 1), strict=True)
        lons, lats = transform(dataset.crs, "EPSG:4326", xs, ys)
        resolution = math.hypot(*LocalProjection(lats[0], lons[0]).forward(lats[1], lons[1])) / math.sqrt(2.0)
        tags = dataset.tags()
        return MapInfo(
            kind=f"raster ({dataset.driver}, {dataset.width} x {dataset.height} px, {dataset.count} bands)",
            crs=dataset.crs.to_string(),
            bounds=(south, west, north, east),
            resolution_m=resolution,
            zooms=None,
            attribution=options.attribution or tags.get("TIFFTAG_COPYRIGHT", ""),
        )

    def _near(self, lat: float, lon: float, half_m: float) -> bool:
        """Whether a tile about the place may touch the raster."""
        assert self._info.bounds is not None
        south, west, north, east = self._info.bounds
        margin = half_m / 111_000.0
        margin_lon = margin / max(0.01, math.cos(math.radians(lat)))
        inside_lon = (lon - west + margin_lon) % 360.0 <= (east - west) % 360.0 + 2.0 * margin_lon
        return south - margin <= lat <= north + margin and inside_lon


def _resampling(ratio: float) -> Resampling:
    """How to resample when an output pixel is ``ratio`` source pixels wide."""
    if ratio < 1.0:
        return Resampling.cubic
    return Resampling.bilinear if ratio <= 1.5 else Resampling.average


def _expand_palette(dataset: Any) -> Any:
    path = dataset.name
    dataset.close()
    return rasterio.open(f"vrt://{path}?expand=rgba")
