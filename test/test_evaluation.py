"""Errors of a drive, and the pages that show them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from xview_loc.evaluation import DriveErrors, Errors, distance_m, localize_drive
from xview_loc.geodesy import LocalProjection
from xview_loc.localizer import LocalizationError, Observation
from xview_loc.report import Page

ROOT = Path(__file__).resolve().parent.parent
PLANE = LocalProjection(48.2, 16.37)


class FiveMetresEast:
    """Stands in for a localizer: 5 m east of the fix, and no answer to every third frame."""

    def __init__(self) -> None:
        self.calls = 0

    def localize(self, observation: Observation) -> SimpleNamespace:
        self.calls += 1
        if self.calls % 3 == 0:
            raise LocalizationError("not this one")
        lat, lon = LocalProjection(observation.lat, observation.lon).inverse(5.0, 0.0)
        return SimpleNamespace(lat=lat, lon=lon)


def test_a_drive_is_measured_frame_by_frame() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    frames = []
    for k in range(6):
        truth = PLANE.inverse(100.0 * k, 50.0)
        fix = LocalProjection(*truth).inverse(-2.0, 0.0)
        frames.append((Observation(image, *fix), truth))
    drive = localize_drive(FiveMetresEast(), frames)  # type: ignore[arg-type]
    assert drive.fix == pytest.approx(np.full(6, 2.0), abs=1e-3)
    assert drive.estimate[[0, 1, 3, 4]] == pytest.approx(np.full(4, 3.0), abs=1e-3)
    assert np.isnan(drive.estimate[[2, 5]]).all()
    assert len(DriveErrors.joined([drive, drive]).fix) == 12


def test_errors_leave_out_what_has_none() -> None:
    errors = Errors.of(np.array([1.0, 2.0, math.nan, 9.0]))
    assert (errors.frames, errors.mean, errors.median) == (3, 4.0, 2.0) and 2.0 < errors.p95 < 9.0
    assert Errors.of(np.array([math.nan])).frames == 0
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


def test_the_shipped_model_finds_its_way(tmp_path: Path) -> None:
    """In a city it has never seen: much nearer than the coarse fix, with a known heading and without one."""
    for heading in ("known", "unknown"):
        words = ["evaluate", "--cities", "950", "--frames", "40", "--heading", heading]
        done = subprocess.run(
            [sys.executable, "-m", "xview_loc.cli", *words, "--out", str(tmp_path / "errors.json")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        figures = re.search(r"estimate\D+(\d+)\D+([\d.]+)\D+([\d.]+)", done.stdout)
        coarse = re.search(r"coarse fix\D+(\d+)\D+([\d.]+)\D+([\d.]+)", done.stdout)
        assert figures and coarse and int(figures[1]) >= 35
        assert float(figures[3]) < 2.5 and float(figures[3]) < float(coarse[3]) / 3
    assert "estimate_m" in (tmp_path / "errors.json").read_text()
