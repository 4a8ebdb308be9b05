"""The example policies for SROS 2 name what the running nodes have. Nothing here runs DDS Security."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from nav_msgs.msg import Odometry
from ros_harness import NodeProcess, bench, pick_domain
from sensor_msgs.msg import CameraInfo, Image, Imu

POLICY = Path(__file__).resolve().parents[2] / "config" / "sros2_policy.xml"
DOMAIN = pick_domain()
# With some parameters, packages and distributions only.
OPTIONAL = {"/tf", "/tf_static", "/clock", "/localizer/hypotheses", "/camera_info", "/imu"}
OPTIONAL |= {f"/{name}/get_type_description" for name in ("localizer", "pair_logger")}


def allowed(node: str, rule: str) -> set[str]:
    """Full names of what a node's profile allows."""
    (profile,) = (p for p in ElementTree.parse(POLICY).iter("profile") if p.get("node") == node)
    assert profile.get("ns") == "/"
    names = set()
    for group in profile:
        assert list(group.attrib.values()) == ["ALLOW"]
        if rule in group.attrib:
            names |= {str(item.text).replace("~", f"/{node}") for item in group}
    return {name if name.startswith("/") else f"/{name}" for name in names}


@pytest.mark.parametrize(
    ("name", "module", "parameters"),
    [
        ("localizer", "", {"model": "stub", "filter": True}),
        ("pair_logger", "xview_loc.nodes.pair_logger_node", {}),
    ],
)
def test_policies_are_exact(name: str, module: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    tif = write_geotiff(tmp_path / "a.tif", texture(600, 600), 48.2, 16.37, 0.25, "EPSG:32633")
    own = {"map": str(tif), **({"directory": str(tmp_path / "bags")} if module else parameters)}
    node = NodeProcess(DOMAIN, tmp_path / "log", own, module=module)
    try:
        with bench(DOMAIN) as b:
            # The node subscribes to what somebody publishes.
            for kind, topic in (
                (Image, "/image"),
                (Imu, "/heading"),
                (Odometry, "/odom"),
                (CameraInfo, "/camera_info"),
            ):
                b.publisher(kind, topic)
            b.wait_diagnosis()
            b.wait(lambda: b.value("state") == "active", what="the active node")
            for ask, rule in (
                (b.node.get_publisher_names_and_types_by_node, "publish"),
                (b.node.get_subscriber_names_and_types_by_node, "subscribe"),
                (b.node.get_service_names_and_types_by_node, "reply"),
                (b.node.get_client_names_and_types_by_node, "request"),
            ):
                wanted = allowed(name, rule)
                b.wait(
                    lambda ask=ask, wanted=wanted: {n for n, _ in ask(name, "/")} | OPTIONAL >= wanted,
                    120.0,
                    f"{rule} of all that the policy allows",
                )
                assert {n for n, _ in ask(name, "/")} <= wanted, rule
    finally:
        assert node.stop() == 0, node.log


def test_the_deployment_tool_may_call_what_the_localizer_answers() -> None:
    assert {"/localizer/set_parameters", "/localizer/reload"} <= allowed("deploy", "request")
    assert allowed("deploy", "request") <= allowed("localizer", "reply")
