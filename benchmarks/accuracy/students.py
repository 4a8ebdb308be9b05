"""Compare students of labels smoothed along whole drives with the paper's recipe and with true positions.

benchmarks/accuracy/students.py [--model ccvpe-small] [--styles target validation varied] [--seeds 0 1 2]
    [--rows paper smoothed rounds oracle ...] [--work DIR] [--json FILE]

Each cell is a city, 1500 m wide, of a style and seed that no model was trained on: ``target`` and
``validation`` are the simulation's styles, ``varied`` strays from the target style as far as training cities
do from theirs. Pairs come from a drive through its western part, errors from one through its eastern part,
60 m apart. All students start as copies of the teacher and take the same number of steps: if labels are left
out, some of the others are repeated.

Models for pinhole cameras get a front camera of 90 degrees on a vehicle that tilts, others a panorama camera.

Rows: ``teacher``; ``paper``, filtered maxima, the first K' levels; ``smoothed``, labels from whole drives,
all levels; ``rounds``, the smoothed student labels the pairs again; ``oracle``, true positions, all levels;
then smoothed labels with inputs degraded as in ``smoothing.py``; ``no heading``, pairs of the same drive
without measured headings, which odometry and fixes replace. Jumping fixes have their own tiles, and therefore
their own rows of teacher and paper. Results are kept in the work folder, where an interrupted run
continues.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from adaptation import CITY_M, SIGMA, TILES_FOR, Source, open_pairs, pair_drive, write_drive
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from smoothing import CASES, FAR_M, label, make_jumping_pairs

from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.adaptation.labels import PseudoLabels, reliable
from xview_loc.adaptation.smoothing import smooth
from xview_loc.models.checkpoint import Checkpoint, load_model
from xview_loc.models.specs import ModelSpec
from xview_loc.rig import Rig
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import Area, DriveOptions, drive
from xview_loc.simulation.rigs import make_rig
from xview_loc.simulation.styles import STYLES, Style, vary
from xview_loc.simulation.views import PanoramaView
from xview_loc.statistics import bootstrap_means
from xview_loc.training.trainer import make_fabric

# Errors in metres of "labels" and "student"; if tiles are turned, of the student "along" and "across" too.
Row = dict[str, list[float]]
# First city of each style; the seed is added.
CITIES = {"target": 820, "validation": 830, "varied": 840}
_HALF = CITY_M / 2
AREAS: dict[str, tuple[Area, int]] = {
    "pairs": ((-_HALF, -_HALF, 120.0, _HALF), 1100),
    "held": ((180.0, -_HALF, _HALF, _HALF), 450),
}
ROWS = (
    *("paper", "smoothed", "rounds", "oracle", "no odometry", "scale, drift", "gaps", "short"),
    *("no heading", "jumps"),
)
# Rows that have pairs of their own, and the rows of these.
OWN_PAIRS = {"jumps": ("paper", "smoothed"), "no heading": ("smoothed",)}


def make_cell(style: str, city_seed: int, folder: Path, spec: ModelSpec) -> None:
    """Make bags of pairs of both drives through a city, for a model."""
    if (folder / "held").exists():
        return
    look: Style | str = style
    if style == "varied":
        look = vary(STYLES["target"], np.random.default_rng(city_seed), 1.0)
    city = build_city(city_seed, look, size_m=CITY_M)
    folder.mkdir(parents=True, exist_ok=True)
    city.write_geotiff(folder / "city.tif")
    options = DriveOptions(rate_hz=1.0)
    tiles_for, rig = _setup(spec)
    for name, (area, frames) in AREAS.items():
        seen = drive(city, frames, city_seed, options=options, view=rig or PanoramaView(64, 256), area=area)
        write_drive(seen, folder / f"{name}-drive", rig)
        pair_drive(folder, name, tiles_for, rig)


def _setup(spec: ModelSpec) -> tuple[ModelSpec, Rig | None]:
    """Return what the tiles of a model's pairs are cut for, and its vehicle's rig."""
    if spec.camera == "panorama":
        return TILES_FOR, None
    # Half the size of its images: more than the models see.
    return spec, make_rig("one", 0.5)


class Cell:
    """A teacher and its students, tested on held-out pairs; stages are kept in a folder."""

    def __init__(self, teacher: Checkpoint, pairs: Source, held: Source, folder: Path, seed: int) -> None:
        # All rows on panoramas as they are labelled, so that they differ in their labels alone.
        options = AdaptationOptions.published(teacher.model, turned=False, sigma=SIGMA, seed=seed)
        self._run = Distillation(make_fabric("cpu"), teacher, pairs[0], folder, options)
        self._teacher, self._pairs, self._held, self._folder = teacher, pairs, held, folder
        self._truth = pairs[1]
        self._plain = label(teacher, pairs, folder, 0.0)
        self._maxima = self._own(self._plain.labels)

    def row(self, name: str) -> Row:
        """Return the errors of the labels, and of the student on the held-out pairs."""
        labels, student = self._maxima, self._teacher
        if name != "teacher":
            labels, student = self._paper() if name == "paper" else self._of_drives(name)
        source, truth = self._held
        found = self._run.labels_of(student, "", source)
        row = {"labels": labels.errors_m(self._truth).tolist(), "student": found.errors_m(truth).tolist()}
        if self._teacher.model.spec.aerial_up == "left":
            along, across = np.abs(found.errors_on_tile_m(truth)).T.tolist()
            row |= {"along": along, "across": across}
        return row

    def _paper(self) -> tuple[PseudoLabels, Checkpoint]:
        recipe = self._run.recipe(smoothed=False)
        auxiliary = self._student(self._maxima, recipe.levels)
        others = self._run.labels_of(auxiliary, "").of(self._maxima.index)
        kept = self._maxima.rows(reliable(self._maxima, others, recipe.keep))
        return kept, self._student(kept, recipe.levels)

    def _of_drives(self, name: str) -> tuple[PseudoLabels, Checkpoint]:
        if name == "oracle":
            labels = self._true_labels()
        else:
            case = self._plain
            if name == "rounds":
                first = self._of_drives("smoothed")[1]
                case = label(first, self._pairs, self._folder, 0.0)
            elif name in CASES:
                case = CASES[name](case)
            labels = self._own(smooth(case.track, case.labels, case.heat_maps).labels(case.labels))
        return labels, self._student(labels, self._run.recipe(smoothed=True).levels)

    def _true_labels(self) -> PseudoLabels:
        labels = self._maxima
        position = labels.at(self._truth[labels.index])
        model = self._teacher.model
        cell = (position - model.grid.origin) / model.grid.scale
        on_map = ((cell >= -0.5) & (cell <= model.map_size - 0.5)).all(1)
        return replace(labels, position=position).rows(on_map)

    def _own(self, labels: PseudoLabels) -> PseudoLabels:
        """Return the labels to train on; the others choose the epoch."""
        return labels.of(self._run.training_index)

    def _student(self, labels: PseudoLabels, levels: int) -> Checkpoint:
        missing = len(self._maxima) - len(labels)
        again = np.random.default_rng(0).integers(0, len(labels), missing)
        filled = labels.rows(np.sort(np.concatenate([np.arange(len(labels)), again])))
        return self._run.student(filled, self._run.loss(levels), "").load()


def summary(results: dict[str, dict[str, Row]], console: Console) -> None:
    """Print the tables of all cells."""
    title = "mean / median / > 10 m; of students also along, across the road; gain over the teacher"
    table = Table(title=title)
    for column in ("cell", "row", "labels", "students", "gain, 95 %", "against the paper, 95 %"):
        table.add_column(column, no_wrap=True)
    for cell, rows in results.items():
        students = {name: np.array(row["student"]) for name, row in rows.items()}
        for number, (name, row) in enumerate(rows.items(), start=1):
            table.add_row(
                cell if number == 1 else "",
                name,
                _text(row["labels"]),
                _text(row["student"]) + _parts(row),
                "" if name == "teacher" else _change(students["teacher"] - students[name]),
                "" if "paper" not in rows else _change(students["paper"] - students[name]),
                end_section=number == len(rows),
            )
    console.print(table)
    means = {cell: {n: np.mean(row["student"]) for n, row in rows.items()} for cell, rows in results.items()}
    for name in dict.fromkeys(name for rows in results.values() for name in rows):
        both = [m for m in means.values() if {name, "paper"} <= set(m)]
        if not both:
            continue
        bounded = [m for m in both if "oracle" in m]
        line = f"{name}: {len(both)} cells, mean {np.mean([m[name] for m in both]):.2f} m"
        for other, cells in (("paper", both), ("oracle", bounded)):
            gains, others = (sum(m["teacher"] - m[n] for m in cells) for n in (name, other))
            line += f", {gains / others:.2f} times the gain of the {other}" if cells else ""
        console.print(line)


def _text(errors: list[float]) -> str:
    far = np.mean(np.array(errors) > FAR_M)
    return f"{np.mean(errors):.2f} / {np.median(errors):.2f} / {far:.1%}"


def _parts(row: Row) -> str:
    """Return mean and median errors along and across the road, where these are known."""
    parts = (np.array(row[part]) for part in ("along", "across") if part in row)
    return "".join(f"; {part.mean():.2f} / {np.median(part):.2f}" for part in parts)


def _change(better: NDArray[np.float64]) -> str:
    low, high = np.quantile(bootstrap_means(better), [0.025, 0.975])
    return f"{better.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--styles", nargs="+", choices=tuple(CITIES), default=tuple(CITIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--work", type=Path, default=Path("students_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    console = Console(width=180)
    teacher = load_model(arguments.model)
    results: dict[str, dict[str, Row]] = {}
    for seed in arguments.seeds:
        for style in arguments.styles:
            camera = "-pinhole" if teacher.model.spec.camera == "pinhole" else ""
            folder = arguments.work / f"{style}-{CITIES[style] + seed}{camera}"
            make_cell(style, CITIES[style] + seed, folder, teacher.model.spec)
            wanted = {"pairs": tuple(row for row in arguments.rows if row not in OWN_PAIRS)}
            wanted |= {row: OWN_PAIRS[row] for row in arguments.rows if row in OWN_PAIRS}
            for pairs, rows in wanted.items():
                spec = teacher.model.spec
                if pairs == "jumps":
                    make_jumping_pairs(folder)
                if pairs == "no heading" and not (folder / pairs).exists():
                    how: dict[str, Any] = {"drive": "pairs", "use_heading": False}
                    pair_drive(folder, pairs, *_setup(spec), **how)
                held = open_pairs(folder, "held", spec)
                source = open_pairs(folder, pairs, spec, "" if pairs == "jumps" else "pairs")
                cell = Cell(teacher, source, held, folder / spec.name, seed)
                name = folder.name + ("" if pairs == "pairs" else f", {pairs}")
                for row in ("teacher", *rows):
                    results.setdefault(name, {})[row] = cell.row(row)
                    console.print(name, row, *map(_text, results[name][row].values()))
                    if arguments.json:
                        arguments.json.write_text(json.dumps(results))
    summary(results, console)


if __name__ == "__main__":
    main()
