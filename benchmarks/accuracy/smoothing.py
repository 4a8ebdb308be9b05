"""Measure labels smoothed along whole drives in simulated cities, also with degraded inputs.

benchmarks/accuracy/smoothing.py [--model ccvpe-small] [--cities 810 811 812] [--frames 1300]
    [--heading known] [--work DIR] [--json FILE]

Pairs come from the larger side of each city of the target style, as in ``adaptation.py``. Errors of the
teacher's maxima and of the smoothed labels cover all pairs, also those labelled unsure or off their map. A
maximum is wrong if it is more than 5 m off; the shares of wrong ones found and of right ones blamed cover
pairs with evidence for smoothing. Results are kept in the work folder.

Cases: ``plain``; ``no odometry``; ``scale, drift``, odometry 5 % long that turns by 2 degrees a minute;
``gaps``, 20 of each 60 pairs missing; ``short``, drives of ten pairs; ``jumps``, every three minutes the
fixes lie 30 m off for half a minute; ``nonsense``, odometry that has nothing to do with the motion.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from adaptation import STYLE, Source, make_pairs, open_pairs, pair_drive
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rosbags.highlevel import AnyReader

from xview_loc.adaptation.heat_map_store import HeatMapStore, store_heat_maps
from xview_loc.adaptation.labelling import ReadOptions, label_pairs
from xview_loc.adaptation.labels import PseudoLabels
from xview_loc.adaptation.smoothing import smooth
from xview_loc.bags.ros_types import serialize
from xview_loc.bags.writer import BagWriter
from xview_loc.datasets.base import Track
from xview_loc.evaluation.errors import Errors
from xview_loc.geodesy import LocalProjection
from xview_loc.models.checkpoint import Checkpoint, load_model
from xview_loc.simulation.messages import TOPICS
from xview_loc.training.trainer import make_fabric

FAR_M, WRONG_M, SURE_M = 10.0, 5.0, 3.0
JUMP_M, JUMP_S, EVERY_S = 30.0, 30, 180


@dataclass(frozen=True, eq=False)
class Labelled:
    """Pairs along drives, the labels and heat maps of a teacher, and metres from fixes to true places."""

    track: Track
    labels: PseudoLabels
    heat_maps: HeatMapStore
    truth: NDArray[np.float64]


def label(teacher: Checkpoint, pairs: Source, folder: Path, prior: float | None) -> Labelled:
    """Label pairs with a teacher; results are kept in a folder."""
    source, truth = pairs
    fabric = make_fabric("cpu")
    stage = f"{teacher.model.spec.name}-{teacher.sha256[:12]}-{source.name.removeprefix('pairs:')}-{prior}"
    labels = label_pairs(fabric, teacher.model, source, folder / f"{stage}.npz", ReadOptions(prior))
    store = store_heat_maps(
        fabric, teacher.model, source, labels.index, folder / f"{stage}.maps", ReadOptions(prior)
    )
    return Labelled(source.track(), labels, store, truth)


def no_odometry(plain: Labelled) -> Labelled:
    return replace(plain, track=replace(plain.track, moved=np.full_like(plain.track.moved, np.nan)))


def scale_and_drift(plain: Labelled) -> Labelled:
    seconds = (plain.track.stamp_ns - plain.track.stamp_ns[0]) / 1e9
    moved = plain.track.moved @ (1.0, 1j) * 1.05 * np.exp(1j * np.radians(2.0) * seconds / 60.0)
    return replace(plain, track=replace(plain.track, moved=np.stack([moved.real, moved.imag], 1)))


def gaps(plain: Labelled) -> Labelled:
    return replace(plain, labels=plain.labels.rows(np.arange(len(plain.labels)) % 60 < 40))


def short(plain: Labelled) -> Labelled:
    return replace(plain, track=replace(plain.track, drive=np.arange(len(plain.track.drive)) // 10))


def nonsense(plain: Labelled) -> Labelled:
    moved = np.random.default_rng(0).normal(size=plain.track.moved.shape) * 8.0
    return replace(plain, track=replace(plain.track, moved=moved))


CASES: dict[str, Callable[[Labelled], Labelled]] = {
    "plain": lambda plain: plain,
    "no odometry": no_odometry,
    "scale, drift": scale_and_drift,
    "gaps": gaps,
    "short": short,
    "nonsense": nonsense,
}


def make_jumping_pairs(folder: Path) -> None:
    """Make ``jumps`` beside ``pairs``: the same drive with fixes that jump, and tiles around these."""
    if (folder / "jumps").exists():
        return
    out = folder / "jumps-drive"
    if out.exists():
        shutil.rmtree(out)  # of an interrupted run
    writer = BagWriter(out, TOPICS)
    with AnyReader([folder / "pairs-drive"]) as reader:
        start = reader.start_time
        for connection, stamp, data in reader.messages():
            message: Any = reader.deserialize(data, connection.msgtype)
            number, into = divmod((stamp - start) / 1e9, EVERY_S)
            if connection.topic == "/fix" and EVERY_S / 2 <= into < EVERY_S / 2 + JUMP_S:
                angle = 2.4 * number
                shift = JUMP_M * np.cos(angle), JUMP_M * np.sin(angle)
                place = LocalProjection(message.latitude, message.longitude).inverse(*shift)
                message.latitude, message.longitude = (float(x) for x in place)
            writer.write(connection.topic, stamp, serialize(connection.msgtype, message))
    writer.close()
    pair_drive(folder, "jumps")


def figures(case: Labelled) -> dict[str, Any]:
    """Return errors before and after smoothing, and how well they are predicted."""
    start = time.thread_time()
    smoothed = smooth(case.track, case.labels, case.heat_maps)
    seconds = time.thread_time() - start
    after = replace(case.labels, position=smoothed.position)
    before_m, after_m = case.labels.errors_m(case.truth), after.errors_m(case.truth)
    known = smoothed.supported
    off = (after.from_fix - case.truth[after.index])[known]
    squared = np.einsum("ni,nij,nj->n", off, np.linalg.inv(smoothed.covariance[known]), off)
    wrong, said = before_m[known] > WRONG_M, smoothed.wrong[known] > 0.5
    sure = smoothed.std_m <= SURE_M
    return {
        "pairs": len(case.labels),
        "teacher": _errors(before_m),
        "smoothed": _errors(after_m),
        "ratio": float(after_m.mean() / before_m.mean()),
        "fell_back": int((~known).sum()),
        "off_map": int((~smoothed.on_map).sum()),
        "sure": float(sure.mean()),
        "smoothed_sure": _errors(after_m[sure]),
        "nees": float(squared.mean()) if known.any() else None,
        "wrong_found": float(said[wrong].mean()) if wrong.any() else None,
        "right_blamed": float(said[~wrong].mean()) if (~wrong).any() else None,
        "ms_per_pair": 1e3 * seconds / len(case.labels),
    }


def _errors(errors: NDArray[np.float64]) -> dict[str, float]:
    if len(errors) == 0:
        return {}
    return {**asdict(Errors.of(errors)), "far": float((errors > FAR_M).mean())}


def _text(errors: dict[str, float]) -> str:
    if not errors:
        return "none"
    return f"{errors['mean']:.2f} / {errors['median']:.2f} / {errors['far']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--cities", type=int, nargs="+", default=(810, 811, 812))
    parser.add_argument(
        "--frames", type=int, default=1300, help="length of the drive in each city, frames at 1 Hz"
    )
    parser.add_argument("--heading", choices=("known", "unknown"), default="known")
    parser.add_argument("--work", type=Path, default=Path("sequence_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Times are those of this thread, to exclude other load.
    cv2.setNumThreads(1)
    teacher = load_model(arguments.model, arguments.checkpoint)
    prior = 0.0 if arguments.heading == "known" else None
    results: list[dict[str, Any]] = []
    for city in arguments.cities:
        folder = arguments.work / f"{STYLE}-{city}"
        make_pairs(city, folder, arguments.frames)
        make_jumping_pairs(folder)
        spec, kept = teacher.model.spec, folder / "smoothing"
        plain = label(teacher, open_pairs(folder, "pairs", spec), kept, prior)
        cases = {name: change(plain) for name, change in CASES.items()}
        cases["jumps"] = label(teacher, open_pairs(folder, "jumps", spec), kept, prior)
        for name, case in cases.items():
            results.append({"case": name, "city": city, **figures(case)})
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    results.sort(key=lambda row: list(cases).index(row["case"]))
    table = Table(title=f"{arguments.model}, heading {arguments.heading}: mean / median / > 10 m, metres")
    for column in ("case", "city", "pairs", "teacher's maxima", "smoothed", "ratio", "fell back, off map"):
        table.add_column(column, no_wrap=True)
    for column in ("sure to 3 m: share, errors", "NEES", "wrong found", "right blamed", "ms"):
        table.add_column(column, no_wrap=True)
    for number, row in enumerate(results, start=1):
        table.add_row(
            row["case"],
            str(row["city"]),
            str(row["pairs"]),
            _text(row["teacher"]),
            _text(row["smoothed"]),
            f"{row['ratio']:.2f}",
            f"{row['fell_back']}, {row['off_map']}",
            f"{row['sure']:.0%}, {_text(row['smoothed_sure'])}",
            *(
                "" if row[name] is None else f"{row[name]:.2g}"
                for name in ("nees", "wrong_found", "right_blamed")
            ),
            f"{row['ms_per_pair']:.1f}",
            end_section=number % len(arguments.cities) == 0,
        )
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
