"""Aerial tiles at hand while driving: snapped centres, kept in memory, loaded ahead of the motion."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future

from xview_loc.geodesy import LocalProjection, snap_to_grid
from xview_loc.maps.base import AerialMap, AerialTile, MapError

LOG = logging.getLogger(__name__)

HORIZON_S = 20.0
TILES_AHEAD = 2
RETRY_AFTER_S = 5.0

Centre = tuple[float, float]


class TileStore:
    """Tiles of one size and ground sample distance, about centres snapped to a grid.

    Frames close to each other get the very same ``AerialTile`` object, so what is computed from it can be
    kept too. Methods may be called from several threads.
    """

    def __init__(
        self, map: AerialMap, size_px: int, gsd: float, snap_m: float | None = None, memory_tiles: int = 16
    ) -> None:
        """``snap_m`` is the grid's spacing in metres, by default a quarter of the tile."""
        if memory_tiles < 1:
            raise ValueError(f"memory_tiles must be at least 1, got {memory_tiles}")
        self.map = map
        self.size_px = size_px
        self.gsd = gsd
        self.snap_m = size_px * gsd / 4.0 if snap_m is None else snap_m
        self.prefetched = 0
        self.prefetch_errors = 0
        self._memory_tiles = memory_tiles
        self._tiles: OrderedDict[Centre, AerialTile] = OrderedDict()
        self._loading: dict[Centre, Future[AerialTile]] = {}
        self._failed_at: dict[Centre, float] = {}
        self._wanted: list[Centre] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def around(self, lat: float, lon: float) -> AerialTile:
        """The tile whose snapped centre is nearest to the place.

        Waits for the prefetch thread if it is loading this very tile. Raises what the map raises
        (MapError); the next call tries again.
        """
        return self._get(snap_to_grid(lat, lon, self.snap_m))

    def prefetch(self, lat: float, lon: float, velocity_en: tuple[float, float]) -> None:
        """Load the next tiles ahead in the background; returns at once.

        ``velocity_en`` is (east, north) in m/s. Failures are counted, and come up again in ``around``.
        """
        wanted = self._ahead(lat, lon, velocity_en)
        with self._changed:
            if self._closed:
                return
            now = time.monotonic()
            # The newest motion alone counts: what was wanted before may lie behind by now.
            self._wanted = [
                centre
                for centre in wanted
                if centre not in self._tiles
                and centre not in self._loading
                and now - self._failed_at.get(centre, -math.inf) > RETRY_AFTER_S
            ]
            if not self._wanted:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tile-prefetch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Stop the prefetch thread, after the tile it is at; the map stays open."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _ahead(self, lat: float, lon: float, velocity_en: tuple[float, float]) -> list[Centre]:
        speed = math.hypot(*velocity_en)
        if not (math.isfinite(speed) and speed > 0.0):
            return []
        here = snap_to_grid(lat, lon, self.snap_m)
        place = LocalProjection(lat, lon)
        centres: list[Centre] = []
        # Half a grid step at a time, so that no tile on the way is jumped over.
        steps = min(math.ceil(speed * HORIZON_S / (self.snap_m / 2.0)), 8 * TILES_AHEAD)
        for step in range(1, steps + 1):
            metres = min(step * self.snap_m / 2.0, speed * HORIZON_S)
            east, north = (component / speed * metres for component in velocity_en)
            centre = snap_to_grid(*place.inverse(east, north), self.snap_m)
            if centre != here and centre not in centres:
                centres.append(centre)
        return centres[:TILES_AHEAD]

    def _get(self, centre: Centre) -> AerialTile:
        with self._changed:
            if centre in self._tiles:
                self._tiles.move_to_end(centre)
                return self._tiles[centre]
            future = self._loading.get(centre)
            mine = future is None
            if future is None:
                future = self._loading[centre] = Future()
        if mine:
            self._load(centre, future)
        return future.result()

    def _load(self, centre: Centre, future: Future[AerialTile]) -> None:
        try:
            tile = self.map.tile(*centre, self.size_px, self.gsd)
        except BaseException as error:
            with self._changed:
                del self._loading[centre]
            future.set_exception(error)
            return
        with self._changed:
            del self._loading[centre]
            self._failed_at.pop(centre, None)
            self._tiles[centre] = tile
            while len(self._tiles) > self._memory_tiles:
                self._tiles.popitem(last=False)
        future.set_result(tile)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                centre = self._wanted.pop(0)
                if centre in self._tiles or centre in self._loading:
                    continue
            try:
                self._get(centre)
                self.prefetched += 1
            except MapError as error:
                LOG.debug("prefetch: %s", error)
                self._count_failure(centre)
            except Exception:
                # The thread must outlive a bug; around() will raise the same error where it is seen.
                LOG.exception("prefetch failed")
                self._count_failure(centre)

    def _count_failure(self, centre: Centre) -> None:
        with self._changed:
            self.prefetch_errors += 1
            if len(self._failed_at) > 1000:
                self._failed_at.clear()
            self._failed_at[centre] = time.monotonic()
