"""Change the weights of a running localizer: verify a checkpoint first, then swap it between two frames."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from xview_loc.errors import UserError, reason
from xview_loc.estimation.deployment_record import DEPLOY, ROLLBACK, SHADOW, Weights, absolute
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from xview_loc.models.graph import EXPORT_CANCELLED

# Niceness of the loading thread: frames go first if both want the same core.
NICENESS = 10


@dataclass(frozen=True)
class Deployed:
    """A localizer and the checkpoint of its weights; ``path`` and ``sha256`` are "" for random weights.

    ``note`` is that of :class:`~xview_loc.models.checkpoint.Checkpoint`.
    """

    localizer: Localizer
    path: str = ""
    sha256: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.path} sha256:{self.sha256[:12]}" if self.path else "none"

    @property
    def with_note(self) -> str:
        """Path, digest and note, for the log."""
        return f"{self}, {self.note}" if self.note else str(self)


class CheckpointSwap:
    """The active localizer and its replacements.

    ``active`` is replaced as a whole: a frame that reads it once never sees mixed weights. Changes run one
    after another in a thread of their own, rollbacks in another. Each returns the localizer active
    afterwards, or raises CheckpointError and changes nothing.
    """

    def __init__(
        self,
        first: Deployed,
        build: Callable[[CrossViewModel], Localizer],
        previous: Weights | None = None,
        changed: Callable[[Weights], object] = lambda weights: None,
    ) -> None:
        """
        build: makes a localizer of a model, with the map and settings of the first one. previous: what a
        rollback loads before any change was made. changed: called after every change, by the thread that
        makes it.
        """
        self.active = first
        self._build = build
        self._changed = changed
        self._previous: Deployed | Weights | None = previous
        self._closing = threading.Event()
        # Guards ``active``, what a rollback loads, and the record of changes.
        self._lock = threading.Lock()
        # Rises with every rollback, which abandons the changes before it.
        self._rollbacks = 0
        self._waiting: Future[Deployed] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", self._enter_thread)
        self._rollback_thread = ThreadPoolExecutor(1, "rollback", EXPORT_CANCELLED.set, (self._closing,))

    def load(self, path: Path) -> Future[Deployed]:
        """Verify the checkpoint at ``path``, then activate it; if it is active already, nothing changes.

        Its weights must be complete and finite, of the same model and inputs, and give a finite pose from
        noise. A change that still waits for another one is cancelled: only the newest waits.
        """
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self._thread.submit(self._load, path, self._rollbacks)
        return self._waiting

    def prepare(self, path: Path) -> Future[Deployed]:
        """Verify the checkpoint at ``path`` without activating it."""
        return self._thread.submit(self._verified, path)

    def use(self, prepared: Deployed, instead_of: Deployed) -> Future[Deployed]:
        """Activate the result of :meth:`prepare`; CheckpointError if ``instead_of`` is no longer active."""
        return self._thread.submit(self._replace, instead_of, prepared)

    def rollback(self) -> Future[Deployed]:
        """Activate the previous checkpoint again; a second call returns to this one.

        Does not wait for changes under way: they are abandoned.
        """
        if self._previous is not None:
            self._rollbacks += 1
            if self._waiting is not None:
                self._waiting.cancel()
        return self._rollback_thread.submit(self._rollback)

    def close(self) -> None:
        """Abandon the change under way, and make no more."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._rollback_thread.shutdown(cancel_futures=True)

    @property
    def closing(self) -> bool:
        """True once :meth:`close` was called."""
        return self._closing.is_set()

    def _enter_thread(self) -> None:
        EXPORT_CANCELLED.set(self._closing)
        # On Linux niceness is a thread's; elsewhere it is the whole process's.
        if sys.platform == "linux":
            os.nice(NICENESS)

    def _load(self, path: Path, rollbacks: int) -> Deployed:
        if hashlib.sha256(read_checkpoint(path)).hexdigest() == self.active.sha256:
            return self.active
        new = self._verified(path)
        # With the latest tiles encoded, the first frame is as fast as the others.
        new.localizer.take_over(self.active.localizer)
        with self._lock:
            if rollbacks != self._rollbacks:
                raise CheckpointError(f"{new} is not activated: a rollback was asked for meanwhile")
            return self._use(new, DEPLOY)

    def _verified(self, path: Path) -> Deployed:
        old = self.active.localizer
        checkpoint = load_checkpoint(path, old.spec.name)
        if replace(checkpoint.model.spec, normalisation=old.spec.normalisation) != old.spec:
            raise CheckpointError(f"checkpoint {path} is for other inputs than the active one")
        try:
            localizer = self._build(checkpoint.model)
            localizer.warm_up()
        except (LocalizationError, UserError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} fails its trial: {reason(error)}") from None
        return Deployed(localizer, str(path), checkpoint.sha256, checkpoint.note)

    def _rollback(self) -> Deployed:
        previous = self._previous
        if previous is None:
            raise CheckpointError("there is no previous checkpoint")
        if isinstance(previous, Weights):
            sha256, previous = previous.sha256, self._verified(Path(previous.path))
            if previous.sha256 != sha256:
                raise CheckpointError(
                    f"the previous checkpoint {previous.path} has changed since it was in use"
                )
        # Its tiles are not encoded before: an answer at once is worth more than a fast first frame.
        with self._lock:
            return self._use(previous, ROLLBACK)

    def _replace(self, old: Deployed, new: Deployed) -> Deployed:
        new.localizer.take_over(old.localizer)
        with self._lock:
            if self.active is not old:
                raise CheckpointError(f"{new} is not activated: meanwhile {self.active} was")
            return self._use(new, SHADOW)

    def _use(self, new: Deployed, by: str) -> Deployed:
        old = self.active
        self._previous, self.active = old, new
        # It keeps its weights, for a rollback.
        old.localizer.forget_tiles()
        _return_freed_memory()
        self._changed(Weights(absolute(new.path), new.sha256, by))
        return new


def _return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps it by thread, and more with every checkpoint."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
