"""Measure the gain of adaptation in simulated cities of the target style: teacher, and students.

benchmarks/accuracy/adaptation.py [--model ccvpe-small] [--cities 700 701 702] [--headings known unknown]
    [--work DIR] [--json FILE]

Each city has one drive of 45 minutes, one frame per second. Pairs come from the streets on one side of a line
through the city, the held-out drive from those on the other side, 60 m apart. Results are kept in the work
folder, where an interrupted run continues. City and seed of the training change together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from xview_loc.adaptation.ablation import TABLE
from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.adaptation.labels import reliable
from xview_loc.adaptation.verdict import judge
from xview_loc.datasets.base import true_from_fix
from xview_loc.datasets.pairs import PairDataset
from xview_loc.maps import open_map
from xview_loc.models.checkpoint import Checkpoint, load_model
from xview_loc.models.specs import SPECS, ModelSpec
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.recordings.tracks import read_timed_track
from xview_loc.rig import Rig
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView
from xview_loc.statistics import bootstrap_means
from xview_loc.training.trainer import make_fabric
from xview_loc.vehicle.keyframes import KeyframeRule

# Side of the cities, and length of their drives, frames at 1 Hz.
CITY_M, FRAMES = 1500.0, 2700
# Pairs and held-out drive lie on opposite sides of a line at this easting.
LINE_M, GAP_M = 150.0, 60.0
# Large enough for both small models, which crop its middle.
TILES_FOR = SPECS["ggcvt-small"]
STYLE = "target"
# Standard deviation of the labels, pixels of the finest map: as in the training of the small models.
SIGMA = 2.0

Source = tuple[PairDataset, NDArray[np.float64]]


def make_pairs(seed: int, folder: Path, count: int = FRAMES) -> None:
    """Drive through a city; make bags of pairs of the larger side (``pairs``) and the other (``held``)."""
    if (folder / "held").exists():
        return
    city = build_city(seed, STYLE, size_m=CITY_M)
    folder.mkdir(parents=True, exist_ok=True)
    city.write_geotiff(folder / "city.tif")
    options = DriveOptions(rate_hz=1.0)
    frames = list(drive(city, count, seed, options=options, view=PanoramaView(64, 256)))
    sides = [
        [f for f in frames if f.truth.east < LINE_M - GAP_M],
        [f for f in frames if f.truth.east > LINE_M],
    ]
    sides.sort(key=len, reverse=True)
    for name, part in zip(("pairs", "held"), sides, strict=True):
        write_drive(part, folder / f"{name}-drive")
        pair_drive(folder, name)


def pair_drive(
    folder: Path,
    name: str,
    spec: ModelSpec = TILES_FOR,
    rig: Rig | None = None,
    *,
    drive: str = "",
    use_heading: bool = True,
) -> None:
    """Make a bag of pairs, with tiles for ``spec``, of a drive recorded in the city of ``folder``.

    ``drive`` is its name, by default that of the pairs.
    """
    topics = {"fix": "/fix", "odom": "/odom"} | ({"heading": "/heading"} if use_heading else {})
    keyframes = KeyframeRule(distance_m=4.0)
    options = ImportOptions(topics=topics, use_heading=use_heading, keyframes=keyframes, spec=spec)
    if rig is None:
        options = replace(options, topics={**topics, "image": "/image"})
    else:
        options = replace(options, cameras=("all",), imu="/imu")
    with open_map(str(folder / "city.tif")) as aerial:
        import_bag(folder / f"{drive or name}-drive", folder / name, aerial, options, lambda share: None)


def write_drive(frames: Iterable[Frame], folder: Path, rig: Rig | None = None) -> None:
    """Write a bag of a drive."""
    if folder.exists():
        shutil.rmtree(folder)  # of an interrupted run
    write_bag(frames, folder, rig=rig)


def open_pairs(folder: Path, name: str, spec: ModelSpec, drive: str = "") -> Source:
    """Open a bag of pairs of a drive, with the metres from coarse fixes to true places."""
    source = PairDataset([folder / name], spec)
    track = source.track()
    truth = read_timed_track(folder / f"{drive or name}-drive", "/truth/fix")
    return source, true_from_fix(track, *truth.at(track.stamp_ns))


class Rates:
    """Pairs per second of each stage, without the part done by an earlier run."""

    def __init__(self, batch_size: int) -> None:
        self.per_second: dict[str, float] = {}
        self._batch = batch_size
        self._since: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        start, first = self._since.setdefault(stage, (time.perf_counter(), done))
        elapsed = time.perf_counter() - start
        if done > first and elapsed > 0.1:
            each = self._batch if stage.endswith("student") else 1
            self.per_second[stage] = (done - first) * each / elapsed


def adapt_once(teacher: Checkpoint, folder: Path, seed: int, heading: str) -> dict[str, Any]:
    """Return all four rows of a city, with errors on its held-out drive."""
    spec = teacher.model.spec
    pairs, truth = open_pairs(folder, "pairs", spec)
    held = open_pairs(folder, "held", spec)
    prior = 0.0 if heading == "known" else None
    options = AdaptationOptions.published(teacher.model, sigma=SIGMA, seed=seed, heading_prior_deg=prior)
    rates = Rates(options.training.batch_size)
    run = Distillation(
        make_fabric("cpu"),
        teacher,
        pairs,
        folder / spec.name,
        options,
        true_from_fix=truth,
        on_progress=rates,
    )
    labels = run.teacher_labels()
    start = time.perf_counter()
    levels, keep, _ = run.recipe(smoothed=False)
    auxiliary = run.student(labels, run.loss(levels), "auxiliary student")
    kept = reliable(labels, run.labels_of(auxiliary.load(), "auxiliary labels").of(labels.index), keep)
    student = run.student(labels.rows(kept), run.loss(levels), "student")
    seconds = time.perf_counter() - start
    heat = run.student(labels, run.loss(levels, False), "heat-map student")
    models = (teacher, heat.load(), auxiliary.load(), student.load())
    errors = {
        name: run.labels_of(model, "test", held[0]).errors_m(held[1])
        for name, model in zip(TABLE, models, strict=True)
    }
    before, after = (run.indicators(run.held_out_labels(model)) for model in (teacher, models[3]))
    label_errors = run.true_errors_m(labels)
    change = errors["Student+M+OF"] - errors["Teacher"]
    return {
        "pairs": len(pairs),
        "held": len(held[0]),
        "errors": {name: e.tolist() for name, e in errors.items()},
        "change_95": np.quantile(bootstrap_means(change), [0.025, 0.975]).tolist(),
        "label_error_kept_and_left_out": [float(label_errors[k].mean()) for k in (kept, ~kept)],
        "histories": [run.history(s) for s in (auxiliary, student, heat)],
        "verdict": asdict(judge(before, after)),
        "per_second": rates.per_second,
        "training_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--cities", type=int, nargs="+", default=(700, 701, 702))
    parser.add_argument("--headings", nargs="+", default=("known", "unknown"))
    parser.add_argument("--work", type=Path, default=Path("adaptation_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    teacher = load_model(arguments.model, arguments.checkpoint)
    results: dict[str, dict[str, Any]] = {}
    for heading in arguments.headings:
        table = Table(title=f"{arguments.model}, heading {heading}: mean / median error, m")
        for column in ("city", "pairs / held", *TABLE, "change of the mean", "deploy"):
            table.add_column(column)
        for seed, city in enumerate(arguments.cities):
            folder = arguments.work / f"{STYLE}-{city}"
            make_pairs(city, folder)
            result = adapt_once(teacher, folder, seed, heading)
            results[f"{city} {heading}"] = result
            means = {name: float(np.mean(e)) for name, e in result["errors"].items()}
            medians = {name: float(np.median(e)) for name, e in result["errors"].items()}
            gain = means["Student+M+OF"] / means["Teacher"] - 1
            table.add_row(
                str(city),
                f"{result['pairs']} / {result['held']}",
                *(f"{means[name]:.2f} / {medians[name]:.2f}" for name in TABLE),
                f"{gain:+.0%}",
                "yes" if result["verdict"]["deploy"] else "no",
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
        console.print(table)
    console.print({name: r["per_second"] for name, r in results.items()})


if __name__ == "__main__":
    main()
