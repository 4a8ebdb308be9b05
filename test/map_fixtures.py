"""Maps of every kind made from a raster, and a tile server with faults."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from pmtiles.tile import Compression, TileType, zxy_to_tileid
from pmtiles.writer import Writer
from rasterio.enums import Resampling
from rasterio.transform import Affine, from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import calculate_default_transform, transform, transform_bounds

HALF_WORLD = math.pi * 6_378_137.0


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Make a smooth random RGB image: without fine detail, so that resampling changes little."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4.0) + 0.5 * cv2.GaussianBlur(noise, (0, 0), 12.0) * 3.0
    return np.clip(128.0 + smooth / smooth.std() * 45.0, 0, 255).astype(np.uint8)


def write_geotiff(
    path: Path,
    image: NDArray,
    lat: float,
    lon: float,
    gsd: float,
    crs: str,
    **profile: object,
) -> Path:
    """Write an image (H, W) or (H, W, bands), north-up in ``crs`` and centred on ``(lat, lon)``.

    ``gsd`` is in the projection's units per pixel.
    """
    bands = image[..., None] if image.ndim == 2 else image
    height, width, count = bands.shape
    (x,), (y,) = transform("EPSG:4326", crs, [lon], [lat])
    options = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": count,
        "dtype": bands.dtype,
        "crs": crs,
        "transform": from_origin(x - width * gsd / 2.0, y + height * gsd / 2.0, gsd, gsd),
        **profile,
    }
    with rasterio.open(path, "w", **options) as out:
        out.write(np.moveaxis(bands, -1, 0))
    return Path(path)


def reproject_geotiff(source: Path, path: Path, crs: str, scale: float = 0.5) -> Path:
    """Reproject a raster; its pixels are ``scale`` times the size, so that little is lost."""
    with rasterio.open(source) as src:
        affine, width, height = calculate_default_transform(src.crs, crs, src.width, src.height, *src.bounds)
        affine = Affine(affine.a * scale, 0.0, affine.c, 0.0, affine.e * scale, affine.f)
        with WarpedVRT(
            src,
            crs=crs,
            transform=affine,
            width=int(width / scale),
            height=int(height / scale),
            resampling=Resampling.cubic,
            tolerance=0.001,
            add_alpha=True,
        ) as warped:
            data = warped.read()
    options = {
        "driver": "GTiff",
        "height": data.shape[1],
        "width": data.shape[2],
        "count": 4,
        "dtype": "uint8",
        "crs": crs,
        "transform": affine,
        "photometric": "RGB",
        "alpha": "YES",
    }
    with rasterio.open(path, "w", **options) as out:
        out.write(data)
    return Path(path)


class Renderer:
    """Web Mercator tiles of a raster, as PNG (RGBA) or JPEG. Not thread-safe.

    All forms of a map share the rendered tiles: rendering is what takes the tests' time.
    """

    rendered: ClassVar[dict[tuple[object, ...], bytes | None]] = {}

    def __init__(self, source_tif: Path, side: int = 256) -> None:
        self.source = Path(source_tif)
        self.side = side
        with rasterio.open(self.source) as src:
            self.bounds = transform_bounds(src.crs, "EPSG:4326", *src.bounds)  # west, south, east, north

    def tiles(self, zoom: int) -> Iterable[tuple[int, int, int]]:
        """Yield all (z, x, y) that overlap the raster."""
        west, south, east, north = self.bounds
        (x0, x1), (y1, y0) = transform("EPSG:4326", "EPSG:3857", [west, east], [south, north])
        span = 2.0 * HALF_WORLD / 2**zoom
        for y in range(int((HALF_WORLD - y0) // span), int((HALF_WORLD - y1) // span) + 1):
            for x in range(int((x0 + HALF_WORLD) // span), int((x1 + HALF_WORLD) // span) + 1):
                yield zoom, x, y

    def render(self, z: int, x: int, y: int, encoding: str = ".png") -> bytes | None:
        """Return the encoded tile, or None outside the raster."""
        key = (self.source, self.source.stat().st_mtime_ns, self.side, z, x, y, encoding)
        if key not in self.rendered:
            self.rendered[key] = self._render(z, x, y, encoding)
        return self.rendered[key]

    def _render(self, z: int, x: int, y: int, encoding: str) -> bytes | None:
        span = 2.0 * HALF_WORLD / 2**z
        pixel = span / self.side
        with rasterio.open(self.source) as src:
            alpha = src.count == 4
            with WarpedVRT(
                src,
                crs="EPSG:3857",
                transform=from_origin(x * span - HALF_WORLD, HALF_WORLD - y * span, pixel, pixel),
                width=self.side,
                height=self.side,
                resampling=Resampling.cubic,
                tolerance=0.001,
                add_alpha=not alpha,
            ) as warped:
                data = np.moveaxis(warped.read([1, 2, 3, 4]), 0, -1)
        if not data[..., 3].any():
            return None
        if encoding == ".jpg" or data[..., 3].min() == 255:
            data = data[..., :3]
        code = cv2.COLOR_RGB2BGR if data.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        return cv2.imencode(encoding, cv2.cvtColor(data, code))[1].tobytes()


def write_mbtiles(path: Path, source_tif: Path, zooms: Iterable[int], encoding: str = ".png") -> Path:
    """Render ``zooms`` of a raster into an MBTiles file."""
    renderer = Renderer(source_tif)
    path = Path(path)
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE metadata (name TEXT, value TEXT)")
    connection.execute(
        "CREATE TABLE tiles (zoom_level INTEGER, tile_column INTEGER, tile_row INTEGER, tile_data BLOB)"
    )
    connection.execute("CREATE UNIQUE INDEX place ON tiles (zoom_level, tile_column, tile_row)")
    metadata = {
        "name": "test",
        "format": encoding[1:],
        "bounds": ",".join(f"{v:.7f}" for v in renderer.bounds),
        "attribution": "Made for <b>tests</b>",
    }
    connection.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())
    for zoom in zooms:
        for z, x, y in renderer.tiles(zoom):
            if data := renderer.render(z, x, y, encoding):
                connection.execute("INSERT INTO tiles VALUES (?, ?, ?, ?)", (z, x, 2**z - 1 - y, data))
    connection.commit()
    connection.close()
    return path


def write_pmtiles(path: Path, source_tif: Path, zooms: Iterable[int], encoding: str = ".png") -> Path:
    """Render ``zooms`` of a raster into a PMTiles file."""
    renderer = Renderer(source_tif)
    ids = [tile for zoom in zooms for tile in renderer.tiles(zoom)]
    west, south, east, north = renderer.bounds
    with open(path, "wb") as file:
        writer = Writer(file)
        for z, x, y in sorted(ids, key=lambda tile: zxy_to_tileid(*tile)):
            if data := renderer.render(z, x, y, encoding):
                writer.write_tile(zxy_to_tileid(z, x, y), data)
        header = {
            "tile_type": TileType.PNG if encoding == ".png" else TileType.JPEG,
            "tile_compression": Compression.NONE,
            "min_lon_e7": int(west * 1e7),
            "min_lat_e7": int(south * 1e7),
            "max_lon_e7": int(east * 1e7),
            "max_lat_e7": int(north * 1e7),
            "center_zoom": 0,
            "center_lon_e7": int((west + east) / 2 * 1e7),
            "center_lat_e7": int((south + north) / 2 * 1e7),
        }
        writer.finalize(header, {"attribution": "Made for tests"})
    return Path(path)


class TileServer:
    """Serve a raster as XYZ tiles on the loopback interface; without a raster all tiles are grey.

    Attributes:
        fault: may be set at any time: None, "404", "500", "403", "hang", "html", "truncated", "slow" or
            "down" (closes the connection without an answer).
        requests: number of requests.
        paths: requested paths with their queries.
        headers: headers of the last request.
    """

    def __init__(self, source_tif: Path | None, side: int = 256, max_zoom: int = 30) -> None:
        self.fault: str | None = None
        self.requests = 0
        self.paths: list[str] = []
        self.headers: dict[str, str] = {}
        self.max_zoom = max_zoom
        self.delay_s = 0.3
        self._renderer = Renderer(source_tif, side) if source_tif is not None else None
        self._grey = cv2.imencode(".png", np.full((side, side, 3), 90, np.uint8))[1].tobytes()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return self.root + "/{z}/{x}/{y}.png"

    def __enter__(self) -> TileServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def _tile(self, z: int, x: int, y: int) -> bytes | None:
        if z > self.max_zoom:
            return None
        if self._renderer is None:
            return self._grey
        with self._lock:
            return self._renderer.render(z, x, y)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        fault = self.fault
        with self._lock:
            self.requests += 1
            self.paths.append(handler.path)
            self.headers = dict(handler.headers.items())
        try:
            if fault == "hang":
                self._stop.wait()
                return
            if fault == "down":
                return
            if fault == "slow":
                self._stop.wait(self.delay_s)
            z, x, y = (int(v) for v in handler.path.partition("?")[0].removesuffix(".png").split("/")[-3:])
            body = b"<html><body>Please log in</body></html>" if fault == "html" else self._tile(z, x, y)
            status = int(fault) if fault and fault.isdigit() else 200 if body is not None else 404
            body = body if status == 200 and body is not None else b"no"
            handler.send_response(status)
            handler.send_header("Content-Type", "text/html" if fault == "html" else "image/png")
            if fault != "truncated":
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            # Without a length only the image itself shows that it is incomplete.
            handler.wfile.write(body[: len(body) // 2] if fault == "truncated" else body)
        except OSError:
            pass  # the client went away
