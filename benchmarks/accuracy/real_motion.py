"""Measure students of whole drives with real motion and fixes, and a simulated camera.

benchmarks/accuracy/real_motion.py TRACK [--model ccvpe-small] [--scales 1 10] [--work DIR] [--json FILE]

TRACK is a folder of comma2k19 arrays, a minute of San Francisco: poses of a tightly coupled solution, and
fixes of the vehicle's receiver. The drive is rotated onto an avenue of simulated cities of the target style
with straight streets, with the errors of its fixes ``--scales`` times as large. Each city is one drive: some
for training, others held out. Odometry and heading have simulated errors.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from adaptation import CITY_M, Source, open_pairs, pair_drive, write_drive
from numpy.typing import NDArray
from pyproj import Transformer
from rich.console import Console
from students import Cell, Row, summary

from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.models.checkpoint import load_model
from xview_loc.models.specs import ModelSpec
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, Fix, Frame, Truth, Wheels
from xview_loc.simulation.styles import style_for
from xview_loc.simulation.views import CameraPose, PanoramaView, render_panorama

Array = NDArray[np.float64]
TRAINING, HELD_OUT = range(850, 858), range(858, 862)
# Frame interval in the recording (20 Hz), and the claimed standard deviation of fixes per axis at scale 1.
EVERY, CLAIMED_M = 8, 1.5
ROWS = ("teacher", "paper", "smoothed", "oracle")


@dataclass(frozen=True, eq=False)
class Motion:
    """Motion of a drive: seconds (N,), and places and errors of fixes (N,), complex metres.

    Axes are the main direction of the drive and its left; the origin is the start.
    """

    seconds: Array
    place: NDArray[np.complex128]
    error: NDArray[np.complex128]


def read_motion(folder: Path) -> Motion:
    def array(name: str) -> Array:
        return np.asarray(np.load(folder / name), np.float64)

    to_degrees = Transformer.from_crs("EPSG:4978", "EPSG:4979", always_xy=True)
    lon, lat, _ = to_degrees.transform(*array("frame_positions").T)
    plane = LocalProjection(float(lat[0]), float(lon[0]))
    east, north = plane.forward(lat, lon)
    place, seconds = east + 1j * north, array("frame_times")
    fixes = array("live_gnss_ublox_value")
    east, north = plane.forward(fixes[:, 0], fixes[:, 1])
    at = array("live_gnss_ublox_t")
    inside = (at >= seconds[0]) & (at <= seconds[-1])
    error = (east + 1j * north - np.interp(at, seconds, place))[inside]
    ahead = (place[-1] - place[0]) / abs(place[-1] - place[0])
    chosen = slice(None, None, EVERY)
    seconds, place = seconds[chosen], place[chosen]
    return Motion(
        seconds - seconds[0], (place - place[0]) / ahead, np.interp(seconds, at[inside], error) / ahead
    )


def straight_city(seed: int) -> City:
    return build_city(seed, replace(style_for("target", seed), bend_m=0.0, jitter=0.0), size_m=CITY_M)


def avenue(city: City, length: float) -> tuple[complex, complex, float]:
    """Return start, direction and lateral distance of the outer lane for ``length`` metres of an avenue.

    The avenue is the one nearest to the centre of the city.
    """
    best: tuple[float, complex, complex, float] | None = None
    for street in city.streets.streets:
        if street.lanes < 2:
            continue
        first, last = street.points[0] @ (1, 1j), street.points[-1] @ (1, 1j)
        along = (last - first) / abs(last - first)
        # Point of the street's line nearest to the centre of the city.
        foot = first - along * (first * along.conjugate()).real
        if best is None or abs(foot) < best[0]:
            best = abs(foot), foot - along * length / 2, along, (street.lanes - 0.5) * street.lane_m
    assert best is not None
    return best[1:]


def frames(city: City, motion: Motion, scale: float) -> Iterator[Frame]:
    options, rng = DriveOptions(), np.random.default_rng(city.seed)
    start, ahead, lane = avenue(city, float(motion.place[-1].real))
    # In the rightmost lane.
    places = start + ahead * (motion.place - 1j * lane)
    velocity = np.gradient(places, motion.seconds)
    heading_bias = rng.normal() * options.heading_bias
    speed_scale = 1.0 + rng.normal() * options.speed_scale
    for k, place in enumerate(places):
        lat, lon = (float(x) for x in city.to_latlon(place.real, place.imag))
        yaw = math.atan2(velocity[k].imag, velocity[k].real)
        heading = wrap_angle(yaw - city.projection.convergence(lat, lon))
        speed = float(abs(velocity[k]))
        fix = place + ahead * motion.error[k] * scale
        fix_lat, fix_lon = (float(x) for x in city.to_latlon(fix.real, fix.imag))
        pose = CameraPose(place.real, place.imag, yaw, city.style.camera_height_m)
        wheel_speed = speed * speed_scale + options.speed_noise * rng.normal()
        yield Frame(
            stamp_ns=round(motion.seconds[k] * 1e9),
            image=render_panorama(city, pose, PanoramaView(64, 256), rng=rng),
            truth=Truth(place.real, place.imag, lat, lon, heading, speed, 0.0),
            fix=Fix(fix_lat, fix_lon, np.eye(2) * (CLAIMED_M * scale) ** 2),
            heading=wrap_angle(heading + heading_bias + options.heading_noise * rng.normal()),
            heading_std=math.hypot(options.heading_bias, options.heading_noise),
            wheels=(Wheels(round(motion.seconds[k] * 1e9), wheel_speed, 0.0),),
        )


def make_drive(seed: int, motion: Motion, scale: float, folder: Path) -> Path:
    """Make a bag of pairs of the drive through a city."""
    if not (folder / "pairs").exists():
        city = straight_city(seed)
        folder.mkdir(parents=True, exist_ok=True)
        city.write_geotiff(folder / "city.tif")
        write_drive(frames(city, motion, scale), folder / "pairs-drive")
        pair_drive(folder, "pairs")
    return folder


def open_drives(folders: list[Path], spec: ModelSpec) -> Source:
    truth = np.concatenate([open_pairs(folder, "pairs", spec)[1] for folder in folders])
    return PairDataset([folder / "pairs" for folder in folders], spec), truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("track", type=Path)
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--scales", type=float, nargs="+", default=(1.0, 10.0))
    parser.add_argument("--work", type=Path, default=Path("real_motion_benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    motion = read_motion(arguments.track)
    teacher = load_model(arguments.model)
    spec, results = teacher.model.spec, dict[str, dict[str, Row]]()
    for scale in arguments.scales:
        pairs, held = (
            open_drives(
                [
                    make_drive(seed, motion, scale, arguments.work / f"{scale:g}" / str(seed))
                    for seed in cities
                ],
                spec,
            )
            for cities in (TRAINING, HELD_OUT)
        )
        cell = Cell(teacher, pairs, held, arguments.work / f"{scale:g}" / spec.name, 0)
        results[f"errors x {scale:g}"] = {row: cell.row(row) for row in ROWS}
        if arguments.json:
            arguments.json.write_text(json.dumps(results))
    summary(results, Console(width=180))


if __name__ == "__main__":
    main()
