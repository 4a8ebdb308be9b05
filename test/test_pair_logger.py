"""The pair_logger as a process, fed over DDS: what it keeps, what it survives, and what it says."""

from __future__ import annotations

import array
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import QuaternionStamped
from nav_msgs.msg import Odometry
from ros_harness import Bench, NodeProcess, bench, pick_domain
from sensor_msgs.msg import CompressedImage, Image, NavSatFix
from std_srvs.srv import Trigger

from xview_loc.bags.recovery import recover_bag
from xview_loc.geodesy import LocalProjection
from xview_loc.recordings.pairs import PairBag

LAT, LON = 48.2, 16.37
PLANE = LocalProjection(LAT, LON)
NS = 10**9
DOMAIN = pick_domain()
RATE_HZ, SPEED = 10.0, 8.0


@pytest.fixture(scope="module")
def aerial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geotiff(
        tmp_path_factory.mktemp("map") / "map.tif", texture(900, 900), LAT, LON, 0.5, "EPSG:32633"
    )


class Rig:
    """A vehicle that drives east at 8 m/s; what it published, by stamp."""

    def __init__(self, here: Bench, compressed: bool) -> None:
        self.here = here
        self.compressed = compressed
        image = CompressedImage if compressed else Image
        self.image = here.publisher(image, "image")
        self.fix = here.publisher(NavSatFix, "fix")
        self.heading = here.publisher(QuaternionStamped, "heading")
        self.odom = here.publisher(Odometry, "odom")
        self.images: dict[int, bytes] = {}
        self.places: dict[int, tuple[float, float]] = {}
        self.at = time.time_ns() // NS * NS
        self.driven = 0.0

    def ready(self) -> None:
        outputs = (self.image, self.fix, self.heading, self.odom)
        self.here.wait(lambda: all(o.get_subscription_count() for o in outputs), 40.0, "the logger's inputs")
        # A publisher that has found its subscription may not have been found by it yet, and what it sends is
        # lost: send what is refused until something of each arrives, and the last of it has.
        before: dict[str, int] = {}
        while not all(self.received().values()) or self.received() != before:
            before = self.received()
            if not all(before.values()):
                for output, message in zip(
                    outputs,
                    (self.image.msg_type(), NavSatFix(), QuaternionStamped(), Odometry()),
                    strict=True,
                ):
                    output.publish(message)
            self.here.wait_diagnosis()

    def received(self) -> dict[str, int]:
        """How many messages of each input the logger counted."""
        names = ("image", "fix", "heading", "odom")
        if self.here.status is None:
            return dict.fromkeys(names, 0)
        return {name: int(self.here.value(f"{name}_received") or 0) for name in names}

    def frame(self, speed: float = SPEED, image: bytes | None = None) -> int:
        """Publish one frame, a tenth of a second after the last; its stamp."""
        self.at += round(NS / RATE_HZ)
        self.driven += speed / RATE_HZ
        lat, lon = PLANE.inverse(self.driven, 0.0)
        odometry = self.stamped(Odometry())
        odometry.twist.twist.linear.x = speed
        self.odom.publish(odometry)
        heading = self.stamped(QuaternionStamped())
        heading.quaternion.z, heading.quaternion.w = math.sin(0.05), math.cos(0.05)
        self.heading.publish(heading)
        fix = self.stamped(NavSatFix(latitude=lat, longitude=lon, altitude=170.0))
        fix.status.status = 0
        fix.position_covariance = [9.0, 0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0, 50.0]
        fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_KNOWN
        self.fix.publish(fix)
        pixels = texture(48, 64, self.at % 1000)
        if self.compressed:
            data = bytes(cv2.imencode(".jpg", pixels)[1]) if image is None else image
            message: Any = self.stamped(CompressedImage(format="rgb8; jpeg compressed bgr8"))
            message.data = array.array("B", data)
        else:
            data = pixels.tobytes()
            message = self.stamped(Image(height=48, width=64, encoding="rgb8", step=3 * 64))
            message.data = array.array("B", data)
        self.image.publish(message)
        self.images[self.at], self.places[self.at] = data, (lat, lon)
        return self.at

    def stamped(self, message: Any) -> Any:
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(self.at, NS)
        return message

    def call(self, name: str) -> Trigger.Response:
        client = self.here.node.create_client(Trigger, f"/pair_logger/{name}")
        self.here.wait(client.service_is_ready, 15.0, name)
        future = client.call_async(Trigger.Request())
        self.here.wait(future.done, 15.0, name)
        return future.result()


def start(folder: Path, domain: int, **parameters: Any) -> NodeProcess:
    base = {
        "directory": str(folder / "bags"),
        "heading_source": "quaternion",
        "qos_reliability": "reliable",
        "qos_depth": 100,
        "tile_px": 64,
        "tile_gsd": 0.5,
        "min_free_mb": 0,
        "max_wait_s": 0.5,
        "max_image_delay_s": 3600.0,
    }
    return NodeProcess(
        domain, folder / "log.txt", {**base, **parameters}, module="xview_loc.nodes.pair_logger_node"
    )


def bags(folder: Path) -> list[Path]:
    return sorted((folder / "bags").iterdir())


def drive(rig: Rig, here: Bench, count: int, **more: Any) -> list[int]:
    """Frames, paced by what the logger says it received."""
    stamps = []
    for _ in range(count):
        stamps.append(rig.frame(**more))
        here.executor.spin_once(timeout_sec=0.01)
    return stamps


@pytest.mark.parametrize("compressed", [False, True])
def test_every_keyframe_is_in_the_bag(aerial: Path, tmp_path: Path, compressed: bool) -> None:
    domain = DOMAIN + compressed
    with bench(domain) as here:
        node = start(
            tmp_path,
            domain,
            map=str(aerial),
            image_transport="compressed" if compressed else "raw",
            vehicle="cart 7",
        )
        try:
            rig = Rig(here, compressed)
            rig.ready()
            stamps = drive(rig, here, 60)
            standing = drive(rig, here, 20, speed=0.0)
            stamps += drive(rig, here, 31)
            # By the wheels: 8 m/s at 10 Hz are 0.8 m a frame, so every third frame, and none while it stands.
            expected, since = [], math.inf
            for stamp in sorted(rig.images):
                speed = 0.0 if stamp in standing else SPEED
                since += speed / RATE_HZ
                if since >= 2.0 and speed > 0:
                    expected.append(stamp)
                    since = 0.0
            here.wait(
                lambda: here.status and here.value("pairs") == str(len(expected)), 20.0, "the last pair"
            )
            here.wait_diagnosis("recording")
            assert float(here.value("size_mb")) > 0.0 and here.value("recording").startswith(str(tmp_path))
        finally:
            assert node.stop() == 0, node.log
    (folder,) = bags(tmp_path)
    pairs = PairBag(folder)
    assert [pairs[k].stamp_ns for k in range(len(pairs))] == expected
    for k, stamp in enumerate(expected):
        pair = pairs[k]
        assert (pair.lat, pair.lon) == pytest.approx(rig.places[stamp], abs=1e-12)
        assert pair.fix_covariance is not None and pair.fix_covariance[1, 1] == 16.0
        assert pair.heading == pytest.approx(0.1, abs=1e-9)
        if compressed:
            assert pair.image_bytes == rig.images[stamp]
        else:
            sent = np.frombuffer(rig.images[stamp], np.uint8).reshape(48, 64, 3)
            assert np.abs(pair.image().astype(int) - sent).mean() < 6.0
        tile = pairs.tile(k)
        assert tile is not None and tile.size_px == 64
        assert math.hypot(*tile.projection.forward(pair.lat, pair.lon)) < 8.0
    session = pairs.session()
    assert session["vehicle"] == "cart 7" and session["tile"] == {"size": 64, "gsd": 0.5}
    # All from the first image on; what came with it may have been taken before it.
    odometry = [stamp for stamp, _ in pairs.odometry()]
    assert len(odometry) > 80 and odometry == sorted(rig.images)[-len(odometry) :]
    assert "Traceback" not in node.log


def test_services_start_stop_and_split(aerial: Path, tmp_path: Path) -> None:
    domain = DOMAIN + 2
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), record_on_start=False)
        try:
            rig = Rig(here, compressed=False)
            rig.ready()
            before = rig.received()
            drive(rig, here, 10)
            # All that came before the start is dealt with before it.
            after = {name: count + 10 for name, count in before.items()}
            here.wait(lambda: rig.received() == after, 15.0, "the frames")
            assert not rig.call("stop").success and not (tmp_path / "bags").exists()
            assert rig.call("start").success
            assert "already" in rig.call("start").message
            first = drive(rig, here, 30)
            here.wait(lambda: here.status and int(here.value("pairs") or 0) >= 10, 15.0, "pairs")
            split = rig.call("split")
            assert split.success and split.message.endswith("_1.mcap")
            drive(rig, here, 30)
            here.wait(lambda: int(here.value("pairs") or 0) >= 20, 15.0, "more pairs")
            stopped = rig.call("stop")
            assert stopped.success and "pairs into" in stopped.message
            assert rig.call("start").success
        finally:
            assert node.stop() == 0, node.log
    one, two = bags(tmp_path)
    pairs = PairBag(one)
    assert len(list(one.glob("*.mcap"))) == 2 and len(pairs) >= 20
    assert pairs[0].stamp_ns >= first[0]
    assert len(PairBag(two)) == 0


def test_pairs_without_a_map_and_with_a_map_out_of_reach(tmp_path: Path) -> None:
    for k, map_ in enumerate(("", "http://127.0.0.1:9/{z}/{x}/{y}.png")):
        domain, folder = DOMAIN + 3, tmp_path / str(k)
        folder.mkdir()
        with bench(domain) as here:
            node = start(folder, domain, map=map_, map_cache_dir=str(folder / "cache"), map_deadline_s=1.0)
            try:
                rig = Rig(here, compressed=False)
                rig.ready()
                drive(rig, here, 40)
                here.wait_diagnosis("pairs are stored without tiles", timeout_s=20.0)
                here.wait(lambda: int(here.value("pairs") or 0) >= 13, 15.0, "pairs")
            finally:
                assert node.stop() == 0, node.log
        (bag,) = bags(folder)
        pairs = PairBag(bag)
        assert len(pairs) >= 13 and all(pairs.tile(i) is None for i in range(len(pairs)))


def test_quota_stops_the_recording_and_not_the_node(aerial: Path, tmp_path: Path) -> None:
    domain = DOMAIN + 4
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), quota_mb=2, image_transport="compressed")
        try:
            rig = Rig(here, compressed=True)
            rig.ready()
            noise = np.random.default_rng(0).integers(0, 256, 120_000, np.uint8).tobytes()
            drive(rig, here, 80, image=noise)
            here.wait_diagnosis("recording ended", "quota of 2 MB", timeout_s=20.0)
            assert node.alive()
            assert rig.call("start").success
            here.wait(lambda: "quota" not in here.text(), 10.0, "a new recording")
        finally:
            assert node.stop() == 0, node.log
    first, _ = bags(tmp_path)
    # 120 kB each before they are compressed, in chunks whose number depends on the time.
    assert 3 <= len(PairBag(first)) <= 2_000_000 // 120_000
    assert sum(p.stat().st_size for p in first.iterdir()) <= 2_000_000


def test_a_folder_that_cannot_be_written_is_told(aerial: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    domain = DOMAIN + 5
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), directory=str(tmp_path / "file"))
        try:
            here.wait_diagnosis("not_active", "cannot record into", timeout_s=40.0)
            assert node.alive()
        finally:
            assert node.stop() == 0, node.log
        assert "Traceback" not in node.log


def test_bad_messages_cost_no_more_than_themselves(aerial: Path, tmp_path: Path) -> None:
    domain = DOMAIN + 6
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), keyframe_distance_m=0.01)
        try:
            rig = Rig(here, compressed=False)
            rig.ready()
            drive(rig, here, 3)
            broken = rig.stamped(Image(height=480, width=640, encoding="rgb8", step=1920))
            broken.header.stamp.nanosec += 10_000_000
            broken.data = array.array("B", b"short")
            rig.image.publish(broken)
            # Damaged bytes, and a stamp before 1970.
            rig.odom.publish(bytes([0, 1, 0, 0]) + rig.at.to_bytes(8, "little") + b"cut off")
            early = Odometry()
            early.header.stamp.sec = -5
            rig.odom.publish(early)
            drive(rig, here, 5)
            here.wait(lambda: here.status and here.value("pairs") == "8", 15.0, "the good pairs")
            here.wait(lambda: here.value("frames_rejected/image_invalid") == "1", 5.0, "its count")
        finally:
            assert node.stop() == 0, node.log
    (bag,) = bags(tmp_path)
    assert len(PairBag(bag)) == 8


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_recording(aerial: Path, tmp_path: Path, seed: int) -> None:
    domain = DOMAIN + 7
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), keyframe_distance_m=0.1)
        rig = Rig(here, compressed=False)
        rig.ready()
        published: dict[int, float] = {}
        end = time.monotonic() + 2.0 + random.Random(seed).random()
        while time.monotonic() < end:
            published[rig.frame()] = time.monotonic()
            here.executor.spin_once(timeout_sec=0.05)
        node.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        node.process.wait(10)
    (bag,) = bags(tmp_path)
    recover_bag(bag, tmp_path / "saved")
    pairs = PairBag(tmp_path / "saved")
    saved = {pairs[k].stamp_ns for k in range(len(pairs))}
    missing = [killed - at for stamp, at in published.items() if stamp not in saved and at < killed - 1.5]
    assert not missing and len(saved) > 5
    assert all(pairs.tile(k) is not None for k in range(len(pairs)))
