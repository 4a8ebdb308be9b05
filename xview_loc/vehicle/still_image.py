"""Finds a camera that sends the same image again and again while the vehicle moves. Free of ROS."""

from __future__ import annotations

from xview_loc.geodesy import distance_m
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix

# About so many of a message's bytes are compared, from behind the header on, which is another one each time:
# a sensor's noise changes them.
_BYTES, _BEHIND_HEADER = 8192, 100
# Equal images, the vehicle's way by odometry, and by fixes: at least this and so many sigma.
_IMAGES, _WAY_M, _APART_M, _APART_SIGMAS = 3, 5.0, 15.0, 4.0


class StillImage:
    """``fault`` says in words that the image does not change; "" if it does. Not thread-safe."""

    def __init__(self, odometry: Odometry) -> None:
        self._odometry = odometry
        self._seen = b""
        self._since_ns = self._count = 0
        self._first: GnssFix | None = None
        self.fault = ""

    def add_image(self, stamp_ns: int, message: bytes) -> None:
        """Take an image message's CDR bytes."""
        seen = message[_BEHIND_HEADER :: max(1, len(message) // _BYTES)]
        if seen != self._seen:
            self._seen, self._since_ns, self._count, self._first = seen, stamp_ns, 0, None
            self.fault = ""
        self._count += 1
        motion = self._odometry.between(self._since_ns, stamp_ns)
        if motion is not None:
            self._judge(motion.length, _WAY_M)

    def add_fix(self, fix: GnssFix) -> None:
        """Take a fix, later than the last one."""
        first = self._first = self._first or fix
        sigmas = _APART_SIGMAS * max(first.sigma, fix.sigma)
        self._judge(distance_m(first.lat, first.lon, fix.lat, fix.lon), max(_APART_M, sigmas))

    def _judge(self, moved_m: float, least_m: float) -> None:
        if self._count >= _IMAGES and moved_m >= least_m:
            self.fault = f"the camera sent the same image {self._count} times while the vehicle moved"
