"""Damaged messages of every type, with a fixed seed, through the running nodes."""

from __future__ import annotations

import array
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import simplejpeg

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

import test_pair_logger as logger
from geometry_msgs.msg import PoseWithCovarianceStamped
from localizer_rig import LAT, LON, Rig, picture, running, stamp
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message, serialize_message
from ros_harness import Bench, bench, pick_domain
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu, NavSatFix

from xview_loc.nodes.inputs import message_class
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.vehicle.input_types import INPUT_TYPES

DOMAIN = pick_domain()
MESSAGES = 500
INTRINSICS = [30.0, 0.0, 32.0, 0.0, 30.0, 16.0, 0.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(DOMAIN, tmp_path_factory.mktemp("localizer")) as r:
        yield r


class Damaging:
    """A publisher that damages every message.

    sent: messages. hopeless: those that no node can take: their bytes are no message, or their stamp is no
    time. whole: the stamps of the images whose damage nobody can see: it hit pixels without a checksum.
    """

    def __init__(self, publisher: Any, rng: random.Random) -> None:
        self._publisher, self._rng = publisher, rng
        self.sent = self.hopeless = 0
        self.whole: set[int] = set()

    def publish(self, message: Any) -> None:
        data = damaged(serialize_message(message), self._rng)
        self._publisher.publish(data)
        self.sent += 1
        try:
            arrived = deserialize_message(data, type(message))
        except Exception:
            self.hopeless += 1
            return
        if not hasattr(message, "header") or isinstance(message, CameraInfo | PoseWithCovarianceStamped):
            return  # the stamp does not matter
        if stamp(arrived) <= 0 or arrived.header.stamp.nanosec >= 10**9:
            self.hopeless += 1
        elif shows_the_same(arrived, message):
            self.whole.add(stamp(arrived))


def shows_the_same(arrived: Any, sent: Any) -> bool:
    """Whether an image that arrived is the one that was sent, as far as anybody can know."""
    if isinstance(sent, Image):
        # A narrower or a little lower one looks like one with padding.
        narrower = 0 < arrived.width <= sent.width and len(arrived.data) == len(sent.data)
        lower = 7 * sent.height <= 8 * arrived.height <= 8 * sent.height
        return narrower and lower and (arrived.step, arrived.encoding) == (sent.step, sent.encoding)
    if not isinstance(sent, CompressedImage):
        return False
    data = bytes(arrived.data)
    if data == bytes(sent.data):
        return True
    try:
        # JPEG has no checksum: what libjpeg takes without a warning, or with a little padding, is a picture.
        simplejpeg.decode_jpeg(data)
    except ValueError as error:
        return "extraneous bytes before marker 0xd9" in str(error)
    return True


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut the end, or write over a stretch; half of it in the first 100 bytes."""
    changed = bytearray(data)
    how, reach = rng.randrange(3), len(data) if rng.random() < 0.5 else min(100, len(data))
    if how == 0:
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif how == 1:
        del changed[rng.randrange(4, len(changed)) :]
    else:
        start = rng.randrange(reach)
        stretch = min(rng.randrange(1, 33), len(changed) - start)
        changed[start : start + stretch] = rng.randbytes(stretch)
    # DDS pads to a multiple of four bytes, and delivers the padding.
    return bytes(changed) + bytes(-len(changed) % 4)


def memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def count(b: Bench, prefix: str) -> int:
    """The sum of the counters of /diagnostics whose names begin like this."""
    assert b.status is not None
    return sum(int(v.value) for v in b.status.values if v.key.startswith(prefix))


def counts(b: Bench, name: str) -> tuple[int, int]:
    """Messages of an input received and refused, so far."""
    return count(b, f"{name}_received"), count(b, f"{name}_rejected/")


def frames(b: Bench) -> int:
    """Frames accounted for."""
    return sum(count(b, f"frames_{fate}") for fate in ("accepted", "rejected/", "dropped"))


def encoded(extension: str, ns: int) -> array.array[int]:
    return array.array("B", cv2.imencode(extension, picture(ns // 1_000_000))[1].tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw", ".png", ".jpg"])
def test_no_damaged_frame_gives_a_pose(rig: Rig, form: str) -> None:
    b = rig.bench
    kind = "raw" if form == "raw" else "compressed"
    with rig.configured(qos_depth=1000, model="stub-pinhole", image_transport=kind):
        rig.send_info(rig.step())
        rig.good_frame()
        b.wait_diagnosis()
        before, received, known = memory_mb(rig.node.process.pid), count(b, "image_received"), frames(b)
        good, sent = rig.image, Damaging(rig.image, random.Random(form))
        poses = len(rig.poses)
        for sending in range(1, MESSAGES + 1):
            ns = rig.step(0.1)
            # A busy node drops all but the newest: fifty at a time, and it takes the last, which is whole.
            last = sending % 50 == 0
            rig.image = good if last else sent
            rig.send_fix(ns)
            rig.send_heading(ns)
            rig.send_image(ns, **({} if form == "raw" else {"data": encoded(form, ns)}))
            b.executor.spin_once(timeout_sec=0.01)
            if last:
                sent.whole.add(ns)
                due = received + sending
                b.wait(lambda due=due: count(b, "image_received") == due, what="the images so far")
        rig.image = good
        # Every one is counted, and has a fate.
        b.wait(lambda: count(b, "image_received") == received + MESSAGES, what="the images")
        b.wait(lambda: frames(b) + count(b, "image_rejected/") == known + MESSAGES, what="their fates")
        b.wait(lambda: stamp(rig.poses[-1]) == ns, what="the pose of the last, which is whole")
        stamps = {stamp(pose) for pose in rig.poses[poses:]}
        assert stamps and stamps <= sent.whole
        assert "internal_error" not in rig.node.log
        assert memory_mb(rig.node.process.pid) < before + 300
        rig.step(60.0)
        rig.send_info(rig.step())
        rig.good_frame()


@pytest.mark.slow
def test_damaged_messages_of_every_type_do_no_harm(rig: Rig) -> None:
    b, rng = rig.bench, random.Random(0)
    types = [
        ("fix", NavSatFix),
        ("camera_info", CameraInfo),
        ("initialpose", PoseWithCovarianceStamped),
        *((name, message_class(kind)) for name in ("heading", "odom") for kind in INPUT_TYPES[name].values()),
    ]
    with rig.configured(filter=True, qos_depth=1000, model="stub-pinhole"):
        rig.send_info(rig.step())
        rig.good_frame()
        before = memory_mb(rig.node.process.pid)
        # They change their types.
        for publisher in (rig.heading, rig.odom):
            b.node.destroy_publisher(publisher)
        for name, kind in types:
            good = b.publisher(kind, f"/{name}")
            b.wait(good.get_subscription_count, what=name)
            b.wait_diagnosis()
            received, refused = counts(b, name)
            output = Damaging(good, rng)
            for _ in range(MESSAGES):
                output.publish(whole(rig, kind))
                b.executor.spin_once(timeout_sec=0.001)
                assert rig.node.alive(), f"{name}: {rig.node.log[-2000:]}"
            # Those whose bytes are no message are counted too, which rclpy would drop without a word.
            if name == "initialpose":  # only the last one is kept: what counts is that they do no harm
                b.wait_diagnosis()
                assert counts(b, name)[1] > refused
            else:
                b.wait(lambda: count(b, f"{name}_received") == received + MESSAGES, what=name)  # noqa: B023
                assert counts(b, name)[1] >= refused + output.hopeless > refused
            b.node.destroy_publisher(good)
            b.wait(lambda: b.node.count_publishers(f"/{name}") <= (name in ("fix", "camera_info")))  # noqa: B023
        assert memory_mb(rig.node.process.pid) < before + 300
        assert "internal_error" not in rig.node.log
        rig.heading, rig.odom = b.publisher(Imu, "/heading"), b.publisher(Odometry, "/odom")
        rig.ready()
        rig.step(60.0)
        rig.send_info(rig.step())
        rig.good_frame()


def whole(rig: Rig, kind: Any) -> Any:
    """A good message of a type, a little later than the last one."""
    message = kind()
    if hasattr(message, "header"):
        rig.header(message, rig.step(0.05))
        message.header.frame_id = "map"
    if kind is NavSatFix:
        message.latitude, message.longitude, message.status.status = LAT, LON, 0
    elif kind is CameraInfo:
        return rig.header(CameraInfo(width=64, height=32, k=INTRINSICS, d=[0.0] * 5), rig.ns)
    return message


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_no_damaged_frame_becomes_a_pair(tmp_path: Path, compressed: bool) -> None:
    domain, rng = DOMAIN + 1 + compressed, random.Random(0)
    with bench(domain) as here:
        node = logger.start(tmp_path, domain, map="", keyframe_distance_m=0.1)
        try:
            vehicle = logger.Rig(here, compressed)
            vehicle.ready()
            vehicle.drive(5)
            here.wait_diagnosis()
            known = frames(here)
            before, good = memory_mb(node.process.pid), vehicle.image
            first = vehicle.at
            vehicle.image = sent = Damaging(good, rng)
            # Every frame is a keyframe.
            vehicle.drive(MESSAGES)
            vehicle.image = good
            here.wait(lambda: frames(here) + count(here, "image_rejected/") == known + MESSAGES)
            for name in ("fix", "heading", "odom"):
                good, damaging = getattr(vehicle, name), Damaging(getattr(vehicle, name), rng)
                setattr(vehicle, name, damaging)
                refused = counts(here, name)[1]
                vehicle.drive(MESSAGES)
                setattr(vehicle, name, good)
                here.wait_diagnosis()
                assert counts(here, name)[1] >= refused + damaging.hopeless > refused
            assert memory_mb(node.process.pid) < before + 300
            assert "internal_error" not in node.log
            vehicle.drive(5)
            ok, message = vehicle.call("stop")
            assert ok, message
        finally:
            assert node.stop() == 0, node.log
    pairs = PairBag(logger.newest(tmp_path))
    stamps = [pairs[k].stamp_ns for k in range(len(pairs)) if pairs[k].image().size]
    strange = set(stamps) - set(vehicle.images) - sent.whole
    damaged_frames = {at for at in vehicle.images if first < at <= first + MESSAGES * 10**8}
    assert not strange and damaged_frames & set(stamps) <= sent.whole
    assert f"recorded {len(pairs)} pairs" in message
