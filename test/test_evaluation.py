"""Errors on drives and benchmarks, the evaluate command, and HTML pages."""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from benchmark_fixtures import kitti_name, kitti_scene, make_kitti_frame, make_vigor_target
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.cli.console import UsageError
from xview_loc.datasets import DatasetError, PoseDataset, Sample
from xview_loc.datasets.benchmark import part_of
from xview_loc.estimation.observation import LocalizationError, Observation
from xview_loc.evaluation.errors import (
    DriveErrors,
    Errors,
    EvaluationError,
    PoseErrors,
    distance_m,
    evaluate,
    localize_drive,
)
from xview_loc.geodesy import LocalProjection
from xview_loc.models.base import CrossViewModel, HeatMapGrid, HeatMaps
from xview_loc.models.ccvpe import CCVPE, CONFIGS
from xview_loc.models.checkpoint import Checkpoint
from xview_loc.models.specs import ModelSpec
from xview_loc.report import Page
from xview_loc.simulation.city import City, build_city

PLANE = LocalProjection(48.2, 16.37)


class FiveMetresEast:
    """A localizer that answers 5 m east of the fix and refuses every third frame."""

    def __init__(self, heading: float | None = None) -> None:
        self.calls, self.heading = 0, heading

    def localize(self, observation: Observation) -> SimpleNamespace:
        self.calls += 1
        if self.calls % 3 == 0:
            raise LocalizationError("not this one")
        lat, lon = LocalProjection(observation.lat, observation.lon).inverse(5.0, 0.0)
        return SimpleNamespace(lat=lat, lon=lon, covariance=np.diag([4.0, 1.0]), heading=self.heading)


@pytest.mark.parametrize("heading", [0.0, math.pi / 2, None])
def test_a_drive_is_measured_frame_by_frame(heading: float | None) -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    frames = []
    for k in range(6):
        truth = PLANE.inverse(100.0 * k, 50.0)
        fix = LocalProjection(*truth).inverse(-2.0, 0.0)
        frames.append((Observation(image, *fix), truth))
    drive = localize_drive(FiveMetresEast(heading), frames)  # type: ignore[arg-type]
    assert drive.fix == pytest.approx(np.full(6, 2.0), abs=1e-3)
    assert drive.estimate[[0, 1, 3, 4]] == pytest.approx(np.full(4, 3.0), abs=1e-3)
    assert np.isnan(drive.estimate[[2, 5]]).all()
    # Three metres off to the east, where the standard deviation is two.
    assert drive.mahalanobis[[0, 1, 3, 4]] == pytest.approx(np.full(4, 1.5), abs=1e-3)
    assert drive.nees == pytest.approx(2.25, abs=1e-3)
    # An error to the east is ahead for a heading east, to the right for one north.
    if heading is not None:
        ahead, right = (3.0, 0.0) if heading == 0.0 else (0.0, 3.0)
        assert drive.longitudinal[[0, 1, 3, 4]] == pytest.approx(np.full(4, ahead), abs=1e-3)
        assert drive.lateral[[0, 1, 3, 4]] == pytest.approx(np.full(4, right), abs=1e-3)
        assert drive.coverage_by_axis(0.8) == ((0.0, 1.0) if ahead else (1.0, 0.0))
        assert drive.coverage_by_axis(0.9) == (1.0, 1.0)
    else:
        assert np.isnan(drive.longitudinal).all() and np.isnan(drive.lateral_sigmas).all()
    assert (drive.coverage(0.6), drive.coverage(0.7)) == (0.0, 1.0)
    assert len(DriveErrors.joined([drive, drive]).fix) == 12


def test_errors_ignore_nan() -> None:
    errors = Errors.of(np.array([1.0, 2.0, math.nan, 9.0]))
    assert (errors.frames, errors.mean, errors.median) == (3, 4.0, 2.0) and 2.0 < errors.p95 < 9.0
    assert Errors.of(np.array([math.nan])).frames == 0
    nan = math.nan
    parts = Errors.of(np.array([5.0, nan, 2.0]), (np.array([3.0, nan, -2.0]), np.array([-4.0, nan, 0.0])))
    assert (parts.frames, parts.longitudinal_mean, parts.lateral_mean) == (2, 2.5, 2.0)
    assert distance_m(*PLANE.inverse(3.0, 4.0), 48.2, 16.37) == pytest.approx(5.0, abs=1e-6)


def test_a_page_is_one_file(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1], [1, 0])
    page = Page("A <drive>")
    page.heading("Errors")
    page.table(["", "mean"], [["fix & more", "2.0 m"]])
    page.figure(figure, "A line")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "A &lt;drive&gt;" in text and "fix &amp; more" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    (data,) = re.findall(r"base64,([^\"]+)", text)
    picture = cv2.imdecode(np.frombuffer(b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None and picture.shape[1] > 100


def command(*words: str) -> str:
    done = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "100"})
    assert done.exit_code == 0
    return done.output


@lru_cache(maxsize=1)
def small_city(seed: int, style: str) -> City:
    return build_city(seed, style, size_m=420.0)


@pytest.mark.parametrize(
    ("model", "heading"), [("ccvpe-small", "known"), ("ccvpe-small", "unknown"), ("ggcvt-small", "known")]
)
def test_the_shipped_models_find_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, heading: str
) -> None:
    """Much nearer than the coarse fix, in a city that was not trained on."""
    monkeypatch.setattr("xview_loc.simulation.city.build_city", small_city)
    out = tmp_path / "errors.json"
    words = ["evaluate", "--model", model, "--cities", "950", "--frames", "16", "--heading", heading]
    printed = command(*words, "--out", str(out))
    figures = re.search(r"estimate\D+(\d+)\D+([\d.]+)\D+([\d.]+)", printed)
    coarse = re.search(r"coarse fix\D+(\d+)\D+([\d.]+)\D+([\d.]+)", printed)
    assert figures and coarse and int(figures[1]) >= 14
    assert float(figures[3]) < 2.5 and float(figures[3]) < float(coarse[3]) / 3
    assert "estimate_m" in json.loads(out.read_text())


SIDE, GSD = 81, 0.5
NORTH = ModelSpec("stub", "panorama", (2, 4), SIDE, GSD, 4)
LEFT = ModelSpec("stub", "pinhole", (2, 4), SIDE, GSD, 4, aerial_up="left", intrinsics=(2.0, 2.0, 1.5, 0.5))


class Maps(PoseDataset):
    """Samples whose aerial tile is the model's heat map: a Gaussian about ``seen``.

    seen, position: (N, 2), (row, col) on the map and on the tile. heading: (N,), radians. sigma: map pixels.
    """

    name = "maps"

    def __init__(
        self,
        seen: np.ndarray,
        position: np.ndarray,
        heading: np.ndarray | None = None,
        sigma: float = 3.0,
        meters_per_pixel: float = GSD,
    ) -> None:
        self._seen, self._position = np.asarray(seen, float), np.asarray(position, float)
        self._heading = np.zeros(len(seen)) if heading is None else heading
        self._sigma, self._gsd = sigma, meters_per_pixel

    def __len__(self) -> int:
        return len(self._seen)

    def __getitem__(self, index: int) -> Sample:
        rows, cols = np.mgrid[:SIDE, :SIDE]
        row, col = self._seen[index]
        log = -((rows - row) ** 2 + (cols - col) ** 2) / (2 * self._sigma**2)
        return {
            "ground": torch.zeros(3, 2, 4),
            "aerial": torch.from_numpy(log).float().expand(3, -1, -1),
            "fix": torch.full((2,), (SIDE - 1) / 2),
            "fix_std": torch.tensor(5.0),
            "heading_known": torch.tensor(True),
            "meters_per_pixel": torch.tensor(self._gsd),
            "index": torch.tensor(index),
            "position": torch.tensor(self._position[index], dtype=torch.float32),
            "heading": torch.tensor(self._heading[index], dtype=torch.float32),
        }


class Mirror(CrossViewModel):
    """Returns the tile as its heat map, and ``angle`` as the heading if asked."""

    def __init__(self, spec: ModelSpec, grid: HeatMapGrid | None = None, angle: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.weight = torch.nn.Parameter(torch.ones(()))
        self._map_grid, self._angle = grid or HeatMapGrid(), angle

    def encode_aerial(self, aerial: Tensor) -> Tensor:
        return aerial[:, 0] * self.weight

    def match(
        self,
        ground: Tensor,
        features: Tensor,
        heading_prior_deg: float | None = None,
        *,
        orientation: bool = False,
    ) -> HeatMaps:
        field = torch.tensor([math.cos(self._angle), math.sin(self._angle)])[None, :, None, None]
        field = field.expand(len(features), 2, SIDE, SIDE) if orientation else None
        return HeatMaps([features[:, None]], features, field, self._map_grid)


def test_distances_are_metres_of_each_tile() -> None:
    data = Maps([(30, 40), (20, 20)], [(30, 40), (24, 17)], meters_per_pixel=0.2)
    errors = evaluate(Mirror(NORTH), data, 0.0)
    assert errors.distance_m == pytest.approx([0.0, 5 * 0.2])
    for missing in (errors.longitudinal_m, errors.lateral_m, errors.heading_deg):
        assert np.isnan(missing).all()
    assert (errors.encode_ms > 0).all() and (errors.match_ms > 0).all()
    # A coarser map that covers a part of the tile.
    shifted = Maps([(30, 40)], [(2 * 30 + 5, 2 * 40 - 7)])
    assert evaluate(Mirror(NORTH, HeatMapGrid(2.0, (5.0, -7.0))), shifted, 0.0).distance_m[0] == 0.0


@pytest.mark.parametrize("turn_deg", [0.0, 10.0, -70.0])
def test_errors_are_split_along_the_heading(turn_deg: float) -> None:
    """The heading points right, turned counter-clockwise; the estimate lies ahead and to the right of it."""
    turn = math.radians(turn_deg)
    right_up = (
        np.array([math.cos(turn), math.sin(turn)]) * 8 + np.array([math.sin(turn), -math.cos(turn)]) * 6
    )
    seen = np.array([40.0, 40.0])
    truth = seen - np.array([-right_up[1], right_up[0]])
    errors = evaluate(Mirror(LEFT), Maps([seen], [truth], np.array([math.pi / 2 - turn])), None)
    assert errors.longitudinal_m[0] == pytest.approx(8 * GSD, abs=1e-5)
    assert errors.lateral_m[0] == pytest.approx(6 * GSD, abs=1e-5)
    assert errors.distance_m[0] == pytest.approx(10 * GSD, abs=1e-5)


def test_heading_errors_are_counter_clockwise() -> None:
    data = Maps([(40, 40)] * 2, [(40, 40)] * 2, np.array([0.1, 2 * math.pi - 0.1]))
    north = evaluate(Mirror(NORTH, angle=0.3), data, None, batch_size=2)
    assert north.heading_deg == pytest.approx(np.degrees([0.2, 0.4]), abs=1e-4)
    # Here the angle counts clockwise from the top.
    left = evaluate(Mirror(LEFT, angle=0.3), data, None, batch_size=2)
    assert left.heading_deg == pytest.approx(-np.degrees([0.2, 0.4]), abs=1e-4)
    assert np.isnan(evaluate(Mirror(NORTH, angle=0.3), data, 0.0).heading_deg).all()


def test_probabilities_and_ellipses_are_those_of_the_map() -> None:
    """True positions are drawn from the maps, so likelihood and coverage are a Gaussian's."""
    rng = np.random.default_rng(5)
    sigma, count = 8.0, 400
    seen = rng.uniform(36, 44, (count, 2))
    truth = seen + rng.normal(0, sigma, (count, 2))
    errors = evaluate(Mirror(NORTH), Maps(seen, truth, sigma=sigma), 0.0, batch_size=50)
    metres = sigma * GSD
    offset = np.linalg.norm(truth - seen, axis=1) * GSD
    density = np.exp(-0.5 * (offset / metres) ** 2) / (2 * math.pi * metres**2)
    inside = ((truth > 0) & (truth < SIDE - 1)).all(axis=1)
    assert errors.nll[inside] == pytest.approx(-np.log(density[inside]), abs=0.4)
    assert errors.probability[inside] == pytest.approx(density[inside] * GSD**2, rel=0.4)
    assert errors.mahalanobis == pytest.approx(offset / math.hypot(metres, 0.5), rel=0.05, abs=0.02)
    assert errors.coverage(0.68) == pytest.approx(0.68, abs=0.05)
    assert errors.coverage(0.95) == pytest.approx(0.95, abs=0.03)
    outside = evaluate(Mirror(NORTH), Maps([(40, 40)], [(-3, 40)]), 0.0)
    assert outside.probability[0] == 0.0 and math.isinf(outside.nll[0])


def test_the_summary_adds_up() -> None:
    shift = np.array([0, 1, 4, 8, 20])
    truth = np.stack([40 + shift, np.full(5, 40)], axis=1)
    errors = evaluate(Mirror(LEFT), Maps([(40, 40)] * 5, truth, np.full(5, math.pi / 2)), None, batch_size=2)
    figures = errors.summary()
    assert figures["samples"] == 5
    assert (figures["distance_m_mean"], figures["distance_m_median"]) == pytest.approx((3.3, 2.0))
    assert (figures["lateral_m_mean"], figures["longitudinal_m_mean"]) == pytest.approx((3.3, 0.0), abs=1e-5)
    assert [figures[f"within_{m}_m"] for m in (1, 3, 5)] == [0.4, 0.6, 0.8]
    assert figures["heading_deg_median"] == pytest.approx(90.0, abs=1e-3)
    assert 0.2 <= figures["coverage_68"] <= figures["coverage_95"] < 1.0
    known = evaluate(Mirror(NORTH), Maps([(40, 40)], [(40, 40)]), 0.0).summary()
    assert not any(name.startswith(("longitudinal", "heading")) for name in known)


class Broken(Maps):
    """Its second sample cannot be read."""

    def __getitem__(self, index: int) -> Sample:
        if index == 1:
            raise DatasetError("tile.png does not exist (named in labels.txt line 2)")
        return super().__getitem__(index)


def test_evaluation_errors_are_clear() -> None:
    with pytest.raises(DatasetError, match=r"^tile.png does not exist \(named in labels.txt line 2\)$"):
        evaluate(Mirror(NORTH), Broken([(40, 40)] * 2, [(40, 40)] * 2), 0.0)
    blind = Mirror(NORTH)
    blind.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"stub on sample 0: .* not finite"):
        evaluate(blind, Maps([(40, 40)], [(40, 40)]), 0.0)
    with pytest.raises(EvaluationError, match="maps has no samples"):
        evaluate(Mirror(NORTH), Maps(np.zeros((0, 2)), np.zeros((0, 2))), 0.0)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 3), (1, 2)])
def test_unreadable_samples_are_left_out(workers: int, batch_size: int) -> None:
    data = Broken([(40, 40)] * 4, [(40 + i, 40) for i in range(4)])
    failures: list[str] = []
    done: list[int] = []
    errors = evaluate(
        Mirror(NORTH),
        data,
        0.0,
        batch_size=batch_size,
        workers=workers,
        on_batch=done.append,
        on_unreadable=lambda error: failures.append(str(error)),
    )
    assert errors.index.tolist() == [0, 2, 3]
    assert errors.distance_m == pytest.approx(np.array([0, 2, 3]) * GSD)
    assert failures == ["tile.png does not exist (named in labels.txt line 2)"]
    assert sum(done) == 4


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny VIGOR and KITTI; the last 20 % of their target areas are two samples and one."""
    root = tmp_path_factory.mktemp("benchmarks")
    make_vigor_target(root / "vigor", 5)
    make_kitti_frame(root / "kitti", 1, 0.4, kitti_scene(0.4))
    lines = [f"{kitti_name(1)} 0.2 -0.1 0.{i}\n" for i in range(5)]
    (root / "kitti" / "test2_files.txt").write_text("".join(lines))
    return root


def run(root: Path, dataset: str, *more: str) -> tuple[str, dict]:
    """Return what the command prints and what it writes."""
    out = root / "errors.json"
    words = ["evaluate", "--dataset", dataset, "--root", str(root / dataset), "--out", str(out), *more]
    return command(*words), json.loads(out.read_text())


@pytest.mark.parametrize("heading", ["known", "unknown"])
def test_a_model_is_evaluated_on_vigor(benchmarks: Path, heading: str) -> None:
    output, errors = run(benchmarks, "vigor", "--heading", heading, "--batch-size", "2")
    student = "3.85" if heading == "known" else "4.27"
    assert re.search(rf"CCVPE, student\D+{student}\D+1\.[56]7", output)
    assert ("GGCVT" in output) == (heading == "known")
    assert errors["summary"]["samples"] == 2 == len(errors["samples"]["distance_m"])
    assert (errors["dataset"], errors["split"], errors["labels"]) == ("vigor", "test", "corrected")
    assert ("heading_deg_mean" in errors["summary"]) == (heading == "unknown")
    assert re.search(rf"ccvpe-small\D+{errors['summary']['distance_m_mean']:.2f}", output)


def test_a_model_is_evaluated_on_kitti(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained, with narrow backbones: no weights are shipped."""
    torch.manual_seed(0)
    config = CONFIGS["ccvpe-kitti"]
    narrow = replace(config, width=0.25, up=(32,) * 5, up_orientation=(32,) * 5, conv_orientation=(32,) * 5)
    loaded = Checkpoint(CCVPE(narrow), {}, "")
    monkeypatch.setattr("xview_loc.models.checkpoint.load_model", lambda *_: loaded)
    output, errors = run(benchmarks, "kitti", "--heading", "unknown", "--split", "validation")
    assert "kitti validation, heading unknown" in output and "published" not in output
    assert errors["model"] == "ccvpe-kitti" and errors["summary"]["heading_deg_mean"] > 0.0


def test_errors_on_kitti_are_along_and_across(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CONFIGS["ccvpe-kitti"].spec

    class Always(CrossViewModel):
        """Finds the camera 10 pixels to the right of the tile's centre and 5 above it."""

        def __init__(self) -> None:
            super().__init__()
            self.spec, self.weight = spec, torch.nn.Parameter(torch.ones(()))

        def encode_aerial(self, aerial: Tensor) -> Tensor:
            return aerial[:, 0]

        def match(self, ground: Tensor, features: Tensor, prior: float | None, **options: bool) -> HeatMaps:
            assert prior is None
            logits = torch.zeros_like(features)
            logits[:, 251, 266] = 20.0
            return HeatMaps([], logits)

    monkeypatch.setattr("xview_loc.models.checkpoint.load_model", lambda *_: Checkpoint(Always(), {}, ""))
    output, errors = run(benchmarks, "kitti")
    # The truth: 4 m ahead of the tile's centre, 2 m to its right.
    ahead, right = 10.5 * spec.gsd - 4.0, -4.5 * spec.gsd - 2.0
    assert errors["samples"]["longitudinal_m"] == pytest.approx([ahead], abs=1e-4)
    assert errors["samples"]["lateral_m"] == pytest.approx([right], abs=1e-4)
    assert "labels" not in errors and errors["intrinsics"] == "published"
    assert errors["samples"]["heading_deg"] == [None]
    assert re.search(rf"ccvpe-kitti\D+{-ahead:.2f}\D+{-ahead:.2f}\D+{-right:.2f}\D+{-right:.2f}", output)
    assert re.search(r"CCVPE, student\D+6\.18\D+2\.35\D+1\.76\D+0\.98", output)
    assert re.search(r"GGCVT, teacher\D+9\.27\D+4\.66\D+2\.19\D+0\.85", output)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_damaged_images_do_not_end_an_evaluation(tmp_path: Path, workers: str) -> None:
    root, out = tmp_path / "vigor", tmp_path / "errors.json"
    make_vigor_target(root, 10)
    files = []
    for number in part_of("test", 20):
        city = "SanFrancisco" if number < 10 else "Chicago"
        files.append(root / city / "panorama" / f"P{number % 10}.jpg")
    files[1].write_bytes(files[1].read_bytes()[:-40])
    files[2].unlink()
    words = ["evaluate", "--dataset", "vigor", "--root", str(root), "--out", str(out), "--workers", workers]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 3
    named = [line for line in done.output.splitlines() if "unreadable" in line]
    assert len(named) == 1 and re.search(r"left out 2 unreadable samples: .* truncated .* exist", named[0])
    assert str(files[1]) in named[0] and str(files[2]) in named[0]
    assert "CCVPE, student" in done.output
    errors = json.loads(out.read_text())
    assert (errors["summary"]["samples"], errors["summary"]["unreadable"]) == (2, 2)
    assert errors["samples"]["index"] == [0, 3] and len(errors["unreadable"]) == 2
    for file in (files[0], files[3]):
        file.write_bytes(b"")
    with pytest.raises(
        EvaluationError, match=r"no sample of vigor:test:\w+ can be read; the first: .*P\d.jpg"
    ):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_wrong_uses_of_evaluate_are_named(benchmarks: Path) -> None:
    def fails(error: type[Exception], message: str, *words: str) -> None:
        with pytest.raises(error, match=message):
            CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)

    fails(UsageError, "--dataset vigor needs --root", "--dataset", "vigor")
    here = ("--root", str(benchmarks / "vigor"), "--device", "nowhere")
    fails(UsageError, "no device 'nowhere'", "--dataset", "vigor", *here)
    fails(DatasetError, "no split 'half'", "--dataset", "vigor", *here[:2], "--split", "half")
    fails(
        DatasetError, "ccvpe-small does not take", "--dataset", "kitti", "--root", str(benchmarks / "kitti")
    )


def test_errors_hold_one_value_for_each_sample() -> None:
    errors = evaluate(Mirror(NORTH), Maps([(40, 40)] * 3, [(40, 40)] * 3), 0.0, batch_size=2)
    assert isinstance(errors, PoseErrors)
    assert {len(values) for values in vars(errors).values()} == {3}
