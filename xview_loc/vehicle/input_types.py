"""Message types that each of a vehicle's inputs may have, for nodes and importers. Free of ROS."""

from __future__ import annotations

AUTO = "auto"
# What a heading's choice may say besides: none is published, odometry and fixes give it.
COURSE = "course"
# By input: the names that parameters choose from, preferred first, and the types.
INPUT_TYPES = {
    "image": {"compressed": "sensor_msgs/msg/CompressedImage", "raw": "sensor_msgs/msg/Image"},
    "camera_info": {"camera_info": "sensor_msgs/msg/CameraInfo"},
    "fix": {"fix": "sensor_msgs/msg/NavSatFix"},
    "heading": {
        "imu": "sensor_msgs/msg/Imu",
        "quaternion": "geometry_msgs/msg/QuaternionStamped",
        "pose": "geometry_msgs/msg/PoseStamped",
        "pose_with_covariance": "geometry_msgs/msg/PoseWithCovarianceStamped",
        "odometry": "nav_msgs/msg/Odometry",
        "degrees": "std_msgs/msg/Float64",
    },
    "odom": {
        "odometry": "nav_msgs/msg/Odometry",
        "twist": "geometry_msgs/msg/TwistStamped",
        "twist_with_covariance": "geometry_msgs/msg/TwistWithCovarianceStamped",
    },
}


def choices(name: str) -> tuple[str, ...]:
    """Return what a parameter may say of an input's type."""
    return (AUTO, *INPUT_TYPES[name])
