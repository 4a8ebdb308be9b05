"""Time full-size training steps (loss, gradients, Adam) against a plain forward and backward pass.

benchmarks/speed/training_step.py [--models ccvpe-vigor ggcvt-vigor] [--batch 2] [--repeats 5]
    [--device cpu] [--precision 32-true]

The plain pass computes all maps of the model, and the gradients of their sum. All three take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xview_loc.adaptation.distillation import AdaptationOptions
from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel
from xview_loc.training.losses import DistillationLoss, loss_for


def make_batch(model: CrossViewModel, count: int) -> dict[str, Tensor]:
    """Return random images of ``count`` pairs, with their positions near the tile's centre."""
    spec = model.spec
    intrinsics = torch.tensor([[0.57, 0.0, 0.48], [0.0, 1.9, 0.49], [0.0, 0.0, 1.0]])
    intrinsics[:2] *= torch.tensor(spec.ground_size[::-1])[:, None]
    batch = {
        "ground": torch.rand(count, 3, *spec.ground_size),
        "aerial": torch.rand(count, 3, spec.aerial_size, spec.aerial_size),
        "position": spec.aerial_size / 2 + 20 * torch.randn(count, 2),
        "heading": torch.full((count,), spec.nominal_heading),
        "meters_per_pixel": torch.full((count,), spec.gsd),
    }
    return {**batch, "intrinsics": intrinsics.expand(count, 3, 3)}


def passes(model: CrossViewModel, batch: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return the forward passes to time; each ends in a scalar."""
    prior = None if model.spec.bins else 0.0
    recipe = AdaptationOptions.published(model).recipe(model, smoothed=False)
    supervised, student = loss_for(model), DistillationLoss(recipe.levels)

    def plain() -> Tensor:
        extra = {name: batch[name] for name in model.extra_inputs}
        features = model.encode_aerial(batch["aerial"])
        maps = model.match(batch["ground"], features, prior, orientation=model.spec.bins > 0, **extra)
        parts = [*maps.levels, maps.logits, *([] if maps.orientation is None else [maps.orientation])]
        return torch.stack([part.float().sum() for part in parts]).sum()

    return {
        "plain": plain,
        "supervised": lambda: supervised(model, batch, prior),
        "student": lambda: student(model, batch, prior),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ccvpe-vigor", "ggcvt-vigor"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    arguments = parser.parse_args()
    fabric = Fabric(accelerator=arguments.device, devices=1, precision=arguments.precision)
    table = Table(title=f"batch {arguments.batch}, {arguments.precision}: seconds per step (median)")
    for column in ("model", "plain", "supervised", "student", "supervised / plain", "student / plain"):
        table.add_column(column)
    for name in arguments.models:
        torch.manual_seed(0)
        model = fabric.to_device(create_model(name).train().to(memory_format=torch.channels_last))
        batch = fabric.to_device(make_batch(model, arguments.batch))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        steps = passes(model, batch)
        seconds: dict[str, list[float]] = {step: [] for step in steps}
        for repeat in range(arguments.repeats + 1):
            for step, forward in steps.items():
                start = time.perf_counter()
                with fabric.autocast():
                    value = forward()
                value.backward()
                if step != "plain":
                    optimizer.step()
                optimizer.zero_grad()
                value.item()
                if repeat:  # the first one warms up
                    seconds[step].append(time.perf_counter() - start)
        plain, supervised, student = (float(np.median(times)) for times in seconds.values())
        ratios = (f"{supervised / plain:.2f}", f"{student / plain:.2f}")
        table.add_row(name, f"{plain:.2f}", f"{supervised:.2f}", f"{student:.2f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
