"""A teacher's heat maps of many pairs, on the disk: coarse, and never all of them in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from numpy.typing import NDArray

from xview_loc.adaptation.labels import PairReader, PairTable, gathered, match_batch, turns_of
from xview_loc.datasets.base import PairSource
from xview_loc.models.base import CrossViewModel, HeatMapGrid, HeatMaps

# Side of what a heat map is averaged to, metres: of the order of the teacher's best errors, and 13 kB a pair.
CELL_M = 1.0
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class _Block(PairTable):
    """likelihood: float16 (N, n, n), of whole tiles; each cell's probability in multiples of what it would
    be if all were alike."""

    likelihood: NDArray[np.float16]


class HeatMapStore:
    """Likelihoods of pairs, as the model has them; ``store[index]`` is one pair's.

    Not flattened as a calibration has it, which makes one map's covariance honest: labels got worse.

    grid: where they lie on the tile; side: of them, n.
    """

    def __init__(self, folder: Path, model: CrossViewModel) -> None:
        pool, fine = _pool(model), model.grid
        row, col = (x + (pool - 1) / 2 * fine.scale for x in fine.origin)
        self.grid = HeatMapGrid(fine.scale * pool, (row, col))
        self.side = model.map_size // pool
        self._starts = sorted(int(file.stem) for file in folder.glob("*.npz"))
        # A walk along a drive, in either direction, opens each file once.
        self._block = lru_cache(maxsize=2)(partial(_load, folder))

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """(n, n). Raises KeyError for a pair that is not there."""
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
    *,
    heading_prior_deg: float | None = 0.0,
    batch_size: int = 16,
    workers: int = 0,
    seed: int = 0,
    on_pairs: Callable[[int], object] = lambda done: None,
) -> HeatMapStore:
    """A model's heat maps of the pairs ``index`` of a source, kept in ``folder`` block by block.

    What is there already is not done again. Pairs that cannot be used are left out. See
    :func:`xview_loc.adaptation.pseudo_labels.label_pairs` for the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = fabric.to_device(model.eval())  # type: ignore[assignment]
    for start in range(0, len(index), _BLOCK):
        chosen = index[start : start + _BLOCK]
        file = folder / f"{chosen[0]}.npz"
        if not fabric.broadcast(file.exists()):
            share = chosen[fabric.global_rank :: fabric.world_size]
            rows = []
            for batch in PairReader(source, share, heading_prior_deg, batch_size, workers):
                batch = fabric.to_device(batch)
                turns = turns_of(batch, heading_prior_deg, seed)
                with fabric.autocast():
                    maps, _ = match_batch(model, batch, heading_prior_deg, turns=turns)
                rows.append(_Block(batch["index"].cpu().numpy(), _likelihood(model, maps)))
                on_pairs(start + sum(map(len, rows)) * fabric.world_size)
            block = gathered(fabric, rows)
            if block is not None and fabric.is_global_zero:
                block.save(file)
        on_pairs(min(start + _BLOCK, len(index)))
    return HeatMapStore(folder, model)


def stored_bytes(model: CrossViewModel) -> int:
    """Of one pair."""
    return 2 * (model.map_size // _pool(model)) ** 2


def _load(folder: Path, start: int) -> _Block | None:
    return _Block.load(folder / f"{start}.npz")


def _pool(model: CrossViewModel) -> int:
    """How many pixels of the finest map, along a side, are averaged into one."""
    return max(1, round(CELL_M / (model.spec.gsd * model.grid.scale)))


def _likelihood(model: CrossViewModel, maps: HeatMaps) -> NDArray[np.float16]:
    logits = maps.logits.float()
    share = logits.flatten(1).softmax(1).view_as(logits)
    cells: Any = F.avg_pool2d(share[:, None] * logits[0].numel(), _pool(model))[:, 0]
    return np.asarray(cells.clamp_max(torch.finfo(torch.float16).max).half().cpu().numpy(), np.float16)
