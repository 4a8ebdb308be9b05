"""Lifecycle callbacks that fail in one clear line. rclpy swallows their exceptions and logs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from xview_loc.errors import UserError, reason
from xview_loc.nodes.diagnostics import ERROR

# A callback of a node that has a Health named ``_health``.
Callback = Callable[[Any, LifecycleState], TransitionCallbackReturn]


def transition(verb: str, condition: str) -> Callable[[Callback], Callback]:
    """Let a callback that raises return FAILURE, log "cannot VERB: why", and set ``condition``.

    The condition is cleared when the callback succeeds.
    """

    def decorate(callback: Callback) -> Callback:
        @wraps(callback)
        def guarded(node: Any, state: LifecycleState) -> TransitionCallbackReturn:
            try:
                result = callback(node, state)
            except Exception as error:
                text = reason(error)
                if not isinstance(error, (UserError, ValueError, OSError)):
                    text = f"{type(error).__name__}: {text}"
                node.get_logger().error(f"cannot {verb}: {text}")
                node._health.condition(condition, ERROR, text)
                return TransitionCallbackReturn.FAILURE
            node._health.clear(condition)
            return result

        return guarded

    return decorate
