"""Subscribes to a vehicle's inputs, each with the type that is published."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import rclpy
from rclpy.clock import Clock
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from rclpy.serialization import deserialize_message

from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.nodes.optional import create_subscription
from xview_loc.vehicle.input_types import AUTO, INPUT_TYPES
from xview_loc.vehicle.synchronisation import RejectedInput

# How often publishers are looked for until every input has its type.
SEARCH_S = 0.2
_TYPES = {**INPUT_TYPES, "imu": {"imu": "sensor_msgs/msg/Imu"}}


class Input(NamedTuple):
    """An input: its topic's name, whose last part is one of :data:`INPUT_TYPES`, or imu.

    choice: the name of its type, or AUTO: as published. raw: the callback takes CDR bytes. optional: it need
    not be published. lost: called with a number of messages that DDS lost. or_topic: listened to instead
    while it is published and the input's own is not.
    """

    name: str
    callback: Callable[[Any], None]
    choice: str = AUTO
    raw: bool = False
    optional: bool = False
    lost: Callable[[int], None] | None = None
    or_topic: str = ""

    @property
    def types(self) -> list[str]:
        """The types that it may have, preferred first."""
        types = _TYPES[self.name.rpartition("/")[2]]
        return list(types.values()) if self.choice == AUTO else [types[self.choice]]


class Inputs:
    """The inputs of an active node. For the executor's thread.

    clock: for the timer that looks for publishers. refuse: called with an input's name and the error that its
    callback raised.
    """

    def __init__(
        self,
        node: LifecycleNode,
        clock: Clock,
        health: Health,
        qos: QoSProfile,
        refuse: Callable[[str, RejectedInput], None],
    ) -> None:
        self._node, self._health, self._qos, self._refuse = node, health, qos, refuse
        self._inputs: dict[str, Input] = {}
        self._subscriptions: dict[str, Any] = {}
        self._types: dict[str, str] = {}
        self._topics: dict[str, str] = {}
        self._search = node.create_timer(SEARCH_S, self._subscribe, clock=clock)

    def __contains__(self, name: str) -> bool:
        return name in self._inputs

    def type_of(self, name: str) -> str:
        """Return the type that an input is subscribed to with, such as sensor_msgs/msg/Image."""
        return self._types[name]

    def listen(self, wanted: Input) -> None:
        """Subscribe to an input, as soon as its type is known."""
        self._inputs[wanted.name] = wanted
        self._search.reset()
        self._subscribe()

    def unlisten(self, name: str) -> None:
        """End an input, and clear its conditions."""
        del self._inputs[name]
        if name in self._subscriptions:
            self._node.destroy_subscription(self._subscriptions.pop(name))
            del self._types[name], self._topics[name]
        self._health.clear(name)
        self._health.clear(f"{name}_topic")

    def close(self) -> None:
        """End all inputs."""
        self._node.destroy_timer(self._search)
        for name in list(self._inputs):
            self.unlisten(name)

    def check_publishers(self) -> None:
        """Follow changes of the published types, and show what keeps an input from its publishers."""
        self._subscribe()
        for name, wanted in self._inputs.items():
            problem = self._problem(wanted)
            if problem is None:
                self._health.clear(f"{name}_topic")
            elif self._health.condition(f"{name}_topic", WARN, problem):
                self._node.get_logger().warning(problem)

    def _subscribe(self) -> None:
        """Subscribe to inputs without a subscription, and again to those that are published otherwise now."""
        for name, wanted in self._inputs.items():
            types, topic = wanted.types, self._topic(wanted)
            same = topic == self._topics.get(name)
            if len(types) > 1:
                published = {info.topic_type for info in self._publishers(topic)}
                if same and self._types.get(name) in published:
                    continue
                types = [kind for kind in types if kind in published]
            if types and not (same and types[0] == self._types.get(name)):
                if name in self._subscriptions:
                    self._node.destroy_subscription(self._subscriptions[name])
                kind = message_class(types[0])
                call = self._guarded(wanted, kind)
                # Raw: what rclpy cannot deserialize, it drops without a word.
                self._subscriptions[name] = create_subscription(
                    self._node, wanted.lost, kind, topic, call, self._qos, raw=True
                )
                self._types[name], self._topics[name] = types[0], topic
        if self._types.keys() == self._inputs.keys():
            self._search.cancel()

    def _topic(self, wanted: Input) -> str:
        other = wanted.or_topic and not self._publishers(wanted.name) and self._publishers(wanted.or_topic)
        return wanted.or_topic if other else wanted.name

    def _publishers(self, topic: str) -> list[Any]:
        return list(self._node.get_publishers_info_by_topic(topic))

    def _guarded(self, wanted: Input, kind: Any) -> Callable[[bytes], None]:
        """Wrap a callback so that every message counts, and none can end the node."""

        def guarded(data: bytes) -> None:
            self._health.count(f"{wanted.name}_received")
            try:
                wanted.callback(data if wanted.raw else read_message(data, kind))
            except RejectedInput as error:
                self._refuse(wanted.name, error)
            except Exception as error:
                if rclpy.ok():
                    self._refuse(wanted.name, RejectedInput("damaged", f"{type(error).__name__}: {error}"))

        return guarded

    def _problem(self, wanted: Input) -> str | None:
        """Return what keeps an input from hearing its publishers."""
        topic = self._topic(wanted)
        topic, publishers = self._node.resolve_topic_name(topic), self._publishers(topic)
        if not publishers:
            return None if wanted.optional else f"{topic} has no publisher"
        expected = self._types.get(wanted.name) or " or ".join(wanted.types)
        for info in publishers:
            who = f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            if info.topic_type != expected:
                return f"{topic}: {who} publishes {info.topic_type}, {expected} is expected"
            verdict, why = qos_check_compatible(info.qos_profile, self._qos)
            if verdict == QoSCompatibility.ERROR:
                return f"{topic}: {who} cannot be heard, its QoS is incompatible: {' '.join(why.split())}"
        return None


def read_message(data: bytes, kind: Any) -> Any:
    """Return rclpy's message of CDR bytes. Raises RejectedInput ("damaged")."""
    try:
        return deserialize_message(data, kind)
    except Exception:  # of the middleware's own kind
        raise RejectedInput("damaged", f"its {len(data)} bytes are no {kind.__name__}") from None


def message_class(kind: str) -> Any:
    """Return rclpy's class of a message type such as sensor_msgs/msg/Image."""
    package, _, name = kind.split("/")
    return getattr(import_module(f"{package}.msg"), name)
