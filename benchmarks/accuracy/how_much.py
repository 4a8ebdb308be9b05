"""How much must be driven, where does a student help, and what does it forget?

benchmarks/accuracy/how_much.py [--cities 860 861 862] [--seeds 0 1] [--pairs 50 100 200 500 1000 2000 4000]
    [--rows curve replay together] [--work DIR] [--json FILE]

Cities of the target style, 1500 m wide, of which nothing was trained or chosen. ``curve``: students of the
first pairs of one long drive through the western streets, by the recipe that ``adapt`` chooses. ``replay``:
the first thousand, and as many pairs of the source cities that the teacher was trained on. ``together``: one
student of all cities at once, with all their pairs. Every student starts as the teacher and takes three
epochs. Errors (mean / median) on a drive through the eastern streets, 60 m away from the west and more, by
distance from the nearest training pair, and in source cities that the teacher has never seen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from adaptation import CITY_M, SIGMA, open_pairs, pair_drive, write_drive
from rich.console import Console
from rich.table import Table

from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.datasets import open_dataset
from xview_loc.datasets.base import PairSample, PairSource, PoseDataset, Track
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection
from xview_loc.models.checkpoint import Checkpoint, load_model
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import Area, DriveOptions, drive
from xview_loc.simulation.views import PanoramaView
from xview_loc.training.trainer import make_fabric

HALF = CITY_M / 2
WEST: Area = (-HALF, -HALF, 120.0, HALF)
EAST: Area = (180.0, -HALF, HALF, HALF)
# Cities that the teacher was trained on, and others of their style.
REPLAYED, SOURCE = "simulated:source:0-3:250", "simulated:source:980-983:100"
# Distances from the nearest training pair, metres.
EDGES = (0.0, 150.0, 300.0, 450.0, np.inf)


def make_city(number: int, frames: int, folder: Path) -> None:
    """Make bags of pairs of both drives through a city."""
    if (folder / "held").exists():
        return
    city = build_city(number, "target", size_m=CITY_M)
    folder.mkdir(parents=True, exist_ok=True)
    city.write_geotiff(folder / "city.tif")
    for name, area, count in (("pairs", WEST, frames), ("held", EAST, 450)):
        options, view = DriveOptions(rate_hz=1.0), PanoramaView(64, 256)
        write_drive(
            drive(city, count, number, options=options, view=view, area=area), folder / f"{name}-drive"
        )
        pair_drive(folder, name)


class First(PairSource):
    """The first pairs of a source."""

    def __init__(self, source: PairSource, count: int) -> None:
        self.name = f"{source.name} first {count}"
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> PairSample:
        return self._source[index]

    def track(self) -> Track:
        track = self._source.track()
        assert track is not None
        return track.rows(np.arange(self._count))


@dataclass(frozen=True)
class Row:
    """A student's errors on a held-out drive and in source cities, metres.

    ``distance``: of each held-out frame from the nearest training pair, metres.
    """

    city: str
    seed: int
    row: str
    pairs: int
    km: float
    held: list[float]
    distance: list[float]
    source: list[float]


class Benchmark:
    """Cities, the teacher, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self._work, self._console, self._json = arguments.work, console, arguments.json
        self._teacher = load_model(arguments.model)
        spec, reach = self._teacher.model.spec, self._teacher.model.half_extent_m
        self._folders = {city: self._work / str(city) for city in arguments.cities}
        for city, folder in self._folders.items():
            make_city(city, arguments.frames, folder)
        self._held = {city: open_pairs(folder, "held", spec) for city, folder in self._folders.items()}
        self._poses = {name: open_dataset(name, spec, half_extent_m=reach) for name in (REPLAYED, SOURCE)}
        self.rows: list[Row] = []

    def pairs(self, cities: list[int]) -> PairDataset:
        """Open the pairs of cities."""
        return PairDataset([self._folders[city] / "pairs" for city in cities], self._teacher.model.spec)

    def teacher(self, city: int) -> None:
        """Add the teacher's row."""
        source = self.pairs([city])
        run = self._run(source, self._folders[city] / "out", 0)
        self._add(run, self._teacher, city, 0, "teacher")

    def student(
        self, row: str, source: PairSource, cities: list[int], seed: int, replay: PoseDataset | None = None
    ) -> None:
        """Train a student, and add its row for each of the cities."""
        out = self._work / ("together" if len(cities) > 1 else f"{cities[0]}/out")
        run = self._run(source, out, seed, replay)
        model = run.run().student.load()
        for city in cities:
            self._add(run, model, city, seed, row)

    def replayed(self) -> PoseDataset:
        """Return the pairs of source cities that are replayed."""
        return self._poses[REPLAYED]

    def _run(
        self, source: PairSource, out: Path, seed: int, replay: PoseDataset | None = None
    ) -> Distillation:
        given: dict[str, Any] = {"smooth": None, "rounds": None, "sigma": SIGMA, "seed": seed}
        options = AdaptationOptions.published(self._teacher.model, **given)
        return Distillation(make_fabric("cpu"), self._teacher, source, out, options, replay=replay)

    def _add(self, run: Distillation, model: Checkpoint, city: int, seed: int, row: str) -> None:
        held, truth = self._held[city]
        source = self._poses[SOURCE]
        errors = run.labels_of(model, "", held).errors_m(truth)
        in_source = run.labels_of(model, "", source).errors_m(source.true_from_fix())
        track, away = run.track, held.track()
        assert track is not None and away is not None
        plane = LocalProjection(float(away.lat.mean()), float(away.lon.mean()))
        seen, tested = (np.stack(plane.forward(t.lat, t.lon), 1) for t in (track, away))
        distance = [float(np.hypot(*(seen - place).T).min()) for place in tested]
        km = float(np.nansum(np.hypot(*track.moved.T)) / 1000.0)
        new = (str(city), seed, row, len(track.lat), km)
        self.rows.append(Row(*new, errors.tolist(), distance, in_source.tolist()))
        self._console.print(*new[:5], _text(errors), "source", _text(in_source))
        if self._json:
            self._json.write_text(json.dumps([asdict(one) for one in self.rows]))


def _text(errors: Any) -> str:
    return f"{np.mean(errors):.2f} / {np.median(errors):.2f}" if len(errors) else ""


def summary(rows: list[Row], console: Console) -> None:
    """Print the means over cities and seeds, with 95 % intervals over the cells."""
    table = Table(title="mean over cells (95 % interval); mean / median, metres")
    for column in ("row", "pairs", "km", "held out: mean", "median", *map(str, EDGES[1:]), "source"):
        table.add_column(column)
    rng = np.random.default_rng(0)
    for name in dict.fromkeys(row.row for row in rows):
        cells = [row for row in rows if row.row == name]
        means = np.array([np.mean(row.held) for row in cells])
        draws = means[rng.integers(0, len(means), (2000, len(means)))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        errors, distance = (np.concatenate([getattr(r, f) for r in cells]) for f in ("held", "distance"))
        classes = [_text(errors[(distance >= a) & (distance < b)]) for a, b in pairwise(EDGES)]
        table.add_row(
            name,
            f"{np.mean([row.pairs for row in cells]):.0f}",
            f"{np.mean([row.km for row in cells]):.1f}",
            f"{means.mean():.2f} ({low:.2f} to {high:.2f})",
            f"{np.mean([np.median(row.held) for row in cells]):.2f}",
            *classes,
            _text(np.concatenate([row.source for row in cells])),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--cities", type=int, nargs="+", default=(860, 861, 862))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--pairs", type=int, nargs="+", default=(50, 100, 200, 500, 1000, 2000, 4000))
    parser.add_argument("--frames", type=int, default=4400, help="length of the long drives, one a second")
    parser.add_argument("--rows", nargs="+", default=("curve", "replay", "together"))
    parser.add_argument("--work", type=Path, default=Path("how_much_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    console = Console(width=180)
    benchmark = Benchmark(arguments, console)
    for city in arguments.cities:
        benchmark.teacher(city)
    for seed in arguments.seeds:
        for city in arguments.cities:
            whole = benchmark.pairs([city])
            for count in arguments.pairs if "curve" in arguments.rows else ():
                benchmark.student(f"{count} pairs", First(whole, count), [city], seed)
            if "replay" in arguments.rows:
                source = First(whole, 1000)
                benchmark.student("1000 pairs, replay", source, [city], seed, benchmark.replayed())
        if "together" in arguments.rows:
            benchmark.student(
                "all cities together", benchmark.pairs(arguments.cities), arguments.cities, seed
            )
    summary(benchmark.rows, console)


if __name__ == "__main__":
    main()
