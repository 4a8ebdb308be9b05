"""The simulated city: both views show the same place, seeds repeat, and positions are right."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from pyproj import Transformer

from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import RouteError, drive
from xview_loc.simulation.styles import STYLES, blend, style_for
from xview_loc.simulation.views import (
    CameraPose,
    PanoramaView,
    PinholeView,
    overhead_view,
    render_panorama,
    render_pinhole,
)

TRACK = Path(__file__).parents[1].parent / "shared/data/tracks/comma2k19"


@pytest.fixture(scope="module")
def city() -> City:
    return build_city(5, "source", size_m=420.0)


def poses(city: City, count: int, seed: int = 0) -> list[CameraPose]:
    frames = list(drive(city, 25 * count, seed, view=None))[::25]
    return [CameraPose(f.truth.east, f.truth.north, f.truth.heading) for f in frames]


def test_same_seed_same_city_and_drive() -> None:
    first, second = (build_city(11, "target", size_m=200.0) for _ in range(2))
    other = build_city(12, "target", size_m=200.0)
    assert np.array_equal(first.aerial, second.aerial) and np.array_equal(first.height, second.height)
    assert not np.array_equal(first.aerial, other.aerial)
    a, b = (list(drive(c, 3, seed=4)) for c in (first, second))
    assert all(np.array_equal(x.image, y.image) and x.fix.lat == y.fix.lat for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_any_seed_renders(style: str) -> None:
    for seed in range(3):
        small = build_city(seed, style, size_m=150.0)
        image = render_panorama(
            small, CameraPose(30.0 * seed - 30.0, 5.0, seed), rng=np.random.default_rng(0)
        )
        assert image.shape == (128, 512, 3) and image.dtype == np.uint8 and image.std() > 5.0


def test_blend_is_a_dial() -> None:
    a, b = STYLES["source"], STYLES["target"]
    assert blend(a, b, 0.0) == a and blend(a, b, 1.0) == b
    half = blend(a, b, 0.5)
    for f in fields(a):
        value = getattr(half, f.name)
        if isinstance(value, float):
            assert value == pytest.approx((getattr(a, f.name) + getattr(b, f.name)) / 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        blend(a, b, 1.5)
    with pytest.raises(ValueError, match="unknown style"):
        style_for("nowhere", 0)
    assert style_for("source", 1) == style_for("source", 1) != style_for("source", 2)


def test_centre_column_looks_along_the_heading(city: City) -> None:
    (pose,) = poses(city, 1)
    ahead = render_panorama(city, pose)
    turned = render_panorama(city, CameraPose(pose.east, pose.north, pose.heading + math.pi / 2, pose.height))
    # Turning left by a quarter shows to the right of the centre what was in the centre.
    difference = np.abs(np.roll(ahead, 128, axis=1)[8:].astype(int) - turned[8:])
    assert difference.mean() < 2.0


def similarity(aerial: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> float:
    """Correlation of the two images' local contrast where the ground is seen."""
    parts = []
    for image in (aerial, ground):
        grey = cv2.GaussianBlur(image.mean(axis=2).astype(np.float32), (0, 0), 1.0)
        parts.append((grey - cv2.GaussianBlur(grey, (0, 0), 6.0))[mask])
    return float(np.corrcoef(*parts)[0, 1])


def test_both_views_show_the_same_place(city: City) -> None:
    view = PanoramaView(256, 1024)
    size, gsd = 81, city.gsd
    radius = np.hypot(*np.meshgrid(*[(np.arange(size) - size // 2) * gsd] * 2))
    shifts = [(d * math.cos(a), d * math.sin(a)) for d in (3.0, 6.0) for a in np.arange(0, 6.2, math.pi / 4)]
    at_truth, elsewhere, wins = [], [], 0
    where = poses(city, 9)
    for pose in where:
        ground, seen = overhead_view(render_panorama(city, pose, view), pose, size, gsd, view)
        mask = seen & (radius < 11.0) & (radius > 1.0)
        true = similarity(city.patch(pose.east, pose.north, size), ground, mask)
        false = [similarity(city.patch(pose.east + x, pose.north + y, size), ground, mask) for x, y in shifts]
        at_truth.append(true)
        elsewhere.append(float(np.mean(false)))
        wins += true > max(false)
    assert np.mean(at_truth) > 0.25 and np.mean(at_truth) > np.mean(elsewhere) + 0.2, (at_truth, elsewhere)
    assert wins >= 7, wins


def test_pinhole_agrees_with_panorama(city: City) -> None:
    (pose,) = poses(city, 1)
    view = PinholeView(120, 240, fov_deg=60.0)
    pinhole = render_pinhole(city, pose, view)
    wide = PanoramaView(512, 2048)
    panorama = render_panorama(city, pose, wide)
    k = view.matrix
    x, y = np.meshgrid((np.arange(240) - k[0, 2]) / k[0, 0], (np.arange(120) - k[1, 2]) / k[1, 1])
    step = 2 * math.pi / 2048
    col = np.arctan(x) / step + 1023.5
    row = (math.radians(30.0) + np.arctan(y / np.hypot(1, x))) / step - 0.5
    expected = cv2.remap(panorama, col.astype(np.float32), row.astype(np.float32), cv2.INTER_LINEAR)
    assert np.abs(expected.astype(int) - pinhole).mean() < 9.0


@pytest.mark.parametrize("place", [(48.137, 11.575), (-33.9, 18.42)])
def test_geotiff_is_where_the_city_is(tmp_path: Path, place: tuple[float, float]) -> None:
    world = build_city(2, "source", *place, size_m=200.0)
    path = world.write_geotiff(tmp_path / "city.tif")
    with rasterio.open(path) as file:
        assert file.crs.to_epsg() == (32632 if place[0] > 0 else 32734)
        assert file.res == (world.gsd, world.gsd)
        image = file.read().transpose(1, 2, 0)
        to_utm = Transformer.from_crs("EPSG:4326", file.crs, always_xy=True)
        east, north = np.meshgrid(np.arange(-70.0, 70.0, 1.7), np.arange(-70.0, 70.0, 1.7))
        lat, lon = world.to_latlon(east, north)
        x, y = ~file.transform * to_utm.transform(lon, lat)
    read = cv2.remap(image, (x - 0.5).astype(np.float32), (y - 0.5).astype(np.float32), cv2.INTER_LINEAR)
    row, col = world.to_pixel(east, north)
    direct = cv2.remap(world.aerial, col.astype(np.float32), row.astype(np.float32), cv2.INTER_LINEAR)
    assert np.abs(read.astype(int) - direct).mean() < 5.0
    lat0, lon0 = world.to_latlon(20.0, -15.0)
    tile = open_map(str(path)).tile(lat0, lon0, 128, world.gsd)
    patch = world.patch(20.0, -15.0, 128)
    assert np.abs(tile.image.astype(int) - patch).mean() < 6.0
    assert world.to_enu(lat0, lon0) == pytest.approx((20.0, -15.0), abs=1e-6)


def test_drive_is_smooth_and_its_fixes_are_off(city: City) -> None:
    frames = list(drive(city, 400, seed=1, view=None))
    place = np.array([(f.truth.east, f.truth.north) for f in frames])
    step = np.hypot(*np.diff(place, axis=0).T)
    assert step.max() < 12.5 / 5 + 0.3 and step.sum() > 200.0
    assert np.abs(np.diff([f.truth.speed for f in frames])).max() < 0.6
    # The reported heading is the direction of travel.
    travel = np.arctan2(np.diff(place[:, 1]), np.diff(place[:, 0]))[step > 1.0]
    heading = np.array([f.truth.heading for f in frames])[:-1][step > 1.0]
    assert np.median(np.abs(np.angle(np.exp(1j * (travel - heading))))) < 0.06
    fix = np.array([city.to_enu(f.fix.lat, f.fix.lon) for f in frames])
    error = np.hypot(*(fix - place).T)
    assert 3.0 < np.median(error) < 30.0
    claimed = np.array([f.fix.covariance[0, 0] for f in frames])
    assert 0.1 < np.mean(error**2 / (2 * claimed)) < 4.0


def test_drive_keeps_to_its_area(city: City) -> None:
    area = (-210.0, -210.0, 0.0, 210.0)
    frames = list(drive(city, 120, seed=1, view=None, area=area))
    # The lane may lie beside a centre line that touches the border.
    assert max(f.truth.east for f in frames) < area[2] + 8.0
    assert max(f.truth.east for f in drive(city, 120, seed=1, view=None)) > area[2] + 8.0
    with pytest.raises(RouteError, match="no street lies within"):
        list(drive(city, 1, view=None, area=(0.0, 0.0, 5.0, 5.0)))


@pytest.mark.skipif(not TRACK.is_dir(), reason="no recorded track beside the checkout")
def test_receiver_error_against_a_real_one(city: City) -> None:
    """A real drive of a minute under an open sky: simulated errors are larger, and also mostly bias."""
    load = lambda name: np.load(TRACK / name)  # noqa: E731
    stamps, values = load("live_gnss_ublox_t"), load("live_gnss_ublox_value")
    to_geo = Transformer.from_crs("EPSG:4978", "EPSG:4979", always_xy=True)
    positions, times = load("frame_positions"), load("frame_times")
    lon, lat, _ = to_geo.transform(*positions.T)
    plane = LocalProjection(float(lat[0]), float(lon[0]))
    true = np.stack(plane.forward(lat, lon), axis=1)
    inside = (stamps > times[0]) & (stamps < times[-1])
    fix = np.stack(plane.forward(values[inside, 0], values[inside, 1]), axis=1)
    real = fix - np.stack([np.interp(stamps[inside], times, true[:, k]) for k in (0, 1)], axis=1)
    frames = list(drive(city, 600, seed=2, view=None))
    ours = np.array([city.to_enu(f.fix.lat, f.fix.lon) for f in frames])
    ours -= [(f.truth.east, f.truth.north) for f in frames]

    def jitter(error: np.ndarray, lag: int) -> float:
        return float(np.median(np.abs(error[lag:] - error[:-lag])))

    rate = round(1 / float(np.median(np.diff(stamps))))
    print(
        f"real: {rate} Hz, mean {np.hypot(*real.T).mean():.2f} m, std {real.std(axis=0)}, "
        f"1 s {jitter(real, rate):.2f}\n"
        f"simulated: mean {np.hypot(*ours.T).mean():.2f} m, std {ours.std(axis=0)}, 1 s {jitter(ours, 5):.2f}"
    )
    assert np.hypot(*ours.T).mean() > np.hypot(*real.T).mean()
    assert jitter(real, rate) < 0.2 * np.hypot(*real.T).mean()
    assert jitter(ours, 5) < 0.2 * np.hypot(*ours.T).mean()
