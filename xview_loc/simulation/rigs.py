"""Rigs of cameras as vehicles have them, and what they see in a simulated city.

``base_link`` is on the ground below the vehicle's middle. Images are 640 x 360, those of fisheyes 640 x 480.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from xview_loc.camera import CameraModel, Lens, PanoramaCamera
from xview_loc.rig import FORWARD, MountedCamera, Quaternion, Rig
from xview_loc.simulation.city import City
from xview_loc.simulation.objects import Cars, Image
from xview_loc.simulation.views import CameraPose, render_camera

# Of the images of all cameras but fisheyes, pixels.
FULL_HEIGHT = 360
_Lens = tuple[str, tuple[float, ...]]
_NORMAL: _Lens = "plumb_bob", (-0.12, 0.03, 3e-4, -2e-4, 0.0)
_WIDE: _Lens = "rational_polynomial", (0.35, 0.02, 1e-4, -1e-4, 0.0, 0.6, 0.08, 0.0)
_FISHEYE: _Lens = "equidistant", (-0.012, 0.003, -1e-3, 1e-4)


@dataclass(frozen=True)
class VehiclePose(CameraPose):
    """Pose of a vehicle's ``base_link``, which is on the ground."""

    height: float = 0.0


def camera(fov_deg: float, size: tuple[int, int] = (640, FULL_HEIGHT), lens: _Lens = _NORMAL) -> CameraModel:
    """Return a camera with a horizontal field of view; ``lens`` is a distortion model and coefficients."""
    width, height = size
    middle = (width - 1) / 2, (height - 1) / 2
    half = math.radians(fov_deg) / 2

    def with_focal_length(focal: float) -> CameraModel:
        k = (focal, 0.0, middle[0], 0.0, focal, middle[1], 0.0, 0.0, 1.0)
        return CameraModel(width, height, k, lens[1], lens[0])

    edge, _ = with_focal_length(width).project(np.array([math.sin(half), 0.0, math.cos(half)]))
    return with_focal_length(width * (width / 2) / (float(edge[0]) - middle[0]))


def looking(yaw_deg: float, down_deg: float) -> Quaternion:
    """Return the rotation of a camera's optical frame that looks to ``yaw_deg`` (left: 90), tilted down."""
    yaw, down = math.radians(yaw_deg) / 2, math.radians(down_deg) / 2
    turned = (0.0, 0.0, math.sin(yaw), math.cos(yaw))
    return _chain(_chain(turned, (0.0, math.sin(down), 0.0, math.cos(down))), FORWARD)


def _chain(a: Sequence[float], b: Sequence[float]) -> Quaternion:
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    )


def _at(place: tuple[float, float, float], yaw: float, down: float, lens: CameraModel) -> MountedCamera:
    return MountedCamera(lens, place, looking(yaw, down))


_STANDARD, _SURROUND = camera(80.0), camera(100.0, lens=_WIDE)
_FISH = camera(190.0, (640, 480), _FISHEYE)

RIGS: dict[str, dict[str, MountedCamera]] = {
    "one": {"front": _at((0.6, 0.0, 1.4), 0.0, 4.0, camera(90.0, lens=_WIDE))},
    "three": {
        "front": _at((1.1, 0.0, 1.4), 0.0, 4.0, _SURROUND),
        "left": _at((0.2, 0.9, 1.3), 100.0, 8.0, _SURROUND),
        "right": _at((0.2, -0.9, 1.3), -100.0, 8.0, _SURROUND),
    },
    "four": {
        "front": _at((1.4, 0.0, 1.2), 0.0, 12.0, _FISH),
        "left": _at((0.2, 0.95, 1.25), 90.0, 15.0, _FISH),
        "rear": _at((-1.3, 0.0, 1.3), 180.0, 12.0, _FISH),
        "right": _at((0.2, -0.95, 1.25), -90.0, 15.0, _FISH),
    },
    "six": {
        "front": _at((1.1, 0.0, 1.6), 0.0, 6.0, _SURROUND),
        "front_left": _at((0.8, 0.5, 1.6), 60.0, 6.0, _STANDARD),
        "front_right": _at((0.8, -0.5, 1.6), -60.0, 6.0, _STANDARD),
        "back": _at((-1.0, 0.0, 1.6), 180.0, 6.0, _SURROUND),
        "back_left": _at((-0.4, 0.6, 1.6), 115.0, 6.0, _STANDARD),
        "back_right": _at((-0.4, -0.6, 1.6), -115.0, 6.0, _STANDARD),
    },
    "eight": {
        f"camera_{number}": _at(
            (0.7 * math.cos(math.radians(yaw)), 0.7 * math.sin(math.radians(yaw)), 1.85),
            yaw,
            10.0,
            _STANDARD,
        )
        for number, yaw in enumerate(range(0, 360, 45))
    },
}


def make_rig(name: str, scale: float = 1.0) -> Rig:
    """Return a rig of ``RIGS``, with images ``scale`` times as wide and high."""
    return Rig({key: replace(one, camera=_scaled(one.camera, scale)) for key, one in RIGS[name].items()})


def _scaled(one: Lens, scale: float) -> Lens:
    width, height = max(1, round(one.width * scale)), max(1, round(one.height * scale))
    if isinstance(one, PanoramaCamera):
        return replace(one, width=width, height=height)
    return replace(one, width=width, height=height, k=tuple(one.scaled_matrix(width, height).flat))


def render_rig(
    city: City,
    pose: VehiclePose,
    rig: Rig,
    *,
    traffic: Cars | None = None,
    rng: np.random.Generator | None = None,
) -> dict[str, Image]:
    """Render the RGB image of every camera of a rig on a vehicle at ``pose``.

    ``traffic`` are moving cars; ``rng`` draws each camera's exposure, noise and raindrops (None: none).
    """
    return {
        name: render_camera(city, pose, mounted, traffic=traffic, rng=rng)
        for name, mounted in rig.cameras.items()
    }
