"""Client of ``xview-loc deploy``: activate a checkpoint on a running localizer, and wait for its verdict."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import rclpy
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from std_srvs.srv import Trigger

from xview_loc.errors import UserError


class DeploymentError(UserError):
    """The node did not take the checkpoint; the message is one clear line."""


def deploy(path: Path, to: str, timeout_s: float) -> str:
    """Set the parameter ``checkpoint`` of the node ``to``, and return its answer.

    The node must see the file under the same path. Raises DeploymentError if the node cannot be reached, or
    refuses the checkpoint.
    """
    rclpy.init()
    try:
        return _Deployer(to, timeout_s).run(path)
    finally:
        rclpy.try_shutdown()


class _Deployer(Node):
    def __init__(self, to: str, timeout_s: float) -> None:
        super().__init__("deploy")
        self._to = "/" + to.strip("/")
        self._end = time.monotonic() + timeout_s

    def run(self, path: Path) -> str:
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=str(path))
        request = SetParameters.Request(parameters=[Parameter(name="checkpoint", value=value)])
        (result,) = self._call(SetParameters, "set_parameters", request).results
        if not result.successful:
            raise DeploymentError(f"{self._to}: {result.reason}")
        # Answers once the change is made or refused; a checkpoint that is active is not loaded again.
        verdict = self._call(Trigger, "reload", Trigger.Request())
        if not verdict.success:
            raise DeploymentError(f"{self._to}: {verdict.message}")
        return str(verdict.message)

    def _call(self, kind: Any, service: str, request: Any) -> Any:
        client: Any = self.create_client(kind, f"{self._to}/{service}")
        if not client.wait_for_service(max(0.0, self._end - time.monotonic())):
            raise DeploymentError(
                f"no localizer answers as {self._to} ({service}): is it running, in the same ROS domain?"
            )
        call = client.call_async(request)
        rclpy.spin_until_future_complete(self, call, timeout_sec=max(0.0, self._end - time.monotonic()))
        if not call.done():
            raise DeploymentError(
                f"{self._to} has not answered {service} in time. It may still prepare the checkpoint, and "
                "will then use it: see checkpoint in /diagnostics, or call ~/rollback"
            )
        return call.result()
