"""Tiles that do not come, and clocks that jump: the running localizer holds no more files or threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from map_fixtures import TileServer

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from localizer_rig import LAT, LON, NS, Rig, running, stamp
from ros_harness import pick_domain

DOMAIN = pick_domain()
FATES = ("frames_accepted", "frames_rejected/", "frames_dropped")
FAULTS = ("404", "500", "html", "truncated", "down", "slow")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(DOMAIN, tmp_path_factory.mktemp("localizer")) as r:
        yield r


def held(rig: Rig) -> tuple[int, int]:
    """Open files and threads of the node."""
    process = Path(f"/proc/{rig.node.process.pid}")
    return len(os.listdir(process / "fd")), len(os.listdir(process / "task"))


def fates(rig: Rig) -> int:
    """Frames that the node has done with."""
    values = [] if rig.bench.status is None else rig.bench.status.values
    return sum(int(v.value) for v in values if v.key.startswith(FATES))


@pytest.mark.slow
def test_hundreds_of_misses_leave_nothing_behind(rig: Rig, tmp_path: Path) -> None:
    b = rig.bench
    with TileServer(None) as server:
        options = {"map": server.url, "map_max_zoom": 18, "map_cache_dir": str(tmp_path / "cache")}
        with rig.configured(**options, map_deadline_s=1.0, qos_depth=1000):

            def misses(faults: tuple[str, ...], count: int) -> None:
                b.wait_diagnosis()
                before = fates(rig)
                for k in range(count):
                    server.fault = faults[k * len(faults) // count]
                    rig.send_frame(0.5, lat=LAT + rig.ns % 977 / 4e4, lon=LON + k % 31 / 2e3)
                    for _ in range(5):
                        b.executor.spin_once(timeout_sec=0.01)
                b.wait(lambda: fates(rig) >= before + count, what="the frames")
                server.fault = None

            rig.good_frame()
            misses(FAULTS, 30)
            (files, threads), asked = held(rig), server.requests
            # How often the server is asked depends on how long the frames take: a map that failed rests.
            for _ in range(50):
                misses(FAULTS, 60)
                if server.requests > asked + 100:
                    break
            assert server.requests > asked + 100
            # Connections to a server of eight threads come and go.
            b.wait(lambda: held(rig)[0] <= files + 8 and held(rig)[1] <= threads + 8, what="the files' end")
            rig.good_frame()


def test_stamps_that_jump_by_an_hour_cost_a_frame_at_most(rig: Rig) -> None:
    b, hour = rig.bench, 3600 * NS
    rig.good_frame()
    b.wait_diagnosis()
    restarts, start = int(b.value("time_restarts") or 0), rig.ns
    for at in (start - hour, start + hour, start, start - hour):
        rig.ns = at
        pose = rig.good_frame()
        assert at < stamp(pose) < at + 60 * NS
    b.wait(lambda: int(b.value("time_restarts") or 0) == restarts + 3, what="the restarts")
    assert "stamps went back" in b.text()
    assert rig.node.log.count("went back in time") <= restarts + 3
    rig.ns = start
    rig.good_frame()
