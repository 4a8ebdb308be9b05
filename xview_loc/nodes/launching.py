"""What the launch files share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from xview_loc.doctor import PROFILE_VARIABLES


def describe(share: Path, executable: str, inputs: tuple[str, ...], overrides: dict[str, str]) -> Any:
    """A LaunchDescription that starts one of the nodes with its parameters' file in ``share``.

    ``inputs`` are the topics that can be remapped, ``overrides`` the parameters that have an argument of
    their own, with the argument's description.
    """
    # Here, because a vehicle has them from its ROS distribution alone.
    from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
    from launch.substitutions import LaunchConfiguration
    from launch_ros.actions import Node

    from launch import LaunchContext, LaunchDescription  # type: ignore[attr-defined, unused-ignore]

    def start(context: LaunchContext) -> list[Any]:
        def value(name: str) -> str:
            return str(LaunchConfiguration(name).perform(context))

        # Only what was given: everything else stays as the parameters' file says.
        given: dict[str, Any] = {name: value(name) for name in overrides if value(name)}
        given["use_sim_time"] = value("use_sim_time").lower() in ("true", "1")
        actions: list[Any] = []
        if not any(name in os.environ for name in PROFILE_VARIABLES):
            profile = str(share / "config" / "fastdds.xml")
            actions += [SetEnvironmentVariable(name, profile) for name in PROFILE_VARIABLES]
        actions.append(
            Node(
                package="xview_loc",
                executable=executable,
                name=executable,
                namespace=value("namespace"),
                output="screen",
                parameters=[value("params_file"), given],
                remappings=[(name, value(name)) for name in inputs if value(name) != name],
            )
        )
        return actions

    arguments = [
        ("params_file", str(share / "config" / f"{executable}.yaml"), "Parameters' file."),
        *((name, "", f"{text}; empty: the parameters' file.") for name, text in overrides.items()),
        ("namespace", "", "The node's namespace."),
        ("use_sim_time", "false", "Take the time from /clock."),
        *((name, name, f"Topic of the input '{name}'.") for name in inputs),
    ]
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(n, default_value=d, description=t) for n, d, t in arguments),
            OpaqueFunction(function=start),
        ]
    )
