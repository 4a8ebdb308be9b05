"""Web Mercator tile pyramids as aerial maps: tile servers (XYZ), MBTiles and PMTiles files.

Our own fetcher instead of GDAL's: a total deadline, named causes, single missing tiles, a cache whose
contents are verified. A pyramid becomes an ``AerialTile`` by pasting the tiles that cover the place
together and resampling once through a coarse grid of exact projections.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import math
import mmap
import os
import re
import sqlite3
import struct
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import httpx
import numpy as np
from numpy.typing import NDArray
from pmtiles.tile import (
    Compression,
    TileType,
    deserialize_directory,
    deserialize_header,
    find_tile,
    zxy_to_tileid,
)

from xview_loc.geodesy import LocalProjection
from xview_loc.imagery import (
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

LOG = logging.getLogger(__name__)
T = TypeVar("T")

EARTH_CIRCUMFERENCE_M = 2.0 * math.pi * 6_378_137.0
MAX_LATITUDE = 85.0511
DEFAULT_MAX_ZOOM = 19
GRID_NODES = 17
# Where a tile is missing, enlarge its ancestor: services stop at different zooms in different places.
OVERZOOM_LEVELS = 2
MAX_TILES = 400
DECODED_TILES = 96
PARALLEL_REQUESTS = 8
PREFETCH_GROUP = 16
ATTEMPTS = 3
FIRST_BACKOFF_S = 0.2
SOCKET_TIMEOUT_S = 5.0
MISSING_KEPT_S = 86_400.0
MAX_TILE_BYTES = 16 << 20


class TileId(NamedTuple):
    """Zoom, column from 180 W eastwards, row from the north."""

    z: int
    x: int
    y: int

    @property
    def parent(self) -> TileId:
        """The tile one zoom up that contains this one."""
        return TileId(self.z - 1, self.x >> 1, self.y >> 1)


class TileSource:
    """Where encoded tiles come from. Methods may be called from several threads.

    ``side`` is that of its tiles in pixels, as far as known.
    """

    name: str
    side: int = 256
    min_zoom: int = 0
    max_zoom: int = DEFAULT_MAX_ZOOM
    bounds: tuple[float, float, float, float] | None = None
    attribution: str = ""
    kind: str = ""

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """Encoded images, None where there is none, by ``deadline`` (``time.monotonic``).

        Raises MapUnavailableError.
        """
        raise NotImplementedError

    def learn_side(self, side: int) -> None:
        """Note the side of the tiles, once one was seen."""
        self.side = side

    def close(self) -> None:
        """Let go of everything held."""


def is_pyramid(source: str) -> bool:
    """Whether ``source`` is a tile URL template or names an MBTiles or PMTiles file."""
    return "{z}" in source or Path(source).suffix.lower() in (".mbtiles", ".pmtiles")


def open_pyramid(source: str, options: MapOptions) -> PyramidMap:
    """Open any of the three kinds; raises MapOpenError."""
    if "{z}" in source:
        return PyramidMap(HttpSource(source, options), options)
    suffix = Path(source).suffix.lower()
    if "://" in source:
        raise MapOpenError(f"{redact(source)}: {suffix} files are read from disk only, download it first")
    if not Path(source).is_file():
        raise MapOpenError(f"cannot open {source}: no such file")
    return PyramidMap(MbtilesSource(source) if suffix == ".mbtiles" else PmtilesSource(source), options)


# ---------------------------------------------------------------------------------------------- the map


class PyramidMap(AerialMap):
    """Cuts aerial tiles from a tile pyramid."""

    def __init__(self, source: TileSource, options: MapOptions) -> None:
        self.source = source
        self.attribution = options.attribution or source.attribution
        self._deadline_s = options.deadline_s
        self._max_zoom = source.max_zoom if options.max_zoom is None else options.max_zoom
        if not isinstance(source, HttpSource):
            self._max_zoom = min(self._max_zoom, source.max_zoom)
        self._decoded: OrderedDict[TileId, NDArray[np.uint8] | None] = OrderedDict()
        self._lock = threading.Lock()

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        """See :meth:`AerialMap.tile`; returns or raises within the map's deadline."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            tile = self._cut(lat, lon, size_px, gsd, deadline)
            if tile is not None:
                return tile
            # The server's tiles are of another size than assumed, so another zoom suits better.

    def prefetch(
        self, places: Sequence[tuple[float, float]], size_px: int, gsd: float
    ) -> Iterator[tuple[int, int, int]]:
        """Have the source fetch all that aerial tiles about ``places`` (lat, lon) are made of.

        Yields (tiles done, tiles in all, tiles without imagery) as it goes on. Raises
        MapUnavailableError; what was fetched until then stays in the cache.
        """
        while True:
            side = self.source.side
            wanted: dict[TileId, None] = {}
            for lat, lon in places:
                wanted.update(dict.fromkeys(self._covering(lat, lon, size_px, gsd)))
            tiles, missing = list(wanted), 0
            for start in range(0, len(tiles), PREFETCH_GROUP):
                group = tiles[start : start + PREFETCH_GROUP]
                missing += self._fetch(group)
                if self.source.side != side:
                    break  # another zoom suits better: work out anew what is needed
                yield start + len(group), len(tiles), missing
            else:
                return

    def info(self) -> MapInfo:
        """See :meth:`AerialMap.info`."""
        bounds = self.source.bounds
        lat = (bounds[0] + bounds[2]) / 2.0 if bounds else 0.0
        return MapInfo(
            kind=self.source.kind,
            crs="EPSG:3857",
            bounds=bounds,
            resolution_m=self._resolution(lat, self._max_zoom),
            zooms=(self.source.min_zoom, self._max_zoom),
            attribution=self.attribution,
        )

    def close(self) -> None:
        """See :meth:`AerialMap.close`."""
        self.source.close()

    def _resolution(self, lat: float, zoom: int) -> float:
        return EARTH_CIRCUMFERENCE_M * math.cos(math.radians(lat)) / (self.source.side * 2.0**zoom)

    def _zoom(self, lat: float, gsd: float) -> int:
        """The coarsest zoom at least as fine as ``gsd``, within what the source has."""
        # A hair of tolerance, or rounding would fetch four times the tiles for an exact match.
        zoom = math.ceil(math.log2(self._resolution(lat, 0) / (gsd * 1.001)))
        return max(self.source.min_zoom, min(self._max_zoom, zoom))

    def _grid(
        self, place: LocalProjection, size_px: int, gsd: float, zoom: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """World pixel coordinates (x, y) at ``zoom`` on a coarse grid over the tile, and the grid's pixels.

        World x is not wrapped at the antimeridian: it goes on beyond the last column.
        """
        nodes = np.linspace(-0.5, size_px - 0.5, GRID_NODES)
        metres = (nodes - (size_px - 1) / 2.0) * gsd
        east, south = np.meshgrid(metres, metres)
        lat, lon = place.inverse(east, -south)
        lon = place.lon + (np.asarray(lon) - place.lon + 180.0) % 360.0 - 180.0
        world = self.source.side * 2.0**zoom
        x = (lon + 180.0) / 360.0 * world
        y = (0.5 - np.arcsinh(np.tan(np.radians(lat))) / (2.0 * math.pi)) * world
        return x, y, nodes

    def _tiles(
        self, grid_x: NDArray[np.float64], grid_y: NDArray[np.float64], zoom: int
    ) -> list[tuple[tuple[int, int], TileId]]:
        """((unwrapped column, row), tile) of all tiles under the grid, with room for interpolation."""
        side, count = self.source.side, 2**zoom
        columns = range(math.floor((grid_x.min() - 2) / side), math.floor((grid_x.max() + 2) / side) + 1)
        rows = range(
            max(0, math.floor((grid_y.min() - 2) / side)),
            min(count - 1, math.floor((grid_y.max() + 2) / side)) + 1,
        )
        if len(columns) * len(rows) > MAX_TILES:
            raise MapError(
                f"{self.source.name}: its coarsest zoom {self.source.min_zoom} is far too fine for this tile"
                f" ({len(columns) * len(rows)} tiles)"
            )
        return [((x, y), TileId(zoom, x % count, y)) for y in rows for x in columns]

    def _covering(self, lat: float, lon: float, size_px: int, gsd: float) -> list[TileId]:
        """The pyramid's tiles that an aerial tile about the place is made of."""
        zoom = self._zoom(lat, gsd)
        grid_x, grid_y, _ = self._grid(LocalProjection(lat, lon), size_px, gsd, zoom)
        return [tile for _, tile in self._tiles(grid_x, grid_y, zoom)]

    def _fetch(self, tiles: list[TileId]) -> int:
        """Have the source fetch tiles, or what is enlarged in their place; how many have neither."""
        deadline = time.monotonic() + self._deadline_s
        sources, data = self._with_ancestors(tiles, lambda group: self.source.get(group, deadline))
        for tile, encoded in data.items():
            if encoded is not None:
                self._decode(encoded, tile)  # one shows the size of all
                break
        return sum(data[sources[tile]] is None for tile in tiles)

    def _cut(self, lat: float, lon: float, size_px: int, gsd: float, deadline: float) -> AerialTile | None:
        """The aerial tile, or None if the pyramid's tiles turned out to be of another size."""
        place = LocalProjection(lat, lon)
        if abs(place.lat) > MAX_LATITUDE:
            raise NoImageryError(f"{self.source.name} ends at latitude {MAX_LATITUDE}, asked for {lat:.6f}")
        side = self.source.side
        zoom = self._zoom(lat, gsd)
        grid_x, grid_y, nodes = self._grid(place, size_px, gsd, zoom)
        placed = self._tiles(grid_x, grid_y, zoom)
        images = self._load([tile for _, tile in placed], deadline)
        if self.source.side != side:
            return None
        if all(image is None for image in images.values()):
            raise NoImageryError(f"{self.source.name} has no imagery at {lat:.6f}, {lon:.6f} (zoom {zoom})")

        left, top = min(x for (x, _), _ in placed), min(y for (_, y), _ in placed)
        right, bottom = max(x for (x, _), _ in placed) + 1, max(y for (_, y), _ in placed) + 1
        mosaic = np.zeros(((bottom - top) * side, (right - left) * side, 3), np.uint8)
        mask = np.zeros(mosaic.shape[:2], np.uint8)
        for (x, y), tile in placed:
            image = images[tile]
            if image is not None and image.shape[:2] == (side, side):
                area = np.s_[
                    (y - top) * side : (y - top + 1) * side, (x - left) * side : (x - left + 1) * side
                ]
                mosaic[area] = image[..., :3]
                mask[area] = image[..., 3] if image.shape[2] == 4 else 255

        # Shrinking by more than 1.5 would alias: sample a multiple finer, then average.
        ratio = gsd / self._resolution(lat, zoom)
        fold = math.ceil(ratio) if ratio > 1.5 else 1
        weights = _interpolation(nodes, (np.arange(size_px * fold) + 0.5) / fold - 0.5)
        # World coordinates count from a pixel's corner, remap's from its centre.
        map_x = (weights @ (grid_x - left * side - 0.5) @ weights.T).astype(np.float32)
        map_y = (weights @ (grid_y - top * side - 0.5) @ weights.T).astype(np.float32)
        kernel = cv2.INTER_CUBIC if ratio < 1.0 else cv2.INTER_LINEAR
        picture: NDArray[Any] = cv2.remap(mosaic, map_x, map_y, kernel, borderMode=cv2.BORDER_REPLICATE)
        if fold > 1:
            picture = cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA)
        if mask.min() == 255:
            valid = np.ones((size_px, size_px), bool)
        else:
            covered = cv2.remap(mask, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
            if fold > 1:
                covered = cv2.resize(covered, (size_px, size_px), interpolation=cv2.INTER_AREA)
            valid = covered > 127
            picture[~valid] = 0
        fraction = float(valid.mean())
        if fraction == 0.0:
            raise NoImageryError(f"{self.source.name} has no imagery at {lat:.6f}, {lon:.6f} (zoom {zoom})")
        return AerialTile(np.asarray(picture, np.uint8), place.lat, place.lon, gsd, fraction, valid=valid)

    def _load(self, tiles: Iterable[TileId], deadline: float) -> dict[TileId, NDArray[np.uint8] | None]:
        """Decoded RGB(A) tiles; missing ones are enlarged from an ancestor where there is one."""
        wanted = list(dict.fromkeys(tiles))
        sources, images = self._with_ancestors(wanted, lambda group: self._decode_all(group, deadline))
        return {tile: self._enlarge(images[sources[tile]], tile, sources[tile]) for tile in wanted}

    def _with_ancestors(
        self, tiles: list[TileId], get: Callable[[list[TileId]], dict[TileId, T | None]]
    ) -> tuple[dict[TileId, TileId], dict[TileId, T | None]]:
        """Which tile stands in for each tile (itself, where it is not missing), and what ``get`` gave."""
        found = dict(get(tiles))
        sources = {tile: tile for tile in tiles}
        for _ in range(OVERZOOM_LEVELS):
            missing = [tile for tile in tiles if found[sources[tile]] is None]
            missing = [tile for tile in missing if sources[tile].z > self.source.min_zoom]
            if not missing:
                break
            sources.update({tile: sources[tile].parent for tile in missing})
            found.update(get(list(dict.fromkeys(sources[tile] for tile in missing))))
        return sources, found

    def _enlarge(
        self, image: NDArray[np.uint8] | None, tile: TileId, ancestor: TileId
    ) -> NDArray[np.uint8] | None:
        """The part of an ancestor's image that ``tile`` covers, at full tile size."""
        levels = tile.z - ancestor.z
        if image is None or levels == 0:
            return image
        part = self.source.side >> levels
        x, y = (tile.x - (ancestor.x << levels)) * part, (tile.y - (ancestor.y << levels)) * part
        # warpAffine reads neighbours beyond the part, so that no seam shows between enlarged tiles.
        scale = 1.0 / 2**levels
        offset = (scale - 1.0) / 2.0
        matrix = np.array([[scale, 0.0, x + offset], [0.0, scale, y + offset]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        size = (self.source.side, self.source.side)
        enlarged = cv2.warpAffine(image, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return enlarged.astype(np.uint8, copy=False)

    def _decode_all(self, tiles: list[TileId], deadline: float) -> dict[TileId, NDArray[np.uint8] | None]:
        images: dict[TileId, NDArray[np.uint8] | None] = {}
        with self._lock:
            for tile in tiles:
                if tile in self._decoded:
                    self._decoded.move_to_end(tile)
                    images[tile] = self._decoded[tile]
        absent = [tile for tile in tiles if tile not in images]
        if not absent:
            return images
        for tile, data in self.source.get(absent, deadline).items():
            images[tile] = None if data is None else self._decode(data, tile)
        with self._lock:
            for tile in absent:
                if images[tile] is not None:  # what is missing now may be there later
                    self._decoded[tile] = images[tile]
            while len(self._decoded) > DECODED_TILES:
                self._decoded.popitem(last=False)
        return images

    def _decode(self, data: bytes, tile: TileId) -> NDArray[np.uint8]:
        try:
            image: NDArray[Any] = decode_tile(data)
        except ValueError as error:
            where = f"{tile.z}/{tile.x}/{tile.y}"
            raise MapUnavailableError(f"{self.source.name}: tile {where} is damaged: {error}") from None
        if image.shape[0] != self.source.side:
            with self._lock:
                if self._decoded:
                    # Not the first tile seen: an odd one out.
                    image = cv2.resize(
                        image, (self.source.side, self.source.side), interpolation=cv2.INTER_AREA
                    )
                else:
                    self.source.learn_side(image.shape[0])
        return image.astype(np.uint8, copy=False)


@lru_cache(maxsize=8)
def _weights(start: float, step: float, first: float, pitch: float, count: int) -> NDArray[np.float64]:
    position = (first + pitch * np.arange(count) - start) / step
    node = np.clip(np.floor(position).astype(int), 0, GRID_NODES - 2)
    weights = np.zeros((count, GRID_NODES))
    weights[np.arange(count), node] = 1.0 - (position - node)
    weights[np.arange(count), node + 1] = position - node
    return weights


def _interpolation(nodes: NDArray[np.float64], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """(positions, nodes) matrix of linear interpolation from evenly spaced nodes to even positions."""
    pitch = float(positions[1] - positions[0]) if len(positions) > 1 else 1.0
    return _weights(float(nodes[0]), float(nodes[1] - nodes[0]), float(positions[0]), pitch, len(positions))


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


def decode_tile(data: bytes) -> NDArray[np.uint8]:
    """RGB (H, W, 3) or RGBA (H, W, 4) of an encoded square tile; ValueError says what is wrong."""
    if problem := check_encoded(data):
        raise ValueError(problem)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("cannot be decoded")
    image: NDArray[Any] = decoded
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    else:
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"not square: {image.shape[1]} x {image.shape[0]} px")
    return np.asarray(image, np.uint8)


# ------------------------------------------------------------------------------------------ tile servers


class HttpSource(TileSource):
    """Tiles of a server, fetched in parallel and kept on disk.

    404, 204 and 410 say that there is no imagery. Everything else that is not a whole image raises
    MapUnavailableError; what may be a passing failure is tried again while the deadline lasts.
    """

    kind = "tile server (XYZ)"

    def __init__(self, template: str, options: MapOptions) -> None:
        for part in ("{x}", "{y}"):
            if part not in template and not (part == "{y}" and "{-y}" in template):
                raise MapOpenError(f"{redact(template)}: the tile URL lacks {part}")
        if "{key}" in template and not options.api_key:
            raise MapOpenError(f"{redact(template)}: the tile URL asks for a key and none is given")
        if not template.startswith(("http://", "https://")):
            raise MapOpenError(f"{redact(template)}: a tile URL starts with http:// or https://")
        self._template = template
        self._key = options.api_key or ""
        self.name = redact(template)
        self.attribution = options.attribution
        if options.max_zoom is not None:
            self.max_zoom = options.max_zoom
        self._offline = options.offline
        if self._key:
            LOG_REDACTOR.secrets.add(self._key)
        fixed_query = template.partition("?")[2]
        # Any value of the query may be a key, however short its name.
        LOG_REDACTOR.secrets.update(re.findall(r"=([^&{}]{4,})(?=&|$)", fixed_query))
        self._cache: TileCache | None = None
        if options.cache_dir is not None:
            name = hashlib.sha256(template.encode()).hexdigest()[:16]
            self._cache = TileCache(Path(options.cache_dir) / name, options.cache_mb)
            self.side = self._cache.read_side() or self.side
        elif options.offline:
            raise MapOpenError(f"{self.name}: offline needs a cache directory")
        try:
            httpx.URL(self._url(TileId(0, 0, 0)))
            self._client = httpx.Client(
                headers={"User-Agent": options.user_agent, **options.headers},
                follow_redirects=True,
                limits=httpx.Limits(max_connections=PARALLEL_REQUESTS),
            )
        except (httpx.InvalidURL, ValueError, TypeError):
            # Their text may hold the key.
            raise MapOpenError(f"{self.name}: not a valid URL, or a header that cannot be sent") from None
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="map-tiles")
        self._closing = threading.Event()

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """See :meth:`TileSource.get`."""
        found: dict[TileId, bytes | None] = {}
        absent = []
        for tile in tiles:
            cached = (
                self._cache.read(tile, None if self._offline else MISSING_KEPT_S) if self._cache else None
            )
            if cached is None:
                absent.append(tile)
            else:
                found[tile] = cached or None
        if not absent:
            return found
        if self._offline:
            raise MapUnavailableError(
                f"{self._describe(absent[0])}: offline and not in the cache"
                f" ({len(absent)} of {len(tiles)} tiles)"
            )
        try:
            futures = {tile: self._pool.submit(self._fetch, tile, deadline) for tile in absent}
        except RuntimeError:
            raise MapUnavailableError(f"{self.name}: the map is closed") from None
        try:
            for tile, future in futures.items():
                found[tile] = self._await(tile, future, deadline)
        finally:
            for future in futures.values():
                future.cancel()
        return found

    def learn_side(self, side: int) -> None:
        """See :meth:`TileSource.learn_side`; kept on disk: an offline drive asks for the same tiles."""
        super().learn_side(side)
        if self._cache:
            self._cache.write_side(side)

    def close(self) -> None:
        """See :meth:`TileSource.close`."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _await(self, tile: TileId, future: Future[bytes | None], deadline: float) -> bytes | None:
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            raise MapUnavailableError(f"{self._describe(tile)}: no answer before the deadline") from None
        except CancelledError:
            raise MapUnavailableError(f"{self.name}: the map is closed") from None

    def _url(self, tile: TileId) -> str:
        flipped = 2**tile.z - 1 - tile.y
        url = self._template.replace("{z}", str(tile.z)).replace("{x}", str(tile.x))
        url = url.replace("{y}", str(tile.y)).replace("{-y}", str(flipped))
        return url.replace("{key}", self._key)

    def _describe(self, tile: TileId) -> str:
        template = redact(self._template, (self._key,) if self._key else ())
        where = f"{tile.z}/{tile.x}/{tile.y}"
        filled = template.replace("{z}/{x}/{y}", where)
        return filled if filled != template else f"{template} (tile {where})"

    def _fetch(self, tile: TileId, deadline: float) -> bytes | None:
        problem = "no time left"
        for attempt in range(ATTEMPTS):
            remaining = deadline - time.monotonic()
            if remaining <= 0.0 or self._closing.is_set():
                break
            passing = True
            try:
                status, data, length = self._request(self._url(tile), deadline)
            except httpx.TimeoutException:
                problem = "timed out"
            except httpx.RemoteProtocolError:
                problem = "the connection broke off (truncated answer)"
            except httpx.HTTPError as error:
                # Only the kind of the error: its text may hold the URL.
                problem = f"cannot reach the server ({type(error).__name__})"
            except RuntimeError:
                if not self._closing.is_set():
                    raise
                problem = "the map is closed"
            else:
                if status in (204, 404, 410):
                    self._keep(tile, b"")
                    return None
                if status == 200:
                    fault = check_encoded(data)
                    if fault is None:
                        self._keep(tile, data)
                        return data
                    problem = f"the server sent {fault}" + (f" ({length} bytes)" if data else "")
                else:
                    problem = f"HTTP {status}" + (" (is the key right?)" if status in (401, 403) else "")
                    passing = status in (408, 425, 429) or status >= 500
            if not passing:
                break
            pause = min(FIRST_BACKOFF_S * 2**attempt, max(0.0, deadline - time.monotonic()))
            if attempt + 1 < ATTEMPTS and self._closing.wait(pause):
                break
        raise MapUnavailableError(f"{self._describe(tile)}: {problem}")

    def _request(self, url: str, deadline: float) -> tuple[int, bytes, int]:
        timeout = max(0.05, min(SOCKET_TIMEOUT_S, deadline - time.monotonic()))
        with self._client.stream("GET", url, timeout=timeout) as response:
            chunks, length = [], 0
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                length += len(chunk)
                if time.monotonic() > deadline:
                    # Socket timeouts bound each read alone; a dripping server must not win.
                    raise httpx.ReadTimeout("deadline")
                if length > MAX_TILE_BYTES:
                    raise httpx.DecodingError("too large")
            return response.status_code, b"".join(chunks), length

    def _keep(self, tile: TileId, data: bytes) -> None:
        if self._cache is not None:
            self._cache.write(tile, data)


# -------------------------------------------------------------------------------------------- disk cache


class TileCache:
    """Encoded tiles on disk, each with a checksum; several processes may share it.

    A file is a header (magic, CRC-32 of the rest, time of writing) and the image's bytes, none where the
    server has no imagery. Files appear whole (rename) and are used only if the checksum holds. The least
    recently used go when the size limit is passed.
    """

    HEADER = struct.Struct("<4sId")
    MAGIC = b"XVT1"

    def __init__(self, directory: Path, limit_mb: float) -> None:
        self.directory = directory
        self._limit = limit_mb * 1e6
        self._size: float | None = None
        self._lock = threading.Lock()
        self._warned = False

    def read(self, tile: TileId, missing_kept_s: float | None) -> bytes | None:
        """The image, b"" where the server had none, or None if not (validly) cached.

        That there was none is believed for ``missing_kept_s`` seconds (None: for ever).
        """
        path = self._path(tile)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if len(content) < self.HEADER.size:
            return None
        magic, crc, written = self.HEADER.unpack_from(content)
        data = content[self.HEADER.size :]
        if magic != self.MAGIC or crc != self._crc(data, written):
            return None
        if not data and missing_kept_s is not None and abs(time.time() - written) > missing_kept_s:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use, for eviction
        return data

    def write(self, tile: TileId, data: bytes) -> None:
        """Keep a tile; a full or read-only disk costs the cache, not the tile."""
        path = self._path(tile)
        now = time.time()
        content = self.HEADER.pack(self.MAGIC, self._crc(data, now), now) + data
        if self._replace(path, content):
            self._account(len(content))

    def read_side(self) -> int | None:
        """The side of the tiles in pixels, if it was ever seen."""
        try:
            side = int((self.directory / "tile_side").read_text())
        except (OSError, ValueError):
            return None
        return side if 16 <= side <= 4096 else None

    def write_side(self, side: int) -> None:
        """Keep the side of the tiles in pixels."""
        self._replace(self.directory / "tile_side", str(side).encode())

    def _replace(self, path: Path, content: bytes) -> bool:
        """Write a file so that it is never seen half done; whether it worked."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                LOG.warning("cannot write the map cache %s: %s", self.directory, error.strerror)
            return False
        return True

    def _crc(self, data: bytes, written: float) -> int:
        return zlib.crc32(data, zlib.crc32(struct.pack("<d", written)))

    def _path(self, tile: TileId) -> Path:
        return self.directory / str(tile.z) / str(tile.x) / f"{tile.y}.tile"

    def _account(self, added: int) -> None:
        with self._lock:
            if self._size is None:
                self._size = float(sum(size for _, size, _ in self._files()))
            else:
                self._size += added
            if self._size <= self._limit:
                return
            files = sorted(self._files())
            size = float(sum(file_size for _, file_size, _ in files))
            for _, file_size, path in files:
                if size <= 0.9 * self._limit:
                    break
                try:
                    path.unlink()
                except FileNotFoundError:
                    pass
                except OSError:
                    continue
                size -= file_size
            self._size = size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of all files."""
        files = []
        for folder, _, names in os.walk(self.directory):
            for name in names:
                path = Path(folder, name)
                if path.suffix not in (".tile", ".part"):
                    continue
                try:
                    stat = path.stat()
                except OSError:
                    continue
                files.append((stat.st_mtime, stat.st_size, path))
        return files


# ------------------------------------------------------------------------------------------- local files


class MbtilesSource(TileSource):
    """An MBTiles file: SQLite, rows counted from the south."""

    kind = "MBTiles"

    def __init__(self, path: str) -> None:
        self.name = path
        self._uri = Path(path).resolve().as_uri() + "?mode=ro"
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            metadata = {str(k): str(v) for k, v in self._query("SELECT name, value FROM metadata", ())}
            zooms = self._query("SELECT MIN(zoom_level), MAX(zoom_level) FROM tiles", ())[0]
        except sqlite3.Error as error:
            self.close()
            raise MapOpenError(f"cannot open {path}: {error}") from None
        if zooms[0] is None:
            self.close()
            raise MapOpenError(f"{path} holds no tiles")
        self.min_zoom, self.max_zoom = int(zooms[0]), int(zooms[1])
        if (kind := metadata.get("format", "png").lower()) in ("pbf", "mvt"):
            self.close()
            raise MapOpenError(f"{path} holds vector tiles ({kind}), not images")
        self.attribution = re.sub(r"<[^>]*>", "", metadata.get("attribution", ""))
        try:
            west, south, east, north = (float(v) for v in metadata["bounds"].split(","))
            self.bounds = (south, west, north, east)
        except (KeyError, ValueError):
            self.bounds = None  # optional in the specification

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """See :meth:`TileSource.get`."""
        del deadline  # a local read
        query = "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?"
        found: dict[TileId, bytes | None] = {}
        try:
            for tile in tiles:
                rows = self._query(query, (tile.z, tile.x, 2**tile.z - 1 - tile.y))
                found[tile] = bytes(rows[0][0]) if rows and rows[0][0] else None
        except sqlite3.Error as error:
            raise MapUnavailableError(f"cannot read {self.name}: {error}") from None
        return found

    def close(self) -> None:
        """See :meth:`TileSource.close`."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def _query(self, sql: str, arguments: tuple[int, ...]) -> list[Any]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            # Each thread queries through its own; close() may come from any thread.
            connection = sqlite3.connect(self._uri, uri=True, check_same_thread=False)
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection.execute(sql, arguments).fetchall()


class PmtilesSource(TileSource):
    """A PMTiles (version 3) file on disk."""

    kind = "PMTiles"

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            with open(path, "rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise MapOpenError(f"cannot open {path}: {error}") from None
        # Parsing a directory takes milliseconds; a drive stays within a few.
        self._directory = lru_cache(maxsize=64)(self._read_directory)
        try:
            if self._file[:7] != b"PMTiles" or self._file[7] != 3:
                raise ValueError("not a PMTiles version 3 file")
            self._header: dict[str, Any] = dict(deserialize_header(self._file[:127]))
            if self._header["internal_compression"] not in (Compression.NONE, Compression.GZIP):
                raise ValueError(f"unsupported compression {self._header['internal_compression'].name}")
            kind = self._header["tile_type"]
            if kind not in (TileType.PNG, TileType.JPEG, TileType.WEBP, TileType.UNKNOWN):
                raise ValueError(f"holds {kind.name} tiles; PNG, JPEG and WebP are supported")
            self._directory(self._header["root_offset"], self._header["root_length"])
            metadata = self._metadata()
        except (ValueError, KeyError, IndexError, EOFError, OSError, struct.error, zlib.error) as error:
            self._file.close()
            raise MapOpenError(f"cannot open {path}: {str(error) or type(error).__name__}") from None
        header = self._header
        self.min_zoom, self.max_zoom = header["min_zoom"], header["max_zoom"]
        south, west = header["min_lat_e7"] / 1e7, header["min_lon_e7"] / 1e7
        north, east = header["max_lat_e7"] / 1e7, header["max_lon_e7"] / 1e7
        self.bounds = (south, west, north, east) if north > south else None
        self.attribution = re.sub(r"<[^>]*>", "", str(metadata.get("attribution", "")))

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """See :meth:`TileSource.get`."""
        del deadline  # a local read
        try:
            return {tile: self._tile(tile) for tile in tiles}
        except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
            reason = str(error) or type(error).__name__
            raise MapUnavailableError(f"cannot read {self.name}: {reason}") from None

    def close(self) -> None:
        """See :meth:`TileSource.close`."""
        self._file.close()

    def _tile(self, tile: TileId) -> bytes | None:
        number = zxy_to_tileid(tile.z, tile.x, tile.y)
        offset, length = self._header["root_offset"], self._header["root_length"]
        for _ in range(4):  # the specification's deepest nesting of directories
            entry = find_tile(self._directory(offset, length), number)
            if entry is None:
                return None
            if entry.run_length:
                data = self._bytes(self._header["tile_data_offset"] + entry.offset, entry.length)
                return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
            offset, length = self._header["leaf_directory_offset"] + entry.offset, entry.length
        raise ValueError("directories nested too deep")

    def _read_directory(self, offset: int, length: int) -> list[Any]:
        data = self._bytes(offset, length)
        if self._header["internal_compression"] == Compression.NONE:
            data = gzip.compress(data, compresslevel=0)  # what the parser expects
        return deserialize_directory(data)

    def _metadata(self) -> dict[str, Any]:
        data = self._bytes(self._header["metadata_offset"], self._header["metadata_length"])
        if self._header["internal_compression"] == Compression.GZIP and data:
            data = gzip.decompress(data)
        parsed = json.loads(data) if data else {}
        return parsed if isinstance(parsed, dict) else {}

    def _bytes(self, offset: int, length: int) -> bytes:
        data = self._file[offset : offset + length]
        if len(data) != length:
            raise ValueError("the file is truncated")
        return data
