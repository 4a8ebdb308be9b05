"""Measure the seconds to build a city and the milliseconds per view, in one thread.

benchmarks/speed/simulation.py [--size 1020] [--json FILE]

Figures are medians over views at ten places of a drive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import drive
from xview_loc.simulation.styles import STYLES
from xview_loc.simulation.views import CameraPose, PinholeView, render_panorama, render_pinhole


def measure(style: str, seed: int, size_m: float, repeats: int) -> dict[str, float | str]:
    start = time.perf_counter()
    city: City = build_city(seed, style, size_m=size_m)
    build_s = time.perf_counter() - start
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"panorama": [], "pinhole": []}
    for frame in list(drive(city, 500, seed, view=None))[::50]:
        truth = frame.truth
        pose = CameraPose(truth.east, truth.north, truth.heading)
        for _ in range(repeats):
            start = time.perf_counter()
            render_panorama(city, pose, rng=rng)
            middle = time.perf_counter()
            render_pinhole(city, pose, PinholeView(256, 1024), rng=rng)
            times["panorama"].append(middle - start)
            times["pinhole"].append(time.perf_counter() - middle)
    return {
        "style": style,
        "build_s": build_s,
        "panorama_128x512_ms": 1e3 * statistics.median(times["panorama"]),
        "panorama_p95_ms": 1e3 * float(np.quantile(times["panorama"], 0.95)),
        "pinhole_256x1024_ms": 1e3 * statistics.median(times["pinhole"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=1020.0, help="side of the city in metres")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rows = [measure(style, args.seed, args.size, args.repeats) for style in STYLES]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else v for v in row.values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
