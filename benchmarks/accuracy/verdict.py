"""How often does ``adapt`` deploy a student that is worse than its teacher, or refuse a better one?

benchmarks/accuracy/verdict.py [--styles target validation varied] [--seeds 5 6] [--cases drives paper ...]
    [--pairs 660] [--work DIR] [--json FILE]

Each cell is a city and style of ``students.py``: pairs come from its western streets, true errors from its
eastern ones. Students of good pairs (``drives``, ``paper``), too few of them (``few``), trained too hard
(``hard``: ten times the learning rate, six epochs), and of faulty ones: tiles of other places (``shuffled
tiles``), headings with the wrong sign (``sign``) or 40 degrees off (``turned``), odometry out of order
(``odometry``), images of three pairs later (``late``). Faulty pairs are to be named; that a better student of
theirs is refused counts as no error. ``worse`` and ``better``: by the true mean error, with 95 % certainty
(bootstrap over stretches of ten frames). Students are kept in the work folder, where a changed verdict can be
measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from adaptation import SIGMA, TILES_FOR, Source, open_pairs
from rich.console import Console
from rich.table import Table
from students import CITIES, make_cell

from xview_loc.adaptation.data_check import check_data
from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.adaptation.report import write_results
from xview_loc.datasets.base import PairSample, PairSource, Track
from xview_loc.datasets.pairs import PairDataset
from xview_loc.maps import open_map
from xview_loc.models.checkpoint import Checkpoint, load_model
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.statistics import SIGNIFICANT, certainty_of_decrease
from xview_loc.training.trainer import make_fabric
from xview_loc.vehicle.keyframes import KeyframeRule
from xview_loc.vehicle.messages import HeadingConvention

Change = Callable[[PairSource, int], PairSample]
# Options of the runs, by case; one epoch unless said otherwise.
CASES: dict[str, dict[str, Any]] = {
    "drives": {},
    "paper": {"smooth": False},
    "few": {"smooth": False, "held_out": 0.4},
    "hard": {"epochs": 6, "learning_rate": 1e-3},
    "shuffled tiles": {},
    "sign": {},
    "turned": {},
    "odometry": {},
    "late": {},
}
# Cases of pairs without a fault.
SOUND = ("drives", "paper", "few", "hard")
FEW = 160
HEADINGS = {"sign": HeadingConvention(clockwise=True), "turned": HeadingConvention(offset=math.radians(40.0))}


class Changed(PairSource):
    """The first pairs of a source, changed."""

    def __init__(self, source: PairSource, case: str, count: int) -> None:
        # Cases that differ in their training alone share their labels.
        change = case if case in ("shuffled tiles", "odometry", "late") else ""
        self.name = f"{source.name} {change} {count}"
        self._source, self._case, self._count = source, case, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> PairSample:
        sample = self._source[index]
        if self._case == "shuffled tiles":
            sample["aerial"] = self._source[(index * 7919 + self._count // 3) % self._count]["aerial"]
        if self._case == "late":
            sample["ground"] = self._source[min(index + 3, self._count - 1)]["ground"]
        return sample

    def track(self) -> Track | None:
        track = self._source.track()
        assert track is not None
        track = track.rows(np.arange(self._count))
        return replace(track, moved=track.moved[::-1].copy()) if self._case == "odometry" else track

    def input_faults(self) -> list[str]:
        return self._source.input_faults()


@dataclass(frozen=True)
class Outcome:
    """How a student was judged, and its true errors beside the teacher's, metres.

    ``score_change``: of the label-free score of the verdict, mean and 95 % interval.
    """

    cell: str
    case: str
    deployed: bool
    faults: list[str]
    remarks: list[str]
    teacher_m: float
    student_m: float
    certainly_better: float
    score_change: tuple[float, float, float]

    @property
    def truth(self) -> str:
        """Say what the student is in truth."""
        if self.certainly_better >= SIGNIFICANT:
            return "better"
        return "worse" if self.certainly_better <= 1.0 - SIGNIFICANT else "equal"


def open_case(folder: Path, case: str, teacher: Checkpoint, count: int) -> PairSource:
    """Open the pairs of a case; those with other headings are made first."""
    name = case if case in HEADINGS else "pairs"
    if not (folder / name).exists():
        topics = {"fix": "/fix", "odom": "/odom", "heading": "/heading", "image": "/image"}
        options = ImportOptions(
            topics=topics, heading=HEADINGS[case], keyframes=KeyframeRule(distance_m=4.0), spec=TILES_FOR
        )
        with open_map(str(folder / "city.tif")) as aerial:
            import_bag(folder / "pairs-drive", folder / name, aerial, options, lambda share: None)
    source = PairDataset([folder / name], teacher.model.spec)
    return Changed(source, case, FEW if case == "few" else count)


def judge_case(folder: Path, case: str, teacher: Checkpoint, held: Source, count: int) -> Outcome:
    """Adapt to the pairs of a case, and compare its verdict with the truth."""
    source = open_case(folder, case, teacher, count)
    given = {"smooth": None, "epochs": 1, "sigma": SIGMA, **CASES[case]}
    options = AdaptationOptions.published(teacher.model, **given)
    out = folder / "verdicts"
    run = Distillation(make_fabric("cpu"), teacher, source, out, options)
    check = check_data(run)
    adapted = run.run()
    metrics = write_results(run, adapted, out, check=check)
    pairs, truth = held
    before, after = (
        run.labels_of(model, "", pairs).errors_m(truth) for model in (teacher, adapted.student.load())
    )
    return Outcome(
        folder.name,
        case,
        metrics["verdict"]["deploy"],
        check.faults,
        check.remarks,
        float(before.mean()),
        float(after.mean()),
        certainty_of_decrease(after - before),
        tuple(metrics["verdict"]["score_change"]),
    )


def summary(outcomes: list[Outcome], console: Console) -> None:
    """Print all students, and how often the verdict was wrong."""
    table = Table(title="Verdicts and truth: mean errors, metres")
    for column in ("case", "cell", "teacher", "student", "truth", "deployed", "named"):
        table.add_column(column)
    for one in sorted(outcomes, key=lambda one: list(CASES).index(one.case)):
        errors = f"{one.teacher_m:.2f}", f"{one.student_m:.2f}"
        named = "; ".join(text[:60] for text in (*one.faults, *one.remarks))
        table.add_row(one.case, one.cell, *errors, one.truth, "yes" if one.deployed else "no", named)
    console.print(table)
    for truth, deployed, cases in (("worse", True, tuple(CASES)), ("better", False, SOUND)):
        these = [one for one in outcomes if one.truth == truth and one.case in cases]
        wrong = sum(one.deployed == deployed for one in these)
        console.print(f"{truth} and {'deployed' if deployed else 'refused'}: {wrong} of {len(these)}")
    faulty = [one for one in outcomes if one.case not in SOUND]
    console.print(f"faulty pairs that were named: {sum(bool(o.faults) for o in faulty)} of {len(faulty)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--styles", nargs="+", choices=tuple(CITIES), default=tuple(CITIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=(5, 6))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--pairs", type=int, default=660, help="pairs of each case but few")
    parser.add_argument("--work", type=Path, default=Path("verdict_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    console = Console(width=200)
    teacher = load_model(arguments.model)
    outcomes: list[Outcome] = []
    for seed in arguments.seeds:
        for style in arguments.styles:
            folder = arguments.work / f"{style}-{CITIES[style] + seed}"
            make_cell(style, CITIES[style] + seed, folder, teacher.model.spec)
            held = open_pairs(folder, "held", teacher.model.spec)
            for case in arguments.cases:
                outcomes.append(judge_case(folder, case, teacher, held, arguments.pairs))
                console.print(outcomes[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    summary(outcomes, console)


if __name__ == "__main__":
    main()
