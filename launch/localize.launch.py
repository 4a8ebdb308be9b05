"""Starts the localizer; ``ros2 launch xview_loc localize.launch.py --show-args`` lists the arguments."""

from pathlib import Path

from launch import LaunchDescription
from xview_loc.nodes.launching import describe

SHARE = Path(__file__).resolve().parent.parent


def generate_launch_description() -> LaunchDescription:
    return describe(
        SHARE,
        "localizer",
        ("image", "camera_info", "fix", "heading", "odom"),
        {"map": "Aerial map", "checkpoint": "File of weights", "model": "Name of the model"},
    )
