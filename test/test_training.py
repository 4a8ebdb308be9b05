"""Supervised training: its samples, the files it writes, and resuming."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.datasets import DatasetError, PoseDataset, Sample, SimulatedDataset, open_dataset
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.models.checkpoint import load_checkpoint
from xview_loc.models.inputs import normalise
from xview_loc.simulation.city import build_city
from xview_loc.training.losses import CCVPELoss, GGCVTLoss, HeatMapLoss
from xview_loc.training.trainer import (
    PoseValidation,
    TrainingError,
    TrainingOptions,
    TrainingProgress,
    make_fabric,
    train,
)
from xview_loc.training.turned_panoramas import random_turns, turn_panoramas

ROOT = Path(__file__).resolve().parent.parent
SPEC = create_model("ccvpe-small").spec
DATA = ["--data", "simulated:source:0:12", "--validation", "simulated:validation:500:2"]


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of rendered cities."""
    return tmp_path_factory.mktemp("cities")


@pytest.fixture(scope="module")
def samples(cities: Path) -> SimulatedDataset:
    """The training data; both it and the validation data are rendered, from small cities."""
    training, validation = (
        open_dataset(text, SPEC, cache_dir=cities, augment=True) for text in (DATA[1], DATA[3])
    )
    assert isinstance(training, SimulatedDataset) and isinstance(validation, SimulatedDataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xview_loc.datasets.simulated.build_city", partial(build_city, size_m=300.0))
        training.prepare()
        validation.prepare()
    return training


def words(out: Path, cities: Path) -> list[str]:
    words = ["train", *DATA, "--out", str(out), "--cache-dir", str(cities), "--accelerator", "cpu"]
    words += ["--epochs", "2", "--batch-size", "2", "--heading", "both", "--sigma", "2", "--save-every", "2"]
    return [*words, "--learning-rate", "1e-3", "--schedule", "cosine", "--warmup", "3"]


def command(out: Path, cities: Path) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "xview_loc.cli", *words(out, cities)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_numbers(
    samples: SimulatedDataset, cities: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with command(whole, cities) as process:
        process.communicate()
    assert process.returncode == 0
    for last_line in ("step 2 of 12", "step 8 of 12"):  # in each of the two epochs of 6 steps
        with command(cut, cities) as process:
            assert process.stdout is not None
            assert any(line.startswith(last_line) for line in process.stdout)
            process.send_signal(signal.SIGKILL)
    assert len(json.loads((cut / "history.json").read_text())) == 1
    with command(cut, cities) as process:
        process.communicate()
    assert process.returncode == 0
    history = json.loads((whole / "history.json").read_text())
    assert len(history) == 2 and history == json.loads((cut / "history.json").read_text())
    best = load_checkpoint(whole / "best.safetensors", "ccvpe-small")
    other = load_checkpoint(cut / "best.safetensors", "ccvpe-small")
    for key, value in best.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
    assert best.metadata["command"].startswith("xview-loc train")


def test_the_command_trains(samples: SimulatedDataset, cities: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, [*words(tmp_path, cities), "--epochs", "1", "--batch-size", "6"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "step 2 of 2: loss" in done.output and "mean validation error" in done.output
    (entry,) = json.loads((tmp_path / "history.json").read_text())
    assert set(entry) >= {"loss", "known_mean_m", "unknown_mean_m", "score"}
    best = load_checkpoint(tmp_path / "best.safetensors", "ccvpe-small")
    assert best.metadata["training"]["data"] == "simulated:source:0-0:12"


@pytest.mark.parametrize("steps", [[2, 7], [5]])
def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path: Path, steps: list[int]) -> None:
    """Interrupted in the first epoch of 5 steps, in the second one, and between the two."""

    def run(folder: Path, stop: int | None = None) -> tuple[TrainingProgress, Seer]:
        def on_step(progress: TrainingProgress) -> None:
            if progress.steps == stop:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        model = Seer()
        chosen = options(epochs=2, batch_size=1, learning_rate=0.02, save_every=1)
        progress = train(
            make_fabric("cpu"), model, Dots(5), VALIDATION, folder, Anywhere(), chosen, on_step=on_step
        )
        return progress, model

    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", step)
    cut, cut_model = run(tmp_path / "cut")
    whole, whole_model = run(tmp_path / "whole")
    assert cut == whole and len(whole.history) == 2
    assert torch.equal(cut_model.weight, whole_model.weight) and float(whole_model.weight.detach()) != 1.0


def test_samples_show_their_position(samples: SimulatedDataset) -> None:
    """Two tiles cut around the same camera show the same surroundings at their positions."""
    samples.epoch = 0
    first = samples[3]
    samples.epoch = 1
    second = samples[3]
    samples.epoch = 0
    assert torch.equal(first["aerial"], samples[3]["aerial"])
    assert not torch.equal(first["aerial"], second["aerial"])
    patches = []
    for sample in (first, second):
        image = sample["aerial"].permute(1, 2, 0).numpy()
        row, col = sample["position"].tolist()
        # Away from the border.
        assert min(row, col) >= 12 and max(row, col) <= SPEC.aerial_size - 13
        patches.append(_around(image, row, col))
    assert np.corrcoef(patches[0].ravel(), patches[1].ravel())[0, 1] > 0.98
    assert abs(float(first["heading"])) < math.radians(12)


def _around(image: np.ndarray, row: float, col: float) -> np.ndarray:
    import cv2

    return cv2.getRectSubPix(np.ascontiguousarray(image), (15, 15), (col, row))


def test_wrong_dataset_names_are_refused(cities: Path) -> None:
    for text, message in (
        ("vogir:/data", "unknown dataset"),
        ("simulated:source:0", "written STYLE:CITIES:FRAMES"),
        ("simulated:nowhere:0:5", "unknown style"),
        ("simulated:source:5-3:5", "at least one city"),
    ):
        with pytest.raises(DatasetError, match=message):
            open_dataset(text, SPEC, cache_dir=cities)


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    dataset = SimulatedDataset("source", range(1), 2, SPEC, cache_dir=tmp_path)
    folder = dataset._path(0)
    folder.mkdir()
    (folder / "panoramas.npy").write_bytes(b"rubbish")
    with pytest.raises(DatasetError, match="is damaged"):
        dataset[0]


class Dots(PoseDataset):
    """Aerial tiles with one white pixel at the camera's position."""

    name = "dots"

    def __init__(self, count: int = 6) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        side = SPEC.aerial_size
        image = np.zeros((side, side, 3), np.uint8)
        row, col = 20 + 17 * index, 140 - 11 * index
        image[row, col] = 255
        return {
            "ground": torch.zeros(3, *SPEC.ground_size),
            "aerial": normalise(image, SPEC)[0],
            "position": torch.tensor([row, col], dtype=torch.float32),
            "heading": torch.tensor(0.0),
            "fix": torch.full((2,), (side - 1) / 2),
            "fix_std": torch.tensor(10.0),
            "heading_known": torch.tensor(True),
            "index": torch.tensor(index),
            "meters_per_pixel": torch.tensor(SPEC.gsd),
        }


class Seer(CrossViewModel):
    """Finds the white pixel; with an unknown heading, the one ten pixels east of it."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = SPEC
        self.weight = torch.nn.Parameter(torch.ones(()))

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
        logits = features.roll(10, 2) if heading_prior_deg is None else features
        return HeatMaps([logits[:, None]], logits)


def test_validation_measures_metres() -> None:
    figures = PoseValidation(Dots(), (0.0, None), 4, 0)(Seer(), 0)
    assert figures["known_mean_m"] == figures["known_median_m"] == 0.0
    assert figures["unknown_mean_m"] == pytest.approx(10 * SPEC.gsd, rel=1e-5)
    assert figures["score"] == pytest.approx(5 * SPEC.gsd, rel=1e-5)
    assert set(PoseValidation(Dots(), (0.0,), 4, 0)(Seer(), 0)) == {"known_mean_m", "known_median_m", "score"}


def test_turned_panoramas_turn_their_heading() -> None:
    width = 256
    ground = torch.arange(width, dtype=torch.float32).expand(5, 1, 2, width)
    batch = {"ground": ground, "heading": torch.full((5,), 0.1)}
    turned = turn_panoramas(batch, random_turns(np.random.default_rng(3), 5, width, None))
    for image, heading in zip(turned["ground"], turned["heading"], strict=True):
        # The former centre column moves to the right by the angle that the heading turns left.
        column = int((image[0, 0] == width // 2).nonzero())
        moved = (column - width // 2) / width * 2 * math.pi
        assert math.remainder(float(heading) - 0.1 - moved, 2 * math.pi) == pytest.approx(0.0, abs=1e-5)
    assert len({round(float(h), 4) for h in turned["heading"]}) > 1


def test_turns_stay_within_the_prior() -> None:
    rng = np.random.default_rng(4)
    within = random_turns(rng, 500, 256, 30.0)
    assert within.min() == -21 and within.max() == 21  # 30 degrees are 21.3 columns
    assert set(random_turns(rng, 500, 8, None)) == set(range(8))
    assert not random_turns(rng, 5, 256, 0.0).any()


def options(**changes: object) -> TrainingOptions:
    base: dict = {"epochs": 1, "batch_size": 2}
    return TrainingOptions(**{**base, **changes})


VALIDATION = PoseValidation(Dots(), (0.0,), 4, 0)


class Anywhere(HeatMapLoss):
    """A loss for any model."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def __call__(self, model: CrossViewModel, batch: dict, prior: float | None) -> Tensor:
        return model.match(batch["ground"], model.encode_aerial(batch["aerial"])).logits.mean() * self.value

    def to_json(self) -> dict:
        return {"name": "anywhere"}


def test_training_errors_are_clear(tmp_path: Path) -> None:
    def fails(message: str, *arguments: object, **changes: object) -> None:
        model, loss, folder = arguments
        with pytest.raises(TrainingError, match=message):
            train(fabric, model, Dots(), VALIDATION, folder, loss, options(**changes))

    fabric = make_fabric("cpu")
    with torch.device("meta"):
        pinhole = create_model("ccvpe-kitti")
    fails("do not fill one batch", Seer(), Anywhere(), tmp_path / "a", batch_size=7)
    fails(
        "needs a known heading",
        create_model("ggcvt-small"),
        GGCVTLoss(),
        tmp_path / "b",
        heading_priors_deg=(0.0, None),
    )
    fails("no panoramas", pinhole, CCVPELoss(), tmp_path / "c", heading_priors_deg=(None,))
    fails("not finite at step 0", Seer(), Anywhere(math.nan), tmp_path / "d")
    train(fabric, Seer(), Dots(), VALIDATION, tmp_path / "e", Anywhere(), options())
    fails("other settings .options.", Seer(), Anywhere(), tmp_path / "e", learning_rate=5e-4)
    (tmp_path / "e" / "last.pt").write_bytes(b"cut off")
    fails("damaged", Seer(), Anywhere(), tmp_path / "e")


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    """The model gets worse: its weight turns negative, so that it misses the dot."""
    model = Seer()
    model.weight.data.fill_(0.002)

    class Falls(Anywhere):
        def __call__(self, model: object, batch: dict, prior: float | None) -> Tensor:
            return model.weight  # type: ignore[attr-defined]

    fabric = make_fabric("cpu")
    progress = train(
        fabric, model, Dots(), VALIDATION, tmp_path, Falls(), options(epochs=2, learning_rate=5e-4)
    )
    assert progress.history[0]["known_mean_m"] == 0.0 and progress.history[1]["known_mean_m"] > 1.0
    assert progress.best_score == 0.0
