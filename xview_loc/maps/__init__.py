"""Aerial maps behind one interface: :func:`open_map` opens rasters, tile archives and tile servers."""

from __future__ import annotations

import os
from pathlib import Path

from xview_loc.maps.base import AerialMap, MapOpenError, MapOptions, redact

__all__ = ["open_map", "open_unshifted"]


def open_map(source: str | Path, options: MapOptions | None = None) -> AerialMap:
    """Open a GDAL raster, an ``.mbtiles`` or ``.pmtiles`` file, or an XYZ tile URL (``.../{z}/{x}/{y}``).

    A shift that ``xview-loc map align`` has measured is taken out. Raises MapOpenError if the source is
    missing, not georeferenced, or of an unsupported kind.
    """
    from xview_loc.maps.shift import ShiftedMap, read_shift

    options = options or MapOptions()
    shift = read_shift(os.fspath(source), options)
    aerial = open_unshifted(source, options)
    return aerial if shift is None else ShiftedMap(aerial, shift)


def open_unshifted(source: str | Path, options: MapOptions) -> AerialMap:
    """Open a map as :func:`open_map`, as it is."""
    # Imported late: each kind of map loads libraries of its own.
    from xview_loc.maps.pyramid import PyramidMap
    from xview_loc.maps.raster import RasterMap
    from xview_loc.maps.sources import MbtilesSource, PmtilesSource
    from xview_loc.maps.tile_server import HttpSource

    source = os.fspath(source)
    if "{z}" in source:
        return PyramidMap(HttpSource(source, options), options)
    suffix = Path(source).suffix.lower()
    if (
        "://" not in source
        and (special := Path(source)).exists()
        and not (special.is_file() or special.is_dir())
    ):
        raise MapOpenError(f"cannot open {source}: it is a pipe or a device, not a file")
    if suffix not in (".mbtiles", ".pmtiles"):
        return RasterMap(source, options)
    if "://" in source:
        raise MapOpenError(f"{redact(source)}: {suffix} files are read from disk only, download it first")
    if not Path(source).is_file():
        raise MapOpenError(f"cannot open {source}: no such file")
    return PyramidMap(MbtilesSource(source) if suffix == ".mbtiles" else PmtilesSource(source), options)
