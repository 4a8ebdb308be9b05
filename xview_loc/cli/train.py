"""``xview-loc train``: supervised training on a dataset with true poses."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xview_loc import __version__
from xview_loc.cli.console import UsageError, console

if TYPE_CHECKING:
    from xview_loc.training.trainer import TrainingProgress


class Heading(str, Enum):
    """Knowledge of the panoramas' heading."""

    known = "known"
    unknown = "unknown"
    both = "both"


class Schedule(str, Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"


def train(
    data: Annotated[str, typer.Option(help="Training data, such as simulated:STYLE:CITIES:FRAMES.")],
    validation: Annotated[str, typer.Option(help="Validation data, to pick the best checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run is resumed.")],
    model: Annotated[str, typer.Option(help="Name of the model.")] = "ccvpe-small",
    start: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="ImageNet weights to start from: EfficientNet-B0 for CCVPE, VGG-16 for GGCVT."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step and process.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate of Adam.")] = 1e-4,
    schedule: Annotated[Schedule, typer.Option(help="Schedule of the learning rate.")] = Schedule.constant,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the full learning rate.")] = 0,
    heading: Annotated[Heading, typer.Option(help="Is the panoramas' heading known?")] = Heading.known,
    sigma: Annotated[
        float, typer.Option(min=0.1, help="Standard deviation of CCVPE's label, tile pixels.")
    ] = 4.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initial weights and sample order.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 200,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder of rendered cities.")] = None,
) -> None:
    """Train a model; to resume an interrupted run, repeat the command."""
    import torch

    from xview_loc.datasets import SimulatedDataset, open_dataset
    from xview_loc.models import create_model
    from xview_loc.models.checkpoint import load_checkpoint
    from xview_loc.models.pretrained import load_pretrained
    from xview_loc.training import trainer as training
    from xview_loc.training.losses import CCVPELoss, loss_for

    if start and init:
        raise UsageError("--init is for new models: leave it out with --start")
    # Only the first of several processes renders and prints.
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    torch.manual_seed(seed)
    try:
        started = load_checkpoint(start, model) if start else None
        net = started.model if started else create_model(model)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if started and started.note and first:
        console.print(f"{start}: {started.note}", soft_wrap=True)
    if init:
        unused = load_pretrained(net, init)
        if first:
            console.print(f"{init}: unused weights: {', '.join(unused) or 'none'}", soft_wrap=True)
    loss = loss_for(net)
    if isinstance(loss, CCVPELoss):
        loss = replace(loss, sigma=sigma)
    sets = [
        open_dataset(text, net.spec, half_extent_m=net.half_extent_m, cache_dir=cache_dir, augment=augment)
        for text, augment in ((data, True), (validation, False))
    ]
    priors = {"known": (0.0,), "unknown": (None,), "both": (0.0, None)}[heading.value]
    options = training.TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule.value,
        warmup=warmup,
        heading_priors_deg=priors,
        seed=seed,
        workers=workers,
        save_every=save_every,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console, disable=not (first and console.is_terminal)) as bars:
        for dataset in sets:
            if isinstance(dataset, SimulatedDataset) and first:
                bar = bars.add_task(f"rendering {dataset.name}", total=dataset.cities, facts="")
                dataset.prepare(partial(bars.advance, bar))
        bar = bars.add_task("training", total=None, facts="")
        printed = 0

        def show(progress: TrainingProgress) -> None:
            nonlocal printed
            if not first:
                return
            total = options.epochs * progress.steps_per_epoch
            best = f", best validation {progress.best_score:.2f} m" if progress.history else ""
            bars.update(bar, completed=progress.steps, total=total, facts=f"loss {progress.loss:.4g}{best}")
            if not console.is_terminal and progress.step_in_epoch % save_every == 0:
                print(f"step {progress.steps} of {total}: loss {progress.loss:.4g}", flush=True)
            for entry in progress.history[printed:]:
                bars.console.print(_line(entry), soft_wrap=True)
            printed = len(progress.history)

        progress = training.train(
            training.make_fabric(accelerator, devices, precision),
            net,
            sets[0],
            training.PoseValidation(sets[1], priors, batch_size, workers),
            out,
            loss,
            options,
            metadata={"version": __version__, "command": shlex.join(["xview-loc", *sys.argv[1:]])},
            on_step=show,
        )
    if first:
        best = f"{progress.best_score:.2f} m mean validation error"
        console.print(f"{out / training.BEST_FILE}: {best}", soft_wrap=True)


def _line(entry: dict[str, float]) -> str:
    errors = ", ".join(
        f"{name.removesuffix('_m').replace('_', ' heading ')} {value:.2f} m"
        for name, value in entry.items()
        if name.endswith("_m")
    )
    return f"epoch {entry['epoch']:.0f}: loss {entry['loss']:.4g}; {errors}"
