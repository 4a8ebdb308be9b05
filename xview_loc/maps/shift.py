"""The constant shift of a map: how far from its true place it shows the ground."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from xview_loc.errors import reason
from xview_loc.files import others_can_write, read_regular, write_whole
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialMap, AerialTile, MapInfo, MapOpenError, MapOptions, is_file_name, redact

# Larger shifts are mistakes, metres.
MAX_SHIFT_M = 50.0
_MAX_BYTES = 10_000


@dataclass(frozen=True)
class MapShift:
    """How far east and north of its true place a map shows the ground, metres, with standard deviations.

    images: number of images that it was measured with.
    """

    east: float
    north: float
    east_std: float
    north_std: float
    images: int

    def __post_init__(self) -> None:
        numbers = self.east, self.north, self.east_std, self.north_std
        if not (all(isinstance(x, (int, float)) for x in numbers) and isinstance(self.images, int)):
            raise ValueError("it holds what is no number")
        if not math.hypot(self.east, self.north) <= MAX_SHIFT_M:  # NaN as well
            raise ValueError(f"a map is shifted by at most {MAX_SHIFT_M:.0f} m")
        if not all(0.0 <= std <= MAX_SHIFT_M for std in numbers[2:]):
            raise ValueError("its standard deviations are impossible")

    def __str__(self) -> str:
        east = f"{abs(self.east):.2f} +- {self.east_std:.2f} m {'east' if self.east >= 0.0 else 'west'}"
        north = f"{abs(self.north):.2f} +- {self.north_std:.2f} m {'north' if self.north >= 0.0 else 'south'}"
        return f"{east}, {north} ({self.images} images)"

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self), indent=1).encode())


def shift_file(source: str, options: MapOptions) -> Path | None:
    """Return where the shift of a map is kept: beside its file, or in a tile server's disk cache, if any."""
    if is_file_name(source):
        return Path(f"{source}.shift.json")
    if options.cache_dir is None:
        return None
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    return options.cache_dir / f"shift-{name}.json"


def read_shift(source: str, options: MapOptions) -> MapShift | None:
    """Return the shift that was measured of a map, None if there is none. Raises MapOpenError."""
    path = shift_file(source, options)
    if path is None:
        return None
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
        if others_can_write(path):
            raise PermissionError("another user can write to it")
        return MapShift(**content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        text = f"cannot read {redact(str(path))}, the shift of the map: {reason(error)}"
        raise MapOpenError(f"{text}; delete it, or run xview-loc map align") from None


class ShiftedMap(AerialMap):
    """A map whose constant shift is taken out."""

    def __init__(self, inner: AerialMap, shift: MapShift) -> None:
        self.inner, self.shift = inner, shift
        self.attribution = inner.attribution

    def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
        """See :meth:`AerialMap.tile`."""
        there = LocalProjection(lat, lon).inverse(self.shift.east, self.shift.north)
        shown = self.inner.tile(float(there[0]), float(there[1]), size_px, gsd)
        return replace(shown, lat=lat, lon=lon)

    def info(self) -> MapInfo:
        """See :meth:`AerialMap.info`."""
        return replace(self.inner.info(), shift=str(self.shift))

    def close(self) -> None:
        """See :meth:`AerialMap.close`."""
        self.inner.close()
