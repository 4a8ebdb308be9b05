"""Motion of a vehicle between two instants, from its odometry's velocities. Free of ROS."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from xview_loc.vehicle.synchronisation import NS, RESTART_NS

# How long velocities are kept.
_KEEP_NS = 120 * NS


@dataclass(frozen=True)
class VelocitySample:
    """Velocity of base_link in its own axes: m/s forward and left, rad/s counter-clockwise."""

    stamp_ns: int
    forward: float
    left: float
    yaw_rate: float


@dataclass(frozen=True)
class Motion:
    """Motion between two instants.

    forward, left: metres in the axes at the start. turn: radians, counter-clockwise. length: metres driven.
    """

    forward: float
    left: float
    turn: float
    length: float


class Odometry:
    """The velocities of the last two minutes, in the order of their stamps. Thread-safe."""

    def __init__(self, max_gap_s: float) -> None:
        """``max_gap_s``: longest time between samples that velocities are interpolated over."""
        self._max_gap_s = max_gap_s
        self._samples: deque[VelocitySample] = deque()
        self._lock = threading.Lock()

    def add(self, sample: VelocitySample) -> bool:
        """Keep a sample; return False if it is not newer than the last one.

        A sample more than half a second older means that time started again: the others are forgotten.
        """
        with self._lock:
            if self._samples and sample.stamp_ns <= self._samples[-1].stamp_ns:
                if sample.stamp_ns > self._samples[-1].stamp_ns - RESTART_NS:
                    return False
                self._samples.clear()
            self._samples.append(sample)
            while self._samples[0].stamp_ns < sample.stamp_ns - _KEEP_NS:
                self._samples.popleft()
        return True

    @property
    def begun(self) -> bool:
        """True once there has been a sample."""
        return bool(self._samples)

    def covers(self, stamp_ns: int) -> bool:
        """Return True if there are samples about a stamp."""
        return self.between(stamp_ns, stamp_ns) is not None

    def between(self, start_ns: int, end_ns: int) -> Motion | None:
        """Return the motion from ``start_ns`` to ``end_ns``, None if samples are missing.

        Velocities change linearly between samples, and are held before the first and after the last.
        """
        samples: list[VelocitySample] = []
        with self._lock:
            for sample in reversed(self._samples):
                samples.append(sample)
                if sample.stamp_ns <= start_ns:
                    break
        samples.reverse()
        if not samples or end_ns < start_ns:
            return None
        stamps = np.array([s.stamp_ns for s in samples])
        # The samples between the two instants, and their neighbours.
        first = max(0, int(np.searchsorted(stamps, start_ns, "right")) - 1)
        last = min(len(stamps), int(np.searchsorted(stamps, end_ns)) + 1)
        time = (stamps[first:last] - start_ns) / NS
        length = (end_ns - start_ns) / NS
        ends = max(time[0], length - time[-1])
        if ends > self._max_gap_s or (np.diff(time) > self._max_gap_s).any():
            return None
        at = np.concatenate([[0.0], time[(time > 0.0) & (time < length)], [length]])
        forward, left, rate = (
            np.interp(at, time, [getattr(s, name) for s in samples[first:last]])
            for name in ("forward", "left", "yaw_rate")
        )
        step = np.diff(at)
        forward, left, rate = ((v[1:] + v[:-1]) / 2 * step for v in (forward, left, rate))
        yaw = np.cumsum(rate) - rate / 2
        cos, sin = np.cos(yaw), np.sin(yaw)
        return Motion(
            forward=float(cos @ forward - sin @ left),
            left=float(sin @ forward + cos @ left),
            turn=float(rate.sum()),
            length=float(np.hypot(forward, left).sum()),
        )
