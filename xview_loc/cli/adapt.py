"""``xview-loc adapt`` and ``ablate``: knowledge self-distillation on pairs without ground truth."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xview_loc import __version__
from xview_loc.cli.console import UsageError, console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xview_loc.adaptation.distillation import Distillation, Plan
    from xview_loc.datasets.base import PairSource
    from xview_loc.models.base import CrossViewModel

Data = Annotated[list[str], typer.Argument(help="Bags of pairs, or one dataset such as vigor:ROOT:SPLIT.")]
Out = Annotated[Path, typer.Option(help="Folder of the results; an unfinished run there is resumed.")]
Model = Annotated[str, typer.Option(help="Model's name.")]
Checkpoint = Annotated[Path | None, typer.Option(help="The teacher's weights; default: the shipped ones.")]
Truth = Annotated[
    Path | None, typer.Option(help="True places, for the report alone: stamp,lat,lon table or bag of fixes.")
]
TruthTopic = Annotated[str | None, typer.Option(help="NavSatFix topic of the true places.")]
Heading = Annotated[str, typer.Option(help="known, unknown, or how many degrees it may be off.")]
Keep = Annotated[float | None, typer.Option(min=0.01, max=1.0, help="T: share of labels kept; 1: no filter.")]
Levels = Annotated[int | None, typer.Option(min=1, help="K': supervised levels, from the coarsest on.")]
Sigma = Annotated[float, typer.Option(min=0.1, help="Of the pseudo ground truth, heat-map pixels.")]
Smooth = Annotated[bool, typer.Option("--smooth", help="Let whole drives correct the teacher's labels.")]
Rounds = Annotated[
    int, typer.Option(min=1, help="At most so many: each one's student labels the pairs for the next.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the pairs, for each student.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pairs per step and process.")]
LearningRate = Annotated[float, typer.Option(min=0.0, help="Adam's.")]
HeldOut = Annotated[float, typer.Option(min=0.01, max=0.5, help="Share of the pairs that judge the student.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of the pairs and of random turns.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load data.")]
Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")]
Accelerator = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Devices = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]


def adapt(
    data: Data,
    out: Out,
    model: Model = "ccvpe-small",
    checkpoint: Checkpoint = None,
    truth: Truth = None,
    truth_topic: TruthTopic = None,
    heading: Heading = "known",
    keep: Keep = None,
    levels: Levels = None,
    sigma: Sigma = 4.0,
    smooth: Smooth = False,
    rounds: Rounds = 1,
    epochs: Epochs = 3,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = 1e-4,
    held_out: HeldOut = 0.1,
    seed: Seed = 0,
    workers: Workers = 0,
    precision: Precision = "32-true",
    accelerator: Accelerator = "auto",
    devices: Devices = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
) -> None:
    """Make a better student of a teacher and pairs without ground truth, and say whether to deploy it.

    Cut off, the same command goes on where it stopped. Defaults are the paper's: levels 2 and keep 0.8 for
    CCVPE, 3 and 0.7 for GGCVT; smoothed labels are not filtered, and supervise all levels.
    """
    shared = {name: value for name, value in locals().items() if name != "dry_run"}
    with _Bars() as bars:
        distillation = _distillation(bars, **shared)
        if dry_run:
            plan = distillation.plan()
            if bars.first:
                _show_plan(plan)
            return
        from xview_loc.adaptation.report import REPORT_FILE, STUDENT_FILE, write_results

        adapted = distillation.run()
        if not bars.first:
            return
        facts = {"version": __version__, "command": shlex.join(["xview-loc", *sys.argv[1:]])}
        metrics = write_results(distillation, adapted, out, facts)
    _show(metrics)
    console.print(f"{out / STUDENT_FILE}, {out / REPORT_FILE}", soft_wrap=True)


def ablate(
    data: Data,
    out: Out,
    test: Annotated[str | None, typer.Option(help="Pairs to measure on; default: the held-out ones.")] = None,
    test_truth: Annotated[Path | None, typer.Option(help="Their true places.")] = None,
    model: Model = "ccvpe-small",
    checkpoint: Checkpoint = None,
    truth: Truth = None,
    truth_topic: TruthTopic = None,
    heading: Heading = "known",
    keep: Keep = None,
    levels: Levels = None,
    sigma: Sigma = 4.0,
    epochs: Epochs = 3,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = 1e-4,
    held_out: HeldOut = 0.1,
    seed: Seed = 0,
    workers: Workers = 0,
    precision: Precision = "32-true",
    accelerator: Accelerator = "auto",
    devices: Devices = 1,
) -> None:
    """Measure what each part of the adaptation adds: the paper's Table 2, and Figures 5 and 6, on this data.

    Rows: teacher; students with and without mode-based labels and outlier filter; then every number of
    levels K', and T from 50 to 100 %.
    """
    shared = {name: value for name, value in locals().items() if name not in ("test", "test_truth")}
    with _Bars() as bars:
        distillation = _distillation(bars, **shared)
        from xview_loc.adaptation.ablation import run_ablation, write_ablation

        measured = None
        if test is not None:
            source = _source([test], distillation.teacher.model)
            places = _true_places(source, test_truth, truth_topic, bars.first)
            measured = None if places is None else (source, places)
        if measured is None and (test is not None or distillation.true_from_fix is None):
            raise UsageError("ablate compares with true places: give --truth, or --test with --test-truth")
        rows = run_ablation(distillation, measured)
        if not bars.first:
            return
        write_ablation(rows, distillation, out)
    table = Table("", "mean, m", "median, m")
    for row in rows:
        table.add_row(row.name, f"{row.errors.mean:.2f}", f"{row.errors.median:.2f}")
    console.print(table)


class _Bars:
    """A progress bar for each stage on a terminal, else a line at each tenth; of the first process alone."""

    def __init__(self) -> None:
        self.first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        speed = TextColumn("{task.fields[rate]}")
        self._progress = Progress(
            *columns, speed, console=console, disable=not (self.first and console.is_terminal)
        )
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, int] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage has come so far."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, rate="")
        task = self._tasks[stage]
        speed = self._progress.tasks[task].speed
        self._progress.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "")
        tenth = 10 * done // total
        if self.first and not console.is_terminal and tenth != self._told.get(stage):
            self._told[stage] = tenth
            print(f"{stage}: {done} of {total}", flush=True)


def _distillation(
    bars: _Bars,
    data: list[str],
    out: Path,
    model: str,
    checkpoint: Path | None,
    truth: Path | None,
    truth_topic: str | None,
    heading: str,
    keep: float | None,
    levels: int | None,
    sigma: float,
    epochs: int,
    batch_size: int | None,
    learning_rate: float,
    held_out: float,
    seed: int,
    workers: int,
    precision: str,
    accelerator: str,
    devices: int,
    smooth: bool = False,
    rounds: int = 1,
) -> Distillation:
    from xview_loc.adaptation.distillation import Distillation
    from xview_loc.adaptation.options import AdaptationOptions
    from xview_loc.models.checkpoint import load_model
    from xview_loc.training.trainer import make_fabric

    teacher = load_model(model, checkpoint)
    given = {"keep": keep, "levels": levels, "batch_size": batch_size}
    options = AdaptationOptions.published(
        teacher.model,
        heading_priors_deg=(_prior(heading),),
        sigma=sigma,
        smooth=smooth,
        rounds=rounds,
        epochs=epochs,
        learning_rate=learning_rate,
        held_out=held_out,
        seed=seed,
        workers=workers,
        **{name: value for name, value in given.items() if value is not None},
    )
    source = _source(data, teacher.model)
    places = _true_places(source, truth, truth_topic, bars.first)
    fabric = make_fabric(accelerator, devices, precision)
    return Distillation(fabric, teacher, source, out, options, true_from_fix=places, on_progress=bars)


def _prior(text: str) -> float | None:
    if text in ("known", "unknown"):
        return 0.0 if text == "known" else None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 180:
        raise UsageError(f"--heading is known, unknown or 0 to 180 degrees, not {text!r}")
    return value


def _source(data: list[str], model: CrossViewModel) -> PairSource:
    from xview_loc.datasets import open_dataset
    from xview_loc.datasets.pairs import PairDataset

    folders = [Path(text) for text in data]
    if len(data) == 1 and ":" in data[0] and not folders[0].exists():
        return open_dataset(data[0], model.spec, half_extent_m=model.half_extent_m)
    return PairDataset(folders, model.spec)


def _true_places(
    source: PairSource, truth: Path | None, topic: str | None, tell: bool
) -> NDArray[np.float64] | None:
    """Metres (N, 2) east and north from the coarse fixes; None where the truth is not known."""
    from xview_loc.datasets.base import PoseDataset, true_from_fix
    from xview_loc.recordings.tracks import read_timed_track

    if isinstance(source, PoseDataset):
        if truth is not None:
            raise UsageError(f"{source.name} has true places of its own: leave out {truth}")
        return source.true_from_fix()
    if truth is None:
        return None
    track = source.track()
    assert track is not None
    places = true_from_fix(track, *read_timed_track(truth, topic).at(track.stamp_ns))
    known = int(sum(map(math.isfinite, places[:, 0])))
    if not known:
        raise UsageError(f"{truth} says nothing about the times at which the pairs were taken")
    if tell:
        console.print(f"true places of {known} of {len(places)} pairs", soft_wrap=True)
    return places


def _show(metrics: dict[str, Any]) -> None:
    from xview_loc.adaptation.report import round_lines, smoothing_line

    verdict = metrics["verdict"]
    if metrics["unreadable"]:
        console.print(f"{metrics['unreadable']} pairs could not be used and were left out", soft_wrap=True)
    if "smoothing" in metrics:
        console.print(smoothing_line(metrics["smoothing"]), soft_wrap=True)
    for line in (*round_lines(metrics.get("rounds", ())), *verdict["reasons"]):
        console.print(line, soft_wrap=True)
    if "true_errors" in metrics:
        table = Table("metres", "pairs", "mean", "median", "95 %")
        for name, e in metrics["true_errors"].items():
            figures = ("" if e[k] is None else f"{e[k]:.2f}" for k in ("mean", "median", "p95"))
            table.add_row(name, str(e["frames"]), *figures)
        console.print(table)
    console.print("verdict: " + ("deploy" if verdict["deploy"] else "do not deploy"), style="bold")


def _show_plan(plan: Plan) -> None:
    for stage in plan.stages:
        console.print(
            f"{stage.name}: {stage.pairs} pairs, about {stage.seconds / 60:.1f} min", soft_wrap=True
        )
    minutes = sum(stage.seconds for stage in plan.stages) / 60
    console.print(f"{minutes:.1f} min in all, less what is done already; {plan.megabytes:.0f} MB of disk")
