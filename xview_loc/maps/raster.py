"""Georeferenced rasters (GeoTIFF, COG, VRT, JPEG 2000 ...) as aerial maps, read with GDAL."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform, transform_bounds

from xview_loc.errors import reason
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import (
    LOG_REDACTOR,
    AerialMap,
    AerialTile,
    MapError,
    MapInfo,
    MapOpenError,
    MapOptions,
    MapUnavailableError,
    NoImageryError,
    redact,
)
from xview_loc.maps.vrt import check_vrt, is_vrt

LOG_REDACTOR.watch("rasterio")
# Formats of images in one file. Others are services, databases, indexes of files, or bytes of any meaning.
_FORMATS = "GTiff JP2OpenJPEG JP2KAK JP2ECW JP2MrSID ECW MrSID HFA PNG JPEG WEBP BMP GPKG"
DRIVERS = _FORMATS.split()


class RasterMap(AerialMap):
    """Aerial map of a raster in any projection, warped by GDAL while reading."""

    def __init__(self, source: str, options: MapOptions) -> None:
        self._source = source
        self._name = redact(source)
        self._env = {
            "GDAL_HTTP_TIMEOUT": str(max(1, math.ceil(options.deadline_s))),
            "GDAL_HTTP_MAX_RETRY": "0",
            "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR" if "://" in source else "FALSE",
            "GDAL_VRT_ENABLE_PYTHON": "NO",
        }
        local = os.path.isfile(source)
        if local and options.confined:
            # No file beside it leads to a server either.
            self._env["CPL_VSIL_CURL_ALLOWED_FILENAME"] = "none"
        # A GDAL dataset must not be used by two threads at a time (the process would abort), so each read
        # takes an idle one, or opens another.
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False
        with rasterio.Env(**self._env):
            self._drivers = self._permitted_drivers(local, options.confined)
            dataset = self._open(MapOpenError)
            self._idle.append(dataset)
            # 1-based indexes of the colour bands (three, or one for grey) and of the alpha band.
            self._colour, self._alpha = self._choose_bands(dataset)
            self._scale = self._brightness_range(dataset)
            self._info = self._describe(dataset, options)
        self.attribution = self._info.attribution

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        """See :meth:`AerialMap.tile`."""
        place = LocalProjection(lat, lon)
        half = size_px * gsd / 2.0
        crs = CRS.from_proj4(
            # With an ellipsoid alone, PROJ would assume that the source's datum is WGS 84.
            f"+proj=tmerc +lat_0={place.lat!r} +lon_0={place.lon!r} +k=1 +x_0=0 +y_0=0 +datum=WGS84 +units=m"
        )
        ratio = gsd / self._info.resolution_m if self._info.resolution_m else 1.0
        resampling = Resampling.bilinear if ratio <= 1.5 else Resampling.average
        if ratio < 1.0:
            resampling = Resampling.cubic
        try:
            with (
                rasterio.Env(**self._env),
                self._dataset() as dataset,
                WarpedVRT(
                    dataset,
                    crs=crs,
                    transform=Affine(gsd, 0.0, -half, 0.0, -gsd, half),
                    width=size_px,
                    height=size_px,
                    resampling=resampling,
                    tolerance=0.02,
                    add_alpha=self._alpha is None,
                    UNIFIED_SRC_NODATA="YES",
                ) as warped,
            ):
                data = warped.read(indexes=[*self._colour, self._alpha or warped.count])
        except (RasterioError, OSError) as error:
            if not self._may_cover(lat, lon, half):
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
        """See :meth:`AerialMap.close`; does not wait for a read in another thread."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for dataset in idle:
            dataset.close()

    @contextmanager
    def _dataset(self) -> Iterator[Any]:
        with self._lock:
            if self._closed:
                raise MapUnavailableError(f"{self._name}: the map is closed")
            dataset = self._idle.pop() if self._idle else None
        if dataset is None:
            dataset = self._open(MapUnavailableError)
        try:
            yield dataset
        finally:
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(dataset)
            if closed:
                dataset.close()

    def _permitted_drivers(self, local: bool, confined: bool) -> list[str]:
        """Return the drivers that may open the source. Raises MapOpenError, also for what a VRT names."""
        source, following = self._source, [*DRIVERS, "VRT"]
        if not local:
            if "<" not in source and ("://" in source or source.startswith("/vsi")):
                return DRIVERS if confined else following
            raise MapOpenError(f"cannot open {self._name}: no such file")
        try:
            if not is_vrt(source):
                return DRIVERS
            for raster in check_vrt(Path(source)) if confined else ():
                # GDAL would open it with any driver.
                DatasetReader(str(raster), driver=DRIVERS).close()
        except (RasterioError, OSError) as error:
            raise MapOpenError(f"cannot open {self._name}: {self._reason(error)}") from None
        return following

    def _open(self, error_type: type[MapError]) -> Any:
        try:
            dataset = DatasetReader(self._source, driver=self._drivers)
            if ColorInterp.palette not in dataset.colorinterp:
                return dataset
            # Colours can be interpolated, palette indices cannot.
            dataset.close()
            return DatasetReader(f"vrt://{dataset.name}?expand=rgba", driver=["VRT"])
        except (RasterioError, OSError, ValueError) as error:
            raise error_type(f"cannot open {self._name}: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        # GDAL's message may hold the source with its key.
        return redact(reason(error).replace(self._source, self._name))

    def _choose_bands(self, dataset: Any) -> tuple[list[int], int | None]:
        if dataset.crs is None:
            raise MapOpenError(f"{self._name} has no coordinate reference system")
        if not (dataset.crs.is_projected or dataset.crs.is_geographic):
            raise MapOpenError(
                f"{self._name} has a local coordinate reference system with no known position on Earth:"
                " assign another one, for example with gdal_edit.py -a_srs"
            )
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
            return [roles.index(role) + 1 for role in rgb], alpha
        colour = [i + 1 for i in range(dataset.count) if i + 1 != alpha]
        return colour[:3] if len(colour) >= 3 else colour[:1], alpha

    def _brightness_range(self, dataset: Any) -> tuple[float, float] | None:
        """Return the pixel values that become black and white; None for 8-bit data."""
        if dataset.dtypes[0] == "uint8":
            return None
        # Sample a few windows, so that the cost does not grow with the file.
        samples = []
        width, height = min(256, dataset.width), min(256, dataset.height)
        for i, j in product(range(4), repeat=2):
            row, col = int(i / 3 * (dataset.height - height)), int(j / 3 * (dataset.width - width))
            window = rasterio.windows.Window(col, row, width, height)
            data = dataset.read(indexes=self._colour, window=window)
            samples.append(data[:, dataset.dataset_mask(window=window) > 0].ravel())
        values = np.concatenate(samples)
        if values.size == 0:
            return 0.0, 65535.0
        low, high = np.percentile(values, [0.5, 99.5])
        return float(low), max(float(high), float(low) + 1.0)

    def _to_rgb(self, data: NDArray[Any]) -> NDArray[np.uint8]:
        if self._scale is not None:
            low, high = self._scale
            data = np.clip((data.astype(np.float32) - low) * (255.0 / (high - low)) + 0.5, 0, 255)
            data = data.astype(np.uint8)
        if data.shape[0] == 1:
            return cv2.cvtColor(data[0], cv2.COLOR_GRAY2RGB)
        return np.ascontiguousarray(np.moveaxis(data, 0, -1))

    def _describe(self, dataset: Any, options: MapOptions) -> MapInfo:
        # Metres on the ground per pixel at the centre, whatever the units of the source's projection.
        row, col = dataset.height // 2, dataset.width // 2
        xs, ys = zip(dataset.xy(row, col), dataset.xy(row + 1, col + 1), strict=True)
        try:
            west, south, east, north = transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
            lons, lats = transform(dataset.crs, "EPSG:4326", xs, ys)
            across, down = LocalProjection(lats[0], lons[0]).forward(lats[1], lons[1])
        except (RasterioError, ValueError) as error:
            raise MapOpenError(f"{self._name} cannot be located on Earth: {self._reason(error)}") from None
        tags = dataset.tags()
        return MapInfo(
            kind=f"raster ({dataset.driver}, {dataset.width} x {dataset.height} px, {dataset.count} bands)",
            crs=dataset.crs.to_string(),
            bounds=(south, west, north, east),
            resolution_m=math.hypot(across, down) / math.sqrt(2.0),
            zooms=None,
            attribution=options.attribution or tags.get("TIFFTAG_COPYRIGHT", ""),
        )

    def _may_cover(self, lat: float, lon: float, half_m: float) -> bool:
        """Return True if a tile of this half side may overlap the raster's bounds."""
        assert self._info.bounds is not None
        south, west, north, east = self._info.bounds
        margin = half_m / 111_000.0
        margin_lon = margin / max(0.01, math.cos(math.radians(lat)))
        width = east - west if east > west else east - west + 360.0  # across the antimeridian east < west
        inside_lon = (lon - west + margin_lon) % 360.0 <= width + 2.0 * margin_lon
        return south - margin <= lat <= north + margin and inside_lon
