"""``xview-loc bootstrap``: train a model from drives, without any surveyed position."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from xview_loc import __version__
from xview_loc.cli.console import UsageError, console
from xview_loc.cli.pair_inputs import true_positions
from xview_loc.cli.stage_progress import StageProgress


def bootstrap(
    data: Annotated[
        list[Path], typer.Argument(help="Bags of pairs from drives, with tiles that fit the model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; an unfinished run there is resumed.")],
    model: Annotated[str, typer.Option(help="Name of a CCVPE model.")] = "ccvpe-small",
    truth: Annotated[
        Path | None,
        typer.Option(help="True positions, for the report only: a table stamp,lat,lon or a bag of fixes."),
    ] = None,
    truth_topic: Annotated[str | None, typer.Option(help="NavSatFix topic of the true positions.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Maximum number of rounds.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs, in each round.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per step and process.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Learning rate of Adam; it falls along a cosine in each round.")
    ] = 1e-3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the full learning rate.")] = 100,
    sigma: Annotated[
        float, typer.Option(min=0.1, help="Least standard deviation of a label, in pixels of the tile.")
    ] = 2.0,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Share of the pairs held out to judge the model.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initial weights, order and turns.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data and smooth drives.")] = 0,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
) -> None:
    """Train a new model from drives alone: coarse fixes, odometry and aerial tiles, no true positions.

    Rounds of placing the pairs by whole drives and training on these places, until that brings no more.
    To resume an interrupted run, repeat the command.
    """
    from xview_loc.adaptation.bootstrap import BootstrapOptions
    from xview_loc.adaptation.bootstrap import bootstrap as run
    from xview_loc.adaptation.bootstrap_report import (
        MODEL_FILE,
        REPORT_FILE,
        figures_of,
        line_of,
        outcome,
        write_bootstrap,
    )
    from xview_loc.datasets.pairs import PairDataset
    from xview_loc.models import create_model
    from xview_loc.training.trainer import TrainingOptions, make_fabric

    try:
        spec = create_model(model).spec
    except ValueError as error:
        raise UsageError(str(error)) from None
    training = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="cosine",
        warmup=warmup,
        # The model learns to find headings as well.
        heading_priors_deg=(0.0, None) if spec.camera == "panorama" else (0.0,),
        seed=seed,
        workers=workers,
    )
    options = BootstrapOptions(training, rounds, held_out, sigma)
    with StageProgress() as progress:
        fabric = make_fabric(accelerator, devices, precision)
        source = PairDataset(data, spec)
        if progress.first:
            for line in (*source.remarks, *(f"warning: {fault}" for fault in source.input_faults())):
                console.print(line, soft_wrap=True)
        true_from_fix = true_positions(source, truth, truth_topic, progress.first)
        done, figures = [], []
        for one in run(fabric, model, source, out, options, progress):
            done.append(one)
            figures.append(figures_of(one, true_from_fix))
            if progress.first:
                console.print(line_of(len(done), figures[-1]), soft_wrap=True)
        if not progress.first:
            return
        facts: dict[str, Any] = {"version": __version__, "command": shlex.join(["xview-loc", *sys.argv[1:]])}
        facts |= {"data": source.name, "options": asdict(options)}
        write_bootstrap(done, figures, out, facts)
    console.print(outcome(done), soft_wrap=True)
    console.print(f"{out / MODEL_FILE}, {out / REPORT_FILE}", soft_wrap=True)
