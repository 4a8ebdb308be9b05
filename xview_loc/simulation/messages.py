"""Serialized ROS 2 messages of a simulated drive, for bags and for DDS. Needs no ROS."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from xview_loc.bags.ros_types import (
    camera_info,
    header,
    imu,
    message,
    nav_sat_fix,
    quaternion,
    serialize,
    transforms,
)
from xview_loc.bags.writer import BagWriter
from xview_loc.camera import CameraModel
from xview_loc.files import whole_folder
from xview_loc.images import encode_jpeg
from xview_loc.rig import Rig
from xview_loc.simulation.drives import Frame, Wheels

# Start of bags, 14 November 2023: fixed, so that equal drives give equal bags. In ROS, zero means no time.
START_NS = 1_700_000_000 * 1_000_000_000
CAMERA_FRAME, ANTENNA_FRAME, BASE_FRAME, ODOM_FRAME = "camera", "antenna", "base_link", "odom"
TOPICS = {
    "/image": "sensor_msgs/msg/Image",
    "/fix": "sensor_msgs/msg/NavSatFix",
    "/heading": "geometry_msgs/msg/QuaternionStamped",
    "/odom": "nav_msgs/msg/Odometry",
    "/truth/fix": "sensor_msgs/msg/NavSatFix",
    "/truth/heading": "geometry_msgs/msg/QuaternionStamped",
}
_JPEG_QUALITY = 90


def image_topic(camera: str) -> str:
    """Return the topic of the images of a rig's camera."""
    return f"/{camera}/image/compressed"


def topics(rig: Rig | None = None) -> dict[str, str]:
    """Return the topics of a drive and their types; with a rig, its cameras' instead of ``/image``."""
    if rig is None:
        return dict(TOPICS)
    images = {image_topic(name): "sensor_msgs/msg/CompressedImage" for name in rig.cameras}
    infos = {f"/{name}/camera_info": "sensor_msgs/msg/CameraInfo" for name in rig.cameras}
    rest = {topic: kind for topic, kind in TOPICS.items() if topic != "/image"}
    tilt = {"/imu": "sensor_msgs/msg/Imu", "/tf_static": "tf2_msgs/msg/TFMessage"}
    return images | infos | rest | tilt


def frame_messages(frame: Frame, stamp_ns: int, rig: Rig | None = None) -> list[tuple[str, int, bytes]]:
    """Return (topic, stamp, CDR bytes) of the messages of a frame, stamped ``stamp_ns``; images come last.

    Those of ``/odom`` since the frame before come first, with stamps of their own: they hold the twist of the
    wheels, and mark their pose as unknown. Headings are true-north ENU yaws. ``rig`` is that of the drive:
    its images are JPEGs, and ``/imu`` has heading, roll and pitch.
    """
    fix, truth = frame.fix, frame.truth
    kinds, start_ns = topics(rig), stamp_ns - frame.stamp_ns
    wheels = [
        ("/odom", start_ns + one.stamp_ns, serialize(kinds["/odom"], _odometry(one, start_ns)))
        for one in frame.wheels
    ]
    messages = [
        ("/truth/fix", _fix(stamp_ns, truth.lat, truth.lon, np.zeros((2, 2)), BASE_FRAME)),
        ("/truth/heading", _heading(stamp_ns, truth.heading)),
        ("/heading", _heading(stamp_ns, frame.heading)),
        ("/fix", _fix(stamp_ns, fix.lat, fix.lon, fix.covariance, ANTENNA_FRAME)),
    ]
    if frame.image is not None:
        messages.append(("/image", _image(stamp_ns, frame.image)))
    if rig is not None:
        messages.append(("/imu", _imu(frame, stamp_ns)))
        for name, image in frame.images.items():
            head, camera = header(stamp_ns, _optical_frame(name)), rig.cameras[name].camera
            if isinstance(camera, CameraModel):
                lens = camera.width, camera.height, camera.k, camera.distortion, camera.distortion_model
                messages.append((f"/{name}/camera_info", camera_info(head, *lens)))
            data = np.frombuffer(encode_jpeg(image, _JPEG_QUALITY), np.uint8)
            jpeg = message("sensor_msgs/msg/CompressedImage", header=head, format="jpeg", data=data)
            messages.append((image_topic(name), jpeg))
    return wheels + [(topic, stamp_ns, serialize(kinds[topic], value)) for topic, value in messages]


def static_message(rig: Rig, stamp_ns: int) -> bytes:
    """Return the CDR bytes of ``/tf_static``: where the optical frame of each camera is in ``base_link``."""
    poses = {_optical_frame(name): (one.position, one.rotation) for name, one in rig.cameras.items()}
    return serialize("tf2_msgs/msg/TFMessage", transforms(stamp_ns, BASE_FRAME, poses))


def _optical_frame(camera: str) -> str:
    return f"{camera}_optical_frame"


def write_bag(
    frames: Iterable[Frame], folder: Path, start_ns: int = START_NS, rig: Rig | None = None
) -> None:
    """Write a drive, with the rig that it was driven with, to a new rosbag2 (MCAP).

    Stamps count from ``start_ns``. ``folder`` appears when it is complete. Raises OSError if it exists or
    cannot be written.
    """
    with whole_folder(folder) as partial, closing(BagWriter(partial, topics(rig))) as writer:
        if rig is not None:
            writer.write("/tf_static", start_ns, static_message(rig, start_ns))
        for frame in frames:
            for topic, stamp, data in frame_messages(frame, start_ns + frame.stamp_ns, rig):
                writer.write(topic, stamp, data)


def _heading(stamp_ns: int, yaw: float) -> Any:
    return message(
        "geometry_msgs/msg/QuaternionStamped", header=header(stamp_ns, BASE_FRAME), quaternion=quaternion(yaw)
    )


def _fix(stamp_ns: int, lat: float, lon: float, covariance: Any, frame_id: str) -> Any:
    full = np.zeros((3, 3))
    full[:2, :2] = covariance
    # Heights of receivers are about twice as uncertain as positions.
    full[2, 2] = 4.0 * max(covariance[0, 0], covariance[1, 1])
    return nav_sat_fix(header(stamp_ns, frame_id), lat, lon, 0.0, full)


def _imu(frame: Frame, stamp_ns: int) -> Any:
    variances = np.square([frame.tilt_std, frame.tilt_std, frame.heading_std])
    orientation = quaternion(frame.heading, frame.pitch, frame.roll)
    return imu(header(stamp_ns, BASE_FRAME), orientation, np.diag(variances))


def _odometry(wheels: Wheels, start_ns: int) -> Any:
    def vector(x: float = 0.0, z: float = 0.0) -> Any:
        return message("geometry_msgs/msg/Vector3", x=x, y=0.0, z=z)

    origin = message("geometry_msgs/msg/Point", x=0.0, y=0.0, z=0.0)
    pose = message("geometry_msgs/msg/Pose", position=origin, orientation=quaternion(0.0))
    unknown = np.diag(np.full(6, 1e6)).reshape(36)
    twist = message(
        "geometry_msgs/msg/Twist", linear=vector(x=wheels.speed), angular=vector(z=wheels.yaw_rate)
    )
    noise = np.diag([0.05**2, 0.01**2, 1e6, 1e6, 1e6, 0.005**2]).reshape(36)
    return message(
        "nav_msgs/msg/Odometry",
        header=header(start_ns + wheels.stamp_ns, ODOM_FRAME),
        child_frame_id=BASE_FRAME,
        pose=message("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=unknown),
        twist=message("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=noise),
    )


def _image(stamp_ns: int, image: Any) -> Any:
    height, width = image.shape[:2]
    return message(
        "sensor_msgs/msg/Image",
        header=header(stamp_ns, CAMERA_FRAME),
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=image.reshape(-1),
    )
