"""Runs a lifecycle node as a process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn


def run(make: Callable[[], LifecycleNode], args: list[str] | None = None) -> int:
    """Run a node until it is asked to stop; return the exit code."""
    node: LifecycleNode | None = None
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.init(args=args)
        node = make()
        try:
            if (
                node.get_parameter("autostart").value
                and node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            ):
                node.trigger_activate()
            rclpy.spin(node)
        except Exception:
            # A signal in the middle of a transition shuts the context down under it.
            if rclpy.ok():
                raise
    if node is not None:
        node.destroy_node()
    rclpy.try_shutdown()
    return 0


def freeze_objects() -> None:
    """Exempt all objects made so far from garbage collection.

    Libraries and weights are 200,000 objects and more: examining them stops every thread for 0.1 s.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
