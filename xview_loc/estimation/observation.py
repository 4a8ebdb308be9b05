"""What a localizer takes and returns: observation, pose estimate, and the errors in between."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xview_loc.camera import CameraModel
from xview_loc.estimation.heat_map import HeatMap
from xview_loc.images import Image
from xview_loc.maps.base import AerialTile
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample


class LocalizationError(Exception):
    """The observation gives no pose; the message is one clear line."""


class HeadingRequiredError(LocalizationError):
    """The observation has no heading, and the model or the settings need one."""


class IntrinsicsRequiredError(LocalizationError):
    """The observation has no camera model, and a pinhole model needs one."""


class LowImageryError(LocalizationError):
    """Too much of the aerial tile has no imagery."""


class FixOutsideTileError(LocalizationError):
    """The coarse fix lies outside the area that the heat map covers."""


class NonFiniteHeatMapError(LocalizationError):
    """The model's output has values that are not finite."""


@dataclass(frozen=True, eq=False)
class Observation:
    """One image and what is known about its camera. Positions and directions are the camera's.

    image: uint8 (H, W, 3), RGB. lat, lon: coarse position, degrees. fix_covariance: its covariance (2, 2) in
    ENU axes, m^2. heading: true-north ENU yaw of the image's centre column, radians; None if unknown.
    heading_std: its standard deviation, radians. camera: calibration; required by pinhole models.
    """

    image: Image
    lat: float
    lon: float
    fix_covariance: NDArray[np.float64] | None = None
    heading: float | None = None
    heading_std: float = 0.0
    camera: CameraModel | None = None
    stamp_ns: int = 0

    @classmethod
    def of(
        cls,
        image: Image,
        fix: GnssFix,
        heading: HeadingSample | None,
        mounting: Mounting,
        camera: CameraModel | None,
    ) -> Observation:
        """Make an observation of a vehicle's inputs; without a heading, lever arms are not known."""
        lat, lon, looking, std = fix.lat, fix.lon, None, 0.0
        if heading is not None:
            lat, lon = mounting.camera_from_antenna(lat, lon, heading.yaw)
            looking, std = mounting.looking(heading.yaw), heading.std
        covariance = None if fix.covariance is None else fix.covariance[:2, :2]
        return cls(image, lat, lon, covariance, looking, std, camera, fix.stamp_ns)


@dataclass(frozen=True, eq=False)
class PoseEstimate:
    """The camera's estimated pose.

    lat, lon: degrees. covariance: (2, 2) in ENU axes, m^2. heading: true-north ENU yaw of the image's centre
    column, radians; None if unknown. heading_variance: rad^2. confidence: share of the heat map in the
    winning mode, 0..1. tile: the aerial tile as the model saw it. at_search_border: the peak lies on the edge
    of the search disc, so the true position may be outside. timings_ms: duration of each step, ms
    (``encode`` is 0 if the tile's features were in memory).
    """

    lat: float
    lon: float
    covariance: NDArray[np.float64]
    heading: float | None
    heading_variance: float
    confidence: float
    heat_map: HeatMap
    tile: AerialTile
    stamp_ns: int
    at_search_border: bool
    timings_ms: dict[str, float] = field(default_factory=dict)
