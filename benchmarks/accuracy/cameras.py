"""Measure the errors of cameras that see a part of the surroundings, level and tilted, by model.

benchmarks/accuracy/cameras.py [--models ccvpe-small ccvpe-rig-small NAME=OTHER.safetensors]
    [--styles source target] [--cities 900-903] [--frames 150] [--headings known unknown] [--cameras ...]
    [--json FILE]

Every frame is localised by itself, as `xview-loc evaluate` does. A tilt of 6 degrees is 6 of roll and 6 of
pitch, of random signs. Errors are those of the middle of the cameras.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xview_loc.camera import PanoramaCamera
from xview_loc.datasets.simulated import parse_cities
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import Observation
from xview_loc.evaluation.errors import DriveErrors, Errors, localize_drive
from xview_loc.models.checkpoint import load_model
from xview_loc.models.specs import ModelSpec
from xview_loc.rig import MountedCamera, Rig, tilt_matrix
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, drive, traffic_near
from xview_loc.simulation.rigs import RIGS, VehiclePose, camera, looking, make_rig, render_rig

# Half of the rigs' usual size: still finer than the panorama.
SCALE = 0.5
TILTS_DEG = (0.0, 3.0, 6.0)
HEIGHT_M = 1.7


def single(fov_deg: float) -> Rig:
    front = MountedCamera(camera(fov_deg, (320, 180)), (0.6, 0.0, 1.4), looking(0.0, 4.0))
    return Rig({"front": front})


CAMERAS: dict[str, Rig] = {
    "panorama": Rig({"all": MountedCamera(PanoramaCamera(1024, 512), (0.0, 0.0, HEIGHT_M))}),
    **{name: make_rig(name, SCALE) for name in reversed(RIGS) if name != "one"},
    **{f"one, {fov} deg": single(fov) for fov in (120, 90, 60)},
}


@dataclass(frozen=True)
class Condition:
    """Cameras, tilt of the vehicle in degrees, and whether it is levelled."""

    cameras: str
    tilt_deg: float
    levelled: bool

    def __str__(self) -> str:
        if not self.tilt_deg:
            return "level"
        return f"{self.tilt_deg:g} deg{', levelled' if self.levelled else ''}"


CONDITIONS = [(tilt, levelled) for tilt in TILTS_DEG for levelled in ((True, False) if tilt else (True,))]
Seen = dict[Condition, list[tuple[Observation, tuple[float, float]]]]


def observe(city: City, spec: ModelSpec, frames: int, cameras: list[str]) -> Seen:
    """Drive through a city; return what all cameras see under all conditions, with the true (lat, lon)."""
    seen: Seen = {Condition(name, *how): [] for name in cameras for how in CONDITIONS}
    rng = np.random.default_rng(city.seed)
    for number, frame in enumerate(drive(city, frames, options=DriveOptions(rate_hz=1.0), view=None)):
        truth = frame.truth
        signs = rng.choice([-1.0, 1.0], 2)
        noise = int(rng.integers(1 << 30))
        yaw = truth.heading + city.projection.convergence(truth.lat, truth.lon)
        traffic = traffic_near(city, truth.east, truth.north, float(number), 0)
        for name in cameras:
            rig = CAMERAS[name]
            for tilt_deg in TILTS_DEG:
                roll, pitch = (signs * math.radians(tilt_deg)).tolist()
                pose = VehiclePose(truth.east, truth.north, yaw, 0.0, pitch, roll)
                images = render_rig(city, pose, rig, traffic=traffic, rng=np.random.default_rng(noise))
                ahead, left, _ = tilt_matrix(roll, pitch) @ rig.centre
                east = math.cos(yaw) * ahead - math.sin(yaw) * left
                north = math.sin(yaw) * ahead + math.cos(yaw) * left
                fix_east, fix_north = city.to_enu(frame.fix.lat, frame.fix.lon)
                lat, lon = (float(v) for v in city.to_latlon(fix_east + east, fix_north + north))
                true_lat, true_lon = (
                    float(v) for v in city.to_latlon(truth.east + east, truth.north + north)
                )
                for levelled in (True, False) if tilt_deg else (True,):
                    level = {"roll": roll, "pitch": pitch} if levelled else {}
                    panorama, _ = rig.view(images, spec.lens, **level)
                    known = frame.heading, frame.heading_std
                    observation = Observation(panorama, lat, lon, frame.fix.covariance, *known)
                    seen[Condition(name, tilt_deg, levelled)].append((observation, (true_lat, true_lon)))
    return seen


def without_heading(those: list[tuple[Observation, tuple[float, float]]]) -> Iterator[Any]:
    for observation, truth in those:
        yield (
            Observation(observation.image, observation.lat, observation.lon, observation.fix_covariance),
            truth,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["ccvpe-small", "ccvpe-rig-small"],
        help="names, with their shipped weights, or NAME=CHECKPOINT; of one size of panorama",
    )
    parser.add_argument("--styles", nargs="+", default=("source", "target"))
    parser.add_argument("--cities", default="900-903")
    parser.add_argument("--frames", type=int, default=150, help="length of each drive, frames at 1 Hz")
    parser.add_argument("--headings", nargs="+", default=("known", "unknown"))
    parser.add_argument("--cameras", nargs="+", default=list(CAMERAS), choices=list(CAMERAS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    nets = {}
    for model in arguments.models:
        name, _, checkpoint = model.partition("=")
        nets[Path(checkpoint or name).stem] = load_model(name, checkpoint or None).model
    spec, *others = (net.spec for net in nets.values())
    if any((s.ground_size, s.elevation_deg) != (spec.ground_size, spec.elevation_deg) for s in others):
        parser.error("the models' panoramas differ: measure them one by one")
    console, results = Console(width=150), []
    for style in arguments.styles:
        errors: dict[tuple[str, str, Condition], list[DriveErrors]] = {}
        for seed in parse_cities(arguments.cities):
            city = build_city(seed, style)
            seen = observe(city, spec, arguments.frames, arguments.cameras)
            with tempfile.TemporaryDirectory() as folder:
                tif = city.write_geotiff(Path(folder) / "city.tif")
                for weights, net in nets.items():
                    for heading in arguments.headings:
                        prior = 0.0 if heading == "known" else None
                        with Localizer.open(tif, net, heading_prior_deg=prior) as localizer:
                            for condition, those in seen.items():
                                drive_errors = localize_drive(
                                    localizer, those if heading == "known" else without_heading(those)
                                )
                                errors.setdefault((weights, heading, condition), []).append(drive_errors)
            print(f"{style} city {seed} done", flush=True)
        for heading in arguments.headings:
            table = Table(title=f"{style} style, heading {heading}: mean / median, m (in the 95 % ellipse)")
            for title in ("cameras", "weights"):
                table.add_column(title)
            for how in CONDITIONS:
                table.add_column(str(Condition("", *how)), justify="right")
            for name in arguments.cameras:
                for weights in nets:
                    row = []
                    for how in CONDITIONS:
                        joined = DriveErrors.joined(errors[weights, heading, Condition(name, *how)])
                        figures = Errors.of(joined.estimate)
                        inside = joined.coverage(0.95)
                        row.append(f"{figures.mean:.2f} / {figures.median:.2f} ({inside:.0%})")
                        cell = {"style": style, "heading": heading, "weights": weights, "cameras": name}
                        cell |= {"tilt_deg": how[0], "levelled": how[1], "coverage_95": inside}
                        results.append({**cell, **asdict(figures)})
                    table.add_row(name, weights, *row)
            console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
