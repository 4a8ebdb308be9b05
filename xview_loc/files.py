"""Files and folders that appear whole, bounded reads, files that carry a digest; what nodes keep."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_DIGEST_BYTES = hashlib.sha256().digest_size


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for pipes, devices and folders."""
    # A pipe without a writer would block for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return open(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes. Raises OSError, as :func:`open_regular`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Not up to the limit: Python sets aside as much memory as is asked for.
        content = file.read(size + 1) if size <= limit else b""
    if (size := max(size, len(content))) > limit:
        raise OSError(errno.EFBIG, f"it has {size / 1e6:.0f} MB, at most {limit / 1e6:.0f} MB are read")
    return content


def others_can_write(path: str | os.PathLike[str]) -> bool:
    """Return whether a user who is neither this one nor root can change a file, or a folder's content.

    Members of the file's group are trusted. Raises OSError.
    """
    status = os.stat(path)
    owners = {status.st_uid, os.lstat(path).st_uid}  # a link's owner can lead it elsewhere
    return not owners <= {0, os.getuid()} or bool(status.st_mode & stat.S_IWOTH)


def write_hashed(path: Path, content: bytes) -> None:
    """Write a file as :func:`write_whole` does, with the SHA-256 of its content at its end. Raises OSError.

    Readers of ZIP archives (NPZ, torch.save) pass over these 32 bytes.
    """
    write_whole(path, content + hashlib.sha256(content).digest())


def read_hashed(path: Path) -> bytes:
    """Return the content written by :func:`write_hashed`. Raises OSError, ValueError if it is damaged."""
    data = path.read_bytes()
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} does not have the SHA-256 that it carries")
    return content


def state_folder() -> Path:
    """Return the folder of what nodes keep: ``$ROS_HOME/xview_loc``, by default ``~/.ros/xview_loc``."""
    return Path(os.environ.get("ROS_HOME") or "~/.ros").expanduser() / "xview_loc"


def check_writable(path: Path) -> None:
    """Raise OSError if a file cannot be made at ``path``: called before the work that would be lost."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically: even after a power loss it is the old or the new one. Raises OSError."""
    # A rename is atomic within a folder only.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Not for everyone to write, whatever the umask.
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o664)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A full disk names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # renamed, or never made
            temporary.unlink()
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a folder to make; it becomes ``path`` at the end, and is deleted after an error.

    Its own name is that of ``path`` already: a bag's files carry it. Raises OSError, also if ``path`` exists,
    or if another user could change what is being written.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, "it exists already", str(path))
    partial = path.parent / ".partial" / path.name
    partial.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if others_can_write(partial.parent):
        raise PermissionError(errno.EACCES, "another user can write to it", str(partial.parent))
    if partial.exists():  # left by a run that was killed
        shutil.rmtree(partial)
    try:
        yield partial
        partial.rename(path)
    except OSError as error:
        if error.filename is None and error.strerror:  # a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # another run may be under way
            partial.parent.rmdir()


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that new and renamed files survive a power loss. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
