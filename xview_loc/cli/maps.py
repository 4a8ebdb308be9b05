"""``xview-loc map``: print a map's properties, and download an area in advance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xview_loc.cli.console import UsageError, console

if TYPE_CHECKING:
    from xview_loc.geodesy import LocalProjection
    from xview_loc.maps.base import MapOptions
    from xview_loc.models.specs import ModelSpec

app = typer.Typer(no_args_is_help=True, help="Aerial maps.")

# A larger area is a mistake, such as a box the wrong way around the globe.
MAX_POSITIONS = 1_000_000

Source = Annotated[str, typer.Argument(metavar="MAP", help="GeoTIFF, .mbtiles, .pmtiles or a tile URL.")]
Headers = Annotated[list[str] | None, typer.Option("--header", help="HTTP header, 'Name: value'.")]
TilesFor = Annotated[str, typer.Option(help="Name of the model that the aerial tiles are for.")]
CacheDir = Annotated[Path | None, typer.Option(help="Disk cache; use the same for the node.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable XVIEW_LOC_... with the key for {key}.")]


@app.command()
def info(source: Source, header: Headers = None, api_key_env: KeyEnv = "") -> None:
    """Print a map's coverage and resolution."""
    from xview_loc.maps import open_map

    with open_map(source, map_options(header, api_key_env)) as aerial:
        facts = aerial.info()
    console.print(f"kind         {facts.kind}")
    console.print(f"projection   {facts.crs}")
    if facts.bounds:
        south, west, north, east = facts.bounds
        console.print(f"bounds       {south:.6f},{west:.6f},{north:.6f},{east:.6f} (south,west,north,east)")
    if facts.resolution_m:
        where = "" if facts.bounds else " at the equator"
        console.print(f"resolution   {facts.resolution_m:.3f} m/px{where}")
    if facts.zooms:
        console.print(f"zooms        {facts.zooms[0]} to {facts.zooms[1]}")
    console.print(f"attribution  {facts.attribution or 'none given'}")
    console.print(f"shift        {facts.shift or 'not measured (xview-loc map align)'}", soft_wrap=True)


@app.command()
def align(
    source: Source,
    bags: Annotated[list[Path], typer.Argument(help="Bags of pairs on the map.")],
    truth: Annotated[Path, typer.Option(help="True positions: a table stamp,lat,lon or a bag of fixes.")],
    truth_topic: Annotated[str | None, typer.Option(help="NavSatFix topic of the true positions.")] = None,
    model: TilesFor = "ccvpe-small",
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint; default: the shipped weights.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the shift, and do not keep it.")] = False,
    cache_dir: CacheDir = None,
    header: Headers = None,
    api_key_env: KeyEnv = "",
) -> None:
    """Measure by how much a map is shifted, and keep that beside it: whatever opens the map takes it out."""
    from xview_loc.datasets.pairs import PairDataset
    from xview_loc.estimation.localizer import Localizer
    from xview_loc.evaluation.map_alignment import MapAlignment
    from xview_loc.maps import open_unshifted
    from xview_loc.maps.shift import shift_file
    from xview_loc.models.checkpoint import load_model
    from xview_loc.recordings.pair_reader import PairBag
    from xview_loc.recordings.tracks import read_timed_track

    options = map_options(header, api_key_env, cache_dir)
    path = shift_file(source, options)
    track, net = read_timed_track(truth, truth_topic), load_model(model, checkpoint).model
    alignment = MapAlignment()
    with (
        open_unshifted(source, options) as aerial,
        Localizer.open(aerial, net, search_radius_m=None) as localizer,
        Progress(console=console, transient=True) as progress,
    ):
        for folder in bags:
            bag = PairBag(folder)
            bar = progress.add_task(folder.name, total=len(bag))
            alignment.add(
                PairDataset([folder], net.spec),
                bag,
                localizer,
                track,
                on_pair=lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
            )
    shift = alignment.shift()
    console.print(f"the map shows the ground too far {shift}", soft_wrap=True)
    if not dry_run and path is not None:
        shift.save(path)
        console.print(f"kept in {path}", soft_wrap=True)


@app.command()
def prefetch(
    source: Source,
    bbox: Annotated[str, typer.Option(help="Area: LAT0,LON0,LAT1,LON1 in degrees.")] = "",
    track: Annotated[Path | None, typer.Option(help="Track of a drive: GPX file or ROS bag.")] = None,
    topic: Annotated[str | None, typer.Option(help="NavSatFix topic of the bag.")] = None,
    radius: Annotated[float, typer.Option(min=0.0, help="Distance from the track to cover, metres.")] = 100.0,
    model: TilesFor = "ccvpe-small",
    cache_dir: CacheDir = None,
    max_zoom: Annotated[int | None, typer.Option(help="Deepest zoom level of the server.")] = None,
    header: Headers = None,
    api_key_env: KeyEnv = "",
) -> None:
    """Download a tile server's imagery into the disk cache, to drive there offline."""
    from xview_loc.maps import open_unshifted
    from xview_loc.maps.base import redact
    from xview_loc.maps.pyramid import PyramidMap
    from xview_loc.maps.tile_server import HttpSource
    from xview_loc.recordings.tracks import read_track

    spec = spec_of(model)
    if bool(bbox) == (track is not None):
        raise UsageError("give either --bbox or --track")
    if track is None:
        positions = list(_grid(*_parse_bbox(bbox), tile_m=spec.aerial_size * spec.gsd))
    else:
        step = spec.snap_m
        drive = _thinned(read_track(track, topic), step)
        # Tile centres are snapped to a grid of this step, so they are up to half of it off the vehicle.
        positions = [near for lat, lon in drive for near in _around(lat, lon, radius + step / 2.0, step)]
    options = map_options(header, api_key_env, cache_dir, max_zoom)
    with open_unshifted(source, options) as aerial:
        if not isinstance(aerial, PyramidMap) or not isinstance(aerial.source, HttpSource):
            raise UsageError(f"{redact(source)} is not a tile server: there is nothing to download")
        columns = (TextColumn("tiles"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        done = missing = 0
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("tiles", total=None)
            for state in aerial.prefetch(positions, spec.tile_px, spec.gsd):
                done, total, missing = state
                progress.update(bar, completed=done, total=total)
    console.print(f"{done - missing} tiles in {options.cache_dir}; the server has no imagery for {missing}")


def spec_of(model: str) -> ModelSpec:
    """Return what a model takes. Raises UsageError if there is none of this name."""
    from xview_loc.models.specs import SPECS

    if model not in SPECS:
        raise UsageError(f"unknown model {model!r}; choose from {', '.join(SPECS)}")
    return SPECS[model]


def map_options(
    headers: list[str] | None,
    api_key_env: str,
    cache_dir: Path | None = None,
    max_zoom: int | None = None,
) -> MapOptions:
    """Make map options from a command's options. Raises UsageError."""
    from xview_loc.maps.base import MapOpenError, MapOptions, api_key, default_cache_dir

    pairs = [header.partition(":") for header in headers or []]
    if any(not colon for _, colon, _ in pairs):
        raise UsageError("--header must be 'Name: value'")
    try:
        key = api_key(api_key_env)
    except MapOpenError as error:
        raise UsageError(str(error)) from None
    return MapOptions(
        headers={name.strip(): value.strip() for name, _, value in pairs},
        api_key=key,
        cache_dir=cache_dir or default_cache_dir(),
        max_zoom=max_zoom,
        deadline_s=30.0,
    )


def _parse_bbox(text: str) -> tuple[float, float, float, float]:
    try:
        lat0, lon0, lat1, lon1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--bbox must be four numbers LAT0,LON0,LAT1,LON1, not {text!r}") from None
    if not all(abs(lat) <= 85.0 for lat in (lat0, lat1)) or not all(
        abs(lon) <= 180.0 for lon in (lon0, lon1)
    ):
        raise UsageError("--bbox: latitudes must be in -85 to 85, longitudes in -180 to 180 degrees")
    return min(lat0, lat1), min(lon0, lon1), max(lat0, lat1), max(lon0, lon1)


def _grid(
    south: float, west: float, north: float, east: float, tile_m: float
) -> Iterator[tuple[float, float]]:
    """Yield positions (lat, lon) half a tile apart in the box and, as tile centres are snapped, in a margin
    of a quarter of a tile."""
    metres = math.radians(1.0) * 6_371_000.0
    step, margin = tile_m / 2.0, tile_m / 4.0 / metres
    south, north = south - margin, north + margin
    narrowest = math.cos(math.radians(max(abs(south), abs(north))))
    widest = 1.0 if south < 0.0 < north else math.cos(math.radians(min(abs(south), abs(north))))
    west, east = west - margin / narrowest, east + margin / narrowest
    rows = max(1, math.ceil((north - south) * metres / step))
    columns = max(1, math.ceil((east - west) * metres * widest / step))
    if rows * columns > MAX_POSITIONS:
        raise UsageError("--bbox: the area is too large to download; check the corners")
    for row in range(rows + 1):
        for column in range(columns + 1):
            yield south + (north - south) * row / rows, west + (east - west) * column / columns


def _thinned(track: list[tuple[float, float]], step_m: float) -> Iterator[tuple[float, float]]:
    """Yield the track's positions, at least ``step_m`` apart."""
    from xview_loc.geodesy import LocalProjection

    last: LocalProjection | None = None
    for lat, lon in track:
        if last is None or math.hypot(*last.forward(lat, lon)) >= step_m:
            last = LocalProjection(lat, lon)
            yield lat, lon


def _around(lat: float, lon: float, radius_m: float, step_m: float) -> Iterator[tuple[float, float]]:
    """Yield positions at most ``step_m`` apart in the square of half side ``radius_m``."""
    from xview_loc.geodesy import LocalProjection

    count = math.ceil(radius_m / step_m)
    plane = LocalProjection(lat, lon)
    for i in range(-count, count + 1):
        for j in range(-count, count + 1):
            yield plane.inverse(i * radius_m / max(count, 1), j * radius_m / max(count, 1))
