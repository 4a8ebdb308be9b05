"""Pseudo ground truth: where a model's heat maps have their maximum (ECCV 2024, Section 3.2)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from xview_loc.datasets.base import Batch, PairSample, PairSource, PoseDataset, Sample
from xview_loc.errors import UserError
from xview_loc.files import write_whole
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.training.losses import search_radius
from xview_loc.training.turned_panoramas import random_turns, turn_panoramas

# Pairs whose labels are written at once: what a run that is cut off has to do again.
_BLOCK = 1024
# About the maximum: the probability within it says how sure the model is.
_PEAK_RADIUS_M = 2.0


Table = TypeVar("Table", bound="PairTable")


class AdaptationError(UserError):
    """Adaptation cannot start or go on; the message is one clear line."""


@dataclass(frozen=True, eq=False)
class PairTable:
    """What is known of pairs: arrays with one row for each of ``index`` (N,), int64, ascending."""

    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, chosen: NDArray[Any]) -> Self:
        """Those that a mask or positions choose."""
        return type(self)(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def of(self, index: NDArray[np.int64]) -> Self:
        """Those of the given pairs, as far as they have any."""
        return self.rows(np.isin(self.index, index))

    def save(self, path: Path) -> None:
        """Write as NPZ, complete or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **{f.name: getattr(self, f.name) for f in fields(self)})
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Inverse of :meth:`save`; None where there is no such file, or none of this kind that is whole."""
        try:
            with np.load(path) as content:
                return cls(*(content[f.name] for f in fields(cls)))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All rows of several, in their order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@dataclass(frozen=True, eq=False)
class PseudoLabels(PairTable):
    """What a model makes of pairs.

    Heat maps are those within three standard deviations of the coarse fix, where these are known.

    position: (N, 2), (row, col) of the heat map's maximum in tile pixels. heading: (N,), of the stored
    image's centre column, radians: the nominal one where the pair's heading is known, else that of the bin
    that wins at the maximum. fix: (N, 2), the coarse fix in tile pixels; fix_std: (N,), m.
    meters_per_pixel: (N,), of the tile. stray_sigmas: (N,), distance from the fix, in its standard
    deviations, of the maximum on the whole map. entropy: (N,), of the finest map, nats. peak_mass: (N,), the
    probability within two metres of the maximum. All but the index are float32.
    """

    position: NDArray[np.float32]
    heading: NDArray[np.float32]
    fix: NDArray[np.float32]
    fix_std: NDArray[np.float32]
    meters_per_pixel: NDArray[np.float32]
    stray_sigmas: NDArray[np.float32]
    entropy: NDArray[np.float32]
    peak_mass: NDArray[np.float32]

    @property
    def from_fix(self) -> NDArray[np.float64]:
        """Metres (N, 2) east and north from the coarse fix to the maximum, on a north-up tile."""
        down, right = (self.position - self.fix).astype(np.float64).T * self.meters_per_pixel
        return np.stack([right, -down], 1)

    def errors_m(self, true_from_fix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Metres (N,) from the true places, given as metres (M, 2) from the coarse fixes of all pairs."""
        return np.asarray(np.linalg.norm(self.from_fix - true_from_fix[self.index], axis=1), np.float64)


def distance_m(a: PseudoLabels, b: PseudoLabels) -> NDArray[np.float64]:
    """Metres (N,) between two models' maxima of the same pairs."""
    pixels = np.linalg.norm(a.position.astype(np.float64) - b.position, axis=1)
    return np.asarray(pixels * a.meters_per_pixel, np.float64)


def reliable(teacher: PseudoLabels, auxiliary: PseudoLabels, keep: float) -> NDArray[np.bool_]:
    """Which labels to keep (N,): those on which teacher and auxiliary student agree (Section 3.2).

    Their distance is at most the distances' ``keep`` quantile. (The published code wants less than that; but
    maxima are whole pixels, and where most models agree to the pixel that would leave none.)
    """
    distances = distance_m(teacher, auxiliary)
    return np.asarray(distances <= np.quantile(distances, keep), bool)


class LabelledPairs(PoseDataset):
    """Pairs with pseudo ground truth in the place of the truth; one item for each row of ``labels``."""

    def __init__(self, source: PairSource, labels: PseudoLabels, name: str) -> None:
        """``name`` says which labels they are."""
        self.name = f"{source.name} {name}"
        self._source, self._labels = source, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> Sample:
        sample = self._source[int(self._labels.index[row])]
        return {
            **sample,
            "position": torch.from_numpy(self._labels.position[row]),
            "heading": torch.tensor(self._labels.heading[row]),
        }


class _Readable(Dataset[PairSample | UserError]):
    """Some of a source's pairs; what cannot be used of them comes as its error."""

    def __init__(self, source: PairSource, index: NDArray[np.int64], needs_heading: bool) -> None:
        self._source, self._index, self._needs_heading = source, index, needs_heading

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> PairSample | UserError:
        index = int(self._index[row])
        try:
            sample = self._source[index]
        except UserError as error:
            return error
        if self._needs_heading and not sample["heading_known"]:
            return AdaptationError(f"pair {index} has no heading: adapt with an unknown heading")
        return sample


class PairReader:
    """Batches of pairs in their order, without those that cannot be used; ``failures`` counts these."""

    def __init__(
        self,
        source: PairSource,
        index: NDArray[np.int64],
        heading_prior_deg: float | None,
        batch_size: int,
        workers: int,
    ) -> None:
        self.failures = 0
        self.first_failure = ""
        readable = _Readable(source, index, heading_prior_deg is not None)
        self._loader = DataLoader(readable, batch_size, num_workers=workers, collate_fn=list)

    def __iter__(self) -> Iterator[Batch]:
        for items in self._loader:
            errors = [item for item in items if isinstance(item, UserError)]
            if errors and not self.failures:
                self.first_failure = str(errors[0])
            self.failures += len(errors)
            good = [item for item in items if not isinstance(item, UserError)]
            if good:
                yield default_collate(good)


def ready(fabric: Fabric, model: CrossViewModel) -> CrossViewModel:
    """``model`` on the device, in evaluation mode, and with the layout in which inference is fastest."""
    # Weights that are moved in inference mode cannot be trained afterwards.
    with torch.inference_mode(False):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fabric.to_device(model.eval())
    return model


@torch.inference_mode()
def encode_tiles(model: CrossViewModel, aerial: Tensor) -> Any:
    """A model's features of tiles (B, 3, S, S); tiles in a row that are the same are encoded once."""
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
    """Heat maps of the whole tiles, and the headings (B,), radians, by which the panoramas were turned.

    See :func:`label_batch`.
    """
    if features is None:
        features = encode_tiles(model, batch["aerial"])
    ground = batch["ground"]
    shown = {"ground": ground, "heading": torch.zeros(len(ground), device=ground.device)}
    if turns is not None:
        shown = turn_panoramas(shown, turns)
    extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
    return model.match(shown["ground"], features, heading_prior_deg, **extra), shown["heading"]


@torch.inference_mode()
def label_batch(
    model: CrossViewModel,
    batch: Batch,
    heading_prior_deg: float | None,
    features: Any = None,
    turns: NDArray[np.int64] | None = None,
) -> tuple[PseudoLabels, HeatMaps]:
    """A model's labels of a batch, and the heat maps they come from.

    ``features``: the encoded tiles where they are at hand. ``turns``: columns (B,) by which panoramas are
    turned before (see :func:`xview_loc.training.turn_panoramas`); the labels' headings are those before.
    """
    free, turned = match_batch(model, batch, heading_prior_deg, features, turns)
    maps = free.within(batch["fix"], search_radius(batch))
    stray = (free.peak() - batch["fix"]).norm(dim=1) * batch["meters_per_pixel"] / batch["fix_std"]
    won = model.winning_heading(maps, -1, *maps.peak_cells()) - turned
    heading = torch.where(batch["heading_known"], model.spec.nominal_heading, won)
    return _labels(batch, maps, heading, stray), maps


def _labels(batch: Batch, maps: HeatMaps, heading: Tensor, stray: Tensor) -> PseudoLabels:
    share = maps.logits.float().flatten(1).softmax(1)
    place = maps.peak()
    # Probability within the radius of the maximum.
    side = maps.logits.shape[2]
    row, col = (x[:, None, None] for x in maps.peak_cells())
    axis = torch.arange(side, device=place.device)
    distance = ((axis[:, None] - row) ** 2 + (axis[None, :] - col) ** 2).float().sqrt()
    near = distance * maps.grid.scale * batch["meters_per_pixel"][:, None, None] <= _PEAK_RADIUS_M
    columns = {
        "index": batch["index"],
        "position": place.float(),
        "heading": heading,
        "fix": batch["fix"],
        "fix_std": batch["fix_std"],
        "meters_per_pixel": batch["meters_per_pixel"],
        "stray_sigmas": stray,
        "entropy": torch.special.entr(share).sum(1),
        "peak_mass": (share * near.flatten(1)).sum(1),
    }
    return PseudoLabels(**{name: value.cpu().numpy() for name, value in columns.items()})


def label_pairs(
    fabric: Fabric,
    model: CrossViewModel,
    source: PairSource,
    path: Path,
    *,
    heading_prior_deg: float | None = 0.0,
    batch_size: int = 16,
    workers: int = 0,
    seed: int = 0,
    on_pairs: Callable[[int], object] = lambda done: None,
) -> PseudoLabels:
    """A model's labels of all pairs that can be used, kept in ``path`` (NPZ).

    What is there already is not done again, block by block; pairs that could not be used are tried again. The
    caller chooses another ``path`` for another model or source. Panoramas whose heading the model is not to
    know are turned at random, each pair the same way every time for one ``seed``. ``on_pairs`` is told how
    many pairs are done. Several processes share the work; each returns all labels.
    Raises AdaptationError where no pair can be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = ready(fabric, model)
    files = [path, *sorted(path.parent.glob(f"{path.stem}.from-*.npz"))] if fabric.is_global_zero else []
    found = [PseudoLabels.load(file) for file in files]
    # The first process's, whether the others see its disk or not.
    blocks: list[PseudoLabels] = fabric.broadcast([block for block in found if block is not None])
    done = PseudoLabels.joined(blocks).index if blocks else np.zeros(0, np.int64)
    to_do = np.setdiff1d(np.arange(len(source)), done)
    first_failure = ""
    for start in range(0, len(to_do), _BLOCK):
        block_index = to_do[start : start + _BLOCK]
        share = block_index[fabric.global_rank :: fabric.world_size]
        reader = PairReader(source, share, heading_prior_deg, batch_size, workers)
        rows = []
        for batch in reader:
            batch = fabric.to_device(batch)
            turns = turns_of(batch, heading_prior_deg, seed)
            with fabric.autocast():
                rows.append(label_batch(model, batch, heading_prior_deg, turns=turns)[0])
            seen = len(done) + start + sum(map(len, rows)) * fabric.world_size
            on_pairs(min(seen, len(source)))
        first_failure = first_failure or reader.first_failure
        block = gathered(fabric, rows)
        if block is not None:
            if fabric.is_global_zero:
                block.save(path.with_name(f"{path.stem}.from-{block_index[0]}.npz"))
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
def with_headings_at(
    fabric: Fabric,
    model: CrossViewModel,
    source: PairSource,
    labels: PseudoLabels,
    *,
    heading_prior_deg: float | None,
    batch_size: int = 16,
    workers: int = 0,
    seed: int = 0,
) -> PseudoLabels:
    """Labels with the headings that win at their positions, where they are not known.

    See :func:`label_pairs`; without those that cannot be read any more.
    """
    model = fabric.to_device(model.eval())  # type: ignore[assignment]
    share = labels.index[fabric.global_rank :: fabric.world_size]
    rows = []
    for batch in PairReader(source, share, heading_prior_deg, batch_size, workers):
        batch = fabric.to_device(batch)
        with fabric.autocast():
            turns = turns_of(batch, heading_prior_deg, seed)
            maps, turned = match_batch(model, batch, heading_prior_deg, turns=turns)
        index = batch["index"].cpu().numpy()
        place = torch.from_numpy(labels.of(index).position).to(turned.device)
        cells = (place - place.new_tensor(maps.grid.origin)) / maps.grid.scale
        row, col = cells.round().long().clamp(0, maps.logits.shape[1] - 1).T
        won = model.winning_heading(maps, -1, row, col) - turned
        heading = torch.where(batch["heading_known"], model.spec.nominal_heading, won)
        rows.append(_Headings(index, heading.float().cpu().numpy()))
    found = gathered(fabric, rows)
    if found is None:
        return labels.rows(np.zeros(0, np.int64))
    return replace(labels.of(found.index), heading=found.heading)


def turns_of(batch: Batch, heading_prior_deg: float | None, seed: int) -> NDArray[np.int64] | None:
    """Columns (B,) by which panoramas whose heading the model is not to know are turned; None: not at all."""
    if heading_prior_deg == 0:
        return None
    width = batch["ground"].shape[3]
    draws = [
        random_turns(np.random.default_rng([seed, int(index)]), 1, width, heading_prior_deg)
        for index in batch["index"]
    ]
    return np.concatenate(draws)


def gathered(fabric: Fabric, rows: list[Table]) -> Table | None:
    """The rows of all processes in the order of their pairs, None where there is none."""
    everyone = [rows]
    if fabric.world_size > 1:
        everyone = [[] for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(everyone, rows)
    parts = [part for process in everyone for part in process]
    if not parts:
        return None
    table = type(parts[0]).joined(parts)
    return table.rows(np.argsort(table.index))
