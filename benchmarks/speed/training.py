"""Measure the speed of adaptation: loading, teacher inference and training, plain and as optimised.

benchmarks/speed/training.py [--models ccvpe-small ggcvt-small] [--image 2048x1024] [--threads 2]
    [--rounds 10] [--accelerator auto] [--json FILE]

Pairs come from a short drive through a simulated city, with panoramas enlarged to the size of a camera image.
``plain`` decodes a pair at every access, encodes its tile with it, and keeps PyTorch's default memory layout;
``now`` works like ``xview-loc adapt``. Variants take turns, so that other load on the machine affects all
alike. The rates of labels and training are those of one process that loads and computes in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_collate

from xview_loc.adaptation.distillation import AdaptationOptions
from xview_loc.adaptation.labelling import label_batch
from xview_loc.datasets.pairs import PairDataset
from xview_loc.images import encode_jpeg
from xview_loc.maps import open_map
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_model
from xview_loc.models.specs import SPECS
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView
from xview_loc.training.losses import DistillationLoss
from xview_loc.training.trainer import make_fabric
from xview_loc.vehicle.keyframes import KeyframeRule

FRAMES, RULE = 120, KeyframeRule(distance_m=4.0)
# Large enough for both small models, which crop its middle.
TILES_FOR = SPECS["ggcvt-small"]
TOPICS = {"image": "/image", "fix": "/fix", "heading": "/heading", "odom": "/odom"}
# Teacher inference, as in label_pairs.
BATCH, BATCHES = 16, 3
WARM_UP = 2


def make_pairs(folder: Path, width: int, height: int) -> Path:
    """Make a bag of pairs with images of this size."""
    city = build_city(700, "target")
    frames = drive(city, FRAMES, 0, options=DriveOptions(rate_hz=1.0), view=PanoramaView(128, 512))
    write_bag(frames, folder / "drive")
    options = ImportOptions(topics=TOPICS, keyframes=RULE, spec=TILES_FOR)
    with open_map(str(city.write_geotiff(folder / "city.tif"))) as aerial:
        import_bag(folder / "drive", folder / "small", aerial, options, lambda share: None)
    small = PairBag(folder / "small")
    writer = PairWriter(folder / "pairs", small.session())
    for index in range(len(small)):
        pair = small[index]
        image = cv2.resize(pair.image(), (width, height), interpolation=cv2.INTER_CUBIC)
        image = image.astype(np.uint8, copy=False)
        writer.add(replace(pair, image_bytes=encode_jpeg(image, 90)), small.tile(index))
    writer.close()
    return folder / "pairs"


class Steps:
    """The steps of adapting one model, plain and as optimised."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        self.now = load_model(name).model.to(device)
        self.plain = deepcopy(self.now)
        self.now.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.source = PairDataset([folder], self.now.spec)
        self.forgetful = deepcopy(self.source)  # a copy does not cache decoded pairs
        self.count = BATCH * BATCHES
        samples = [self.source[index] for index in range(self.count)]
        order = np.random.default_rng(0).permutation(self.count)
        options = AdaptationOptions.published(self.now)
        self.size = options.training.batch_size
        recipe = options.recipe(self.now, smoothed=False)
        self.loss = DistillationLoss(recipe.levels, options.sigma)

        def batch(chosen: Any) -> dict[str, torch.Tensor]:
            collated = default_collate([samples[index] for index in chosen])
            return {key: value.to(device) for key, value in collated.items()}

        self.batches = [batch(range(start, start + BATCH)) for start in range(0, self.count, BATCH)]
        self.training_batch = batch(order[: self.size])
        self.training_batch["position"] = self.training_batch["fix"]
        self.training_batch["heading"] = torch.zeros(self.size, device=device)
        self.students = {model: deepcopy(model).train() for model in (self.plain, self.now)}
        self.optimizers = {
            model: torch.optim.Adam(student.parameters(), lr=1e-4) for model, student in self.students.items()
        }

    def load(self, source: PairDataset) -> None:
        default_collate([source[index] for index in range(self.count)])

    def label(self, model: CrossViewModel, fabric: Fabric) -> None:
        model.eval()
        for batch in self.batches:
            with torch.inference_mode(), fabric.autocast():
                features = model.encode_aerial(batch["aerial"]) if model is self.plain else None
                label_batch(model, batch, 0.0, features)

    def train(self, model: CrossViewModel, fabric: Fabric) -> None:
        with fabric.autocast():
            value = self.loss(self.students[model], self.training_batch, 0.0)
        value.backward()
        self.optimizers[model].step()
        self.optimizers[model].zero_grad()
        float(value.detach())


def measure(steps: Steps, rounds: int) -> list[dict[str, Any]]:
    """Return rows of pairs per second."""
    precisions = ("32-true", "bf16-mixed")
    accelerator = steps.training_batch["fix"].device.type
    calls: dict[tuple[str, str, str], tuple[Callable[[], None], int]] = {
        ("load", "", "plain"): (partial(steps.load, steps.forgetful), steps.count),
        ("load", "", "now"): (partial(steps.load, steps.source), steps.count),
    }
    for precision in precisions:
        fabric = make_fabric(accelerator, 1, precision)
        for way, model in (("plain", steps.plain), ("now", steps.now)):
            calls["teacher inference", precision, way] = (
                partial(steps.label, model, fabric),
                steps.count,
            )
            calls["training step", precision, way] = (
                partial(steps.train, model, fabric),
                steps.size,
            )
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in calls}
    for number in range(WARM_UP + rounds):
        for key, (call, count) in calls.items():
            start = time.perf_counter()
            call()
            if number >= WARM_UP:
                times[key].append((time.perf_counter() - start) / count)
    seconds = {key: float(np.median(values)) for key, values in times.items()}
    for stage, step in (("labels", "teacher inference"), ("training", "training step")):
        for precision in precisions:
            for way in ("plain", "now"):
                whole = seconds["load", "", way] + seconds[step, precision, way]
                seconds[stage, precision, way] = whole
    return [
        {
            "step": step,
            "precision": precision,
            "plain_per_s": 1 / value,
            "now_per_s": 1 / seconds[step, precision, "now"],
            "now_over_plain": value / seconds[step, precision, "now"],
        }
        for (step, precision, way), value in seconds.items()
        if way == "plain"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=("ccvpe-small", "ggcvt-small"))
    parser.add_argument("--image", default="2048x1024", help="WIDTHxHEIGHT of the camera images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    width, height = map(int, arguments.image.split("x"))
    torch.set_num_threads(arguments.threads)
    device = make_fabric(arguments.accelerator).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} threads"
    console = Console()
    results: dict[str, Any] = {"device": where, "image": arguments.image}
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_pairs(Path(temporary), width, height)
        for name in arguments.models:
            rows = measure(Steps(name, folder, device), arguments.rounds)
            results[name] = rows
            table = Table(title=f"{name}, images of {arguments.image}, {where}: pairs per second")
            for column in ("step", "precision", "plain", "now", "now / plain"):
                table.add_column(column, justify="left" if column in ("step", "precision") else "right")
            for row in rows:
                rates = (f"{row['plain_per_s']:.1f}", f"{row['now_per_s']:.1f}")
                table.add_row(row["step"], row["precision"], *rates, f"{row['now_over_plain']:.2f}")
            console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
