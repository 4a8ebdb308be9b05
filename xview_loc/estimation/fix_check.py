"""Finds fixes that the heat maps contradict: wrong by more than their covariance says."""

from __future__ import annotations

import math

from xview_loc.estimation.heat_map import HeatMap, SearchDisc
from xview_loc.estimation.localizer import search_radius
from xview_loc.estimation.observation import Observation
from xview_loc.geodesy import LocalProjection

# Images closer together look alike, and so do their heat maps.
_APART_M = 5.0
# Evidence against the fixes, in powers of ten: a disc that holds less than a hundredth of a heat map's
# probability adds to it, one that holds more takes away. At most ``_MOST`` comes from an image or is carried
# on to the next place, so that a fault begins with one image that is sure, and ends after two places.
_EXPECTED, _MOST, _ENOUGH = 2.0, 6.0, 4.0


class FixCheck:
    """Sums up how improbable the places that the fixes allow are on the heat maps (CUSUM), over the images.

    A disc as large as the error of the fix holds nearly all of the probability; one about a fix that is worse
    than it claims holds hardly any, image after image. ``fault`` says so in words; "" for nothing. Heat maps
    must be calibrated: others are far too sure. Not thread-safe.
    """

    def __init__(self) -> None:
        # With the latest image, and of those at the places before.
        self._evidence = self._before = 0.0
        self._last: LocalProjection | None = None
        self.fault = ""

    def add(self, heat_map: HeatMap, observation: Observation) -> None:
        """Take an image's heat map, later than the last one."""
        if observation.fix_covariance is None:
            self._evidence = self._before = 0.0
            self.fault = ""
            return
        disc = SearchDisc(observation.lat, observation.lon, search_radius(observation.fix_covariance))
        if self._last is None or math.hypot(*self._last.forward(disc.lat, disc.lon)) >= _APART_M:
            self._last = LocalProjection(disc.lat, disc.lon)
            self._before = min(self._evidence, _MOST)
        log_share = heat_map.log_share_of(disc) if heat_map.search is None else heat_map.log_share
        evidence = min(-log_share - _EXPECTED, _MOST)
        self._evidence = max(0.0, self._before + evidence)
        self.fault = ""
        if self._evidence >= _ENOUGH:
            self.fault = (
                f"images place the vehicle outside the {disc.radius_m:.0f} m around the fix that its "
                "covariance allows: it is not believed, and the whole heat map is searched"
            )
