"""The files for RViz, Foxglove and other packages: what they name exists, and has the type they need."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import yaml
from map_fixtures import texture, write_geotiff
from pyproj import Transformer

from xview_loc.geodesy import LocalProjection

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config"


class Shown(NamedTuple):
    """A topic that a display takes, the message type it needs, and RViz's QoS."""

    topic: str
    type: str
    qos: dict[str, Any]


RVIZ_TYPES = {
    "rviz_default_plugins/Map": "nav_msgs/msg/OccupancyGrid",
    "rviz_default_plugins/PoseWithCovariance": "geometry_msgs/msg/PoseWithCovarianceStamped",
    "rviz_default_plugins/Image": "sensor_msgs/msg/Image",
}
RVIZ_WITHOUT_TOPIC = {"rviz_default_plugins/Grid", "rviz_default_plugins/TF"}


def rviz() -> dict[str, Any]:
    return yaml.safe_load((CONFIG / "localizer.rviz").read_text())["Visualization Manager"]


def rviz_shows() -> Iterator[Shown]:
    for display in rviz()["Displays"]:
        assert display["Enabled"] is True and display["Value"] is True and display["Name"]
        if display["Class"] not in RVIZ_WITHOUT_TOPIC:
            topic = display["Topic"]
            yield Shown(topic["Value"], RVIZ_TYPES[display["Class"]], topic)


def foxglove() -> dict[str, Any]:
    return json.loads((CONFIG / "foxglove.json").read_text())


def foxglove_shows() -> Iterator[Shown]:
    scene = {
        "/localizer/heat_map": "nav_msgs/msg/OccupancyGrid",
        "/localizer/pose": "geometry_msgs/msg/PoseWithCovarianceStamped",
    }
    for name, panel in foxglove()["configById"].items():
        kind = name.partition("!")[0]
        if kind == "3D":
            topics = {topic: scene[topic] for topic in panel["topics"]}
        elif kind == "Image":
            topics = {panel["imageMode"]["imageTopic"]: "sensor_msgs/msg/Image"}
        elif kind == "map":
            assert panel["followTopic"] in panel["topicColors"]
            topics = dict.fromkeys(panel["topicColors"], "sensor_msgs/msg/NavSatFix")
        elif kind == "Plot":
            paths = [re.fullmatch(r"(/[\w/]+)\.data", path["value"]) for path in panel["paths"]]
            topics = {path[1]: "std_msgs/msg/Float64" for path in paths}
        elif kind == "DiagnosticSummary":
            topics = {panel["topicToRender"]: "diagnostic_msgs/msg/DiagnosticArray"}
        elif kind == "RawMessages":
            topics = {panel["topicPath"]: ""}  # it shows any
        else:
            raise AssertionError(f"a panel of an unknown kind: {name}")
        yield from (Shown(topic, needed, {}) for topic, needed in topics.items())


def robot_localization() -> dict[str, dict[str, Any]]:
    nodes = yaml.safe_load((CONFIG / "robot_localization.yaml").read_text())
    return {name: node["ros__parameters"] for name, node in nodes.items()}


def localizer() -> dict[str, Any]:
    return yaml.safe_load((CONFIG / "localizer.yaml").read_text())["/**"]["ros__parameters"]


def test_what_they_show_is_there(tmp_path):
    """A node is started and asked: topic, type, and for RViz whether the QoS lets it be heard."""
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
    from ros_harness import NodeProcess, bench, pick_domain

    tif = write_geotiff(tmp_path / "a.tif", texture(600, 600), 48.2, 16.37, 0.25, "EPSG:32633")
    domain = pick_domain()
    node = NodeProcess(domain, tmp_path / "log", {"map": str(tif), "model": "stub", "torch_threads": 1})
    try:
        with bench(domain) as b:
            b.wait(lambda: b.node.count_subscribers("/fix"), what="the active node")
            fused = Shown(
                robot_localization()["ekf_map"]["pose0"], "geometry_msgs/msg/PoseWithCovarianceStamped", {}
            )
            plotted = set()
            for topic, needed, wanted in (*rviz_shows(), *foxglove_shows(), fused):
                ask = (
                    b.node.get_subscriptions_info_by_topic
                    if topic == "/fix"
                    else b.node.get_publishers_info_by_topic
                )
                (info,) = b.wait(
                    lambda topic=topic, ask=ask: [i for i in ask(topic) if i.node_name == "localizer"],
                    what=f"{topic} of the node",
                )
                assert needed in (info.topic_type, ""), topic
                plotted.add(topic)
                if wanted:
                    profile = QoSProfile(
                        depth=wanted["Depth"],
                        durability=policy(wanted["Durability Policy"]),
                        reliability=policy(wanted["Reliability Policy"]),
                        history=policy(wanted["History Policy"]),
                    )
                    # Whoever joins late gets what is latched, if it asks for it.
                    assert info.qos_profile.durability == profile.durability, topic
                    verdict, why = qos_check_compatible(info.qos_profile, profile)
                    assert verdict != QoSCompatibility.ERROR, f"{topic}: {why}"
            topics = {topic for topic, _ in b.node.get_topic_names_and_types()}
            unplotted = {topic for topic in topics if topic.startswith("/localizer/status/")} - plotted
            assert not unplotted, "every status is plotted"
    finally:
        assert node.stop(signal.SIGTERM) == 0, node.log


def policy(name: str) -> Any:
    """rclpy's constant by RViz's name of it."""
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, ReliabilityPolicy

    kinds = {
        "Keep Last": HistoryPolicy.KEEP_LAST,
        "Reliable": ReliabilityPolicy.RELIABLE,
        "Best Effort": ReliabilityPolicy.BEST_EFFORT,
        "Transient Local": DurabilityPolicy.TRANSIENT_LOCAL,
        "Volatile": DurabilityPolicy.VOLATILE,
    }
    return kinds[name]


def test_the_parameters_offer_every_runtime():
    """The nodes' table repeats the names, so that the pair logger starts without torch."""
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from xview_loc.models import runtimes
    from xview_loc.nodes import parameters

    assert get_args(runtimes.Backend) == parameters.BACKENDS
    assert get_args(runtimes.Precision) == parameters.PRECISIONS


def test_rviz_looks_from_the_map():
    assert rviz()["Global Options"]["Fixed Frame"] == "map"
    assert [display["Class"] for display in rviz()["Displays"]].count("rviz_default_plugins/Map") == 1


def test_the_foxglove_layout_holds_every_panel_once():
    layout = foxglove()
    leaves = []

    def visit(node: Any) -> None:
        if isinstance(node, str):
            leaves.append(node)
            return
        assert set(node) == {"first", "second", "direction", "splitPercentage"}
        assert node["direction"] in ("row", "column") and 0 < node["splitPercentage"] < 100
        visit(node["first"])
        visit(node["second"])

    visit(layout["layout"])
    assert sorted(leaves) == sorted(layout["configById"])
    kinds = {name.partition("!")[0] for name in leaves}
    assert kinds == {"3D", "Image", "map", "Plot", "DiagnosticSummary", "RawMessages"}


# Name -> (type, length of a list), as robot_localization declares and documents them.
STATE = 15
EKF = {
    r"frequency|history_length|sensor_timeout|transform_timeout|transform_time_offset": (float, None),
    r"two_d_mode|publish_tf|smooth_lagged_data|print_diagnostics|permit_corrected_publication": (bool, None),
    r"map_frame|odom_frame|base_link_frame|world_frame": (str, None),
    r"(odom|pose|imu)0": (str, None),
    r"(odom|pose|imu)0_config": (bool, STATE),
    r"(odom|pose|imu)0_(differential|relative)": (bool, None),
    r"(odom|pose|imu)0_queue_size": (int, None),
    r"pose0_rejection_threshold": (float, None),
    r"(odom|imu)0_(pose|twist)_rejection_threshold": (float, None),
    r"process_noise_covariance|initial_estimate_covariance": (float, STATE),
}
NAVSAT = {
    r"frequency|delay|magnetic_declination_radians|yaw_offset": (float, None),
    r"zero_altitude|publish_filtered_gps|use_odometry_yaw|wait_for_datum|use_local_cartesian": (bool, None),
    r"datum": (float, 3),
}


def test_robot_localization_knows_the_parameters():
    """rclcpp refuses an integer for a double, and ignores what it does not know."""
    for node, values in robot_localization().items():
        known = NAVSAT if node == "navsat_transform" else EKF
        for name, value in values.items():
            kinds = [kind for pattern, kind in known.items() if re.fullmatch(pattern, name)]
            assert kinds, f"{node}: no parameter {name}"
            ((kind, length),) = kinds
            items = value if length else [value]
            assert length is None or len(items) == length, f"{node}: {name} has {len(items)} values"
            assert all(type(item) is kind for item in items), f"{node}: {name} must be of {kind.__name__}"
        for name in values:
            if re.fullmatch(r"(odom|pose|imu)\d", name):
                assert any(values[f"{name}_config"]), f"{node} uses nothing of {name}"


def test_the_filters_divide_the_tree_between_them():
    """Each frame has one parent: odom -> base_link from one filter, map -> odom from the other."""
    defaults = localizer()
    nodes = robot_localization()
    local, world = nodes["ekf_odom"], nodes["ekf_map"]
    for filter_ in (local, world):
        assert filter_["map_frame"] == defaults["map_frame"]
        assert filter_["base_link_frame"] == defaults["base_frame"]
        assert filter_["publish_tf"] is True
    assert local["world_frame"] == local["odom_frame"]
    assert world["world_frame"] == world["map_frame"]
    assert defaults["publish_tf"] == "none", "the localizer would give base_link a second parent"
    assert not any(name.startswith("pose") for name in local), "what jumps stays out of odom"


def test_only_what_the_localizer_estimates_is_fused():
    """z, roll and pitch have the variance 1e6; the heading is only repeated in the default mode."""
    assert localizer()["heading_mode"] == "known"
    world = robot_localization()["ekf_map"]
    assert [i for i, used in enumerate(world["pose0_config"]) if used] == [0, 1]
    assert not world["pose0_differential"] and not world["pose0_relative"]
    # An absolute position must not be an outlier to a filter that does not know where it is.
    assert min(world["initial_estimate_covariance"][:2]) >= 1e4
    assert world["smooth_lagged_data"] and world["history_length"] > 0


# Name -> type, as Autoware's nodes and Nav2's lifecycle manager declare them.
FOREIGN = {
    "ekf_localizer": {
        f"simple_1d_filter_parameters.{axis}_filter_proc_dev": float for axis in ("z", "roll", "pitch")
    },
    # It declares no defaults, so all must be given.
    "gnss_poser": {
        "base_frame": str,
        "gnss_base_frame": str,
        "map_frame": str,
        "use_gnss_ins_orientation": bool,
        "gnss_pose_pub_method": int,
        "buff_epoch": int,
    },
    "lifecycle_manager_localizer": {"autostart": bool, "node_names": list, "bond_timeout": float},
}


def example(name: str) -> dict[str, dict[str, Any]]:
    """Return the parameters in a file of config/ by node, nested ones as a.b."""

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    sections = yaml.safe_load((CONFIG / name).read_text())
    assert all(section.startswith("/**/") for section in sections), "under any namespace"
    return {key.removeprefix("/**/"): dict(flat(value["ros__parameters"])) for key, value in sections.items()}


def command(page: str, start: str) -> list[str]:
    """Return the words after ``start`` of the command on a page, with the folder of the files."""
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^ {{4}}{start} (.+)$", text, flags=re.MULTILINE)
    return shlex.split(line.replace("$F", str(CONFIG)))


@pytest.mark.parametrize("name", ["autoware.yaml", "nav2.yaml"])
def test_the_examples_set_legal_parameters(name):
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from xview_loc.nodes.parameters import LOCALIZER, check_choices

    nodes = example(name)
    ours = nodes.pop("localizer")
    known = {p.name: p for p in LOCALIZER}
    for parameter, value in ours.items():
        assert type(value) is type(known[parameter].default), parameter
        low, high = known[parameter].range or (value, value)
        assert low <= value <= high, parameter
    check_choices(LOCALIZER, ours)
    for node, values in nodes.items():
        assert {key: type(value) for key, value in values.items()} == FOREIGN[node]


@pytest.fixture
def tif(tmp_path: Path) -> Path:
    return write_geotiff(tmp_path / "a.tif", texture(600, 600), 48.2, 16.37, 0.25, "EPSG:32633")


def test_the_command_for_autoware_connects_the_topics(tmp_path, tif):
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from geometry_msgs.msg import TwistWithCovarianceStamped
    from ros_harness import NodeProcess, bench, pick_domain
    from sensor_msgs.msg import Image, Imu, NavSatFix

    words = command("autoware.md", "ros2 run xview_loc localizer --ros-args")
    pairs = list(zip(words[::2], words[1::2], strict=True))
    given = dict(value.split(":=") for option, value in pairs if option == "-p")
    remapped = dict(value.split(":=") for option, value in pairs if option == "-r")
    arguments = [word for option, value in pairs if option != "-p" for word in (option, value)]
    parameters = {
        **given,
        "filter": given["filter"] == "true",
        "map": str(tif),
        "model": "stub",
        "checkpoint": "",
    }
    domain = pick_domain()
    inputs = {"image": Image, "fix": NavSatFix, "heading": Imu, "odom": TwistWithCovarianceStamped}
    assert set(remapped) == {*inputs, "~/pose"}
    (poser,) = re.findall(
        r"-r fix:=(\S+)", " ".join(command("autoware.md", "ros2 run autoware_gnss_poser gnss_poser"))
    )
    node = NodeProcess(domain, tmp_path / "log", {**parameters, "torch_threads": 1}, *arguments)
    try:
        with bench(domain) as b:
            for name, kind in inputs.items():
                publisher = b.publisher(kind, remapped[name])
                b.wait(publisher.get_subscription_count, what=f"a subscription to {remapped[name]}")
            outputs = {
                remapped["~/pose"]: "geometry_msgs/msg/PoseWithCovarianceStamped",
                poser: "sensor_msgs/msg/NavSatFix",
            }
            for topic, kind in outputs.items():
                (info,) = b.wait(lambda topic=topic: b.node.get_publishers_info_by_topic(topic), what=topic)
                assert (info.node_name, info.topic_type) == ("localizer", kind)
    finally:
        assert node.stop() == 0, node.log


def test_nav2s_manager_starts_the_localizer(tmp_path, tif):
    """It configures and activates the nodes that it is given, and nothing does so before."""
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from lifecycle_msgs.msg import Transition
    from ros_harness import NodeProcess, bench, pick_domain

    (managed,) = example("nav2.yaml")["lifecycle_manager_localizer"]["node_names"]
    arguments = ["--params-file", str(CONFIG / "nav2.yaml")]
    if find_spec("tf2_msgs") is None:
        arguments += ["-p", "localizer:publish_tf:=none"]
    domain = pick_domain()
    node = NodeProcess(
        domain, tmp_path / "log", {"map": str(tif), "model": "stub", "torch_threads": 1}, *arguments
    )
    try:
        with bench(domain) as b:
            b.change_state(f"/{managed}", Transition.TRANSITION_CONFIGURE)
            b.change_state(f"/{managed}", Transition.TRANSITION_ACTIVATE)
            for topic in ("/fix", "/initialpose"):
                b.wait(lambda topic=topic: b.node.count_subscribers(topic), what=f"a subscription to {topic}")
    finally:
        assert node.stop() == 0, node.log


def test_the_launch_arguments_for_nav2_exist():
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from xview_loc.nodes import launching

    known = {"params_file", *launching.INPUTS, *launching.scalars(launching.TABLES["localizer"])}
    given = dict(word.split(":=") for word in command("nav2.md", "ros2 launch xview_loc localize.launch.py"))
    assert set(given) <= known
    assert given["params_file"] == str(CONFIG / "nav2.yaml")


def test_one_node_sends_each_transform_to_nav2():
    ours = example("nav2.yaml")["localizer"]
    local = robot_localization()["ekf_odom"]
    assert ours["publish_tf"] == "map_to_odom" and ours["filter"] is True
    assert (local["odom_frame"], local["base_link_frame"]) == (ours["odom_frame"], ours["base_frame"])
    assert example("autoware.yaml")["localizer"]["publish_tf"] == "none", (
        "ekf_localizer sends map -> base_link"
    )


def test_the_figures_of_autowares_planes():
    """The largest difference on a circle about the origin, as docs/autoware.md gives it."""
    page = " ".join((ROOT / "docs/autoware.md").read_text().split())
    here = example("autoware.yaml")["localizer"]
    lat0, lon0 = here["datum_lat"], here["datum_lon"]
    ours = LocalProjection(lat0, lon0)
    degrees = "+proj=pipeline +step +proj=unitconvert +xy_in=deg +xy_out=rad +step"
    origin = f"+ellps=WGS84 +lat_0={lat0} +lon_0={lon0}"
    scaled = Transformer.from_pipeline(f"{degrees} +proj=tmerc +k=0.9996 {origin}")
    tangent = Transformer.from_pipeline(
        f"{degrees} +proj=cart +ellps=WGS84 +step +proj=topocentric +h_0=0 {origin}"
    )
    utm = Transformer.from_crs("EPSG:4326", "EPSG:32633", always_xy=True)

    def difference(theirs: Transformer, distance: float, height: float = 0.0) -> float:
        angle = np.radians(np.arange(360))
        x, y = distance * np.cos(angle), distance * np.sin(angle)
        lat, lon = ours.inverse(x, y)
        at_origin = theirs.transform(lon0, lat0, height)
        there = theirs.transform(lon, lat, np.full(360, height))
        return float(np.hypot(there[0] - at_origin[0] - x, there[1] - at_origin[1] - y).max())

    assert f"| {difference(scaled, 1e3):.1f} m per km from the origin |" in page
    at = [difference(tangent, distance) * 1e3 for distance in (5e3, 10e3, 20e3)]
    assert "{:.0f} mm at 5 km, {:.0f} mm at 10 km, {:.0f} mm at 20 km".format(*at) in page
    assert f"{difference(tangent, 1e3, 100.0) * 1e3:.0f} mm per km for each 100 m above or below" in page
    assert f"({difference(utm, 1e3):.0f} m per km at 48.2 N, 16.37 E)" in page
