"""``xview-loc adapt`` and ``ablate``: knowledge self-distillation on pairs without ground truth."""

from __future__ import annotations

import hashlib
import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from xview_loc import __version__
from xview_loc.cli.console import UsageError, console
from xview_loc.cli.maps import Headers, KeyEnv, map_options
from xview_loc.cli.pair_inputs import heading_prior, true_positions
from xview_loc.cli.stage_progress import StageProgress
from xview_loc.errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from xview_loc.adaptation.distillation import Distillation
    from xview_loc.adaptation.plan import Plan
    from xview_loc.datasets.base import PairSource, PoseDataset
    from xview_loc.models.base import CrossViewModel
    from xview_loc.models.specs import ModelSpec


class RecipeName(str, Enum):
    """How labels are made."""

    AUTO = "auto"
    DRIVES = "drives"
    PAPER = "paper"
    GEODISTILL = "geodistill"


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Arguments and options of both commands."""

    data: Annotated[list[str], typer.Argument(help="Bags of pairs, or one dataset such as vigor:ROOT:SPLIT.")]
    out: Annotated[Path, typer.Option(help="Folder for the results; an unfinished run there is resumed.")]
    model: Annotated[str, typer.Option(help="Name of the model.")] = "ccvpe-small"
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of the teacher; default: the shipped ones.")
    ] = None
    map_: Annotated[
        str,
        typer.Option(
            "--map",
            help="Aerial map; bags whose tiles do not fit the model are copied, with tiles cut from it.",
        ),
    ] = ""
    header: Headers = None
    api_key_env: KeyEnv = ""
    truth: Annotated[
        Path | None,
        typer.Option(help="True positions, for the report only: a table stamp,lat,lon or a bag of fixes."),
    ] = None
    truth_topic: Annotated[str | None, typer.Option(help="NavSatFix topic of the true positions.")] = None
    heading: Annotated[str, typer.Option(help="known, unknown, or its largest error in degrees.")] = "known"
    turn: Annotated[
        bool | None,
        typer.Option(
            "--turn/--no-turn",
            help="Train on panoramas turned at random, so that the student also finds headings. "
            "Default: for CCVPE with the paper's recipe.",
        ),
    ] = None
    keep: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="T: share of labels to keep; 1: no filter.")
    ] = None
    levels: Annotated[
        int | None, typer.Option(min=1, help="K': number of supervised levels, from the coarsest.")
    ] = None
    sigma: Annotated[
        float, typer.Option(min=0.1, help="Standard deviation of the label, in pixels of the tile.")
    ] = 4.0
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs, for each student.")] = 3
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs per step and process.")] = None
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate of Adam.")] = 1e-4
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Share of the pairs held out to judge the student.")
    ] = 0.1
    validation: Annotated[
        str | None,
        typer.Option(
            help="Dataset with true positions to pick the epoch by, such as vigor:ROOT:validation; "
            "no pairs are held out then."
        ),
    ] = None
    replay: Annotated[
        str | None,
        typer.Option(
            help="Dataset with true positions to train on as well, such as simulated:source:0-3:100, "
            "so that the student forgets less of it."
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed for the order of pairs and random turns.")] = 0
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data and smooth drives.")] = 0
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true"
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    devices: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1

    def distillation(self, progress: StageProgress, **more: Any) -> Distillation:
        """Set up the run; ``more`` are further fields of :class:`AdaptationOptions`."""
        from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
        from xview_loc.datasets import open_dataset
        from xview_loc.models.checkpoint import load_model
        from xview_loc.training.trainer import make_fabric

        teacher = load_model(self.model, self.checkpoint)
        if teacher.note and progress.first:
            console.print(f"{self.checkpoint}: {teacher.note}", soft_wrap=True)
        if self.batch_size is not None:
            more["batch_size"] = self.batch_size
        more["turned"] = self.turn
        for name in ("keep", "levels", "sigma", "epochs", "learning_rate", "held_out", "seed", "workers"):
            more[name] = getattr(self, name)
        more["heading_prior_deg"] = heading_prior(self.heading)
        options = AdaptationOptions.published(teacher.model, **more)
        fabric = make_fabric(self.accelerator, self.devices, self.precision)
        source = self.source(self.data, teacher.model, fabric, progress)
        truth = true_positions(source, self.truth, self.truth_topic, progress.first)
        spec, reach = teacher.model.spec, teacher.model.half_extent_m

        def poses(name: str | None) -> PoseDataset | None:
            return open_dataset(name, spec, half_extent_m=reach) if name else None

        return Distillation(
            fabric,
            teacher,
            source,
            self.out,
            options,
            true_from_fix=truth,
            validation=poses(self.validation),
            replay=poses(self.replay),
            on_progress=progress,
        )

    def source(
        self, data: list[str], model: CrossViewModel, fabric: Fabric, progress: StageProgress
    ) -> PairSource:
        """Open bags of pairs, or one dataset."""
        from xview_loc.datasets import open_dataset
        from xview_loc.datasets.pairs import PairDataset

        if len(data) == 1 and ":" in data[0] and not Path(data[0]).exists():
            return open_dataset(data[0], model.spec, half_extent_m=model.half_extent_m)
        folders = [Path(text) for text in data]
        if self.map_:
            # One process copies what all read; where it fails, all do.
            problem: Exception | None = None
            if fabric.is_global_zero:
                try:
                    folders = self._with_tiles(folders, model.spec, progress)
                except (UserError, OSError) as error:
                    problem = error
            folders, problem = fabric.broadcast((folders, problem))
            if problem is not None:
                raise problem
        pairs = PairDataset(folders, model.spec)
        for line in pairs.remarks if progress.first else ():
            console.print(line, soft_wrap=True)
        return pairs

    def _with_tiles(self, folders: list[Path], spec: ModelSpec, progress: StageProgress) -> list[Path]:
        """Return the bags; of those whose tiles do not fit model or map's shift, copies below ``out``."""
        from xview_loc.maps import open_map
        from xview_loc.recordings.importer import ImportOptions, import_bag
        from xview_loc.recordings.pair_reader import PairBag

        bags = []
        with open_map(self.map_, map_options(self.header, self.api_key_env)) as aerial:
            shift = aerial.info().shift
            for folder in folders:
                bag = PairBag(folder)
                fit = all(size and spec.takes_tile(*size) for size in bag.tile_sizes())
                if not fit or bag.session().get("map_shift", "") != shift:
                    inputs = repr((bag.digest(), self.map_, spec, *([shift] if shift else []))).encode()
                    digest = hashlib.sha256(inputs).hexdigest()[:12]
                    folder = self.out / "pairs" / f"{folder.resolve().name}-{digest}"
                    stage, count = f"tiles of {bag.folder.name}", len(bag)

                    def cut(share: float, stage: str = stage, count: int = count) -> None:
                        progress(stage, round(share * count), count)

                    done = import_bag(bag.folder, folder, aerial, ImportOptions(spec=spec), cut)
                    if done is not None:
                        text = f"{folder}: {done.pairs} pairs with tiles for {spec.name}"
                        text += f", {done.without_tile} of them without a tile" if done.without_tile else ""
                        if done.failed_tiles:
                            text += f" ({done.failed_tiles} could not be read: {done.tile_failure}; delete "
                            text += "the folder to try again)"
                        console.print(text, soft_wrap=True)
                bags.append(folder)
        return bags


def _with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the first parameter of a command, a :class:`_Shared`, with the fields of that class."""
    shared = inspect.signature(_Shared, eval_str=True).parameters
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    @wraps(command)
    def run(**values: Any) -> None:
        command(_Shared(**{name: values.pop(name) for name in shared}), **values)

    run.__signature__ = inspect.Signature([*shared.values(), *own])  # type: ignore[attr-defined]
    return run


@_with_shared_options
def adapt(
    shared: _Shared,
    *,
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="drives: whole drives correct the labels. paper: the published recipe. "
            "geodistill: no labels; students that see a sector learn the heat maps of a teacher that is a "
            "moving average of them (ICCV 2025). auto: drives where the pairs come from drives, else paper."
        ),
    ] = RecipeName.AUTO,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of rounds; each student labels the pairs for the next. "
            "Default: 1 with paper and geodistill, else up to 3 while the labels are uncertain.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be done, and stop; --map copies all the same."),
    ] = False,
) -> None:
    """Train a better student from a teacher and pairs without ground truth, and judge whether to deploy it.

    To resume an interrupted run, repeat the command. The paper's recipe has levels 2 and keep 0.8 for CCVPE,
    3 and 0.7 for GGCVT; labels corrected by drives are not filtered and supervise all levels.
    """
    more: dict[str, Any] = {"smooth": None if recipe is RecipeName.AUTO else recipe is RecipeName.DRIVES}
    more["geodistill"] = recipe is RecipeName.GEODISTILL
    if rounds is None and recipe in (RecipeName.PAPER, RecipeName.GEODISTILL):
        rounds = 1
    with StageProgress() as progress:
        distillation = shared.distillation(progress, **more, rounds=rounds)
        if dry_run:
            from xview_loc.adaptation.plan import plan_run

            plan = plan_run(distillation)
            if progress.first:
                _print_plan(plan)
                if distillation.smoothing and rounds is None:
                    console.print("up to two further rounds, each as long, while the labels are uncertain")
            return
        from xview_loc.adaptation.data_check import check_data
        from xview_loc.adaptation.report import REPORT_FILE, STUDENT_FILE, write_results
        from xview_loc.maps.base import redact

        _check_padding(distillation, progress.first)
        check = check_data(distillation)
        for line in (*check.faults, *check.remarks) if progress.first else ():
            console.print(f"warning: {line}", soft_wrap=True)
        adapted = distillation.run()
        if not progress.first:
            return
        secrets = [line.partition(":")[2].strip() for line in shared.header or ()]
        words = [redact(word, secrets) for word in sys.argv[1:]]
        facts = {"version": __version__, "command": shlex.join(["xview-loc", *words])}
        metrics = write_results(distillation, adapted, shared.out, facts, check)
    _print_metrics(metrics)
    console.print(f"{shared.out / STUDENT_FILE}, {shared.out / REPORT_FILE}", soft_wrap=True)


@_with_shared_options
def ablate(
    shared: _Shared,
    *,
    test: Annotated[
        str | None, typer.Option(help="Pairs to measure errors on; default: the held-out ones.")
    ] = None,
    test_truth: Annotated[Path | None, typer.Option(help="True positions of these pairs.")] = None,
) -> None:
    """Measure what each part of the adaptation adds: the paper's Table 2 and Figures 5 and 6, on this data.

    Rows: the teacher; students with and without mode-based labels and the outlier filter; then every number
    of levels K', and T from 50 to 100 %.
    """
    with StageProgress() as progress:
        distillation = shared.distillation(progress)
        from xview_loc.adaptation.ablation import run_ablation, write_ablation
        from xview_loc.report import finite

        measured = None
        if test is not None:
            source = shared.source([test], distillation.teacher.model, distillation.fabric, progress)
            truth = true_positions(source, test_truth, shared.truth_topic, progress.first)
            measured = None if truth is None else (source, truth)
        if measured is None and (test is not None or distillation.true_from_fix is None):
            raise UsageError("ablate needs true positions: give --truth, or --test with --test-truth")
        _check_padding(distillation, progress.first)
        rows = run_ablation(distillation, measured)
        if not progress.first:
            return
        write_ablation(rows, distillation, shared.out)
    _print_errors({row.name: finite(asdict(row.errors)) for row in rows})


def _check_padding(distillation: Distillation, verbose: bool) -> None:
    from xview_loc.adaptation.labelling import ReadOptions
    from xview_loc.adaptation.padding import padding_warning

    options = ReadOptions(distillation.options.heading_prior_deg)
    warning = padding_warning(distillation.fabric, distillation.teacher, distillation.source, options)
    if warning and verbose:
        console.print(f"warning: {warning}", soft_wrap=True)


def _print_metrics(metrics: dict[str, Any]) -> None:
    from xview_loc.adaptation.report import outcome_lines, smoothing_line

    verdict = metrics["verdict"]
    if metrics["unreadable"]:
        console.print(f"{metrics['unreadable']} pairs could not be read and were left out", soft_wrap=True)
    if "smoothing" in metrics:
        console.print(smoothing_line(metrics["smoothing"]), soft_wrap=True)
    for line in (*outcome_lines(metrics), *verdict["reasons"]):
        console.print(line, soft_wrap=True)
    if "true_errors" in metrics:
        _print_errors(metrics["true_errors"])
    console.print("verdict: " + ("deploy" if verdict["deploy"] else "do not deploy"), style="bold")
    console.print(f"{verdict['summary']} {verdict['advice']}", soft_wrap=True)


def _print_errors(errors: dict[str, dict[str, float | None]]) -> None:
    from xview_loc.adaptation.report import error_table

    heads, rows = error_table(errors)
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_plan(plan: Plan) -> None:
    for stage in plan.stages:
        minutes = stage.seconds / 60
        console.print(f"{stage.name}: {stage.pairs} pairs, about {minutes:.1f} min", soft_wrap=True)
    minutes = sum(stage.seconds for stage in plan.stages) / 60
    console.print(f"{minutes:.1f} min in all, less what is already done; {plan.megabytes:.0f} MB of disk")
