"""KITTI's frames on turned and shifted satellite tiles."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_fixtures import (
    DAY,
    DRIVE,
    KITTI_GSD,
    PROJECTION,
    kitti_name,
    kitti_scene,
    make_kitti_frame,
    write_image,
)
from torch.utils.data import default_collate

from xview_loc.adaptation.labelling import match_batch
from xview_loc.cli.evaluate import Benchmark, Heading, open_benchmark
from xview_loc.datasets import DatasetError, KittiDataset, PoseDataset, Sample, open_dataset
from xview_loc.evaluation.errors import evaluate
from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD
from xview_loc.models.ccvpe import CCVPE, CONFIGS
from xview_loc.training.trainer import PoseValidation

SPEC = CONFIGS["ccvpe-kitti"].spec
REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "kitti"
GREY = np.full((1280, 1280, 3), 60, np.uint8)


def found(sample: Sample, channel: int) -> np.ndarray:
    """Return (row, col) of the disc of one colour on the tile."""
    image = sample["aerial"] * IMAGENET_STD[:, None, None] + IMAGENET_MEAN[:, None, None]
    weight = (image[channel] - image.sum(0) / 2).clamp_min(0).numpy()
    assert weight.max() > 0.3
    return np.argwhere(weight > 0.25).mean(axis=0)


def frame(root: Path, yaw: float, line: str, **options: Any) -> Sample:
    make_kitti_frame(root, 1, yaw, kitti_scene(yaw))
    (root / "test2_files.txt").write_text(f"{kitti_name(1)} {line}\n")
    return KittiDataset(root, "test2", SPEC, **options)[0]


@pytest.mark.parametrize(
    ("yaw", "line", "rotation_deg"),
    [
        (0.0, "0 0 0", 0.0),
        (0.7, "0.5 0.25 1.0", 0.0),
        (0.7, "0.5 0.25 1.0", 10.0),
        (0.0, "-0.9 0.6 -0.4", 180.0),
        (-2.5, "-0.9 0.6 -0.4", 180.0),
    ],
)
def test_the_camera_is_where_the_pose_says(
    tmp_path: Path, yaw: float, line: str, rotation_deg: float
) -> None:
    """The antenna is 1.08 m behind and 0.26 m to the left of the camera, whatever the heading."""
    sample = frame(tmp_path, yaw, line, rotation_deg=rotation_deg)
    position, heading = sample["position"].numpy(), float(sample["heading"])
    assert found(sample, 0) == pytest.approx(position, abs=0.5)
    # Clockwise from the tile's top edge.
    ahead = np.array([-math.cos(heading), math.sin(heading)])
    left = np.array([-ahead[1], ahead[0]])
    assert found(sample, 1) == pytest.approx(position + 15 / KITTI_GSD * ahead, abs=0.5)
    assert found(sample, 2) == pytest.approx(position + 8 / KITTI_GSD * left, abs=0.5)
    assert bool(sample["heading_known"]) == (rotation_deg == 0)


def test_shifts_and_turn_are_the_benchmarks(tmp_path: Path) -> None:
    """The first shift is ahead of the tile's centre, the second to the left, the turn counter-clockwise."""
    sample = frame(tmp_path, 0.3, "0.5 0.25 1.0")
    assert sample["position"].tolist() == pytest.approx([255.5 - 5 / KITTI_GSD, 255.5 + 10 / KITTI_GSD])
    assert float(sample["heading"]) == pytest.approx(math.pi / 2)
    turned = frame(tmp_path, 0.3, "0.5 0.25 0.5", rotation_deg=180.0)
    # A quarter turn: what was on the right is at the top.
    assert turned["position"].tolist() == pytest.approx([255.5 - 10 / KITTI_GSD, 255.5 - 5 / KITTI_GSD])
    assert float(turned["heading"]) == pytest.approx(0.0, abs=1e-6)
    some = frame(tmp_path, 0.3, "0.0 0.0 -0.7", rotation_deg=10.0)
    assert float(some["heading"]) == pytest.approx(math.radians(97))
    assert some["fix"].tolist() == [255.5, 255.5]
    assert float(some["fix_std"]) == pytest.approx(20 / math.sqrt(3))
    assert float(some["meters_per_pixel"]) == pytest.approx(KITTI_GSD)


def test_intrinsics_are_scaled_as_ggcvt_was_trained(tmp_path: Path) -> None:
    """By 1242 x 375 pixels whatever the image's size, and without regard to where pixel centres lie."""
    sample = frame(tmp_path, 0.0, "0 0 0")
    across, down = 1024 / 1242, 256 / 375
    expected = [[721.5377 * across, 0, 609.5593 * across], [0, 721.5377 * down, 172.854 * down], [0, 0, 1]]
    assert sample["intrinsics"].numpy() == pytest.approx(np.array(expected), abs=1e-3)
    image = tmp_path / "raw_data" / DRIVE / "image_02" / "data" / "0000000001.png"
    write_image(image, np.zeros((370, 1226, 3), np.uint8))
    other = KittiDataset(tmp_path, "test2", SPEC)
    assert torch.equal(other[0]["intrinsics"], sample["intrinsics"])
    exact = open_dataset(f"kitti:{tmp_path}:test2:exact", SPEC)
    assert float(exact[0]["intrinsics"][0, 0]) == pytest.approx(721.5377 * 1024 / 1226)
    assert exact.name != other.name


def test_exact_intrinsics_are_those_of_the_resized_image(tmp_path: Path) -> None:
    sample = frame(tmp_path, 0.0, "0 0 0", intrinsics="exact")
    assert sample["ground"].shape == (3, 256, 1024)
    across, down = 1024 / 1242, 256 / 375
    # Pixel-centre coordinates: the image's edge is half a pixel before the first centre.
    expected = [
        [721.5377 * across, 0, (609.5593 + 0.5) * across - 0.5],
        [0, 721.5377 * down, (172.854 + 0.5) * down - 0.5],
        [0, 0, 1],
    ]
    assert sample["intrinsics"].numpy() == pytest.approx(np.array(expected), abs=1e-3)


def test_training_draws_anew_in_every_epoch(tmp_path: Path) -> None:
    for number in (1, 2):
        make_kitti_frame(tmp_path, number, 0.0, GREY)
    (tmp_path / "train_files.txt").write_text(f"{kitti_name(1)}\n{kitti_name(2)}\n")
    dataset = KittiDataset(tmp_path, "train", SPEC, rotation_deg=10.0)
    poses = {}
    for epoch in (0, 1, 0):
        dataset.epoch = epoch
        for index in (1, 0):
            sample = dataset[index]
            pose = torch.cat([sample["position"], sample["heading"][None]])
            assert torch.equal(poses.setdefault((epoch, index), pose), pose)
            assert ((pose[:2] - 255.5).abs() * KITTI_GSD).max() <= 20 * (math.sin(0.175) + math.cos(0.175))
            assert abs(float(pose[2]) - math.pi / 2) <= math.radians(10)
    assert len({tuple(pose.tolist()) for pose in poses.values()}) == 4
    assert dataset.true_from_fix() == pytest.approx(PoseDataset.true_from_fix(dataset), abs=1e-4)


@pytest.mark.skipif(not REAL.exists(), reason="no real KITTI split files here")
def test_the_real_split_files_are_read(tmp_path: Path) -> None:
    for file in REAL.glob("*_files.txt"):
        shutil.copy(file, tmp_path)
    sizes = {"train": 19655, "test1": 3773, "test2": 7542, "adapt": 5279, "validation": 754, "test": 1509}
    sets = {split: KittiDataset(tmp_path, split, SPEC) for split in sizes}
    assert {split: len(dataset) for split, dataset in sets.items()} == sizes
    lines = [{frame.line for frame in sets[part]._frames} for part in ("adapt", "validation", "test")]
    assert len(set.union(*lines)) == 7542
    first = sets["test2"]._frames[0]
    assert str(first.image) == f"{DRIVE}/0000000048.png"
    assert first.shift == (-0.3455326, -0.9653194, -0.0077375486)


def test_errors_are_one_line(tmp_path: Path) -> None:
    def fails(message: str, split: str = "test2", **options: Any) -> None:
        with pytest.raises(DatasetError, match=message) as caught:
            KittiDataset(tmp_path, split, SPEC, **options)[0]
        assert "\n" not in str(caught.value)

    fails("test2_files.txt does not exist")
    split_file = tmp_path / "test2_files.txt"
    good = f"{kitti_name(1)} 0 0 0"
    for broken in ("", kitti_name(1), f"{kitti_name(1)} 0 0 1.5", f"{kitti_name(1)} 0 x 0", "a.png 0 0 0"):
        split_file.write_text(f"{good}\n{broken}\n")
        fails(r"test2_files.txt line 2 is not an image's name and three numbers")
    (tmp_path / "train_files.txt").write_text(f"{good}\n")
    fails(r"train_files.txt line 1 is not an image's name: ", split="train")
    split_file.write_text(f"{good}\n")
    fails(r"image_02/data/0000000001.png does not exist \(named in .*test2_files.txt line 1\)")
    make_kitti_frame(tmp_path, 1, 0.0, GREY)
    satellite = write_image(tmp_path / "satmap" / kitti_name(1), GREY[:512, :512])
    fails(r"has 512 x 512 pixels, a satellite map has 1280 x 1280 \(named in .*line 1\)")
    satellite.unlink()
    fails(r"satmap/.*/0000000001.png does not exist")
    make_kitti_frame(tmp_path, 1, 0.0, GREY)
    raw = tmp_path / "raw_data"
    oxts = raw / DRIVE / "oxts" / "data" / "0000000001.txt"
    oxts.write_text("49.0 8.4 115\n")
    fails(r"oxts/data/0000000001.txt line 1 does not hold the inertial system's 30 numbers")
    oxts.unlink()
    fails(r"oxts/data/0000000001.txt does not exist")
    with pytest.raises(DatasetError, match="ccvpe-vigor does not take"):
        KittiDataset(tmp_path, "test2", CONFIGS["ccvpe-vigor"].spec)
    fails("no split 'val'", split="val")
    fails("0 to 180 degrees", rotation_deg=-1.0)
    fails("published or exact, not right", intrinsics="right")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"P_rect_03: {PROJECTION}\n", "calib_cam_to_cam.txt has no line P_rect_02"),
        (
            f"P_rect_03: {PROJECTION}\nP_rect_02: 1 2 3\n",
            "calib_cam_to_cam.txt line 2 is not a camera matrix",
        ),
        (f"P_rect_02: {PROJECTION.replace('7.215377e+02', '0', 1)}\n", "line 1 is not a camera matrix"),
    ],
)
def test_a_damaged_calibration_is_named(tmp_path: Path, text: str, message: str) -> None:
    make_kitti_frame(tmp_path, 1, 0.0, GREY)
    (tmp_path / "raw_data" / DAY / "calib_cam_to_cam.txt").write_text(text)
    (tmp_path / "test2_files.txt").write_text(f"{kitti_name(1)} 0 0 0\n")
    with pytest.raises(DatasetError, match=message):
        KittiDataset(tmp_path, "test2", SPEC)[0]


def test_known_headings_have_no_turn(tmp_path: Path) -> None:
    make_kitti_frame(tmp_path, 1, 0.0, GREY)
    (tmp_path / "test1_files.txt").write_text(f"{kitti_name(1)} 0 0 1\n")
    text = f"kitti:{tmp_path}:test1"
    assert float(open_dataset(text, SPEC)[0]["heading"]) == pytest.approx(math.pi / 2)
    unknown = open_dataset(text, SPEC, heading_known=False)
    assert float(unknown[0]["heading"]) == pytest.approx(math.radians(80))
    assert unknown.name != open_dataset(text, SPEC).name


def test_adaptation_labels_with_the_bins_of_an_evaluation(tmp_path: Path) -> None:
    """All of them, as the published model does, though the heading is known."""
    torch.manual_seed(0)
    narrow = replace(CONFIGS["ccvpe-kitti"], width=0.25, up=(32,) * 5)
    narrow = replace(narrow, up_orientation=(32,) * 5, conv_orientation=(32,) * 5)
    model = CCVPE(narrow).eval()
    make_kitti_frame(tmp_path, 1, 0.4, kitti_scene(0.4))
    (tmp_path / "test2_files.txt").write_text(f"{kitti_name(1)} 0.2 -0.1 0\n{kitti_name(1)} -0.9 0.6 0\n")
    dataset, prior = open_benchmark(model, Benchmark.kitti, tmp_path, "test2", Heading.known)
    batch = default_collate([dataset[0], dataset[1]])
    maps, _ = match_batch(model, batch, 0.0)
    assert maps.levels[0].shape[1] == SPEC.bins
    distance = (maps.peak() - batch["position"]).norm(dim=1) * KITTI_GSD
    evaluated = evaluate(model, dataset, prior)
    assert evaluated.distance_m == pytest.approx(distance.numpy(), abs=1e-3)
    trained = PoseValidation(dataset, (0.0,), 2, 0)(model, 0)
    assert trained["known_mean_m"] == pytest.approx(evaluated.distance_m.mean(), abs=1e-3)
