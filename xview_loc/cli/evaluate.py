"""``xview-loc evaluate``: a model's errors on drives through simulated cities."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from xview_loc.cli.console import UsageError, console

if TYPE_CHECKING:
    from xview_loc.evaluation import DriveErrors
    from xview_loc.models.base import CrossViewModel


class Heading(str, Enum):
    """Is the heading known?"""

    known = "known"
    unknown = "unknown"


def evaluate(
    model: Annotated[str, typer.Option(help="Model's name.")] = "ccvpe-small",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; default: the shipped ones.")] = None,
    style: Annotated[str, typer.Option(help="Style of the cities.")] = "source",
    cities: Annotated[str, typer.Option(help="Seeds of the cities, such as 7 or 900-903.")] = "900-903",
    frames: Annotated[int, typer.Option(min=1, help="Frames of each drive, one a second.")] = 150,
    heading: Annotated[Heading, typer.Option(help="Is the heading known?")] = Heading.known,
    out: Annotated[Path | None, typer.Option(help="Write the errors, frame by frame, as JSON.")] = None,
) -> None:
    """Drive through simulated cities, localise every frame by itself and print the errors."""
    from xview_loc.datasets.simulated import parse_cities
    from xview_loc.evaluation import DriveErrors, Errors
    from xview_loc.models.checkpoint import load_model
    from xview_loc.simulation.styles import STYLES

    if style not in STYLES:
        raise UsageError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    net = load_model(model, checkpoint).model
    drives = [
        _drive(net, style, seed, frames, heading is Heading.known)
        for seed in track(parse_cities(cities), "cities", console=console, transient=True)
    ]
    drive = DriveErrors.joined(drives)
    table = Table(title=f"{net.spec.name}, {style} style, heading {heading.value}, metres")
    for column in ("", "frames", "mean", "median", "95 %"):
        table.add_column(column, justify="right" if column else "left")
    rows = {"coarse fix": Errors.of(drive.fix), "estimate": Errors.of(drive.estimate)}
    for name, errors in rows.items():
        figures = (f"{value:.2f}" for value in (errors.mean, errors.median, errors.p95))
        table.add_row(name, str(errors.frames), *figures)
    console.print(table)
    if out:
        content: dict[str, Any] = {
            "model": net.spec.name,
            "style": style,
            "cities": cities,
            "heading": heading.value,
        }
        content |= {name.replace(" ", "_"): asdict(errors) for name, errors in rows.items()}
        content |= {"fix_m": drive.fix.tolist()}
        content["estimate_m"] = [None if math.isnan(e) else e for e in drive.estimate.tolist()]
        out.write_text(json.dumps(content))


def _drive(net: CrossViewModel, style: str, seed: int, frames: int, known: bool) -> DriveErrors:
    from xview_loc.evaluation import localize_drive
    from xview_loc.imagery import AerialMap
    from xview_loc.localizer import Localizer, Observation, required_tile_px
    from xview_loc.simulation.city import build_city
    from xview_loc.simulation.drive import DriveOptions, drive
    from xview_loc.simulation.render import PanoramaView
    from xview_loc.tile_store import TileStore

    city = build_city(seed, style)
    spec = net.spec
    seen = drive(city, frames, options=DriveOptions(rate_hz=1.0), view=PanoramaView(*spec.ground_size))
    with (
        tempfile.TemporaryDirectory() as folder,
        AerialMap.open(str(city.write_geotiff(Path(folder) / "city.tif"))) as aerial,
    ):
        tiles = TileStore(aerial, required_tile_px(spec), spec.gsd)
        localizer = Localizer(tiles, net, heading_prior_deg=0.0 if known else None)
        observations = (
            (
                Observation(
                    f.image,
                    f.fix.lat,
                    f.fix.lon,
                    f.fix.covariance,
                    f.heading if known else None,
                    f.heading_std,
                ),
                (f.truth.lat, f.truth.lon),
            )
            for f in seen
            if f.image is not None
        )
        return localize_drive(localizer, observations)
