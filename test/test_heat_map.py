"""Peaks, modes, covariances and places of heat maps."""

import math

import numpy as np
import pytest
from pyproj import Geod

from xview_loc.estimation.heat_map import HeatMap, HeatMapError, SearchDisc, room_around
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import Calibration, HeatMapGrid

LAT, LON = 48.2, 16.37
GEOD = Geod(ellps="WGS84")


def make_tile(size: int = 128, gsd: float = 0.25, rotation: float = 0.0) -> AerialTile:
    return AerialTile(np.zeros((size, size, 3), np.uint8), LAT, LON, gsd, rotation=rotation)


def gaussian(shape: tuple[int, int], centre: tuple[float, float], covariance: np.ndarray) -> np.ndarray:
    """Log of a Gaussian; covariance in (row, col) pixels squared."""
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    offsets = np.stack([rows - centre[0], cols - centre[1]], axis=-1)
    return -0.5 * np.einsum("...i,ij,...j", offsets, np.linalg.inv(covariance), offsets)


def isotropic(shape: tuple[int, int], centre: tuple[float, float], sigma: float) -> np.ndarray:
    return gaussian(shape, centre, sigma**2 * np.eye(2))


def mixture(*parts: tuple[float, np.ndarray]) -> np.ndarray:
    """Logits of a mixture of log-densities with the shares given."""
    return np.log(sum(share * np.exp(log) / np.exp(log).sum() for share, log in parts) + 1e-300)


def test_probabilities_sum_to_one_and_large_logits_do_not_overflow() -> None:
    logits = np.random.default_rng(0).normal(scale=300.0, size=(64, 48)) + 5000.0
    heat_map = HeatMap.from_logits(logits, HeatMapGrid(), make_tile())
    assert heat_map.probability.dtype == np.float32
    assert float(heat_map.probability.sum()) == pytest.approx(1.0, abs=1e-5)
    assert heat_map.peak_pixel == np.unravel_index(logits.argmax(), logits.shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_refused(bad: float) -> None:
    logits = np.zeros((8, 8))
    logits[3, 4] = bad
    with pytest.raises(HeatMapError, match="finite"):
        HeatMap.from_logits(logits, HeatMapGrid(), make_tile())


@pytest.mark.parametrize("seed", range(12))
def test_sub_pixel_peak_of_a_gaussian_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centre = tuple(rng.uniform(10, 50, 2))
    spread = rng.normal(size=(2, 2))
    covariance = spread @ spread.T + 2.0 * np.eye(2)
    heat_map = HeatMap.from_logits(gaussian((64, 64), centre, covariance), HeatMapGrid(), make_tile())
    row, col = heat_map.peak_pixel
    # The largest pixel of a slanted Gaussian may be more than half a pixel from its centre.
    expected = np.clip(centre, np.array([row, col]) - 0.5, np.array([row, col]) + 0.5)
    assert heat_map.peak == pytest.approx(tuple(expected), abs=2e-3)


@pytest.mark.parametrize("corner", [(0, 0), (0, 20), (31, 31), (17, 0), (31, 5)])
def test_peaks_on_the_border_stay_on_the_map(corner: tuple[int, int]) -> None:
    heat_map = HeatMap.from_logits(isotropic((32, 32), corner, 2.0), HeatMapGrid(), make_tile(32))
    assert heat_map.peak == pytest.approx(corner, abs=1e-3)
    assert heat_map.at_border


def test_single_pixels_flat_maps_and_saddles_give_a_peak_within_half_a_pixel() -> None:
    single = np.full((16, 16), -500.0)
    single[5, 7] = 500.0
    heat_map = HeatMap.from_logits(single, HeatMapGrid(), make_tile(16))
    assert heat_map.peak == (5.0, 7.0)
    assert heat_map.confidence == pytest.approx(1.0)
    assert heat_map.entropy == pytest.approx(0.0, abs=1e-6)
    # A place somewhere in a pixel of a quarter of a metre.
    np.testing.assert_allclose(heat_map.covariance(0.3), (0.09 + 0.25**2 / 12) * np.eye(2), atol=1e-9)
    flat = HeatMap.from_logits(np.zeros((16, 16)), HeatMapGrid(), make_tile(16))
    assert flat.peak == (0.0, 0.0)
    assert flat.entropy == pytest.approx(math.log(256), rel=1e-5)
    rng = np.random.default_rng(3)
    for _ in range(50):
        rough = HeatMap.from_logits(rng.normal(size=(16, 16)), HeatMapGrid(), make_tile(16))
        offset = np.subtract(rough.peak, rough.peak_pixel)
        assert np.abs(offset).max() <= 0.5


@pytest.mark.parametrize("rotation", [0.0, 0.7, -2.5])
@pytest.mark.parametrize("grid", [HeatMapGrid(), HeatMapGrid(2.0, (13.5, 9.25))])
def test_peak_is_at_the_true_place_of_its_pixel(rotation: float, grid: HeatMapGrid) -> None:
    tile = make_tile(128, 0.25, rotation)
    centre = (31.3, 18.8)
    heat_map = HeatMap.from_logits(isotropic((50, 50), centre, 2.0), grid, tile)
    lat, lon = heat_map.to_latlon(*heat_map.peak)
    # Independently: metres right and down of the tile's centre, turned, along geodesics.
    row, col = (origin + grid.scale * value for origin, value in zip(grid.origin, centre, strict=True))
    right, up = (col - 63.5) * 0.25, -(row - 63.5) * 0.25
    azimuth = 90.0 - math.degrees(math.atan2(up, right) + rotation)
    true_lon, true_lat, _ = GEOD.fwd(LON, LAT, azimuth, math.hypot(right, up))
    assert GEOD.inv(lon, lat, true_lon, true_lat)[2] < 0.01


@pytest.mark.parametrize("rotation", [0.0, 0.7, -2.0])
@pytest.mark.parametrize(("sigma_along", "sigma_across"), [(1.0, 1.0), (3.0, 1.0), (2.5, 0.6)])
def test_covariance_recovers_a_gaussian_in_enu_axes(
    rotation: float, sigma_along: float, sigma_across: float
) -> None:
    # The long axis points 30 degrees north of east, whatever way the tile is turned.
    angle = math.radians(30.0)
    along, across = (
        np.array([math.cos(angle), math.sin(angle)]),
        np.array([-math.sin(angle), math.cos(angle)]),
    )
    expected = sigma_along**2 * np.outer(along, along) + sigma_across**2 * np.outer(across, across)
    tile = make_tile(200, 0.2, rotation)
    grid = HeatMapGrid(1.0, (10.0, 20.0))
    rows, cols = np.mgrid[:170, :170]
    east, north = tile.pixel_to_enu(rows + 10.0, cols + 20.0)
    offsets = np.stack([east - 1.3, north + 0.9], axis=-1)
    logits = -0.5 * np.einsum("...i,ij,...j", offsets, np.linalg.inv(expected), offsets)
    heat_map = HeatMap.from_logits(logits, grid, tile)
    assert heat_map.confidence > 0.99
    floor = 0.4
    covariance = heat_map.covariance(floor)
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-12)
    sigmas = np.sqrt(np.linalg.eigvalsh(covariance - floor**2 * np.eye(2)))
    np.testing.assert_allclose(sigmas, [sigma_across, sigma_along], rtol=0.05)
    np.testing.assert_allclose(covariance, expected + floor**2 * np.eye(2), atol=0.1 * sigma_along**2)


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
def test_two_modes_give_the_share_of_the_winning_one(share: float) -> None:
    shape = (128, 128)
    logits = mixture(
        (share, isotropic(shape, (40.2, 40.7), 6.0)), (1 - share, isotropic(shape, (90.0, 80.0), 6.0))
    )
    heat_map = HeatMap.from_logits(logits, HeatMapGrid(), make_tile())
    assert heat_map.peak == pytest.approx((40.2, 40.7), abs=0.02)
    assert heat_map.confidence == pytest.approx(share, abs=0.01)
    # The other mode makes the covariance large: by its share of the squared way to it.
    way = np.array([80.0 - 40.7, 40.2 - 90.0]) * 0.25
    own = (6.0 * 0.25) ** 2 * np.eye(2)
    expected = own + (1 - share) * np.outer(way, way)
    np.testing.assert_allclose(heat_map.covariance(), expected, rtol=0.03, atol=0.1)


def test_a_map_that_stands_out_less_than_the_calibrations_is_flattened() -> None:
    shape, tile = (128, 128), make_tile()
    logits = isotropic(shape, (60.0, 60.0), 20.0)
    own = HeatMap.from_logits(logits, HeatMapGrid(), tile).contrast
    assert own == pytest.approx(-logits.mean(), rel=1e-5)

    def covariance(scale: float, contrast: float | None) -> float:
        calibration = Calibration(contrast, 0.0)
        heat_map = HeatMap.from_logits(scale * logits, HeatMapGrid(), tile, calibration=calibration)
        assert heat_map.peak == pytest.approx((60.0, 60.0), abs=0.01)  # it moves no peak
        return float(heat_map.covariance()[0, 0])

    assert covariance(1.0, own) == pytest.approx(covariance(1.0, None), rel=1e-5)
    # A map with four times the contrast is a Gaussian of half the width, at an eighth of the temperature.
    assert covariance(4.0, own) == pytest.approx(covariance(1.0, None) / 32.0, rel=0.05)
    assert covariance(0.5, own) > 1.5 * covariance(0.5, None)
    flat = HeatMap.from_logits(np.zeros(shape), HeatMapGrid(), tile, calibration=Calibration(own, 0.5))
    np.testing.assert_allclose(flat.probability, 1 / 128**2, rtol=1e-4)


def test_the_highest_mode_wins_over_a_wide_one() -> None:
    shape = (128, 128)
    logits = mixture((0.3, isotropic(shape, (40.0, 40.0), 2.0)), (0.7, isotropic(shape, (90.0, 90.0), 12.0)))
    heat_map = HeatMap.from_logits(logits, HeatMapGrid(), make_tile())
    assert heat_map.peak_pixel == (40, 40)
    assert heat_map.confidence == pytest.approx(0.3, abs=0.02)


def test_ripples_do_not_split_a_mode() -> None:
    rows, cols = np.mgrid[:128, :128]
    ripples = 0.3 * np.cos(2.1 * rows) * np.cos(2.3 * cols)
    heat_map = HeatMap.from_logits(isotropic((128, 128), (64, 60), 8.0) + ripples, HeatMapGrid(), make_tile())
    assert heat_map.confidence > 0.98


def test_a_map_without_structure_has_no_confidence() -> None:
    logits = np.random.default_rng(1).normal(size=(128, 128))
    heat_map = HeatMap.from_logits(logits, HeatMapGrid(), make_tile())
    assert heat_map.confidence < 0.1


@pytest.mark.parametrize("contrast", [None, 20.0])
def test_the_discs_share_is_that_of_the_whole_map(contrast: float | None) -> None:
    tile, calibration = make_tile(), Calibration(contrast)
    near, far = isotropic((128, 128), (40.0, 40.0), 3.0), isotropic((128, 128), (90.0, 90.0), 3.0)
    logits = np.maximum(near, far + 30.0)
    whole = HeatMap.from_logits(logits, HeatMapGrid(), tile, calibration=calibration)
    assert whole.log_share == 0.0
    disc = SearchDisc(*(float(v) for v in tile.pixel_to_latlon(40.0, 40.0)), 5.0)
    limited = HeatMap.from_logits(logits, HeatMapGrid(), tile, disc, calibration)
    inside = whole.probability[limited.probability > 0.0].sum(dtype=np.float64)
    if contrast is None:
        assert limited.log_share == pytest.approx(np.log10(inside), abs=1e-3)
        assert limited.log_share == pytest.approx(-30.0 / np.log(10.0), abs=0.1)
    assert limited.log_share < -10.0 and limited.confidence > 0.99


@pytest.mark.parametrize("rotation", [0.0, 1.1])
@pytest.mark.parametrize("grid", [HeatMapGrid(), HeatMapGrid(2.0, (14.0, 14.0))])
def test_search_is_limited_to_the_disc(rotation: float, grid: HeatMapGrid) -> None:
    tile = make_tile(128, 0.25, rotation)
    side = 128 if grid.scale == 1.0 else 50
    lat, lon = LocalProjection(LAT, LON).inverse(2.0, -3.0)
    search = SearchDisc(lat, lon, 6.0)
    heat_map = HeatMap.from_logits(np.zeros((side, side)), grid, tile, search)
    rows, cols = np.nonzero(heat_map.probability)
    east, north = heat_map.to_enu(rows, cols)
    distance = np.hypot(east - 2.0, north + 3.0)
    assert distance.max() <= 6.0 + 1e-9
    assert len(rows) == pytest.approx(math.pi * 6.0**2 / heat_map.metres_per_pixel**2, rel=0.02)
    assert float(heat_map.probability.sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_peak_outside_the_disc_cannot_win_and_one_on_its_edge_is_flagged() -> None:
    tile = make_tile()
    logits = 3.0 + isotropic((128, 128), (2.0, 2.0), 3.0)
    inside = isotropic((128, 128), (70.0, 66.0), 4.0)
    search = SearchDisc(LAT, LON, 8.0)
    both = HeatMap.from_logits(np.maximum(logits, inside), HeatMapGrid(), tile, search)
    assert both.peak == pytest.approx((70.0, 66.0), abs=0.01) and not both.at_border
    rising = HeatMap.from_logits(isotropic((128, 128), (2.0, 2.0), 30.0), HeatMapGrid(), tile, search)
    assert rising.at_border
    east, north = rising.to_enu(*rising.peak)
    assert 7.0 < math.hypot(east, north) <= 8.0 + 0.25 * 0.75


def test_mode_and_covariance_stay_within_the_disc() -> None:
    search = SearchDisc(LAT, LON, 5.0)
    heat_map = HeatMap.from_logits(isotropic((128, 128), (64, 64), 40.0), HeatMapGrid(), make_tile(), search)
    assert heat_map.confidence == pytest.approx(1.0, abs=1e-3)
    # Almost uniform over the disc: a quarter of the squared radius along each axis.
    np.testing.assert_allclose(heat_map.covariance(), np.eye(2) * 25.0 / 4.0, atol=0.4)


def test_a_disc_off_the_map_is_refused() -> None:
    search = SearchDisc(LAT + 0.01, LON, 10.0)
    with pytest.raises(HeatMapError, match="disc"):
        HeatMap.from_logits(np.zeros((16, 16)), HeatMapGrid(), make_tile(16), search)


@pytest.mark.parametrize("rotation", [0.0, math.pi / 2])
def test_room_around_a_place(rotation: float) -> None:
    tile = make_tile(100, 0.5, rotation)
    assert room_around((100, 100), HeatMapGrid(), tile, LAT, LON) == pytest.approx(25.0, abs=1e-3)
    lat, lon = LocalProjection(LAT, LON).inverse(20.0, 3.0)
    assert room_around((100, 100), HeatMapGrid(), tile, lat, lon) == pytest.approx(5.0, abs=1e-3)
    lat, lon = LocalProjection(LAT, LON).inverse(30.0, 3.0)
    assert room_around((100, 100), HeatMapGrid(), tile, lat, lon) == pytest.approx(-5.0, abs=1e-3)
