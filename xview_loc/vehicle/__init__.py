"""A vehicle's inputs: messages checked, paired by stamp and moved between sensors; no ROS needed."""
