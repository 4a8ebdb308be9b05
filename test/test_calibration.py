"""Covariances that hold what they promise: fitted on some frames, checked on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.estimation.calibration import (
    CalibrationError,
    CalibrationFrame,
    fit_calibration,
)
from xview_loc.estimation.heat_map import HeatMap
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import Calibration, HeatMapGrid
from xview_loc.models.checkpoint import load_checkpoint, load_model
from xview_loc.statistics import coverage, mahalanobis

SIDE, GSD = 96, 0.5
TILE = AerialTile(np.zeros((SIDE, SIDE, 3), np.uint8), 48.2, 16.37, GSD)
Frame = tuple[np.ndarray, tuple[float, float]]


def frames(count: int, certainty: float, seed: int) -> list[Frame]:
    """Logits and true (row, col): two summits, the truth near one of them as often as its share says.

    ``certainty`` is what the logits of such a model are multiplied with.
    """
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:SIDE, :SIDE]
    out = []
    for _ in range(count):
        share, sigma = rng.uniform(0.5, 1.0), rng.uniform(2.0, 4.0)
        summits = rng.uniform(25, 70, (2, 2))
        density = sum(
            weight * np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (2 * sigma**2))
            for weight, (row, col) in zip((share, 1 - share), summits, strict=True)
        )
        truth = summits[0 if rng.random() < share else 1] + sigma * rng.normal(size=2)
        out.append((certainty * np.log(density + 1e-9), (float(truth[0]), float(truth[1]))))
    return out


def fitted(some: list[Frame]) -> Calibration:
    return fit_calibration([CalibrationFrame.of(*pair) for pair in seen_by(Calibration(None, 0.0), some)])


def seen_by(given: Calibration, some: list[Frame]) -> list[tuple[HeatMap, tuple[float, float]]]:
    return [
        (
            HeatMap.from_logits(logits, HeatMapGrid(), TILE, calibration=given),
            TILE.pixel_to_latlon(*truth),
        )
        for logits, truth in some
    ]


def share_inside(given: Calibration, some: list[Frame], probability: float) -> float:
    distances = []
    for heat_map, truth in seen_by(given, some):
        offset = np.subtract(heat_map.to_enu(*heat_map.from_latlon(*truth)), heat_map.to_enu(*heat_map.peak))
        distances.append(mahalanobis(offset, heat_map.covariance(given.floor_m)))
    return coverage(np.array(distances), probability)


def test_distances_and_coverage_of_normal_errors() -> None:
    rng = np.random.default_rng(0)
    covariance = np.array([[4.0, 1.5], [1.5, 1.0]])
    errors = rng.multivariate_normal([0, 0], covariance, 20000)
    distances = np.array([mahalanobis(error, covariance) for error in errors])
    for probability in (0.5, 0.68, 0.95):
        assert coverage(distances, probability) == pytest.approx(probability, abs=0.01)


@pytest.mark.parametrize("certainty", [0.5, 4.0])
def test_the_ellipse_of_other_frames_holds_what_it_promises(certainty: float) -> None:
    others = frames(400, certainty, 2)
    found = fitted(frames(400, certainty, 1))
    assert share_inside(found, others, 0.95) == pytest.approx(0.95, abs=0.025)
    if certainty > 1.0:  # overconfident before
        assert share_inside(Calibration(None, 0.0), others, 0.95) < 0.93


def test_nearly_all_images_reach_the_least_confidence() -> None:
    given = fitted(frames(400, 2.0, 1))
    confidences = [heat_map.confidence for heat_map, _ in seen_by(given, frames(400, 2.0, 2))]
    assert 0.96 < np.mean(np.array(confidences) >= given.min_confidence) < 1.0
    noise = np.random.default_rng(0).normal(size=(20, SIDE, SIDE))
    shown_nothing = [HeatMap.from_logits(one, HeatMapGrid(), TILE, calibration=given) for one in noise]
    assert all(heat_map.confidence < given.min_confidence for heat_map in shown_nothing)


def test_too_few_frames_and_hopeless_ones_are_refused() -> None:
    with pytest.raises(CalibrationError, match="too few"):
        fitted(frames(199, 1.0, 1))
    elsewhere = [(logits, (9e3, 9e3)) for logits, _ in frames(200, 1.0, 1)]
    with pytest.raises(CalibrationError, match=r"it held 0%.*check the positions"):
        fitted(elsewhere)


def test_random_cameras_are_of_simulated_cities(tmp_path: Path) -> None:
    words = ["calibrate", "--out", str(tmp_path / "a"), "--dataset", "vigor", "--root", "x", "--any-camera"]
    result = CliRunner().invoke(app, words)
    says = str(result.exception or result.output)
    assert result.exit_code and "--any-camera is for simulated cities" in says


@pytest.mark.slow
def test_the_command_calibrates_on_drives_and_evaluate_uses_it(tmp_path: Path) -> None:
    out = tmp_path / "calibrated.safetensors"
    arguments = ["calibrate", "--out", str(out), "--cities", "950", "--frames", "200"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    before, after = load_model("ccvpe-small"), load_checkpoint(out)
    assert "200 frames" in result.output and after.sha256[:12] in result.output
    assert after.model.calibration.contrast is not None and after.model.calibration.min_confidence > 0.1
    assert after.metadata["calibrated_on"]["frames"] == "simulated:source:950:200"
    weights = after.model.state_dict()
    assert all(bool((value == weights[key]).all()) for key, value in before.model.state_dict().items())

    arguments = ["evaluate", "--checkpoint", str(out), "--cities", "952", "--frames", "40"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "95 % ellipse" in line)
    assert float(line.split("/")[4].split("%")[0]) > 85.0, line
