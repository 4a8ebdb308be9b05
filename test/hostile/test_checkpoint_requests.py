"""Requests for other checkpoints while one is being verified: the newest waits, a rollback does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from rclpy.parameter import Parameter
from std_srvs.srv import Trigger
from stub_node import write_stub
from test_localizer_state import localizer

from xview_loc.estimation import checkpoint_swap


class Slow:
    """Verifying a checkpoint whose name contains "slow" takes until it is told to end."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self._end = threading.Event(), threading.Event()
        self.seen: list[str] = []
        load = checkpoint_swap.load_checkpoint

        def waits(path: Path, *more: Any) -> Any:
            self.seen.append(path.name)
            if "slow" in path.name:
                self.begun.set()
                assert self._end.wait(120.0)
            return load(path, *more)

        patch.setattr(checkpoint_swap, "load_checkpoint", waits)

    def end(self) -> None:
        self._end.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow(monkeypatch)
    yield slow
    slow.end()


@contextmanager
def configured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A localizer with the first of two checkpoints in use, the second one before, and more beside."""
    monkeypatch.setenv("ROS_HOME", str(folder / "ros"))
    tif = write_geotiff(folder / "map.tif", texture(600, 600), 48.2, 16.37, 0.5, "EPSG:32633")
    for number, name in enumerate(("first", "second", "third", "slow")):
        write_stub(folder / f"{name}.safetensors", number)
    first = folder / "first.safetensors"
    with localizer(map=tif, model="stub", backend="torch", checkpoint=first) as node:
        node.deploy(folder / "second.safetensors")
        yield node


def ask(node: Any, path: Path) -> None:
    (result,) = node.node.set_parameters([Parameter("checkpoint", value=str(path))])
    assert result.successful


def call(node: Any, service: str) -> Any:
    client = node.node.create_client(Trigger, f"~/{service}")
    assert client.wait_for_service(60.0)
    return client.call_async(Trigger.Request())


def test_a_rollback_does_not_wait(slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered while a change is verified and a reload waits, and that change is abandoned."""
    with configured(tmp_path, monkeypatch) as node:
        ask(node, tmp_path / "slow.safetensors")
        assert slow.begun.wait(60.0)
        change, reload = node.node._checkpoints.swap._waiting, call(node, "reload")
        while node.node._checkpoints.swap._waiting is change:
            node.executor.spin_once(0.1)
        assert "in use" in node.rollback() and node.checkpoint == "first.safetensors"
        while not reload.done():
            node.executor.spin_once(0.1)
        assert not reload.result().success and "another change" in reload.result().message
        assert node.node.get_parameter("checkpoint").value == str(tmp_path / "first.safetensors")
        slow.end()
        while "checkpoint_refused" not in node.text:
            node.executor.spin_once(0.1)
        assert "a rollback was asked for meanwhile" in node.text
        assert node.checkpoint == "first.safetensors"
        assert "in use" in node.rollback() and node.checkpoint == "second.safetensors"
        node.deploy(tmp_path / "third.safetensors")


def test_only_the_newest_change_waits(slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with configured(tmp_path, monkeypatch) as node:
        ask(node, tmp_path / "slow.safetensors")
        assert slow.begun.wait(60.0)
        for number in range(100):
            junk = tmp_path / f"junk-{number}.safetensors"
            junk.write_bytes(b"junk")
            ask(node, junk)
        ask(node, tmp_path / "third.safetensors")
        for number in range(100):
            candidate = Parameter("shadow_checkpoint", value=str(tmp_path / f"gone-{number}"))
            (result,) = node.node.set_parameters([candidate])
            assert result.successful
        slow.end()
        node.spin_until(tmp_path / "third.safetensors")
        while "gone-99" not in slow.seen:
            node.executor.spin_once(0.1)
    assert slow.seen == ["second.safetensors", "slow.safetensors", "third.safetensors", "gone-99"]
