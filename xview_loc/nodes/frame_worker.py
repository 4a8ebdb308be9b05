"""A thread that works on the newest frame, so that the executor never waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FrameWorker(Generic[T]):
    """Calls ``work`` with the newest frame; a newer frame replaces one that is still waiting."""

    def __init__(self, work: Callable[[T], None]) -> None:
        """``work`` must not raise."""
        self._work = work
        self._slot: T | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="localize", daemon=True)
        self._thread.start()

    def put(self, frame: T) -> bool:
        """Hand over a frame; return True if it replaced a waiting one."""
        with self._changed:
            dropped = self._slot is not None
            self._slot = frame
            self._changed.notify()
        return dropped

    def close(self) -> None:
        """Finish the current frame, drop the waiting one, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._slot is None and not self._closed:
                    self._changed.wait()
                if self._closed or self._slot is None:
                    return
                frame, self._slot = self._slot, None
            self._work(frame)
