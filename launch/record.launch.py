"""Starts the pair logger; ``ros2 launch xview_loc record.launch.py --show-args`` lists the arguments."""

from pathlib import Path

from launch import LaunchDescription
from xview_loc.nodes.launching import describe

SHARE = Path(__file__).resolve().parent.parent


def generate_launch_description() -> LaunchDescription:
    return describe(
        SHARE,
        "pair_logger",
        ("image", "camera_info", "fix", "heading", "odom"),
        {"map": "Aerial map", "directory": "Folder of the recordings", "vehicle": "Name of the vehicle"},
    )
