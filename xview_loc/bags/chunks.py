"""Bounds what readers of bags unpack: a compressed chunk, message or file of kilobytes can hold gigabytes.

The libraries unpack them at whatever size they have, so their functions are replaced here, for the process.
"""

from __future__ import annotations

import bz2
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, BinaryIO

import lz4.frame
import mcap.stream_reader
import rosbags.rosbag1.reader
import rosbags.rosbag2.reader
import rosbags.rosbag2.storage_mcap
import zstandard
from mcap.records import Chunk

# Usual chunks have a megabyte, or one message if that is larger.
LARGEST_CHUNK = 256 << 20
# Files that rosbag2 compressed unpack into a temporary folder: to this many times their size, plus a chunk.
_LARGEST_RATIO = 100
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_data_stream = mcap.stream_reader.get_chunk_data_stream


def unpack(data: bytes, compression: str, size: int = LARGEST_CHUNK) -> bytes:
    """Unpack at most ``size`` bytes. Raises ValueError if there are more, or if that is too large a chunk."""
    if size > LARGEST_CHUNK:
        raise ValueError(f"a chunk of {size / 1e6:.0f} MB, at most {LARGEST_CHUNK / 1e6:.0f} MB are read")
    if compression == "zstd":
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            content: bytes = reader.read(size + 1)
    else:
        unpacker: Any = lz4.frame.LZ4FrameDecompressor() if compression == "lz4" else bz2.BZ2Decompressor()
        content = unpacker.decompress(data, size + 1)
    if len(content) > size:
        raise ValueError(f"a chunk or message of more than {size / 1e6:.1f} MB")
    return content


def unpack_message(data: bytes) -> bytes:
    """Unpack a message that rosbag2 compressed, and return any other as it is. Raises ValueError."""
    # CDR begins with a zero.
    if not data.startswith(_ZSTD_MAGIC):
        return data
    try:
        return unpack(data, "zstd")
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged message: {error}") from None


class _BoundedFile:
    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"a file that unpacks to more than {_LARGEST_RATIO} times its size")
        return data


@contextmanager
def _open_bounded(packed: BinaryIO, mode: str) -> Iterator[_BoundedFile]:
    limit = _LARGEST_RATIO * os.fstat(packed.fileno()).st_size + LARGEST_CHUNK
    with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True, closefd=False) as file:
        yield _BoundedFile(file, limit)


def _bounded(chunk: Chunk, validate_crc: bool = False) -> Any:
    if chunk.compression in ("zstd", "lz4"):
        data = unpack(chunk.data, chunk.compression, chunk.uncompressed_size)
        chunk = replace(chunk, compression="", data=data)
    return _data_stream(chunk, validate_crc)


mcap.stream_reader.get_chunk_data_stream = _bounded
rosbags.rosbag2.storage_mcap.DECOMPRESSORS.update(
    zstd=lambda data, size: unpack(data, "zstd", size), lz4=lambda data, size: unpack(data, "lz4", size)
)
_zstd: Any = SimpleNamespace(decompress=unpack_message, open=_open_bounded)
rosbags.rosbag2.reader.zstd = _zstd
rosbags.rosbag1.reader.decompressors.update(
    bz2=lambda data: unpack(data, "bz2"), lz4=lambda data: unpack(data, "lz4")
)
