"""What is used where a distribution has it: cv_bridge, sensor_msgs_py, events of lost messages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.logging import RcutilsLogger
from rclpy.node import Node
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from xview_loc.errors import reason
from xview_loc.images import Image, ImageError

MakeCloud = Callable[[Header, NDArray[np.float32]], PointCloud2]
HYPOTHESIS_FIELDS = ("x", "y", "z", "probability")


def cv_bridge_decoder(logger: RcutilsLogger) -> Callable[[Any], Image] | None:
    """Return a function that converts an Image to RGB with cv_bridge; None without it.

    The function raises ImageError where cv_bridge fails, or would be wrong.
    """
    try:
        bridge = import_module("cv_bridge").CvBridge()
    except ImportError:
        return None
    except Exception as error:  # built for another numpy
        logger.warning(f"cv_bridge is installed, but cannot be used: {reason(error)}")
        return None

    def decode(message: Any) -> Image:
        name = f"image encoding {message.encoding!r}"
        try:
            raw = np.asarray(bridge.imgmsg_to_cv2(message))
            pixels = np.asarray(bridge.imgmsg_to_cv2(message, "rgb8"))
        except Exception as error:  # C++ raises any of them
            raise ImageError(f"{name} is not supported, nor by cv_bridge: {reason(error)}") from None
        if raw.nbytes != message.height * message.step:
            raise ImageError(f"{name} has padded rows, which cv_bridge would skew")
        if pixels.dtype != np.uint8 or pixels.shape != (message.height, message.width, 3):
            raise ImageError(f"{name}: cv_bridge made {pixels.dtype} of shape {pixels.shape} of it, not RGB")
        return np.ascontiguousarray(pixels)

    return decode


def create_subscription(node: Node, lost: Callable[[int], None] | None, *args: Any, **more: Any) -> Any:
    """Return a subscription of the node that calls ``lost`` with a number of messages that DDS lost.

    It does not where the middleware cannot tell. args, more: those of rclpy's ``create_subscription``.
    """
    if lost is None:
        return node.create_subscription(*args, **more)
    try:
        events = import_module("rclpy.event_handler")
    except ImportError:  # Humble
        events = import_module("rclpy.qos_event")
    callbacks = events.SubscriptionEventCallbacks(message_lost=lambda event: lost(event.total_count_change))
    try:
        return node.create_subscription(*args, **more, event_callbacks=callbacks)
    except events.UnsupportedEventTypeError:
        return node.create_subscription(*args, **more)


def cloud_maker() -> MakeCloud | None:
    """Return a function that makes a cloud of points (n, 4); None without sensor_msgs_py."""
    try:
        point_cloud2 = import_module("sensor_msgs_py.point_cloud2")
    except ImportError:
        return None
    fields = [
        PointField(name=name, offset=4 * k, datatype=PointField.FLOAT32, count=1)
        for k, name in enumerate(HYPOTHESIS_FIELDS)
    ]
    return lambda header, points: point_cloud2.create_cloud(header, fields, points)
