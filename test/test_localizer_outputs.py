"""tf, the initial pose, services and clouds of a running localizer; the tests share one."""

from __future__ import annotations

import array
import math
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import PoseWithCovarianceStamped, Quaternion, TransformStamped, Vector3
from localizer_rig import DATUM, LAT, LON, NS, YAW, Rig, running, stamp, true_place
from nav_msgs.msg import Odometry
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros_harness import pick_domain
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from xview_loc.nodes.outputs import pose_message
from xview_loc.vehicle.messages import yaw_of
from xview_loc.vehicle.transforms import Transform

DOMAIN = pick_domain()
STAND_INS = Path(__file__).parent / "stand_ins"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STAND_INS), prepend=os.pathsep)
        with running(DOMAIN, tmp_path_factory.mktemp("localizer"), "/camera/image_rect") as r:
            yield r


class Tf:
    """The vehicle's other publishers of tf, and all that is on /tf."""

    def __init__(self, rig: Rig) -> None:
        from tf2_msgs.msg import TFMessage

        self.kind, self.rig = TFMessage, rig
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._moving = rig.bench.publisher(TFMessage, "/tf")
        self._static = rig.bench.node.create_publisher(TFMessage, "/tf_static", latched)
        self._heard = rig.bench.listen(TFMessage, "/tf", 100)

    def ready(self) -> None:
        self.rig.bench.wait(
            lambda: self._moving.get_subscription_count() > 1 and self._static.get_subscription_count(),
            what="tf's subscriptions",
        )

    def send(self, ns: int, parent: str, child: str, pose: Transform, static: bool = False) -> None:
        t, q = pose.translation.tolist(), pose.rotation.tolist()
        message = self.rig.header(TransformStamped(child_frame_id=child), ns)
        message.header.frame_id = parent
        message.transform.translation = Vector3(x=t[0], y=t[1], z=t[2])
        message.transform.rotation = Quaternion(x=q[0], y=q[1], z=q[2], w=q[3])
        (self._static if static else self._moving).publish(self.kind(transforms=[message]))

    def heard(self, child: str) -> list[Any]:
        """Transforms of the map received so far."""
        every = [one for message in self._heard for one in message.transforms]
        return [one for one in every if one.header.frame_id == "map" and one.child_frame_id == child]


@pytest.mark.skipif(find_spec("tf2_msgs") is None, reason="tf2_msgs is not installed")
def test_tf_carries_the_map_as_amcl_does(rig: Rig) -> None:
    b, tf = rig.bench, Tf(rig)
    # The odometry's base_link leans, and is above the ground.
    lean = np.array([math.sin(0.05), 0.0, 0.0, math.cos(0.05)])
    leaning = Transform(np.array([0.0, 0.0, 0.4]), lean)
    odometry = [Transform.planar(5.0 + 0.1 * k, -3.0, 0.7) @ leaning for k in range(20)]

    def frame(k: int, moved: bool = True) -> int:
        """Send an image and, unless the odometry is late, the transforms around its stamp."""
        ns = rig.step(0.2)
        rig.odom.publish(rig.header(Odometry(child_frame_id="base_link"), ns))
        if moved:
            tf.send(ns - NS // 20, "odom", "base_link", odometry[k])
            tf.send(ns + NS // 20, "odom", "base_link", odometry[k + 1])
        rig.send_fix(ns)
        rig.send_heading(ns)
        rig.send_image(ns)
        return ns

    with rig.configured(filter=True, publish_tf="map_to_odom", transform_tolerance=0.5):
        tf.ready()
        rig.good_frame()
        # No odometry is on tf: said once the next pose is there.
        rig.good_frame()
        assert b.wait_diagnosis("tf: map -> odom is not published: frame 'odom' is unknown").level == b"\x01"
        while not tf.heard("odom"):
            frame(0)
            b.wait_diagnosis()
        b.wait(lambda: "tf: " not in b.text(), what="the warning's end")
        heard = len(tf.heard("odom"))
        ns = frame(4, moved=False)
        b.wait(lambda: rig.filtered and stamp(rig.filtered[-1]) == ns, what="the filtered pose")
        assert len(tf.heard("odom")) == heard
        tf.send(ns - NS // 20, "odom", "base_link", odometry[4])
        tf.send(ns + NS // 20, "odom", "base_link", odometry[5])
        b.wait(lambda: len(tf.heard("odom")) > heard, what="the transform")
        message = tf.heard("odom")[-1]
        assert stamp(message) == ns + NS // 2
        placed = Transform.of(message.transform) @ odometry[4].blend(odometry[5], 0.5)
        pose = rig.filtered[-1].pose.pose
        assert placed.translation[:2] == pytest.approx([pose.position.x, pose.position.y], abs=1e-6)
        assert placed.yaw == pytest.approx(yaw_of(pose.orientation), abs=1e-6)
        # The map stays level: the lean is the odometry's.
        assert message.transform.rotation.x == message.transform.rotation.y == 0.0
        assert placed.translation[2] == pytest.approx(0.4, abs=1e-6)
        assert not tf.heard("base_link")

    with rig.configured(publish_tf="map_to_base", camera_frame="eye_optical", antenna_frame="antenna"):
        tf.ready()
        before = len(rig.poses)
        rig.send_frame()
        b.wait_diagnosis("extrinsics_missing", "tf from base_link to antenna")
        assert len(rig.poses) == before
        # The camera looks back, 2 m before base_link; its optical frame's z axis is its x axis.
        optical = Transform(np.zeros(3), np.array([-0.5, 0.5, -0.5, 0.5]))
        tf.send(rig.ns, "base_link", "eye", Transform.planar(2.0, 0.0, math.pi), static=True)
        tf.send(rig.ns, "eye", "eye_optical", optical, static=True)
        tf.send(rig.ns, "base_link", "antenna", Transform.planar(-1.0, 0.5, 0.0), static=True)
        pose = rig.good_frame()
        b.wait(lambda: tf.heard("base_link") and stamp(tf.heard("base_link")[-1]) == stamp(pose), what="tf")
        message, place = tf.heard("base_link")[-1], pose.pose.pose
        assert message.transform.translation.x == place.position.x
        assert message.transform.rotation.z == pytest.approx(place.orientation.z)
        assert yaw_of(place.orientation) == pytest.approx(YAW + DATUM.convergence(LAT, LON), abs=1e-3)
        # Where the camera was found, less the 2 m.
        camera = Transform.planar(place.position.x, place.position.y, yaw_of(place.orientation))
        camera @= Transform.planar(2.0, 0.0, 0.0)
        x, y = DATUM.forward(*true_place(*DATUM.inverse(*camera.translation[:2])))
        assert math.hypot(camera.translation[0] - x, camera.translation[1] - y) < 0.1
        # Odometry on tf would make two parents of base_link.
        tf.send(rig.ns, "odom", "base_link", odometry[0])
        assert b.wait_diagnosis("tf_parents", "base_link has two parents").level == b"\x01"

    with rig.configured(heading_frame="compass"):
        tf.ready()
        rig.send_frame()
        b.wait_diagnosis("last heading refused: tf from base_link to compass")
        tf.send(rig.ns, "base_link", "compass", Transform.planar(0.5, 0.0, 0.3), static=True)
        yaw = yaw_of(rig.good_frame().pose.pose.orientation)
        assert yaw == pytest.approx(YAW - 0.3 + DATUM.convergence(LAT, LON), abs=1e-3)


def test_an_operator_gives_the_pose_pauses_and_searches_anew(rig: Rig) -> None:
    b = rig.bench
    click = b.publisher(PoseWithCovarianceStamped, "/initialpose")
    b.wait(click.get_subscription_count, what="the topic")

    def pose(east: float = 0.0, **changes: Any) -> PoseWithCovarianceStamped:
        """At the true place, or so far off; without a stamp."""
        x, y = DATUM.forward(*true_place())
        values = {"position": (x + east, y), "covariance": np.eye(2) * 4.0, "yaw": YAW, "yaw_variance": 0.05}
        return pose_message(Header(frame_id=changes.pop("frame", "map")), **{**values, **changes})

    def image(fix: bool = False) -> None:
        """Send an image, with a heading, and wait for its filtered pose."""
        ns = rig.step(0.2)
        rig.odom.publish(rig.header(Odometry(child_frame_id="base_link"), ns))
        if fix:
            rig.send_fix(ns)
        rig.send_heading(ns)
        rig.send_image(ns)
        b.wait(lambda: rig.filtered and stamp(rig.filtered[-1]) == ns, what="a filtered pose")

    def off() -> float:
        """How far the last filtered pose is from the true place."""
        x, y = DATUM.forward(*true_place())
        p = rig.filtered[-1].pose.pose.position
        return math.hypot(p.x - x, p.y - y)

    click.publish(pose())
    assert b.wait_diagnosis("initial pose refused", "set filter: true").level == b"\x01"
    assert b.trigger("/localizer/relocalize") == (
        False,
        "no filter is active: images are searched around their fixes anyway",
    )
    with rig.configured(filter=True, datum_lat=math.nan, datum_lon=math.nan):
        click.publish(pose())
        b.wait_diagnosis("initial pose refused", "set datum_lat and datum_lon")
    with rig.configured(filter=True):
        for message, says in (
            (pose(frame="odom"), "it is in frame 'odom', 'map' is expected"),
            (pose(covariance=np.eye(2) * 1e5), "at most 167 m"),
            (pose(east=math.nan), "not finite"),
            (pose(east=1e9), "more than 50 km"),
        ):
            click.publish(message)
            b.wait_diagnosis(says)
        rig.filtered.clear()
        rig.fixes.clear()
        click.publish(pose(east=3.0))
        b.wait(lambda: "refused" not in b.text(), what="the pose")
        b.wait(rig.odom.get_subscription_count, what="the odometry's subscription")
        # It has had no fix at all.
        for _ in range(5):
            image()
        assert off() < 3.0
        ignored = len(rig.filtered)
        assert b.set_bool("/localizer/set_enabled", False) == (True, "disabled")
        for _ in range(3):
            rig.send_frame(0.2)
        b.wait(lambda: b.value("images_ignored") == "3", what="the images")
        assert b.wait_diagnosis("disabled: images are ignored").level == b"\x01"
        assert len(rig.filtered) == ignored
        assert b.set_bool("/localizer/set_enabled", True) == (True, "enabled")
        image()
        # Far off, where fixes and images contradict it: forgotten at once, not after 20 s.
        click.publish(pose(east=60.0))
        b.wait(lambda: b.value("initialpose_received") == "7", what="the pose")
        image(fix=True)
        assert off() > 40.0
        assert b.trigger("/localizer/relocalize") == (
            True,
            "the position is forgotten; the next fix is the new start; without one, images are searched "
            "within 200 m",
        )
        image(fix=True)
        assert off() < 15.0
        b.wait(lambda: "disabled" not in b.text(), what="the warning's end")
        # Too rough to start from.
        assert not b.set_parameter("/localizer", "start_radius_m", 0.0)
        click.publish(pose(covariance=np.eye(2) * 900.0))
        b.wait_diagnosis("initial pose refused", "at most 25 m while start_radius_m is 0")
        assert not b.set_parameter("/localizer", "start_radius_m", 100.0)
        click.publish(pose(covariance=np.eye(2) * 900.0))
        b.wait(lambda: b.value("initialpose_received") == "9", what="the pose")
        rig.step()  # beyond the last fix
        # Odometry may be heard a little later than the first image.
        says = re.compile(r"searching: no fix to start from: searching for the vehicle within 9\d m")
        while not says.search(b.text()):
            ns = rig.step(0.5)
            rig.odom.publish(rig.header(Odometry(child_frame_id="base_link"), ns))
            rig.send_heading(ns)
            rig.send_image(ns)
            b.wait_diagnosis()
        image(fix=True)
        b.wait(lambda: "searching" not in b.text(), what="its end")


def test_cv_bridge_converts_what_is_not_known_here_and_is_not_believed_where_it_is_wrong(rig: Rig) -> None:
    b = rig.bench
    before = len(rig.poses)

    def frame(**image: Any) -> None:
        ns = rig.step()
        rig.send_fix(ns)
        rig.send_heading(ns)
        # Whatever the step is: stripes of eight bytes.
        data = array.array("B", (bytes([40] * 8 + [90] * 8) * 160)[: 32 * image["step"]])
        rig.send_image(ns, data=data, **image)

    frame(encoding="inverted", step=64)
    b.wait(lambda: len(rig.poses) > before, what="a pose")
    for encoding, step, says in (
        ("inverted", 65, "'inverted' has padded rows, which cv_bridge would skew"),
        ("bad", 64, "'bad': cv_bridge made uint8 of shape (32, 64) of it, not RGB"),
        ("yuv9", 64, "'yuv9' is not supported, nor by cv_bridge: [yuv9] is not a color format"),
    ):
        frame(encoding=encoding, step=step)
        rig.expect_rejection("image_invalid", says)


@pytest.mark.skipif(find_spec("sensor_msgs_py") is None, reason="sensor_msgs_py is not installed")
def test_the_likely_places_are_a_cloud_of_points(rig: Rig) -> None:
    b = rig.bench
    with rig.configured(heat_map_rate=100.0):
        clouds = b.listen(PointCloud2, "/localizer/hypotheses")
        while not clouds:
            pose = rig.good_frame()
    cloud = clouds[-1]
    assert cloud.header.frame_id == "map" and cloud.height == 1 and not cloud.is_bigendian
    assert [(f.name, f.offset, f.datatype, f.count) for f in cloud.fields] == [
        (name, 4 * k, 7, 1) for k, name in enumerate(("x", "y", "z", "probability"))
    ]
    points = np.frombuffer(bytes(cloud.data), "<f4").reshape(cloud.width, 4).astype(float)
    assert cloud.point_step == 16 and cloud.row_step == 16 * cloud.width == len(cloud.data)
    # The heat map is a Gaussian of 2 px, 1 m, about the pose: 95 % lie within 2.45 m.
    p = pose.pose.pose.position
    away = np.hypot(points[:, 0] - p.x, points[:, 1] - p.y)
    assert 2.3 < away.max() < 2.8 and (points[:, 2] == 0.0).all()
    # x and y are metres from a datum 2 km away, in 4 bytes.
    assert away.argmin() < 4 and (np.diff(points[:, 3]) <= 0.0).all()
    assert points[:, 3].sum() == pytest.approx(0.95, abs=0.01)


def test_rectified_images_are_not_undistorted_twice(rig: Rig) -> None:
    b = rig.bench
    raw = {"d": [0.1, 0.0, 0.0, 0.0, 0.0], "distortion_model": "plumb_bob"}
    p = [28.0, 0.0, 31.5, 0.0, 0.0, 28.0, 15.5, 0.0, 0.0, 0.0, 1.0, 0.0]
    with rig.configured(model="stub-pinhole"):
        b.wait(rig.info.get_subscription_count, what="the camera_info's subscription")
        rig.send_info(rig.ns, p=p, **raw)
        assert b.wait_diagnosis("rectified: images on /camera/image_rect are corrected").level == b"\x01"
        assert b.set_parameter("/localizer", "rectified", True) == ""
        rig.send_info(rig.ns, p=p, **raw)
        b.wait(lambda: "rectified" not in b.text(), what="the warning's end")
        rig.good_frame()
        # The sensor has four times the pixels, binned.
        received = int(b.value("camera_info_received"))
        rig.send_info(rig.ns, p=p, width=128, height=64, binning_x=2, binning_y=2, **raw)
        b.wait(lambda: int(b.value("camera_info_received")) > received, what="the camera_info")
        rig.good_frame()
