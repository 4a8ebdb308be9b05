"""Compare the panoramas that rigs of cameras make with panoramas rendered directly from the rigs' middles.

benchmarks/accuracy/rig_geometry.py [--cities 952 953 954 955] [--places 6] [--assumptions] [--skew]
    [--json FILE] [--picture FILE]

Cities are in the source and the target style in turn; the panorama has 128 x 512 pixels from +30 to -60
degrees. Errors are absolute differences in grey levels (0 to 255) of the pixels that a camera sees. "Tilted"
is by 6 degrees of roll and -6 of pitch, levelled or not.

--assumptions: how far walls and the sky are taken to be (``rig._RANGE_M``) and how wide seams are blended
(``rig._SEAM``). The figures in rig.py were chosen with it in cities 950 and 951, other ones than those of the
table.
--skew: every second camera takes its image 50 ms later, at 30 km/h.
--picture: what the rigs show of the first place, tilted and levelled; above, the panorama rendered directly.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from xview_loc import rig as rig_module
from xview_loc.camera import PanoramaCamera
from xview_loc.images import Image, encode_jpeg
from xview_loc.rig import MountedCamera, Rig, tilt_matrix
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import drive
from xview_loc.simulation.rigs import RIGS, VehiclePose, make_rig, render_rig
from xview_loc.simulation.views import render_camera

ELEVATION = math.radians(30.0), math.radians(-60.0)
LENS = PanoramaCamera(512, 128, *ELEVATION)
# Rendered directly at four times the resolution, then reduced.
FINE = 4
PICTURE = PanoramaCamera(768, 192, *ELEVATION)
TILT = math.radians(6.0)
SPEED, LATE_S = 30 / 3.6, 0.05


LEVEL, TILTED = (0.0, 0.0), (TILT, -TILT)
RANGES_M = (8.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 1e6)
SEAMS = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass
class Errors:
    """Absolute differences of the pixels seen, grey levels, and the shares of pixels seen."""

    values: list[Any] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, seen: tuple[Image, Any], direct: Image) -> None:
        panorama, mask = seen
        self.values.append(np.abs(panorama.astype(np.int16) - direct)[mask].astype(np.uint8))
        self.shares.append(float(mask.mean()))

    def figures(self) -> dict[str, float]:
        values = np.concatenate(self.values).astype(float)
        return {
            "median": float(np.median(values.mean(-1))),
            "mean": float(values.mean()),
            "psnr": 20 * math.log10(255 / math.sqrt((values**2).mean())),
            "seen": float(np.mean(self.shares)),
        }


@dataclass
class View:
    """What a rig's cameras saw from one place, and the panorama from their middle."""

    rig: str
    tilt: tuple[float, float]
    images: dict[str, Image]
    direct: Image


Results = dict[str, dict[str, dict[str, float]]]


def places(city: City, count: int) -> list[VehiclePose]:
    frames = list(drive(city, 25 * count, 0, view=None))[::25]
    return [VehiclePose(f.truth.east, f.truth.north, f.truth.heading) for f in frames]


def views(
    cities: list[int],
    count: int,
    tilts: tuple[tuple[float, float], ...],
    late_s: float = 0.0,
    lens: PanoramaCamera = LENS,
) -> Iterator[View]:
    """Render every rig, without the camera's blur and noise; every second camera ``late_s`` later."""
    fine = PanoramaCamera(LENS.width * FINE, LENS.height * FINE, *ELEVATION)
    for number, seed in enumerate(cities):
        city = build_city(seed, ("source", "target")[number % 2])
        city = replace(city, style=replace(city.style, camera_blur=0.0))
        for place in places(city, count):
            for name, (roll, pitch) in ((name, tilt) for name in RIGS for tilt in tilts):
                rig, pose = make_rig(name), replace(place, roll=roll, pitch=pitch)
                forward, left, up = (tilt_matrix(roll, pitch) @ rig.centre).tolist()
                direct = render_camera(city, place, MountedCamera(fine, (forward, left, up)))
                size = lens.width, lens.height
                direct = np.asarray(cv2.resize(direct, size, interpolation=cv2.INTER_AREA))
                images = render_rig(city, pose, rig)
                for key in list(rig.cameras)[1::2] if late_s else []:
                    mounted = rig.cameras[key]
                    x, y, z = mounted.position
                    ahead = replace(mounted, position=(x + SPEED * late_s, y, z))
                    images[key] = render_camera(city, pose, ahead)
                yield View(name, (roll, pitch), images, direct)


def compare(seen: Iterator[View] | list[View], height: float = 0.0) -> Results:
    """Return figures by condition and rig; ``height`` is where the rig takes the ground to be."""
    rigs = {name: Rig(make_rig(name).cameras, height) for name in RIGS}
    errors: dict[str, dict[str, Errors]] = defaultdict(lambda: defaultdict(Errors))
    for view in seen:
        roll, pitch = view.tilt
        condition = "tilted" if view.tilt != LEVEL else "level"
        made = rigs[view.rig].view(view.images, LENS, roll=roll, pitch=pitch)
        errors[condition][view.rig].add(made, view.direct)
        if view.tilt != LEVEL:
            plain = rigs[view.rig].view(view.images, LENS)
            errors["tilted, not levelled"][view.rig].add(plain, view.direct)
    return {key: {rig: e.figures() for rig, e in row.items()} for key, row in errors.items()}


def assumptions(seen: list[View]) -> Results:
    rows: Results = {}
    for range_m in RANGES_M:
        with patch.object(rig_module, "_RANGE_M", range_m):
            name = f"{range_m:.0f} m" if range_m < 1e6 else "infinity, ground plane"
            rows[name] = compare(seen)["level"]
            if range_m == 1e6:
                # The ground out of reach, too.
                rows["infinity everywhere"] = compare(seen, 1e12)["level"]
    for seam in SEAMS:
        with patch.object(rig_module, "_SEAM", seam):
            rows[f"seam {seam:g}"] = compare(seen)["level"]
    return rows


def draw(seen: Iterator[View], path: Path) -> None:
    rows = []
    for view in seen:
        roll, pitch = view.tilt
        panorama, _ = make_rig(view.rig).view(view.images, PICTURE, roll=roll, pitch=pitch)
        rows.append(panorama)
        if len(rows) == 1:
            rows.insert(0, view.direct)
    path.write_bytes(encode_jpeg(np.vstack(rows), 85))


def table(results: Results, title: str) -> Table:
    made = Table(title=title)
    made.add_column("")
    for name in RIGS:
        made.add_column(name, justify="right")
    for row, rigs in results.items():
        cells = [rigs.get(name) for name in RIGS]
        made.add_row(
            row,
            *(
                f"{c['median']:.1f} / {c['mean']:.1f} / {c['psnr']:.1f} / {c['seen']:.0%}" if c else ""
                for c in cells
            ),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cities", type=int, nargs="+", default=[952, 953, 954, 955])
    parser.add_argument("--places", type=int, default=6, help="places in each city")
    parser.add_argument("--assumptions", action="store_true")
    parser.add_argument("--skew", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.picture:
        draw(views(arguments.cities[:1], 1, (TILTED,), lens=PICTURE), arguments.picture)
        return
    where = arguments.cities, arguments.places
    if arguments.assumptions:
        results = assumptions(list(views(*where, (LEVEL,))))
    elif arguments.skew:
        results = compare(views(*where, (LEVEL,)))
        results["every second camera 50 ms late"] = compare(views(*where, (LEVEL,), LATE_S))["level"]
    else:
        results = compare(views(*where, (LEVEL, TILTED)))
    title = f"{len(arguments.cities) * arguments.places} places: median / mean error, PSNR in dB, share seen"
    Console(width=170).print(table(results, title))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
