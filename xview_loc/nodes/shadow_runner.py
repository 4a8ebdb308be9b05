"""Run a candidate checkpoint beside the active one on some of the frames, and report the comparison."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from xview_loc.errors import reason
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.observation import Observation, PoseEstimate
from xview_loc.estimation.shadow import FrameComparison, ShadowTrial
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

FIGURES = tuple(f.name for f in fields(FrameComparison))
# How long the diagnostics show that a frame could not be compared.
FAULT_SHOWN_S = 10.0


@dataclass(frozen=True)
class ShadowOptions:
    """Compare every n-th frame, ``frames`` times; ``promote``: activate a better candidate."""

    every: int
    frames: int
    promote: bool


class ShadowRunner:
    """Runs one trial at a time.

    The executor's thread starts and stops it, the loading thread delivers the candidate, and the worker's
    thread the frames. A lock guards the trial together with its diagnostics.
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
        """spread_m: as of :class:`ShadowTrial`. options: read when a trial begins and when it ends. publish:
        called with each comparison. promote: called with the change of checkpoint that ends a trial.
        """
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
        """Begin a trial of the checkpoint at ``path`` once it is verified; a running trial ends."""
        self.stop()
        with self._lock:
            candidate = self._wanted = self._swap.prepare(path)
            self._health.value("shadow", f"verifying {path}")
        candidate.add_done_callback(self._verified)

    def stop(self) -> None:
        """End the trial, and remove it from the diagnostics."""
        with self._lock:
            wanted, self._wanted, self._trial = self._wanted, None, None
            self._health.forget("shadow")
        if wanted is not None:
            wanted.cancel()  # if it still waits for another change

    def saw(
        self,
        observation: Observation,
        fix: GnssFix | None,
        heading: HeadingSample | None,
        mounting: Mounting,
    ) -> None:
        """Compare on a frame that the active checkpoint has localised; errors go to the diagnostics."""
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
                # Comparisons with a checkpoint that is no longer active are useless.
                self._trial = self._new_trial(self._trial.candidate)
            trial = self._trial
        if trial is None or not trial.wants(observation.stamp_ns):
            return
        observation = trial.displaced(observation)
        active = trial.active.localizer.localize(observation)
        candidate: PoseEstimate | Exception
        trial.candidate.localizer.limits = trial.active.localizer.limits
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
        """Show the trial's figures in the diagnostics, and end it after its last frame."""
        for name, value in trial.means().items():
            self._health.value(f"shadow_{name}", f"{value:.3f}")
        verdict = trial.verdict()
        if verdict is None:
            failed = f", failed on {trial.failures}" if trial.failures else ""
            self._health.value("shadow", f"{trial.candidate}, {len(trial)} of {trial.frames} frames{failed}")
            return
        self._trial = None
        better = "is better" if verdict.promote else "is not significantly better"
        text = f"{trial.candidate} {better}: {verdict.text}"
        self._health.value("shadow", "ended")
        self._health.value("shadow_verdict", text)
        self._log.info(text)
        if verdict.promote and self._options().promote:
            self._promote(self._swap.use(trial.candidate, instead_of=trial.active))

    def _new_trial(self, candidate: Deployed) -> ShadowTrial:
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
        # Called by the loading thread, or by the thread that cancels the candidate.
        with self._lock:
            if candidate is not self._wanted or candidate.cancelled():
                return
            error = candidate.exception()
            if error is None:
                self._trial = self._new_trial(candidate.result())
                text = f"in the shadow: {candidate.result().with_note}"
                self._health.value("shadow", f"{candidate.result()}, 0 of {self._trial.frames} frames")
                self._log.info(text)
            else:
                self._health.forget("shadow")
                self._health.condition("shadow", WARN, reason(error))
                self._log.warning(reason(error))
