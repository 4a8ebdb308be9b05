"""Drive for an hour through sensor, map and checkpoint faults, and check diagnostics, poses and memory.

benchmarks/speed/soak.py [--minutes 60] [--seed 0] [--rate 5] [--wrong 20] [--json FILE]

One fault at a time, with quiet periods between. Checked: /diagnostics name the fault, poses resume, no wrong
pose is published without a warning, warnings end after the fault, and memory does not grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseWithCovarianceStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from nav_msgs.msg import OccupancyGrid, Odometry
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rich.console import Console
from rich.table import Table
from sensor_msgs.msg import Image, NavSatFix
from swap import perturbed
from vehicle import ROOT, Vehicle, cpu_seconds, isolate, localizer, memory_mb

from xview_loc.geodesy import LocalProjection
from xview_loc.maps.store import RETRY_AFTER_S
from xview_loc.models.checkpoint import shipped_checkpoint
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive

sys.path.insert(0, str(ROOT / "test"))
from map_fixtures import TileServer

MODEL = "ccvpe-small"
FRAMES = 700
# Of half a turn on the spot.
TURN_FRAMES = 20
TILE_SIDE, TILE_ZOOM = 64, 20
# Longer than the server, in this process, takes on a busy machine.
MAP_DEADLINE_S = 3.0
QUIET_S = (5.0, 10.0)
ALL_WELL_TIMEOUT_S = 70.0
RESUME_S = 5.0
REPORT_S = 2.5  # reports come once per second; one may already be on its way
LARGEST_GROWTH = 5.0  # per cent over the run
JUMP_M = 100.0
# Few, so that a shadow trial ends with a verdict.
SHADOW_FRAMES = 100
TABLE_WIDTH = 140
METRES_PER_DEGREE = 111_200.0


@dataclass(frozen=True)
class Pose:
    """Times of its image and of its arrival (monotonic seconds), and its error in metres."""

    sent: float
    arrived: float
    error_m: float


@dataclass(frozen=True)
class Report:
    """A status of /diagnostics."""

    at: float
    warns: bool
    message: str
    values: dict[str, str]


class Rig(Vehicle):
    """A vehicle whose sensor drivers can fail."""

    def __init__(self, datum: LocalProjection, server: TileServer, folder: Path, rng: random.Random) -> None:
        super().__init__()
        self.server, self.folder, self.rng = server, folder, rng
        self.camera = self.compass = self.gnss = True
        self.clock_ns = 0
        self.spoil_fix: Callable[[NavSatFix], object] = lambda fix: None
        self.spoil_image: Callable[[Image], object] = lambda image: None
        self.count = 0
        self.poses: list[Pose] = []
        self.history: list[Report] = []
        self.checkpoints = itertools.cycle([perturbed(MODEL, folder / "other.safetensors"), SHIPPED])
        self.checkpoint = SHIPPED
        self._datum = datum
        self._truth: dict[int, tuple[float, float]] = {}
        self._before: tuple[int, Frame] | None = None
        self.odometry = self.create_publisher(Odometry, "odom", 5)
        # Time of arrival (monotonic seconds) and error in metres.
        self.filtered: list[tuple[float, float]] = []
        topic = "/localizer/odometry_filtered_pose"
        self.create_subscription(PoseWithCovarianceStamped, topic, self._on_filtered, 50)
        self._change_state = self.create_client(ChangeState, "/localizer/change_state")

    def publish(self, frame: Frame) -> int:
        """Send the messages of a frame whose drivers work."""
        stamp_ns = time.time_ns() + self.clock_ns
        heading, fix, image = self.messages(frame, stamp_ns)
        self.spoil_fix(fix)
        self.spoil_image(image)
        self.odometry.publish(self._velocity(frame, stamp_ns))
        if self.compass:
            self.headings.publish(heading)
        if self.gnss:
            self.fixes.publish(fix)
        if self.camera:
            self._truth[stamp_ns] = self._datum.forward(frame.truth.lat, frame.truth.lon)
            self.sent[stamp_ns] = time.monotonic()
            self.images.publish(image)
            self.count += 1
        return stamp_ns

    def _velocity(self, frame: Frame, stamp_ns: int) -> Odometry:
        """Return the true velocity since the last frame."""
        message = Odometry()
        message.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        since_ns, before = self._before or (stamp_ns, frame)
        self._before = stamp_ns, frame
        seconds = (stamp_ns - since_ns) / 1e9
        if 0.0 < seconds < 2.0:
            a, b = before.truth, frame.truth
            turn = math.remainder(b.heading - a.heading, 2 * math.pi)
            yaw = a.heading + turn / 2
            east, north = b.east - a.east, b.north - a.north
            message.twist.twist.linear.x = (math.cos(yaw) * east + math.sin(yaw) * north) / seconds
            message.twist.twist.linear.y = (math.cos(yaw) * north - math.sin(yaw) * east) / seconds
            message.twist.twist.angular.z = turn / seconds
        return message

    def change_state(self, transition: int) -> None:
        """Request a lifecycle transition."""
        self._change_state.call_async(ChangeState.Request(transition=Transition(id=transition)))

    def _on_pose(self, pose: PoseWithCovarianceStamped) -> None:
        stamp_ns = Time.from_msg(pose.header.stamp).nanoseconds
        sent = self.sent.pop(stamp_ns, None)
        if sent is not None:
            place = pose.pose.pose.position
            error = math.dist((place.x, place.y), self._truth[stamp_ns])
            self.poses.append(Pose(sent, time.monotonic(), error))

    def _on_filtered(self, pose: PoseWithCovarianceStamped) -> None:
        truth = self._truth.get(Time.from_msg(pose.header.stamp).nanoseconds)
        if truth is not None:
            place = pose.pose.pose.position
            self.filtered.append((time.monotonic(), math.dist((place.x, place.y), truth)))

    def _on_diagnostics(self, report: DiagnosticArray) -> None:
        super()._on_diagnostics(report)
        (status,) = report.status
        warns = status.level != DiagnosticStatus.OK
        self.history.append(Report(time.monotonic(), warns, status.message, self.diagnostics))


# ---------------------------------------------------------------------------------------------- the faults


@contextmanager
def camera_gap(rig: Rig) -> Iterator[None]:
    rig.camera = False
    yield
    rig.camera = True


@contextmanager
def heading_loss(rig: Rig) -> Iterator[None]:
    rig.compass = False
    yield
    rig.compass = True


@contextmanager
def gnss_loss(rig: Rig) -> Iterator[None]:
    rig.gnss = False
    yield
    rig.gnss = True


def bad_fixes(spoil: Callable[[NavSatFix], object]) -> Callable[[Rig], AbstractContextManager[None]]:
    @contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        rig.spoil_fix = spoil
        yield
        rig.spoil_fix = lambda fix: None

    return fault


@contextmanager
def gnss_jump(rig: Rig) -> Iterator[None]:
    angle = rig.rng.uniform(0.0, 2.0 * math.pi)

    def move(fix: NavSatFix) -> None:
        degree_of_longitude = METRES_PER_DEGREE * math.cos(math.radians(fix.latitude))
        fix.longitude += JUMP_M * math.cos(angle) / degree_of_longitude
        fix.latitude += JUMP_M * math.sin(angle) / METRES_PER_DEGREE

    with bad_fixes(move)(rig):
        yield


def not_a_number(fix: NavSatFix) -> None:
    fix.latitude = math.nan


def no_fix(fix: NavSatFix) -> None:
    fix.status.status = -1


def no_covariance(fix: NavSatFix) -> None:
    fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_UNKNOWN


def clock(seconds: float) -> Callable[[Rig], AbstractContextManager[None]]:
    @contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        rig.clock_ns = round(seconds * 1e9)
        yield
        rig.clock_ns = 0

    return fault


def damaged_images(**changes: Any) -> Callable[[Rig], AbstractContextManager[None]]:
    @contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        def spoil(image: Image) -> None:
            for name, value in changes.items():
                setattr(image, name, value)

        rig.spoil_image = spoil
        yield
        rig.spoil_image = lambda image: None

    return fault


def tile_server(kind: str) -> Callable[[Rig], AbstractContextManager[None]]:
    """Configure the node anew while the server fails; the tiles that it keeps would hide the fault."""

    @contextmanager
    def fault(rig: Rig) -> Iterator[None]:
        rig.server.fault = kind
        rig.change_state(Transition.TRANSITION_DEACTIVATE)
        rig.change_state(Transition.TRANSITION_CLEANUP)
        shutil.rmtree(rig.folder / "cache", ignore_errors=True)
        rig.change_state(Transition.TRANSITION_CONFIGURE)
        rig.change_state(Transition.TRANSITION_ACTIVATE)
        yield
        rig.server.fault = None

    return fault


@contextmanager
def good_checkpoint(rig: Rig) -> Iterator[None]:
    rig.checkpoint = next(rig.checkpoints)
    rig.deploy(rig.checkpoint)
    yield


@contextmanager
def bad_checkpoint(rig: Rig) -> Iterator[None]:
    whole = SHIPPED.read_bytes()
    bad = rig.folder / "bad.safetensors"
    bad.write_bytes(rig.rng.choice([whole[: len(whole) // 2], b"", b"no weights", whole[:-1]]))
    rig.deploy(bad)
    yield
    rig.deploy(rig.checkpoint)


@contextmanager
def shadowed(rig: Rig) -> Iterator[None]:
    """Shadow the checkpoint that is not in use, until there is a verdict."""
    other = rig.folder / "other.safetensors"
    rig.set_parameter("shadow_checkpoint", str(other if rig.checkpoint == SHIPPED else SHIPPED))
    yield
    rig.set_parameter("shadow_checkpoint", "")


@contextmanager
def deactivated(rig: Rig) -> Iterator[None]:
    rig.change_state(Transition.TRANSITION_DEACTIVATE)
    yield
    rig.change_state(Transition.TRANSITION_ACTIVATE)


@contextmanager
def subscriber_storm(rig: Rig) -> Iterator[None]:
    """Start and stop participants; half of their subscribers are never served."""
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            context = Context()
            rclpy.init(context=context)
            nodes = [Node(f"storm_{k}", context=context, enable_rosout=False) for k in range(2)]
            reliabilities = (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT)
            for node, reliability in itertools.product(nodes, reliabilities):
                qos = QoSProfile(depth=1, reliability=reliability)
                for kind, topic in OUTPUTS.items():
                    node.create_subscription(kind, f"/localizer/{topic}", lambda message: None, qos)
            executor = SingleThreadedExecutor(context=context)
            executor.add_node(nodes[0])
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                executor.spin_once(timeout_sec=0.1)
            executor.shutdown()
            for node in nodes:
                node.destroy_node()
            rclpy.shutdown(context=context)

    threads = [threading.Thread(target=storm) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


OUTPUTS = {
    PoseWithCovarianceStamped: "pose",
    NavSatFix: "fix",
    OccupancyGrid: "heat_map",
    Image: "overlay",
}
_shipped = shipped_checkpoint(MODEL)
assert _shipped is not None
SHIPPED = _shipped


@dataclass(frozen=True)
class Fault:
    """A fault, and how long it lasts.

    ``named`` is the message, or the count that grows, in docs/diagnostics.md; "" if nothing is reported. The
    fault lasts between ``seconds``, and up to ``patience_s`` longer until it is named.
    """

    during: Callable[[Rig], AbstractContextManager[None]]
    named: str
    seconds: tuple[float, float] = (4.0, 8.0)
    patience_s: float = 0.0
    resume_s: float = RESUME_S


def map_fault(kind: str) -> Fault:
    named, resume_s = "frames_rejected/map_unavailable", RETRY_AFTER_S + RESUME_S
    return Fault(tile_server(kind), named, patience_s=60.0, resume_s=resume_s)


FAULTS = {
    "camera gap": Fault(camera_gap, "no_image", (5.0, 8.0)),
    "no heading": Fault(heading_loss, "frames_rejected/heading_stale"),
    "no fixes": Fault(gnss_loss, "frames_rejected/fix_stale"),
    "fixes jump": Fault(gnss_jump, "fix_rejected/fix_jump"),
    # The filter accepts them meanwhile, so that the way back is also a jump.
    "fixes jump and stay": Fault(gnss_jump, "fix_rejected/fix_jump", (13.0, 16.0), resume_s=10.0 + RESUME_S),
    "fixes are NaN": Fault(bad_fixes(not_a_number), "fix_rejected/fix_not_finite"),
    "fix status -1": Fault(bad_fixes(no_fix), "fix_rejected/fix_status"),
    "no covariance": Fault(bad_fixes(no_covariance), ""),
    "clock back 30 s": Fault(clock(-30.0), "time_restarts"),
    "clock on 30 s": Fault(clock(30.0), "image_delay"),
    "images cut off": Fault(damaged_images(data=bytes(1000)), "frames_rejected/image_invalid"),
    "images' step wrong": Fault(damaged_images(step=7), "frames_rejected/image_invalid"),
    "images' encoding": Fault(damaged_images(encoding="yuv9"), "frames_rejected/image_invalid"),
    "tile server down": map_fault("down"),
    "tile server 500": map_fault("500"),
    "tile server slow": map_fault("slow"),
    "tiles truncated": map_fault("truncated"),
    "good checkpoint": Fault(good_checkpoint, "checkpoint", patience_s=10.0),
    "bad checkpoint": Fault(bad_checkpoint, "checkpoint_refused", patience_s=10.0),
    "candidate in the shadow": Fault(shadowed, "shadow_verdict", patience_s=300.0),
    "subscriber storm": Fault(subscriber_storm, ""),
    "deactivated": Fault(deactivated, "not active"),
}


# ------------------------------------------------------------------------------------------------ the drive


@dataclass
class Event:
    """A fault that happened; times are monotonic seconds."""

    name: str
    began: float
    ended: float = math.inf
    named: bool = False
    resumed_s: float = math.inf


def turned(frame: Frame, angle: float) -> Frame:
    """Return what the vehicle measures, turned left by ``angle``; its panorama shows all directions."""
    assert frame.image is not None
    yaw, true_yaw = (math.remainder(a + angle, 2 * math.pi) for a in (frame.heading, frame.truth.heading))
    width = frame.image.shape[1]
    image = np.roll(frame.image, round(angle / (2 * math.pi) * width), axis=1)
    return replace(frame, image=image, heading=yaw, truth=replace(frame.truth, heading=true_yaw))


def to_and_fro(frames: list[Frame]) -> list[Frame]:
    """Return a drive there and back again; the vehicle turns on the spot at both ends."""
    angles = np.linspace(0.0, math.pi, TURN_FRAMES + 2)[1:-1]
    out = [turned(frames[-1], angle) for angle in angles]
    home = [turned(frames[0], math.pi + angle) for angle in angles]
    return [*frames, *out, *(turned(frame, math.pi) for frame in reversed(frames)), *home]


class Soak:
    """Drive to and fro at a steady rate, and watch the node."""

    def __init__(self, rig: Rig, node: Popen, frames: list[Frame], rate_hz: float) -> None:
        self.rig, self._node = rig, node
        self._frames = itertools.cycle(to_and_fro(frames))
        self._period = 1.0 / rate_hz
        self._due = time.monotonic()
        self.memory: list[tuple[float, float]] = []
        self.events: list[Event] = []
        # Faults (or "the start") after which warnings did not end, and the last warning.
        self.not_well_again: list[tuple[str, str]] = []

    def alive(self) -> bool:
        return self._node.poll() is None

    def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Drive until the condition holds; return False on timeout or if the node ended."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end or not self.alive():
                return False
            self.rig.spin_until(self._due)
            # A late frame is not caught up: the vehicle would jump.
            self._due = max(self._due, time.monotonic()) + self._period
            self.rig.publish(next(self._frames))
            if self.alive() and (not self.memory or time.monotonic() - self.memory[-1][0] >= 1.0):
                self.memory.append((time.monotonic(), memory_mb(self._node.pid, "VmRSS")))
        return True

    def drive(self, seconds: float) -> None:
        self.until(lambda: False, seconds)

    def quiet(self, seconds: float) -> None:
        """Drive for ``seconds``, and until /diagnostics warn no more."""
        self.drive(seconds)
        if not self.until(lambda: not self.rig.history[-1].warns, ALL_WELL_TIMEOUT_S):
            after = self.events[-1].name if self.events else "the start"
            self.not_well_again.append((after, self.rig.history[-1].message))
            print(f"warnings do not end after {after}: {self.rig.history[-1].message}", flush=True)

    def cause(self, name: str) -> Event:
        """Cause a fault and wait until it is over."""
        fault, rig = FAULTS[name], self.rig
        event = Event(name, time.monotonic())
        self.events.append(event)
        before = len(rig.history) - 1
        with fault.during(rig):
            self.drive(rig.rng.uniform(*fault.seconds))
            event.named = self.until(lambda: self._named(fault.named, before), fault.patience_s)
        event.ended = time.monotonic()
        self.until(lambda: rig.poses[-1].sent > event.ended, 2.0 * fault.resume_s)
        if rig.poses[-1].sent > event.ended:
            event.resumed_s = rig.poses[-1].arrived - event.ended
        event.named = event.named or self.until(lambda: self._named(fault.named, before), REPORT_S)
        return event

    def _named(self, by: str, before: int) -> bool:
        """Return True if a report since then names it: as message, growing count, or checkpoint."""
        if not by:
            return True
        old, reports = self.rig.history[before], self.rig.history[before + 1 :]
        if by == "checkpoint":
            return any(str(self.rig.checkpoint) in report.values[by] for report in reports)
        was = old.values.get(by, "0")
        return any(f"{by}:" in r.message or r.values.get(by, "0") != was for r in reports)


def judge(soak: Soak, wrong_m: float) -> dict[str, dict[str, Any]]:
    """Return figures of each kind of fault, and of the quiet time between."""
    rig = soak.rig
    reports = np.array([report.at for report in rig.history])
    warned = [report.warns for report in rig.history]

    def flagged(pose: Pose) -> bool:
        after = int(np.searchsorted(reports, pose.arrived))
        return any(warned[max(0, after - 1) : after + 1])

    begins = np.array([event.began for event in soak.events] or [math.inf])

    def fault_at(sent: float) -> str:
        index = int(np.searchsorted(begins, sent)) - 1
        event = soak.events[index] if index >= 0 else None
        if event is None or sent > event.ended + event.resumed_s:
            return "quiet"
        return event.name if sent <= event.ended else "until poses resume"

    poses: dict[str, list[Pose]] = {name: [] for name in ["quiet", "until poses resume", *FAULTS]}
    for pose in rig.poses:
        poses[fault_at(pose.sent)].append(pose)
    unanswered = Counter(fault_at(sent) for sent in rig.sent.values())
    rows = {}
    for name, those in poses.items():
        events = [event for event in soak.events if event.name == name]
        if name in FAULTS and not events:
            continue
        wrong = [pose.error_m for pose in those if pose.error_m > wrong_m]
        unflagged = [pose.error_m for pose in those if pose.error_m > wrong_m and not flagged(pose)]
        rows[name] = {
            "times": len(events),
            "named": sum(event.named for event in events if FAULTS[name].named),
            "resumed": sum(event.resumed_s <= FAULTS[event.name].resume_s for event in events),
            "longest wait, s": max((event.resumed_s for event in events), default=0.0),
            "poses": len(those),
            "images without": unanswered[name],
            "median error, m": float(np.median([pose.error_m for pose in those])) if those else 0.0,
            "wrong": len(wrong),
            "wrong and not flagged": len(unflagged),
            "worst not flagged, m": max(unflagged, default=0.0),
        }
    return rows


def growth(memory: list[tuple[float, float]]) -> dict[str, float]:
    """Fit a line to the memory after warm-up (the first quarter, at most ten minutes)."""
    at, rss = np.array(memory).T
    at -= at[0]
    later = at >= min(at[-1] / 4.0, 600.0)
    slope, level = np.polyfit(at[later] - at[later][0], rss[later], 1)
    span = at[later][-1] - at[later][0]
    return {
        "RSS after warm-up, MB": float(level),
        "RSS at the end, MB": float(rss[-1]),
        "growth, MB/h": float(slope * 3600.0),
        "growth over the run, %": float(100.0 * slope * span / level),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=5.0, help="frames per second")
    parser.add_argument("--wrong", type=float, default=20.0, help="error of a wrong pose, metres")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS), metavar="FAULT")
    parser.add_argument("--filter", action="store_true", help="run the filter, which bridges missing fixes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.filter:
        FAULTS["no fixes"] = Fault(gnss_loss, "filter")
    isolate()
    rng = random.Random(arguments.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        city = build_city(7, "source")
        options = DriveOptions(rate_hz=arguments.rate)
        frames = list(drive(city, FRAMES, seed=arguments.seed, options=options))
        server = TileServer(city.write_geotiff(folder / "city.tif"), TILE_SIDE, TILE_ZOOM)
        server.delay_s = 2.0 * MAP_DEADLINE_S
        stack.enter_context(server)
        datum = LocalProjection(frames[0].truth.lat, frames[0].truth.lon)
        parameters = {
            "map": server.url,
            "map_max_zoom": TILE_ZOOM,
            "map_cache_dir": folder / "cache",
            "map_deadline_s": MAP_DEADLINE_S,
            "model": MODEL,
            "datum_lat": datum.lat,
            "datum_lon": datum.lon,
            "filter": str(arguments.filter).lower(),
            "shadow_every": 1,
            "shadow_frames": SHADOW_FRAMES,
            "checkpoint_dirs": [str(folder)],
        }
        rclpy.init()
        rig = Rig(datum, server, folder, rng)
        log = folder / "node.log"
        node = stack.enter_context(localizer(rig, log, parameters))
        soak = Soak(rig, node, frames, arguments.rate)
        if not soak.until(lambda: bool(rig.poses and rig.history), 30.0):
            raise SystemExit(f"the localizer gave no pose:\n{log.read_text()}")
        with good_checkpoint(rig):
            # From here on two checkpoints are in memory, to allow a rollback.
            soak.drive(QUIET_S[0])
        del soak.memory[:-1]
        began, cpu = time.monotonic(), cpu_seconds(node.pid)
        end = began + 60.0 * arguments.minutes
        turn: list[str] = []
        while soak.alive() and time.monotonic() < end:
            soak.quiet(rng.uniform(*QUIET_S))
            turn = turn or rng.sample(arguments.faults, len(arguments.faults))
            event = soak.cause(turn.pop())
            rss = soak.memory[-1][1]
            print(
                f"{event.ended - began:5.0f} s  {event.name:20} named: {event.named}, "
                f"poses after {event.resumed_s:.1f} s, RSS {rss:.0f} MB",
                flush=True,
            )
        soak.quiet(QUIET_S[0])
        crashed = not soak.alive()
        elapsed = time.monotonic() - began
        used = math.nan if crashed else cpu_seconds(node.pid) - cpu
        text = log.read_text()
    rows = judge(soak, arguments.wrong)
    summary: dict[str, Any] = {
        "minutes": elapsed / 60.0,
        "images": rig.count,
        "poses": len(rig.poses),
        "filtered poses": len(rig.filtered),
        "filtered error, mean, m": sum(error for _, error in rig.filtered) / max(1, len(rig.filtered)),
        "crashed": crashed,
        "exceptions logged": text.count("Traceback") + text.count("internal_error"),
        "frames dropped or rejected": {k: v for k, v in rig.diagnostics.items() if k.startswith("frames_")},
        "CPU, % of one core": 100.0 * used / elapsed,
        **growth(soak.memory),
    }
    console = Console(width=TABLE_WIDTH)
    table = Table("fault", *rows["quiet"], title=f"wrong: more than {arguments.wrong:g} m")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    console.print(table)
    table = Table("what", "figure", title=f"{MODEL}, {arguments.rate:g} Hz, {os.cpu_count()} cores")
    for what, value in summary.items():
        table.add_row(what, f"{value:.1f}" if isinstance(value, float) else str(value))
    console.print(table)
    unnamed = [event.name for event in soak.events if not event.named]
    silent = [e.name for e in soak.events if e.resumed_s > FAULTS[e.name].resume_s]
    if arguments.json:
        report = {**summary, "faults": rows, "unnamed": unnamed, "not resumed": silent}
        report |= {"not well again": soak.not_well_again, "RSS": soak.memory, "filtered": rig.filtered}
        report |= {"events": [(e.name, e.began, e.ended, e.resumed_s) for e in soak.events]}
        report |= {"images without": sorted(rig.sent.values())}
        report |= {"warnings": [(r.at, r.message) for r in rig.history if r.warns]}
        arguments.json.write_text(json.dumps(report, indent=1))
    if crashed:
        print(text)
    bad = crashed or summary["exceptions logged"] or unnamed or silent or soak.not_well_again
    return 1 if bad or summary["growth over the run, %"] > LARGEST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
