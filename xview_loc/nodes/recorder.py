"""Queue and thread that write what the pair logger accepted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from xview_loc.nodes.vehicle_node import PairedFrame
from xview_loc.recordings.pair_writer import PairWriter

# What may wait for a slow disk: half a minute of odometry at 100 Hz, ten raw images of 4096 x 2048 pixels.
ODOMETRY_WAITING = 4096
IMAGE_BYTES_WAITING = 256_000_000


@dataclass(frozen=True)
class Keyframe:
    """A frame to write."""

    writer: PairWriter
    paired: PairedFrame


@dataclass(frozen=True)
class OdometryMessage:
    """CDR bytes of a ``nav_msgs/Odometry`` to write."""

    writer: PairWriter
    stamp_ns: int
    data: bytes


@dataclass(frozen=True)
class Stop:
    """Complete the bag, and call ``done`` with whether it is complete."""

    writer: PairWriter
    done: Callable[[bool], None]


class Recorder:
    """Processes keyframes and odometry one after another in a thread of its own."""

    def __init__(self, process: Callable[[Keyframe | OdometryMessage | Stop], None]) -> None:
        self._process = process
        self._queue: queue.SimpleQueue[Keyframe | OdometryMessage | Stop | None] = queue.SimpleQueue()
        self._bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def put(self, item: Keyframe | OdometryMessage) -> bool:
        """Queue an item; return True if it was dropped because too much waits."""
        if isinstance(item, Keyframe):
            size = _size(item)
            with self._lock:
                # One image always fits.
                full = self._bytes > 0 and self._bytes + size > IMAGE_BYTES_WAITING
                self._bytes += 0 if full else size
        else:
            full = self._queue.qsize() >= ODOMETRY_WAITING
        if not full:
            self._queue.put(item)
        return full

    def stop(self, writer: PairWriter, done: Callable[[bool], None]) -> None:
        """Complete the bag after everything queued for it was written."""
        self._queue.put(Stop(writer, done))

    def close(self) -> None:
        """Process everything queued, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._process(item)
            if isinstance(item, Keyframe):
                with self._lock:
                    self._bytes -= _size(item)


def _size(keyframe: Keyframe) -> int:
    return sum(len(image.data) for image in keyframe.paired.frame.images)
