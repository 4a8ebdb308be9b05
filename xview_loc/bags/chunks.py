"""Bounds what readers of bags unpack: a compressed chunk of kilobytes can hold gigabytes.

The libraries unpack chunks at whatever size they have, so their functions are replaced here, for the process.
"""

from __future__ import annotations

import bz2
from dataclasses import replace
from typing import Any

import lz4.frame
import mcap.stream_reader
import rosbags.rosbag1.reader
import rosbags.rosbag2.storage_mcap
import zstandard
from mcap.records import Chunk

# Usual chunks have a megabyte, or one message if that is larger.
LARGEST_CHUNK = 256 << 20

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
        raise ValueError(f"a chunk of more than {size / 1e6:.1f} MB")
    return content


def _bounded(chunk: Chunk, validate_crc: bool = False) -> Any:
    if chunk.compression in ("zstd", "lz4"):
        data = unpack(chunk.data, chunk.compression, chunk.uncompressed_size)
        chunk = replace(chunk, compression="", data=data)
    return _data_stream(chunk, validate_crc)


mcap.stream_reader.get_chunk_data_stream = _bounded
rosbags.rosbag2.storage_mcap.DECOMPRESSORS.update(
    zstd=lambda data, size: unpack(data, "zstd", size), lz4=lambda data, size: unpack(data, "lz4", size)
)
rosbags.rosbag1.reader.decompressors.update(
    bz2=lambda data: unpack(data, "bz2"), lz4=lambda data: unpack(data, "lz4")
)
