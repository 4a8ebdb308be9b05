"""Pairs frames with fixes, headings and tilts at their stamps, for nodes and recordings. Free of ROS."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from xview_loc.vehicle.fix_gate import JumpGate
from xview_loc.vehicle.synchronisation import (
    NS,
    RESTART_NS,
    GnssFix,
    HeadingSample,
    History,
    RejectedInput,
    Stamped,
    StampNotNewerError,
    blend_fix,
    blend_heading,
)
from xview_loc.vehicle.tilt import TiltSample, blend_tilt

F = TypeVar("F", bound=Stamped)


@dataclass(frozen=True)
class Paired(Generic[F]):
    """A frame with the fix, heading and tilt at its stamp.

    fix, heading: None only if not required. tilt: None if not used, or not known.
    """

    frame: F
    fix: GnssFix | None
    heading: HeadingSample | None
    tilt: TiltSample | None = None


class Pairing(Generic[F]):
    """Collects stamped fixes, headings, tilts and frames, and releases frames with those at their stamp.

    A frame waits for a fix, a heading and a tilt later than itself. A stamp more than half a second before
    the last one of its input means that time started again: everything collected is forgotten. Not
    thread-safe.
    """

    def __init__(
        self,
        *,
        max_fix_age_s: float,
        max_heading_age_s: float,
        fix_max_jump_m: float,
        max_wait_s: float,
        use_heading: bool,
        use_tilt: bool = False,
        on_restart: Callable[[str, int], object],
        capacity: int = 16,
    ) -> None:
        """
        max_fix_age_s, max_heading_age_s: how far a fix, or a heading and tilt, may be from a frame that uses
        it. fix_max_jump_m: see :class:`JumpGate`. max_wait_s, capacity: how long, and how many, frames may
        wait; beyond either the oldest is released as it is. on_restart: called with the name of the input
        whose stamps went back and the number of waiting frames dropped.
        """
        self._fixes: History[GnssFix] = History("fix", blend_fix, max_fix_age_s)
        self._headings: History[HeadingSample] = History("heading", blend_heading, max_heading_age_s)
        self._tilts: History[TiltSample] = History("tilt", blend_tilt, max_heading_age_s)
        self._jumps = JumpGate(fix_max_jump_m)
        self._capacity = capacity
        self.set_limits(max_fix_age_s, max_heading_age_s, fix_max_jump_m, max_wait_s)
        self._use_heading, self._use_tilt = use_heading, use_tilt
        self._on_restart = on_restart
        # Frames, and when they arrived.
        self._waiting: deque[tuple[F, int]] = deque()
        self.last_frame_ns = 0

    def set_limits(
        self, max_fix_age_s: float, max_heading_age_s: float, fix_max_jump_m: float, max_wait_s: float
    ) -> None:
        """Change the limits, from the next input on; as of the constructor."""
        self._fixes.max_age_s, self._headings.max_age_s = max_fix_age_s, max_heading_age_s
        self._tilts.max_age_s = max_heading_age_s
        self._jumps.max_jump_m = fix_max_jump_m
        self._wait_ns = round(max_wait_s * NS)

    @property
    def waiting(self) -> int:
        """Number of frames that wait."""
        return len(self._waiting)

    def add_fix(self, fix: GnssFix) -> float:
        """Keep a fix; return the metres jumped if it is the first believed in a new place, else 0.

        Raises RejectedInput if it must not be used, StampNotNewerError.
        """
        if self._fixes.went_back(fix.stamp_ns):
            self._restart("fix")
        self._fixes.check_newer(fix.stamp_ns)
        jumped_m = self._jumps.admit(fix)
        if jumped_m > 0.0:
            # The vehicle has never been between the two places.
            self._fixes.clear()
        self._fixes.add(fix)
        return jumped_m

    def add_heading(self, heading: HeadingSample) -> None:
        """Keep a heading. Raises StampNotNewerError."""
        if self._headings.went_back(heading.stamp_ns):
            self._restart("heading")
        self._headings.add(heading)

    def add_tilt(self, tilt: TiltSample) -> None:
        """Keep a tilt. Raises StampNotNewerError."""
        if self._tilts.went_back(tilt.stamp_ns):
            self._restart("tilt")
        self._tilts.add(tilt)

    def add_frame(self, frame: F, now_ns: int) -> None:
        """Let a frame wait that arrived at ``now_ns`` of the caller's clock. Raises StampNotNewerError."""
        if frame.stamp_ns < self.last_frame_ns - RESTART_NS:
            self._restart("image")
        if frame.stamp_ns <= self.last_frame_ns:
            raise StampNotNewerError("image")
        self.last_frame_ns = frame.stamp_ns
        self._waiting.append((frame, now_ns))

    def ready(
        self, now_ns: int, *, fix_required: bool = True, heading_required: bool = True
    ) -> Iterator[Paired[F] | RejectedInput]:
        """Release frames, oldest first, whose samples are complete or that waited long enough.

        Yields each with its fix, heading and tilt, or a RejectedInput with the reason why it has no fix or
        heading that is required.
        """
        while self._waiting:
            frame, arrived_ns = self._waiting[0]
            overdue = now_ns - arrived_ns >= self._wait_ns or len(self._waiting) > self._capacity
            if not overdue and not self._complete(frame.stamp_ns):
                return
            self._waiting.popleft()
            yield self._pair(frame, fix_required, heading_required)

    def _complete(self, stamp_ns: int) -> bool:
        return (
            self._fixes.reaches(stamp_ns)
            and (not self._use_heading or self._headings.reaches(stamp_ns))
            and (not self._use_tilt or self._tilts.reaches(stamp_ns))
        )

    def _pair(self, frame: F, fix_required: bool, heading_required: bool) -> Paired[F] | RejectedInput:
        fix: GnssFix | None = None
        try:
            fix = self._fixes.at(frame.stamp_ns)
        except RejectedInput as error:
            if fix_required:
                return error
        heading: HeadingSample | None = None
        try:
            if self._use_heading:
                heading = self._headings.at(frame.stamp_ns)
        except RejectedInput as error:
            if heading_required:
                return error
        tilt: TiltSample | None = None
        if self._use_tilt:
            with suppress(RejectedInput):
                tilt = self._tilts.at(frame.stamp_ns)
        return Paired(frame, fix, heading, tilt)

    def _restart(self, name: str) -> None:
        dropped = len(self._waiting)
        self._fixes.clear()
        self._jumps.clear()
        self._headings.clear()
        self._tilts.clear()
        self._waiting.clear()
        self.last_frame_ns = 0
        self._on_restart(name, dropped)
