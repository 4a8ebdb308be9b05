"""Projection of flat ground around the camera into the image: where GGCVT samples its image features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from xview_loc.models.attention import ColumnPlan
from xview_loc.models.specs import ModelSpec

# Tile pixels per feature cell, coarse to fine.
STRIDES = (8, 4, 2)
_MIN_DEPTH = 1e-6


@dataclass(frozen=True)
class CameraGeometry:
    """Height of a camera above ground, metres.

    ``image_origin`` is the pixel coordinate of the image's upper left corner: 0 in the published models,
    which put the first pixel's centre there; -0.5 with pixel-centre coordinates.
    """

    height: float
    image_origin: float = 0.0


@dataclass(frozen=True)
class Sampler:
    """Bilinear sampling of image features at overhead cells.

    ``neighbours`` (S * S, 4) are the indices row * columns + column of the features around each cell, with
    ``weights`` (S * S, 4), zero for cells outside the image.
    """

    neighbours: Tensor
    weights: Tensor

    @classmethod
    def of(cls, u: Tensor, v: Tensor, rows: int, cols: int, device: torch.device) -> Sampler:
        """Sample features (rows, cols) at column ``u`` and row ``v`` (S, S)."""
        # Instead of F.grid_sample, whose scaling to [-1, 1] and back loses 1e-5 of a pixel.
        inside = (u >= 0) & (u <= cols - 1) & (v >= 0) & (v <= rows - 1)
        u, v = (torch.where(inside, x, 0.0).flatten() for x in (u, v))
        left, top = u.floor().clamp(max=cols - 2), v.floor().clamp(max=rows - 2)
        right, down = u - left, v - top
        first = (top * cols + left).long()
        neighbours = torch.stack([first, first + 1, first + cols, first + cols + 1], 1)
        up = 1 - down
        weights = torch.stack([(1 - right) * up, right * up, (1 - right) * down, right * down], 1)
        weights = weights * inside.flatten()[:, None]
        return cls(neighbours.to(device), weights.to(device))


def sample(features: Tensor, samplers: list[Sampler]) -> Tensor:
    """Sample ``features`` (B, C, H, W) with one sampler per example: (B, C, S, S)."""
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
class OverheadView:
    """Samplers of one camera's overhead cells for each level, and the image columns of the coarsest level's.

    ``seen`` (S, S) is False for the coarsest level's cells behind the camera.
    """

    samplers: tuple[Sampler, ...]
    plan: ColumnPlan
    seen: Tensor = field(repr=False)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a view made during inference is cached and must serve training too
def overhead_view(
    camera: tuple[float, ...], spec: ModelSpec, geometry: CameraGeometry, device: torch.device
) -> OverheadView:
    """Project the overhead cells of every level into the image of ``camera``.

    That is the tile's ground sample distance (m/px) for panoramas, the nine intrinsics for pinhole models.
    """
    samplers = []
    for stride in reversed(STRIDES):
        size, (rows, cols) = spec.aerial_size // stride, (x // stride for x in spec.ground_size)
        if spec.camera == "panorama":
            u, v = project_panorama(camera[0] * stride, geometry, spec.elevation_deg, size, rows, cols)
            visible = torch.ones_like(u, dtype=torch.bool)
        else:
            matrix = torch.tensor(camera).reshape(3, 3)
            matrix[:2] /= stride
            u, v, visible = _project_pinhole(matrix, spec.gsd * stride, geometry.height, size)
        samplers.append(Sampler.of(u, v, rows, cols, device))
    # The last level is the coarsest.
    plan = ColumnPlan.of(u.flatten(), cols)
    plan = ColumnPlan(plan.cells.to(device), plan.columns.to(device), plan.slots.to(device))
    return OverheadView(tuple(reversed(samplers)), plan, visible.to(device))


def project_panorama(
    cell_m: float,
    geometry: CameraGeometry,
    elevation_deg: tuple[float, float],
    size: int,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:
    """Return column and row (size, size) of flat ground around a panoramic camera that looks north."""
    # float32 and this order of operations as published: diagonals fall on whole columns, where rounding
    # decides.
    centre = size / 2 - 0.5
    row, col = torch.meshgrid(*[torch.arange(size, dtype=torch.float32)] * 2, indexing="ij")
    radius = torch.sqrt((row - centre) ** 2 + (col - centre) ** 2)
    angle = torch.atan2(row - centre, col - centre)
    angle = (-math.pi / 2 + angle % (2 * math.pi)) % (2 * math.pi)
    polar = torch.atan2(radius * torch.tensor(cell_m), torch.tensor(-geometry.height))
    top, bottom = (math.radians(90.0 - elevation) for elevation in elevation_deg)
    u, v = angle / 2 / math.pi * cols, (polar - top) / (bottom - top) * rows
    return u + geometry.image_origin, v + geometry.image_origin


def _project_pinhole(
    matrix: Tensor, cell_m: float, camera_height: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return column, row and a mask of what is in front (size, size) of flat ground; forward is +column."""
    row, col = torch.meshgrid(*[torch.arange(size, dtype=torch.float32) - size // 2] * 2, indexing="ij")
    right, forward = cell_m * row, cell_m * col
    points = torch.stack([right, torch.full_like(right, camera_height), forward], -1) @ matrix.T
    depth = points[..., 2].clamp_min(_MIN_DEPTH)
    return points[..., 0] / depth, points[..., 1] / depth, points[..., 2] > _MIN_DEPTH
