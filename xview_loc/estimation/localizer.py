"""Localise one observation (image, coarse fix, heading) on an aerial map.

Positions and directions are the camera's. :mod:`xview_loc.vehicle.mounting` converts between antenna, vehicle
and camera.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.camera import CameraModel
from xview_loc.estimation.heat_map import HeatMap, SearchDisc, TileScores, room_around
from xview_loc.estimation.observation import (
    FixOutsideTileError,
    HeadingRequiredError,
    IntrinsicsRequiredError,
    LowImageryError,
    NonFiniteHeatMapError,
    Observation,
    PoseEstimate,
)
from xview_loc.geodesy import wrap_angle
from xview_loc.images import Image
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialMap, AerialTile
from xview_loc.maps.store import TileStore
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.models.checkpoint import load_model
from xview_loc.models.graph import FrameSettings
from xview_loc.models.inputs import ground_image, normalise
from xview_loc.models.runtimes import (
    Backend,
    Precision,
    Runtime,
    check_precision,
    choose_backend,
    make_runtime,
)
from xview_loc.models.specs import TURN_STEP_DEG
from xview_loc.rig import look_aside
from xview_loc.statistics import wrapped_variance

# Radius of the search disc in standard deviations of the fix along its larger axis.
SEARCH_SIGMAS = 3.0
# Smallest search radius from a covariance: receivers understate their error between buildings.
MIN_SEARCH_M = 5.0
# The orientation field's own error, which its spread within a mode cannot show.
HEADING_STD_FLOOR = math.radians(2.0)
# Level whose heading scores are used: the second, most robust in unfamiliar cities.
HEADING_LEVEL = 1
# Variance of an unknown heading (uniform over the circle), rad^2.
UNKNOWN_HEADING_VARIANCE = math.pi**2 / 3.0
# Most tiles whose features are kept.
TILES_ENCODED = 8
TILES_TAKEN_OVER = 3
# Memory for the features of tiles that a search without a fix compares, MB: those of ccvpe-small in 500 m.
SCAN_MB = 1500.0


def search_radius(fix_covariance: NDArray[np.float64]) -> float:
    """Return the radius within which a fix of this covariance (2, 2) lies, metres."""
    sigma = math.sqrt(max(0.0, float(np.linalg.eigvalsh(fix_covariance)[-1])))
    return max(SEARCH_SIGMAS * sigma, MIN_SEARCH_M)


def tile_store(map: AerialMap, model: CrossViewModel, snap_m: float | None = None) -> TileStore:
    """Return a store that cuts ``map`` into the tiles that ``model`` needs.

    snap_m: spacing of the tile centres, metres; default: a quarter of the side of the searched square.
    """
    return TileStore(map, model.spec.tile_px, model.spec.gsd, snap_m or model.half_extent_m / 2)


@dataclass(frozen=True)
class Limits:
    """What may change from one observation to the next; as of the constructor of :class:`Localizer`."""

    search_radius_m: float | Literal["covariance"] | None = "covariance"
    min_valid_fraction: float = 0.9
    covariance_floor_m: float | None = None

    def __post_init__(self) -> None:
        radius = self.search_radius_m
        if isinstance(radius, str) and radius != "covariance":
            raise ValueError(f"the search radius is metres, 'covariance' or None, not {radius!r}")


class Localizer:
    """Localises observations one after another; for use by one thread at a time.

    tiles: store of aerial tiles of the model's size. heading_prior_deg: how far the true heading may be from
    the observation's, degrees; 0 trusts it, None searches all headings (panoramas then need none).
    search_radius_m: limit of the search around the coarse position: metres, ``"covariance"`` for three
    standard deviations of the fix (the whole tile if it has no covariance), or None for no limit; the disc
    never reaches beyond the heat map. min_valid_fraction: least share of the tile with imagery.
    covariance_floor_m: replaces the floor of the model's calibration, metres. features_mb: memory for the
    features of up to eight tiles (at least one is kept), MB. turn_step_deg: tiles that are turned to the
    heading are turned in steps of this, so that they come again and can be kept; 0 turns each to its image's
    heading, and keeps none. precompute: makes features several times larger
    and images of a known tile faster. backend, precision: what executes the model's share of each image;
    tiles are always encoded by PyTorch. tile_wait_s: longest wait for an aerial tile, seconds, as of
    :meth:`TileStore.around`. ``limits`` may be replaced between observations. Raises ValueError if tiles,
    model and heading prior do not go together, UserError if the backend is missing or cannot execute the
    model.
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
        turn_step_deg: float = TURN_STEP_DEG,
        precompute: bool = True,
        backend: Backend = "torch",
        precision: Precision = "float32",
        tile_wait_s: float | None = None,
    ) -> None:
        spec = model.spec
        if tiles.size_px != spec.tile_px or not math.isclose(tiles.gsd, spec.gsd, rel_tol=1e-6):
            raise ValueError(
                f"{spec.name} needs aerial tiles of {spec.tile_px} px at {spec.gsd:.4f} m/px, "
                f"not {tiles.size_px} px at {tiles.gsd:.4f} m/px"
            )
        if spec.bins == 0 and heading_prior_deg != 0:
            raise ValueError(f"{spec.name} needs a known heading (a heading prior of 0 degrees)")
        self.spec = spec
        self.limits = Limits(search_radius_m, min_valid_fraction, covariance_floor_m)
        self._tiles = tiles
        self._tile_wait_s = tile_wait_s
        self._device = torch.device(device)
        self.backend = choose_backend(backend, self._device)
        check_precision(self.backend, precision, self._device)
        self._precision = precision
        # Other runtimes take float32 and compute in a precision of their own.
        self._dtype = getattr(torch, precision) if self.backend == "torch" else torch.float32
        self._model_device = self._device if self.backend == "torch" else torch.device("cpu")
        # Convolutions on the CPU are fastest with the channels last.
        self._model = model.to(self._model_device, self._dtype).eval()
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._heading_prior_deg = heading_prior_deg
        self.calibration = model.calibration
        # Tile and its features by the tile's key, most recently used last.
        self._features: OrderedDict[str, tuple[AerialTile, Any]] = OrderedDict()
        self._features_mb = features_mb
        self._turn_step = math.radians(turn_step_deg)
        # A tile turned to an image's heading hardly ever comes again.
        self._keeps = spec.aerial_up == "north" or turn_step_deg > 0.0
        # Graphs take precomputed tiles only.
        self._precompute = self.backend != "torch" or (precompute and self._keeps)
        self._settings = FrameSettings.of(model, heading_prior_deg)
        self._runtime: Runtime | None = None
        # A turned panorama faces north up to the prior.
        self._turns_image = spec.camera == "panorama" and heading_prior_deg is not None
        self._needs_heading = self._turns_image or spec.aerial_up == "left" or heading_prior_deg == 0
        self._resources = ExitStack()
        self._others: list[Localizer] = []

    @classmethod
    def open(
        cls,
        map: AerialMap | str | Path,
        model: CrossViewModel | str,
        checkpoint: str | Path | None = None,
        *,
        snap_m: float | None = None,
        **options: Any,
    ) -> Localizer:
        """Open a map, load a model, and return their localizer. Close it, or use it as a context manager.

        map: what :func:`~xview_loc.maps.open_map` opens, or an open map, which stays open afterwards.
        model: name of a model, or the model itself. checkpoint: its weights; default: the shipped ones.
        snap_m: as of :func:`tile_store`. options: as of the constructor. Raises UserError if the map or the
        checkpoint cannot be used.
        """
        net = model if isinstance(model, CrossViewModel) else load_model(model, checkpoint).model
        with ExitStack() as resources:
            aerial = map if isinstance(map, AerialMap) else resources.enter_context(open_map(map))
            tiles = resources.enter_context(closing(tile_store(aerial, net, snap_m)))
            localizer = cls(tiles, net, **options)
            localizer._resources = resources.pop_all()
        return localizer

    @cached_property
    def of_all_headings(self) -> Localizer:
        """A localizer of the same model and tiles that searches all headings, made on first use.

        Raises ValueError if the model cannot.
        """
        other = Localizer(
            self._tiles,
            self._model,
            heading_prior_deg=None,
            device=self._device,
            backend=self.backend,
            precision=self._precision,
            tile_wait_s=self._tile_wait_s,
        )
        self._others.append(other)
        return other

    def close(self) -> None:
        """Close what :meth:`open` opened."""
        self._resources.close()

    def __enter__(self) -> Localizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @torch.inference_mode()
    def localize(self, observation: Observation) -> PoseEstimate:
        """Return the camera's pose.

        Raises a subclass of LocalizationError if the observation gives none, ImageError if the image does not
        fit the model or its calibration, MapError without an aerial tile within ``tile_wait_s``.
        """
        self._check_inputs(observation)
        timings: dict[str, float] = {}
        with _timed(timings, "tile"):
            tile = self._tile(observation, self._tile_wait_s)
        with _timed(timings, "ground"):
            ground = self._ground(observation, tile)
        with _timed(timings, "encode"):
            features = self._encode(tile)
        with _timed(timings, "match"):
            maps = self._match(ground, features)
            logits = self._finite(maps.logits[0], "heat map")
        with _timed(timings, "heat_map"):
            estimate = self._estimate(observation, tile, maps, logits)
        return replace(estimate, timings_ms=timings)

    @torch.inference_mode()
    def score(self, observation: Observation, tile_wait_s: float | None = None) -> TileScores:
        """Return the scores of all places on the tile around the observation's position.

        tile_wait_s: longest wait for the tile, as of :meth:`TileStore.around`. The features of such tiles
        take up to ``SCAN_MB``, until :meth:`localize` meets another tile. Raises as :meth:`localize`.
        """
        self._check_inputs(observation)
        tile = self._tile(observation, tile_wait_s)
        maps = self._match(self._ground(observation, tile), self._encode(tile, scanned=True))
        logits = self._finite(maps.logits[0], "heat map")
        if maps.orientation is None:
            return TileScores(logits, maps.grid, tile)
        cos, sin = self._finite(maps.orientation[0], "orientation field")
        turn, sign = self._turn(observation, tile)
        sin = sign * sin
        cos, sin = math.cos(turn) * cos - math.sin(turn) * sin, math.sin(turn) * cos + math.cos(turn) * sin
        return TileScores(logits, maps.grid, tile, cos, sin)

    def _check_inputs(self, observation: Observation) -> None:
        """Raise LocalizationError if heading or intrinsics are needed and missing."""
        if self._needs_heading and observation.heading is None:
            raise HeadingRequiredError(f"{self.spec.name} needs a heading, and the observation has none")
        if self.spec.camera == "pinhole" and observation.camera is None:
            raise IntrinsicsRequiredError(
                f"{self.spec.name} needs the camera's intrinsics, which are missing"
            )

    def _finite(self, values: Tensor, what: str) -> NDArray[np.float32]:
        """Return a model's values as an array. Raises NonFiniteHeatMapError."""
        array = values.float().cpu().numpy()
        if not np.isfinite(array).all():
            raise NonFiniteHeatMapError(f"the {what} of {self.spec.name} has values that are not finite")
        return array

    def _turn(self, observation: Observation, tile: AerialTile) -> tuple[float, int]:
        """Return (turn, sign): the camera's heading (ENU) is turn + sign * angle, of the model's angle."""
        if self.spec.aerial_up == "left":
            # Clockwise from the tile's top, which faces left of the direction of growing columns.
            return tile.rotation + math.pi / 2.0, -1
        if not self._turns_image:
            return math.pi / 2.0, 1
        assert observation.heading is not None
        return observation.heading, 1

    def _estimate(
        self, observation: Observation, tile: AerialTile, maps: HeatMaps, logits: NDArray[np.float32]
    ) -> PoseEstimate:
        search = self._search(observation, logits.shape, maps, tile)
        heat_map = HeatMap.from_logits(logits, maps.grid, tile, search, self.calibration)
        lat, lon = heat_map.to_latlon(*heat_map.peak)
        floor = self.limits.covariance_floor_m
        covariance = heat_map.covariance(self.calibration.floor_m if floor is None else floor)
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
            timings_ms={},
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Estimate a pose from noise, so that the first observation is as fast as the others.

        Raises NonFiniteHeatMapError if its heat map, position, covariance or heading is not finite.
        """
        rng = np.random.default_rng(0)
        side = self.spec.aerial_size
        aerial = rng.integers(0, 256, (side, side, 3), np.uint8)
        tile = AerialTile(aerial, 0.0, 0.0, self.spec.gsd)
        height, width = self.spec.ground_size
        ground = self._to_model(normalise(rng.integers(0, 256, (height, width, 3), np.uint8), self.spec))
        features = self._features_of(aerial)
        observation = Observation(aerial, 0.0, 0.0, heading=0.0)
        maps = self._match(ground, features)
        found = self._estimate(observation, tile, maps, self._finite(maps.logits[0], "heat map"))
        figures = [found.lat, found.lon, *found.covariance.flat, found.heading or 0.0, found.heading_variance]
        if not np.isfinite(figures).all():
            raise NonFiniteHeatMapError(f"the pose of {self.spec.name} has values that are not finite")
        for other in self._others:
            other.warm_up()

    @torch.inference_mode()
    def take_over(self, other: Localizer) -> None:
        """Encode the tiles that ``other``, of the same map, used last; it may be in use meanwhile.

        Only three: encoding slows down the frames of ``other``.
        """
        for tile, _ in list(other._features.values())[-TILES_TAKEN_OVER:]:
            self._encode(tile)

    def forget_tiles(self) -> None:
        """Free the features of all tiles; the localizer may be in use meanwhile."""
        self._features = OrderedDict()
        for other in self._others:
            other.forget_tiles()

    def _tile(self, observation: Observation, wait_s: float | None) -> AerialTile:
        tile = self._tiles.around(observation.lat, observation.lon, wait_s)
        if self.spec.aerial_up == "left":
            assert observation.heading is not None
            tile = self._turned(tile, observation.heading)
        if tile.valid_fraction < (least := self.limits.min_valid_fraction):
            raise LowImageryError(
                f"only {tile.valid_fraction:.0%} of the aerial tile has imagery, {least:.0%} is needed"
            )
        return tile

    def _turned(self, tile: AerialTile, heading: float) -> AerialTile:
        """Turn a tile to a heading, to the nearest step; a tile that is kept serves again."""
        if self._turn_step:
            heading = round(heading / self._turn_step) * self._turn_step
        for kept, _ in self._features.values():
            same_place = (kept.lat, kept.lon) == (tile.lat, tile.lon)
            if same_place and abs(wrap_angle(kept.rotation - heading)) < 1e-9:
                return kept
        return tile.rotated(heading, self.spec.aerial_size)

    def _ground(self, observation: Observation, tile: AerialTile) -> Tensor:
        spec, lens = self.spec, self.spec.lens
        heading = observation.heading if self._turns_image else None
        image = ground_image(observation.image, spec, heading=heading, camera=observation.camera)
        if self._turn_step and isinstance(lens, CameraModel) and spec.bins == 0:
            # Without heading bins, models take the image to look exactly along the tile's rows.
            assert observation.heading is not None
            image = look_aside(image, lens, wrap_angle(tile.rotation - observation.heading))
        return self._to_model(normalise(image, spec))

    def _to_model(self, image: Tensor) -> Tensor:
        return image.to(self._model_device, self._dtype, memory_format=torch.channels_last)

    def _encode(self, tile: AerialTile, scanned: bool = False) -> Any:
        known = self._features
        if self._keeps and tile.key in known:
            known.move_to_end(tile.key)
            return known[tile.key][1]
        features = self._features_of(tile.image)
        if self._keeps:
            known[tile.key] = (tile, features)
            # All tiles of a model take the same memory.
            room = (SCAN_MB if scanned else self._features_mb) / max(_megabytes(features), 1e-3)
            while len(known) > max(1, room if scanned else min(room, TILES_ENCODED)):
                known.popitem(last=False)
        return features

    def _features_of(self, aerial: Image) -> Any:
        features = self._model.encode_aerial(self._to_model(normalise(aerial, self.spec)))
        if not self._precompute:
            return features
        return self._model.precompute(features, orientation=self._heading_prior_deg != 0)

    def _match(self, ground: Tensor, features: Any) -> HeatMaps:
        settings = self._settings
        if self.backend == "torch":
            prior, orientation = settings.heading_prior_deg, settings.orientation
            extra = {name: x.to(self._device) for name, x in settings.extra().items()}
            return self._model.match(ground, features, prior, orientation=orientation, **extra)
        if self._runtime is None:
            self._runtime = make_runtime(self._model, self.backend, settings, self._precision, self._device)
        return self._model.maps(self._runtime(ground, self._model.tile_tensors(features)), features)

    def _search(
        self, observation: Observation, shape: tuple[int, ...], maps: HeatMaps, tile: AerialTile
    ) -> SearchDisc | None:
        limit = self.limits.search_radius_m
        if limit is None:
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
        if isinstance(limit, (int, float)):
            radius = float(limit)
        elif observation.fix_covariance is not None:
            radius = search_radius(observation.fix_covariance)
        return SearchDisc(lat, lon, max(min(radius, room), pixel))

    def _heading(
        self, observation: Observation, maps: HeatMaps, heat_map: HeatMap
    ) -> tuple[float | None, float]:
        """Return the camera's (heading, variance): from the orientation field or bins, else as observed."""
        if maps.orientation is None:
            if observation.heading is None:
                return None, UNKNOWN_HEADING_VARIANCE
            return wrap_angle(observation.heading), observation.heading_std**2
        cos, sin = self._finite(maps.orientation[0], "orientation field")
        weight = heat_map.probability * heat_map.mode
        cos, sin = float((weight * cos).sum()), float((weight * sin).sum())
        angle = math.atan2(sin, cos)
        resultant = min(1.0, math.hypot(cos, sin) / float(weight.sum()))
        variance = min(wrapped_variance(resultant) + HEADING_STD_FLOOR**2, UNKNOWN_HEADING_VARIANCE)
        level = min(HEADING_LEVEL, len(maps.levels) - 1)
        if maps.levels[level].shape[1] > 2:
            # The bins find the position; a field that contradicts them is wrong.
            device = maps.levels[level].device
            row, col = (torch.tensor([cell], device=device) for cell in heat_map.peak_pixel)
            binned = float(self._model.winning_heading(maps, level, row, col)[0])
            width = 2.0 * math.pi / self.spec.bins
            if abs(wrap_angle(angle - binned)) > width:
                angle, variance = binned, width**2 / 12.0 + HEADING_STD_FLOOR**2
        turn, sign = self._turn(observation, heat_map.tile)
        return wrap_angle(turn + sign * angle), variance


def _megabytes(features: Any) -> float:
    """Return the memory of all tensors in nested dataclasses, dictionaries and sequences, MB."""
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
