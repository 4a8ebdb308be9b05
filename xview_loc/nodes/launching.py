"""Launch descriptions of the nodes; their arguments are made from the parameter tables."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xview_loc.doctor import profile_variables
from xview_loc.errors import UserError, reason
from xview_loc.files import state_folder, write_whole
from xview_loc.nodes import parameters
from xview_loc.nodes.parameters import Parameter

TABLES = {"localizer": parameters.LOCALIZER, "pair_logger": parameters.PAIR_LOGGER}
INPUTS = ("image", "camera_info", "fix", "heading", "odom", "imu")
# The shared memory of config/fastdds.xml holds this many images of 1920 x 1080 pixels, 3 bytes each.
SHIPPED_MB, IMAGES_HELD = 32, 5
OTHERS = {
    "namespace": ("", "Namespace of the nodes."),
    "use_sim_time": ("false", "Use the time of /clock."),
    "log_level": ("info", "Least severity that is logged: debug, info, warn, error or fatal."),
    "use_respawn": ("false", "Start a node again, after 2 s, if it dies."),
    "image_size": ("", "Size of raw images, WIDTHxHEIGHT, for Fast DDS; empty: up to 1920x1080."),
}


def describe(launch_file: str, *executables: str) -> Any:
    """Return a LaunchDescription that starts the nodes, each with its parameter file and the given arguments.

    launch_file: ``__file__`` of the caller, in a folder beside ``config``.
    """
    # Imported here: only ROS distributions have them.
    from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction
    from launch_ros.actions import Node
    from launch_ros.parameter_descriptions import ParameterValue

    from launch import LaunchContext, LaunchDescription  # type: ignore[attr-defined, unused-ignore]

    config = Path(launch_file).resolve().parent.parent / "config"
    tables = {executable: scalars(TABLES[executable]) for executable in executables}
    files = {"params_file" if len(tables) == 1 else f"{name}_params_file": name for name in tables}
    arguments = {
        **{file: (str(config / f"{name}.yaml"), f"Parameters of {name}.") for file, name in files.items()},
        **{p.name: ("", describe_parameter(p)) for table in tables.values() for p in table.values()},
        **{name: (name, f"Topic of the input '{name}'.") for name in INPUTS},
        **OTHERS,
    }

    def start(context: LaunchContext) -> list[Any]:
        values = context.launch_configurations
        if started_directly(launch_file):
            check_names(values, arguments)
        sim_time, respawn = (
            convert(Parameter(name, False, ""), values[name]) for name in ("use_sim_time", "use_respawn")
        )
        env, actions = {}, []
        if not any(context.environment.get(name) for name in profile_variables()):
            profile = dds_profile(config / "fastdds.xml", values["image_size"])
            # Only for these nodes: a launch file that includes this one may set another for its own.
            (variable, *_) = profile_variables()
            env = {variable: str(profile)}
            text = f"Fast DDS profile {profile}: set {variable} to it for the camera driver too"
            actions.append(LogInfo(msg=text))
        image = values["image"]
        if values["image_transport"] == "compressed" and not image.endswith("/compressed"):
            image += "/compressed"
        topics = {**{name: values[name] for name in INPUTS}, "image": image}
        for file, executable in files.items():
            if not Path(values[file]).is_file():
                raise UserError(f"{file}: no file {values[file]!r}")
            # Only given arguments override the parameter file.
            table = tables[executable]
            given = {name: convert(p, values[name]) for name, p in table.items() if values[name]}
            given["use_sim_time"] = sim_time
            actions.append(
                Node(
                    package="xview_loc",
                    executable=executable,
                    name=executable,
                    namespace=values["namespace"],
                    output="screen",
                    parameters=[
                        values[file],
                        # Typed, or "7" would become a number.
                        {name: ParameterValue(v, value_type=type(v)) for name, v in given.items()},
                    ],
                    remappings=[(name, topic) for name, topic in topics.items() if topic != name],
                    ros_arguments=["--log-level", values["log_level"]],
                    additional_env=env,
                    respawn=respawn,
                    respawn_delay=2.0,
                )
            )
        return actions

    return LaunchDescription(
        [
            *(DeclareLaunchArgument(n, default_value=d, description=t) for n, (d, t) in arguments.items()),
            OpaqueFunction(function=start),
        ]
    )


def scalars(table: Iterable[Parameter]) -> dict[str, Parameter]:
    """Return the parameters that fit into a launch argument: all but lists."""
    return {p.name: p for p in table if not isinstance(p.default, list)}


def describe_parameter(parameter: Parameter) -> str:
    """Return the help of a parameter's argument."""
    choices = f" One of {', '.join(parameter.choices)}." if parameter.choices else ""
    return f"{parameter.description}{choices} Not given: as in the parameter file."


def convert(parameter: Parameter, text: str) -> bool | int | float | str:
    """Return an argument's text as a value of the parameter's type. Raises UserError."""
    kind = type(parameter.default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value: int | float | str = kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "an integer", float: "a number"}[kind]
        raise UserError(f"{parameter.name} is {text!r}; must be {wanted}") from None
    try:
        parameters.check_choices((parameter,), {parameter.name: value})
    except parameters.ParameterError as error:
        raise UserError(reason(error)) from None
    return value


def started_directly(launch_file: str) -> bool:
    """Return True if the command line names the file, which then gets all of its arguments.

    An included file sees the arguments of the including one too.
    """
    path = Path(launch_file)
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    return ("xview_loc", path.name) in pairs or path.resolve() in [Path(word).resolve() for word in sys.argv]


def check_names(given: Iterable[str], known: Mapping[str, Any]) -> None:
    """Raise UserError for a name that is not known, with the nearest one that is."""
    for name in given:
        # Those of ros2 launch itself are launch-prefix and the like, and these.
        if name not in {*known, "sigterm_timeout", "sigkill_timeout", "emulate_tty"} and "-" not in name:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"no argument '{name}'; did you mean '{nearest}'? --show-args lists all")


def dds_profile(shipped: Path, image_size: str) -> Path:
    """Return a Fast DDS profile whose shared memory holds images of that size. Raises UserError.

    ``shipped``, unless it is too small: then a copy with a larger segment under $ROS_HOME/xview_loc.
    """
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", image_size)
    if image_size and size is None:
        raise UserError(f"image_size is {image_size!r}; must be WIDTHxHEIGHT, for example 4096x2048")
    megabytes = math.ceil(IMAGES_HELD * 3 * int(size[1]) * int(size[2]) / 2**20) if size else 0
    if megabytes <= SHIPPED_MB:
        return shipped
    segment = f"<segment_size>{megabytes * 2**20}</segment_size>"
    text = re.sub(r"<segment_size>\d+</segment_size>", segment, shipped.read_text(encoding="utf-8"))
    folder = state_folder()
    path = folder / f"fastdds_{megabytes}mb.xml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write the Fast DDS profile: {reason(error)}") from None
    return path
