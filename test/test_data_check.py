"""Pairs are checked before students are trained: map, headings, odometry, and the clocks of fixes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adaptation_fixtures import SPEC, tiny_models, write_drive, xview_loc

from xview_loc.adaptation import data_check
from xview_loc.adaptation.data_check import check_data, fix_delay, match_fault
from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.adaptation.labelling import ReadOptions
from xview_loc.adaptation.labels import PseudoLabels
from xview_loc.datasets.base import PairSample, PairSource, Track
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection
from xview_loc.images import encode_jpeg
from xview_loc.maps.base import AerialTile
from xview_loc.models import create_model
from xview_loc.models.checkpoint import load_model, save_checkpoint
from xview_loc.recordings.input_faults import input_faults
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.simulation.city import build_city
from xview_loc.training.trainer import make_fabric

PLANE = LocalProjection(48.2, 16.37)


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    """Seventy seconds in a city of the style that the shipped model knows."""
    folder = tmp_path_factory.mktemp("drive")
    write_drive(build_city(3, "source", size_m=500.0), folder)
    return PairDataset([folder / "pairs"], SPEC)


class Faulty(PairSource):
    """The pairs of another source, with a fault."""

    def __init__(self, source: PairSource, fault: str) -> None:
        self.name, self._source, self._fault = f"{source.name} {fault}", source, fault

    def __len__(self) -> int:
        return len(self._source)

    def track(self) -> Track | None:
        track = self._source.track()
        assert track is not None
        return replace(track, moved=-track.moved[::-1]) if self._fault == "odometry" else track

    def __getitem__(self, index: int) -> PairSample:
        sample = self._source[index]
        if self._fault == "other map":
            sample["aerial"] = self._source[(index + 25) % len(self)]["aerial"]
        if self._fault == "turned":
            sample["ground"] = sample["ground"].roll(SPEC.ground_size[1] // 2, 2)
        return sample


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("none", ""),
        ("other map", "no better than images of other places"),
        ("turned", "turned by 180 degrees"),
    ],
)
def test_images_must_fit_their_tiles(
    drive: PairDataset, fault: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a style that the model knows, few pairs tell.
    monkeypatch.setattr(data_check, "_LEAST_PAIRS", len(drive))
    model, index = load_model("ccvpe-small").model, np.arange(len(drive))
    found = match_fault(make_fabric("cpu"), model, Faulty(drive, fault), index, ReadOptions())
    assert found is not None and says in found and bool(found) == bool(says)


@pytest.mark.parametrize(("fault", "least"), [("none", 0), ("odometry", 0), ("odometry", 100)])
def test_drives_must_explain_their_images(
    drive: PairDataset, fault: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odometry of another order: single images fit the map all the same, if enough are compared to tell."""
    source, teacher = Faulty(drive, fault), load_model("ccvpe-small")
    options = AdaptationOptions.published(teacher.model, smooth=None)
    run = Distillation(make_fabric("cpu"), teacher, source, tmp_path, options)
    monkeypatch.setattr(data_check, "_LEAST_PAIRS", least or len(run.training_index))
    faults = [text.split(",")[0] for text in check_data(run).faults]
    assert faults == (["single images fit the map"] if fault == "odometry" and not least else [])


def test_good_drives_have_no_input_faults(drive: PairDataset) -> None:
    assert drive.input_faults() == []


@pytest.mark.parametrize(("delay_s", "says"), [(1.5, "late"), (-1.5, "early"), (0.0, "")])
@pytest.mark.parametrize("lever_m", [0.0, 3.0])
def test_late_fixes_are_noticed(delay_s: float, lever_m: float, says: str) -> None:
    """Twenty minutes in circles, at 3 to 13 m/s; fixes wander by two metres, on a map that is shifted.

    The antenna behind the camera is no delay.
    """
    seconds, rng = np.arange(1200), np.random.default_rng(0)

    def place(at: np.ndarray, behind_m: float = 0.0) -> np.ndarray:
        turned = 0.08 * at - np.cos(0.05 * at)
        ahead = np.stack([-np.sin(turned), np.cos(turned)], 1)
        return 100.0 * np.stack([np.cos(turned), np.sin(turned)], 1) - behind_m * ahead

    wander = 2.0 * np.repeat(rng.normal(size=(41, 2)), 30, axis=0)[:1200]
    fixes = place(seconds - delay_s, lever_m) + wander + (4.0, -2.0)
    lat, lon = PLANE.inverse(*fixes.T)
    track = Track(np.zeros(1200, np.int64), seconds * 10**9, lat, lon, np.full((1200, 2), math.nan))
    zero, one = np.zeros(1200, np.float32), np.ones(1200, np.float32)
    middle = np.zeros((1200, 2), np.float32)
    labels = PseudoLabels(seconds, middle, zero, middle, one, one, zero, zero, zero, zero)
    labels = replace(labels, position=labels.at(place(seconds) - fixes))
    found = fix_delay(track, labels)
    assert bool(found) == bool(says)
    if says:
        seconds_told, said = re.findall(r"fixes are (.*) \+- .* s (\w+) against", found)[0]
        assert said == says and float(seconds_told) == pytest.approx(abs(delay_s), abs=0.4)


def write_pairs(folder: Path, heading_error: float) -> None:
    """A drive along two straight streets, 5 m a second, on tiles of noise."""
    rng = np.random.default_rng(0)
    tile = AerialTile(rng.integers(0, 255, (SPEC.aerial_size,) * 2 + (3,), np.uint8), 48.2, 16.37, SPEC.gsd)
    image = encode_jpeg(rng.integers(0, 255, (64, 256, 3), np.uint8), 90)
    writer = PairWriter(folder, {"vehicle": "test"})
    for number in range(48):
        ahead, course = 5.0 * number, 0.0 if number < 24 else math.pi / 2
        lat, lon = PLANE.inverse(min(ahead, 120.0), max(0.0, ahead - 120.0))
        pair = Pair(10**18 + number * 10**9, "jpeg", image, lat, lon, fix_covariance=np.eye(3))
        writer.add(replace(pair, heading=course + heading_error), tile)
    writer.close()


def test_headings_that_contradict_the_drive_are_named_before_training(tmp_path: Path) -> None:
    """And a student of such pairs is not deployed."""
    write_pairs(tmp_path / "pairs", 0.0)
    assert input_faults(PairBag(tmp_path / "pairs")) == []
    write_pairs(tmp_path / "wrong", math.radians(60.0))
    with tiny_models():
        save_checkpoint(create_model("ccvpe-tiny"), tmp_path / "teacher.safetensors")
        words = ["--model", "ccvpe-tiny", "--checkpoint", tmp_path / "teacher.safetensors", "--epochs", 1]
        words += ["--accelerator", "cpu", "--batch-size", 4, "--recipe", "paper", "--out", tmp_path / "out"]
        printed = xview_loc("adapt", tmp_path / "wrong", *words)
    warning = printed.index("warning: ")
    assert "heading is +60 deg off the course of the fixes" in printed[warning:]
    assert warning < printed.index("student: ")
    verdict = json.loads((tmp_path / "out" / "metrics.json").read_text())["verdict"]
    assert not verdict["deploy"] and "The pairs are faulty" in verdict["summary"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("The pairs are faulty") < page.index("Evidence without true positions")
