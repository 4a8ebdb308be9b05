"""Images and maps from outside are read within bounded memory and time, each fault is one clear line."""

from __future__ import annotations

import gzip
import os
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zstandard
from peak_memory import peak_mb
from pmtiles.tile import Compression, Entry, TileType, serialize_directory, serialize_header

from xview_loc.images import MAX_PIXELS, ImageError, check_size, decode_compressed
from xview_loc.maps import open_map, sources
from xview_loc.maps.base import MapError, MapOpenError, MapOptions, MapUnavailableError

TILE = cv2.imencode(".png", np.full((256, 256, 3), 128, np.uint8))[1].tobytes()


def png(width: int, height: int, data: bytes, bits: int = 1) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


DECODE = """
import sys
from xview_loc.images import ImageError, decode_compressed
try:
    print(decode_compressed(open(sys.argv[1], "rb").read()).shape)
except ImageError as error:
    print(error)
"""


def test_an_image_that_decodes_to_gigabytes(tmp_path: Path) -> None:
    side = 30_000
    content = png(side, side, zlib.compress(bytes((side // 8 + 1) * side), 9))
    assert len(content) < 200_000
    (tmp_path / "a.png").write_bytes(content)
    peak, line = peak_mb(DECODE, tmp_path / "a.png")
    assert line == "the image has 30000 x 30000 pixels, at most 67 million are decoded" and peak < 1000


def encoded(suffix: str, width: int, height: int) -> bytes:
    quality = [cv2.IMWRITE_WEBP_QUALITY, 80] if suffix == ".webp" else []
    return cv2.imencode(suffix, np.zeros((height, width, 3), np.uint8), quality)[1].tobytes()


def extended_webp(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sizes + encoded(".webp", width, height)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("size", [(1, 1), (53, 37), (300, 40), (2000, 999)])
def test_the_declared_size_is_the_decoded_one(size: tuple[int, int]) -> None:
    """In every format: one pixel less is refused."""
    width, height = size
    lossless = cv2.imencode(".webp", np.zeros((height, width, 3), np.uint8))[1].tobytes()
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    contents = [encoded(suffix, *size) for suffix in (".jpg", ".png", ".webp")] + [lossless]
    contents.append(cv2.imencode(".jpg", np.zeros((height, width), np.uint8), progressive)[1].tobytes())
    contents.append(extended_webp(*size))
    for content in contents:
        assert decode_compressed(content).shape == (height, width, 3)
        check_size(content, width * height)
        with pytest.raises(ImageError, match=f"{width} x {height} pixels"):
            check_size(content, width * height - 1)


def test_markers_before_the_size_of_a_jpeg() -> None:
    """Bare markers and fill bytes hide nothing."""
    content = encoded(".jpg", 64, 48)
    for inserted in (b"\xff\x01", b"\xff\xff\xff\x01", b"\xff\xfe\x00\x04ab", b"\xff\xd3"):
        with pytest.raises(ImageError, match="64 x 48 pixels"):
            check_size(content[:2] + inserted + content[2:], 10)
    for cut in (content[:2], content[:20], b"\xff\xd8" + b"\xff" * 100, b"RIFF\0\0\0\0WEBPXXXX", TILE[:8]):
        with pytest.raises(ImageError, match="declares no size"):
            check_size(cut)


def test_large_panoramas_pass() -> None:
    assert decode_compressed(encoded(".jpg", 8192, 4096)).shape == (4096, 8192, 3)
    assert MAX_PIXELS >= 2 * 8192 * 4096


def mbtiles(path: Path, *statements: str, zoom: object = 0) -> Path:
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE metadata (name, value)")
        file.execute("CREATE TABLE tiles (zoom_level, tile_column, tile_row, tile_data)")
        file.execute("INSERT INTO tiles VALUES (?, 0, 0, ?)", (zoom, TILE))
        for statement in statements:
            file.execute(statement)
        file.commit()
    return path


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n)"


def test_endless_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is an endless recursion ends the opening, or the tile, at its deadline."""
    monkeypatch.setattr(sources, "_OPEN_S", 0.5)
    path, none = tmp_path / "a.mbtiles", "0 AS tile_column, 0 AS tile_row, NULL AS tile_data"
    endless = f"CREATE VIEW tiles AS {ENDLESS} SELECT i AS zoom_level, {none} FROM n"
    mbtiles(path, "DROP TABLE tiles", endless)
    with pytest.raises(MapOpenError, match="takes too long"):
        open_map(path)
    mbtiles(
        path, "DROP TABLE metadata", f"CREATE VIEW metadata AS {ENDLESS} SELECT i AS name, i AS value FROM n"
    )
    open_map(path).close()
    mbtiles(path)
    with closing(open_map(path, MapOptions(deadline_s=0.5))) as map:
        with closing(sqlite3.connect(path)) as file:
            file.execute("DROP TABLE tiles")
            file.execute(f"CREATE VIEW tiles AS {ENDLESS} SELECT i + 1 AS zoom_level, {none} FROM n")
        with pytest.raises(MapUnavailableError, match="takes too long"):
            map.tile(0.0, 0.0, 64, 100.0)


@pytest.mark.skipif(not hasattr(sqlite3.Connection, "setlimit"), reason="Python 3.10 cannot limit values")
def test_tiles_of_any_size(tmp_path: Path) -> None:
    one = "SELECT 0 AS zoom_level, 0 AS tile_column, 0 AS tile_row"
    path = mbtiles(
        tmp_path / "a.mbtiles",
        "DROP TABLE tiles",
        f"CREATE VIEW tiles AS {one}, zeroblob(900000000) AS tile_data",
    )
    with pytest.raises(MapError, match="too big"):
        open_map(path).tile(0.0, 0.0, 64, 100.0)


@pytest.mark.parametrize("zoom", [-1, 29, 1 << 40, "many", 1e300, b"x"])
def test_damaged_zooms(tmp_path: Path, zoom: object) -> None:
    with pytest.raises(MapOpenError, match=r"zoom levels .* are not within 0 to 28"):
        open_map(mbtiles(tmp_path / "a.mbtiles", zoom=zoom))


@pytest.mark.parametrize("bounds", ["nan,nan,nan,nan", "0,0,1e308,1e308", "-inf,-inf,inf,inf", "0,1,1,0"])
def test_damaged_bounds_are_none(tmp_path: Path, bounds: str) -> None:
    path = mbtiles(tmp_path / "a.mbtiles", f"INSERT INTO metadata VALUES ('bounds', '{bounds}')")
    with closing(open_map(path)) as map:
        assert map.info().bounds is None


def pmtiles(
    path: Path, root: bytes, tile: bytes = TILE, zooms: tuple[int, int] = (0, 0), extra: bytes = b""
) -> Path:
    header: dict[str, Any] = dict.fromkeys(
        ("addressed_tiles_count", "tile_entries_count", "tile_contents_count", "min_lon_e7", "min_lat_e7"), 0
    )
    header |= dict.fromkeys(("max_lon_e7", "max_lat_e7", "center_zoom", "center_lon_e7", "center_lat_e7"), 0)
    header |= {"root_offset": 127, "root_length": len(root), "clustered": True}
    header |= {"metadata_offset": 127 + len(root), "metadata_length": len(extra)}
    header |= {"leaf_directory_offset": 0, "leaf_directory_length": 0}
    header |= {"tile_data_offset": 127 + len(root) + len(extra), "tile_data_length": len(tile)}
    header |= {"internal_compression": Compression.GZIP, "tile_compression": Compression.NONE}
    header |= {"tile_type": TileType.PNG, "min_zoom": zooms[0], "max_zoom": zooms[1]}
    path.write_bytes(serialize_header(header) + root + extra + tile)
    return path


def directory(length: int, offset: int = 0) -> bytes:
    return serialize_directory([Entry(0, offset, length, 1)])


def test_pmtiles_that_unpack_to_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.pmtiles"
    bomb = gzip.compress(bytes(64 << 20))
    with closing(open_map(pmtiles(path, directory(len(TILE))))) as map:
        assert map.tile(0.0, 0.0, 64, 100.0).image.mean() == 128
    for root, extra, problem in (
        (bomb, b"", "unpacks to more than 1 MB"),
        (directory(9), bomb, "unpacks to more than 17 MB"),
        (gzip.compress(b"\xff" * 900_000 + b"\x01"), b"", "damaged directory"),
        (gzip.compress(b"\xff\xff\xff\xff\x07" + b"\x01" * 900_000), b"", "damaged directory"),
        (gzip.compress(b"\x01")[:-9], b"", "truncated"),
        (directory(9), gzip.compress(b"[" * 100_000), "recursion"),
    ):
        with pytest.raises(MapOpenError, match=problem):
            open_map(pmtiles(path, root, extra=extra))
    for root, tile, problem in (
        (directory(len(bomb)), bomb, "unpacks to more than 17 MB"),
        (directory(1 << 31), TILE, "at most 16777216 are read"),
        (directory(9, 1 << 62), TILE, "cannot read|truncated"),
    ):
        with (
            closing(open_map(pmtiles(path, root, tile))) as map,
            pytest.raises(MapUnavailableError, match=problem),
        ):
            map.tile(0.0, 0.0, 64, 100.0)
    with pytest.raises(MapOpenError, match="zoom levels 7 to 3"):
        open_map(pmtiles(path, directory(9), zooms=(7, 3)))
    with pytest.raises(MapOpenError, match="zoom levels 0 to 255"):
        open_map(pmtiles(path, directory(9), zooms=(0, 255)))


def test_an_archive_truncated_while_it_is_used(tmp_path: Path) -> None:
    """No signal kills the process."""
    path = pmtiles(tmp_path / "a.pmtiles", directory(1 << 16), os.urandom(1 << 16))
    with closing(open_map(path)) as map:
        os.truncate(path, 300)
        with pytest.raises(MapUnavailableError, match="truncated"):
            map.tile(0.0, 0.0, 64, 100.0)


@pytest.mark.parametrize("name", ["a.pmtiles", "a.mbtiles", "a.tif"])
def test_maps_that_are_no_files(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(MapOpenError, match="a pipe or a device"):
        open_map(tmp_path / name)


def test_tiles_of_a_damaged_size(tmp_path: Path) -> None:
    large = png(8000, 8000, zlib.compress(bytes(1001 * 8000)))
    with (
        closing(open_map(pmtiles(tmp_path / "a.pmtiles", directory(len(large)), large))) as map,
        pytest.raises(MapUnavailableError, match=r"tile 0/0/0: the image has 8000 x 8000 pixels"),
    ):
        map.tile(0.0, 0.0, 64, 100.0)


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except OSError:
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/{{z}}/{{x}}/{{y}}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def body(content: bytes, encoding: str | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        if encoding:
            request.send_header("Content-Encoding", encoding)
        request.end_headers()
        request.wfile.write(content)

    return answer


FETCH = """
import sys
from xview_loc.maps import open_map
from xview_loc.maps.base import MapError, MapOptions
try:
    print(open_map(sys.argv[1], MapOptions(deadline_s=60.0)).tile(0.0, 0.0, 64, 10000.0).image.mean())
except MapError as error:
    print(error)
"""


def test_bodies_that_unpack_to_gigabytes() -> None:
    for content, encoding, problem in (
        (gzip.compress(TILE), "gzip", "128.0"),
        (zlib.compress(TILE), "deflate", "128.0"),
        (gzip.compress(bytes(512 << 20), 1), "gzip", "unpacks to more than 17 MB"),
        (zstandard.compress(bytes(1 << 30)), "zstd", "encoded as zstd"),
        (b"x" * 100, "gzip", "damaged compressed data"),
        (b"x" * 100, "br\x1b[31m", "encoded as"),
    ):
        with server(body(content, encoding)) as url:
            peak, line = peak_mb(FETCH, url)
        assert problem in line and line.isprintable() and peak < 500, (encoding, line)


def fetching() -> int:
    return sum(thread.name == "map-tiles" for thread in threading.enumerate())


def test_a_server_that_drips(tmp_path: Path) -> None:
    """Header or body, byte by byte: it costs the deadline, leaves no thread behind, and may recover."""
    dripping, over = [b""], threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        if over.is_set():
            return body(TILE)(request)
        request.wfile.write(dripping[0])
        while not over.wait(0.05):
            request.wfile.write(b"x")
        raise OSError

    starts = (b"", b"HTTP/1.0 200 OK\r\nX-Long: ", b"HTTP/1.0 200 OK\r\nContent-Length: 99999\r\n\r\n")
    for number, start in enumerate(starts):
        dripping[0] = start
        over.clear()
        # Servers may get a port that an earlier one had, whose tiles a shared cache still holds.
        options = MapOptions(deadline_s=1.0, cache_dir=tmp_path / str(number))
        with server(answer) as url, closing(open_map(url, options)) as map:
            began = time.monotonic()
            with pytest.raises(MapUnavailableError, match=r"deadline|timed out|broke off"):
                map.tile(0.0, 0.0, 64, 100.0)
            assert time.monotonic() - began < 20.0
            while fetching():
                assert time.monotonic() - began < 60.0
                time.sleep(0.05)
            over.set()
            assert map.tile(0.0, 0.0, 64, 100.0).image.mean() == 128
