"""How do time, memory and disk of an adaptation grow with the number of pairs?

benchmarks/speed/scale.py [--pairs 1000 10000 100000] [--processes 1 2] [--work DIR] [--json FILE]

Drives of a thousand pairs with small images are written once; a tiny model of random weights labels them,
whole drives smooth the labels, and a student is trained for one epoch: on maxima, as random weights support
no smoothed labels. Each run is a process of its own, or several by torchrun. ``pairs/s`` of every stage, the
first process's largest memory, and the disk that the run leaves, without the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xview_loc import models
from xview_loc.adaptation.distillation import AdaptationOptions, Distillation
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection
from xview_loc.images import encode_jpeg
from xview_loc.maps.base import AerialTile
from xview_loc.models.ccvpe import CCVPE, CONFIGS
from xview_loc.models.checkpoint import load_checkpoint, save_checkpoint
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.training.trainer import make_fabric

# The name by which checkpoints find the model.
models._CONSTRUCTORS["ccvpe-tiny"] = lambda: CCVPE(TINY)
SMALL = CONFIGS["ccvpe-small"]
TINY = replace(
    SMALL,
    spec=replace(SMALL.spec, name="ccvpe-tiny", aerial_size=80),
    satellite_descriptor=64,
    ground_channels=(2, 1, 1),
    shifts=(4, 2, 2),
    up=(16, 8),
    conv=(32, 32),
    up_orientation=(8, 8),
    conv_orientation=(32, 32),
    taps=(2, 0),
    width=0.25,
    groups=3,
)
DRIVE, STEP_M, PAIRS_PER_TILE = 1000, 5.0, 5
START_NS = 1_700_000_000_000_000_000
STAGES = ("opening", "teacher labels", "teacher heat maps", "smoothing", "student")


def write_drive(number: int, folder: Path) -> None:
    """Write a straight drive of a thousand pairs, with textures that JPEG and PNG make small."""
    rng, side = np.random.default_rng(number), TINY.spec.aerial_size
    plane = LocalProjection(48.0 + number % 100 / 100.0, 16.0 + number // 100 / 10.0)
    writer = PairWriter(folder, {"vehicle": "benchmark"})
    images = [encode_jpeg(_texture(rng, 64, 256), 90) for _ in range(50)]
    tile, wander = None, np.zeros(2)
    for k in range(DRIVE):
        stamp = START_NS + (number * 2 * DRIVE + k) * 1_000_000_000
        wander = 0.97 * wander + rng.normal(size=2)
        lat, lon = plane.inverse(STEP_M * k + wander[0], wander[1])
        if tile is None or k % PAIRS_PER_TILE == 0:
            tile = AerialTile(_texture(rng, side, side), float(lat), float(lon), TINY.spec.gsd)
        covariance = 50.0 * np.eye(2)
        pair = Pair(stamp, "jpeg", images[k % 50], lat, lon, fix_covariance=covariance, heading=0.0)
        writer.add(pair, tile)
    writer.close()


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.integers(0, 255, (height // 16, width // 16, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def run(work: Path, count: int) -> None:
    """Adapt to the first pairs, in this process or in those of torchrun; print the figures as JSON."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    folders = sorted((work / "pairs").iterdir())[: math.ceil(count / DRIVE)]
    teacher = load_checkpoint(work / "teacher.safetensors")
    begun: dict[str, tuple[float, int]] = {}
    rates: dict[str, float] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        start, first = begun.setdefault(stage, (now, done))
        if done > first:
            rates[stage] = (done - first) / (now - start)

    out = work / f"out-{count}-{os.environ.get('WORLD_SIZE', '1')}"
    fabric = make_fabric("cpu", int(os.environ.get("WORLD_SIZE", "1")))
    options = AdaptationOptions.published(teacher.model, smooth=True, epochs=1, keep=1.0)
    start = time.perf_counter()
    source = PairDataset(folders, TINY.spec)
    distillation = Distillation(fabric, teacher, source, out, options, on_progress=on_progress)
    rates["opening"] = count / (time.perf_counter() - start)
    distillation.run()
    if fabric.is_global_zero:
        # Progress is that of this process's drives, and in steps.
        rates["smoothing"] *= fabric.world_size
        rates["student"] *= options.training.batch_size * fabric.world_size
        disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"rates": rates, "memory_mb": memory, "disk_mb": disk / 1e6}))
        shutil.rmtree(out)


def measure(work: Path, count: int, processes: int) -> dict[str, Any]:
    """Run :func:`run` in fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--work", str(work)]
    # Some processes of torchrun abort at exit when all is done: what counts is what they printed.
    done = subprocess.run([*command, "--adapt-to", str(count)], stdout=subprocess.PIPE, text=True)
    return {"pairs": count, "processes": processes, **json.loads(done.stdout.strip().splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=(1000, 10_000, 100_000))
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--work", type=Path, default=Path("scale_benchmark"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--adapt-to", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.adapt_to:
        run(work, arguments.adapt_to)
        return
    if not (work / "teacher.safetensors").exists():
        torch.manual_seed(0)
        save_checkpoint(CCVPE(TINY), work / "teacher.safetensors")
    for number in range(math.ceil(max(arguments.pairs) / DRIVE)):
        folder = work / "pairs" / f"{number:04d}"
        if not folder.exists():
            write_drive(number, folder)
    rows = []
    for count in arguments.pairs:
        for processes in arguments.processes:
            rows.append(measure(work, count, processes))
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    table = Table(title="pairs per second")
    for column in ("pairs", "processes", *STAGES, "memory, MB", "disk, MB"):
        table.add_column(column)
    for row in rows:
        rates = (f"{row['rates'][stage]:.0f}" if stage in row["rates"] else "" for stage in STAGES)
        sizes = f"{row['memory_mb']:.0f}", f"{row['disk_mb']:.0f}"
        table.add_row(str(row["pairs"]), str(row["processes"]), *rates, *sizes)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
