"""Damaged messages of every type, with a fixed seed, through the running localizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import PoseWithCovarianceStamped
from localizer_rig import LAT, LON, Rig, picture, running
from nav_msgs.msg import Odometry
from rclpy.serialization import serialize_message
from ros_harness import pick_domain
from sensor_msgs.msg import CameraInfo, Image, Imu, NavSatFix

DOMAIN = pick_domain()
MESSAGES = 500


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(DOMAIN, tmp_path_factory.mktemp("localizer")) as r:
        yield r


def whole(rig: Rig) -> dict[str, Any]:
    """A good message of each type, by topic."""
    heading = Imu()
    heading.orientation.w = 1.0
    image = Image(height=32, width=64, encoding="rgb8", step=192, data=picture(1).tobytes())
    k = [30.0, 0.0, 32.0, 0.0, 30.0, 16.0, 0.0, 0.0, 1.0]
    messages = {
        "/image": image,
        "/fix": NavSatFix(latitude=LAT, longitude=LON),
        "/heading": heading,
        "/odom": Odometry(child_frame_id="base_link"),
        "/camera_info": CameraInfo(width=64, height=32, k=k, d=[0.0] * 5, distortion_model="plumb_bob"),
        "/initialpose": PoseWithCovarianceStamped(),
    }
    for message in messages.values():
        rig.header(message, rig.ns)
        message.header.frame_id = "map"
    return messages


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut the end, or write over a stretch."""
    changed = bytearray(data)
    how = rng.randrange(3)
    if how == 0:
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del changed[rng.randrange(4, len(changed)) :]
    else:
        start = rng.randrange(len(changed))
        stretch = min(rng.randrange(1, 33), len(changed) - start)
        changed[start : start + stretch] = rng.randbytes(stretch)
    return bytes(changed)


def memory_mb(rig: Rig) -> float:
    status = Path(f"/proc/{rig.node.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.slow
def test_damaged_messages_of_every_type_do_no_harm(rig: Rig) -> None:
    b, rng = rig.bench, random.Random(0)
    with rig.configured(filter=True, qos_depth=1000, model="stub-pinhole"):
        rig.send_info(rig.step())
        rig.good_frame()
        before = memory_mb(rig)
        for topic, message in whole(rig).items():
            output = b.publisher(type(message), topic)
            b.wait(output.get_subscription_count, what=topic)
            data = serialize_message(message)
            for _ in range(MESSAGES):
                output.publish(damaged(data, rng))
                b.executor.spin_once(timeout_sec=0.001)
                assert rig.node.alive(), f"{topic}: {rig.node.log[-2000:]}"
            b.wait_diagnosis()
            b.node.destroy_publisher(output)
        assert memory_mb(rig) < before + 500
        assert "internal_error" not in rig.node.log
        rig.step(60.0)
        rig.send_info(rig.step())
        rig.good_frame()
