"""From observations to poses, with models whose heat map is known; lever arms; the overlay."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from map_fixtures import texture, write_geotiff
from pyproj import Geod

from xview_loc.camera import CameraModel
from xview_loc.estimation import localizer as localizer_module
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import (
    FixOutsideTileError,
    HeadingRequiredError,
    IntrinsicsRequiredError,
    LowImageryError,
    NonFiniteHeatMapError,
    Observation,
    PoseEstimate,
)
from xview_loc.estimation.overlay import ESTIMATE_COLOUR, draw_overlay
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.images import ImageError
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialMap, AerialTile, MapError, MapUnavailableError, NoImageryError
from xview_loc.maps.store import TileStore
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel, HeatMapGrid, HeatMaps
from xview_loc.models.checkpoint import CheckpointError
from xview_loc.models.inputs import normalise
from xview_loc.models.specs import ModelSpec
from xview_loc.rig import look_aside
from xview_loc.vehicle.mounting import Mounting, in_enu

LAT, LON = 48.2, 16.37
SIZE, GSD = 128, 0.5
GEOD = Geod(ellps="WGS84")
IMAGE = np.full((32, 64, 3), 120, np.uint8)
CAMERA = CameraModel(64, 32, (50.0, 0.0, 31.5, 0.0, 50.0, 15.5, 0.0, 0.0, 1.0))


class PaintedMap(AerialMap):
    """Grey, with a red square of 3 m at each landmark, given in degrees."""

    def __init__(self, *landmarks: tuple[float, float], valid_fraction: float = 1.0) -> None:
        self.landmarks = landmarks
        self.valid_fraction = valid_fraction
        self.cuts = 0

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        if lat > 60.0:
            raise NoImageryError("nothing up there")
        self.cuts += 1
        tile = AerialTile(
            np.full((size_px, size_px, 3), 100, np.uint8), lat, lon, gsd, valid_fraction=self.valid_fraction
        )
        rows, cols = np.mgrid[:size_px, :size_px]
        for landmark in self.landmarks:
            row, col = tile.latlon_to_pixel(*landmark)
            near = np.maximum(abs(rows - row), abs(cols - col)) * gsd <= 1.5
            tile.image[near] = (255, 0, 0)
        return tile


@dataclass
class Kept:
    """What a model keeps of a tile, with something that takes memory."""

    row: float
    col: float
    more: dict

    def __iter__(self) -> Iterator[float]:
        return iter((self.row, self.col))


class FindsRed(CrossViewModel):
    """Its heat map is a Gaussian about the middle of what is red on the tile; notes how it was called."""

    def __init__(
        self,
        camera: str = "panorama",
        up: str = "north",
        bins: int = 8,
        angle: float | None = None,
        grid: HeatMapGrid | None = None,
        sigma: float = 3.0,
    ) -> None:
        super().__init__()
        lens = (50.0, 50.0, 31.5, 15.5) if camera == "pinhole" else None
        self.spec = ModelSpec("finds-red", camera, (32, 64), SIZE, GSD, bins, aerial_up=up, intrinsics=lens)
        self.angle, self._grid, self.sigma = angle, grid or HeatMapGrid(), sigma
        self.encoded = 0
        self.calls: list[dict] = []
        self.fill: float | None = None

    @property
    def grid(self) -> HeatMapGrid:
        return self._grid

    def encode_aerial(self, aerial: torch.Tensor) -> tuple[float, float]:
        assert aerial.shape == (1, 3, SIZE, SIZE)
        self.encoded += 1
        red = (aerial[0, 0] - aerial[0, 1]).clamp_min(0) > 1.0
        rows, cols = torch.nonzero(red, as_tuple=True)
        if len(rows) == 0:
            return SIZE / 2, SIZE / 2
        return float(rows.float().mean()), float(cols.float().mean())

    def match(self, ground, features, heading_prior_deg=None, *, orientation=False, **extra) -> HeatMaps:
        assert not torch.is_grad_enabled()
        self.calls.append(
            {"ground": ground, "prior": heading_prior_deg, "orientation": orientation, "extra": extra}
        )
        side = int(SIZE / self.grid.scale)
        row, col = ((f - o) / self.grid.scale for f, o in zip(features, self.grid.origin, strict=True))
        rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        logits = -((rows - row) ** 2 + (cols - col) ** 2).float() / (2 * self.sigma**2)
        if self.fill is not None:
            logits[5, 6] = self.fill
        field = None
        if orientation and self.angle is not None:
            field = torch.tensor([math.cos(self.angle), math.sin(self.angle)])[None, :, None, None]
            field = field.expand(1, 2, side, side)
        return HeatMaps([logits[None, None]], logits[None], field, self.grid)


def place(east: float, north: float) -> tuple[float, float]:
    return LocalProjection(LAT, LON).inverse(east, north)


def metres_between(estimate: PoseEstimate, landmark: tuple[float, float]) -> float:
    return GEOD.inv(estimate.lon, estimate.lat, landmark[1], landmark[0])[2]


def make_localizer(aerial_map: AerialMap, model: CrossViewModel, **options) -> Localizer:
    return Localizer.open(aerial_map, model, **{"turn_step_deg": 0.0, **options})


@pytest.mark.parametrize(("east", "north"), [(0.0, 0.0), (7.3, -4.1), (-9.0, 8.0)])
@pytest.mark.parametrize("grid", [HeatMapGrid(), HeatMapGrid(2.0, (3.25, -1.5))])
def test_the_landmark_is_found_at_its_true_place(east: float, north: float, grid: HeatMapGrid) -> None:
    landmark = place(2.2, -3.7)
    localizer = make_localizer(PaintedMap(landmark), FindsRed(grid=grid))
    estimate = localizer.localize(Observation(IMAGE, *place(east, north), heading=0.3, stamp_ns=17))
    # The painted square is made of whole pixels, so its middle is off by up to half of one.
    assert metres_between(estimate, landmark) < 0.5 * GSD * math.sqrt(2)
    row, col = estimate.heat_map.tile.latlon_to_pixel(estimate.lat, estimate.lon)
    reds = np.nonzero(estimate.tile.image[..., 1] == 0)
    assert (row, col) == pytest.approx((reds[0].mean(), reds[1].mean()), abs=0.01 / GSD)
    assert estimate.stamp_ns == 17
    assert not estimate.at_search_border
    assert estimate.confidence > 0.95
    sigma = 3.0 * grid.scale * GSD
    np.testing.assert_allclose(estimate.covariance, np.eye(2) * (sigma**2 + 0.25), rtol=0.1, atol=0.05)
    assert set(estimate.timings_ms) == {"tile", "ground", "encode", "match", "heat_map"}


@pytest.mark.parametrize("heading", [0.0, 0.9, 2.5, -1.7])
def test_tiles_turned_to_the_heading_give_the_same_place(heading: float) -> None:
    landmark = place(8.0, 5.0)
    model = FindsRed("pinhole", "left")
    localizer = make_localizer(PaintedMap(landmark), model)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON, heading=heading, camera=CAMERA))
    assert estimate.tile.size_px == SIZE
    assert estimate.tile.rotation == pytest.approx(wrap_angle(heading))
    assert estimate.tile.valid_fraction == 1.0
    assert metres_between(estimate, landmark) < 0.5
    # Ahead on the ground is to the right on the tile.
    ahead = estimate.tile.enu_to_pixel(math.cos(heading), math.sin(heading))
    assert ahead == pytest.approx(((SIZE - 1) / 2, (SIZE - 1) / 2 + 1 / GSD))
    assert model.calls[0]["prior"] is None  # its bins are not counted from the heading


def test_tiles_turned_in_steps_are_kept_and_give_the_same_place() -> None:
    landmark = place(8.0, 5.0)
    model = FindsRed("pinhole", "left")
    localizer = make_localizer(PaintedMap(landmark), model, turn_step_deg=4.0)
    for heading_deg, turn_deg, encoded in (
        (11.0, 12.0, 1),
        (13.9, 12.0, 1),
        (14.5, 16.0, 2),
        (10.1, 12.0, 2),
    ):
        heading = math.radians(heading_deg)
        estimate = localizer.localize(Observation(IMAGE, LAT, LON, heading=heading, camera=CAMERA))
        assert math.degrees(estimate.tile.rotation) == pytest.approx(turn_deg)
        assert metres_between(estimate, landmark) < 0.5
        assert estimate.heading == pytest.approx(heading)
        assert model.encoded == encoded
    exact = make_localizer(PaintedMap(landmark), model)
    for _ in range(2):
        exact.localize(Observation(IMAGE, LAT, LON, heading=0.2, camera=CAMERA))
    assert model.encoded == 4


@pytest.mark.parametrize("bins", [0, 8])
def test_a_model_that_trusts_the_heading_sees_along_the_turned_tile(bins: int) -> None:
    """Its image is turned by what the step leaves; a model with bins finds that by itself."""
    model = FindsRed("pinhole", "left", bins=bins)
    localizer = make_localizer(PaintedMap(place(8.0, 5.0)), model, turn_step_deg=4.0)
    image = np.random.default_rng(0).integers(0, 255, IMAGE.shape, np.uint8)
    localizer.localize(Observation(image, LAT, LON, heading=math.radians(10.5), camera=CAMERA))
    seen = image if bins else look_aside(image, CAMERA, math.radians(1.5))
    assert torch.equal(model.calls[0]["ground"], normalise(seen, model.spec))


def test_a_known_heading_is_passed_through_and_no_orientation_asked_for() -> None:
    model = FindsRed(angle=1.0)
    localizer = make_localizer(PaintedMap(), model)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON, heading=-2.0, heading_std=0.1))
    assert (model.calls[0]["prior"], model.calls[0]["orientation"]) == (0.0, False)
    assert estimate.heading == pytest.approx(-2.0)
    assert estimate.heading_variance == pytest.approx(0.01)


def test_a_heading_prior_gives_a_heading_about_it() -> None:
    model = FindsRed(angle=math.radians(-20.0))
    localizer = make_localizer(PaintedMap(), model, heading_prior_deg=45.0)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON, heading=3.0))
    assert (model.calls[0]["prior"], model.calls[0]["orientation"]) == (45.0, True)
    assert estimate.heading == pytest.approx(wrap_angle(3.0 - math.radians(20.0)), abs=1e-5)
    assert 0.0 < estimate.heading_variance < math.radians(5.0) ** 2


@pytest.mark.parametrize("given", [None, 1.0])
def test_an_unknown_heading_is_the_orientation_fields_from_north(given: float | None) -> None:
    model = FindsRed(angle=math.radians(100.0))
    localizer = make_localizer(PaintedMap(), model, heading_prior_deg=None)
    gradient = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    estimate = localizer.localize(Observation(gradient, LAT, LON, heading=given))
    assert model.calls[0]["prior"] is None
    # 100 degrees left of north is 10 degrees south of west.
    assert estimate.heading == pytest.approx(wrap_angle(math.radians(190.0)), abs=1e-5)
    assert bool((model.calls[0]["ground"][0, 0, 0].diff() > 0).all())  # not turned


def test_the_heading_of_turned_tiles_runs_clockwise_from_the_tiles_top() -> None:
    # The published KITTI convention: 90 degrees is straight along the heading the tile was turned to.
    model = FindsRed("pinhole", "left", angle=math.radians(90.0 - 7.0))
    localizer = make_localizer(PaintedMap(), model, heading_prior_deg=10.0)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON, heading=0.5, camera=CAMERA))
    assert model.calls[0]["orientation"]
    assert estimate.heading == pytest.approx(0.5 + math.radians(7.0), abs=1e-5)


def test_a_model_without_orientation_leaves_an_unknown_heading_unknown() -> None:
    localizer = make_localizer(PaintedMap(), FindsRed(angle=None), heading_prior_deg=None)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON))
    assert estimate.heading is None
    assert estimate.heading_variance == pytest.approx(math.pi**2 / 3)


def test_the_heading_variance_grows_where_the_field_disagrees_with_itself() -> None:
    class Undecided(FindsRed):
        def match(self, *args, **kwargs) -> HeatMaps:
            maps = super().match(*args, **kwargs)
            spread = torch.linspace(-1.0, 1.0, SIZE)[None, None, None, :].expand(1, 1, SIZE, SIZE) * 12.0
            maps.orientation = torch.cat([spread.cos(), spread.sin()], 1)
            return maps

    localizer = make_localizer(PaintedMap(), Undecided(angle=0.0, sigma=2.0), heading_prior_deg=None)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON))
    # The angle changes by 24 / 127 rad per pixel, and the mode has a deviation of two pixels.
    assert math.sqrt(estimate.heading_variance) == pytest.approx(2.0 * 24.0 / 127.0, rel=0.05)


@pytest.mark.parametrize(("field", "believed"), [(0.2, True), (2.0, False)])
def test_a_field_that_contradicts_the_bins_is_not_believed(field: float, believed: bool) -> None:
    class Binned(FindsRed):
        """All its cells look 45 degrees to the left: the last of eight bins that count clockwise."""

        def match(self, *args, **kwargs) -> HeatMaps:
            maps = super().match(*args, **kwargs)
            scores = torch.zeros(1, 8, SIZE // 4, SIZE // 4)
            scores[:, 7] = 1.0
            return replace(maps, levels=[scores, scores])

    model = Binned(angle=math.radians(45.0) + field)
    estimate = make_localizer(PaintedMap(), model, heading_prior_deg=None).localize(
        Observation(IMAGE, LAT, LON)
    )
    north = math.pi / 2.0
    expected = math.radians(45.0) + (field if believed else 0.0)
    assert estimate.heading == pytest.approx(wrap_angle(north + expected), abs=1e-6)
    # Somewhere in the bin, which is 45 degrees wide.
    assert (math.sqrt(estimate.heading_variance) > math.radians(12.0)) != believed


def test_the_tiles_features_are_computed_once_and_forgotten_after_a_while() -> None:
    aerial_map, model = PaintedMap(), FindsRed()
    localizer = make_localizer(aerial_map, model)
    for metres in (0.0, 1.0, 2.0):
        localizer.localize(Observation(IMAGE, *place(metres, 0.0), heading=0.0))
    assert model.encoded == aerial_map.cuts == 1
    # As if each tile took a third of a megabyte, of which there is one.
    big = torch.zeros(333_333 // 4)
    model = FindsRed()
    model.precompute = lambda features, orientation: Kept(*features, {"more": (big,)})
    localizer = make_localizer(aerial_map, model, features_mb=1.0)
    for step in range(4):
        localizer.localize(Observation(IMAGE, *place(16.0 * step, 0.0), heading=0.0))
    encoded = model.encoded
    assert encoded == 4
    localizer.localize(Observation(IMAGE, *place(16.0, 0.0), heading=0.0))
    assert model.encoded == encoded
    localizer.localize(Observation(IMAGE, LAT, LON, heading=0.0))
    assert model.encoded == encoded + 1


def test_the_search_disc_follows_the_fix_and_its_covariance() -> None:
    decoy, fix = place(-20.0, 14.0), place(1.0, 2.0)
    localizer = make_localizer(PaintedMap(decoy), FindsRed(sigma=6.0))

    def located(covariance: np.ndarray | None) -> PoseEstimate:
        return localizer.localize(Observation(IMAGE, *fix, covariance, heading=0.0))

    tight = located(np.diag([2.0, 3.0]) ** 2)
    assert tight.heat_map.search is not None
    assert tight.heat_map.search.radius_m == pytest.approx(9.0)
    assert (tight.heat_map.search.lat, tight.heat_map.search.lon) == fix
    assert tight.at_search_border and metres_between(tight, fix) < 9.5
    slanted = located(np.array([[5.0, 4.0], [4.0, 5.0]]))
    assert slanted.heat_map.search.radius_m == pytest.approx(3.0 * 3.0)
    assert located(np.diag([1e-4, 1e-4])).heat_map.search.radius_m == pytest.approx(5.0)
    # A poor fix, and one that says nothing of itself: as far as the map reaches around the fix.
    for covariance in (np.eye(2) * 1e4, None):
        wide = located(covariance)
        assert 22.0 < wide.heat_map.search.radius_m < 32.0
        row, col = wide.tile.latlon_to_pixel(*fix)
        room = min(row, col, SIZE - 1 - row, SIZE - 1 - col) + 0.5
        assert wide.heat_map.search.radius_m == pytest.approx(room * GSD, abs=0.01)


def test_the_search_can_be_a_radius_or_off() -> None:
    decoy = place(-28.0, 24.0)
    near = make_localizer(PaintedMap(decoy), FindsRed(), search_radius_m=7.0, snap_m=4.0)
    estimate = near.localize(Observation(IMAGE, LAT, LON, heading=0.0))
    assert estimate.at_search_border and estimate.heat_map.search.radius_m == 7.0
    anywhere = make_localizer(PaintedMap(decoy), FindsRed(), search_radius_m=None, snap_m=4.0)
    estimate = anywhere.localize(Observation(IMAGE, LAT, LON, heading=0.0))
    assert estimate.heat_map.search is None and not estimate.at_search_border
    assert metres_between(estimate, decoy) < 0.5


def test_what_keeps_an_observation_from_being_localised_has_a_name() -> None:
    def localize(model: CrossViewModel, observation: Observation, **options) -> PoseEstimate:
        return make_localizer(options.pop("map", PaintedMap()), model, **options).localize(observation)

    with pytest.raises(HeadingRequiredError):
        localize(FindsRed(), Observation(IMAGE, LAT, LON))
    with pytest.raises(HeadingRequiredError):
        localize(
            FindsRed("pinhole", "left"), Observation(IMAGE, LAT, LON, camera=CAMERA), heading_prior_deg=None
        )
    with pytest.raises(IntrinsicsRequiredError):
        localize(FindsRed("pinhole", "left"), Observation(IMAGE, LAT, LON, heading=0.0))
    with pytest.raises(ImageError, match="calibration"):
        wrong = np.zeros((30, 60, 3), np.uint8)
        localize(FindsRed("pinhole", "left"), Observation(wrong, LAT, LON, heading=0.0, camera=CAMERA))
    with pytest.raises(LowImageryError, match="80%"):
        localize(FindsRed(), Observation(IMAGE, LAT, LON, heading=0.0), map=PaintedMap(valid_fraction=0.8))
    with pytest.raises(NoImageryError):
        localize(FindsRed(), Observation(IMAGE, 61.0, LON, heading=0.0))
    aside = HeatMapGrid(1.0, (100.0, 0.0))
    with pytest.raises(FixOutsideTileError):
        localize(FindsRed(grid=aside), Observation(IMAGE, LAT, LON, heading=0.0))
    for bad in (math.nan, math.inf):
        model = FindsRed()
        model.fill = bad
        with pytest.raises(NonFiniteHeatMapError):
            localize(model, Observation(IMAGE, LAT, LON, heading=0.0))


def test_tiles_and_settings_that_do_not_fit_the_model_are_refused() -> None:
    for size, gsd in ((SIZE, 0.4), (SIZE + 1, GSD)):
        with pytest.raises(ValueError, match="aerial tiles"):
            Localizer(TileStore(PaintedMap(), size, gsd, 16.0), FindsRed())
    with pytest.raises(ValueError, match="182 px"):
        Localizer(TileStore(PaintedMap(), SIZE, GSD, 16.0), FindsRed("pinhole", "left"))
    with pytest.raises(ValueError, match="known heading"):
        make_localizer(PaintedMap(), FindsRed(bins=0), heading_prior_deg=None)
    with pytest.raises(ValueError, match="search radius"):
        make_localizer(PaintedMap(), FindsRed(), search_radius_m="auto")


def test_extra_inputs_reach_the_model() -> None:
    model = FindsRed(bins=0)
    model.extra_inputs = frozenset({"meters_per_pixel"})
    make_localizer(PaintedMap(), model).localize(Observation(IMAGE, LAT, LON, heading=0.0))
    torch.testing.assert_close(model.calls[0]["extra"]["meters_per_pixel"], torch.tensor([GSD]))
    assert model.calls[0]["prior"] == 0.0
    model = FindsRed("pinhole", "left", bins=0)
    model.extra_inputs = frozenset({"intrinsics"})
    large = CameraModel(128, 64, (100.0, 0.0, 63.5, 0.0, 100.0, 31.5, 0.0, 0.0, 1.0))
    image = np.zeros((64, 128, 3), np.uint8)
    make_localizer(PaintedMap(), model).localize(Observation(image, LAT, LON, heading=0.0, camera=large))
    torch.testing.assert_close(
        model.calls[0]["extra"]["intrinsics"][0],
        torch.from_numpy(CAMERA.matrix).float(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("heading_prior_deg", [0.0, 60.0, None])
def test_a_real_network_runs_through(heading_prior_deg: float | None) -> None:
    torch.manual_seed(0)
    model = create_model("ccvpe-small")
    localizer = make_localizer(PaintedMap(), model, heading_prior_deg=heading_prior_deg)
    localizer.warm_up()
    estimate = localizer.localize(Observation(IMAGE, LAT, LON, np.eye(2) * 16.0, heading=0.2))
    assert metres_between(estimate, (LAT, LON)) <= 12.0 + 0.5
    assert 0.0 < estimate.confidence <= 1.0
    assert estimate.heading is not None and -math.pi < estimate.heading <= math.pi
    assert np.linalg.eigvalsh(estimate.covariance).min() >= 0.25


@pytest.mark.parametrize(
    "camera, up, prior, heading",
    [
        ("panorama", "north", None, None),
        ("panorama", "north", 45.0, 0.7),
        ("panorama", "north", 0.0, 0.7),
        ("pinhole", "left", 10.0, 0.7),
    ],
)
def test_scores_of_a_tile_are_those_of_the_estimate(
    camera: str, up: str, prior: float | None, heading: float | None
) -> None:
    localizer = make_localizer(
        PaintedMap(place(4.0, 3.0)),
        FindsRed(camera, up, angle=0.3),
        heading_prior_deg=prior,
        search_radius_m=None,
    )
    observation = Observation(IMAGE, LAT, LON, heading=heading, camera=CAMERA)
    estimate, scores = localizer.localize(observation), localizer.score(observation)
    assert (scores.tile.key, scores.grid) == (estimate.tile.key, estimate.heat_map.grid)
    peak = np.unravel_index(scores.logits.argmax(), scores.logits.shape)
    assert peak == estimate.heat_map.peak_pixel
    if prior == 0.0:
        assert scores.cos is None and scores.sin is None
    else:
        assert scores.cos is not None and scores.sin is not None and estimate.heading is not None
        angle = math.atan2(scores.sin[peak], scores.cos[peak])
        assert wrap_angle(angle - estimate.heading) == pytest.approx(0.0, abs=1e-5)


def test_scores_keep_the_features_of_many_tiles_until_another_tile_is_localised() -> None:
    model = FindsRed()
    localizer = make_localizer(PaintedMap(), model, snap_m=1.0)
    places = [Observation(IMAGE, *place(10.0 * k, 0.0), heading=0.0) for k in range(20)]
    for observation in places + places:
        localizer.score(observation)
    assert model.encoded == 20
    localizer.localize(Observation(IMAGE, *place(0.0, 20.0), heading=0.0))
    for observation in places:
        localizer.score(observation)
    assert model.encoded == 21 + 20 - 7  # eight had been kept


def test_scores_that_are_not_finite_are_refused() -> None:
    model = FindsRed()
    localizer = make_localizer(PaintedMap(), model)
    model.fill = math.nan
    with pytest.raises(NonFiniteHeatMapError, match="the heat map of finds-red"):
        localizer.score(Observation(IMAGE, LAT, LON, heading=0.0))
    model.fill, model.angle = None, math.nan
    with pytest.raises(NonFiniteHeatMapError, match="the orientation field of finds-red"):
        localizer.of_all_headings.score(Observation(IMAGE, LAT, LON))


def test_a_localizer_of_known_headings_has_one_of_all_headings() -> None:
    localizer = make_localizer(PaintedMap(place(4.0, 3.0)), FindsRed(angle=0.3))
    with pytest.raises(HeadingRequiredError):
        localizer.localize(Observation(IMAGE, LAT, LON))
    estimate = localizer.of_all_headings.localize(Observation(IMAGE, LAT, LON))
    assert estimate.heading == pytest.approx(math.pi / 2 + 0.3, abs=1e-5)


def test_the_snippet_of_the_readme_localises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_geotiff(tmp_path / "city.tif", texture(600, 600), LAT, LON, 0.48, "EPSG:32633")
    model = create_model("ccvpe-small")
    torch.save(model.state_dict(), "ccvpe.pt")
    names = {"image": IMAGE, "lat": LAT, "lon": LON, "heading": 0.3}
    exec(snippet.replace("ccvpe-vigor", "ccvpe-small"), names)
    assert metres_between(names["estimate"], (LAT, LON)) < model.half_extent_m
    names["localizer"].close()


def test_a_localizer_closes_the_map_that_it_opened_and_no_other(tmp_path: Path) -> None:
    tif = write_geotiff(tmp_path / "city.tif", texture(600, 600), LAT, LON, 0.48, "EPSG:32633")
    observation = Observation(IMAGE, LAT, LON, heading=0.3)
    with Localizer.open(tif, "ccvpe-small") as localizer:
        localizer.localize(observation)
    with pytest.raises(MapError, match="closed"):
        localizer.localize(replace(observation, lat=LAT + 0.001))
    with open_map(tif) as aerial:
        with Localizer.open(aerial, "ccvpe-small"):
            pass
        assert aerial.tile(LAT, LON, 32, 0.5).valid_fraction == 1.0
    with pytest.raises(CheckpointError, match=r"choose from ccvpe-vigor.*ccvpe-small"):
        Localizer.open(tif, "ccvpe-smal")


def test_a_slow_map_keeps_an_observation_waiting_no_longer_than_allowed() -> None:
    class SlowMap(PaintedMap):
        answers = threading.Event()

        def tile(self, *args, **kwargs) -> AerialTile:
            self.answers.wait()
            return super().tile(*args, **kwargs)

    aerial = SlowMap(place(2.0, 1.0))
    with make_localizer(aerial, FindsRed(), tile_wait_s=0.05) as localizer:
        observation = Observation(IMAGE, LAT, LON, heading=0.0)
        for _ in range(3):
            with pytest.raises(MapUnavailableError):
                localizer.localize(observation)
        aerial.answers.set()
        while True:
            with suppress(MapUnavailableError):
                estimate = localizer.localize(observation)
                break
        assert metres_between(estimate, place(2.0, 1.0)) < 0.5


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_heading_bins_are_read_where_the_scores_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runtimes return scores on the CPU, whatever device they compute on."""

    class OneBin(FindsRed):
        def match(self, *args, **kwargs) -> HeatMaps:
            scores = torch.zeros(1, 8, SIZE // 4, SIZE // 4)
            scores[:, 7] = 1.0
            return replace(super().match(*args, **kwargs), levels=[scores, scores])

        def tile_tensors(self, features: Any) -> tuple:
            return ()

        def maps(self, outputs: Any, features: Any) -> HeatMaps:
            return self.match(None, features, None, orientation=True)

    monkeypatch.setattr(localizer_module, "make_runtime", lambda *args: lambda ground, tile: ())
    # A device other than that of the scores; "meta" stands for a GPU.
    device = "cpu" if backend == "torch" else "meta"
    model = OneBin(angle=math.radians(45.0) + 2.0)
    localizer = make_localizer(PaintedMap(), model, heading_prior_deg=None, backend=backend, device=device)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON))
    assert estimate.heading == pytest.approx(wrap_angle(math.radians(90.0 + 45.0)), abs=1e-6)


def test_lever_arms_turn_with_the_vehicle() -> None:
    mounting = Mounting(antenna=(-1.0, 0.5), camera=(2.0, -0.3), camera_yaw=math.radians(30.0))
    north = math.pi / 2
    # Facing north, forward is north and left is west.
    assert in_enu((2.0, -0.3), north) == pytest.approx((0.3, 2.0))
    camera = mounting.camera_from_antenna(LAT, LON, north)
    assert LocalProjection(LAT, LON).forward(*camera) == pytest.approx((0.8, 3.0), abs=1e-6)
    base = mounting.base_from_camera(*camera, north)
    assert LocalProjection(LAT, LON).forward(*base) == pytest.approx((0.5, 1.0), abs=1e-6)
    assert mounting.looking(3.0) == pytest.approx(wrap_angle(3.0 + math.radians(30.0)))
    assert mounting.heading(mounting.looking(3.0)) == pytest.approx(3.0)
    assert Mounting().camera_from_antenna(LAT, LON, 1.0) == (LAT, LON)


def test_the_headings_error_swings_the_vehicle_about_the_camera() -> None:
    mounting = Mounting(camera=(2.0, 1.0))
    heading, std = 0.6, 0.02
    rng = np.random.default_rng(0)
    samples = np.array([in_enu((-2.0, -1.0), heading + std * e) for e in rng.normal(size=20000)])
    expected = np.cov(samples.T) + np.diag([0.5, 0.7])
    covariance = mounting.base_covariance(np.diag([0.5, 0.7]), heading, std**2)
    np.testing.assert_allclose(covariance, expected, atol=1e-4)


@pytest.mark.parametrize("heading", [0.0, 1.2])
@pytest.mark.parametrize("size_px", [128, 500])
def test_the_overlay_shows_the_estimate_where_it_is(heading: float, size_px: int) -> None:
    model = FindsRed("pinhole", "left", grid=HeatMapGrid(2.0, (0.5, 0.5)))
    localizer = make_localizer(PaintedMap(place(9.0, 7.0)), model)
    estimate = localizer.localize(Observation(IMAGE, LAT, LON, heading=heading, camera=CAMERA))
    picture = draw_overlay(estimate, LAT, LON, size_px)
    assert picture.shape == (size_px, size_px, 3) and picture.dtype == np.uint8
    row, col = (
        (v + 0.5) * size_px / SIZE - 0.5 for v in estimate.tile.latlon_to_pixel(estimate.lat, estimate.lon)
    )
    patch = picture[round(row) - 1 : round(row) + 2, round(col) - 1 : round(col) + 2].astype(int)
    assert np.abs(patch - ESTIMATE_COLOUR).sum(2).min() < 60
    # The heat is warmest around the estimate, and the far corner is the bare tile.
    assert tuple(picture[2, 2]) == (100, 100, 100)
    # A fix far off the tile does no harm.
    draw_overlay(estimate, LAT + 1.0, LON, size_px)
