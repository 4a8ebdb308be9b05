"""From one observation (image, coarse fix, heading) to the camera's pose on the aerial map.

Everything here is the *camera's*: its coarse position, the direction it looks in, its estimated pose.
``mounting`` moves positions between antenna, vehicle and camera.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.camera import CameraModel
from xview_loc.estimation.heat_map import HeatMap, SearchDisc, room_around
from xview_loc.geodesy import wrap_angle
from xview_loc.images import Image
from xview_loc.maps.base import AerialTile
from xview_loc.maps.store import TileStore
from xview_loc.models.base import CrossViewModel, HeatMaps, ModelSpec
from xview_loc.models.graph import FrameSettings
from xview_loc.models.inputs import normalise, prepare_ground
from xview_loc.models.runtimes import (
    Backend,
    Precision,
    Runtime,
    check_precision,
    choose_backend,
    make_runtime,
)

# The search disc of a fix with a covariance: so many standard deviations of its larger axis, but not
# less than this, since receivers understate their error between houses.
SEARCH_SIGMAS = 3.0
MIN_SEARCH_M = 5.0
# What an orientation field's spread within one mode cannot show: the field's own error.
HEADING_STD_FLOOR = math.radians(2.0)
# Of the levels' scores of heading bins, those of this one are looked at: the second one, which errs the least
# on cities that are strange to a model.
HEADING_LEVEL = 1
# Variance of a heading nothing is known of (uniform over the circle), rad^2.
UNKNOWN_HEADING_VARIANCE = math.pi**2 / 3.0
TILES_ENCODED = 8
TILES_TAKEN_OVER = 3


class LocalizationError(Exception):
    """This observation gives no pose; the message is one clear line."""


class HeadingRequiredError(LocalizationError):
    """The observation has no heading, and model or settings need one."""


class IntrinsicsRequiredError(LocalizationError):
    """The observation has no camera model, and a pinhole model needs one."""


class LowImageryError(LocalizationError):
    """Too much of the aerial tile has no imagery."""


class FixOutsideTileError(LocalizationError):
    """The coarse fix lies outside the area that the model's heat map covers on its tile."""


class NonFiniteHeatMapError(LocalizationError):
    """The model's output has values that are not finite."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What was known when an image was taken.

    image: uint8 (H, W, 3), RGB. lat, lon: coarse position of the camera, degrees. fix_covariance: its 2x2
    covariance in ENU axes, m^2. heading: true-north ENU yaw of the direction that the image's centre column
    looks in, radians, with its standard deviation. camera: needed by pinhole models.
    """

    image: Image
    lat: float
    lon: float
    fix_covariance: NDArray[np.float64] | None = None
    heading: float | None = None
    heading_std: float = 0.0
    camera: CameraModel | None = None
    stamp_ns: int = 0


@dataclass(frozen=True, eq=False)
class PoseEstimate:
    """Where the camera was.

    lat, lon: degrees. covariance: 2x2 in ENU axes, m^2. heading: true-north ENU yaw of the image's centre
    column, radians, or None where unknown; heading_variance: rad^2. confidence: the winning mode's share of
    the heat map, 0..1. tile: the aerial tile as the model saw it. at_search_border: the peak lies on the edge
    of the search disc, so the true place may be outside. timings_ms: duration of each step (``encode`` is 0
    where the tile's features were at hand).
    """

    lat: float
    lon: float
    covariance: NDArray[np.float64]
    heading: float | None
    heading_variance: float
    confidence: float
    heat_map: HeatMap
    tile: AerialTile
    stamp_ns: int
    at_search_border: bool
    timings_ms: dict[str, float] = field(default_factory=dict)


def required_tile_px(spec: ModelSpec) -> int:
    """Side in pixels of the tiles that a TileStore must serve to a localizer of this model.

    Larger than the model's own where the tile has to be turned to the heading.
    """
    return spec.aerial_size if spec.aerial_up == "north" else math.ceil(math.sqrt(2.0) * spec.aerial_size)


class Localizer:
    """Localises observations one after another; for use by one thread at a time.

    ``heading_prior_deg`` says how far the true heading may be from the observation's: 0 trusts it, None
    searches all headings (panoramas then need none). ``search_radius_m`` limits the search to a disc about
    the coarse position: a radius in metres, ``"covariance"`` for three standard deviations of the fix (the
    whole tile where it has no covariance), or None for no limit. A disc never reaches beyond the heat map.
    Tiles of which less than ``min_valid_fraction`` has imagery are refused. Probabilities and covariances
    are those of the model's calibration; ``covariance_floor_m`` stands in for that of the calibration.
    What the model keeps of the last eight tiles takes at most ``features_mb`` of memory (or one tile's);
    ``precompute`` makes that much more, and every image of a tile that comes again faster.
    ``backend`` and ``precision`` say what executes the model's share of each image; tiles are PyTorch's.
    Raises ValueError where tiles, model and heading prior do not go together, UserError where a backend is
    missing or cannot execute the model.
    """

    def __init__(
        self,
        tiles: TileStore,
        model: CrossViewModel,
        *,
        heading_prior_deg: float | None = 0.0,
        search_radius_m: float | Literal["covariance"] | None = "covariance",
        min_valid_fraction: float = 0.9,
        covariance_floor_m: float | None = None,
        device: str | torch.device = "cpu",
        features_mb: float = 256.0,
        precompute: bool = True,
        backend: Backend = "torch",
        precision: Precision = "float32",
    ) -> None:
        spec = model.spec
        if tiles.size_px != required_tile_px(spec) or not math.isclose(tiles.gsd, spec.gsd, rel_tol=1e-6):
            raise ValueError(
                f"{spec.name} needs aerial tiles of {required_tile_px(spec)} px at {spec.gsd:.4f} m/px, "
                f"not {tiles.size_px} px at {tiles.gsd:.4f} m/px"
            )
        if spec.bins == 0 and heading_prior_deg != 0:
            raise ValueError(f"{spec.name} needs a known heading (a heading prior of 0 degrees)")
        if isinstance(search_radius_m, str) and search_radius_m != "covariance":
            raise ValueError(f"the search radius is metres, 'covariance' or None, not {search_radius_m!r}")
        self.spec = spec
        self._tiles = tiles
        self._device = torch.device(device)
        self.backend = choose_backend(backend, self._device)
        check_precision(self.backend, precision, self._device)
        self._precision = precision
        # Other runtimes compute in a precision of their own.
        self._dtype = getattr(torch, precision) if self.backend == "torch" else torch.float32
        self._model_device = self._device if self.backend == "torch" else torch.device("cpu")
        # Convolutions on the CPU are fastest with the channels last.
        self._model = model.to(self._model_device, self._dtype).eval()
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._heading_prior_deg = heading_prior_deg
        self._search_radius_m = search_radius_m
        self._min_valid_fraction = min_valid_fraction
        self._calibration = model.calibration
        if covariance_floor_m is not None:
            self._calibration = replace(model.calibration, floor_m=covariance_floor_m)
        # By the tile's key: the tile and what the model keeps of it, the one used last at the end.
        self._features: OrderedDict[str, tuple[AerialTile, Any]] = OrderedDict()
        self._features_mb = features_mb
        # A graph takes nothing but precomputed tiles.
        self._precompute = self.backend != "torch" or (precompute and spec.aerial_up == "north")
        # Of the settings used last.
        self._runtime: tuple[FrameSettings, Runtime] | None = None
        # A turned panorama faces north up to the prior; any other image leaves all bins open.
        self._turns_image = spec.camera == "panorama" and heading_prior_deg is not None
        self._needs_heading = self._turns_image or spec.aerial_up == "left" or heading_prior_deg == 0

    @torch.inference_mode()
    def localize(self, observation: Observation) -> PoseEstimate:
        """The pose of ``observation``.

        Raises LocalizationError and its subclasses, ImageError for an image that does not fit the model or
        its calibration, and MapError for what keeps the aerial tile from being had.
        """
        if self._needs_heading and observation.heading is None:
            raise HeadingRequiredError(f"{self.spec.name} needs a heading, and the observation has none")
        if self.spec.camera == "pinhole" and observation.camera is None:
            raise IntrinsicsRequiredError(
                f"{self.spec.name} needs the camera's intrinsics, which are missing"
            )
        timings: dict[str, float] = {}
        with _timed(timings, "tile"):
            tile = self._tile(observation)
        with _timed(timings, "ground"):
            ground = self._ground(observation)
        with _timed(timings, "encode"):
            features = self._encode(tile)
        with _timed(timings, "match"):
            maps = self._match(ground, features, tile, observation)
            logits = maps.logits[0].float().cpu().numpy()
        with _timed(timings, "heat_map"):
            if not np.isfinite(logits).all():
                raise NonFiniteHeatMapError(
                    f"the heat map of {self.spec.name} has values that are not finite"
                )
            search = self._search(observation, logits.shape, maps, tile)
            heat_map = HeatMap.from_logits(logits, maps.grid, tile, search, self._calibration)
            lat, lon = heat_map.to_latlon(*heat_map.peak)
            covariance = heat_map.covariance(self._calibration.floor_m)
            heading, heading_variance = self._heading(observation, maps, heat_map)
        return PoseEstimate(
            lat=float(lat),
            lon=float(lon),
            covariance=covariance,
            heading=heading,
            heading_variance=heading_variance,
            confidence=heat_map.confidence,
            heat_map=heat_map,
            tile=tile,
            stamp_ns=observation.stamp_ns,
            at_search_border=heat_map.at_border,
            timings_ms=timings,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the model once on noise, so that the first observation is as fast as the others.

        Raises NonFiniteHeatMapError where its heat map is not finite.
        """
        rng = np.random.default_rng(0)
        side = self.spec.aerial_size
        aerial = rng.integers(0, 256, (side, side, 3), np.uint8)
        tile = AerialTile(aerial, 0.0, 0.0, self.spec.gsd)
        height, width = self.spec.ground_size
        camera = CameraModel(width, height, (width, 0, width / 2, 0, width, height / 2, 0, 0, 1))
        ground = normalise(rng.integers(0, 256, (height, width, 3), np.uint8))
        ground = ground.to(self._model_device, self._dtype, memory_format=torch.channels_last)
        features = self._features_of(aerial)
        observation = Observation(aerial, 0.0, 0.0, heading=0.0, camera=camera)
        maps = self._match(ground, features, tile, observation)
        if not bool(maps.logits.isfinite().all()):
            raise NonFiniteHeatMapError(f"the heat map of {self.spec.name} has values that are not finite")

    @torch.inference_mode()
    def take_over(self, other: Localizer) -> None:
        """Encode the tiles that another localizer of the same map used last; it may be in use meanwhile.

        A few: each takes time from its frames.
        """
        for tile, _ in list(other._features.values())[-TILES_TAKEN_OVER:]:
            self._encode(tile)

    def forget_tiles(self) -> None:
        """Free what the model keeps of tiles; the localizer may be in use meanwhile."""
        self._features = OrderedDict()

    def _tile(self, observation: Observation) -> AerialTile:
        tile = self._tiles.around(observation.lat, observation.lon)
        if self.spec.aerial_up == "left":
            assert observation.heading is not None
            tile = tile.rotated(observation.heading, self.spec.aerial_size)
        if tile.valid_fraction < self._min_valid_fraction:
            raise LowImageryError(
                f"only {tile.valid_fraction:.0%} of the aerial tile has imagery, "
                f"{self._min_valid_fraction:.0%} is needed"
            )
        return tile

    def _ground(self, observation: Observation) -> Tensor:
        heading = observation.heading if self._turns_image else None
        ground = prepare_ground(observation.image, self.spec, heading=heading, camera=observation.camera)
        return ground.to(self._model_device, self._dtype, memory_format=torch.channels_last)

    def _encode(self, tile: AerialTile) -> Any:
        keep = self.spec.aerial_up == "north"  # a tile turned to the heading hardly ever comes again
        known = self._features
        if keep and tile.key in known:
            known.move_to_end(tile.key)
            return known[tile.key][1]
        features = self._features_of(tile.image)
        if keep:
            known[tile.key] = (tile, features)
            # The tiles of a model are all of one size.
            room = max(1, int(self._features_mb / max(_megabytes(features), 1e-3)))
            while len(known) > min(room, TILES_ENCODED):
                known.popitem(last=False)
        return features

    def _features_of(self, aerial: Image) -> Any:
        """What the model keeps of a tile; of one that never comes again no more than it needs."""
        features = self._model.encode_aerial(
            normalise(aerial).to(self._model_device, self._dtype, memory_format=torch.channels_last)
        )
        if not self._precompute:
            return features
        return self._model.precompute(features, orientation=self._heading_prior_deg != 0)

    def _match(self, ground: Tensor, features: Any, tile: AerialTile, observation: Observation) -> HeatMaps:
        inputs: dict[str, Any] = {}
        if "meters_per_pixel" in self._model.extra_inputs:
            inputs["meters_per_pixel"] = (tile.gsd,)
        if "intrinsics" in self._model.extra_inputs:
            assert observation.camera is not None
            height, width = self.spec.ground_size
            matrix = observation.camera.scaled_matrix(width, height)
            inputs["intrinsics"] = (tuple(map(tuple, matrix.tolist())),)
        known_to_model = self._turns_image or self.spec.bins == 0
        settings = FrameSettings(
            self._heading_prior_deg if known_to_model else None,
            orientation=self._heading_prior_deg != 0,
            inputs=tuple(inputs.items()),
        )
        if self.backend == "torch":
            prior, orientation = settings.heading_prior_deg, settings.orientation
            extra = {name: x.to(self._device) for name, x in settings.extra().items()}
            return self._model.match(ground, features, prior, orientation=orientation, **extra)
        if self._runtime is None or self._runtime[0] != settings:
            made = make_runtime(self._model, self.backend, settings, self._precision, self._device)
            self._runtime = settings, made
        return self._model.maps(self._runtime[1](ground, self._model.tile_tensors(features)), features)

    def _search(
        self, observation: Observation, shape: tuple[int, ...], maps: HeatMaps, tile: AerialTile
    ) -> SearchDisc | None:
        if self._search_radius_m is None:
            return None
        lat, lon = observation.lat, observation.lon
        room = room_around((shape[0], shape[1]), maps.grid, tile, lat, lon)
        pixel = maps.grid.scale * tile.gsd
        if room < pixel:
            raise FixOutsideTileError(
                "the coarse fix lies outside the area that the heat map covers; "
                "a smaller spacing of the tile centres helps"
            )
        radius = room
        if isinstance(self._search_radius_m, (int, float)):
            radius = float(self._search_radius_m)
        elif observation.fix_covariance is not None:
            sigma = math.sqrt(max(0.0, float(np.linalg.eigvalsh(observation.fix_covariance)[-1])))
            radius = max(SEARCH_SIGMAS * sigma, MIN_SEARCH_M)
        return SearchDisc(lat, lon, max(min(radius, room), pixel))

    def _heading(
        self, observation: Observation, maps: HeatMaps, heat_map: HeatMap
    ) -> tuple[float | None, float]:
        """(heading, variance) of the camera: of the orientation field or the bins, else as it was given."""
        if maps.orientation is None:
            if observation.heading is None:
                return None, UNKNOWN_HEADING_VARIANCE
            return wrap_angle(observation.heading), observation.heading_std**2
        cos, sin = maps.orientation[0].float().cpu().numpy()
        weight = heat_map.probability * heat_map.mode
        cos, sin = float((weight * cos).sum()), float((weight * sin).sum())
        if not (math.isfinite(cos) and math.isfinite(sin)):
            raise NonFiniteHeatMapError(f"the orientation field of {self.spec.name} is not finite")
        angle = math.atan2(sin, cos)
        resultant = min(1.0, math.hypot(cos, sin) / float(weight.sum()))
        # Variance of the normal distribution that, wrapped around the circle, has this mean resultant.
        variance = -2.0 * math.log(max(resultant, 1e-12)) + HEADING_STD_FLOOR**2
        variance = min(variance, UNKNOWN_HEADING_VARIANCE)
        level = min(HEADING_LEVEL, len(maps.levels) - 1)
        if maps.levels[level].shape[1] > 2:
            # A field that contradicts the bins, which are what finds the place, is not believed.
            row, col = (torch.tensor([cell], device=self._device) for cell in heat_map.peak_pixel)
            won = float(self._model.winning_heading(maps, level, row, col)[0])
            width = 2.0 * math.pi / self.spec.bins
            if abs(wrap_angle(angle - won)) > width:
                angle, variance = won, width**2 / 12.0 + HEADING_STD_FLOOR**2
        if self.spec.aerial_up == "left":
            # Clockwise from the tile's top, which faces left of the direction that its columns grow in.
            return wrap_angle(heat_map.tile.rotation + math.pi / 2.0 - angle), variance
        nominal = observation.heading if self._turns_image else math.pi / 2.0
        assert nominal is not None
        return wrap_angle(nominal + angle), variance


def _megabytes(features: Any) -> float:
    """Memory of all tensors in nested dataclasses, dictionaries and sequences."""
    if isinstance(features, Tensor):
        return features.numel() * features.element_size() / 1e6
    if is_dataclass(features):
        features = [getattr(features, f.name) for f in fields(features)]
    if isinstance(features, dict):
        features = list(features.values())
    return sum(map(_megabytes, features)) if isinstance(features, (list, tuple)) else 0.0


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = (time.perf_counter() - start) * 1e3
