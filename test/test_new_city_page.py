"""docs/new_city.md: a user's whole way; every command runs, on two short simulated drives."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from ros_harness import NodeProcess, bench, environment, pick_domain

from xview_loc.recordings.tracks import read_timed_track
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView

PAGE = Path(__file__).resolve().parent.parent / "docs" / "new_city.md"
DOMAIN = pick_domain()
# So few pairs fill no batch of eight, nor a tenth of them a verdict.
FEWER = ["--epochs", "1", "--batch-size", "4", "--accelerator", "cpu"]


def page_commands() -> list[list[str]]:
    """The commands of xview-loc on the page, one list of words for each."""
    return [shlex.split(line) for line in re.findall(r"^    xview-loc (.*)$", PAGE.read_text(), re.MULTILINE)]


def run(folder: Path, *words: str) -> str:
    """Run a command in a folder; return what it prints."""
    command = [sys.executable, "-m", "xview_loc.cli", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(DOMAIN), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    city = build_city(941, "target", size_m=600.0)
    city.write_geotiff(tmp_path / "map.tif")
    for seed, name, count in ((0, "drive", 60), (1, "test", 40)):
        options, view = DriveOptions(rate_hz=1.0), PanoramaView(64, 256)
        write_bag(drive(city, count, seed, options=options, view=view), tmp_path / name)
    truth = read_timed_track(tmp_path / "test", "/truth/fix")
    rows = (f"{s / 1e9:.9f},{a:.9f},{o:.9f}\n" for s, a, o in zip(*vars(truth).values(), strict=True))
    (tmp_path / "rtk.csv").write_text("stamp,lat,lon\n" + "".join(rows))

    commands = page_commands()
    names = [words[0] for words in commands]
    assert names == ["pairs", "pairs", "pairs", "evaluate", "map", "adapt", "evaluate", "deploy"]
    printed = [run(tmp_path, *words, *(FEWER if words[0] == "adapt" else [])) for words in commands[:-1]]
    assert "verdict: do not deploy" in printed[5] and " times as many pairs" in printed[5]
    errors = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("before", "after")]
    assert all(one["filtered"]["frames"] > 20 for one in errors)
    assert errors[0]["fix"] == errors[1]["fix"] and errors[0]["single"] != errors[1]["single"]

    parameters = {"map": str(tmp_path / "map.tif"), "checkpoint_dirs": [str(tmp_path)], "backend": "torch"}
    node = NodeProcess(DOMAIN, tmp_path / "log", parameters, module="xview_loc.nodes.localizer_node")
    with bench(DOMAIN) as b:
        try:
            assert "student.safetensors" in run(tmp_path, *commands[-1])
            b.wait(lambda: "student.safetensors" in b.value("checkpoint"), what="the student")
        finally:
            assert node.stop() == 0
