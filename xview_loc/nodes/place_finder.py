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
from xview_loc.estimation.position_filter import FilteredPose
from xview_loc.maps.base import MapError
from xview_loc.models.base import Calibration
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN, Health
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample, RejectedInput

# A search begins once there has been no fix for this long.
BEGIN_AFTER_S = 5.0
# How often the place is written to its file.
SAVE_EVERY_S = 10.0


class PlaceFinder:
    """Searches around the first of these that is known: a rough initial pose, where the way was lost, the
    parameters ``start_lat`` and ``start_lon``, the last place before the node was started.

    Areas without the vehicle are widened. For the worker's thread; others may call :meth:`expect`.
    """

    def __init__(self, node: Node, health: Health, odometry: Odometry, spacing_m: float) -> None:
        self._node, self._health = node, health
        self._odometry, self._spacing_m = odometry, spacing_m
        self._file = record_path(node.get_fully_qualified_name(), ".place")
        self._lock = threading.Lock()
        self._area = self._first_area()
        self._search: PlaceSearch | None = None
        self._missing_ns: int | None = None
        self._saved_at = 0.0
        self._place: LastPlace | None = None

    @property
    def enabled(self) -> bool:
        """False if the parameters rule out a search."""
        return self._radius() > 0.0

    @property
    def possible(self) -> bool:
        """True if there is an area to search."""
        return self._area is not None and self.enabled

    def expect(self, area: SearchArea) -> None:
        """Search this area from the next image without a fix on."""
        with self._lock:
            self._area, self._search = area, None

    def around(self, fix: GnssFix) -> None:
        """Search around a fix that is too coarse to start from, unless a search goes on."""
        if self._search is None and fix.covariance is not None:
            radius = min(search_radius(fix.covariance[:2, :2]), LARGEST_M)
            self.expect(SearchArea(fix.lat, fix.lon, radius))
            self._missing_ns = 0

    def settled(self, pose: FilteredPose) -> None:
        """End the search: there is a filtered pose. It is where a later search begins."""
        self._end()
        self._area = SearchArea(pose.lat, pose.lon, self._radius())
        self._place = LastPlace(pose.lat, pose.lon)
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
    ) -> FilteredPose | None:
        """Go on with an image; return the pose once it is found.

        score: returns the scores of the tile around a position; None if it shows nothing. It may raise
        MapError. Raises RejectedInput if there is no area, or the time has not come.
        """
        text = "no usable fix, and the filter has no position either"
        if not self.possible:
            raise RejectedInput("fix_missing", text)
        if self._missing_ns is None or stamp_ns < self._missing_ns:
            self._missing_ns = stamp_ns
        left = BEGIN_AFTER_S - (stamp_ns - self._missing_ns) / NS
        if left > 0.0:
            raise RejectedInput("fix_missing", f"{text}; the search without fixes begins in {left:.0f} s")
        with self._lock:
            if self._search is None:
                assert self._area is not None
                self._search = PlaceSearch(self._area, self._odometry, self._spacing_m)
            search = self._search
        if not search.move(stamp_ns, heading):
            self._health.count("searches_interrupted")
        self._say(search)
        scan, failure = [], None
        for place in search.centres():
            try:
                scores = score(*place)
            except MapError as error:
                failure = error
                continue
            if scores is not None:
                scan.append(scores)
        if failure is not None and not scan:
            raise failure
        search.observe(scan, calibration, mounting)
        self._health.count("images_searched")
        with self._lock:
            if self._search is not search:
                return None  # another area was named meanwhile
        if search.given_up:
            self._widen(search)
        return search.found

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

    def _say(self, search: PlaceSearch) -> None:
        area = search.area
        text = f"no fix: the place is searched within {area.radius_m:.0f} m of {area.lat:.5f} {area.lon:.5f}"
        if search.images:
            text += (
                f"; the likeliest {FOUND_M:g} m hold {search.best[1]:.0%} after {search.images:.0f} images"
            )
        else:
            text += "; it takes images and odometry of some tens of metres"
        self._health.condition("searching", WARN, text)
        self._node.get_logger().warning(shown(text), throttle_duration_sec=10.0)

    def _widen(self, search: PlaceSearch) -> None:
        area = search.area
        text = f"images do not show the {area.radius_m:.0f} m around {area.lat:.5f} {area.lon:.5f}"
        self._node.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        self.expect(area.widened)

    def _radius(self) -> float:
        return float(self._node.get_parameter("start_radius_m").value)

    def _first_area(self) -> SearchArea | None:
        value = {name: self._node.get_parameter(name).value for name in ("start_lat", "start_lon")}
        place: LastPlace | None = None
        if value["start_lat"] == value["start_lat"]:
            place = LastPlace(value["start_lat"], value["start_lon"])
        elif self._node.get_parameter("place_persist").value:
            try:
                place = LastPlace.load(self._file)
            except RecordError as error:
                self._node.get_logger().warning(str(error))
        return None if place is None else SearchArea(place.lat, place.lon, self._radius())
