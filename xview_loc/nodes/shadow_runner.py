"""Runs a candidate checkpoint beside the one in use, on some of the frames, and reports on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from xview_loc.errors import reason
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.localizer import Observation, PoseEstimate
from xview_loc.estimation.shadow import FrameComparison, ShadowTrial
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

FIGURES = tuple(f.name for f in fields(FrameComparison))
# Of the latest frame that could not be compared.
FAULT_SHOWN_S = 10.0


@dataclass(frozen=True)
class ShadowOptions:
    """Compare on every ``every``-th frame, ``frames`` times; then promote a better candidate or not."""

    every: int
    frames: int
    promote: bool


class ShadowRunner:
    """One trial at a time, guarded by a lock together with what is said about it.

    The executor's thread starts and stops it, the loading one brings the candidate, the worker's the frames.
    """

    def __init__(
        self,
        swap: CheckpointSwap,
        odometry: Odometry,
        spread_m: float,
        options: Callable[[], ShadowOptions],
        health: Health,
        log: Any,
        publish: Callable[[FrameComparison], object],
        promote: Callable[[Future[Deployed]], object],
    ) -> None:
        """``spread_m``: how far coarse places are displaced, see :class:`ShadowTrial`. ``options`` are asked
        for when a trial begins and when it ends. ``publish`` is told each comparison, ``promote`` the change
        of checkpoint that ends a trial."""
        self._swap = swap
        self._odometry = odometry
        self._spread_m = spread_m
        self._options = options
        self._health = health
        self._log = log
        self._publish = publish
        self._promote = promote
        self._lock = threading.Lock()
        self._wanted: Future[Deployed] | None = None
        self._trial: ShadowTrial | None = None

    def start(self, path: Path) -> None:
        """Begin a trial of the checkpoint at ``path`` once it is verified, instead of the one there is."""
        self.stop()
        with self._lock:
            candidate = self._wanted = self._swap.prepare(path)
            self._health.value("shadow", f"verifying {path}")
        candidate.add_done_callback(self._verified)

    def stop(self) -> None:
        """End the trial, and forget what was said about it."""
        with self._lock:
            self._wanted = self._trial = None
            self._health.forget("shadow")

    def saw(
        self,
        observation: Observation,
        fix: GnssFix | None,
        heading: HeadingSample | None,
        mounting: Mounting,
    ) -> None:
        """A frame that the checkpoint in use has localised. Whatever goes wrong here is said, not raised."""
        try:
            self._saw(observation, fix, heading, mounting)
        except Exception as error:
            text = f"a frame could not be compared: {reason(error)}"
            self._health.condition("shadow", WARN, text, FAULT_SHOWN_S)

    def _saw(
        self,
        observation: Observation,
        fix: GnssFix | None,
        heading: HeadingSample | None,
        mounting: Mounting,
    ) -> None:
        with self._lock:
            if self._trial is not None and self._trial.active is not self._swap.active:
                # Another checkpoint is in use: what was compared is of no use.
                self._trial = self._begun(self._trial.candidate)
            trial = self._trial
        if trial is None or not trial.wants(observation.stamp_ns):
            return
        observation = trial.displaced(observation)
        active = trial.active.localizer.localize(observation)
        candidate: PoseEstimate | Exception
        try:
            candidate = trial.candidate.localizer.localize(observation)
        except Exception as error:
            candidate = error
        with self._lock:
            if trial is not self._trial:
                return
            if isinstance(candidate, Exception):
                trial.failed()
                text = f"{trial.candidate} fails: {reason(candidate)}"
                self._health.condition("shadow", WARN, text, FAULT_SHOWN_S)
            else:
                self._publish(trial.compare(observation, active, candidate, fix, heading, mounting))
            self._report(trial)

    def _report(self, trial: ShadowTrial) -> None:
        """How it stands; and its end, where this was the last frame."""
        for name, value in trial.means().items():
            self._health.value(f"shadow_{name}", f"{value:.3f}")
        verdict = trial.verdict()
        if verdict is None:
            failed = f", failed on {trial.failures}" if trial.failures else ""
            self._health.value("shadow", f"{trial.candidate}, {len(trial)} of {trial.frames} frames{failed}")
            return
        self._trial = None
        better = "is better" if verdict.promote else "is not surely better"
        text = f"{trial.candidate} {better}: {verdict.text}"
        self._health.value("shadow", "ended")
        self._health.value("shadow_verdict", text)
        self._log.info(text)
        if verdict.promote and self._options().promote:
            self._promote(self._swap.use(trial.candidate, instead_of=trial.active))

    def _begun(self, candidate: Deployed) -> ShadowTrial:
        options = self._options()
        return ShadowTrial(
            self._swap.active,
            candidate,
            self._odometry,
            every=options.every,
            frames=options.frames,
            spread_m=self._spread_m,
        )

    def _verified(self, candidate: Future[Deployed]) -> None:
        """Called by the loading thread, or by who stops it."""
        with self._lock:
            if candidate is not self._wanted or candidate.cancelled():
                return
            error = candidate.exception()
            if error is None:
                self._trial = self._begun(candidate.result())
                text = f"in the shadow: {candidate.result()}"
                self._health.value("shadow", f"{candidate.result()}, 0 of {self._trial.frames} frames")
                self._log.info(text)
            else:
                self._health.forget("shadow")
                self._health.condition("shadow", WARN, reason(error))
                self._log.warning(reason(error))
