"""Knowledge self-distillation: labels, filter, losses, stages that survive a kill, and the verdict."""

from __future__ import annotations

import copy
import html
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from xview_loc.adaptation import ablation
from xview_loc.adaptation import distillation as distill
from xview_loc.adaptation import verdict as verdicts_module
from xview_loc.adaptation.distillation import Distillation
from xview_loc.adaptation.figures import most_moved
from xview_loc.adaptation.heat_map_store import store_heat_maps, stored_bytes
from xview_loc.adaptation.indicators import Indicators, Views, look
from xview_loc.adaptation.labels import (
    AdaptationError,
    PseudoLabels,
    distance_m,
    encode_tiles,
    label_pairs,
    reliable,
    with_headings_at,
)
from xview_loc.adaptation.options import AdaptationOptions
from xview_loc.adaptation.report import write_results
from xview_loc.adaptation.verdict import judge
from xview_loc.bags.ros_types import header, message, quaternion, serialize
from xview_loc.datasets import SimulatedDataset
from xview_loc.datasets.base import DatasetError, PairSample, PairSource, true_from_fix
from xview_loc.datasets.pairs import PairDataset
from xview_loc.errors import UserError
from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection
from xview_loc.images import encode_jpeg
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialTile
from xview_loc.models import create_model
from xview_loc.models.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.recordings.pairs import Pair, PairWriter
from xview_loc.recordings.tracks import TrackError, read_timed_track
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView
from xview_loc.training.losses import DistillationLoss, pool_label
from xview_loc.training.trainer import TrainingError, make_fabric

ROOT = Path(__file__).resolve().parent.parent
SPEC = create_model("ccvpe-small").spec
START_NS = 1_700_000_000_000_000_000
FABRIC = make_fabric("cpu")


@pytest.fixture(scope="session")
def teacher() -> Checkpoint:
    return load_model("ccvpe-small")


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> SimulatedDataset:
    """Forty pairs of a target-style city, with their truth."""
    dataset = SimulatedDataset("target", range(3, 4), 40, SPEC, cache_dir=tmp_path_factory.mktemp("cities"))
    dataset.prepare()
    return dataset


def options(model: object, **changes: object) -> AdaptationOptions:
    return AdaptationOptions.published(
        model,  # type: ignore[arg-type]
        **{"sigma": 2.0, "epochs": 1, "batch_size": 4, "held_out": 0.2, **changes},  # type: ignore[arg-type]
    )


def labels_at(position: np.ndarray, index: np.ndarray | None = None, **changes: object) -> PseudoLabels:
    count = len(position)
    one = np.ones(count, np.float32)
    columns = {
        "index": np.arange(count) if index is None else index,
        "position": position.astype(np.float32),
        "heading": 0 * one,
        "fix": np.full((count, 2), 79.5, np.float32),
        "fix_std": 10 * one,
        "meters_per_pixel": 0.5 * one,
        "stray_sigmas": np.linalg.norm(position - 79.5, axis=1).astype(np.float32) / 20,
        "entropy": one,
        "peak_mass": 0.5 * one,
    }
    return PseudoLabels(**{**columns, **changes})  # type: ignore[arg-type]


def test_labels_are_the_model_s_own_maxima(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    labels = label_pairs(FABRIC, teacher.model, city, tmp_path / "labels.npz", batch_size=7)
    assert labels.index.tolist() == list(range(40))
    sample = city[11]
    with torch.inference_mode():
        features = teacher.model.encode_aerial(sample["aerial"][None])
        logits = teacher.model.match(sample["ground"][None], features, 0.0).logits[0]
    row, col = divmod(int(logits.argmax()), SPEC.aerial_size)
    assert labels.position[11].tolist() == [row, col]
    share = logits.flatten().softmax(0)  # a uniform fix on the tile: three sigma are all of it
    assert labels.entropy[11] == pytest.approx(float(-(share * share.log()).sum()), rel=1e-4)
    # Better than the coarse fixes, which are anywhere on the tile.
    errors = np.linalg.norm(labels.from_fix - city.true_from_fix(), axis=1)
    assert np.median(errors) < 0.5 * np.median(np.linalg.norm(city.true_from_fix(), axis=1))
    again = PseudoLabels.load(tmp_path / "labels.npz")
    assert again is not None
    assert np.array_equal(again.position, labels.position)


@pytest.mark.parametrize("name", ["ccvpe-small", "ggcvt-small"])
def test_a_tile_that_comes_again_is_encoded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = load_model(name).model.eval(), torch.Generator().manual_seed(0)
    spec = model.spec
    rows = [0, 0, 1, 1, 1, 0]
    aerial = torch.randn(2, 3, spec.aerial_size, spec.aerial_size, generator=generator)[rows]
    ground = torch.randn(len(rows), 3, *spec.ground_size, generator=generator)
    extra = {name: torch.full((len(rows),), spec.gsd) for name in model.extra_inputs}
    encode, encoded = model.encode_aerial, []
    monkeypatch.setattr(model, "encode_aerial", lambda tiles: encoded.append(len(tiles)) or encode(tiles))
    with torch.inference_mode():
        plain = model.match(ground, encode(aerial), 0.0, **extra).logits
        with torch.autocast("cpu", torch.bfloat16):
            encode_tiles(model, aerial)
        # What half precision left behind is of no matter for what comes after it.
        maps = model.match(ground, encode_tiles(model, aerial), 0.0, **extra).logits
    assert encoded == [3, 3]
    assert (maps - plain).abs().max() < 1e-4 * plain.abs().max()
    # And the weights can be trained, in a copy as well.
    student = copy.deepcopy(model).train()
    student.match(ground, student.encode_aerial(aerial), 0.0, **extra).logits.square().mean().backward()


def test_labels_are_near_the_fix(teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path) -> None:
    """Within three standard deviations, where the fix has any."""

    class Sure(PairSource):
        name = "sure"

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> PairSample:
            std = torch.tensor(math.nan if index == 5 else 2.0)
            return {**city[index], "fix_std": std}  # type: ignore[typeddict-item]

    labels = label_pairs(FABRIC, teacher.model, Sure(), tmp_path / "sure.npz")
    free = label_pairs(FABRIC, teacher.model, city, tmp_path / "free.npz")
    distances = np.linalg.norm(labels.from_fix, axis=1)
    assert distances[labels.index != 5].max() <= 6.0
    assert np.array_equal(labels.position[5], free.position[5])
    near = np.linalg.norm(free.from_fix, axis=1) <= 6.0
    assert np.array_equal(labels.position[near], free.position[near])
    expected = np.linalg.norm(free.from_fix, axis=1) / 2.0
    assert np.delete(labels.stray_sigmas, 5) == pytest.approx(np.delete(expected, 5), rel=1e-4)


def test_unknown_headings_are_turned_and_told_back(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    """Where no heading was recorded the label has the model's own, of the image as it was stored."""

    class Unaware(PairSource):
        name = "unaware"

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> PairSample:
            sample: PairSample = {**city[index]}  # type: ignore[typeddict-item]
            # Stored a quarter turn to the left of north.
            return {
                **sample,
                "ground": sample["ground"].roll(SPEC.ground_size[1] // 4, 2),
                "heading_known": torch.tensor(False),
            }

    labels = label_pairs(FABRIC, teacher.model, Unaware(), tmp_path / "a.npz", heading_prior_deg=None, seed=3)
    errors = np.linalg.norm(labels.from_fix - city.true_from_fix(), axis=1)
    found = errors < 3.0
    assert found.sum() >= 10
    off = np.angle(np.exp(1j * (labels.heading[found] - math.pi / 2)))
    assert np.median(np.abs(off)) < math.radians(12)
    known = label_pairs(FABRIC, teacher.model, city, tmp_path / "b.npz", heading_prior_deg=None, seed=3)
    assert not known.heading.any()


def test_the_filter_keeps_what_two_models_agree_on() -> None:
    a = labels_at(np.zeros((10, 2)))
    b = labels_at(np.array([[i, 0.0] for i in range(10)]))
    assert distance_m(a, b).tolist() == [0.5 * i for i in range(10)]
    assert reliable(a, b, 0.5).tolist() == [True] * 5 + [False] * 5
    assert reliable(a, b, 1.0).all()
    assert reliable(a, a, 0.8).all()  # nothing tells them apart


def numpy_info_nce(scores: np.ndarray, target: np.ndarray) -> float:
    exponent = scores.astype(np.float64) / 0.1
    log_share = exponent - np.log(np.exp(exponent - exponent.max()).sum()) - exponent.max()
    return float(-(target * log_share).sum() / target.sum())


@pytest.mark.parametrize("name", ["ccvpe-small", "ggcvt-small"])
def test_the_loss_is_that_of_an_independent_computation(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    size, side = model.spec.aerial_size, model.map_size
    batch = {
        "ground": torch.randn(1, 3, *model.spec.ground_size),
        "aerial": torch.randn(1, 3, size, size),
        "position": torch.tensor([[size / 2 + 9.0, size / 2 - 14.0]]),
        "heading": torch.tensor([0.3]),
        "meters_per_pixel": torch.tensor([model.spec.gsd]),
    }
    prior = 0.0  # of no matter for CCVPE, whose wrong bins are negatives
    count = model.level_count - 1
    extra = {key: batch[key] for key in model.extra_inputs}
    with torch.no_grad():
        got = float(DistillationLoss(count, 3.0)(model, batch, prior))
        everywhere = None if model.spec.bins else 0.0
        maps = model.match(batch["ground"], model.encode_aerial(batch["aerial"]), everywhere, **extra)
    row, col = ((batch["position"][0] - torch.tensor(maps.grid.origin)) / maps.grid.scale).tolist()
    y, x = np.mgrid[:side, :side]
    label = np.exp(-((y - row) ** 2 + (x - col) ** 2) / 18.0)
    total = 0.0
    for level in maps.levels[:count]:
        cells = level.shape[2]
        stride = round(side / cells)
        # A cell covers the finest map's pixels within half a stride of its centre.
        centres = (side - 1) / 2 + (np.arange(cells) - (cells - 1) / 2) * stride
        covered = [np.abs(np.arange(side) - centre) <= stride / 2 for centre in centres]
        pooled = np.array([[label[rows][:, cols].max() for cols in covered] for rows in covered])
        bins = np.zeros(level.shape[1])
        if model.spec.bins:
            place = 0.3 / (2 * math.pi) * model.spec.bins
            first = (model.spec.bins - int(place)) % model.spec.bins
            bins[first], bins[(first - 1) % model.spec.bins] = 1 - place % 1, place % 1
        else:
            bins[:] = 1.0
        total += numpy_info_nce(level[0].numpy(), bins[:, None, None] * pooled)
    assert got == pytest.approx(1e4 * total / count, rel=1e-4)


def test_levels_without_the_rest_are_the_same(city: SimulatedDataset, teacher: Checkpoint) -> None:
    sample = city[0]
    with torch.inference_mode():
        features = teacher.model.encode_aerial(sample["aerial"][None])
        whole = teacher.model.match(sample["ground"][None], features, None).levels
        first = teacher.model.match_levels(sample["ground"][None], features, None, 2)
    assert len(first) == 2 and all(torch.equal(a, b) for a, b in zip(first, whole, strict=False))


def test_labels_are_pooled_about_a_common_centre() -> None:
    label = torch.zeros(1, 69, 69)
    label[0, 34 + 8, 34 - 12] = 1.0  # two and three coarse cells from the centre
    pooled = pool_label(label, 35)
    assert divmod(int(pooled[0].argmax()), 35) == (17 + 4, 17 - 6)
    even = torch.zeros(1, 160, 160)
    even[0, 31, 159] = 1.0
    assert divmod(int(pool_label(even, 10)[0].argmax()), 10) == (1, 9)


def test_without_learning_the_student_is_its_teacher(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    run = Distillation(
        FABRIC, teacher, city, tmp_path, options(teacher.model, learning_rate=0.0, fixed_batch_norm=True)
    )
    adapted = run.run()
    assert adapted.auxiliary is not None
    assert np.array_equal(adapted.labels.position, adapted.auxiliary.labels.position)
    student = adapted.student.load().model.state_dict()
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, student[key]), key
    verdict = judge(*(Indicators.of(views, None) for views in (adapted.before, adapted.after)))
    assert not verdict.deploy


def test_no_filter_is_all_labels(teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path) -> None:
    adapted = Distillation(FABRIC, teacher, city, tmp_path, options(teacher.model, keep=1.0)).run()
    assert adapted.kept.all() and adapted.auxiliary is None


def test_rounds_need_held_out_pairs(teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path) -> None:
    with pytest.raises(AdaptationError, match="8 held-out pairs are too few to compare rounds on: 60 are"):
        Distillation(FABRIC, teacher, city, tmp_path, options(teacher.model, rounds=2))


def test_rounds_end_where_the_student_is_no_better(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (distill, verdicts_module):
        monkeypatch.setattr(module, "LEAST", 8)
    still = options(teacher.model, learning_rate=0.0, fixed_batch_norm=True, rounds=3)
    adapted = Distillation(FABRIC, teacher, city, tmp_path, still).run()
    assert [outcome.deploy for outcome in adapted.rounds] == [False]
    assert adapted.rounds[0].score_change == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    first = Distillation(FABRIC, teacher, city, tmp_path, options(teacher.model)).run()
    assert first.rounds == ()
    # With the second round's student taken, and the third's refused.
    verdicts = [replace(adapted.rounds[0], deploy=deploy) for deploy in (True, False)]
    given = iter(verdicts)
    monkeypatch.setattr(distill, "judge", lambda before, after: next(given))
    run = Distillation(FABRIC, teacher, city, tmp_path, options(teacher.model, rounds=4))
    adapted = run.run()
    assert list(adapted.rounds) == verdicts
    labels = run.labels_of(first.student.load(), "").of(run.training_index)
    assert np.array_equal(adapted.maxima.position, labels.position)
    assert adapted.student.load().sha256 != first.student.load().sha256
    write_results(run, adapted, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("its student is taken") == page.count("round before is kept") == 1


def test_results_say_what_they_come_from(teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path) -> None:
    run = Distillation(
        FABRIC, teacher, city, tmp_path, options(teacher.model), true_from_fix=city.true_from_fix()
    )
    metrics = write_results(run, run.run(), tmp_path, {"version": "0"})
    written = load_checkpoint(tmp_path / "student.safetensors")
    assert written.metadata["parent"] == teacher.sha256
    assert written.metadata["adaptation"]["data"] == city.name
    assert json.loads((tmp_path / "metrics.json").read_text())["student_sha256"] == written.sha256
    assert metrics["pairs"] == 40 and metrics["held_out"] == 8
    assert 26 <= metrics["trained_on"] < 32  # four fifths, and what agrees as well as the last of them
    assert metrics["true_errors"]["teacher, held out"]["frames"] == 8
    assert {"label_free_mean_m", "best_mean_m"} <= set(metrics["epoch_picks"])
    page = (tmp_path / "report.html").read_text()
    assert "Outlier filter" in page and "deploy" in page and page.count("data:image/png") >= 6


def write_pairs(
    folder: Path,
    count: int,
    *,
    heading: float | None = 0.4,
    tile_px: int = SPEC.aerial_size,
    damage: int = -1,
) -> list[tuple[float, float]]:
    """A straight drive of 5 m between pairs, on tiles of noise; returns the coarse fixes."""
    rng = np.random.default_rng(0)
    plane = LocalProjection(48.2, 16.37)
    tile = AerialTile(rng.integers(0, 255, (tile_px, tile_px, 3), np.uint8), 48.2, 16.37, SPEC.gsd)
    writer = PairWriter(folder, {"vehicle": "test"})
    fixes = []
    for number in range(count):
        image = encode_jpeg(rng.integers(0, 255, (64, 256, 3), np.uint8), 90)
        if number == damage:
            image = image[:40]
        lat, lon = plane.inverse(5.0 * number * math.cos(0.4), 5.0 * number * math.sin(0.4))
        fixes.append((lat, lon))
        stamp = START_NS + number * 1_000_000_000
        pair = Pair(stamp, "jpeg", image, lat, lon, fix_covariance=np.eye(2) * 100, heading=heading)
        writer.add(pair, tile)
    writer.close()
    return fixes


def test_pairs_that_cannot_be_read_are_left_out(teacher: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 6, damage=2, tile_px=SPEC.aerial_size + 32)
    labels = label_pairs(FABRIC, teacher.model, PairDataset([tmp_path / "pairs"], SPEC), tmp_path / "l.npz")
    assert labels.index.tolist() == [0, 1, 3, 4, 5]
    assert labels.fix_std.tolist() == [10.0] * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """By whichever process comes first; where nothing can be kept, whenever they are asked for."""
    write_pairs(tmp_path / "pairs", 6, damage=2)
    source = PairDataset([tmp_path / "pairs"], SPEC)
    other, full = copy.deepcopy(source), PairDataset([tmp_path / "pairs"], SPEC)
    good = [0, 1, 3, 4, 5]

    def read(dataset: PairDataset) -> list[PairSample]:
        return list(DataLoader(Subset(dataset, good), batch_size=None, num_workers=workers))

    first = read(source)
    monkeypatch.setattr(os, "pwrite", lambda *arguments: exec("raise OSError(28, 'No space left on device')"))
    read(full)
    monkeypatch.undo()
    for path in (tmp_path / "pairs").glob("*.mcap"):
        path.unlink()
    for dataset in (other, full):
        dataset._bags[0]._open.clear()
        with pytest.raises(UserError):
            read(dataset)
    for one, again in zip(first, read(source), strict=True):
        assert one.keys() == again.keys()
        assert all(torch.equal(one[key], again[key]) for key in one)  # type: ignore[literal-required]
    with pytest.raises(UserError):
        source._bags[0]._open.clear()
        source[2]


def test_unusable_pairs_say_so(teacher: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "few", 3)
    source = PairDataset([tmp_path / "few"], SPEC)
    with pytest.raises(AdaptationError, match="3 pairs are too few"):
        Distillation(FABRIC, teacher, source, tmp_path, options(teacher.model))
    with pytest.raises(AdaptationError, match="0 pairs are too few"):
        Distillation(FABRIC, teacher, PairDataset([], SPEC), tmp_path, options(teacher.model))
    write_pairs(tmp_path / "small", 9, tile_px=64)
    small = PairDataset([tmp_path / "small"], SPEC)
    run = Distillation(FABRIC, teacher, small, tmp_path, options(teacher.model))
    with pytest.raises(AdaptationError, match=r"none of 9 pairs can be used: .* 64 px"):
        run.run()
    write_pairs(tmp_path / "north", 9, heading=None)
    unaware = PairDataset([tmp_path / "north"], SPEC)
    run = Distillation(FABRIC, teacher, unaware, tmp_path, options(teacher.model))
    with pytest.raises(AdaptationError, match="pair 0 has no heading"):
        run.run()
    for levels in (0, 5):
        with pytest.raises(AdaptationError, match=f"4 levels to supervise, not {levels}"):
            Distillation(FABRIC, teacher, unaware, tmp_path, options(teacher.model, levels=levels))


def test_pairs_that_failed_are_tried_again(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    class Broken(PairSource):
        name = "broken"

        def __init__(self) -> None:
            self.missing = {3, 17}

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> PairSample:
            if index in self.missing:
                raise DatasetError("not yet there")
            return city[index]

    source, path = Broken(), tmp_path / "labels.npz"
    assert len(label_pairs(FABRIC, teacher.model, source, path)) == 18
    source.missing = {17}
    labels = label_pairs(FABRIC, teacher.model, source, path)
    assert labels.index.tolist() == [i for i in range(20) if i != 17]
    path.write_bytes(b"damaged")
    again = label_pairs(FABRIC, teacher.model, source, path)
    assert np.array_equal(again.position, labels.position)


def test_heat_maps_are_stored_coarse(teacher: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 6, damage=2)
    source, index = PairDataset([tmp_path / "pairs"], SPEC), np.arange(1, 6)
    store = store_heat_maps(FABRIC, teacher.model, source, index, tmp_path / "maps")
    sample = source[4]
    with torch.inference_mode():
        features = teacher.model.encode_aerial(sample["aerial"][None])
        logits = teacher.model.match(sample["ground"][None], features, 0.0).logits[0].numpy()
    tile = AerialTile(np.zeros((160, 160, 3), np.uint8), 48.2, 16.37, SPEC.gsd)
    fine = HeatMap.from_logits(logits, teacher.model.grid, tile)
    coarse = fine.probability.reshape(80, 2, 80, 2).mean((1, 3)) * fine.searched
    np.testing.assert_allclose(store[4], coarse, rtol=2e-3, atol=1e-6)
    # Its first cell lies amid the tile's first four pixels.
    assert (store.grid.origin, store.grid.scale, store.side) == ((0.5, 0.5), 2.0, 80)
    for missing in (0, 2, 6):
        with pytest.raises(KeyError):
            store[missing]
    # What is there is not done again.
    shutil.rmtree(tmp_path / "pairs")
    again = store_heat_maps(FABRIC, teacher.model, source, index, tmp_path / "maps")
    assert np.array_equal(again[4], store[4])
    assert store[4].size * 2 == stored_bytes(teacher.model)


def test_headings_are_those_at_the_labels_places(teacher: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 5, heading=None)
    source = PairDataset([tmp_path / "pairs"], SPEC)
    labels = label_pairs(FABRIC, teacher.model, source, tmp_path / "l.npz", heading_prior_deg=None, seed=3)
    forgotten = replace(labels, heading=np.zeros(5, np.float32))
    again = with_headings_at(FABRIC, teacher.model, source, forgotten, heading_prior_deg=None, seed=3)
    assert again.heading == pytest.approx(labels.heading, abs=1e-6) and np.ptp(labels.heading) > 0.1


@pytest.fixture(scope="module")
def drive_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``pairs`` along a good minute in a city of the target style, and the whole ``drive``."""
    folder = tmp_path_factory.mktemp("drive")
    city = build_city(821, "target", size_m=500.0)
    frames = drive(city, 70, 0, options=DriveOptions(rate_hz=1.0), view=PanoramaView(64, 256))
    write_bag(frames, folder / "drive")
    topics = {"image": "/image", "fix": "/fix", "heading": "/heading", "odom": "/odom"}
    chosen = ImportOptions(topics=topics, tile_px=SPEC.aerial_size, tile_gsd=SPEC.gsd)
    with open_map(str(city.write_geotiff(folder / "city.tif"))) as aerial:
        import_bag(folder / "drive", folder / "pairs", aerial, chosen, lambda share: None)
    return folder


@pytest.fixture(scope="module")
def simulated_drive(drive_folder: Path) -> tuple[PairDataset, np.ndarray]:
    """The pairs, and metres from their fixes to their true places."""
    source = PairDataset([drive_folder / "pairs"], SPEC)
    track = source.track()
    truth = read_timed_track(drive_folder / "drive", "/truth/fix")
    return source, true_from_fix(track, *truth.at(track.stamp_ns))


def test_the_drive_corrects_the_teacher(
    teacher: Checkpoint, simulated_drive: tuple[PairDataset, np.ndarray], tmp_path: Path
) -> None:
    source, truth = simulated_drive
    chosen = options(teacher.model, smooth=True, learning_rate=0.0)
    stages = []
    run = Distillation(
        FABRIC,
        teacher,
        source,
        tmp_path,
        chosen,
        true_from_fix=truth,
        on_progress=lambda s, *_: stages.append(s),
    )
    labels = run.teacher_labels()
    smoothed = run.smoothed(labels, teacher)
    better = smoothed.labels(labels)
    before, after = run.true_errors_m(labels), run.true_errors_m(better)
    assert after.mean() < 0.5 * before.mean()
    adapted = run.run()
    # Once smoothed, the heat maps are not needed any more, and nothing is done again.
    assert stages.count("teacher heat maps") == len(set(range(0, len(labels), 16))) + 1
    assert not list((tmp_path / "stages").glob("*.maps"))
    assert np.array_equal(adapted.labels.position, better.position)
    # All levels, and no filter.
    assert adapted.recipe == (4, 1.0) and adapted.kept.all()
    metrics = write_results(run, adapted, tmp_path)
    assert metrics["options"]["levels"] == 4 and metrics["unreadable"] == 0
    assert metrics["smoothing"]["pairs"] == len(labels) and metrics["smoothing"]["without_grounds"] == 0
    errors = metrics["true_errors"]
    assert errors["pseudo ground truth"]["mean"] < 0.5 * errors["maxima of the same pairs"]["mean"]
    page = (tmp_path / "report.html").read_text()
    assert f"whole drives corrected {len(labels)} of {len(labels)} labels" in page
    for picture in ("whose labels moved most", "The whole drive", "the label has moved"):
        assert picture in page


def test_drives_with_unknown_headings_are_smoothed(
    teacher: Checkpoint, simulated_drive: tuple[PairDataset, np.ndarray], tmp_path: Path
) -> None:
    source, truth = simulated_drive
    chosen = options(teacher.model, smooth=True, learning_rate=0.0, heading_priors_deg=(None,))
    run = Distillation(FABRIC, teacher, source, tmp_path, chosen, true_from_fix=truth)
    adapted = run.run()
    assert run.true_errors_m(adapted.labels).mean() < 0.5 * run.true_errors_m(adapted.maxima).mean()
    # North is up in what the camera saw; the panoramas were turned for the teacher, the labels are not.
    off = np.angle(np.exp(1j * adapted.labels.heading.astype(float)))
    assert np.median(np.abs(off)) < math.radians(20)
    assert write_results(run, adapted, tmp_path)["smoothing"]["used"]


def test_the_stretch_that_moved_most_is_of_one_drive() -> None:
    drive = np.repeat([0, 1, 2], [30, 100, 5])
    moved = np.zeros(135)
    moved[[28, 29]], moved[[32, 33, 80]], moved[131] = 20.0, (25.0, 24.0, 26.0), 40.0
    whole, stretch = most_moved(drive, moved)
    assert (whole[0], whole[-1]) == (30, 129)
    assert len(stretch) == 40 and stretch[0] == 30
    whole, stretch = most_moved(drive[:30], moved[:30])
    assert np.array_equal(whole, stretch) and len(whole) == 30


def test_smoothing_says_what_it_cannot_do(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    with pytest.raises(AdaptationError, match="is not of drives"):
        Distillation(FABRIC, teacher, city, tmp_path, options(teacher.model, smooth=True))
    # Heat maps of noise give no grounds: the paper's recipe it is, and that is said.
    write_pairs(tmp_path / "pairs", 24)
    source = PairDataset([tmp_path / "pairs"], SPEC)
    chosen = options(teacher.model, smooth=True)
    run = Distillation(FABRIC, teacher, source, tmp_path / "smooth", chosen)
    adapted = run.run()
    metrics = write_results(run, adapted, tmp_path / "smooth")
    assert not metrics["smoothing"]["used"] and adapted.recipe == (2, 0.8)
    text = "fell back to the teacher's maxima and the paper's recipe: for "
    assert text in html.unescape((tmp_path / "smooth" / "report.html").read_text())
    plain = Distillation(FABRIC, teacher, source, tmp_path / "plain", options(teacher.model)).run()
    assert np.array_equal(adapted.labels.position, plain.labels.position)
    assert adapted.student.load().sha256 == plain.student.load().sha256


@pytest.mark.parametrize(
    ("name", "prior"), [("ggcvt-small", 0.0), ("ccvpe-small", 30.0), ("ccvpe-small", None)]
)
def test_every_model_and_heading_is_adapted(
    name: str, prior: float | None, city: SimulatedDataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = create_model(name)
    save_checkpoint(model, tmp_path / "teacher.safetensors")
    first = load_checkpoint(tmp_path / "teacher.safetensors")
    cities = city.folder
    source = SimulatedDataset(
        "target", range(3, 4), 40, model.spec, half_extent_m=model.half_extent_m, cache_dir=cities
    )
    chosen = options(model, heading_priors_deg=(prior,), keep=0.6)
    adapted = Distillation(FABRIC, first, source, tmp_path, chosen).run()
    assert 0 < adapted.kept.sum() < len(adapted.labels)
    assert math.isfinite(adapted.student.history[0]["loss"])
    changed = adapted.student.load().model.state_dict()
    assert any(not torch.equal(value, changed[key]) for key, value in model.state_dict().items())


def test_the_ablation_measures_every_part(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "KEEPS", (0.5, 1.0))
    chosen = options(teacher.model, keep=0.5)
    run = Distillation(FABRIC, teacher, city, tmp_path, chosen, true_from_fix=city.true_from_fix())
    rows = ablation.run_ablation(run)
    names = ["K' = 1", "K' = 2", "K' = 3", "K' = 4", "T = 50%", "T = 100%"]
    assert [row.name for row in rows] == [*ablation.TABLE, *names]
    by_name = {row.name: row.errors for row in rows}
    assert by_name["Student+M-OF"] == by_name["T = 100%"]
    assert by_name["Student+M+OF"] == by_name["K' = 2"] == by_name["T = 50%"]
    assert by_name["Teacher"].frames == 8
    ablation.write_ablation(rows, run, tmp_path)
    assert len(json.loads((tmp_path / "ablation.json").read_text())) == len(rows)
    assert (tmp_path / "ablation.html").read_text().count("data:image/png") == 2


def test_training_stops_at_a_loss_that_is_not_finite(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    run = Distillation(FABRIC, teacher, city, tmp_path, options(teacher.model, learning_rate=1e18, epochs=2))
    with pytest.raises(TrainingError, match=r"not finite at step \d+"):
        run.run()


def test_odometry_is_what_the_wheels_drove(tmp_path: Path) -> None:
    """Ten metres a second along the heading, but for a gap of three seconds that says nothing."""
    folder = tmp_path / "pairs"
    writer = PairWriter(folder, {"vehicle": "test"})
    image = encode_jpeg(np.zeros((64, 256, 3), np.uint8), 90)
    tile = AerialTile(np.zeros((SPEC.aerial_size,) * 2 + (3,), np.uint8), 48.2, 16.37, SPEC.gsd)
    for tenth in range(0, 101):
        if not 60 < tenth < 90:
            stamp = START_NS + tenth * 100_000_000
            writer.add_odometry(stamp, odometry(stamp, 10.0))
        if tenth % 20 == 5:
            writer.add(Pair(START_NS + tenth * 100_000_000, "jpeg", image, 48.2, 16.37, heading=0.5), tile)
    writer.close()
    moved = PairDataset([folder], SPEC).track().moved  # at 0.5, 2.5, 4.5, 6.5 and 8.5 s
    step = 20.0 * np.array([math.cos(0.5), math.sin(0.5)])
    assert moved[1:3] == pytest.approx(np.stack([step, step]), abs=1e-6)
    assert np.isnan(moved[[0, 3, 4]]).all()


def test_true_places_are_read_at_the_pairs_stamps(tmp_path: Path) -> None:
    """Linear between the rows of a table, unknown outside it and in its gaps."""
    table = tmp_path / "truth.csv"
    table.write_text(
        "stamp,lat,lon\n1700000001.5,48.2,16.0\n1700000000.5,48.0,16.0\n1700000010.5,48.4,16.0\n"
    )
    asked = START_NS + np.array([0, 500_000_000, 750_000_000, 1_500_000_000, 5_000_000_000, 11_000_000_000])
    lat, lon = read_timed_track(table).at(asked)
    assert lat[1:4] == pytest.approx([48.0, 48.05, 48.2], abs=1e-9) and lon[2] == 16.0
    assert np.isnan(lat[[0, 4, 5]]).all()
    table.write_text("stamp,lat,lon\n1700000000.5,48.0,16.0\nyesterday,48,16\n")
    with pytest.raises(TrackError, match="row 2"):
        read_timed_track(table)


def odometry(stamp: int, speed: float) -> bytes:
    def vector(x: float = 0.0) -> Any:
        return message("geometry_msgs/msg/Vector3", x=x, y=0.0, z=0.0)

    point = message("geometry_msgs/msg/Point", x=0.0, y=0.0, z=0.0)
    pose = message("geometry_msgs/msg/Pose", position=point, orientation=quaternion(0.0))
    twist = message("geometry_msgs/msg/Twist", linear=vector(speed), angular=vector())
    none = np.zeros(36)
    value = message(
        "nav_msgs/msg/Odometry",
        header=header(stamp, "odom"),
        child_frame_id="base_link",
        pose=message("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=none),
        twist=message("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=none),
    )
    return serialize("nav_msgs/msg/Odometry", value)


def test_motion_and_truth_are_measured_along_the_drive(tmp_path: Path) -> None:
    fixes = write_pairs(tmp_path / "pairs", 5)
    track = PairDataset([tmp_path / "pairs"], SPEC).track()
    assert track.lat.tolist() == pytest.approx([lat for lat, _ in fixes])
    assert np.isnan(track.moved).all()  # no odometry
    moved = np.tile([5.0 * math.cos(0.4), 5.0 * math.sin(0.4)], (5, 1))
    track = replace(track, moved=moved)
    # Two pixels too far north at the fourth: 1 m, there and back.
    position = np.full((5, 2), 79.5)
    position[3, 0] -= 2
    plain = labels_at(position)
    indicators = Indicators.of(Views(plain, plain, None), track)
    assert indicators.motion[1:] == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=2e-3)
    assert np.isnan(indicators.motion[0])
    assert indicators.stray_sigmas == pytest.approx([0, 0, 0, 0.1, 0])
    some = track.rows(np.array([0, 2, 3]))
    assert np.isnan(some.moved[:2]).all() and np.isfinite(some.moved[2]).all()
    lat, lon = LocalProjection(*fixes[1]).inverse(3.0, -4.0)
    places = true_from_fix(track.rows(np.array([1])), np.array([lat]), np.array([lon]))
    assert places == pytest.approx(np.array([[3.0, -4.0]]), abs=1e-6)


class Changed(PairSource):
    """Another source's pairs with some fields replaced."""

    def __init__(self, source: PairSource, **fields: Tensor) -> None:
        self.name = f"{source.name} {sorted(fields)}"
        self._source, self._fields = source, fields

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> PairSample:
        return {**self._source[index], **self._fields}  # type: ignore[typeddict-item]


@pytest.mark.parametrize("fix_std", [20.0, 1.0])
@pytest.mark.parametrize("prior", [0.0, 30.0, None])
def test_views_show_the_same_place(
    city: SimulatedDataset, teacher: Checkpoint, fix_std: float, prior: float | None
) -> None:
    source = Changed(city, fix_std=torch.tensor(fix_std))
    views = look(FABRIC, teacher.model, source, np.arange(20), heading_prior_deg=prior)
    assert views.turned is not None
    assert np.median(distance_m(views.plain, views.shifted)) < 1.5
    assert np.median(distance_m(views.plain, views.turned)) < (1.5 if prior is not None else 4.0)
    for labels in (views.plain, views.shifted, views.turned):
        assert np.linalg.norm(labels.from_fix, axis=1).max() <= max(3 * fix_std, 5.0) + 1e-3
    summary = Indicators.of(views, None).summary()
    assert "motion" not in summary and summary["score"] > 0


def test_the_verdict_follows_the_evidence() -> None:
    rng = np.random.default_rng(0)
    nan = np.full(200, math.nan)

    def indicators(level: float, sigmas: float = 1.0) -> Indicators:
        return Indicators(rng.exponential(level, 200), nan, nan, np.full(200, sigmas), nan, nan)

    worse, better, stray = indicators(3.0), indicators(1.0), indicators(1.0, 4.0)
    assert judge(worse, better).deploy
    assert not judge(better, worse).deploy
    assert not judge(worse, worse).deploy
    blind = replace(better, stray_sigmas=nan)
    assert judge(worse, blind).deploy and "no covariance" in judge(worse, blind).reasons[-1]
    few = [Indicators(rng.exponential(level, 50), *(np.full(50, math.nan),) * 5) for level in (9.0, 0.1)]
    assert not judge(*few).deploy and "50 held-out pairs are too few" in judge(*few).reasons[1]
    far = judge(worse, stray)
    assert not far.deploy and "100.0% of the maxima of whole maps lie more than 3 sigma" in far.reasons[1]


COMMAND = [sys.executable, "-m", "xview_loc.cli"]


def adapt_words(out: Path, *more: str) -> list[str]:
    words = ["adapt", "simulated:target:3:40", "--out", str(out), "--accelerator", "cpu", "--sigma", "2"]
    return [*words, "--epochs", "2", "--batch-size", "4", "--held-out", "0.2", *more]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}


def run_command(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, cwd=ROOT, env=environment(cache), timeout=200
    )


@pytest.mark.timeout(400)
def test_a_killed_adaptation_ends_with_the_same_figures(tmp_path: Path) -> None:
    """Killed at random instants in every stage, and run again each time."""
    cache = tmp_path / "cache"
    whole = run_command(*adapt_words(tmp_path / "whole"), cache=cache)
    assert whole.returncode == 0, whole.stderr
    rng = random.Random(0)
    stages = [("teacher labels", 40), ("auxiliary student", 16), ("auxiliary labels", 40), ("student", 12)]
    kills = sorted((rng.randrange(len(stages)), rng.random()) for _ in range(10))
    for number, share in kills:
        stage, total = stages[number]
        command = [*COMMAND, *adapt_words(tmp_path / "cut")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(cache)
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"{stage}: ") and int(line.split()[-3]) >= share * total:
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    again = run_command(*adapt_words(tmp_path / "cut"), cache=cache)
    assert again.returncode == 0, again.stderr
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut"))
    del one["student_sha256"], other["student_sha256"]  # of files that name their own folder
    assert one == other
    students = [load_checkpoint(tmp_path / name / "student.safetensors") for name in ("whole", "cut")]
    for key, value in students[0].model.state_dict().items():
        assert torch.equal(value, students[1].model.state_dict()[key]), key


@pytest.mark.timeout(300)
def test_smoothing_survives_kills_and_two_processes(drive_folder: Path, tmp_path: Path) -> None:
    words = ["adapt", str(drive_folder / "pairs"), "--smooth", "--accelerator", "cpu", "--epochs", "1"]
    words += ["--truth", str(drive_folder / "drive"), "--truth-topic", "/truth/fix"]
    done = run_command(*words, "--out", str(tmp_path / "whole"), cache=tmp_path)
    assert done.returncode == 0 and "whole drives corrected" in done.stdout, done.stderr
    for stage in ("teacher heat maps", "smoothing", "student"):
        command = [*COMMAND, *words, "--out", str(tmp_path / "cut")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(tmp_path)
        )
        assert process.stdout is not None
        assert any(line.startswith(f"{stage}: ") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    done = run_command(*words, "--out", str(tmp_path / "cut"), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *launcher, *COMMAND[1:], *words, "--out", str(tmp_path / "two")]
    two = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path), timeout=200
    )
    assert (tmp_path / "two" / "report.html").exists(), two.stderr
    whole, cut, both = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut", "two")
    )
    del whole["student_sha256"], cut["student_sha256"]  # of files that name their own folder
    assert whole == cut
    # Of other batches, heat maps differ in their last digits.
    for name in ("moved_m", "std_m"):
        assert both["smoothing"][name] == pytest.approx(whole["smoothing"][name], rel=1e-3)
    for name in ("pseudo ground truth", "teacher, held out"):
        assert both["true_errors"][name] == pytest.approx(whole["true_errors"][name], rel=1e-3)
    assert math.isfinite(both["epochs"]["student"][0]["loss"])


@pytest.mark.timeout(300)
def test_two_processes_make_the_same_labels(teacher: Checkpoint, tmp_path: Path) -> None:
    """Gloo on one machine: labels as of one process, and a student about as good."""
    cache = _rendered(tmp_path / "cache")
    outs = [tmp_path / "one", tmp_path / "two"]
    done = run_command(*adapt_words(outs[0]), cache=cache)
    assert done.returncode == 0, done.stderr
    # Some processes abort at exit when all is done: what counts is what they wrote.
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [sys.executable, *launcher, *COMMAND[1:], *adapt_words(outs[1])]
    two = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(cache), timeout=250)
    assert (outs[1] / "report.html").exists(), two.stderr
    labels = []
    for out in outs:
        found = [PseudoLabels.load(path) for path in (out / "stages").glob("labels-*.npz")]
        expected = label_pairs(FABRIC, teacher.model, _simulated(cache), tmp_path / f"{out.name}.npz")
        labels += [x for x in found if x is not None and np.array_equal(x.position, expected.position)]
    assert len(labels) == 2
    losses = [json.loads((out / "metrics.json").read_text())["epochs"]["student"] for out in outs]
    assert [len(history) for history in losses] == [2, 2]
    assert losses[1][0]["loss"] == pytest.approx(losses[0][0]["loss"], rel=0.3)
    errors = [json.loads((out / "metrics.json").read_text())["true_errors"] for out in outs]
    assert errors[0]["teacher, held out"] == errors[1]["teacher, held out"]
    assert errors[0]["pseudo ground truth"] == errors[1]["pseudo ground truth"]


def _simulated(cache: Path) -> SimulatedDataset:
    return SimulatedDataset("target", range(3, 4), 40, SPEC, cache_dir=cache / "xview_loc" / "simulated")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 24)
    pairs, out = str(tmp_path / "pairs"), str(tmp_path / "out")
    table = tmp_path / "truth.csv"
    table.write_text("stamp,lat,lon\n12.5,48.2,16.37\n")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"rubbish")
    for words, says in (
        (["adapt", pairs, "--out", out, "--heading", "north"], "known, unknown or 0 to 180"),
        (["adapt", pairs, "--out", out, "--truth", str(table)], "says nothing about the times"),
        (["adapt", pairs, "--out", out, "--checkpoint", str(other)], "other.safetensors"),
        (["adapt", str(tmp_path / "none"), "--out", out], "none"),
        (["ablate", pairs, "--out", out], "give --truth"),
        (["adapt", pairs, "--out", out, "--model", "ggcvt-vigor"], "no weights are shipped"),
    ):
        done = run_command(*words, cache=tmp_path)
        assert done.returncode in (1, 2) and says in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    """Files of a megabyte at most: labels fit, weights do not. With room the same command goes on."""
    cache = tmp_path / "cache"
    words = [*COMMAND, *adapt_words(tmp_path / "out", "--epochs", "1")]
    limit = f"ulimit -f 1024; exec {shlex.join(words)}"
    done = subprocess.run(
        ["bash", "-c", limit],
        capture_output=True, text=True, cwd=ROOT, env=environment(_rendered(cache)), timeout=200,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert len(list((tmp_path / "out" / "stages").glob("labels-*.npz"))) == 1
    again = run_command(*adapt_words(tmp_path / "out", "--epochs", "1"), cache=cache)
    assert again.returncode == 0 and "verdict" in again.stdout, again.stderr


def _rendered(cache: Path) -> Path:
    _simulated(cache).prepare()
    return cache


def test_a_dry_run_does_nothing(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 24)
    words = ["adapt", str(tmp_path / "pairs"), "--out", str(tmp_path / "out"), "--dry-run", "--smooth"]
    done = run_command(*words, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "teacher heat maps: 22 pairs, about" in done.stdout and "smoothing: 22 pairs" in done.stdout
    assert "student: 22 pairs, about" in done.stdout and "MB of disk" in done.stdout
    assert "auxiliary" not in done.stdout
    assert not (tmp_path / "out").exists()
