"""The localizer's checkpoint: which it starts with, and its change by parameters, services, shadow trials."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import rclpy.task
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from xview_loc.errors import UserError
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.deployment_record import (
    PARAMETER,
    DeploymentRecord,
    RecordError,
    Weights,
    absolute,
    record_path,
)
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.shadow import FrameComparison
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint, load_model, shipped_checkpoint
from xview_loc.nodes import parameters
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.nodes.permissions import Permissions
from xview_loc.nodes.shadow_runner import ShadowOptions, ShadowRunner
from xview_loc.vehicle.odometry import Odometry


class Checkpoints:
    """Parameters ``checkpoint`` and ``shadow_*``, services ``~/reload`` and ``~/rollback`` of a node.

    ``swap`` and ``shadow`` exist from :meth:`open` to :meth:`close`. ``checkpoint`` names the active
    checkpoint again after every change, refused ones included.

    A change survives a restart of the node: a record of it is kept in a file (``checkpoint_persist``).
    """

    def __init__(
        self,
        node: Node,
        health: Health,
        permissions: Permissions,
        candidate_changed: Callable[[bool], object],
    ) -> None:
        """``candidate_changed`` is called with True before a shadow trial begins, with False as it ends."""
        self.swap: CheckpointSwap | None = None
        self.shadow: ShadowRunner | None = None
        self._node = node
        self._health = health
        self._permissions = permissions
        self._candidate_changed = candidate_changed
        # The checkpoint asked for last; ~/reload loads it again, also if it was refused.
        self._requested = ""
        # True while the node itself sets parameters, to what is in use already.
        self.storing = False
        # The parameters ``model`` and ``checkpoint`` as this class left them, and as the user set them last.
        self._left = self._chosen = self._asked()
        self._file = record_path(node.get_fully_qualified_name())
        self._record: DeploymentRecord | None = None
        for name, call in (("reload", self._on_reload), ("rollback", self._on_rollback)):
            # Each waits for its verdict in a group of its own: frames go on, and so does the other one.
            waiting = MutuallyExclusiveCallbackGroup()
            node.create_service(Trigger, f"~/{name}", call, callback_group=waiting)

    def load(self) -> CrossViewModel:
        """Return the model to start with.

        Its weights are those deployed last, if the user has not changed ``model`` or ``checkpoint`` since;
        otherwise those of the parameters. Raises CheckpointError, ValueError.
        """
        name, path = asked = self._asked()
        by_hand = asked != self._left
        if by_hand:
            self._chosen = asked
        log, known = self._node.get_logger(), self._saved()
        for folder in self._permissions.open_to_others():
            log.warning(f"another user can write to {folder}, and so choose the checkpoints")
        before = [] if known is None else [known.active, known.previous]
        checkpoint, weights = None, Weights("", "")
        same = known is not None and not by_hand and (known.model, known.checkpoint) == self._chosen
        if known is not None and same and known.active.by != PARAMETER:
            weights = known.active
            try:
                self._permissions.check_checkpoint(weights.path)
                checkpoint = load_checkpoint(weights.path, name or None)
                if checkpoint.sha256 != weights.sha256:
                    raise CheckpointError(f"{weights.path} is not what was deployed, its SHA-256 differs")
                log.info(f"checkpoint {weights.path}, in use before (by {weights.by})")
            except (CheckpointError, parameters.ParameterError) as error:
                checkpoint, path, before = None, self._chosen[1], [known.previous]
                text = f"{error}; the parameter's checkpoint is used instead ({path or 'none is named'})"
                log.warning(text)
                self._health.condition("checkpoint_not_restored", WARN, text)
        if checkpoint is None:
            weights = Weights(absolute(str(path or shipped_checkpoint(name) or "")), "")
            if weights.path or not self._value("allow_untrained"):
                checkpoint = load_checkpoint(weights.path, name or None) if path else load_model(name)
                weights = replace(weights, sha256=checkpoint.sha256)
                log.info(f"checkpoint {weights.path}, as the parameters say")
        previous = next((w for w in before if w and w.path and w.sha256 != weights.sha256), None)
        self._record = DeploymentRecord(*self._chosen, weights, previous)
        if checkpoint is None:
            text = f"no checkpoint: {name} runs with random weights, its poses mean nothing"
            log.warning(text)
            self._health.condition("untrained", WARN, text)
            return create_model(name)
        self._health.clear("untrained")
        if checkpoint.note:
            log.info(f"{weights.path}: {checkpoint.note}")
        return checkpoint.model

    def _asked(self) -> tuple[str, str]:
        return self._value("model"), self._value("checkpoint")

    def _saved(self) -> DeploymentRecord | None:
        self._health.clear("checkpoint_not_restored")
        try:
            return DeploymentRecord.load(self._file) if self._value("checkpoint_persist") else None
        except RecordError as error:
            self._node.get_logger().warning(str(error))
            self._health.condition("checkpoint_not_restored", WARN, str(error))
            return None

    def _changed(self, weights: Weights) -> None:
        """Record a change; called by the loading thread."""
        assert self._record is not None
        self._record = self._record.followed_by(weights)
        self._save()

    def _save(self) -> None:
        self._health.clear("checkpoint_not_saved")
        assert self._record is not None
        self._health.value("checkpoint_by", self._record.active.by)
        if not self._value("checkpoint_persist"):
            return
        try:
            self._record.save(self._file)
        except RecordError as error:
            text = f"{error}; the next start will not know of this checkpoint"
            if self._health.condition("checkpoint_not_saved", WARN, text):
                self._node.get_logger().warning(text)

    def open(
        self,
        localizer: Localizer,
        build: Callable[[CrossViewModel], Localizer],
        odometry: Odometry,
        spread_m: float,
        publish: Callable[[FrameComparison], object],
    ) -> None:
        """Serve the localizer of :meth:`load`'s model; the rest is for CheckpointSwap and ShadowRunner."""
        assert self._record is not None
        weights, previous = self._record.active, self._record.previous
        first = Deployed(localizer, weights.path, weights.sha256)
        self._requested = first.path
        self._health.value("checkpoint", first)
        self._store(checkpoint=self._chosen[1] if weights.by == PARAMETER else weights.path)
        self._save()
        self.swap = CheckpointSwap(first, build, previous, self._changed)
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

    def check(self, values: dict[str, Any]) -> None:
        """Raise ParameterError if an open localizer would be left without a checkpoint."""
        if self.swap is not None and values.get("checkpoint") == "":
            raise parameters.ParameterError("name a checkpoint's file")

    def apply(self, values: dict[str, Any]) -> None:
        """Start what changed parameters of an open localizer ask for."""
        if self.storing or self.swap is None or self.shadow is None:
            return
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

    def _store(self, **values: str) -> None:
        self.storing = True
        try:
            self._node.set_parameters([Parameter(name, value=value) for name, value in values.items()])
        finally:
            self.storing = False
        self._left = self._asked()

    async def _on_reload(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Load the checkpoint asked for last once more, for instance after its file was replaced."""
        if self.swap is None or not self._requested:
            response.message = "not configured" if self.swap is None else "no checkpoint was named"
            return response
        try:
            # A link may lead elsewhere now.
            self._permissions.check_checkpoint(self._requested)
        except parameters.ParameterError as error:
            response.message = str(error)
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
            # Called by the loading thread, or by the thread that cancels a change.
            if change.cancelled():
                tell((False, "the node is closing" if swap.closing else "another change was asked for since"))
                return
            error = change.exception()
            if error is None:
                text = f"in use: {change.result().with_note}"
                self._health.value("checkpoint", change.result())
                self._health.clear("untrained")
                self._health.clear("checkpoint_refused")
                self._health.clear("checkpoint_not_restored")
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
