"""``xview-loc evaluate``: errors on recordings, on simulated drives or on a published benchmark."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, track
from rich.table import Table

from xview_loc.cli.console import UsageError, console
from xview_loc.cli.maps import CacheDir, Headers, KeyEnv, map_options
from xview_loc.errors import UserError, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xview_loc.datasets.base import PoseDataset
    from xview_loc.estimation.localizer import Localizer
    from xview_loc.estimation.observation import Observation
    from xview_loc.evaluation.errors import PoseErrors
    from xview_loc.models.base import CrossViewModel
    from xview_loc.models.checkpoint import Checkpoint


class Heading(str, Enum):
    """Knowledge of the heading."""

    known = "known"
    unknown = "unknown"


class Benchmark(str, Enum):
    """A published dataset."""

    vigor = "vigor"
    kitti = "kitti"


class LabelSet(str, Enum):
    """A set of VIGOR's labels."""

    corrected = "corrected"
    original = "original"


class Intrinsics(str, Enum):
    """A way to scale KITTI's intrinsics."""

    published = "published"
    exact = "exact"


# Options shared with other commands.
ModelName = Annotated[str, typer.Option(help="Name of the model.")]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint file; default: the shipped weights.")]
Style = Annotated[str, typer.Option(help="Style of the simulated cities.")]
Frames = Annotated[int, typer.Option(min=1, help="Frames of each drive, one a second.")]
KnownHeading = Annotated[Heading, typer.Option(help="Is the heading known?")]
Dataset = Annotated[Benchmark | None, typer.Option(help="Benchmark to use instead of simulated drives.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the benchmark.")]
Split = Annotated[
    str,
    typer.Option(
        help="Split of the benchmark: test, validation, adapt; VIGOR also same-train, same-test, "
        "cross-train, cross-test; KITTI train, test1, test2."
    ),
]


# Exit code if samples of a benchmark were left out, and how many of them are named.
_SOME_UNREADABLE = 3
_NAMED = 3
# Number of images shown that mislead the model most.
_WORST = 4
# Published errors, (mean, median) in metres: teacher and student on the last 20 % of the target area (Xia et
# al., ECCV 2024, table 1).
_MEASURES = {Benchmark.vigor: ("distance",), Benchmark.kitti: ("longitudinal", "lateral")}
_PUBLISHED = {
    (Benchmark.vigor, Heading.known): {
        "CCVPE, teacher": [(4.38, 1.76)],
        "CCVPE, student": [(3.85, 1.57)],
        "GGCVT, teacher": [(5.19, 1.39)],
        "GGCVT, student": [(4.34, 1.32)],
    },
    (Benchmark.vigor, Heading.unknown): {
        "CCVPE, teacher": [(5.35, 1.97)],
        "CCVPE, student": [(4.27, 1.67)],
    },
    (Benchmark.kitti, Heading.known): {
        "CCVPE, teacher": [(6.55, 2.55), (1.82, 0.98)],
        "CCVPE, student": [(6.18, 2.35), (1.76, 0.98)],
        "GGCVT, teacher": [(9.27, 4.66), (2.19, 0.85)],
        "GGCVT, student": [(8.56, 4.35), (1.90, 0.79)],
    },
}


def evaluate(
    bags: Annotated[
        list[Path] | None,
        typer.Argument(help="Bags of pairs to localise beside --truth.", show_default=False),
    ] = None,
    map_: Annotated[str, typer.Option("--map", help="Aerial map of the bags.")] = "",
    truth: Annotated[
        Path | None, typer.Option(help="True positions of the bags: a table stamp,lat,lon or a bag of fixes.")
    ] = None,
    truth_topic: Annotated[str | None, typer.Option(help="NavSatFix topic of the true positions.")] = None,
    cache_dir: CacheDir = None,
    header: Headers = None,
    api_key_env: KeyEnv = "",
    model: ModelName = "ccvpe-small",
    checkpoint: Weights = None,
    style: Style = "source",
    cities: Annotated[str, typer.Option(help="Seeds of the cities, such as 7 or 900-903.")] = "900-903",
    frames: Frames = 150,
    heading: KnownHeading = Heading.known,
    dataset: Dataset = None,
    root: Root = None,
    split: Split = "test",
    labels: Annotated[LabelSet, typer.Option(help="Labels of VIGOR.")] = LabelSet.corrected,
    intrinsics: Annotated[
        Intrinsics, typer.Option(help="KITTI's intrinsics, scaled as GGCVT was trained or exactly.")
    ] = Intrinsics.published,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a benchmark matched together.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load a benchmark.")] = 0,
    device: Annotated[str, typer.Option(help="Device for a benchmark: cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the errors of every frame to this JSON file; of bags: a report, errors.csv and "
            "trajectories in TUM's format to this folder."
        ),
    ] = None,
) -> None:
    """Localise every frame by itself, those of bags over time as well, and print the errors.

    Frames are from bags of pairs with true positions (--truth), from drives through simulated cities or, with
    --dataset and --root, from VIGOR or KITTI, whose published figures are printed too. Samples of a benchmark
    that cannot be read are named and left out; the exit code is then 3.
    """
    from xview_loc.adaptation.labelling import ReadOptions
    from xview_loc.adaptation.padding import padding_warning
    from xview_loc.evaluation.errors import evaluate as evaluate_model
    from xview_loc.files import check_writable, write_whole
    from xview_loc.report import finite
    from xview_loc.training.trainer import make_fabric

    if bags:
        _on_recordings(
            bags,
            map_,
            map_options(header, api_key_env, cache_dir),
            truth,
            truth_topic,
            model,
            checkpoint,
            heading,
            out,
        )
        return
    if truth or map_:
        raise UsageError("--truth and --map are for bags of pairs: name them")
    if out:
        check_writable(out)
    loaded = load(model, checkpoint, heading)
    net = loaded.model
    unreadable: list[UserError] = []
    if dataset is None:
        content = _on_drives(net, style, cities, frames, heading)
    else:
        try:
            net.to(device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
            raise UsageError(f"no device {device!r}: {reason(error)}") from None
        data, prior = open_benchmark(net, dataset, root, split, heading, labels, intrinsics)
        fabric = make_fabric(next(net.parameters()).device.type)
        warning = padding_warning(fabric, loaded, data, ReadOptions(prior, workers=workers))
        if warning:
            console.print(f"warning: {warning}", soft_wrap=True)
        net.to(device)  # the warning's device may be another one of the same type
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("samples", total=len(data))
            errors = evaluate_model(
                net,
                data,
                prior,
                batch_size=batch_size,
                workers=workers,
                on_batch=lambda count: progress.advance(bar, count),
                on_unreadable=unreadable.append,
            )
        _print_benchmark(errors, net.spec.name, dataset, split, heading)
        content = {"dataset": dataset.value, "split": split}
        is_vigor = dataset is Benchmark.vigor
        content |= {"labels": labels.value} if is_vigor else {"intrinsics": intrinsics.value}
        content |= {"summary": {**errors.summary(), "unreadable": len(unreadable)}}
        content |= {"unreadable": [str(error) for error in unreadable]}
        content |= {"samples": {name: values.tolist() for name, values in asdict(errors).items()}}
    if out:
        figures = {"model": net.spec.name, "heading": heading.value, **content}
        write_whole(out, json.dumps(finite(figures), allow_nan=False).encode())
    if unreadable:
        print_unreadable(unreadable)
        raise typer.Exit(_SOME_UNREADABLE)


def _on_recordings(
    bags: list[Path],
    map_: str,
    options: Any,
    truth: Path | None,
    topic: str | None,
    model: str,
    checkpoint: Path | None,
    heading: Heading,
    out: Path | None,
) -> None:
    """Replay bags of pairs beside true positions, print the errors and write the report."""
    from xview_loc.datasets.pairs import PairDataset
    from xview_loc.estimation.localizer import Localizer
    from xview_loc.evaluation import recording_report
    from xview_loc.evaluation.replay import Replay, replay
    from xview_loc.maps import open_map
    from xview_loc.maps.base import redact
    from xview_loc.recordings.pair_reader import PairBag
    from xview_loc.recordings.tracks import read_timed_track

    if truth is None or not map_:
        raise UsageError("bags need --truth, their true positions, and --map, the aerial map")
    names = [bag.resolve().name for bag in bags]
    if len(set(names)) < len(names):
        raise UsageError("two of the bags have the same name: rename one")
    if out:
        out.mkdir(parents=True, exist_ok=True)
    track = read_timed_track(truth, topic)
    net = load(model, checkpoint, heading).model
    known = heading is Heading.known
    replays: list[Replay] = []
    worst: list[tuple[float, Figure, str]] = []
    with (
        open_map(map_, options) as aerial,
        Localizer.open(aerial, net, heading_prior_deg=0.0 if known else None) as localizer,
        Progress(console=console, transient=True) as progress,
    ):
        for folder, name in zip(bags, names, strict=True):
            bag, dataset = PairBag(folder), PairDataset([folder], net.spec)
            for remark in dataset.remarks:
                console.print(remark, soft_wrap=True)
            bar = progress.add_task(name, total=len(bag))
            one = replay(
                name,
                dataset,
                bag,
                localizer,
                track,
                use_heading=known,
                on_pair=lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
            )
            replays.append(one)
            if out:
                recording_report.write_recording(one, out)
                for i, error in one.worst(_WORST):
                    drawn = recording_report.draw_image(one, i, dataset, localizer, known)
                    worst.append((error, *drawn))
        figures = recording_report.summary(replays)
        heads, rows = recording_report.table(figures)
        table = Table(*heads, title=f"{net.spec.name}, heading {heading.value}")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in recording_report.verdict(figures):
            console.print(line, soft_wrap=True)
        if out:
            recording_report.write_metrics(figures, out)
            facts = {"model": net.spec.name, "checkpoint": str(checkpoint or "shipped")}
            facts |= {"heading": heading.value, "map": redact(map_), "imagery": aerial.info().attribution}
            facts |= {"shift of the map, taken out": aerial.info().shift or "not measured"}
            facts |= {"true positions": str(truth)}
            shown = [one[1:] for one in sorted(worst, key=lambda one: -one[0])[:_WORST]]
            recording_report.page(replays, figures, facts, aerial, shown).write(out / "report.html")
            console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def load(model: str, checkpoint: Path | None, heading: Heading) -> Checkpoint:
    """Load a model. Raises UsageError if it needs a known heading and that is unknown."""
    from xview_loc.models.checkpoint import load_model

    loaded = load_model(model, checkpoint)
    if loaded.model.spec.bins == 0 and heading is Heading.unknown:
        raise UsageError(f"{loaded.model.spec.name} needs a known heading")
    if loaded.note:
        console.print(f"{checkpoint}: {loaded.note}", soft_wrap=True)
    return loaded


def open_benchmark(
    net: CrossViewModel,
    dataset: Benchmark,
    root: Path | None,
    split: str,
    heading: Heading,
    labels: LabelSet = LabelSet.corrected,
    intrinsics: Intrinsics = Intrinsics.published,
) -> tuple[PoseDataset, float | None]:
    """Open a benchmark for a model; returns it and the heading prior (degrees) to match with."""
    from xview_loc.datasets import open_dataset

    if root is None:
        raise UsageError(f"--dataset {dataset.value} needs --root, the benchmark's folder")
    variant = ""
    if dataset is Benchmark.vigor and labels is LabelSet.original:
        variant = ":original"
    elif dataset is Benchmark.kitti and intrinsics is Intrinsics.exact:
        variant = ":exact"
    known = heading is Heading.known
    data = open_dataset(f"{dataset.value}:{root}:{split}{variant}", net.spec, heading_known=known)
    return data, net.spec.matching_prior(0.0 if known else None)


def print_unreadable(errors: list[UserError]) -> None:
    """Say in one line how many samples were left out, and why the first ones were."""
    more = "; ..." if len(errors) > _NAMED else ""
    reasons = "; ".join(map(str, errors[:_NAMED]))
    console.print(f"left out {len(errors)} unreadable samples: {reasons}{more}", soft_wrap=True)


@contextmanager
def simulated_drive(
    net: CrossViewModel,
    style: str,
    seed: int,
    frames: int,
    heading_known: bool,
    any_camera: bool = False,
) -> Iterator[tuple[Localizer, Iterator[tuple[Observation, tuple[float, float]]]]]:
    """Open a localizer on the map of city ``seed`` and drive through the city.

    Yields the localizer and the drive's observations, one a second, each with its true (lat, lon).
    ``any_camera``: random cameras see a part of each panorama. Raises UsageError on an unknown style.
    """
    import numpy as np

    from xview_loc.camera import CameraModel
    from xview_loc.datasets.random_cameras import random_view
    from xview_loc.datasets.simulated import rendered_view
    from xview_loc.estimation.localizer import Localizer
    from xview_loc.estimation.observation import Observation
    from xview_loc.simulation.city import build_city
    from xview_loc.simulation.drives import drive
    from xview_loc.simulation.styles import STYLES

    if style not in STYLES:
        raise UsageError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    city = build_city(seed, style)
    view, options = rendered_view(net.spec, any_camera)
    lens = net.spec.lens if any_camera else view.camera
    camera = lens if isinstance(lens, CameraModel) else None
    rng = np.random.default_rng(seed)

    def observations() -> Iterator[tuple[Observation, tuple[float, float]]]:
        for frame in drive(city, frames, options=options, view=view):
            if (image := frame.image) is not None:
                if any_camera:
                    image, _ = random_view(image, view.camera, lens, rng)
                fix, heading = frame.fix, frame.heading if heading_known else None
                known = heading, frame.heading_std
                observation = Observation(image, fix.lat, fix.lon, fix.covariance, *known, camera)
                yield observation, (frame.truth.lat, frame.truth.lon)

    prior = 0.0 if heading_known else None
    with tempfile.TemporaryDirectory() as folder:
        map_file = city.write_geotiff(Path(folder) / "city.tif")
        with Localizer.open(map_file, net, heading_prior_deg=prior) as localizer:
            yield localizer, observations()


def _print_benchmark(errors: PoseErrors, name: str, dataset: Benchmark, split: str, heading: Heading) -> None:
    figures = errors.summary()
    measures = _MEASURES[dataset]
    own = [(figures[f"{m}_m_mean"], figures[f"{m}_m_median"]) for m in measures]
    published = _PUBLISHED.get((dataset, heading), {})
    table = Table(title=f"{dataset.value} {split}, heading {heading.value}, metres")
    table.add_column("")
    for measure in measures:
        table.add_column(f"{measure} mean", justify="right")
        table.add_column("median", justify="right")
    for row, values in {name: own, **{f"{key} (published)": v for key, v in published.items()}}.items():
        table.add_row(row, *(f"{value:.2f}" for pair in values for value in pair))
    console.print(table)
    by_axis = {
        f"{name} in its 50 / 68 / 95 % interval": " / ".join(
            f"{figures[f'{name}_coverage_{percent}']:.1%}" for percent in (50, 68, 95)
        )
        for name in ("longitudinal", "lateral")
        if f"{name}_coverage_50" in figures
    }
    lines = {
        "samples": f"{figures['samples']}",
        "distance": f"mean {figures['distance_m_mean']:.2f} m, median {figures['distance_m_median']:.2f} m",
        "within 1 / 3 / 5 m": " / ".join(f"{errors.within(metres):.1%}" for metres in (1, 3, 5)),
        "in the 50 / 68 / 95 % ellipse": " / ".join(
            f"{errors.coverage(percent / 100):.1%}" for percent in (50, 68, 95)
        ),
        **by_axis,
        "negative log-likelihood": f"{figures['nll_mean']:.2f} nats, density per square metre",
        "encode / match, median": f"{figures['encode_ms_p50']:.0f} / {figures['match_ms_p50']:.0f} ms",
    }
    if "heading_deg_mean" in figures:
        mean, median = figures["heading_deg_mean"], figures["heading_deg_median"]
        lines["heading error"] = f"mean {mean:.2f} deg, median {median:.2f} deg"
    for key, line in lines.items():
        console.print(f"{key}: {line}", highlight=False, soft_wrap=True)


def _on_drives(net: CrossViewModel, style: str, cities: str, frames: int, heading: Heading) -> dict[str, Any]:
    """Print the errors on simulated drives and return them for the JSON file."""
    from xview_loc.datasets.simulated import parse_cities
    from xview_loc.evaluation.errors import DriveErrors, Errors, localize_drive

    drives = []
    for seed in track(parse_cities(cities), "cities", console=console, transient=True):
        with simulated_drive(net, style, seed, frames, heading is Heading.known) as (localizer, observations):
            drives.append(localize_drive(localizer, observations))
    drive = DriveErrors.joined(drives)
    table = Table(title=f"{net.spec.name}, {style} style, heading {heading.value}, metres")
    for column in ("", "frames", "mean", "median", "95 %"):
        table.add_column(column, justify="right" if column else "left")
    turned = net.spec.aerial_up == "left"
    parts = (drive.longitudinal, drive.lateral) if turned else None
    rows = {"coarse fix": Errors.of(drive.fix), "estimate": Errors.of(drive.estimate, parts)}
    for name, errors in rows.items():
        figures = (f"{value:.2f}" for value in (errors.mean, errors.median, errors.p95))
        table.add_row(name, str(errors.frames), *figures)
    console.print(table)
    shares = " / ".join(f"{drive.coverage(percent / 100):.1%}" for percent in (50, 68, 95))
    console.print(f"in the 50 / 68 / 95 % ellipse: {shares}; NEES {drive.nees:.1f} (honest: 2)")
    if turned:
        axes = zip(*(drive.coverage_by_axis(percent / 100) for percent in (50, 68, 95)), strict=True)
        errors = rows["estimate"]
        for name, covered in zip(("longitudinal", "lateral"), axes, strict=True):
            mean, median = (getattr(errors, f"{name}_{figure}") for figure in ("mean", "median"))
            shares = " / ".join(f"{share:.1%}" for share in covered)
            line = f"{name} error: mean {mean:.2f} m, median {median:.2f} m"
            console.print(f"{line}; in its 50 / 68 / 95 % interval: {shares}", soft_wrap=True)
    content: dict[str, Any] = {"style": style, "cities": cities}
    content |= {name.replace(" ", "_"): asdict(errors) for name, errors in rows.items()}
    metres = ("fix", "estimate", "longitudinal", "lateral")
    content |= {f"{name}_m": getattr(drive, name).tolist() for name in metres}
    sigmas = ("longitudinal_sigmas", "lateral_sigmas", "mahalanobis")
    content |= {name: getattr(drive, name).tolist() for name in sigmas}
    return content
