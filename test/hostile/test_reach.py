"""A stranger in the ROS domain: which files, servers and variables they can turn a running node to."""

from __future__ import annotations

from pathlib import Path

import pytest
from map_fixtures import TileServer, texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from lifecycle_msgs.msg import Transition
from ros_harness import Bench, NodeProcess, bench, pick_domain
from stub_node import write_stub

DOMAIN = pick_domain()
LAT, LON = 48.2, 16.37


def again(b: Bench, node: str, *transitions: int) -> None:
    for transition in transitions:
        b.change_state(node, transition)


def value(b: Bench, node: str, **parameters: object) -> list[str]:
    """What the node answers to each, "" if it takes it."""
    return [b.set_parameter(node, name, value) for name, value in parameters.items()]


@pytest.fixture
def aerial(tmp_path: Path) -> Path:
    return write_geotiff(tmp_path / "map.tif", texture(600, 600), LAT, LON, 0.5, "EPSG:32633")


def test_a_stranger_reads_no_variable_and_no_header(
    aerial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "t0psecret")
    monkeypatch.setenv("XVIEW_LOC_KEY", "0wnkey")
    start = {"map": str(aerial), "model": "stub", "map_api_key_env": "XVIEW_LOC_KEY", "map_max_zoom": 18}
    node = NodeProcess(DOMAIN, tmp_path / "log", start)
    with bench(DOMAIN) as b, TileServer(None) as theirs:
        try:
            b.wait_diagnosis()
            b.wait(lambda: b.value("state") == "active", what="the active node")
            again(b, "/localizer", Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP)
            for source in (
                theirs.url + "?k={key}",
                f"{theirs.root}/map.tif",
                f"/vsicurl/{theirs.root}/map.tif",
                f"/vsizip//vsicurl/{theirs.root}/map.zip/map.tif",
                f"zip+{theirs.root}/map.zip!map.tif",
                f"<GDAL_WMS><Service name='TMS'><ServerUrl>{theirs.root}</ServerUrl></Service></GDAL_WMS>",
                f"WMS:{theirs.root}/?",
                "PG:host=127.0.0.1 dbname=a",
            ):
                (says,) = value(b, "/localizer", map=source)
                assert "map may change to a file only" in says, source
            says = value(
                b,
                "/localizer",
                map_api_key_env="CLOUD_SECRET",
                map_headers=["X-Forwarded-For: 10.0.0.1"],
                map_cache_dir=str(tmp_path / "elsewhere"),
                allow_remote_maps=True,
                checkpoint_dirs=["/"],
            )
            assert "must stay as at the start" in says[0] and "must stay as at the start" in says[1]
            assert "must be" in says[2] and "as at the start" in says[2]
            assert "read-only" in says[3] and "read-only" in says[4]
            # What was given, and other files, may be set.
            assert value(b, "/localizer", map_api_key_env="XVIEW_LOC_KEY", map=str(aerial)) == ["", ""]
            again(b, "/localizer", Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE)
            assert theirs.requests == 0
        finally:
            assert node.stop() == 0, node.log
    assert "t0psecret" not in node.log and "0wnkey" not in node.log


def test_where_remote_maps_are_allowed_a_key_is_still_a_key(
    aerial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "t0psecret")
    start = {"map": str(aerial), "model": "stub", "allow_remote_maps": True, "autostart": False}
    node = NodeProcess(DOMAIN + 1, tmp_path / "log", start)
    with bench(DOMAIN + 1) as b, TileServer(None) as theirs:
        try:
            b.wait_diagnosis()
            url = theirs.url + "?k={key}"
            assert value(b, "/localizer", map=url, map_api_key_env="CLOUD_SECRET") == ["", ""]
            with pytest.raises(AssertionError):
                b.change_state("/localizer", Transition.TRANSITION_CONFIGURE)
            b.wait_diagnosis("not_configured", "CLOUD_SECRET", "begins with XVIEW_LOC_")
            assert theirs.requests == 0
        finally:
            assert node.stop() == 0, node.log
    assert "t0psecret" not in node.log


def test_weights_come_from_allowed_folders_only(
    aerial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("own", "theirs"):
        (tmp_path / folder).mkdir()
    first = write_stub(tmp_path / "own" / "first.safetensors", 1)
    second = write_stub(tmp_path / "own" / "second.safetensors", 2)
    theirs = write_stub(tmp_path / "theirs" / "a.safetensors", 3)
    link = tmp_path / "own" / "link.safetensors"
    link.symlink_to(theirs)
    (tmp_path / "own").chmod(0o777)
    start = {"map": str(aerial), "model": "stub", "checkpoint": str(first), "allow_untrained": False}
    node = NodeProcess(DOMAIN + 2, tmp_path / "log", start)
    with bench(DOMAIN + 2) as b:
        try:
            b.wait_diagnosis()
            b.wait(lambda: "first.safetensors" in b.value("checkpoint"), what="the first checkpoint")
            for path in (theirs, link, tmp_path / "own" / ".." / "theirs" / "a.safetensors", "/dev/zero"):
                for says in value(b, "/localizer", checkpoint=str(path), shadow_checkpoint=str(path)):
                    assert "checkpoint_dirs" in says and len(says.splitlines()) == 1, path
            assert value(b, "/localizer", checkpoint=str(second)) == [""]
            b.wait(lambda: "second.safetensors" in b.value("checkpoint"), what="the second checkpoint")
            # A file that was replaced by a link out of the folder.
            second.unlink()
            second.symlink_to(theirs)
            ok, says = b.trigger("/localizer/reload")
            assert not ok and "checkpoint_dirs" in says
            assert b.trigger("/localizer/rollback")[0]
            # Where the node keeps its own files.
            (tmp_path / "ros" / "xview_loc").mkdir(parents=True, exist_ok=True)
            third = write_stub(tmp_path / "ros" / "xview_loc" / "third.safetensors", 4)
            assert value(b, "/localizer", checkpoint=str(third)) == [""]
            b.wait(lambda: "third.safetensors" in b.value("checkpoint"), what="the third checkpoint")
        finally:
            assert node.stop() == 0, node.log
    assert f"another user can write to {tmp_path / 'own'}, and so choose the checkpoints" in node.log


def test_recordings_stay_in_the_folder_of_the_start(tmp_path: Path) -> None:
    start = {"directory": str(tmp_path / "bags"), "autostart": False}
    node = NodeProcess(DOMAIN + 3, tmp_path / "log", start, module="xview_loc.nodes.pair_logger_node")
    with bench(DOMAIN + 3) as b:
        try:
            b.wait_diagnosis()
            (tmp_path / "bags").mkdir()
            (tmp_path / "bags" / "link").symlink_to(tmp_path)
            for folder in (tmp_path, tmp_path / "bags" / ".." / "other", tmp_path / "bags" / "link", ""):
                (says,) = value(b, "/pair_logger", directory=str(folder))
                assert "as at the start" in says, folder
            assert value(b, "/pair_logger", directory=str(tmp_path / "bags" / "monday")) == [""]
        finally:
            assert node.stop() == 0, node.log
