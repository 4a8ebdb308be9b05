"""Damage JPEG images, and measure how many are refused and how far the others move the pose.

benchmarks/accuracy/damaged_images.py [--photographs FOLDER] [--images 20] [--mutations 1000]
    [--intact 10000] [--cities 631 632] [--styles source target] [--json FILE]

Each image is damaged in three ways in turn: 1 to 64 bytes changed, the end cut off, two stretches of equal
length swapped. A pose has moved if it lies more than three of its standard deviations from that of the intact
image. Photographs have no map: theirs has moved if the model's input changes by 2 of 255 in the mean.
``--intact`` images are further frames of the drives and crops of the photographs, in several sizes and
qualities: none should be refused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from xview_loc.cli.evaluate import simulated_drive
from xview_loc.estimation.observation import LocalizationError
from xview_loc.geodesy import LocalProjection
from xview_loc.images import ImageError, check_content, decode_compressed, encode_jpeg
from xview_loc.models.checkpoint import load_model
from xview_loc.statistics import mahalanobis

MODEL = "ccvpe-small"
SIGMAS, GREY_LEVELS = 3.0, 2.0
QUALITIES = (50, 75, 90, 95)
# Rows and columns of the photographs' crops.
CROPS = ((240, 320), (480, 640), (512, 1024))


def change_bytes(data: bytearray, rng: np.random.Generator) -> None:
    places = rng.integers(2, len(data), rng.integers(1, 65))
    for place in places:
        data[place] ^= int(rng.integers(1, 256))


def cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[rng.integers(2, len(data)) :]


def swap(data: bytearray, rng: np.random.Generator) -> None:
    length = int(rng.integers(16, 4097))
    length = min(length, len(data) // 4)
    first = int(rng.integers(2, len(data) - 2 * length))
    second = int(rng.integers(first + length, len(data) - length + 1))
    a, b = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = b, a


WAYS = {"bytes changed": change_bytes, "end cut off": cut, "stretches swapped": swap}


def decode(data: bytes) -> np.ndarray[Any, Any]:
    """Decode as the nodes do. Raises ImageError."""
    image = decode_compressed(data)
    check_content(image)
    return image


class Tally:
    """Counts what becomes of damaged images, by way of damage."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def damage(
        self, jpeg: bytes, moved: Callable[[Any], bool], mutations: int, rng: np.random.Generator
    ) -> None:
        """Damage an encoded image again and again; ``moved`` tells whether what is decoded is wrong."""
        for _, (name, way) in zip(range(mutations), cycle(WAYS.items()), strict=False):
            data = bytearray(jpeg)
            way(data, rng)
            if data == jpeg:
                continue
            self.counts[name]["all"] += 1
            try:
                image = decode(bytes(data))
            except ImageError:
                self.counts[name]["refused"] += 1
            else:
                self.counts[name]["moved"] += moved(image)

    def table(self, title: str) -> Table:
        table = Table("", "images", "refused", "moved, of 1000", title=title)
        for name, row in self.counts.items():
            figures = (f"{row['all']}", f"{row['refused'] / row['all']:.1%}")
            table.add_row(name, *figures, f"{1e3 * row['moved'] / row['all']:.2f}")
        total = {key: sum(row[key] for row in self.counts.values()) for key in ("all", "refused", "moved")}
        share = f"{total['refused'] / total['all']:.1%}", f"{1e3 * total['moved'] / total['all']:.2f}"
        table.add_row("together", f"{total['all']}", *share)
        return table


def damage_drives(tally: Tally, arguments: argparse.Namespace, rng: np.random.Generator) -> None:
    """Damage frames of drives, and localise what is decoded."""
    net = load_model(MODEL).model
    drives = [(style, seed) for style in arguments.styles for seed in arguments.cities]
    each = -(-arguments.images // len(drives))
    left = arguments.images
    for style, seed in track(drives, "drives"):
        # Frames ten seconds apart.
        with simulated_drive(net, style, seed, 10 * each, True) as (localizer, seen):
            for observation, _ in islice(seen, 0, None, 10):
                if not left:
                    return
                jpeg = encode_jpeg(observation.image, QUALITIES[left % len(QUALITIES)])
                left -= 1
                intact = localizer.localize(replace(observation, image=decode(jpeg)))
                plane = LocalProjection(intact.lat, intact.lon)

                def moved(image: Any, observation: Any = observation, plane: Any = plane) -> bool:
                    try:
                        pose = localizer.localize(replace(observation, image=image))
                    except (LocalizationError, ImageError):
                        return False
                    return mahalanobis(np.array(plane.forward(pose.lat, pose.lon)), pose.covariance) > SIGMAS

                tally.damage(jpeg, moved, arguments.mutations, rng)


def damage_photographs(tally: Tally, files: list[Path], mutations: int, rng: np.random.Generator) -> None:
    """Damage photographs, and compare what is decoded at the model's size."""
    for file in track(files, "photographs"):
        jpeg = file.read_bytes()
        size = (512, 256)
        intact = cv2.resize(decode(jpeg), size, interpolation=cv2.INTER_AREA).astype(float)

        def moved(image: Any, intact: Any = intact, size: Any = size) -> bool:
            seen = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            return bool(np.abs(seen - intact).mean() > GREY_LEVELS)

        tally.damage(jpeg, moved, mutations, rng)


def crops(files: list[Path], rng: np.random.Generator) -> Iterator[Any]:
    """Yield parts of the photographs, without end."""
    photographs = [decode(file.read_bytes()) for file in files]
    for photograph, (rows, columns) in zip(cycle(photographs), cycle(CROPS * 2 + CROPS[:1]), strict=False):
        zoom = rng.uniform(max(rows / photograph.shape[0], columns / photograph.shape[1]), 1.0)
        high, wide = int(rows / zoom), int(columns / zoom)
        top = int(rng.integers(0, photograph.shape[0] - high + 1))
        left = int(rng.integers(0, photograph.shape[1] - wide + 1))
        part = photograph[top : top + high, left : left + wide]
        yield cv2.resize(part, (columns, rows), interpolation=cv2.INTER_AREA)


def views(arguments: argparse.Namespace, count: int) -> Iterator[Any]:
    """Yield further frames of drives."""
    net = load_model(MODEL).model
    drives = [(style, seed + 1000) for style in arguments.styles for seed in arguments.cities]
    for style, seed in drives:
        with simulated_drive(net, style, seed, -(-count // len(drives)), True) as (_, seen):
            yield from (observation.image for observation, _ in seen)


def refused(images: Iterable[Any], count: int) -> dict[str, int]:
    """Encode and decode intact images; return the numbers of all and refused ones."""
    result = {"all": 0, "refused": 0}
    for image, quality in zip(track(images, "intact", total=count), cycle(QUALITIES), strict=False):
        result["all"] += 1
        try:
            decode(encode_jpeg(image, quality))
        except ImageError as error:
            result["refused"] += 1
            print(f"refused: {error}")
    return result


def cost_ms(files: list[Path], runs: int = 20) -> dict[str, dict[str, float]]:
    """Return the median times of OpenCV's decoder, of ours and of the check of the content, in turn."""
    rows = {}
    for file in files:
        jpeg = file.read_bytes()
        image = decode_compressed(jpeg)
        steps: dict[str, Callable[[], Any]] = {
            "OpenCV": lambda jpeg=jpeg: cv2.cvtColor(
                cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
            ),
            "decode_compressed": lambda jpeg=jpeg: decode_compressed(jpeg),
            "check_content": lambda image=image: check_content(image),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(runs):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - start))
        rows[f"{image.shape[1]} x {image.shape[0]}"] = {n: float(np.median(t)) for n, t in times.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files, searched with its subfolders")
    parser.add_argument("--images", type=int, default=20, help="frames of drives to damage")
    parser.add_argument("--mutations", type=int, default=1000, help="damaged copies of each image")
    parser.add_argument("--intact", type=int, default=10_000)
    parser.add_argument("--cities", type=int, nargs="+", default=(631, 632))
    parser.add_argument("--styles", nargs="+", default=("source", "target"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, rng = Console(width=100), np.random.default_rng(0)
    files = sorted(arguments.photographs.rglob("*.jpg")) if arguments.photographs else []
    frames, photographs = Tally(), Tally()
    if files:
        damage_photographs(photographs, files, arguments.mutations, rng)
        console.print(photographs.table(f"{len(files)} photographs"))
    damage_drives(frames, arguments, rng)
    console.print(frames.table(f"{arguments.images} frames of drives"))
    half = arguments.intact // 2 if files else arguments.intact
    whole = chain(views(arguments, half), islice(crops(files, rng), arguments.intact - half))
    intact = refused(whole, arguments.intact)
    console.print(f"intact images refused: {intact['refused']} of {intact['all']}")
    cost = cost_ms(files)
    table = Table("photograph", "OpenCV, ms", "decode_compressed", "check_content")
    for size, row in cost.items():
        table.add_row(size, *(f"{value:.2f}" for value in row.values()))
    if files:
        console.print(table)
    if arguments.json:
        report = {
            "frames": frames.counts,
            "photographs": photographs.counts,
            "intact": intact,
            "cost_ms": cost,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
