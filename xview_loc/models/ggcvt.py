"""GGCVT: a ground view projected overhead, refined by attention, and correlated with an aerial tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xview_loc.models.attention import ColumnPlan, CrossViewAttention
from xview_loc.models.base import CrossViewModel, HeatMapGrid, HeatMaps, check_image_size
from xview_loc.models.projection import STRIDES, CameraGeometry, OverheadView, overhead_view, sample
from xview_loc.models.specs import SPECS, ModelSpec
from xview_loc.models.vgg import VGG16_CHANNELS, Ascend, Decoder, Encoder, UNet, unit

# Factor of the published loss on score differences. That loss is a softmax over pairs of positions, so the
# same factor turns scores, which span little more than [-2, 0], into logits of one softmax over all
# positions.
_SHARPNESS = 10.0
_MIN_ENERGY = 1e-12


@dataclass(frozen=True)
class GGCVTConfig:
    """Sizes of one GGCVT model.

    ``zero_cell`` is the offset, in cells of the finest map, that the published position formula adds to half
    the map's side to get the tile's centre; the supervised loss trains the arg-max to -0.5. ``search_m`` is
    the side of the square of positions that is scored, m (pinhole models). Without it, ``crop`` is the share
    of the overhead view, around the camera, that is slid over the tile.
    """

    spec: ModelSpec
    geometry: CameraGeometry
    zero_cell: float
    search_m: float | None = None
    crop: float = 0.4
    channels: tuple[int, int, int] = VGG16_CHANNELS


CONFIGS = {
    config.spec.name: config
    for config in (
        GGCVTConfig(SPECS["ggcvt-vigor"], CameraGeometry(2.0), zero_cell=0.5),
        GGCVTConfig(SPECS["ggcvt-kitti"], CameraGeometry(1.65), zero_cell=0.0, search_m=60.0),
        GGCVTConfig(
            # A search window of 65 m, as the shipped drives' fixes need.
            SPECS["ggcvt-small"],
            CameraGeometry(2.0, image_origin=-0.5),
            zero_cell=-0.5,
            crop=0.3,
            channels=(16, 32, 64),
        ),
    )
}


@dataclass(frozen=True)
class AerialLevel:
    """Fourier transform (B, C, S, S // 2 + 1) of a tile's features, divisor (B, h, w) of each correlation."""

    spectrum: Tensor
    divisor: Tensor


# Features of a tile, coarse to fine.
AerialFeatures = tuple[AerialLevel, ...]


class _Uncertainty(nn.Module):
    """Weights of the aerial features, one head per level."""

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
    """Refines a level's overhead features by a residual from the coarser level's."""

    def __init__(self, name: str, coarse: int, fine: int) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, Ascend(coarse, fine, fine))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return fine + unit(self.get_submodule(self._name)(coarse, fine))


class GGCVT(CrossViewModel):
    """Matches an image of known heading to a tile; parameters are named as in published checkpoints."""

    # The last two: the rotation's share of the KITTI model with three degrees of freedom.
    ignored_weights = ("SatFeatureNet.conv_dec3.", "SatFeatureNet.conf", "TransRefine.", "coe_R", "coe_T")

    def __init__(self, config: GGCVTConfig) -> None:
        super().__init__()
        self.spec = config.spec
        self._config = config
        self._panorama = config.spec.camera == "panorama"
        self.extra_inputs = frozenset({"meters_per_pixel" if self._panorama else "intrinsics"})
        first, second, third = config.channels
        self.SatFeatureNet = UNet(config.channels)
        self.GrdEnc = Encoder(config.channels)
        self.GrdDec = Decoder(config.channels)
        self.Dec4 = _Refine("conv_dec1", third, second)
        self.Dec2 = _Refine("conv_dec2", second, first)
        self.CVattn = CrossViewAttention(third)
        self.uncertain_net = _Uncertainty(config.channels)

    def crop_sizes(self) -> list[int]:
        """Return the sides, in cells, of the part of the overhead view that is slid over the tile."""
        sizes = []
        for stride in STRIDES:
            size, search_m = self.spec.aerial_size // stride, self._config.search_m
            searched = None if search_m is None else search_m / (self.spec.gsd * stride)
            sizes.append(int(size * self._config.crop if searched is None else size - searched))
        return sizes

    @property
    def half_extent_m(self) -> float:
        """See :attr:`CrossViewModel.half_extent_m`; half the search window."""
        return (self.map_size - 1) / 2 * STRIDES[-1] * self.spec.gsd

    @property
    def level_count(self) -> int:
        """See :attr:`CrossViewModel.level_count`."""
        return len(STRIDES)

    @property
    def map_size(self) -> int:
        """See :attr:`CrossViewModel.map_size`."""
        return self.spec.aerial_size // STRIDES[-1] - self.crop_sizes()[-1] + 1

    @property
    def grid(self) -> HeatMapGrid:
        """See :attr:`CrossViewModel.grid`; from the published position formula."""
        stride = STRIDES[-1]
        origin = (self.spec.aerial_size - 1) / 2 - stride * (self.map_size / 2 + self._config.zero_cell)
        return HeatMapGrid(float(stride), (origin, origin))

    def encode_aerial(self, aerial: Tensor) -> AerialFeatures:
        """See :meth:`CrossViewModel.encode_aerial`. Raises ValueError if S is not the spec's."""
        size = self.spec.aerial_size
        check_image_size("aerial", aerial, (size, size))
        # The published rectifier works in place, so rectified features are correlated.
        levels = [F.relu(x) for x in self.SatFeatureNet(aerial)]
        weights = self.uncertain_net(levels)
        encoded = []
        for x, weight, crop in zip(levels, weights, self.crop_sizes(), strict=True):
            energy = box_sum(x.square().sum(1), crop) * _centre_crop(weight[:, 0], x.shape[-1] - crop + 1)
            # Clamped before the root, whose slope at zero is infinite.
            encoded.append(AerialLevel(torch.fft.rfft2(_wide(x)), energy.clamp_min(_MIN_ENERGY).sqrt()))
        return tuple(encoded)

    def select(self, features: AerialFeatures, rows: Tensor) -> AerialFeatures:
        """See :meth:`CrossViewModel.select`."""
        return tuple(AerialLevel(level.spectrum[rows], level.divisor[rows]) for level in features)

    def encode_ground(
        self, ground: Tensor, meters_per_pixel: Tensor | None = None, intrinsics: Tensor | None = None
    ) -> list[Tensor]:
        """Compute overhead views (B, C, S, S) about the camera, coarse to fine; see :meth:`match`."""
        return self._overhead(ground, self._views(ground.shape[0], meters_per_pixel, intrinsics))

    def _overhead(self, ground: Tensor, views: list[OverheadView]) -> list[Tensor]:
        check_image_size("ground", ground, self.spec.ground_size)
        encoded = self.GrdEnc(ground)
        overhead = [
            sample(level, [view.samplers[i] for view in views])
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
        """See :meth:`CrossViewModel.match`; a batch of one on either side is broadcast to the other's.

        Panoramas need ``meters_per_pixel``, pinhole models ``intrinsics``; each may have a batch of one.
        Logits are ten times the finest level. Raises ValueError unless ``heading_prior_deg`` is 0 (known
        heading), or if an input is missing or of a wrong shape.
        """
        views = self._views(ground.shape[0], meters_per_pixel, intrinsics)
        kernels = self.frame(ground, (), heading_prior_deg, orientation=orientation, views=views)
        return self.maps(kernels, features)

    def tile_tensors(self, features: AerialFeatures) -> tuple[Tensor, ...]:
        """See :meth:`CrossViewModel.tile_tensors`; none."""
        return ()

    def frame_inputs(self, **extra: Tensor) -> dict[str, Any]:
        """See :meth:`CrossViewModel.frame_inputs`; the overhead views."""
        return {"views": self._views(1, extra.get("meters_per_pixel"), extra.get("intrinsics"))}

    def frame(
        self,
        ground: Tensor,
        tile: Sequence[Tensor],
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
        views: list[OverheadView] | None = None,
    ) -> tuple[Tensor, ...]:
        """See :meth:`CrossViewModel.frame`; returns the kernels (B, C, k, k) to slide over the tile."""
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
        """See :meth:`CrossViewModel.maps`; correlates each level."""
        maps = []
        for level, kernel, stride in zip(features, outputs, STRIDES, strict=True):
            size = self.spec.aerial_size // stride
            similarity = correlate(level.spectrum, kernel, size) / level.divisor
            # The published distances are 2 - 2 * similarity; scores are their negatives.
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
        """See :meth:`CrossViewModel.match_levels`; computes all levels, since the finest one costs little."""
        return self.match(ground, features, heading_prior_deg, **extra).levels[:count]

    def _views(
        self, batch: int, meters_per_pixel: Tensor | None, intrinsics: Tensor | None
    ) -> list[OverheadView]:
        """Project the overhead cells for each camera of the batch; equal cameras are cached."""
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
        geometry = self._config.geometry
        views = [overhead_view(tuple(values), self.spec, geometry, device) for values in cameras.tolist()]
        return views * (batch // len(views))


def correlate(spectrum: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Cross-correlate features with a smaller ``kernel`` (B, C, k, k), summed over channels.

    ``spectrum`` is rfft2 of the features (B, C, size, size). Returns the valid part, (B, size - k + 1,
    size - k + 1); the circular correlation wraps around only outside it, so no padding is needed.
    """
    product = spectrum * torch.fft.rfft2(_wide(kernel), s=(size, size)).conj()
    side = size - kernel.shape[-1] + 1
    return torch.fft.irfft2(product.sum(1), s=(size, size))[:, :side, :side]


def _wide(x: Tensor) -> Tensor:
    # Fourier transforms in half precision support few sizes, or none.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def box_sum(x: Tensor, side: int) -> Tensor:
    """Sum ``x`` (B, h, w) over every square of ``side`` cells inside it, first along rows, then columns."""
    x = F.avg_pool2d(x[:, None], (side, 1), stride=1, divisor_override=1)
    return F.avg_pool2d(x, (1, side), stride=1, divisor_override=1)[:, 0]


def ranking_loss(maps: HeatMaps, position: Tensor, aerial_size: int) -> Tensor:
    """Compute the authors' supervised loss: every position must score below the true one, at each level.

    Sums over levels the mean of log(1 + exp(10 * (score - true score))). ``position`` (B, 2) is the true
    (row, col) in tile pixels. Raises ValueError if one lies outside a map.
    """
    offset = position - (aerial_size - 1) / 2
    total = offset.new_zeros(())
    for stride, level in zip(STRIDES, maps.levels, strict=True):
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


def _centre_crop(x: Tensor, side: int) -> Tensor:
    start = round((x.shape[-1] - side) / 2)  # halves round to even, as published
    return x[..., start : start + side, start : start + side]
