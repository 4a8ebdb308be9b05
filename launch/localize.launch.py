"""Starts the localizer; ``ros2 launch xview_loc localize.launch.py --show-args`` lists the arguments."""

import os

from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription

SHARE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INPUTS = ("image", "camera_info", "fix", "heading")
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


def start(context: LaunchContext) -> list:
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    # Only what was given: everything else stays as the parameters' file says.
    overrides: dict = {name: value(name) for name in ("map", "checkpoint", "model") if value(name)}
    overrides["use_sim_time"] = value("use_sim_time").lower() in ("true", "1")
    actions: list = []
    if not any(name in os.environ for name in PROFILE_VARIABLES):
        profile = os.path.join(SHARE, "config", "fastdds.xml")
        actions += [SetEnvironmentVariable(name, profile) for name in PROFILE_VARIABLES]
    actions.append(
        Node(
            package="xview_loc",
            executable="localizer",
            name="localizer",
            namespace=value("namespace"),
            output="screen",
            parameters=[value("params_file"), overrides],
            remappings=[(name, value(name)) for name in INPUTS if value(name) != name],
        )
    )
    return actions


def generate_launch_description() -> LaunchDescription:
    default_params = os.path.join(SHARE, "config", "localizer.yaml")
    arguments = [
        ("params_file", default_params, "Parameters' file."),
        ("map", "", "Aerial map; empty: the parameters' file."),
        ("checkpoint", "", "Weights; empty: the parameters' file."),
        ("model", "", "Model's name; empty: the parameters' file."),
        ("namespace", "", "The node's namespace."),
        ("use_sim_time", "false", "Take the time from /clock."),
        *((name, name, f"Topic of the input '{name}'.") for name in INPUTS),
    ]
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(n, default_value=d, description=t) for n, d, t in arguments),
            OpaqueFunction(function=start),
        ]
    )
