"""Sources of encoded Web Mercator tiles: their interface, MBTiles and PMTiles files."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pmtiles.tile import (
    Compression,
    TileType,
    deserialize_directory,
    deserialize_header,
    find_tile,
    read_varint,
    zxy_to_tileid,
)

from xview_loc.errors import shown
from xview_loc.files import open_regular
from xview_loc.maps.base import MapOpenError, MapUnavailableError

DEFAULT_MAX_ZOOM = 19
# Deepest zoom that an archive may declare: pixels of less than a millimetre.
DEEPEST_ZOOM = 28
MAX_TILE_BYTES = 16 << 20
# Most bytes of a PMTiles directory, unpacked: over a hundred thousand tiles.
_MAX_DIRECTORY_BYTES = 1 << 20
_MAX_ATTRIBUTION = 2000
# Longest time to open an archive, seconds.
_OPEN_S = 30.0
_LONG_NUMBER = re.compile(rb"[\x80-\xff]{10}")
# SQLite's steps between two looks at the clock.
_STEPS = 10_000
# SQLITE_LIMIT_LENGTH: of a value or row, bytes.
_LIMIT_LENGTH = 0


class TileId(NamedTuple):
    """Zoom, column (eastwards from 180 W) and row (southwards)."""

    z: int
    x: int
    y: int

    @property
    def parent(self) -> TileId:
        """The tile of the next coarser zoom level that contains this one."""
        return TileId(self.z - 1, self.x >> 1, self.y >> 1)


def inflate(data: bytes, limit: int) -> bytes:
    """Unpack gzip or zlib data of at most ``limit`` bytes. Raises ValueError."""
    unpacker = zlib.decompressobj(wbits=47)  # either header
    try:
        content = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"damaged compressed data ({error})") from None
    if len(content) > limit:
        raise ValueError(f"compressed data unpacks to more than {limit / 1e6:.0f} MB")
    if not unpacker.eof:
        raise ValueError("compressed data is truncated")
    return content


def checked_zooms(path: str, least: Any, most: Any) -> tuple[int, int]:
    """Return an archive's zoom levels. Raises MapOpenError unless they are sensible."""
    try:
        first, last = int(least), int(most)
    except (TypeError, ValueError, OverflowError):
        first, last = -1, -1
    if not 0 <= first <= last <= DEEPEST_ZOOM:
        raise MapOpenError(
            f"cannot open {path}: zoom levels {shown(least, 40)} to {shown(most, 40)} are not within "
            f"0 to {DEEPEST_ZOOM}"
        )
    return first, last


def checked_bounds(
    south: float, west: float, north: float, east: float
) -> tuple[float, float, float, float] | None:
    """Return an archive's bounds, None unless they are sensible."""
    usable = -90.0 <= south < north <= 90.0 and -360.0 <= west <= 360.0 and -360.0 <= east <= 360.0
    return (south, west, north, east) if usable else None


def plain_text(html: object) -> str:
    """Return an archive's attribution without its HTML tags."""
    return shown(re.sub(r"<[^>]*>", "", str(html)[:_MAX_ATTRIBUTION]))


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
            # A table may be a view of anything, endless recursions included.
            with closing(self._connect()) as file, _until(file, time.monotonic() + _OPEN_S):
                rows = file.execute("SELECT name, value FROM metadata LIMIT 1000")
                metadata = {str(k): str(v) for k, v in rows}
                zooms = file.execute("SELECT MIN(zoom_level), MAX(zoom_level) FROM tiles").fetchone()
        except (sqlite3.Error, OverflowError, MemoryError, UnicodeError) as error:
            raise MapOpenError(f"cannot open {path}: {_sqlite_reason(error)}") from None
        if zooms[0] is None:
            raise MapOpenError(f"{path} holds no tiles")
        self.min_zoom, self.max_zoom = checked_zooms(path, *zooms)
        if (kind := metadata.get("format", "png").lower()) in ("pbf", "mvt"):
            raise MapOpenError(f"{path} holds vector tiles ({kind}), not images")
        self.attribution = plain_text(metadata.get("attribution", ""))
        try:
            west, south, east, north = (float(v) for v in metadata["bounds"].split(","))
            self.bounds = checked_bounds(south, west, north, east)
        except (KeyError, ValueError):
            self.bounds = None  # optional in the specification

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """See :meth:`TileSource.get`."""
        query = (
            "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ? LIMIT 1"
        )
        found: dict[TileId, bytes | None] = {}
        try:
            connection = self._connection()
            with _until(connection, deadline):
                for tile in tiles:
                    row = connection.execute(query, (tile.z, tile.x, 2**tile.z - 1 - tile.y)).fetchone()
                    found[tile] = _blob(row[0]) if row and row[0] else None
        except (sqlite3.Error, OverflowError, MemoryError, ValueError) as error:
            raise MapUnavailableError(f"cannot read {self.name}: {_sqlite_reason(error)}") from None
        return found

    def close(self) -> None:
        """See :meth:`TileSource.close`."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def _connect(self) -> sqlite3.Connection:
        # close() may be called from any thread.
        connection = sqlite3.connect(self._uri, uri=True, check_same_thread=False)
        # Functions in views have no side effects.
        connection.execute("PRAGMA trusted_schema = OFF")
        if hasattr(connection, "setlimit"):  # from Python 3.11 on
            connection.setlimit(_LIMIT_LENGTH, MAX_TILE_BYTES)
        return connection

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's own connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            with self._lock:
                self._connections.append(connection)
        return connection


@contextmanager
def _until(connection: sqlite3.Connection, deadline: float) -> Iterator[None]:
    """Let queries inside end with an OperationalError at ``deadline`` (time.monotonic)."""
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)


def _sqlite_reason(error: Exception) -> str:
    return "it takes too long" if str(error) == "interrupted" else shown(error)


def _blob(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"a tile is {type(value).__name__}, not bytes")
    return value


# What reading a damaged PMTiles file raises.
_DAMAGE = (ValueError, IndexError, EOFError, OSError, OverflowError)


class PmtilesSource(TileSource):
    """A PMTiles (version 3) file on disk."""

    kind = "PMTiles"

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            # Not mapped into memory: a process that reads a truncated map is killed.
            self._file = open_regular(path)
        except (OSError, ValueError) as error:
            raise MapOpenError(f"cannot open {path}: {error}") from None
        # Parsing a directory takes milliseconds, and a drive needs only a few.
        self._directory = lru_cache(maxsize=16)(self._read_directory)
        try:
            start = os.pread(self._file.fileno(), 127, 0)
            if start[:8] != b"PMTiles\x03":
                raise ValueError("not a PMTiles version 3 file")
            self._header: dict[str, Any] = dict(deserialize_header(start))
            if self._header["internal_compression"] not in (Compression.NONE, Compression.GZIP):
                raise ValueError(f"unsupported compression {self._header['internal_compression'].name}")
            kind = self._header["tile_type"]
            if kind not in (TileType.PNG, TileType.JPEG, TileType.WEBP, TileType.UNKNOWN):
                raise ValueError(f"holds {kind.name} tiles; PNG, JPEG and WebP are supported")
            self._directory(self._header["root_offset"], self._header["root_length"])
            metadata = self._metadata()
            header = self._header
            self.min_zoom, self.max_zoom = checked_zooms(path, header["min_zoom"], header["max_zoom"])
        except MapOpenError:
            self._file.close()
            raise
        except (*_DAMAGE, KeyError, struct.error, RecursionError) as error:
            self._file.close()
            raise MapOpenError(f"cannot open {path}: {str(error) or type(error).__name__}") from None
        south, west = header["min_lat_e7"] / 1e7, header["min_lon_e7"] / 1e7
        north, east = header["max_lat_e7"] / 1e7, header["max_lon_e7"] / 1e7
        self.bounds = checked_bounds(south, west, north, east)
        self.attribution = plain_text(metadata.get("attribution", ""))

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """See :meth:`TileSource.get`."""
        del deadline  # a local read
        try:
            return {tile: self._tile(tile) for tile in tiles}
        except _DAMAGE as error:
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
                return inflate(data, MAX_TILE_BYTES) if data[:2] == b"\x1f\x8b" else data
            offset, length = self._header["leaf_directory_offset"] + entry.offset, entry.length
        raise ValueError("directories nested too deep")

    def _read_directory(self, offset: int, length: int) -> list[Any]:
        data = self._bytes(offset, length)
        if self._header["internal_compression"] == Compression.GZIP:
            data = inflate(data, _MAX_DIRECTORY_BYTES)
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory has {len(data)} bytes, at most {_MAX_DIRECTORY_BYTES} are read")
        # Numbers of more than 64 bits, and more entries than four numbers each leave room for.
        if _LONG_NUMBER.search(data) or 4 * read_varint(io.BytesIO(data)) > len(data):
            raise ValueError("a damaged directory")
        return deserialize_directory(gzip.compress(data, compresslevel=0))  # what the parser expects

    def _metadata(self) -> dict[str, Any]:
        data = self._bytes(self._header["metadata_offset"], self._header["metadata_length"])
        if self._header["internal_compression"] == Compression.GZIP and data:
            data = inflate(data, MAX_TILE_BYTES)
        parsed = json.loads(data) if data else {}
        return parsed if isinstance(parsed, dict) else {}

    def _bytes(self, offset: int, length: int) -> bytes:
        if length > MAX_TILE_BYTES:
            raise ValueError(f"a part of {length} bytes, at most {MAX_TILE_BYTES} are read")
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise ValueError("the file is truncated")
        return data
