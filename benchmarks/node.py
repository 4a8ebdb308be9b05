"""Latency of the whole node, image in to pose out, at several rates; and a soak test of its memory.

python benchmarks/node.py [--rates 1 2 5] [--frames 40] [--soak MINUTES] [--model ccvpe-small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rich.console import Console
from rich.table import Table
from vehicle import Vehicle, isolate, localizer, memory_mb

from xview_loc.simulation.city import build_city
from xview_loc.simulation.drive import DriveOptions, Frame, drive

SOAK_TIMEOUT_S = 0.5


def at_rate(vehicle: Vehicle, frames: list[Frame], rate: float) -> dict[str, Any]:
    """Publish ``frames`` at ``rate`` Hz; latencies in ms."""
    vehicle.latencies.clear()
    vehicle.sent.clear()
    for frame in frames:
        due = time.monotonic() + 1.0 / rate
        vehicle.publish(frame)
        vehicle.spin_until(due)
    vehicle.wait(lambda: len(vehicle.latencies) == len(frames), 2.0)
    if not vehicle.latencies:
        raise SystemExit(f"no pose at {rate:g} Hz")
    p50, p95, worst = np.percentile(vehicle.latencies, [50, 95, 100])
    return {"p50": p50, "p95": p95, "max": worst, "poses": len(vehicle.latencies), "frames": len(frames)}


def soak(vehicle: Vehicle, frames: list[Frame], minutes: float, pid: int) -> dict[str, Any]:
    """Publish each frame as soon as the last one's pose is there; memory minute by minute, in MB."""
    vehicle.latencies.clear()
    begin, published, missed = time.monotonic(), 0, 0
    samples: list[tuple[float, float]] = []
    while (now := time.monotonic() - begin) < minutes * 60:
        # There and back again, so that the vehicle never jumps.
        index = published % (2 * len(frames) - 2)
        stamp = vehicle.publish(frames[min(index, 2 * len(frames) - 2 - index)])
        published += 1
        vehicle.wait(lambda stamp=stamp: stamp not in vehicle.sent, SOAK_TIMEOUT_S)
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
    isolate()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        city = build_city(7, "source")
        map_path = city.write_geotiff(Path(folder) / "city.tif")
        frames = list(drive(city, 200, seed=1, options=DriveOptions(rate_hz=5.0)))
        results: dict[str, Any] = {}
        log_path = Path(folder) / "node.log"
        rclpy.init()
        vehicle = Vehicle()
        with localizer(vehicle, log_path, {"map": map_path, "model": arguments.model}) as node:
            at_rate(vehicle, frames[:5], 2.0)  # warm-up
            for rate in arguments.rates:
                results[f"{rate:g} Hz"] = at_rate(vehicle, frames[: arguments.frames], rate)
            if arguments.soak:
                results["soak"] = soak(vehicle, frames, arguments.soak, node.pid)
            results["peak RSS, MB"] = memory_mb(node.pid, "VmHWM")
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
