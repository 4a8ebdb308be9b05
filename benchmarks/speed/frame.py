"""Measure the time per frame of every backend and precision, for each model, with known and unknown heading.

benchmarks/speed/frame.py [--models ccvpe-small ccvpe-vigor ...] [--threads 2] [--runs 30] [--json FILE]

The variants of a model take turns, so that other load on the machine affects all alike. ``everything`` is the
published forward pass in float32 with plain PyTorch: it encodes the tile with every image and computes heat
map and orientation field. ``plain`` omits the orientation field if the heading is known. The others keep the
tile (``cached``) or see it for the first time (``cold``, in PyTorch for all). GFLOP count convolutions and
matrix products; the floor is the fastest matrix product of PyTorch on this machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

MODELS = ("ccvpe-small", "ccvpe-vigor", "ggcvt-small", "ggcvt-vigor")
WAYS = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("onnxruntime", "float32"),
)
WARM_UP = 3


def peak_rss_mb() -> float:
    """Return the peak memory of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def median_ms(function: Callable[[], object], runs: int, warm_up: int = WARM_UP) -> float:
    return float(np.median(times_ms({"": function}, runs, warm_up)[""]))


def times_ms(
    functions: dict[Any, Callable[[], object]], runs: int, warm_up: int = WARM_UP
) -> dict[Any, list[float]]:
    """Time functions in turn, ``runs`` times; return milliseconds."""
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for run in range(warm_up + runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if run >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def floor_gflops(threads: int) -> dict[str, float]:
    """Return GFLOP/s of a plain matrix product by precision, the faster of two implementations."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    size, side = 2048, 64
    rates = {}
    for precision in ("float32", "bfloat16"):
        a = torch.randn(size, size, dtype=getattr(torch, precision))
        image = torch.randn(1, 512, side, side, dtype=a.dtype).to(memory_format=torch.channels_last)
        kernel = torch.randn(512, 512, 1, 1, dtype=a.dtype).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            product = times_ms({"": lambda a=a: a @ a}, 8)[""]
            pointwise = times_ms({"": lambda image=image, kernel=kernel: F.conv2d(image, kernel)}, 20)[""]
        rates[precision] = max(2 * size**3 / min(product) / 1e6, 2 * side**2 * 512**2 / min(pointwise) / 1e6)
    return rates


class Frame:
    """One image and one tile of noise, for every variant."""

    def __init__(self, name: str, known: bool, threads: int) -> None:
        import torch

        from xview_loc.models import create_model
        from xview_loc.models.checkpoint import load_model, shipped_checkpoint
        from xview_loc.models.graph import FrameSettings

        def seeded(name: str) -> Any:
            torch.manual_seed(0)
            return create_model(name)

        torch.set_num_threads(threads)
        self.name = name
        self.shipped = shipped_checkpoint(name) is not None
        self.make = lambda: load_model(name).model if self.shipped else seeded(name)
        model = self.make()
        spec = model.spec
        torch.manual_seed(0)
        self.bins = spec.bins
        self.settings = FrameSettings.of(model, 0.0 if known else None)
        self.ground = torch.rand(1, 3, *spec.ground_size)
        self.aerial = torch.rand(1, 3, spec.aerial_size, spec.aerial_size)

    def plain(self, orientation: bool) -> Callable[[], Any]:
        model, prior, extra = self.make(), self.settings.heading_prior_deg, self.settings.extra()
        return lambda: model.match(
            self.ground, model.encode_aerial(self.aerial), prior, orientation=orientation, **extra
        )

    def kept(self, backend: str, precision: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return functions that compute the frame on a cached tile and on a new one."""
        import torch

        from xview_loc.models.runtimes import make_runtime

        model, settings = self.make(), self.settings
        layout = torch.channels_last
        dtype = getattr(torch, precision) if backend == "torch" else torch.float32
        model.to(dtype).to(memory_format=layout)
        ground, aerial = (x.to(dtype).to(memory_format=layout) for x in (self.ground, self.aerial))
        orientation = settings.orientation

        def encode() -> Any:
            return model.precompute(model.encode_aerial(aerial), orientation=orientation)

        if backend == "torch":
            prior, extra = settings.heading_prior_deg, settings.extra()

            def match(features: Any) -> Any:
                return model.match(ground, features, prior, orientation=orientation, **extra)
        else:
            runtime = make_runtime(model, backend, settings, precision)  # type: ignore[arg-type]

            def match(features: Any) -> Any:
                return model.maps(runtime(ground, model.tile_tensors(features)), features)

        with torch.inference_mode():
            features = encode()
        return lambda: match(features), lambda: match(encode())


def measure(name: str, known: bool, threads: int, runs: int) -> list[dict[str, Any]]:
    """Return the rows of one model, with known or unknown heading."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    frame = Frame(name, known, threads)
    functions: dict[Any, Callable[[], Any]] = {("everything", "float32", ""): frame.plain(frame.bins > 0)}
    if known and frame.bins:
        functions["plain", "float32", ""] = frame.plain(False)
    for backend, precision in WAYS:
        cached, cold = frame.kept(backend, precision)
        functions[backend, precision, "cached"] = cached
        functions[backend, precision, "cold"] = cold
    with torch.inference_mode():
        operations = {}
        for key in (("everything", "float32", ""), ("plain", "float32", ""), ("torch", "float32", "cached")):
            if key in functions:
                with FlopCounterMode(display=False) as counter:
                    functions[key]()
                operations[key] = counter.get_total_flops()
        times = times_ms(functions, runs)
        peaks = {key: int(functions[key]().logits.argmax()) for key in functions}
    base = times["everything", "float32", ""]
    rows = []
    for key, values in times.items():
        backend, precision, tile = key
        same = ("torch", "float32", "cached") if tile == "cached" else key
        p50, p95 = np.percentile(values, [50, 95])
        rows.append(
            {
                "model": name,
                "heading": "known" if known else "unknown",
                "way": f"{backend} {precision}",
                "tile": tile,
                "p50_ms": float(p50),
                "p95_ms": float(p95),
                "hz": 1e3 / float(p50),
                "everything_over_this": float(np.median(base) / p50),
                "plain_over_this": float(np.median(times["plain", "float32", ""]) / p50)
                if ("plain", "float32", "") in times
                else None,
                "gflop": operations.get(same, 0) / 1e9 or None,
                "gflops": operations.get(same, 0) / 1e6 / float(p50) or None,
                "same_maximum": peaks[key] == peaks["everything", "float32", ""],
            }
        )
    return rows


def measure_parts(name: str, threads: int, runs: int) -> list[dict[str, Any]]:
    """Return time and GFLOP of the parts of a model in PyTorch, float32, with known heading."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    frame = Frame(name, True, threads)
    model, extra = frame.make().to(memory_format=torch.channels_last), frame.settings.extra()
    prior = frame.settings.heading_prior_deg
    ground, aerial = (x.to(memory_format=torch.channels_last) for x in (frame.ground, frame.aerial))
    with torch.inference_mode():
        encoded = model.encode_aerial(aerial)
        kept = model.precompute(encoded)
        functions: dict[Any, Callable[[], Any]] = {
            "encode_aerial": lambda: model.encode_aerial(aerial),
            "precompute": lambda: model.precompute(encoded),
            "encode_ground": lambda: model.encode_ground(ground, **extra),
            "match, tile kept": lambda: model.match(ground, kept, prior, **extra),
        }
        if kept is encoded:
            del functions["precompute"]
        times = times_ms(functions, runs)
        rows = []
        for part, function in functions.items():
            with FlopCounterMode(display=False) as counter:
                function()
            gflop, p50 = counter.get_total_flops() / 1e9, float(np.median(times[part]))
            rows.append(
                {"model": name, "part": part, "gflop": gflop, "p50_ms": p50, "gflops": 1e3 * gflop / p50}
            )
    return rows


def peak_memory(name: str, known: bool, threads: int, backend: str, precision: str) -> float:
    """Return the peak memory of frames on a cached tile; run it in its own process."""
    import torch

    cached, _ = Frame(name, known, threads).kept(backend, precision)
    with torch.inference_mode():
        for _ in range(WARM_UP):
            cached()
    return peak_rss_mb()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--headings", nargs="+", default=("known", "unknown"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    # Keep idle threads of one library from spinning while another computes.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    threads, runs = arguments.threads, arguments.runs
    console = Console(width=130)
    floor = alone(floor_gflops, threads)
    console.print({f"matrix product, {name}, GFLOP/s": round(rate) for name, rate in floor.items()})
    parts = [row for name in arguments.models for row in alone(measure_parts, name, threads, runs)]
    table = Table("model", "part", "GFLOP", "p50 ms", "GFLOP/s", "of floor", title="torch float32, in parts")
    for row in parts:
        figures = (f"{row['gflop']:.2f}", f"{row['p50_ms']:.1f}", f"{row['gflops']:.0f}")
        table.add_row(row["model"], row["part"], *figures, f"{row['gflops'] / floor['float32']:.0%}")
    console.print(table)
    results = []
    for name in arguments.models:
        for heading in arguments.headings:
            known = heading == "known"
            if name.startswith("ggcvt") and not known:
                continue
            rows = alone(measure, name, known, threads, runs)
            for row in rows:
                backend, precision = row["way"].split()
                if row["tile"] == "cached":
                    row["peak_rss_mb"] = alone(peak_memory, name, known, threads, backend, precision)
            whole = rows[0]["gflop"]
            kept = next(row["gflop"] for row in rows if row["tile"] == "cached")
            table = Table(
                title=f"{name}, heading {heading}: batch 1, {threads} threads, {runs} runs; "
                f"{whole:.1f} GFLOP in all, {kept:.1f} with a kept tile"
            )
            for column in (
                "way", "tile", "p50 ms", "p95 ms", "Hz", "x everything", "x plain", "GFLOP/s", "of floor",
                "same maximum", "RSS MB",
            ):  # fmt: skip
                table.add_column(column, justify="right" if len(table.columns) > 1 else "left")
            for row in rows:
                precision = row["way"].split()[1]
                cells = [row["p50_ms"], row["p95_ms"], row["hz"], row["everything_over_this"]]
                rate, plain, rss = row["gflops"], row["plain_over_this"], row.get("peak_rss_mb")
                table.add_row(
                    row["way"],
                    row["tile"],
                    *(f"{x:.1f}" for x in cells),
                    f"{plain:.1f}" if plain else "",
                    f"{rate:.0f}" if rate else "",
                    f"{rate / floor[precision]:.0%}" if rate else "",
                    "yes" if row["same_maximum"] else "no",
                    f"{rss:.0f}" if rss else "",
                )
            console.print(table)
            results += rows
    if arguments.json:
        report = {"threads": threads, "runs": runs, "floor_gflops": floor, "parts": parts, "rows": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
