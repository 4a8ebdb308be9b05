"""Change the localizer's checkpoint while it runs: parameters, services, and the shadow trial."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import rclpy.task
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from xview_loc.errors import UserError
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.shadow import FrameComparison
from xview_loc.models.base import CrossViewModel
from xview_loc.nodes import parameters
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.nodes.shadow_runner import ShadowOptions, ShadowRunner
from xview_loc.vehicle.odometry import Odometry


class Checkpoints:
    """Parameters ``checkpoint`` and ``shadow_*``, services ``~/reload`` and ``~/rollback`` of a node.

    ``swap`` and ``shadow`` exist from :meth:`open` to :meth:`close`. Afterwards and before, parameters are
    only stored. ``checkpoint`` names the active checkpoint again after every change, refused ones included.
    """

    def __init__(self, node: Node, health: Health, candidate_changed: Callable[[bool], object]) -> None:
        """``candidate_changed`` is called with True before a shadow trial begins, with False as it ends."""
        self.swap: CheckpointSwap | None = None
        self.shadow: ShadowRunner | None = None
        self._node = node
        self._health = health
        self._candidate_changed = candidate_changed
        # The checkpoint asked for last; ~/reload loads it again, also if it was refused.
        self._requested = ""
        self._storing = False
        node.add_on_set_parameters_callback(self._on_parameters)
        # A service waits for its verdict in a group of its own, so that frames go on meanwhile.
        waiting = MutuallyExclusiveCallbackGroup()
        for name, call in (("reload", self._on_reload), ("rollback", self._on_rollback)):
            node.create_service(Trigger, f"~/{name}", call, callback_group=waiting)

    def open(
        self,
        first: Deployed,
        build: Callable[[CrossViewModel], Localizer],
        odometry: Odometry,
        spread_m: float,
        publish: Callable[[FrameComparison], object],
    ) -> None:
        """Serve ``first``; the other arguments are those of CheckpointSwap and ShadowRunner."""
        self._requested = first.path
        self._health.value("checkpoint", first)
        self.swap = CheckpointSwap(first, build)
        self.shadow = ShadowRunner(
            self.swap,
            odometry,
            spread_m,
            self._shadow_options,
            self._health,
            self._node.get_logger(),
            publish,
            self._promote,
        )
        if candidate := self._value("shadow_checkpoint"):
            self.shadow.start(Path(candidate))

    def close(self) -> None:
        """End the trial and abandon the change under way."""
        if self.shadow is not None:
            self.shadow.stop()
        if self.swap is not None:
            self.swap.close()
        self.swap = self.shadow = None

    def _value(self, name: str) -> Any:
        return self._node.get_parameter(name).value

    def _shadow_options(self) -> ShadowOptions:
        promote = self._value("shadow_policy") == "promote"
        return ShadowOptions(self._value("shadow_every"), self._value("shadow_frames"), promote)

    def _on_parameters(self, changes: list[Any]) -> SetParametersResult:
        """Start what the changes ask for, or refuse all of them."""
        if self._storing:
            return SetParametersResult(successful=True)
        values = {change.name: change.value for change in changes}
        try:
            parameters.check_choices(parameters.LOCALIZER, values)
        except parameters.ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self.swap is None or self.shadow is None:
            return SetParametersResult(successful=True)
        if values.get("checkpoint") == "":
            return SetParametersResult(successful=False, reason="name a checkpoint's file")
        if "checkpoint" in values:
            self._requested = values["checkpoint"]
            self._follow(self.swap.load(Path(self._requested)))
        if "shadow_checkpoint" in values:
            candidate = values["shadow_checkpoint"]
            self._candidate_changed(bool(candidate))
            if candidate:
                self.shadow.start(Path(candidate))
            else:
                self.shadow.stop()
        return SetParametersResult(successful=True)

    def _store(self, **values: str) -> None:
        self._storing = True
        try:
            self._node.set_parameters([Parameter(name, value=value) for name, value in values.items()])
        finally:
            self._storing = False

    async def _on_reload(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Load the checkpoint asked for last once more, for instance after its file was replaced."""
        if self.swap is None or not self._requested:
            response.message = "not configured" if self.swap is None else "no checkpoint was named"
            return response
        return await self._verdict(self.swap.load(Path(self._requested)), response)

    async def _on_rollback(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self.swap is None:
            response.message = "not configured"
            return response
        response = await self._verdict(self.swap.rollback(), response)
        if response.success:
            self._requested = self.swap.active.path
        return response

    async def _verdict(self, change: Future[Deployed], response: Trigger.Response) -> Trigger.Response:
        done: Any = rclpy.task.Future(executor=self._node.executor)
        self._follow(change, done.set_result)
        response.success, response.message = await done
        return response

    def _promote(self, change: Future[Deployed]) -> None:
        """Let the candidate become the checkpoint, and the trial end."""

        def ended() -> None:
            self._requested = change.result().path
            self._store(shadow_checkpoint="")
            self._candidate_changed(False)

        self._follow(change, lambda verdict: self._in_executor(ended) if verdict[0] else None)

    def _follow(
        self,
        change: Future[Deployed],
        tell: Callable[[tuple[bool, str]], object] = lambda verdict: None,
    ) -> None:
        """Report the outcome of a change in /diagnostics, in the log and to ``tell`` as (success, text)."""
        swap = self.swap
        assert swap is not None

        def ended(change: Future[Deployed]) -> None:
            # Called by the loading thread.
            if change.cancelled():
                tell((False, "the node is closing"))
                return
            error = change.exception()
            if error is None:
                text = f"in use: {change.result().with_note}"
                self._health.value("checkpoint", change.result())
                self._health.clear("untrained")
                self._health.clear("checkpoint_refused")
                self._node.get_logger().info(text)
            else:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._health.condition("checkpoint_refused", WARN, text)
                self._node.get_logger().warning(text)
            self._in_executor(lambda: self._store(checkpoint=swap.active.path))
            tell((error is None, text))

        change.add_done_callback(ended)

    def _in_executor(self, task: Callable[[], None]) -> None:
        """Run a task in the executor's thread, which owns parameters and subscriptions."""
        if self._node.executor is not None:
            self._node.executor.create_task(task)
