"""The loop from a rig's recording: imported, labelled, smoothed, a student trained, all by the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_fixtures import SPEC, tiny_models, xview_loc
from torch import nn
from torch.utils.data import default_collate

from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.datasets.base import true_from_fix
from xview_loc.datasets.pairs import PairDataset
from xview_loc.models import create_model
from xview_loc.models.checkpoint import load_checkpoint, load_model, save_checkpoint
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.tracks import read_timed_track
from xview_loc.training.trainer import make_fabric

FRAMES, TRAINED = 70, 56


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drive with six cameras that tilts, as ``drive``, and its pairs as ``pairs/drive``."""
    folder = tmp_path_factory.mktemp("rig")
    words: list[object] = ["--style", "target", "--city", 3, "--size", 500, "--frames", FRAMES, "--rate", 1]
    xview_loc("simulate", folder, *words, "--rig", "six", "--height", 90)
    words = ["--map", folder / "city.tif", "--model", SPEC.name]
    done = xview_loc(
        "pairs", folder / "drive", "--cameras", "all", "--imu", "/imu", "--out", folder / "pairs", *words
    )
    assert "without" not in done
    return folder


def test_the_drive_corrects_labels_of_a_rig(folder: Path, tmp_path: Path) -> None:
    """The shipped model finds its place with six cameras of a vehicle that tilts, as with a panorama."""
    teacher = load_model("ccvpe-small")
    source = PairDataset([folder / "pairs" / "drive"], SPEC)
    track = source.track()
    assert track is not None
    truth = true_from_fix(track, *read_timed_track(folder / "drive", "/truth/fix").at(track.stamp_ns))
    chosen = AdaptationOptions.published(teacher.model, smooth=True, held_out=0.2)
    run = Distillation(make_fabric("cpu"), teacher, source, tmp_path, chosen, true_from_fix=truth)
    maxima = run.teacher_labels()
    assert len(maxima) == TRAINED  # the others are held out
    before = run.true_errors_m(maxima)
    assert np.median(before) < 5.0 < np.linalg.norm(truth, axis=1).mean()
    smoothed = run.smoothed(teacher).of(run.training_index)
    print(
        before.mean(),
        np.median(before),
        run.true_errors_m(smoothed.labels(maxima)).mean(),
        np.linalg.norm(truth, axis=1).mean(),
    )
    assert run.true_errors_m(smoothed.labels(maxima)).mean() < 0.7 * before.mean()


def test_a_student_is_trained_from_a_rig(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("ccvpe-tiny").train()
    pairs = PairDataset([folder / "pairs" / "drive"], model.spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    batch = default_collate([pairs[index] for index in range(0, len(pairs), 4)])
    with torch.no_grad():
        model.match(batch["ground"], model.encode_aerial(batch["aerial"]), 0.0)
    save_checkpoint(model, tmp_path / "teacher.safetensors")
    words: list[object] = ["--model", "ccvpe-tiny", "--checkpoint", tmp_path / "teacher.safetensors"]
    words += ["--accelerator", "cpu"]
    words += ["--epochs", 1, "--batch-size", 8, "--held-out", 0.2, "--sigma", 2, "--workers", 1]
    words += ["--truth", folder / "drive", "--truth-topic", "/truth/fix"]
    pairs = folder / "pairs" / "drive"
    printed = xview_loc("adapt", pairs, "--out", tmp_path / "out", "--recipe", "drives", *words)
    assert "verdict" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["unreadable"] == 0 and metrics["smoothing"]["pairs"] == TRAINED
    student = load_checkpoint(tmp_path / "out" / "student.safetensors").model
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), model.parameters(), strict=True)]
    assert any(changed)


def test_the_bag_says_what_it_holds(folder: Path) -> None:
    printed = xview_loc("pairs", "info", folder / "pairs" / "drive", "--picture", folder / "places.png")
    count = len(PairBag(folder / "pairs" / "drive"))
    for line in (f"back_left: {count} images, 160 x 90, plumb_bob", f"{count} from imu: roll -"):
        assert line in printed
