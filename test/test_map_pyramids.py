from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from map_fixtures import TileServer, reproject_geotiff, texture, write_geotiff, write_mbtiles, write_pmtiles

from xview_loc.images import ImageError, check_complete, decode_with_alpha
from xview_loc.maps import open_map
from xview_loc.maps.base import (
    MapError,
    MapOpenError,
    MapOptions,
    MapUnavailableError,
    NoImageryError,
)
from xview_loc.maps.sources import TileId
from xview_loc.maps.tile_server import TileCache

LAT, LON = 48.1853, 16.3119
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "aerial"
ZOOMS = (19, 20)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A synthetic scene of 170 m as every kind of map."""
    folder = tmp_path_factory.mktemp("scene")
    utm = write_geotiff(folder / "mgi.tif", texture(850, 850), LAT, LON, 0.2, "EPSG:31256")
    mercator = reproject_geotiff(utm, folder / "mercator.tif", "EPSG:3857")
    return {
        "mgi": str(utm),
        "mercator": str(mercator),
        "mbtiles": str(write_mbtiles(folder / "a.mbtiles", utm, ZOOMS)),
        "pmtiles": str(write_pmtiles(folder / "a.pmtiles", utm, ZOOMS)),
    }


def options(tmp_path, **more):
    return MapOptions(cache_dir=tmp_path / "cache", deadline_s=more.pop("deadline_s", 10.0), **more)


def shift_between(a, b):
    """Return the mean grey difference and the offset in pixels of two tiles."""
    grey = [cv2.cvtColor(t.image, cv2.COLOR_RGB2GRAY).astype(np.float64) for t in (a, b)]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_64F)
    (dx, dy), _ = cv2.phaseCorrelate(grey[0], grey[1], window)
    return float(np.abs(grey[0] - grey[1]).mean()), math.hypot(dx, dy)


@pytest.mark.parametrize("gsd", [0.14, 0.2, 0.3])
@pytest.mark.parametrize("kind", ["mercator", "mbtiles", "pmtiles"])
def test_every_kind_of_map_gives_the_same_tile(scene, kind, gsd):
    size = 256
    with open_map(scene["mgi"]) as reference, open_map(scene[kind]) as other:
        a, b = (
            reference.tile(LAT + 1e-4, LON - 2e-4, size, gsd),
            other.tile(LAT + 1e-4, LON - 2e-4, size, gsd),
        )
    assert a.valid_fraction == b.valid_fraction == 1.0
    difference, offset = shift_between(a, b)
    assert offset < 0.1
    assert difference < 2.0


def test_tile_server_gives_the_same_tile(scene, tmp_path):
    with (
        TileServer(scene["mgi"]) as server,
        open_map(server.url, options(tmp_path, max_zoom=20)) as web,
    ):
        b = web.tile(LAT, LON, 256, 0.14)
    with open_map(scene["mgi"]) as reference:
        difference, offset = shift_between(reference.tile(LAT, LON, 256, 0.14), b)
    assert offset < 0.1
    assert difference < 2.0


def test_real_orthophoto_agrees_between_forms(tmp_path):
    source = SHARED / "vienna_ortho_2023_30cm.tif"
    if not source.exists():
        pytest.skip("the shared orthophoto is not here")
    mbtiles = write_mbtiles(tmp_path / "v.mbtiles", source, [19])
    with open_map(source) as a, open_map(mbtiles) as b:
        for lat, lon in [(48.1853, 16.3119), (48.1845, 16.3105), (48.1862, 16.3130)]:
            _, offset = shift_between(a.tile(lat, lon, 512, 0.2), b.tile(lat, lon, 512, 0.2))
            assert offset < 0.1


def test_edges_are_invalid_in_every_form(scene, tmp_path):
    edge = (LAT, LON + 80.0 / (111_320.0 * math.cos(math.radians(LAT))))
    with TileServer(scene["mgi"]) as server:
        for source in [*scene.values(), server.url]:
            with open_map(source, options(tmp_path, max_zoom=20)) as aerial:
                tile = aerial.tile(*edge, 256, 0.2)
                assert 0.5 < tile.valid_fraction < 0.75
                assert tile.valid is not None and tile.valid[128, 10] and not tile.valid[128, 250]
                assert not tile.image[128, 250].any()
                with pytest.raises(NoImageryError):
                    aerial.tile(LAT + 1.0, LON, 256, 0.2)


def test_enlarges_beyond_the_deepest_zoom(scene, tmp_path):
    with TileServer(scene["mgi"], max_zoom=18) as server:
        with open_map(server.url, options(tmp_path, max_zoom=20)) as web:
            fallen_back = web.tile(LAT, LON, 256, 0.14)  # the server answers 404 below 18
        with open_map(server.url, options(tmp_path, max_zoom=18)) as web:
            told = web.tile(LAT, LON, 256, 0.14)
    assert fallen_back.valid_fraction == told.valid_fraction == 1.0
    assert shift_between(fallen_back, told)[1] < 0.1


def test_tiles_of_512_pixels(scene, tmp_path):
    with TileServer(scene["mgi"], side=512) as server:
        with open_map(server.url, options(tmp_path, max_zoom=20)) as web:
            tile = web.tile(LAT, LON, 256, 0.2)
        zooms = {int(path.split("/")[1]) for path in server.paths}
    assert 18 in zooms
    with open_map(scene["mgi"]) as reference:
        assert shift_between(reference.tile(LAT, LON, 256, 0.2), tile)[1] < 0.1


def test_across_the_antimeridian(tmp_path):
    with TileServer(None) as server, open_map(server.url, options(tmp_path)) as web:
        assert web.tile(-16.8, 180.0, 256, 0.3).valid_fraction == 1.0
        columns = {int(path.split("/")[2]) for path in server.paths}
    assert 0 in columns and 2**19 - 1 in columns


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", "HTTP 500"),
        ("403", "HTTP 403"),
        ("html", "HTML"),
        ("truncated", "truncated"),
        ("hang", "no answer|timed out"),
    ],
)
def test_faults_are_named_and_may_pass(scene, tmp_path, fault, cause):
    with (
        TileServer(scene["mgi"]) as server,
        open_map(server.url, options(tmp_path, deadline_s=1.5, max_zoom=20)) as web,
    ):
        server.fault = fault
        with pytest.raises(MapUnavailableError, match=cause) as caught:
            web.tile(LAT, LON, 128, 0.2)
        assert "\n" not in str(caught.value)
        server.fault = None
        deadline = time.monotonic() + 60.0
        while True:  # requests of the hung attempt may still hold a connection
            try:
                assert web.tile(LAT, LON, 128, 0.2).valid_fraction == 1.0
                break
            except MapUnavailableError:
                assert time.monotonic() < deadline


def test_server_gone(tmp_path):
    with TileServer(None) as server:
        url = server.url
    with (
        open_map(url, options(tmp_path, deadline_s=2.0)) as web,
        pytest.raises(MapUnavailableError, match="cannot reach"),
    ):
        web.tile(LAT, LON, 128, 0.2)


def test_slow_server_within_the_deadline(tmp_path):
    with TileServer(None) as server, open_map(server.url, options(tmp_path)) as web:
        server.fault = "slow"
        assert web.tile(LAT, LON, 128, 0.2).valid_fraction == 1.0


def test_missing_everywhere(tmp_path):
    with TileServer(None) as server, open_map(server.url, options(tmp_path)) as web:
        server.fault = "404"
        with pytest.raises(NoImageryError):
            web.tile(LAT, LON, 128, 0.2)


def test_offline_from_the_cache(scene, tmp_path):
    with TileServer(scene["mgi"]) as server:
        url = server.url
        with open_map(url, options(tmp_path, max_zoom=20)) as web:
            online = web.tile(LAT, LON, 128, 0.2)
    with open_map(url, options(tmp_path, max_zoom=20, offline=True)) as web:
        assert np.array_equal(web.tile(LAT, LON, 128, 0.2).image, online.image)
        with pytest.raises(MapUnavailableError, match="offline and not in the cache"):
            web.tile(LAT + 0.01, LON, 128, 0.2)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_cache_files_are_fetched_again(scene, tmp_path, damage):
    with TileServer(scene["mgi"]) as server:
        with open_map(server.url, options(tmp_path, max_zoom=20)) as web:
            before = web.tile(LAT, LON, 128, 0.2)
        files = list((tmp_path / "cache").rglob("*.tile"))
        asked = server.requests
        for file in files:
            data = bytearray(file.read_bytes())
            if damage == "flip":
                data[len(data) // 2] ^= 1
            file.write_bytes(
                data[: len(data) // 2] if damage == "truncate" else data if damage == "flip" else b""
            )
        with open_map(server.url, options(tmp_path, max_zoom=20)) as web:
            after = web.tile(LAT, LON, 128, 0.2)
        assert server.requests == asked + len(files)
        with open_map(server.url, options(tmp_path, max_zoom=20)) as web:
            web.tile(LAT, LON, 128, 0.2)
        assert server.requests == asked + len(files)  # now whole again
    assert np.array_equal(before.image, after.image)


def test_cache_size_is_bounded(tmp_path):
    cache = TileCache(tmp_path, limit_mb=0.1)
    for i in range(100):
        cache.write(TileId(10, i, 0), bytes(5000))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.tile"))
    assert 50_000 < size <= 105_100
    assert cache.read(TileId(10, 99, 0), None) == bytes(5000)
    assert cache.read(TileId(10, 0, 0), None) is None


def test_unwritable_cache_costs_only_the_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with TileServer(None) as server, open_map(server.url, MapOptions(cache_dir=blocked)) as web:
        assert web.tile(LAT, LON, 128, 0.2).valid_fraction == 1.0


def test_keys_reach_neither_errors_nor_logs(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "httpx")
    secret, other = "s3cret-K3y", "t0ken-in-query"
    with TileServer(None) as server:
        url = server.root + "/{key}/{z}/{x}/{y}.png?token=" + other + "&key={key}"
        chosen = options(
            tmp_path, api_key=secret, deadline_s=2.0, headers={"X-Auth": "h3ader"}, user_agent="ua/1"
        )
        texts = [repr(chosen)]
        with open_map(url, chosen) as web:
            web.tile(LAT, LON, 128, 0.2)
            assert server.headers["X-Auth"] == "h3ader" and server.headers["User-Agent"] == "ua/1"
            assert any(secret in path and other in path for path in server.paths)
            texts += [repr(web.info()), web.source.name]
            server.fault = "500"
            with pytest.raises(MapUnavailableError) as caught:
                web.tile(LAT + 1.0, LON, 128, 0.2)
            texts.append(str(caught.value))
            # Nothing that a traceback would print beside the message.
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None or caught.value.__suppress_context__
    texts.append(caplog.text)
    assert "HTTP Request" in caplog.text  # the library does log URLs
    for text in texts:
        for word in (secret, other, "h3ader"):
            assert word not in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://h/{z}/{x}.png", "lacks {y}"),
        ("http://h/{z}/{x}/{y}?k={key}", "asks for a key"),
        ("ftp://h/{z}/{x}/{y}", "starts with http"),
        ("https://h/a.pmtiles", "from disk only"),
        ("/nowhere/a.mbtiles", "no such file"),
        ("/nowhere/a.pmtiles", "no such file"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(MapOpenError, match=message):
        open_map(source, MapOptions(cache_dir=None))


@pytest.mark.parametrize("name", ["a.mbtiles", "a.pmtiles"])
@pytest.mark.parametrize("content", [b"", b"rubbish" * 100, b"PMTiles\x03" + bytes(200), b"PMTiles\x02"])
def test_damaged_files_do_not_open(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MapOpenError, match=name):
        open_map(path)


def test_truncated_pmtiles(scene, tmp_path):
    data = Path(scene["pmtiles"]).read_bytes()
    path = tmp_path / "cut.pmtiles"
    path.write_bytes(data[: len(data) // 8])
    with pytest.raises(MapUnavailableError, match="truncated"), open_map(path) as aerial:
        for i in range(40):
            aerial.tile(LAT + (i % 7 - 3) * 2e-4, LON + (i // 7 - 3) * 2e-4, 128, 0.2)


def test_info(scene):
    for kind, name in (("mbtiles", "MBTiles"), ("pmtiles", "PMTiles")):
        with open_map(scene[kind]) as aerial:
            info = aerial.info()
            assert info.kind == name and info.zooms == ZOOMS
            assert aerial.attribution == "Made for tests"
            assert info.bounds is not None and info.bounds[0] < LAT < info.bounds[2]


def test_threads_share_a_map(scene, tmp_path):
    with TileServer(scene["mgi"]) as server:
        for source in [*scene.values(), server.url]:
            with open_map(source, options(tmp_path, max_zoom=20)) as aerial:
                want = aerial.tile(LAT, LON, 128, 0.2).image
                wrong: list[str] = []

                def work(aerial=aerial, want=want, wrong=wrong):
                    try:
                        for _ in range(5):
                            if not np.array_equal(aerial.tile(LAT, LON, 128, 0.2).image, want):
                                wrong.append("differs")
                    except MapError as error:
                        wrong.append(str(error))

                threads = [threading.Thread(target=work) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not wrong


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_tile_formats(suffix):
    data = cv2.imencode(suffix, texture(64, 64))[1].tobytes()
    assert decode_with_alpha(data).shape == (64, 64, 3)
    for length in (len(data) // 2, len(data) - 20, len(data) - 1):
        with pytest.raises(ImageError, match="truncated"):
            check_complete(data[:length])
