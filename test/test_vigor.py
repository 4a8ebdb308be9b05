"""VIGOR's labels and images as samples."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fixtures import (
    CHICAGO,
    RED,
    make_vigor_target,
    noise,
    paint,
    vigor_line,
    write_image,
    write_labels,
    write_vigor_images,
)

from xview_loc.datasets import DatasetError, PoseDataset, Sample, VigorDataset, open_dataset, vigor
from xview_loc.datasets.benchmark import part_of, turns
from xview_loc.geodesy import LocalProjection
from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD
from xview_loc.models.ccvpe import CONFIGS

SPEC = CONFIGS["ccvpe-vigor"].spec
REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "vigor" / "Chicago"
GREY = np.full((64, 128, 3), 90, np.uint8)


def colours(image: torch.Tensor) -> np.ndarray:
    """RGB 0..1, (H, W, 3)."""
    return (image * IMAGENET_STD[:, None, None] + IMAGENET_MEAN[:, None, None]).permute(1, 2, 0).numpy()


def true_place(line: str, gsd: float) -> tuple[float, float]:
    """Return raw pixels (south, east) from the tile's centre, by latitude and longitude in the names."""
    lat, lon = (float(x) for x in line.split(",")[1:3])
    centre = re.search(r"satellite_([-\d.]+)_([-\d.]+)\.png", line)
    assert centre
    east, north = LocalProjection(float(centre[1]), float(centre[2])).forward(lat, lon)
    return -north / gsd, east / gsd


def chicago(root: Path, lines: tuple[str, ...] = CHICAGO) -> None:
    """Write real label lines and tiles with the camera's true position painted on them."""
    write_labels(root, "Chicago", "pano_label_balanced", list(lines))
    write_labels(root, "SanFrancisco", "pano_label_balanced", [vigor_line(0)])
    for line in lines:
        tile = np.full((640, 640, 3), 60, np.uint8)
        south, east = true_place(line, 0.111262)
        paint(tile, 319.5 + south, 319.5 + east, RED, 6.0)
        write_vigor_images(root, "Chicago", line, GREY, tile)


@pytest.fixture(scope="module")
def real_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chicago")
    chicago(root)
    return root


@pytest.mark.parametrize("number", range(3))
def test_the_camera_is_where_the_position_says(real_lines: Path, number: int) -> None:
    sample = VigorDataset(real_lines, "cross-test", SPEC)[1 + number]
    aerial = colours(sample["aerial"])
    red = (aerial[..., 0] > 0.7) & (aerial[..., 1] < 0.3)
    found = np.argwhere(red).mean(axis=0)
    # Labels are whole raw pixels, and their scale differs slightly.
    assert sample["position"].numpy() == pytest.approx(found, abs=1.5)
    south_east = ((23, 29), (6, -106), (-82, -30))[number]
    assert sample["position"].tolist() == pytest.approx([255.5 + 0.8 * x for x in south_east])
    assert float(sample["meters_per_pixel"]) == pytest.approx(0.111262 * 640 / 512)
    assert sample["fix"].tolist() == [255.5, 255.5]
    # Uniform over +-160 raw pixels.
    assert float(sample["fix_std"]) == pytest.approx(320 / math.sqrt(12) * 0.111262)
    assert float(sample["heading"]) == 0.0 and bool(sample["heading_known"])
    assert int(sample["index"]) == 1 + number


def test_tiles_of_any_size_hold_the_same_position(tmp_path: Path) -> None:
    line = vigor_line(0, 100.0, -60.0)
    for stem, side in (("a", 640), ("b", 512), ("c", 320)):
        root = tmp_path / stem
        write_labels(root, "NewYork", "pano_label_balanced", [line])
        write_labels(root, "Seattle", "pano_label_balanced", [line])
        tile = np.full((side, side, 3), 60, np.uint8)
        paint(tile, (side - 1) / 2 + 100 * side / 640, (side - 1) / 2 + 60 * side / 640, RED, side / 80)
        for city in ("NewYork", "Seattle"):
            write_vigor_images(root, city, line, GREY, tile)
        samples = VigorDataset(root, "cross-train", SPEC)
        for sample, gsd in zip((samples[0], samples[1]), (0.113248, 0.100817), strict=True):
            aerial = colours(sample["aerial"])
            found = np.argwhere((aerial[..., 0] > 0.6) & (aerial[..., 1] < 0.35)).mean(axis=0)
            assert sample["position"].numpy() == pytest.approx(found, abs=0.6)
            assert float(sample["meters_per_pixel"]) * 512 == pytest.approx(gsd * 640)


@pytest.mark.skipif(not REAL.exists(), reason="no real VIGOR labels here")
def test_real_labels_agree_with_the_names_of_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "splits__corrected" / "Chicago"
    folder.mkdir(parents=True)
    text = (REAL / "same_area_balanced_test__corrected.txt").read_bytes()
    (folder / "same_area_balanced_test__corrected.txt").write_bytes(text)
    labels = list(vigor._read(tmp_path, "Chicago", "same_area_balanced_test", "corrected"))
    assert len(labels) > 12000 and labels[-1].line == len(labels)
    tiles = set((REAL / "satellite_list.txt").read_text().split())
    assert {label.tile for label in labels} <= tiles
    for label in labels[::20]:
        south, east = true_place(f"{label.panorama} {label.tile}", 0.111262)
        assert (label.south, label.east) == pytest.approx((south, east), abs=2.5)


def test_an_unknown_heading_turns_the_panorama(tmp_path: Path) -> None:
    """After a quarter turn to the left, the centre column shows the west."""
    chicago(tmp_path)
    panorama = np.zeros((64, 128, 3), np.uint8)
    panorama[:, 60:68] = (0, 255, 0)  # north
    panorama[:, 28:36] = (255, 0, 0)  # west
    panorama[:, 92:100] = (0, 0, 255)  # east
    write_vigor_images(tmp_path, "SanFrancisco", vigor_line(0), panorama, np.zeros((80, 80, 3), np.uint8))
    (tmp_path / "rolls.txt").write_text("0.25\n0.1\n0.9\n0.5\n")

    def centre(sample: Sample) -> list[float]:
        middle = colours(sample["ground"])[:, 310:330].mean(axis=(0, 1))
        return [round(float(x)) for x in middle]

    straight = VigorDataset(tmp_path, "cross-test", SPEC)[0]
    assert centre(straight) == [0, 1, 0]
    rolls = tmp_path / "rolls.txt"
    turned = VigorDataset(tmp_path, "cross-test", SPEC, heading_known=False, rolls=rolls)[0]
    assert centre(turned) == [1, 0, 0]
    # Counter-clockwise from north, west is a quarter turn.
    assert float(turned["heading"]) == pytest.approx(math.pi / 2) and not turned["heading_known"]
    assert torch.equal(turned["ground"], straight["ground"].roll(160, 2))
    north = VigorDataset(tmp_path, "cross-test", SPEC, heading_known=False)[0]
    assert float(north["heading"]) == pytest.approx(0.5488135 * 2 * math.pi)
    assert torch.equal(north["ground"], straight["ground"].roll(round(0.5488135 * 640), 2))


def test_the_target_area_is_split_as_in_the_paper(tmp_path: Path) -> None:
    make_vigor_target(tmp_path, 10)
    whole = VigorDataset(tmp_path, "cross-test", SPEC)
    parts = {name: VigorDataset(tmp_path, name, SPEC) for name in ("adapt", "validation", "test")}
    assert [len(part) for part in parts.values()] == [14, 2, 4] and len(whole) == 20
    places = sorted(tuple(part[i]["position"].tolist()) for part in parts.values() for i in range(len(part)))
    assert places == sorted(tuple(whole[i]["position"].tolist()) for i in range(20))
    assert len({part.name for part in (whole, *parts.values())}) == 4
    for dataset in parts.values():
        assert dataset.true_from_fix() == pytest.approx(PoseDataset.true_from_fix(dataset), abs=1e-4)
    backwards = np.arange(20)[::-1]
    np.save(tmp_path / "order.npy", backwards)
    (tmp_path / "order.txt").write_text("\n".join(str(i) for i in backwards))
    for file in ("order.npy", "order.txt"):
        last = VigorDataset(tmp_path, "test", SPEC, order=tmp_path / file)
        for i, number in enumerate((3, 2, 1, 0)):
            assert torch.equal(last[i]["aerial"], whole[number]["aerial"])
            assert int(last[i]["index"]) == i
    # A panorama is turned alike in all splits.
    turned = VigorDataset(tmp_path, "cross-test", SPEC, heading_known=False)
    last = VigorDataset(tmp_path, "test", SPEC, heading_known=False, order=tmp_path / "order.npy")
    assert torch.equal(last[3]["ground"], turned[0]["ground"]) and last[3]["heading"] == turned[0]["heading"]


def test_the_permutation_and_the_turns_are_those_of_the_authors() -> None:
    """First entries of the files that come with the authors' release, of 53694 panoramas."""
    count = 53694
    assert part_of("adapt", count)[:5].tolist() == [1594, 53474, 19227, 50746, 2080]
    assert [len(part_of(part, count)) for part in ("adapt", "validation", "test")] == [37585, 5370, 10739]
    assert turns(count)[:3] == pytest.approx([0.5488135, 0.71518937, 0.60276338])


def test_both_kinds_of_labels_and_all_splits_are_found(tmp_path: Path) -> None:
    for city in ("NewYork", "Seattle", "SanFrancisco", "Chicago"):
        write_labels(tmp_path, city, "same_area_balanced_train", [vigor_line(0, 10.0)])
        write_labels(tmp_path, city, "same_area_balanced_test", [vigor_line(0), vigor_line(1)])
        write_labels(
            tmp_path, city, "same_area_balanced_test", [vigor_line(0, -50.0)], "splits/{city}/{stem}.txt"
        )
        write_vigor_images(tmp_path, city, vigor_line(0), GREY, noise(np.random.default_rng(0), 80, 80))
    assert len(VigorDataset(tmp_path, "same-train", SPEC)) == 4
    assert len(VigorDataset(tmp_path, "same-test", SPEC)) == 8
    original = open_dataset(f"vigor:{tmp_path}:same-test:original", SPEC)
    assert len(original) == 4
    assert original[2]["position"].tolist() == pytest.approx([255.5 - 40, 255.5])


@pytest.mark.parametrize("name", ["{stem}__corrected.txt", "{stem}.txt"])
def test_corrected_labels_are_found_where_the_models_authors_keep_them(tmp_path: Path, name: str) -> None:
    for city in ("NewYork", "Seattle"):
        write_labels(
            tmp_path, city, "pano_label_balanced", [vigor_line(0, 10.0)], f"splits_new/{{city}}/{name}"
        )
        write_vigor_images(tmp_path, city, vigor_line(0), GREY, noise(np.random.default_rng(0), 80, 80))
    dataset = VigorDataset(tmp_path, "cross-train", SPEC)
    assert dataset[0]["position"].tolist() == pytest.approx([255.5 + 8, 255.5]) and len(dataset) == 2
    # SliceMatch's own folder is read where there is one.
    write_labels(tmp_path, "Seattle", "pano_label_balanced", [vigor_line(0, 20.0)])
    assert VigorDataset(tmp_path, "cross-train", SPEC)[1]["position"][0] == pytest.approx(255.5 + 16)
    with pytest.raises(DatasetError, match=r"splits/NewYork/pano_label_balanced.txt does not exist"):
        VigorDataset(tmp_path, "cross-train", SPEC, labels="original")


def test_errors_are_one_line(tmp_path: Path) -> None:
    def fails(message: str, split: str = "cross-test", **options: object) -> None:
        with pytest.raises(DatasetError, match=message) as caught:
            dataset = VigorDataset(tmp_path, split, SPEC, **options)  # type: ignore[arg-type]
            dataset[1]
        assert "\n" not in str(caught.value)

    fails(r"SanFrancisco/pano_label_balanced__corrected.txt does not exist")
    chicago(tmp_path)
    path = write_labels(tmp_path, "SanFrancisco", "pano_label_balanced", [vigor_line(0), vigor_line(1)])
    fails(r"panorama/P1.jpg does not exist \(named in .*SanFrancisco/.*corrected.txt line 2\)")
    panorama = write_image(tmp_path / "SanFrancisco" / "panorama" / "P1.jpg", GREY)
    fails(r"satellite/T1.png does not exist \(named in .* line 2\)")
    tile = write_image(tmp_path / "SanFrancisco" / "satellite" / "T1.png", GREY)
    fails(r"T1.png has 128 x 64 pixels, a tile is square \(named in .* line 2\)")
    tile.write_bytes(b"no image at all")
    fails(r"T1.png cannot be used: not a JPEG, PNG or WebP image .*line 2\)")
    panorama.write_bytes(panorama.read_bytes()[:-40])
    fails(r"P1.jpg cannot be used: .* truncated .*line 2\)")
    for broken in ("P1.jpg T1.png", "P1.jpg T1.png x 0 b 0 0 c 0 0 d 0 0", "", vigor_line(1, 400.0)):
        path.write_text(f"{vigor_line(0)}\n{broken}\n")
        fails(r"SanFrancisco/pano_label_balanced__corrected.txt line 2 is not a VIGOR label")
    path.write_text("")
    fails("SanFrancisco/pano_label_balanced__corrected.txt is empty")
    path.write_text(f"{vigor_line(0)}\n")
    fails("no split 'cross'", split="cross")
    fails("no 'new' labels", labels="new")
    (tmp_path / "order.txt").write_text("0\n1\n1\n3\n")
    fails("not a permutation of the numbers 0 to 3", split="test", order=tmp_path / "order.txt")
    (tmp_path / "order.txt").write_text("0\none\n")
    fails("order.txt line 2 is not a number: 'one'", split="test", order=tmp_path / "order.txt")
    (tmp_path / "rolls.npy").write_bytes(b"rubbish")
    fails("rolls.npy is not a .npy file", heading_known=False, rolls=tmp_path / "rolls.npy")
    np.save(tmp_path / "rolls.npy", np.ones(3))
    fails("does not hold 4 shares of a turn", heading_known=False, rolls=tmp_path / "rolls.npy")
    with pytest.raises(DatasetError, match="ccvpe-kitti does not take"):
        VigorDataset(tmp_path, "test", CONFIGS["ccvpe-kitti"].spec)
    for text in (f"vigor:{tmp_path}:nowhere", "vigor:nowhere"):
        with pytest.raises(DatasetError, match=r"no split 'nowhere'|unknown dataset"):
            open_dataset(text, SPEC)
