"""Starts the pair logger; ``ros2 launch xview_loc record.launch.py --show-args`` lists the arguments."""

from launch import LaunchDescription
from xview_loc.nodes.launching import describe


def generate_launch_description() -> LaunchDescription:
    return describe(__file__, "pair_logger")
