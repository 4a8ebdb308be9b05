"""Takes from rclpy what Humble's lacks. Python imports this module at its start if the folder is on the path.

The differences of the public methods and their parameters between rclpy's branch humble (3.3) and 9.1.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import rclpy
from rclpy.client import Client
from rclpy.executors import Executor
from rclpy.node import Node
from rclpy.service import Service
from rclpy.subscription import Subscription
from rclpy.task import Future

MISSING: dict[type, tuple[str, ...]] = {
    Node: (
        "add_post_set_parameters_callback",
        "add_pre_set_parameters_callback",
        "count_clients",
        "count_services",
        "get_fully_qualified_node_names",
        "list_parameters",
        "wait_for_node",
    ),
    Executor: ("create_future",),
    Future: ("remove_done_callback",),
    Subscription: ("get_publisher_count", "set_content_filter"),
    Client: ("configure_introspection", "service_name"),
    Service: ("configure_introspection", "service_name"),
}
MISSING_PARAMETERS = {
    "create_timer": ("autostart",),
    "create_subscription": ("content_filter_options",),
    "__init__": ("enable_logger_service", "rosout_qos_profile"),
}


def without(method: Any, parameters: tuple[str, ...]) -> Any:
    """A method that refuses the parameters as Python does."""

    @functools.wraps(method)
    def older(*args: Any, **kwargs: Any) -> Any:
        for name in parameters:
            # rclpy itself passes them on.
            if name in kwargs and "/rclpy/" not in inspect.stack()[1].filename:
                raise TypeError(f"{method.__name__}() got an unexpected keyword argument '{name}'")
        return method(*args, **kwargs)

    return older


def init(*args: Any, **kwargs: Any) -> None:
    """No context manager."""
    newer_init(*args, **kwargs)


for kind, names in MISSING.items():
    for name in names:
        if name in vars(kind):
            delattr(kind, name)
for name, parameters in MISSING_PARAMETERS.items():
    setattr(Node, name, without(getattr(Node, name), parameters))
newer_init, rclpy.init = rclpy.init, init
print("rclpy as of Humble", file=sys.stderr)
