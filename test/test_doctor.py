"""``xview-loc doctor``: findings and advice."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from map_fixtures import TileServer, texture, write_geotiff, write_mbtiles
from typer.testing import CliRunner

from xview_loc import doctor as doctor_module
from xview_loc.cli.commands import app
from xview_loc.doctor import PACKAGES, profile_variables
from xview_loc.models.checkpoint import load_model, shipped_checkpoint

LAT, LON = 48.2, 16.37
ROOT = Path(__file__).resolve().parent.parent
SMALL = shipped_checkpoint("ccvpe-small")
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({!r}))
from xview_loc.cli.commands import main
main()
"""


@dataclass
class Report:
    """What the command printed: by check, its level and the rest of the line."""

    code: int
    lines: dict[str, tuple[str, str]]

    def level(self, check: str) -> str:
        return self.lines[check][0]

    def text(self, check: str) -> str:
        return self.lines[check][1]


def doctor(*arguments: str) -> Report:
    """Run the command in this process, where everything is imported already."""
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return report(done.exit_code, done.output)


def doctor_without(*modules: str) -> Report:
    """Run the command in a process where these Python modules cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(modules), "doctor"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return report(done.returncode, done.stdout)


def report(code: int, output: str) -> Report:
    lines = {}
    for line in output.splitlines():
        match = re.fullmatch(r"(ok|warning|failure) +(\w+(?: \w+)?) {2,}(.+)", line)
        assert match, f"not a finding: {line!r}"
        lines[match[2]] = (match[1], match[3])
    failed = any(level == "failure" for level, _ in lines.values())
    assert lines and code == int(failed), output
    return Report(code, lines)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads stall on a machine that is busy with other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_profile(monkeypatch) -> None:
    for name in profile_variables():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_rate(monkeypatch) -> None:
    """Skip the measurement, which takes most of the time and is tested elsewhere."""
    monkeypatch.setattr(doctor_module, "_rate", lambda *arguments: iter(()))


@pytest.fixture
def tif(tmp_path):
    return write_geotiff(tmp_path / "a.tif", texture(600, 600), LAT, LON, 0.25, "EPSG:32633")


def test_all_good(monkeypatch, tif, tmp_path):
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", str(ROOT / "config" / "fastdds.xml"))
    report = doctor("--map", str(tif), "--cache-dir", str(tmp_path))
    assert report.code == 0
    assert report.level("map") == "ok" and "0.250 m/px" in report.text("map")
    assert "100% imagery" in report.text("map")
    assert report.level("checkpoint") == "ok" and "ccvpe-small" in report.text("checkpoint")
    hertz = float(re.search(r"with openvino on cpu: ([\d.]+) Hz", report.text("rate"))[1])
    assert hertz > 0
    for check in ("python", "packages", "torch", "map formats", "tile formats", "projections", "tile cache"):
        assert report.level(check) == "ok", report.text(check)
    if "rclpy" in report.text("ros"):
        assert report.level("dds profile") == "ok"


def test_without_ros_the_rest_is_checked(no_rate, monkeypatch):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    report = doctor()
    assert report.code == 0
    assert report.level("ros") == "warning" and "setup.bash" in report.text("ros")
    assert report.level("checkpoint") == "ok"
    assert "map" not in report.lines


def test_missing_packages_are_named():
    """The command itself starts without them."""
    report = doctor_without("rasterio", "cv2", "torch")
    assert report.code == 1
    assert report.level("packages") == "failure"
    # Packages that import them are missing too.
    install = report.text("packages").partition("pip install ")[2].split()
    assert {"rasterio", "opencv-python-headless", "torch"} <= set(install)


def test_the_packages_are_those_of_the_setup():
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    required = ast.literal_eval(next(k.value for k in call.keywords if k.arg == "install_requires"))
    assert {re.match(r"[\w.-]+", text)[0] for text in required} == set(PACKAGES)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_place(path: Path) -> None:
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8") as out:
        out.write(np.full((3, 64, 64), 90, np.uint8))


def with_local_coordinates(path: Path) -> None:
    with rasterio.open(path, "r+") as out:
        out.crs = 'LOCAL_CS["site",UNIT["metre",1]]'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot open"),
        (lambda path: path.write_bytes(b"rubbish"), "cannot open"),
        (without_place, "no coordinate reference system"),
        (cut_short, "cannot read"),
        (with_local_coordinates, "local coordinate reference system"),
    ],
)
def test_a_broken_map_is_a_failure(no_rate, tif, damage, message):
    damage(tif)
    report = doctor("--map", str(tif))
    assert report.code == 1
    assert report.level("map") == "failure"
    assert message in report.text("map") and tif.name in report.text("map")


def test_a_map_smaller_than_a_tile_is_a_warning(no_rate, tmp_path):
    tif = write_geotiff(tmp_path / "a.tif", texture(60, 60), LAT, LON, 0.25, "EPSG:32633")
    report = doctor("--map", str(tif))
    assert report.code == 0
    assert report.level("map") == "warning" and "min_valid_fraction" in report.text("map")


def test_a_map_without_imagery_in_its_middle_is_read_elsewhere(no_rate, tmp_path):
    image = np.dstack([texture(1200, 1200), np.full((1200, 1200), 255, np.uint8)])
    image[300:, :, 3] = 0
    image[:, 300:, 3] = 0
    everywhere_else = write_geotiff(
        tmp_path / "a.tif", image, LAT, LON, 0.25, "EPSG:32633", photometric="RGB", alpha="YES"
    )
    report = doctor("--map", str(everywhere_else))
    assert report.level("map") == "warning" and "imagery" in report.text("map")
    assert "no imagery at its middle" not in report.text("map")


def test_a_file_pyramid(no_rate, tif, tmp_path):
    path = write_mbtiles(tmp_path / "a.mbtiles", tif, [19])
    report = doctor("--map", str(path))
    assert report.level("map") == "ok" and "MBTiles" in report.text("map")


def test_a_tile_server_is_asked_once(no_rate, tmp_path):
    with TileServer(None) as server:
        arguments = ("--map", server.url, "--cache-dir", str(tmp_path))
        for count in (1, 2):  # a cached answer would not tell whether the server is there
            report = doctor(*arguments)
            assert report.code == 0
            assert "answered one request" in report.text("map")
            assert server.requests == count
        server.fault = "403"
        report = doctor(*arguments)
    assert report.code == 1
    assert report.level("map") == "failure" and "403" in report.text("map")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, (), "does not exist"),
        (b"", (), "is empty"),
        (b"rubbish", (), "neither a complete safetensors file"),
        (SMALL.read_bytes()[:100_000], (), "neither a complete safetensors file"),
        (SMALL.read_bytes(), ("--model", "ccvpe-vigor"), "holds ccvpe-small, not ccvpe-vigor"),
        (SMALL.read_bytes(), ("--model", "nonsense"), "not nonsense"),
    ],
)
def test_a_bad_checkpoint_is_a_failure(tmp_path, content, arguments, message):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    report = doctor("--checkpoint", str(path), *arguments)
    assert report.code == 1
    assert report.level("checkpoint") == "failure" and message in report.text("checkpoint")
    assert "rate" not in report.lines


def test_a_checkpoint_says_which_model_it_holds(no_rate):
    report = doctor("--checkpoint", str(shipped_checkpoint("ggcvt-small")))
    assert report.level("checkpoint") == "ok" and "ggcvt-small" in report.text("checkpoint")


def test_how_a_published_file_was_read_is_said(no_rate, tmp_path):
    torch.save(load_model("ccvpe-small").model.state_dict(), tmp_path / "a.pt")
    report = doctor("--checkpoint", str(tmp_path / "a.pt"), "--model", "ccvpe-small")
    assert report.level("checkpoint") == "ok" and "padding reflect" in report.text("checkpoint")


def test_a_model_without_weights_is_a_failure(no_rate):
    report = doctor("--model", "ccvpe-vigor")
    assert report.code == 1
    assert report.level("checkpoint") == "failure" and "give a file" in report.text("checkpoint")


def test_an_unknown_model_is_a_failure():
    report = doctor("--model", "nonsense")
    assert report.code == 1
    assert "choose from" in report.text("checkpoint")


@pytest.mark.parametrize("parent", ["file", "x" * 300])
def test_a_cache_that_cannot_be_written(no_rate, tif, tmp_path, parent):
    blocked = tmp_path / parent / "cache"
    (tmp_path / "file").write_text("")
    report = doctor("--map", str(tif), "--cache-dir", str(blocked))
    assert report.code == 0, "a file needs no cache"
    assert report.level("tile cache") == "warning" and "map_cache_dir" in report.text("tile cache")
    with TileServer(None) as server:
        report = doctor("--map", server.url, "--cache-dir", str(blocked))
    assert report.level("tile cache") == "failure"


def test_the_dds_profile(no_rate, monkeypatch, tmp_path):
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    report = doctor()
    if "fastrtps" not in report.text("ros"):
        pytest.skip("the middleware is not Fast DDS")
    assert report.level("dds profile") == "warning" and "fastdds.xml" in report.text("dds profile")
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", str(tmp_path / "none.xml"))
    report = doctor()
    assert report.code == 1
    assert report.level("dds profile") == "failure" and "none.xml" in report.text("dds profile")


def test_a_middleware_that_hangs(no_rate, monkeypatch):
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    monkeypatch.setattr(doctor_module, "_PROBE", "import signal; signal.pause()")
    monkeypatch.setattr(doctor_module, "PROBE_TIMEOUT_S", 0.1)
    report = doctor()
    assert report.code == 1
    assert report.level("ros") == "failure" and "does not answer" in report.text("ros")


def test_a_middleware_that_is_not_there(no_rate, monkeypatch):
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_nonsense_cpp")
    report = doctor()
    assert report.code == 1
    assert report.level("ros") == "failure" and "RMW_IMPLEMENTATION" in report.text("ros")
