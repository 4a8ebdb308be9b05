"""Measure the latency of the node, image in to pose out, at several rates, and its memory over time.

benchmarks/speed/node.py [--rates 2 5 20] [--frames 100] [--image 1920x960] [--compressed]
    [--rig six] [--height 720] [--backend auto] [--soak MINUTES] [--model ccvpe-small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from rich.console import Console
from rich.table import Table
from vehicle import RigVehicle, Vehicle, cpu_seconds, isolate, localizer, memory_mb

from xview_loc.models.runtimes import BACKENDS
from xview_loc.rig import Rig
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.rigs import FULL_HEIGHT, RIGS, make_rig
from xview_loc.simulation.views import PanoramaView
from xview_loc.vehicle.rig_file import write_rig_file

SOAK_TIMEOUT_S = 0.5


def at_rate(vehicle: Vehicle, frames: list[Frame], rate: float, pid: int) -> dict[str, float]:
    """Publish ``frames`` at ``rate`` Hz; return latencies in ms, from publishing a frame to its pose."""
    before = vehicle.counts()
    for record in (vehicle.latencies, vehicle.sent, vehicle.inference_ms):
        record.clear()
    vehicle.prepare(frames)
    begin, cpu = time.monotonic(), cpu_seconds(pid)
    for number, frame in enumerate(frames, 1):
        vehicle.publish(frame)
        # Due times count from the beginning, so that a late frame delays no other.
        vehicle.spin_until(begin + number / rate)
    seconds, cpu = time.monotonic() - begin, cpu_seconds(pid) - cpu
    vehicle.wait(lambda: len(vehicle.latencies) == len(frames), 2.0)
    if not vehicle.latencies:
        raise SystemExit(f"no pose at {rate:g} Hz")
    after = vehicle.counts()
    p50, p95, worst = np.percentile(vehicle.latencies, [50, 95, 100])
    inference = float(np.median(vehicle.inference_ms))
    return {
        "p50": p50,
        "p95": p95,
        "max": worst,
        "inference p50": inference,
        "inference, %": 100 * float(np.sum(vehicle.inference_ms) / np.sum(vehicle.latencies)),
        "answered, Hz": len(vehicle.latencies) / seconds,
        "frames": len(frames),
        "poses": len(vehicle.latencies),
        "dropped": after.get("frames_dropped", 0) - before.get("frames_dropped", 0),
        "CPU, % of a core": 100 * cpu / seconds,
    }


def driven(
    city: City, count: int, rate: float, size: tuple[int, int] | None, rig: Rig | None = None
) -> list[Frame]:
    """Return ``count`` frames of a drive, with a panorama resized to (width, height) if given, or a rig."""
    options = DriveOptions(rate_hz=rate)
    frames = list(drive(city, count, seed=1, options=options, view=rig or PanoramaView()))
    if size is None or rig is not None:
        return frames
    return [replace(f, image=np.asarray(cv2.resize(np.asarray(f.image), size), np.uint8)) for f in frames]


def soak(vehicle: Vehicle, frames: list[Frame], minutes: float, pid: int) -> dict[str, Any]:
    """Publish each frame as soon as the previous pose arrives; return the memory by minute, MB."""
    vehicle.latencies.clear()
    vehicle.prepare(frames)
    begin, published, missed = time.monotonic(), 0, 0
    samples: list[tuple[float, float]] = []
    while (now := time.monotonic() - begin) < minutes * 60:
        # Back and forth, so that the vehicle never jumps.
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
    parser.add_argument("--rates", type=float, nargs="*", default=[2.0, 5.0, 20.0])
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--image", help="WIDTHxHEIGHT of the images; default: the input size of the model")
    parser.add_argument("--compressed", action="store_true", help="send images as JPEG")
    parser.add_argument(
        "--rig", choices=list(RIGS), help="cameras, whose JPEGs are sent instead of a panorama"
    )
    parser.add_argument("--height", type=int, default=FULL_HEIGHT, help="of the rig's images, pixels")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--soak", type=float, default=0.0, help="duration of the memory test, minutes")
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = None
    if arguments.image:
        width, _, height = arguments.image.partition("x")
        size = (int(width), int(height))
    isolate()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        city = build_city(7, "source")
        map_path = city.write_geotiff(Path(folder) / "city.tif")
        results: dict[str, Any] = {}
        log_path = Path(folder) / "node.log"
        rclpy.init()
        rig = make_rig(arguments.rig, arguments.height / FULL_HEIGHT) if arguments.rig else None
        vehicle = RigVehicle(rig) if rig else Vehicle(arguments.compressed)
        parameters = {
            "map": map_path,
            "model": arguments.model,
            "allow_untrained": "true",  # speed does not depend on the weights
            "backend": arguments.backend,
            "image_transport": "compressed" if arguments.compressed or rig else "raw",
        }
        if rig:
            rig_file = Path(folder) / "rig.yaml"
            write_rig_file(rig_file, rig.cameras)
            parameters |= {"cameras": list(rig.cameras), "rig_file": rig_file, "tilt_source": "imu"}
        with localizer(vehicle, log_path, parameters) as node:
            at_rate(vehicle, driven(city, 5, 2.0, size, rig), 2.0, node.pid)  # warm-up
            results["backend"] = vehicle.diagnostics.get("backend", "?")
            for rate in arguments.rates:
                frames = driven(city, arguments.frames, rate, size, rig)
                results[f"{rate:g} Hz"] = at_rate(vehicle, frames, rate, node.pid)
            if arguments.soak:
                frames = driven(city, 200, 5.0, size, rig)
                results["soak"] = soak(vehicle, frames, arguments.soak, node.pid)
            results["peak RSS, MB"] = memory_mb(node.pid, "VmHWM")
        text = log_path.read_text()
        results["exceptions logged"] = text.count("Traceback") + text.count("internal_error")
    kind = f"{arguments.image or 'own size'} {'JPEG' if arguments.compressed else 'raw'}"
    if arguments.rig:
        kind = f"of rig {arguments.rig}, {arguments.height} pixels high, JPEG"
    title = f"{arguments.model}, {results['backend']}, images {kind}, {os.cpu_count()} cores"
    table = Table("what", "figure", title=title)
    for name, value in results.items():
        if isinstance(value, float):
            value = f"{value:.1f}"
        elif isinstance(value, dict) and "p50" in value:
            value = (
                "p50 {p50:.0f} ms, p95 {p95:.0f} ms, max {max:.0f} ms; inference p50 {inference p50:.1f} ms, "
                "{inference, %:.0f} % of it all; {answered, Hz:.1f} Hz: {poses} of {frames} poses, "
                "{dropped} dropped; {CPU, % of a core:.0f} % of a core"
            ).format(**value)
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
