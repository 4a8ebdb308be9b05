"""A vehicle for the benchmarks of the localizer node: publishes frames, records poses, runs the node."""

from __future__ import annotations

import array
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped, QuaternionStamped
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, Image, NavSatFix, NavSatStatus
from std_msgs.msg import Float64
from std_srvs.srv import Trigger

from xview_loc.demo.live import map_middle
from xview_loc.images import encode_jpeg
from xview_loc.rig import Rig
from xview_loc.simulation.drives import Frame
from xview_loc.simulation.messages import frame_messages, image_topic, topics

ROOT = Path(__file__).resolve().parents[2]


class Vehicle(Node):
    """Publish frames, with images as JPEG if ``compressed``, and record when their poses arrive."""

    def __init__(self, compressed: bool = False) -> None:
        super().__init__("vehicle")
        self._compressed = compressed
        self.images = self.create_publisher(CompressedImage if compressed else Image, "image", 5)
        self.fixes = self.create_publisher(NavSatFix, "fix", 5)
        self.headings = self.create_publisher(QuaternionStamped, "heading", 5)
        # Time of sending (monotonic seconds) by stamp, of frames without a pose.
        self.sent: dict[int, float] = {}
        self.latencies: list[float] = []  # milliseconds
        self.inference_ms: list[float] = []
        # Stamp and time of arrival (monotonic seconds) of each pose.
        self.arrivals: list[tuple[int, float]] = []
        self.diagnostics: dict[str, str] = {}
        self.reports = 0
        self.create_subscription(PoseWithCovarianceStamped, "/localizer/pose", self._on_pose, 50)
        self.create_subscription(Float64, "/localizer/status/inference_ms", self._on_inference, 50)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self._set = self.create_client(SetParameters, "/localizer/set_parameters")
        self._reload = self.create_client(Trigger, "/localizer/reload")

    def messages(
        self, frame: Frame, stamp_ns: int
    ) -> tuple[QuaternionStamped, NavSatFix, Image | CompressedImage]:
        """Return heading, fix and image of a frame."""
        assert frame.image is not None
        heading = QuaternionStamped()
        heading.quaternion.z = math.sin(frame.heading / 2)
        heading.quaternion.w = math.cos(frame.heading / 2)
        fix = NavSatFix(latitude=frame.fix.lat, longitude=frame.fix.lon)
        fix.status.status = NavSatStatus.STATUS_FIX
        (fix.position_covariance[0], _), (_, fix.position_covariance[4]) = frame.fix.covariance
        fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_DIAGONAL_KNOWN
        if self._compressed:
            image = CompressedImage(format="jpeg", data=array.array("B", encode_jpeg(frame.image, 90)))
        else:
            height, width, _ = frame.image.shape
            image = Image(height=height, width=width, step=3 * width, encoding="rgb8")
            image.data = array.array("B", frame.image.tobytes())
        for message in (heading, fix, image):
            message.header.stamp = Time(nanoseconds=stamp_ns).to_msg()
        return heading, fix, image

    def prepare(self, frames: list[Frame]) -> None:
        """Do beforehand what publishing these frames would take long for."""

    def publish(self, frame: Frame) -> int:
        """Send a frame, stamped now; return its stamp."""
        stamp_ns = time.time_ns()
        heading, fix, image = self.messages(frame, stamp_ns)
        self.headings.publish(heading)
        self.fixes.publish(fix)
        self.sent[stamp_ns] = time.monotonic()
        self.images.publish(image)
        return stamp_ns

    def spin_until(self, due: float) -> None:
        """Receive messages until ``due`` on the monotonic clock."""
        while (left := due - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Receive messages until the condition holds; return False if it took too long."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                return False
            self._executor.spin_once(timeout_sec=0.05)
        return True

    def counts(self) -> dict[str, int]:
        """Return the counts in the diagnostics, from a report made after now (one per second)."""
        seen = self.reports
        # The next report may already be on its way.
        self.wait(lambda: self.reports >= seen + 2, 5.0)
        return {key: int(value) for key, value in self.diagnostics.items() if value.isdigit()}

    def set_parameter(self, name: str, text: str) -> Any:
        """Request the change of a parameter; return the future of the answer."""
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=text)
        return self._set.call_async(SetParameters.Request(parameters=[Parameter(name=name, value=value)]))

    def deploy(self, path: Path) -> Any:
        """Request another checkpoint, as ``xview-loc deploy`` does; return the future of the verdict.

        The second call answers once the change is made.
        """
        self.set_parameter("checkpoint", str(path))
        return self._reload.call_async(Trigger.Request())

    def _on_pose(self, pose: PoseWithCovarianceStamped) -> None:
        now, stamp_ns = time.monotonic(), Time.from_msg(pose.header.stamp).nanoseconds
        sent = self.sent.pop(stamp_ns, None)
        if sent is not None:
            self.latencies.append((now - sent) * 1e3)
            self.arrivals.append((stamp_ns, now))

    def _on_inference(self, milliseconds: Float64) -> None:
        self.inference_ms.append(milliseconds.data)

    def _on_diagnostics(self, report: DiagnosticArray) -> None:
        for status in report.status:
            self.diagnostics = {value.key: value.value for value in status.values}
        self.reports += 1


class RigVehicle(Vehicle):
    """A vehicle with several cameras; frames must be prepared, since encoding their images takes long."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self._rig = rig
        self._messages: dict[int, list[tuple[str, bytes]]] = {}
        self._outputs: dict[str, Any] = {}
        for topic, kind in topics(rig).items():
            package, _, name = kind.split("/")
            if package != "tf2_msgs" and not topic.startswith("/truth"):
                kind_class = getattr(import_module(f"{package}.msg"), name)
                self._outputs[topic] = self.create_publisher(kind_class, topic[1:], 5)
        # The localizer is ready once it listens to these.
        self.images = self._outputs[image_topic(next(iter(rig.cameras)))]

    def prepare(self, frames: list[Frame]) -> None:
        """See :meth:`Vehicle.prepare`."""
        for frame in frames:
            ns, stamped = frame.stamp_ns, frame_messages(frame, frame.stamp_ns, self._rig)
            # All get one stamp when they are published.
            self._messages[ns] = [(topic, data) for topic, stamp, data in stamped if stamp == ns]

    def publish(self, frame: Frame) -> int:
        """See :meth:`Vehicle.publish`."""
        stamp_ns = time.time_ns()
        self.sent[stamp_ns] = time.monotonic()
        # All begin with the encoding, four bytes, and a header's stamp.
        stamp = struct.pack("<iI", *divmod(stamp_ns, 1_000_000_000))
        for topic, data in self._messages[frame.stamp_ns]:
            if topic in self._outputs:
                self._outputs[topic].publish(data[:4] + stamp + data[12:])
        return stamp_ns


def memory_mb(pid: int, field: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field))


def cpu_seconds(pid: int) -> float:
    """Return the processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def isolate() -> None:
    """Keep this benchmark's DDS traffic to itself, with room for camera images."""
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds.xml")


@contextmanager
def localizer(vehicle: Vehicle, log: Path, parameters: dict[str, object]) -> Iterator[subprocess.Popen]:
    """Run a localizer process connected to the vehicle; its output goes to ``log``."""
    own = {"qos_reliability": "reliable", "checkpoint_persist": "false", **parameters}
    if "datum_lat" not in own:
        # The first image has a pose.
        own["datum_lat"], own["datum_lon"] = map_middle(Path(str(own["map"])))
    words = [word for name, value in own.items() for word in ("-p", f"{name}:={value}")]
    with log.open("w") as out:
        node = subprocess.Popen(
            [sys.executable, "-m", "xview_loc.nodes.localizer_node", "--ros-args", *words],
            stdout=out,
            stderr=out,
        )
    try:
        inputs = (vehicle.images, vehicle.fixes, vehicle.headings)
        ready = vehicle.wait(
            lambda: (
                node.poll() is not None
                or (
                    all(topic.get_subscription_count() for topic in inputs)
                    and vehicle.count_publishers("/localizer/pose")
                    and vehicle.diagnostics
                )
            ),
            90.0,
        )
        if not ready or node.poll() is not None:
            raise SystemExit(f"the localizer did not start:\n{log.read_text()}")
        yield node
    finally:
        node.terminate()
        node.wait(20)
        rclpy.try_shutdown()
