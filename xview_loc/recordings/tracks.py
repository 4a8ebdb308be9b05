"""Reads tracks from GPX files, CSV files and ROS bags."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader

from xview_loc.bags.recovery import check_files
from xview_loc.bags.ros_types import STORE, stamp_ns
from xview_loc.errors import UserError, reason
from xview_loc.files import read_regular

FIX_TYPE = "sensor_msgs/msg/NavSatFix"
# A week at 10 Hz is 200 MB.
MAX_TRACK_BYTES = 256 << 20
T = TypeVar("T")


class TrackError(UserError):
    """A track cannot be read; the message is one clear line."""


def read_track(path: Path, topic: str | None = None) -> list[tuple[float, float]]:
    """Return (lat, lon) in degrees along a GPX file or a ROS bag's NavSatFix topic (default: the only one).

    Raises TrackError.
    """
    if path.suffix.lower() == ".gpx":
        return _some(path, _read_gpx)
    return [(lat, lon) for _, lat, lon in _some(path, partial(_read_bag, topic=topic))]


@dataclass(frozen=True, eq=False)
class TimedTrack:
    """Positions in the order of their stamps: stamp_ns (N,) int64; lat, lon (N,), degrees."""

    stamp_ns: NDArray[np.int64]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]

    def at(
        self, stamp_ns: NDArray[np.int64], within_s: float = 2.0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Interpolate (lat, lon), each (M,), linearly at other stamps (M,).

        NaN before the first position, after the last, and in gaps of more than ``within_s`` seconds.
        """
        # From the first stamp: a float holds nanoseconds since 1970 only to a quarter of a microsecond.
        known, asked = (x - self.stamp_ns[0] for x in (self.stamp_ns, stamp_ns))
        after = np.clip(np.searchsorted(known, asked), 1, max(1, len(known) - 1))
        gap = known[np.minimum(after, len(known) - 1)] - known[after - 1]
        exact = np.isin(asked, known)
        bad = ~exact & ((asked < 0) | (asked > known[-1]) | (gap > within_s * 1e9))
        lat, lon = (np.interp(asked, known, x) for x in (self.lat, self.lon))
        return np.where(bad, np.nan, lat), np.where(bad, np.nan, lon)


def read_timed_track(path: Path, topic: str | None = None) -> TimedTrack:
    """Read stamped positions from a CSV file or a ROS bag's NavSatFix topic (default: the only one).

    The CSV file has the header ``stamp,lat,lon``: seconds, degrees. Raises TrackError.
    """
    rows = _some(path, _read_csv if path.suffix.lower() == ".csv" else partial(_read_bag, topic=topic))
    stamps, lat, lon = zip(*sorted(rows), strict=True)
    return TimedTrack(np.array(stamps, np.int64), np.array(lat, float), np.array(lon, float))


def _some(path: Path, read: Callable[[Path], list[T]]) -> list[T]:
    """Return a file's entries, at least one."""
    if not path.exists():
        raise TrackError(f"cannot read {path}: no such file")
    entries = read(path)
    if not entries:
        raise TrackError(f"{path} holds no positions")
    return entries


def _read_csv(path: Path) -> list[tuple[int, float, float]]:
    rows: list[tuple[int, float, float]] = []
    try:
        with io.StringIO(read_regular(path, MAX_TRACK_BYTES).decode(), newline="") as file:
            for row in csv.DictReader(file):
                # Not as a float, which does not hold nanoseconds since 1970.
                seconds, _, part = row["stamp"].strip().partition(".")
                stamp = int(seconds) * 1_000_000_000 + int((part + "0" * 9)[:9])
                lat, lon = float(row["lat"]), float(row["lon"])
                if not (_plausible(lat, lon) and 0 <= stamp < 1 << 63):
                    raise ValueError
                rows.append((stamp, lat, lon))
    except KeyError as error:
        raise TrackError(
            f"cannot read {path}: it has no column {error}: name the columns stamp, lat and lon"
        ) from None
    except (TypeError, ValueError, AttributeError, csv.Error):
        raise TrackError(f"cannot read {path}: row {len(rows) + 1} has no valid stamp, lat and lon") from None
    except OSError as error:
        raise TrackError(f"cannot read {path}: {error}") from None
    return rows


def _read_gpx(path: Path) -> list[tuple[float, float]]:
    points = []
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(read_regular(path, MAX_TRACK_BYTES))):
            # The namespace differs between GPX versions; trk, rte and wpt points all have lat and lon.
            if element.tag.rpartition("}")[2] in ("trkpt", "rtept", "wpt"):
                point = float(element.attrib["lat"]), float(element.attrib["lon"])
                if _plausible(*point):
                    points.append(point)
            element.clear()
    except (ElementTree.ParseError, OSError) as error:
        raise TrackError(f"cannot read {path}: {error}") from None
    except (KeyError, ValueError):
        raise TrackError(f"cannot read {path}: a point without a valid lat and lon") from None
    return points


def _read_bag(path: Path, topic: str | None) -> list[tuple[int, float, float]]:
    try:
        check_files(path)
        # Bags of ROS 2 Humble and earlier hold no message definitions.
        with AnyReader([path], default_typestore=STORE) as reader:
            fixes = [c for c in reader.connections if c.msgtype == FIX_TYPE and topic in (None, c.topic)]
            topics = sorted({connection.topic for connection in fixes})
            if not topics:
                raise TrackError(f"{path} has no NavSatFix topic" + (f" {topic}" if topic else ""))
            if len(topics) > 1:
                raise TrackError(f"{path} has several NavSatFix topics, choose one: {', '.join(topics)}")
            points = []
            for connection, _, raw in reader.messages(connections=fixes):
                fix: Any = reader.deserialize(raw, connection.msgtype)
                if fix.status.status >= 0 and _plausible(fix.latitude, fix.longitude):
                    points.append((stamp_ns(fix.header), float(fix.latitude), float(fix.longitude)))
            return points
    except TrackError:
        raise
    except Exception as error:  # damaged files raise anything
        raise TrackError(f"cannot read {path}: {reason(error)}") from None


def _plausible(lat: float, lon: float) -> bool:
    return math.isfinite(lat) and math.isfinite(lon) and abs(lat) <= 90.0 and abs(lon) <= 360.0
