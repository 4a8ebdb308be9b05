"""Knowledge self-distillation: labels, filter, losses, smoothing, students, results and the verdict."""

from __future__ import annotations

import copy
import html
import io
import json
import math
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adaptation_fixtures import (
    PAIRS,
    SPEC,
    render_pairs,
    simulated_pairs,
    small_city,
    tiny_models,
    write_drive,
)
from map_fixtures import texture, write_geotiff
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate

from xview_loc import models
from xview_loc.adaptation import ablation, padding
from xview_loc.adaptation import distillation as distill
from xview_loc.adaptation import report as reports_module
from xview_loc.adaptation import verdict as verdicts_module
from xview_loc.adaptation.distillation import AdaptationOptions, Adapted, Distillation
from xview_loc.adaptation.figures import most_moved
from xview_loc.adaptation.heat_map_store import store_heat_maps, stored_bytes
from xview_loc.adaptation.indicators import Indicators, LabelFreeValidation, LabelsByView, label_views
from xview_loc.adaptation.labelling import ReadOptions, encode_tiles, label_pairs, with_model_headings
from xview_loc.adaptation.labels import AdaptationError, PseudoLabels, distance_m, reliable
from xview_loc.adaptation.motion import from_drives
from xview_loc.adaptation.padding import padding_warning
from xview_loc.adaptation.report import round_lines, write_results
from xview_loc.adaptation.smoothing import Smoothed
from xview_loc.adaptation.verdict import Verdict, judge
from xview_loc.bags.ros_types import header, message, quaternion, serialize
from xview_loc.cli.commands import main
from xview_loc.datasets import SimulatedDataset, simulated
from xview_loc.datasets.base import DatasetError, JoinedPairs, PairSample, PairSource, true_from_fix
from xview_loc.datasets.pairs import PairDataset
from xview_loc.errors import UserError
from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection
from xview_loc.images import encode_jpeg
from xview_loc.maps.base import AerialTile
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.ccvpe import CCVPE, CONFIGS
from xview_loc.models.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.recordings.tracks import TrackError, read_timed_track
from xview_loc.simulation.city import City, build_city
from xview_loc.training.losses import DistillationLoss, pool_label
from xview_loc.training.trainer import BEST_FILE, TrainingError, TrainingProgress, make_fabric
from xview_loc.training.turned_panoramas import turn_panoramas

START_NS = 1_700_000_000_000_000_000
FABRIC = make_fabric("cpu")


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    """The shipped model: its labels are good."""
    return load_model("ccvpe-small")


@pytest.fixture(scope="module")
def tiny(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model that is trained in seconds: random weights, whose layers are normalised on the pairs."""
    torch.manual_seed(0)
    model = create_model("ccvpe-tiny").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    pairs = simulated_pairs(model.spec, cache)
    batch = default_collate([pairs[index] for index in range(0, 40, 4)])
    with torch.no_grad():
        model.match(batch["ground"], model.encode_aerial(batch["aerial"]), 0.0)
    path = tmp_path_factory.mktemp("tiny") / "teacher.safetensors"
    save_checkpoint(model, path)
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def streets() -> City:
    return small_city()


@pytest.fixture(scope="module")
def cache(streets: City, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, as XDG_CACHE_HOME names it, in which forty pairs of a city are rendered."""
    folder = tmp_path_factory.mktemp("cache")
    render_pairs(streets, folder)
    return folder


@pytest.fixture(scope="module")
def city(cache: Path) -> SimulatedDataset:
    """Forty pairs of a target-style city, with their truth."""
    return simulated_pairs(SPEC, cache)


@pytest.fixture(scope="module")
def city_labels(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path_factory: pytest.TempPathFactory
) -> PseudoLabels:
    path = tmp_path_factory.mktemp("labels") / "labels.npz"
    labels = label_pairs(FABRIC, teacher.model, city, path, ReadOptions(batch_size=7))
    again = PseudoLabels.load(path)
    assert again is not None and np.array_equal(again.position, labels.position)
    return labels


@pytest.fixture(scope="module")
def tiny_city(tiny: Checkpoint, cache: Path) -> SimulatedDataset:
    """The same on the tiles of the tiny model."""
    return simulated_pairs(tiny.model.spec, cache)


def xview_loc(cache: Path, *words: str) -> tuple[int, str, str]:
    """Run a command in this process, which knows the tiny models: exit code, output and errors."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(sys, "argv", ["xview-loc", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), output.getvalue(), errors.getvalue()


@dataclass(frozen=True)
class Finished:
    """An adaptation of the tiny model by the command, with its results in ``folder``.

    refused: what the same command said before, on a full disk.
    """

    folder: Path
    words: list[str]
    refused: tuple[int, str, str]
    printed: str
    run: Distillation
    adapted: Adapted
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def finished(
    tiny: Checkpoint,
    tiny_city: SimulatedDataset,
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    save_checkpoint(tiny.model, folder / "teacher.safetensors")
    words = ["adapt", PAIRS, "--out", str(folder), "--model", "ccvpe-tiny", "--accelerator", "cpu"]
    words += ["--checkpoint", str(folder / "teacher.safetensors"), "--sigma", "2", "--epochs", "1"]
    words += ["--batch-size", "8", "--held-out", "0.2"]
    # Files of 64 kB at most: labels fit, weights do not.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, unlimited[1]))
    try:
        refused = xview_loc(cache, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    code, printed, errors = xview_loc(cache, *words)
    assert code == 0, errors
    truth = tiny_city.true_from_fix()
    run = Distillation(FABRIC, tiny, tiny_city, folder, options(tiny.model), true_from_fix=truth)
    stages = sorted((folder / "stages").iterdir())
    adapted = run.run()
    assert sorted((folder / "stages").iterdir()) == stages  # nothing was left to do
    metrics = json.loads((folder / "metrics.json").read_text())
    return Finished(folder, words, refused, printed, run, adapted, metrics)


def options(model: object, **changes: object) -> AdaptationOptions:
    return AdaptationOptions.published(
        model,  # type: ignore[arg-type]
        **{"sigma": 2.0, "epochs": 1, "batch_size": 8, "held_out": 0.2, **changes},  # type: ignore[arg-type]
    )


class Changed(PairSource):
    """Another source's pairs with some fields replaced by what ``change`` makes of them."""

    def __init__(
        self,
        source: PairSource,
        change: Callable[[PairSample], dict[str, Tensor]],
        count: int | None = None,
    ) -> None:
        self.name = f"changed {source.name}"
        self._source, self._change = source, change
        self._count = len(source) if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> PairSample:
        sample = self._source[index]
        return {**sample, **self._change(sample)}  # type: ignore[typeddict-item]


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
        "turn": 0 * one,
    }
    return PseudoLabels(**{**columns, **changes})  # type: ignore[arg-type]


def test_labels_are_the_model_s_own_maxima(
    teacher: Checkpoint, city: SimulatedDataset, city_labels: PseudoLabels
) -> None:
    labels = city_labels
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


@pytest.mark.parametrize("name", ["ccvpe-tiny", "ggcvt-tiny"])
def test_a_repeated_tile_is_encoded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, generator = create_model(name), torch.Generator().manual_seed(0)
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
        # What was merged in half precision does not spoil what comes after it.
        maps = model.match(ground, encode_tiles(model, aerial), 0.0, **extra).logits
    assert encoded == [3, 3]
    assert (maps - plain).abs().max() < 1e-4 * plain.abs().max()
    # And the weights can be trained, in a copy as well.
    student = copy.deepcopy(model).train()
    student.match(ground, student.encode_aerial(aerial), 0.0, **extra).logits.square().mean().backward()


def test_labels_are_near_the_fix(
    teacher: Checkpoint, city: SimulatedDataset, city_labels: PseudoLabels, tmp_path: Path
) -> None:
    """Within three standard deviations, where they are known."""

    source = Changed(city, lambda s: {"fix_std": torch.tensor(math.nan if s["index"] == 5 else 2.0)})
    labels = label_pairs(FABRIC, teacher.model, source, tmp_path / "near.npz", ReadOptions())
    free = city_labels
    distances = np.linalg.norm(labels.from_fix, axis=1)
    assert distances[labels.index != 5].max() <= 6.0
    assert np.array_equal(labels.position[5], free.position[5])
    near = np.linalg.norm(free.from_fix, axis=1) <= 6.0
    assert np.array_equal(labels.position[near], free.position[near])
    expected = np.linalg.norm(free.from_fix, axis=1) / 2.0
    assert np.delete(labels.stray_sigmas, 5) == pytest.approx(np.delete(expected, 5), rel=1e-4)


def test_unknown_headings_are_turned_back(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    """Without a recorded heading, the label has the model's, of the image as it was stored."""
    quarter = SPEC.ground_size[1] // 4  # stored a quarter turn to the left of north
    source = Changed(
        city, lambda s: {"ground": s["ground"].roll(quarter, 2), "heading_known": torch.tensor(False)}
    )
    labels = label_pairs(FABRIC, teacher.model, source, tmp_path / "a.npz", ReadOptions(None, seed=3))
    found = labels.errors_m(city.true_from_fix()) < 3.0
    assert found.sum() >= 10
    off = np.angle(np.exp(1j * (labels.heading[found] - math.pi / 2)))
    assert np.median(np.abs(off)) < math.radians(12)
    known = Changed(city, lambda s: {}, count=5)
    labels = label_pairs(FABRIC, teacher.model, known, tmp_path / "b.npz", ReadOptions(None, seed=3))
    assert not labels.heading.any()


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
    prior = 0.0  # ignored for CCVPE, whose wrong bins are negatives
    count = model.level_count - 1
    extra = {key: batch[key] for key in model.extra_inputs}
    with torch.no_grad():
        got = float(DistillationLoss(count, 3.0)(model, batch, prior))
        everywhere = None if model.spec.bins else 0.0
        maps = model.match(batch["ground"], model.encode_aerial(batch["aerial"]), everywhere, **extra)
    row, col = ((batch["position"][0] - torch.tensor(maps.grid.origin)) / maps.grid.scale).tolist()
    y, x = np.mgrid[:side, :side]
    sigma = 3.0 / maps.grid.scale  # pixels of the tile
    label = np.exp(-((y - row) ** 2 + (x - col) ** 2) / (2 * sigma**2))
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


def test_the_first_levels_alone_are_the_same(city: SimulatedDataset, teacher: Checkpoint) -> None:
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


def test_without_learning_the_student_equals_its_teacher(
    tiny: Checkpoint, tiny_city: SimulatedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a second round, whose student is no better, is the last."""
    for module in (distill, verdicts_module):
        monkeypatch.setattr(module, "MIN_MEASUREMENTS", 8)
    still = options(tiny.model, learning_rate=0.0, fixed_batch_norm=True, rounds=3)
    adapted = Distillation(FABRIC, tiny, tiny_city, tmp_path, still).run()
    assert adapted.auxiliary is not None
    assert np.array_equal(adapted.labels.position, adapted.auxiliary.labels.position)
    student = adapted.student.load().model.state_dict()
    for key, value in tiny.model.state_dict().items():
        assert torch.equal(value, student[key]), key
    assert [verdict.deploy for verdict in adapted.rounds] == [False]
    assert adapted.rounds[0].score_change == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)


def test_rounds_need_held_out_pairs(tiny: Checkpoint, tiny_city: SimulatedDataset, tmp_path: Path) -> None:
    with pytest.raises(AdaptationError, match="8 held-out pairs are too few to compare rounds on: 60 are"):
        Distillation(FABRIC, tiny, tiny_city, tmp_path, options(tiny.model, rounds=2))


def test_the_student_of_the_last_good_round_is_taken(
    finished: Finished, tiny: Checkpoint, tiny_city: SimulatedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the second of four rounds: the third's is refused, the fourth is not begun. No outlier filter."""
    unfiltered = options(tiny.model, keep=1.0)
    first = Distillation(FABRIC, tiny, tiny_city, finished.folder, unfiltered).run()
    assert first.kept.all() and first.auxiliary is None and first.rounds == ()
    change = (0.0, 0.0, 0.0)
    verdicts = [
        Verdict(True, "", "", ["better"], 1.0, change),
        Verdict(False, "", "", ["worse"], 0.0, change),
    ]
    given = iter(verdicts)
    monkeypatch.setattr(distill, "MIN_MEASUREMENTS", 8)
    monkeypatch.setattr(distill, "judge", lambda before, after: next(given))
    more = options(tiny.model, keep=1.0, rounds=4)
    run = Distillation(FABRIC, tiny, tiny_city, finished.folder, more)
    adapted = run.run()
    assert list(adapted.rounds) == verdicts
    labels = run.labels_of(first.student.load(), "").of(run.training_index)
    assert np.array_equal(adapted.maxima.position, labels.position)
    assert adapted.student.load().sha256 != first.student.load().sha256
    lines = round_lines([asdict(verdict) for verdict in adapted.rounds])
    assert lines == [
        "round 2: better; its student is kept",
        "round 3: worse; the previous round's student is kept",
    ]


def test_a_full_disk_is_reported(finished: Finished) -> None:
    """In one line; with more room the same command resumes."""
    code, _, errors = finished.refused
    assert code == 1 and "File too large" in errors and len(errors.strip().splitlines()) == 1
    assert "verdict: " in finished.printed and "student.safetensors" in finished.printed


def test_flipped_bits_in_stages_are_noticed(finished: Finished, tiny: Checkpoint, tmp_path: Path) -> None:
    """Damaged labels are made again, a damaged student is never used."""
    folder = tmp_path / "again"
    shutil.copytree(finished.folder / "stages", folder / "stages")

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    run = Distillation(FABRIC, tiny, finished.run.source, folder, options(tiny.model))
    for labels in (folder / "stages").glob("labels-*.npz"):
        flip(labels)
        assert PseudoLabels.load(labels) is None
    assert np.array_equal(run.run().labels.position, finished.adapted.labels.position)
    # Those that this run uses; others are of other settings.
    assert any(PseudoLabels.load(labels) for labels in (folder / "stages").glob("labels-*.npz"))
    student = folder / "stages" / finished.adapted.student.path.parent.name
    flip(student / BEST_FILE)
    with pytest.raises(AdaptationError, match=rf"is damaged: .* delete {student} to train"):
        run.run()
    flip(student / BEST_FILE)
    flip(student / "last.pt")
    with pytest.raises(TrainingError, match=r"last\.pt is damaged"):
        run.run()


def test_results_say_what_they_come_from(
    finished: Finished, tiny: Checkpoint, tiny_city: SimulatedDataset
) -> None:
    metrics = finished.metrics
    written = load_checkpoint(finished.folder / "student.safetensors")
    assert written.metadata["parent"] == tiny.sha256
    assert written.metadata["command"] == shlex.join(["xview-loc", *finished.words])
    assert written.metadata["adaptation"]["data"] == tiny_city.name
    assert metrics["student_sha256"] == written.sha256
    assert metrics["pairs"] == 40 and metrics["held_out"] == 8
    assert 26 <= metrics["trained_on"] < 32  # four fifths, and what agrees as well as the last of them
    assert metrics["true_errors"]["teacher, held out"]["frames"] == 8
    assert {"label_free_mean_m", "best_mean_m"} <= set(metrics["epoch_picks"])
    page = (finished.folder / "report.html").read_text()
    assert "Outlier filter" in page and "deploy" in page and page.count("data:image/png") >= 6
    assert page.index("Do not deploy the student") < page.index("Outlier filter")
    for picture in ("from the true position", "the estimate moved by", "Share of held-out pairs by error"):
        assert picture in page


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
    labels = label_pairs(
        FABRIC, teacher.model, PairDataset([tmp_path / "pairs"], SPEC), tmp_path / "l.npz", ReadOptions()
    )
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


def test_unusable_pairs_say_so(tiny: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "few", 3)
    source = PairDataset([tmp_path / "few"], tiny.model.spec)
    with pytest.raises(AdaptationError, match="3 pairs are too few"):
        Distillation(FABRIC, tiny, source, tmp_path, options(tiny.model, batch_size=4))
    with pytest.raises(AdaptationError, match="0 pairs are too few"):
        Distillation(
            FABRIC, tiny, PairDataset([], tiny.model.spec), tmp_path, options(tiny.model, batch_size=4)
        )
    write_pairs(tmp_path / "small", 9, tile_px=64)
    small = PairDataset([tmp_path / "small"], tiny.model.spec)
    run = Distillation(FABRIC, tiny, small, tmp_path, options(tiny.model, batch_size=4))
    with pytest.raises(AdaptationError, match=r"none of 9 pairs can be used: .* 64 px"):
        run.run()
    write_pairs(tmp_path / "north", 9, heading=None)
    unaware = PairDataset([tmp_path / "north"], tiny.model.spec)
    run = Distillation(FABRIC, tiny, unaware, tmp_path, options(tiny.model, batch_size=4))
    with pytest.raises(AdaptationError, match="pair 0 has no heading"):
        run.run()
    for levels in (0, 4):
        with pytest.raises(AdaptationError, match=f"3 levels to supervise, not {levels}"):
            Distillation(FABRIC, tiny, unaware, tmp_path, options(tiny.model, batch_size=4, levels=levels))


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
    assert len(label_pairs(FABRIC, teacher.model, source, path, ReadOptions())) == 18
    source.missing = {17}
    labels = label_pairs(FABRIC, teacher.model, source, path, ReadOptions())
    assert labels.index.tolist() == [i for i in range(20) if i != 17]
    path.write_bytes(b"damaged")
    again = label_pairs(FABRIC, teacher.model, source, path, ReadOptions())
    assert np.array_equal(again.position, labels.position)


def test_heat_maps_are_stored_coarse(teacher: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 6, damage=2)
    source, index = PairDataset([tmp_path / "pairs"], SPEC), np.arange(1, 6)
    store = store_heat_maps(FABRIC, teacher.model, source, index, tmp_path / "maps", ReadOptions())
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
    again = store_heat_maps(FABRIC, teacher.model, source, index, tmp_path / "maps", ReadOptions())
    assert np.array_equal(again[4], store[4])
    assert store[4].size * 2 == stored_bytes(teacher.model)


def test_headings_are_those_at_the_labels_places(teacher: Checkpoint, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 5, heading=None)
    source = PairDataset([tmp_path / "pairs"], SPEC)
    labels = label_pairs(FABRIC, teacher.model, source, tmp_path / "l.npz", ReadOptions(None, seed=3))
    forgotten = replace(labels, heading=np.zeros(5, np.float32))
    again = with_model_headings(FABRIC, teacher.model, source, forgotten, ReadOptions(None, seed=3))
    assert again.heading == pytest.approx(labels.heading, abs=1e-6) and np.ptp(labels.heading) > 0.1


@pytest.fixture(scope="module")
def simulated_drive(
    streets: City,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PairDataset, np.ndarray]:
    """Pairs along a minute's drive, and metres from their fixes to their true positions."""
    folder = tmp_path_factory.mktemp("drive")
    write_drive(streets, folder)
    source = PairDataset([folder / "pairs"], SPEC)
    track = source.track()
    truth = read_timed_track(folder / "drive", "/truth/fix")
    return source, true_from_fix(track, *truth.at(track.stamp_ns))


def untrained(
    fabric: object,
    model: CrossViewModel,
    data: object,
    validation: LabelFreeValidation,
    folder: Path,
    loss: object,
    options: object,
    **more: object,
) -> TrainingProgress:
    """Stands in for training, of which these tests need no more than its files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, folder / BEST_FILE)
    return TrainingProgress(history=[{"epoch": 0, "loss": 0.0, **validation(model, 0)}])


def test_the_drive_corrects_the_teacher(
    teacher: Checkpoint,
    simulated_drive: tuple[PairDataset, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, truth = simulated_drive
    monkeypatch.setattr(distill, "train", untrained)
    chosen = options(teacher.model, smooth=True)
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
    smoothed = run.smoothed(teacher).of(run.training_index)
    better = smoothed.labels(labels)
    before, after = run.true_errors_m(labels), run.true_errors_m(better)
    assert after.mean() < 0.5 * before.mean()
    adapted = run.run()
    # Once smoothed, the heat maps are not needed any more, and nothing is done again.
    assert stages.count("teacher heat maps") == len(set(range(0, len(source), 16))) + 1
    assert not list((tmp_path / "stages").glob("*.maps"))
    assert np.array_equal(adapted.labels.position, better.position)
    # All levels, and no filter.
    assert adapted.recipe == (4, 1.0, False) and adapted.kept.all()
    metrics = write_results(run, adapted, tmp_path)
    assert metrics["options"]["levels"] == 4 and metrics["unreadable"] == 0
    assert metrics["smoothing"]["pairs"] == len(labels) and metrics["smoothing"]["without_grounds"] == 0
    errors = metrics["true_errors"]
    assert errors["pseudo ground truth"]["mean"] < 0.5 * errors["maxima of the same pairs"]["mean"]
    page = (tmp_path / "report.html").read_text()
    assert f"smoothing corrected {len(labels)} of {len(labels)} labels" in page
    for picture in ("whose labels moved most", "The whole drive", "the label moved by"):
        assert picture in page


@pytest.mark.parametrize(("uncertain_m", "held_out", "rounds"), [(0.0, 8, 2), (9.0, 8, 0), (0.0, 60, 0)])
def test_the_recipe_is_chosen(
    teacher: Checkpoint,
    simulated_drive: tuple[PairDataset, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uncertain_m: float,
    held_out: int,
    rounds: int,
) -> None:
    """Drives correct the labels; where these stay uncertain, rounds follow, as far as they can be judged."""
    source, _ = simulated_drive
    monkeypatch.setattr(distill, "train", untrained)
    for module in (distill, reports_module):
        monkeypatch.setattr(module, "UNCERTAIN_M", uncertain_m)
        monkeypatch.setattr(module, "MIN_MEASUREMENTS", held_out)
    good = Verdict(True, "", "", ["better"], 1.0, (-1.0, -2.0, -0.5))
    monkeypatch.setattr(distill, "judge", lambda before, after: good)
    run = Distillation(FABRIC, teacher, source, tmp_path, options(teacher.model, smooth=None, rounds=None))
    adapted = run.run()
    assert adapted.smoothed is not None and len(adapted.rounds) == rounds
    recipe = write_results(run, adapted, tmp_path)["recipe"]
    assert recipe["name"] == "drives"
    text = " ".join(recipe["reasons"])
    assert "The pairs come from drives, which correct the labels. The labels are uncertain by 0." in text
    says = "after the last round that was kept"
    if not rounds:
        says = "would gain nothing" if uncertain_m else "60 held-out pairs"
    assert says in text


def test_pairs_without_drives_get_the_paper_s_recipe(tiny: Checkpoint, tmp_path: Path) -> None:
    """Photographs a minute apart are no drive, unless odometry links them."""
    write_pairs(tmp_path / "pairs", 24)
    source = PairDataset([tmp_path / "pairs"], tiny.model.spec)
    track = source.track()
    assert track is not None and from_drives(track)
    apart = replace(track, stamp_ns=np.arange(24) * 60 * 10**9)
    assert not from_drives(apart)
    assert from_drives(replace(apart, moved=np.ones((24, 2))))
    source.track = lambda: apart  # type: ignore[method-assign]
    run = Distillation(FABRIC, tiny, source, tmp_path, options(tiny.model, smooth=None, rounds=None))
    adapted = run.run()
    assert adapted.smoothed is None and adapted.rounds == () and adapted.recipe.levels == 2
    reasons = write_results(run, adapted, tmp_path)["recipe"]["reasons"]
    assert reasons == ["The pairs do not come from drives, so the labels are the teacher's maxima."]


def test_drives_with_unknown_headings_are_smoothed(
    teacher: Checkpoint, simulated_drive: tuple[PairDataset, np.ndarray], tmp_path: Path
) -> None:
    source, truth = simulated_drive
    chosen = options(teacher.model, smooth=True, heading_prior_deg=None)
    run = Distillation(FABRIC, teacher, source, tmp_path, chosen, true_from_fix=truth)
    maxima = run.teacher_labels()
    smoothed = run.smoothed(teacher).of(run.training_index)
    labels = smoothed.labels(maxima)
    assert smoothed.mostly_usable
    assert run.true_errors_m(labels).mean() < 0.5 * run.true_errors_m(maxima).mean()
    # North is up in what the camera saw; the panoramas were turned for the teacher, the labels are not.
    off = np.angle(np.exp(1j * labels.heading.astype(float)))
    assert np.median(np.abs(off)) < math.radians(20)


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
    tiny: Checkpoint, tiny_city: SimulatedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(tiny.model, smooth=True)
    with pytest.raises(AdaptationError, match="has no drives to correct the labels: use the recipe paper"):
        Distillation(FABRIC, tiny, tiny_city, tmp_path, chosen)
    with pytest.raises(AdaptationError, match="with a validation dataset, drives cannot be used"):
        Distillation(FABRIC, tiny, tiny_city, tmp_path, chosen, validation=tiny_city)
    # Heat maps of noise give no grounds: the paper's recipe it is, in one round, and that is said.
    write_pairs(tmp_path / "pairs", 24)
    source = PairDataset([tmp_path / "pairs"], tiny.model.spec)
    monkeypatch.setattr(distill, "UNCERTAIN_M", 0.0)
    monkeypatch.setattr(distill, "MIN_MEASUREMENTS", 2)
    chosen = options(tiny.model, smooth=True, rounds=None)
    run = Distillation(FABRIC, tiny, source, tmp_path / "smooth", chosen)
    adapted = run.run()
    metrics = write_results(run, adapted, tmp_path / "smooth")
    assert not metrics["smoothing"]["used"] and adapted.recipe == (2, 0.8, True)
    assert metrics["recipe"] == {"name": "paper", "reasons": []}
    text = "drives were not used, but the teacher's maxima and the paper's recipe: "
    assert text in html.unescape((tmp_path / "smooth" / "report.html").read_text())
    # Without smoothing nothing is left to do: the stages are the same.
    stages = sorted((tmp_path / "smooth" / "stages").iterdir())
    plain = Distillation(FABRIC, tiny, source, tmp_path / "smooth", options(tiny.model)).run()
    assert np.array_equal(adapted.labels.position, plain.labels.position)
    assert sorted((tmp_path / "smooth" / "stages").iterdir()) == stages


@pytest.mark.parametrize(("name", "prior"), [("ggcvt-tiny", 0.0), ("ccvpe-tiny", None)])
def test_every_model_and_heading_is_adapted(
    name: str, prior: float | None, cache: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = create_model(name)
    save_checkpoint(model, tmp_path / "teacher.safetensors")
    first = load_checkpoint(tmp_path / "teacher.safetensors")
    source = simulated_pairs(model.spec, cache, model.half_extent_m)
    chosen = options(model, heading_prior_deg=prior, keep=0.6)
    adapted = Distillation(FABRIC, first, source, tmp_path, chosen).run()
    assert 0 < adapted.kept.sum() < len(adapted.labels)
    assert math.isfinite(adapted.student.history[0]["loss"])
    changed = adapted.student.load().model.state_dict()
    assert any(not torch.equal(value, changed[key]) for key, value in model.state_dict().items())


def test_one_student_serves_with_and_without_a_heading(tiny: Checkpoint, tiny_city: SimulatedDataset) -> None:
    """CCVPE panoramas are turned in training whatever is known; other students are trained as read."""
    small = create_model("ggcvt-tiny")
    for model, turned, prior, trained in (
        (tiny.model, None, 0.0, None),
        (tiny.model, None, None, None),
        (tiny.model, False, 0.0, 0.0),
        (tiny.model, False, 30.0, 30.0),
        (small, None, 0.0, 0.0),
    ):
        chosen = options(model, heading_prior_deg=prior, turned=turned)
        training = chosen.student_training(chosen.recipe(model, smoothed=False))
        assert training.heading_priors_deg == (trained,)
        if turned is None:
            smoothed = chosen.student_training(chosen.recipe(model, smoothed=True))
            assert smoothed.heading_priors_deg == (prior,)


def test_turned_students_learn_from_the_teacher_s_upright_heat_maps(tiny_city: SimulatedDataset) -> None:
    torch.manual_seed(0)
    model = create_model("ccvpe-tiny").eval()
    batch = default_collate([tiny_city[index] for index in range(3)])
    batch["heading"] = torch.zeros(3)
    loss = DistillationLoss(2, teacher=model, teacher_prior_deg=0.0)
    turned = turn_panoramas(batch, np.array([16, 96, 200]))
    with torch.no_grad():
        torch.testing.assert_close(loss._label(model, turned), loss._label(model, batch))
        searched = replace(loss, teacher_prior_deg=None)
        assert not torch.equal(searched._label(model, turned), loss._label(model, batch))


def test_a_dataset_with_truth_picks_the_epoch(
    tiny: Checkpoint, tiny_city: SimulatedDataset, tmp_path: Path
) -> None:
    """All pairs are trained on then; the dataset's are the held-out ones of verdict and report."""
    chosen = options(tiny.model, epochs=2, keep=1.0)
    run = Distillation(FABRIC, tiny, tiny_city, tmp_path, chosen, validation=tiny_city)
    assert len(run.training_index) == 40 and run.held_out_index.tolist() == list(range(40, 80))
    adapted = run.run()
    history = adapted.student.history
    best = min(history, key=lambda entry: entry["known_mean_m"])
    written = load_checkpoint(adapted.student.path).metadata["training"]
    assert written["epoch"] == best["epoch"] and written["validation"] == tiny_city.name
    assert len(adapted.kept) == 40 and len(adapted.after.plain) == 40
    # The same poses are the truth of the held-out pairs; of the others none was given.
    assert np.isfinite(run.true_errors_m(adapted.after.plain)).all()
    assert np.isnan(run.true_errors_m(adapted.labels)).all()


def test_the_ablation_measures_every_part(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "KEEPS", (0.8, 1.0))
    rows = ablation.run_ablation(finished.run)
    names = ["K' = 1", "K' = 2", "K' = 3", "T = 80%", "T = 100%"]
    assert [row.name for row in rows] == [*ablation.TABLE, *names]
    by_name = {row.name: row.errors for row in rows}
    assert by_name["Student+M-OF"] == by_name["T = 100%"]
    assert by_name["Student+M+OF"] == by_name["K' = 2"] == by_name["T = 80%"]
    assert by_name["Teacher"].frames == 8
    ablation.write_ablation(rows, finished.run, tmp_path)
    assert len(json.loads((tmp_path / "ablation.json").read_text())) == len(rows)
    assert (tmp_path / "ablation.html").read_text().count("data:image/png") == 2


def test_training_stops_at_a_loss_that_is_not_finite(
    tiny: Checkpoint, tiny_city: SimulatedDataset, tmp_path: Path
) -> None:
    wild = options(tiny.model, learning_rate=1e18, epochs=2)
    with pytest.raises(TrainingError, match=r"not finite at step \d+"):
        Distillation(FABRIC, tiny, tiny_city, tmp_path, wild).run()


@pytest.mark.parametrize("twist", [True, False])
def test_odometry_is_what_the_wheels_drove(tmp_path: Path, twist: bool) -> None:
    """Ten metres a second along the heading; a gap of three seconds says nothing, but for poses around it."""
    folder = tmp_path / "pairs"
    writer = PairWriter(folder, {"vehicle": "test"})
    image = encode_jpeg(np.zeros((64, 256, 3), np.uint8), 90)
    tile = AerialTile(np.zeros((SPEC.aerial_size,) * 2 + (3,), np.uint8), 48.2, 16.37, SPEC.gsd)
    for tenth in range(0, 101):
        if not 60 < tenth < 90:
            stamp = START_NS + tenth * 100_000_000
            writer.add_odometry(stamp, odometry(stamp, 10.0 * twist, x=float(tenth)))
        if tenth % 20 == 5:
            writer.add(Pair(START_NS + tenth * 100_000_000, "jpeg", image, 48.2, 16.37, heading=0.5), tile)
    writer.close()
    moved = PairDataset([folder], SPEC).track().moved  # at 0.5, 2.5, 4.5, 6.5 and 8.5 s
    step = 20.0 * np.array([math.cos(0.5), math.sin(0.5)])
    known = [1, 2] if twist else [1, 2, 3, 4]
    assert moved[known] == pytest.approx(np.stack([step] * len(known)), abs=1e-6)
    assert np.isnan(np.delete(moved, known, 0)).all()


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


def odometry(stamp: int, speed: float, x: float = 0.0) -> bytes:
    def vector(x: float = 0.0) -> Any:
        return message("geometry_msgs/msg/Vector3", x=x, y=0.0, z=0.0)

    point = message("geometry_msgs/msg/Point", x=x, y=0.0, z=0.0)
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
    indicators = Indicators.of(LabelsByView(plain, plain, None), track)
    assert indicators.motion[1:] == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=2e-3)
    assert np.isnan(indicators.motion[0])
    assert indicators.stray_sigmas == pytest.approx([0, 0, 0, 0.1, 0])
    some = track.rows(np.array([0, 2, 3]))
    assert np.isnan(some.moved[:2]).all() and np.isfinite(some.moved[2]).all()
    lat, lon = LocalProjection(*fixes[1]).inverse(3.0, -4.0)
    places = true_from_fix(track.rows(np.array([1])), np.array([lat]), np.array([lon]))
    assert places == pytest.approx(np.array([[3.0, -4.0]]), abs=1e-6)


def test_whole_drives_say_how_far_estimates_are_off() -> None:
    """Two metres, more than twenty, and unknown; averaged with what else contradicts an estimate."""
    position = np.full((3, 2), 79.5, np.float32)
    plain = labels_at(position)
    shifted = labels_at(position + np.array([2.0, 0.0], np.float32))
    there = position + np.array([[4.0, 0.0], [0.0, 60.0], [4.0, 4.0]], np.float32)
    known, covariance = np.array([True, True, False]), np.tile(np.eye(2, dtype=np.float32), (3, 1, 1))
    zero = np.zeros(3, np.float32)
    placed = Smoothed(np.arange(3), there, zero, covariance, zero, known, np.ones(3, bool))
    indicators = Indicators.of(LabelsByView(plain, shifted, None), None, placed)
    assert indicators.drive == pytest.approx([2.0, 20.0, math.nan], rel=1e-4, nan_ok=True)
    assert indicators.score_terms() == pytest.approx([1.5, 10.5, 1.0], rel=1e-4)
    assert indicators.summary()["drive"] == pytest.approx(11.0, rel=1e-4)


@pytest.mark.parametrize(("fix_std", "prior"), [(20.0, 0.0), (1.0, 30.0), (20.0, None)])
def test_views_show_the_same_place(
    city: SimulatedDataset, teacher: Checkpoint, fix_std: float, prior: float | None
) -> None:
    source = Changed(city, lambda s: {"fix_std": torch.tensor(fix_std)})
    views = label_views(FABRIC, teacher.model, source, np.arange(20), ReadOptions(prior))
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
        return Indicators(rng.exponential(level, 200), nan, nan, nan, np.full(200, sigmas), nan, nan)

    worse, better, stray = indicators(3.0), indicators(1.0), indicators(1.0, 4.0)
    assert judge(worse, better).deploy
    assert not judge(better, worse).deploy
    assert not judge(worse, worse).deploy
    blind = replace(better, stray_sigmas=nan)
    assert judge(worse, blind).deploy and "no covariance" in judge(worse, blind).reasons[-1]
    few = [Indicators(rng.exponential(level, 50), *(np.full(50, math.nan),) * 6) for level in (9.0, 0.1)]
    few_pairs = judge(*few)
    assert not few_pairs.deploy and "50 held-out pairs are too few" in few_pairs.summary
    assert "Record 2 times as many pairs" in few_pairs.advice
    far = judge(worse, stray)
    assert not far.deploy and "contradicts the coarse fixes more often" in far.summary
    assert "100.0% of the student's and 0.0% of the teacher's lie more than 3 sigma" in far.reasons[1]
    assert "better than the teacher" in judge(worse, better).summary
    assert "worse than the teacher" in judge(better, worse).summary
    assert "not clearly better than the teacher" in judge(worse, worse).summary


def test_the_command_says_what_is_wrong(cache: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 24)
    pairs, out = str(tmp_path / "pairs"), str(tmp_path / "out")
    table = tmp_path / "truth.csv"
    table.write_text("stamp,lat,lon\n12.5,48.2,16.37\n")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"rubbish")
    for words, says in (
        (["adapt", pairs, "--out", out, "--heading", "north"], "known, unknown or 0 to 180"),
        (["adapt", pairs, "--out", out, "--truth", str(table)], "has no position at the time"),
        (["adapt", pairs, "--out", out, "--checkpoint", str(other)], "other.safetensors"),
        (["adapt", str(tmp_path / "none"), "--out", out], "none"),
        (["ablate", pairs, "--out", out], "give --truth"),
        (["adapt", pairs, "--out", out, "--model", "ggcvt-vigor"], "no weights are shipped"),
    ):
        code, _, error = xview_loc(cache, *words)
        assert code in (1, 2) and says in error, error
        assert len(error.strip().splitlines()) == 1


def test_pairs_of_the_source_are_replayed(
    tiny: Checkpoint, tiny_city: SimulatedDataset, tmp_path: Path
) -> None:
    """Students see them as well; pairs with a known turn of their tile and without go together."""
    write_pairs(tmp_path / "pairs", 24)
    source = PairDataset([tmp_path / "pairs"], tiny.model.spec)
    steps: dict[str, int] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        steps[stage] = total

    chosen = options(tiny.model, keep=1.0)
    run = Distillation(FABRIC, tiny, source, tmp_path, chosen, replay=tiny_city, on_progress=on_progress)
    adapted = run.run()
    seen = len(run.training_index) + len(tiny_city)
    assert steps["student"] == seen // chosen.training.batch_size * chosen.training.epochs
    metrics = write_results(run, adapted, tmp_path)
    assert metrics["replayed"] == len(tiny_city) and metrics["trained_on"] == len(run.training_index)
    alone = Distillation(FABRIC, tiny, source, tmp_path, chosen).run()
    assert alone.student.path != adapted.student.path


def test_a_dry_run_does_nothing(cache: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 24)
    words = ["adapt", str(tmp_path / "pairs"), "--out", str(tmp_path / "out"), "--dry-run"]
    code, printed, errors = xview_loc(cache, *words)
    assert code == 0, errors
    assert "teacher heat maps: 24 pairs, about" in printed and "smoothing: 24 pairs" in printed
    assert "student: 22 pairs, about" in printed and "MB of disk" in printed
    assert "auxiliary" not in printed
    code, printed, errors = xview_loc(cache, *words, "--recipe", "paper")
    # The verdict uses the drives whatever the recipe.
    assert code == 0 and "auxiliary student" in printed and "smoothing: 24 pairs" in printed, errors
    assert not (tmp_path / "out").exists()


def test_tiles_that_do_not_fit_are_cut_anew(cache: Path, tmp_path: Path) -> None:
    aerial = write_geotiff(tmp_path / "map.tif", texture(900, 900), 48.2, 16.37, 0.5, "EPSG:32633")
    out = tmp_path / "out"
    write_pairs(tmp_path / "pairs", 24)
    words = ["adapt", str(tmp_path / "pairs"), "--out", str(out), "--dry-run", "--model"]
    assert "ggcvt-small needs 192 px at 0.48 m/px" in xview_loc(cache, *words, "ggcvt-small")[2]
    words += ["ggcvt-small", "--map", str(aerial)]
    code, printed, errors = xview_loc(cache, *words)
    assert code == 0, errors
    assert "24 pairs with tiles for ggcvt-small\n" in printed and ": 22 pairs, about" in printed
    (copy,) = (out / "pairs").iterdir()
    assert PairBag(copy).tile_sizes() == {(192, 0.48)}
    # It serves again, also as a bag of its own, and ccvpe-small's smaller tiles are cut from it.
    for bag, model in ((words[1], "ggcvt-small"), (str(copy), "ggcvt-small"), (str(copy), "ccvpe-small")):
        words[1], words[6] = bag, model
        code, printed, errors = xview_loc(cache, *words)
        assert code == 0 and "with tiles for" not in printed, errors
    assert list((out / "pairs").iterdir()) == [copy]


def test_keys_of_a_map_stay_out_of_the_student(cache: Path, tmp_path: Path) -> None:
    aerial = write_geotiff(tmp_path / "map.tif", texture(900, 900), 48.2, 16.37, 0.5, "EPSG:32633")
    write_pairs(tmp_path / "pairs", 24)
    words = ["adapt", str(tmp_path / "pairs"), "--out", str(tmp_path / "out"), "--model", "ccvpe-tiny"]
    teacher = tmp_path / "teacher.safetensors"
    save_checkpoint(create_model("ccvpe-tiny"), teacher)
    words += ["--checkpoint", str(teacher), "--epochs", "1", "--accelerator", "cpu", "--map", str(aerial)]
    code, _, errors = xview_loc(cache, *words, "--header", "Authorization: Bearer s3cr3t-t0ken")
    assert code == 0, errors
    command = load_checkpoint(tmp_path / "out" / "student.safetensors").metadata["command"]
    assert "--header" in command and "s3cr3t" not in command
    assert b"s3cr3t" not in (tmp_path / "out" / "student.safetensors").read_bytes()


def test_pairs_may_be_validated_on_another_dataset(
    teacher: Checkpoint, city: SimulatedDataset, tmp_path: Path
) -> None:
    """Their samples differ: those of a bag say how its tiles are turned."""
    write_pairs(tmp_path / "pairs", 6)
    both = JoinedPairs(PairDataset([tmp_path / "pairs"], SPEC), city)
    labels = label_pairs(FABRIC, teacher.model, both, tmp_path / "l.npz", ReadOptions())
    assert len(labels) == 6 + len(city) and (labels.turn == 0.0).all()


def test_the_other_padding_is_noticed(
    teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped weights were trained with reflect padding; their plain state dict does not say so."""
    familiar = build_city(3, "source", size_m=500.0)
    monkeypatch.setattr(simulated, "build_city", lambda seed, style: familiar)
    pairs = SimulatedDataset("source", range(3, 4), 64, SPEC, cache_dir=tmp_path)
    zeros = replace(CONFIGS["ccvpe-small"], spec=replace(SPEC, name="ccvpe-zeros"), padding="zeros")
    monkeypatch.setitem(models._CONSTRUCTORS, "ccvpe-zeros", partial(CCVPE, zeros))
    monkeypatch.setattr(
        padding, "_ALTERNATIVES", {"ccvpe-small": "ccvpe-zeros", "ccvpe-zeros": "ccvpe-small"}
    )
    torch.save(teacher.model.state_dict(), tmp_path / "published.pt")
    warnings = {
        name: padding_warning(FABRIC, load_checkpoint(tmp_path / "published.pt", name), pairs, ReadOptions())
        for name in ("ccvpe-zeros", "ccvpe-small")
    }
    assert warnings["ccvpe-small"] is None
    assert warnings["ccvpe-zeros"] is not None and "--model ccvpe-small" in warnings["ccvpe-zeros"]
    # Our own files name their model.
    assert padding_warning(FABRIC, teacher, pairs, ReadOptions()) is None
