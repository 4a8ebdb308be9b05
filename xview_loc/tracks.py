"""Reads where a track goes, from GPX files and ROS bags."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rosbags.highlevel import AnyReader, AnyReaderError

from xview_loc.errors import UserError, reason

FIX_TYPE = "sensor_msgs/msg/NavSatFix"


class TrackError(UserError):
    """The track cannot be read; the message is one clear line."""


def read_track(path: Path, topic: str | None = None) -> list[tuple[float, float]]:
    """(lat, lon) in degrees along a GPX file or a ROS bag's NavSatFix topic (default: the only one).

    Raises TrackError.
    """
    if not path.exists():
        raise TrackError(f"cannot read {path}: no such file")
    points = _read_gpx(path) if path.suffix.lower() == ".gpx" else _read_bag(path, topic)
    if not points:
        raise TrackError(f"{path} holds no positions")
    return points


def _read_gpx(path: Path) -> list[tuple[float, float]]:
    points = []
    try:
        for _, element in ElementTree.iterparse(path):
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


def _read_bag(path: Path, topic: str | None) -> list[tuple[float, float]]:
    try:
        with AnyReader([path]) as reader:
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
                    points.append((float(fix.latitude), float(fix.longitude)))
            return points
    except TrackError:
        raise
    except (AnyReaderError, OSError, ValueError, AssertionError) as error:
        raise TrackError(f"cannot read {path}: {reason(error)}") from None


def _plausible(lat: float, lon: float) -> bool:
    return math.isfinite(lat) and math.isfinite(lon) and abs(lat) <= 90.0 and abs(lon) <= 360.0
