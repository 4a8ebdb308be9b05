"""Runs a node as a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(make: Callable[[], LifecycleNode], args: list[str] | None = None) -> int:
    """Run a node until SIGINT or SIGTERM; return the exit code. Further signals do not disturb its end."""
    asked = interruptible = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        asked, first = True, not asked
        if first and interruptible:
            raise KeyboardInterrupt

    for number in END_SIGNALS:
        signal.signal(number, on_signal)
    node: LifecycleNode | None = None
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        try:
            # Adds handlers that shut the context down, which ends all below but the configuring.
            rclpy.init(args=args)
            node = make()
            if node.get_parameter("autostart").value:
                interruptible = True
                configured = node.trigger_configure()
                interruptible = False
                if configured == TransitionCallbackReturn.SUCCESS:
                    node.trigger_activate()
            if not asked:
                rclpy.spin(node)
        except Exception:
            # A signal in the middle of anything shuts the context down under it.
            if not asked and rclpy.ok():
                raise
    if node is not None:
        node.destroy_node()
    rclpy.try_shutdown()
    for number in END_SIGNALS:
        # Also while Python ends.
        signal.signal(number, signal.SIG_IGN)
    return 0
