"""Starts localizer and pair logger, for example beside a robot_localization of your own.

An argument goes to both nodes if both have the parameter.
"""

from launch import LaunchDescription
from xview_loc.nodes.launching import describe


def generate_launch_description() -> LaunchDescription:
    return describe(__file__, "localizer", "pair_logger")
