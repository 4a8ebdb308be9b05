"""Common parts of the published benchmarks: label files, images, and the paper's split of the target area."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.datasets.base import DatasetError
from xview_loc.errors import reason
from xview_loc.files import read_regular
from xview_loc.images import Image, ImageError, decode_compressed

# First and last share of the target area's samples in each part.
PARTS = {"adapt": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
# The authors' release stores its permutation and the panoramas' turns in files. Both come from this seed of
# NumPy's legacy generator, whose stream never changes.
_SEED = 0
_MAX_LIST_BYTES, _MAX_IMAGE_BYTES = 256 << 20, 256 << 20


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file. Raises DatasetError if it cannot be read or is empty."""
    try:
        lines = read_regular(path, _MAX_LIST_BYTES).decode().splitlines()
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not a text file") from None
    if not lines:
        raise DatasetError(f"{path} is empty")
    return lines


def read_image(path: Path, named_in: str) -> Image:
    """Read a JPEG or PNG file. Raises DatasetError, which names the line ``named_in`` that lists the file."""
    try:
        return decode_compressed(read_regular(path, _MAX_IMAGE_BYTES))
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ImageError as error:
        problem = f"cannot be used: {error}"
    raise DatasetError(f"{path} {problem} (named in {named_in})")


def read_numbers(path: Path) -> NDArray[Any]:
    """Read numbers (N,) from a ``.npy`` file or a text file with one on each line. Raises DatasetError."""
    if path.suffix != ".npy":
        numbers = []
        for number, line in enumerate(read_lines(path), start=1):
            try:
                numbers.append(float(line))
            except ValueError:
                raise DatasetError(f"{path} line {number} is not a number: {line!r}") from None
        return np.array(numbers)
    try:
        values = np.load(io.BytesIO(read_regular(path, _MAX_LIST_BYTES)), allow_pickle=False)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except Exception as error:  # damaged files raise anything, MemoryError to TokenError
        raise DatasetError(f"{path} is not a .npy file: {reason(error)}") from None
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise DatasetError(f"{path} must hold a list of numbers, not {values.dtype} of shape {values.shape}")
    return values


def part_of(part: str, count: int, order: Path | None = None) -> NDArray[np.int64]:
    """Return the indices of one of PARTS among ``count`` samples, in the permutation's order.

    ``order`` is a file with the permutation (see :func:`read_numbers`); None uses the paper's authors', which
    depends on ``count`` alone. Raises DatasetError.
    """
    permutation = np.random.RandomState(_SEED).permutation(count) if order is None else read_numbers(order)
    if not np.array_equal(np.sort(permutation), np.arange(count)):
        raise DatasetError(f"{order} is not a permutation of the numbers 0 to {count - 1}")
    first, last = (int(share * count) for share in PARTS[part])
    return permutation[first:last].astype(np.int64)


def turns(count: int, path: Path | None = None) -> NDArray[np.float64]:
    """Return a random turn for each of ``count`` panoramas, as a share 0..1 of a whole one.

    ``path`` is a file with the turns; None uses the paper's authors'. Raises DatasetError.
    """
    if path is None:
        return np.random.RandomState(_SEED).random_sample(count)
    values = read_numbers(path).astype(np.float64)
    if len(values) != count or not ((values >= 0.0) & (values <= 1.0)).all():
        raise DatasetError(f"{path} does not hold {count} shares of a turn between 0 and 1")
    return values


def digest(values: Iterable[object]) -> str:
    """Return a hash of the values' texts, 16 hex digits, for a dataset's name."""
    return hashlib.sha256("".join(f"{value}\n" for value in values).encode()).hexdigest()[:16]
