"""A localizer that gets signals again and again, as from `ros2 launch` and the terminal at once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from ros_harness import NodeProcess, bench, pick_domain

DOMAIN = pick_domain()


@pytest.mark.parametrize("moment", ["starting", "active"])
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_a_node_ends_cleanly_however_often_it_is_told(
    tmp_path: Path, moment: str, signals: list[signal.Signals]
) -> None:
    tif = write_geotiff(tmp_path / "a.tif", texture(300, 300), 48.2, 16.37, 0.25, "EPSG:32633")
    with bench(DOMAIN) as b:
        node = NodeProcess(DOMAIN, tmp_path / "log", {"map": str(tif), "model": "stub", "torch_threads": 1})
        if moment == "starting":
            b.wait(lambda: "localizer" in b.node.get_node_names(), what="the node")
        else:
            b.wait(lambda: b.value("state") == "active", what="the active node")
        code = node.interrupt(signals)
    assert code == 0, node.log
    assert "Traceback" not in node.log
