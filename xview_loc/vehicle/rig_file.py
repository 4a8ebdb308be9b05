"""Where a rig's cameras are, and what hides the vehicle's own parts, in a YAML file."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from xview_loc.errors import UserError, reason, shown
from xview_loc.files import read_regular, write_whole
from xview_loc.images import ImageError, decode_with_alpha
from xview_loc.rig import Mask, MountedCamera
from xview_loc.vehicle.mounted_cameras import FARTHEST_M, optical
from xview_loc.vehicle.transforms import Transform

# Largest files that are read, bytes.
_FILE_LIMIT, _MASK_LIMIT = 100_000, 50_000_000
_PLACE = ("x", "y", "z")
_ANGLES = ("roll_deg", "pitch_deg", "yaw_deg")
_KEYS = {*_PLACE, *_ANGLES, "quaternion", "own_mask"}


@dataclass(frozen=True, eq=False)
class CameraEntry:
    """What a rig file says of a camera: its optical frame's pose in base_link, its mask; None: nothing."""

    pose: Transform | None = None
    own: Mask | None = None


def read_rig_file(path: str | Path) -> dict[str, CameraEntry]:
    """Return what a rig file says, by camera; docs/operations.md describes it. Raises UserError.

    ``x``, ``y``, ``z`` are the camera's place in base_link, metres. ``roll_deg``, ``pitch_deg`` and
    ``yaw_deg`` turn a camera that looks along the vehicle's x axis, about x, y and z in this order (degrees;
    positive pitch looks down, positive yaw left); ``quaternion`` (x, y, z, w) is that of the optical frame
    instead. ``own_mask`` names an image beside the file, white where the camera sees the vehicle.
    """
    place = Path(path).expanduser()
    try:
        data = YAML(typ="safe", pure=True).load(read_regular(place, _FILE_LIMIT))
    except Exception as error:  # ruamel.yaml raises anything on some damaged files
        raise UserError(f"rig_file {place} cannot be read: {reason(error)}") from None
    cameras = data.get("cameras") if isinstance(data, Mapping) else None
    if not isinstance(cameras, Mapping) or not cameras:
        raise UserError(f"rig_file {place} has no cameras: write 'cameras:' and below it each camera's name")
    entries = {}
    for name, content in cameras.items():
        try:
            entries[str(name)] = _entry(content, place.parent)
        except (ValueError, UserError) as error:
            raise UserError(f"rig_file {place}: camera {shown(name, 80)}: {error}") from None
    return entries


def write_rig_file(path: Path, cameras: Mapping[str, MountedCamera]) -> None:
    """Write the places of cameras, without masks, as :func:`read_rig_file` reads them."""
    entries = {
        name: {
            **dict(zip(_PLACE, map(float, one.position), strict=True)),
            "quaternion": [*map(float, one.rotation)],
        }
        for name, one in cameras.items()
    }
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    # In the order of the rig.
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump({"cameras": entries}, text)
    write_whole(path, text.getvalue().encode())


def read_mask(path: Path) -> Mask:
    """Return a mask (H, W), True where the image is white. Raises UserError, also if all or nothing is."""
    try:
        image = decode_with_alpha(read_regular(path, _MASK_LIMIT))
    except (OSError, ImageError) as error:
        raise UserError(f"own_mask {path} cannot be read: {reason(error)}") from None
    mask = np.asarray((image[..., :3] > 127).all(-1))
    if mask.all():
        raise UserError(f"own_mask {path} is white all over: it hides the whole image")
    if not mask.any():
        raise UserError(f"own_mask {path} has no white: it hides nothing")
    return mask


def _entry(content: Any, folder: Path) -> CameraEntry:
    if not isinstance(content, Mapping):
        raise ValueError("write x, y, z, yaw_deg ... below its name")
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(f"{shown(unknown[0], 80)} is unknown; it may have {', '.join(sorted(_KEYS))}")
    own = content.get("own_mask")
    mask = None if own is None else read_mask(folder / str(own))
    if not content.keys() - {"own_mask"}:
        return CameraEntry(None, mask)
    translation = np.array([_number(content, key) for key in _PLACE])
    if not np.abs(translation).max() <= FARTHEST_M:
        raise ValueError(f"x, y, z must be within {FARTHEST_M:g} m of base_link, not {translation.tolist()}")
    if "quaternion" not in content:
        turn = _turned([math.radians(_number(content, key)) for key in _ANGLES])
        return CameraEntry(optical(Transform(translation, turn)), mask)
    if any(key in content for key in _ANGLES):
        raise ValueError("give quaternion or roll_deg, pitch_deg and yaw_deg, not both")
    values = content["quaternion"]
    if not isinstance(values, Sequence) or len(values) != 4 or not all(map(_is_number, values)):
        raise ValueError("quaternion must be four numbers: [x, y, z, w]")
    rotation = np.array(values, float)
    if not abs(np.linalg.norm(rotation) - 1.0) < 0.1:
        raise ValueError(f"quaternion {rotation.tolist()} has no norm of 1")
    return CameraEntry(Transform(translation, rotation / np.linalg.norm(rotation)), mask)


def _turned(angles: Sequence[float]) -> Any:
    """Return the quaternion (4,) of roll, pitch and yaw, radians, about fixed axes in this order."""
    pose = Transform.planar(0.0, 0.0, 0.0)
    for axis, angle in enumerate(angles):
        rotation = np.zeros(4)
        rotation[axis], rotation[3] = math.sin(angle / 2.0), math.cos(angle / 2.0)
        pose = Transform(np.zeros(3), rotation) @ pose
    return pose.rotation


def _number(content: Mapping[str, Any], key: str) -> float:
    value = content.get(key, 0.0)
    if not _is_number(value):
        raise ValueError(f"{key} is no number: {shown(value, 80)}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
