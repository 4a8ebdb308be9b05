"""Web Mercator tile pyramids as aerial maps: tile servers (XYZ), MBTiles and PMTiles files.

Our own fetcher instead of GDAL's: a total deadline, named causes, single missing tiles, a cache whose
contents are verified. A pyramid becomes an ``AerialTile`` by pasting the tiles that cover the place
together and resampling once through a coarse grid of exact projections.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection
from xview_loc.images import check_encoded
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

EARTH_CIRCUMFERENCE_M = 2.0 * math.pi * 6_378_137.0
MAX_LATITUDE = 85.0511
GRID_NODES = 17
# Where a tile is missing, enlarge its ancestor: services stop at different zooms in different places.
OVERZOOM_LEVELS = 2
MAX_TILES = 400
DECODED_TILES = 96
PREFETCH_GROUP = 16


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
