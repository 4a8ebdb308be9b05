"""Measure the gain of the filter over time in simulated cities.

benchmarks/accuracy/filter.py [--cities 970 971 972 973] [--seconds 150] [--json FILE]

Drives at 4 Hz are rendered once and localised in several scenarios: ``plain``; ``corrupted``, with 15 % wrong
images, half of them blind (black or noise), half ambiguous (the panorama of another place of the drive);
``outage``, corrupted and 60 s without a fix in the middle; ``odometry scale``, an outage with odometry that
overestimates ways by 5 %; ``tunnel``, an outage in which all images are black; and, corrupted, with other
headings than measured ones: ``course``, those of odometry and fixes; ``no heading``, all are searched;
``compass``, 20 degrees off; ``long outage``, headings of odometry, which overestimates ways by 2 % and turns
by 2 degrees a minute, and 5 minutes without a fix, if the drive lasts longer. The filter gets its input as in
the node. Figures leave out the first 5 s.

Single frames are localised at their own fixes in every scenario, also in the outage, where a vehicle without
the filter would have none. NEES is the mean squared Mahalanobis distance of the truth from the filtered pose;
2 for correct normal errors. ``> 3, 5`` are the shares of truths further than 3 and 5 standard deviations away
(1.1 % and 0.0004 % for these). ``lost`` counts frames without a filtered pose; ``right after`` is the time
from which on all poses are within 3 m and 5 degrees, of the slowest drive; ``ms`` is the processor time per
frame: that of the localizer, once it has the tile's features, and that of the filter.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError, Observation, PoseEstimate
from xview_loc.estimation.position_filter import PositionFilter
from xview_loc.evaluation.errors import Errors, distance_m
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.images import Image
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialMap, MapError
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_model
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.views import PanoramaView
from xview_loc.statistics import coverage, mahalanobis
from xview_loc.vehicle.course import CourseHeadings
from xview_loc.vehicle.heading_check import OffsetCheck
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry, VelocitySample
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

RATE_HZ = 4.0
SKIPPED_S, OUTAGE_S = 5.0, 60.0
CORRUPTED = 0.15
# Least distance to the place that an ambiguous image shows.
ELSEWHERE_M = 30.0
WITHIN_M = 5.0
RIGHT_M, RIGHT_DEG = 3.0, 5.0
# A tile that takes longer to encode was not at hand, ms.
ENCODED_MS = 1.0


@dataclass(frozen=True)
class Scenario:
    """What goes wrong: images, fixes, headings (radians), odometry (scale, and radians per second).

    dark: images are black while there are no fixes.
    """

    name: str
    corrupted: bool = True
    outage_s: float = 0.0
    dark: bool = False
    heading: Literal["measured", "course", "unknown"] = "measured"
    heading_error: float = 0.0
    scale: float = 1.0
    turn: float = 0.0

    @property
    def heading_known(self) -> bool:
        return self.heading != "unknown"


SCENARIOS = (
    Scenario("plain", corrupted=False),
    Scenario("corrupted"),
    Scenario("outage", outage_s=OUTAGE_S),
    Scenario("odometry scale", outage_s=OUTAGE_S, scale=1.05),
    Scenario("tunnel", outage_s=OUTAGE_S, dark=True),
    Scenario("course", heading="course"),
    Scenario("no heading", heading="unknown"),
    Scenario("compass", heading_error=math.radians(20.0)),
    Scenario("long outage", outage_s=300.0, heading="course", scale=1.02, turn=math.radians(2.0) / 60.0),
)


@dataclass(frozen=True)
class Series:
    """Values per frame: errors in metres, in standard deviations and in degrees, in the outage or not, ms.

    localizer_ms: NaN where the tile was not at hand. right_after_s: of each drive.
    """

    single_m: NDArray[np.float64]
    filtered_m: NDArray[np.float64]
    mahalanobis: NDArray[np.float64]
    heading_deg: NDArray[np.float64]
    outage: NDArray[np.bool_]
    localizer_ms: NDArray[np.float64]
    filter_ms: NDArray[np.float64]
    right_after_s: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Iterable[Series]) -> Series:
        drives = list(parts)
        return cls(*(np.concatenate([getattr(d, f.name) for d in drives]) for f in fields(cls)))

    def figures(self) -> dict[str, Any]:
        single, filtered = Errors.of(self.single_m), Errors.of(self.filtered_m)
        sigmas = self.mahalanobis[np.isfinite(self.mahalanobis)]
        return {
            "frames": len(self.filtered_m),
            "single": asdict(single),
            "filtered": asdict(filtered) | {"max": float(np.nanmax(self.filtered_m))},
            "lost": int(np.isnan(self.filtered_m).sum()),
            "ratio": filtered.mean / single.mean,
            "coverage": {percent: coverage(sigmas, percent / 100) for percent in (50, 68, 95)},
            "nees": float((sigmas**2).mean()),
            "beyond": {limit: float((sigmas > limit).mean()) for limit in (3, 5)},
            "heading_deg": float(np.nanmean(self.heading_deg)),
            "right_after_s": self.right_after_s.tolist(),
            "outage": self._outage() if self.outage.any() else None,
            "localizer_ms": float(np.nanmean(self.localizer_ms)),
            "filter_ms": float(self.filter_ms.mean()),
        }

    def _outage(self) -> dict[str, float]:
        errors = self.filtered_m[self.outage]
        return {
            "mean": float(np.nanmean(errors)),
            "max": float(np.nanmax(errors)),
            "lost": int(np.isnan(errors).sum()),
            "within_5_m": float((errors < WITHIN_M).mean()),
        }


class Drive:
    """Rendered frames of a drive, good and corrupted, and estimates of single frames at their own fixes."""

    def __init__(self, frames: list[Frame], aerial: AerialMap, net: CrossViewModel, seed: int) -> None:
        self._frames = frames
        self._good = [frame.image for frame in frames if frame.image is not None]
        self._corrupted = corrupted(frames, self._good, np.random.default_rng([seed, 6]))
        self._localizers = {
            known: Localizer.open(aerial, net, heading_prior_deg=0.0 if known else None)
            for known in (True, False)
        }
        self._at_fix: dict[tuple[int, bool, float | None], tuple[PoseEstimate | None, float]] = {}

    def measure(self, scenario: Scenario) -> Series:
        middle, half = len(self._frames) // 2, round(scenario.outage_s * RATE_HZ / 2)
        odometry, mounting = Odometry(1.0), Mounting()
        course, check, replaced = CourseHeadings(odometry), OffsetCheck(), False
        least = self._localizers[True].calibration.min_confidence
        position = PositionFilter(odometry)
        rows = []
        for i, frame in enumerate(self._frames):
            truth = frame.truth
            outage = middle - half <= i < middle + half
            covariance = np.zeros((3, 3))
            covariance[:2, :2] = frame.fix.covariance
            fix = GnssFix(frame.stamp_ns, frame.fix.lat, frame.fix.lon, 0.0, covariance)
            started = time.thread_time()
            if not outage:
                course.add_fix(fix)
            for one in frame.wheels:
                speed, yaw_rate = scenario.scale * one.speed, one.yaw_rate + scenario.turn
                velocity = VelocitySample(one.stamp_ns, speed, 0.0, yaw_rate)
                odometry.add(velocity)
                reckoned = course.add_velocity(velocity)
            heading: HeadingSample | None = None
            if scenario.heading == "course":
                heading = reckoned
            elif scenario.heading == "measured":
                measured = wrap_angle(frame.heading + scenario.heading_error)
                heading = HeadingSample(frame.stamp_ns, measured, frame.heading_std)
                if course.contradicted:
                    check = OffsetCheck()
                motion = odometry.between(frame.stamp_ns - round(1e9 / RATE_HZ), frame.stamp_ns)
                if reckoned is not None and motion is not None:
                    check.add(heading, reckoned, motion.length)
                if check.fault and reckoned is not None:
                    heading = reckoned
                    if not replaced and not outage:
                        position.restart()
                replaced = check.fault is not None
            # Without a heading that it needs, the node refuses a frame.
            refused = heading is None and scenario.heading_known
            looked = None
            if not refused:
                looked = position.move(frame.stamp_ns, None if outage else fix, heading, mounting)
            spent = time.thread_time() - started
            dark = scenario.dark and outage
            single, localizer_ms = None, math.nan
            if not refused:
                single, localizer_ms = self._localize(i, fix, scenario, heading, dark, at_fix=True)
            estimate = single
            if looked is not fix:
                estimate = None
                if looked is not None:
                    estimate, localizer_ms = self._localize(i, looked, scenario, heading, dark)
            started = time.thread_time()
            if estimate is not None:
                position.observe(estimate, mounting, scenario.heading_known)
                if estimate.confidence >= least:
                    # The camera is where base_link is.
                    full = np.diag([*estimate.covariance.diagonal(), 1.0])
                    course.add_estimate(GnssFix(frame.stamp_ns, estimate.lat, estimate.lon, 0.0, full))
            pose = position.pose
            spent += time.thread_time() - started

            alone = math.nan
            if single is not None:
                alone = distance_m(single.lat, single.lon, truth.lat, truth.lon)
            error = sigmas = turned = math.nan
            if pose is not None and not refused:
                offset = np.array(LocalProjection(truth.lat, truth.lon).forward(pose.lat, pose.lon))
                error, sigmas = math.hypot(*offset), mahalanobis(offset, pose.covariance)
                if pose.heading is not None:
                    turned = math.degrees(abs(wrap_angle(pose.heading - truth.heading)))
            rows.append((alone, error, sigmas, turned, outage, localizer_ms, 1e3 * spent))
        columns = np.array(rows).T
        wrong = np.flatnonzero(~((columns[1] < RIGHT_M) & (columns[3] < RIGHT_DEG)))
        right_after = np.array([(wrong[-1] + 1) / RATE_HZ if len(wrong) else 0.0])
        single_m, filtered_m, distances, headings, outages, *ms = columns[:, round(SKIPPED_S * RATE_HZ) :]
        return Series(single_m, filtered_m, distances, headings, outages.astype(bool), *ms, right_after)

    def _localize(
        self,
        i: int,
        place: GnssFix,
        scenario: Scenario,
        heading: HeadingSample | None,
        dark: bool,
        at_fix: bool = False,
    ) -> tuple[PoseEstimate | None, float]:
        """Return the estimate of a frame, and the processor time that it took, ms; NaN without its tile."""
        image = self._good[i]
        if scenario.corrupted:
            image = self._corrupted[i]
        if dark:
            image = np.zeros_like(image)
        # Scenarios share the estimates of single frames.
        key = (i, image is not self._good[i], None if heading is None else heading.yaw)
        shared = at_fix and not dark
        if shared and key in self._at_fix:
            return self._at_fix[key]
        assert place.covariance is not None
        yaw, std = (None, 0.0) if heading is None else (heading.yaw, heading.std)
        observation = Observation(image, place.lat, place.lon, place.covariance[:2, :2], yaw, std)
        estimate: PoseEstimate | None = None
        ms, started = math.nan, time.process_time()
        try:
            estimate = self._localizers[scenario.heading_known].localize(observation)
            if estimate.timings_ms["encode"] < ENCODED_MS:
                ms = 1e3 * (time.process_time() - started)
        except (LocalizationError, MapError) as error:
            print(f"frame {i}, {scenario.name}: {error}", file=sys.stderr)
        if shared:
            self._at_fix[key] = estimate, ms
        return estimate, ms


def corrupted(frames: list[Frame], images: list[Image], rng: np.random.Generator) -> list[Image]:
    """Replace some images by black, noise, or a panorama of another place."""
    places = np.array([(f.truth.east, f.truth.north) for f in frames])
    out = list(images)
    for i in np.flatnonzero(rng.random(len(images)) < CORRUPTED):
        kind = rng.choice(["black", "noise", "ambiguous"], p=[0.25, 0.25, 0.5])
        elsewhere = np.flatnonzero(np.hypot(*(places - places[i]).T) > ELSEWHERE_M)
        if kind == "black":
            out[i] = np.zeros_like(images[i])
        elif kind == "noise":
            out[i] = rng.integers(0, 256, images[i].shape, np.uint8)
        else:
            out[i] = images[int(rng.choice(elsewhere))]
    return out


def measure(net: CrossViewModel, style: str, number: int, seed: int, seconds: float) -> dict[str, Series]:
    """Measure all scenarios of one drive."""
    city = build_city(number, style)
    view = PanoramaView(*net.spec.ground_size)
    options = DriveOptions(rate_hz=RATE_HZ)
    frames = list(drive(city, round(seconds * RATE_HZ), seed, options=options, view=view))
    with (
        tempfile.TemporaryDirectory() as folder,
        open_map(str(city.write_geotiff(Path(folder) / "city.tif"))) as aerial,
    ):
        rendered = Drive(frames, aerial, net, seed)
        return {scenario.name: rendered.measure(scenario) for scenario in scenarios(seconds)}


def scenarios(seconds: float) -> list[Scenario]:
    """Return those that fit into a drive."""
    return [scenario for scenario in SCENARIOS if scenario.outage_s + 2.0 * SKIPPED_S < seconds]


def table_of(style: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{style}: metres; mean / median / 95 % (/ max)")
    for column in ("scenario", "city", "single frame", "filtered", "ratio", "in 50/68/95 %, NEES, > 3, 5"):
        table.add_column(column, no_wrap=True)
    table.add_column("outage: mean / max, < 5 m", no_wrap=True)
    table.add_column("heading, right after", no_wrap=True)
    table.add_column("lost", justify="right")
    table.add_column("ms", justify="right")
    for row in rows:
        single, filtered, outage = row["single"], row["filtered"], row["outage"]
        during = ""
        if outage is not None:
            during = f"{outage['mean']:.2f} / {outage['max']:.2f}, {outage['within_5_m']:.0%}"
        table.add_row(
            row["scenario"],
            str(row["city"]) if row["seed"] is None else f"{row['city']}/{row['seed']}",
            " / ".join(f"{single[name]:.2f}" for name in ("mean", "median", "p95")),
            " / ".join(f"{filtered[name]:.2f}" for name in ("mean", "median", "p95", "max")),
            f"{row['ratio']:.2f}",
            f"{'/'.join(f'{100 * share:.0f}' for share in row['coverage'].values())}, {row['nees']:.1f}, "
            f"{', '.join(f'{share:.1%}' for share in row['beyond'].values())}",
            during,
            f"{row['heading_deg']:.1f} deg, {max(row['right_after_s']):.0f} s",
            str(row["lost"]),
            f"{row['localizer_ms']:.1f} + {row['filter_ms']:.1f}",
            end_section=row["seed"] is None,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ccvpe-small")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--styles", nargs="+", default=("source", "target"))
    parser.add_argument("--cities", type=int, nargs="+", default=(970, 971, 972, 973))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="seeds of the drives in each city")
    parser.add_argument("--seconds", type=float, default=150.0, help="length of a drive")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.seconds <= SKIPPED_S + OUTAGE_S:
        parser.error(f"an outage of {OUTAGE_S:g} s needs a longer drive")

    # Times of the filter are those of this thread, to exclude other load.
    cv2.setNumThreads(1)
    net = load_model(arguments.model, arguments.checkpoint).model
    console = Console(width=None if sys.stdout.isatty() else 200)
    results: list[dict[str, Any]] = []
    for style in arguments.styles:
        drives: dict[tuple[int, int], dict[str, Series]] = {}
        for city in arguments.cities:
            for seed in arguments.seeds:
                drives[city, seed] = measure(net, style, city, seed, arguments.seconds)
                print(f"{style}, city {city}, drive {seed}: done", file=sys.stderr)
        rows: list[dict[str, Any]] = []
        for scenario in scenarios(arguments.seconds):
            name = scenario.name
            for (city, seed), series in drives.items():
                head = {"style": style, "scenario": name, "city": city, "seed": seed}
                rows.append(head | series[name].figures())
            every = Series.joined(series[name] for series in drives.values())
            rows.append({"style": style, "scenario": name, "city": "all", "seed": None} | every.figures())
        console.print(table_of(style, rows))
        results += rows
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
