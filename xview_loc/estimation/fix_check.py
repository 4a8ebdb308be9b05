"""Finds fixes that the heat maps contradict: wrong by more than their covariance says."""

from __future__ import annotations

import math

from xview_loc.estimation.observation import PoseEstimate
from xview_loc.geodesy import LocalProjection

# Images closer together look alike, and so do their heat maps.
_APART_M = 5.0
# Evidence against the fixes, in powers of ten: a search disc that holds less than a hundredth of a heat map's
# probability adds to it, one that holds more reduces it. Then the most that one image adds, and the sum that
# makes a fault.
_EXPECTED, _MOST, _ENOUGH = 2.0, 6.0, 4.0


class FixCheck:
    """Sums up how improbable the search discs are on the whole heat maps (CUSUM), over images and distance.

    A disc that is larger than the vehicle's uncertainty holds nearly all of the probability; one about a fix
    that is wrong, and claims to be precise, holds hardly any. ``fault`` says so in words, "" for nothing:
    after several doubtful images, or one that leaves no doubt. Heat maps must be calibrated: others are far
    too sure. Not thread-safe.
    """

    def __init__(self) -> None:
        # With the latest image, and of those at the places before.
        self._evidence = self._before = 0.0
        self._last: LocalProjection | None = None
        self.fault = ""

    def add(self, estimate: PoseEstimate) -> None:
        """Take an estimate, later than the last one."""
        heat_map = estimate.heat_map
        disc = heat_map.search
        if disc is None:
            self.fault = ""
            return
        if self._last is None or math.hypot(*self._last.forward(disc.lat, disc.lon)) >= _APART_M:
            self._last = LocalProjection(disc.lat, disc.lon)
            # One image that agrees is enough to end the fault: a vehicle that waits for a pose stands still.
            self._before = min(self._evidence, _ENOUGH)
        evidence = min(-heat_map.log_share - _EXPECTED, _MOST)
        self._evidence = max(0.0, self._before + evidence)
        self.fault = ""
        if self._evidence >= _ENOUGH:
            self.fault = (
                f"images place the vehicle outside the {disc.radius_m:.0f} m around the fix: the fix is "
                "wrong, its covariance or search_radius_m too small, or the map displaced"
            )
