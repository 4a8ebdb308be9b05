"""Measure logging and reading of pairs: the node at 10 Hz in full HD, and random access to a large bag.

benchmarks/speed/pairs.py [--seconds 30] [--gigabytes 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import array
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from vehicle import cpu_seconds, isolate, memory_mb

from xview_loc.bags.writer import BagLimits
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models import create_model
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter

PLANE = LocalProjection(48.2, 16.37)
RATE_HZ = 10.0
SAMPLES = 400


def photograph(seed: int) -> bytes:
    """Return a full HD JPEG of about half a megabyte, typical of a street camera."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(135, 240, 3)).astype(np.float32)
    image = 128 + 40 * cv2.resize(coarse, (1920, 1080), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, 9, image.shape)
    return bytes(cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8))[1])


def log_full_hd(folder: Path, seconds: float) -> dict[str, float]:
    """Measure the pair logger; every frame is a keyframe, images are CompressedImage."""
    import rclpy
    from geometry_msgs.msg import QuaternionStamped
    from rclpy.node import Node
    from sensor_msgs.msg import CompressedImage, NavSatFix

    isolate()
    parameters = {
        "directory": str(folder),
        "keyframe_distance_m": 0.01,
        "qos_depth": 50,
        "min_free_mb": 0,
    }
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    node_process = subprocess.Popen(
        [sys.executable, "-m", "xview_loc.nodes.pair_logger_node", "--ros-args", *words]
    )
    rclpy.init()
    node = Node("vehicle")
    image = node.create_publisher(CompressedImage, "image", 10)
    fix = node.create_publisher(NavSatFix, "fix", 10)
    heading = node.create_publisher(QuaternionStamped, "heading", 10)
    while not all(p.get_subscription_count() for p in (image, fix, heading)):
        time.sleep(0.05)
    pictures = [array.array("B", photograph(k)) for k in range(8)]
    frames = round(seconds * RATE_HZ)
    began, cpu = time.monotonic(), cpu_seconds(node_process.pid)
    for k in range(frames):
        stamp = node.get_clock().now().to_msg()
        lat, lon = PLANE.inverse(1.5 * k, 0.0)
        messages: tuple[Any, ...] = (
            QuaternionStamped(),
            NavSatFix(latitude=lat, longitude=lon),
            CompressedImage(format="jpeg", data=pictures[k % len(pictures)]),
        )
        messages[0].quaternion.w = 1.0
        messages[1].status.status = 0
        for publisher, message in zip((heading, fix, image), messages, strict=True):
            message.header.stamp = stamp
            publisher.publish(message)
        time.sleep(max(0.0, began + (k + 1) / RATE_HZ - time.monotonic()))
    elapsed = time.monotonic() - began
    used = cpu_seconds(node_process.pid) - cpu
    memory = memory_mb(node_process.pid, "VmRSS")
    time.sleep(1.0)  # let the last messages arrive
    node_process.terminate()
    node_process.wait(20)
    node.destroy_node()
    rclpy.shutdown()
    (bag,) = folder.iterdir()
    size = sum(path.stat().st_size for path in bag.iterdir())
    return {
        "frames sent": frames,
        "pairs logged": len(PairBag(bag)),
        "MB/s": size / 1e6 / elapsed,
        "CPU, % of one core": 100 * used / elapsed,
        "memory, MB": memory,
    }


def read_at_random(folder: Path, gigabytes: float) -> dict[str, float]:
    """Measure two workers that decode pairs of a bag in random order."""
    spec = create_model("ccvpe-small").spec
    pictures = [photograph(k) for k in range(8)]
    count = round(gigabytes * 1e9 / np.mean([len(p) for p in pictures]))
    tile_image = cv2.resize(
        np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8), (spec.aerial_size,) * 2
    )
    writer = PairWriter(folder, {}, BagLimits(min_free_bytes=0))
    began = time.monotonic()
    for k in range(count):
        lat, lon = PLANE.inverse(2.0 * (k % 5000), 0.0)
        tile_lat, tile_lon = PLANE.inverse(20.0 * (k % 5000 // 10), 0.0)
        tile = AerialTile(tile_image, tile_lat, tile_lon, spec.gsd)
        writer.add(Pair(10**18 + k * 10**8, "jpeg", pictures[k % 8], lat, lon, heading=0.0), tile)
    writer.close()
    written = time.monotonic() - began
    began = time.monotonic()
    dataset = PairDataset([folder], spec)
    opened = time.monotonic() - began
    order = np.random.default_rng(0).integers(0, len(dataset), SAMPLES).tolist()
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, sampler=order, num_workers=2)
    batches = iter(loader)
    next(batches)
    workers = [w.pid for w in batches._workers]  # type: ignore[attr-defined]
    first = max(memory_mb(pid, "VmRSS") for pid in workers)
    began, seen, peak = time.monotonic(), 0, first
    for batch in batches:
        seen += len(batch["index"])
        # A worker may end before its last batches arrive.
        peak = max([peak, *(memory_mb(pid, "VmRSS") for pid in workers if Path(f"/proc/{pid}").exists())])
    elapsed = time.monotonic() - began
    return {
        "pairs": count,
        "bag, GB": sum(p.stat().st_size for p in folder.iterdir()) / 1e9,
        "written, MB/s": sum(p.stat().st_size for p in folder.iterdir()) / 1e6 / written,
        "opened, s": opened,
        "samples/s, 2 workers": seen / elapsed,
        "worker's memory after one batch, MB": first,
        "worker's peak memory, MB": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results["logging 1920x1080 JPEG at 10 Hz"] = log_full_hd(folder / "log", arguments.seconds)
        results["reading at random"] = read_at_random(folder / "big", arguments.gigabytes)
    for title, figures in results.items():
        table = Table(title=title)
        table.add_column("")
        table.add_column("", justify="right")
        for name, value in figures.items():
            table.add_row(name, f"{value:.4g}")
        Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
