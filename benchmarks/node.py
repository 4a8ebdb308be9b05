"""Latency of the whole node, image in to pose out, at several rates; and a soak test of its memory.

python benchmarks/node.py [--rates 1 2 5] [--frames 40] [--soak MINUTES] [--model ccvpe-small] [--json FILE]
"""

from __future__ import annotations

import argparse
import array
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped, QuaternionStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.time import Time
from rich.console import Console
from rich.table import Table
from sensor_msgs.msg import Image, NavSatFix, NavSatStatus

from xview_loc.simulation.city import build_city
from xview_loc.simulation.drive import DriveOptions, Frame, drive

ROOT = Path(__file__).resolve().parent.parent
SOAK_TIMEOUT_S = 0.5


class Vehicle(Node):
    """Publishes frames and notes when their poses come back."""

    def __init__(self) -> None:
        super().__init__("vehicle")
        self.images = self.create_publisher(Image, "image", 5)
        self.fixes = self.create_publisher(NavSatFix, "fix", 5)
        self.headings = self.create_publisher(QuaternionStamped, "heading", 5)
        self.sent: dict[int, float] = {}
        self.latencies: list[float] = []
        self.diagnostics: dict[str, str] = {}
        self.create_subscription(PoseWithCovarianceStamped, "/localizer/pose", self._on_pose, 10)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def publish(self, frame: Frame) -> int:
        """Send one frame, stamped now; its stamp."""
        assert frame.image is not None
        now = self.get_clock().now()
        stamp = now.to_msg()
        heading = QuaternionStamped()
        heading.header.stamp = stamp
        heading.quaternion.z = math.sin(frame.heading / 2)
        heading.quaternion.w = math.cos(frame.heading / 2)
        fix = NavSatFix(latitude=frame.fix.lat, longitude=frame.fix.lon)
        fix.header.stamp = stamp
        fix.status.status = NavSatStatus.STATUS_FIX
        (fix.position_covariance[0], _), (_, fix.position_covariance[4]) = frame.fix.covariance
        fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_DIAGONAL_KNOWN
        height, width, _ = frame.image.shape
        image = Image(height=height, width=width, step=3 * width, encoding="rgb8")
        image.header.stamp = stamp
        image.data = array.array("B", frame.image.tobytes())
        self.headings.publish(heading)
        self.fixes.publish(fix)
        self.sent[now.nanoseconds] = time.monotonic()
        self.images.publish(image)
        return now.nanoseconds

    def _on_pose(self, pose: PoseWithCovarianceStamped) -> None:
        sent = self.sent.pop(Time.from_msg(pose.header.stamp).nanoseconds, None)
        if sent is not None:
            self.latencies.append((time.monotonic() - sent) * 1e3)

    def _on_diagnostics(self, array_: DiagnosticArray) -> None:
        for status in array_.status:
            self.diagnostics = {value.key: value.value for value in status.values}


def memory_mb(pid: int, field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field))


def at_rate(
    vehicle: Vehicle, executor: SingleThreadedExecutor, frames: list[Frame], rate: float
) -> dict[str, Any]:
    """Publish ``frames`` at ``rate`` Hz; latencies in ms."""
    vehicle.latencies.clear()
    vehicle.sent.clear()
    for frame in frames:
        due = time.monotonic() + 1.0 / rate
        vehicle.publish(frame)
        while (left := due - time.monotonic()) > 0:
            executor.spin_once(timeout_sec=left)
    end = time.monotonic() + 2.0
    while time.monotonic() < end and len(vehicle.latencies) < len(frames):
        executor.spin_once(timeout_sec=0.05)
    if not vehicle.latencies:
        raise SystemExit(f"no pose at {rate:g} Hz")
    p50, p95, worst = np.percentile(vehicle.latencies, [50, 95, 100])
    return {"p50": p50, "p95": p95, "max": worst, "poses": len(vehicle.latencies), "frames": len(frames)}


def soak(
    vehicle: Vehicle, executor: SingleThreadedExecutor, frames: list[Frame], minutes: float, pid: int
) -> dict[str, Any]:
    """Publish each frame as soon as the last one's pose is there; memory minute by minute, in MB."""
    vehicle.latencies.clear()
    begin, published, missed = time.monotonic(), 0, 0
    samples: list[tuple[float, float]] = []
    while (now := time.monotonic() - begin) < minutes * 60:
        # There and back again, so that the vehicle never jumps.
        index = published % (2 * len(frames) - 2)
        stamp = vehicle.publish(frames[min(index, 2 * len(frames) - 2 - index)])
        published += 1
        deadline = time.monotonic() + SOAK_TIMEOUT_S
        while stamp in vehicle.sent and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=SOAK_TIMEOUT_S)
        missed += vehicle.sent.pop(stamp, None) is not None
        if not samples or now - samples[-1][0] >= 1.0:
            samples.append((now, memory_mb(pid, "VmRSS")))
            if len(samples) % 60 == 1:
                print(f"{now:4.0f} s: {published} frames, RSS {samples[-1][1]:.1f} MB", flush=True)
    by_minute = [
        float(np.mean([rss for at, rss in samples if m * 60 <= at < (m + 1) * 60]))
        for m in range(max(1, int(minutes)))
    ]
    return {
        "frames": published,
        "poses": len(vehicle.latencies),
        "without a pose": missed,
        "RSS by minute, MB": [round(x, 1) for x in by_minute],
        "growth, %": round(100 * (by_minute[-1] / by_minute[0] - 1), 2),
        "rejected, dropped": {
            key: value for key, value in vehicle.diagnostics.items() if "rejected" in key or "dropped" in key
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 2.0, 5.0])
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--soak", type=float, default=0.0, help="minutes")
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds.xml")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        city = build_city(7, "source")
        map_path = city.write_geotiff(Path(folder) / "city.tif")
        frames = list(drive(city, 200, seed=1, options=DriveOptions(rate_hz=5.0)))
        results: dict[str, Any] = {}
        log_path = Path(folder) / "node.log"
        parameters = {
            "map": map_path,
            "model": arguments.model,
            "heading_source": "quaternion",
            "qos_reliability": "reliable",
        }
        words = [w for name, value in parameters.items() for w in ("-p", f"{name}:={value}")]
        rclpy.init()
        vehicle = Vehicle()
        executor = SingleThreadedExecutor()
        executor.add_node(vehicle)
        with log_path.open("w") as log:
            node = subprocess.Popen(
                [sys.executable, "-m", "xview_loc.nodes.localizer_node", "--ros-args", *words],
                stdout=log,
                stderr=log,
            )
        try:
            while not (
                vehicle.images.get_subscription_count() and vehicle.count_publishers("/localizer/pose")
            ):
                executor.spin_once(timeout_sec=0.1)
                if node.poll() is not None:
                    raise SystemExit(log_path.read_text())
            at_rate(vehicle, executor, frames[:5], 2.0)  # warm-up
            for rate in arguments.rates:
                results[f"{rate:g} Hz"] = at_rate(vehicle, executor, frames[: arguments.frames], rate)
            if arguments.soak:
                results["soak"] = soak(vehicle, executor, frames, arguments.soak, node.pid)
            results["peak RSS, MB"] = memory_mb(node.pid, "VmHWM")
        finally:
            node.terminate()
            node.wait(20)
            rclpy.try_shutdown()
        text = log_path.read_text()
        results["exceptions logged"] = text.count("Traceback") + text.count("internal_error")
    table = Table("what", "figure", title=f"{arguments.model}, {os.cpu_count()} cores")
    for name, value in results.items():
        if isinstance(value, float):
            value = f"{value:.1f}"
        elif "p50" in value if isinstance(value, dict) else False:
            value = "p50 {p50:.0f} ms, p95 {p95:.0f} ms, max {max:.0f} ms; {poses} of {frames} poses".format(
                **value
            )
        table.add_row(name, str(value))
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    bad = results["exceptions logged"] > 0
    if "soak" in results:
        bad |= results["soak"]["growth, %"] >= 5.0 or results["soak"]["without a pose"] > 0
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
