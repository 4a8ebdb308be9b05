"""The localizer's search for its place where there is neither a fix nor a filtered pose."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rclpy.node import Node

from xview_loc.errors import shown
from xview_loc.estimation.deployment_record import LastPlace, RecordError, record_path
from xview_loc.estimation.heat_map import TileScores
from xview_loc.estimation.localizer import search_radius
from xview_loc.estimation.place_search import FOUND_M, LARGEST_M, PlaceSearch, SearchArea
from xview_loc.estimation.position_filter import FilteredPose, PositionFilter
from xview_loc.maps.base import MapError
from xview_loc.models.base import Calibration
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN, Health
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample, RejectedInput

# A search begins once there has been no fix for this long.
BEGIN_AFTER_S = 5.0
# Longest time to compare an image with tiles: odometry since must still be known.
SLOWEST_S = 60.0
# How often the place is written to its file.
SAVE_EVERY_S = 10.0


class PlaceFinder:
    """Searches around the first of these that is known: a rough initial pose, where the way was lost, the
    parameters ``start_lat`` and ``start_lon``, the last place before the node was started.

    Areas without the vehicle are widened. For the worker's thread; others may call :meth:`start_from`,
    :meth:`expect` and :meth:`forget`. The place that is found becomes that of the filter.
    """

    def __init__(
        self, node: Node, health: Health, odometry: Odometry, spacing_m: float, moving: PositionFilter
    ) -> None:
        self._node, self._health = node, health
        self._odometry, self._spacing_m, self._filter = odometry, spacing_m, moving
        self._file = record_path(node.get_fully_qualified_name(), ".place")
        # Held where the filter is given another place, so that the last request counts.
        self._lock = threading.Lock()
        self._place = self._first_place()
        # Around it; None for the parameter's.
        self._radius_m: float | None = None
        self._search: PlaceSearch | None = None
        self._missing_ns: int | None = None
        self._saved_at = 0.0

    @property
    def enabled(self) -> bool:
        """False if the parameters rule out a search."""
        return self._parameter() > 0.0

    @property
    def possible(self) -> bool:
        """True if there is an area to search."""
        return self._place is not None and self.enabled

    def start_from(self, pose: FilteredPose) -> None:
        """Let the filter start from a pose."""
        with self._lock:
            self._search = None
            self._filter.restart(pose)

    def expect(self, area: SearchArea) -> None:
        """Forget the filter's place; search this area from the next image without a fix on."""
        with self._lock:
            self._place, self._radius_m, self._search = LastPlace(area.lat, area.lon), area.radius_m, None
            self._filter.restart()

    def forget(self) -> SearchArea | None:
        """Forget the filter's place, which is wrong; return the wider area to search without a fix."""
        with self._lock:
            self._search = None
            self._filter.restart()
            if (area := self._area) is None or not self.enabled:
                return None
            area = area.larger(area.radius_m)
            self._radius_m = area.radius_m
            return area

    def around(self, fix: GnssFix) -> None:
        """Search around a fix that is too coarse to start from, unless a search goes on."""
        with self._lock:
            if fix.covariance is not None and not (self._search and self._search.images):
                self._place, self._search = LastPlace(fix.lat, fix.lon), None
                self._radius_m = min(search_radius(fix.covariance[:2, :2]), LARGEST_M)
                self._missing_ns = 0

    def settled(self, pose: FilteredPose) -> None:
        """End the search: the filter has this pose, where a later search begins."""
        with self._lock:
            if not self._filter.started:
                return  # it is to be forgotten
            self._end()
            self._place, self._radius_m = LastPlace(pose.lat, pose.lon), None
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self._save()

    def stop(self) -> None:
        """End the search; write the last place to its file."""
        self._end()
        self._save()

    def step(
        self,
        stamp_ns: int,
        heading: HeadingSample | None,
        score: Callable[[float, float], TileScores | None],
        calibration: Calibration,
        mounting: Mounting,
    ) -> FilteredPose:
        """Go on with an image; return the pose that was found.

        score: returns the scores of the tile around a position; None if it shows nothing. It may raise
        MapError. Raises RejectedInput if there is no area, the time has not come, or the place is not known.
        """
        text = "no usable fix, and the filter has no position either"
        with self._lock:
            if (area := self._area) is None or not self.enabled:
                self._end()
                raise RejectedInput("fix_missing", text)
            if self._missing_ns is None or stamp_ns < self._missing_ns:
                self._missing_ns, self._search = stamp_ns, None
            # A vehicle whose odometry has not begun yet stands.
            followed = self._odometry.between(stamp_ns, stamp_ns) is not None
            if self._search is None and followed:
                self._search = PlaceSearch(area, self._odometry, self._spacing_m, self._filter.options)
            search = self._search
        # From the first image on, as the area moves along with the vehicle.
        if search is not None and not search.move(stamp_ns, heading):
            self._health.count("searches_interrupted")
        left = BEGIN_AFTER_S - (stamp_ns - self._missing_ns) / NS
        if left > 0.0:
            raise RejectedInput("fix_missing", f"{text}; the search without fixes begins in {left:.0f} s")
        self._say(area, search)
        if search is None or not followed:
            raise RejectedInput("odometry_missing", "the search for the vehicle's place needs odometry")
        if search.wants:
            search.observe(self._scan(search, score, mounting), calibration, mounting)
            self._health.count("images_searched")
        with self._lock:
            if self._search is search:  # and no other place was named meanwhile
                if search.given_up:
                    self._widen(search)
                elif (found := search.found) is not None:
                    self._filter.restart(found)
                    return found
        raise RejectedInput("searching", "the vehicle's place is not known yet")

    def _scan(
        self, search: PlaceSearch, score: Callable[[float, float], TileScores | None], mounting: Mounting
    ) -> list[TileScores]:
        """Return the scores of all tiles that may show the place. Raises RejectedInput, MapError."""
        scan: list[TileScores] = []
        failure: MapError | None = None
        places, began = search.centres(mounting), time.monotonic()
        for lat, lon in places:
            if self._search is not search:
                raise RejectedInput("searching", "another place was named")
            if time.monotonic() - began > SLOWEST_S:
                text = f"comparing an image with {len(places)} tiles takes more than {SLOWEST_S:.0f} s"
                raise RejectedInput("search_slow", f"{text}: set a smaller start_radius_m")
            try:
                scores = score(lat, lon)
            except MapError as error:
                failure = error  # the others are loaded meanwhile
                continue
            if scores is not None:
                scan.append(scores)
        if failure is not None:
            # Without all tiles, another place would seem the best.
            raise failure
        return scan

    def _end(self) -> None:
        self._search, self._missing_ns = None, None
        self._health.clear("searching")

    def _save(self) -> None:
        if self._place is None or not self._node.get_parameter("place_persist").value:
            return
        self._saved_at = time.monotonic()
        try:
            self._place.save(self._file)
            self._health.clear("place_not_saved")
        except RecordError as error:
            self._health.condition("place_not_saved", WARN, str(error))

    def _say(self, area: SearchArea, search: PlaceSearch | None) -> None:
        area = area if search is None else search.area
        text = f"no fix: searching for the vehicle {_shown_area(area)}"
        if search is not None and search.images:
            share = f"{search.best[1]:.0%} of the belief lie within {FOUND_M:g} m of the likeliest place"
            text += f"; {share} after about {search.images:.0f} images"
        else:
            text += "; it takes images and odometry of some tens of metres"
        self._health.condition("searching", WARN, text)
        self._node.get_logger().warning(shown(text), throttle_duration_sec=10.0)

    def _widen(self, search: PlaceSearch) -> None:
        text = f"neither map nor images show a place {_shown_area(search.area)}: searching in a wider area"
        self._node.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        search.widen()
        self._health.count("searches_widened")

    @property
    def _area(self) -> SearchArea | None:
        if self._place is None:
            return None
        radius = self._parameter() if self._radius_m is None else self._radius_m
        return SearchArea(self._place.lat, self._place.lon, radius)

    def _parameter(self) -> float:
        return float(self._node.get_parameter("start_radius_m").value)

    def _first_place(self) -> LastPlace | None:
        value = {name: self._node.get_parameter(name).value for name in ("start_lat", "start_lon")}
        if value["start_lat"] == value["start_lat"]:
            return LastPlace(value["start_lat"], value["start_lon"])
        if self._node.get_parameter("place_persist").value:
            try:
                return LastPlace.load(self._file)
            except RecordError as error:
                self._node.get_logger().warning(str(error))
        return None


def _shown_area(area: SearchArea) -> str:
    return f"within {area.radius_m:.0f} m of {area.lat:.5f} {area.lon:.5f}"
