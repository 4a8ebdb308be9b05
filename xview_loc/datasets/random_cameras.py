"""What random sets of cameras show of a level image: hidden sectors, tilt, and exposures that differ.

Training data, from images that reach further than the model's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.camera import Lens, PanoramaCamera
from xview_loc.images import Image
from xview_loc.rig import UNSEEN, directions, tilt_matrix

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Shares of samples that show the whole panorama, and that are tilted as a vehicle on a level road.
_WHOLE, _LEVEL = 0.3, 0.5
_LEVEL_TILT, _MOST_TILT = math.radians(0.6), math.radians(6.0)
_FISHEYE = 0.25
# Fields of view and aspect ratios of pinhole cameras, and of fisheyes, and how far they look down.
_PINHOLE, _ASPECT = (math.radians(55.0), math.radians(125.0)), (4 / 3, 16 / 9)
_FISHEYE_ANGLE = (math.radians(170.0), math.radians(195.0))
_LOOK_DOWN = (math.radians(-3.0), math.radians(15.0))
_FEWEST, _MOST = 1, 8
_EXPOSURE = 0.12
# Share of samples whose bottom the vehicle hides, and the elevation above which it hides nothing.
_BODY, _BODY_TOP = 0.3, math.radians(-30.0)


def random_view(image: Image, camera: Lens, lens: Lens, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Return what random cameras show of a level image, as ``lens`` sees it, and the mask of what they see.

    ``camera`` took the image; it and the lens look along the vehicle's x axis. A panorama is seen by one to
    eight cameras, what a pinhole lens sees by one. What no camera sees has the mean colour.
    """
    if rng.random() < _LEVEL:
        content, mounting = rng.normal(size=(2, 2)) * _LEVEL_TILT
    else:
        content, mounting = rng.uniform(-_MOST_TILT, _MOST_TILT, (2, 2))
    rays = directions(lens)
    most = _MOST if isinstance(lens, PanoramaCamera) else 1
    gain, seen = _exposures_and_mask(rays @ tilt_matrix(*mounting), most, rng)
    if rng.random() < _BODY:
        seen &= ~_body(rays, rng)
    # Twice as fine, then averaged, as a camera's image is.
    fine = directions(_twice_as_fine(lens)) @ tilt_matrix(*content)
    optical = np.stack([-fine[..., 1], -fine[..., 2], fine[..., 0]], -1)
    pixels, inside = camera.project(optical)
    rows = np.clip(pixels[..., 1], 0, camera.height - 1)
    border = cv2.BORDER_WRAP if isinstance(camera, PanoramaCamera) else cv2.BORDER_REPLICATE
    warped = cv2.remap(image, pixels[..., 0], rows, cv2.INTER_LINEAR, borderMode=border)
    shown = cv2.resize(warped, (lens.width, lens.height), interpolation=cv2.INTER_AREA) * gain
    seen &= inside[::2, ::2]
    shown[~seen] = UNSEEN
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8), seen


def _twice_as_fine(lens: Lens) -> Lens:
    width, height = 2 * lens.width, 2 * lens.height
    if isinstance(lens, PanoramaCamera):
        return replace(lens, width=width, height=height)
    return replace(lens, width=width, height=height, k=tuple(lens.scaled_matrix(width, height).flat))


def _exposures_and_mask(
    rays: NDArray[np.float64], most: int, rng: np.random.Generator
) -> tuple[Floats, Mask]:
    """Return gains (height, width, 3), and which pixels a camera sees; ``rays`` are in the vehicle's axes."""
    shape = rays.shape[:2]
    gain = np.ones((*shape, 3), np.float32)
    if rng.random() < _WHOLE:
        return gain, np.ones(shape, bool)
    seen = np.zeros(shape, bool)
    count = int(rng.integers(_FEWEST, most + 1))
    fisheye = rng.random() < _FISHEYE
    width, aspect = rng.uniform(*(_FISHEYE_ANGLE if fisheye else _PINHOLE)), rng.uniform(*_ASPECT)
    # One camera looks ahead more often than not.
    first = 0.0 if rng.random() < 0.5 or most == 1 else rng.uniform(-math.pi, math.pi)
    for k in range(count):
        yaw = first + 2 * math.pi * k / count + rng.normal() * 0.1
        down = rng.uniform(*_LOOK_DOWN)
        x, y, z = np.moveaxis(rays @ _axes(yaw, down), -1, 0)
        if fisheye:
            inside = np.arccos(np.clip(x, -1.0, 1.0)) < width / 2
        else:
            reach = math.tan(width / 2)
            inside = (x > 0.0) & (np.abs(y) < reach * x) & (np.abs(z) < reach / aspect * x)
        gain[inside] = np.exp(_EXPOSURE * rng.normal() + 0.3 * _EXPOSURE * rng.normal(size=3))
        seen |= inside
    return gain, seen


def _axes(yaw: float, down: float) -> NDArray[np.float64]:
    """Return the rotation (3, 3) from the axes of a camera (x forward, z up) to the vehicle's."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]) @ tilt_matrix(0.0, down)


def _body(rays: NDArray[np.float64], rng: np.random.Generator) -> Mask:
    """Return the pixels that the vehicle's own parts hide: all below a wavy line."""
    turn = np.arctan2(rays[..., 1], rays[..., 0])
    low = rng.uniform(math.radians(-70.0), _BODY_TOP)
    wave = 0.1 * np.cos(turn - rng.uniform(0, 2 * math.pi)) + 0.1 * np.cos(2 * turn)
    return np.asarray(np.arcsin(rays[..., 2]) < np.minimum(low + wave, _BODY_TOP))
