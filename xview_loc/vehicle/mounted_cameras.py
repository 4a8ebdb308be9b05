"""What a rig's cameras may be, and the poses of their optical frames. Free of ROS."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import numpy as np

from xview_loc.camera import CameraError, Lens
from xview_loc.errors import shown
from xview_loc.images import MAX_PIXELS
from xview_loc.rig import FORWARD, LEAST_HEIGHT_M, MountedCamera, Rig
from xview_loc.vehicle.transforms import Transform, TransformError

# Cameras of a rig, pixels of all their images together, metres from base_link.
MOST_CAMERAS, MOST_PIXELS, FARTHEST_M = 16, 2 * MAX_PIXELS, 100.0
_NAME = re.compile("[A-Za-z][A-Za-z0-9_]{0,63}")
# Least share of the vertical in a z axis that points up.
_UP = 0.5


def check_names(names: Collection[str]) -> None:
    """Raise CameraError if a name is not allowed, or if there are too many cameras."""
    if len(names) > MOST_CAMERAS:
        raise CameraError(f"a rig of {len(names)} cameras: at most {MOST_CAMERAS} are supported")
    for name in names:
        if not _NAME.fullmatch(name):
            raise CameraError(
                f"'{shown(name, 80)}' is no name of a camera: use up to 64 letters, digits and underscores, "
                "and begin with a letter"
            )


def check_height(rig: Rig) -> None:
    """Raise CameraError if several cameras are too low for joining their images on the ground."""
    height = float(rig.centre[2]) + rig.height
    if len(rig.cameras) > 1 and not height >= LEAST_HEIGHT_M:  # NaN as well
        raise CameraError(
            f"the cameras are {height:.2f} m above the ground: give their z, and the height of base_link "
            "above the ground"
        )


def mount(camera: Lens, pose: Transform) -> MountedCamera:
    """Return a camera whose optical frame has this pose in ``base_link``."""
    (x, y, z), (qx, qy, qz, qw) = pose.translation.tolist(), pose.rotation.tolist()
    return MountedCamera(camera, (x, y, z), (qx, qy, qz, qw))


def optical(pose: Transform) -> Transform:
    """Return the pose of the optical frame of a camera that looks along the x axis of ``pose``."""
    return pose @ Transform(np.zeros(3), np.array(FORWARD))


def rig_frames(camera: str, calibration: str) -> list[str]:
    """Return the frames that a rig's camera may have in tf, first choice first.

    ``calibration``: the frame of its ``camera_info``, "" if not known.
    """
    return [f"{camera}_optical_frame", *filter(None, [calibration])]


def optical_pose(pose_of: Callable[[str], Transform], frames: list[str]) -> Transform:
    """Return the pose of a camera's optical frame in ``base_link``: the first of ``frames`` that is known.

    A frame is an optical one (REP-103: z forward, x right), unless its z axis points up and its name lacks
    ``optical``: then it is the housing's, which looks along its x axis. ``pose_of`` returns a frame's pose in
    ``base_link``, or raises TransformError. Raises the last frame's TransformError if none is known.
    """
    for frame in frames[:-1]:
        try:
            return _as_optical(pose_of(frame), frame)
        except TransformError:
            continue
    return _as_optical(pose_of(frames[-1]), frames[-1])


def _as_optical(pose: Transform, frame: str) -> Transform:
    is_housing = "optical" not in frame and pose.matrix[2, 2] > _UP
    return optical(pose) if is_housing else pose
