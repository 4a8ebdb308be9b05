"""Checks of a VRT, a file of GDAL that names other files, before GDAL follows it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from xview_loc.files import read_regular
from xview_loc.maps.base import MapOpenError, is_file_name, redact

_HEAD_BYTES = 1 << 16
_MAX_BYTES = 64 << 20
_MAX_DEPTH = 4
# What mosaics and cut-outs of rasters consist of, in lower case: GDAL takes any, and elements for attributes.
# Others name files too, run code, or read bytes that are no image.
_ELEMENTS = (
    "vrtdataset srs geotransform metadata mdi vrtrasterband description unittype offset scale colorinterp "
    "colortable entry nodatavalue hidenodatavalue categorynames category histograms histitem histmin histmax "
    "bucketcount includeoutofrange approximate histcounts simplesource complexsource averagedsource "
    "sourcefilename sourceband sourceproperties srcrect dstrect nodata usemaskband scaleoffset scaleratio "
    "lut colortablecomponent maskband overview overviewlist"
)
_ATTRIBUTES = (
    "rasterxsize rasterysize subclass datatype band blockxsize blockysize dataaxistosrsaxismapping "
    "coordinateepoch domain key c1 c2 c3 c4 relativetovrt shared xoff yoff xsize ysize resampling"
)
_KIND, _DOMAINS = "vrtsourcedrasterband", ("", "image_structure")


def is_vrt(path: str | os.PathLike[str]) -> bool:
    """Return True if GDAL may take a file for a VRT. Raises OSError."""
    with open(path, "rb") as file:
        return b"<vrtdataset" in file.read(_HEAD_BYTES).lower()


def check_vrt(path: Path) -> list[Path]:
    """Return the rasters that a VRT shows, directly or through other VRTs; they lie in its folder or below.

    Raises MapOpenError if it names others, has raw bands, or anything beyond mosaics.
    """
    path = Path(os.path.realpath(path))
    rasters: dict[Path, None] = {}
    seen: set[Path] = set()

    def follow(vrt: Path, depth: int) -> None:
        seen.add(vrt)
        for source in _sources(vrt, path.parent):
            if not is_vrt(source):
                rasters[source] = None
            elif source not in seen:
                if depth == _MAX_DEPTH:
                    raise _refused(path, f"VRTs are nested more than {_MAX_DEPTH} deep")
                follow(source, depth + 1)

    try:
        follow(path, 1)
    except OSError as error:
        raise _refused(path, f"{error.filename or path}: {error.strerror}") from None
    return list(rasters)


def _sources(vrt: Path, folder: Path) -> Iterator[Path]:
    content = read_regular(vrt, _MAX_BYTES)
    if b"<!" in content:
        raise _refused(vrt, "it has comments or a document type")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise _refused(vrt, f"it is damaged ({error})") from None
    elements, allowed = set(_ELEMENTS.split()), set(_ATTRIBUTES.split())
    for element in root.iter():
        name, attributes = element.tag.lower(), {key.lower(): value for key, value in element.items()}
        unknown = sorted({name} - elements or attributes.keys() - allowed)
        if unknown or len(attributes) < len(element.attrib):
            raise _refused(vrt, f"{(unknown or [name])[0]!r} is not part of plain mosaics")
        if (kind := attributes.get("subclass", _KIND)).lower() != _KIND:
            raise _refused(vrt, f"it is of the kind {kind!r}")
        if attributes.get("domain", "").lower() not in _DOMAINS:
            raise _refused(vrt, f"it has metadata of the domain {attributes['domain']!r}")
        if name == "sourcefilename":
            yield _source(vrt, folder, element, attributes.get("relativetovrt", "0"))


def _source(vrt: Path, folder: Path, element: ElementTree.Element, relative: str) -> Path:
    name = element.text or ""
    if len(element) or relative not in ("0", "1") or name != name.strip() or not is_file_name(name):
        raise _refused(vrt, f"its source {redact(name)[:200]!r} is not a plain file name")
    source = Path(os.path.realpath(vrt.parent / name if relative == "1" else name))
    if not source.is_relative_to(folder):
        raise _refused(vrt, f"its source {name[:200]!r} lies outside of {folder}")
    if not os.path.isfile(source):
        raise _refused(vrt, f"its source {name[:200]!r} is no file")
    return source


def _refused(path: Path, problem: str) -> MapOpenError:
    advice = "gdal_translate makes a GeoTIFF of it, and allow_remote_maps lets a node follow it"
    return MapOpenError(f"{path} is not followed: {problem}; {advice}")
