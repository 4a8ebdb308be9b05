"""A model's heat maps of many pairs, stored coarsely on disk and read one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from numpy.typing import NDArray

from xview_loc.adaptation.labelling import ReadOptions, match_batch, prepare_model, tabulate
from xview_loc.adaptation.labels import PairTable
from xview_loc.datasets.base import Batch, PairSource
from xview_loc.models.base import CrossViewModel, HeatMapGrid

# Cell size of stored heat maps, metres: about the teacher's best errors, and 13 kB per pair.
CELL_M = 1.0
# Pairs per file.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class _Block(PairTable):
    """likelihood: float16 (N, n, n), of whole tiles: a cell's probability over that of a uniform map."""

    likelihood: NDArray[np.float16]


class HeatMapStore:
    """Likelihoods of pairs; ``store[index]`` is that of one pair, ``side`` cells a side, placed by ``grid``.

    Not tempered by the model's calibration: tempering made labels worse.
    """

    def __init__(self, folder: Path, model: CrossViewModel) -> None:
        pool, fine = _pool(model), model.grid
        row, col = (x + (pool - 1) / 2 * fine.scale for x in fine.origin)
        self.grid = HeatMapGrid(fine.scale * pool, (row, col))
        self.side = model.map_size // pool
        self._starts = sorted(int(file.stem) for file in folder.glob("*.npz"))
        # Two blocks: reading along a drive, in either direction, opens each file once.
        self._block = lru_cache(maxsize=2)(lambda start: _Block.load(folder / f"{start}.npz"))

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """Return a likelihood (n, n). Raises KeyError for a pair that is not stored."""
        at = int(np.searchsorted(self._starts, index, "right")) - 1
        block = self._block(self._starts[at]) if at >= 0 else None
        if block is None or index not in block.index:
            raise KeyError(index)
        return np.asarray(block.likelihood[np.searchsorted(block.index, index)], np.float32)


def store_heat_maps(
    fabric: Fabric,
    model: CrossViewModel,
    source: PairSource,
    index: NDArray[np.int64],
    folder: Path,
    options: ReadOptions,
    on_pairs: Callable[[int], object] = lambda done: None,
) -> HeatMapStore:
    """Store a model's heat maps of the pairs ``index`` of a source in ``folder``, block by block.

    Stored blocks are not computed again. Pairs that cannot be used are left out. ``on_pairs`` receives the
    number of pairs done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = prepare_model(fabric, model)

    def table_of(batch: Batch, turns: NDArray[np.int64] | None) -> _Block:
        maps, _ = match_batch(model, batch, options.heading_prior_deg, turns=turns)
        logits = maps.logits.float()
        share = logits.flatten(1).softmax(1).view_as(logits)
        cells: Any = F.avg_pool2d(share[:, None] * logits[0].numel(), _pool(model))[:, 0]
        likelihood = cells.clamp_max(torch.finfo(torch.float16).max).half()
        return _Block(batch["index"].cpu().numpy(), likelihood.cpu().numpy())

    for start in range(0, len(index), _BLOCK):
        chosen = index[start : start + _BLOCK]
        file = folder / f"{chosen[0]}.npz"
        if fabric.broadcast(_Block.load(file) is None):
            block, _ = tabulate(fabric, source, chosen, options, table_of, on_pairs, start)
            if block is not None and fabric.is_global_zero:
                block.save(file)
        on_pairs(min(start + _BLOCK, len(index)))
    # The first process has written what all read.
    fabric.barrier()
    return HeatMapStore(folder, model)


def stored_bytes(model: CrossViewModel) -> int:
    """Return the size of one stored heat map."""
    return 2 * (model.map_size // _pool(model)) ** 2


def _pool(model: CrossViewModel) -> int:
    """Return the side of the square of finest-map pixels that are averaged into one cell."""
    return max(1, round(CELL_M / (model.spec.gsd * model.grid.scale)))
