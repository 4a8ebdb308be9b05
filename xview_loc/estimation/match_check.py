"""Finds a localizer whose maxima are no better than chance: a wrong map, scale, camera or model."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from xview_loc.estimation.heat_map import SearchDisc
from xview_loc.estimation.observation import Observation, PoseEstimate
from xview_loc.geodesy import LocalProjection

# Images closer together look alike, and so do their heat maps.
_APART_M = 5.0
_IMAGES = 16
# Points scattered by chance over a disc lie 0.71 of its radius from their middle, in the median. A fault
# begins and ends at these shares; what scatters by less than the least is none, however small the disc.
_BEGIN, _END, _LEAST_M = 0.45, 0.3, 8.0


class MatchCheck:
    """Watches where the estimates lie in their search discs, or on the whole heat maps, over a distance.

    The middle of the disc, a fix or the filter's place, is off by about as much from one image to the next:
    right estimates are so too, and wrong ones are scattered over the disc. ``fault`` says so in words; "" for
    nothing. Not thread-safe.
    """

    def __init__(self) -> None:
        # East and north of the disc's middle, and the disc's radius; metres.
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=_IMAGES)
        self._last: LocalProjection | None = None
        self.fault = ""

    def add(self, estimate: PoseEstimate, observation: Observation) -> None:
        """Take the estimate of an observation, later than the last one."""
        heat_map = estimate.heat_map
        disc = heat_map.search
        if disc is None:
            half_side = min(heat_map.probability.shape) * heat_map.metres_per_pixel / 2.0
            disc = SearchDisc(observation.lat, observation.lon, half_side)
        if self._last is not None and math.hypot(*self._last.forward(disc.lat, disc.lon)) < _APART_M:
            return
        self._last = LocalProjection(disc.lat, disc.lon)
        east, north = (float(v) for v in self._last.forward(estimate.lat, estimate.lon))
        self._seen.append((east, north, disc.radius_m))
        if len(self._seen) < _IMAGES:
            return
        points = np.array(self._seen)
        scatter = float(np.median(np.hypot(*(points[:, :2] - np.median(points[:, :2], axis=0)).T)))
        radius = float(points[:, 2].mean())
        if scatter < max(_END * radius, _LEAST_M):
            self.fault = ""
        elif self.fault or scatter > max(_BEGIN * radius, _LEAST_M):
            self.fault = (
                f"positions scatter by {scatter:.0f} m about the searched place, as by chance within "
                f"{radius:.0f} m: check map, its scale, camera_yaw_deg, heading, model and checkpoint"
            )
