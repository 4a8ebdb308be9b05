"""Cache of decoded samples in a temporary file."""

from __future__ import annotations

import os
import tempfile
from typing import IO, Any

import numpy as np

# Disk space left to others.
_LEAVE_FREE_BYTES = 1 << 30


class RecordCache:
    """Numbered records of one NumPy type, in a temporary file that is deleted when the process ends.

    Forked processes, such as a data loader's workers, share it. If the disk is full or cannot be written,
    records are silently not kept.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        # The byte after a record is set once the record is complete.
        self._stride = dtype.itemsize + 1
        try:
            self._file: IO[bytes] | None = tempfile.TemporaryFile(prefix="xview_loc-", buffering=0)  # noqa: SIM115
        except OSError:
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the file: a copy in a process that was not forked keeps nothing."""
        return {**self.__dict__, "_file": None}

    def get(self, number: int) -> np.void | None:
        """Return a record, None if it was not kept."""
        if self._file is None:
            return None
        data = os.pread(self._file.fileno(), self._stride, number * self._stride)
        if len(data) < self._stride or not data[-1]:
            return None
        record: np.void = np.frombuffer(bytearray(data), self._dtype, 1)[0]
        return record

    def put(self, number: int, record: np.void) -> None:
        """Keep a record if the disk allows it."""
        if self._file is None:
            return
        descriptor, start = self._file.fileno(), number * self._stride
        try:
            disk = os.fstatvfs(descriptor)
            if disk.f_bavail * disk.f_frsize < _LEAVE_FREE_BYTES:
                return
            data = record.tobytes()
            if os.pwrite(descriptor, data, start) == len(data):
                os.pwrite(descriptor, b"\1", start + len(data))
        except OSError:
            pass
