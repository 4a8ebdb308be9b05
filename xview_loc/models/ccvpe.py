"""CCVPE: coarse-to-fine matching of a ground descriptor, rolled to every heading, against an aerial tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xview_loc.models.base import CrossViewModel, HeatMaps, check_image_size
from xview_loc.models.efficientnet import EfficientNet, Padding, block_channels, head_channels
from xview_loc.models.specs import SPECS, ModelSpec

# Lower bound of squared norms: the square of F.normalize's epsilon.
_MIN_SQUARED_NORM = 1e-24
# Channels of the last stage, from the finest level to the tile's own resolution.
_LAST_CHANNELS = 16


@dataclass(frozen=True)
class CCVPEConfig:
    """Sizes of one CCVPE model; tuples run from the coarsest level to the finest.

    ``satellite_descriptor`` is the length of one coarse descriptor, ``cell`` the side of the cell that it
    covers, in final backbone features. ``ground_channels`` are the channels per panorama column of each
    level's ground descriptor, ``shifts`` those by which the satellite descriptor is rolled per heading bin.
    ``up`` and ``conv`` are output channels of each level's transposed convolution and of its convolutions
    (``..._orientation``: of the orientation decoder). ``taps`` are the backbone blocks whose outputs are the
    decoders' skip features, one for each level but the last; ``width`` is a factor on the backbones'
    channels, ``groups`` their number of EfficientNet-B0's groups; ``classifier`` keeps the unused classifier
    weights of the published checkpoints. ``padding`` is that of the satellite backbone and the decoders.
    """

    spec: ModelSpec
    satellite_descriptor: int
    ground_channels: tuple[int, ...]
    shifts: tuple[int, ...]
    up: tuple[int, ...]
    conv: tuple[int, ...]
    up_orientation: tuple[int, ...]
    conv_orientation: tuple[int, ...]
    taps: tuple[int, ...] = (15, 10, 4, 2, 0)
    cell: int = 2
    width: float = 1.0
    groups: int = 7
    padding: Literal["zeros", "reflect"] = "zeros"
    classifier: bool = True


_VIGOR = CCVPEConfig(
    spec=SPECS["ccvpe-vigor"],
    satellite_descriptor=1280,
    ground_channels=(64, 32, 16, 8, 4, 2),
    shifts=(64, 32, 16, 8, 4, 2),
    up=(1024, 320, 160, 80, 40),
    conv=(640, 320, 160, 80, 40),
    up_orientation=(1024, 256, 128, 64, 32),
    conv_orientation=(640, 256, 128, 64, 32),
)
_KITTI = CCVPEConfig(
    spec=SPECS["ccvpe-kitti"],
    satellite_descriptor=2048,
    ground_channels=(16, 8, 4, 2, 1, 1),
    shifts=(128, 64, 32, 16, 8, 8),
    up=(1024, 256, 128, 64, 32),
    conv=(512, 256, 128, 128, 32),
    up_orientation=(1024, 256, 128, 64, 32),
    conv_orientation=(512, 256, 128, 64, 32),
)
_SMALL = CCVPEConfig(
    # Backbones of stride 16 and one feature per coarse cell: 10 x 10 cells of 7.7 m, and one heading bin per
    # feature column of the panorama.
    spec=SPECS["ccvpe-small"],
    satellite_descriptor=256,
    ground_channels=(16, 8, 4, 2),
    shifts=(16, 8, 4, 2),
    up=(96, 48, 24),
    conv=(128, 64, 32),
    up_orientation=(64, 32, 16),
    conv_orientation=(64, 32, 16),
    taps=(4, 2, 0),
    cell=1,
    width=0.5,
    groups=5,
    padding="reflect",
    classifier=False,
)
_PINHOLE_SMALL = replace(
    # It sees a quarter of all directions, and so of each descriptor.
    _SMALL,
    spec=SPECS["ccvpe-pinhole-small"],
    ground_channels=(4, 2, 1, 1),
    shifts=(16, 8, 4, 4),
    conv=(128, 64, 64),
)
CONFIGS = {
    config.spec.name: config
    for config in (
        _VIGOR,
        replace(_VIGOR, spec=SPECS["ccvpe-vigor-reflect"], padding="reflect"),
        _KITTI,
        _SMALL,
        _PINHOLE_SMALL,
        # The same model, trained on panoramas that cameras see in part.
        replace(_SMALL, spec=SPECS["ccvpe-rig-small"]),
    )
}


@dataclass(frozen=True)
class AerialFeatures:
    """Features of a tile: coarse descriptors (B, C, h, w) and the decoders' skip features.

    ``shares``, filled by :meth:`CCVPE.precompute`, are for each decoder (by its suffix) the tile's share of
    the first convolution of each stage but the last.
    """

    descriptors: Tensor
    skips: tuple[Tensor, ...]
    shares: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Fused:
    """A decoder's transposed convolutions, each merged with the convolution after it.

    ``versions`` are those of the merged weights, ``kernels`` (C, C', 4, 4) one for each stage. ``last``
    (1, C, S, S) is the constant share in the first convolution of the last stage, without skip features.
    """

    versions: tuple[int, ...]
    kernels: tuple[Tensor, ...]
    last: Tensor


class _Stage(NamedTuple):
    """One stage of a decoder: transposed convolution, first convolution after it, and the rest."""

    up: nn.ConvTranspose2d
    conv: nn.Conv2d
    rest: nn.Sequential

    def up_of_zeros(self, size: tuple[int, ...]) -> Tensor:
        assert self.up.bias is not None
        return self.up.bias[None, :, None, None].expand(1, -1, *size)

    def merged_kernel(self) -> Tensor:
        """Merge the transposed convolution with its share of the convolution after it: (C, C', 4, 4)."""
        # Tap t sums the products of all pairs of taps k and e of the two with t = k + 2 - e.
        own = self.conv.weight[:, : self.up.out_channels]
        kernel = F.conv2d(self.up.weight, own, padding=2)
        return kernel.contiguous(memory_format=torch.channels_last)

    def versions(self) -> tuple[int, ...]:
        """Return numbers that change whenever the weights do."""
        weights = (self.up.weight, self.up.bias, self.conv.weight, self.conv.bias)
        return tuple(v for w in weights if w is not None for v in (w.data_ptr(), w._version))


class _ColumnsFirst(nn.Module):
    """(B, C, H, W) -> (B, H, W, C), so that a 1x1 convolution can mix the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class CCVPE(CrossViewModel):
    """Matches a panorama or pinhole image to a tile; parameters are named as in published checkpoints."""

    def __init__(self, config: CCVPEConfig) -> None:
        super().__init__()
        self.spec = config.spec
        self.assumed = (f"padding {config.padding}",)
        self._config = config
        self._levels = len(config.ground_channels)
        features = head_channels(config.width)
        skip_channels = [block_channels(config.width)[tap] for tap in config.taps]

        ground_padding: Padding = "circular" if config.spec.camera == "panorama" else "zeros"
        self.grd_efficientnet = EfficientNet(ground_padding, config.width, config.classifier, config.groups)
        self.sat_efficientnet = EfficientNet(config.padding, config.width, config.classifier, config.groups)
        rows = config.spec.ground_size[0] // self.grd_efficientnet.stride
        for level, channels in enumerate(config.ground_channels, start=1):
            self.add_module(
                f"grd_feature_to_descriptor{level}",
                nn.Sequential(nn.Conv2d(features, channels, 1), _ColumnsFirst(), nn.Conv2d(rows, 1, 1)),
            )
        self.sat_feature_to_descriptors = nn.Sequential(
            nn.Flatten(), nn.Linear(features * config.cell**2, config.satellite_descriptor)
        )
        self._add_decoder("", 1, config.up, config.conv, skip_channels, extra=1, outputs=1)
        # Keys are the decoders' suffixes.
        self._fused: dict[str, _Fused] = {}
        self._add_decoder(
            "_ori", config.spec.bins, config.up_orientation, config.conv_orientation, skip_channels, 0, 2
        )

    def _add_decoder(
        self,
        suffix: str,
        scores: int,
        up: tuple[int, ...],
        conv: tuple[int, ...],
        skips: list[int],
        extra: int,
        outputs: int,
    ) -> None:
        # Stages are numbered from the number of levels down to 1 as in published checkpoints. ``scores`` and
        # ``extra`` are the numbers of score channels before the features, at the first level and the others.
        conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode=self._config.padding)
        channels = scores + self._config.satellite_descriptor
        ups = (*up, _LAST_CHANNELS)
        hidden = (*conv, _LAST_CHANNELS)
        for level in range(self._levels):
            last = level == self._levels - 1
            number = self._levels - level
            joined = ups[level] + (0 if last else skips[level])
            self.add_module(f"deconv{number}{suffix}", nn.ConvTranspose2d(channels, ups[level], 2, 2))
            self.add_module(
                f"conv{number}{suffix}",
                nn.Sequential(
                    conv3x3(joined, hidden[level]),
                    nn.ReLU(),
                    conv3x3(hidden[level], outputs if last else hidden[level]),
                ),
            )
            channels = hidden[level] + extra

    def encode_aerial(self, aerial: Tensor) -> AerialFeatures:
        """See :meth:`CrossViewModel.encode_aerial`. Raises ValueError if S is not the spec's."""
        size = self.spec.aerial_size
        check_image_size("aerial", aerial, (size, size))
        volume, skips = self.sat_efficientnet(aerial, self._config.taps)
        batch, channels, rows, cols = volume.shape
        cell = self._config.cell
        grid = volume.reshape(batch, channels, rows // cell, cell, cols // cell, cell)
        cells = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * cell * cell)
        descriptors = self.sat_feature_to_descriptors(cells)
        descriptors = descriptors.reshape(batch, rows // cell, cols // cell, -1).permute(0, 3, 1, 2)
        return AerialFeatures(descriptors.contiguous(), tuple(skips))

    def precompute(self, features: AerialFeatures, *, orientation: bool = False) -> AerialFeatures:
        """See :meth:`CrossViewModel.precompute`.

        The first convolution after a concatenation is the sum of one over the skip features, which depend on
        the tile alone, and one over the features from below. The latter merges with the transposed
        convolution before it into one of 4 x 4. At the coarsest level only the scores depend on the image.
        """
        scores = {"": 1, "_ori": self.spec.bins} if orientation else {"": 1}
        for suffix in scores:
            self._fuse(suffix)
        return replace(features, shares={s: self._shares(s, count, features) for s, count in scores.items()})

    def select(self, features: AerialFeatures, rows: Tensor) -> AerialFeatures:
        """See :meth:`CrossViewModel.select`."""
        return AerialFeatures(
            features.descriptors[rows],
            tuple(skip[rows] for skip in features.skips),
            {suffix: tuple(s[rows] for s in shares) for suffix, shares in features.shares.items()},
        )

    def _shares(self, suffix: str, scores: int, features: AerialFeatures) -> tuple[Tensor, ...]:
        x = _unit(features.descriptors)
        no_scores = x.new_zeros(x.shape[0], scores, *x.shape[2:])
        shares = []
        for level, skip in enumerate(features.skips):
            stage = self._stage(level, suffix)
            below = stage.up(_join(no_scores, x)) if level == 0 else stage.up_of_zeros(skip.shape[2:])
            shares.append(stage.conv(_join(below, skip)).contiguous(memory_format=torch.channels_last))
        return tuple(shares)

    def _fuse(self, suffix: str) -> None:
        stages = [self._stage(level, suffix) for level in range(self._levels)]
        versions = tuple(v for stage in stages for v in stage.versions())
        known = self._fused.get(suffix)
        if known is None or known.versions != versions:
            size = self.spec.aerial_size
            # In the weights' precision: the result is kept beyond this call and its autocast.
            with torch.autocast(stages[0].up.weight.device.type, enabled=False):
                last = stages[-1].conv(stages[-1].up_of_zeros((size, size)))
                self._fused[suffix] = _Fused(
                    versions,
                    tuple(stage.merged_kernel() for stage in stages),
                    last.contiguous(memory_format=torch.channels_last),
                )

    def _stage(self, level: int, suffix: str) -> _Stage:
        number = self._levels - level
        up = cast(nn.ConvTranspose2d, self.get_submodule(f"deconv{number}{suffix}"))
        convs = cast(nn.Sequential, self.get_submodule(f"conv{number}{suffix}"))
        return _Stage(up, cast(nn.Conv2d, convs[0]), cast(nn.Sequential, convs[1:]))

    def encode_ground(self, ground: Tensor) -> list[Tensor]:
        """Compute each level's unit descriptors (B, columns * channels). Raises ValueError on wrong sizes."""
        check_image_size("ground", ground, self.spec.ground_size)
        volume, _ = self.grd_efficientnet(ground)
        return [
            F.normalize(self.get_submodule(f"grd_feature_to_descriptor{level}")(volume).flatten(1), dim=1)
            for level in range(1, self._levels + 1)
        ]

    def match(
        self,
        ground: Tensor,
        features: AerialFeatures,
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> HeatMaps:
        """See :meth:`CrossViewModel.match`; a batch of one on either side is broadcast to the other's.

        Only the whole bins within +-``heading_prior_deg`` degrees are scored, ordered from minus to plus (for
        None all bins, from bin 0). The orientation field always uses all bins.
        Raises ValueError on a negative prior or a wrong image size.
        """
        descriptors = self.encode_ground(ground)
        maps, x = self._climb(descriptors, features, heading_prior_deg, self._levels)
        x = self._ascend(self._levels - 1, "", maps[-1].amax(1, keepdim=True), x, features)
        field = self._orientation(descriptors[0], features) if orientation else None
        return HeatMaps(maps, x[:, 0], field)

    def tile_tensors(self, features: AerialFeatures) -> tuple[Tensor, ...]:
        """See :meth:`CrossViewModel.tile_tensors`; ``features`` must be precomputed."""
        return (features.descriptors, *(share for shares in features.shares.values() for share in shares))

    def frame(
        self,
        ground: Tensor,
        tile: Sequence[Tensor],
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> tuple[Tensor, ...]:
        """See :meth:`CrossViewModel.frame`; returns the maps of :meth:`match`, the finest one first."""
        count = self._levels - 1
        shares = {"": tuple(tile[1 : 1 + count])}
        if orientation:
            shares["_ori"] = tuple(tile[1 + count :])
        features = AerialFeatures(tile[0], (), shares)
        maps = self.match(ground, features, heading_prior_deg, orientation=orientation)
        return (maps.logits, *maps.levels, *([] if maps.orientation is None else [maps.orientation]))

    def maps(self, outputs: Sequence[Tensor], features: AerialFeatures) -> HeatMaps:
        """See :meth:`CrossViewModel.maps`."""
        logits, levels, rest = outputs[0], outputs[1 : 1 + self._levels], outputs[1 + self._levels :]
        return HeatMaps(list(levels), logits, rest[0] if rest else None)

    def match_levels(
        self,
        ground: Tensor,
        features: AerialFeatures,
        heading_prior_deg: float | None,
        count: int,
        **extra: Any,
    ) -> list[Tensor]:
        """See :meth:`CrossViewModel.match_levels`."""
        return self._climb(self.encode_ground(ground), features, heading_prior_deg, count)[0]

    @property
    def level_count(self) -> int:
        """See :attr:`CrossViewModel.level_count`."""
        return self._levels

    def _climb(
        self,
        descriptors: list[Tensor],
        features: AerialFeatures,
        heading_prior_deg: float | None,
        count: int,
    ) -> tuple[list[Tensor], Tensor]:
        """Return the scores of the first ``count`` levels and the unit features of the last of them."""
        bins = self.prior_bins(heading_prior_deg).to(descriptors[0].device)
        x = _unit(features.descriptors)
        maps: list[Tensor] = []
        for level in range(count):
            if level:
                x = _unit(self._ascend(level - 1, "", maps[-1].amax(1, keepdim=True), x, features))
            maps.append(self._scores(level, x, descriptors[level], bins))
        return maps, x

    def prior_bins(self, heading_prior_deg: float | None) -> Tensor:
        """Return the indices of the heading bins within +-``heading_prior_deg`` degrees, in order."""
        count = self.spec.bins
        if heading_prior_deg is None:
            return torch.arange(count)
        if not heading_prior_deg >= 0:
            raise ValueError(f"the heading prior must be 0 degrees or more, not {heading_prior_deg}")
        half = math.floor(min(heading_prior_deg, 180.0) * count / 360)
        if 2 * half + 1 >= count:
            return torch.arange(count)
        # Bins count clockwise, headings counter-clockwise.
        middle = -round(self.spec.nominal_heading / (2 * math.pi) * count)
        return (torch.arange(-half, half + 1) + middle) % count

    def _scores(self, level: int, x: Tensor, descriptor: Tensor, bins: Tensor) -> Tensor:
        """Return cosine similarities (B, bins, h, w) of the rolled ground descriptor and unit features ``x``.

        Rolling the features back by a bin's shift and comparing their first channels equals comparing them
        with the descriptor rolled forward, so one matrix product scores every bin.
        """
        channels, length = x.shape[1], descriptor.shape[1]
        source = torch.arange(channels, device=x.device)
        source = (source - bins[:, None] * self._config.shifts[level]) % channels
        # Channels last: avoids a change of the memory layout.
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)
        scores = cells @ F.pad(descriptor, (0, channels - length))[:, source].mT
        if length < channels:
            window = (source < length).to(cells.dtype)
            norm = (cells.square() @ window.mT).float().clamp_min(_MIN_SQUARED_NORM).sqrt()
            scores = scores / norm.to(scores.dtype)
        return scores.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _ascend(
        self, level: int, suffix: str, scores: Tensor | None, x: Tensor, features: AerialFeatures
    ) -> Tensor:
        """Run one decoder stage: from scores and features to the next level's features, of twice the side."""
        stage = self._stage(level, suffix)
        shares = features.shares.get(suffix)
        if shares is not None:
            fused = self._fused[suffix]
            kernel = fused.kernels[level]
            if level == 0:
                assert scores is not None
                x, kernel = scores, kernel[: scores.shape[1]]
            elif scores is not None:
                x = _join(scores, x)
            share = shares[level] if level < len(shares) else fused.last
            # Reflecting the border after the transposed convolution equals repeating it before.
            padding = 1
            if self._config.padding == "reflect":
                x, padding = F.pad(x, (1, 1, 1, 1), mode="replicate"), 3
            x = F.conv_transpose2d(x, kernel, stride=2, padding=padding)
            return cast(Tensor, stage.rest(share + x))
        if scores is not None:
            x = _join(scores, x)
        x = stage.up(x)
        if level < len(features.skips):
            x = _join(x, features.skips[level])
        return cast(Tensor, stage.rest(stage.conv(x)))

    def _orientation(self, descriptor: Tensor, features: AerialFeatures) -> Tensor:
        x = _unit(features.descriptors)
        scores = self._scores(0, x, descriptor, self.prior_bins(None).to(x.device))
        x = self._ascend(0, "_ori", scores, x, features)
        for level in range(1, self._levels):
            x = self._ascend(level, "_ori", None, x, features)
        return _unit(x)


def _unit(x: Tensor) -> Tensor:
    """Divide ``x`` by its norm along the channels; F.normalize is ten times slower on these maps."""
    # In float32 at least: squares overflow half precision.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide.square().sum(1, keepdim=True).clamp_min(_MIN_SQUARED_NORM).sqrt()
    return x / norm.to(x.dtype)


def _join(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate along channels; a batch of one is broadcast to the other's."""
    batch = max(a.shape[0], b.shape[0])
    return torch.cat([a.expand(batch, -1, -1, -1), b.expand(batch, -1, -1, -1)], 1)
