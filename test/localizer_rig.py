"""A vehicle's drivers beside a localizer that runs as a process of its own, fed over DDS."""

from __future__ import annotations

import array
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from lifecycle_msgs.msg import Transition
from map_fixtures import texture, write_geotiff
from nav_msgs.msg import OccupancyGrid, Odometry
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros_harness import Bench, NodeProcess, bench
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu, NavSatFix
from std_msgs.msg import Float64
from stub_node import GSD, PEAK, SIZE

from xview_loc.geodesy import LocalProjection, snap_to_grid
from xview_loc.maps.base import AerialTile
from xview_loc.nodes import outputs as messages
from xview_loc.nodes.parameters import LOCALIZER

LAT, LON = 48.2, 16.37
DATUM = LocalProjection(48.19, 16.35)
YAW = math.radians(30.0)
NS = 1_000_000_000
PARAMETERS: dict[str, Any] = {
    "model": "stub",
    "datum_lat": DATUM.lat,
    "datum_lon": DATUM.lon,
    "search_radius_m": 20.0,
    "max_wait_s": 0.2,
    "qos_reliability": "reliable",
    "torch_threads": 1,
    # The tests' vehicle is where a test needs it.
    "fix_max_jump_m": 0.0,
    # Stubs cannot be exported, and have no weights.
    "backend": "torch",
    "allow_untrained": True,
}
START_ONLY = [p.name for p in LOCALIZER if p.start_only]
STOP = (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP)
START = (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE)
PATIENCE_S = 120.0


def stamp(message: Any) -> int:
    """Of a message, nanoseconds."""
    return int(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)


def picture(seed: int, colour: Any = (128, 128, 128)) -> np.ndarray:
    """An image (32, 64, 3) of stripes about a colour, which is its mean; hardly two seeds give the same."""
    stripes = np.repeat(np.random.default_rng(seed).permutation([15] * 8 + [-15] * 8), 4)
    return np.broadcast_to(np.array(colour, int) + stripes[:, None], (32, 64, 3)).astype(np.uint8)


def true_place(lat: float = LAT, lon: float = LON) -> tuple[float, float]:
    """Where the stub's peak lies for a fix here."""
    centre = snap_to_grid(lat, lon, SIZE * GSD / 4.0)
    tile = AerialTile(np.zeros((SIZE, SIZE, 3), np.uint8), *centre, GSD)
    return tile.pixel_to_latlon(*PEAK)


@dataclass
class Rig:
    """A vehicle: what its drivers publish, what comes back, and the node that it feeds."""

    bench: Bench
    node: NodeProcess
    parameters: dict[str, Any]
    image_topic: str = "/image"

    def __post_init__(self) -> None:
        b = self.bench
        self.compressed = False
        self.hears_headings = True
        self.image = b.publisher(Image, self.image_topic)
        self.fix = b.publisher(NavSatFix, "/fix")
        self.heading = b.publisher(Imu, "/heading")
        self._info: Any = None
        self.odom = b.publisher(Odometry, "/odom")
        self.poses = b.listen(PoseWithCovarianceStamped, "/localizer/pose")
        self.filtered = b.listen(PoseWithCovarianceStamped, "/localizer/odometry_filtered_pose")
        self.fixes = b.listen(NavSatFix, "/localizer/fix")
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.grids = b.listen(OccupancyGrid, "/localizer/heat_map", latched)
        self.latency = b.listen(Float64, "/localizer/status/latency_ms")
        self.ns = time.time_ns()

    @property
    def info(self) -> Any:
        """The calibration's publisher; with it, images are those of a pinhole camera."""
        self._info = self._info or self.bench.publisher(CameraInfo, "/camera_info")
        return self._info

    @contextmanager
    def configured(self, **parameters: Any) -> Iterator[None]:
        """The node with other parameters, and afterwards with its own again."""
        self.restart(**parameters)
        try:
            yield
        finally:
            self.restart()
            self.good_frame()

    def restart(self, **parameters: Any) -> None:
        """Configure and activate the node again, with the common parameters and these."""
        self.change_state(*STOP)
        if self._info is not None:
            self.bench.node.destroy_publisher(self._info)
            self._info = None
        self.set_parameters(**parameters)
        kind = CompressedImage if parameters.get("image_transport") == "compressed" else Image
        if self.compressed != (kind is CompressedImage):
            self.bench.node.destroy_publisher(self.image)
            self.compressed = kind is CompressedImage
            self.image = self.bench.publisher(kind, self.image_topic)
        self.change_state(*START)
        self.hears_headings = parameters.get("heading_source") != "course"
        self.ready()

    def change_state(self, *transitions: int) -> None:
        for transition in transitions:
            self.bench.change_state("/localizer", transition)

    def set_parameters(self, **changes: Any) -> None:
        """Set every parameter of a node that is not configured."""
        common = {name: value for name, value in self.parameters.items() if name not in START_ONLY}
        values = {p.name: p.default for p in LOCALIZER if not p.start_only} | common | changes
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        )
        call = self.bench._client(SetParameters, "/localizer/set_parameters").call_async(request)
        self.bench.wait(call.done, what="the parameters")
        assert all(result.successful for result in call.result().results)

    def parameter(self, name: str) -> str:
        client = self.bench._client(GetParameters, "/localizer/get_parameters")
        call = client.call_async(GetParameters.Request(names=[name]))
        self.bench.wait(call.done, what="the parameter")
        return call.result().values[0].string_value

    def ready(self) -> None:
        """Wait until node and bench know each other."""
        outputs = ("/localizer/pose", "/localizer/fix", "/localizer/heat_map")
        self.bench.wait(
            lambda: (
                self.image.get_subscription_count()
                and self.fix.get_subscription_count()
                and (not self.hears_headings or self.heading.get_subscription_count())
                and all(self.bench.node.count_publishers(topic) for topic in outputs)
            ),
            PATIENCE_S,
            "the node's topics",
        )

    def header(self, message: Any, ns: int) -> Any:
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(ns, 1_000_000_000)
        return message

    def send_fix(self, ns: int, lat: float = LAT, lon: float = LON, status: int = 0) -> None:
        message = NavSatFix(latitude=lat, longitude=lon, altitude=170.0)
        message.status.status = status
        self.fix.publish(self.header(message, ns))

    def send_heading(self, ns: int, yaw: float = YAW) -> None:
        self.heading.publish(self.header(Imu(orientation=messages.quaternion_of(yaw)), ns))

    def send_image(self, ns: int, **changes: Any) -> None:
        pixels = picture(ns // 1_000_000)
        image = Image(height=32, width=64, encoding="rgb8", step=192, data=array.array("B", pixels.tobytes()))
        if self.compressed:
            jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
            image = CompressedImage(format="jpeg", data=array.array("B", jpeg))
        for name, value in changes.items():
            setattr(image, name, value)
        self.image.publish(self.header(image, ns))

    def step(self, seconds: float = 3.0) -> int:
        """Go on in time; far enough by default that nothing earlier is of use."""
        self.ns += round(seconds * 1e9)
        return self.ns

    def send_info(self, ns: int, **more: Any) -> None:
        own = {"width": 64, "height": 32, "k": [30.0, 0, 32, 0, 30.0, 16, 0, 0, 1]}
        self.info.publish(self.header(CameraInfo(**{**own, **more}), ns))

    def send_frame(self, seconds: float = 3.0, **fix: float) -> int:
        """Go on in time and send a good frame; its stamp."""
        ns = self.step(seconds)
        self.send_fix(ns, **fix)
        self.send_heading(ns)
        self.send_image(ns)
        return ns

    def good_frame(self) -> PoseWithCovarianceStamped:
        """Send what is good until a pose comes (DDS may take a moment); the pose."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            before = len(self.poses)
            ns = self.step()
            for at in (ns - 50_000_000, ns + 50_000_000):
                self.send_fix(at)
                self.send_heading(at)
            self.send_image(ns)
            try:
                self.bench.wait(lambda before=before: len(self.poses) > before, 5.0, "a pose")
            except AssertionError:
                continue
            return self.poses[-1]
        raise AssertionError(f"no pose on good input; diagnostics: {self.bench.text()}")

    def expect_rejection(self, *parts: str) -> None:
        """The node says so, published nothing meanwhile, and carries on with good input."""
        before = len(self.poses)
        self.bench.wait_diagnosis(*parts)
        assert len(self.poses) == before
        self.good_frame()


R = TypeVar("R", bound=Rig)


@contextmanager
def running(
    domain: int, folder: Path, image_topic: str = "/image", vehicle: type[R] = Rig, **more: Any
) -> Iterator[R]:
    """A rig with a node that gives poses; ``folder`` takes its map and its log. more: parameters."""
    aerial = write_geotiff(folder / "map.tif", texture(1200, 1200), LAT, LON, 0.5, "EPSG:32633")
    # The tests' own folders lie beside this one.
    reach = {"checkpoint_dirs": [str(folder.parent)], "map_cache_dir": str(folder.parent)}
    parameters = {**PARAMETERS, "map": str(aerial), "allow_remote_maps": True, **reach, **more}
    node = NodeProcess(domain, folder / "node.txt", parameters, "-r", f"image:={image_topic}")
    try:
        with bench(domain) as b:
            r = vehicle(b, node, parameters, image_topic)
            r.ready()
            r.good_frame()
            yield r
            assert node.alive(), node.log
    finally:
        code = node.stop()
    assert code == 0, node.log
    assert "Traceback" not in node.log
