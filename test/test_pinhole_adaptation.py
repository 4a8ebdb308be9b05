"""The loop of a model for pinhole cameras, from an ordinary recording of a front camera, by the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_fixtures import tiny_models, xview_loc
from rosbags.highlevel import AnyReader

from xview_loc.bags.ros_types import STORE
from xview_loc.bags.writer import BagWriter
from xview_loc.datasets.pairs import PairDataset
from xview_loc.models import create_model
from xview_loc.models.checkpoint import load_checkpoint, save_checkpoint
from xview_loc.models.specs import SPECS
from xview_loc.recordings.pair_reader import PairBag

FRAMES = 70
# Topics of the rig's only camera, and those of an ordinary recording.
RENAMED = {
    "/front/image/compressed": "/image",
    "/front/camera_info": "/camera_info",
    "/fix": "/fix",
    "/imu": "/imu",
    "/odom": "/odom",
    "/truth/fix": "/truth/fix",
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drive with a front camera on a vehicle that tilts, as ``drive``, and its pairs as ``pairs/drive``."""
    folder = tmp_path_factory.mktemp("pinhole")
    words: list[object] = ["--style", "target", "--city", 3, "--size", 500, "--frames", FRAMES, "--rate", 1]
    xview_loc("simulate", folder / "rig", *words, "--rig", "one", "--height", 96)
    with AnyReader([folder / "rig" / "drive"], default_typestore=STORE) as reader:
        kept = [c for c in reader.connections if c.topic in RENAMED]
        writer = BagWriter(folder / "drive", {RENAMED[c.topic]: c.msgtype for c in kept})
        with closing(writer):
            for connection, stamp, data in reader.messages(connections=kept):
                writer.write(RENAMED[connection.topic], stamp, data)
    words = ["--map", folder / "rig" / "city.tif", "--model", "ccvpe-pinhole-small", "--imu", "/imu"]
    done = xview_loc("pairs", folder / "drive", "--out", folder / "pairs", *words)
    assert "without" not in done
    return folder


def test_tiles_are_large_enough_to_be_turned(folder: Path) -> None:
    bag = PairBag(folder / "pairs" / "drive")
    assert bag.tile_sizes() == {(228, 0.48)} and bag.session()["model"] == "ccvpe-pinhole-small"
    pairs = PairDataset([bag.folder], SPECS["ccvpe-pinhole-small"])
    turns = np.array([float(pairs[k]["turn"]) for k in range(len(pairs))])
    headings = np.array([bag[k].heading for k in range(len(pairs))])
    assert np.abs(turns - headings).max() < 1e-6 and np.ptp(turns) > 1.0


@pytest.mark.parametrize(("name", "way"), [("ccvpe", "--smooth"), ("ccvpe", "paper"), ("ggcvt", "--smooth")])
def test_a_student_is_trained(folder: Path, tmp_path: Path, name: str, way: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"{name}-pinhole-tiny")
    save_checkpoint(model, tmp_path / "teacher.safetensors")
    words: list[object] = ["--model", model.spec.name, "--checkpoint", tmp_path / "teacher.safetensors"]
    words += ["--accelerator", "cpu", "--epochs", 1, "--batch-size", 8, "--held-out", 0.2, "--sigma", 2]
    words += ["--truth", folder / "drive", "--truth-topic", "/truth/fix"]
    words += [way] if way == "--smooth" else []
    printed = xview_loc("adapt", folder / "pairs" / "drive", "--out", tmp_path / "out", *words)
    assert "verdict" in printed and "along" in printed and "across" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["unreadable"] == 0 and ("smoothing" in metrics) == (way == "--smooth")
    for errors in metrics["true_errors"].values():
        along, across = errors["longitudinal_mean"], errors["lateral_mean"]
        assert max(along, across) <= errors["mean"] <= along + across
    assert "along mean" in (tmp_path / "out" / "report.html").read_text()
    student = load_checkpoint(tmp_path / "out" / "student.safetensors").model
    pairs = zip(student.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_the_ablation_says_both_directions(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(create_model("ccvpe-pinhole-tiny"), tmp_path / "teacher.safetensors")
    words: list[object] = ["--model", "ccvpe-pinhole-tiny", "--checkpoint", tmp_path / "teacher.safetensors"]
    words += ["--accelerator", "cpu", "--epochs", 1, "--batch-size", 16, "--held-out", 0.4, "--sigma", 2]
    words += ["--truth", folder / "drive", "--truth-topic", "/truth/fix"]
    printed = xview_loc("ablate", folder / "pairs" / "drive", "--out", tmp_path / "out", *words)
    assert "along" in printed
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert all(row["errors"]["lateral_median"] > 0.0 for row in rows)
    assert "along mean" in (tmp_path / "out" / "ablation.html").read_text()
