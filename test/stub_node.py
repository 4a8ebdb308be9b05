"""Runs the localizer with a model that is quick and whose heat map has a known peak."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from xview_loc import models
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.models.specs import ModelSpec

SIZE, GSD = 128, 0.5
# Sub-pixel, and not symmetric, so that a swap of rows and columns or a flip shows.
PEAK = (58.3, 71.8)
# Where the upper left pixel of a panorama is on the tile of a model that points.
POINTED = (48, 32)


class StubModel(CrossViewModel):
    """Scores a Gaussian about ``PEAK``, whatever it is shown.

    ``weight`` moves the peak down by that many rows; ``shaken`` up and down, changing every second call.
    """

    def __init__(self, camera: str) -> None:
        super().__init__()
        name, lens = "stub", None
        if camera == "pinhole":
            name, lens = "stub-pinhole", (32.0, 32.0, 31.5, 15.5)
        self.spec = ModelSpec(name, camera, (32, 64), SIZE, GSD, bins=8, intrinsics=lens)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shaken = torch.nn.Parameter(torch.zeros(1))
        self._calls = 0

    def encode_aerial(self, aerial: torch.Tensor) -> torch.Tensor:
        return aerial[:, :1]

    def match(self, ground, features, heading_prior_deg=None, *, orientation=False) -> HeatMaps:
        rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        self._calls += 1
        row = PEAK[0] + float(self.weight.detach()) + float(self.shaken.detach()) * (-1) ** (self._calls // 2)
        logits = -((rows - row) ** 2 + (cols - PEAK[1]) ** 2) / (2.0 * 2.0**2)
        logits = logits.float()[None]
        # Facing north everywhere: as the image was prepared, that is the heading given.
        field = torch.zeros(1, 2, SIZE, SIZE)
        field[:, 0] = 1.0
        return HeatMaps([logits[:, None]], logits, field if orientation else None)


class SeeingModel(StubModel):
    """Finds the place on the map that has the image's colour, and moves it as the stub's weights say."""

    def __init__(self) -> None:
        super().__init__("panorama")
        self.spec = replace(self.spec, name="stub-seeing")

    def encode_aerial(self, aerial: torch.Tensor) -> torch.Tensor:
        return aerial

    def match(self, ground, features, heading_prior_deg=None, *, orientation=False) -> HeatMaps:
        self._calls += 1
        colour = ground.mean((2, 3), keepdim=True)
        there = -2e3 * (features - colour).square().sum(1)
        # It is not quite sure.
        logits = torch.maximum(there, there.roll(20, 1) - 1.0)
        down = self.weight.detach() + self.shaken.detach() * (-1) ** (self._calls // 2)
        logits = logits.roll(round(float(down)), 1)
        field = torch.zeros(1, 2, SIZE, SIZE)
        field[:, 0] = 1.0
        return HeatMaps([logits[:, None]], logits, field if orientation else None)


class PointingModel(StubModel):
    """Its peak shows where the reddest pixel of the image is: ``POINTED`` further down and to the right.

    Without a red pixel it is at the tile's centre.
    """

    def __init__(self, camera: str = "panorama") -> None:
        super().__init__(camera)
        name = "stub-pointing" if camera == "panorama" else "stub-pointing-pinhole"
        self.spec = replace(self.spec, name=name, elevation_deg=(30.0, -60.0))

    def match(self, ground, features, heading_prior_deg=None, *, orientation=False) -> HeatMaps:
        red = ground[0, 0] - ground[0, 1]
        # Of a spot, the middle.
        weight = (red - 1.0).clamp(min=0.0)
        rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        row = col = (SIZE - 1) / 2.0
        if weight.sum() > 0.0:
            height, width = red.shape
            row = float((weight.sum(1) * torch.arange(height)).sum() / weight.sum()) + POINTED[0]
            col = float((weight.sum(0) * torch.arange(width)).sum() / weight.sum()) + POINTED[1]
        logits = -((rows - row) ** 2 + (cols - col) ** 2).float()[None] / 8.0
        field = torch.zeros(1, 2, SIZE, SIZE)
        field[:, 0] = 1.0
        return HeatMaps([logits[:, None]], logits, field if orientation else None)


def write_stub(path: Path, rows: float, shaken: float = 0.0, model: StubModel | None = None) -> Path:
    """A checkpoint that moves the stub's peak down by some rows, and up and down by some."""
    model = model or StubModel("panorama")
    with torch.no_grad():
        model.weight.fill_(rows)
        model.shaken.fill_(shaken)
    save_checkpoint(model, path)
    return path


models._CONSTRUCTORS["stub"] = lambda: StubModel("panorama")
models._CONSTRUCTORS["stub-pinhole"] = lambda: StubModel("pinhole")
models._CONSTRUCTORS["stub-seeing"] = SeeingModel
models._CONSTRUCTORS["stub-pointing"] = PointingModel
models._CONSTRUCTORS["stub-pointing-pinhole"] = lambda: PointingModel("pinhole")

if __name__ == "__main__":
    from xview_loc.nodes.localizer_node import main

    sys.exit(main())
