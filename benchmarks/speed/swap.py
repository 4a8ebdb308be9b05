"""Measure what a change of checkpoint costs a running localizer: frames, gaps between poses, latency.

benchmarks/speed/swap.py [--rate 10] [--swaps 50] [--model ccvpe-small] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import torch
from rich.console import Console
from rich.table import Table
from vehicle import Vehicle, isolate, localizer, memory_mb

from xview_loc.models.checkpoint import load_model, save_checkpoint, shipped_checkpoint
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive

PERTURBATION = 1e-3  # of each weight, relative
LONGEST_GAP = 2.0  # allowed between two poses, frame periods


def perturbed(model: str, path: Path) -> Path:
    """Write a checkpoint whose weights differ a little from the shipped ones."""
    network = load_model(model).model
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.0 + PERTURBATION * torch.randn_like(weight))
    save_checkpoint(network, path)
    return path


class Driving:
    """Publish frames at a steady rate, back and forth, so that the vehicle never jumps."""

    def __init__(self, vehicle: Vehicle, pid: int, frames: list[Frame], rate_hz: float) -> None:
        self._vehicle, self._pid, self._period = vehicle, pid, 1.0 / rate_hz
        self._frames = itertools.cycle(frames + frames[-2:0:-1])

    def measure(self, seconds: float, checkpoints: list[Path]) -> dict[str, Any]:
        """Drive for ``seconds`` and until each checkpoint was activated; return the figures."""
        vehicle = self._vehicle
        before = vehicle.counts()
        for record in (vehicle.latencies, vehicle.arrivals, vehicle.sent):
            record.clear()  # type: ignore[attr-defined]
        self._due, self._count = time.monotonic(), 0
        while self._count * self._period < seconds:
            self._step()
        durations = [self._swap(path) for path in checkpoints]
        vehicle.wait(lambda: not vehicle.sent, 2.0)
        after = vehicle.counts()
        grown = {key: after[key] - before.get(key, 0) for key in after}
        stamps, arrivals = np.array(vehicle.arrivals).T
        p50, p95, worst = np.percentile(vehicle.latencies, [50, 95, 100])
        dropped = grown.get("frames_dropped", 0)
        return {
            "images sent": self._count,
            "poses received": len(arrivals),
            "dropped: the node was busy": dropped,
            "lost": self._count - len(arrivals) - dropped,
            "longest gap by stamps, periods": np.diff(np.sort(stamps)).max() / 1e9 / self._period,
            "longest gap by arrival, periods": np.diff(arrivals).max() / self._period,
            "latency median, ms": p50,
            "latency 95 %, ms": p95,
            "latency worst, ms": worst,
            "RSS at the end, MB": memory_mb(self._pid, "VmRSS"),
            "swaps": len(durations),
            "seconds per swap": float(np.median(durations)) if durations else 0.0,
        }

    def _step(self) -> None:
        self._vehicle.spin_until(self._due)
        self._due += self._period
        self._vehicle.publish(next(self._frames))
        self._count += 1

    def _swap(self, path: Path) -> float:
        began = time.monotonic()
        verdict = self._vehicle.deploy(path)
        while not verdict.done():
            self._step()
        if not verdict.result().success or str(path) not in verdict.result().message:
            raise SystemExit(f"{path} is not in use: {verdict.result().message}")
        return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=10.0, help="frames per second")
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    isolate()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        city = build_city(7, "source")
        frames = list(drive(city, 200, seed=1, options=DriveOptions(rate_hz=arguments.rate)))
        shipped = shipped_checkpoint(arguments.model)
        if shipped is None:
            raise SystemExit(f"no weights come with {arguments.model}")
        other = perturbed(arguments.model, folder / "other.safetensors")
        parameters = {
            "map": city.write_geotiff(folder / "city.tif"),
            "model": arguments.model,
            "checkpoint_dirs": [str(folder)],
        }
        rclpy.init()
        vehicle = Vehicle()
        with localizer(vehicle, folder / "node.log", parameters) as node:
            driving = Driving(vehicle, node.pid, frames, arguments.rate)
            driving.measure(3.0, [other, shipped])  # warm-up
            results = {
                "without swaps": driving.measure(20.0, []),
                "with swaps": driving.measure(1.0, [other, shipped] * (arguments.swaps // 2)),
            }
            peak = memory_mb(node.pid, "VmHWM")
        errors = (folder / "node.log").read_text().count("Traceback")
    table = Table("what", *results, title=f"{arguments.model}, {arguments.rate:g} Hz, {os.cpu_count()} cores")
    for what in results["with swaps"]:
        table.add_row(what, *(f"{values[what]:.4g}" for values in results.values()))
    Console().print(table)
    if arguments.json:
        report = {**results, "peak RSS, MB": peak, "exceptions logged": errors}
        arguments.json.write_text(json.dumps(report, indent=1))
    swapped = results["with swaps"]
    gaps = [value for what, value in swapped.items() if what.startswith("longest gap")]
    return 1 if errors or swapped["lost"] > 0 or max(gaps) > LONGEST_GAP else 0


if __name__ == "__main__":
    sys.exit(main())
