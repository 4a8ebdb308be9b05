"""``xview-loc calibrate``: fit a checkpoint's calibration: honest covariances, a least confidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from xview_loc.cli.console import UsageError, console
from xview_loc.cli.evaluate import (
    Dataset,
    Frames,
    Heading,
    KnownHeading,
    ModelName,
    Root,
    Split,
    Style,
    Weights,
    load,
    open_benchmark,
    print_unreadable,
    simulated_drive,
)
from xview_loc.errors import UserError


def calibrate(
    out: Annotated[Path, typer.Option(help="File of the calibrated checkpoint.")],
    model: ModelName = "ccvpe-small",
    checkpoint: Weights = None,
    style: Style = "source",
    cities: Annotated[str, typer.Option(help="Seeds of cities that were not trained on.")] = "950-957",
    frames: Frames = 150,
    heading: KnownHeading = Heading.known,
    any_camera: Annotated[
        bool, typer.Option("--any-camera", help="Random cameras see a part of each simulated panorama.")
    ] = False,
    dataset: Dataset = None,
    root: Root = None,
    split: Split = "test",
    samples: Annotated[int, typer.Option(min=200, help="Samples of the benchmark, evenly spaced.")] = 1500,
) -> None:
    """Fit temperature, floor and least confidence on frames with true positions; the weights do not change.

    Use frames like those that the model was trained on, but not the same ones.
    """
    from xview_loc.datasets.simulated import parse_cities
    from xview_loc.estimation.calibration import CalibrationFrame, fit_calibration
    from xview_loc.evaluation.errors import evaluate, localize_each
    from xview_loc.files import check_writable
    from xview_loc.models.base import Calibration
    from xview_loc.models.checkpoint import save_checkpoint

    if dataset is not None and any_camera:
        raise UsageError("--any-camera is for simulated cities: leave it out with --dataset")
    check_writable(out)
    loaded = load(model, checkpoint, heading)
    net = loaded.model
    net.calibration = Calibration(None, 0.0)
    known = heading is Heading.known
    kept: list[CalibrationFrame] = []
    unreadable: list[UserError] = []
    if dataset is not None:
        data, prior = open_benchmark(net, dataset, root, split, heading)
        evaluate(
            net,
            data,
            prior,
            every=max(1, len(data) // samples),
            on_heat_map=lambda *pair: kept.append(CalibrationFrame.of(*pair)),
            on_unreadable=unreadable.append,
        )
        if unreadable:
            print_unreadable(unreadable)
        frames_from = f"{dataset.value}:{split}:{len(kept)}"
    else:
        for seed in track(parse_cities(cities), "cities", console=console, transient=True):
            with simulated_drive(net, style, seed, frames, known, any_camera) as (localizer, seen):
                kept += [
                    CalibrationFrame.of(p.heat_map, truth) for p, truth in localize_each(localizer, seen)
                ]
        frames_from = f"simulated:{style}:{cities}:{frames}{':any-camera' if any_camera else ''}"
    net.calibration = fit_calibration(kept)
    metadata = {**loaded.metadata, "calibrated_on": {"frames": frames_from, "heading": heading.value}}
    sha256 = save_checkpoint(net, out, metadata)
    found = net.calibration
    fitted = (
        f"contrast {found.contrast:.2f}, floor {found.floor_m:.2f} m, "
        f"least confidence {found.min_confidence:.2f}"
    )
    console.print(
        f"{len(kept)} frames: {fitted}; wrote {out} (sha256 {sha256[:12]})",
        highlight=False,
        soft_wrap=True,
    )
