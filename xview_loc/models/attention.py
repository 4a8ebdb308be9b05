"""Attention of GGCVT: each overhead cell attends to its window, then to the image columns it projects to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xview_loc.models.vgg import unit

# Cells that share one gather of their two image columns; 32 keeps both the padding and the keys small.
_BLOCK = 32
# Added to the attention logit of an overhead cell that the camera does not see.
_UNSEEN = -100.0


@dataclass(frozen=True)
class ColumnPlan:
    """Overhead cells grouped in blocks that project between the same two image columns.

    ``cells`` (blocks * 32,) is the cell in each slot (padding repeats a cell), ``columns`` (blocks, 2) are
    the two columns, both counted over the batch; ``slots`` (cells,) is the slot of each cell.
    """

    cells: Tensor
    columns: Tensor
    slots: Tensor

    @classmethod
    def of(cls, u: Tensor, width: int) -> ColumnPlan:
        """Plan one view: ``u`` (cells,) is each cell's column in ``width`` feature columns."""
        left = u.floor()
        # Clamped before the conversion: for cells behind the camera, ``u`` overflows an integer.
        right = (left + 1).clamp(0, width - 1).long()
        left = left.clamp(0, width - 1).long()
        # Both columns make the pair's key: past an edge they are equal, so the left one is ambiguous.
        pairs, pair_of_cell, counts = torch.unique(
            left * width + right, return_inverse=True, return_counts=True
        )
        order = torch.argsort(pair_of_cell, stable=True)
        blocks = (counts + _BLOCK - 1) // _BLOCK
        # A pair's cells fill its blocks in order; spare slots of its last block repeat cell 0.
        first_slot = (blocks.cumsum(0) - blocks) * _BLOCK
        rank = torch.arange(len(order), device=u.device) - (counts.cumsum(0) - counts)[pair_of_cell[order]]
        slots = torch.empty_like(order)
        slots[order] = first_slot[pair_of_cell[order]] + rank
        cells = torch.zeros(int(blocks.sum()) * _BLOCK, dtype=torch.long, device=u.device)
        cells[slots] = torch.arange(len(order), device=u.device)
        columns = torch.stack([pairs // width, pairs % width], 1).repeat_interleave(blocks, 0)
        return cls(cells, columns, slots)

    @staticmethod
    def batch(plans: list[ColumnPlan], width: int) -> ColumnPlan:
        """Join the plans of a batch's examples."""
        if len(plans) == 1:
            return plans[0]
        count = len(plans[0].slots)
        starts = accumulate((len(plan.cells) for plan in plans[:-1]), initial=0)
        return ColumnPlan(
            torch.cat([plan.cells + i * count for i, plan in enumerate(plans)]),
            torch.cat([plan.columns + i * width for i, plan in enumerate(plans)]),
            torch.cat([plan.slots + start for plan, start in zip(plans, starts, strict=True)]),
        )


class CrossAttention(nn.Module):
    """Attention of every overhead cell to all rows of the two image columns beside its projection."""

    def __init__(self, channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self._heads = heads
        inner = heads * head_channels

        self.to_q, self.to_k, self.to_v = (
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, inner, bias=False)) for _ in range(3)
        )
        self.proj = nn.Linear(inner, channels)
        self.prenorm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.postnorm = nn.LayerNorm(channels)

    def forward(self, cells: Tensor, columns: Tensor, plan: ColumnPlan) -> Tensor:
        """Attend from ``cells`` (B, M, C) to the image's ``columns`` (B, W, H, C): (B, M, C)."""
        # Keys and values are projected once per image feature, not once per cell that attends to it.
        keys = self.to_k(columns).flatten(0, 1)[plan.columns].flatten(1, 2)
        values = self.to_v(columns).flatten(0, 1)[plan.columns].flatten(1, 2)
        queries = self.to_q(cells).flatten(0, 1)[plan.cells].unflatten(0, (-1, _BLOCK))
        mixed = F.scaled_dot_product_attention(self._split(queries), self._split(keys), self._split(values))
        mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)[plan.slots]
        x = self.prenorm(self.proj(mixed.unflatten(0, cells.shape[:2])))
        return self.postnorm(x + self.mlp(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self._heads, -1)).transpose(1, 2)


class _WindowAttention(nn.Module):
    """Self-attention inside square windows, with a learned bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self._heads = heads
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.proj = nn.Linear(channels, channels, bias=False)
        span = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(span * span, heads))
        row, col = (index.flatten() for index in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        rows, cols = (x[:, None] - x[None, :] + window - 1 for x in (row, col))
        self.register_buffer("relative_position_index", rows * span + cols)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Mix ``x`` (windows, cells, C); ``seen`` (windows, cells) is False for keys to avoid."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if seen is not None:
            bias = bias + torch.where(seen, 0.0, _UNSEEN).to(bias.dtype)[:, None, None, :]
        query, key, value = (
            layer(x).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _SwinBlock(nn.Module):
    """Window attention and a perceptron, each with its residual."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self._window = window
        self.normx = nn.LayerNorm(channels)
        self.attn = _WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = _Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Mix ``x`` (B, S, S, C) within windows; ``seen`` is (B, S, S)."""
        batch, size, _, _ = x.shape
        n, w = size // self._window, self._window
        windows = self.normx(x).reshape(batch, n, w, n, w, -1).transpose(2, 3).reshape(-1, w * w, x.shape[3])
        if seen is not None:
            seen = seen.reshape(batch, n, w, n, w).transpose(2, 3).reshape(-1, w * w)
        mixed = self.attn(windows, seen).reshape(batch, n, n, w, w, -1).transpose(2, 3)
        x = x + mixed.reshape(x.shape)
        return x + self.mlp(self.norm2(x))


# The two below exist for their names in checkpoints.
class _Blocks(nn.Module):
    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_SwinBlock(channels, heads, window)])


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, embedding, 1)
        self.norm = nn.LayerNorm(embedding)


class WindowTransformer(nn.Module):
    """Embeds overhead features, mixes them within windows and projects them back to their channels."""

    def __init__(self, channels: int, embedding: int = 48, heads: int = 3, window: int = 8) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(channels, embedding)
        self.layers = nn.ModuleList([_Blocks(embedding, heads, window)])
        self.head = nn.Linear(embedding, channels)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Map ``x`` (B, C, S, S) to (B, S * S, C)."""
        embedded = self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        mixed = self.get_submodule("layers.0.blocks.0")(embedded, seen)
        return self.head(mixed.flatten(1, 2))


class CrossViewAttention(nn.Module):
    """Alternates self-attention of overhead cells and their cross-attention to the ground image."""

    def __init__(self, channels: int, blocks: int = 2, heads: int = 4, head_channels: int = 16) -> None:
        super().__init__()
        self.self_attention_layers = nn.ModuleList(WindowTransformer(channels) for _ in range(blocks))
        self.cross_attention_layers = nn.ModuleList(
            CrossAttention(channels, heads, head_channels) for _ in range(blocks)
        )

    def forward(self, overhead: Tensor, ground: Tensor, plan: ColumnPlan, seen: Tensor | None) -> Tensor:
        """Refine ``overhead`` (B, C, S, S) by ``ground`` (B, C, H, W); ``seen`` is (B, S, S) or None."""
        columns = ground.permute(0, 3, 2, 1).contiguous()
        x = overhead
        for mix, look in zip(self.self_attention_layers, self.cross_attention_layers, strict=True):
            cells = look(mix(x, seen), columns, plan)
            x = cells.transpose(1, 2).reshape(overhead.shape)
        return unit(x)
