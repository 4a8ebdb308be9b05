"""Dataset of drives through simulated cities, rendered once and kept on disk."""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from xview_loc.camera import CameraModel
from xview_loc.datasets.base import DatasetError, PoseDataset, Sample
from xview_loc.datasets.random_cameras import random_view
from xview_loc.geodesy import wrap_angle
from xview_loc.images import Image
from xview_loc.maps.base import default_cache_dir
from xview_loc.models.inputs import normalise, prepare_ground
from xview_loc.models.specs import ModelSpec
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.styles import STYLES
from xview_loc.simulation.views import PanoramaView, PinholeView

# Increase it when the simulation's images change.
_VERSION = 1
# One frame a second: about 8 m apart, so that neighbours differ.
_RATE_HZ = 1.0
# The camera's least distance from the tile's border, so that the tile shows its surroundings.
_BORDER_M = 6.0
_HEADING_NOISE = math.radians(2.0)
# Of tiles that are turned to the heading, at most.
_TURN_NOISE = math.radians(10.0)
# Of cameras of any vehicle, metres.
_HEIGHT_NOISE_M = 0.3
# What images show beyond the model's edges, so that they can be tilted, degrees, and how much finer they are.
_MARGIN_DEG, _FINER = 11.25, 2
_FILES = ("panoramas", "aerial", "poses")
_Rendered = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]


def parse_cities(text: str) -> range:
    """Parse seeds of cities: ``7`` or ``0-23`` (both ends included). Raises DatasetError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    cities = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not cities:
        raise DatasetError(f"cities are written 7 or 0-23, at least one city, not {text!r}")
    return cities


class SimulatedDataset(PoseDataset):
    """Images along drives through ``cities`` (seeds) of a style, ``frames`` in each.

    The camera is at a random position of its tile, 6 m or more from the border and within ``half_extent_m``
    of the centre along rows and columns. A panorama is turned north by a heading with an error of 2 degrees
    (standard deviation), a pinhole camera's tile to one that is up to 10 degrees off. ``augment`` draws all
    anew in every epoch. ``any_camera``: images show what random cameras on tilted vehicles see, see
    :func:`random_view`. Cities are rendered into ``cache_dir`` by :meth:`prepare`, or on first use.
    Raises DatasetError if the style is unknown.
    """

    def __init__(
        self,
        style: str,
        cities: range,
        frames: int,
        spec: ModelSpec,
        *,
        half_extent_m: float = math.inf,
        cache_dir: Path | None = None,
        augment: bool = False,
        any_camera: bool = False,
    ) -> None:
        if style not in STYLES:
            raise DatasetError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
        if not cities or frames < 1:
            raise DatasetError("a simulated dataset needs at least one city and one frame")
        self.name = f"simulated:{style}:{cities.start}-{cities.stop - 1}:{frames}"
        self.name += ":any-camera" if any_camera else ""
        self._style, self._cities, self._frames = style, cities, frames
        self._spec = spec
        self.folder = (cache_dir or default_cache_dir().parent / "simulated").expanduser()
        self._augment, self._any_camera = augment, any_camera
        self._view, self._options = rendered_view(spec, any_camera)
        self._reach = min(spec.aerial_size * spec.gsd / 2 - _BORDER_M, half_extent_m)
        self._open: dict[int, _Rendered] = {}

    @property
    def cities(self) -> int:
        """Number of cities."""
        return len(self._cities)

    def __len__(self) -> int:
        return len(self._cities) * self._frames

    def prepare(self, on_city: Callable[[], object] = lambda: None) -> None:
        """Render the cities missing from the cache; ``on_city`` is called after each city."""
        for seed in self._cities:
            if not self._path(seed).exists():
                self._render(seed)
            on_city()

    def __getitem__(self, index: int) -> Sample:
        seed = self._cities[index // self._frames]
        images, aerial, poses = self._city(seed)
        frame = index % self._frames
        rng = np.random.default_rng([index, self.epoch if self._augment else 0])
        east, north, heading = poses[frame]
        spec, gsd = self._spec, self._spec.gsd
        offset = rng.uniform(-self._reach, self._reach, 2)
        if spec.aerial_up == "north":
            measured, turn = heading + _HEADING_NOISE * rng.normal(), 0.0
            angle = heading - measured
        else:
            measured = turn = heading + rng.uniform(-_TURN_NOISE, _TURN_NOISE)
            angle = spec.nominal_heading - (heading - measured)
        # From the camera to the tile's centre, right and up on the tile.
        ahead = offset @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
        tile = _cut(aerial, (east + ahead[0], north + ahead[1]), turn, spec)
        image, camera = images[frame], self._view.camera
        if self._any_camera:
            image, _ = random_view(image, camera, spec.lens, rng)
            camera = spec.lens
        pinhole = camera if isinstance(camera, CameraModel) else None
        ground = prepare_ground(image, spec, heading=measured, camera=pinhole)
        middle = (spec.aerial_size - 1) / 2
        position = (middle + offset[1] / gsd, middle - offset[0] / gsd)
        sample: Sample = {
            "ground": ground[0],
            "aerial": normalise(tile, spec)[0],
            "fix": torch.full((2,), middle),
            "fix_std": torch.tensor(self._reach / math.sqrt(3)),  # of a uniform distribution
            "heading_known": torch.tensor(True),
            "index": torch.tensor(index),
            "position": torch.tensor(position, dtype=torch.float32),
            "heading": torch.tensor(wrap_angle(angle), dtype=torch.float32),
            "meters_per_pixel": torch.tensor(gsd, dtype=torch.float32),
        }
        if isinstance(spec.lens, CameraModel):
            sample["intrinsics"] = torch.tensor(spec.lens.matrix, dtype=torch.float32)
        return sample

    def _path(self, seed: int) -> Path:
        what: tuple[object, ...] = (_VERSION, self._style, seed, self._frames, self._spec.ground_size)
        what += (self._spec.gsd,)
        drawn = self._view, self._options
        # The usual ones are not named: cities that were rendered before others existed serve again.
        if drawn != (PanoramaView(*self._spec.ground_size), DriveOptions(rate_hz=_RATE_HZ)):
            what += drawn
        return self.folder / hashlib.sha256(repr(what).encode()).hexdigest()[:16]

    def _city(self, seed: int) -> _Rendered:
        if seed not in self._open:
            path = self._path(seed)
            if not path.exists():
                self._render(seed)
            try:
                panoramas, aerial, poses = (np.load(path / f"{name}.npy", mmap_mode="r") for name in _FILES)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{path} is damaged ({error}): delete it to render it again") from None
            self._open[seed] = (panoramas, aerial, poses)
        return self._open[seed]

    def _render(self, seed: int) -> None:
        city = build_city(seed, self._style)
        images, poses = [], []
        for frame in drive(city, self._frames, options=self._options, view=self._view):
            images.append(frame.image)
            poses.append((frame.truth.east, frame.truth.north, frame.truth.heading))
        side = round(city.size_m / self._spec.gsd)
        aerial = cv2.resize(city.aerial, (side, side), interpolation=cv2.INTER_AREA)
        path = self._path(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed at the end, so that the folder is complete or missing.
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            folder = Path(temporary) / path.name
            folder.mkdir()
            for name, values in zip(_FILES, (images, aerial, poses), strict=True):
                np.save(folder / f"{name}.npy", np.array(values))
            if not path.exists():
                folder.rename(path)


def rendered_view(spec: ModelSpec, any_camera: bool) -> tuple[PanoramaView | PinholeView, DriveOptions]:
    """Return how a model's images are rendered, and how the vehicle drives.

    For ``any_camera`` they show more than the model's, see :func:`random_view`.
    """
    height, width = spec.ground_size
    # Level, as the tilt is drawn with each sample.
    options = DriveOptions(rate_hz=_RATE_HZ)
    if any_camera:
        options = replace(options, height_noise_m=_HEIGHT_NOISE_M, tilt=0.0)
    lens = spec.lens
    if isinstance(lens, CameraModel):
        return _pinhole_view(lens, any_camera), options
    top, bottom = spec.elevation_deg
    if not any_camera:
        return PanoramaView(height, width, top, bottom), options
    margin = round(height * _MARGIN_DEG / (top - bottom))
    reach = margin * (top - bottom) / height
    size = _FINER * (height + 2 * margin), _FINER * width
    return PanoramaView(*size, min(90.0, top + reach), max(-90.0, bottom - reach)), options


def _pinhole_view(lens: CameraModel, any_camera: bool) -> PinholeView:
    margin, finer = (math.radians(_MARGIN_DEG), _FINER) if any_camera else (0.0, 1)
    sides = (lens.k[0], lens.k[2], lens.width), (lens.k[4], lens.k[5], lens.height)
    # The farthest edges, in focal lengths.
    halves = [max(middle + 0.5, side - 0.5 - middle) / focal for focal, middle, side in sides]
    focal = finer * max(lens.k[0], lens.k[4])
    width, height = (2 * math.ceil(focal * math.tan(math.atan(half) + margin) - 1e-6) for half in halves)
    return PinholeView(height, width, 2 * math.degrees(math.atan(width / 2 / focal)))


def _cut(aerial: NDArray[np.uint8], centre: tuple[float, float], turn: float, spec: ModelSpec) -> Image:
    """Cut a model's tile around ``centre``, metres east and north; columns grow in the direction ``turn``."""
    side, gsd = spec.aerial_size, spec.gsd
    half = aerial.shape[0] * gsd / 2
    col, row = (centre[0] + half) / gsd - 0.5, (half - centre[1]) / gsd - 0.5
    if turn == 0.0:
        return np.asarray(cv2.getRectSubPix(aerial, (side, side), (float(col), float(row))), np.uint8)
    cos, sin, middle = math.cos(turn), math.sin(turn), (side - 1) / 2
    to_aerial = np.array(
        [[cos, sin, col - middle * (cos + sin)], [-sin, cos, row - middle * (cos - sin)]], np.float64
    )
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    # As getRectSubPix does beyond the map.
    return np.asarray(
        cv2.warpAffine(aerial, to_aerial, (side, side), flags=how, borderMode=cv2.BORDER_REPLICATE), np.uint8
    )
