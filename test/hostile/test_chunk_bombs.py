"""Bags of kilobytes whose chunks, messages or files unpack to gigabytes: refused in bounded memory."""

from __future__ import annotations

import bz2
import struct
from collections.abc import Iterator
from pathlib import Path

import lz4.frame
import pytest
import zstandard
from mcap.writer import CompressionType, Writer
from peak_memory import peak_mb
from rosbags.highlevel import AnyReader
from rosbags.rosbag1.reader import decompressors
from rosbags.rosbag2 import Writer as RosbagWriter
from rosbags.rosbag2.enums import CompressionFormat, CompressionMode, StoragePlugin

import xview_loc.bags.chunks  # noqa: F401
from xview_loc.bags.metadata import FileSummary, write_metadata
from xview_loc.bags.recovery import recover_bag
from xview_loc.errors import UserError
from xview_loc.recordings.importer import STORE, import_bag
from xview_loc.recordings.tracks import read_track
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView

FIX = "sensor_msgs/msg/NavSatFix"
READ = """
import sys
from pathlib import Path
from xview_loc.bags.recovery import recover_bag
from xview_loc.errors import UserError
from xview_loc.recordings.importer import import_bag
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.statistics import pair_statistics
from xview_loc.recordings.tracks import read_track
bag = Path(sys.argv[1])
readers = [
    lambda: read_track(bag),
    lambda: import_bag(bag, bag.with_name("pairs"), None),
    lambda: pair_statistics(PairBag(bag)),
    lambda: PairBag(bag).session(),
    lambda: recover_bag(bag, bag.with_name("recovered")),
]
for read in readers:
    try:
        print("read", read())
    except UserError as error:
        print("refused", error)
"""
GIGABYTES = 3


def zeros(compression: str) -> bytes:
    """Pack three gigabytes of zeros, without their size."""
    parts = (bytes(64 << 20) for _ in range(16 * GIGABYTES))
    if compression == "zstd":
        zstd = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        return b"".join(map(zstd.compress, parts)) + zstd.flush()
    packer = lz4.frame.LZ4FrameCompressor()
    return bytes(packer.begin()) + b"".join(map(packer.compress, parts)) + packer.flush()


@pytest.fixture(scope="module", params=["zstd", "lz4"])
def packed(request: pytest.FixtureRequest) -> Iterator[tuple[str, bytes]]:
    yield request.param, zeros(request.param)


@pytest.mark.parametrize("claimed", [1000, 200 << 20, GIGABYTES << 30, 1 << 60])
def test_a_chunk_that_unpacks_to_gigabytes(tmp_path: Path, packed: tuple[str, bytes], claimed: int) -> None:
    compression, data = packed
    folder = tmp_path / "bag"
    folder.mkdir()
    kind = CompressionType.ZSTD if compression == "zstd" else CompressionType.LZ4
    with (folder / "bag_0.mcap").open("wb") as file:
        writer = Writer(file, compression=kind)
        writer.start(profile="ros2", library="x")
        schema = writer.register_schema(FIX, "ros2msg", b"float64 latitude")
        for topic in ("/fix", "/pair/image", "/session"):
            writer.add_message(writer.register_channel(topic, "cdr", schema), 1, bytes(100), 1)
        # The packed zeros in the place of what was written.
        with pytest.MonkeyPatch.context() as patch:
            for module in (zstandard, lz4.frame):
                patch.setattr(module, "compress", lambda content: data)
            writer._Writer__finalize_chunk()  # type: ignore[attr-defined]
        index = writer._Writer__chunk_indices[-1]  # type: ignore[attr-defined]
        honest, index.uncompressed_size = index.uncompressed_size, claimed
        writer.finish()
    content = (folder / "bag_0.mcap").read_bytes()
    at = content.index(struct.pack("<Q", honest))
    (folder / "bag_0.mcap").write_bytes(content[:at] + struct.pack("<Q", claimed) + content[at + 8 :])
    summary = FileSummary("bag_0.mcap")
    summary.add("/fix", 1)
    write_metadata(folder, [summary], {"/fix": FIX})
    assert sum(path.stat().st_size for path in folder.iterdir()) < 32 << 20
    peak, lines = peak_mb(READ, folder)
    assert peak < 1200, lines
    # A track of no position is read as far as the damage; recovery skips it.
    assert len(lines.splitlines()) == 5 and lines.count("refused") >= 3


def test_chunks_of_ros1() -> None:
    for compression, data in (("lz4", zeros("lz4")), ("bz2", bz2.compress(bytes(300 << 20)))):
        with pytest.raises(ValueError, match="more than 268"):
            decompressors[compression](data)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording") / "drive"
    write_bag(drive(build_city(1, size_m=300.0), 3, view=PanoramaView(32, 128)), folder)
    return folder


def compressed(recording: Path, out: Path, mode: CompressionMode) -> Path:
    """Write a bag as ``ros2 bag record --compression-mode`` does."""
    writer = RosbagWriter(out, version=9, storage_plugin=StoragePlugin.MCAP)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with AnyReader([recording], default_typestore=STORE) as reader, writer:
        for given in reader.connections:
            own = writer.add_connection(given.topic, given.msgtype, typestore=reader.typestore)
            for _, stamp, raw in reader.messages([given]):
                writer.write(own, stamp, raw)
    return out


@pytest.mark.parametrize("mode", [CompressionMode.MESSAGE, CompressionMode.FILE])
def test_bags_that_rosbag2_compressed_are_read(
    recording: Path, tmp_path: Path, mode: CompressionMode
) -> None:
    bag = compressed(recording, tmp_path / "bag", mode)
    track = read_track(recording, "/fix")
    assert read_track(bag, "/fix") == track
    assert import_bag(bag, tmp_path / "pairs", None).pairs == 3
    if mode is CompressionMode.FILE:
        with pytest.raises(UserError, match=r"holds no \.mcap files"):
            recover_bag(bag, tmp_path / "recovered")
    else:
        assert not recover_bag(bag, tmp_path / "recovered").damage
        assert read_track(tmp_path / "recovered", "/fix") == track


@pytest.mark.parametrize("mode", [CompressionMode.MESSAGE, CompressionMode.FILE])
def test_a_message_or_a_file_that_unpacks_to_gigabytes(
    recording: Path, tmp_path: Path, mode: CompressionMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag, data = tmp_path / "bag", zeros("zstd")
    if mode is CompressionMode.FILE:
        compressed(recording, bag, mode)
        (bag / "bag.mcap.zstd").write_bytes(data)
    else:
        monkeypatch.setattr("rosbags.rosbag2.writer.zstd.compress", lambda _: data)
        compressed(recording, bag, mode)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    peak, lines = peak_mb(READ.replace("read_track(bag)", "read_track(bag, '/fix')"), bag)
    assert peak < 1200, lines
    assert len(lines.splitlines()) == 5 and lines.count("refused") >= 3
    assert ("a chunk or message of more than 268" in lines) or ("more than 100 times its size" in lines)
    assert list(temporary.iterdir()) == []
