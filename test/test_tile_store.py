"""Tiles shared between frames and fetched ahead of the motion."""

import threading

import numpy as np
import pytest

from xview_loc.geodesy import LocalProjection
from xview_loc.imagery import AerialMap, AerialTile, MapUnavailableError
from xview_loc.tile_store import TileStore

LAT, LON = 48.2, 16.37


class CountingMap(AerialMap):
    """Grey tiles; counts what is asked for, waits for ``gate``, fails on request."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []
        self.loaded = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False

    def tile(self, lat, lon, size_px, gsd) -> AerialTile:
        self.asked.append((lat, lon))
        try:
            assert self.gate.wait(10.0)
            if self.fail:
                raise MapUnavailableError("down")
            return AerialTile(np.zeros((size_px, size_px, 3), np.uint8), lat, lon, gsd, 1.0)
        finally:
            self.loaded.release()

    def close(self) -> None:
        pass


@pytest.fixture
def source():
    return CountingMap()


@pytest.fixture
def store(source):
    store = TileStore(source, 64, 0.5, memory_tiles=4)
    yield store
    source.gate.set()
    store.close()


def moved(east: float) -> tuple[float, float]:
    return LocalProjection(LAT, LON).inverse(east, 0.0)


def test_near_frames_share_one_tile(store, source):
    first = store.around(LAT, LON)
    assert store.around(first.lat, first.lon) is first
    assert len(source.asked) == 1


def test_the_least_recently_used_tile_is_let_go(store, source):
    first = store.around(*moved(0.0))
    for k in range(1, 5):
        store.around(*moved(50.0 * k))
    assert store.around(*moved(0.0)) is not first
    assert len(source.asked) == 6


def test_the_tile_ahead_is_there_before_it_is_needed(store, source):
    store.around(LAT, LON)
    assert source.loaded.acquire(timeout=10.0)
    store.prefetch(LAT, LON, (15.0, 0.0))
    assert source.loaded.acquire(timeout=10.0)
    ahead = source.asked[-1]
    count = source.asked.count(ahead)
    store.around(*ahead)
    assert source.asked.count(ahead) == count == 1


def test_a_tile_on_its_way_is_waited_for_not_fetched_twice(store, source):
    source.gate.clear()
    results: list[AerialTile] = []
    threads = [threading.Thread(target=lambda: results.append(store.around(LAT, LON))) for _ in range(4)]
    for thread in threads:
        thread.start()
    source.gate.set()
    for thread in threads:
        thread.join(10.0)
    assert len(source.asked) == 1
    assert len(results) == 4 and all(tile is results[0] for tile in results)


def test_a_failed_tile_is_tried_again(store, source):
    source.fail = True
    with pytest.raises(MapUnavailableError):
        store.around(LAT, LON)
    source.fail = False
    assert store.around(LAT, LON).valid_fraction == 1.0
