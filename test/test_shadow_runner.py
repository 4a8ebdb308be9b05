"""Trials that are stopped, fail, or end, thread by thread."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from xview_loc.estimation.checkpoint_swap import Deployed
from xview_loc.estimation.observation import Observation
from xview_loc.geodesy import LocalProjection
from xview_loc.nodes.diagnostics import Health
from xview_loc.nodes.shadow_runner import ShadowOptions, ShadowRunner
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import HeadingSample

NS = 1_000_000_000
PLANE = LocalProjection(48.2, 16.37)
FRAMES = 80


class Rig:
    """A vehicle going east in steps of 10 m, its checkpoint in use 3 m off, and a candidate that is right."""

    def __init__(self) -> None:
        self.x = 0.0
        self.stamp_ns = NS
        self.rng = np.random.default_rng(0)
        self.active = Deployed(self.localizer(lambda: 3.0 * self.rng.normal()), "active", "0")
        self.candidate = Deployed(self.localizer(lambda: 0.0), "candidate", "1")
        self.prepared: list[Future[Deployed]] = []
        self.used: list[tuple[Deployed, Deployed]] = []
        self.promoted: list[Any] = []
        self.published: list[Any] = []
        self.options = ShadowOptions(every=1, frames=FRAMES, promote=False)
        self.odometry = Odometry(2.0)
        self.health = Health("testing")
        self.runner = ShadowRunner(
            self,  # type: ignore[arg-type]
            self.odometry,
            20.0,
            lambda: self.options,
            self.health,
            logging.getLogger("test"),
            self.published.append,
            self.promoted.append,
        )

    def localizer(self, error: Callable[[], float]) -> Any:
        def localize(observation: Observation) -> Any:
            lat, lon = PLANE.inverse(self.x + error(), 0.0)
            return SimpleNamespace(lat=lat, lon=lon, heat_map=SimpleNamespace(entropy=1.0))

        return SimpleNamespace(localize=localize, limits=None)

    # What the runner asks of a CheckpointSwap

    def prepare(self, path: Path) -> Future[Deployed]:
        self.prepared.append(Future())
        self.prepared[-1].set_running_or_notify_cancel()  # being verified
        return self.prepared[-1]

    def use(self, prepared: Deployed, instead_of: Deployed) -> Future[Deployed]:
        self.used.append((prepared, instead_of))
        return Future()

    # What the test does

    def begin(self) -> None:
        self.runner.start(Path("candidate"))
        self.prepared[-1].set_result(self.candidate)

    def drive(self, frames: int) -> None:
        for _ in range(frames):
            self.x += 10.0
            self.stamp_ns += NS
            self.odometry.add(VelocitySample(self.stamp_ns, 10.001, 0.0, 0.0))
            image = np.zeros((1, 1, 3), np.uint8)
            observation = Observation(image, *PLANE.inverse(self.x, 0.0), stamp_ns=self.stamp_ns)
            self.runner.saw(observation, None, HeadingSample(self.stamp_ns, 0.0, 0.01), Mounting())

    def values(self) -> dict[str, str]:
        return {v.key: v.value for v in self.health.report("test").values if v.key.startswith("shadow")}

    def message(self) -> str:
        return str(self.health.report("test").message)


def test_a_better_candidate_replaces_the_one_that_it_was_compared_with() -> None:
    rig = Rig()
    rig.begin()
    rig.drive(FRAMES - 1)
    assert rig.values()["shadow"].endswith(f"{FRAMES - 1} of {FRAMES} frames")
    # The policy is the one at the end, the number of frames the one at the start.
    rig.options = ShadowOptions(every=1, frames=1000, promote=True)
    rig.drive(1)
    assert rig.used == [(rig.candidate, rig.active)] and len(rig.promoted) == 1
    assert "is better" in rig.values()["shadow_verdict"]
    rig.drive(5)
    assert len(rig.published) == FRAMES


def test_a_candidate_that_fails_is_said_and_not_promoted() -> None:
    rig = Rig()
    rig.options = replace(rig.options, promote=True)

    def fails_once() -> float:
        if next(frame) == 5:
            raise RuntimeError("out of memory")
        return 0.0

    frame = itertools.count()
    rig.candidate = Deployed(rig.localizer(fails_once), "candidate", "1")
    rig.begin()
    rig.drive(6)
    assert "candidate" in rig.message() and "fails: out of memory" in rig.message()
    assert rig.values()["shadow"].endswith(f"6 of {FRAMES} frames, failed on 1")
    rig.drive(FRAMES - 6)
    assert "failed on 1 of 80 frames" in rig.values()["shadow_verdict"] and not rig.used


def test_what_cannot_be_compared_is_no_fault_of_the_candidate() -> None:
    rig = Rig()
    rig.begin()
    rig.drive(3)
    (good, rig.active.localizer.localize) = (rig.active.localizer.localize, None)  # type: ignore[assignment, method-assign]
    rig.drive(2)
    assert "could not be compared" in rig.message()
    rig.active.localizer.localize = good  # type: ignore[method-assign]
    rig.drive(1)
    assert rig.values()["shadow"].endswith(f"4 of {FRAMES} frames")


def test_a_trial_that_is_stopped_meanwhile_neither_speaks_nor_promotes() -> None:
    rig = Rig()
    rig.options = replace(rig.options, promote=True)

    def stops_at_the_end() -> float:
        if len(rig.published) == FRAMES - 1:
            rig.runner.stop()
        return 0.0

    rig.candidate = Deployed(rig.localizer(stops_at_the_end), "candidate", "1")
    rig.begin()
    rig.drive(FRAMES)
    assert len(rig.published) == FRAMES - 1 and not rig.used and rig.values() == {}
    rig.drive(1)
    assert rig.values() == {}


def test_a_candidate_that_is_verified_too_late_is_not_tried() -> None:
    rig = Rig()
    rig.runner.start(Path("candidate"))
    rig.runner.stop()
    rig.prepared[0].set_result(rig.candidate)
    rig.runner.start(Path("candidate"))
    rig.runner.start(Path("candidate"))
    rig.prepared[1].set_result(rig.candidate)
    rig.drive(1)
    assert not rig.published and "verifying" in rig.values()["shadow"]
    rig.prepared[2].set_exception(ValueError("it is no checkpoint"))
    rig.drive(1)
    assert not rig.published and rig.values() == {} and "it is no checkpoint" in rig.message()


def test_with_another_checkpoint_in_use_the_trial_begins_anew() -> None:
    rig = Rig()
    rig.begin()
    rig.drive(20)
    rig.active = Deployed(rig.localizer(lambda: 1.0), "another", "2")
    rig.options = replace(rig.options, frames=100)
    rig.drive(1)
    assert rig.values()["shadow"].endswith("1 of 100 frames")
    assert math.isnan(rig.published[-1].motion_m)
