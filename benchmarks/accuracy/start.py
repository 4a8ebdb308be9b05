"""Measure how soon a vehicle without fixes finds its place in simulated cities.

benchmarks/accuracy/start.py [--cities 970 971 972 973] [--radii 100 200 500] [--json FILE]

Vehicles start anywhere in a disc, at several times of a drive at 4 Hz, and drive on for 120 s, by odometry
and images alone: with measured headings (``known``), or without any (``unknown``). With ``--moved``, they are
that far from the middle of the disc instead: moved while switched off. Images are taken when the search has
time: a tile takes 20 ms, and 25 ms more the first time, which was measured with ``ccvpe-small`` and OpenVINO
on two threads of a shared processor.

``right`` after 30, 60 and 120 s: found, within 5 m. ``wrong``: found, farther off. The time is that of those
found; the heading's error is that of unknown headings when found. From then on, the filter goes on without
fixes until the drive ends, with measured headings, or those of odometry from the heading that was found:
``afterwards``, mean and largest errors, the share of frames in the 95 % ellipse and the NEES (honest: 2).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from xview_loc.estimation.heat_map import TileScores
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError, LowImageryError, Observation
from xview_loc.estimation.place_search import LEAST_APART_M, PlaceSearch, SearchArea
from xview_loc.estimation.position_filter import FilteredPose, PositionFilter
from xview_loc.geodesy import LocalProjection, distance_m, wrap_angle
from xview_loc.images import Image
from xview_loc.maps import open_map
from xview_loc.maps.base import NoImageryError
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_model
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.views import PanoramaView
from xview_loc.statistics import coverage, mahalanobis
from xview_loc.vehicle.course import CourseHeadings
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

RATE_HZ = 4.0
TILE_S, ENCODED_S = 0.02, 0.025
RIGHT_M = 5.0
AFTER_S = (30, 60, 120)


@dataclass(frozen=True)
class Start:
    """How a search ended: seconds, metres, degrees; NaN if it did not. widened: how often its area grew."""

    style: str
    city: int
    radius_m: float
    heading: str
    seconds: float = math.nan
    error_m: float = math.nan
    heading_deg: float = math.nan
    widened: int = 0
    # Of every image after that: metres, and standard deviations.
    afterwards_m: tuple[float, ...] = ()
    afterwards_sigmas: tuple[float, ...] = ()


class Vehicle:
    """Drives through frames without fixes; ``known``: with measured headings."""

    def __init__(self, localizer: Localizer, frames: list[Frame], known: bool) -> None:
        self._localizer, self._frames, self._known = localizer, frames, known
        self._searching = localizer if known else localizer.of_all_headings
        self._odometry = Odometry(1.0)
        self._course = CourseHeadings(self._odometry)

    def start(self, area: SearchArea, spacing_m: float, encoded: Counter[str]) -> dict[str, Any]:
        """Search until the place is found, then filter; return the fields of Start."""
        free_s, widened = 0.0, 0
        one = PlaceSearch(area, self._odometry, spacing_m)
        self._searching.forget_tiles()
        encoded.clear()
        for i, frame in enumerate(self._frames):
            self._drive(frame)
            seconds = (frame.stamp_ns - self._frames[0].stamp_ns) / 1e9
            if seconds < free_s:
                continue
            heading = self._measured(frame)
            one.move(frame.stamp_ns, heading)
            if one.driven < LEAST_APART_M:
                continue
            scan: list[TileScores] = []
            places = one.centres(Mounting())
            for lat, lon in places:
                with suppress(LowImageryError, NoImageryError):
                    scan.append(self._searching.score(_observation(frame, lat, lon, heading)))
            one.observe(scan, self._localizer.calibration, Mounting())
            free_s = seconds + TILE_S * len(places) + ENCODED_S * encoded.pop("tiles", 0)
            if one.given_up:
                widened += 1
                one.widen()
            elif (pose := one.found) is not None:
                assert pose.heading is not None
                turned = math.degrees(abs(wrap_angle(pose.heading - frame.truth.heading)))
                errors, sigmas = self._follow(self._frames[i + 1 :], pose)
                return {
                    "seconds": free_s,
                    "error_m": distance_m(pose.lat, pose.lon, frame.truth.lat, frame.truth.lon),
                    "heading_deg": turned,
                    "widened": widened,
                    "afterwards_m": tuple(errors),
                    "afterwards_sigmas": tuple(sigmas),
                }
        return {"widened": widened}

    def _follow(self, frames: list[Frame], pose: FilteredPose) -> tuple[list[float], list[float]]:
        """Filter from a pose on; return errors, metres and standard deviations."""
        position, mounting = PositionFilter(self._odometry), Mounting()
        position.restart(pose)
        if not self._known and pose.heading is not None:
            std = math.sqrt(pose.heading_variance)
            self._course.add_heading(HeadingSample(pose.stamp_ns, pose.heading, std))
        errors, sigmas = [], []
        for frame in frames:
            reckoned = self._drive(frame)
            heading = self._measured(frame) if self._known else reckoned
            if heading is None:
                errors.append(math.nan)
                continue
            place = position.move(frame.stamp_ns, None, heading, mounting)
            if place is not None and place.covariance is not None:
                observation = _observation(frame, place.lat, place.lon, heading, place.covariance[:2, :2])
                with suppress(LocalizationError, NoImageryError):
                    estimate = self._localizer.localize(observation)
                    position.observe(estimate, mounting, True)
                    covariance = np.diag([*estimate.covariance.diagonal(), 1.0])
                    fix = GnssFix(frame.stamp_ns, estimate.lat, estimate.lon, 0.0, covariance)
                    self._course.add_estimate(fix)
            if (now := position.pose) is None:
                errors.append(math.nan)
                continue
            truth = LocalProjection(frame.truth.lat, frame.truth.lon)
            offset = np.array(truth.forward(now.lat, now.lon))
            errors.append(float(np.hypot(*offset)))
            sigmas.append(mahalanobis(offset, now.covariance))
        return errors, sigmas

    def _drive(self, frame: Frame) -> HeadingSample | None:
        """Take a frame's odometry; return the heading by it."""
        reckoned = None
        for wheels in frame.wheels:
            velocity = VelocitySample(wheels.stamp_ns, wheels.speed, 0.0, wheels.yaw_rate)
            self._odometry.add(velocity)
            reckoned = self._course.add_velocity(velocity)
        return reckoned

    def _measured(self, frame: Frame) -> HeadingSample | None:
        return HeadingSample(frame.stamp_ns, frame.heading, frame.heading_std) if self._known else None


def _observation(
    frame: Frame, lat: float, lon: float, heading: HeadingSample | None, covariance: Any = None
) -> Observation:
    assert frame.image is not None
    yaw, std = (None, 0.0) if heading is None else (heading.yaw, heading.std)
    return Observation(frame.image, lat, lon, covariance, yaw, std)


def count_encoded(localizer: Localizer) -> Counter[str]:
    """Return a count of the tiles that a localizer encodes from now on."""
    counts: Counter[str] = Counter()
    encode = localizer._features_of

    def counted(aerial: Image) -> Any:
        counts["tiles"] += 1
        return encode(aerial)

    localizer._features_of = counted  # type: ignore[method-assign]
    return counts


def measure(net: CrossViewModel, style: str, number: int, arguments: argparse.Namespace) -> list[Start]:
    """Measure all starts in one city."""
    city = build_city(number, style, size_m=arguments.size)
    view = PanoramaView(*net.spec.ground_size)
    apart = round(arguments.apart * RATE_HZ)
    length = round(arguments.seconds * RATE_HZ)
    count = length + apart * (arguments.starts - 1)
    frames = list(drive(city, count, 3, options=DriveOptions(rate_hz=RATE_HZ), view=view))
    found: list[Start] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_map(str(city.write_geotiff(Path(folder) / "city.tif"))) as aerial,
        Localizer.open(aerial, net, backend=arguments.backend) as localizer,
    ):
        for heading in arguments.headings:
            known = heading == "known"
            encoded = count_encoded(localizer if known else localizer.of_all_headings)
            for radius in arguments.radii:
                rng = np.random.default_rng([number, int(radius)])
                for k in range(arguments.starts):
                    vehicle = Vehicle(localizer, frames[k * apart : k * apart + length], known)
                    away = arguments.moved or radius * math.sqrt(rng.uniform())
                    direction = rng.uniform(0.0, 2.0 * math.pi)
                    at = frames[k * apart].truth
                    east, north = away * math.cos(direction), away * math.sin(direction)
                    lat, lon = (float(v) for v in LocalProjection(at.lat, at.lon).inverse(east, north))
                    result = vehicle.start(SearchArea(lat, lon, radius), net.half_extent_m, encoded)
                    found.append(Start(style, number, radius, heading, **result))
                print(f"{style}, city {number}, {heading}, {radius:g} m: done", file=sys.stderr)
    return found


def table_of(starts: list[Start]) -> Table:
    table = Table(title="starts without fixes")
    for column in ("style", "heading", "radius", "starts", *(f"right, {s} s" for s in AFTER_S), "wrong"):
        table.add_column(column)
    table.add_column("seconds: median / 95 %")
    table.add_column("error, m: median / 95 %")
    table.add_column("heading, deg")
    for column in ("widened", "afterwards: mean / largest", "95 %, NEES", "lost"):
        table.add_column(column)
    for style, heading, radius in dict.fromkeys((s.style, s.heading, s.radius_m) for s in starts):
        rows = [s for s in starts if (s.style, s.heading, s.radius_m) == (style, heading, radius)]
        seconds, error = (np.array([getattr(s, name) for s in rows]) for name in ("seconds", "error_m"))
        ended = np.isfinite(seconds)
        figures = ["", "", ""]
        if ended.any():
            figures = [
                f"{np.median(seconds[ended]):.0f} / {np.percentile(seconds[ended], 95):.0f}",
                f"{np.median(error[ended]):.2f} / {np.percentile(error[ended], 95):.2f}",
                f"{np.mean([s.heading_deg for s in rows if math.isfinite(s.seconds)]):.1f}",
            ]
        table.add_row(
            style,
            heading,
            f"{radius:g} m",
            str(len(rows)),
            *(f"{((seconds <= after) & (error < RIGHT_M)).mean():.0%}" for after in AFTER_S),
            str(int((error >= RIGHT_M).sum())),
            *figures,
            f"{np.mean([s.widened for s in rows]):.1f}",
            *_afterwards(rows),
        )
    return table


def _afterwards(starts: list[Start]) -> tuple[str, str, str]:
    errors, sigmas = (
        np.array([value for start in starts for value in getattr(start, name)])
        for name in ("afterwards_m", "afterwards_sigmas")
    )
    if not len(sigmas):
        return "", "", ""
    honest = f"{coverage(sigmas, 0.95):.0%}, {(sigmas**2).mean():.1f}"
    return f"{np.nanmean(errors):.2f} / {np.nanmax(errors):.1f}", honest, f"{np.isnan(errors).mean():.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--styles", nargs="+", default=("source", "target"))
    parser.add_argument("--cities", type=int, nargs="+", default=(970, 971, 972, 973))
    parser.add_argument("--size", type=float, default=1020.0, help="side of the cities, metres")
    parser.add_argument("--headings", nargs="+", choices=("known", "unknown"), default=("known", "unknown"))
    parser.add_argument("--radii", type=float, nargs="+", default=(100.0, 200.0, 500.0))
    parser.add_argument("--moved", type=float, default=0.0, help="distance from the disc's middle, metres")
    parser.add_argument("--seconds", type=float, default=120.0, help="length of a drive")
    parser.add_argument("--starts", type=int, default=8, help="starts of each drive")
    parser.add_argument("--apart", type=float, default=20.0, help="seconds between them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all starts to this file")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    net = load_model(arguments.model, arguments.checkpoint).model
    starts: list[Start] = []
    for style in arguments.styles:
        for number in arguments.cities:
            starts += measure(net, style, number, arguments)
            if arguments.json:
                text = json.dumps([asdict(start) for start in starts], indent=1)
                arguments.json.write_text(text + "\n")
    Console(width=None if sys.stdout.isatty() else 200).print(table_of(starts))


if __name__ == "__main__":
    main()
