"""Shared by both demos: simulated drives and nodes as processes, and a node that records their output."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import NavSatFix

from xview_loc.evaluation.errors import distance_m
from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map
from xview_loc.models.specs import SPECS
from xview_loc.simulation.messages import image_topic
from xview_loc.simulation.rigs import RIGS
from xview_loc.vehicle.messages import valid_stamp_ns

# Generous: a busy machine takes a minute to build a city. A process that fails ends the wait at once.
START_TIMEOUT_S = 600.0
LAST_FRAME_TIMEOUT_S = 1.5
# Of a rig's images, pixels: rendered live.
RIG_HEIGHT = 180
FASTDDS_PROFILE = Path(__file__).resolve().parents[2] / "config" / "fastdds.xml"

FIX, SINGLE, FILTERED = "GNSS fix", "single frame", "filtered"

Place = tuple[float, float]


@dataclass
class DriveLog:
    """A drive: positions as (lat, lon) in degrees and heat maps, by stamp in nanoseconds.

    ``estimate`` is that of each frame on its own; ``filtered`` is empty without the filter.
    """

    truth: dict[int, Place] = field(default_factory=dict)
    fix: dict[int, Place] = field(default_factory=dict)
    estimate: dict[int, Place] = field(default_factory=dict)
    filtered: dict[int, Place] = field(default_factory=dict)
    heat_maps: dict[int, OccupancyGrid] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, dict[int, Place]]:
        """The positions to compare with the truth, by name."""
        return {FIX: self.fix, SINGLE: self.estimate, FILTERED: self.filtered}

    def errors(self, places: dict[int, Place]) -> dict[int, float]:
        """Return the distances from the truth in metres by stamp, for the frames that were localised."""
        return {
            stamp: distance_m(*places[stamp], *self.truth[stamp])
            for stamp in sorted(self.estimate)
            if stamp in self.truth and stamp in self.fix and stamp in places
        }


class Listener(Node):
    """Record a drive over DDS, and print the errors of one frame in ``print_every``.

    Replace ``drive`` by an empty log to record another drive. ``datum`` is the origin of the localizer's map
    frame, ``state`` and ``checkpoint`` are the lifecycle state and the checkpoint that it reports.
    """

    def __init__(self) -> None:
        super().__init__("demo")
        self.drive = DriveLog()
        self.print_every = 1
        self.state = self.checkpoint = ""
        self.datum: LocalProjection | None = None
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for topic, kind in (("/truth/fix", "truth"), ("/fix", "fix")):
            self.create_subscription(NavSatFix, topic, partial(self._collect, kind), 50)
        filtered = "/localizer/odometry_filtered_pose"
        self.create_subscription(PoseWithCovarianceStamped, filtered, self._on_filtered, 50)
        self.create_subscription(NavSatFix, "/localizer/fix", self._on_estimate, 50)
        self.create_subscription(OccupancyGrid, "/localizer/heat_map", self._on_grid, latched)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _collect(self, kind: str, message: NavSatFix) -> None:
        getattr(self.drive, kind)[valid_stamp_ns(message)] = (message.latitude, message.longitude)

    def _on_estimate(self, message: NavSatFix) -> None:
        self._collect("estimate", message)
        stamp, count = valid_stamp_ns(message), len(self.drive.estimate)
        truth, named = self.drive.truth.get(stamp), self.drive.named
        if truth and count % self.print_every == 0:
            errors = {name: distance_m(*p[stamp], *truth) for name, p in named.items() if stamp in p}
            texts = [f"{name} {error:5.1f} m off" for name, error in errors.items()]
            print(f"frame {count:3d}: {', '.join(texts)}", flush=True)

    def _on_filtered(self, message: PoseWithCovarianceStamped) -> None:
        if self.datum is not None:
            at = message.pose.pose.position
            lat, lon = self.datum.inverse(at.x, at.y)
            self.drive.filtered[valid_stamp_ns(message)] = (float(lat), float(lon))

    def _on_grid(self, grid: OccupancyGrid) -> None:
        self.drive.heat_maps[valid_stamp_ns(grid)] = grid

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name == "localizer":
                values = {v.key: v.value for v in status.values}
                self.state, self.checkpoint = values.get("state", ""), values.get("checkpoint", "")


class Demo:
    """The processes of a demo and the node that listens to them; leaving the context ends all of them."""

    def __init__(self, name: str, rig: str = "") -> None:
        """``name`` begins the error message; ``rig`` is one of RIGS, "" a panorama camera."""
        os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        if FASTDDS_PROFILE.exists():
            os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(FASTDDS_PROFILE))
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        self.listener = Listener()
        self._name, self._rig = name, rig
        self._processes: list[subprocess.Popen] = []
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.listener)
        self._signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Demo:
        # Noted here and obeyed in wait(), so that no process is left behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number

    def __exit__(self, *error: object) -> None:
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            _send(process, signal.SIGTERM)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            _send(process, signal.SIGKILL)  # its children may still run
        self._executor.shutdown()
        self.listener.destroy_node()
        rclpy.try_shutdown()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(self, module: str, *words: Any, **options: Any) -> subprocess.Popen:
        """Start a module of this package as a process; ``options`` go to Popen."""
        command = [sys.executable, "-m", module, *map(str, words)]
        # In its own group, so that its children end with it.
        process = subprocess.Popen(command, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def start_node(self, module: str, parameters: dict[str, Any]) -> subprocess.Popen:
        """Start a node of this package."""
        words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        return self.start(f"xview_loc.nodes.{module}", "--ros-args", *words)

    def wait(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Spin until ``condition`` holds; return False if that takes too long or a process failed.

        Raises SystemExit after a signal to end.
        """
        end = time.monotonic() + timeout_s
        while not condition():
            if self._signal:
                raise SystemExit(128 + self._signal)
            if time.monotonic() > end or any(p.poll() not in (None, 0) for p in self._processes):
                return False
            self._executor.spin_once(timeout_sec=0.1)
        return True

    def need(self, condition: Callable[[], object], timeout_s: float, problem: str) -> None:
        """Wait for ``condition``. Raises SystemExit that names the ``problem`` on failure."""
        if not self.wait(condition, timeout_s):
            raise SystemExit(f"{self._name}: {problem} (messages of its processes, if any, are above)")

    def finish(self, process: subprocess.Popen, timeout_s: float, problem: str) -> None:
        """Wait until a process has ended, also with an error. Raises SystemExit if that takes too long."""
        self.need(lambda: process.poll() is not None, timeout_s, problem)
        self._processes.remove(process)
        _send(process, signal.SIGKILL)  # its children may still run

    def stop(self, process: subprocess.Popen, problem: str) -> None:
        """Terminate a process and wait until it has ended. Raises SystemExit if that takes too long."""
        _send(process, signal.SIGTERM)
        self.finish(process, START_TIMEOUT_S, problem)

    def start_drive(self, folder: Path, *words: Any) -> subprocess.Popen:
        """Start ``xview-loc simulate --ros`` and wait until its map, ``folder / "city.tif"``, is written.

        The drive starts when somebody subscribes to the images of one of its cameras.
        """
        image = "/image"
        if self._rig:
            image = image_topic(next(iter(RIGS[self._rig])))
            words += ("--rig", self._rig, "--height", RIG_HEIGHT)
        self.wait(lambda: not self.listener.count_publishers(image), START_TIMEOUT_S)
        drive = self.start("xview_loc.cli", "simulate", folder, "--ros", *words)
        # Its topics appear once the map is written.
        publishers = partial(self.listener.count_publishers, image)
        self.need(publishers, START_TIMEOUT_S, "the simulated drive did not start")
        return drive

    def inputs(self, map_path: Path) -> dict[str, Any]:
        """Return a node's parameters for a drive's map and cameras; a rig's file lies beside the map."""
        cameras: dict[str, Any] = {}
        if self._rig:
            rig_file = map_path.with_name("rig.yaml")
            cameras = {"cameras": list(RIGS[self._rig]), "rig_file": rig_file, "tilt_source": "imu"}
        return {"map": map_path, "qos_reliability": "reliable", **cameras}

    def start_localizer(self, map_path: Path, model: str, parameters: dict[str, Any]) -> None:
        """Start the localizer node and wait until it is active."""
        datum = self.listener.datum = LocalProjection(*map_middle(map_path))
        own = {"model": model, "datum_lat": datum.lat, "datum_lon": datum.lon, "checkpoint_persist": False}
        self.start_node("localizer_node", {**self.inputs(map_path), **own, **parameters})
        self.need(lambda: self.listener.state == "active", START_TIMEOUT_S, "the localizer did not start")

    def follow(self, drive: subprocess.Popen, frames: int, seconds: float) -> DriveLog:
        """Record a drive of ``frames`` frames in ``seconds`` to its end.

        Raises SystemExit if fewer than half of the frames were localised.
        """
        self.wait(lambda: drive.poll() is not None, START_TIMEOUT_S + seconds)
        log = self.listener.drive
        self.wait(lambda: len(log.estimate) == frames, LAST_FRAME_TIMEOUT_S)
        if len(log.estimate) < frames / 2:
            raise SystemExit(f"{self._name}: only {len(log.estimate)} of {frames} frames were localised")
        return log


def _send(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def cameras_text(rig: str) -> str:
    """Name the cameras of a rig of RIGS; "" is a panorama camera."""
    return f"the rig {rig!r} ({', '.join(RIGS[rig])})" if rig else "a panorama camera"


def add_vehicle_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--rig``, for :func:`model_and_rig`."""
    shipped = [name for name in SPECS if name.endswith("-small")]
    parser.add_argument(
        "--model", choices=shipped, help="default: ccvpe-rig-small with --rig, else ccvpe-small"
    )
    cameras = "cameras; default: one for ccvpe-pinhole-small, else a panorama camera"
    parser.add_argument("--rig", choices=list(RIGS), default="", help=cameras)


def model_and_rig(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the names of model and rig; "" is a panorama camera."""
    model, rig = arguments.model, arguments.rig
    if model and SPECS[model].camera == "pinhole":
        rig = rig or "one"
    return model or ("ccvpe-rig-small" if rig else "ccvpe-small"), rig


def map_middle(map_path: Path) -> Place:
    """Return latitude and longitude of the middle of a map, degrees."""
    with open_map(str(map_path)) as aerial:
        bounds = aerial.info().bounds
    assert bounds is not None
    south, west, north, east = bounds
    return (south + north) / 2, (west + east) / 2
