"""What is deployed outlives the node: localizers in this process, one after another, with one ROS_HOME."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_harness import pick_domain
from std_srvs.srv import Trigger
from stub_node import write_stub

from xview_loc.nodes.localizer_node import LocalizerNode

DOMAIN = pick_domain()


class Running:
    """A configured localizer that its executor spins on request."""

    def __init__(self, node: LocalizerNode) -> None:
        self.node = node
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(node)

    def configure(self) -> None:
        assert self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS

    def deploy(self, path: Path) -> None:
        (result,) = self.node.set_parameters([Parameter("checkpoint", value=str(path))])
        assert result.successful
        self.spin_until(path)

    def rollback(self) -> str:
        client = self.node.create_client(Trigger, "~/rollback")
        call = client.call_async(Trigger.Request())
        while not call.done():
            self.executor.spin_once(0.1)
        return call.result().message

    def spin_until(self, path: Path) -> None:
        while self.checkpoint != path.name or self.node.get_parameter("checkpoint").value != str(path):
            self.executor.spin_once(0.1)

    @property
    def checkpoint(self) -> str:
        return Path(self.node._checkpoints.swap.active.path).name

    @property
    def text(self) -> str:
        return self.node._health.report("localizer").message


@contextmanager
def localizer(**parameters: Any) -> Iterator[Running]:
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    rclpy.init(args=["--ros-args", "-r", "__ns:=/car", *words], domain_id=DOMAIN)
    node = LocalizerNode()
    try:
        running = Running(node)
        running.configure()
        yield running
        running.executor.shutdown()
    finally:
        node.destroy_node()
        rclpy.shutdown()


def test_what_was_deployed_serves_after_a_restart(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ROS_HOME", str(tmp_path / "ros"))
    tif = write_geotiff(tmp_path / "map.tif", texture(600, 600), 48.2, 16.37, 0.5, "EPSG:32633")
    first, second, third = (write_stub(tmp_path / f"{n}.safetensors", n) for n in (1, 2, 3))
    common = {"map": tif, "model": "stub", "backend": "torch"}
    with localizer(**common, checkpoint=first) as node:
        assert node.checkpoint == "1.safetensors"
        node.deploy(second)
    record = json.loads((tmp_path / "ros" / "xview_loc" / "car__localizer.json").read_text())
    assert record["active"]["path"] == str(second) and record["active"]["by"] == "deploy"
    assert record["previous"]["path"] == str(first) and record["previous"]["by"] == "parameter"

    with localizer(**common, checkpoint=first) as node:
        assert "2.safetensors, in use before (by deploy)" in capfd.readouterr().err
        assert node.checkpoint == "2.safetensors" and node.text == "localising"
        assert node.node.get_parameter("checkpoint").value == str(second)
        assert "in use" in node.rollback() and node.checkpoint == "1.safetensors"
        node.deploy(third)
        # Cleaning up is no restart, and forgets nothing either.
        node.node.trigger_cleanup()
        node.configure()
        assert node.checkpoint == "3.safetensors"
        assert "in use" in node.rollback() and node.checkpoint == "1.safetensors"
        assert "in use" in node.rollback() and node.checkpoint == "3.safetensors"

    # A changed parameter wins; a rollback returns to what was in use.
    with localizer(**common, checkpoint=second) as node:
        assert "2.safetensors, as the parameters say" in capfd.readouterr().err
        assert node.checkpoint == "2.safetensors"
        assert "in use" in node.rollback() and node.checkpoint == "3.safetensors"

    with localizer(**common, checkpoint=second, checkpoint_persist=False) as node:
        assert node.checkpoint == "2.safetensors" and "no previous" in node.rollback()
    write_stub(third, 4)
    with localizer(**common, checkpoint=second) as node:
        assert node.checkpoint == "2.safetensors"
        assert "checkpoint_not_restored" in node.text and "3.safetensors is not what was" in node.text
        node.deploy(first)
    first.unlink()
    with localizer(**common, checkpoint=second) as node:
        assert node.checkpoint == "2.safetensors"
        assert "checkpoint_not_restored" in node.text and "1.safetensors" in node.text
    (tmp_path / "ros" / "xview_loc" / "car__localizer.json").write_text("{")
    with localizer(**common, checkpoint=second) as node:
        assert node.checkpoint == "2.safetensors" and "cannot read" in node.text
