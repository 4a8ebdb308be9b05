"""Training data of any camera: what random cameras on tilted vehicles see."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from xview_loc.camera import PanoramaCamera
from xview_loc.datasets import DatasetError, open_dataset
from xview_loc.datasets.random_cameras import random_view
from xview_loc.models.ccvpe import CONFIGS
from xview_loc.models.inputs import denormalise
from xview_loc.models.specs import ModelSpec
from xview_loc.rig import UNSEEN
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive

SPEC = CONFIGS["ccvpe-small"].spec
WIDE = PanoramaCamera(512, 160, math.radians(45.0), math.radians(-75.0))
WANTED = PanoramaCamera(128, 32, math.radians(30.0), math.radians(-60.0))


def views(count: int, panorama: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [random_view(panorama, WIDE, WANTED, rng) for _ in range(count)]


def test_views_range_from_one_camera_to_all_around() -> None:
    grey = np.full((160, 512, 3), 200, np.uint8)
    seen = [mask.mean() for _, mask in views(100, grey)]
    assert min(seen) < 0.15 and max(seen) == 1.0
    assert 0.2 < np.mean(np.array(seen) > 0.95) < 0.6
    for image, mask in views(20, grey):
        assert (image[~mask] == UNSEEN).all()
        # Exposures differ between cameras, but day stays day.
        assert image[mask].mean() > 100 and image[mask].min() > 80


def test_the_horizon_stays_near_the_horizon() -> None:
    """Tilts are those of vehicles: up to six degrees about each axis."""
    rows = np.arange(160)[:, None, None]
    panorama = np.broadcast_to(np.where(rows < 60, 255, 0), (160, 512, 3)).astype(np.uint8)
    heights = []
    for image, mask in views(60, panorama):
        column = np.flatnonzero(mask[6:16].all(0))
        if len(column):
            heights.append(32 - np.argmax(image[::-1, column, 0] > 150, axis=0))
    found = np.concatenate(heights) * 90.0 / 32
    assert np.abs(found.mean() - 30.0) < 1.5
    assert np.abs(found - 30.0).max() < 13.0
    assert found.std() > 1.0


def test_a_data_set_of_any_camera(tmp_path: Path) -> None:
    name = "simulated:source:3:4:any-camera"
    data = open_dataset(name, SPEC, cache_dir=tmp_path, augment=True)
    assert data.name == "simulated:source:3-3:4:any-camera"
    first = [data[i]["ground"] for i in range(4)]
    assert all(torch.equal(a, data[i]["ground"]) for i, a in enumerate(first))
    data.epoch = 1
    assert not any(torch.equal(a, data[i]["ground"]) for i, a in enumerate(first))
    fixed = open_dataset(name, SPEC, cache_dir=tmp_path)
    fixed.epoch = 1
    assert all(torch.equal(a, fixed[i]["ground"]) for i, a in enumerate(first))
    with pytest.raises(DatasetError, match="STYLE:CITIES:FRAMES"):
        open_dataset("simulated:source:3:4:any", SPEC, cache_dir=tmp_path)


def test_models_of_other_elevations_do_not_share_panoramas(tmp_path: Path) -> None:
    """Cities are rendered once for all models that see the same."""
    name = "simulated:source:3:2"
    narrow = open_dataset(name, SPEC, cache_dir=tmp_path)[0]
    again = open_dataset(name, replace(SPEC, bins=8), cache_dir=tmp_path)[0]
    assert torch.equal(narrow["ground"], again["ground"]) and len(list(tmp_path.iterdir())) == 1
    wide = open_dataset(name, replace(SPEC, elevation_deg=(90.0, -90.0)), cache_dir=tmp_path)[0]
    assert not torch.equal(narrow["ground"], wide["ground"])


def test_a_pinhole_camera_stands_on_a_tile_turned_to_its_heading(tmp_path: Path) -> None:
    """Up to ten degrees off; what it sees is below the horizon on the road, and above it in the sky."""
    spec = ModelSpec("stub", "pinhole", (48, 128), 96, 0.5, 8, "left", intrinsics=(64.0, 64.0, 63.5, 23.5))
    data = open_dataset("simulated:source:3:3", spec, cache_dir=tmp_path)
    random = open_dataset("simulated:source:3:3:any-camera", spec, cache_dir=tmp_path)
    city = build_city(3, "source")
    aerial = cv2.resize(city.aerial, None, fx=city.gsd / 0.5, fy=city.gsd / 0.5, interpolation=cv2.INTER_AREA)
    for k, frame in enumerate(drive(city, 3, options=DriveOptions(rate_hz=1.0), view=None)):
        for sample in (data[k], random[k]):
            assert sample["ground"].shape == (3, 48, 128)
            assert sample["intrinsics"].tolist() == [[64.0, 0.0, 63.5], [0.0, 64.0, 23.5], [0.0, 0.0, 1.0]]
            (row, col), angle = sample["position"].tolist(), float(sample["heading"])
            assert abs(math.degrees(angle) - 90.0) < 10.01
            tile = denormalise(sample["aerial"], spec)
            for ahead in (0.0, 8.0):
                east = frame.truth.east + ahead * math.cos(frame.truth.heading)
                north = frame.truth.north + ahead * math.sin(frame.truth.heading)
                half = aerial.shape[0] * 0.5 / 2
                shown = patch(aerial / 255.0, (half - north) / 0.5 - 0.5, (east + half) / 0.5 - 0.5)
                reach = ahead / 0.5
                at = row - reach * math.cos(angle), col + reach * math.sin(angle)
                assert np.abs(patch(tile, *at) - shown).max() < 0.08


def patch(image: np.ndarray, row: float, col: float) -> np.ndarray:
    """Mean colour around a pixel."""
    return cv2.getRectSubPix(image.astype(np.float32), (5, 5), (float(col), float(row))).mean((0, 1))
