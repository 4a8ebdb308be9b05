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
from xview_loc.estimation.place_search import (
    APART_M,
    FOUND_M,
    LARGEST_M,
    LEAST_APART_M,
    PlaceSearch,
    SearchArea,
)
from xview_loc.estimation.position_filter import FilteredPose, PositionFilter
from xview_loc.maps.base import MapError
from xview_loc.models.base import Calibration
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN, Health
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import NS, GnssFix, HeadingSample, RejectedInput

# A search begins once there has been no fix for this long.
BEGIN_AFTER_S = 5.0
# Longest time to compare an image with tiles: odometry since must still be known. Beside a
# filter, poses wait.
SLOWEST_S, SLOWEST_BESIDE_S = 60.0, 2.0
# Share of the tiles that may fail to load.
FAILED_SHARE = 0.1
# How often the place is written to its file.
SAVE_EVERY_S = 10.0


class PlaceFinder:
    """Searches around the first of these that is known: a rough initial pose, a fix too coarse to start from,
    where the way was lost, the parameters ``start_lat`` and ``start_lon``, the last place before the node was
    started.

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
        # What is to be searched next: its middle, and its radius; None for the parameter's.
        self._middle = self._first_place()
        self._radius_m: float | None = None
        # An operator named it: coarse fixes do not replace it.
        self._requested = False
        self._search: PlaceSearch | None = None
        self._scanned = self._slow = False
        self._missing_ns: int | None = None
        self._settled: LastPlace | None = None
        self._saved_at = 0.0

    @property
    def enabled(self) -> bool:
        """False if the parameters rule out a search."""
        return self._parameter() > 0.0

    @property
    def possible(self) -> bool:
        """True if there is an area to search."""
        return self._middle is not None and self.enabled

    def start_from(self, pose: FilteredPose) -> None:
        """Let the filter start from a pose."""
        with self._lock:
            self._search = None
            self._filter.restart(pose)

    def expect(self, area: SearchArea) -> None:
        """Forget the filter's place; search this area from the next image without a fix on."""
        with self._lock:
            self._name(area)
            self._requested, self._search = True, None
            self._filter.restart()

    def forget(self) -> SearchArea | None:
        """Forget the filter's place, which is wrong; return the wider area to search without a fix."""
        with self._lock:
            self._search = None
            self._filter.restart()
            if (area := self._area) is None or not self.enabled:
                return None
            self._name(area := area.larger(area.radius_m))
            self._requested = True
            return area

    def around(self, fix: GnssFix) -> None:
        """Search around a fix that is too coarse to start from, unless a search goes on or was asked for."""
        with self._lock:
            busy = self._requested or (self._search is not None and self._scanned)
            if fix.covariance is not None and not busy:
                radius = min(search_radius(fix.covariance[:2, :2]), LARGEST_M)
                self._name(SearchArea(fix.lat, fix.lon, radius))
                self._search, self._missing_ns = None, fix.stamp_ns - round(BEGIN_AFTER_S * NS)

    def settled(self, pose: FilteredPose) -> bool:
        """End the search: the filter has a pose, where a later one begins. Return True if there was one."""
        with self._lock:
            if not self._filter.started:
                return False  # it is to be forgotten
            searched = self._search is not None
            self._end()
            self._middle = self._settled = LastPlace(pose.lat, pose.lon)
            self._radius_m, self._requested = None, False
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self._save()
        return searched

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
        *,
        take: Callable[[FilteredPose], object],
        beside: bool = False,
    ) -> None:
        """Go on with an image.

        score: returns the scores of the tile around a position; None if it shows nothing. It may raise
        MapError. take: called with the pose once it is found, when the filter has been told. beside: True if
        the filter goes on meanwhile: fewer images are compared, and the area is not widened. Raises
        RejectedInput unless the place is found.
        """
        text = "no usable fix, and the filter has no position either"
        with self._lock:
            if (area := self._area) is None or not self.enabled:
                self._end()
                raise RejectedInput("fix_missing", text)
            if self._missing_ns is None or stamp_ns < self._missing_ns:
                self._missing_ns, self._search = stamp_ns, None
            # A vehicle whose odometry has never begun stands.
            if self._search is None and self._odometry.begun:
                self._search = PlaceSearch(area, self._odometry, self._spacing_m, self._filter.options)
                self._scanned = False
            search = self._search
        if search is not None:
            # From the first image on, as the area moves along with the vehicle.
            if not search.move(stamp_ns, heading):
                self._health.count("searches_interrupted")
            with self._lock:
                if self._search is search:
                    self._name(search.area)
        left = BEGIN_AFTER_S - (stamp_ns - self._missing_ns) / NS
        if left > 0.0:
            raise RejectedInput("fix_missing", f"{text}; the search without fixes begins in {left:.0f} s")
        self._say(area if search is None else search.area, search, beside)
        if search is None or not self._odometry.covers(stamp_ns):
            raise RejectedInput("odometry_missing", "the search for the vehicle's place needs odometry")
        if search.driven >= (APART_M if beside else LEAST_APART_M):
            self._scanned = True
            try:
                scan = self._scan(search, score, mounting, SLOWEST_BESIDE_S if beside else SLOWEST_S)
            except MapError:
                if beside:
                    search.driven = 0.0  # poses must not wait for every image
                raise
            search.observe(scan, calibration, mounting)
            self._health.count("images_searched")
        with self._lock:
            if self._search is search:  # and no other place was named meanwhile
                if search.given_up and not self._slow:
                    self._widen(search, beside)
                elif (found := search.found) is not None:
                    self._filter.restart(found)
                    take(found)
                    return
        raise RejectedInput("searching", "the vehicle's place is not known yet")

    def _scan(
        self,
        search: PlaceSearch,
        score: Callable[[float, float], TileScores | None],
        mounting: Mounting,
        longest_s: float,
    ) -> list[TileScores]:
        """Return the scores of the tiles that may show the place, the likeliest first.

        Those for which there is no time, and a few that fail, count as not shown. Raises RejectedInput, and
        MapError if many fail.
        """
        scan: list[TileScores] = []
        failures: list[MapError] = []
        places, began = search.centres(mounting), time.monotonic()
        self._slow = False
        for lat, lon in places:
            if self._search is not search:
                raise RejectedInput("searching", "another place was named")
            if time.monotonic() - began > longest_s:
                self._slow = True
                self._health.count("searches_slow")
                break
            try:
                scores = score(lat, lon)
            except MapError as error:
                failures.append(error)
                if len(failures) > FAILED_SHARE * len(places):
                    # Without so many tiles, another place could seem the best.
                    raise
                continue
            if scores is not None:
                scan.append(scores)
        return scan

    def _name(self, area: SearchArea) -> None:
        self._middle, self._radius_m = LastPlace(area.lat, area.lon), area.radius_m

    def _end(self) -> None:
        self._search, self._missing_ns = None, None
        self._health.clear("searching")

    def _save(self) -> None:
        if self._settled is None or not self._node.get_parameter("place_persist").value:
            return
        self._saved_at = time.monotonic()
        try:
            self._settled.save(self._file)
            self._health.clear("place_not_saved")
        except RecordError as error:
            self._health.condition("place_not_saved", WARN, str(error))

    def _say(self, area: SearchArea, search: PlaceSearch | None, beside: bool) -> None:
        why = "the filter's position is doubtful" if beside else "no fix to start from"
        text = f"{why}: searching for the vehicle {_shown_area(area)}"
        if search is not None and search.images:
            share = f"{search.best[1]:.0%} of the belief lies within {FOUND_M:g} m of the likeliest place"
            text += f"; {share} after about {search.images:.0f} images"
        else:
            text += "; it takes images and odometry of some tens of metres"
        if self._slow:
            text += "; there is no time for all tiles: set a smaller start_radius_m, or use a faster model"
        self._health.condition("searching", WARN, text)
        self._node.get_logger().warning(shown(text), throttle_duration_sec=10.0)

    def _widen(self, search: PlaceSearch, beside: bool) -> None:
        text = f"neither map nor images show a place {_shown_area(search.area)}"
        if beside or search.area.radius_m >= LARGEST_M:
            search.restart()
            text += ": searching there anew"
        else:
            search.widen()
            self._health.count("searches_widened")
            text += ": searching in a wider area"
        self._name(search.area)
        self._node.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)

    @property
    def _area(self) -> SearchArea | None:
        if self._middle is None:
            return None
        radius = self._parameter() if self._radius_m is None else self._radius_m
        return SearchArea(self._middle.lat, self._middle.lon, radius)

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
