"""The bag writer and the recovery: whatever happens, nothing older than the last flush is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mcap.reader import make_reader
from rosbags.highlevel import AnyReader

from xview_loc.bags.recovery import BagError, Damage, bag_files, read_intact, recover_bag
from xview_loc.bags.ros_types import deserialize, header, message, serialize
from xview_loc.bags.writer import FLUSH_S, BagFullError, BagLimits, BagWriter

ROOT = Path(__file__).resolve().parent.parent
TOPICS = {"/a": "std_msgs/msg/Header", "/b": "std_msgs/msg/String"}
NO_FLOOR = BagLimits(min_free_bytes=0)
T0 = 1_700_000_000_000_000_000


def text(content: str) -> bytes:
    return serialize("std_msgs/msg/String", message("std_msgs/msg/String", data=content))


def fill(writer: BagWriter, count: int, size: int = 100, start: int = 0) -> None:
    rng = random.Random(start)
    for k in range(start, start + count):
        noise = rng.randbytes(size // 2).hex()
        writer.write("/b", T0 + k * 10**7, text(f"{k} {noise}"))


def numbers(folder: Path) -> list[int]:
    with AnyReader([folder]) as reader:
        return [
            int(reader.deserialize(raw, connection.msgtype).data.split()[0])
            for connection, _, raw in reader.messages()
            if connection.topic == "/b"
        ]


def test_every_reader_reads_it(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS, NO_FLOOR)
    fill(writer, 50)
    stamped = header(T0 + 5, "somewhere")
    writer.write("/a", T0 + 5, serialize("std_msgs/msg/Header", stamped))
    writer.close()
    writer.close()  # twice is fine
    assert numbers(tmp_path / "bag") == list(range(50))
    with AnyReader([tmp_path / "bag"]) as reader:
        assert {c.topic: (c.msgtype, c.msgcount) for c in reader.connections} == {
            "/a": ("std_msgs/msg/Header", 1),
            "/b": ("std_msgs/msg/String", 50),
        }
        assert reader.start_time == T0 and reader.end_time == T0 + 49 * 10**7 + 1
    (file,) = bag_files(tmp_path / "bag")
    with file.open("rb") as stream:
        found = [m for _, channel, m in make_reader(stream).iter_messages(topics=["/a"])]
    assert deserialize("std_msgs/msg/Header", found[0].data).frame_id == "somewhere"
    with pytest.raises(OSError, match="closed"):
        fill(writer, 1)
    with pytest.raises(FileExistsError):
        BagWriter(tmp_path / "bag", TOPICS)


def test_splits_by_size_by_time_and_on_request(tmp_path: Path) -> None:
    by_size = BagWriter(tmp_path / "size", TOPICS, BagLimits(split_bytes=3_000_000, min_free_bytes=0))
    fill(by_size, 80, size=100_000)
    by_size.close()
    assert 2 <= len(bag_files(tmp_path / "size")) <= 3 and numbers(tmp_path / "size") == list(range(80))
    by_time = BagWriter(tmp_path / "time", TOPICS, BagLimits(split_seconds=0.2, min_free_bytes=0))
    fill(by_time, 60)
    by_time.split()
    by_time.split()  # an empty file is not left behind
    fill(by_time, 5, start=60)
    by_time.close()
    assert len(bag_files(tmp_path / "time")) == 4 and numbers(tmp_path / "time") == list(range(65))


def test_full_bag_stops_with_a_clear_reason(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS, BagLimits(quota_bytes=4_000_000, min_free_bytes=0))
    with pytest.raises(BagFullError, match="quota of 4 MB"):
        fill(writer, 100, size=100_000)
    writer.close()
    assert writer.size_bytes <= 4_000_000
    kept = numbers(tmp_path / "bag")
    assert kept == list(range(len(kept))) and len(kept) > 10
    floor = BagWriter(tmp_path / "floor", TOPICS, BagLimits(min_free_bytes=1 << 60))
    with pytest.raises(BagFullError, match="must stay free"):
        fill(floor, 1)
    floor.close()


def test_full_bag_can_delete_its_oldest_files(tmp_path: Path) -> None:
    limits = BagLimits(
        split_bytes=1_000_000, quota_bytes=6_000_000, min_free_bytes=0, when_full="delete_oldest"
    )
    writer = BagWriter(tmp_path / "bag", TOPICS, limits)
    fill(writer, 200, size=100_000)
    writer.close()
    kept = numbers(tmp_path / "bag")
    assert writer.files_deleted > 0 and writer.size_bytes <= 6_000_000
    assert kept == list(range(kept[0], 200)) and kept[0] > 0


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Writing fails in the middle: the call says so, and what was flushed before is recovered."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        writer = BagWriter(disk / "bag", TOPICS, NO_FLOOR)
        fill(writer, 10, size=100_000)
        writer.flush()
        with pytest.raises(OSError, match="No space left"):
            fill(writer, 100, size=100_000, start=10)
            writer.flush()
        with pytest.raises(OSError, match="could not be completed"):
            writer.close()
        recover_bag(disk / "bag", tmp_path / "saved")
    finally:
        subprocess.run(["umount", disk], check=True)
    saved = numbers(tmp_path / "saved")
    assert len(saved) >= 10 and saved == list(range(len(saved)))


RECORDER = """
import sys
from pathlib import Path
from test_bags import BagWriter, NO_FLOOR, TOPICS, fill
writer = BagWriter(Path(sys.argv[1]), TOPICS, NO_FLOOR)
flush, k = writer.flush, 0
def flush_and_print():
    written = k
    flush()
    print(f"flushed {written}\\n", end="", flush=True)
writer.flush = flush_and_print
while True:
    fill(writer, 1, size=2000, start=k)
    k += 1
    print(f"written {k}\\n", end="", flush=True)
"""


@pytest.mark.parametrize("seed", range(2))
def test_killed_recorders_lose_at_most_the_last_flush(tmp_path: Path, seed: int) -> None:
    assert FLUSH_S <= 0.5  # a second is promised
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "test")])}
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(tmp_path / "bag")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    flushed: list[int] = []
    more = random.Random(seed).randrange(500)
    for line in process.stdout:
        if line.startswith("flushed"):
            flushed.append(int(line.split()[1]))
        if len(flushed) >= 2:
            more -= 1
            if more < 0:
                break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    before = {p.name: p.read_bytes() for p in (tmp_path / "bag").iterdir()}
    recover_bag(tmp_path / "bag", tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "bag").iterdir()} == before
    saved = numbers(tmp_path / "saved")
    assert saved == list(range(len(saved))) and len(saved) >= flushed[-1] > 0


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "bag"
    writer = BagWriter(folder, TOPICS, NO_FLOOR)
    for part in range(8):
        fill(writer, 20, size=3000, start=20 * part)
        writer.flush()
    writer.close()
    return bag_files(folder)[0]


@pytest.mark.parametrize("seed", range(9))
def test_damaged_files_give_what_is_intact(intact: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(intact.read_bytes())
    if seed % 3 == 0:
        del data[rng.randrange(len(data) // 2, len(data)) :]
    else:
        data[rng.randrange(2000, len(data) - 2000)] ^= 1 << rng.randrange(8)
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag" / "bag_0.mcap").write_bytes(data)
    damage = Damage()
    got = [m for m in read_intact(tmp_path / "bag" / "bag_0.mcap", damage) if m.topic == "/b"]
    found = [int(deserialize(m.kind, m.data).data.split()[0]) for m in got]
    # All that is there is right: every message that came back is byte for byte what was written.
    reference = {m.stamp_ns: m.data for m in read_intact(intact, Damage()) if m.topic == "/b"}
    assert all(reference[m.stamp_ns] == m.data for m in got)
    assert len(found) >= 60 and (damage or len(found) == 160)
    report = recover_bag(tmp_path / "bag", tmp_path / "saved")
    assert report.messages == len(found) and numbers(tmp_path / "saved") == found
    assert bool(report.damage) == bool(damage)


def test_what_cannot_be_recovered_says_so(tmp_path: Path, intact: Path) -> None:
    with pytest.raises(BagError, match="holds no"):
        recover_bag(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag" / "x_0.mcap").write_bytes(b"not a bag, but long enough to be taken for one")
    with pytest.raises(BagError, match="not an MCAP file"):
        list(read_intact(tmp_path / "bag" / "x_0.mcap", Damage()))
    (tmp_path / "bag" / "x_1.mcap").write_bytes(intact.read_bytes())
    report = recover_bag(tmp_path / "bag", tmp_path / "out")
    assert report.messages == 160 and set(report.damage) == {"x_0.mcap"}
    with pytest.raises(BagError, match="exists already"):
        recover_bag(tmp_path / "bag", tmp_path / "out")


def test_a_bad_stamp_does_not_spoil_the_bag(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS, NO_FLOOR)
    fill(writer, 3)
    with pytest.raises(ValueError, match="cannot be written"):
        writer.write("/b", -1, text("before 1970"))
    fill(writer, 3, start=3)
    writer.close()
    assert numbers(tmp_path / "bag") == list(range(6))


def test_threads_may_share_a_writer(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS, NO_FLOOR)
    threads = [threading.Thread(target=fill, args=(writer, 50), kwargs={"start": 50 * k}) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert sorted(numbers(tmp_path / "bag")) == list(range(200))
