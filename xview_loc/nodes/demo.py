"""``make demo``: a simulated drive, published by one process and localised live by the node in another."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import rclpy
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import NavSatFix

from xview_loc.geodesy import LocalProjection
from xview_loc.imagery import AerialMap
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drive import DriveOptions, drive

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FRAMES = 20
RATE_HZ = 2.0
START_TIMEOUT_S = 60.0
LAST_FRAME_TIMEOUT_S = 5.0
FASTDDS_PROFILE = Path(__file__).resolve().parents[2] / "config" / "fastdds.xml"


def record_drive(city: City, folder: Path) -> list[dict]:
    """Drive through the city; write the panoramas and ``drive.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    frames: list[dict] = []
    for index, frame in enumerate(drive(city, FRAMES, seed=1, options=DriveOptions(rate_hz=RATE_HZ))):
        assert frame.image is not None
        name = f"{index:03d}.png"
        cv2.imwrite(str(folder / name), cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR))
        frames.append(
            {
                "image": name,
                "lat": frame.fix.lat,
                "lon": frame.fix.lon,
                "sigma": math.sqrt(float(frame.fix.covariance[0, 0])),
                "heading": frame.heading,
                "true_lat": frame.truth.lat,
                "true_lon": frame.truth.lon,
            }
        )
    (folder / "drive.json").write_text(json.dumps(frames))
    return frames


class Listener(Node):
    """Collects what the localizer publishes and prints each position as it arrives."""

    def __init__(self, frames: list[dict]) -> None:
        super().__init__("demo")
        self.frames = frames
        self.fixes: list[NavSatFix] = []
        self.grid: OccupancyGrid | None = None
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_subscription(NavSatFix, "/localizer/fix", self._on_fix, 50)
        self.create_subscription(OccupancyGrid, "/localizer/heat_map", self._on_grid, latched)

    def _on_fix(self, fix: NavSatFix) -> None:
        self.fixes.append(fix)
        sigma = math.sqrt(max(fix.position_covariance[0], fix.position_covariance[4]))
        print(
            f"pose {len(self.fixes):3d}: {fix.latitude:.7f} {fix.longitude:.7f}, sigma {sigma:.1f} m",
            flush=True,
        )

    def _on_grid(self, grid: OccupancyGrid) -> None:
        self.grid = grid


class Demo:
    """The processes of the demo and the node that listens to them."""

    def __init__(self, frames: list[dict]) -> None:
        rclpy.init()
        self.listener = Listener(frames)
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
            process.wait(20)
        rclpy.try_shutdown()


def draw(listener: Listener, map_path: Path, datum: LocalProjection, picture: Path) -> None:
    """The aerial tile, the last heat map on it, the fixes and the estimates, in map-frame metres."""
    assert listener.grid is not None
    info = listener.grid.info
    cells = np.array(listener.grid.data, np.float32).reshape(info.height, info.width)
    side = info.width * info.resolution
    left, bottom = info.origin.position.x, info.origin.position.y
    extent = (left, left + side, bottom, bottom + side)
    with AerialMap.open(map_path) as aerial_map:
        centre = datum.inverse(left + side / 2, bottom + side / 2)
        tile = aerial_map.tile(*centre, 512, side / 512)
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), sharex=True, sharey=True)
    for axis, title in zip(axes, ("Aerial tile", "Heat map of the last frame"), strict=True):
        axis.imshow(tile.image, extent=extent)
        axis.set(title=title, xlabel="east, m", ylabel="north, m")
    axes[1].imshow(np.flipud(cells), extent=extent, cmap="inferno", alpha=0.6)
    series = (
        ("truth", "white", [(f["true_lat"], f["true_lon"]) for f in listener.frames]),
        ("coarse fix", "tab:orange", [(f["lat"], f["lon"]) for f in listener.frames]),
        ("estimate (untrained weights)", "cyan", [(f.latitude, f.longitude) for f in listener.fixes]),
    )
    for label, colour, places in series:
        east, north = datum.forward(*np.array(places).T)
        for axis in axes:
            axis.plot(east, north, "x", color=colour, markersize=5, label=label)
    axes[0].set(xlim=extent[:2], ylim=extent[2:])
    axes[1].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=80)


def main() -> None:
    """Build a small city, drive it, localise it live, and write a picture."""
    folder = Path("demo_output").resolve()
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    if FASTDDS_PROFILE.exists():
        os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(FASTDDS_PROFILE))
    print("building a simulated city ...", flush=True)
    city = build_city(7, "source")
    map_path = city.write_geotiff(folder / "city.tif")
    frames = record_drive(city, folder / "drive")
    datum = LocalProjection(frames[0]["lat"], frames[0]["lon"])
    parameters = {
        "map": str(map_path),
        "model": "ccvpe-small",
        "heading_source": "quaternion",
        "qos_reliability": "reliable",
        "datum_lat": datum.lat,
        "datum_lon": datum.lon,
    }
    arguments = [x for name, value in parameters.items() for x in ("-p", f"{name}:={value}")]
    print("the weights are UNTRAINED: this shows the plumbing, the positions mean nothing yet", flush=True)
    demo = Demo(frames)
    listener = demo.listener
    try:
        demo.start("xview_loc.nodes.localizer_node", "--ros-args", *arguments)
        if not demo.wait(lambda: listener.count_publishers("/localizer/fix"), START_TIMEOUT_S):
            raise SystemExit("demo: the localizer did not start; see its messages above")
        publisher = demo.start("xview_loc.nodes.drive_publisher", str(folder / "drive"), str(RATE_HZ))
        demo.wait(lambda: publisher.poll() is not None, START_TIMEOUT_S + FRAMES / RATE_HZ)
        demo.wait(lambda: len(listener.fixes) == len(frames), LAST_FRAME_TIMEOUT_S)
        if len(listener.fixes) < len(frames) / 2 or listener.grid is None:
            raise SystemExit(f"demo: only {len(listener.fixes)} of {len(frames)} frames were localised")
        draw(listener, map_path, datum, folder / "demo.png")
    finally:
        demo.close()
    errors = [
        math.dist(datum.forward(f["lat"], f["lon"]), datum.forward(f["true_lat"], f["true_lon"]))
        for f in frames
    ]
    print(f"{len(listener.fixes)} of {len(frames)} frames localised")
    print(
        f"mean error of the coarse fix: {np.mean(errors):.1f} m (the estimate means nothing before training)"
    )
    print(f"picture: {folder / 'demo.png'}")


if __name__ == "__main__":
    main()
