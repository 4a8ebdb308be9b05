"""Lever arms: from the GNSS antenna to the camera, and from the camera to ``base_link``.

A heat map gives the camera's position, a receiver the antenna's, and a published pose is ``base_link``'s.
Offsets are in the plane, (forward, left) of base_link in metres; the vehicle is taken to be level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection, wrap_angle

Offset = tuple[float, float]


@dataclass(frozen=True)
class Mounting:
    """Where antenna and camera are on the vehicle, and the direction the camera looks in.

    antenna, camera: (forward, left) of base_link, metres. camera_yaw: radians, counter-clockwise from the
    vehicle's x axis. Headings below are true-north ENU yaws of the vehicle's x axis.
    """

    antenna: Offset = (0.0, 0.0)
    camera: Offset = (0.0, 0.0)
    camera_yaw: float = 0.0

    def camera_from_antenna(self, lat: float, lon: float, heading: float) -> tuple[float, float]:
        """(lat, lon) of the camera, in degrees, of the antenna's."""
        lever = (self.camera[0] - self.antenna[0], self.camera[1] - self.antenna[1])
        return moved(lat, lon, lever, heading)

    def base_from_camera(self, lat: float, lon: float, heading: float) -> tuple[float, float]:
        """(lat, lon) of base_link, in degrees, of the camera's."""
        return moved(lat, lon, (-self.camera[0], -self.camera[1]), heading)

    def base_covariance(
        self, covariance: NDArray[np.float64], heading: float, heading_variance: float
    ) -> NDArray[np.float64]:
        """2x2 ENU covariance (m^2) of base_link's position, of the camera's and the heading's (rad^2).

        The heading's error swings base_link around the camera, to first order along the circle.
        """
        east, north = in_enu(self.camera, heading)
        swing = np.array([north, -east])
        return covariance + heading_variance * np.outer(swing, swing)

    def looking(self, heading: float) -> float:
        """ENU yaw of the camera's direction of view, of the vehicle's heading."""
        return wrap_angle(heading + self.camera_yaw)

    def heading(self, looking: float) -> float:
        """The vehicle's heading, of the ENU yaw of the camera's direction of view."""
        return wrap_angle(looking - self.camera_yaw)


def in_enu(offset: Offset, heading: float) -> tuple[float, float]:
    """(east, north) in metres of a (forward, left) offset."""
    cos, sin = math.cos(heading), math.sin(heading)
    return cos * offset[0] - sin * offset[1], sin * offset[0] + cos * offset[1]


def moved(lat: float, lon: float, offset: Offset, heading: float) -> tuple[float, float]:
    """(lat, lon) in degrees of the place a (forward, left) offset in metres away."""
    if offset == (0.0, 0.0):
        return lat, lon
    new_lat, new_lon = LocalProjection(lat, lon).inverse(*in_enu(offset, heading))
    return float(new_lat), float(new_lon)
