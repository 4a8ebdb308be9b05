from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from xview_loc.geodesy import LocalProjection, snap_to_grid
from xview_loc.maps.base import AerialMap, AerialTile, MapUnavailableError, NoImageryError
from xview_loc.maps.store import RETRY_AFTER_S, TILES_AHEAD, TileStore

LAT, LON = 48.2, 16.3
WAIT_S = 300.0
SOON = 1e-3


class FakeMap(AerialMap):
    """Records requests; can fail, or hang until ``go`` is set."""

    def __init__(self):
        self.asked = []
        self.error = None
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)

    def tile(self, lat, lon, size_px, gsd):
        self.asked.append((lat, lon))
        self.entered.release()
        assert self.go.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return AerialTile(np.zeros((size_px, size_px, 3), np.uint8), lat, lon, gsd)


@pytest.fixture
def world():
    aerial = FakeMap()
    store = TileStore(aerial, 64, 0.5, snap_m=8.0, memory_tiles=4)
    yield aerial, store
    aerial.go.set()
    store.close()


@pytest.fixture
def clock(monkeypatch):
    """The store's clock; it stands still unless the test sets it."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("xview_loc.maps.store.time", clock)
    return clock


def moved(east, north):
    return LocalProjection(LAT, LON).inverse(east, north)


def eventually(call):
    """Call again until it does not raise MapUnavailableError any more."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.002)):
        with contextlib.suppress(MapUnavailableError):
            return call()
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
    for _ in range(1 + TILES_AHEAD):
        assert aerial.entered.acquire(timeout=WAIT_S)
    ahead = snap_to_grid(*moved(8.0, 0.0), 8.0)
    assert ahead in aerial.asked[1:]
    for centre in aerial.asked[1:]:
        store.around(*centre)
    assert len(aerial.asked) == 1 + TILES_AHEAD


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


def test_failed_prefetches_are_not_repeated_at_once(world):
    aerial, store = world
    aerial.error = MapUnavailableError("the server is down")
    store.prefetch(LAT, LON, (10.0, 0.0))
    for _ in range(TILES_AHEAD):
        assert aerial.entered.acquire(timeout=WAIT_S)
    failed = aerial.asked[0]
    store.prefetch(LAT, LON, (10.0, 0.0))
    with pytest.raises(MapUnavailableError, match="down"):
        store.around(*failed)
    aerial.error = None
    assert (store.around(*failed).lat, store.around(*failed).lon) == failed
    assert aerial.asked.count(failed) == 3


def test_a_hanging_map_is_waited_for_once(world, clock):
    aerial, store = world
    here = store.around(LAT, LON)
    aerial.go.clear()
    with pytest.raises(MapUnavailableError, match=r"not answered within 0\.001 s"):
        store.around(*moved(20.0, 0.0), wait_s=SOON)
    for _ in range(2):
        assert aerial.entered.acquire(timeout=WAIT_S)
    # These would block for a minute each.
    for place in [moved(20.0, 0.0), moved(40.0, 0.0)]:
        with pytest.raises(MapUnavailableError, match=r"not answered within 0\.001 s"):
            store.around(*place, wait_s=WAIT_S)
    assert store.around(LAT, LON, wait_s=SOON) is here
    store.prefetch(LAT, LON, (0.0, 10.0))
    assert len(aerial.asked) == 2
    # The load went on meanwhile.
    aerial.go.set()
    late = eventually(lambda: store.around(*moved(20.0, 0.0), wait_s=SOON))
    assert (late.lat, late.lon) == aerial.asked[1] and len(aerial.asked) == 2
    # The map has answered: it is asked again.
    assert store.around(*moved(40.0, 0.0), wait_s=WAIT_S).lat


def test_a_failing_map_is_asked_again_after_a_while(world, clock):
    aerial, store = world
    aerial.error = MapUnavailableError("the server is down")
    for _ in range(3):
        with pytest.raises(MapUnavailableError, match="the server is down"):
            store.around(LAT, LON, wait_s=WAIT_S)
    assert len(aerial.asked) == 1
    with pytest.raises(MapUnavailableError, match="the server is down"):
        store.around(LAT, LON)  # who can wait asks every time
    assert len(aerial.asked) == 2
    aerial.error = None
    clock.now += RETRY_AFTER_S
    assert store.around(LAT, LON, wait_s=WAIT_S).size_px == 64


def test_the_reason_of_a_late_failure_is_remembered(world):
    aerial, store = world
    aerial.go.clear()
    aerial.error = MapUnavailableError("the server is down")
    with pytest.raises(MapUnavailableError, match="not answered"):
        store.around(LAT, LON, wait_s=SOON)
    aerial.go.set()
    with pytest.raises(MapUnavailableError, match="the server is down"):
        store.around(LAT, LON)


def test_no_imagery_is_no_outage(world):
    aerial, store = world
    aerial.error = NoImageryError("the map ends here")
    with pytest.raises(NoImageryError):
        store.around(LAT, LON, wait_s=WAIT_S)
    aerial.error = None
    assert store.around(*moved(20.0, 0.0), wait_s=WAIT_S).size_px == 64


def test_a_slow_prefetch_does_not_hold_up_a_request(world):
    aerial, store = world
    aerial.go.clear()
    store.prefetch(LAT, LON, (10.0, 0.0))
    assert aerial.entered.acquire(timeout=WAIT_S)
    request = threading.Thread(target=store.around, args=(LAT, LON, WAIT_S))
    request.start()
    assert aerial.entered.acquire(timeout=WAIT_S)
    assert aerial.asked[-1] == snap_to_grid(LAT, LON, 8.0)
    aerial.go.set()
    request.join(WAIT_S)


def test_closing_does_not_wait_for_a_hanging_map(world):
    aerial, store = world
    aerial.go.clear()
    store.prefetch(LAT, LON, (10.0, 0.0))
    with pytest.raises(MapUnavailableError):
        store.around(LAT, LON, wait_s=SOON)
    for _ in range(2):
        assert aerial.entered.acquire(timeout=WAIT_S)
    store.close()
    store.close()
    assert not aerial.go.is_set()
    with pytest.raises(MapUnavailableError, match="closed"):
        store.around(*moved(500.0, 0.0), wait_s=WAIT_S)
    count = len(aerial.asked)
    store.prefetch(*moved(500.0, 0.0), (10.0, 0.0))
    aerial.go.set()
    for thread in store._threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert len(aerial.asked) == count


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
