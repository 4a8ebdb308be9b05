"""Makes bags of pairs from geotagged photographs: panoramas, and those of ordinary cameras."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from xview_loc.bags.recovery import BagError
from xview_loc.bags.writer import BagLimits
from xview_loc.camera import CameraModel
from xview_loc.errors import UserError, reason
from xview_loc.files import read_regular, whole_folder
from xview_loc.geodesy import wrap_angle
from xview_loc.images import ImageError, check_complete, check_size, declared_size
from xview_loc.maps.base import AerialMap
from xview_loc.models.specs import ModelSpec
from xview_loc.recordings.importer import ImportResult, TileCutter
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.vehicle.tilt import TiltSample

PANORAMAS, PHOTOGRAPHS = "panoramas", "photographs"
SUFFIXES = (".jpg", ".jpeg")
_MAX_PHOTO_BYTES, _MAX_TABLE_BYTES = 100 << 20, 64 << 20
# Standard deviation of a position whose accuracy is not given, metres.
_FIX_STD_M = 10.0


class PhotoError(UserError):
    """Photographs cannot be used; the message is one clear line."""


@dataclass(frozen=True)
class Given:
    """What a table says of a photograph instead of its tags; None if it does not.

    stamp: seconds since 1970. lat, lon: degrees. heading: degrees clockwise from true north. sigma: of the
    position, metres.
    """

    stamp: float | None = None
    lat: float | None = None
    lon: float | None = None
    heading: float | None = None
    sigma: float | None = None


@dataclass
class PhotoResult:
    """Outcome: pairs in each bag, how many of them have no tile, photographs left out by reason."""

    pairs: Counter[str] = field(default_factory=Counter)
    without_tile: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def read_table(path: Path) -> dict[str, Given]:
    """Read a CSV file: a column ``file``, and any of stamp, lat, lon, heading, sigma. Raises PhotoError."""
    rows: dict[str, Given] = {}
    names = list(Given.__dataclass_fields__)
    try:
        with io.StringIO(read_regular(path, _MAX_TABLE_BYTES).decode(), newline="") as file:
            for row in csv.DictReader(file):
                values = {name: float(row[name]) for name in names if (row.get(name) or "").strip()}
                if not all(map(math.isfinite, values.values())):
                    raise ValueError
                rows[row["file"]] = Given(**values)
    except KeyError:
        raise PhotoError(f"cannot read {path}: it has no column file") from None
    except (ValueError, TypeError, csv.Error):
        raise PhotoError(f"cannot read {path}: row {len(rows) + 1} has values that are no numbers") from None
    except OSError as error:
        raise PhotoError(f"cannot read {path}: {reason(error)}") from None
    return rows


def import_photos(
    folder: Path,
    out: Path,
    aerial: AerialMap | None,
    spec: ModelSpec,
    *,
    table: dict[str, Given] | None = None,
    heading_std_deg: float = 10.0,
    on_progress: Callable[[float], object] = lambda share: None,
) -> PhotoResult:
    """Write ``out/panoramas`` and ``out/photographs`` from the JPEG files in a folder, in the order of time.

    table: by file name, what counts instead of tags. Raises PhotoError if there are none or none can be used,
    BagError if a bag is there already, MapError if the map fails.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise PhotoError(f"{folder} has no photographs: files that end in .jpg")
    result = PhotoResult()
    kinds: dict[str, list[tuple[int, Path]]] = {PANORAMAS: [], PHOTOGRAPHS: []}
    given = table or {}
    for path in files:
        try:
            pair, kind = read_photo(path, given.get(path.name, Given()), heading_std_deg)
        except PhotoError as error:
            result.dropped[str(error)] += 1
            continue
        kinds[kind].append((pair.stamp_ns, path))
    if not any(kinds.values()):
        raise PhotoError(f"none of {len(files)} photographs can be used: {_listed(result.dropped)}")
    count, done = sum(map(len, kinds.values())), 0
    for kind, photos in kinds.items():
        if not photos:
            continue
        if (out / kind).exists():
            raise BagError(f"{out / kind} is there already")
        cutting = ImportResult()
        session = {"recording": folder.resolve().name, "camera_yaw": 0.0}
        if kind == PANORAMAS:
            session["panorama_elevation_deg"] = [90.0, -90.0]
        with closing(TileCutter(aerial, spec, cutting)) as tiles, whole_folder(out / kind) as partial:
            session |= {"licence": tiles.licence, **tiles.facts()}
            with closing(PairWriter(partial, session, BagLimits(min_free_bytes=0))) as writer:
                last_ns = 0
                for stamp_ns, path in sorted(photos):
                    on_progress(done / count)
                    done += 1
                    if stamp_ns == last_ns:
                        result.dropped["another photograph has the same time"] += 1
                        continue
                    pair, _ = read_photo(path, given.get(path.name, Given()), heading_std_deg)
                    tile = tiles.around(pair.lat, pair.lon)
                    writer.add(pair, tile)
                    last_ns = stamp_ns
                    result.pairs[kind] += 1
                    result.without_tile += tile is None
    return result


def read_photo(path: Path, given: Given, heading_std_deg: float) -> tuple[Pair, str]:
    """Return a photograph as a pair, and the kind of its bag. Raises PhotoError with the reason."""
    try:
        data = read_regular(path, _MAX_PHOTO_BYTES)
        check_complete(data)
        check_size(data)
        width, height = declared_size(data)
    except (OSError, ImageError) as error:
        raise PhotoError(reason(error)) from None
    tags = _tags(data)
    if tags.exif.get("Exif.Image.Orientation", "1") not in ("", "0", "1"):
        raise PhotoError("its tag Orientation turns it: turn its pixels instead")
    lat, lon = (tags.lat if given.lat is None else given.lat), (tags.lon if given.lon is None else given.lon)
    if lat is None or lon is None:
        raise PhotoError("no position, neither in its tags nor in the table")
    taken = tags.ts.timestamp() if given.stamp is None and isinstance(tags.ts, datetime) else given.stamp
    if taken is None:
        raise PhotoError("no time, neither in its tags nor in the table")
    stamp_ns = round(taken * 1e9)
    # GPano's heading; cameras without a compass write 0.
    tagged = tags.yaw or None if tags.heading is None else tags.heading
    azimuth = tagged if given.heading is None else given.heading
    sigma = given.sigma or tags.gps_accuracy or _FIX_STD_M
    camera, kind, tilt = None, PANORAMAS, None
    if tags.type == "equirectangular":
        if tags.crop is not None or width != 2 * height:
            raise PhotoError("a panorama that is not of the whole sphere")
        if tags.pitch is not None and tags.roll is not None:
            # GPano's pitch is positive with the nose up, its roll with the right side down.
            tilt = TiltSample(stamp_ns, math.radians(tags.roll), -math.radians(tags.pitch))
    else:
        kind = PHOTOGRAPHS
        if not tags.field_of_view or not 1.0 < float(tags.field_of_view) < 170.0:
            raise PhotoError("no field of view in its tags (focal length and camera)")
        focal = width / 2.0 / math.tan(math.radians(float(tags.field_of_view)) / 2.0)
        middle = (width - 1) / 2.0, (height - 1) / 2.0
        camera = CameraModel(width, height, (focal, 0.0, middle[0], 0.0, focal, middle[1], 0.0, 0.0, 1.0))
    pair = Pair(
        stamp_ns,
        "jpeg",
        data,
        float(lat),
        float(lon),
        float(tags.altitude or 0.0),
        np.diag([sigma**2, sigma**2]).astype(float),
        None if azimuth is None else wrap_angle(math.pi / 2.0 - math.radians(float(azimuth))),
        0.0 if azimuth is None else math.radians(heading_std_deg),
        camera,
        tilt=tilt,
        tilt_source="" if tilt is None else "GPano",
    )
    return pair, kind


def _tags(data: bytes) -> Any:
    """Return the tags of a photograph, as far as they are known."""
    try:
        from geopic_tag_reader import reader
    except ImportError:
        raise PhotoError("its tags are read by geopic-tag-reader: pip install 'xview_loc[photos]'") from None
    try:
        return reader.readPictureMetadata(data)
    except reader.PartialExifException as error:
        return error.tags
    except Exception as error:  # damaged tags raise anything
        raise PhotoError(f"its tags cannot be read: {reason(error)}") from None


def _listed(reasons: Counter[str]) -> str:
    return "; ".join(f"{count} {text}" for text, count in reasons.most_common(3))
