"""Makes one observation of the images of several cameras, by their stamps. Free of ROS."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from xview_loc.vehicle.synchronisation import NS, RESTART_NS, RejectedInput, StampNotNewerError

# Sets remembered, and needed to judge; a camera that is missing from this share of them is faulty.
_WINDOW, _ENOUGH, _LIMIT = 20, 10, 0.5
# Images of one instant arrive one after another; a set waits at least this long.
_LEAST_WAIT_NS = NS // 20
# A camera whose last image arrived longer ago sends none any more.
_SILENT_NS = NS
# Fewest cameras among which a wrong clock can be told.
_CLOCKS = 3


@dataclass(frozen=True)
class CameraImage:
    """A camera's image as it came: an Image or CompressedImage.

    name: the camera's; "" for the only camera of a vehicle. type, data: the message's type, such as
    sensor_msgs/msg/CompressedImage, and its CDR bytes. arrived_ns: when, by the receiver's clock.
    """

    name: str
    stamp_ns: int
    type: str
    data: bytes
    arrived_ns: int = 0


class RigAssembly:
    """Collects images into sets, at most one of each camera, whose stamps differ by ``tolerance_s`` at most.

    A set is released complete at once; incomplete after ``tolerance_s`` (at least 50 ms), or when the next
    one begins. A stamp more than half a second before the last one of its camera means that time started
    again. With three cameras or more, images of a camera are refused while its clock (stamp less arrival) is
    more than half a second from the median clock: they would make all others seem early or late. Not
    thread-safe.
    """

    def __init__(self, names: Sequence[str], tolerance_s: float) -> None:
        self._names = tuple(names)
        self.tolerance_s = tolerance_s
        self._set: dict[str, CameraImage] = {}
        self._since_ns = 0
        self._released: tuple[CameraImage, ...] = ()
        self._last_ns: dict[str, int] = {}
        # By camera: when its last image arrived, its stamp less that, and why it was refused.
        self._arrived_ns: dict[str, int] = {}
        self._clock_ns: dict[str, int] = {}
        self._refused: dict[str, RejectedInput] = {}
        self._missing: deque[frozenset[str]] = deque(maxlen=_WINDOW)

    def add(self, image: CameraImage) -> list[tuple[CameraImage, ...]]:
        """Take an image; return the sets that it releases.

        Raises StampNotNewerError; RejectedInput ("image_late") if the image's set was released without it, or
        ("image_clock") if its camera has another clock than the others.
        """
        self._refused.pop(image.name, None)
        try:
            return self._add(image)
        except RejectedInput as error:
            self._refused[image.name] = error
            raise

    def _add(self, image: CameraImage) -> list[tuple[CameraImage, ...]]:
        name, stamp = image.name, image.stamp_ns
        self._check_clock(image)
        last_ns = self._last_ns.get(name, 0)
        if stamp < last_ns - RESTART_NS:
            self._set, self._released, self._last_ns = {}, (), {}
        elif stamp <= last_ns:
            raise StampNotNewerError("image")
        self._last_ns[name] = stamp
        if self._is_late(image):
            behind_ns = max(other.stamp_ns for other in self._set.values() or self._released) - stamp
            text = (
                "it came after the others of its instant were used: "
                f"they wait {self._wait_ns / NS:g} s (rig_tolerance_s)"
            )
            if behind_ns > RESTART_NS:
                text = (
                    f"its stamp is {behind_ns / NS:.1f} s before those of images used already: set the clocks"
                )
            raise RejectedInput("image_late", text)
        sets = []
        if self._set and (name in self._set or not self._belongs(stamp)):
            sets.append(self._release())
        if not self._set:
            self._since_ns = image.arrived_ns
        self._set[name] = image
        if len(self._set) == len(self._names):
            sets.append(self._release())
        return sets

    @property
    def waiting(self) -> bool:
        """Whether an incomplete set waits."""
        return bool(self._set)

    def overdue(self, now_ns: int) -> list[tuple[CameraImage, ...]]:
        """Return the set that has waited long enough by the clock of arrivals, if there is one."""
        if self._set and now_ns - self._since_ns >= self._wait_ns:
            return [self._release()]
        return []

    def missing(self, images: Sequence[CameraImage]) -> list[str]:
        """Return the names of the cameras without an image in a set."""
        return [name for name in self._names if all(image.name != name for image in images)]

    def faults(self) -> dict[str, str]:
        """Return what is wrong, by camera, with those that miss half of the last sets or more."""
        if len(self._missing) < _ENOUGH:
            return {}
        newest_ns = max(self._arrived_ns.values(), default=0)
        faults = {}
        for name in self._names:
            count = sum(name in missing for missing in self._missing)
            if count < _LIMIT * len(self._missing):
                continue
            arrived_ns = self._arrived_ns.get(name)
            if arrived_ns is None:
                faults[name] = "it has sent no usable image"
            elif newest_ns - arrived_ns > _SILENT_NS:
                faults[name] = f"it has sent no usable image for {(newest_ns - arrived_ns) / NS:.0f} s"
            elif name in self._refused:
                faults[name] = f"its last image was refused: {self._refused[name]}"
            else:
                faults[name] = (
                    f"{count} of the last {len(self._missing)} observations have no image of it: it is "
                    f"slower, or its stamps are more than {self.tolerance_s:g} s (rig_tolerance_s) away"
                )
        return faults

    @property
    def _wait_ns(self) -> float:
        return max(self.tolerance_s * NS, _LEAST_WAIT_NS)

    def _check_clock(self, image: CameraImage) -> None:
        """Raise RejectedInput if a camera's clock is not that of the cameras that send images."""
        name, clock_ns = image.name, image.stamp_ns - image.arrived_ns
        before_ns = self._clock_ns.get(name, clock_ns)
        self._arrived_ns[name], self._clock_ns[name] = image.arrived_ns, clock_ns
        since_ns = image.arrived_ns - _SILENT_NS
        clocks = [self._clock_ns[other] for other, at in self._arrived_ns.items() if at >= since_ns]
        usual_ns = median_low(clocks)
        ahead_ns = clock_ns - usual_ns
        # Where time jumps, or a recording is played fast, the first camera is off, but was not before.
        if len(clocks) >= _CLOCKS and min(abs(ahead_ns), abs(before_ns - usual_ns)) > RESTART_NS:
            # What it sent before is no measure of the others.
            self._set.pop(name, None)
            self._released = tuple(other for other in self._released if other.name != name)
            self._last_ns.pop(name, None)
            way = "ahead of" if ahead_ns > 0 else "behind"
            text = (
                f"its stamps are {abs(ahead_ns) / NS:.1f} s {way} those of the other cameras: set its clock"
            )
            raise RejectedInput("image_clock", text)

    def _belongs(self, stamp_ns: int) -> bool:
        stamps = [image.stamp_ns for image in self._set.values()]
        return max(*stamps, stamp_ns) - min(*stamps, stamp_ns) <= self.tolerance_s * NS

    def _is_late(self, image: CameraImage) -> bool:
        if self._set:
            first_ns = min(other.stamp_ns for other in self._set.values())
            return image.stamp_ns < first_ns and not self._belongs(image.stamp_ns)
        if not self._released or any(other.name == image.name for other in self._released):
            return False
        first_ns = min(other.stamp_ns for other in self._released)
        return image.stamp_ns - first_ns <= self.tolerance_s * NS

    def _release(self) -> tuple[CameraImage, ...]:
        # In the order of the cameras' names.
        released = tuple(self._set[name] for name in self._names if name in self._set)
        self._set, self._released = {}, released
        self._missing.append(frozenset(self.missing(released)))
        return released


def middle_ns(images: Sequence[CameraImage]) -> int:
    """Return the instant of an observation: midway between the first and the last stamp of its images."""
    stamps = [image.stamp_ns for image in images]
    return (min(stamps) + max(stamps)) // 2
