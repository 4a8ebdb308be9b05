"""Launch files: what their arguments become, and with what they start the nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from xview_loc.errors import UserError
from xview_loc.nodes import launching
from xview_loc.nodes.parameters import LOCALIZER, PAIR_LOGGER, Parameter

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "config" / "fastdds.xml"
FILES = {"localize": ["localizer"], "record": ["pair_logger"], "bringup": ["localizer", "pair_logger"]}
# In the place of both executables: writes what it was started with.
DUMP = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
files = [pathlib.Path(b).read_text() for a, b in zip(words, words[1:]) if a == "--params-file"]
name = pathlib.Path(sys.argv[0]).name
out = pathlib.Path({folder!r}, name + ".part")
out.write_text(json.dumps({{"words": words, "files": files, "env": dict(os.environ)}}))
out.rename(out.with_suffix(".json"))
"""
LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *arguments = sys.argv[1:]
service = LaunchService()
source = PythonLaunchDescriptionSource(file)
pairs = [tuple(argument.split(":=", 1)) for argument in arguments]
service.include_launch_description(IncludeLaunchDescription(source, launch_arguments=pairs))
sys.exit(service.run())
"""


def parameter(name: str) -> Parameter:
    (found,) = (p for p in LOCALIZER if p.name == name)
    return found


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("filter", "true", True),
        ("filter", "True", True),
        ("filter", "0", False),
        ("qos_depth", "7", 7),
        ("search_radius_m", "7", 7.0),
        ("search_radius_m", "-1e0", -1.0),
        ("vehicle", "7", "7"),
        ("heading_mode", "prior", "prior"),
    ],
)
def test_a_text_becomes_a_value_of_the_parameters_type(name: str, text: str, value: Any) -> None:
    p = Parameter(name, "", "") if name == "vehicle" else parameter(name)
    converted = launching.convert(p, text)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("filter", "maybe", "filter is 'maybe'; must be true or false"),
        ("qos_depth", "1.5", "qos_depth is '1.5'; must be an integer"),
        ("search_radius_m", "far", "search_radius_m is 'far'; must be a number"),
        ("heading_mode", "knwon", "heading_mode is 'knwon'; choose from known, prior, unknown"),
    ],
)
def test_a_text_of_another_type_is_refused(name: str, text: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        launching.convert(parameter(name), text)


def test_an_unknown_argument_names_the_nearest_one() -> None:
    known = {"checkpoint": None, "map": None}
    launching.check_names(["map", "launch-prefix", "sigkill_timeout"], known)
    with pytest.raises(UserError, match="no argument 'chekpoint'; did you mean 'checkpoint'"):
        launching.check_names(["map", "chekpoint"], known)


@pytest.mark.parametrize("table", [LOCALIZER, PAIR_LOGGER])
def test_every_parameter_but_lists_is_an_argument_that_says_what_it_is(table: tuple[Parameter, ...]) -> None:
    arguments = launching.scalars(table)
    assert [p.name for p in table if p.name not in arguments] == [
        p.name for p in table if isinstance(p.default, list)
    ]
    for p in arguments.values():
        text = launching.describe_parameter(p)
        assert text.startswith(p.description) and all(choice in text for choice in p.choices)


def test_a_file_that_is_included_is_not_started_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(ROOT / "launch" / "localize.launch.py")
    for words, direct in [
        (["launch", "xview_loc", "localize.launch.py", "map:=a.tif"], True),
        (["launch", file], True),
        (["launch", os.path.relpath(file)], True),
        (["launch", "xview_loc", "record.launch.py"], False),
        (["launch", "vehicle", "localize.launch.py"], False),
        (["launch", "vehicle.launch.py"], False),
    ]:
        monkeypatch.setattr(sys, "argv", ["ros2", *words])
        assert launching.started_directly(file) == direct, words


def test_the_profile_has_room_for_images_of_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_HOME", str(tmp_path / "ros"))
    for size in ("", "640x480", "1920x1080"):
        assert launching.dds_profile(SHIPPED, size) == SHIPPED
    profile = launching.dds_profile(SHIPPED, "4096x2048")
    assert profile.is_relative_to(tmp_path)
    (segment,) = re.findall(r"<segment_size>(\d+)</segment_size>", profile.read_text())
    assert int(segment) >= 5 * 3 * 4096 * 2048
    # Nothing else is changed.
    shipped = SHIPPED.read_text()
    (own,) = re.findall(r"<segment_size>(\d+)</segment_size>", shipped)
    assert profile.read_text().replace(segment, own) == shipped
    for wrong in ("4096", "4096x0", "4096 x 2048", "wide"):
        with pytest.raises(UserError, match=f"image_size is '{wrong}'; must be WIDTHxHEIGHT"):
            launching.dds_profile(SHIPPED, wrong)


def test_a_profile_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROS_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the Fast DDS profile"):
        launching.dds_profile(SHIPPED, "4096x2048")


class Launched:
    """A launch file that was run to its end, with a stand-in for each executable."""

    def __init__(self, folder: Path, file: str, *arguments: str, **environment: str) -> None:
        index = folder / "share/ament_index/resource_index/packages"
        programs = folder / "lib/xview_loc"
        for new in (index, programs):
            new.mkdir(parents=True, exist_ok=True)
        (index / "xview_loc").touch()
        for name in ("localizer", "pair_logger"):
            program = programs / name
            program.write_text(DUMP.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)
        prefixes = [str(folder), *filter(None, [os.environ.get("AMENT_PREFIX_PATH")])]
        variables = {k: v for k, v in os.environ.items() if not k.endswith("_DEFAULT_PROFILES_FILE")}
        run = subprocess.run(
            [sys.executable, "-c", LAUNCH, str(ROOT / "launch" / f"{file}.launch.py"), *arguments],
            capture_output=True,
            text=True,
            env={
                **variables,
                "AMENT_PREFIX_PATH": os.pathsep.join(prefixes),
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "ROS_LOG_DIR": str(folder / "log"),
                "ROS_DISTRO": "kilted",
                **environment,
            },
        )
        self.code, self.output = run.returncode, run.stdout + run.stderr
        self.nodes = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

    def remappings(self, node: str) -> set[str]:
        words = self.nodes[node]["words"]
        return {b for a, b in pairwise(words) if a == "-r"} - {"__ns:=/"}

    def given(self, node: str) -> dict[str, str]:
        """The parameters that override the file, as YAML."""
        _, *own = self.nodes[node]["files"]
        return dict(re.findall(r"^ +(\w+): (.+)$", "\n".join(own), re.MULTILINE))


@pytest.fixture
def launch_ros() -> None:
    pytest.importorskip("launch_ros", reason="launch_ros is not installed")


@pytest.mark.usefixtures("launch_ros")
@pytest.mark.parametrize("file", FILES)
def test_nodes_start_with_their_files_and_nothing_else(file: str, tmp_path: Path) -> None:
    launched = Launched(tmp_path, file)
    assert launched.code == 0, launched.output
    assert sorted(launched.nodes) == FILES[file]
    for name, started in launched.nodes.items():
        assert started["files"][0] == (ROOT / "config" / f"{name}.yaml").read_text()
        assert launched.given(name) == {"use_sim_time": "false"}
        assert launched.remappings(name) == {f"__node:={name}"}
        assert started["env"]["FASTDDS_DEFAULT_PROFILES_FILE"] == str(SHIPPED)
        assert "FASTRTPS_DEFAULT_PROFILES_FILE" not in started["env"]
    assert "camera driver too" in launched.output


@pytest.mark.usefixtures("launch_ros")
def test_arguments_reach_the_nodes_that_have_them(tmp_path: Path) -> None:
    launched = Launched(
        tmp_path,
        "bringup",
        "map:=/maps/7",
        "vehicle:=7",
        "filter:=true",
        "antenna_x:=2",
        "namespace:=car",
        "image:=/camera/image_raw",
        "image_transport:=compressed",
        "fix:=/gnss/fix",
        "log_level:=debug",
        "use_sim_time:=true",
    )
    assert launched.code == 0, launched.output
    both = {"map": "/maps/7", "antenna_x": "2.0", "image_transport": "compressed", "use_sim_time": "true"}
    assert launched.given("localizer") == {**both, "filter": "true"}
    assert launched.given("pair_logger") == {**both, "vehicle": "'7'"}
    topics = {"image:=/camera/image_raw/compressed", "fix:=/gnss/fix"}
    for name, started in launched.nodes.items():
        assert launched.remappings(name) == {*topics, f"__node:={name}", "__ns:=/car"}
        words = started["words"]
        assert words[words.index("--log-level") + 1] == "debug"


@pytest.mark.usefixtures("launch_ros")
def test_a_profile_of_ones_own_stays_and_another_is_named_as_the_distribution_does(tmp_path: Path) -> None:
    own = Launched(tmp_path / "own", "record", FASTDDS_DEFAULT_PROFILES_FILE="/mine.xml")
    assert own.nodes["pair_logger"]["env"]["FASTDDS_DEFAULT_PROFILES_FILE"] == "/mine.xml"
    assert "camera driver too" not in own.output
    old = Launched(tmp_path / "old", "record", ROS_DISTRO="jazzy")
    assert old.nodes["pair_logger"]["env"]["FASTRTPS_DEFAULT_PROFILES_FILE"] == str(SHIPPED)
    assert "set FASTRTPS_DEFAULT_PROFILES_FILE to it" in old.output


@pytest.mark.usefixtures("launch_ros")
@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("chekpoint:=a.pt", "no argument 'chekpoint'; did you mean 'checkpoint'?"),
        ("params_file:=/none.yaml", "params_file: no file '/none.yaml'"),
        ("filter:=maybe", "filter is 'maybe'; must be true or false"),
        ("use_sim_time:=2", "use_sim_time is '2'; must be true or false"),
        ("image_size:=12", "image_size is '12'; must be WIDTHxHEIGHT"),
    ],
)
def test_a_wrong_argument_starts_nothing(argument: str, says: str, tmp_path: Path) -> None:
    launched = Launched(tmp_path, "localize", argument)
    assert launched.code == 1 and says in launched.output
    assert not launched.nodes and "Traceback" not in launched.output
