"""Both demos, small, over DDS: drives, pages, the student on the running node, and no process left."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from matplotlib.colors import to_rgb
from matplotlib.image import imread
from ros_harness import environment, pick_domain

from xview_loc.demo.adapt import AFTER, BEFORE, Plan, Results, make_page
from xview_loc.demo.live import FILTERED, DriveLog
from xview_loc.demo.pictures import COLOURS
from xview_loc.geodesy import LocalProjection
from xview_loc.models.checkpoint import shipped_checkpoint

DOMAIN = pick_domain()
FRAMES, RECORDED = 24, 80
DRIVE = "import xview_loc.demo.localize as demo; demo.FRAMES, demo.SIZE_M = 10, 420; demo.main()"
SMALL = ["--size", "600", "--frames", str(FRAMES), "--recorded", str(RECORDED), "--epochs", "1"]


def start(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment(DOMAIN),
    )


def start_adapt(folder: Path, *words: str) -> subprocess.Popen:
    return start(folder, "-m", "xview_loc.demo.adapt", "--out", str(folder), *SMALL, *words)


def finish(process: subprocess.Popen, timeout_s: float) -> str:
    """Wait for the demo to succeed; return its output."""
    try:
        log, _ = process.communicate(timeout=timeout_s)
    finally:
        process.terminate()
        process.wait()
    assert process.returncode == 0, log
    return log


def processes_that_name(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if str(folder) in command:
            found.append(command)
    return found


def text_of(page: str) -> str:
    return html.unescape(" ".join(re.sub("<[^>]*>", " ", page).split()))


def width_of(colour: str, png: str) -> float:
    """Share of the picture's width that things of this colour extend over."""
    picture = imread(io.BytesIO(base64.b64decode(png)))[..., :3]
    columns = np.flatnonzero((abs(picture - to_rgb(colour)) < 0.02).all(2).any(0))
    return np.ptp(columns) / picture.shape[1] if len(columns) else 0.0


@pytest.mark.parametrize(
    ("words", "cameras"),
    [
        ((), "a panorama camera"),
        (("--rig", "six"), "'six'"),
        (("--model", "ccvpe-pinhole-small"), "'one'"),
    ],
)
def test_a_drive_is_localised_live(tmp_path: Path, words: tuple[str, ...], cameras: str) -> None:
    """The filtered pose is beside the single frames in table, curve, map and output."""
    log = finish(start(tmp_path, "-c", DRIVE, *words), timeout_s=800)
    page = (tmp_path / "demo_output" / "demo.html").read_text()
    text = text_of(page)
    assert cameras in text
    localised = re.search(r"localised (\d+) of 10 frames", text)
    assert localised and int(localised[1]) >= 5
    medians = {}
    for name in ("GNSS fix", "single frame", "filtered"):
        row = re.search(rf"{name} ([\d.]+) m ([\d.]+) m ([\d.]+) m ([\d.]+) m {localised[1]}\b", text)
        assert row, text
        medians[name] = float(row[1])
        assert f"{name:12s}: median {row[1]} m, mean {row[2]} m, 95 % {row[3]} m, worst {row[4]} m" in log
    assert max(medians["single frame"], medians["filtered"]) < medians["GNSS fix"]
    assert re.search(r"frame +\d+: GNSS fix +\S+ m off, single frame +\S+ m off, filtered +\S+ m off", log)
    route, curve, _ = re.findall(r"data:image/png;base64,([^\"]+)", page)
    # More than the sample in the legend.
    assert width_of(COLOURS[FILTERED], route) > 0.1
    assert width_of(COLOURS[FILTERED], curve) > 0.5
    assert not processes_that_name(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("words", "cameras", "model"),
    [
        ((), "a panorama camera", "ccvpe-small"),
        (("--rig", "six"), "'six'", "ccvpe-rig-small"),
        (("--model", "ccvpe-pinhole-small"), "'one'", "ccvpe-pinhole-small"),
    ],
)
def test_the_whole_loop(tmp_path: Path, words: tuple[str, ...], cameras: str, model: str) -> None:
    """So few pairs make no student worth deploying; --deploy-anyway deploys it."""
    finish(start_adapt(tmp_path, "--deploy-anyway", *words), timeout_s=1700)
    adapted = tmp_path / "adapt" / "adapted"
    metrics = json.loads((adapted / "metrics.json").read_text())
    assert RECORDED / 4 <= metrics["pairs"] <= RECORDED
    page = (tmp_path / "demo-adapt.html").read_text()
    text = text_of(page)
    assert cameras in text
    hashes = dict(re.findall(rf"({BEFORE}|{AFTER}) \S+\.safetensors sha256:(\w{{12}})", text))
    files = (Path(str(shipped_checkpoint(model))), adapted / "student.safetensors")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files]
    assert hashes == dict(zip((BEFORE, AFTER), digests, strict=True))
    answered = re.search(r"(\d+) were localised in the first drive and (\d+) in the second", text)
    assert answered and all(int(count) >= FRAMES / 2 for count in answered.groups())
    for name in (BEFORE, AFTER):
        assert re.search(rf"{name}, filtered [\d.]+ m [\d.]+ m [\d.]+ m \d\d", text), text
    assert "The verdict was not to deploy the student. It was deployed anyway" in text
    assert page.count("data:image/png;base64,") == 3
    (link,) = re.findall('<a href="([^"]+)"', page)
    assert (tmp_path / link).read_text().startswith("<!doctype html>")
    assert not processes_that_name(tmp_path)


def test_a_terminated_demo_leaves_no_process(tmp_path: Path) -> None:
    process = start_adapt(tmp_path)
    assert process.stdout is not None
    try:
        assert any("[localizer]: active" in line for line in process.stdout)
        assert len(processes_that_name(tmp_path)) > 1
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in log
    assert not processes_that_name(tmp_path)


def test_the_page_of_a_student_that_is_not_deployed(tmp_path: Path) -> None:
    """It says why; errors cover the frames that both drives localised."""
    aerial = write_geotiff(tmp_path / "map.tif", texture(600, 600), 48.2, 16.37, 0.5, "EPSG:32633")
    plane = LocalProjection(48.2, 16.37)
    drives = {}
    for name, first_stamp, off_m, missing in ((BEFORE, 100, 4.0, 0), (AFTER, 9000, 3.0, 5)):
        log = drives[name] = DriveLog()
        for k in range(6):
            log.truth[first_stamp + k] = plane.inverse(5.0 * k, 0.0)
            log.fix[first_stamp + k] = plane.inverse(5.0 * k, 20.0)
            if k != missing:
                log.estimate[first_stamp + k] = plane.inverse(5.0 * k, off_m)
                log.filtered[first_stamp + k] = plane.inverse(5.0 * k, off_m / 2)
    results = Results(
        Plan(600.0, 6, 60, 1, deploy_anyway=False),
        aerial,
        drives,
        checkpoints=dict.fromkeys(drives, "/weights/teacher.safetensors sha256:0123456789ab"),
        metrics={
            "verdict": {"deploy": False, "summary": "No.", "reasons": ["worse than <before>"]},
            "student_sha256": "cd" * 32,
        },
    )
    make_page(results, "report.html").write(tmp_path / "page.html")
    text = text_of((tmp_path / "page.html").read_text())
    assert "The node kept its weights" in text
    assert "worse than <before>" in text and "Answer of the node" not in text
    assert f"{BEFORE} 4.00 m 4.00 m 4.00 m 4 teacher" in text
    assert f"{AFTER} 3.00 m 3.00 m 3.00 m 4 teacher" in text
    assert f"{BEFORE}, filtered 2.00 m 2.00 m 2.00 m 4 {AFTER}, filtered 1.50 m 1.50 m 1.50 m 4" in text
    assert "5 were localised in the first drive and 5 in the second" in text
