"""Finds missing images: between the stamps of a camera with a fixed rate, or lost by DDS. Free of ROS."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from xview_loc.vehicle.synchronisation import NS

# Images remembered, and needed to learn the rate and to judge.
_WINDOW, _ENOUGH = 100, 30
# Longer than both of these is a pause.
_PAUSE_NS, _PAUSE_INTERVALS = 3 * NS, 10
# The shortest tenth of the intervals is free of gaps, unless nine of ten images are missing.
_SHORT = 10
# With a fixed rate this share of the intervals is within this part of a usual one of a multiple of it.
_REGULAR_SHARE, _TOLERANCE = 0.9, 0.25
# So many equal intervals in a row, other than the usual one, are a new rate.
_NEW_RATE = 6
# Share of missing images that is a fault.
_LIMIT = 0.05


class LostImages:
    """Counts missing images. Not thread-safe.

    DDS says what it lost, in any number and at any rate. Stamps show what a driver skipped too: the rate is
    learned from them, and nothing is missing without a fixed rate, in a pause, or where the rate changes.
    ``fault`` says in words that too many are missing; "" if not.
    """

    def __init__(self) -> None:
        self._last_ns, self._usual_ns = 0, 0.0
        # Whether the last images arrived, as DDS says.
        self._arrivals: deque[bool] = deque(maxlen=_WINDOW)
        self._start_again()

    def lose(self, count: int) -> None:
        """Take a number of images that DDS says it lost."""
        self._arrivals.extend([False] * min(count, _WINDOW))

    @property
    def lost_by_dds(self) -> str:
        """What is wrong with DDS, in words; "" for nothing."""
        lost = self._arrivals.count(False)
        if len(self._arrivals) < _ENOUGH or lost <= _LIMIT * len(self._arrivals):
            return ""
        return (
            f"DDS lost {lost} of the last {len(self._arrivals)} images: use the Fast DDS profile, for the "
            "camera driver too, image_size, and a larger qos_depth"
        )

    def add(self, stamp_ns: int) -> int:
        """Take an image's stamp, later than the last one; return how many are now known to be missing."""
        self._arrivals.append(True)
        interval = stamp_ns - self._last_ns
        self._last_ns = stamp_ns
        if interval > max(_PAUSE_NS, _PAUSE_INTERVALS * self._usual_ns):
            self._start_again()
            return 0
        self._intervals.append(interval)
        self._usual_ns = usual = self._find_usual()
        latest = list(self._intervals)[-_NEW_RATE:]
        if _agree(latest) and not _agree([*latest, usual]):
            self._start_again(latest)
            return 0
        steps = [interval / usual for interval in self._intervals]
        regular = sum(abs(step - max(1, round(step))) <= _TOLERANCE for step in steps)
        if len(steps) < _ENOUGH or regular < _REGULAR_SHARE * len(steps):
            self._forget()
            return 0
        missing = max(1, round(steps[-1])) - 1
        if missing:
            self._doubtful.append(missing)
            return 0
        found = sum(self._doubtful)
        self._missing.extend([*self._doubtful, 0])
        self._doubtful.clear()
        lost = sum(self._missing)
        share = lost / (lost + len(self._missing))
        self.fault = ""
        if share > _LIMIT and len(self._missing) >= _ENOUGH:
            self.fault = (
                f"{share:.0%} of the images are missing (one is due every {usual / 1e6:.0f} ms): DDS drops "
                "large messages (use the Fast DDS profile, image_size, a larger qos_depth), or the driver "
                "skips images"
            )
        return found

    def _start_again(self, intervals: Iterable[int] = ()) -> None:
        self._intervals = deque(intervals, _WINDOW)
        self._usual_ns = 0.0
        self._forget()

    def _forget(self) -> None:
        # Missing before each image; and since the last usual interval: a new rate, if no other follows.
        self._missing: deque[int] = deque(maxlen=_WINDOW)
        self._doubtful: list[int] = []
        self.fault = ""

    def _find_usual(self) -> float:
        short = sorted(self._intervals)[len(self._intervals) // _SHORT]
        low, high = short / (1.0 + _TOLERANCE), short * (1.0 + _TOLERANCE)
        return median(interval for interval in self._intervals if low <= interval <= high)


def _agree(intervals: Iterable[float]) -> bool:
    return max(intervals) <= (1.0 + _TOLERANCE) * min(intervals)
