"""Measure how far backends and precisions move the pose from plain float32, on simulated drives.

benchmarks/accuracy/drift.py [--model ccvpe-small] [--checkpoint FILE] [--styles source target]
    [--cities 910 911] [--frames 150] [--heading known] [--json FILE]

``plain`` is PyTorch in float32 with nothing precomputed. Errors are against the true places.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import Observation, PoseEstimate
from xview_loc.geodesy import LocalProjection
from xview_loc.models.checkpoint import load_model
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.views import PanoramaView

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"precompute": False},
    "torch float32": {},
    "torch bfloat16": {"precision": "bfloat16"},
    "openvino float32": {"backend": "openvino"},
    "openvino bfloat16": {"backend": "openvino", "precision": "bfloat16"},
    "onnxruntime float32": {"backend": "onnxruntime"},
}


def localize(
    frames: list[Frame], tif: Path, model: str, checkpoint: Path | None, known: bool, options: dict[str, Any]
) -> list[PoseEstimate]:
    """Localise each frame without search discs, which would hide maxima that jump."""
    net = load_model(model, checkpoint).model
    options = {"heading_prior_deg": 0.0 if known else None, "min_valid_fraction": 0.0, **options}
    with Localizer.open(tif, net, search_radius_m=None, **options) as localizer:
        return [
            localizer.localize(Observation(f.image, f.fix.lat, f.fix.lon, heading=f.heading))
            for f in frames
            if f.image is not None
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--styles", nargs="+", default=("source", "target"))
    parser.add_argument("--cities", type=int, nargs="+", default=(910, 911))
    parser.add_argument("--frames", type=int, default=150, help="length of each drive, frames at 1 Hz")
    parser.add_argument("--heading", choices=("known", "unknown"), default="known")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    spec = load_model(arguments.model, arguments.checkpoint).model.spec
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    drifts: dict[str, list[float]] = {way: [] for way in WAYS}
    same: dict[str, list[bool]] = {way: [] for way in WAYS}
    for style in arguments.styles:
        for seed in arguments.cities:
            city = build_city(seed, style)
            view = PanoramaView(*spec.ground_size)
            frames = list(drive(city, arguments.frames, options=DriveOptions(rate_hz=1.0), view=view))
            datum = LocalProjection(frames[0].truth.lat, frames[0].truth.lon)
            with tempfile.TemporaryDirectory() as folder:
                tif = city.write_geotiff(Path(folder) / "city.tif")
                known = arguments.heading == "known"
                poses = {
                    way: localize(frames, tif, arguments.model, arguments.checkpoint, known, options)
                    for way, options in WAYS.items()
                }
            for way, those in poses.items():
                for pose, plain, frame in zip(those, poses["plain"], frames, strict=True):
                    place = datum.forward(pose.lat, pose.lon)
                    drifts[way].append(math.dist(place, datum.forward(plain.lat, plain.lon)))
                    errors[way].append(math.dist(place, datum.forward(frame.truth.lat, frame.truth.lon)))
                    same[way].append(pose.heat_map.peak_pixel == plain.heat_map.peak_pixel)
    count = len(errors["plain"])
    table = Table(title=f"{arguments.model}, heading {arguments.heading}, {count} frames")
    for column in (
        "way",
        "drift mean, m",
        "95 %, m",
        "worst, m",
        "same maximum",
        "error mean, m",
        "median, m",
    ):
        table.add_column(column, justify="right" if table.columns else "left")
    results = {}
    for way in WAYS:
        drift, error = np.array(drifts[way]), np.array(errors[way])
        results[way] = {
            "drift_mean_m": float(drift.mean()),
            "drift_95_m": float(np.quantile(drift, 0.95)),
            "drift_worst_m": float(drift.max()),
            "same_maximum": float(np.mean(same[way])),
            "error_mean_m": float(error.mean()),
            "error_median_m": float(np.median(error)),
        }
        mean, p95, worst, share, error_mean, error_median = results[way].values()
        table.add_row(
            way,
            *(f"{x:.4f}" for x in (mean, p95, worst)),
            f"{share:.1%}",
            *(f"{x:.2f}" for x in (error_mean, error_median)),
        )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"frames": count, "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
