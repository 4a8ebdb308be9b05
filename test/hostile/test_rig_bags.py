"""Bags of a rig from strangers: their checksums hold, but what they say is damaged."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from map_fixtures import texture
from test_rig_pairs import NO_FLOOR, pair, three

from xview_loc.bags.writer import BagWriter
from xview_loc.datasets.pairs import PairDataset
from xview_loc.errors import UserError
from xview_loc.maps.base import AerialTile
from xview_loc.models.specs import ModelSpec
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.recordings.statistics import pair_statistics

SPEC = ModelSpec("stub", "panorama", (64, 256), 64, 0.5, bins=8, elevation_deg=(30.0, -60.0))
BAGS = 80
# What may carry damage; tiles and the rest are those of any bag.
TOPICS = ("/tf_static", "camera_info", "own_mask", "image", "/pair/tilt")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, or cut the end off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(4, len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)


def write(folder: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    original, target = BagWriter.write, rng.choice(TOPICS)

    def forged(writer: BagWriter, topic: str, stamp: int, data: bytes, **options: Any) -> None:
        if topic.endswith(target) and rng.random() < 0.7:
            data = damaged(data, rng)
        original(writer, topic, stamp, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BagWriter, "write", forged)
        writer = PairWriter(folder, {}, NO_FLOOR, three())
        tile = AerialTile(texture(64, 64, 5), 48.2, 16.37, 0.5, 1.0)
        for k in range(2):
            writer.add(pair(k, "front", "left", "right"), tile)
        writer.close()


def test_damage_is_an_error_or_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(20)
    outcomes: dict[str, int] = {"read": 0, "refused": 0}
    for number in range(BAGS):
        folder = tmp_path / str(number)
        write(folder, rng, monkeypatch)
        for read in (
            lambda f=folder: PairDataset([f], SPEC)[0],  # type: ignore[misc]
            lambda f=folder: PairDataset([f], SPEC)[1],  # type: ignore[misc]
            lambda f=folder: PairBag(f).rig(),  # type: ignore[misc]
            lambda f=folder: pair_statistics(PairBag(f)),  # type: ignore[misc]
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                try:
                    read()
                    outcomes["read"] += 1
                except UserError as error:
                    outcomes["refused"] += 1
                    assert str(error).isprintable() and len(str(error)) < 2000
    assert min(outcomes.values()) > BAGS / 2, outcomes
