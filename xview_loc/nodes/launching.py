"""Launch description shared by the launch files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from xview_loc.doctor import PROFILE_VARIABLES


def describe(share: Path, executable: str, inputs: tuple[str, ...], overrides: dict[str, str]) -> Any:
    """Return a LaunchDescription that starts one of the nodes with its parameter file in ``share``.

    inputs: topics that can be remapped. overrides: parameters that have a launch argument, with its
    description.
    """
    # Imported here: only ROS distributions have them.
    from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
    from launch.substitutions import LaunchConfiguration
    from launch_ros.actions import Node

    from launch import LaunchContext, LaunchDescription  # type: ignore[attr-defined, unused-ignore]

    def start(context: LaunchContext) -> list[Any]:
        def value(name: str) -> str:
            return str(LaunchConfiguration(name).perform(context))

        # Only given arguments override the parameter file.
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
        ("params_file", str(share / "config" / f"{executable}.yaml"), "Parameter file."),
        *((name, "", f"{text}; empty: as in the parameter file.") for name, text in overrides.items()),
        ("namespace", "", "Namespace of the node."),
        ("use_sim_time", "false", "Use the time of /clock."),
        *((name, name, f"Topic of the input '{name}'.") for name in inputs),
    ]
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(n, default_value=d, description=t) for n, d, t in arguments),
            OpaqueFunction(function=start),
        ]
    )
