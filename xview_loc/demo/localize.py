"""``make demo``: a drive through a city that the model has never seen, localised live by the node."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from xview_loc.demo.live import (
    FILTERED,
    FIX,
    SINGLE,
    Demo,
    DriveLog,
    add_vehicle_options,
    cameras_text,
    map_middle,
    model_and_rig,
)
from xview_loc.demo.pictures import draw_errors, draw_heat_map, draw_maps, spread_m
from xview_loc.evaluation.errors import Errors
from xview_loc.geodesy import LocalProjection
from xview_loc.report import Page

# The shipped weights were trained on the source style's cities 0 to 23.
STYLE, CITY, SIZE_M = "source", 4321, 1020.0
FRAMES, RATE_HZ = 160, 4.0
# Every heat map, so that the page can show the widest.
PARAMETERS = {"filter": True, "heat_map_rate": 100.0}
FIGURES = ("median", "mean", "95 %", "worst", "frames")


def run_drive(map_path: Path, model: str, rig: str) -> DriveLog:
    """Drive, with a panorama camera or a rig, and localise over DDS. Raises SystemExit on failure."""
    map_path.unlink(missing_ok=True)
    words: list[Any] = ["--style", STYLE, "--city", CITY, "--size", SIZE_M]
    words += ["--frames", FRAMES, "--rate", RATE_HZ]
    with Demo("demo", rig) as demo:
        drive = demo.start_drive(map_path.parent, *words)
        demo.start_localizer(map_path, model, PARAMETERS)
        return demo.follow(drive, FRAMES, FRAMES / RATE_HZ)


def figures(errors: dict[int, float]) -> list[str]:
    """Return FIGURES of errors in metres, as text."""
    e = Errors.of(np.array(list(errors.values())))
    worst = max(errors.values(), default=math.nan)
    return [*(f"{v:.2f} m" for v in (e.median, e.mean, e.p95, worst)), str(e.frames)]


def make_page(log: DriveLog, model: str, rig: str, map_path: Path) -> Page:
    """Make the page."""
    errors = {name: log.errors(places) for name, places in log.named.items()}
    own = errors[SINGLE]
    page = Page("xview_loc: a drive through a city it has never seen")
    page.text(
        f"The localizer node with {model} localised {len(own)} of {FRAMES} frames of a simulated drive with "
        f"{cameras_text(rig)}, live over DDS. The city (style {STYLE}, seed {CITY}) was not used in "
        f"training. The {FIX} says where to search, a {SINGLE} is matched to the aerial image there, and the "
        f"{FILTERED} pose fuses all frames and fixes so far with wheel odometry."
    )
    page.table(["distance from the truth", *FIGURES], [[n, *figures(e)] for n, e in errors.items()])
    page.heading("Route")
    caption = "Truth, GNSS fixes, single-frame estimates and filtered poses over the aerial image"
    page.figure(draw_maps({"": log}, map_path), caption)
    page.heading("Errors")
    page.text(
        "Stretches of street can look alike: a single frame cannot tell which of them it shows and may pick "
        f"the wrong one, so its curve can jump (here, at worst, to {max(own.values()):.1f} m). The filter "
        "also knows how the vehicle has moved since earlier frames."
    )
    page.figure(draw_errors(errors), "Distance from the truth: GNSS fix, single frame and filtered pose")
    if stamps := log.heat_maps.keys() & own.keys():
        widest = max(stamps, key=lambda stamp: spread_m(log.heat_maps[stamp]))
        page.heading("Heat map")
        datum = LocalProjection(*map_middle(map_path))
        caption = "The frame with the widest heat map: its aerial tile, and where it may have been taken"
        page.figure(draw_heat_map(log, widest, map_path, datum), caption)
    return page


def main() -> None:
    """Run the demo and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_vehicle_options(parser)
    model, rig = model_and_rig(parser.parse_args())
    folder = Path("demo_output").resolve()
    folder.mkdir(exist_ok=True)
    print(f"building a simulated city the model has never seen ({STYLE} style, seed {CITY}) ...", flush=True)
    map_path, page = folder / "city.tif", folder / "demo.html"
    log = run_drive(map_path, model, rig)
    make_page(log, model, rig, map_path).write(page)
    print("distance from the truth:")
    for name, places in log.named.items():
        texts = zip(FIGURES, figures(log.errors(places)), strict=True)
        print(f"{name:12s}: {', '.join(' '.join(pair) for pair in texts)}")
    print(f"page: {page}")


if __name__ == "__main__":
    main()
