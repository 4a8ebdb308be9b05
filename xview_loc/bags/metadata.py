"""Writes a rosbag2 directory's ``metadata.yaml``, in the version that every ROS 2 since Humble reads."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from xview_loc.files import write_whole

FILE = "metadata.yaml"
_VERSION = 5
_FOREVER = {"sec": 9223372036, "nsec": 854775807}
# Reliable and kept for subscribers that come later, so that `ros2 bag play` offers it so. In rmw's numbers.
_LATCHED = {
    "history": 1,
    "depth": 1,
    "reliability": 1,
    "durability": 1,
    "deadline": _FOREVER,
    "lifespan": _FOREVER,
    "liveliness": 1,
    "liveliness_lease_duration": _FOREVER,
    "avoid_ros_namespace_conventions": False,
}


@dataclass
class FileSummary:
    """One file of a bag: name, messages per topic, first and last stamp in nanoseconds, bytes."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    start_ns: int = 0
    end_ns: int = 0
    size: int = 0

    def add(self, topic: str, stamp_ns: int) -> None:
        """Count a message."""
        first = not self.counts
        self.start_ns = stamp_ns if first else min(self.start_ns, stamp_ns)
        self.end_ns = stamp_ns if first else max(self.end_ns, stamp_ns)
        self.counts[topic] += 1


def offered_qos(topic: str) -> str:
    """Return the quality of service that a topic is played with, as YAML; empty for the usual one."""
    if topic != "/tf_static":
        return ""
    text = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.dump([_LATCHED], text)
    return text.getvalue()


def write_metadata(folder: Path, files: Sequence[FileSummary], topics: Mapping[str, str]) -> None:
    """Write ``metadata.yaml`` for ``files``; ``topics`` maps each topic to its type.

    The file is replaced atomically. Raises OSError.
    """
    filled = [f for f in files if f.counts]
    start = min((f.start_ns for f in filled), default=0)
    end = max((f.end_ns for f in filled), default=0)
    counts: Counter[str] = sum((f.counts for f in files), Counter())
    content: dict[str, Any] = {
        "version": _VERSION,
        "storage_identifier": "mcap",
        "duration": {"nanoseconds": end - start},
        "starting_time": {"nanoseconds_since_epoch": start},
        "message_count": counts.total(),
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic,
                    "type": kind,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": offered_qos(topic),
                },
                "message_count": counts[topic],
            }
            for topic, kind in topics.items()
        ],
        "compression_format": "",
        "compression_mode": "",
        "relative_file_paths": [f.name for f in files],
        "files": [
            {
                "path": f.name,
                "starting_time": {"nanoseconds_since_epoch": f.start_ns},
                "duration": {"nanoseconds": f.end_ns - f.start_ns},
                "message_count": f.counts.total(),
            }
            for f in files
        ],
    }
    text = io.StringIO()
    YAML(typ="safe").dump({"rosbag2_bagfile_information": content}, text)
    write_whole(folder / FILE, text.getvalue().encode())
