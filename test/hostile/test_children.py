"""What lies in the current folder, in the cache of graphs or in shared temporary folders is not run."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stub_node import StubModel

from xview_loc.models import graph, runtimes
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_model
from xview_loc.models.graph import FrameSettings, RuntimeUnavailableError, kept_graph

ROOT = Path(__file__).resolve().parents[2]
# What the child imports that this process does not.
NAMES = ("onnx", "onnxscript", "onnx_ir", "sitecustomize", "usercustomize")
SETTINGS = FrameSettings()


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder of modules that leave a mark when they are run: the file ``ran`` beside it."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    return folder


def test_an_export_runs_nothing_of_the_current_folder(trap: Path, tmp_path: Path) -> None:
    """Started like a node: a script elsewhere, in whatever folder."""
    program = tmp_path / "bin" / "program.py"
    program.parent.mkdir()
    program.write_text(
        "from xview_loc.models.checkpoint import load_model\n"
        "from xview_loc.models.graph import FrameSettings, kept_graph\n"
        "print(kept_graph(load_model('ccvpe-small').model, FrameSettings()))\n"
    )
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program)]
    done = subprocess.run(
        command, cwd=trap, env={**os.environ, **variables}, capture_output=True, text=True, timeout=600
    )
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()


@pytest.mark.parametrize(
    ("options", "python_path"),
    [
        ([], f"{ROOT}:"),  # an empty entry is the current folder
        ([], f"{ROOT}:."),
        (["-I"], ""),  # found by other means than the environment, as an editable install
    ],
)
def test_a_child_finds_this_package_and_none_of_the_current_folder(
    trap: Path, tmp_path: Path, options: list[str], python_path: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import subprocess, sys; sys.path.append({str(ROOT)!r})\n"
        "from xview_loc.children import isolated_python\n"
        f"sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "code = 'import xview_loc, onnxscript; print(xview_loc.__file__, onnxscript.__file__, sys.argv[1])'\n"
        "sys.exit(subprocess.run(isolated_python(code, 'word')).returncode)\n"
    )
    (trap / "sitecustomize.py").unlink()  # these are run by any Python with such a search path
    (trap / "usercustomize.py").unlink()
    done = subprocess.run(
        [sys.executable, *options, str(program)],
        cwd=trap,
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    package, other, word = done.stdout.split()
    assert Path(package).is_relative_to(ROOT) and not Path(other).is_relative_to(trap) and word == "word"
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of graphs, which exist from the first call on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "xview_loc" / "graphs"


def export_here(model: CrossViewModel, settings: FrameSettings, path: Path) -> None:
    path.write_bytes(graph.export(model, settings))


def test_a_damaged_graph_is_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_export_elsewhere", export_here)
    model = load_model("ccvpe-small").model
    whole = kept_graph(model, SETTINGS)
    content = whole.read_bytes()
    damaged = np.frombuffer(content, np.uint8).copy()
    damaged[len(damaged) // 2] ^= 1
    for other in (damaged.tobytes(), content[: len(content) // 2], b""):
        whole.write_bytes(other)
        runtimes.make_runtime(model, "openvino", SETTINGS)
        (kept,) = cache.iterdir()
        assert graph._hashed_name(kept.name.rpartition("-")[0], kept) == kept.name
        whole = kept


def test_the_cache_is_the_users_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        graph, "_export_elsewhere", lambda model, settings, path: path.write_bytes(b"a graph")
    )
    model = StubModel("panorama")
    path = kept_graph(model, SETTINGS)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o777)
    assert kept_graph(model, SETTINGS) == path
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(RuntimeUnavailableError, match="belongs to another user"):
        kept_graph(model, SETTINGS)


def test_temporary_names_cannot_be_foreseen(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    used: list[Path] = []

    def child(code: str, checkpoint: str, out: str, settings: str) -> list[str]:
        assert stat.S_IMODE(Path(checkpoint).parent.stat().st_mode) == 0o700
        used.extend(Path(name).relative_to(tmp_path) for name in (Path(checkpoint).parent, out))
        return [sys.executable, "-I", "-c", f"open({out!r}, 'wb').write(b'a graph')"]

    monkeypatch.setattr(graph, "isolated_python", child)
    for _ in range(2):
        kept_graph(StubModel("panorama"), SETTINGS).unlink()
    assert len(set(used)) == 4
    assert list(shared.iterdir()) == list(cache.iterdir()) == []
