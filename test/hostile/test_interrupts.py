"""Ctrl-C, once and twice, during imports, work and writing: one line, and no half of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from map_fixtures import texture, write_geotiff

from xview_loc.bags.writer import BagLimits, BagWriter

ROOT = Path(__file__).resolve().parents[2]
# Interrupts itself when something is imported, opened or renamed.
COMMAND = """
import os, pathlib, signal, sys
event, word, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
del sys.argv[1:4]
def watch(name, arguments):
    global times
    if name == event and any(word in pathlib.Path(str(one)).name for one in arguments[:2]):
        for _ in range(times):
            times -= 1
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(watch)
from xview_loc.cli import main
main()
"""
DRIVE = ["simulate", "OUT", "--frames", "2", "--size", "300", "--height", "16"]
TRAIN = ["--data", "simulated:source:1:1", "--validation", "simulated:source:1:1", "--out", "OUT"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_geotiff(folder / "map.tif", texture(60, 60), 48.2, 16.37, 0.5, "EPSG:32633")
    BagWriter(folder / "bag", {"/a": "std_msgs/msg/String"}, BagLimits(min_free_bytes=0)).close()
    return folder


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("words", "event", "word"),
    [
        (["map", "info", "map.tif"], "import", "typer"),
        (["map", "info", "map.tif"], "import", "numpy._core.multiarray"),
        (["map", "info", "map.tif"], "open", "map.tif"),
        (["bag", "recover", "bag", "--out", "OUT/bag"], "open", "bag_0.mcap"),
        (["doctor"], "import", "torch._C"),
        (["adapt", "bag", "--out", "OUT"], "import", "torch.nn"),
        (["train", *TRAIN], "import", "lightning_fabric"),
        (DRIVE, "os.rename", "city.tif"),
        (DRIVE, "open", "drive_0.mcap"),
        (DRIVE, "os.rename", "drive"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_interrupted_command(
    inputs: Path, tmp_path: Path, words: list[str], event: str, word: str, times: int
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, event, word, str(times)]
        + [text.replace("OUT", str(out)) for text in words],
        capture_output=True,
        text=True,
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (130, "xview-loc: interrupted\n")
    assert [path.name for path in out.rglob("*") if path.is_file()] in ([], ["city.tif"])
