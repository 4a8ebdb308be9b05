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


@pytest.mark.parametrize(
    ("damage", "says"),
    [(deleted, "deleted"), (replaced, "replaced"), (truncated, "truncated"), (gone, "deleted")],
)
def test_a_file_that_is_lost(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
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
    assert isinstance(writer.failure, BagLostError) and says in str(writer.failure)
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

    from xview_loc.recordings.pair_reader import PairBag

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


@pytest.mark.slow
def test_two_loggers_record_into_one_folder_at_the_same_time(tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from contextlib import ExitStack

    from ros_harness import bench, pick_domain
    from test_pair_logger import Rig, start

    from xview_loc.recordings.pair_reader import PairBag

    domain, shared = pick_domain(), tmp_path / "shared"
    with ExitStack() as stack:
        rigs, nodes = [], []
        for k in range(2):
            (folder := tmp_path / str(k)).mkdir()
            own = {"directory": str(shared), "vehicle": str(k)}
            nodes.append(start(folder, domain + k, map="", record_on_start=False, **own))
            stack.callback(nodes[k].stop)
            rigs.append(Rig(stack.enter_context(bench(domain + k))))
            rigs[k].ready()
            rigs[k].at += k  # so that the stamps tell them apart
        for _ in range(3):
            calls = [(rig, rig.here.begin_trigger("/pair_logger/start")) for rig in rigs]
            for rig, call in calls:
                rig.here.wait(call.done, what="the start")
                assert call.result().success, call.result().message
            for rig in rigs:
                rig.drive(3, speed=30.0)
            for rig in rigs:
                assert rig.call("stop")[0]
    bags = sorted(shared.iterdir())
    assert len(bags) == 6
    for bag in bags:
        pairs = PairBag(bag)
        stamps = [pairs[k].stamp_ns for k in range(len(pairs))]
        (one,) = [rig for rig in rigs if set(stamps) <= rig.images.keys()]
        assert len(stamps) == 3 and pairs.session()["vehicle"] == str(rigs.index(one))


@pytest.mark.slow
def test_clocks_that_jump_cost_no_pair(tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from ros_harness import bench, pick_domain
    from rosgraph_msgs.msg import Clock
    from test_pair_logger import NS, Rig, newest, start

    from xview_loc.recordings.pair_reader import PairBag

    domain, hour = pick_domain(), 3600 * NS
    with bench(domain) as here:
        node = start(tmp_path, domain, map="", use_sim_time=True, max_image_delay_s=60.0)
        try:
            clock, rig = here.publisher(Clock, "/clock"), Rig(here)
            rig.ready()
            begin = rig.at
            expected: dict[int, tuple[float, float]] = {}
            # Back by an hour, on by two, and the beginning again and again, as a bag that loops.
            for at in (begin, begin - hour, begin + hour, *[begin] * 4):
                rig.at = at
                message = Clock()
                message.clock.sec = at // NS
                clock.publish(message)
                rig.drive(10, speed=30.0)
                expected |= rig.places
                here.wait_diagnosis()
            assert "stamps went back" in here.text() and "image_delay" not in here.text()
            assert int(here.value("time_restarts")) == 5
            assert rig.call("stop")[0]
        finally:
            assert node.stop() == 0, node.log
    assert "Traceback" not in node.log
    # Not a line for each message.
    assert node.log.count("went back in time") <= 5
    pairs = PairBag(newest(tmp_path))
    assert len(pairs) == 7 * 10
    for k in range(len(pairs)):
        pair = pairs[k]
        if pair.stamp_ns < begin or pair.stamp_ns > begin + hour // 2:  # those of the loop drove elsewhere
            lat, lon = expected[pair.stamp_ns]
            assert abs(pair.lat - lat) < 1e-9 and abs(pair.lon - lon) < 1e-9
