"""The interface of every cross-view model; the rest of the package uses models only through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xview_loc.errors import shown
from xview_loc.models.specs import ModelSpec, Normalisation

# How strongly maps of little contrast are flattened. With 0 (one temperature for all maps), models are far
# too certain in a style of city that they were not trained on.
_CONTRAST_POWER = 1.5
# Least and greatest figure of a usable calibration: beyond them poses would be useless, or overflow.
CALIBRATION_BOUNDS = {"contrast": (0.01, 10_000.0), "floor_m": (0.0, 100.0), "min_confidence": (0.0, 1.0)}
# Least and greatest ground sample distance of a checkpoint's tiles, m/px.
GSD_BOUNDS = (0.01, 10.0)
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])
# What is subtracted from RGB in [0, 1], and what it is divided by.
NORMALISATIONS: dict[Normalisation, tuple[Tensor, Tensor]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "unit": (torch.zeros(3), torch.ones(3)),
}


@dataclass(frozen=True)
class Calibration:
    """Settings that make a model's probabilities and covariances honest; a checkpoint may carry one.

    ``contrast`` is that of maps that need no tempering. The softmax's temperature is its ratio to a map's own
    contrast, to the power 1.5, which flattens maps of low contrast. None: no map is tempered. ``floor_m`` is
    the standard deviation of errors that a heat map cannot show, metres. ``min_confidence`` is a confidence
    that nearly all images of a drive reach; 0: not known.
    """

    contrast: float | None = None
    floor_m: float = 0.5
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in CALIBRATION_BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and least <= value <= most):
                raise ValueError(f"{name} must be {least:g} to {most:g}, not {shown(value, 80)}")
        if self.floor_m is None or self.min_confidence is None:
            raise ValueError("floor_m and min_confidence must be numbers")

    def temperature(self, contrast: float) -> float:
        """Temperature of the softmax for a map of this contrast."""
        if self.contrast is None:
            return 1.0
        # Bounded, so that logits stay finite when divided by the temperature.
        ratio = min(max(contrast / self.contrast, 1e-3), 1e3)
        return float(ratio**-_CONTRAST_POWER)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class HeatMapGrid:
    """Position of a heat map on its aerial tile: tile pixel = ``origin`` + ``scale`` * heat-map pixel.

    Both are pixel-centre coordinates (row, col). CCVPE's finest map covers the tile pixel by pixel (the
    default); GGCVT's covers a smaller search window in coarser steps.
    """

    scale: float = 1.0
    origin: tuple[float, float] = (0.0, 0.0)


@dataclass
class HeatMaps:
    """Result of :meth:`CrossViewModel.match`; larger scores mean a more likely camera position.

    ``levels`` are scores from coarse to fine, each (B, bins, h, w); one bin for models without heading bins.
    ``logits`` (B, H, W) is the finest map, at ``grid`` on the tile; its softmax over all pixels is the
    probability of each pixel. ``orientation`` (B, 2, H, W) holds unit vectors (cos, sin) of the heading of
    the image's centre column, or is None. With ``aerial_up`` ``"north"`` the angle runs counter-clockwise
    from north; with ``"left"`` (as published KITTI models were trained) clockwise from the tile's top edge.
    """

    levels: list[Tensor]
    logits: Tensor
    orientation: Tensor | None = None
    grid: HeatMapGrid = field(default_factory=HeatMapGrid)

    def peak_cells(self) -> tuple[Tensor, Tensor]:
        """Return row and column (B,) of the finest map's maximum."""
        width = self.logits.shape[2]
        peak = self.logits.flatten(1).argmax(1)
        return peak // width, peak % width

    def within(self, centre: Tensor, radius: Tensor) -> HeatMaps:
        """Restrict the finest map to discs: return maps whose logits are minus infinity outside them.

        ``centre`` (B, 2) is (row, col) and ``radius`` (B,) the radius, both in tile pixels. A map stays
        unchanged if its radius is NaN or its disc lies outside the map.
        """
        axis = torch.arange(self.logits.shape[1], device=self.logits.device) * self.grid.scale
        down = (axis + self.grid.origin[0] - centre[:, :1])[:, :, None]
        right = (axis + self.grid.origin[1] - centre[:, 1:])[:, None, :]
        inside = down.square() + right.square() <= radius[:, None, None].square()
        inside |= ~inside.flatten(1).any(1)[:, None, None]
        return replace(self, logits=self.logits.masked_fill(~inside, -math.inf))

    def peak(self) -> Tensor:
        """Return the tile pixel (row, col) of the finest map's maximum, (B, 2)."""
        cells = torch.stack(self.peak_cells(), 1).float()
        return cells * self.grid.scale + cells.new_tensor(self.grid.origin)


class CrossViewModel(nn.Module):
    """Matches ground images against aerial tiles; the tile's part is computed once per tile.

    ``extra_inputs`` are keyword arguments that ``match`` needs beyond the common ones: ``meters_per_pixel``
    (B,), the tile's ground sample distance, or ``intrinsics`` (B, 3, 3), the camera matrix in pixels of the
    ground image. ``ignored_weights`` are prefixes of keys in the authors' checkpoints that it does not need,
    ``assumed`` are its properties on which these say nothing, for the log.
    """

    spec: ModelSpec
    calibration: Calibration = Calibration()
    extra_inputs: frozenset[str] = frozenset()
    ignored_weights: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def level_count(self) -> int:
        """Number of levels that ``match`` returns."""
        raise NotImplementedError

    @property
    def grid(self) -> HeatMapGrid:
        """Position of the finest map on the tile."""
        return HeatMapGrid()

    @property
    def map_size(self) -> int:
        """Side of the finest map, in its own pixels."""
        return self.spec.aerial_size

    @property
    def half_extent_m(self) -> float:
        """Greatest distance from the tile's centre, along rows or columns, of a camera position, metres."""
        return self.spec.aerial_size / 2 * self.spec.gsd

    def encode_aerial(self, aerial: Tensor) -> Any:
        """Compute all that depends on the tile alone; ``aerial`` is (B, 3, S, S), normalised."""
        raise NotImplementedError

    def precompute(self, features: Any, *, orientation: bool = False) -> Any:
        """Extend ``features`` by the work that :meth:`match` would repeat for every image of the tile.

        For inference, and tiles matched more than once; results are the same up to rounding. Set
        ``orientation`` if matches will ask for the orientation field.
        """
        return features

    def select(self, features: Any, rows: Tensor) -> Any:
        """Return the features of the tiles ``rows`` (B,), in this order; a tile may be repeated."""
        raise NotImplementedError

    def match(
        self,
        ground: Tensor,
        features: Any,
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> HeatMaps:
        """Score every position of the tiles in ``features`` for ``ground`` (B, 3, h, w), normalised.

        ``heading_prior_deg`` bounds the heading's distance from the image's nominal one, degrees (a panorama
        is nominally rolled so that its centre column faces north): None searches all headings, 0 trusts the
        nominal one. ``orientation`` asks for the orientation field.
        """
        raise NotImplementedError

    def tile_tensors(self, features: Any) -> tuple[Tensor, ...]:
        """Return the tensors of precomputed ``features`` that :meth:`frame` takes."""
        raise NotImplementedError

    def frame_inputs(self, **extra: Tensor) -> dict[str, Any]:
        """Turn the extra inputs of :meth:`match` into those of :meth:`frame`, for images of one camera."""
        return extra

    def frame(
        self,
        ground: Tensor,
        tile: Sequence[Tensor],
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> tuple[Tensor, ...]:
        """Compute the image's part of :meth:`match`, from tensors to tensors, so that it can be exported.

        ``tile`` are the :meth:`tile_tensors`; further keyword arguments are the model's :meth:`frame_inputs`.
        :meth:`maps` turns the result into heat maps.
        """
        raise NotImplementedError

    def maps(self, outputs: Sequence[Tensor], features: Any) -> HeatMaps:
        """Turn the ``outputs`` of :meth:`frame` and the tile's ``features`` into heat maps."""
        raise NotImplementedError

    def winning_heading(self, maps: HeatMaps, level: int, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the heading (B,) of a level's best bin at cells ``rows``, ``cols`` (B,) of the finest map.

        Radians, in the convention of :attr:`HeatMaps.orientation`.
        """
        scores = maps.levels[level]
        count, side = scores.shape[1], scores.shape[2]
        step = maps.logits.shape[2] // side
        best = scores[torch.arange(len(rows)), :, rows // step, cols // step].argmax(1)
        if count == self.spec.bins:
            return -2 * math.pi / count * best
        # A heading prior leaves the bins around the nominal heading (GGCVT has only that one).
        return self.spec.nominal_heading - 2 * math.pi / max(1, self.spec.bins) * (best - count // 2)

    def match_levels(
        self, ground: Tensor, features: Any, heading_prior_deg: float | None, count: int, **extra: Any
    ) -> list[Tensor]:
        """Return the first ``count`` levels of :meth:`match`; ``extra`` are the ``extra_inputs``."""
        raise NotImplementedError


def check_image_size(what: str, image: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless ``image`` is (B, 3, *size)."""
    if image.ndim != 4 or image.shape[1] != 3 or tuple(image.shape[2:]) != size:
        raise ValueError(
            f"{what} images must have shape (batch, 3, {size[0]}, {size[1]}), not {tuple(image.shape)}"
        )
