"""``make demo``: a drive through a city the model has never seen, localised live by the node."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import rclpy
from matplotlib.figure import Figure
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import NavSatFix

from xview_loc.evaluation import Errors, distance_m
from xview_loc.geodesy import LocalProjection
from xview_loc.imagery import AerialMap
from xview_loc.input_messages import stamp_ns
from xview_loc.report import Page

matplotlib.use("Agg")

# The shipped weights were trained on the source style's cities 0 to 23.
STYLE, CITY = "source", 4321
FRAMES, RATE_HZ = 160, 4.0
MODELS = ("ccvpe-small", "ggcvt-small")
START_TIMEOUT_S = 90.0
LAST_FRAME_TIMEOUT_S = 1.5
FASTDDS_PROFILE = Path(__file__).resolve().parents[2] / "config" / "fastdds.xml"

Place = tuple[float, float]


@dataclass
class Track:
    """Places (lat, lon) in degrees by stamp in nanoseconds: the truth, the coarse fixes and the estimates."""

    truth: dict[int, Place] = field(default_factory=dict)
    fix: dict[int, Place] = field(default_factory=dict)
    estimate: dict[int, Place] = field(default_factory=dict)

    def errors(self, of: dict[int, Place]) -> dict[int, float]:
        """Distance from the truth in metres of the frames that were localised, by stamp."""
        return {
            stamp: distance_m(*of[stamp], *self.truth[stamp])
            for stamp in sorted(self.estimate)
            if stamp in self.truth and stamp in self.fix
        }


class Listener(Node):
    """Collects what goes over DDS and prints each frame's errors as its pose arrives."""

    def __init__(self) -> None:
        super().__init__("demo")
        self.track = Track()
        self.grid: OccupancyGrid | None = None
        self.grid_stamp = 0
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for topic, places in (("/truth/fix", self.track.truth), ("/fix", self.track.fix)):
            self.create_subscription(NavSatFix, topic, partial(_collect, places), 50)
        self.create_subscription(NavSatFix, "/localizer/fix", self._on_estimate, 50)
        self.create_subscription(OccupancyGrid, "/localizer/heat_map", self._on_grid, latched)

    def _on_estimate(self, message: NavSatFix) -> None:
        _collect(self.track.estimate, message)
        stamp = stamp_ns(message)
        truth, fix = self.track.truth.get(stamp), self.track.fix.get(stamp)
        if truth and fix:
            coarse, own = (distance_m(*place, *truth) for place in (fix, self.track.estimate[stamp]))
            count = len(self.track.estimate)
            print(f"frame {count:3d}: coarse fix {coarse:5.1f} m off, estimate {own:5.1f} m off", flush=True)

    def _on_grid(self, grid: OccupancyGrid) -> None:
        self.grid = grid
        self.grid_stamp = stamp_ns(grid)


def _collect(places: dict[int, Place], message: NavSatFix) -> None:
    places[stamp_ns(message)] = (message.latitude, message.longitude)


def _middle(map_path: Path) -> Place:
    with AerialMap.open(str(map_path)) as aerial:
        bounds = aerial.info().bounds
    assert bounds is not None
    south, west, north, east = bounds
    return (south + north) / 2, (west + east) / 2


class Demo:
    """The processes of the demo and the node that listens to them."""

    def __init__(self) -> None:
        rclpy.init()
        self.listener = Listener()
        self.processes: list[subprocess.Popen] = []
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.listener)

    def start(self, module: str, *arguments: str) -> subprocess.Popen:
        """Start one of this package's modules as a process of its own."""
        process = subprocess.Popen([sys.executable, "-m", module, *arguments])
        self.processes.append(process)
        return process

    def wait(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Spin until ``condition`` holds; False when it took too long or a process failed."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end or any(p.poll() not in (None, 0) for p in self.processes):
                return False
            self._executor.spin_once(timeout_sec=0.1)
        return True

    def close(self) -> None:
        """End every process."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        rclpy.try_shutdown()


def run_drive(folder: Path, model: str) -> tuple[Listener, Path]:
    """Simulate and localise over DDS; what was heard, and the map's path. Raises SystemExit on failure."""
    demo = Demo()
    listener = demo.listener
    map_path = folder / "city.tif"
    map_path.unlink(missing_ok=True)
    try:
        options = {"--style": STYLE, "--city": CITY, "--frames": FRAMES, "--rate": RATE_HZ}
        words = [str(word) for option in options.items() for word in option]
        drive = demo.start("xview_loc.cli", "simulate", str(folder), "--ros", *words)
        # The drive's topics appear once the map is written.
        if not demo.wait(lambda: listener.count_publishers("/image"), START_TIMEOUT_S):
            raise SystemExit("demo: the simulated drive did not start; see its messages above")
        datum_lat, datum_lon = _middle(map_path)
        parameters = {
            "map": str(map_path),
            "model": model,
            "heading_source": "quaternion",
            "qos_reliability": "reliable",
            "datum_lat": datum_lat,
            "datum_lon": datum_lon,
        }
        words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        demo.start("xview_loc.nodes.localizer_node", "--ros-args", *words)
        if not demo.wait(lambda: listener.count_publishers("/localizer/fix"), START_TIMEOUT_S):
            raise SystemExit("demo: the localizer did not start; see its messages above")
        demo.wait(lambda: drive.poll() is not None, START_TIMEOUT_S + FRAMES / RATE_HZ)
        demo.wait(lambda: len(listener.track.estimate) == FRAMES, LAST_FRAME_TIMEOUT_S)
    finally:
        demo.close()
    if len(listener.track.estimate) < FRAMES / 2:
        raise SystemExit(f"demo: only {len(listener.track.estimate)} of {FRAMES} frames were localised")
    return listener, map_path


def draw_map(track: Track, map_path: Path) -> Figure:
    """Truth, coarse fixes and estimates over the aerial image, in metres about the drive's middle."""
    truth = np.array(list(track.truth.values()))
    plane = LocalProjection(*truth.mean(0))
    reach = max(float(np.abs(plane.forward(*truth.T)).max()) + 40.0, 80.0)
    with AerialMap.open(str(map_path)) as aerial:
        tile = aerial.tile(plane.lat, plane.lon, 1000, 2 * reach / 1000)
    figure = Figure(figsize=(9, 9))
    axes = figure.add_subplot()
    axes.imshow(tile.image, extent=(-reach, reach, -reach, reach))
    for label, look, colour, places in (
        ("truth", "-", "white", track.truth),
        ("coarse fix", ".-", "tab:orange", track.fix),
        ("estimate", ".", "cyan", track.estimate),
    ):
        east, north = plane.forward(*np.array([places[s] for s in sorted(places)]).T)
        axes.plot(east, north, look, color=colour, linewidth=1.5, markersize=5, label=label)
    axes.set(xlabel="east, m", ylabel="north, m", xlim=(-reach, reach), ylim=(-reach, reach))
    axes.legend(loc="upper right")
    return figure


def draw_errors(coarse: dict[int, float], own: dict[int, float]) -> Figure:
    """Errors over time."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.add_subplot()
    start = min(own)
    for label, colour, errors in (("coarse fix", "tab:orange", coarse), ("estimate", "tab:blue", own)):
        axes.plot([(s - start) / 1e9 for s in errors], list(errors.values()), color=colour, label=label)
    axes.set(xlabel="time, s", ylabel="distance from the truth, m", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_heat_map(listener: Listener, map_path: Path, datum: LocalProjection) -> Figure:
    """The last heat map over its aerial tile, in map-frame metres."""
    assert listener.grid is not None
    info = listener.grid.info
    cells = np.array(listener.grid.data, np.float32).reshape(info.height, info.width)
    side = info.width * info.resolution
    left, bottom = info.origin.position.x, info.origin.position.y
    extent = (left, left + side, bottom, bottom + side)
    with AerialMap.open(str(map_path)) as aerial:
        tile = aerial.tile(*datum.inverse(left + side / 2, bottom + side / 2), 512, side / 512)
    figure = Figure(figsize=(9, 4.5))
    for index, axes in enumerate(figure.subplots(1, 2, sharex=True, sharey=True)):
        axes.imshow(tile.image, extent=extent)
        if index:
            axes.imshow(np.flipud(cells), extent=extent, cmap="inferno", alpha=0.65)
        for label, colour, marker, places in (
            ("truth", "white", "o", listener.track.truth),
            ("coarse fix", "tab:orange", "x", listener.track.fix),
            ("estimate", "cyan", "+", listener.track.estimate),
        ):
            if listener.grid_stamp in places:
                east, north = datum.forward(*places[listener.grid_stamp])
                axes.plot(
                    east, north, marker, color=colour, markersize=9, fillstyle="none", label=label, ls=""
                )
        axes.set(xlabel="east, m", xlim=extent[:2], ylim=extent[2:])
    axes.legend(loc="lower left", fontsize=8)
    return figure


def main() -> None:
    """Drive, localise, compare, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    model = parser.parse_args().model
    folder = Path("demo_output").resolve()
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    if FASTDDS_PROFILE.exists():
        os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(FASTDDS_PROFILE))
    print(f"building a simulated city the model has never seen ({STYLE} style, seed {CITY}) ...", flush=True)
    listener, map_path = run_drive(folder, model)
    track = listener.track
    coarse, own = track.errors(track.fix), track.errors(track.estimate)
    rows = {
        name: Errors.of(np.array(list(e.values()))) for name, e in (("coarse fix", coarse), ("estimate", own))
    }
    page = Page("xview_loc: a drive through a city it has never seen")
    page.text(
        f"{len(own)} of {FRAMES} frames of a simulated drive were localised, each by itself, by the "
        f"localizer node with {model}, live over DDS. The city (style {STYLE}, seed {CITY}) was not in its "
        "training."
    )
    header = ["distance from the truth", "mean", "median", "95 %"]
    page.table(header, [[n, *(f"{v:.1f} m" for v in (e.mean, e.median, e.p95))] for n, e in rows.items()])
    page.heading("Where it drove")
    page.figure(draw_map(track, map_path), "Truth, coarse fixes and estimates over the aerial image")
    page.heading("How far off")
    page.figure(draw_errors(coarse, own), "Distance from the truth of the coarse fix and of the estimate")
    if listener.grid is not None:
        datum = LocalProjection(*_middle(map_path))
        page.heading("One heat map")
        page.figure(draw_heat_map(listener, map_path, datum), "The last frame's aerial tile and heat map")
    page.write(folder / "demo.html")
    for name, errors in rows.items():
        print(
            f"{name:10s}: median {errors.median:5.2f} m, mean {errors.mean:5.2f} m, 95 % {errors.p95:5.2f} m"
        )
    ratio = rows["estimate"].median / rows["coarse fix"].median
    print(f"the estimate's median error is {ratio:.0%} of the coarse fix's")
    print(f"page: {folder / 'demo.html'}")


if __name__ == "__main__":
    main()
