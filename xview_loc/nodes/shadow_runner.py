"""Runs a candidate checkpoint beside the one in use, on every n-th frame, and reports on it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from xview_loc.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.errors import reason
from xview_loc.input_sync import GnssFix, HeadingSample
from xview_loc.localizer import LocalizationError, Observation, PoseEstimate
from xview_loc.mounting import Mounting
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.odometry import Odometry
from xview_loc.shadow import FrameComparison, ShadowTrial, ShadowVerdict

FIGURES = tuple(f.name for f in fields(FrameComparison))


@dataclass(frozen=True)
class ShadowOptions:
    """Run the candidate on every ``every``-th frame, ``frames`` times; then promote a better one or not."""

    every: int
    frames: int
    promote: bool


class ShadowRunner:
    """Starts and stops trials in the executor's thread, compares in the worker's."""

    def __init__(
        self,
        swap: CheckpointSwap,
        odometry: Odometry,
        options: ShadowOptions,
        health: Health,
        log: Any,
        publish: Callable[[FrameComparison], object],
        promote: Callable[[Future[Deployed]], object],
    ) -> None:
        """``publish`` is told each comparison, ``promote`` the change of checkpoint that ends a trial."""
        self._swap = swap
        self._odometry = odometry
        self._options = options
        self._health = health
        self._log = log
        self._publish = publish
        self._promote = promote
        self._trial: ShadowTrial | None = None
        self._wanted: Path | None = None
        self._frames = 0

    def start(self, path: Path | None) -> None:
        """Begin a trial of the checkpoint at ``path`` once it is verified; None ends the one there is."""
        self._wanted, self._trial = path, None
        self._health.clear("shadow")
        self._health.value("shadow", "none" if path is None else f"verifying {path}")
        if path is not None:
            self._swap.prepare(path).add_done_callback(partial(self._verified, path))

    def saw(
        self,
        observation: Observation,
        estimate: PoseEstimate,
        fix: GnssFix,
        heading: HeadingSample | None,
        mounting: Mounting,
    ) -> None:
        """A frame that the checkpoint in use has localised."""
        trial = self._trial
        if trial is None:
            return
        self._frames += 1
        if self._frames % self._options.every:
            return
        if self._swap.active is not trial.active:  # another one is in use: what was compared is of no use
            trial = self._trial = self._begun(trial.candidate)
        try:
            other = trial.candidate.localizer.localize(observation)
        except LocalizationError as error:
            self._health.count("shadow_failed")
            self._health.condition("shadow", WARN, f"{trial.candidate} fails: {error}", for_s=10.0)
            return
        self._publish(trial.compare(estimate, other, fix, heading, mounting))
        self._health.value("shadow", f"{trial.candidate}, {len(trial)} of {trial.frames} frames")
        for name, value in trial.means().items():
            self._health.value(f"shadow_{name}", f"{value:.3f}")
        verdict = trial.verdict()
        if verdict is not None:
            self._ended(trial, verdict)

    def _begun(self, candidate: Deployed) -> ShadowTrial:
        return ShadowTrial(self._swap.active, candidate, self._options.frames, self._odometry)

    def _verified(self, path: Path, candidate: Future[Deployed]) -> None:
        """Called by the loading thread."""
        if candidate.cancelled() or self._wanted != path:
            return
        error = candidate.exception()
        if error is None:
            self._trial = self._begun(candidate.result())
            self._log.info(f"in the shadow: {candidate.result()}")
            return
        text = reason(error)
        self._health.value("shadow", "none")
        self._health.condition("shadow", WARN, text)
        self._log.warning(text)

    def _ended(self, trial: ShadowTrial, verdict: ShadowVerdict) -> None:
        self._trial = None
        better = "is better" if verdict.promote else "is not surely better"
        text = f"{trial.candidate} {better}: {verdict.text}"
        self._health.value("shadow", "none")
        self._health.value("shadow_verdict", text)
        self._log.info(text)
        if verdict.promote and self._options.promote:
            self._promote(self._swap.use(trial.candidate))
