"""Aerial tiles for a moving vehicle: snapped centres, a cache in memory, prefetching, slow maps."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait

from xview_loc.geodesy import LocalProjection, snap_to_grid
from xview_loc.maps.base import AerialMap, AerialTile, MapError, MapUnavailableError

LOG = logging.getLogger(__name__)

HORIZON_S = 20.0
TILES_AHEAD = 2
# Tiles that are kept.
MEMORY_MB, LEAST_TILES = 64.0, 16
RETRY_AFTER_S = 5.0
CLOSE_WAIT_S = 0.5

Centre = tuple[float, float]


class TileStore:
    """Serve tiles of one size and ground sample distance, centred on the points of a grid.

    Frames close to each other get the same ``AerialTile`` object, so results computed from it can be
    reused. Methods may be called from several threads.
    """

    def __init__(
        self,
        map: AerialMap,
        size_px: int,
        gsd: float,
        snap_m: float | None = None,
        memory_tiles: int | None = None,
    ) -> None:
        """``snap_m``: grid spacing in metres, by default a quarter of a tile. ``memory_tiles``: number of
        tiles kept, by default as many as take 64 MB.
        """
        if memory_tiles is None:
            memory_tiles = max(LEAST_TILES, int(MEMORY_MB * 1e6 / (3 * size_px**2)))
        if memory_tiles < 1:
            raise ValueError(f"memory_tiles must be at least 1, got {memory_tiles}")
        self.map = map
        self.size_px = size_px
        self.gsd = gsd
        self.snap_m = size_px * gsd / 4.0 if snap_m is None else snap_m
        self._memory_tiles = memory_tiles
        self._tiles: OrderedDict[Centre, AerialTile] = OrderedDict()
        self._loading: dict[Centre, Future[AerialTile]] = {}
        # Tiles that a caller waits or waited for, for a limited time.
        self._awaited: set[Centre] = set()
        # Why the map is unavailable to such callers, and until when.
        self._outage = ("", -math.inf)
        self._requested: list[Centre] = []
        self._ahead: list[Centre] = []
        self._prefetch_failed_at: dict[Centre, float] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def around(self, lat: float, lon: float, wait_s: float | None = None) -> AerialTile:
        """Return the tile whose centre is nearest to the position.

        ``wait_s`` is the longest time to wait for the map, in seconds. The tile is loaded in the background,
        and a later call finds it. After a failure or a timeout, tiles not in memory fail at once for
        ``RETRY_AFTER_S``, so that a vehicle does not wait for the same map again and again. None waits as
        long as the map takes, and asks it every time. Raises NoImageryError, and MapUnavailableError if the
        map failed or did not answer in time.
        """
        centre = snap_to_grid(lat, lon, self.snap_m)
        with self._changed:
            if centre in self._tiles:
                self._tiles.move_to_end(centre)
                return self._tiles[centre]
            if wait_s is not None:
                self._raise_if_unavailable()
                self._awaited.add(centre)
            future = self._loading.get(centre)
            load_here = future is None and wait_s is None
            if future is None:
                future = self._loading[centre] = Future()
                if not load_here:
                    self._requested.append(centre)
                    self._wake_threads()
        if load_here:
            self._load(centre, future)
        if not wait([future], wait_s).done:
            with self._changed:
                if self._loading.get(centre) is future:
                    self._set_outage(f"the map has not answered within {wait_s:g} s")
                    self._raise_if_unavailable()
        return future.result()

    def prefetch(self, lat: float, lon: float, velocity_en: tuple[float, float]) -> None:
        """Load the next tiles ahead in the background; ``velocity_en`` is (east, north) in m/s.

        Return at once. Failures are logged at level DEBUG: :meth:`around` reports them.
        """
        ahead = self._centres_ahead(lat, lon, velocity_en)
        with self._changed:
            now = time.monotonic()
            if self._closed or now < self._outage[1]:
                return
            # Replace what was still to be prefetched: it may lie behind by now.
            failed_at = self._prefetch_failed_at
            self._ahead = [c for c in ahead if now - failed_at.get(c, -math.inf) > RETRY_AFTER_S]
            if self._ahead:
                self._wake_threads()

    def close(self) -> None:
        """Stop the background threads; the map stays open.

        A thread that waits for a slow map is left behind, and ends with the tile it is loading.
        """
        with self._changed:
            self._closed = True
            abandoned = [self._loading.pop(centre) for centre in self._requested]
            self._requested.clear()
            self._changed.notify_all()
        for future in abandoned:
            future.set_exception(MapUnavailableError("the tile store is closed"))
        for thread in self._threads:
            thread.join(CLOSE_WAIT_S)

    def _raise_if_unavailable(self) -> None:
        if self._closed:
            raise MapUnavailableError("the tile store is closed")
        reason, until = self._outage
        if time.monotonic() < until:
            raise MapUnavailableError(reason)

    def _set_outage(self, reason: str) -> None:
        self._outage = (reason, time.monotonic() + RETRY_AFTER_S)

    def _centres_ahead(self, lat: float, lon: float, velocity_en: tuple[float, float]) -> list[Centre]:
        speed = math.hypot(*velocity_en)
        if not (math.isfinite(speed) and speed > 0.0):
            return []
        here = snap_to_grid(lat, lon, self.snap_m)
        place = LocalProjection(lat, lon)
        centres: list[Centre] = []
        # Half a grid step at a time, so that no tile on the way is skipped.
        steps = min(math.ceil(speed * HORIZON_S / (self.snap_m / 2.0)), 8 * TILES_AHEAD)
        for step in range(1, steps + 1):
            metres = min(step * self.snap_m / 2.0, speed * HORIZON_S)
            east, north = (component / speed * metres for component in velocity_en)
            centre = snap_to_grid(*place.inverse(east, north), self.snap_m)
            if centre != here and centre not in centres:
                centres.append(centre)
        return centres[:TILES_AHEAD]

    def _load(self, centre: Centre, future: Future[AerialTile]) -> None:
        try:
            tile = self.map.tile(*centre, self.size_px, self.gsd)
        except BaseException as error:
            with self._changed:
                del self._loading[centre]
                if centre in self._awaited and isinstance(error, MapUnavailableError):
                    self._set_outage(str(error))
                self._awaited.discard(centre)
            future.set_exception(error)
            return
        with self._changed:
            del self._loading[centre]
            self._awaited.discard(centre)
            self._outage = ("", -math.inf)
            self._prefetch_failed_at.pop(centre, None)
            self._tiles[centre] = tile
            while len(self._tiles) > self._memory_tiles:
                self._tiles.popitem(last=False)
        future.set_result(tile)

    # Background threads: one for requested tiles, one for those ahead, so that neither waits for the other

    def _wake_threads(self) -> None:
        if not self._threads:
            for name, step in (("requested-tiles", self._load_requested), ("prefetch", self._load_ahead)):
                thread = threading.Thread(target=self._run, args=(step,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        self._changed.notify_all()

    def _run(self, step: Callable[[], None]) -> None:
        while not self._closed:
            step()

    def _load_requested(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._requested or self._closed)
            if self._closed:
                return
            centre = self._requested.pop(0)
            future = self._loading[centre]
        self._load(centre, future)

    def _load_ahead(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ahead or self._closed)
            if self._closed:
                return
            centre = self._ahead.pop(0)
            if centre in self._tiles or centre in self._loading:
                return
            future = self._loading[centre] = Future()
        self._load(centre, future)
        if error := future.exception():
            level = logging.DEBUG if isinstance(error, MapError) else logging.ERROR
            LOG.log(level, "prefetch: %s", error, exc_info=error)
            with self._changed:
                if len(self._prefetch_failed_at) > 1000:
                    self._prefetch_failed_at.clear()
                self._prefetch_failed_at[centre] = time.monotonic()
