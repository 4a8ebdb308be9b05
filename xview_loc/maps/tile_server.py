"""Tiles of XYZ servers, fetched over HTTP and kept in a disk cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import struct
import tempfile
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from xview_loc.errors import shown
from xview_loc.files import others_can_write, read_regular
from xview_loc.images import ImageError, check_complete
from xview_loc.maps.base import LOG_REDACTOR, MapOpenError, MapOptions, MapUnavailableError, redact
from xview_loc.maps.sources import MAX_TILE_BYTES, TileId, TileSource, inflate

LOG = logging.getLogger(__name__)
PARALLEL_REQUESTS = 8
ATTEMPTS = 3
FIRST_BACKOFF_S = 0.2
SOCKET_TIMEOUT_S = 5.0
MISSING_KEPT_S = 86_400.0
MAX_REDIRECTS = 5
# Every request is a line at INFO.
for _library in ("httpx", "httpcore"):
    logging.getLogger(_library).setLevel(logging.WARNING)
    LOG_REDACTOR.watch(_library)


class _RedirectError(Exception):
    """A redirection that is not followed; the message says where to."""


class _UnusableAnswerError(Exception):
    """What a server sent is too large, or encoded as nobody asked for."""


class HttpSource(TileSource):
    """Tiles of an XYZ server, fetched in parallel and kept on disk.

    HTTP 204, 404 and 410 mean no imagery. Any other answer that is not a complete image raises
    MapUnavailableError; failures that may be temporary are retried until the deadline. GDAL's fetcher lacks
    this total deadline, missing single tiles, and errors that name their causes.
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
        # Any value in the query may be a key, whatever its name.
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
                limits=httpx.Limits(max_connections=PARALLEL_REQUESTS),
            )
        except (httpx.InvalidURL, ValueError, TypeError):
            # The error's text may hold the key.
            raise MapOpenError(f"{self.name}: not a valid URL, or a header that cannot be sent") from None
        self._closing = threading.Event()
        # Connections, to end those on which a server lets an answer drip.
        self._sockets: weakref.WeakSet[Any] = weakref.WeakSet()

    def get(self, tiles: Sequence[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """See :meth:`TileSource.get`."""
        found: dict[TileId, bytes | None] = {}
        absent = []
        missing_kept_s = None if self._offline else MISSING_KEPT_S
        for tile in tiles:
            cached = self._cache.read(tile, missing_kept_s) if self._cache else None
            if cached is None:
                absent.append(tile)
            else:
                found[tile] = cached or None
        if absent and self._offline:
            raise MapUnavailableError(
                f"{self._describe(absent[0])}: offline and not in the cache"
                f" ({len(absent)} of {len(tiles)} tiles)"
            )
        return found | self._fetch_all(absent, deadline)

    def learn_side(self, side: int) -> None:
        """See :meth:`TileSource.learn_side`; kept on disk, for an offline drive to ask for the same tiles."""
        super().learn_side(side)
        if self._cache:
            self._cache.write_side(side)

    def close(self) -> None:
        """See :meth:`TileSource.close`."""
        self._closing.set()
        self._client.close()

    def _fetch_all(self, tiles: list[TileId], deadline: float) -> dict[TileId, bytes | None]:
        """Fetch tiles in parallel. Raises the first error, and asks for no more tiles then."""
        waiting, found = deque(tiles), dict[TileId, bytes | None]()
        answers: queue.SimpleQueue[tuple[TileId, bytes | None, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            with contextlib.suppress(IndexError):  # nothing waits any more
                while True:
                    tile = waiting.popleft()
                    try:
                        answers.put((tile, self._fetch(tile, deadline), None))
                    except Exception as error:
                        answers.put((tile, None, error))

        for _ in tiles[:PARALLEL_REQUESTS]:
            # Not a pool: the end of the process waits for its threads, for as long as the server hangs.
            threading.Thread(target=work, name="map-tiles", daemon=True).start()
        try:
            for _ in tiles:
                tile, data, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
                if error is not None:
                    raise error
                found[tile] = data
        except queue.Empty:
            for socket in list(self._sockets):
                with contextlib.suppress(OSError):
                    socket.shutdown(2)
            late = next(tile for tile in tiles if tile not in found)
            raise MapUnavailableError(f"{self._describe(late)}: no answer before the deadline") from None
        finally:
            waiting.clear()
        return found

    def _url(self, tile: TileId) -> str:
        url = self._template.replace("{z}", str(tile.z)).replace("{x}", str(tile.x))
        url = url.replace("{y}", str(tile.y)).replace("{-y}", str(2**tile.z - 1 - tile.y))
        return url.replace("{key}", self._key)

    def _describe(self, tile: TileId) -> str:
        template = redact(self._template, (self._key,) if self._key else ())
        where = f"{tile.z}/{tile.x}/{tile.y}"
        filled = template.replace("{z}/{x}/{y}", where)
        return filled if filled != template else f"{template} (tile {where})"

    def _fetch(self, tile: TileId, deadline: float) -> bytes | None:
        problem = "no time left"
        for attempt in range(ATTEMPTS):
            if self._closing.is_set():
                problem = "the map is closed"
                break
            if time.monotonic() >= deadline:
                break
            temporary = True
            try:
                status, data = self._request(self._url(tile), deadline)
            except _RedirectError as error:
                problem, temporary = str(error), False
            except httpx.TimeoutException:
                problem = "timed out"
            except httpx.RemoteProtocolError:
                problem = "the connection broke off (truncated answer)"
            except _UnusableAnswerError as error:
                problem = f"unusable answer: {error}"
            except httpx.HTTPError as error:
                # Only the type of the error: its text may hold the URL.
                problem = f"cannot reach the server ({type(error).__name__})"
            except RuntimeError:  # the client was closed meanwhile
                if not self._closing.is_set():
                    raise
                problem = "the map is closed"
            else:
                if status in (204, 404, 410):
                    self._keep(tile, b"")
                    return None
                if status == 200:
                    try:
                        check_complete(data)
                    except ImageError as error:
                        problem = f"unusable answer: {error}"
                    else:
                        self._keep(tile, data)
                        return data
                else:
                    problem = f"HTTP {status}" + (" (is the key right?)" if status in (401, 403) else "")
                    temporary = status in (408, 425, 429) or status >= 500
            if not temporary or attempt + 1 == ATTEMPTS:
                break
            self._closing.wait(min(FIRST_BACKOFF_S * 2**attempt, max(0.0, deadline - time.monotonic())))
        raise MapUnavailableError(f"{self._describe(tile)}: {problem}")

    def _request(self, url: str, deadline: float) -> tuple[int, bytes]:
        # Images are compressed already, and httpx unpacks without a limit.
        headers, trace = {"Accept-Encoding": "identity"}, {"trace": self._notice_connection}
        request = self._client.build_request("GET", url, headers=headers, extensions=trace)
        for _ in range(MAX_REDIRECTS + 1):
            status, data, onward = self._answer(request, deadline)
            if onward is None:
                return status, data
            if (onward.url.scheme, onward.url.netloc) != (request.url.scheme, request.url.netloc):
                # It would get headers and key.
                other = f"{onward.url.scheme}://{onward.url.netloc.decode()}"
                raise _RedirectError(
                    f"redirected to {other}, which is not followed: name it in the map's URL"
                )
            request = onward
        raise _RedirectError("redirected without end")

    def _answer(self, request: httpx.Request, deadline: float) -> tuple[int, bytes, httpx.Request | None]:
        """Return status, body, and where the answer redirects to."""
        left = max(0.05, min(SOCKET_TIMEOUT_S, deadline - time.monotonic()))
        request.extensions["timeout"] = httpx.Timeout(left).as_dict()
        response = self._client.send(request, stream=True)
        with contextlib.closing(response):
            if response.next_request is not None:
                return response.status_code, b"", response.next_request
            chunks, length = [], 0
            for chunk in response.iter_raw():
                chunks.append(chunk)
                length += len(chunk)
                if time.monotonic() > deadline:
                    # A socket's timeout bounds a single read; the server may send byte by byte.
                    raise httpx.ReadTimeout("deadline")
                if length > MAX_TILE_BYTES:
                    raise _UnusableAnswerError(f"more than {MAX_TILE_BYTES >> 20} MB")
            data = b"".join(chunks)
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if data and encoding in ("gzip", "x-gzip", "deflate"):
                try:
                    data = inflate(data, MAX_TILE_BYTES)
                except ValueError as error:
                    raise _UnusableAnswerError(str(error)) from None
            elif data and encoding not in ("", "identity"):
                raise _UnusableAnswerError(f"encoded as {shown(encoding, 40)}, which was not asked for")
            return response.status_code, data, None

    def _notice_connection(self, event: str, info: dict[str, Any]) -> None:
        """Remember the socket of a new connection; called by httpx at every step of a request."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _keep(self, tile: TileId, data: bytes) -> None:
        if self._cache is not None:
            self._cache.write(tile, data)


class TileCache:
    """Encoded tiles on disk, each with a checksum; several processes may share it.

    A file is a header (magic, CRC-32 of time and image, time of writing) followed by the image, which is
    empty if the server has no imagery. Files are renamed into place, and ignored unless the checksum matches.
    Above the size limit the least recently used are deleted.
    """

    HEADER = struct.Struct("<4sId")
    MAGIC = b"XVT1"

    def __init__(self, directory: Path, limit_mb: float) -> None:
        self.directory = directory
        self._limit = limit_mb * 1e6
        self._size: float | None = None
        self._lock = threading.Lock()
        self._warned = False
        with contextlib.suppress(OSError):
            if others_can_write(directory.parent) or others_can_write(directory):
                LOG.warning("another user can write to %s, and change what the map shows", directory)

    def read(self, tile: TileId, missing_kept_s: float | None) -> bytes | None:
        """Return the image, b"" if the server had none, or None if the tile is not in the cache.

        An answer that there is no imagery counts for ``missing_kept_s`` seconds; None: for ever.
        """
        path = self._path(tile)
        try:
            content = read_regular(path, MAX_TILE_BYTES + self.HEADER.size)
            magic, crc, written = self.HEADER.unpack_from(content)
        except (OSError, struct.error):
            return None
        data = content[self.HEADER.size :]
        if magic != self.MAGIC or crc != self._crc(data, written):
            return None
        if not data and missing_kept_s is not None and abs(time.time() - written) > missing_kept_s:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use, for eviction
        return data

    def write(self, tile: TileId, data: bytes) -> None:
        """Keep a tile. A full or read-only disk is logged once, and no error."""
        now = time.time()
        content = self.HEADER.pack(self.MAGIC, self._crc(data, now), now) + data
        if self._replace(self._path(tile), content):
            self._account(len(content))

    def read_side(self) -> int | None:
        """Return the side of the server's tiles in pixels, None if it is not known yet."""
        try:
            side = int(read_regular(self.directory / "tile_side", 16))
        except (OSError, ValueError):
            return None
        return side if 16 <= side <= 4096 else None

    def write_side(self, side: int) -> None:
        """Keep the side of the server's tiles in pixels."""
        self._replace(self.directory / "tile_side", str(side).encode())

    def _replace(self, path: Path, content: bytes) -> bool:
        """Write a file and rename it into place; return False if that failed."""
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
        """Add a file's bytes; above the limit delete files down to nine tenths of it."""
        with self._lock:
            if self._size is not None and self._size + added <= self._limit:
                self._size += added
                return
            files = sorted(self._files())
            self._size = float(sum(size for _, size, _ in files))
            if self._size <= self._limit:
                return
            for _, size, path in files:
                if self._size <= 0.9 * self._limit:
                    break
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                    self._size -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        # Time of last use, bytes and path of each.
        files = []
        for folder, _, names in os.walk(self.directory):
            for path in (Path(folder, name) for name in names if name.endswith((".tile", ".part"))):
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    files.append((stat.st_mtime, stat.st_size, path))
        return files
