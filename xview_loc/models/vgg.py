"""VGG-16's first three blocks with a U-Net decoder, named as in published checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Output channels of the three blocks.
VGG16_CHANNELS = (64, 128, 256)


def unit(x: Tensor) -> Tensor:
    """Divide each example of ``x`` (B, ...) by the norm of all its values."""
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(1e-12)
    return x / norm.reshape(-1, *[1] * (x.ndim - 1))


class Ascend(nn.Sequential):
    """Doubles the features' size and joins them with the finer ``skip`` features."""

    def __init__(self, coarse: int, skip: int, out: int) -> None:
        # The rectifiers' positions give the convolutions their published names.
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(coarse + skip, out, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``x`` (B, coarse, h, w) and ``skip`` (B, skip, 2h, 2w) to (B, out, 2h, 2w)."""
        return super().forward(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1))


class Encoder(nn.Module):
    """VGG-16 up to its third pooling layer; ``channels`` are the output channels of the three blocks."""

    def __init__(self, channels: tuple[int, int, int] = VGG16_CHANNELS) -> None:
        super().__init__()
        first, second, third = channels
        # Numbered as torchvision numbers VGG-16's layers.
        self.conv0 = nn.Conv2d(3, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, first, 3, padding=1)
        self.conv5 = nn.Conv2d(first, second, 3, padding=1)
        self.conv7 = nn.Conv2d(second, second, 3, padding=1)
        self.conv10 = nn.Conv2d(second, third, 3, padding=1)
        self.conv12 = nn.Conv2d(third, third, 3, padding=1)
        self.conv14 = nn.Conv2d(third, third, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute features at 1/8 (not rectified), 1/4 and 1/2 (rectified) of ``image`` (B, 3, H, W)."""
        half = F.relu(F.max_pool2d(self.conv2(F.relu(self.conv0(image))), 2))
        quarter = F.relu(F.max_pool2d(self.conv7(F.relu(self.conv5(half))), 2))
        x = F.relu(self.conv12(F.relu(self.conv10(quarter))))
        return F.max_pool2d(self.conv14(x), 2), quarter, half


class Decoder(nn.Module):
    """Computes three levels of descriptors from an encoder's features."""

    def __init__(self, channels: tuple[int, int, int] = VGG16_CHANNELS) -> None:
        super().__init__()
        first, second, third = channels
        self.conv_dec1 = Ascend(third, second, second)
        self.conv_dec2 = Ascend(second, first, first)

    def forward(self, eighth: Tensor, quarter: Tensor, half: Tensor) -> list[Tensor]:
        """Compute descriptors at 1/8, 1/4 and 1/2, each of unit norm over all its values."""
        return _descriptors(self.conv_dec1, self.conv_dec2, eighth, quarter, half)


class UNet(Encoder):
    """Encoder and decoder as one module."""

    def __init__(self, channels: tuple[int, int, int] = VGG16_CHANNELS) -> None:
        super().__init__(channels)
        first, second, third = channels
        self.conv_dec1 = Ascend(third, second, second)
        self.conv_dec2 = Ascend(second, first, first)

    def forward(self, image: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Compute descriptors of ``image`` (B, 3, H, W) as :class:`Decoder` does."""
        return _descriptors(self.conv_dec1, self.conv_dec2, *super().forward(image))


def _descriptors(dec1: Ascend, dec2: Ascend, eighth: Tensor, quarter: Tensor, half: Tensor) -> list[Tensor]:
    middle = dec1(eighth, quarter)
    return [unit(eighth), unit(middle), unit(dec2(middle, half))]
