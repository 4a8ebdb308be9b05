"""What an operator asks of a running localizer: an initial pose, a pause, a new search."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger

from xview_loc.bags.ros_types import stamp_ns
from xview_loc.errors import reason, shown
from xview_loc.estimation.localizer import SEARCH_SIGMAS, search_radius
from xview_loc.estimation.place_search import LARGEST_M, SearchArea
from xview_loc.estimation.position_filter import WIDEST_M, FilteredPose
from xview_loc.geodesy import LocalProjection
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN, Health
from xview_loc.nodes.inputs import read_message
from xview_loc.nodes.outputs import FARTHEST_M
from xview_loc.nodes.place_finder import PlaceFinder
from xview_loc.vehicle.messages import yaw_of
from xview_loc.vehicle.synchronisation import RejectedInput

REFUSAL_SHOWN_S = 10.0


class Requests:
    """Topic ``initialpose``, services ``~/set_enabled`` and ``~/relocalize``.

    enabled: False while images are to be ignored.
    """

    def __init__(
        self,
        node: Node,
        health: Health,
        place_finder: Callable[[], PlaceFinder | None],
        datum: Callable[[], LocalProjection | None],
        forget_heading: Callable[[], object],
    ) -> None:
        """
        place_finder, datum: return those of the active node; None without a filter, or a datum.
        forget_heading: called where the place is to be searched anew.
        """
        self.enabled = True
        self._node, self._health = node, health
        self._finder, self._datum, self._forget_heading = place_finder, datum, forget_heading
        # A click in RViz: one message, which must arrive.
        node.create_subscription(PoseWithCovarianceStamped, "initialpose", self._on_initial_pose, 1, raw=True)
        node.create_service(SetBool, "~/set_enabled", self._on_set_enabled)
        node.create_service(Trigger, "~/relocalize", self._on_relocalize)

    def _on_initial_pose(self, data: bytes) -> None:
        self._health.count("initialpose_received")
        try:
            message = read_message(data, PoseWithCovarianceStamped)
            finder = self._finder()
            if finder is None:
                raise RejectedInput("no_filter", "it starts the filter: set filter: true, and activate")
            datum = self._datum()
            if datum is None:
                raise RejectedInput("no_datum", "set datum_lat and datum_lon, or wait for a pose")
            frame = self._node.get_parameter("map_frame").value
            try:
                pose = pose_on_earth(message, datum, frame)
            except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
                raise RejectedInput("damaged", reason(error)) from None
            rough = float(np.linalg.eigvalsh(pose.covariance)[-1]) > WIDEST_M**2
            if rough and not finder.enabled:
                text = f"its standard deviation must be at most {WIDEST_M:.0f} m while start_radius_m is 0"
                raise RejectedInput("covariance", text)
        except RejectedInput as error:
            self._health.count(f"initialpose_rejected/{error.reason}")
            text = f"initial pose refused: {error}"
            self._health.condition("initialpose", WARN, text, REFUSAL_SHOWN_S)
            self._node.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
            return
        self._health.clear("initialpose")
        text = f"the filter starts from the initial pose {pose.lat:.7f} {pose.lon:.7f}"
        if rough:
            radius = search_radius(pose.covariance)
            finder.expect(SearchArea(pose.lat, pose.lon, radius))
            text = f"searching within {radius:.0f} m of the initial pose, unless a fix comes"
        else:
            finder.start_from(pose)
        self._forget_heading()
        self._node.get_logger().info(text, throttle_duration_sec=LOG_INTERVAL_S)

    def _on_set_enabled(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.enabled = bool(request.data)
        if self.enabled:
            self._health.clear("disabled")
        else:
            self._health.condition(
                "disabled", WARN, "images are ignored: ~/set_enabled was called with false"
            )
        response.success, response.message = True, "enabled" if self.enabled else "disabled"
        self._node.get_logger().info(response.message)
        return response

    def _on_relocalize(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        finder = self._finder()
        if finder is None:
            response.message = "no filter is active: images are searched around their fixes anyway"
            return response
        area = finder.forget()
        self._forget_heading()
        response.success, response.message = True, "the position is forgotten; the next fix is the new start"
        if area is not None:
            response.message += f"; without one, images are searched within {area.radius_m:.0f} m"
        self._node.get_logger().info(response.message)
        return response


def pose_on_earth(message: PoseWithCovarianceStamped, datum: LocalProjection, frame: str) -> FilteredPose:
    """Convert an initial pose in the datum's plane, which is called ``frame``.

    Raises RejectedInput if it is in another frame, not finite, too far away, or too uncertain to start from.
    """
    given = message.header.frame_id.lstrip("/")
    if given != frame:
        raise RejectedInput("frame", f"it is in frame {given!r}, {frame!r} is expected")
    position, q = message.pose.pose.position, message.pose.pose.orientation
    full = np.array(message.pose.covariance, float).reshape(6, 6)
    covariance, variance = full[:2, :2], float(full[5, 5])
    norm = math.hypot(q.x, q.y, q.z, q.w)
    if not (
        abs(norm - 1.0) < 0.1 and np.isfinite([position.x, position.y, variance, *covariance.flat]).all()
    ):
        raise RejectedInput("not_finite", "its numbers are not finite, or its quaternion is no rotation")
    if math.hypot(position.x, position.y) > FARTHEST_M:
        raise RejectedInput("too_far", f"it is more than {FARTHEST_M / 1e3:.0f} km from the map's origin")
    widest = LARGEST_M / SEARCH_SIGMAS
    least, largest = np.linalg.eigvalsh((covariance + covariance.T) / 2.0)
    if least < 0.0 or variance < 0.0 or largest > widest**2:
        text = f"its standard deviation must be at most {widest:.0f} m, and its covariance no less than zero"
        raise RejectedInput("covariance", text)
    lat, lon = (float(v) for v in datum.inverse(position.x, position.y))
    convergence = float(datum.convergence(lat, lon))
    cos, sin = math.cos(convergence), math.sin(convergence)
    turn = np.array([[cos, sin], [-sin, cos]])
    stamp = stamp_ns(message.header)
    return FilteredPose(lat, lon, turn @ covariance @ turn.T, yaw_of(q) - convergence, variance, stamp)
