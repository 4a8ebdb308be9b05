"""A node's status on /diagnostics: counts, conditions and the outcome of the last frame."""

from __future__ import annotations

import threading
import time
from collections import Counter

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from xview_loc.errors import shown

# A line of the log that messages from outside cause is written once in this time, seconds.
LOG_INTERVAL_S = 1.0
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


class Health:
    """Counts, conditions and frames of a node. Thread-safe.

    A *condition* holds until it is cleared or its time is over; a *frame* is accepted, or rejected for a
    reason. The status is the worst of all conditions and of the frames since the last report. Messages and
    values may hold text from outside: they are cut, and escaped.
    """

    def __init__(self, ok_message: str) -> None:
        """``ok_message``: the status' message while nothing is wrong."""
        self._ok_message = ok_message
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._values: dict[str, str] = {}
        self._conditions: dict[str, tuple[bytes, str, float]] = {}
        self._rejections: dict[str, str] = {}
        self._last_rejection: str | None = None
        self._last_error = ""
        self._accepted_since = 0
        self._reported_at = time.monotonic()

    def count(self, key: str, number: int = 1) -> None:
        """Add to a count."""
        with self._lock:
            self._counts[key] += number

    def value(self, key: str, value: object) -> None:
        """Set a key value of the report."""
        with self._lock:
            self._values[key] = shown(value)

    def condition(self, key: str, level: bytes, message: str, for_s: float = float("inf")) -> bool:
        """Set a condition, for ``for_s`` seconds; return True if it is new or its message changed."""
        message = shown(message)
        with self._lock:
            old = self._conditions.get(key)
            self._conditions[key] = (level, message, time.monotonic() + for_s)
            if level != OK:
                self._last_error = message
            return old is None or old[1] != message

    def clear(self, key: str) -> None:
        """Clear a condition."""
        with self._lock:
            self._conditions.pop(key, None)

    def forget(self, prefix: str) -> None:
        """Clear the key values and conditions whose keys begin with ``prefix``."""
        with self._lock:
            self._values = {k: v for k, v in self._values.items() if not k.startswith(prefix)}
            self._conditions = {k: c for k, c in self._conditions.items() if not k.startswith(prefix)}

    def accepted(self) -> None:
        """Record that a frame was processed."""
        with self._lock:
            self._counts["frames_accepted"] += 1
            self._accepted_since += 1
            self._last_rejection = None

    def rejected(self, reason: str, message: str) -> bool:
        """Record that a frame was rejected; return True unless the one before was for the same reason."""
        message = shown(message)
        with self._lock:
            self._counts[f"frames_rejected/{reason}"] += 1
            self._rejections[reason] = message
            self._last_error = message
            new = self._last_rejection != reason
            self._last_rejection = reason
            return new

    def report(self, name: str) -> DiagnosticStatus:
        """Return the status since the last report."""
        with self._lock:
            now = time.monotonic()
            self._conditions = {k: c for k, c in self._conditions.items() if c[2] > now}
            problems = [(level, f"{key}: {text}") for key, (level, text, _) in self._conditions.items()]
            # A node that accepts frames between rejected ones is not broken.
            level = WARN if self._last_rejection is None else ERROR
            problems += [
                (level, f"frames rejected: {reason}: {text}") for reason, text in self._rejections.items()
            ]
            rate = self._accepted_since / max(1e-3, now - self._reported_at)
            problems.sort(key=lambda problem: problem[0], reverse=True)
            status = DiagnosticStatus(name=name, hardware_id="xview_loc")
            status.level = problems[0][0] if problems else OK
            status.message = "; ".join(text for _, text in problems) or self._ok_message
            values = {
                **self._values,
                "rate_hz": f"{rate:.2f}",
                "last_error": self._last_error,
                **{key: str(count) for key, count in sorted(self._counts.items())},
            }
            status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
            self._accepted_since, self._reported_at = 0, now
            # The last frame's rejection is reported until a frame is accepted.
            self._rejections = {k: v for k, v in self._rejections.items() if k == self._last_rejection}
            return status
