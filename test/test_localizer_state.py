"""What a localizer remembers, and what of it may be changed: localizers in this process."""

from __future__ import annotations

import json
import math
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
from xview_loc.nodes.parameters import LOCALIZER

DOMAIN = pick_domain()
# What others may not choose for the node.
OF_THE_START = ("map_headers", "map_api_key_env", "map_cache_dir")


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
def localizer(configure: bool = True, **parameters: Any) -> Iterator[Running]:
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    rclpy.init(args=["--ros-args", "-r", "__ns:=/car", *words], domain_id=DOMAIN)
    node = LocalizerNode()
    try:
        running = Running(node)
        if configure:
            running.configure()
        yield running
        running.executor.shutdown()
    finally:
        node.destroy_node()
        rclpy.shutdown()


@pytest.fixture
def common(tmp_path, monkeypatch) -> dict[str, Any]:
    """Parameters of a localizer with the stub of a model, in a ROS_HOME of its own."""
    monkeypatch.setenv("ROS_HOME", str(tmp_path / "ros"))
    tif = write_geotiff(tmp_path / "map.tif", texture(600, 600), 48.2, 16.37, 0.5, "EPSG:32633")
    return {"map": tif, "model": "stub", "backend": "torch"}


def test_what_was_deployed_serves_after_a_restart(common, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    first, second, third = (write_stub(tmp_path / f"{n}.safetensors", n) for n in (1, 2, 3))
    with localizer(**common, checkpoint=first) as node:
        assert node.checkpoint == "1.safetensors"
        node.deploy(Path(second.name))
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


def test_every_parameter_is_live_or_refused_while_the_node_is_configured(common, tmp_path):
    path = write_stub(tmp_path / "a.safetensors", 1)
    with localizer(**common, checkpoint=path, filter=True) as running:
        node = running.node
        values = {p.name: another_value(p, node.get_parameter(p.name).value) for p in LOCALIZER}
        values |= {"checkpoint": str(path), "shadow_checkpoint": str(path)}

        def put(name: str) -> tuple[bool, str]:
            (result,) = node.set_parameters([Parameter(name, value=values[name])])
            return result.successful, result.reason

        for p in LOCALIZER:
            successful, reason = put(p.name)
            assert successful == p.live, p.name
            if p.start_only:
                assert "read-only" in reason
            elif not p.live:
                assert reason == f"{p.name} needs cleanup and configure"
        # What is kept elsewhere than in the parameters.
        options = node._filter.options
        assert options.outlier == values["filter_outlier"] and options.drift_m == values["filter_drift_m"]
        assert node._pairing._wait_ns == values["max_wait_s"] * 1e9
        # An unchanged value is no change, as when a whole file is loaded.
        assert node.set_parameters([Parameter("map_frame", value="map")])[0].successful
        (nan,) = node.set_parameters([Parameter("search_radius_m", value=math.nan)])
        assert not nan.successful and "search_radius_m out of range" in nan.reason
        # One that is refused, and none is taken.
        pair = [Parameter("min_confidence", value=0.9), Parameter("map", value="b.tif")]
        assert not node.set_parameters_atomically(pair).successful
        assert node.get_parameter("min_confidence").value == values["min_confidence"]
        assert node._params["min_confidence"] == values["min_confidence"]
        node.trigger_cleanup()
        for p in LOCALIZER:
            assert put(p.name)[0] == (not p.start_only and p.name not in OF_THE_START)


def test_a_value_out_of_range_in_the_parameter_file_is_said_and_can_be_corrected(common):
    wrong = {"heading_std_deg": 500.0, "max_fix_age_s": 2}
    with localizer(**common, **wrong, allow_untrained=True, configure=False) as running:
        node = running.node
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        for part in ("heading_std_deg out of range", "'max_fix_age_s' to '2' of type 'INTEGER'"):
            assert part in running.text
        corrected = [Parameter("heading_std_deg", value=5.0), Parameter("max_fix_age_s", value=2.0)]
        assert all(result.successful for result in node.set_parameters(corrected))
        running.configure()


def another_value(p: Any, value: Any) -> Any:
    """An allowed value of a parameter that is not its present one."""
    if p.choices:
        return next(choice for choice in p.choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        low, high = p.range or (1, 2)
        return type(value)(low + (high - low) / 4)
    if p.name == "panorama_elevation_deg":
        return [60.0, -60.0]
    return ["X: y"] if isinstance(value, list) else f"{value}x"
