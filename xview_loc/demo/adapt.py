"""``make demo-adapt``: localise, record pairs, adapt, update the running node, localise again."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.report import METRICS_FILE, REPORT_FILE, STUDENT_FILE
from xview_loc.demo.live import (
    FILTERED,
    FIX,
    SINGLE,
    START_TIMEOUT_S,
    Demo,
    DriveLog,
    add_vehicle_options,
    cameras_text,
    model_and_rig,
)
from xview_loc.demo.pictures import COLOURS, draw_change, draw_distribution, draw_maps
from xview_loc.evaluation.errors import Errors
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.report import Page

# The shipped weights were trained on the source style; no benchmark uses this city.
STYLE, CITY = "target", 4322
# The held-out route lies east of a line, the recording west of it, with a gap of more than half a tile.
LINE_SHARE, GAP_M = 0.08, 60.0
HELD_OUT_SEED, RECORDING_SEED = 1, 2
# One frame per second, about eight metres apart, published faster than real time.
RATE_HZ, LIVE_SPEED, RECORDING_SPEED = 1.0, 4.0, 16.0
# Standard deviation of the labels, pixels: that of the training labels of the model.
SIGMA = 2.0
BATCH_SIZE = 8
# Simulated stamps run ahead of the clock.
PARAMETERS = {"max_image_delay_s": 3600.0}
ADAPT_TIMEOUT_S = 3 * 3600.0
BEFORE, AFTER = "first drive", "second drive"
LINES = {FIX: COLOURS[FIX], BEFORE: "tab:red", AFTER: "tab:blue"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Settings of the demo: side of the city in metres, frames of the held-out route and of the recording.

    ``epochs`` are passes over the pairs for each student; ``deploy_anyway`` ignores the verdict; ``model`` is
    the model's name, ``rig`` one of RIGS, "" a panorama camera.
    """

    size_m: float
    frames: int
    recorded: int
    epochs: int
    deploy_anyway: bool
    model: str = "ccvpe-small"
    rig: str = ""

    def drive(self, recording: bool) -> list[Any]:
        """Return the options of ``xview-loc simulate`` for the recording or the held-out route."""
        half, line = self.size_m / 2, LINE_SHARE * self.size_m
        if recording:
            west, east, frames, seed = -half, line - GAP_M, self.recorded, RECORDING_SEED
        else:
            west, east, frames, seed = line, half, self.frames, HELD_OUT_SEED
        speed = RECORDING_SPEED if recording else LIVE_SPEED
        words: list[Any] = ["--style", STYLE, "--city", CITY, "--size", self.size_m]
        words += [] if self.rig else ["--height", 64]
        words += ["--rate", RATE_HZ, "--frames", frames, "--seed", seed, "--speed", speed]
        return [*words, "--area", west, -half, east, half]


@dataclass
class Results:
    """Results of the demo, for the page.

    ``checkpoints`` are those in use in each drive, as the node reports them, ``pairs`` the number of recorded
    pairs, ``metrics`` those of the adaptation, ``answer`` the node's to the student ("" if it was not
    deployed), and ``seconds`` the duration of each step.
    """

    plan: Plan
    map_path: Path = Path()
    drives: dict[str, DriveLog] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)
    pairs: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    answer: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Print the step, and record how long it takes."""
        print(f"\n== {text}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[text] = time.monotonic() - start

    def errors(self) -> dict[str, Array]:
        """Return the errors in metres of the frames that both drives localised, in order.

        A frame is identified by its true position, which is equal in both drives to the last bit.
        """
        first, second = self.drives[BEFORE], self.drives[AFTER]

        def both(name: str) -> Array:
            again = {second.truth[s]: error for s, error in second.errors(second.named[name]).items()}
            own = first.errors(first.named[name]).items()
            rows = [(error, again[first.truth[s]]) for s, error in own if first.truth[s] in again]
            return np.array(rows).reshape(-1, 2).T

        names = (BEFORE, AFTER, f"{BEFORE}, {FILTERED}", f"{AFTER}, {FILTERED}")
        return {FIX: both(FIX)[0], **dict(zip(names, [*both(SINGLE), *both(FILTERED)], strict=True))}


def run(plan: Plan, folder: Path) -> Results:
    """Run all steps; maps, pairs, student and report stay in ``folder``."""
    results = Results(plan)
    with Demo("demo-adapt", plan.rig) as demo:
        listener = demo.listener

        def drive(name: str, first: bool) -> None:
            wait_apart(listener.drive)
            listener.drive, listener.print_every = DriveLog(), 20
            out = folder / name.replace(" ", "-")
            moving = demo.start_drive(out, *plan.drive(recording=False))
            if first:
                results.map_path = out / "city.tif"
                own = {"filter": True, "checkpoint_dirs": [str(folder.resolve())]}
                demo.start_localizer(results.map_path, plan.model, {**PARAMETERS, **own})
            log = demo.follow(moving, plan.frames, plan.frames / RATE_HZ / LIVE_SPEED)
            # The node reports its weights once per second.
            demo.need(lambda: listener.checkpoint, START_TIMEOUT_S, "the localizer does not report")
            results.drives[name], results.checkpoints[name] = log, listener.checkpoint

        with results.step("first drive: a held-out route, localised live with the shipped weights"):
            drive(BEFORE, first=True)
        with results.step("recording: the pair logger on other streets, while the localizer keeps running"):
            bag = record(demo, plan, folder, results.map_path)
            results.pairs = len(PairBag(bag))
            print(f"{results.pairs} pairs in {bag}", flush=True)
        with results.step("adaptation: from the pairs alone, without ground truth"):
            results.metrics = adapt(demo, plan, bag, folder / "adapted")
        if results.metrics["verdict"]["deploy"] or plan.deploy_anyway:
            with results.step("deployment: the student on the running node"):
                results.answer = deploy(demo, folder / "adapted" / STUDENT_FILE)
                digest = results.metrics["student_sha256"][:12]
                problem = "the localizer did not change its weights"
                demo.need(lambda: digest in listener.checkpoint, START_TIMEOUT_S, problem)
        with results.step("second drive: the same frames again"):
            drive(AFTER, first=False)
    return results


def wait_apart(before: DriveLog) -> None:
    """Wait until the next drive cannot begin just after this one ended, which would look like a jump.

    Stamps are the vehicle's time, which runs faster than the clock: a drive ends ahead of it. The next one
    begins within a minute, at the time of the clock.
    """
    end_ns, now_ns = max(before.truth, default=0), time.time_ns()
    if end_ns - 60 * 10**9 < now_ns < end_ns + 10 * 10**9:
        time.sleep((end_ns - now_ns) / 1e9 + 10.0)


def record(demo: Demo, plan: Plan, folder: Path, map_path: Path) -> Path:
    """Drive on other streets while the pair logger records; return the bag."""
    demo.listener.drive, demo.listener.print_every = DriveLog(), sys.maxsize
    parameters = {
        **PARAMETERS,
        **demo.inputs(map_path),
        "directory": folder / "pairs",
        "model": plan.model,
        # A named type, so that it subscribes before the drive publishes.
        "odom_source": "odometry",
        "qos_depth": 100,
        "min_free_mb": 100,
    }
    logger = demo.start_node("pair_logger_node", parameters)

    def listening() -> bool:
        return any(
            s.node_name == "pair_logger" for s in demo.listener.get_subscriptions_info_by_topic("/odom")
        )

    demo.need(listening, START_TIMEOUT_S, "the pair logger did not start")
    drive = demo.start_drive(folder / "recording", *plan.drive(recording=True))
    demo.finish(drive, START_TIMEOUT_S + plan.recorded / RATE_HZ, "the recording did not end")
    demo.stop(logger, "the pair logger did not end")
    (bag,) = (folder / "pairs").iterdir()
    return bag


def adapt(demo: Demo, plan: Plan, bag: Path, out: Path) -> dict[str, Any]:
    """Run ``xview-loc adapt`` on the bag; return its metrics."""
    processes = min(2, os.cpu_count() or 1)
    options = {
        "--out": out,
        "--model": plan.model,
        "--sigma": SIGMA,
        "--epochs": plan.epochs,
        "--batch-size": BATCH_SIZE // processes,
        "--devices": processes,
        "--accelerator": "cpu",
    }
    words = [word for option in options.items() for word in option]
    process = demo.start("xview_loc.cli", "adapt", bag, *words)
    demo.finish(process, ADAPT_TIMEOUT_S, "the adaptation did not end")
    if not (out / METRICS_FILE).exists():
        raise SystemExit("demo-adapt: the adaptation failed; see its messages above")
    metrics: dict[str, Any] = json.loads((out / METRICS_FILE).read_text())
    return metrics


def deploy(demo: Demo, student: Path) -> str:
    """Run ``xview-loc deploy``; return the answer of the node."""
    process = demo.start("xview_loc.cli", "deploy", student, stdout=subprocess.PIPE, text=True)
    demo.finish(process, START_TIMEOUT_S, "the node did not answer")
    assert process.stdout is not None
    answer = process.stdout.read().strip()
    print(answer, flush=True)
    if process.returncode:
        raise SystemExit("demo-adapt: the node refused the student; see its message above")
    return answer


def verdict_text(results: Results) -> str:
    """Say if the student was deployed, and why."""
    if results.metrics["verdict"]["deploy"]:
        return "The verdict was to deploy the student, and the running node now uses it."
    if results.plan.deploy_anyway:
        return "The verdict was not to deploy the student. It was deployed anyway, as requested."
    kept = "The node kept its weights, so both drives show the same model."
    return f"The verdict was not to deploy the student. {kept}"


def make_page(results: Results, report: str) -> Page:
    """Make the page; ``report`` is the relative path of the adaptation's report."""
    errors, plan, metrics = results.errors(), results.plan, results.metrics
    rows = {name: Errors.of(values) for name, values in errors.items()}
    change = errors[AFTER] - errors[BEFORE]
    better, worse = int((change < -1.0).sum()), int((change > 1.0).sum())
    page = Page("xview_loc: adaptation to a new city while driving")
    page.text(
        f"A simulated city (style {STYLE}, seed {CITY}) looks unlike those that {plan.model} was trained on. "
        f"A localizer node localised a drive in its east with {cameras_text(plan.rig)}. The pair logger "
        f"recorded {results.pairs} pairs on streets in its west, and a student learnt from them without "
        "ground truth; whole drives corrected the labels. The node, still running, then localised the same "
        "drive again. Everything went over DDS, with known heading. Each frame was localised on its own; "
        f"{FILTERED} poses fuse all frames and fixes so far with wheel odometry. Frames are "
        f"{1 / RATE_HZ:.0f} s apart and were published at up to {LIVE_SPEED:.0f} times real time, those of "
        f"the recording at up to {RECORDING_SPEED:.0f} times."
    )
    page.text(verdict_text(results))
    weights = {name: Path(results.checkpoints[name].rsplit(" ", 1)[0]).stem for name in results.drives}
    table = [
        [name, *(f"{v:.2f} m" for v in (e.mean, e.median, e.p95)), str(e.frames), weights.get(name, "")]
        for name, e in rows.items()
    ]
    page.table(["distance from the truth", "mean", "median", "95 %", "frames", "weights"], table)
    mean, median = (rows[AFTER].mean / rows[BEFORE].mean, rows[AFTER].median / rows[BEFORE].median)
    localised = [len(log.estimate) for log in results.drives.values()]
    page.text(
        f"From the first drive to the second the mean error changed by {mean - 1:+.0%}, the median by "
        f"{median - 1:+.0%}; {better} frames are more than a metre closer to the truth, {worse} more than a "
        f"metre farther. Of {plan.frames} frames, {localised[0]} were localised in the first drive and "
        f"{localised[1]} in the second; the figures cover the frames localised in both."
    )
    page.heading("Both drives")
    titled = {f"{name}: {weights[name]}": log for name, log in results.drives.items()}
    maps = draw_maps(titled, results.map_path)
    page.figure(maps, "Truth, GNSS fixes, single-frame estimates with lines to the truth, filtered poses")
    page.heading("Errors")
    shares = draw_distribution({name: errors[name] for name in LINES}, LINES, max(20.0, rows[FIX].p95))
    page.figure(shares, "Share of frames with at most this error")
    own = {name: errors[name] for name in (BEFORE, AFTER)}
    page.figure(draw_change(own, LINES), "Error of each frame in both drives, and the change")
    page.heading("Verdict, without ground truth")
    page.text(metrics["verdict"]["summary"])
    for reason in metrics["verdict"]["reasons"]:
        page.text(reason)
    page.link("Report of the adaptation", report)
    page.heading("Weights")
    used = [[name, *results.checkpoints[name].rsplit(" ", 1)] for name in results.drives]
    page.table(["drive", "checkpoint", "hash"], used)
    page.text(f"student: sha256 {metrics['student_sha256']}")
    if results.answer:
        page.text(f"Answer of the node to the student: {results.answer}")
    page.heading("Time")
    page.table(["step", "seconds"], [[name, f"{s:.0f}"] for name, s in results.seconds.items()])
    return page


def main() -> None:
    """Run the demo and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="output folder")
    parser.add_argument("--size", type=float, default=1500.0, help="side of the city, metres")
    parser.add_argument("--frames", type=int, default=300, help="length of the held-out route, frames")
    parser.add_argument("--recorded", type=int, default=1700, help="length of the recording, frames")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the pairs for each student")
    anyway = "deploy the student whatever the verdict"
    parser.add_argument("--deploy-anyway", action="store_true", help=anyway)
    add_vehicle_options(parser)
    a = parser.parse_args()
    out = a.out.resolve()
    folder = out / "adapt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = run(Plan(a.size, a.frames, a.recorded, a.epochs, a.deploy_anyway, *model_and_rig(a)), folder)
    page = out / "demo-adapt.html"
    make_page(results, f"{folder.name}/adapted/{REPORT_FILE}").write(page)
    print()
    for name, errors in results.errors().items():
        e = Errors.of(errors)
        print(f"{name:22s}: mean {e.mean:5.2f} m, median {e.median:5.2f} m, 95 % {e.p95:5.2f} m")
    print(verdict_text(results))
    print(f"page: {page}")


if __name__ == "__main__":
    main()
