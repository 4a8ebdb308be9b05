"""Supervised training of a cross-view model on a dataset with true poses, with the authors' losses."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from xview_loc.datasets.base import Batch, PoseDataset, clearly
from xview_loc.errors import UserError, reason
from xview_loc.files import write_whole
from xview_loc.models.base import CrossViewModel, ModelSpec
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.training.losses import HeatMapLoss
from xview_loc.training.turned_panoramas import random_turns, turn_panoramas

STATE_FILE = "last.pt"
BEST_FILE = "best.safetensors"
HISTORY_FILE = "history.json"


class TrainingError(UserError):
    """Training cannot start or go on; the message is one clear line."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the defaults are those of CCVPE's authors.

    ``heading_priors_deg``: how far the panoramas are turned at random, and the prior the model is told (see
    :meth:`CrossViewModel.match`; 0: the heading is known to the dataset's error, None: it is unknown); where
    there are several, each has its turn of one batch. ``schedule``: the learning rate stays ``"constant"``
    or falls to zero along a ``"cosine"`` after ``warmup`` steps. ``fixed_batch_norm``: batch normalisation
    keeps the statistics it starts with, instead of those of the batches.
    ``save_every``: steps between saved states within an epoch.
    """

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    heading_priors_deg: tuple[float | None, ...] = (0.0,)
    fixed_batch_norm: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int = 200


class Validation(Protocol):
    """Judges a model after every epoch.

    ``name`` says on what. A call returns figures for the history; ``score`` of them (the smaller the better)
    picks the best epoch. Every process calls it.
    """

    name: str

    def __call__(self, model: CrossViewModel, epoch: int) -> dict[str, float]:
        """The figures of a model, which is in evaluation mode, after an epoch."""
        ...


@dataclass
class Standing:
    """Where a run stands; ``history`` has one entry per finished epoch."""

    epoch: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 0
    loss: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float = math.inf


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
        return self._loss(self.model, batch, heading_prior_deg)


class PoseValidation:
    """Distances of the heat map's maximum from the true place, on whole tiles.

    Figures: ``known_mean_m``, ``known_median_m`` and the same with ``unknown`` (panoramas turned at random,
    the same way every time) or ``within 30 deg``, one pair for each heading prior; ``score`` is the mean of
    the means.
    """

    def __init__(
        self,
        dataset: PoseDataset,
        heading_priors_deg: tuple[float | None, ...],
        batch_size: int,
        workers: int,
    ) -> None:
        self.name = dataset.name
        self._priors = heading_priors_deg
        self._loader: DataLoader[Any] = DataLoader(dataset, batch_size, num_workers=workers)

    @torch.inference_mode()
    def __call__(self, model: CrossViewModel, epoch: int) -> dict[str, float]:
        """Distances in metres."""
        device = next(model.parameters()).device
        distances: dict[str, list[Tensor]] = {_heading_name(prior): [] for prior in self._priors}
        rng = np.random.default_rng(0)
        for batch in clearly(self._loader):
            batch = {name: value.to(device) for name, value in batch.items()}
            features = model.encode_aerial(batch["aerial"])
            extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
            for prior in self._priors:
                ground = batch["ground"]
                turned = batch
                if prior != 0:
                    columns = random_turns(rng, len(ground), ground.shape[3], prior)
                    turned = turn_panoramas(batch, columns)
                place = model.match(turned["ground"], features, prior, **extra).peak()
                distance = (place - batch["position"]).norm(dim=1) * batch["meters_per_pixel"]
                distances[_heading_name(prior)].append(distance.cpu())
        figures = {}
        for name, parts in distances.items():
            distance = torch.cat(parts).double()
            figures[f"{name}_mean_m"] = float(distance.mean())
            figures[f"{name}_median_m"] = float(distance.median())
        means = [value for name, value in figures.items() if name.endswith("_mean_m")]
        return {**figures, "score": float(np.mean(means))}


def _heading_name(prior: float | None) -> str:
    return "unknown" if prior is None else f"within {prior:g} deg" if prior else "known"


def make_fabric(accelerator: str = "auto", devices: int = 1, precision: str = "32-true") -> Fabric:
    """Lightning Fabric for ``devices`` processes on this machine, or for those that torchrun started.

    Launched already: the call returns in every process. Raises TrainingError on what is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    machines = 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        machines = world // devices
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=machines,
            precision=precision,  # type: ignore[arg-type]
            # A loss on the first levels leaves the weights of the others without gradients.
            strategy=DDPStrategy(find_unused_parameters=True) if max(world, devices) > 1 else "auto",
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise TrainingError(f"accelerator {accelerator}, precision {precision}: {reason(error)}") from None
    fabric.launch()
    return fabric


def train(
    fabric: Fabric,
    model: CrossViewModel,
    data: PoseDataset,
    validation: Validation,
    folder: Path,
    loss: HeatMapLoss,
    options: TrainingOptions,
    *,
    metadata: Mapping[str, Any] | None = None,
    on_step: Callable[[Standing], object] = lambda standing: None,
) -> Standing:
    """Train ``model`` in place, or go on where an earlier call with the same arguments was cut off.

    ``folder`` gets ``last.pt`` (the state to go on from), ``history.json`` (loss and validation figures per
    epoch) and ``best.safetensors`` (the weights with the least validation score, with ``metadata``,
    options, data and figures). Each file is complete at any instant. On the CPU, a run that was killed and
    started again ends with the numbers of one that was not. ``on_step`` is called after every step
    and every epoch.
    Raises TrainingError where the folder holds a run with other options, the data is less than one batch,
    or the loss is not finite.
    """
    torch.manual_seed(options.seed)
    check_heading(model.spec, options)
    per_epoch = len(data) // (options.batch_size * fabric.world_size)
    if per_epoch == 0:
        raise TrainingError(f"{len(data)} samples do not fill one batch of {options.batch_size}")
    # Convolutions on the CPU, and in half precision on a GPU, are fastest with the channels last.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = _Step(_training_mode(model, options), loss)
    optimizer = torch.optim.Adam(step.parameters(), lr=options.learning_rate)
    wrapped, wrapped_optimizer = fabric.setup(step, optimizer)
    run: dict[str, Any] = {"options": comparable(options), "data": data.name, "validation": validation.name}
    run |= {"model": model.spec.name, "loss": loss.to_json(), "processes": fabric.world_size}
    run |= {
        "samples": len(data),
        "start": weights_digest(model),
        "precision": fabric.strategy.precision.precision,
    }
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
            DataLoader(
                data,
                batch_sampler=batches,
                num_workers=options.workers,
                # From where a GPU takes batches while it computes.
                pin_memory=fabric.device.type == "cuda",
            ),
            use_distributed_sampler=False,
        )
        for batch in clearly(loader):
            count = standing.epoch * per_epoch + standing.step_in_epoch
            rng = np.random.default_rng([options.seed, count, fabric.global_rank])
            prior = options.heading_priors_deg[count % len(options.heading_priors_deg)]
            if prior != 0:
                ground = batch["ground"]
                batch = turn_panoramas(batch, random_turns(rng, len(ground), ground.shape[3], prior))
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _rate(options, count, options.epochs * per_epoch)
            value = wrapped(batch, prior)
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
        figures = validation(model.eval(), standing.epoch)
        _training_mode(model, options)
        standing.history.append({"epoch": standing.epoch, "loss": standing.loss, **figures})
        if figures["score"] < standing.best_score:
            standing.best_score = figures["score"]
            if fabric.is_global_zero:
                training = {**run, "epoch": standing.epoch, "validation_figures": figures}
                save_checkpoint(model, folder / BEST_FILE, {**(metadata or {}), "training": training})
        standing.epoch += 1
        standing.step_in_epoch = 0
        totals = [0.0, 0]
        if fabric.is_global_zero:
            write_whole(folder / HISTORY_FILE, json.dumps(standing.history, indent=1).encode())
        # Last: a run that is cut off before it validates once more, and writes the same files.
        save_state()
        on_step(standing)
    # The others may read what the first one has written.
    fabric.barrier()
    return standing


def check_heading(spec: ModelSpec, options: TrainingOptions) -> None:
    """Raise TrainingError where a model cannot be trained with these heading priors."""
    turned = any(prior != 0 for prior in options.heading_priors_deg)
    if spec.camera == "pinhole" and turned:
        raise TrainingError(f"{spec.name} has no panoramas to turn: train it with a known heading")
    if spec.bins == 0 and turned:
        raise TrainingError(f"{spec.name} needs a known heading")


def _training_mode(model: CrossViewModel, options: TrainingOptions) -> CrossViewModel:
    model.train()
    if options.fixed_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return model


def weights_digest(model: CrossViewModel) -> str:
    """Names a model's weights: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def comparable(options: TrainingOptions) -> dict[str, Any]:
    """What of the options decides the numbers."""
    values = asdict(options)
    for name in ("workers", "save_every"):
        del values[name]
    # As the saved state gives it back.
    return {**values, "heading_priors_deg": list(options.heading_priors_deg)}


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
