"""A model is trained from drives alone, without any surveyed position."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adaptation_fixtures import small_city, tiny_models, write_drive, xview_loc

from xview_loc.adaptation import bootstrap as bootstrapping
from xview_loc.adaptation import distillation
from xview_loc.adaptation.bootstrap import BootstrapOptions, bootstrap
from xview_loc.adaptation.labels import AdaptationError
from xview_loc.adaptation.verdict import Verdict
from xview_loc.datasets.base import Track
from xview_loc.datasets.pairs import PairDataset
from xview_loc.models import create_model
from xview_loc.models.checkpoint import load_checkpoint
from xview_loc.training.trainer import TrainingOptions, make_fabric

FABRIC = make_fabric("cpu")


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drive")
    write_drive(small_city(), folder)
    return folder


class Photographs(PairDataset):
    """Pairs a minute apart, without odometry."""

    def track(self) -> Track:
        track = super().track()
        minutes = np.arange(len(self)) * 60 * 10**9
        return replace(track, stamp_ns=minutes, moved=np.full((len(self), 2), np.nan))


def options(**changes: object) -> BootstrapOptions:
    training = TrainingOptions(epochs=1, batch_size=8, learning_rate=1e-3, heading_priors_deg=(0.0, None))
    return BootstrapOptions(training, held_out=0.2, **changes)  # type: ignore[arg-type]


def test_the_command_trains_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["bootstrap", folder / "pairs", "--out", tmp_path, "--model", "ccvpe-tiny", "--rounds", "2"]
    monkeypatch.setattr(distillation, "MIN_MEASUREMENTS", 8)
    words += ["--epochs", "1", "--batch-size", "8", "--held-out", "0.2"]
    words += ["--truth", folder / "drive", "--truth-topic", "/truth/fix"]
    printed = xview_loc(*words)
    assert "round 1: " in printed and "labels uncertain by" in printed and "model.safetensors" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    first = metrics["rounds"][0]
    assert first["verdict"] is None and first["label_std_m"] > 1.0 and first["label_error_m"] > 0.0
    assert metrics["rounds"][-1]["verdict"] is not None
    model = load_checkpoint(tmp_path / "model.safetensors", "ccvpe-tiny")
    assert model.metadata["bootstrap"]["round"] == metrics["round"]
    blank = load_checkpoint(tmp_path / "blank-ccvpe-tiny-0.safetensors")
    assert any(
        not np.array_equal(a.numpy(), b.numpy())
        for a, b in zip(blank.model.state_dict().values(), model.model.state_dict().values(), strict=True)
    )
    page = (tmp_path / "report.html").read_text()
    for text in ("The model is that of round", "trained without true positions", "labels off by, m"):
        assert text in page
    # The same command finds everything done.
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    again = xview_loc(*words)
    assert [line for line in again.splitlines() if "round 1: " in line][-1] in printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()} == stages


def test_rounds_end_when_they_bring_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PairDataset([folder / "pairs"], create_model("ccvpe-tiny").spec)
    verdicts = [Verdict(good, "", "", [], float(good), (0.0, 0.0, 0.0)) for good in (True, False, True)]
    monkeypatch.setattr(distillation, "MIN_MEASUREMENTS", 8)
    monkeypatch.setattr(bootstrapping, "judge", lambda before, after: verdicts.pop(0))
    rounds = list(bootstrap(FABRIC, "ccvpe-tiny", source, tmp_path, options(rounds=9)))
    assert [done.better for done in rounds] == [True, True, False]
    assert len({done.student.path for done in rounds}) == 3


def test_what_cannot_be_bootstrapped_is_refused(folder: Path, tmp_path: Path) -> None:
    source = PairDataset([folder / "pairs"], create_model("ggcvt-tiny").spec)
    with pytest.raises(AdaptationError, match="ggcvt-tiny cannot learn from uncertain positions"):
        next(bootstrap(FABRIC, "ggcvt-tiny", source, tmp_path, options()))
    few = PairDataset([folder / "pairs"], create_model("ccvpe-tiny").spec)
    with pytest.raises(AdaptationError, match="too few to compare rounds on"):
        next(bootstrap(FABRIC, "ccvpe-tiny", few, tmp_path, options()))
    single = Photographs([folder / "pairs"], create_model("ccvpe-tiny").spec)
    with pytest.raises(AdaptationError, match="does not come from drives"):
        next(bootstrap(FABRIC, "ccvpe-tiny", single, tmp_path, options(rounds=1)))
