"""Web Mercator tile pyramids as aerial maps: tiles are merged into a mosaic, which is resampled once."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection
from xview_loc.images import Image, ImageError, check_size, decode_with_alpha
from xview_loc.maps.base import (
    AerialMap,
    AerialTile,
    MapError,
    MapInfo,
    MapOptions,
    MapUnavailableError,
    NoImageryError,
)
from xview_loc.maps.sources import TileId, TileSource
from xview_loc.maps.tile_server import HttpSource

T = TypeVar("T")
Array = NDArray[np.float64]

EARTH_CIRCUMFERENCE_M = 2.0 * math.pi * 6_378_137.0
MAX_LATITUDE = 85.0511
# Pixel coordinates are projected exactly on a grid of this many nodes and interpolated in between.
GRID_NODES = 17
# A missing tile is enlarged from an ancestor: a server's deepest zoom differs between places.
OVERZOOM_LEVELS = 2
MAX_TILES = 400
MAX_TILE_SIDE = 4096
# Pixels of a mosaic: MAX_TILES of 512 x 512. Of the decoded tiles that are kept: 96 of them.
MAX_MOSAIC_PIXELS = MAX_TILES * 512**2
DECODED_PIXELS = 96 * 512**2
PREFETCH_GROUP = 16


class PyramidMap(AerialMap):
    """Aerial map of a tile server, an MBTiles or a PMTiles file."""

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
            # The server's tiles have another size than assumed, so another zoom fits better.

    def prefetch(
        self, places: Sequence[tuple[float, float]], size_px: int, gsd: float
    ) -> Iterator[tuple[int, int, int]]:
        """Fetch the tiles of the pyramid that aerial tiles at ``places`` (lat, lon) need into the cache.

        Yields (tiles done, tiles in total, tiles without imagery). Raises MapUnavailableError if a tile
        cannot be fetched; the tiles fetched before stay in the cache.
        """
        while True:
            side = self.source.side
            wanted: dict[TileId, None] = {}
            for lat, lon in places:
                zoom = self._zoom(lat, gsd)
                grid = self._grid(LocalProjection(lat, lon), size_px, gsd, zoom)
                wanted.update(dict.fromkeys(tile for _, tile in self._tiles(*grid, zoom)))
            tiles, missing = list(wanted), 0
            for start in range(0, len(tiles), PREFETCH_GROUP):
                group = tiles[start : start + PREFETCH_GROUP]
                missing += self._fetch(group)
                if self.source.side != side:
                    break  # another zoom fits better: determine the tiles again
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
        """Return the coarsest zoom at least as fine as ``gsd``, within the source's zooms."""
        # The tolerance is for an exact match: rounded up, it would take four times the tiles.
        zoom = math.ceil(math.log2(self._resolution(lat, 0) / (gsd * 1.001)))
        return max(self.source.min_zoom, min(self._max_zoom, zoom))

    def _grid(self, place: LocalProjection, size_px: int, gsd: float, zoom: int) -> tuple[Array, Array]:
        """Return world pixel coordinates (x, y) at ``zoom`` of the grid's nodes on the aerial tile.

        World x is not wrapped at the antimeridian: it continues beyond the last column.
        """
        metres = (_nodes(size_px) - (size_px - 1) / 2.0) * gsd
        east, south = np.meshgrid(metres, metres)
        lat, lon = place.inverse(east, -south)
        lon = place.lon + (np.asarray(lon) - place.lon + 180.0) % 360.0 - 180.0
        world = self.source.side * 2.0**zoom
        x = (lon + 180.0) / 360.0 * world
        y = (0.5 - np.arcsinh(np.tan(np.radians(lat))) / (2.0 * math.pi)) * world
        return x, y

    def _tiles(self, grid_x: Array, grid_y: Array, zoom: int) -> list[tuple[tuple[int, int], TileId]]:
        """Return ((unwrapped column, row), tile) of all tiles under the grid and a margin to interpolate."""
        side, count = self.source.side, 2**zoom
        columns = range(math.floor((grid_x.min() - 2) / side), math.floor((grid_x.max() + 2) / side) + 1)
        rows = range(
            max(0, math.floor((grid_y.min() - 2) / side)),
            min(count - 1, math.floor((grid_y.max() + 2) / side)) + 1,
        )
        count_tiles = len(columns) * len(rows)
        if count_tiles > MAX_TILES or count_tiles * side**2 > MAX_MOSAIC_PIXELS:
            raise MapError(
                f"{self.source.name}: its coarsest zoom {self.source.min_zoom} is too fine for this aerial"
                f" tile ({count_tiles} tiles of {side} px to merge, at most {MAX_TILES} of 512 px are)"
            )
        return [((x, y), TileId(zoom, x % count, y)) for y in rows for x in columns]

    def _fetch(self, tiles: list[TileId]) -> int:
        """Fetch tiles, and ancestors of missing ones, into the cache; return how many have neither."""
        deadline = time.monotonic() + self._deadline_s
        sources, data = self._with_ancestors(tiles, lambda group: self.source.get(group, deadline))
        for tile, encoded in data.items():
            if encoded is not None:
                self._decode(encoded, tile)  # a single tile shows the size of all
                break
        return sum(data[sources[tile]] is None for tile in tiles)

    def _cut(self, lat: float, lon: float, size_px: int, gsd: float, deadline: float) -> AerialTile | None:
        """Return the aerial tile, or None if the tiles turned out to have another size than assumed."""
        place = LocalProjection(lat, lon)
        if abs(place.lat) > MAX_LATITUDE:
            raise NoImageryError(f"{self.source.name} ends at latitude {MAX_LATITUDE}, asked for {lat:.6f}")
        side = self.source.side
        zoom = self._zoom(lat, gsd)
        grid_x, grid_y = self._grid(place, size_px, gsd, zoom)
        placed = self._tiles(grid_x, grid_y, zoom)
        wanted = list(dict.fromkeys(tile for _, tile in placed))
        sources, decoded = self._with_ancestors(wanted, lambda group: self._decode_all(group, deadline))
        if self.source.side != side:
            return None
        # Missing tiles are enlarged from an ancestor, if any.
        images = {tile: self._enlarge(decoded[sources[tile]], tile, sources[tile]) for tile in wanted}
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

        # Linear interpolation would alias when shrinking by more than 1.5: sample finer, then average.
        ratio = gsd / self._resolution(lat, zoom)
        fold = math.ceil(ratio) if ratio > 1.5 else 1
        weights = _interpolation(size_px, fold)
        # World coordinates are relative to a pixel's corner, those of remap to its centre.
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

    def _with_ancestors(
        self, tiles: list[TileId], get: Callable[[list[TileId]], dict[TileId, T | None]]
    ) -> tuple[dict[TileId, TileId], dict[TileId, T | None]]:
        """Return the tile that replaces each tile (itself, unless missing), and the results of ``get``."""
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

    def _enlarge(self, image: Image | None, tile: TileId, ancestor: TileId) -> Image | None:
        """Return the part of an ancestor's image that ``tile`` covers, at full tile size."""
        levels = tile.z - ancestor.z
        if image is None or levels == 0:
            return image
        part = self.source.side >> levels
        x, y = (tile.x - (ancestor.x << levels)) * part, (tile.y - (ancestor.y << levels)) * part
        # warpAffine also reads pixels outside the part, so there are no seams between enlarged tiles.
        scale = 1.0 / 2**levels
        offset = (scale - 1.0) / 2.0
        matrix = np.array([[scale, 0.0, x + offset], [0.0, scale, y + offset]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        size = (self.source.side, self.source.side)
        enlarged = cv2.warpAffine(image, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return enlarged.astype(np.uint8, copy=False)

    def _decode_all(self, tiles: list[TileId], deadline: float) -> dict[TileId, Image | None]:
        images: dict[TileId, Image | None] = {}
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
                if images[tile] is not None:  # a missing tile may be there later
                    self._decoded[tile] = images[tile]
            while len(self._decoded) > max(1, DECODED_PIXELS // self.source.side**2):
                self._decoded.popitem(last=False)
        return images

    def _decode(self, data: bytes, tile: TileId) -> NDArray[np.uint8]:
        try:
            check_size(data, MAX_TILE_SIDE**2)
            image: NDArray[Any] = decode_with_alpha(data)
            if image.shape[0] != image.shape[1]:
                raise ImageError(f"not square ({image.shape[1]} x {image.shape[0]} px)")
        except ImageError as error:
            where = f"{tile.z}/{tile.x}/{tile.y}"
            raise MapUnavailableError(f"{self.source.name}: tile {where}: {error}") from None
        if image.shape[0] != self.source.side:
            with self._lock:
                if self._decoded:
                    # Not the first tile: a single one of another size.
                    size = (self.source.side, self.source.side)
                    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
                else:
                    self.source.learn_side(image.shape[0])
        return image.astype(np.uint8, copy=False)


def _nodes(size_px: int) -> Array:
    """Return the pixel coordinates of the grid's nodes along an aerial tile's side."""
    return np.linspace(-0.5, size_px - 0.5, GRID_NODES)


@lru_cache(maxsize=8)
def _interpolation(size_px: int, fold: int) -> Array:
    """Return the matrix that interpolates linearly from the nodes to ``fold`` samples per pixel."""
    nodes, count = _nodes(size_px), size_px * fold
    samples = (np.arange(count) + 0.5) / fold - 0.5
    pitch = samples[1] - samples[0] if count > 1 else 1.0
    position = (samples[0] + pitch * np.arange(count) - nodes[0]) / (nodes[1] - nodes[0])
    node = np.clip(np.floor(position).astype(int), 0, GRID_NODES - 2)
    weights = np.zeros((count, GRID_NODES))
    weights[np.arange(count), node] = 1.0 - (position - node)
    weights[np.arange(count), node + 1] = position - node
    return weights
