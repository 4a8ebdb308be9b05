"""``xview-loc map``: what a map covers, and fetching it ahead."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xview_loc.cli.console import UsageError, console

if TYPE_CHECKING:
    from xview_loc.geodesy import LocalProjection
    from xview_loc.maps import open_map
    from xview_loc.maps.base import MapOptions

app = typer.Typer(no_args_is_help=True, help="Aerial maps.")

# More places than this is a slip of the pen (a box the wrong way around the globe), not a drive.
MAX_PLACES = 1_000_000

Source = Annotated[str, typer.Argument(metavar="MAP", help="GeoTIFF, .mbtiles, .pmtiles or a tile URL.")]
Headers = Annotated[list[str] | None, typer.Option("--header", help="HTTP header, 'Name: value'.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable whose value replaces {key} in the URL.")]


@app.command()
def info(source: Source, header: Headers = None, api_key_env: KeyEnv = "") -> None:
    """Print what a map covers, and how finely."""

    with open_map(source, map_options(header, api_key_env)) as aerial:
        facts = aerial.info()
    console.print(f"kind         {facts.kind}")
    console.print(f"projection   {facts.crs}")
    if facts.bounds:
        south, west, north, east = facts.bounds
        console.print(f"bounds       {south:.6f},{west:.6f},{north:.6f},{east:.6f} (south,west,north,east)")
    if facts.resolution_m:
        console.print(f"resolution   {facts.resolution_m:.3f} m/px")
    if facts.zooms:
        console.print(f"zooms        {facts.zooms[0]} to {facts.zooms[1]}")
    console.print(f"attribution  {facts.attribution or 'none given'}")


@app.command()
def prefetch(
    source: Source,
    bbox: Annotated[str, typer.Option(help="Area: LAT0,LON0,LAT1,LON1 in degrees.")] = "",
    track: Annotated[Path | None, typer.Option(help="A drive: GPX file or ROS bag.")] = None,
    topic: Annotated[str | None, typer.Option(help="The bag's NavSatFix topic.")] = None,
    radius: Annotated[float, typer.Option(min=0.0, help="Metres to fetch around the track.")] = 100.0,
    size: Annotated[int, typer.Option(min=1, help="Side of the model's aerial tile, pixels.")] = 512,
    gsd: Annotated[float, typer.Option(min=0.01, help="The model's ground sample distance, m/px.")] = 0.14,
    cache_dir: Annotated[Path | None, typer.Option(help="Disk cache; give the node the same.")] = None,
    max_zoom: Annotated[int | None, typer.Option(help="The server's deepest zoom level.")] = None,
    header: Headers = None,
    api_key_env: KeyEnv = "",
) -> None:
    """Fill the disk cache with a tile server's imagery, to drive there without a network."""
    from xview_loc.maps.pyramid import PyramidMap
    from xview_loc.maps.tile_server import HttpSource
    from xview_loc.recordings.tracks import read_track

    if bool(bbox) == (track is not None):
        raise UsageError("give either --bbox or --track")
    if track is None:
        places = list(_grid(*_parse_bbox(bbox), tile_m=size * gsd))
    else:
        step = size * gsd / 4.0
        drive = _thinned(read_track(track, topic), step)
        # Tile centres snap to a grid of this step: half of it is how far a tile may lie off the vehicle.
        places = [place for lat, lon in drive for place in _around(lat, lon, radius + step / 2.0, step)]
    options = map_options(header, api_key_env, cache_dir, max_zoom)
    with open_map(source, options) as aerial:
        if not isinstance(aerial, PyramidMap) or not isinstance(aerial.source, HttpSource):
            raise UsageError(f"{source} is a file on this machine already: nothing to fetch")
        columns = (TextColumn("tiles"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        done = missing = 0
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("tiles", total=None)
            for state in aerial.prefetch(places, size, gsd):
                done, total, missing = state
                progress.update(bar, completed=done, total=total)
    console.print(f"{done - missing} tiles in {options.cache_dir}; the server has none for {missing} more")


def map_options(
    headers: list[str] | None,
    api_key_env: str,
    cache_dir: Path | None = None,
    max_zoom: int | None = None,
) -> MapOptions:
    """What the words of a command say about a map. Raises UsageError."""
    from xview_loc.maps.base import MapOptions, default_cache_dir

    pairs = [header.partition(":") for header in headers or []]
    if any(not colon for _, colon, _ in pairs):
        raise UsageError("a header is written 'Name: value'")
    if api_key_env and api_key_env not in os.environ:
        raise UsageError(f"the environment variable {api_key_env} is not set")
    return MapOptions(
        headers={name.strip(): value.strip() for name, _, value in pairs},
        api_key=os.environ.get(api_key_env) if api_key_env else None,
        cache_dir=cache_dir or default_cache_dir(),
        max_zoom=max_zoom,
        deadline_s=30.0,
    )


def _parse_bbox(text: str) -> tuple[float, float, float, float]:
    try:
        lat0, lon0, lat1, lon1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--bbox is four numbers LAT0,LON0,LAT1,LON1, not {text!r}") from None
    if not all(abs(lat) <= 85.0 for lat in (lat0, lat1)) or not all(
        abs(lon) <= 180.0 for lon in (lon0, lon1)
    ):
        raise UsageError("--bbox: latitudes go from -85 to 85 and longitudes from -180 to 180 degrees")
    return min(lat0, lat1), min(lon0, lon1), max(lat0, lat1), max(lon0, lon1)


def _grid(
    south: float, west: float, north: float, east: float, tile_m: float
) -> Iterator[tuple[float, float]]:
    """Places half a tile apart that fill the box and a margin of a quarter of a tile, for snapped centres."""
    metres = math.radians(1.0) * 6_371_000.0
    step, margin = tile_m / 2.0, tile_m / 4.0 / metres
    south, north = south - margin, north + margin
    narrowest = math.cos(math.radians(max(abs(south), abs(north))))
    widest = 1.0 if south < 0.0 < north else math.cos(math.radians(min(abs(south), abs(north))))
    west, east = west - margin / narrowest, east + margin / narrowest
    rows = max(1, math.ceil((north - south) * metres / step))
    columns = max(1, math.ceil((east - west) * metres * widest / step))
    if rows * columns > MAX_PLACES:
        raise UsageError("--bbox: the area is too large to fetch (are the corners right?)")
    for row in range(rows + 1):
        for column in range(columns + 1):
            yield south + (north - south) * row / rows, west + (east - west) * column / columns


def _thinned(track: list[tuple[float, float]], step_m: float) -> Iterator[tuple[float, float]]:
    """The track's places, at least ``step_m`` apart."""
    from xview_loc.geodesy import LocalProjection

    last: LocalProjection | None = None
    for lat, lon in track:
        if last is None or math.hypot(*last.forward(lat, lon)) >= step_m:
            last = LocalProjection(lat, lon)
            yield lat, lon


def _around(lat: float, lon: float, radius_m: float, step_m: float) -> Iterator[tuple[float, float]]:
    """Places that fill the square of ``radius_m`` about a place."""
    from xview_loc.geodesy import LocalProjection

    count = math.ceil(radius_m / step_m)
    plane = LocalProjection(lat, lon)
    for i in range(-count, count + 1):
        for j in range(-count, count + 1):
            yield plane.inverse(i * radius_m / max(count, 1), j * radius_m / max(count, 1))
