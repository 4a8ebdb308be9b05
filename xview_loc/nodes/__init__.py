"""ROS 2 nodes: thin adapters over the core. The only package that imports rclpy."""
