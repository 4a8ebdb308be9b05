"""Lever arms between the GNSS antenna, the camera and ``base_link``.

A heat map gives the camera's position, a receiver the antenna's; a published pose is base_link's. Offsets are
(forward, left) of base_link in metres, for a level vehicle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.geodesy import LocalProjection, wrap_angle

Offset = tuple[float, float]


@dataclass(frozen=True)
class Mounting:
    """Positions of antenna and camera on the vehicle, and the camera's viewing direction.

    antenna, camera: (forward, left) of base_link, metres. camera_yaw: radians, counter-clockwise from the
    vehicle's x axis. Positions below are (lat, lon) in degrees, headings true-north ENU yaws of the vehicle's
    x axis in radians.
    """

    antenna: Offset = (0.0, 0.0)
    camera: Offset = (0.0, 0.0)
    camera_yaw: float = 0.0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Mounting:
        """Inverse of :meth:`facts`; what is missing is 0."""
        places = (tuple(map(float, facts.get(name, (0.0, 0.0)))) for name in ("antenna", "camera"))
        (antenna_x, antenna_y), (camera_x, camera_y) = places
        return cls((antenna_x, antenna_y), (camera_x, camera_y), float(facts.get("camera_yaw", 0.0)))

    def facts(self) -> dict[str, Any]:
        """Return what a recording keeps, JSON values."""
        return {"antenna": self.antenna, "camera": self.camera, "camera_yaw": self.camera_yaw}

    def camera_from_antenna(self, lat: float, lon: float, heading: float) -> tuple[float, float]:
        """Camera position from the antenna's."""
        lever = (self.camera[0] - self.antenna[0], self.camera[1] - self.antenna[1])
        return moved(lat, lon, lever, heading)

    def base_from_camera(self, lat: float, lon: float, heading: float) -> tuple[float, float]:
        """base_link's position from the camera's."""
        return moved(lat, lon, (-self.camera[0], -self.camera[1]), heading)

    def base_covariance(
        self, covariance: NDArray[np.float64], heading: float, heading_variance: float
    ) -> NDArray[np.float64]:
        """2x2 ENU covariance of base_link's position, m^2, from the camera's and the heading's variance.

        The heading's error swings base_link around the camera, to first order along the circle.
        """
        east, north = in_enu(self.camera, heading)
        swing = np.array([north, -east])
        return covariance + heading_variance * np.outer(swing, swing)

    def looking(self, heading: float) -> float:
        """ENU yaw of the viewing direction from the vehicle's heading."""
        return wrap_angle(heading + self.camera_yaw)

    def heading(self, looking: float) -> float:
        """The vehicle's heading from the ENU yaw of the viewing direction."""
        return wrap_angle(looking - self.camera_yaw)


def in_enu(offset: Offset, heading: float) -> tuple[float, float]:
    """Rotate a (forward, left) offset to (east, north), metres."""
    cos, sin = math.cos(heading), math.sin(heading)
    return cos * offset[0] - sin * offset[1], sin * offset[0] + cos * offset[1]


def moved(lat: float, lon: float, offset: Offset, heading: float) -> tuple[float, float]:
    """Return the (lat, lon) in degrees a (forward, left) offset in metres away."""
    if offset == (0.0, 0.0):
        return lat, lon
    new_lat, new_lon = LocalProjection(lat, lon).inverse(*in_enu(offset, heading))
    return float(new_lat), float(new_lon)
