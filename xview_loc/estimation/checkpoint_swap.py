"""Changes the weights of a localizer that goes on serving: verified first, swapped between two frames."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from xview_loc.errors import UserError, reason
from xview_loc.estimation.localizer import LocalizationError, Localizer
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint

# Of the thread that loads: frames go first wherever the two want the same core.
NICENESS = 10


@dataclass(frozen=True)
class Deployed:
    """A localizer and the checkpoint of its weights; ``path`` and ``sha256`` are "" for random ones."""

    localizer: Localizer
    path: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.path} sha256:{self.sha256[:12]}" if self.path else "none"


class CheckpointSwap:
    """The localizer in use and its changes.

    ``active`` is replaced as a whole: who takes it once for a frame never sees mixed weights. Changes are
    made one after another in a thread of their own; each gives what is in use afterwards, or a
    CheckpointError with one clear line, and then nothing has changed.
    """

    def __init__(self, first: Deployed, build: Callable[[CrossViewModel], Localizer]) -> None:
        """``build`` makes a localizer of a model, with the map and settings of the first one."""
        self.active = first
        self._build = build
        self._previous: Deployed | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", _step_back)

    def load(self, path: Path) -> Future[Deployed]:
        """Verify the checkpoint at ``path`` and put it in use; the old one serves until then.

        One that is in use already stays as it is. Wanted are whole and finite weights of the same model, for
        the same inputs, whose heat map of noise is finite.
        """
        return self._thread.submit(self._load, path)

    def prepare(self, path: Path) -> Future[Deployed]:
        """The same without putting it in use: what :meth:`use` takes."""
        return self._thread.submit(self._verified, path)

    def use(self, prepared: Deployed, instead_of: Deployed) -> Future[Deployed]:
        """Put in use what :meth:`prepare` gave; CheckpointError where ``instead_of`` is no longer active."""
        return self._thread.submit(self._replace, instead_of, prepared)

    def rollback(self) -> Future[Deployed]:
        """Put the one before in use again; once more returns to this one."""
        return self._thread.submit(self._rollback)

    def close(self) -> None:
        """Finish the change in work and make no more."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self, path: Path) -> Deployed:
        # What cannot be read is told by load_checkpoint, in one clear line.
        with suppress(OSError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == self.active.sha256:
                return self.active
        return self._use(self._verified(path))

    def _verified(self, path: Path) -> Deployed:
        old = self.active.localizer
        checkpoint = load_checkpoint(path, old.spec.name)
        if checkpoint.model.spec != old.spec:
            raise CheckpointError(f"checkpoint {path} is for other inputs than the one in use")
        try:
            localizer = self._build(checkpoint.model)
            localizer.warm_up()
        except (LocalizationError, UserError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} fails its trial: {reason(error)}") from None
        return Deployed(localizer, str(path), checkpoint.sha256)

    def _rollback(self) -> Deployed:
        if self._previous is None:
            raise CheckpointError("there is no checkpoint before this one")
        return self._use(self._previous)

    def _replace(self, old: Deployed, new: Deployed) -> Deployed:
        if self.active is not old:
            raise CheckpointError(f"{new} is not put in use: meanwhile {self.active} was")
        return self._use(new)

    def _use(self, new: Deployed) -> Deployed:
        # The tiles about the vehicle, so that the first frame is as fast as the others.
        new.localizer.take_over(self.active.localizer)
        self._previous, self.active = self.active, new
        # It keeps its weights, for the way back.
        self._previous.localizer.forget_tiles()
        _give_memory_back()
        return new


def _give_memory_back() -> None:
    """Return what was freed to the system: glibc keeps it by thread, and more with every checkpoint."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _step_back() -> None:
    """Lower the priority of the calling thread. Elsewhere than on Linux it would be the whole process's."""
    if sys.platform == "linux":
        os.nice(NICENESS)
