"""A simulated drive as a bag and over DDS: every topic is complete and equal to the drive in memory."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from xview_loc.cli.commands import main
from xview_loc.images import decode_compressed
from xview_loc.rig import Rig
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.messages import START_NS, TOPICS, topics, write_bag
from xview_loc.simulation.rigs import make_rig
from xview_loc.simulation.views import PanoramaView
from xview_loc.vehicle.messages import camera_from_info, yaw_of
from xview_loc.vehicle.tilt import tilt_from_imu
from xview_loc.vehicle.transforms import Transform, TransformBuffer

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "import sys; sys.modules[{!r}] = None; from xview_loc.cli import main; main()"


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return list(drive(build_city(5, "source", size_m=300.0), 6, seed=2, view=PanoramaView(32, 128)))


def test_bag_holds_the_drive(frames: list[Frame], tmp_path: Path) -> None:
    write_bag(frames, tmp_path / "bag")
    got: dict[str, list] = {topic: [] for topic in TOPICS}
    with AnyReader([tmp_path / "bag"]) as reader:
        for connection, stamp, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == stamp
            got[connection.topic].append((stamp - START_NS, message))
    wheels = [one for frame in frames for one in frame.wheels]
    twists = [(stamp, odometry.twist.twist) for stamp, odometry in got.pop("/odom")]
    assert [(stamp, t.linear.x, t.angular.z) for stamp, t in twists] == [
        (one.stamp_ns, one.speed, one.yaw_rate) for one in wheels
    ]
    assert np.diff([one.stamp_ns for one in wheels]).max() <= 100_000_000
    for topic, messages in got.items():
        assert [stamp for stamp, _ in messages] == [f.stamp_ns for f in frames], topic
    for k, frame in enumerate(frames):
        image, fix, heading = (got[topic][k][1] for topic in ("/image", "/fix", "/heading"))
        assert np.array_equal(image.data.reshape(image.height, image.width, 3), frame.image)
        assert (image.encoding, image.step) == ("rgb8", 3 * 128)
        assert (fix.latitude, fix.longitude) == (frame.fix.lat, frame.fix.lon)
        assert fix.position_covariance[0] == frame.fix.covariance[0, 0]
        yaw = 2 * math.atan2(heading.quaternion.z, heading.quaternion.w)
        assert math.remainder(yaw - frame.heading, 2 * math.pi) == pytest.approx(0.0, abs=1e-12)
        truth = got["/truth/fix"][k][1]
        assert (truth.latitude, truth.longitude) == (frame.truth.lat, frame.truth.lon)
    with pytest.raises(FileExistsError):
        write_bag(frames, tmp_path / "bag")


@pytest.fixture(scope="module")
def rig_drive() -> tuple[Rig, list[Frame]]:
    rig = make_rig("four", 0.25)
    options = DriveOptions(rate_hz=1.0)
    return rig, list(drive(build_city(5, "source", size_m=300.0), 4, seed=2, options=options, view=rig))


def test_bag_of_a_rig_can_be_read_back_whole(rig_drive: tuple[Rig, list[Frame]], tmp_path: Path) -> None:
    """Calibration, extrinsics, attitude and JPEGs, through what the vehicle reads them with."""
    rig, frames = rig_drive
    write_bag(frames, tmp_path / "bag", rig=rig)
    got: dict[str, list] = {topic: [] for topic in topics(rig)}
    with AnyReader([tmp_path / "bag"]) as reader:
        (static,) = [c for c in reader.connections if c.topic == "/tf_static"]
        (profile,) = static.ext.offered_qos_profiles
        assert profile.durability.name == "TRANSIENT_LOCAL"
        for connection, stamp, raw in reader.messages():
            got[connection.topic].append((stamp, reader.deserialize(raw, connection.msgtype)))
    buffer = TransformBuffer()
    ((stamp, tree),) = got.pop("/tf_static")
    assert stamp == START_NS
    for one in tree.transforms:
        buffer.add(stamp, one.header.frame_id, one.child_frame_id, Transform.of(one.transform), True)
    for name, mounted in rig.cameras.items():
        infos, images = got[f"/{name}/camera_info"], got[f"/{name}/image/compressed"]
        for (_, info), (_, jpeg), frame in zip(infos, images, frames, strict=True):
            assert camera_from_info(info) == mounted.camera
            assert info.header == jpeg.header and jpeg.format == "jpeg"
            image = decode_compressed(jpeg.data)
            assert np.abs(image.astype(int) - frame.images[name]).mean() < 8.0
        pose = buffer.lookup("base_link", jpeg.header.frame_id)
        assert pose.translation == pytest.approx(mounted.position)
        assert pose.matrix == pytest.approx(mounted.axes)
    for (stamp, imu), frame in zip(got["/imu"], frames, strict=True):
        assert stamp == START_NS + frame.stamp_ns
        tilt = tilt_from_imu(imu, np.eye(3))
        assert (tilt.roll, tilt.pitch) == pytest.approx((frame.roll, frame.pitch))
        assert math.remainder(yaw_of(imu.orientation) - frame.heading, 2 * math.pi) == pytest.approx(0.0)
        assert imu.orientation_covariance[0] == pytest.approx(frame.tilt_std**2)
    assert len(got.pop("/odom")) == 1 + 3 * 10
    assert all(len(messages) == 4 for messages in got.values())


def test_command_drives_live(tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from nav_msgs.msg import Odometry
    from ros_harness import bench, environment, pick_domain
    from sensor_msgs.msg import Image, NavSatFix

    domain = pick_domain()
    words = ["simulate", str(tmp_path), "--ros", "--frames", "12", "--rate", "10", "--height", "32"]
    words += ["--speed", "4", "--size", "300"]
    with bench(domain) as here:
        process = subprocess.Popen(
            [sys.executable, "-m", "xview_loc.cli", *words],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(domain),
        )
        try:
            fixes, truths = here.listen(NavSatFix, "/fix"), here.listen(NavSatFix, "/truth/fix")
            odometry = here.listen(Odometry, "/odom")
            here.wait(
                lambda: all(
                    here.node.count_publishers(topic) for topic in ("/image", "/fix", "/truth/fix", "/odom")
                ),
                120.0,
                "the drive",
            )
            # The drive waits for a subscriber to the image.
            assert not fixes
            images = here.listen(Image, "/image")
            here.wait(lambda: process.poll() is not None, 120.0, "the end of the drive")
        finally:
            process.kill()
        assert process.stdout is not None and "published 12 frames" in process.stdout.read()
    assert process.returncode == 0 and (tmp_path / "city.tif").exists()
    stamps = [[(m.header.stamp.sec, m.header.stamp.nanosec) for m in inbox] for inbox in (images, fixes)]
    assert len(stamps[0]) == 12 and stamps[0] == stamps[1]
    # Stamps are the vehicle's time, a tenth of a second apart.
    assert set(np.diff([sec * 10**9 + nanosec for sec, nanosec in stamps[0]])) == {10**8}
    assert len(truths) == len(odometry) == 12
    assert (images[0].height, images[0].width) == (32, 128)


def test_command_writes_a_bag_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["simulate", str(tmp_path), "--frames", "3", "--size", "300", "--height", "32"]
    process = [sys.executable, "-m", "xview_loc.cli", *words]
    done = subprocess.run(process, capture_output=True, text=True, cwd=ROOT, timeout=800)
    assert done.returncode == 0, done.stderr
    with AnyReader([tmp_path / "drive"]) as reader:
        counts = {c.topic: c.msgcount for c in reader.connections}
    assert counts.pop("/odom") >= 3
    assert counts == dict.fromkeys(TOPICS.keys() - {"/odom"}, 3)
    monkeypatch.setattr(sys, "argv", ["xview-loc", *words])
    with pytest.raises(SystemExit) as again:
        main()
    assert again.value.code == 2 and "exists already" in capsys.readouterr().err


def test_command_drives_a_rig_live(tmp_path: Path) -> None:
    """Also without tf2_msgs, which is said."""
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from ros_harness import bench, environment, pick_domain
    from sensor_msgs.msg import CameraInfo, CompressedImage, Imu

    domain = pick_domain()
    words = ["simulate", str(tmp_path), "--ros", "--rig", "three", "--frames", "5", "--rate", "5"]
    words += ["--height", "90", "--size", "300"]
    with bench(domain) as here, open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "xview_loc.cli", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(domain),
        )
        try:
            imu = here.listen(Imu, "/imu")
            infos = here.listen(CameraInfo, "/left/camera_info")
            here.wait(
                lambda: all(here.node.count_publishers(t) for t in ("/left/image/compressed", "/imu")),
                120.0,
                "the drive",
            )
            # Any camera's subscriber starts the drive.
            images = here.listen(CompressedImage, "/left/image/compressed")
            here.wait(lambda: process.poll() is not None, 120.0, "the end of the drive")
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert "published 5 frames" in text
    assert ("tf2_msgs cannot be imported" in text) == (find_spec("tf2_msgs") is None)
    assert len(images) == len(infos) == len(imu) == 5
    assert [m.header.stamp for m in images] == [m.header.stamp for m in imu]
    assert (infos[0].height, infos[0].width) == (90, 160)
    assert decode_compressed(bytes(images[0].data)).shape == (90, 160, 3)


def test_command_refuses_unknown_rigs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["xview-loc", "simulate", str(tmp_path), "--rig", "two"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "unknown rig 'two'; choose from one, three, four, six, eight" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "advice"), [("cv2", "pip install opencv"), ("rclpy", "xview_loc[ros]")])
def test_command_says_what_to_install(tmp_path: Path, module: str, advice: str) -> None:
    words = [sys.executable, "-c", BLOCK.format(module), "simulate", str(tmp_path / "out"), "--ros"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=800)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert module in line and advice in line
