"""``xview-loc bag`` and ``xview-loc pairs``: recover recordings, make pairs from them, inspect pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from xview_loc.cli.console import UsageError, console
from xview_loc.cli.maps import Headers, KeyEnv, map_options, spec_of
from xview_loc.errors import shown

if TYPE_CHECKING:
    from xview_loc.recordings.importer import ImportResult

bag_app = typer.Typer(no_args_is_help=True, help="Recover recordings.")


def _topic(name: str, what: str = "Topic") -> Any:
    return typer.Option(help=f"{what}; default: /{name}, else the only one of its type.")


def _place(of: str) -> Any:
    return typer.Option(metavar="FORWARD LEFT", help=f"Where the {of} is in base_link, metres.")


class _ImportUnlessNamed(TyperGroup):
    """``pairs BAG...`` imports; ``pairs info DIR`` prints."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["import", *args]
        return super().resolve_command(ctx, args)


pairs_app = typer.Typer(
    cls=_ImportUnlessNamed,
    no_args_is_help=True,
    help="Make pairs from recordings (BAG...), and inspect them.",
)


def _beside(bag: Path, ending: str) -> Path:
    """Return the bag's path with an ending; ``.`` is resolved, as it has no name."""
    whole = bag.resolve()
    return whole.with_name(whole.name + ending)


def _range(angles: tuple[float, float]) -> str:
    """Return the least and the greatest angle, degrees."""
    return " to ".join(f"{math.degrees(angle):.1f}" for angle in angles)


def _remarks(result: ImportResult, imu: str) -> Iterator[str]:
    """Yield what an import took for granted, and what it left out."""
    if result.unplaced_imu:
        frame = shown(result.unplaced_imu, 80)
        yield f"the Imu's frame {frame} is not in /tf_static: its axes are taken as base_link's"
    if result.uncalibrated:
        yield shown(f"not used, as no camera_info is beside them: {', '.join(result.uncalibrated)}")
    for name, count in sorted(result.without_camera.items()):
        yield f"without an image of camera {name}: {count}"
    if result.without_tilt:
        yield f"without a tilt from {imu}: {result.without_tilt}"
    for reason, count in sorted(result.dropped.items()):
        yield f"dropped: {count} {reason}"


@bag_app.command()
def recover(
    bag: Annotated[Path, typer.Argument(help="Directory of a bag that was not closed or is damaged.")],
    out: Annotated[Path | None, typer.Option(help="New bag; default: BAG_recovered beside it.")] = None,
) -> None:
    """Copy the intact messages of a bag into a new, complete one. The original is not changed."""
    from xview_loc.bags.recovery import recover_bag

    target = out or _beside(bag, "_recovered")
    report = recover_bag(bag, target)
    for name, damage in report.damage.items():
        parts = [f"{damage.chunks_skipped} damaged chunks skipped"] if damage.chunks_skipped else []
        if damage.undescribed:
            parts.append(f"{damage.undescribed} messages of unknown topics")
        parts += [f"ends early ({damage.ended_early})"] if damage.ended_early else []
        console.print(f"{name}: {', '.join(parts)}", soft_wrap=True)
    console.print(f"{report.messages} messages recovered into {target}", soft_wrap=True)


@pairs_app.command("import")
def import_(
    bags: Annotated[list[Path], typer.Argument(help="Recordings: rosbag2 directories, ROS 1 .bag files.")],
    out: Annotated[Path, typer.Option(help="Folder for the bags of pairs, one per recording.")],
    map_: Annotated[str, typer.Option("--map", help="Aerial map; default: pairs without tiles.")] = "",
    image: Annotated[str, _topic("image")] = "",
    fix: Annotated[str, _topic("fix")] = "",
    heading: Annotated[str, _topic("heading", "Topic, or none for pairs without a heading")] = "",
    camera_info: Annotated[str, _topic("camera_info")] = "",
    odom: Annotated[str, _topic("odom")] = "",
    distance: Annotated[float, typer.Option(min=0.0, help="Distance between pairs, metres.")] = 2.0,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to cut tiles for; default: the one that a bag of pairs names, else ccvpe-small."
        ),
    ] = None,
    declination: Annotated[float, typer.Option(help="Magnetic declination, degrees east.")] = 0.0,
    heading_offset: Annotated[
        float, typer.Option(help="Added to headings, degrees counter-clockwise.")
    ] = 0.0,
    heading_clockwise: Annotated[
        bool, typer.Option("--heading-clockwise", help="Headings are azimuths, clockwise from north.")
    ] = False,
    camera_yaw: Annotated[
        float | None, typer.Option(help="Angle of the image's centre column, degrees left of forward.")
    ] = None,
    camera: Annotated[tuple[float, float] | None, _place("camera")] = None,
    antenna: Annotated[tuple[float, float] | None, _place("antenna")] = None,
    panorama_elevation: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="TOP BOTTOM",
            help="Elevations of a panorama's edges, degrees; default: 90, -90 if 2:1, else the model's.",
        ),
    ] = None,
    rectified: Annotated[
        bool, typer.Option("--rectified", help="Images are free of distortion: P of camera_info is used.")
    ] = False,
    cameras: Annotated[
        str,
        typer.Option(
            help="Cameras of a rig, separated by commas, each NAME (the namespace of its images and its "
            "camera_info) or NAME=TOPIC (of its images); all: every camera with a camera_info."
        ),
    ] = "",
    rig_file: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with places and masks of a rig's cameras; what it lacks is read from /tf_static."
        ),
    ] = None,
    base_height: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="Height of base_link above the ground, metres; for rigs.")
    ] = 0.0,
    own_mask: Annotated[
        Path | None, typer.Option(help="Image, white where a single camera sees the vehicle itself.")
    ] = None,
    imu: Annotated[str, typer.Option(help="Topic of an Imu that gives roll and pitch.")] = "",
    tilt: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="ROLL PITCH",
            help="Roll and pitch where no Imu gives them, degrees, positive with the right side and the nose "
            "down; default: unknown.",
        ),
    ] = None,
    header: Headers = None,
    api_key_env: KeyEnv = "",
) -> None:
    """Make pairs from recordings, or cut tiles for pairs that have none that fit the model.

    Recordings already imported are skipped.
    """
    from xview_loc.bags.recovery import BagError
    from xview_loc.maps import open_map
    from xview_loc.recordings.importer import ImportOptions, import_bag
    from xview_loc.vehicle.keyframes import KeyframeRule
    from xview_loc.vehicle.messages import HeadingConvention
    from xview_loc.vehicle.rig_file import read_mask, read_rig_file
    from xview_loc.vehicle.tilt import MOST_TILT

    if panorama_elevation and not -90.0 <= panorama_elevation[1] < panorama_elevation[0] <= 90.0:
        raise UsageError(f"--panorama-elevation takes two angles such as 90 -90, not {panorama_elevation}")
    given = image or camera_info or camera or camera_yaw is not None or own_mask or panorama_elevation
    if cameras and given:
        single = "--image, --camera-info, --camera, --camera-yaw, --own-mask and --panorama-elevation"
        raise UsageError(f"{single} are for a single camera: leave them out with --cameras")
    if not cameras and (rig_file or base_height):
        raise UsageError("--rig-file and --base-height are for a rig: name its --cameras")
    roll_pitch = (math.radians(tilt[0]), math.radians(tilt[1])) if tilt else None
    if roll_pitch is not None and not max(map(abs, roll_pitch)) <= MOST_TILT:
        raise UsageError(f"--tilt takes at most {math.degrees(MOST_TILT):.0f} degrees either way, not {tilt}")
    rig = tuple(word.strip() for word in cameras.split(",")) if cameras else ()
    if not all(rig):
        raise UsageError(f"--cameras {cameras!r} has an empty name: write one comma between two names")
    named = {"image": image, "fix": fix, "camera_info": camera_info, "odom": odom, "heading": heading}
    options = ImportOptions(
        topics={name: topic for name, topic in named.items() if topic and topic != "none"},
        use_heading=heading != "none",
        heading=HeadingConvention(heading_clockwise, math.radians(heading_offset), math.radians(declination)),
        antenna=antenna,
        camera=camera,
        camera_yaw=None if camera_yaw is None else math.radians(camera_yaw),
        panorama_elevation_deg=panorama_elevation,
        cameras=rig,
        rig_file=read_rig_file(rig_file) if rig_file else {},
        base_height_m=base_height,
        own_mask=read_mask(own_mask) if own_mask else None,
        imu=imu,
        tilt=roll_pitch,
        rectified=rectified,
        keyframes=KeyframeRule(distance_m=distance),
        spec=spec_of(model) if model else None,
    )
    names = [bag.resolve().stem if bag.suffix == ".bag" else bag.resolve().name for bag in bags]
    if len(set(names)) < len(names):
        raise UsageError("two of the recordings have the same name: import them into different folders")
    aerial = open_map(map_, map_options(header, api_key_env)) if map_ else None
    failures: list[BagError] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as bars:
            for bag, name in zip(bags, names, strict=True):
                bar = bars.add_task(name, total=1.0)
                try:
                    result = import_bag(
                        bag,
                        out / name,
                        aerial,
                        options,
                        lambda share, bar=bar: bars.update(bar, completed=share),  # type: ignore[misc]
                    )
                except BagError as error:
                    # The other recordings are imported all the same.
                    failures.append(error)
                    bars.console.print(f"xview-loc: {error}", soft_wrap=True)
                    continue
                bars.update(bar, completed=1.0)
                if result is None:
                    bars.console.print(f"{out / name}: already imported", soft_wrap=True)
                    continue
                without = f", {result.without_tile} of them without a tile" if result.without_tile else ""
                if result.failed_tiles:
                    without += f" ({result.failed_tiles} could not be read: {result.tile_failure})"
                bars.console.print(f"{out / name}: {result.pairs} pairs{without}", soft_wrap=True)
                for line in _remarks(result, imu):
                    bars.console.print(f"  {line}", soft_wrap=True)
    finally:
        if aerial is not None:
            aerial.close()
    if failures:
        raise BagError(f"{len(failures)} of {len(bags)} recordings could not be imported")


@pairs_app.command()
def photos(
    folder: Annotated[Path, typer.Argument(help="Folder of geotagged JPEG files; those below it, too.")],
    out: Annotated[Path, typer.Option(help="Folder for the bags: panoramas, photographs.")],
    map_: Annotated[str, typer.Option("--map", help="Aerial map; default: pairs without tiles.")] = "",
    table: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with a column file and any of stamp, lat, lon, heading (degrees clockwise from "
            "true north) and sigma (metres), which count instead of tags."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model to cut tiles for.")] = "ccvpe-small",
    heading_std: Annotated[
        float, typer.Option(min=0.1, max=180.0, help="Standard deviation of headings, degrees.")
    ] = 10.0,
    header: Headers = None,
    api_key_env: KeyEnv = "",
) -> None:
    """Make pairs from photographs with EXIF and XMP tags: panoramas of the whole sphere, and others."""
    from contextlib import nullcontext

    from xview_loc.maps import open_map
    from xview_loc.recordings.photos import import_photos, read_table

    spec, given = spec_of(model), read_table(table) if table else None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    opened = open_map(map_, map_options(header, api_key_env)) if map_ else nullcontext()
    with opened as aerial, Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("photographs", total=1.0)
        result = import_photos(
            folder,
            out,
            aerial,
            spec,
            table=given,
            heading_std_deg=heading_std,
            on_progress=lambda share: bars.update(bar, completed=share),
        )
    for kind, count in result.pairs.items():
        console.print(f"{out / kind}: {count} pairs", soft_wrap=True)
    if result.without_tile:
        console.print(f"  without a tile: {result.without_tile}")
    for reason, count in sorted(result.dropped.items()):
        console.print(f"  left out: {count}, {reason}", soft_wrap=True)


@pairs_app.command()
def info(
    bag: Annotated[Path, typer.Argument(help="Bag of pairs.")],
    picture: Annotated[
        Path | None, typer.Option(help="File for the drawing; default: BAG_pairs.png beside it.")
    ] = None,
) -> None:
    """Print a summary of a bag of pairs, and draw the pairs' positions."""
    from xview_loc.camera import CameraModel
    from xview_loc.files import write_whole
    from xview_loc.recordings.drive import find_headings
    from xview_loc.recordings.pair_reader import PairBag
    from xview_loc.recordings.statistics import draw_places, pair_statistics
    from xview_loc.report import png

    pairs = PairBag(bag)
    facts, session, rig = pair_statistics(pairs), pairs.session(), pairs.rig()
    console.print(f"pairs        {facts.pairs}, {facts.without_tile} without a tile, {facts.damaged} damaged")
    console.print(f"tiles        {facts.tiles}")
    console.print(f"track        {facts.length_m:.0f} m in {facts.seconds:.0f} s")
    box = ",".join(f"{degrees:.6f}" for degrees in facts.bounds)
    console.print(f"area         {box} (south,west,north,east)")
    console.print(f"headings     {find_headings(pairs, pairs.mounting())[1]}")
    claims = f"{facts.fix_sigma_m:.1f} m (median of the receiver's claims)"
    console.print(f"fix sigma    {'unknown' if math.isnan(facts.fix_sigma_m) else claims}")
    for name in pairs.cameras:
        mounted = rig.cameras.get(name) if rig else None
        lens = "no camera_info"
        if mounted and isinstance(mounted.camera, CameraModel):
            lens = f"{mounted.camera.width} x {mounted.camera.height}, {mounted.camera.distortion_model}"
        console.print(f"camera       {name}: {facts.images[name]} images, {lens}", soft_wrap=True)
    for source, (count, roll, pitch) in facts.tilts.items():
        angles = f"roll {_range(roll)}, pitch {_range(pitch)} degrees"
        console.print(f"tilt         {count} from {shown(source, 80)}: {angles}", soft_wrap=True)
    if untilted := facts.pairs - sum(count for count, *_ in facts.tilts.values()):
        console.print(f"tilt         {untilted} unknown")
    console.print(f"vehicle      {session.get('vehicle') or 'not named'}")
    console.print(f"licence      {session.get('licence') or 'none given'}", soft_wrap=True)
    path = picture or _beside(bag, "_pairs.png")
    write_whole(path, png(draw_places(pairs, facts)))
    console.print(f"picture      {path}", soft_wrap=True)
