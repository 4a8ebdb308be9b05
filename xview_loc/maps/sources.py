"""Sources of encoded Web Mercator tiles: their interface, MBTiles and PMTiles files."""

from __future__ import annotations

import gzip
import json
import mmap
import re
import sqlite3
import struct
import threading
import zlib
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pmtiles.tile import (
    Compression,
    TileType,
    deserialize_directory,
    deserialize_header,
    find_tile,
    zxy_to_tileid,
)

from xview_loc.maps.base import MapOpenError, MapUnavailableError

DEFAULT_MAX_ZOOM = 19


class TileId(NamedTuple):
    """Zoom, column (eastwards from 180 W) and row (southwards)."""

    z: int
    x: int
    y: int

    @property
    def parent(self) -> TileId:
        """The tile of the next coarser zoom level that contains this one."""
        return TileId(self.z - 1, self.x >> 1, self.y >> 1)


class TileSource:
    """Base class of sources. Methods may be called from several threads."""

    name: str
    # Side length of the tiles in pixels: an assumption until a tile was seen.
    side: int = 256
    min_zoom: int = 0
    max_zoom: int = DEFAULT_MAX_ZOOM
    bounds: tuple[float, float, float, float] | None = None
    attribution: str = ""
    kind: str = ""

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """Return encoded images, None for tiles without imagery.

        Raises MapUnavailableError if the source fails or does not answer by ``deadline`` (time.monotonic).
        """
        raise NotImplementedError

    def learn_side(self, side: int) -> None:
        """Set the side length of the tiles, once one was seen."""
        self.side = side

    def close(self) -> None:
        """Close files and connections."""


class MbtilesSource(TileSource):
    """An MBTiles file: an SQLite database whose rows are counted from the south."""

    kind = "MBTiles"

    def __init__(self, path: str) -> None:
        self.name = path
        self._uri = Path(path).resolve().as_uri() + "?mode=ro"
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            with closing(sqlite3.connect(self._uri, uri=True)) as file:
                metadata = {str(k): str(v) for k, v in file.execute("SELECT name, value FROM metadata")}
                zooms = file.execute("SELECT MIN(zoom_level), MAX(zoom_level) FROM tiles").fetchone()
        except sqlite3.Error as error:
            raise MapOpenError(f"cannot open {path}: {error}") from None
        if zooms[0] is None:
            raise MapOpenError(f"{path} holds no tiles")
        self.min_zoom, self.max_zoom = int(zooms[0]), int(zooms[1])
        if (kind := metadata.get("format", "png").lower()) in ("pbf", "mvt"):
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
            # Each thread has its own connection; close() may be called from any thread.
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
        # Parsing a directory takes milliseconds, and a drive needs only a few.
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
