"""``xview-loc simulate``: a drive through a simulated city, as a bag or live over ROS 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from xview_loc.cli.console import UsageError, console


def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for the map (city.tif) and the bag (drive).")],
    style: Annotated[str, typer.Option(help="Style of the city: source, target or validation.")] = "source",
    city: Annotated[int, typer.Option(min=0, help="Seed of the city.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drive.")] = 0,
    frames: Annotated[int, typer.Option(min=1, help="Number of frames.")] = 300,
    rate: Annotated[float, typer.Option(min=0.1, help="Frames per second.")] = 5.0,
    rig: Annotated[
        str, typer.Option(help="Cameras instead of a panorama: one, three, four (fisheyes), six or eight.")
    ] = "",
    height: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Height of the images, pixels; default: 128 for a panorama, which is 4 times as wide, 360 "
            "for a rig, whose fisheyes are a third higher.",
        ),
    ] = None,
    size: Annotated[float, typer.Option(min=150.0, help="Side of the city, metres.")] = 1020.0,
    area: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="Borders of the drive: west, south, east, north, metres from the centre."),
    ] = None,
    ros: Annotated[bool, typer.Option("--ros", help="Publish live instead of writing a bag.")] = False,
    speed: Annotated[
        float,
        typer.Option(min=0.01, help="Speed-up of --ros; unless 1, stamps are the vehicle's time."),
    ] = 1.0,
) -> None:
    """Build a city, write its aerial map, and drive through it.

    With --ros the drive starts when somebody subscribes to an image. With --rig the vehicle tilts, and
    rig.yaml says where its cameras are (the nodes' rig_file).
    """
    from xview_loc.simulation.city import build_city
    from xview_loc.simulation.drives import DriveOptions, drive
    from xview_loc.simulation.messages import topics, write_bag
    from xview_loc.simulation.rigs import FULL_HEIGHT, RIGS, make_rig
    from xview_loc.simulation.styles import STYLES
    from xview_loc.simulation.views import PanoramaView
    from xview_loc.vehicle.rig_file import write_rig_file

    if ros:
        from xview_loc.nodes.drive_publisher import publish_drive
    if style not in STYLES:
        raise UsageError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    if rig and rig not in RIGS:
        raise UsageError(f"unknown rig {rig!r}; choose from {', '.join(RIGS)}")
    cameras = make_rig(rig, (height or FULL_HEIGHT) / FULL_HEIGHT) if rig else None
    bag = out / "drive"
    if not ros and bag.exists():
        raise UsageError(f"{bag} exists already: choose another folder or delete it")
    with console.status("building the city"):
        built = build_city(city, style, size_m=size)
        out.mkdir(parents=True, exist_ok=True)
        if cameras:
            write_rig_file(out / "rig.yaml", cameras.cameras)
        map_path = built.write_geotiff(out / "city.tif")
    panorama = PanoramaView() if height is None else PanoramaView(height, 4 * height)
    seen = drive(built, frames, seed, options=DriveOptions(rate_hz=rate), view=cameras or panorama, area=area)
    console.print(f"map: {map_path}", soft_wrap=True)
    if ros:
        console.print(
            f"topics: {' '.join(topics(cameras))}; waiting for a subscriber to an image", soft_wrap=True
        )
        console.print(f"published {publish_drive(seen, rate, speed, cameras)} frames")
        return
    driven = track(seen, "driving", total=frames, console=console, transient=True)
    write_bag(driven, bag, rig=cameras)
    console.print(f"bag: {bag}", soft_wrap=True)
