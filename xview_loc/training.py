"""Supervised training of a cross-view model on a dataset with true poses, with the authors' losses."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from xview_loc.datasets.base import PoseDataset
from xview_loc.errors import UserError
from xview_loc.files import write_whole
from xview_loc.losses import HeatMapLoss
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import save_checkpoint

Batch = dict[str, Tensor]
Heading = Literal["known", "unknown", "both"]
STATE_FILE = "last.pt"
BEST_FILE = "best.safetensors"
HISTORY_FILE = "history.json"


class TrainingError(UserError):
    """Training cannot start or go on; the message is one clear line."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the defaults are those of CCVPE's authors.

    ``heading``: the panoramas' heading is ``"known"`` to the model (to the dataset's error), ``"unknown"``
    (panoramas turned at random), or either by turns of one batch (``"both"``). ``schedule``: the
    learning rate stays ``"constant"`` or falls to zero along a ``"cosine"`` after ``warmup`` steps.
    ``precision``, ``accelerator`` and ``devices`` are Lightning Fabric's. ``save_every``: steps between
    saved states within an epoch.
    """

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    heading: Heading = "known"
    seed: int = 0
    workers: int = 0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    save_every: int = 200


@dataclass
class Standing:
    """Where a run stands; ``history`` has one entry per finished epoch."""

    epoch: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 0
    loss: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)
    best_error_m: float = math.inf


class _EpochBatches(Sampler[list[int]]):
    """Batches of one epoch for one process; its order is a function of (seed, epoch) alone."""

    def __init__(
        self, size: int, batch: int, seed: int, epoch: int, skip: int, rank: int, world: int
    ) -> None:
        order = np.random.default_rng([seed, epoch]).permutation(size)
        whole = size // (batch * world)
        self._batches = order[: whole * batch * world].reshape(whole, world, batch)[skip:, rank].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _Step(nn.Module):
    """Model and loss in one forward pass, which is what data-parallel training wraps."""

    def __init__(self, model: CrossViewModel, loss: HeatMapLoss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch, heading_prior_deg: float | None) -> Tensor:
        extra = {name: batch[name] for name in self.model.extra_inputs}
        maps = self.model.match(
            batch["ground"],
            self.model.encode_aerial(batch["aerial"]),
            heading_prior_deg,
            orientation=self._loss.orientation and heading_prior_deg != 0,
            **extra,
        )
        return self._loss(self.model, maps, batch, heading_prior_deg)


def turn_panoramas(batch: Batch, rng: np.random.Generator) -> Batch:
    """The batch with each panorama turned by a random whole number of columns, and its heading with it."""
    width = batch["ground"].shape[3]
    columns = rng.integers(0, width, len(batch["ground"]))
    ground = torch.stack([g.roll(int(c), 2) for g, c in zip(batch["ground"], columns, strict=True)])
    turned = torch.as_tensor(columns, dtype=torch.float32, device=ground.device) * (2 * math.pi / width)
    return {**batch, "ground": ground, "heading": batch["heading"] + turned}


@torch.inference_mode()
def validate(model: CrossViewModel, batches: Iterable[Batch], heading: Heading) -> dict[str, float]:
    """Mean and median distance in metres of the heat map's maximum from the true place, on whole tiles.

    Keys: ``known_mean_m``, ``known_median_m`` and the same with ``unknown`` (panoramas turned at random,
    the same way every time), as far as ``heading`` asks for them.
    """
    was_training = model.training
    model.eval()
    errors: dict[str, list[Tensor]] = {h: [] for h in ("known", "unknown") if heading in (h, "both")}
    rng = np.random.default_rng(0)
    for batch in batches:
        features = model.encode_aerial(batch["aerial"])
        extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
        for name in errors:
            one = turn_panoramas(batch, rng) if name == "unknown" else batch
            maps = model.match(one["ground"], features, None if name == "unknown" else 0.0, **extra)
            width = maps.logits.shape[2]
            peak = maps.logits.flatten(1).argmax(1)
            place = torch.stack([peak // width, peak % width], 1) * maps.grid.scale
            origin = torch.tensor(maps.grid.origin, device=place.device)
            distance = (place + origin - batch["position"]).norm(dim=1) * model.spec.gsd
            errors[name].append(distance.cpu())
    model.train(was_training)
    result = {}
    for name, parts in errors.items():
        distance = torch.cat(parts).double()
        result[f"{name}_mean_m"] = float(distance.mean())
        result[f"{name}_median_m"] = float(distance.median())
    return result


def train(
    model: CrossViewModel,
    data: PoseDataset,
    validation: PoseDataset,
    folder: Path,
    loss: HeatMapLoss,
    options: TrainingOptions,
    *,
    metadata: Mapping[str, Any] | None = None,
    on_step: Callable[[Standing], object] = lambda standing: None,
) -> Standing:
    """Train ``model`` in place, or go on where an earlier call with the same arguments was cut off.

    ``folder`` gets ``last.pt`` (the state to go on from), ``history.json`` (loss and validation errors per
    epoch) and ``best.safetensors`` (the weights with the least mean validation error, with ``metadata``,
    options, data and errors). Each file is complete at any instant. On the CPU, a run that was killed and
    started again ends with the numbers of one that was not. ``on_step`` is called after every step
    and every epoch.
    Raises TrainingError where the folder holds a run with other options, the data is less than one batch,
    or the loss is not finite.
    """
    parallel = options.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,  # type: ignore[arg-type]
        strategy=DDPStrategy(find_unused_parameters=True) if parallel else "auto",
    )
    fabric.launch()
    torch.manual_seed(options.seed)
    if model.spec.camera == "pinhole" and options.heading != "known":
        raise TrainingError(f"{model.spec.name} has no panoramas to turn: train it with a known heading")
    if model.spec.bins == 0 and options.heading != "known":
        raise TrainingError(f"{model.spec.name} needs a known heading")
    per_epoch = len(data) // (options.batch_size * fabric.world_size)
    if per_epoch == 0:
        raise TrainingError(f"{len(data)} samples do not fill one batch of {options.batch_size}")
    step = _Step(model.train(), loss)
    optimizer = torch.optim.Adam(step.parameters(), lr=options.learning_rate)
    wrapped, wrapped_optimizer = fabric.setup(step, optimizer)
    run: dict[str, Any] = {"options": _comparable(options), "data": data.name, "validation": validation.name}
    run |= {"model": model.spec.name, "loss": loss.to_json(), "processes": fabric.world_size}
    run |= {"samples": len(data), "start": _digest(model)}
    standing = Standing(steps_per_epoch=per_epoch)
    totals = [0.0, 0]
    state_file = folder / STATE_FILE
    # Every process goes on from the first one's state, whether they share a disk or not.
    state = fabric.broadcast(_load_state(state_file) if fabric.is_global_zero else None)
    if state is not None:
        _check_run(folder, state["run"], run)
        standing, totals = Standing(**state["standing"]), state["totals"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
    folder.mkdir(parents=True, exist_ok=True)

    def save_state() -> None:
        if fabric.is_global_zero:
            state = {"run": run, "standing": asdict(standing), "totals": totals}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"precision": fabric.strategy.precision.state_dict()}
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_whole(state_file, buffer.getvalue())

    valid_loader: Any = fabric.setup_dataloaders(
        DataLoader(validation, options.batch_size, num_workers=options.workers),
        use_distributed_sampler=False,
    )
    while standing.epoch < options.epochs:
        data.epoch = standing.epoch
        batches = _EpochBatches(
            len(data),
            options.batch_size,
            options.seed,
            standing.epoch,
            standing.step_in_epoch,
            fabric.global_rank,
            fabric.world_size,
        )
        loader: Any = fabric.setup_dataloaders(
            DataLoader(data, batch_sampler=batches, num_workers=options.workers),
            use_distributed_sampler=False,
        )
        for batch in loader:
            count = standing.epoch * per_epoch + standing.step_in_epoch
            rng = np.random.default_rng([options.seed, count, fabric.global_rank])
            known = options.heading == "known" or (options.heading == "both" and count % 2 == 0)
            if not known:
                batch = turn_panoramas(batch, rng)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _rate(options, count, options.epochs * per_epoch)
            value = wrapped(batch, 0.0 if known else None)
            # All of them stop, or none: the others would wait for ever.
            if not bool(fabric.all_reduce(torch.isfinite(value).float(), reduce_op="mean") == 1):
                raise TrainingError(
                    f"the loss is not finite at step {count}: lower the learning rate, or train in 32-true"
                )
            fabric.backward(value)
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            totals = [totals[0] + float(value.detach()), totals[1] + 1]
            standing.step_in_epoch += 1
            standing.loss = totals[0] / totals[1]
            if standing.step_in_epoch % options.save_every == 0:
                save_state()
            on_step(standing)
        errors = validate(model, valid_loader, options.heading)
        entry = {"epoch": standing.epoch, "loss": standing.loss, **errors}
        standing.history.append(entry)
        error = float(np.mean([value for name, value in errors.items() if name.endswith("_mean_m")]))
        if error < standing.best_error_m:
            standing.best_error_m = error
            if fabric.is_global_zero:
                training = {**run, "epoch": standing.epoch, "validation_errors": errors}
                save_checkpoint(model, folder / BEST_FILE, {**(metadata or {}), "training": training})
        standing.epoch += 1
        standing.step_in_epoch = 0
        totals = [0.0, 0]
        if fabric.is_global_zero:
            write_whole(folder / HISTORY_FILE, json.dumps(standing.history, indent=1).encode())
        # Last: a run that is cut off before it validates once more, and writes the same files.
        save_state()
        on_step(standing)
    return standing


def _digest(model: CrossViewModel) -> str:
    """Names the weights that a run starts from."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _comparable(options: TrainingOptions) -> dict[str, Any]:
    """What of the options decides the numbers."""
    values = asdict(options)
    for name in ("workers", "accelerator", "devices", "save_every"):
        del values[name]
    return values


def _load_state(path: Path) -> dict[str, Any] | None:
    """The state to go on from, None where there is none."""
    if not path.exists():
        return None
    try:
        # On the CPU: the model and Adam put each tensor where it belongs.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises anything
        raise TrainingError(f"{path} is damaged ({type(error).__name__}): delete it to start anew") from None
    return state


def _check_run(folder: Path, before: dict[str, Any], run: dict[str, Any]) -> None:
    if before != run:
        differing = sorted(key for key in run if before.get(key) != run[key])
        raise TrainingError(
            f"{folder} holds a run with other settings ({', '.join(differing)}); use another folder"
        )


def _rate(options: TrainingOptions, count: int, total: int) -> float:
    """Factor on the learning rate at step ``count`` of ``total``."""
    warm = min(1.0, (count + 1) / options.warmup) if options.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * count / total)) if options.schedule == "cosine" else 1.0
    return warm * fall
