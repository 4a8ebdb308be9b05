"""What a node says about itself on /diagnostics: counts, conditions and how the last frame went."""

from __future__ import annotations

import threading
import time
from collections import Counter

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


class Health:
    """Thread-safe account of what a node received, accepted and refused.

    A *condition* holds until cleared (or for a while); a *frame* was accepted or rejected for a reason. The
    status is the worst of all conditions and of what happened to the frames since the last report.
    """

    def __init__(self, doing: str) -> None:
        """``doing`` is what the status says where nothing is wrong."""
        self._doing = doing
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._values: dict[str, str] = {}
        self._conditions: dict[str, tuple[bytes, str, float]] = {}
        self._rejections: dict[str, str] = {}
        self._last_rejection: str | None = None
        self._last_error = ""
        self._accepted_since = 0
        self._reported_at = time.monotonic()

    def count(self, key: str) -> None:
        """Add one to a count."""
        with self._lock:
            self._counts[key] += 1

    def value(self, key: str, value: object) -> None:
        """Set a key value of the report."""
        with self._lock:
            self._values[key] = str(value)

    def condition(self, key: str, level: bytes, message: str, for_s: float = float("inf")) -> bool:
        """A condition holds, until cleared or for ``for_s`` seconds; True where it is new or changed."""
        with self._lock:
            old = self._conditions.get(key)
            self._conditions[key] = (level, message, time.monotonic() + for_s)
            if level != OK:
                self._last_error = message
            return old is None or old[1] != message

    def clear(self, key: str) -> None:
        """A condition holds no more."""
        with self._lock:
            self._conditions.pop(key, None)

    def forget(self, prefix: str) -> None:
        """Drop the key values and conditions whose keys begin with ``prefix``."""
        with self._lock:
            self._values = {k: v for k, v in self._values.items() if not k.startswith(prefix)}
            self._conditions = {k: c for k, c in self._conditions.items() if not k.startswith(prefix)}

    def accepted(self) -> None:
        """A frame led to what the node is for."""
        with self._lock:
            self._counts["frames_accepted"] += 1
            self._accepted_since += 1
            self._last_rejection = None

    def rejected(self, reason: str, message: str) -> bool:
        """A frame led to nothing; True where the frame before it was not rejected for the same reason."""
        with self._lock:
            self._counts[f"frames_rejected/{reason}"] += 1
            self._rejections[reason] = message
            self._last_error = message
            new = self._last_rejection != reason
            self._last_rejection = reason
            return new

    def report(self, name: str) -> DiagnosticStatus:
        """The status since the last report."""
        with self._lock:
            now = time.monotonic()
            self._conditions = {k: c for k, c in self._conditions.items() if c[2] > now}
            problems = [(level, f"{key}: {text}") for key, (level, text, _) in self._conditions.items()]
            # While frames are accepted between rejected ones, the node still does its job.
            level = WARN if self._last_rejection is None else ERROR
            problems += [
                (level, f"frames rejected: {reason}: {text}") for reason, text in self._rejections.items()
            ]
            rate = self._accepted_since / max(1e-3, now - self._reported_at)
            problems.sort(key=lambda problem: problem[0], reverse=True)
            status = DiagnosticStatus(name=name, hardware_id="xview_loc")
            status.level = problems[0][0] if problems else OK
            status.message = "; ".join(text for _, text in problems) or self._doing
            values = {
                **self._values,
                "rate_hz": f"{rate:.2f}",
                "last_error": self._last_error,
                **{key: str(count) for key, count in sorted(self._counts.items())},
            }
            status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
            self._accepted_since, self._reported_at = 0, now
            # What the last frame was rejected for stays until a frame is accepted.
            self._rejections = {k: v for k, v in self._rejections.items() if k == self._last_rejection}
            return status
