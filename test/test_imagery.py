"""Aerial tiles from rasters of every common kind."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from map_fixtures import texture, write_geotiff

from xview_loc.geodesy import LocalProjection
from xview_loc.imagery import AerialMap, AerialTile, MapOpenError, NoImageryError

LAT, LON = 48.2, 16.37
AERIAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "aerial"


def marked(size: int) -> np.ndarray:
    """Black with one soft bright dot off the middle, at (row, col) = (0.4, 0.6) of the size."""
    rows, cols = np.mgrid[0:size, 0:size]
    dot = 255.0 * np.exp(-((rows - 0.4 * size) ** 2 + (cols - 0.6 * size) ** 2) / (2 * 4.0**2))
    return np.repeat(dot.astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("crs", "gsd"), [("EPSG:32633", 0.3), ("EPSG:3857", 0.4), ("EPSG:31256", 0.3), ("EPSG:4326", 3e-6)]
)
def test_a_marker_is_found_where_it_is(tmp_path, crs, gsd):
    path = write_geotiff(tmp_path / "a.tif", marked(600), LAT, LON, gsd, crs)
    with rasterio.open(path) as source:
        x, y = source.xy(240, 360)  # the dot's pixel
        (lon,), (lat,) = rasterio.warp.transform(source.crs, "EPSG:4326", [x], [y])
    with AerialMap.open(path) as aerial:
        tile = aerial.tile(LAT, LON, 300, 0.3)
    weight = tile.image[..., 0].astype(float)
    weight[weight < 20] = 0.0
    rows, cols = np.mgrid[0:300, 0:300]
    row, col = (rows * weight).sum() / weight.sum(), (cols * weight).sum() / weight.sum()
    expected = tile.latlon_to_pixel(lat, lon)
    assert math.hypot(row - expected[0], col - expected[1]) < 0.1


@pytest.mark.parametrize("kind", ["grey", "alpha", "16 bit", "palette"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, kind):
    path = tmp_path / "a.tif"
    picture = texture(400, 400)
    if kind == "grey":
        write_geotiff(path, picture[..., 0], LAT, LON, 0.3, "EPSG:32633")
    elif kind == "alpha":
        alpha = np.full((400, 400, 1), 255, np.uint8)
        write_geotiff(
            path, np.dstack([picture, alpha]), LAT, LON, 0.3, "EPSG:32633", photometric="RGB", alpha="YES"
        )
    elif kind == "16 bit":
        write_geotiff(path, picture.astype(np.uint16) * 200, LAT, LON, 0.3, "EPSG:32633")
    else:
        write_geotiff(path, picture[..., 0] // 64, LAT, LON, 0.3, "EPSG:32633", photometric="palette")
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, {i: (60 * i, 255 - 60 * i, 10, 255) for i in range(4)})
    with AerialMap.open(path) as aerial:
        tile = aerial.tile(LAT, LON, 128, 0.3)
    assert tile.image.shape == (128, 128, 3) and tile.image.dtype == np.uint8
    assert tile.valid_fraction == 1.0 and tile.image.std() > 10.0
    if kind == "grey":
        assert (tile.image[..., 0] == tile.image[..., 2]).all()
    if kind == "palette":
        assert not (tile.image[..., 0] == tile.image[..., 1]).all()


def test_edges_holes_and_beyond(tmp_path):
    picture = texture(400, 400)
    alpha = np.full((400, 400, 1), 255, np.uint8)
    alpha[:200] = 0  # nothing in the northern half
    options = {"photometric": "RGB", "alpha": "YES"}
    path = write_geotiff(
        tmp_path / "a.tif", np.dstack([picture, alpha]), LAT, LON, 0.3, "EPSG:32633", **options
    )
    with AerialMap.open(path) as aerial:
        assert 0.45 < aerial.tile(LAT, LON, 128, 0.3).valid_fraction < 0.55
        lat, lon = LocalProjection(LAT, LON).inverse(60.0, -30.0)  # on the eastern edge
        assert 0.4 < aerial.tile(lat, lon, 128, 0.3).valid_fraction < 0.6
        with pytest.raises(NoImageryError, match="no imagery"):
            aerial.tile(LAT + 1.0, LON, 128, 0.3)


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_what_is_no_map_does_not_open(tmp_path, content):
    path = tmp_path / "a.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MapOpenError) as caught:
        AerialMap.open(path)
    assert len(str(caught.value).splitlines()) == 1 and "a.tif" in str(caught.value)


def test_a_picture_without_a_place_does_not_open(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), texture(50, 50))
    with pytest.raises(MapOpenError):
        AerialMap.open(tmp_path / "a.png")


def test_threads_read_the_same_map(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", texture(600, 600), LAT, LON, 0.3, "EPSG:32633")
    with AerialMap.open(path) as aerial:
        expected = aerial.tile(LAT, LON, 128, 0.3).image
        with ThreadPoolExecutor(8) as pool:
            tiles = list(pool.map(lambda _: aerial.tile(LAT, LON, 128, 0.3).image, range(40)))
    assert all((image == expected).all() for image in tiles)


def test_a_turned_tile_shows_the_same_places():
    tile = AerialTile(texture(400, 400), LAT, LON, 0.3, 1.0)
    turned = tile.rotated(math.radians(30.0), 200)
    for row, col in ((40, 60), (100, 100), (150, 30)):
        there = tile.latlon_to_pixel(*turned.pixel_to_latlon(row, col))
        sampled = cv2.getRectSubPix(tile.image, (1, 1), (float(there[1]), float(there[0])))[0, 0]
        assert np.abs(sampled.astype(int) - turned.image[row, col]).max() <= 6


@pytest.mark.skipif(not AERIAL.exists(), reason="the real data is not beside the repository")
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("vienna_ortho_2023_30cm.tif", 1.0, 1.0),
        ("colorado_hro_2014.tif", 0.2, 1.0),
        ("pix4d_alpha_nodata.tif", 0.9, 1.0),
        ("usda_naip_512_deflate_z2.tif", 0.0, 0.5),
    ],
)
def test_real_maps(name, low, high):
    with AerialMap.open(AERIAL / name) as aerial:
        south, west, north, east = aerial.info().bounds
        try:
            tile = aerial.tile((south + north) / 2, (west + east) / 2, 256, 0.3)
        except NoImageryError:
            assert low == 0.0
        else:
            assert low <= tile.valid_fraction <= high
            assert low == 0.0 or tile.image[tile.image.any(axis=2)].std() > 10.0
