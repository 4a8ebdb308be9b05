"""EfficientNet-B0 as a feature extractor, with selectable padding and the key names of the common port."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["zeros", "circular", "reflect"]

# One row per group of blocks: repeats, kernel, stride of the first block, expansion, output channels.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280
_CLASSES = 1000
# Drop-connect: a residual block's rate is this times its number over that of all blocks.
_DROP_CONNECT, _BLOCKS = 0.2, sum(repeats for repeats, *_ in _GROUPS)


def scaled_channels(channels: int, width: float) -> int:
    """Scale ``channels`` by ``width``, rounded to a multiple of 8 (at least 8)."""
    return max(8, round(channels * width / 8) * 8)


def block_channels(width: float = 1.0) -> list[int]:
    """Return the output channels of each of the 16 blocks."""
    return [scaled_channels(out, width) for repeats, _, _, _, out in _GROUPS for _ in range(repeats)]


def head_channels(width: float = 1.0) -> int:
    """Return the channels of the final feature volume."""
    return scaled_channels(_HEAD_CHANNELS, width)


class _SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding for a 224-pixel input.

    Every stride-2 layer then gets an even size and ``kernel - stride`` pixels of padding, the odd one after
    the image. ``circular`` wraps left and right (a panorama's seam) and pads with zeros above and below.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, groups: int, padding: Padding
    ) -> None:
        total = kernel - stride
        margin = (total + 1) // 2
        mode: Literal["reflect", "zeros"] = "reflect" if padding == "reflect" else "zeros"
        super().__init__(
            channels_in, channels_out, kernel, stride, margin, groups=groups, bias=False, padding_mode=mode
        )
        self._margin = margin
        self._wraps = padding == "circular"
        self._uneven = total % 2 == 1

    def forward(self, x: Tensor) -> Tensor:
        # One pixel less before than after: a zero row and column in front of the kernel makes the padding
        # even, which the convolution does itself. Padding the image would copy it (several times slower).
        weight = F.pad(self.weight, (1, 0, 1, 0)) if self._uneven else self.weight
        if self._wraps:
            # Many times faster than F.pad with circular padding.
            x = torch.cat([x[..., -self._margin :], x, x[..., : self._margin]], 3)
            return F.conv2d(x, weight, None, self.stride, (self._margin, 0), 1, self.groups)
        return self._conv_forward(x, weight, None)


_batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation.

    In training, a residual block skips its branch with probability ``drop_connect_rate``, for each sample
    by itself (drop-connect, also called stochastic depth).
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int, padding: Padding
    ) -> None:
        super().__init__()
        inner = channels_in * expansion
        squeezed = max(1, channels_in // 4)
        self._expands = expansion != 1
        if self._expands:
            self._expand_conv = nn.Conv2d(channels_in, inner, 1, bias=False)
            self._bn0 = _batch_norm(inner)
        self._depthwise_conv = _SameConv2d(inner, inner, kernel, stride, inner, padding)
        self._bn1 = _batch_norm(inner)
        self._se_reduce = nn.Conv2d(inner, squeezed, 1)
        self._se_expand = nn.Conv2d(squeezed, inner, 1)
        self._project_conv = nn.Conv2d(inner, channels_out, 1, bias=False)
        self._bn2 = _batch_norm(channels_out)
        self._residual = stride == 1 and channels_in == channels_out
        self.drop_connect_rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self._bn0(self._expand_conv(x))) if self._expands else x
        y = F.silu(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y * self._gate(y)))
        if not self._residual:
            return y
        if self.training and self.drop_connect_rate:
            kept = 1.0 - self.drop_connect_rate
            # Divided by the share that is kept, so that the mean stays that of evaluation.
            y = y * (torch.rand(len(y), 1, 1, 1, device=y.device) < kept).to(y.dtype) / kept
        return x + y

    def _gate(self, y: Tensor) -> Tensor:
        """Compute squeeze and excitation (B, C, 1, 1); linear, since 1x1 convolutions of a pixel are slow."""
        reduce, expand = self._se_reduce, self._se_expand
        squeezed = F.silu(F.linear(y.mean((2, 3)), reduce.weight.flatten(1), reduce.bias))
        return F.linear(squeezed, expand.weight.flatten(1), expand.bias).sigmoid()[..., None, None]


class EfficientNet(nn.Module):
    """EfficientNet-B0 without its classifier; total stride 32, or 16 with the first five groups alone.

    ``width`` scales every layer's channels, ``groups`` is the number of groups of blocks. ``classifier``
    keeps the unused ``_fc`` weights of published checkpoints as frozen parameters.
    """

    def __init__(
        self,
        padding: Padding = "zeros",
        width: float = 1.0,
        classifier: bool = True,
        groups: int = len(_GROUPS),
    ) -> None:
        super().__init__()
        self.stride = 2 * math.prod(stride for _, _, stride, _, _ in _GROUPS[:groups])
        channels = scaled_channels(_STEM_CHANNELS, width)
        self._conv_stem = _SameConv2d(3, channels, 3, 2, 1, padding)
        self._bn0 = _batch_norm(channels)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, out in _GROUPS[:groups]:
            for i in range(repeats):
                out_scaled = scaled_channels(out, width)
                block = _Block(channels, out_scaled, kernel, 1 if i else stride, expansion, padding)
                block.drop_connect_rate = _DROP_CONNECT * len(self._blocks) / _BLOCKS
                self._blocks.append(block)
                channels = out_scaled
        self._conv_head = nn.Conv2d(channels, head_channels(width), 1, bias=False)
        self._bn1 = _batch_norm(head_channels(width))
        if classifier:
            self._fc = nn.Linear(head_channels(width), _CLASSES).requires_grad_(False)

    def forward(self, image: Tensor, taps: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return the final features of ``image`` (B, 3, H, W) and the outputs of the blocks ``taps``."""
        x = F.silu(self._bn0(self._conv_stem(image)))
        tapped = {}
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in taps:
                tapped[i] = x
        return F.silu(self._bn1(self._conv_head(x))), [tapped[i] for i in taps]
