#!/bin/bash
# Start each launch file on a simulated city, and wait until its nodes are active. Run it in the image of the Dockerfile.
set -eu
set -m # so that ros2 launch, in the background, is interrupted by kill -INT

folder=$(mktemp -d)
ros2 run xview_loc xview-loc simulate "$folder" --size 300 --frames 1

try() { # LAUNCH_FILE NODE...
    echo "== $1"
    ros2 launch xview_loc "$1" map:="$folder/city.tif" &
    local launch=$!
    for node in "${@:2}"; do
        timeout 300 bash -c "until ros2 lifecycle get $node | grep '^active'; do sleep 1; done"
    done
    kill -INT $launch
    wait $launch
}

try localize.launch.py /localizer
try record.launch.py /pair_logger
try bringup.launch.py /localizer /pair_logger
echo "all launch files work"
