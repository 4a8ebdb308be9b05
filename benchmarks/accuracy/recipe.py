"""Measure what turned panoramas and drop-connect add to the published recipe, in simulated cities.

benchmarks/accuracy/recipe.py [--model ccvpe-small] [--cities 700 701 702] [--work DIR] [--json FILE]

Pairs and held-out drives are those of ``adaptation.py``. Labels are the teacher's with known heading. Every
student, of all labels (+M-OF) and of the filtered ones (+M+OF), is evaluated with known and unknown heading.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from adaptation import SIGMA, STYLE, make_pairs, open_pairs
from rich.console import Console
from rich.table import Table

from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.adaptation.labels import reliable
from xview_loc.models.checkpoint import Checkpoint, load_model
from xview_loc.training.trainer import make_fabric

# Name: (panoramas are turned, drop-connect).
RECIPES = {
    "neither": (False, False),
    "drop-connect": (False, True),
    "turned": (True, False),
    "both (published)": (True, True),
}
MODELS = ("Teacher", "Student+M-OF", "Student+M+OF")
Errors = dict[str, dict[str, list[float]]]


def run_recipe(teacher: Checkpoint, folder: Path, seed: int, turned: bool, drop_connect: bool) -> Errors:
    """Return each model's errors on the held-out drive, m, with known and unknown heading."""
    spec = teacher.model.spec
    if not drop_connect:
        model = copy.deepcopy(teacher.model)
        for module in model.modules():
            if hasattr(module, "drop_connect_rate"):
                module.drop_connect_rate = 0.0
        teacher = replace(teacher, model=model)
    pairs, truth = open_pairs(folder, "pairs", spec)
    held, held_truth = open_pairs(folder, "held", spec)
    options = AdaptationOptions.published(teacher.model, turned=turned, sigma=SIGMA, seed=seed)
    # Stages are named by their inputs; drop-connect is not among them.
    work = folder / f"{spec.name}-recipe{'' if drop_connect else '-without-drop-connect'}"
    run, blind = (
        Distillation(make_fabric("cpu"), teacher, pairs, work, chosen, true_from_fix=truth)
        for chosen in (options, replace(options, heading_prior_deg=None))
    )
    labels = run.teacher_labels()
    levels, keep, _ = run.recipe(smoothed=False)
    auxiliary = run.student(labels, run.loss(levels), "auxiliary student")
    kept = reliable(labels, run.labels_of(auxiliary.load(), "auxiliary labels").of(labels.index), keep)
    student = run.student(labels.rows(kept), run.loss(levels), "student")
    models = zip(MODELS, (teacher, auxiliary.load(), student.load()), strict=True)
    return {
        name: {
            heading: way.labels_of(model, "test", held).errors_m(held_truth).tolist()
            for heading, way in (("known", run), ("unknown", blind))
        }
        for name, model in models
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--cities", type=int, nargs="+", default=(700, 701, 702))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path("adaptation_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    teacher = load_model(arguments.model, arguments.checkpoint)
    table = Table(title=f"{arguments.model}: mean / median error, m, with known and unknown heading")
    for column in ("city", "recipe", *(f"{name}, {h}" for name in MODELS for h in ("known", "unknown"))):
        table.add_column(column)
    results: dict[str, Errors] = {}
    for seed, city in enumerate(arguments.cities):
        folder = arguments.work / f"{STYLE}-{city}"
        make_pairs(city, folder)
        for recipe in arguments.recipes:
            errors = run_recipe(teacher, folder, seed, *RECIPES[recipe])
            results[f"{city} {recipe}"] = errors
            cells = [values for name in MODELS for values in errors[name].values()]
            table.add_row(str(city), recipe, *(f"{np.mean(e):.2f} / {np.median(e):.2f}" for e in cells))
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
