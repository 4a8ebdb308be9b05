"""A command that runs out of memory says so in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xview_loc.files import read_regular

ROOT = Path(__file__).resolve().parents[2]
# What libraries raise, and what Python does.
FAILURES = {
    "python": "bytes(1 << 60)",
    "numpy": "import numpy; numpy.zeros(1 << 58)",
    "torch": "import torch; torch.zeros(1 << 58)",
}


@pytest.mark.parametrize("library", FAILURES)
def test_too_much_for_the_memory(tmp_path: Path, library: str) -> None:
    (tmp_path / "a.tif").write_text("")
    code = (
        "from xview_loc import maps; from xview_loc.cli import main\n"
        f"def open_map(*given):\n    {FAILURES[library]}\n"
        "maps.open_map = open_map\nmain()"
    )
    command = [sys.executable, "-c", code, "map", "info", "a.tif"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("xview-loc: there is not enough memory: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """Whatever the limit is."""
    (tmp_path / "a").write_bytes(b"content")
    assert read_regular(tmp_path / "a", 1 << 60) == b"content"
