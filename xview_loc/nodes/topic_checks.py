"""Finds out why a subscription hears nothing."""

from __future__ import annotations

from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSCompatibility, qos_check_compatible


def topic_problem(node: Node, subscription: Any, optional: bool) -> str | None:
    """Return what keeps a subscription from hearing its publishers, None if nothing does.

    ``optional``: a topic without publishers is no problem.
    """
    topic = subscription.topic_name
    own = subscription.msg_type
    type_name = f"{own.__module__.split('.')[0]}/msg/{own.__name__}"
    publishers = node.get_publishers_info_by_topic(topic)
    if not publishers:
        return None if optional else f"{topic} has no publisher"
    for info in publishers:
        who = f"{info.node_namespace.rstrip('/')}/{info.node_name}"
        if info.topic_type != type_name:
            return f"{topic}: {who} publishes {info.topic_type}, {type_name} is expected"
        verdict, why = qos_check_compatible(info.qos_profile, subscription.qos_profile)
        if verdict == QoSCompatibility.ERROR:
            return f"{topic}: {who} cannot be heard, its QoS is incompatible: {' '.join(why.split())}"
    return None
