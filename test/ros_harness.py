"""Runs a node as a process of its own, feeds it over DDS, and waits for what it publishes.

No limit below measures speed: each only ends a test that would otherwise wait for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter as RclpyParameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_srvs.srv import SetBool, Trigger

HERE = Path(__file__).parent


# Longest wait for anything: minutes of a machine that is busy with something else.
PATIENCE_S = 600.0


@cache
def pick_domain() -> int:
    """Claim ten ROS domains, for as long as this process lives, and return the first.

    A bound port marks them as taken, so that no other test process on this machine uses them.
    """
    for domain in range(1, 222, 10):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", 20_000 + domain))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return domain
    raise RuntimeError("all ROS domains are in use")


_claims: list[socket.socket] = []


def environment(domain: int) -> dict[str, str]:
    return {
        **os.environ,
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }


class NodeProcess:
    """The node under test. ``log``: its output."""

    def __init__(
        self, domain: int, log: Path, parameters: dict[str, Any], *arguments: str, module: str = ""
    ) -> None:
        """``module``: the module to run; default: the localizer with a stub of a model."""
        self._log = log
        program = ["-m", module] if module else [str(HERE / "stub_node.py")]
        if not module:
            # Stubs cannot be exported, and have no weights.
            parameters = {"backend": "torch", "allow_untrained": True, **parameters}
        command = [sys.executable, *program, "--ros-args"]
        for name, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if isinstance(value, str):
                text = f'"{value}"'
            command += ["-p", f"{name}:={text}"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                # What it remembers of its checkpoints lies beside its log.
                env={**environment(domain), "ROS_HOME": str(log.parent / "ros")},
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, sig: int = signal.SIGINT) -> int:
        """Send a signal and wait for the end; return the exit code."""
        if self.alive():
            self.process.send_signal(sig)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the node did not end on signal {sig}:\n{self.log}") from None

    def interrupt(self, signals: Iterable[int]) -> int:
        """Send one signal every 20 ms until the node has ended; return the exit code."""
        signals = cycle(signals)
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.process.send_signal(next(signals))
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(0.02)
        self.process.kill()
        raise AssertionError(f"the node did not end on signals:\n{self.log}")


class Bench:
    """The test's own node, beside the one under test."""

    def __init__(self, domain: int) -> None:
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = Node("bench", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.received: dict[str, list[Any]] = {}
        self.status: DiagnosticStatus | None = None
        self.reports = 0
        self._clients: dict[str, Any] = {}
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def publisher(self, kind: type, topic: str, reliable: bool = True) -> Any:
        policy = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        # Deep, so that a slow machine loses nothing.
        return self.node.create_publisher(kind, topic, QoSProfile(depth=1000, reliability=policy))

    def listen(self, kind: type, topic: str, qos: QoSProfile | int = 50) -> list[Any]:
        inbox = self.received[topic] = []
        self.node.create_subscription(kind, topic, inbox.append, qos)
        return inbox

    def wait(self, condition: Callable[[], Any], timeout_s: float = PATIENCE_S, what: str = "it") -> Any:
        """Spin until ``condition`` holds; return its value."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout_s} s for {what}; last diagnostics: {self.text()}")
            self.executor.spin_once(timeout_sec=0.05)
        return value

    def wait_diagnosis(self, *parts: str, timeout_s: float = PATIENCE_S) -> DiagnosticStatus:
        """Wait for a *new* report whose message holds all ``parts``."""
        seen = self.reports
        self.wait(
            lambda: self.reports > seen and all(part in self.text() for part in parts),
            timeout_s,
            f"diagnostics with {parts}",
        )
        assert self.status is not None
        return self.status

    def text(self) -> str:
        return "" if self.status is None else self.status.message

    def value(self, key: str) -> str:
        values = [] if self.status is None else self.status.values
        return {v.key: v.value for v in values}.get(key, "")

    def begin_set_parameter(self, node: str, name: str, value: Any) -> Any:
        """Ask for a parameter's change; return the future of the answer."""
        client = self._client(SetParameters, f"{node}/set_parameters")
        message = RclpyParameter(name, value=value).to_parameter_msg()
        return client.call_async(SetParameters.Request(parameters=[message]))

    def set_parameter(self, node: str, name: str, value: Any) -> str:
        """Change a parameter; return why it was refused, "" if it was not."""
        call = self.begin_set_parameter(node, name, value)
        (result,) = self.wait(call.done, what="the parameter") and call.result().results
        return "" if result.successful else result.reason

    def set_parameters(self, node: str, **texts: str) -> str:
        """Change several at once; return why they were refused, "" if they were not."""
        client = self._client(SetParametersAtomically, f"{node}/set_parameters_atomically")
        values = {
            name: ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=text)
            for name, text in texts.items()
        }
        parameters = [Parameter(name=name, value=value) for name, value in values.items()]
        call = client.call_async(SetParametersAtomically.Request(parameters=parameters))
        result = self.wait(call.done, what="the parameters") and call.result().result
        return "" if result.successful else str(result.reason)

    def change_state(self, node: str, transition: int) -> None:
        """Change the lifecycle's state."""
        request = ChangeState.Request(transition=Transition(id=transition))
        call = self._client(ChangeState, f"{node}/change_state").call_async(request)
        assert self.wait(call.done, what="the change of state") and call.result().success

    def begin_trigger(self, service: str) -> Any:
        """Call a Trigger service; return the future of its answer."""
        return self._client(Trigger, service).call_async(Trigger.Request())

    def trigger(self, service: str) -> tuple[bool, str]:
        """Call a Trigger service; return its success and message."""
        call = self.begin_trigger(service)
        self.wait(call.done, what=service)
        return call.result().success, call.result().message

    def set_bool(self, service: str, value: bool) -> tuple[bool, str]:
        """Call a SetBool service; return its success and message."""
        call = self._client(SetBool, service).call_async(SetBool.Request(data=value))
        self.wait(call.done, what=service)
        return call.result().success, call.result().message

    def _client(self, kind: type, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = self.node.create_client(kind, service)
        client = self._clients[service]
        self.wait(client.service_is_ready, what=service)
        return client

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.status = message.status[0]
        self.reports += 1


@contextmanager
def bench(domain: int) -> Iterator[Bench]:
    b = Bench(domain)
    try:
        yield b
    finally:
        b.close()
