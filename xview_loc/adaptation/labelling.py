"""Run a model over pairs, on one or several processes, and label them with its heat maps' maxima."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.adaptation.labels import AdaptationError, PairTable, PseudoLabels
from xview_loc.datasets.base import Batch, PairSample, PairSource, Readable, load_readable
from xview_loc.errors import UserError
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.training.losses import search_radius
from xview_loc.training.turned_panoramas import random_turns, turn_panoramas

# Pairs per file of labels; an interrupted run repeats at most these.
_BLOCK = 1024
# Radius for the peak mass.
_PEAK_RADIUS_M = 2.0

Table = TypeVar("Table", bound=PairTable)


class _Usable(Readable):
    """Readable pairs; one whose heading is needed but unknown comes as an error."""

    def __init__(self, source: PairSource, index: NDArray[np.int64], needs_heading: bool) -> None:
        super().__init__(source, index)
        self._needs_heading = needs_heading

    def __getitem__(self, row: int) -> PairSample | UserError:
        sample = super().__getitem__(row)
        if self._needs_heading and not isinstance(sample, UserError) and not sample["heading_known"]:
            return AdaptationError(f"pair {self._index[row]} has no heading: adapt with an unknown heading")
        return sample


@dataclass(frozen=True)
class ReadOptions:
    """How pairs are read: the largest error of the headings (None: unknown), and processes that load data.

    ``seed`` is that of the random turns by which headings are hidden from the model (:func:`turns_of`).
    """

    heading_prior_deg: float | None = 0.0
    seed: int = 0
    workers: int = 0
    batch_size: int = 16


class PairReader:
    """Batches, on the device, of this process's share of the pairs ``index``.

    Pairs that cannot be used are skipped; ``first_failure`` is the reason for the first one, or "".
    """

    def __init__(
        self, fabric: Fabric, source: PairSource, index: NDArray[np.int64], options: ReadOptions
    ) -> None:
        self.first_failure = ""
        self._fabric = fabric
        share = index[fabric.global_rank :: fabric.world_size]
        self._pairs = _Usable(source, share, options.heading_prior_deg is not None)
        self._options = options

    def __iter__(self) -> Iterator[Batch]:
        for batch, errors in load_readable(self._pairs, self._options.batch_size, self._options.workers):
            if errors and not self.first_failure:
                self.first_failure = str(errors[0])
            if batch is not None:
                on_device: Batch = self._fabric.to_device(batch)
                yield on_device


def tabulate(
    fabric: Fabric,
    source: PairSource,
    index: NDArray[np.int64],
    options: ReadOptions,
    table_of: Callable[[Batch, NDArray[np.int64] | None], Table],
    on_pairs: Callable[[int], object] = lambda done: None,
    before: int = 0,
) -> tuple[Table | None, str]:
    """Join the tables that ``table_of(batch, turns)`` makes of all batches, on all processes.

    ``on_pairs`` receives ``before`` plus the number of pairs done. Returns None if no pair can be used, and
    the reason for the first one that cannot.
    """
    reader = PairReader(fabric, source, index, options)
    tables: list[Table] = []
    for batch in reader:
        with fabric.autocast():
            tables.append(table_of(batch, turns_of(batch, options)))
        on_pairs(before + min(sum(map(len, tables)) * fabric.world_size, len(index)))
    return gather_rows(fabric, tables), reader.first_failure


def turns_of(batch: Batch, options: ReadOptions) -> NDArray[np.int64] | None:
    """Draw the columns (B,) by which panoramas are turned; None if their headings are known.

    A pair's turn depends on its index and the seed alone.
    """
    width, prior = batch["ground"].shape[3], options.heading_prior_deg
    if prior == 0:
        return None
    generators = (np.random.default_rng([options.seed, int(index)]) for index in batch["index"])
    return np.concatenate([random_turns(rng, 1, width, prior) for rng in generators])


def gather_rows(fabric: Fabric, tables: list[Table]) -> Table | None:
    """Join the tables of all processes, ordered by pair; None if there is none."""
    everyone = [tables]
    if fabric.world_size > 1:
        everyone = [[] for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(everyone, tables)
    parts = [part for process in everyone for part in process]
    if not parts:
        return None
    table = type(parts[0]).joined(parts)
    return table.rows(np.argsort(table.index))


def prepare_model(fabric: Fabric, model: CrossViewModel) -> CrossViewModel:
    """Move a model to the device, in evaluation mode and the memory layout fastest for inference."""
    # Weights that are moved in inference mode cannot be trained afterwards.
    with torch.inference_mode(False):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fabric.to_device(model.eval())
    return model


@torch.inference_mode()
def encode_tiles(model: CrossViewModel, aerial: Tensor) -> Any:
    """Encode tiles (B, 3, S, S); equal tiles in a row are encoded once."""
    other = torch.ones(len(aerial), dtype=torch.bool, device=aerial.device)
    other[1:] = (aerial[1:] != aerial[:-1]).flatten(1).any(1)
    features = model.precompute(model.encode_aerial(aerial[other]))
    return model.select(features, other.cumsum(0) - 1)


@torch.inference_mode()
def match_batch(
    model: CrossViewModel,
    batch: Batch,
    heading_prior_deg: float | None,
    features: Any = None,
    turns: NDArray[np.int64] | None = None,
) -> tuple[HeatMaps, Tensor]:
    """Return the heat maps of whole tiles, and the headings (B,), radians, by which panoramas were turned.

    The arguments are those of :func:`label_batch`.
    """
    if features is None:
        features = encode_tiles(model, batch["aerial"])
    ground = batch["ground"]
    shown = {"ground": ground, "heading": torch.zeros(len(ground), device=ground.device)}
    if turns is not None:
        shown = turn_panoramas(shown, turns)
    extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
    prior = model.spec.matching_prior(heading_prior_deg)
    return model.match(shown["ground"], features, prior, **extra), shown["heading"]


@torch.inference_mode()
def label_batch(
    model: CrossViewModel,
    batch: Batch,
    heading_prior_deg: float | None,
    features: Any = None,
    turns: NDArray[np.int64] | None = None,
) -> tuple[PseudoLabels, HeatMaps]:
    """Return a model's labels of a batch, and the heat maps they come from.

    ``features`` are the encoded tiles, if known already, ``turns`` the columns (B,) by which panoramas are
    turned first (:func:`turn_panoramas`); labels have the headings of the unturned ones.
    """
    whole, turned = match_batch(model, batch, heading_prior_deg, features, turns)
    maps = whole.within(batch["fix"], search_radius(batch))
    stray = (whole.peak() - batch["fix"]).norm(dim=1) * batch["meters_per_pixel"] / batch["fix_std"]
    heading = _heading_at(model, batch, maps, turned, *maps.peak_cells())
    share = maps.logits.float().flatten(1).softmax(1)
    columns = {
        "index": batch["index"],
        "position": maps.peak().float(),
        "heading": heading,
        "fix": batch["fix"],
        "fix_std": batch["fix_std"],
        "meters_per_pixel": batch["meters_per_pixel"],
        "stray_sigmas": stray,
        "entropy": torch.special.entr(share).sum(1),
        "turn": batch.get("turn", torch.zeros_like(stray)),
        "peak_mass": (share * _near_peak(maps, batch["meters_per_pixel"])).sum(1),
    }
    return PseudoLabels(**{name: value.cpu().numpy() for name, value in columns.items()}), maps


def _heading_at(
    model: CrossViewModel, batch: Batch, maps: HeatMaps, turned: Tensor, row: Tensor, col: Tensor
) -> Tensor:
    """Headings (B,) at cells of the finest map: nominal where known, else those of the best bins."""
    best = model.winning_heading(maps, -1, row, col) - turned
    return torch.where(batch["heading_known"], model.spec.nominal_heading, best)


def _near_peak(maps: HeatMaps, meters_per_pixel: Tensor) -> Tensor:
    """Mask (B, cells) of the cells near the maximum."""
    row, col = (x[:, None, None] for x in maps.peak_cells())
    axis = torch.arange(maps.logits.shape[2], device=maps.logits.device)
    distance = ((axis[:, None] - row) ** 2 + (axis[None, :] - col) ** 2).float().sqrt()
    return (distance * maps.grid.scale * meters_per_pixel[:, None, None] <= _PEAK_RADIUS_M).flatten(1)


def label_pairs(
    fabric: Fabric,
    model: CrossViewModel,
    source: PairSource,
    path: Path,
    options: ReadOptions,
    on_pairs: Callable[[int], object] = lambda done: None,
) -> PseudoLabels:
    """Label all usable pairs of a source with a model, and keep the labels in ``path`` (NPZ).

    An interrupted call resumes block by block; pairs that could not be used are tried again. The caller
    chooses another ``path`` for another model, source or options. ``on_pairs`` receives the number of pairs
    done. Processes share the work; each returns all labels. Raises AdaptationError if no pair can be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = prepare_model(fabric, model)
    files = [path, *sorted(path.parent.glob(f"{path.stem}.from-*.npz"))] if fabric.is_global_zero else []
    found = [PseudoLabels.load(file) for file in files]
    # From the first process: the others may not see its disk.
    blocks: list[PseudoLabels] = fabric.broadcast([block for block in found if block is not None])
    done = PseudoLabels.joined(blocks).index if blocks else np.zeros(0, np.int64)
    to_do = np.setdiff1d(np.arange(len(source)), done)
    first_failure = ""

    def table_of(batch: Batch, turns: NDArray[np.int64] | None) -> PseudoLabels:
        return label_batch(model, batch, options.heading_prior_deg, turns=turns)[0]

    for start in range(0, len(to_do), _BLOCK):
        index = to_do[start : start + _BLOCK]
        block, failure = tabulate(fabric, source, index, options, table_of, on_pairs, len(done) + start)
        first_failure = first_failure or failure
        if block is not None:
            if fabric.is_global_zero:
                block.save(path.with_name(f"{path.stem}.from-{index[0]}.npz"))
            blocks.append(block)
    on_pairs(len(source))
    if not blocks:
        raise AdaptationError(f"none of {len(source)} pairs can be used: {first_failure or 'there is none'}")
    labels = PseudoLabels.joined(blocks)
    labels = labels.rows(np.unique(labels.index, return_index=True)[1])
    if fabric.is_global_zero and (len(to_do) or not path.exists()):
        labels.save(path)
        for part in path.parent.glob(f"{path.stem}.from-*.npz"):
            part.unlink()
    return labels


@dataclass(frozen=True, eq=False)
class _Headings(PairTable):
    heading: NDArray[np.float32]


@torch.inference_mode()
def with_model_headings(
    fabric: Fabric, model: CrossViewModel, source: PairSource, labels: PseudoLabels, options: ReadOptions
) -> PseudoLabels:
    """Replace unknown headings by the model's at the labels' positions; unusable pairs are left out."""
    model = prepare_model(fabric, model)

    def table_of(batch: Batch, turns: NDArray[np.int64] | None) -> _Headings:
        maps, turned = match_batch(model, batch, options.heading_prior_deg, turns=turns)
        index = batch["index"].cpu().numpy()
        position = torch.from_numpy(labels.of(index).position).to(turned.device)
        cells = (position - position.new_tensor(maps.grid.origin)) / maps.grid.scale
        row, col = cells.round().long().clamp(0, maps.logits.shape[1] - 1).T
        heading = _heading_at(model, batch, maps, turned, row, col)
        return _Headings(index, heading.float().cpu().numpy())

    found, _ = tabulate(fabric, source, labels.index, options, table_of)
    if found is None:
        return labels.rows(np.zeros(0, np.int64))
    return replace(labels.of(found.index), heading=found.heading)
