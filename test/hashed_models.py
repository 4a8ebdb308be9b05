"""Weights and inputs from integer arithmetic, so that they do not depend on library versions."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return values in [-1, 1), hashed from ``name`` and their index."""
    count = int(np.prod(shape, dtype=np.int64))
    x = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    values = uniform(key, shape)
    if len(shape) > 1:  # keep the variance through a rectified layer
        return values * np.float32(np.sqrt(6 / np.prod(shape[1:])))
    if key.endswith(("bias", "running_mean")):
        return values * np.float32(0.1)
    return 1 + values * np.float32(0.3)


def image(name: str, height: int, width: int) -> torch.Tensor:
    pixels = torch.zeros(1, 3, height, width)
    for cells in (4, 16, 64):
        grid = torch.from_numpy(uniform(f"{name}/{cells}", (1, 3, cells, cells)))
        pixels += F.interpolate(grid, (height, width), mode="bilinear", align_corners=True)
    return pixels


def hash_weights(model: CrossViewModel) -> CrossViewModel:
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = torch.from_numpy(weight(key, tuple(value.shape)))
    model.load_state_dict(state)
    return model


@lru_cache(maxsize=1)
def hashed_model(name: str) -> CrossViewModel:
    return hash_weights(create_model(name))


def inputs(model: CrossViewModel) -> tuple[torch.Tensor, torch.Tensor]:
    size = model.spec.aerial_size
    return image("ground", *model.spec.ground_size), image("aerial", size, size)
