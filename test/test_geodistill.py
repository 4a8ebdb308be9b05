"""GeoDistill's recipe: students that see a sector learn the heat maps of a teacher that follows them."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_fixtures import PAIRS, render_pairs, simulated_pairs, small_city, tiny_models, xview_loc
from torch.utils.data import default_collate

from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.adaptation.labels import AdaptationError
from xview_loc.datasets.base import Batch
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_checkpoint, save_checkpoint
from xview_loc.training.hidden_sectors import hide_sectors
from xview_loc.training.losses import GeoDistillLoss
from xview_loc.training.trainer import (
    PoseValidation,
    TrainingError,
    TrainingOptions,
    TrainingProgress,
    check_heading,
    make_fabric,
    train,
)


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    render_pairs(small_city(), folder)
    return folder


def tiny(seed: int = 0) -> CrossViewModel:
    torch.manual_seed(seed)
    return create_model("ccvpe-tiny").eval()


@pytest.fixture(scope="module")
def batch(cache: Path) -> Batch:
    pairs = simulated_pairs(tiny().spec, cache)
    return default_collate([pairs[index] for index in range(4)])


def test_one_sector_of_each_panorama_is_seen() -> None:
    ground = torch.ones(200, 3, 4, 360)
    batch = hide_sectors({"ground": ground}, np.random.default_rng(0), (180.0, 240.0))
    assert batch["whole"] is ground
    seen = batch["ground"].numpy()
    assert set(np.unique(seen)) == {0.0, 1.0}
    columns = seen[:, 0, 0]
    assert (seen == columns[:, None, None]).all()
    widths = columns.sum(1)
    assert widths.min() >= 179 and widths.max() <= 241 and np.ptp(widths) > 40
    # Cyclically, one sector begins and ends.
    assert (np.abs(columns - np.roll(columns, 1, 1)).sum(1) == 2).all()
    assert columns.mean(0).min() > 0.3  # in any direction


def test_the_loss_is_that_of_an_independent_computation(batch: Batch) -> None:
    student, teacher = tiny(0), tiny(1)
    hidden = hide_sectors(batch, np.random.default_rng(0), (180.0, 240.0))
    value = GeoDistillLoss(3, teacher)(student, hidden, 0.0)
    terms = []
    with torch.no_grad():
        maps, targets = (
            model.match(ground, model.encode_aerial(batch["aerial"]), 0.0).levels
            for model, ground in ((student, hidden["ground"]), (teacher, batch["ground"]))
        )
    for scores, target in zip(maps, targets, strict=True):
        own, other = (np.exp(x.double().flatten(1).numpy() / 0.06) for x in (scores, target))
        own, other = (x / x.sum(1, keepdims=True) for x in (own, other))
        terms.append(-(other * np.log(own)).sum(1).mean())
    assert float(value.detach()) == pytest.approx(np.mean(terms), rel=1e-4)
    value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_follows_the_student() -> None:
    student, teacher = tiny(0), tiny(1)
    before = copy.deepcopy(teacher)
    GeoDistillLoss(3, teacher).end_epoch(student)
    for now, old, other in zip(teacher.parameters(), before.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * other)


@pytest.mark.parametrize("stop", [(7, 1), (10, 1), (10, 2)])
def test_an_interrupted_run_ends_with_the_same_numbers(
    cache: Path, tmp_path: Path, stop: tuple[int, int]
) -> None:
    """Interrupted in the second epoch of five steps, before and after its end: the moved teacher is kept."""
    pairs = simulated_pairs(tiny().spec, cache)
    options = TrainingOptions(epochs=3, batch_size=8, save_every=1, field_of_view_deg=(180.0, 240.0))

    def run(folder: Path, stop: tuple[int, int] = (0, 0)) -> TrainingProgress:
        calls: Counter[int] = Counter()

        def on_step(progress: TrainingProgress) -> None:
            calls[progress.steps] += 1
            if (progress.steps, calls[progress.steps]) == stop:
                raise KeyboardInterrupt

        model, loss = tiny(0), GeoDistillLoss(3, tiny(0))
        validation = PoseValidation(pairs, (0.0,), 8, 0)
        return train(make_fabric("cpu"), model, pairs, validation, folder, loss, options, on_step=on_step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop)
    assert run(tmp_path / "cut") == run(tmp_path / "whole")


def test_the_command_adapts(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    save_checkpoint(tiny(), tmp_path / "teacher.safetensors")
    words = ["adapt", PAIRS, "--model", "ccvpe-tiny", "--checkpoint", str(tmp_path / "teacher.safetensors")]
    words += ["--out", str(tmp_path / "out"), "--recipe", "geodistill", "--epochs", "1", "--held-out", "0.2"]
    assert "auxiliary" not in xview_loc(*words)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["recipe"]["name"] == "geodistill" and metrics["trained_on"] == 32
    assert metrics["options"]["training"]["field_of_view_deg"] == [180.0, 240.0]
    student = load_checkpoint(tmp_path / "out" / "student.safetensors")
    assert student.metadata["adaptation"]["recipe"]["name"] == "geodistill"


def test_cameras_without_panoramas_are_refused() -> None:
    options = TrainingOptions(field_of_view_deg=(180.0, 240.0))
    with pytest.raises(TrainingError, match="no panoramas"):
        check_heading(create_model("ccvpe-pinhole-small").spec, options)


@pytest.mark.parametrize("change", [{"keep": 0.8}, {"rounds": 2}])
def test_without_labels_there_is_nothing_to_filter(cache: Path, tmp_path: Path, change: dict) -> None:
    save_checkpoint(tiny(), tmp_path / "teacher.safetensors")
    teacher = load_checkpoint(tmp_path / "teacher.safetensors")
    options = AdaptationOptions.published(teacher.model, geodistill=True, **change)
    with pytest.raises(AdaptationError, match="no labels to filter"):
        Distillation(make_fabric("cpu"), teacher, simulated_pairs(tiny().spec, cache), tmp_path, options)
