"""Pairs and their tiles as messages of a bag, and back: the topics of docs/pair_format.md but a rig's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.bags.ros_types import (
    COVARIANCE_KNOWN,
    UNMEASURED,
    camera_info,
    header,
    imu,
    message,
    nav_sat_fix,
    quaternion,
)
from xview_loc.images import decode_with_alpha
from xview_loc.maps.base import AerialTile
from xview_loc.recordings.pair import Pair
from xview_loc.vehicle.messages import camera_from_info, yaw_of
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.tilt import TiltSample

IMAGE, FIX, HEADING, TILT, CAMERA, TILE, OWN_MASK = (
    f"/pair/{name}" for name in ("image", "fix", "heading", "tilt", "camera_info", "tile", "own_mask")
)
TILE_IMAGE, TILE_GEOREFERENCE = "/tile/image", "/tile/georeference"
ODOMETRY, SESSION = "/odom", "/session"
TOPICS = {
    IMAGE: "sensor_msgs/msg/CompressedImage",
    FIX: "sensor_msgs/msg/NavSatFix",
    HEADING: "sensor_msgs/msg/Imu",
    TILT: "geometry_msgs/msg/Vector3Stamped",
    CAMERA: "sensor_msgs/msg/CameraInfo",
    OWN_MASK: "sensor_msgs/msg/CompressedImage",
    TILE: "std_msgs/msg/Header",
    TILE_IMAGE: "sensor_msgs/msg/CompressedImage",
    TILE_GEOREFERENCE: "std_msgs/msg/String",
    ODOMETRY: "nav_msgs/msg/Odometry",
    SESSION: "std_msgs/msg/String",
}
CONVENTIONS = {
    "pixel_origin": "pixel (row, col) names the pixel's centre; (0, 0) is the upper left one",
    "tile": "north-up square in the transverse Mercator plane (k = 1, WGS-84) about its lat and lon, which "
    "lie at pixel ((size - 1) / 2, (size - 1) / 2); gsd is metres per pixel",
    "heading": "ENU yaw of the vehicle's x axis from true north's east, counter-clockwise, radians",
    "tilt": "roll (x) and pitch (y) of the vehicle as in REP-103, radians: positive with the right side and "
    "the nose down; frame_id says where they come from",
    "rig": "camera_info, own_mask (white: the vehicle's own parts) and the optical frames in base_link "
    "(/tf_static, named after the cameras) hold for all pairs; base_height is base_link's above the ground",
    "mounting": "antenna and camera are (forward, left) of the vehicle's origin, metres",
    "panorama": "columns run clockwise; the centre column looks camera_yaw left of the vehicle's x axis",
    "fix": "WGS-84 degrees of the GNSS antenna at the image's stamp, covariance in ENU m^2",
}
FORMAT = 1


def pair_messages(pair: Pair) -> Iterator[tuple[str, Any]]:
    """Yield topics and messages of what the vehicle knew: fix, heading, calibration and tilt."""
    stamp = pair.stamp_ns
    head = header(stamp, "")
    yield FIX, nav_sat_fix(head, pair.lat, pair.lon, pair.altitude, _full(pair))
    covariance = None if pair.heading is None else np.diag([1e6, 1e6, pair.heading_std**2])
    yield HEADING, imu(head, quaternion(pair.heading or 0.0), covariance)
    if pair.camera is not None:
        camera = pair.camera
        size, lens = (camera.width, camera.height), (camera.distortion, camera.distortion_model)
        yield CAMERA, camera_info(head, *size, camera.k, *lens)
    if pair.tilt is not None:
        tilt = message("geometry_msgs/msg/Vector3", x=pair.tilt.roll, y=pair.tilt.pitch, z=0.0)
        yield TILT, message(TOPICS[TILT], header=header(stamp, pair.tilt_source), vector=tilt)


def read_pair(stamp: int, found: Mapping[str, Any], images: tuple[CameraImage, ...]) -> Pair:
    """Return the pair that :func:`pair_messages` described.

    ``found`` are its messages by topic, ``images`` those of a rig. Raises any error on damaged ones.
    """
    fix, heading, tilt = found[FIX], found[HEADING], found.get(TILT)
    known = fix.position_covariance_type == COVARIANCE_KNOWN
    yaw = read_heading(heading)
    sample = None
    if tilt is not None:
        sample = TiltSample(stamp, tilt.vector.x, tilt.vector.y)
        if not max(abs(sample.roll), abs(sample.pitch)) < math.pi / 2:  # NaN as well
            raise ValueError(f"no vehicle has a roll of {sample.roll} and a pitch of {sample.pitch}")
    return Pair(
        stamp_ns=stamp,
        image_format="" if images else found[IMAGE].format,
        image_bytes=b"" if images else found[IMAGE].data.tobytes(),
        lat=fix.latitude,
        lon=fix.longitude,
        altitude=fix.altitude,
        fix_covariance=fix.position_covariance.reshape(3, 3) if known else None,
        heading=yaw,
        heading_std=0.0 if yaw is None else math.sqrt(heading.orientation_covariance[8]),
        camera=camera_from_info(found[CAMERA]) if CAMERA in found else None,
        tile_id=found[TILE].frame_id,
        images=images,
        tilt=sample,
        tilt_source="" if tilt is None else tilt.header.frame_id,
    )


def read_sigma(fix: Any) -> float:
    """Return the standard deviation of a pair's fix along its larger axis, metres; NaN if unknown."""
    if fix.position_covariance_type != COVARIANCE_KNOWN:
        return math.nan
    horizontal = fix.position_covariance.reshape(3, 3)[:2, :2]
    if not np.isfinite(horizontal).all():
        return math.nan
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(horizontal)[-1])))


def read_heading(heading: Any) -> float | None:
    """Return the heading of a pair, true-north ENU yaw in radians; None if it is unknown."""
    return None if heading.orientation_covariance[0] == UNMEASURED else yaw_of(heading.orientation)


def image_message(head: Any, image_format: str, data: bytes) -> Any:
    """Return an encoded image as a CompressedImage."""
    return message(TOPICS[IMAGE], header=head, format=image_format, data=np.frombuffer(data, np.uint8))


def tile_messages(tile: AerialTile, stamp_ns: int) -> Iterator[tuple[str, Any]]:
    """Yield topics and messages of an aerial tile."""
    georeference = {
        "id": tile.key,
        "lat": tile.lat,
        "lon": tile.lon,
        "gsd": tile.gsd,
        "size": tile.size_px,
        "rotation": tile.rotation,
        "valid_fraction": tile.valid_fraction,
    }
    yield TILE_IMAGE, image_message(header(stamp_ns, tile.key), "png", encode_tile(tile))
    yield TILE_GEOREFERENCE, message(TOPICS[TILE_GEOREFERENCE], data=json.dumps(georeference))


def encode_tile(tile: AerialTile) -> bytes:
    """Encode a tile as PNG, with an alpha channel if only a part of it has imagery."""
    image = cv2.cvtColor(tile.image, cv2.COLOR_RGB2BGR)
    if tile.valid is not None and not tile.valid.all():
        image = np.dstack([image, np.where(tile.valid, 255, 0).astype(np.uint8)])
    return bytes(cv2.imencode(".png", image)[1])


def decode_tile(data: bytes, georeference: Mapping[str, Any]) -> AerialTile:
    """Inverse of :func:`encode_tile`. Raises ValueError on damaged bytes."""
    image = decode_with_alpha(data)
    valid = image[..., 3] > 0 if image.shape[2] == 4 else None
    return AerialTile(
        np.ascontiguousarray(image[..., :3]),
        float(georeference["lat"]),
        float(georeference["lon"]),
        float(georeference["gsd"]),
        float(georeference["valid_fraction"]),
        float(georeference["rotation"]),
        valid,
    )


def _full(pair: Pair) -> NDArray[np.float64] | None:
    if pair.fix_covariance is None:
        return None
    full = np.diag([0.0, 0.0, 1e6])
    size = pair.fix_covariance.shape[0]
    full[:size, :size] = pair.fix_covariance
    return full
