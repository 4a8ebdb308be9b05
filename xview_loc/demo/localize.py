"""``make demo``: a drive through a city that the model has never seen, localised live by the node."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from xview_loc.demo.live import Demo, Listener, map_middle
from xview_loc.demo.pictures import draw_errors, draw_heat_map, draw_map
from xview_loc.evaluation import Errors
from xview_loc.geodesy import LocalProjection
from xview_loc.report import Page

# The shipped weights were trained on the source style's cities 0 to 23.
STYLE, CITY, SIZE_M = "source", 4321, 1020.0
FRAMES, RATE_HZ = 160, 4.0
MODELS = ("ccvpe-small", "ggcvt-small")


def run_drive(folder: Path, model: str) -> tuple[Listener, Path]:
    """Drive and localise over DDS; return the listener and the map. Raises SystemExit on failure."""
    map_path = folder / "city.tif"
    map_path.unlink(missing_ok=True)
    with Demo("demo") as demo:
        words = ("--style", STYLE, "--city", CITY, "--size", SIZE_M, "--frames", FRAMES, "--rate", RATE_HZ)
        drive = demo.start_drive(folder, *words)
        demo.start_localizer(map_path, model)
        demo.follow(drive, FRAMES, FRAMES / RATE_HZ)
    return demo.listener, map_path


def main() -> None:
    """Run the demo and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    model = parser.parse_args().model
    folder = Path("demo_output").resolve()
    folder.mkdir(exist_ok=True)
    print(f"building a simulated city the model has never seen ({STYLE} style, seed {CITY}) ...", flush=True)
    listener, map_path = run_drive(folder, model)
    log = listener.drive
    coarse, own = log.errors(log.fix), log.errors(log.estimate)
    named = {"coarse fix": coarse, "estimate": own}
    rows = {name: Errors.of(np.array(list(errors.values()))) for name, errors in named.items()}
    page = Page("xview_loc: a drive through a city it has never seen")
    page.text(
        f"The localizer node with {model} localised {len(own)} of {FRAMES} frames of a simulated drive, live "
        f"over DDS, each frame on its own. The city (style {STYLE}, seed {CITY}) was not used in training."
    )
    header = ["distance from the truth", "mean", "median", "95 %"]
    page.table(header, [[n, *(f"{v:.1f} m" for v in (e.mean, e.median, e.p95))] for n, e in rows.items()])
    page.heading("Route")
    page.figure(draw_map(log, map_path), "Truth, coarse fixes and estimates over the aerial image")
    page.heading("Errors")
    page.figure(draw_errors(coarse, own), "Distance from the truth: coarse fix and estimate")
    if listener.grid is not None:
        datum = LocalProjection(*map_middle(map_path))
        page.heading("Heat map")
        heat_map = draw_heat_map(log, listener.grid, listener.grid_stamp, map_path, datum)
        page.figure(heat_map, "Aerial tile and heat map of the last frame")
    page.write(folder / "demo.html")
    for name, e in rows.items():
        print(f"{name:10s}: median {e.median:5.2f} m, mean {e.mean:5.2f} m, 95 % {e.p95:5.2f} m")
    ratio = rows["estimate"].median / rows["coarse fix"].median
    print(f"the estimate's median error is {ratio:.0%} of the coarse fix's")
    print(f"page: {folder / 'demo.html'}")


if __name__ == "__main__":
    main()
