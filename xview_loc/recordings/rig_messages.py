"""The cameras of a rig as messages of a bag of pairs: calibration, extrinsics and masks, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np

from xview_loc.bags.ros_types import camera_info, header, message, transforms
from xview_loc.camera import CameraError, CameraModel
from xview_loc.images import MAX_PIXELS, ImageError, check_complete, check_size, decode_compressed
from xview_loc.rig import Mask, MountedCamera, Rig
from xview_loc.vehicle.messages import camera_from_info
from xview_loc.vehicle.mounted_cameras import (
    FARTHEST_M,
    MOST_CAMERAS,
    MOST_PIXELS,
    check_names,
    mount,
)
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.transforms import Transform

BASE_FRAME = "base_link"
TF_STATIC = "/tf_static"
_IMAGE, _INFO, _MASK = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/CameraInfo", "own_mask"
_TRANSFORMS = "tf2_msgs/msg/TFMessage"
_IMAGE_TOPIC = re.compile("/pair/([^/]*)/image")


def make_rig(cameras: Mapping[str, MountedCamera], own: Mapping[str, Mask], height: float) -> Rig:
    """Return the rig of recorded cameras; ``height``: of ``base_link`` above the ground, metres.

    Raises CameraError if there are none, or they cannot be a vehicle's.
    """
    if not cameras:
        raise CameraError("no camera has a camera_info")
    check_rig(cameras)
    if not 0.0 <= height <= FARTHEST_M:  # NaN as well
        raise CameraError(f"{BASE_FRAME} cannot be {height} m above the ground")
    return Rig(cameras, height, own)


def check_rig(cameras: Mapping[str, MountedCamera]) -> None:
    """Raise CameraError unless a rig's cameras can be recorded: names, number, size and places."""
    check_names(cameras)
    pixels = sum(mounted.camera.width * mounted.camera.height for mounted in cameras.values())
    if pixels > MOST_PIXELS:
        most = f"{MOST_PIXELS / 1e6:.0f} million"
        raise CameraError(f"the rig's images have {pixels / 1e6:.0f} million pixels together, at most {most}")
    for name, mounted in cameras.items():
        if not isinstance(mounted.camera, CameraModel):
            raise CameraError(f"camera {name} of the rig takes panoramas: record it alone")
        if not all(abs(value) <= FARTHEST_M for value in mounted.position):  # NaN as well
            raise CameraError(f"camera {name} is not on the vehicle: it is at {mounted.position} m")


def rig_mounting(rig: Rig, antenna: tuple[float, float]) -> Mounting:
    """Return where antenna and camera are: a rig's panoramas are seen from the middle of its cameras."""
    return Mounting(antenna, (float(rig.centre[0]), float(rig.centre[1])))


def image_topic(name: str) -> str:
    """Return the topic of a camera's images."""
    return f"/pair/{name}/image"


def rig_topics(names: Iterable[str]) -> dict[str, str]:
    """Return the topics that describe a rig's cameras, and their types."""
    topics = {TF_STATIC: _TRANSFORMS}
    for name in names:
        topics |= {f"/pair/{name}/camera_info": _INFO, f"/pair/{name}/{_MASK}": _IMAGE}
    return topics


def camera_names(topics: Iterable[str]) -> list[str]:
    """Return the names of the cameras that have images among a bag's topics, sorted. Raises CameraError."""
    found = sorted({match[1] for topic in topics if (match := _IMAGE_TOPIC.fullmatch(topic))})
    check_names(found)
    return found


def rig_messages(rig: Rig, stamp_ns: int) -> Iterator[tuple[str, Any]]:
    """Yield topics and messages that describe a rig's cameras."""
    for name, mounted in rig.cameras.items():
        camera = mounted.camera
        assert isinstance(camera, CameraModel)  # checked
        size, lens = (camera.width, camera.height), (camera.distortion, camera.distortion_model)
        yield f"/pair/{name}/camera_info", camera_info(header(stamp_ns, name), *size, camera.k, *lens)
    poses = {name: (mounted.position, mounted.rotation) for name, mounted in rig.cameras.items()}
    yield TF_STATIC, transforms(stamp_ns, BASE_FRAME, poses)
    for name, mask in rig.own.items():
        yield f"/pair/{name}/{_MASK}", mask_message(mask, stamp_ns, name)


def read_cameras(
    names: Iterable[str], found: Mapping[str, Any]
) -> tuple[dict[str, MountedCamera], dict[str, Mask]]:
    """Return the cameras that :func:`rig_messages` described, and their masks; those without are left out.

    ``found`` are the messages by topic. Raises CameraError, and any error on damaged ones.
    """
    poses = {
        one.child_frame_id: Transform.of(one.transform)
        for one in getattr(found.get(TF_STATIC), "transforms", ())[:MOST_CAMERAS]
        if one.header.frame_id == BASE_FRAME
    }
    cameras, own = {}, {}
    for name in names:
        if (info := found.get(f"/pair/{name}/camera_info")) is None:
            continue
        if (pose := poses.get(name)) is None:
            raise CameraError(f"{TF_STATIC} has no transform from {BASE_FRAME} to camera {name}")
        cameras[name] = mount(camera_from_info(info), pose)
        if (mask := found.get(f"/pair/{name}/{_MASK}")) is not None:
            camera = cameras[name].camera
            own[name] = decode_mask(mask.data.tobytes(), camera.width * camera.height)
    return cameras, own


def mask_message(mask: Mask, stamp_ns: int, camera: str = "") -> Any:
    """Return a mask as a CompressedImage: white where it is set."""
    png = cv2.imencode(".png", np.where(mask, 255, 0).astype(np.uint8))[1]
    return message(_IMAGE, header=header(stamp_ns, camera), format="png", data=png.reshape(-1))


def decode_mask(content: bytes, most_pixels: int = MAX_PIXELS) -> Mask:
    """Decode an image that is white where a camera sees the vehicle. Raises ImageError."""
    check_complete(content)
    check_size(content, most_pixels)
    mask = np.asarray(decode_compressed(content)[..., 1] > 127)
    if mask.all():
        raise ImageError("the mask of the vehicle's own parts hides the whole image")
    return mask
