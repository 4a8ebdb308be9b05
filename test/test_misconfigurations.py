"""A vehicle that is set up wrong: a simulated drive through the running node, one mistake at a time.

Every mistake must show in /diagnostics. The table of what was said, and after how many seconds of driving, is
printed (``-s``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import rasterio
from rasterio.transform import Affine

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from ros_harness import Bench, NodeProcess, bench, pick_domain
from sensor_msgs.msg import Image
from std_msgs.msg import Float64

from xview_loc.models import create_model
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.nodes.inputs import message_class
from xview_loc.nodes.outputs import quaternion_of
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.messages import TOPICS, frame_messages
from xview_loc.vehicle.messages import yaw_of

pytestmark = pytest.mark.slow
DOMAIN = pick_domain()
RATE_HZ = 10.0
NS = 10**9
Change = Callable[[Any, int], Any]


@dataclass
class Mistake:
    """says: what the diagnostics must hold. parameters: of the node.

    change: maps topic, message and the frame's number to the message published instead; None: nothing. kinds:
    types published instead, by topic; None: no publisher. on_map: which map.
    """

    says: str
    parameters: dict[str, Any] = field(default_factory=dict)
    change: Callable[[str, Any, int], Any] = lambda topic, message, k: message
    kinds: dict[str, Any] = field(default_factory=dict)
    on_map: str = "right"
    best_effort: bool = False


def heading(change: Callable[[float], float]) -> Callable[[str, Any, int], Any]:
    """Change the yaw of the heading."""

    def changed(topic: str, message: Any, k: int) -> Any:
        if topic == "/heading":
            message.quaternion = quaternion_of(change(yaw_of(message.quaternion)))
        return message

    return changed


def later(topic_changed: str, seconds: float) -> Callable[[str, Any, int], Any]:
    """Shift the stamps of a topic."""

    def changed(topic: str, message: Any, k: int) -> Any:
        if topic == topic_changed:
            message.header.stamp.sec += round(seconds)
        return message

    return changed


def only(topic_changed: str, change: Callable[[Any, int], Any]) -> Callable[[str, Any, int], Any]:
    """Change the messages of one topic."""
    return lambda topic, message, k: change(message, k) if topic == topic_changed else message


def put(**values: Any) -> Callable[[Any, int], Any]:
    """Set fields of a message."""

    def changed(message: Any, k: int) -> Any:
        for name, value in values.items():
            setattr(message, name, value)
        return message

    return changed


def no_stamp(message: Any, k: int) -> Any:
    message.header.stamp.sec = message.header.stamp.nanosec = 0
    return message


def no_fix(message: Any, k: int) -> Any:
    message.status.status = -1
    return message


def swapped_degrees(message: Any, k: int) -> Any:
    message.latitude, message.longitude = message.longitude, message.latitude
    return message


def standing(message: Any, k: int) -> Any:
    message.twist.twist.linear.x = message.twist.twist.angular.z = 0.0
    return message


class Frozen:
    """The first fix again and again."""

    def __call__(self, message: Any, k: int) -> Any:
        if k == 0:
            self.place = message.latitude, message.longitude
        message.latitude, message.longitude = self.place
        return message


FILTER = {"filter": True}
MISTAKES: dict[str, Mistake] = {
    "heading clockwise": Mistake("heading_disagrees", change=heading(lambda yaw: math.pi / 2 - yaw)),
    "identity quaternion": Mistake("heading_disagrees", change=heading(lambda yaw: 0.0)),
    "IMU turned by 90 degrees": Mistake("heading_disagrees", change=heading(lambda yaw: yaw + math.pi / 2)),
    "Float64 counted from east": Mistake(
        "heading_disagrees",
        kinds={"/heading": Float64},
        change=only("/heading", lambda message, k: Float64(data=math.degrees(yaw_of(message.quaternion)))),
    ),
    "camera turned by 90 degrees": Mistake("no_match", {"camera_yaw_deg": 90.0}),
    "odometry without motion": Mistake("odom_still", FILTER, only("/odom", standing)),
    "fix that hangs": Mistake("fix_still", FILTER, only("/fix", Frozen())),
    "image stamps of an hour ago": Mistake("image_delay", change=later("/image", -3600)),
    "GPS time, 18 s ahead": Mistake("fix_stale", change=later("/fix", 18)),
    "heading of another clock": Mistake("heading_stale", change=later("/heading", -1000)),
    "no stamps": Mistake("no_stamp", change=only("/image", no_stamp)),
    "use_sim_time without a clock": Mistake("no_clock", {"use_sim_time": True}),
    "unknown encoding": Mistake("image_invalid", change=only("/image", put(encoding="jpeg2000"))),
    "RGB called mono8": Mistake("image_invalid", change=only("/image", put(encoding="mono8"))),
    "image on the heading's topic": Mistake(
        "heading_topic: /heading: /bench publishes",
        kinds={"/heading": Image},
        change=only("/heading", lambda message, k: Image()),
    ),
    "compressed expected, raw published": Mistake(
        "image_topic: /image: /bench publishes", {"image_transport": "compressed"}
    ),
    "incompatible QoS": Mistake("QoS is incompatible", {"qos_reliability": "reliable"}, best_effort=True),
    "no camera": Mistake("image_topic: /image has no publisher", kinds={"/image": None}),
    "camera that sends nothing": Mistake("no_image", change=only("/image", lambda message, k: None)),
    "every third image lost": Mistake(
        "images_lost", change=only("/image", lambda message, k: message if k % 3 else None)
    ),
    "no receiver": Mistake("fix_topic: /fix has no publisher", kinds={"/fix": None}),
    "receiver without a fix": Mistake("fix status -1", change=only("/fix", no_fix)),
    "latitude and longitude swapped": Mistake("no_imagery", change=only("/fix", swapped_degrees)),
    "map of another area": Mistake("no_imagery", on_map="elsewhere"),
    "map of another city": Mistake("no_match", on_map="other"),
    "map 1.5 times too large": Mistake("no_match", on_map="scaled"),
    "tile server that is down": Mistake("map_unavailable", on_map="http://127.0.0.1:1/{z}/{x}/{y}.png"),
    "no map": Mistake("not_configured", on_map="missing.tif"),
    "filter without odometry": Mistake("odom_topic: /odom has no publisher", FILTER, kinds={"/odom": None}),
    "pinhole model without camera_info": Mistake(
        "camera_info_missing", {"model": "ccvpe-kitti", "allow_untrained": True}
    ),
    "weights of another model": Mistake("not_configured", {"checkpoint": "other_model"}),
    "map -> odom without a filter": Mistake("not_configured", {"publish_tf": "map_to_odom"}),
}


@dataclass
class Vehicle:
    bench: Bench
    frames: list[Any]
    maps: dict[str, str]
    folder: Path

    @contextmanager
    def node(self, mistake: Mistake) -> Iterator[None]:
        """Run the localizer, which outlives every mistake."""
        parameters = {"map": self.maps.get(mistake.on_map, mistake.on_map), "torch_threads": 1}
        # The first image has a pose.
        parameters |= {"datum_lat": self.frames[0].fix.lat, "datum_lon": self.frames[0].fix.lon}
        parameters |= {"map_deadline_s": 2.0, **mistake.parameters}
        log = self.folder / "node.txt"
        node = NodeProcess(DOMAIN, log, parameters, module="xview_loc.nodes.localizer_node")
        try:
            self.bench.wait_diagnosis()
            yield
            assert node.alive(), node.log
        finally:
            code = node.stop()
        assert code == 0 and "Traceback" not in node.log, node.log

    def drive(self, mistake: Mistake, stop: Callable[[], bool]) -> float:
        """Publish the drive until ``stop`` returns True; return the seconds driven."""
        policy = ReliabilityPolicy.BEST_EFFORT if mistake.best_effort else ReliabilityPolicy.RELIABLE
        qos, node = QoSProfile(depth=10, reliability=policy), self.bench.node
        sent = {topic: message_class(kind) for topic, kind in TOPICS.items() if "truth" not in topic}
        kinds = {topic: mistake.kinds.get(topic, kind) for topic, kind in sent.items()}
        outputs = {t: node.create_publisher(kind, t, qos) for t, kind in kinds.items() if kind is not None}
        try:
            due = time.monotonic()
            for k, frame in enumerate(self.frames):
                for topic, _, data in frame_messages(frame, time.time_ns()):
                    if topic in outputs:
                        message = mistake.change(topic, deserialize_message(data, sent[topic]), k)
                        if message is not None:
                            outputs[topic].publish(message)
                due = max(due + 1.0 / RATE_HZ, time.monotonic())
                while time.monotonic() < due:
                    self.bench.executor.spin_once(timeout_sec=0.01)
                    if stop():
                        return (k + 1) / RATE_HZ
        finally:
            for output in outputs.values():
                node.destroy_publisher(output)
        return math.inf


def rescaled(source: str, target: Path, scale: float, east: float = 0.0) -> str:
    """A copy of a map whose georeference is too large, about its middle, or moved, metres."""
    with rasterio.open(source) as image:
        pixels, crs, old = image.read(), image.crs, image.transform
    bands, height, width = pixels.shape
    wider = (1.0 - scale) / 2.0
    west, north = old.c + wider * old.a * width + east, old.f + wider * old.e * height
    new = Affine(old.a * scale, 0.0, west, 0.0, old.e * scale, north)
    with rasterio.open(
        target, "w", driver="GTiff", width=width, height=height, count=bands, dtype="uint8", crs=crs,
        transform=new,
    ) as copy:  # fmt: skip
        copy.write(pixels)
    return str(target)


@pytest.fixture(scope="module")
def vehicle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vehicle]:
    folder = tmp_path_factory.mktemp("misconfigurations")
    city = build_city(31, "source")
    right = str(city.write_geotiff(folder / "city.tif"))
    other = build_city(32, "source")
    maps = {
        "right": right,
        "other": str(other.write_geotiff(folder / "other.tif")),
        "scaled": rescaled(right, folder / "scaled.tif", 1.5),
        "elsewhere": rescaled(right, folder / "elsewhere.tif", 1.0, east=20_000.0),
    }
    save_checkpoint(create_model("ggcvt-small"), folder / "other_model.safetensors")
    frames = list(drive(city, 300, 3, options=DriveOptions(rate_hz=RATE_HZ)))
    with bench(DOMAIN) as here:
        yield Vehicle(here, frames, maps, folder)


def test_a_vehicle_that_is_set_up_well_has_nothing_to_report(vehicle: Vehicle) -> None:
    said: list[str] = []

    def listen() -> bool:
        said.append(vehicle.bench.text())
        return False

    good = Mistake("", FILTER)
    with vehicle.node(good):
        vehicle.drive(good, listen)
        assert int(vehicle.bench.value("frames_accepted")) > 20
    # From the first image on; a single image may mistake one place for another.
    parts = [part for text in said[said.index("localising") :] for part in text.split("; ")]
    assert {part.split(":")[0] for part in parts if ":" in part} <= {"search_border", "filter"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_in_the_diagnostics(vehicle: Vehicle, name: str) -> None:
    mistake, b = MISTAKES[name], vehicle.bench
    if mistake.parameters.get("checkpoint"):
        mistake.parameters["checkpoint"] = str(vehicle.folder / "other_model.safetensors")
    with vehicle.node(mistake):
        # The next but one: what was said before the drive does not count.
        before = b.reports
        seconds = vehicle.drive(mistake, lambda: b.reports > before + 1 and mistake.says in b.text())
    assert seconds < math.inf, f"silent; at the end: {b.text()}"
    assert b.status is not None and b.status.level in (b"\x01", b"\x02")
    text = next(part for part in b.text().split("; ") if mistake.says in part)
    print(f"\n| {name} | {seconds:.1f} s | {text}")
