"""Training data of any camera: what random cameras on tilted vehicles see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xview_loc.datasets import DatasetError, open_dataset
from xview_loc.datasets.random_cameras import random_view
from xview_loc.models.ccvpe import CONFIGS
from xview_loc.rig import UNSEEN

SPEC = CONFIGS["ccvpe-small"].spec
WIDE, WANTED = (45.0, -75.0), (30.0, -60.0)


def views(count: int, panorama: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [random_view(panorama, WIDE, (32, 128), WANTED, rng) for _ in range(count)]


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
