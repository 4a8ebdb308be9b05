"""A simulated drive with a rig through the running localizer, from JPEGs to poses."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from rclpy.serialization import deserialize_message
from ros_harness import Bench, NodeProcess, bench, pick_domain
from sensor_msgs.msg import NavSatFix

from xview_loc.geodesy import distance_m
from xview_loc.nodes.inputs import message_class
from xview_loc.rig import Rig
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.messages import frame_messages, topics
from xview_loc.simulation.rigs import make_rig

DOMAIN = pick_domain()
FRAMES, NS = 30, 10**9


def rig_file(path: Path, rig: Rig) -> Path:
    """Where the cameras are."""
    lines = ["cameras:"]
    for name, mounted in rig.cameras.items():
        x, y, z = mounted.position
        lines.append(
            f"  {name}: {{x: {x}, y: {y}, z: {z}, quaternion: {list(map(float, mounted.rotation))}}}"
        )
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_a_drive_with_a_rig(tmp_path: Path) -> None:
    city, rig = build_city(905, "source"), make_rig("six")
    options = DriveOptions(rate_hz=1.0)
    frames = list(drive(city, FRAMES, 1, options=options, view=rig))
    parameters = {
        "map": str(city.write_geotiff(tmp_path / "city.tif")),
        "datum_lat": frames[0].truth.lat,
        "datum_lon": frames[0].truth.lon,
        "cameras": list(rig.cameras),
        "rig_file": str(rig_file(tmp_path / "rig.yaml", rig)),
        "tilt_source": "imu",
        "qos_reliability": "reliable",
        "max_wait_s": 1.0,
        "torch_threads": 1,
    }
    module = "xview_loc.nodes.localizer_node"
    node = NodeProcess(DOMAIN, tmp_path / "log", parameters, module=module)
    try:
        with bench(DOMAIN) as b:
            kinds = {topic: message_class(kind) for topic, kind in topics(rig).items() if "tf" not in topic}
            outputs = {topic: b.publisher(kind, topic) for topic, kind in kinds.items()}
            fixes = b.listen(NavSatFix, "/localizer/fix")
            wanted = [
                o for topic, o in outputs.items() if "truth" not in topic and topic not in ("/odom", "/image")
            ]
            b.wait(lambda: all(o.get_subscription_count() for o in wanted), what="the inputs")
            errors: list[float] = []
            stamp = time.time_ns()
            for frame in frames:
                stamp += NS
                known = accounted(b)
                while accounted(b) == known:  # DDS may lose the first
                    stamp += NS
                    for topic, _, data in frame_messages(frame, stamp, rig):
                        outputs[topic].publish(deserialize_message(data, kinds[topic]))
                    b.wait_diagnosis()
                at = [fix for fix in fixes if NS * fix.header.stamp.sec + fix.header.stamp.nanosec == stamp]
                errors += [distance_m(f.latitude, f.longitude, frame.truth.lat, frame.truth.lon) for f in at]
            print(f"median error {np.median(errors):.2f} m, latency {b.value('latency_ms')} ms")
    finally:
        assert node.stop() == 0, node.log
    assert "Traceback" not in node.log, node.log
    assert len(errors) > 0.9 * FRAMES
    assert np.median(errors) < 3.0


def accounted(b: Bench) -> int:
    """Frames that gave a pose, or none."""
    values = [] if b.status is None else b.status.values
    return sum(int(v.value) for v in values if v.key.startswith(("frames_accepted", "frames_rejected")))
