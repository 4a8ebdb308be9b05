"""Publishes a recorded drive's camera, GNSS and heading as a vehicle would: the demo's other process.

A drive is a folder with ``drive.json`` (a list of frames: image file, fix lat/lon in degrees and sigma in
metres, heading as true-north ENU yaw in radians) and the images.
"""

from __future__ import annotations

import array
import json
import math
import sys
import time
from pathlib import Path

import rclpy
from geometry_msgs.msg import QuaternionStamped
from rclpy.node import Node
from sensor_msgs.msg import Image, NavSatFix, NavSatStatus

from xview_loc.camera import decode_compressed


def publish_drive(folder: Path, rate_hz: float) -> None:
    """Publish every frame once, at ``rate_hz``, after all three topics have a listener."""
    node = Node("drive_publisher")
    outputs = {
        topic: node.create_publisher(kind, topic, 10)
        for topic, kind in (("image", Image), ("fix", NavSatFix), ("heading", QuaternionStamped))
    }
    while not all(p.get_subscription_count() for p in outputs.values()):
        time.sleep(0.05)
    for frame in json.loads((folder / "drive.json").read_text()):
        began = time.monotonic()
        stamp = node.get_clock().now().to_msg()
        rgb = decode_compressed((folder / frame["image"]).read_bytes())

        heading = QuaternionStamped()
        heading.header.stamp = stamp
        heading.header.frame_id = "base_link"
        heading.quaternion.z = math.sin(frame["heading"] / 2)
        heading.quaternion.w = math.cos(frame["heading"] / 2)
        outputs["heading"].publish(heading)

        fix = NavSatFix(latitude=frame["lat"], longitude=frame["lon"])
        fix.header.stamp = stamp
        fix.header.frame_id = "antenna"
        fix.status.status = NavSatStatus.STATUS_FIX
        fix.position_covariance = [frame["sigma"] ** 2 if i in (0, 4) else 0.0 for i in range(9)]
        fix.position_covariance[8] = (2 * frame["sigma"]) ** 2
        fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_DIAGONAL_KNOWN
        outputs["fix"].publish(fix)

        image = Image(height=rgb.shape[0], width=rgb.shape[1], step=3 * rgb.shape[1], encoding="rgb8")
        image.header.stamp = stamp
        image.header.frame_id = "camera"
        image.data = array.array("B", rgb.tobytes())
        outputs["image"].publish(image)
        time.sleep(max(0.0, 1.0 / rate_hz - (time.monotonic() - began)))
    node.destroy_node()


def main() -> None:
    """``python -m xview_loc.nodes.drive_publisher FOLDER RATE_HZ``."""
    rclpy.init()
    publish_drive(Path(sys.argv[1]), float(sys.argv[2]))
    rclpy.shutdown()


if __name__ == "__main__":
    main()
