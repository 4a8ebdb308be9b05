"""Writes a rosbag2 directory of MCAP files that loses at most a second when the power fails."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from mcap.writer import CompressionType, Writer

from xview_loc.bags.metadata import FileSummary, offered_qos, write_metadata
from xview_loc.bags.ros_types import definition

FLUSH_S = 0.5
_CHUNK_BYTES = 1 << 20
# The summary that closes a file must still fit on a full disk.
_RESERVE_BYTES = 1 << 20


class BagFullError(OSError):
    """The quota or the free-space floor is reached, and nothing may be deleted; the message is one line."""


class BagLostError(OSError):
    """The file being written was deleted, replaced or truncated; the message is one line."""


@dataclass(frozen=True)
class BagLimits:
    """Limits of a bag; bytes and seconds, 0 for no limit.

    A new file begins after ``split_bytes`` or ``split_seconds`` (of stamps). All files together stay below
    ``quota_bytes``, and ``min_free_bytes`` of the disk stay free; beyond either the writer stops
    (``when_full`` "stop") or deletes its oldest file ("delete_oldest").
    """

    split_bytes: int = 1 << 30
    split_seconds: float = 0.0
    quota_bytes: int = 0
    min_free_bytes: int = 1 << 30
    when_full: Literal["stop", "delete_oldest"] = "stop"


class BagWriter:
    """Writes a new rosbag2 directory. Thread-safe.

    A thread puts what was written on the disk (chunk closed, fdatasync) every ``FLUSH_S`` seconds. After a
    failure every further call raises OSError. ``lost``: the file being written was deleted or truncated;
    its messages are counted no more.
    """

    def __init__(self, folder: Path, topics: Mapping[str, str], limits: BagLimits | None = None) -> None:
        """``topics`` maps each topic to its type, such as sensor_msgs/msg/Imu.

        Raises FileExistsError if ``folder`` exists, OSError if it cannot be written.
        """
        self.folder = folder
        self.files_deleted = 0
        self.lost = False
        self._topics = dict(topics)
        self._limits = limits or BagLimits()
        self._lock = threading.RLock()
        self._files: list[FileSummary] = []
        self._next_number = 0
        self._failure: OSError | None = None
        self._closed = False
        # Bytes handed over since the last flush.
        self._pending = 0
        folder.mkdir(parents=True)
        self._open_file()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._flush_regularly, name="bag flush", daemon=True)
        self._thread.start()

    @property
    def size_bytes(self) -> int:
        """Size of the bag, including what is not on the disk yet."""
        with self._lock:
            complete = self._files if self.lost else self._files[:-1]
            return self._pending + self._written + sum(file.size for file in complete)

    @property
    def current_file(self) -> str:
        """Name of the file being written."""
        with self._lock:
            return self._files[-1].name if self._files else ""

    @property
    def failure(self) -> OSError | None:
        """What further calls raise, None if nothing failed."""
        return self._failure

    def count(self, topic: str) -> int:
        """Return the number of a topic's messages in the files that are still there."""
        with self._lock:
            return sum(file.counts[topic] for file in self._files)

    def write(self, topic: str, stamp_ns: int, data: bytes, *, may_split: bool = True) -> None:
        """Add a serialized message; without ``may_split``, to the same file as the one before.

        Raises BagFullError, OSError, and ValueError for a stamp that a bag cannot hold.
        """
        if not 0 <= stamp_ns < 1 << 63:
            raise ValueError(f"a stamp of {stamp_ns} ns cannot be written")
        with self._lock, self._failing():
            self._check_file()
            if may_split:
                self.split_if_due()
            self._make_room(len(data))
            self._mcap.add_message(self._channels[topic], stamp_ns, data, stamp_ns)
            self._files[-1].add(topic, stamp_ns)
            self._pending += len(data)

    def flush(self) -> None:
        """Put everything written so far on the disk. Raises OSError."""
        with self._lock, self._failing():
            self._check_file()
            if self._pending:
                self._mcap.flush()
                os.fdatasync(self._stream.fileno())
                self._pending, self._written = 0, self._stream.tell()
                self._check_file()

    def split_if_due(self) -> None:
        """Begin a new file if the limits require it. Raises OSError."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            limits, current = self._limits, self._files[-1]
            seconds = (current.end_ns - current.start_ns) / 1e9
            too_long = limits.split_seconds and seconds >= limits.split_seconds
            too_large = limits.split_bytes and self._written + self._pending >= limits.split_bytes
            if too_long or too_large:
                self.split()

    def split(self) -> None:
        """Begin a new file, unless this one is empty. Raises OSError."""
        with self._lock, self._failing():
            if self._files[-1].counts:
                self._close_file()
                self._open_file()

    def close(self) -> None:
        """Complete the bag. Raises OSError if that fails; the bag can then be recovered."""
        self._closing.set()
        self._thread.join()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if not self._stream.closed:
                    self._close_file()
                if not self.lost or self.folder.exists():
                    write_metadata(self.folder, self._files, self._topics)
            except Exception as error:
                # On a full disk what is still buffered is lost; the rest can be recovered.
                with suppress(OSError):
                    self._stream.close()
                with suppress(OSError):
                    write_metadata(self.folder, self._files, self._topics)
                raise OSError(f"the bag {self.folder} could not be completed: {error}") from error

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn any failure inside into an OSError that every later call raises, too."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise OSError(f"the bag {self.folder} is closed")
        try:
            yield
        except OSError as error:
            self._failure = error
            raise
        except Exception as error:
            self._failure = OSError(f"writing the bag {self.folder} failed: {error}")
            raise self._failure from error

    def _open_file(self) -> None:
        path = self.folder / f"{self.folder.name}_{self._next_number}.mcap"
        self._stream: IO[bytes] = path.open("xb")
        self._next_number += 1
        self._written = 0
        self._files.append(FileSummary(path.name))
        self._mcap: Writer = Writer(self._stream, chunk_size=_CHUNK_BYTES, compression=CompressionType.ZSTD)
        self._mcap.start(profile="ros2", library="xview_loc")
        self._channels = {}
        for topic, kind in self._topics.items():
            schema = self._mcap.register_schema(kind, "ros2msg", definition(kind).encode())
            self._channels[topic] = self._mcap.register_channel(
                topic, "cdr", schema, {"offered_qos_profiles": offered_qos(topic)}
            )
        # So that every tool opens the bag during the recording.
        write_metadata(self.folder, self._files, self._topics)

    def _close_file(self) -> None:
        self._mcap.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._files[-1].size = self._written = self._stream.tell()
        self._pending = 0
        self._stream.close()

    def _check_file(self) -> None:
        """Raise BagLostError unless the file being written is where it was begun, with all its bytes."""
        path, own = self.folder / self._files[-1].name, os.fstat(self._stream.fileno())
        try:
            found = path.stat()
            problem = "" if os.path.samestat(found, own) else "replaced"
        except FileNotFoundError:
            problem = "deleted"
        if not problem and own.st_size < self._written:
            problem = "truncated"
        if problem:
            self.lost = True
            with suppress(OSError):
                self._stream.close()
            self._files = [file for file in self._files[:-1] if (self.folder / file.name).exists()]
            self._pending = self._written = 0
            raise BagLostError(f"{path} was {problem} while it was written")

    def _make_room(self, size: int) -> None:
        """Make room for a message of ``size`` bytes. Raises BagFullError."""
        limits = self._limits
        while (reason := self._full(size)) is not None:
            # The file being written is never deleted.
            if limits.when_full == "stop" or len(self._files) < 2:
                raise BagFullError(reason)
            oldest = self._files.pop(0)
            (self.folder / oldest.name).unlink()
            self.files_deleted += 1
            write_metadata(self.folder, self._files, self._topics)

    def _full(self, size: int) -> str | None:
        """Return why a message of ``size`` bytes would be too much, None if it is not."""
        limits = self._limits
        if limits.quota_bytes and self.size_bytes + size + _RESERVE_BYTES > limits.quota_bytes:
            return f"the quota of {limits.quota_bytes / 1e6:.0f} MB for {self.folder} is used up"
        if limits.min_free_bytes:
            free = shutil.disk_usage(self.folder).free
            if free - size - _RESERVE_BYTES < limits.min_free_bytes:
                return (
                    f"only {free / 1e6:.0f} MB are free on the disk of {self.folder}, "
                    f"{limits.min_free_bytes / 1e6:.0f} MB must stay free"
                )
        return None

    def _flush_regularly(self) -> None:
        while not self._closing.wait(FLUSH_S):
            try:
                self.flush()
            except OSError:
                return  # kept in _failure: the next write raises it
