"""Lifecycle callbacks that fail, and the nodes with rclpy as Humble has it (docs/distributions.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

import rclpy
from geometry_msgs.msg import PoseWithCovarianceStamped
from localizer_rig import picture
from nav_msgs.msg import Odometry
from rclpy.lifecycle import TransitionCallbackReturn
from ros_harness import NodeProcess, bench, pick_domain
from sensor_msgs.msg import Image, Imu, NavSatFix

from xview_loc.models.specs import SPECS
from xview_loc.nodes.parameters import PAIR_LOGGER
from xview_loc.nodes.vehicle_node import VehicleNode
from xview_loc.recordings.pair_reader import PairBag

LAT, LON = 48.2, 16.37
DOMAIN = pick_domain()
FAILURE, SUCCESS = TransitionCallbackReturn.FAILURE, TransitionCallbackReturn.SUCCESS


@pytest.mark.parametrize("module", ["", "xview_loc.nodes.pair_logger_node"], ids=["localizer", "logger"])
def test_a_node_runs_with_what_humble_has(module, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "humble"))
    tif = write_geotiff(tmp_path / "map.tif", texture(600, 600), LAT, LON, 0.5, "EPSG:32633")
    parameters: dict[str, Any] = {"map": str(tif), "qos_reliability": "reliable"}
    if module:
        parameters |= {"directory": str(tmp_path)}
    else:
        parameters |= {"model": "stub", "torch_threads": 1}
    node = NodeProcess(DOMAIN, tmp_path / "log", parameters, module=module)
    try:
        with bench(DOMAIN) as b:
            outputs = [
                b.publisher(kind, f"/{name}")
                for name, kind in (("odom", Odometry), ("fix", NavSatFix), ("heading", Imu), ("image", Image))
            ]
            poses = b.listen(PoseWithCovarianceStamped, "/localizer/pose")
            b.wait(lambda: outputs[-1].get_subscription_count(), what="the active node")

            def done() -> bool:
                """Send a frame, and look whether one has been used."""
                stamp = time.time_ns()
                for output in outputs:
                    message = output.msg_type()
                    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
                    if isinstance(message, NavSatFix):
                        message.latitude, message.longitude = LAT, LON
                        message.status.status = 0
                    elif isinstance(message, Imu):
                        message.orientation.w = 1.0
                    elif isinstance(message, Image):
                        message.height, message.width, message.step = 32, 64, 192
                        message.encoding, message.data = "rgb8", picture(0).tobytes()
                    output.publish(message)
                b.executor.spin_once(timeout_sec=0.3)
                return bool(int(b.value("pairs") or 0) if module else poses)

            b.wait(done, what="a pose or a pair")
    finally:
        assert node.stop() == 0, node.log
    assert "rclpy as of Humble" in node.log and "Traceback" not in node.log
    if module:
        assert len(PairBag(next(tmp_path.glob("pairs_*")))) > 0


class Idle:
    """A worker that does nothing."""

    def put(self, item: Any) -> bool:
        return False

    def close(self) -> None:
        pass


class BrokenNode(VehicleNode):
    """Raises where it is told to."""

    table = PAIR_LOGGER
    ok_message = "running"

    def __init__(self) -> None:
        self.broken = ""
        super().__init__("broken")

    def breaks(self, name: str) -> None:
        if self.broken == name:
            raise RuntimeError(f"no {name}")

    def configure(self) -> None:
        self.breaks("configure")
        self._spec = SPECS["ccvpe-small"]

    def make_worker(self) -> Any:
        self.breaks("make_worker")
        return Idle()

    def wants_heading(self) -> bool:
        self.breaks("wants_heading")
        return True

    def stopped(self) -> None:
        self.breaks("stopped")

    def release(self) -> None:
        self.breaks("release")


@pytest.fixture
def broken() -> Iterator[BrokenNode]:
    rclpy.init(domain_id=DOMAIN + 1)
    node = BrokenNode()
    try:
        yield node
    finally:
        node.broken = ""
        node.destroy_node()
        rclpy.shutdown()


def test_a_transition_that_fails_says_why_and_can_be_repeated(broken, capfd):
    for hook, trigger, condition in (
        ("configure", broken.trigger_configure, "not_configured"),
        ("make_worker", broken.trigger_activate, "not_active"),
        ("wants_heading", broken.trigger_activate, "not_active"),
        ("stopped", broken.trigger_deactivate, "not_deactivated"),
        ("release", broken.trigger_cleanup, "not_cleaned_up"),
    ):
        broken.broken = hook
        assert trigger() == FAILURE
        assert f"{condition}: RuntimeError: no {hook}" in broken._health.report("broken").message
        assert f"RuntimeError: no {hook}" in capfd.readouterr().err
        broken.broken = ""
        if hook != "make_worker":  # the next one fails, too
            assert trigger() == SUCCESS
            assert condition not in broken._health.report("broken").message
    broken.broken = "release"
    assert broken.trigger_shutdown() == FAILURE
    assert "not_shut_down: RuntimeError: no release" in broken._health.report("broken").message
