"""Adaptations that are killed and run again, and adaptations by two processes, give the same figures."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adaptation_fixtures import PAIRS, SPEC, render_pairs, simulated_pairs, small_city, write_drive

from xview_loc.adaptation.labelling import ReadOptions, label_pairs
from xview_loc.adaptation.labels import PseudoLabels
from xview_loc.models.checkpoint import load_checkpoint, load_model
from xview_loc.training.trainer import make_fabric

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
ADAPT = ["-m", "xview_loc.cli", "adapt"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
PLAIN = [
    PAIRS,
    "--accelerator",
    "cpu",
    "--sigma",
    "2",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--held-out",
    "0.2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``cache``, ``drive`` and ``pairs`` of a small city."""
    folder, city = tmp_path_factory.mktemp("adaptation"), small_city()
    render_pairs(city, folder / "cache")
    write_drive(city, folder)
    # A second drive of the same streets, so that two processes smooth one each.
    shutil.copytree(folder / "pairs", folder / "again")
    return folder


@pytest.fixture(scope="module")
def smoothing(folder: Path) -> list[str]:
    truth = ["--truth", str(folder / "drive"), "--truth-topic", "/truth/fix"]
    pairs = [str(folder / "pairs"), str(folder / "again"), "--recipe", "drives"]
    return [*pairs, "--accelerator", "cpu", "--epochs", "1", *truth]


def start(folder: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
    )


def finish(folder: Path, out: Path, *words: str) -> dict[str, Any]:
    """Run a command to its end; returns the metrics it has written."""
    process = start(folder, out, *words)
    _, errors = process.communicate(timeout=800)
    # Some processes of torchrun abort at exit when all is done: what counts is what they wrote.
    assert process.returncode == 0 or "torch.distributed.run" in words, errors
    assert (out / "report.html").exists(), errors
    return json.loads((out / "metrics.json").read_text())


def kill(process: subprocess.Popen[str], stage: str, pairs: int = 0) -> None:
    """Kill a process as soon as it has printed that it has done so many pairs of a stage."""
    assert process.stdout is not None
    assert (
        any(line.startswith(f"{stage}: ") and int(line.split()[-3]) >= pairs for line in process.stdout)
        or process.wait() == 0
    )
    process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return finish(folder, folder / "whole", *ADAPT, *PLAIN)


@pytest.fixture(scope="module")
def smoothed_whole(folder: Path, smoothing: list[str]) -> dict[str, Any]:
    return finish(folder, folder / "smoothed", *ADAPT, *smoothing)


def without_digest(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without the digest of the student, which carries its own command."""
    return {name: value for name, value in metrics.items() if name != "student_sha256"}


def test_a_killed_adaptation_ends_with_the_same_figures(
    folder: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Killed at random instants in every stage, and run again each time."""
    rng = random.Random(0)
    for stage, total in (
        ("teacher labels", 40),
        ("auxiliary student", 16),
        ("auxiliary labels", 40),
        ("student", 12),
    ):
        for share in sorted(rng.random() for _ in range(2)):
            kill(start(folder, tmp_path, *ADAPT, *PLAIN), stage, int(share * total))
    assert without_digest(finish(folder, tmp_path, *ADAPT, *PLAIN)) == without_digest(whole)
    students = [load_checkpoint(path / "student.safetensors") for path in (folder / "whole", tmp_path)]
    for key, value in students[0].model.state_dict().items():
        assert torch.equal(value, students[1].model.state_dict()[key]), key


def test_killed_smoothing_ends_with_the_same_figures(
    folder: Path, smoothing: list[str], smoothed_whole: dict[str, Any], tmp_path: Path
) -> None:
    assert smoothed_whole["smoothing"]["used"]
    for stage in ("teacher heat maps", "smoothing", "student"):
        kill(start(folder, tmp_path, *ADAPT, *smoothing), stage)
    again = finish(folder, tmp_path, *ADAPT, *smoothing)
    assert without_digest(again) == without_digest(smoothed_whole)


def test_two_processes_smooth_the_same_labels(
    folder: Path, smoothing: list[str], smoothed_whole: dict[str, Any], tmp_path: Path
) -> None:
    both = finish(folder, tmp_path, *TORCHRUN, *ADAPT, *smoothing)
    # In other batches, heat maps differ in their last digits.
    for name in ("moved_m", "std_m"):
        assert both["smoothing"][name] == pytest.approx(smoothed_whole["smoothing"][name], rel=1e-3)
    for name in ("pseudo ground truth", "teacher, held out"):
        # Errors along and across are unknown for panoramas.
        found, wanted = (
            {figure: value for figure, value in run["true_errors"][name].items() if value is not None}
            for run in (both, smoothed_whole)
        )
        assert "mean" in wanted and found == pytest.approx(wanted, rel=1e-3)
    assert math.isfinite(both["epochs"]["student"][0]["loss"])


def test_two_processes_make_the_same_labels(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Gloo on one machine: the labels of one process, and a student about as good."""
    both = finish(folder, tmp_path / "two", *TORCHRUN, *ADAPT, *PLAIN)
    model, source = load_model("ccvpe-small").model, simulated_pairs(SPEC, folder / "cache")
    expected = label_pairs(make_fabric("cpu"), model, source, tmp_path / "labels.npz", ReadOptions()).position
    for out in (folder / "whole", tmp_path / "two"):
        labels = [PseudoLabels.load(path) for path in (out / "stages").glob("labels-*.npz")]
        assert any(found is not None and (found.position == expected).all() for found in labels)
    histories = [metrics["epochs"]["student"] for metrics in (whole, both)]
    assert [len(history) for history in histories] == [2, 2]
    assert histories[1][0]["loss"] == pytest.approx(histories[0][0]["loss"], rel=0.3)
    for name in ("teacher, held out", "pseudo ground truth"):
        assert whole["true_errors"][name] == both["true_errors"][name]
