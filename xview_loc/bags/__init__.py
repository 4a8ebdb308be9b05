"""rosbag2 directories (MCAP): written so that nothing is lost, repaired, and read, without ROS."""
