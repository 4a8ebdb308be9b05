"""Measure what models for pinhole cameras lose by turning tiles in steps, and gain by a virtual camera.

benchmarks/accuracy/pinhole.py [--model ccvpe-pinhole-small] [--style validation] [--cities 502-504]
    [--frames 400] [--json FILE]

Drives through simulated cities with a front camera; each frame is localised by itself. All steps localise
the same frames, and so do both variants of a field of view. First tiles are turned to the heading in steps:
one is at hand if it was turned to the same step before and is still kept. Then cameras have other fields of
view, 16 : 9: their images are warped to the model's lens (virtual camera), or resized as if of that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from xview_loc.camera import CameraModel
from xview_loc.datasets.simulated import parse_cities, rendered_view
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import Observation
from xview_loc.evaluation.errors import DriveErrors, Errors, localize_drive
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_model
from xview_loc.models.specs import ModelSpec
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.views import PanoramaView, PinholeView

STEPS_DEG = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
FIELDS_DEG = (50.0, 60.0, 75.0, 90.0, 105.0, 120.0)
# Of images with other fields of view, pixels.
SIZE = (180, 320)
Frames = list[tuple[Observation, tuple[float, float]]]


def observe(city: City, frames: int, rate_hz: float, view: PanoramaView | PinholeView) -> Frames:
    """Drive through a city with a camera."""
    assert isinstance(view.camera, CameraModel)
    seen: Frames = []
    for frame in drive(city, frames, options=DriveOptions(rate_hz=rate_hz), view=view):
        fix, heading = frame.fix, (frame.heading, frame.heading_std)
        if frame.image is not None:
            observation = Observation(frame.image, fix.lat, fix.lon, fix.covariance, *heading, view.camera)
            seen.append((observation, (frame.truth.lat, frame.truth.lon)))
    return seen


def as_if_of_the_lens(frames: Frames, spec: ModelSpec) -> Frames:
    """Resize the images to the model's, and say that its lens took them."""
    lens = spec.lens
    assert isinstance(lens, CameraModel)
    size = lens.width, lens.height
    return [
        (
            replace(
                o, image=np.asarray(cv2.resize(o.image, size, interpolation=cv2.INTER_AREA)), camera=lens
            ),
            t,
        )
        for o, t in frames
    ]


class Counter:
    """Counts the tiles that a model encodes."""

    def __init__(self, net: CrossViewModel) -> None:
        self.count, self._encode = 0, net.encode_aerial
        net.encode_aerial = self  # type: ignore[method-assign, assignment]

    def __call__(self, aerial: Any) -> Any:
        self.count += 1
        return self._encode(aerial)


def row_of(drives: Iterable[DriveErrors]) -> dict[str, float]:
    joined = DriveErrors.joined(drives)
    errors = Errors.of(joined.estimate, (joined.longitudinal, joined.lateral))
    covered = joined.coverage_by_axis(0.95)
    return {
        "frames": errors.frames,
        "mean": errors.mean,
        "median": errors.median,
        "p95": errors.p95,
        "longitudinal": errors.longitudinal_mean,
        "lateral": errors.lateral_mean,
        "in_95_longitudinal": covered[0],
        "in_95_lateral": covered[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ccvpe-pinhole-small")
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped weights")
    parser.add_argument("--style", default="validation")
    parser.add_argument("--cities", default="502-504")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--rate", type=float, default=4.0, help="frames a second, for the steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    a = parser.parse_args()
    spec = load_model(a.model, a.checkpoint).model.spec
    drives: dict[str, list[DriveErrors]] = {}
    encoded: dict[str, int] = {}

    def localize(name: str, map_path: Path, frames: Frames, step_deg: float = 0.0) -> None:
        net = load_model(a.model, a.checkpoint).model
        counter = Counter(net)
        with Localizer.open(map_path, net, turn_step_deg=step_deg) as localizer:
            drives.setdefault(name, []).append(localize_drive(localizer, frames))
        encoded[name] = encoded.get(name, 0) + counter.count

    for seed in parse_cities(a.cities):
        with tempfile.TemporaryDirectory() as folder:
            city = build_city(seed, a.style)
            map_path = city.write_geotiff(Path(folder) / "city.tif")
            view, _ = rendered_view(spec, any_camera=False)
            frames = observe(city, a.frames, a.rate, view)
            for step in STEPS_DEG:
                localize(f"step {step:g} deg", map_path, frames, step)
            for field in FIELDS_DEG:
                frames = observe(city, a.frames, 1.0, PinholeView(*SIZE, field))
                localize(f"{field:g} deg, virtual camera", map_path, frames)
                localize(f"{field:g} deg, resized", map_path, as_if_of_the_lens(frames, spec))
    rows = {name: row_of(parts) for name, parts in drives.items()}
    for name, row in rows.items():
        row["at_hand"] = 1.0 - encoded[name] / sum(len(part.fix) for part in drives[name])
    table = Table(title=f"{a.model}, {a.style} style, cities {a.cities}, metres")
    table.add_column("")
    for column in next(iter(rows.values())):
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{v:.0f}" if column == "frames" else f"{v:.2f}" for column, v in row.items()))
    Console(width=140).print(table)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
