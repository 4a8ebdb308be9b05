"""Files that disappear under the writer: noticed at the next flush, nothing is counted that is not there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xview_loc.bags.writer import BagLimits, BagLostError, BagWriter

TOPICS = {"/a": "std_msgs/msg/String"}
MESSAGE = b"\x00\x01\x00\x00\x02\x00\x00\x00a\x00"


def deleted(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def truncated(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("damage", [deleted, replaced, truncated, gone])
def test_a_file_that_is_lost(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "bag"
    writer = BagWriter(folder, TOPICS, BagLimits(min_free_bytes=0))
    for stamp in range(7):
        writer.write("/a", stamp, MESSAGE)
    writer.split()
    for stamp in range(7, 10):
        writer.write("/a", stamp, MESSAGE)
    writer.flush()
    assert writer.count("/a") == 10 and writer.failure is None
    damage(folder / writer.current_file)
    while writer.failure is None:
        time.sleep(0.01)  # the flushing thread notices it
    assert isinstance(writer.failure, BagLostError) and damage.__name__ in str(writer.failure).replace(
        "deleted", "deleted gone"
    )
    assert writer.lost and writer.count("/a") == (0 if damage is gone else 7)
    with pytest.raises(BagLostError):
        writer.write("/a", 10, MESSAGE)
    with pytest.raises(BagLostError):
        writer.split_if_due()
    writer.close()
    assert folder.exists() == (damage is not gone)


def test_the_logger_goes_on_in_a_new_bag(tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from ros_harness import bench, pick_domain
    from test_pair_logger import Rig, newest, start

    from xview_loc.recordings.pairs import PairBag

    domain = pick_domain()
    with bench(domain) as here:
        node = start(tmp_path, domain, map="")
        try:
            rig = Rig(here)
            rig.ready()
            rig.drive(40)
            here.wait(lambda: here.value("pairs") == "14", what="the pairs")
            first = newest(tmp_path)
            shutil.rmtree(first)
            here.wait_diagnosis("file_lost", "ended after 0 pairs", "now into another bag")
            here.wait(lambda: here.value("pairs") == "0", what="the new bag")
            rig.drive(40)
            stopped, message = rig.call("stop")
            assert stopped, message
            pairs = PairBag(newest(tmp_path))
            assert not first.exists() and f"recorded {len(pairs)} pairs" in message and len(pairs) >= 13
        finally:
            assert node.stop() == 0, node.log
    assert "Traceback" not in node.log
