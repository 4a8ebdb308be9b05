"""What a localizer remembers from one start to the next: its checkpoint, the one before, and its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xview_loc.errors import UserError, reason
from xview_loc.files import others_can_write, state_folder, write_whole

# Who put a checkpoint there.
PARAMETER, DEPLOY, SHADOW, ROLLBACK = "parameter", "deploy", "shadow", "rollback"


class RecordError(UserError):
    """A record cannot be read or written; the message is one clear line."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint's absolute path, its SHA-256 (hex), and who put it there; both "" for random weights."""

    path: str
    sha256: str
    by: str = PARAMETER


@dataclass(frozen=True)
class DeploymentRecord:
    """The checkpoint in use and the one before.

    model, checkpoint: the parameters when the node was configured. Where they have changed since, they say
    what is to be used, and not the record.
    """

    model: str
    checkpoint: str
    active: Weights
    previous: Weights | None = None

    def followed_by(self, active: Weights) -> DeploymentRecord:
        """Return the record after a change of checkpoint."""
        return replace(self, active=active, previous=self.active)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises RecordError."""
        _write(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> DeploymentRecord | None:
        """Read the file; None if there is none. Raises RecordError, also if another user can change it."""
        with _record_errors(path):
            content = _read(path)
            if content is None:
                return None
            previous = content["previous"]
            return cls(
                str(content["model"]),
                str(content["checkpoint"]),
                Weights(**content["active"]),
                None if previous is None else Weights(**previous),
            )


@dataclass(frozen=True)
class LastPlace:
    """Where the vehicle was last, degrees."""

    lat: float
    lon: float

    def __post_init__(self) -> None:
        if not (abs(self.lat) <= 90.0 and abs(self.lon) <= 180.0):
            raise ValueError(f"no place on earth: {self.lat!r} {self.lon!r}")

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises RecordError."""
        _write(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> LastPlace | None:
        """Read the file; None if there is none. Raises RecordError, also if another user can change it."""
        with _record_errors(path):
            content = _read(path)
            return None if content is None else cls(float(content["lat"]), float(content["lon"]))


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2).encode())
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}") from None


def _read(path: Path) -> Any:
    try:
        for place in (path.parent, path):
            if others_can_write(place):
                raise PermissionError(f"another user can write to {place}")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


@contextmanager
def _record_errors(path: Path) -> Iterator[None]:
    """Raise RecordError for what is wrong with a file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RecordError(f"cannot read {path}, which is written anew: {reason(error)}") from None


def absolute(path: str) -> str:
    """Return a path as seen from any folder, "" as it is."""
    return str(Path(path).absolute()) if path else ""


def record_path(node: str, kind: str = "") -> Path:
    """Return where the node of this full name keeps its record: below ``$ROS_HOME``, by default ~/.ros.

    ``kind``: "" for the checkpoint's, ".place" for that of the last place.
    """
    return state_folder() / f"{node.strip('/').replace('/', '__')}{kind}.json"
