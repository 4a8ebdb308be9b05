"""``xview-loc calibrate``: make a checkpoint's probabilities and covariances honest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from xview_loc.cli.console import UsageError, console
from xview_loc.cli.drives import simulated_drive
from xview_loc.cli.evaluate import Benchmark, Heading, open_benchmark


def calibrate(
    out: Annotated[Path, typer.Option(help="Where the calibrated checkpoint goes.")],
    model: Annotated[str, typer.Option(help="Model's name.")] = "ccvpe-small",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; default: the shipped ones.")] = None,
    style: Annotated[str, typer.Option(help="Style of the cities.")] = "source",
    cities: Annotated[str, typer.Option(help="Seeds of cities that it was not trained on.")] = "950-957",
    frames: Annotated[int, typer.Option(min=1, help="Frames of each drive, one a second.")] = 150,
    heading: Annotated[Heading, typer.Option(help="Is the heading known?")] = Heading.known,
    dataset: Annotated[Benchmark | None, typer.Option(help="A benchmark instead of drives.")] = None,
    root: Annotated[Path | None, typer.Option(help="The benchmark's folder.")] = None,
    split: Annotated[str, typer.Option(help="The benchmark's split.")] = "test",
    samples: Annotated[int, typer.Option(min=200, help="Of the benchmark, evenly chosen.")] = 1500,
) -> None:
    """Fit temperature and floor on frames with known places; the weights stay as they are.

    Use frames of the kind that the model was trained on, but not these themselves.
    """
    from xview_loc.datasets.simulated import parse_cities
    from xview_loc.estimation.calibration import CalibrationFrame, fit_calibration
    from xview_loc.evaluation import evaluate, localize_each
    from xview_loc.models.base import Calibration
    from xview_loc.models.checkpoint import load_model, save_checkpoint

    loaded = load_model(model, checkpoint)
    net = loaded.model
    if net.spec.bins == 0 and heading is Heading.unknown:
        raise UsageError(f"{net.spec.name} needs a known heading")
    net.calibration = Calibration(None, 0.0)
    known = heading is Heading.known
    kept: list[CalibrationFrame] = []
    if dataset is not None:
        if root is None:
            raise UsageError(f"--dataset {dataset.value} needs --root, the folder that holds it")
        data, prior = open_benchmark(net, f"{dataset.value}:{root}:{split}", heading)
        evaluate(
            net,
            data,
            prior,
            every=max(1, len(data) // samples),
            on_heat_map=lambda *pair: kept.append(CalibrationFrame.of(*pair)),
        )
        frames_from = f"{dataset.value}:{split}:{len(kept)}"
    else:
        for seed in track(parse_cities(cities), "cities", console=console, transient=True):
            with simulated_drive(net, style, seed, frames, known) as (localizer, seen):
                kept += [
                    CalibrationFrame.of(p.heat_map, truth) for p, truth in localize_each(localizer, seen)
                ]
        frames_from = f"simulated:{style}:{cities}:{frames}"
    net.calibration = fit_calibration(kept)
    metadata = {**loaded.metadata, "calibrated_on": {"frames": frames_from, "heading": heading.value}}
    sha256 = save_checkpoint(net, out, metadata)
    fitted = f"contrast {net.calibration.contrast:.2f}, floor {net.calibration.floor_m:.2f} m"
    console.print(
        f"{len(kept)} frames: {fitted}; wrote {out} (sha256 {sha256[:12]})",
        highlight=False,
        soft_wrap=True,
    )
