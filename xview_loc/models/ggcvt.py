"""GGCVT: a ground view projected overhead, refined by attention, and correlated with an aerial tile.

Distances of the published model are 2 - 2 * similarity (smaller is better); scores here are those negated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xview_loc.models.attention import ColumnPlan, CrossViewAttention
from xview_loc.models.base import CrossViewModel, HeatMapGrid, HeatMaps, ModelSpec
from xview_loc.models.vgg import VGG16_CHANNELS, Ascend, Decoder, Encoder, UNet, unit

# Tile pixels per feature cell, coarse to fine.
_STRIDES = (8, 4, 2)
# Factor of the published loss on score differences. That loss is a softmax over pairs of positions, so the
# same factor turns scores, which span little more than [-2, 0], into the logits of one softmax over all.
_SHARPNESS = 10.0
_MIN_ENERGY = 1e-12
_MIN_DEPTH = 1e-6


@dataclass(frozen=True)
class GGCVTConfig:
    """The sizes of one GGCVT model.

    camera_height: of the camera above flat ground, m.
    search_m: side of the square of positions that is scored, m (pinhole); None: ``crop`` says it.
    crop: share of the overhead view, about the camera, that is slid over the tile.
    elevation_deg: of the panorama's upper and lower edge.
    image_origin: pixel coordinate of an image's upper left corner: the published models put the first
        pixel's centre there (0), it lies half a pixel inside (-0.5).
    zero_cell: what the published position formula adds to half the finest map's side for the tile's centre,
        in cells. The supervised loss trains the arg-max to -0.5.
    """

    spec: ModelSpec
    camera_height: float
    zero_cell: float
    search_m: float | None = None
    crop: float = 0.4
    elevation_deg: tuple[float, float] = (90.0, -90.0)
    image_origin: float = 0.0
    channels: tuple[int, int, int] = VGG16_CHANNELS


_KITTI_GSD = 156543.03392 * math.cos(math.radians(49.015)) / 2**18 / 2
CONFIGS = {
    config.spec.name: config
    for config in (
        GGCVTConfig(ModelSpec("ggcvt-vigor", "panorama", (320, 640), 512, 0.14, 0), 2.0, zero_cell=0.5),
        GGCVTConfig(
            ModelSpec("ggcvt-kitti", "pinhole", (256, 1024), 512, _KITTI_GSD, 0, aerial_up="left"),
            1.65,
            zero_cell=0.0,
            search_m=60.0,
        ),
        GGCVTConfig(
            # The search window is 65 m wide, as the shipped drives' fixes need.
            ModelSpec("ggcvt-small", "panorama", (64, 256), 192, 0.48, 0),
            2.0,
            zero_cell=-0.5,
            crop=0.3,
            elevation_deg=(30.0, -60.0),
            image_origin=-0.5,
            channels=(16, 32, 64),
        ),
    )
}


@dataclass(frozen=True)
class AerialLevel:
    """One level of a tile.

    spectrum: of its features, (B, C, S, S // 2 + 1); divisor: of the correlation at each position, (B, h, w).
    """

    spectrum: Tensor
    divisor: Tensor


@dataclass(frozen=True)
class AerialFeatures:
    """What GGCVT keeps of a tile, coarse to fine."""

    levels: tuple[AerialLevel, ...]


class _Uncertainty(nn.Module):
    """How much each aerial feature is to be trusted, one head per level."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        for number, width in enumerate(reversed(channels), start=1):
            layers: list[nn.Module] = []
            for channels_in, channels_out in ((width, 64), (64, 16), (16, 1)):
                layers += [nn.ReLU(), nn.Conv2d(channels_in, channels_out, 3, padding=1)]
            self.add_module(f"conv{number}", nn.Sequential(*layers, nn.Sigmoid()))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.get_submodule(f"conv{i}")(x) for i, x in enumerate(levels, start=1)]


class _Refine(nn.Module):
    """A residual on a level's overhead features from the coarser level's."""

    def __init__(self, name: str, coarse: int, fine: int) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, Ascend(coarse, fine, fine))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return fine + unit(self.get_submodule(self._name)(coarse, fine))


class GGCVT(CrossViewModel):
    """Ground image of known heading to aerial tile; parameter names are those of published checkpoints."""

    # Branches of published checkpoints that localisation does not use.
    ignored_weights = ("SatFeatureNet.conv_dec3.", "SatFeatureNet.conf", "TransRefine.")

    def __init__(self, config: GGCVTConfig) -> None:
        super().__init__()
        self.spec = config.spec
        self._config = config
        self._panorama = config.spec.camera == "panorama"
        # Keyword inputs that match needs.
        self.extra_inputs = frozenset({"meters_per_pixel" if self._panorama else "intrinsics"})
        first, second, third = config.channels
        self.SatFeatureNet = UNet(config.channels)
        self.GrdEnc = Encoder(config.channels)
        self.GrdDec = Decoder(config.channels)
        self.Dec4 = _Refine("conv_dec1", third, second)
        self.Dec2 = _Refine("conv_dec2", second, first)
        self.CVattn = CrossViewAttention(third)
        self.uncertain_net = _Uncertainty(config.channels)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of torch; the unused branches of published checkpoints are left out."""
        used = {key: value for key, value in state_dict.items() if not key.startswith(self.ignored_weights)}
        return super().load_state_dict(used, strict=strict, assign=assign)

    def crop_sizes(self) -> list[int]:
        """Side in cells, coarse to fine, of the part of the overhead view that is slid over the tile."""
        sizes = []
        for stride in _STRIDES:
            size = self.spec.aerial_size // stride
            if self._config.search_m is None:
                sizes.append(int(size * self._config.crop))
            else:
                sizes.append(int(size - self._config.search_m / (self.spec.gsd * stride)))
        return sizes

    @property
    def half_extent_m(self) -> float:
        """See :attr:`CrossViewModel.half_extent_m`: half the search window."""
        return (self.map_size - 1) / 2 * _STRIDES[-1] * self.spec.gsd

    @property
    def level_count(self) -> int:
        """See :attr:`CrossViewModel.level_count`."""
        return len(_STRIDES)

    @property
    def map_size(self) -> int:
        """See :attr:`CrossViewModel.map_size`."""
        return self.spec.aerial_size // _STRIDES[-1] - self.crop_sizes()[-1] + 1

    @property
    def grid(self) -> HeatMapGrid:
        """Where the finest map lies on the tile, by the published position formula."""
        stride = _STRIDES[-1]
        origin = (self.spec.aerial_size - 1) / 2 - stride * (self.map_size / 2 + self._config.zero_cell)
        return HeatMapGrid(float(stride), (origin, origin))

    def encode_aerial(self, aerial: Tensor) -> AerialFeatures:
        """Spectra and energies of tiles (B, 3, S, S), normalised; ValueError where S is not the spec's."""
        size = self.spec.aerial_size
        _check_size("aerial", aerial, (size, size))
        # The published rectifier works in place: the rectified features are the ones correlated.
        levels = [F.relu(x) for x in self.SatFeatureNet(aerial)]
        trust = self.uncertain_net(levels)
        encoded = []
        for x, weight, crop in zip(levels, trust, self.crop_sizes(), strict=True):
            energy = box_sum(x.square().sum(1), crop) * _centre_crop(weight[:, 0], x.shape[-1] - crop + 1)
            # Floored before the root, whose slope at zero is infinite.
            encoded.append(AerialLevel(torch.fft.rfft2(_wide(x)), energy.clamp_min(_MIN_ENERGY).sqrt()))
        return AerialFeatures(tuple(encoded))

    def select(self, features: AerialFeatures, rows: Tensor) -> AerialFeatures:
        """See :meth:`CrossViewModel.select`."""
        return AerialFeatures(
            tuple(AerialLevel(level.spectrum[rows], level.divisor[rows]) for level in features.levels)
        )

    def encode_ground(
        self,
        ground: Tensor,
        meters_per_pixel: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> list[Tensor]:
        """Overhead views (B, C, S, S), coarse to fine, of images (B, 3, h, w), normalised.

        The camera is over the centre of the view. See :meth:`match` for the other arguments and errors.
        """
        return self._overhead(ground, self._views(ground.shape[0], meters_per_pixel, intrinsics))

    def _overhead(self, ground: Tensor, views: list[_View]) -> list[Tensor]:
        _check_size("ground", ground, self.spec.ground_size)
        encoded = self.GrdEnc(ground)
        overhead = [
            _sample(level, [view.samplers[i] for view in views])
            for i, level in enumerate(self.GrdDec(*encoded))
        ]
        plan = ColumnPlan.batch([view.plan for view in views], encoded[0].shape[3])
        seen = None if self._panorama else torch.stack([view.seen for view in views])
        eighth = self.CVattn(overhead[0], encoded[0], plan, seen)
        quarter = self.Dec4(eighth, overhead[1])
        return [eighth, quarter, self.Dec2(quarter, overhead[2])]

    def match(
        self,
        ground: Tensor,
        features: AerialFeatures,
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
        meters_per_pixel: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> HeatMaps:
        """See :meth:`CrossViewModel.match`; a batch of one on either side goes with any batch on the other.

        ``heading_prior_deg`` must be 0: the heading has to be known. ``meters_per_pixel`` (B,) is the tile's
        ground sample distance, for panoramas; ``intrinsics`` (B, 3, 3) the camera matrix in pixels of the
        ground image as passed, for pinhole models. Each may have a batch of one.
        Levels are the negated published maps (larger is better), logits ten times the finest one.
        Raises ValueError where the heading is not known, an input is missing or a shape is wrong.
        """
        views = self._views(ground.shape[0], meters_per_pixel, intrinsics)
        kernels = self.frame(ground, (), heading_prior_deg, orientation=orientation, views=views)
        return self.maps(kernels, features)

    def tile_tensors(self, features: AerialFeatures) -> tuple[Tensor, ...]:
        """See :meth:`CrossViewModel.tile_tensors`: none."""
        return ()

    def frame_inputs(self, **extra: Tensor) -> dict[str, Any]:
        """See :meth:`CrossViewModel.frame_inputs`: where the cells lie in the image."""
        return {"views": self._views(1, extra.get("meters_per_pixel"), extra.get("intrinsics"))}

    def frame(
        self,
        ground: Tensor,
        tile: Sequence[Tensor],
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
        views: list[_View] | None = None,
    ) -> tuple[Tensor, ...]:
        """See :meth:`CrossViewModel.frame`: what is slid over the tile (B, C, k, k), coarse to fine."""
        name = self.spec.name
        if heading_prior_deg != 0:
            raise ValueError(f"{name} needs a known heading (heading_prior_deg=0), not {heading_prior_deg}")
        if orientation:
            raise ValueError(f"{name} has no orientation field")
        assert views is not None
        overhead = self._overhead(ground, views)
        crops = self.crop_sizes()
        return tuple(unit(_centre_crop(view, crop)) for view, crop in zip(overhead, crops, strict=True))

    def maps(self, outputs: Sequence[Tensor], features: AerialFeatures) -> HeatMaps:
        """See :meth:`CrossViewModel.maps`: the correlation of each level."""
        maps = []
        for level, kernel, stride in zip(features.levels, outputs, _STRIDES, strict=True):
            size = self.spec.aerial_size // stride
            similarity = correlate(level.spectrum, kernel, size) / level.divisor
            maps.append((2 * similarity - 2)[:, None])
        return HeatMaps(maps, _SHARPNESS * maps[-1][:, 0], None, self.grid)

    def match_levels(
        self,
        ground: Tensor,
        features: AerialFeatures,
        heading_prior_deg: float | None,
        count: int,
        **extra: Any,
    ) -> list[Tensor]:
        """See :meth:`CrossViewModel.match_levels`; all levels are computed, the finest one costs little."""
        return self.match(ground, features, heading_prior_deg, **extra).levels[:count]

    def _views(self, batch: int, meters_per_pixel: Tensor | None, intrinsics: Tensor | None) -> list[_View]:
        given = meters_per_pixel if self._panorama else intrinsics
        name, shape = ("meters_per_pixel", ()) if self._panorama else ("intrinsics", (3, 3))
        if given is None:
            raise ValueError(f"{self.spec.name} needs {name} (B{''.join(f', {n}' for n in shape)})")
        if given.ndim != 1 + len(shape) or given.shape[1:] != shape or given.shape[0] not in (1, batch):
            raise ValueError(f"{name} must have shape {(batch, *shape)}, not {tuple(given.shape)}")
        if not bool(given.isfinite().all()) or (self._panorama and not bool((given > 0).all())):
            raise ValueError(f"{name} must be finite{' and positive' if self._panorama else ''}")
        cameras = given.detach().to("cpu", torch.float32).flatten(1) if shape else given[:, None]
        device = next(self.parameters()).device
        views = [_view(tuple(values), self._config, device) for values in cameras.tolist()]
        return views * (batch // len(views))


def correlate(spectrum: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Sum over channels of the valid cross-correlation of features with a smaller ``kernel`` (B, C, k, k).

    ``spectrum`` is rfft2 of the features (B, C, size, size). Returns (B, size - k + 1, size - k + 1).
    Positions where the circular correlation wraps round lie outside that part, so nothing needs padding.
    """
    product = spectrum * torch.fft.rfft2(_wide(kernel), s=(size, size)).conj()
    side = size - kernel.shape[-1] + 1
    return torch.fft.irfft2(product.sum(1), s=(size, size))[:, :side, :side]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: transforms of half precision lack sizes, or everything."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def box_sum(x: Tensor, side: int) -> Tensor:
    """Sums of ``x`` (B, h, w) over every square of ``side`` cells inside it; rows and columns in turn."""
    x = F.avg_pool2d(x[:, None], (side, 1), stride=1, divisor_override=1)
    return F.avg_pool2d(x, (1, side), stride=1, divisor_override=1)[:, 0]


def ranking_loss(maps: HeatMaps, position: Tensor, aerial_size: int) -> Tensor:
    """The authors' supervised loss: at each level every other position must score below the true one.

    ``position`` (B, 2) is the camera's true (row, col) in tile pixels (pixel-centre), ``aerial_size`` the
    tile's side in pixels. A scalar: the sum over levels of the mean of
    log(1 + exp(10 * (score - true score))).
    Raises ValueError where a position lies outside a map.
    """
    offset = position - (aerial_size - 1) / 2
    total = offset.new_zeros(())
    for stride, level in zip(_STRIDES, maps.levels, strict=True):
        scores = level[:, 0]
        batch, rows, cols = scores.shape
        row = (rows / 2 - 0.5 + offset[:, 0] / stride).round().long()
        col = (cols / 2 - 0.5 + offset[:, 1] / stride).round().long()
        if bool(((row < 0) | (row >= rows) | (col < 0) | (col >= cols)).any()):
            raise ValueError("a true position lies outside the search window")
        true = scores[torch.arange(batch, device=scores.device), row, col]
        pairs = F.softplus(_SHARPNESS * (scores - true[:, None, None]))
        total = total + pairs.sum() / (batch * (rows * cols - 1))
    return total


@dataclass(frozen=True)
class _Sampler:
    """Bilinear sampling of image features: (S * S, 4) neighbours of each cell (row * columns + column) and
    their weights (zero outside the image)."""

    neighbours: Tensor
    weights: Tensor

    @classmethod
    def of(cls, u: Tensor, v: Tensor, rows: int, cols: int, device: torch.device) -> _Sampler:
        """For cells (S, S) at column ``u`` and row ``v`` of features (rows, cols)."""
        # Not F.grid_sample: scaling to [-1, 1] and back loses 1e-5 of a pixel.
        inside = (u >= 0) & (u <= cols - 1) & (v >= 0) & (v <= rows - 1)
        u, v = (torch.where(inside, x, 0.0).flatten() for x in (u, v))
        left, top = u.floor().clamp(max=cols - 2), v.floor().clamp(max=rows - 2)
        right, down = u - left, v - top
        first = (top * cols + left).long()
        neighbours = torch.stack([first, first + 1, first + cols, first + cols + 1], 1)
        weights = torch.stack(
            [(1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down], 1
        )
        weights = weights * inside.flatten()[:, None]
        return cls(neighbours.to(device), weights.to(device))


def _sample(features: Tensor, samplers: list[_Sampler]) -> Tensor:
    """``features`` (B, C, H, W) at the cells of one sampler per example -> (B, C, S, S)."""
    batch, channels, rows, cols = features.shape
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    neighbours = torch.cat([sampler.neighbours + i * rows * cols for i, sampler in enumerate(samplers)])
    weights = torch.cat([sampler.weights for sampler in samplers]).to(features.dtype)
    if torch.compiler.is_exporting():
        # ONNX has no counterpart of the faster operation below.
        cells = torch.stack([table[neighbours[:, i]] * weights[:, i, None] for i in range(4)]).sum(0)
    else:
        cells = F.embedding_bag(neighbours, table, per_sample_weights=weights, mode="sum")
    size = math.isqrt(len(cells) // batch)
    return cells.reshape(batch, size, size, channels).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class _View:
    """Where one camera's overhead cells lie in its image features.

    samplers: per level, where the cells lie in the image features.
    plan: the image columns of the coarsest level's cells; seen: (S, S), False behind the camera.
    """

    samplers: tuple[_Sampler, ...]
    plan: ColumnPlan
    seen: Tensor = field(repr=False)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a view first made in inference serves training too
def _view(camera: tuple[float, ...], config: GGCVTConfig, device: torch.device) -> _View:
    """``camera``: m/px of a panorama's tile, or a pinhole camera's nine intrinsics (tiles as the spec)."""
    spec = config.spec
    samplers = []
    plan = seen = None
    for stride in _STRIDES:
        size, (rows, cols) = spec.aerial_size // stride, (x // stride for x in spec.ground_size)
        if spec.camera == "panorama":
            u, v = _project_panorama(camera[0] * stride, config, size, rows, cols)
            visible = torch.ones_like(u, dtype=torch.bool)
        else:
            matrix = torch.tensor(camera).reshape(3, 3)
            matrix[:2] /= stride
            u, v, visible = _project_pinhole(matrix, spec.gsd * stride, config.camera_height, size)
        samplers.append(_Sampler.of(u, v, rows, cols, device))
        if plan is None:
            plan = ColumnPlan.of(u.flatten(), cols)
            plan = ColumnPlan(plan.cells.to(device), plan.columns.to(device), plan.slots.to(device))
            seen = visible.to(device)
    assert plan is not None and seen is not None
    return _View(tuple(samplers), plan, seen)


def _project_panorama(
    cell_m: float, config: GGCVTConfig, size: int, rows: int, cols: int
) -> tuple[Tensor, Tensor]:
    """Column and row (size, size) of flat ground around a panoramic camera that looks north."""
    # float32 and this order of operations: diagonals fall on whole columns, and rounding picks a side.
    centre = size / 2 - 0.5
    row, col = torch.meshgrid(*[torch.arange(size, dtype=torch.float32)] * 2, indexing="ij")
    radius = torch.sqrt((row - centre) ** 2 + (col - centre) ** 2)
    angle = torch.atan2(row - centre, col - centre)
    angle = (-math.pi / 2 + angle % (2 * math.pi)) % (2 * math.pi)
    polar = torch.atan2(radius * torch.tensor(cell_m), torch.tensor(-config.camera_height))
    top, bottom = (math.radians(90.0 - elevation) for elevation in config.elevation_deg)
    u, v = angle / 2 / math.pi * cols, (polar - top) / (bottom - top) * rows
    return u + config.image_origin, v + config.image_origin


def _project_pinhole(
    matrix: Tensor, cell_m: float, camera_height: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Column, row and whether in front (size, size) of flat ground; the camera looks along +column."""
    row, col = torch.meshgrid(*[torch.arange(size, dtype=torch.float32) - size // 2] * 2, indexing="ij")
    right, forward = cell_m * row, cell_m * col
    points = torch.stack([right, torch.full_like(right, camera_height), forward], -1) @ matrix.T
    depth = points[..., 2].clamp_min(_MIN_DEPTH)
    return points[..., 0] / depth, points[..., 1] / depth, points[..., 2] > _MIN_DEPTH


def _centre_crop(x: Tensor, side: int) -> Tensor:
    start = round((x.shape[-1] - side) / 2)  # halves go to the even side, as published
    return x[..., start : start + side, start : start + side]


def _check_size(what: str, image: Tensor, size: tuple[int, int]) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or tuple(image.shape[2:]) != size:
        raise ValueError(
            f"{what} images must have shape (batch, 3, {size[0]}, {size[1]}), not {tuple(image.shape)}"
        )
