"""Milliseconds and memory of the models on this machine: ``python benchmarks/model.py [--json FILE]``.

Columns: encoding the aerial tile; what is precomputed of it; matching one frame against it with known and
with unknown heading, without and with what was precomputed; tile and frame together with unknown heading and
the orientation field; peak resident memory of the process. As the localizer runs them: channels last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

MODELS = ("ccvpe-small", "ccvpe-vigor")


def median_ms(function: Callable[[], object], runs: int, warm_up: int) -> float:
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def peak_rss_mb() -> float:
    """Of this process since it started; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(name: str, threads: int, runs: int, warm_up: int) -> dict[str, float | str]:
    """In a process of its own, so that the peak memory is this model's."""
    import torch

    from xview_loc.models import create_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = create_model(name).eval()
    model.to(memory_format=torch.channels_last)
    spec = model.spec
    ground = torch.randn(1, 3, *spec.ground_size).to(memory_format=torch.channels_last)
    aerial = torch.randn(1, 3, spec.aerial_size, spec.aerial_size).to(memory_format=torch.channels_last)

    def time_of(function: Callable[[], object]) -> float:
        return median_ms(function, runs, warm_up)

    with torch.inference_mode():
        features = model.encode_aerial(aerial)
        ready = model.precompute(features)
        return {
            "model": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "encode_aerial_ms": time_of(lambda: model.encode_aerial(aerial)),
            "precompute_ms": time_of(lambda: model.precompute(features)),
            "match_known_heading_ms": time_of(lambda: model.match(ground, features, 0)),
            "match_unknown_heading_ms": time_of(lambda: model.match(ground, features)),
            "precomputed_known_heading_ms": time_of(lambda: model.match(ground, ready, 0)),
            "precomputed_unknown_heading_ms": time_of(lambda: model.match(ground, ready)),
            "forward_with_orientation_ms": time_of(
                lambda: model.match(ground, model.encode_aerial(aerial), orientation=True)
            ),
            "peak_rss_mb": peak_rss_mb(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()

    rows = []
    for name in arguments.models:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(
                pool.submit(measure, name, arguments.threads, arguments.runs, arguments.warm_up).result()
            )

    title = f"batch 1, float32, {arguments.threads} CPU threads, median of {arguments.runs} runs"
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for heading in (
        "weights, M",
        "encode, ms",
        "precompute, ms",
        "known, ms",
        "unknown, ms",
        "ready, known, ms",
        "ready, unknown, ms",
        "all, ms",
        "RSS, MB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        name, parameters, *figures = row.values()
        table.add_row(str(name), f"{float(parameters) / 1e6:.1f}", *(f"{float(x):.0f}" for x in figures))
    Console(width=120).print(table)
    if arguments.json:
        settings = {"threads": arguments.threads, "runs": arguments.runs}
        arguments.json.write_text(json.dumps({**settings, "models": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
