"""``make demo-adapt``: localise, record pairs, adapt, swap the running node's weights, localise again."""

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.report import METRICS_FILE, REPORT_FILE, STUDENT_FILE
from xview_loc.demo.live import START_TIMEOUT_S, Demo, Track
from xview_loc.demo.pictures import COARSE, draw_change, draw_distribution, draw_maps
from xview_loc.evaluation import Errors
from xview_loc.models import create_model
from xview_loc.recordings.pairs import PairBag
from xview_loc.report import Page

# The shipped weights were trained on the source style; no benchmark has seen this city.
STYLE, CITY, MODEL = "target", 4322, "ccvpe-small"
# The held-out route lies east of a line, the streets of the pairs west of it, further off than a tile's half.
LINE_SHARE, GAP_M = 0.08, 60.0
HELD_OUT_SEED, RECORDING_SEED = 1, 2
# One frame a second, about eight metres apart, published faster than real time.
RATE_HZ, LIVE_SPEED, RECORDING_SPEED = 1.0, 4.0, 16.0
# As the model's training labels, pixels.
SIGMA = 2.0
BATCH_SIZE = 8
# Simulated stamps leave the clock.
PARAMETERS = {"max_image_delay_s": 3600.0}
ADAPT_TIMEOUT_S = 3 * 3600.0
FIX, BEFORE, AFTER = "coarse fix", "first drive", "second drive"
COLOURS = {FIX: COARSE, BEFORE: "tab:red", AFTER: "tab:blue"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What the user asked for.

    size_m: the city's side. frames, recorded: length of the held-out route and of the recording, in frames.
    epochs: passes over the pairs, for each student. deploy_anyway: whatever the verdict says.
    """

    size_m: float
    frames: int
    recorded: int
    epochs: int
    deploy_anyway: bool

    def drive(self, recording: bool) -> list[Any]:
        """Words of ``xview-loc simulate`` for the recording, or for the held-out route."""
        half, line = self.size_m / 2, LINE_SHARE * self.size_m
        west, east = (-half, line - GAP_M) if recording else (line, half)
        frames, seed, speed = (
            (self.recorded, RECORDING_SEED, RECORDING_SPEED)
            if recording
            else (self.frames, HELD_OUT_SEED, LIVE_SPEED)
        )
        words: list[Any] = ["--style", STYLE, "--city", CITY, "--size", self.size_m, "--height", 64]
        words += ["--rate", RATE_HZ, "--frames", frames, "--seed", seed, "--speed", speed]
        return [*words, "--area", west, -half, east, half]


@dataclass
class Story:
    """What happened, for the page.

    served: the checkpoint in use in the first and in the second drive, as the node names it. answer: of the
    node to the student, "" where it was not asked. seconds: of each step.
    """

    plan: Plan
    map_path: Path = Path()
    tracks: dict[str, Track] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)
    pairs: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    answer: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say what is done now, and remember how long it took."""
        print(f"\n== {text}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[text] = time.monotonic() - start

    def errors(self) -> dict[str, Array]:
        """Metres from the truth of the frames that both drives localised, in their order.

        A frame is known by its true place, which is the same in both drives to the last bit.
        """
        first, second = self.tracks[BEFORE], self.tracks[AFTER]
        again = {second.truth[stamp]: error for stamp, error in second.errors(second.estimate).items()}
        coarse, own = first.errors(first.fix), first.errors(first.estimate)
        rows = [(coarse[s], own[s], again[first.truth[s]]) for s in own if first.truth[s] in again]
        return dict(zip((FIX, BEFORE, AFTER), np.array(rows).T, strict=True))


def run(plan: Plan, folder: Path) -> Story:
    """Everything, for real; maps, pairs, student and its report are left in ``folder``."""
    story = Story(plan)
    with Demo("demo-adapt") as demo:
        listener = demo.listener

        def drive(name: str, first: bool) -> None:
            listener.track, listener.tell_every = Track(), 20
            moving = demo.start_drive(folder / name.replace(" ", "-"), *plan.drive(recording=False))
            if first:
                story.map_path = folder / name.replace(" ", "-") / "city.tif"
                demo.start_localizer(story.map_path, MODEL, PARAMETERS)
            track = demo.follow(moving, plan.frames, plan.frames / RATE_HZ / LIVE_SPEED)
            # The node says once a second which weights it uses.
            demo.need(lambda: listener.checkpoint, START_TIMEOUT_S, "the localizer does not report")
            story.tracks[name], story.served[name] = track, listener.checkpoint

        with story.step("first drive: a held-out route, localised live with the shipped weights"):
            drive(BEFORE, first=True)
        with story.step("recording: the pair logger on other streets, while the localizer goes on"):
            bag = record(demo, plan, folder, story.map_path)
            story.pairs = len(PairBag(bag))
            print(f"{story.pairs} pairs in {bag}", flush=True)
        with story.step("adaptation: of the pairs alone, without ground truth"):
            story.metrics = adapt(demo, plan, bag, folder / "adapted")
        if story.metrics["verdict"]["deploy"] or plan.deploy_anyway:
            with story.step("deployment: the student on the running node"):
                story.answer = deploy(demo, folder / "adapted" / STUDENT_FILE)
                digest = story.metrics["student_sha256"][:12]
                demo.need(
                    lambda: digest in listener.checkpoint, START_TIMEOUT_S, "the localizer keeps its weights"
                )
        with story.step("second drive: the same frames again"):
            drive(AFTER, first=False)
    return story


def record(demo: Demo, plan: Plan, folder: Path, map_path: Path) -> Path:
    """Drive on other streets with the pair logger listening; the bag."""
    spec = create_model(MODEL).spec
    demo.listener.track, demo.listener.tell_every = Track(), sys.maxsize
    parameters = {
        **PARAMETERS,
        "map": map_path,
        "directory": folder / "pairs",
        "tile_px": spec.aerial_size,
        "tile_gsd": spec.gsd,
        "heading_source": "quaternion",
        "qos_reliability": "reliable",
        "qos_depth": 100,
        "min_free_mb": 100,
    }
    logger = demo.start_node("pair_logger_node", parameters)
    # Of all nodes it alone listens to the odometry.
    listening = partial(demo.listener.count_subscribers, "/odom")
    demo.need(listening, START_TIMEOUT_S, "the pair logger did not start")
    drive = demo.start_drive(folder / "recording", *plan.drive(recording=True))
    timeout_s = START_TIMEOUT_S + plan.recorded / RATE_HZ
    demo.finish(drive, timeout_s, "the recording did not end")
    demo.stop(logger, "the pair logger did not end")
    (bag,) = (folder / "pairs").iterdir()
    return bag


def adapt(demo: Demo, plan: Plan, bag: Path, out: Path) -> dict[str, Any]:
    """Run ``xview-loc adapt`` on the bag; its metrics."""
    processes = min(2, os.cpu_count() or 1)
    options = {
        "--out": out,
        "--model": MODEL,
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
    """Run ``xview-loc deploy``; what the node answers."""
    process = demo.start("xview_loc.cli", "deploy", student, stdout=subprocess.PIPE, text=True)
    demo.finish(process, START_TIMEOUT_S, "the node does not answer")
    assert process.stdout is not None
    answer = process.stdout.read().strip()
    print(answer, flush=True)
    if process.returncode:
        raise SystemExit("demo-adapt: the node refused the student; see its message above")
    return answer


def verdict_text(story: Story) -> str:
    """Whether the student was deployed, and why."""
    if story.metrics["verdict"]["deploy"]:
        return "The verdict was to deploy the student: the running node was told to use it."
    if story.plan.deploy_anyway:
        return "The verdict was not to deploy the student. It was deployed all the same, as asked for."
    return (
        "The verdict was not to deploy the student, and it was not deployed: the node kept its weights, so "
        "both drives show the same model."
    )


def make_page(story: Story, report: str) -> Page:
    """The whole story; ``report``: where the adaptation's own page is, seen from this one."""
    errors, plan, metrics = story.errors(), story.plan, story.metrics
    rows = {name: Errors.of(values) for name, values in errors.items()}
    better, worse = (int((s * (errors[AFTER] - errors[BEFORE]) < -1.0).sum()) for s in (1, -1))
    page = Page("xview_loc: adapted to a new city while it drives")
    page.text(
        f"A simulated city (style {STYLE}, seed {CITY}) looks unlike those that {MODEL} was trained in. A "
        f"localizer node drove a route through its east; the pair logger recorded {story.pairs} pairs on "
        "streets in its west; a student learnt from them without ground truth; and the node, still running, "
        "drove the same route again. All of it over DDS, each frame localised by itself, heading known. "
        f"Frames are {1 / RATE_HZ:.0f} s apart; they were published at {LIVE_SPEED:.0f} times real time, "
        f"those of the recording at {RECORDING_SPEED:.0f} times."
    )
    page.text(verdict_text(story))
    weights = {name: Path(story.served[name].rsplit(" ", 1)[0]).stem for name in story.tracks}
    page.table(
        ["distance from the truth", "mean", "median", "95 %", "frames", "weights"],
        [
            [name, *(f"{v:.2f} m" for v in (e.mean, e.median, e.p95)), str(e.frames), weights.get(name, "")]
            for name, e in rows.items()
        ],
    )
    mean, median = (rows[AFTER].mean / rows[BEFORE].mean, rows[AFTER].median / rows[BEFORE].median)
    answered = [len(track.estimate) for track in story.tracks.values()]
    page.text(
        f"From the first drive to the second the mean error changed by {mean - 1:+.0%}, the median by "
        f"{median - 1:+.0%}; {better} frames are more than a metre nearer to the truth, {worse} further from "
        f"it. Of {plan.frames} frames, {answered[0]} were answered in the first drive and {answered[1]} in "
        "the second; the figures are of those answered in both."
    )
    page.heading("Both drives")
    titled = {f"{name}: {weights[name]}": track for name, track in story.tracks.items()}
    page.figure(
        draw_maps(titled, story.map_path), "Truth, coarse fixes, and estimates with a line to their truth"
    )
    page.heading("How far off")
    reach = max(20.0, rows[FIX].p95)
    page.figure(draw_distribution(errors, COLOURS, reach), "Share of the frames with at most this error")
    own = {name: errors[name] for name in (BEFORE, AFTER)}
    page.figure(draw_change(own, COLOURS), "Each frame's error in both drives, and its change")
    page.heading("The verdict, without ground truth")
    for reason in metrics["verdict"]["reasons"]:
        page.text(reason)
    page.link("What the adaptation says of itself", report)
    page.heading("The weights")
    served = [[name, *story.served[name].rsplit(" ", 1)] for name in story.tracks]
    page.table(["in use", "checkpoint", "hash"], served)
    page.text(f"student: sha256 {metrics['student_sha256']}")
    if story.answer:
        page.text(f"The node's answer to the student: {story.answer}")
    page.heading("Time")
    page.table(["step", "seconds"], [[name, f"{s:.0f}"] for name, s in story.seconds.items()])
    return page


def main() -> None:
    """Tell the story and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the page")
    parser.add_argument("--size", type=float, default=1500.0, help="side of the city, metres")
    parser.add_argument("--frames", type=int, default=300, help="frames of the held-out route")
    parser.add_argument("--recorded", type=int, default=1700, help="frames of the drive that records pairs")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the pairs, for each student")
    parser.add_argument("--deploy-anyway", action="store_true", help="whatever the verdict says")
    a = parser.parse_args()
    out = a.out.resolve()
    folder = out / "adapt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    story = run(Plan(a.size, a.frames, a.recorded, a.epochs, a.deploy_anyway), folder)
    page = out / "demo-adapt.html"
    make_page(story, f"{folder.name}/adapted/{REPORT_FILE}").write(page)
    print()
    for name, errors in story.errors().items():
        e = Errors.of(errors)
        print(f"{name:12s}: mean {e.mean:5.2f} m, median {e.median:5.2f} m, 95 % {e.p95:5.2f} m")
    print(verdict_text(story))
    print(f"page: {page}")


if __name__ == "__main__":
    main()
