"""The interface every cross-view model implements; the rest of the package speaks to this alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

# How much flatter a map becomes that stands out less than those of the calibration: with 0, one temperature
# for all, models are far too certain of themselves in a style of city that they were not trained on.
_CONTRAST_POWER = 1.5


@dataclass(frozen=True)
class ModelSpec:
    """What a model expects of its inputs; every checkpoint carries one.

    ``ground_size`` is (height, width) of the ground image in pixels, ``aerial_size`` the side of the
    square aerial tile in pixels and ``gsd`` that tile's ground sample distance in m/px.
    ``aerial_up`` says what the tile's top edge faces: ``"north"``, or ``"left"`` where the model was
    trained on tiles turned so that the vehicle's heading points right (so the top edge faces its left).
    ``bins`` is the number of heading bins the model scores (0: it needs a known heading).
    """

    name: str
    camera: Literal["panorama", "pinhole"]
    ground_size: tuple[int, int]
    aerial_size: int
    gsd: float
    bins: int
    aerial_up: Literal["north", "left"] = "north"

    @property
    def nominal_heading(self) -> float:
        """Of an image whose heading is known, in the convention of :attr:`HeatMaps.orientation`, radians."""
        return 0.0 if self.aerial_up == "north" else math.pi / 2

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Inverse of :meth:`to_json`."""
        return cls(**{**data, "ground_size": tuple(data["ground_size"])})


@dataclass(frozen=True)
class Calibration:
    """What makes a model's probabilities and covariances honest; a checkpoint may carry one.

    contrast: of maps whose logits are taken as they are; None takes all so. The softmax's temperature is the
    ratio of this contrast to a map's own, to the power 1.5: a map that hardly stands out is flattened.
    floor_m: standard deviation of what a heat map cannot show, metres.
    """

    contrast: float | None = None
    floor_m: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError on numbers that calibrate nothing."""
        if self.contrast is not None and not 0.0 < self.contrast < math.inf:
            raise ValueError(f"a calibration's contrast is above 0, not {self.contrast}")
        if not 0.0 <= self.floor_m < math.inf:
            raise ValueError(f"a calibration's floor is 0 m or more, not {self.floor_m}")

    def temperature(self, contrast: float) -> float:
        """Of the softmax of a map with this contrast."""
        if self.contrast is None:
            return 1.0
        # Whatever a map is like, its temperature stays within what a float can divide by.
        ratio = min(max(contrast / self.contrast, 1e-3), 1e3)
        return float(ratio**-_CONTRAST_POWER)


@dataclass(frozen=True)
class HeatMapGrid:
    """Where a heat map lies on its aerial tile: tile pixel = ``origin`` + ``scale`` * heat-map pixel.

    Both are pixel-centre coordinates (row, col). CCVPE's finest map is the tile itself (the default);
    GGCVT's covers a smaller search window at a coarser step.
    """

    scale: float = 1.0
    origin: tuple[float, float] = (0.0, 0.0)


@dataclass
class HeatMaps:
    """What :meth:`CrossViewModel.match` returns; scores are larger where the camera more likely is.

    levels: coarse to fine, each (B, bins, h, w) (bins = 1 where the model has none).
    logits: (B, H, W), the finest map; its softmax over all pixels is the probability of each pixel.
    orientation: (B, 2, H, W) unit (cos, sin) of the heading, or None. Where ``aerial_up`` is ``"north"``
    the angle is that of the image's centre column, counter-clockwise from north; where it is ``"left"``
    (as the published KITTI models were trained) it runs clockwise from the tile's top edge.
    """

    levels: list[Tensor]
    logits: Tensor
    orientation: Tensor | None = None
    grid: HeatMapGrid = field(default_factory=HeatMapGrid)

    def peak_cells(self) -> tuple[Tensor, Tensor]:
        """Row and column (B,) of the finest map's maximum."""
        width = self.logits.shape[2]
        peak = self.logits.flatten(1).argmax(1)
        return peak // width, peak % width

    def within(self, centre: Tensor, radius: Tensor) -> HeatMaps:
        """These maps with the finest one's logits minus infinity outside discs about ``centre`` (B, 2).

        ``centre`` is (row, col) in tile pixels, ``radius`` (B,) in tile pixels. Where the radius is
        not-a-number or the disc misses the map, the map stays as it is.
        """
        axis = torch.arange(self.logits.shape[1], device=self.logits.device) * self.grid.scale
        down = (axis + self.grid.origin[0] - centre[:, :1])[:, :, None]
        right = (axis + self.grid.origin[1] - centre[:, 1:])[:, None, :]
        inside = down.square() + right.square() <= radius[:, None, None].square()
        inside |= ~inside.flatten(1).any(1)[:, None, None]
        return replace(self, logits=self.logits.masked_fill(~inside, -math.inf))

    def peak(self) -> Tensor:
        """Tile pixel (row, col) of the finest map's maximum, (B, 2)."""
        cells = torch.stack(self.peak_cells(), 1).float()
        return cells * self.grid.scale + cells.new_tensor(self.grid.origin)


class CrossViewModel(nn.Module):
    """Matches ground images against aerial tiles, with the tile's share computed once per tile.

    ``extra_inputs`` names the keyword arguments that ``match`` needs beyond the interface's:
    ``meters_per_pixel`` (B,), the tile's ground sample distance, and ``intrinsics`` (B, 3, 3), the camera
    matrix in pixels of the ground image as passed. ``ignored_weights`` are the prefixes of keys that the
    authors' checkpoints hold and localisation does not need.
    """

    spec: ModelSpec
    calibration: Calibration = Calibration()
    extra_inputs: frozenset[str] = frozenset()
    ignored_weights: tuple[str, ...] = ()

    @property
    def level_count(self) -> int:
        """How many levels ``match`` returns."""
        raise NotImplementedError

    @property
    def grid(self) -> HeatMapGrid:
        """Where the finest map lies on the tile."""
        return HeatMapGrid()

    @property
    def map_size(self) -> int:
        """Side of the finest map in its own pixels."""
        return self.spec.aerial_size

    @property
    def half_extent_m(self) -> float:
        """How far from the tile's centre, along rows or columns, a camera can be found, metres."""
        return self.spec.aerial_size / 2 * self.spec.gsd

    def encode_aerial(self, aerial: Tensor) -> Any:
        """Everything that depends on the tile alone; ``aerial`` is (B, 3, S, S), normalised."""
        raise NotImplementedError

    def precompute(self, features: Any, *, orientation: bool = False) -> Any:
        """``features`` with all that :meth:`match` would do anew for every image of the tile, done once.

        Worth its time and memory where a tile is matched more than once. The same results but for rounding;
        for inference alone. ``orientation``: for matches that ask for the orientation field as well.
        """
        return features

    def select(self, features: Any, rows: Tensor) -> Any:
        """Those of the tiles ``rows`` (B,) of ``features``, in this order; a tile may come more than once."""
        raise NotImplementedError

    def match(
        self,
        ground: Tensor,
        features: Any,
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> HeatMaps:
        """Score every position of the tiles encoded in ``features`` for ``ground`` (B, 3, h, w), normalised.

        ``heading_prior_deg`` is how far the heading may be from the image's nominal one (a panorama
        rolled so that its centre column faces north): None searches all headings, 0 trusts it.
        ``orientation`` asks for the orientation field.
        """
        raise NotImplementedError

    def tile_tensors(self, features: Any) -> tuple[Tensor, ...]:
        """What :meth:`frame` takes of precomputed ``features``."""
        raise NotImplementedError

    def frame_inputs(self, **extra: Tensor) -> dict[str, Any]:
        """What :meth:`frame` takes of the extra inputs of :meth:`match`, for images of one camera."""
        return extra

    def frame(
        self,
        ground: Tensor,
        tile: Sequence[Tensor],
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> tuple[Tensor, ...]:
        """What :meth:`match` computes for every image, from tensors to tensors: other runtimes can do it.

        ``tile`` are the :meth:`tile_tensors`. What else a model takes are its :meth:`frame_inputs`. The
        :meth:`maps` of the result are those of :meth:`match`.
        """
        raise NotImplementedError

    def maps(self, outputs: Sequence[Tensor], features: Any) -> HeatMaps:
        """The heat maps of what :meth:`frame` gave of an image and the tile of ``features``."""
        raise NotImplementedError

    def winning_heading(self, maps: HeatMaps, level: int, rows: Tensor, cols: Tensor) -> Tensor:
        """Heading (B,) of a level's best bin at cells ``rows``, ``cols`` (B,) of the finest map, radians.

        In the convention of :attr:`HeatMaps.orientation`; the maps are this model's.
        """
        scores = maps.levels[level]
        count, side = scores.shape[1], scores.shape[2]
        step = maps.logits.shape[2] // side
        best = scores[torch.arange(len(rows)), :, rows // step, cols // step].argmax(1)
        if count == self.spec.bins:
            return -2 * math.pi / count * best
        # A prior leaves the bins about the nominal heading (GGCVT: that one alone).
        return self.spec.nominal_heading - 2 * math.pi / max(1, self.spec.bins) * (best - count // 2)

    def match_levels(
        self, ground: Tensor, features: Any, heading_prior_deg: float | None, count: int, **extra: Any
    ) -> list[Tensor]:
        """The first ``count`` levels that :meth:`match` returns, without computing what comes after them.

        ``extra``: the inputs that ``extra_inputs`` names.
        """
        raise NotImplementedError


IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])
