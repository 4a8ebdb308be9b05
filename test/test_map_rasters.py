from __future__ import annotations

import logging
import math
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from map_fixtures import texture, write_geotiff
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from xview_loc.maps import open_map
from xview_loc.maps.base import (
    AerialTile,
    MapError,
    MapOpenError,
    MapOptions,
    MapUnavailableError,
    NoImageryError,
    redact,
)

LAT, LON = 48.1853, 16.3119
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "aerial"


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared {name} is not here")
    return path


def blob(height, width, row, col):
    """A bright spot, symmetric about a pixel position."""
    rows, cols = np.mgrid[:height, :width]
    spot = 40.0 + 200.0 * np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (2 * 8.0**2))
    return np.repeat(np.round(spot).astype(np.uint8)[..., None], 3, axis=2)


def centroid(image):
    weight = np.clip(image[..., 0].astype(float) - 60.0, 0.0, None)
    rows, cols = np.mgrid[: image.shape[0], : image.shape[1]]
    return (rows * weight).sum() / weight.sum(), (cols * weight).sum() / weight.sum()


@pytest.mark.parametrize("crs", ["EPSG:31256", "EPSG:3857", "EPSG:32633", "EPSG:4326"])
@pytest.mark.parametrize("gsd", [0.14, 0.2, 0.35, 0.6])
def test_a_mark_is_found_where_it_is(tmp_path, crs, gsd):
    pixel = 0.2 / 111_320.0 if crs == "EPSG:4326" else 0.2
    path = write_geotiff(tmp_path / "a.tif", blob(900, 900, 480, 410), LAT, LON, pixel, crs)
    with rasterio.open(path) as src:
        x, y = src.xy(480, 410)  # of the pixel's centre
        (lon,), (lat,) = rasterio.warp.transform(src.crs, "EPSG:4326", [x], [y])
    with open_map(path) as aerial:
        tile = aerial.tile(LAT, LON, 320, gsd)
    row, col = tile.latlon_to_pixel(lat, lon)
    assert centroid(tile.image) == pytest.approx((row, col), abs=0.1)


def test_datums_are_honoured(tmp_path):
    # MGI and WGS 84 are some 100 m apart at Vienna: taking one for the other must not pass.
    path = write_geotiff(tmp_path / "a.tif", blob(300, 300, 149.5, 149.5), LAT, LON, 0.2, "EPSG:31256")
    with open_map(path) as aerial:
        assert centroid(aerial.tile(LAT, LON, 256, 0.2).image) == pytest.approx((127.5, 127.5), abs=0.1)


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_band_counts(tmp_path, bands):
    image = texture(200, 200)[..., : min(bands, 3)]
    if bands == 4:
        alpha = np.full((200, 200, 1), 255, np.uint8)
        alpha[:, :100] = 0
        image = np.concatenate([image, alpha], axis=2)
    extra = {"photometric": "RGB", "alpha": "YES"} if bands == 4 else {}
    path = write_geotiff(tmp_path / "a.tif", image, LAT, LON, 0.2, "EPSG:32633", **extra)
    with open_map(path) as aerial:
        tile = aerial.tile(LAT, LON, 100, 0.2)
    assert tile.image.shape == (100, 100, 3) and tile.image.dtype == np.uint8
    assert tile.valid_fraction == (pytest.approx(0.5, abs=0.03) if bands == 4 else 1.0)
    if bands == 1:
        assert np.ptp(tile.image, axis=2).max() == 0


def test_infrared_is_not_taken_for_alpha(tmp_path):
    image = np.concatenate([texture(200, 200), np.zeros((200, 200, 1), np.uint8)], axis=2)
    path = write_geotiff(
        tmp_path / "a.tif", image, LAT, LON, 0.2, "EPSG:32633", photometric="RGB", alpha="NO"
    )
    with open_map(path) as aerial:
        assert aerial.tile(LAT, LON, 100, 0.2).valid_fraction == 1.0


def test_band_order_follows_the_colours(tmp_path):
    image = np.zeros((100, 100, 3), np.uint8)
    image[..., 0] = 200
    path = write_geotiff(tmp_path / "a.tif", image, LAT, LON, 0.2, "EPSG:32633")
    with rasterio.open(path, "r+") as out:
        out.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    with open_map(path) as aerial:
        assert aerial.tile(LAT, LON, 40, 0.2).image[20, 20].tolist() == [0, 0, 200]


def test_palette(tmp_path):
    indices = np.zeros((100, 100), np.uint8)
    indices[:, 50:] = 1
    path = write_geotiff(tmp_path / "a.tif", indices, LAT, LON, 0.2, "EPSG:32633", photometric="palette")
    with rasterio.open(path, "r+") as out:
        out.write_colormap(1, {0: (250, 10, 20, 255), 1: (30, 40, 200, 255)})
    with open_map(path) as aerial:
        tile = aerial.tile(LAT, LON, 60, 0.2)
    assert tile.image[30, 5].tolist() == [250, 10, 20] and tile.image[30, 55].tolist() == [30, 40, 200]
    assert tile.valid_fraction == 1.0


def test_sixteen_bits_are_stretched(tmp_path):
    image = texture(300, 300)
    path = write_geotiff(tmp_path / "a.tif", image.astype(np.uint16) * 9, LAT, LON, 0.2, "EPSG:32633")
    plain = write_geotiff(tmp_path / "b.tif", image, LAT, LON, 0.2, "EPSG:32633")
    with open_map(path) as deep, open_map(plain) as shallow:
        a, b = deep.tile(LAT, LON, 200, 0.2), shallow.tile(LAT, LON, 200, 0.2)
    assert a.valid_fraction == 1.0
    assert np.corrcoef(a.image.ravel(), b.image.ravel())[0, 1] > 0.98
    assert a.image.max() > 240 and a.image.min() < 15


def test_nodata_needs_every_band(tmp_path):
    image = np.full((200, 200, 3), 90, np.uint8)
    image[:, :100] = 0  # no data
    image[:, 100:, 0] = 0  # merely no red
    path = write_geotiff(tmp_path / "a.tif", image, LAT, LON, 0.2, "EPSG:32633", nodata=0)
    with open_map(path) as aerial:
        tile = aerial.tile(LAT, LON, 100, 0.2)
    assert tile.valid_fraction == pytest.approx(0.5, abs=0.03)
    assert tile.valid is not None and tile.valid[50, 80] and not tile.valid[50, 20]


def test_internal_mask(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", texture(200, 200), LAT, LON, 0.2, "EPSG:32633")
    mask = np.full((200, 200), 255, np.uint8)
    mask[:100] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as out:
        out.write_mask(mask)
    with open_map(path) as aerial:
        assert aerial.tile(LAT, LON, 100, 0.2).valid_fraction == pytest.approx(0.5, abs=0.03)


def test_edges_and_beyond(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", texture(200, 200), LAT, LON, 0.2, "EPSG:31256")
    with open_map(path) as aerial:
        east = LON + 20.0 / (111_320.0 * math.cos(math.radians(LAT)))
        assert aerial.tile(LAT, east, 100, 0.2).valid_fraction == pytest.approx(0.5, abs=0.03)
        for place in [(LAT + 0.01, LON), (-LAT, LON), (LAT, LON - 180.0), (89.9, 0.0), (0.0, 180.0)]:
            with pytest.raises(NoImageryError, match=r"a\.tif"):
                aerial.tile(*place, 100, 0.2)


def test_almost_empty_mosaic():
    with open_map(shared("usda_naip_512_deflate_z2.tif")) as aerial:
        south, west, north, east = aerial.info().bounds
        assert aerial.tile((south + north) / 2, (west + east) / 2, 512, 0.6).valid_fraction < 0.1
        with pytest.raises(NoImageryError):
            aerial.tile(south + 0.0005, (west + east) / 2, 64, 0.3)


def test_alpha_and_nodata_of_a_drone_mosaic():
    with open_map(shared("pix4d_alpha_nodata.tif")) as aerial:
        south, west, north, east = aerial.info().bounds
        lat, lon = (south + north) / 2, (west + east) / 2
        assert aerial.tile(lat, lon, 256, 0.2).valid_fraction == 1.0
        corner = aerial.tile(south, west, 512, 0.35)
        assert 0.0 < corner.valid_fraction < 0.35


def test_info():
    with open_map(shared("vienna_ortho_2023_30cm.tif")) as aerial:
        info = aerial.info()
    assert info.crs == "EPSG:31256"
    assert info.resolution_m == pytest.approx(0.3, abs=0.001)
    assert info.bounds == pytest.approx((48.1831, 16.3086, 48.1876, 16.3153), abs=1e-4)


def test_bad_files(tmp_path):
    rubbish = tmp_path / "rubbish.tif"
    rubbish.write_bytes(b"II*\0" + bytes(50))
    bare = tmp_path / "bare.png"
    cv2.imwrite(str(bare), texture(50, 50))
    floats = write_geotiff(tmp_path / "f.tif", np.zeros((9, 9), np.float32), LAT, LON, 0.2, "EPSG:32633")
    for path, message in [
        (tmp_path / "nowhere.tif", "cannot open"),
        (rubbish, "cannot open"),
        (bare, "no coordinate reference system"),
        (floats, "float32"),
    ]:
        with pytest.raises(MapOpenError, match=message) as caught:
            open_map(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_a_raster_that_breaks_later(tmp_path):
    path = write_geotiff(
        tmp_path / "a.tif", texture(400, 400), LAT, LON, 0.2, "EPSG:32633", compress="deflate"
    )
    with open_map(path) as aerial:
        data = path.read_bytes()
        path.write_bytes(data[:2000])
        with pytest.raises(MapError, match=r"a\.tif"):
            aerial.tile(LAT, LON, 200, 0.2)


def test_local_coordinates_are_refused(tmp_path):
    """A site plan's engineering CRS has no relation to the Earth."""
    path = tmp_path / "site.tif"
    shape = {"width": 64, "height": 64, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        path, "w", crs='LOCAL_CS["site",UNIT["metre",1]]', transform=from_origin(0, 64, 1, 1), **shape
    ) as out:
        out.write(np.full((3, 64, 64), 90, np.uint8))
    with pytest.raises(MapOpenError, match=r"site\.tif has a local coordinate reference system") as caught:
        open_map(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("west", [-180.0, 0.0])
def test_a_damaged_world_map_is_not_taken_for_one_that_ends(tmp_path, west):
    """East and west of a raster 360 degrees wide are the same meridian."""
    path = tmp_path / "world.tif"
    image = np.random.default_rng(0).integers(0, 256, (3, 256, 512), np.uint8)
    shape = {"width": 512, "height": 256, "count": 3, "dtype": "uint8", "compress": "deflate"}
    with rasterio.open(
        path, "w", crs="EPSG:4326", transform=from_origin(west, 90, 360 / 512, 180 / 256), **shape
    ) as out:
        out.write(image)
    path.write_bytes(path.read_bytes()[:-300_000])
    with open_map(path) as world, pytest.raises(MapUnavailableError, match="cannot read"):
        world.tile(-45.0, 100.0, 64, 20_000.0)


def test_keys_of_remote_rasters_stay_secret(caplog):
    caplog.set_level(logging.DEBUG)
    secret = "Zq81token"
    with pytest.raises(MapOpenError) as caught:
        open_map(f"http://127.0.0.1:9/a.tif?sig={secret}", MapOptions(deadline_s=1.0))
    assert secret not in str(caught.value) and caught.value.__suppress_context__
    assert secret not in caplog.text


def test_redact():
    assert redact("https://me:pw@h/a/{z}/{x}/{y}.png?key=1") == "https://h/a/{z}/{x}/{y}.png?***"
    assert "0a1b2c" not in redact("https://h/v1/0a1b2c3d4e5f60718293a4b5/{z}/{x}/{y}")
    assert redact("/data/a.tif") == "/data/a.tif"
    assert redact("https://h/abc/{z}", ("abc",)) == "https://h/***/{z}"


def test_pixels_of_a_tile():
    tile = AerialTile(np.zeros((101, 101, 3), np.uint8), LAT, LON, 0.5)
    assert tile.pixel_to_enu(50, 50) == (0.0, 0.0)
    assert tile.pixel_to_enu(40, 60) == (5.0, 5.0)  # up is north, right is east
    assert tile.pixel_to_latlon(50, 50) == pytest.approx((LAT, LON), abs=1e-12)
    turned = AerialTile(tile.image, LAT, LON, 0.5, rotation=math.pi / 2)  # columns grow northwards
    assert turned.pixel_to_enu(50, 60) == pytest.approx((0.0, 5.0), abs=1e-9)
    assert turned.pixel_to_enu(40, 50) == pytest.approx((-5.0, 0.0), abs=1e-9)  # the top edge faces west
    assert tile.key != turned.key


@pytest.mark.parametrize("rotation", [0.0, 0.3, math.pi / 2, -2.0, math.pi])
def test_turning_keeps_places(rotation):
    tile = AerialTile(blob(401, 401, 150, 230), LAT, LON, 0.2)
    turned = tile.rotated(rotation, 256)
    where = turned.latlon_to_pixel(*tile.pixel_to_latlon(150, 230))
    assert centroid(turned.image) == pytest.approx(where, abs=0.05)
    assert turned.valid_fraction == 1.0
    # Turning again is measured from east, not from the last turn.
    again = AerialTile(turned.image, LAT, LON, 0.2, rotation=turned.rotation).rotated(0.0, 200)
    assert centroid(again.image) == pytest.approx(
        again.latlon_to_pixel(*tile.pixel_to_latlon(150, 230)), abs=0.1
    )


def test_turning_beyond_the_corners_is_invalid():
    tile = AerialTile(np.full((100, 100, 3), 9, np.uint8), LAT, LON, 0.2)
    turned = tile.rotated(math.pi / 4, 100)
    assert turned.valid_fraction == pytest.approx(0.828, abs=0.01)
    assert turned.valid is not None and not turned.valid[0, 0]


def test_threads_share_a_raster(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", texture(400, 400), LAT, LON, 0.2, "EPSG:31256")
    with open_map(path) as aerial:
        expected = aerial.tile(LAT, LON, 200, 0.15).image
        wrong = []

        def work():
            for _ in range(10):
                if not np.array_equal(aerial.tile(LAT, LON, 200, 0.15).image, expected):
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closing_while_a_thread_reads(tmp_path):
    """A dataset closed under a reader would abort the process."""
    path = write_geotiff(tmp_path / "a.tif", texture(400, 400), LAT, LON, 0.2, "EPSG:31256")
    aerial = open_map(path)
    reading, results = threading.Semaphore(0), []

    def work():
        try:
            while True:
                reading.release()
                aerial.tile(LAT, LON, 200, 0.15)
        except MapUnavailableError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        assert reading.acquire(timeout=60.0)
    aerial.close()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all("closed" in result for result in results)
