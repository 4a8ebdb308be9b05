"""Resumable training of a cross-view model on a dataset with poses."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from xview_loc.datasets.base import Batch, PoseDataset, load_batches
from xview_loc.errors import UserError, reason
from xview_loc.files import read_hashed, write_hashed, write_whole
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import save_checkpoint, weights_digest
from xview_loc.models.specs import ModelSpec
from xview_loc.training.hidden_sectors import hide_sectors
from xview_loc.training.losses import HeatMapLoss
from xview_loc.training.turned_panoramas import turn_at_random

STATE_FILE = "last.pt"
BEST_FILE = "best.safetensors"
HISTORY_FILE = "history.json"


class TrainingError(UserError):
    """Training that cannot start or go on; the message is one clear line."""


@dataclass(frozen=True)
class TrainingOptions:
    """Hyper-parameters; the defaults are those of CCVPE's authors.

    The learning rate rises over ``warmup`` steps, and falls to zero along a ``"cosine"`` with that
    ``schedule``. ``heading_priors_deg`` are the batches' heading priors, in turn: panoramas are turned at
    random within it, and :meth:`CrossViewModel.match` gets it (0: heading known up to the dataset's error;
    None: unknown). Of each panorama only a random sector of ``field_of_view_deg`` (least, most) is shown
    (None: all of it). ``fixed_batch_norm`` keeps the batch normalisation's initial statistics instead of the
    batches'. ``workers`` are processes that load data, ``save_every`` steps between saved states.
    """

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    heading_priors_deg: tuple[float | None, ...] = (0.0,)
    field_of_view_deg: tuple[float, float] | None = None
    fixed_batch_norm: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int = 200


class Validation(Protocol):
    """Evaluates a model after every epoch, in every process; ``name`` is that of the validation data."""

    name: str

    def __call__(self, model: CrossViewModel, epoch: int) -> dict[str, float]:
        """Return figures of ``model`` (in evaluation mode); the least ``score`` picks the best epoch."""
        ...


@dataclass
class TrainingProgress:
    """Progress of a run: ``loss`` is the epoch's mean so far, ``history`` each finished epoch's figures."""

    epoch: int = 0
    step_in_epoch: int = 0
    steps_per_epoch: int = 0
    loss: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float = math.inf

    @property
    def steps(self) -> int:
        """Number of finished steps in all epochs."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch


class _Step(nn.Module):
    """Model and loss in one forward pass, as data-parallel training needs it."""

    def __init__(self, model: CrossViewModel, loss: HeatMapLoss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch, heading_prior_deg: float | None) -> Tensor:
        return self._loss(self.model, batch, heading_prior_deg)


class PoseValidation:
    """Measures the distance of the heat map's maximum from the true position, on whole tiles.

    Figures are ``known_mean_m`` and ``known_median_m`` for a heading prior of 0, ``unknown_...`` for None and
    ``within 30 deg_...`` for 30. Panoramas are turned at random within the prior, alike in every epoch.
    ``score`` is the mean of the means.
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
        """See :class:`Validation`; figures in metres."""
        device = next(model.parameters()).device
        distances: dict[str, list[Tensor]] = {_heading_name(prior): [] for prior in self._priors}
        rng = np.random.default_rng(0)
        for batch in load_batches(self._loader):
            batch = {name: value.to(device) for name, value in batch.items()}
            features = model.encode_aerial(batch["aerial"])
            extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
            for prior in self._priors:
                turned = turn_at_random(batch, rng, prior)
                matching = model.spec.matching_prior(prior)
                found = model.match(turned["ground"], features, matching, **extra).peak()
                distance = (found - batch["position"]).norm(dim=1) * batch["meters_per_pixel"]
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
    """Launch Lightning Fabric with ``devices`` processes on this machine, or with those of torchrun.

    Returns in every process. Raises TrainingError if the accelerator or precision is not available.
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
    on_step: Callable[[TrainingProgress], object] = lambda progress: None,
) -> TrainingProgress:
    """Train ``model`` in place, or resume an interrupted call with the same arguments.

    Writes to ``folder``: ``last.pt`` (state to resume from), ``history.json`` (loss and validation figures of
    each epoch) and ``best.safetensors`` (the weights with the least validation score, with ``metadata``,
    options, data and figures), each replaced atomically. On the CPU, a resumed run ends with the same numbers
    as an uninterrupted one. ``on_step`` is called after every step and every epoch.
    Raises TrainingError if the folder holds a run with other options, the data does not fill one batch, or
    the loss is not finite.
    """
    torch.manual_seed(options.seed)
    check_heading(model.spec, options)
    per_epoch = len(data) // (options.batch_size * fabric.world_size)
    if per_epoch == 0:
        raise TrainingError(f"{len(data)} samples do not fill one batch of {options.batch_size}")
    # Fastest for convolutions on the CPU, and in half precision on a GPU.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = _Step(_training_mode(model, options), loss)
    optimizer = torch.optim.Adam(step.parameters(), lr=options.learning_rate)
    wrapped, wrapped_optimizer = fabric.setup(step, optimizer)
    run: dict[str, Any] = {"options": comparable(options), "data": data.name, "validation": validation.name}
    run |= {"model": model.spec.name, "normalisation": model.spec.normalisation}
    run |= {"loss": loss.to_json(), "processes": fabric.world_size, "samples": len(data)}
    run["start"] = weights_digest(model)
    run["precision"] = fabric.strategy.precision.precision
    progress = TrainingProgress(steps_per_epoch=per_epoch)
    totals = [0.0, 0]
    state_file = folder / STATE_FILE
    # Every process resumes from the first one's state: they may not share a disk.
    state = fabric.broadcast(_load_state(state_file) if fabric.is_global_zero else None)
    if state is not None:
        if state["run"] != run:
            differing = ", ".join(sorted(key for key in run if state["run"].get(key) != run[key]))
            raise TrainingError(f"{folder} holds a run with other settings ({differing}); use another folder")
        progress, totals = TrainingProgress(**state["progress"]), state["totals"]
        if loss.moving_teacher is not None:
            loss.moving_teacher.load_state_dict(state["teacher"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
    folder.mkdir(parents=True, exist_ok=True)

    def save_state() -> None:
        if fabric.is_global_zero:
            state = {"run": run, "progress": asdict(progress), "totals": totals}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"precision": fabric.strategy.precision.state_dict()}
            if loss.moving_teacher is not None:
                state["teacher"] = loss.moving_teacher.state_dict()
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_hashed(state_file, buffer.getvalue())

    while progress.epoch < options.epochs:
        data.epoch = progress.epoch
        # The order of an epoch's batches depends on (seed, epoch) alone.
        order = np.random.default_rng([options.seed, progress.epoch]).permutation(len(data))
        shape = (per_epoch, fabric.world_size, options.batch_size)
        batches = order[: math.prod(shape)].reshape(shape)[progress.step_in_epoch :, fabric.global_rank]
        # Pinned memory lets a GPU copy batches while it computes.
        pinned = fabric.device.type == "cuda"
        loader: Any = fabric.setup_dataloaders(
            DataLoader(data, batch_sampler=batches.tolist(), num_workers=options.workers, pin_memory=pinned),
            use_distributed_sampler=False,
        )
        for batch in load_batches(loader):
            count = progress.steps
            rng = np.random.default_rng([options.seed, count, fabric.global_rank])
            prior = options.heading_priors_deg[count % len(options.heading_priors_deg)]
            batch = turn_at_random(batch, rng, prior)
            if options.field_of_view_deg is not None:
                batch = hide_sectors(batch, rng, options.field_of_view_deg)
            # For drop-connect: a resumed run drops the same blocks.
            torch.manual_seed(int(rng.integers(1 << 62)))
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _rate(options, count, options.epochs * per_epoch)
            value = wrapped(batch, prior)
            # Reduced, so that all processes stop together: a single one would leave the others waiting.
            if not bool(fabric.all_reduce(torch.isfinite(value).float(), reduce_op="mean") == 1):
                raise TrainingError(
                    f"the loss is not finite at step {count}: lower the learning rate, or train in 32-true"
                )
            fabric.backward(value)
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            totals = [totals[0] + float(value.detach()), totals[1] + 1]
            progress.step_in_epoch += 1
            progress.loss = totals[0] / totals[1]
            if progress.step_in_epoch % options.save_every == 0:
                save_state()
            on_step(progress)
        figures = validation(model.eval(), progress.epoch)
        _training_mode(model, options)
        progress.history.append({"epoch": progress.epoch, "loss": progress.loss, **figures})
        if figures["score"] < progress.best_score:
            progress.best_score = figures["score"]
            if fabric.is_global_zero:
                training = {**run, "epoch": progress.epoch, "validation_figures": figures}
                save_checkpoint(model, folder / BEST_FILE, {**(metadata or {}), "training": training})
        loss.end_epoch(model)
        progress.epoch += 1
        progress.step_in_epoch = 0
        totals = [0.0, 0]
        if fabric.is_global_zero:
            write_whole(folder / HISTORY_FILE, json.dumps(progress.history, indent=1).encode())
        # Last: a run interrupted before this repeats the validation and writes the same files.
        save_state()
        on_step(progress)
    # From here on every process may read the files.
    fabric.barrier()
    return progress


def check_heading(spec: ModelSpec, options: TrainingOptions) -> None:
    """Raise TrainingError if a model cannot be trained with these heading priors."""
    turned = any(prior != 0 for prior in options.heading_priors_deg)
    if spec.camera == "pinhole" and turned:
        raise TrainingError(f"{spec.name} has no panoramas to turn: train it with a known heading")
    if spec.camera == "pinhole" and options.field_of_view_deg is not None:
        raise TrainingError(f"{spec.name} has no panoramas to hide sectors of")
    if spec.bins == 0 and turned:
        raise TrainingError(f"{spec.name} needs a known heading")


def _training_mode(model: CrossViewModel, options: TrainingOptions) -> CrossViewModel:
    model.train()
    if options.fixed_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return model


def comparable(options: TrainingOptions) -> dict[str, Any]:
    """Return the options that decide the resulting numbers."""
    # A list, as in a saved state.
    values = {**asdict(options), "heading_priors_deg": list(options.heading_priors_deg)}
    # Runs from before an option are without it.
    values["field_of_view_deg"] = options.field_of_view_deg and list(options.field_of_view_deg)
    unused = {"workers", "save_every", *(["field_of_view_deg"] if not options.field_of_view_deg else [])}
    return {name: value for name, value in values.items() if name not in unused}


def _load_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        # PyTorch's own checks do not notice flipped bits.
        content = io.BytesIO(read_hashed(path))
        # To the CPU: the model and Adam move each tensor to its device.
        state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises anything
        raise TrainingError(f"{path} is damaged ({type(error).__name__}): delete it to start again") from None
    return state


def _rate(options: TrainingOptions, count: int, total: int) -> float:
    """Return the factor on the learning rate at step ``count`` of ``total``."""
    warm = min(1.0, (count + 1) / options.warmup) if options.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * count / total)) if options.schedule == "cosine" else 1.0
    return warm * fall
