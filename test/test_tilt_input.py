"""Tilts from tf, and from an Imu whose frame tf knows; without a node."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import Quaternion
from sensor_msgs.msg import Imu

from xview_loc.nodes.cameras import Frame
from xview_loc.nodes.diagnostics import Health
from xview_loc.nodes.parameters import LOCALIZER, ParameterError
from xview_loc.nodes.tilt_input import TiltInput
from xview_loc.nodes.transforms import Transforms
from xview_loc.vehicle.pairing import Paired, Pairing
from xview_loc.vehicle.synchronisation import GnssFix, RejectedInput
from xview_loc.vehicle.tilt import TiltSample
from xview_loc.vehicle.transforms import Transform, TransformBuffer

NS = 1_000_000_000


def turned(roll_deg: float = 0.0, pitch_deg: float = 0.0, yaw_deg: float = 0.0) -> Transform:
    pose = Transform.planar(3.0, 4.0, math.radians(yaw_deg))
    for axis, angle in ((1, math.radians(pitch_deg)), (0, math.radians(roll_deg))):
        rotation = np.zeros(4)
        rotation[axis], rotation[3] = math.sin(angle / 2), math.cos(angle / 2)
        pose = pose @ Transform(np.zeros(3), rotation)
    return pose


class Tf(Transforms):
    """tf, without a node."""

    def __init__(self) -> None:
        self.buffer, self.on_new = TransformBuffer(), []

    def say(self, seconds: float, parent: str, child: str, pose: Transform, static: bool = False) -> None:
        self.buffer.add(round(seconds * NS), parent, child, pose, static)
        for call in self.on_new:
            call()


class Vehicle:
    """A tilt input and what it gives. ``refused``: reasons."""

    def __init__(self, source: str, tf: Tf | None, **parameters: Any) -> None:
        def listen(why: str) -> Transforms:
            if tf is None:
                raise ParameterError(why)
            return tf

        limits = {"max_fix_age_s": 9.0, "max_heading_age_s": 1.0, "fix_max_jump_m": 0.0, "max_wait_s": 0.0}
        self.pairing: Pairing[Frame] = Pairing(
            **limits, use_heading=False, use_tilt=True, on_restart=lambda *_: None
        )
        self.pairing.add_fix(GnssFix(NS, 48.0, 16.0, 0.0, None))
        self.refused: list[str] = []
        self.health = Health("")
        params = {p.name: p.default for p in LOCALIZER} | parameters | {"tilt_source": source}
        self.input = TiltInput(params, self.pairing, self.health, listen, self.refuse)

    def refuse(self, name: str, error: RejectedInput) -> None:
        self.refused.append(error.reason)

    def tilt(self, seconds: float) -> tuple[float, float]:
        """Roll and pitch of a frame, degrees."""
        paired = self.frame(seconds)
        tilt = self.input.of(paired)
        return math.degrees(tilt.roll), math.degrees(tilt.pitch)

    def frame(self, seconds: float) -> Paired[Frame]:
        self.pairing.add_frame(Frame(round(seconds * NS), 0, (), {}), 0)
        (paired,) = self.pairing.ready(1)
        assert isinstance(paired, Paired)
        return paired

    def text(self) -> str:
        return str(self.health.report("").message)


def test_tf_is_interpolated_to_the_image() -> None:
    tf = Tf()
    vehicle = Vehicle("tf", tf)
    tf.say(0.0, "base_link", "camera", turned(), static=True)
    assert vehicle.refused == ["tilt_missing"]  # nobody has said where base_link is
    for second, roll in ((1.0, 2.0), (1.5, 4.0)):
        tf.say(second, "odom", "base_link", turned(roll, -3.0, 100.0))
    # What else is on tf gives nothing new.
    tf.say(1.6, "base_link", "wheel", turned(45.0))
    assert vehicle.tilt(1.25) == pytest.approx((3.0, -3.0), abs=0.01)
    assert vehicle.refused == ["tilt_missing"] and vehicle.text() == ""


def test_a_vehicle_on_its_side_is_refused() -> None:
    tf = Tf()
    vehicle = Vehicle("tf", tf, pitch_deg=1.0)
    tf.say(1.0, "odom", "base_link", turned(80.0))
    assert vehicle.refused == ["tilt_implausible"]
    paired = vehicle.frame(1.0)
    vehicle.input.show_missing(paired)
    assert "no tilt from tf within" in vehicle.text() and "pitch_deg 1" in vehicle.text()
    assert vehicle.input.of(paired) == TiltSample(NS, 0.0, math.radians(1.0))


def imu(pose: Transform, frame: str, second: int = 1) -> Imu:
    x, y, z, w = pose.rotation.tolist()
    message = Imu(orientation=Quaternion(x=x, y=y, z=z, w=w))
    message.header.stamp.sec, message.header.frame_id = second, frame
    return message


def test_an_imu_that_is_mounted_turned() -> None:
    tf = Tf()
    mounting = turned(yaw_deg=90.0) @ turned(roll_deg=180.0)
    tf.say(0.0, "base_link", "imu_link", mounting, static=True)
    vehicle = Vehicle("imu", tf)
    (listens,) = vehicle.input.inputs()
    listens.callback(imu(turned(5.0, -2.0, 33.0) @ mounting, "imu_link"))
    assert vehicle.tilt(1.0) == pytest.approx((5.0, -2.0), abs=0.01)
    assert vehicle.text() == ""


@pytest.mark.parametrize(("tf", "why"), [(Tf(), "frame 'imu_link' is unknown"), (None, "tf2_msgs cannot be")])
def test_an_imu_in_an_unknown_frame_is_taken_as_it_is(tf: Tf | None, why: str) -> None:
    if tf is not None:
        tf.say(0.0, "base_link", "camera", turned(), static=True)
    vehicle = Vehicle("imu", tf)
    (listens,) = vehicle.input.inputs()
    listens.callback(imu(turned(5.0), "imu_link"))
    assert vehicle.tilt(1.0) == pytest.approx((5.0, 0.0), abs=0.01)
    assert vehicle.text().startswith("imu_frame: imu gives the tilt of imu_link") and why in vehicle.text()
    listens.callback(imu(turned(5.0), "base_link", 2))
    assert vehicle.text() == ""
