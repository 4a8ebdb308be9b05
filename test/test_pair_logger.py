"""The pair_logger as a process, fed over DDS: what it keeps, what it survives, and what it reports."""

from __future__ import annotations

import array
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
from map_fixtures import texture, write_geotiff

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import QuaternionStamped, TwistStamped
from lifecycle_msgs.msg import Transition
from nav_msgs.msg import Odometry
from ros_harness import Bench, NodeProcess, bench, pick_domain
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, NavSatFix

from xview_loc.bags.recovery import recover_bag
from xview_loc.bags.ros_types import deserialize
from xview_loc.geodesy import LocalProjection
from xview_loc.nodes.cameras import Frame
from xview_loc.nodes.recorder import IMAGE_BYTES_WAITING, Keyframe, OdometryMessage, Recorder
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.rig import facing, rotation_matrix
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.pairing import Paired
from xview_loc.vehicle.rig_assembly import CameraImage

ROOT = Path(__file__).parent.parent
LAT, LON = 48.2, 16.37
PLANE = LocalProjection(LAT, LON)
NS = 10**9
DOMAIN = pick_domain()
RATE_HZ, SPEED = 10.0, 8.0
MODULE = "xview_loc.nodes.pair_logger_node"


@pytest.fixture(scope="module")
def aerial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geotiff(
        tmp_path_factory.mktemp("map") / "map.tif", texture(900, 900), LAT, LON, 0.5, "EPSG:32633"
    )


class Rig:
    """A vehicle that drives east at 8 m/s; what it published, by stamp."""

    def __init__(self, here: Bench, compressed: bool = False) -> None:
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
        """Wait until every input reaches the logger."""
        outputs = (self.image, self.fix, self.heading, self.odom)
        self.here.wait(lambda: all(o.get_subscription_count() for o in outputs), what="the logger's inputs")
        # A publisher that has found its subscription may not have been found by it yet, and what it sends is
        # lost: send what is refused until something of each arrives, and the last of it has.
        self.here.wait_diagnosis()
        start = before = self.received()
        while any(before[n] == start[n] for n in start) or self.received() != before:
            before = self.received()
            if any(before[n] == start[n] for n in start):
                for output in outputs:
                    output.publish(output.msg_type())
            self.here.wait_diagnosis()

    def received(self) -> dict[str, int]:
        """How many messages of each input the logger counted."""
        names = ("image", "fix", "heading", "odom")
        return {name: int(self.here.value(f"{name}_received") or 0) for name in names}

    def frame(
        self,
        speed: float = SPEED,
        image: bytes | None = None,
        twist: float | None = None,
        pose: float | None = None,
        fix_moves: bool = True,
    ) -> int:
        """Publish one frame, a tenth of a second after the last; return its stamp.

        twist: odometry's speed, if not the vehicle's. pose: odometry's position, if it has one.
        """
        self.at += round(NS / RATE_HZ)
        self.driven += speed / RATE_HZ if fix_moves else 0.0
        lat, lon = PLANE.inverse(self.driven, 0.0)
        odometry = self.stamped(Odometry())
        odometry.twist.twist.linear.x = speed if twist is None else twist
        odometry.pose.pose.position.x = pose or 0.0
        self.odom.publish(odometry)
        heading = self.stamped(QuaternionStamped())
        heading.quaternion.z, heading.quaternion.w = math.sin(0.05), math.cos(0.05)
        self.heading.publish(heading)
        fix = self.stamped(NavSatFix(latitude=lat, longitude=lon, altitude=170.0))
        fix.status.status = 0
        fix.position_covariance = [9.0, 0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0, 50.0]
        fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_KNOWN
        self.fix.publish(fix)
        pixels = texture(48, 64, self.at // 10**8 % 1000)
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

    def drive(self, count: int, **more: Any) -> list[int]:
        """Publish frames and wait until the logger has received them; return their stamps."""
        before = self.received()
        stamps = [self.frame(**more) for _ in range(count)]
        self.wait_received(before, image=count, fix=count, heading=count, odom=count)
        return stamps

    def wait_received(self, before: dict[str, int], **more: int) -> None:
        after = {name: number + more.get(name, 0) for name, number in before.items()}
        self.here.wait(lambda: self.received() == after, what="the messages")

    def stamped(self, message: Any) -> Any:
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(self.at, NS)
        return message

    def call(self, name: str) -> tuple[bool, str]:
        return self.here.trigger(f"/pair_logger/{name}")


def start(folder: Path, domain: int, *, module: str = MODULE, **parameters: Any) -> NodeProcess:
    base = {
        "directory": str(folder / "bags"),
        "qos_reliability": "reliable",
        "qos_depth": 1000,
        "model": "ccvpe-small",
        "min_free_mb": 0,
        # Images have no panorama's shape.
        "panorama_elevation_deg": [90.0, -90.0],
        # Longer than any fix is late.
        "max_wait_s": 5.0,
        "max_image_delay_s": 3600.0,
    }
    return NodeProcess(domain, folder / "log.txt", {**base, **parameters}, module=module)


def newest(folder: Path) -> Path:
    """The last bag that was begun."""
    return max((folder / "bags").iterdir(), key=lambda bag: bag.stat().st_ctime_ns)


MOUNTING = {"antenna_x": -1.0, "antenna_y": 0.5, "camera_x": 2.0, "camera_yaw_deg": 10.0}


@pytest.fixture(scope="module")
def logger(aerial: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Path]]:
    """A running logger of raw images that waits for ~/start, and its folder."""
    folder = tmp_path_factory.mktemp("logger")
    with bench(DOMAIN) as here:
        node = start(folder, DOMAIN, map=str(aerial), vehicle="cart 7", record_on_start=False, **MOUNTING)
        try:
            rig = Rig(here)
            rig.ready()
            yield rig, folder
        finally:
            assert node.stop() == 0, node.log
    assert "Traceback" not in node.log


def test_every_keyframe_is_in_the_bag(logger: tuple[Rig, Path]) -> None:
    rig, folder = logger
    here = rig.here
    assert rig.call("start")[0]
    stamps = rig.drive(60)
    standing = rig.drive(20, speed=0.0)
    stamps += standing + rig.drive(31)
    # By the wheels: 8 m/s at 10 Hz are 0.8 m a frame, so every third frame, and none while it stands.
    expected, since = [], math.inf
    for stamp in stamps:
        speed = 0.0 if stamp in standing else SPEED
        since += speed / RATE_HZ
        if since >= 2.0 and speed > 0:
            expected.append(stamp)
            since = 0.0
    here.wait(lambda: here.value("pairs") == str(len(expected)), what="the last pair")
    here.wait_diagnosis("recording")
    assert float(here.value("size_mb")) > 0.0 and here.value("recording").startswith(str(folder))
    success, message = rig.call("stop")
    assert success and message.startswith(f"recorded {len(expected)} pairs into")
    pairs = PairBag(newest(folder))
    assert [pairs[k].stamp_ns for k in range(len(pairs))] == expected
    for k, stamp in enumerate(expected):
        pair = pairs[k]
        assert (pair.lat, pair.lon) == pytest.approx(rig.places[stamp], abs=1e-12)
        assert pair.fix_covariance is not None and pair.fix_covariance[1, 1] == 16.0
        assert pair.heading == pytest.approx(0.1, abs=1e-9)
        sent = np.frombuffer(rig.images[stamp], np.uint8).reshape(48, 64, 3)
        assert np.abs(pair.image().astype(int) - sent).mean() < 6.0
        tile = pairs.tile(k)
        assert tile is None or tile.size_px == 160
        assert tile is None or math.hypot(*tile.projection.forward(pair.lat, pair.lon)) < 14.0
    # A pair does not wait for its tile for long, whatever else the machine does.
    missing = sum(pairs.tile(k) is None for k in range(len(pairs)))
    assert missing < len(pairs)
    here.wait(lambda: here.value("pairs_without_tile") == (str(missing) if missing else ""), what="the count")
    session = pairs.session()
    mounting = Mounting.of(session)
    assert (mounting.antenna, mounting.camera) == ((-1.0, 0.5), (2.0, 0.0))
    assert mounting.camera_yaw == pytest.approx(math.radians(10.0))
    looking = rotation_matrix(tuple(session["camera_rotation"]))
    np.testing.assert_allclose(looking, rotation_matrix(facing(math.radians(10.0))), atol=1e-9)
    assert session["vehicle"] == "cart 7" and session["model"] == "ccvpe-small"
    assert session["tile"] == {"size": 160, "gsd": 0.48}
    # All from the first image on; what came with it may have been received before it.
    odometry = [stamp for stamp, _ in pairs.odometry()]
    assert len(odometry) > 80 and odometry == stamps[-len(odometry) :]


def test_services_start_stop_and_split(logger: tuple[Rig, Path]) -> None:
    rig, folder = logger
    bags = len(list((folder / "bags").iterdir())) if (folder / "bags").exists() else 0
    rig.drive(10)
    assert rig.call("stop") == (False, "not recording")
    assert rig.call("split") == (False, "not recording")
    assert rig.call("start")[0]
    one = newest(folder)
    assert "already" in rig.call("start")[1]
    first = rig.drive(30)
    rig.here.wait(lambda: int(rig.here.value("pairs") or 0) >= 10, what="pairs")
    split, name = rig.call("split")
    assert split and name.endswith("_1.mcap")
    rig.drive(30)
    stopped, message = rig.call("stop")
    assert stopped and "20 pairs into" in message
    rig.here.wait_diagnosis("stopped")
    assert rig.call("start")[0] and rig.call("stop")[0]
    pairs = PairBag(one)
    assert len(list(one.glob("*.mcap"))) == 2 and len(pairs) == 20
    assert pairs[0].stamp_ns >= first[0]
    assert len(PairBag(newest(folder))) == 0 and len(list((folder / "bags").iterdir())) == bags + 2


def test_keyframes_and_quality_change_while_it_records(logger: tuple[Rig, Path]) -> None:
    rig, folder = logger

    def put(name: str, value: Any) -> str:
        return rig.here.set_parameter("/pair_logger", name, value)

    assert put("directory", "/elsewhere") == "directory needs cleanup and configure"
    assert rig.call("start")[0]
    assert put("keyframe_distance_m", 0.5) == put("jpeg_quality", 1) == ""
    try:
        rig.drive(10)  # 0.8 m a frame
        rig.here.wait(lambda: rig.here.value("pairs") == "10", what="the pairs")
        assert put("max_width", 32) == ""
        rig.drive(1)
    finally:
        assert put("keyframe_distance_m", 2.0) == put("jpeg_quality", 95) == put("max_width", 2048) == ""
    assert "recorded 11 pairs" in rig.call("stop")[1]
    pairs = PairBag(newest(folder))
    assert pairs[9].image().shape == (48, 64, 3) and pairs[10].image().shape == (24, 32, 3)
    pair = pairs[9]
    sent = np.frombuffer(rig.images[pair.stamp_ns], np.uint8).reshape(48, 64, 3)
    assert np.abs(pair.image().astype(int) - sent).mean() > 6.0


def test_bad_messages_cost_no_more_than_themselves(logger: tuple[Rig, Path]) -> None:
    rig, folder = logger
    refused = int(rig.here.value("frames_rejected/image_invalid") or 0)
    assert rig.call("start")[0]
    # 3 m a frame: each one is a keyframe.
    rig.drive(3, speed=30.0)
    before = rig.received()
    rig.at += round(NS / RATE_HZ)
    broken = rig.stamped(Image(height=480, width=640, encoding="rgb8", step=1920))
    broken.data = array.array("B", b"short")
    rig.image.publish(broken)
    # Damaged bytes, and a stamp before 1970.
    rig.odom.publish(bytes([0, 1, 0, 0]) + rig.at.to_bytes(8, "little") + b"cut off")
    early = Odometry()
    early.header.stamp.sec = -5
    rig.odom.publish(early)
    rig.wait_received(before, image=1, odom=2)
    rig.drive(5, speed=30.0)
    rig.here.wait(
        lambda: int(rig.here.value("frames_rejected/image_invalid") or 0) == refused + 1, what="its count"
    )
    assert rig.call("stop")[0]
    assert len(PairBag(newest(folder))) == 8


def test_odometry_without_a_twist_and_odometry_that_contradicts_the_fixes(logger: tuple[Rig, Path]) -> None:
    rig, folder = logger
    here = rig.here
    rig.at -= 1000 * NS  # time starts again, with another odometry
    rig.drive(1, twist=0.0)
    assert rig.call("start")[0]
    before = rig.received()
    for k in range(60):
        rig.frame(twist=0.0, pose=SPEED / RATE_HZ * k)
    rig.wait_received(before, image=60, fix=60, heading=60, odom=60)
    assert rig.call("stop")[0]
    # 0.8 m a frame: every third is a keyframe.
    assert 18 <= len(PairBag(newest(folder))) <= 20
    rig.at -= 1000 * NS
    rig.drive(25, speed=30.0, twist=0.0)
    here.wait_diagnosis("odom_still: fixes moved", "odometry 0.0 m")
    rig.drive(35, speed=30.0)
    here.wait(lambda: "odom_still" not in here.text(), what="the end of the warning")
    rig.drive(60, speed=30.0, fix_moves=False)
    here.wait_diagnosis("fix_still: odometry moved")
    rig.drive(1)
    here.wait(lambda: "fix_still" not in here.text(), what="the end of the warning")


def test_a_twist_replaces_the_odometry_while_it_records(logger: tuple[Rig, Path]) -> None:
    rig, folder = logger
    here = rig.here
    rig.at -= 1000 * NS
    assert rig.call("start")[0]
    rig.drive(1)
    here.node.destroy_publisher(rig.odom)
    twist = here.publisher(TwistStamped, "odom")
    here.wait(twist.get_subscription_count, what="a subscription to the twist")
    before = rig.received()
    sent = []
    while rig.received()["odom"] < before["odom"] + 5:
        rig.at += NS // 100
        message = rig.stamped(TwistStamped())
        message.header.frame_id, message.twist.linear.x = "wheels", 3.0
        twist.publish(message)
        sent.append(rig.at)
        here.executor.spin_once(timeout_sec=0.05)
    assert rig.call("stop")[0]
    odometry = PairBag(newest(folder)).odometry()
    kept = [(at, deserialize("nav_msgs/msg/Odometry", data)) for at, data in odometry]
    twists = [(at, one) for at, one in kept if one.child_frame_id == "wheels"]
    assert len(twists) >= 5 and {at for at, _ in twists} <= set(sent)
    assert all(one.twist.twist.linear.x == 3.0 for _, one in twists)
    here.node.destroy_publisher(twist)
    rig.odom = here.publisher(Odometry, "odom")
    rig.ready()


def test_pairs_without_a_folder_without_a_map_and_with_a_map_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "bags").write_text("in the way")
    domain = DOMAIN + 1
    with bench(domain) as here:
        node = start(
            tmp_path,
            domain,
            map="",
            allow_remote_maps=True,
            map_cache_dir=str(tmp_path / "cache"),
            map_deadline_s=1.0,
        )

        def again(**parameters: str) -> None:
            """Configure and activate with other parameters."""
            here.change_state("/pair_logger", Transition.TRANSITION_CLEANUP)
            assert here.set_parameters("/pair_logger", **parameters) == ""
            here.change_state("/pair_logger", Transition.TRANSITION_CONFIGURE)
            here.change_state("/pair_logger", Transition.TRANSITION_ACTIVATE)

        try:
            here.wait_diagnosis("not_active", "cannot record into", "no_map")
            (tmp_path / "bags").unlink()
            rig = Rig(here)
            for map_, problem in (("", "no_map"), ("http://127.0.0.1:9/{z}/{x}/{y}.png", "map:")):
                again(map=map_)
                rig.ready()
                rig.drive(40)
                here.wait_diagnosis(problem, "pairs are stored without tiles")
                assert not map_ or "no_map" not in here.text()
                stopped, message = rig.call("stop")
                assert stopped and "recorded 14 pairs" in message
                pairs = PairBag(newest(tmp_path))
                assert len(pairs) == 14 and all(pairs.tile(i) is None for i in range(14))
                here.change_state("/pair_logger", Transition.TRANSITION_DEACTIVATE)
        finally:
            assert node.stop() == 0, node.log
    assert "Traceback" not in node.log


def test_a_slow_disk_loses_nothing_that_was_accepted_and_a_full_one_counts_it(
    aerial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    busy = tmp_path / "busy"
    monkeypatch.setenv("XVIEW_LOC_TEST_DISK_BUSY", str(busy))
    domain = DOMAIN + 2
    with bench(domain) as here:
        node = start(
            tmp_path,
            domain,
            module="slow_disk_node",
            map=str(aerial),
            quota_mb=2,
            image_transport="compressed",
            keyframe_distance_m=0.1,
        )
        try:
            rig = Rig(here, compressed=True)
            rig.ready()
            busy.touch()
            stamps = rig.drive(20)
            stop = here.begin_trigger("/pair_logger/stop")
            here.wait(lambda: here.value("recording") == "no", what="the stop's begin")
            # These frames are not recorded, and the node goes on meanwhile.
            rig.drive(5)
            assert not stop.done()
            busy.unlink()
            here.wait(stop.done, what="the stop")
            assert stop.result().success and "recorded 20 pairs" in stop.result().message
            pairs = PairBag(newest(tmp_path))
            assert [pairs[k].stamp_ns for k in range(len(pairs))] == stamps
            assert all(pairs[k].image_bytes == rig.images[stamp] for k, stamp in enumerate(stamps))
            # 120 kB each before they are compressed, in chunks whose number depends on the time.
            noise = np.random.default_rng(0).integers(0, 256, 60_000, np.uint8).tobytes()
            comment = b"\xff\xfe" + (2 + len(noise)).to_bytes(2, "big") + noise
            jpeg = rig.images[stamps[0]]
            busy.touch()
            assert rig.call("start")[0]
            full = newest(tmp_path)
            before = rig.received()
            for k in range(30):
                rig.frame(image=jpeg[:2] + comment + comment[:4] + noise[k:] + noise[:k] + jpeg[2:])
                if k % 5 == 4:
                    # On a busy machine the headings of a few seconds arrive before the first large image.
                    rig.wait_received(before, image=k + 1, fix=k + 1, heading=k + 1, odom=k + 1)
            busy.unlink()
            here.wait_diagnosis("recording ended", "quota of 2 MB")
            here.wait(
                lambda: int(here.value("frames_accepted")) + int(here.value("frames_dropped") or 0) == 50,
                what="the count of all keyframes",
            )
            kept = len(PairBag(full))
            assert int(here.value("frames_accepted")) == 20 + kept and 3 <= kept <= 2_000_000 // 120_000
            assert sum(p.stat().st_size for p in full.iterdir()) <= 2_000_000
            assert node.alive() and rig.call("start")[0]
            here.wait(lambda: "quota" not in here.text(), what="a new recording")
        finally:
            busy.unlink(missing_ok=True)
            assert node.stop() == 0, node.log
    assert "Traceback" not in node.log


def test_images_that_wait_for_the_disk_have_a_limit_in_bytes() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[Any] = []

    def process(item: Any) -> None:
        begun.set()
        go_on.wait()
        done.append(item)

    recorder = Recorder(process)
    image = bytes(IMAGE_BYTES_WAITING // 4)
    frame = Frame(1, 1, (CameraImage("", 1, "sensor_msgs/msg/Image", image),), {})
    keyframe = Keyframe(cast(Any, None), Paired(frame, None, None))
    assert not recorder.put(keyframe)
    begun.wait()
    # The one in work counts: three more fit.
    assert [recorder.put(keyframe) for _ in range(5)] == [False, False, False, True, True]
    assert not recorder.put(OdometryMessage(cast(Any, None), 1, b""))
    go_on.set()
    recorder.close()
    assert len(done) == 5


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_recording(aerial: Path, tmp_path: Path, seed: int) -> None:
    domain = DOMAIN + 3
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), keyframe_distance_m=0.1)
        rig = Rig(here)
        rig.ready()
        # What is written is on the disk a second later: when the next report but one is there.
        written: list[int] = []
        frames = 20 + random.Random(seed).randrange(20)
        while len(rig.images) < frames or len(written) < 3 or written[-3] == 0:
            rig.frame()
            reports = here.reports
            here.executor.spin_once(timeout_sec=0.05)
            if here.reports > reports:
                written.append(int(here.value("pairs") or 0))
        node.process.send_signal(signal.SIGKILL)
        node.process.wait()
    recover_bag(newest(tmp_path), tmp_path / "saved")
    pairs = PairBag(tmp_path / "saved")
    assert len(pairs) >= written[-3] > 0
    saved = [pairs[k].stamp_ns for k in range(len(pairs))]
    assert saved == sorted(rig.images)[: len(saved)]
    assert all(pairs.tile(k) is not None for k in range(len(pairs)))


def test_signals_do_not_disturb_the_completion_of_the_bag(
    aerial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    busy = tmp_path / "busy"
    monkeypatch.setenv("XVIEW_LOC_TEST_DISK_BUSY", str(busy))
    domain = DOMAIN + 4
    with bench(domain) as here:
        node = start(tmp_path, domain, module="slow_disk_node", map=str(aerial), keyframe_distance_m=0.1)
        rig = Rig(here)
        rig.ready()
        busy.touch()
        stamps = rig.drive(20)
        for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT) * 5:
            node.process.send_signal(sent)
            with pytest.raises(subprocess.TimeoutExpired):
                node.process.wait(0.05)
        busy.unlink()
        assert node.interrupt([signal.SIGINT]) == 0, node.log
    assert "Traceback" not in node.log
    pairs = PairBag(newest(tmp_path))
    assert [pairs[k].stamp_ns for k in range(len(pairs))] == stamps


def test_it_loads_no_model_library() -> None:
    code = "import sys, xview_loc.nodes.pair_logger_node; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "given", [{"model": "ccvpe-pinhole-small", "use_heading": False}, {"heading_source": "course"}]
)
def test_headings_are_recorded_or_reckoned(aerial: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    domain = DOMAIN + 5
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), use_odometry=False, **given)
        try:
            here.wait_diagnosis("headings are neither recorded nor can they be reckoned", "set use_odometry")
        finally:
            assert node.stop() == 0, node.log
        (tmp_path / "second").mkdir()
        node = start(tmp_path / "second", domain, map=str(aerial), **given)
        try:
            here.wait_diagnosis("/odom has no publisher")
        finally:
            assert node.stop() == 0, node.log


@pytest.mark.parametrize(("model", "side"), [("ccvpe-small", 160), ("ccvpe-pinhole-small", 228)])
def test_images_wait_for_a_calibration_that_is_published(
    aerial: Path, tmp_path: Path, model: str, side: int
) -> None:
    """Without it, a pair would be taken for a panorama, or could not adapt a model for pinhole cameras."""
    domain = DOMAIN + 5
    with bench(domain) as here:
        node = start(tmp_path, domain, map=str(aerial), model=model, panorama_elevation_deg=[0.0, 0.0])
        try:
            rig = Rig(here)
            info = here.publisher(CameraInfo, "camera_info")
            here.wait(info.get_subscription_count, what="the camera_info")
            rig.ready()
            rig.drive(5)
            here.wait(lambda: here.value("frames_rejected/camera_info_missing") == "5", what="the refusals")
            matrix = [40.0, 0.0, 31.5, 0.0, 40.0, 23.5, 0.0, 0.0, 1.0]
            here.wait(
                lambda: (
                    info.publish(rig.stamped(CameraInfo(width=64, height=48, k=matrix)))
                    or int(here.value("camera_info_received") or 0)
                ),
                what="a calibration",
            )
            rig.drive(5)
            here.wait(lambda: int(here.value("pairs") or 0) >= 1, what="a pair")
        finally:
            assert node.stop() == 0, node.log
    bag = PairBag(newest(tmp_path))
    assert bag.tile_sizes() - {None} == {(side, 0.48)}
    camera = bag[0].camera
    assert camera is not None and camera.k == tuple(matrix)


@pytest.mark.parametrize("size", [(48, 64), (24, 32)])
def test_a_mask_is_stored_in_the_size_of_the_images(tmp_path: Path, size: tuple[int, int]) -> None:
    """Images are not reduced then, and those of another size refused."""
    mask = np.zeros(size, np.uint8)
    mask[-4:] = 255
    cv2.imwrite(str(tmp_path / "roof.png"), mask)
    domain = DOMAIN + 5
    with bench(domain) as here:
        node = start(tmp_path, domain, map="", max_width=32, own_mask=str(tmp_path / "roof.png"))
        try:
            rig = Rig(here)
            rig.ready()
            rig.drive(40)
            if size == (48, 64):
                here.wait(lambda: int(here.value("pairs") or 0) >= 5, what="pairs")
            else:
                here.wait_diagnosis(
                    "own_mask_invalid: its own_mask has 32 x 24 pixels, but its images have 64 x 48"
                )
                assert here.value("pairs") == "0"
        finally:
            assert node.stop() == 0, node.log
    if size == (48, 64):
        bag = PairBag(newest(tmp_path))
        stored = bag.own_mask()
        assert stored is not None and stored.shape == bag[0].image().shape[:2] == size
