"""Measure what each part of smoothing contributes: the errors of labels without it.

benchmarks/accuracy/smoothing_parts.py [--model ccvpe-small] [--cities 810 811 812] [--frames 1300]
    [--cases plain "no odometry" short] [--work DIR]

Pairs, errors and cases as in ``benchmarks/accuracy/smoothing.py``, whose work folder it shares.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
from adaptation import STYLE, make_pairs, open_pairs
from rich.console import Console
from rich.table import Table
from smoothing import CASES, Labelled, label

from xview_loc.adaptation import smoothing as sequence
from xview_loc.adaptation.motion import Steps, odometry_gain
from xview_loc.adaptation.smoothing import Likelihood, smooth
from xview_loc.estimation.belief import BeliefGrid
from xview_loc.models.checkpoint import load_model

Array = Any


def _forwards(
    corners: Array, steps: Steps, likelihood: Likelihood, cells: int, cell_m: float
) -> Iterator[tuple[int, BeliefGrid]]:
    """Yield the belief of each pair from the pairs before it, as the filter on the vehicle would."""
    belief: BeliefGrid | None = None
    for k in range(len(corners)):
        if belief is None or not steps.linked[k]:
            flat = np.full((cells, cells), cells**-2, np.float32)
            belief = BeliefGrid(flat, corners[k], cell_m)
        else:
            belief.multiply(likelihood(k - 1, belief))
            belief.move(steps.mean[k], float(steps.variance[k]), corners[k])
            belief.blend(sequence._LOST)
        yield k, BeliefGrid(belief.probability.copy(), belief.corner, cell_m)


@contextmanager
def _constant(name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(sequence, name, value):
        yield


def _fitted_to_fixes() -> Callable[..., Array]:
    """Return a function that keeps the gain of the first pass for the second."""
    gains: list[Array] = []

    def gain(*arguments: Any) -> Array:
        gains.append(gains[0] if gains else odometry_gain(*arguments))
        return gains[-1]

    return gain


PARTS: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "pairs after it": lambda: _constant("smoothed_beliefs", _forwards),
    "outlier floor": lambda: _constant("_OUTLIER", 1e-6),
    "correlation of near maps": lambda: _constant("_DECORRELATION_M", 1e-6),
    "fixes": lambda: _constant("_MIN_LIKELIHOOD", np.float32(1.0)),
    "odometry may be all wrong": lambda: _constant("_LOST", 1e-12),
    "fit of odometry": lambda: _constant(
        "odometry_gain", lambda track, *_: np.ones(len(track.moved), complex)
    ),
    "fit to heat maps": lambda: _constant("odometry_gain", _fitted_to_fixes()),
    "densest place": lambda: _constant("_summary", lambda belief: (belief.mean, belief.covariance)),
}


def _errors(case: Labelled) -> Array:
    smoothed = smooth(case.track, case.labels, case.heat_maps)
    return replace(case.labels, position=smoothed.position).errors_m(case.truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--cities", type=int, nargs="+", default=(810, 811, 812))
    parser.add_argument("--frames", type=int, default=1300)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=("plain", "no odometry", "short"))
    parser.add_argument("--work", type=Path, default=Path("sequence_benchmark"))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    teacher = load_model(arguments.model)
    found: dict[tuple[str, str], list[Array]] = {}
    for city in arguments.cities:
        folder = arguments.work / f"{STYLE}-{city}"
        make_pairs(city, folder, arguments.frames)
        pairs = open_pairs(folder, "pairs", teacher.model.spec)
        plain = label(teacher, pairs, folder / "smoothing", 0.0)
        for case in arguments.cases:
            labelled = CASES[case](plain)
            for part, without in PARTS.items():
                with without():
                    found.setdefault((part, case), []).append(_errors(labelled))
    table = Table(title="label errors: mean, m / share > 10 m, mean over the cities")
    for column in ("without", *arguments.cases):
        table.add_column(column, no_wrap=True)
    for part in PARTS:
        cells = []
        for case in arguments.cases:
            errors = found[part, case]
            far = np.mean([(e > 10.0).mean() for e in errors])
            cells.append(f"{np.mean([e.mean() for e in errors]):.2f} / {far:.1%}")
        table.add_row(part, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
