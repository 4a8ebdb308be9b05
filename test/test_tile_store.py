from __future__ import annotations

import threading

import numpy as np
import pytest

from xview_loc.geodesy import LocalProjection, snap_to_grid
from xview_loc.maps.base import AerialMap, AerialTile, MapUnavailableError
from xview_loc.maps.store import TILES_AHEAD, TileStore

LAT, LON = 48.2, 16.3
WAIT_S = 10.0


class FakeMap(AerialMap):
    """Counts what is asked of it; can fail, or wait until told to go on."""

    def __init__(self):
        self.asked = []
        self.fail = False
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)

    def tile(self, lat, lon, size_px, gsd):
        self.asked.append((lat, lon))
        self.entered.release()
        assert self.go.wait(WAIT_S)
        if self.fail:
            raise MapUnavailableError("the server is down")
        return AerialTile(np.zeros((size_px, size_px, 3), np.uint8), lat, lon, gsd)


@pytest.fixture
def world():
    aerial = FakeMap()
    store = TileStore(aerial, 64, 0.5, snap_m=8.0, memory_tiles=4)
    yield aerial, store
    aerial.go.set()
    store.close()


def moved(east, north):
    return LocalProjection(LAT, LON).inverse(east, north)


def wait_for(condition):
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("did not happen in time")


def test_near_places_share_one_tile(world):
    aerial, store = world
    centre = snap_to_grid(LAT, LON, 8.0)
    plane = LocalProjection(*centre)
    first = store.around(*centre)
    assert store.around(*plane.inverse(3.0, -3.0)) is first
    assert store.around(*plane.inverse(9.0, 0.0)) is not first
    assert (first.lat, first.lon) == centre and len(aerial.asked) == 2
    assert first.key != store.around(*plane.inverse(9.0, 0.0)).key


def test_memory_is_bounded_and_keeps_the_recent(world):
    aerial, store = world
    first = store.around(LAT, LON)
    for i in range(1, 4):
        store.around(*moved(i * 10.0, 0.0))
    assert store.around(LAT, LON) is first  # used again, so not the oldest
    store.around(*moved(50.0, 0.0))
    assert store.around(LAT, LON) is first
    count = len(aerial.asked)
    store.around(*moved(10.0, 0.0))
    assert len(aerial.asked) == count + 1


def test_prefetch_loads_what_comes_next(world):
    aerial, store = world
    store.around(LAT, LON)
    store.prefetch(LAT, LON, (10.0, 0.0))
    wait_for(lambda: store.prefetched == TILES_AHEAD)
    ahead = snap_to_grid(*moved(8.0, 0.0), 8.0)
    assert ahead in aerial.asked
    count = len(aerial.asked)
    store.around(*ahead)
    store.prefetch(LAT, LON, (10.0, 0.0))
    assert len(aerial.asked) == count


def test_standing_still_loads_nothing(world):
    aerial, store = world
    for velocity in [(0.0, 0.0), (float("nan"), 1.0)]:
        store.prefetch(LAT, LON, velocity)
    store.close()
    assert aerial.asked == []


def test_waits_for_what_is_already_on_its_way(world):
    aerial, store = world
    aerial.go.clear()
    store.prefetch(LAT, LON, (10.0, 0.0))
    assert aerial.entered.acquire(timeout=WAIT_S)
    coming = aerial.asked[0]
    got = []
    waiter = threading.Thread(target=lambda: got.append(store.around(*coming)))
    waiter.start()
    aerial.go.set()
    waiter.join(WAIT_S)
    assert got and aerial.asked.count(coming) == 1


def test_failures_are_counted_and_tried_again(world):
    aerial, store = world
    aerial.fail = True
    store.prefetch(LAT, LON, (10.0, 0.0))
    wait_for(lambda: store.prefetch_errors == TILES_AHEAD)
    failed = aerial.asked[0]
    store.prefetch(LAT, LON, (10.0, 0.0))  # does not hammer a server that is down
    with pytest.raises(MapUnavailableError, match="down"):
        store.around(*failed)
    aerial.fail = False
    assert (store.around(*failed).lat, store.around(*failed).lon) == failed
    assert aerial.asked.count(failed) == 3


def test_closing(world):
    aerial, store = world
    store.prefetch(LAT, LON, (10.0, 0.0))
    store.close()
    store.close()
    count = len(aerial.asked)
    store.prefetch(*moved(500.0, 0.0), (10.0, 0.0))
    assert len(aerial.asked) == count
    assert not any(thread.name == "tile-prefetch" for thread in threading.enumerate())


def test_many_threads_load_each_tile_once(world):
    aerial, _ = world
    roomy = TileStore(aerial, 64, 0.5, snap_m=8.0, memory_tiles=50)
    places = [moved(i * 8.0, 0.0) for i in range(20)]

    def work():
        for place in places:
            roomy.around(*place)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(aerial.asked) == len({snap_to_grid(*place, 8.0) for place in places})


def test_wrong_size():
    with pytest.raises(ValueError, match="memory_tiles"):
        TileStore(FakeMap(), 64, 0.5, memory_tiles=0)
