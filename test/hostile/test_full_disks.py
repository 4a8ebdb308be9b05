"""Outputs for which there is no room or no folder: one line that names them, and no half of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xview_loc.files import write_whole
from xview_loc.maps import open_map
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "simulate": ["simulate", "OUT/s", "--frames", "2", "--size", "300", "--height", "16"],
    "pairs": ["pairs", "drive", "--out", "OUT/p", "--map", "map.tif"],
    "recover": ["bag", "recover", "drive", "--out", "OUT/r"],
    "info": ["pairs", "info", "pairs", "--picture", "OUT/i.png"],
}
# Those that compute for minutes say at once that they cannot write.
LONG = {
    "evaluate": ["evaluate", "--frames", "1000000", "--out", "OUT/e.json"],
    "calibrate": ["calibrate", "--frames", "1000000", "--out", "OUT/c.safetensors"],
    "export": ["export", "--out", "OUT/e.onnx"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drive and its pairs; each is larger than a kilobyte."""
    folder = tmp_path_factory.mktemp("inputs")
    city = build_city(1, size_m=300.0)
    write_bag(drive(city, 3, view=PanoramaView(32, 128)), folder / "drive")
    with open_map(str(city.write_geotiff(folder / "map.tif"))) as aerial:
        import_bag(folder / "drive", folder / "pairs", aerial, ImportOptions())
    return folder


def run(inputs: Path, out: Path, name: str, limit: str = "unlimited") -> subprocess.CompletedProcess[str]:
    """Run a command; no file may grow beyond ``limit`` kilobytes."""
    words = [word.replace("OUT", str(out)) for word in (COMMANDS | LONG)[name]]
    return subprocess.run(
        ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh", sys.executable, "-m", "xview_loc.cli", *words],
        capture_output=True,
        text=True,
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(inputs / "cache")},
        timeout=300,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_no_room(inputs: Path, tmp_path: Path, name: str) -> None:
    if name == "info":  # so that matplotlib keeps its fonts
        assert run(inputs, tmp_path, name).returncode == 0
    (tmp_path / "out").mkdir()
    done = run(inputs, tmp_path / "out", name, "1")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr and str(tmp_path / "out") in done.stderr
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == set()
    # There is room again: nothing that is left is in the way.
    assert run(inputs, tmp_path / "out", name).returncode == 0


@pytest.mark.parametrize("name", COMMANDS | LONG)
def test_no_folder(inputs: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").write_text("a file")
    done = run(inputs, tmp_path / "out", name)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path / "out") in done.stderr
    assert (tmp_path / "out").read_text() == "a file"


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    code = "import sys; from pathlib import Path; from xview_loc.files import write_whole; "
    code += "write_whole(Path(sys.argv[1]), bytes(5000))"
    command = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f"File too large: '{tmp_path / 'a'}'" in done.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / ("\u00e9" * 127 + "x")
    write_whole(path, b"content")
    assert path.read_bytes() == b"content"
    with pytest.raises(OSError, match="File name too long"):
        write_whole(tmp_path / ("x" * 256), b"content")
    assert list(tmp_path.iterdir()) == [path]
