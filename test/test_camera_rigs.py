"""The localizer with a rig of cameras, tilted or not; its model's peak shows where a red spot is."""

from __future__ import annotations

import array
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from geometry_msgs.msg import Quaternion, TransformStamped
from lifecycle_msgs.msg import Transition
from localizer_rig import LAT, LON, PATIENCE_S, START, STOP, YAW, Rig, running, stamp
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros_harness import NodeProcess, bench, pick_domain
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu, NavSatFix
from stub_node import GSD, POINTED, SIZE, PointingModel, write_stub

from xview_loc.bags.ros_types import deserialize
from xview_loc.geodesy import snap_to_grid
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import Calibration
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.rig import tilt_matrix
from xview_loc.vehicle.mounted_cameras import optical
from xview_loc.vehicle.mounting import moved
from xview_loc.vehicle.transforms import Transform

DOMAIN = pick_domain()
NS = 1_000_000_000
WIDTH, HEIGHT, FOCAL = 96, 72, 48.0
ROWS, COLUMNS, TOP, BOTTOM = 32, 64, math.radians(30), math.radians(-60)
# Place of the cameras of the vehicle, in base_link, and where they look, degrees left.
CAMERAS = {
    "front": (0.3, 0.0, 0.0),
    "left": (0.0, 0.3, 90.0),
    "rear": (-0.3, 0.0, 180.0),
    "right": (0.0, -0.3, -90.0),
}
RIG_FILE = """
cameras:
  front: {x: 0.3, z: 1.5, own_mask: front.png}
  left: {y: 0.3, z: 1.5, yaw_deg: 90}
  rear: {x: -0.3, z: 1.5, yaw_deg: 180}
  right: {y: -0.3, z: 1.5, quaternion: [0.0, 0.7071068, -0.7071068, 0.0]}
  zenith: {z: 1.5, pitch_deg: -90}
"""
Spot = tuple[float, float]


def scene(rays: np.ndarray, spot: Spot) -> np.ndarray:
    """What lies in directions (..., 3) of level axes about the vehicle: grey waves, and a red spot.

    ``spot``: degrees left of forward, and up.
    """
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    grey = 110 + 50 * np.sin(9 * rays[..., 0]) * np.cos(7 * rays[..., 1] + 5 * rays[..., 2])
    image = np.repeat(grey[..., None], 3, -1)
    left, up = map(math.radians, spot)
    there = np.array([math.cos(up) * math.cos(left), math.cos(up) * math.sin(left), math.sin(up)])
    image[rays @ there > math.cos(math.radians(9))] = (250, 20, 20)
    return image.astype(np.uint8)


def pinhole_rays(yaw_deg: float) -> np.ndarray:
    """Directions in base_link of the pixels of a camera that looks ``yaw_deg`` left."""
    u, v = np.meshgrid(np.arange(WIDTH) - (WIDTH - 1) / 2, np.arange(HEIGHT) - (HEIGHT - 1) / 2)
    rays = np.stack([u / FOCAL, v / FOCAL, np.ones_like(u)], -1)
    return rays @ optical(Transform.planar(0.0, 0.0, math.radians(yaw_deg))).matrix.T


@dataclass
class Vehicle(Rig):
    """cameras: those that have publishers. silent: those of them that send nothing. spot: where it is.

    tilt: roll and pitch, degrees. imu: whether it is measured.
    """

    cameras: dict[str, tuple[float, float, float]] = field(default_factory=lambda: dict(CAMERAS))
    silent: set[str] = field(default_factory=set)
    uncalibrated: set[str] = field(default_factory=set)
    spot: Spot = (0.0, -10.0)
    tilt: tuple[float, float] = (0.0, 0.0)
    with_imu: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.names = list(CAMERAS)
        self.images = {name: self.bench.publisher(CompressedImage, f"/{name}/image") for name in self.cameras}
        self.infos = {name: self.bench.publisher(CameraInfo, f"/{name}/camera_info") for name in self.cameras}
        self.imu = self.bench.publisher(Imu, "/imu")

    def restart(self, **parameters: Any) -> None:
        self.names = parameters.get("cameras", list(CAMERAS))
        super().restart(**parameters)

    def ready(self) -> None:
        outputs = [kind[name] for kind in (self.images, self.infos) for name in self.names]
        outputs += [self.fix, self.heading]
        self.bench.wait(lambda: all(o.get_subscription_count() for o in outputs), PATIENCE_S, "the inputs")

    def send_image(self, ns: int, **changes: Any) -> None:
        level = tilt_matrix(*map(math.radians, self.tilt))
        self.send_imu(ns)
        for name, (_, _, yaw) in self.cameras.items():
            if name in self.silent:
                continue
            if name not in self.uncalibrated:
                info = self.header(calibration(), ns)
                info.header.frame_id = f"{name}_housing"
                self.infos[name].publish(info)
            pixels = scene(pinhole_rays(yaw) @ level.T, self.spot)
            data = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
            message = CompressedImage(format="png", data=array.array("B", changes.get(name, data)))
            self.images[name].publish(self.header(message, ns))

    def send_imu(self, ns: int, **changes: Any) -> None:
        if self.with_imu:
            for at in (ns - NS // 50, ns + NS // 50):
                turn = tilt_quaternion(*map(math.radians, self.tilt))
                self.imu.publish(self.header(Imu(**{"orientation": turn, **changes}), at))

    def found(self, lever: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
        """Row and column of the panorama at which the model saw the spot, in a new frame."""
        pose = self.good_frame()
        # Poses of earlier frames may have been on their way.
        while stamp(pose) != self.ns:
            pose = self.good_frame()
        self.bench.wait(lambda: self.fixes[-1].header.stamp == pose.header.stamp, what="the fix")
        place = moved(self.fixes[-1].latitude, self.fixes[-1].longitude, lever, YAW)
        centre = snap_to_grid(*moved(LAT, LON, lever, YAW), SIZE * GSD / 4.0)
        tile = AerialTile(np.zeros((SIZE, SIZE, 3), np.uint8), *centre, GSD)
        row, col = tile.latlon_to_pixel(*place)
        return float(row) - POINTED[0], float(col) - POINTED[1]


def calibration(**more: Any) -> CameraInfo:
    k = [FOCAL, 0.0, (WIDTH - 1) / 2, 0.0, FOCAL, (HEIGHT - 1) / 2, 0.0, 0.0, 1.0]
    return CameraInfo(**{"width": WIDTH, "height": HEIGHT, "k": k, "distortion_model": "plumb_bob", **more})


def tilt_quaternion(roll: float, pitch: float, yaw: float = 1.1) -> Quaternion:
    """An Imu's orientation with a yaw that means nothing."""
    pose = Transform.planar(0.0, 0.0, yaw)
    for axis, angle in ((1, pitch), (0, roll)):
        rotation = np.zeros(4)
        rotation[axis], rotation[3] = math.sin(angle / 2), math.cos(angle / 2)
        pose = pose @ Transform(np.zeros(3), rotation)
    x, y, z, w = pose.rotation.tolist()
    return Quaternion(x=x, y=y, z=z, w=w)


def expected(spot: Spot) -> tuple[float, float]:
    """Row and column of a panorama whose middle faces north."""
    left, up = map(math.radians, spot)
    turn = (math.pi / 2 - YAW - left) / (2 * math.pi) + 0.5
    return (TOP - up) / (TOP - BOTTOM) * ROWS - 0.5, turn % 1.0 * COLUMNS - 0.5


def off(found: tuple[float, float], spot: Spot) -> float:
    """How far a spot was found from where it is, pixels of the panorama."""
    row, col = expected(spot)
    return math.hypot(found[0] - row, found[1] - col)


@pytest.fixture(scope="module")
def vehicle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vehicle]:
    folder = tmp_path_factory.mktemp("rig")
    (folder / "rig.yaml").write_text(RIG_FILE)
    # The bonnet.
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[50:] = 255
    cv2.imwrite(str(folder / "front.png"), mask)
    parameters = {
        "model": "stub-pointing",
        "cameras": list(CAMERAS),
        "rig_file": str(folder / "rig.yaml"),
        "search_radius_m": -1.0,
    }
    with running(DOMAIN, folder, vehicle=Vehicle, **parameters) as v:
        yield v


@pytest.fixture(autouse=True)
def _as_usual(vehicle: Vehicle) -> Iterator[None]:
    yield
    vehicle.silent, vehicle.uncalibrated, vehicle.tilt = set(), set(), (0.0, 0.0)
    vehicle.spot, vehicle.with_imu = (0.0, -10.0), True


@pytest.mark.parametrize("spot", [(0.0, 0.0), (90.0, 10.0), (180.0, -15.0), (-70.0, -20.0), (45.0, 0.0)])
def test_every_camera_shows_its_part(vehicle: Vehicle, spot: Spot) -> None:
    vehicle.spot = spot
    assert off(vehicle.found(), spot) < 1.0


def test_own_parts_are_hidden(vehicle: Vehicle) -> None:
    vehicle.spot = (0.0, -30.0)
    # The model sees nothing red: its peak is the tile's centre.
    assert vehicle.found() == pytest.approx(
        ((SIZE - 1) / 2 - POINTED[0], (SIZE - 1) / 2 - POINTED[1]), abs=0.2
    )


def test_a_part_of_a_panorama_may_be_less_sure_than_all_of_it(vehicle: Vehicle, tmp_path: Path) -> None:
    """A checkpoint's least confidence is that of whole panoramas, the parameter's holds for all images."""
    model = PointingModel()
    model.calibration = Calibration(min_confidence=1.0)
    checkpoint = write_stub(tmp_path / "sure.safetensors", 0.0, model=model)
    with vehicle.configured(checkpoint=str(checkpoint)):
        assert off(vehicle.found(), vehicle.spot) < 1.0
    with vehicle.configured(checkpoint=str(checkpoint), min_confidence=1.0):
        vehicle.send_frame()
        vehicle.bench.wait_diagnosis("low_confidence")


@pytest.mark.parametrize("tilt", [(9.0, 0.0), (-4.0, 7.0)])
def test_images_are_levelled_with_the_imu(vehicle: Vehicle, tilt: tuple[float, float]) -> None:
    vehicle.spot, vehicle.tilt = (80.0, 0.0), tilt
    level = off(vehicle.found(), vehicle.spot)
    with vehicle.configured(tilt_source="imu"):
        assert off(vehicle.found(), vehicle.spot) < 0.8 < level


def test_a_pinhole_model_sees_what_its_lens_would(vehicle: Vehicle) -> None:
    """Level, straight ahead, from whatever cameras there are: 90 degrees in 64 pixels."""
    vehicle.tilt = (8.0, -5.0)
    with vehicle.configured(model="stub-pointing-pinhole", tilt_source="imu"):
        for vehicle.spot in ((0.0, 0.0), (35.0, 5.0), (-30.0, -2.0)):
            left, up = map(math.radians, vehicle.spot)
            row, col = 15.5 - 32.0 * math.tan(up) / math.cos(left), 31.5 - 32.0 * math.tan(left)
            assert vehicle.found() == pytest.approx((row, col), abs=0.8)
        vehicle.bench.wait(lambda: float(vehicle.bench.value("seen") or 0.0) > 0.5, what="what is seen")


def test_the_vehicle_may_lean_by_a_fixed_angle(vehicle: Vehicle) -> None:
    vehicle.spot, vehicle.tilt = (80.0, 0.0), (10.0, 0.0)
    assert vehicle.bench.set_parameter("/localizer", "roll_deg", 10.0) == ""
    assert off(vehicle.found(), vehicle.spot) < 0.8
    assert vehicle.bench.set_parameter("/localizer", "roll_deg", 0.0) == ""


def test_a_pose_is_that_of_base_link(vehicle: Vehicle) -> None:
    """With the front camera alone the rig's centre is there."""
    with vehicle.configured(cameras=["front"]):
        assert off(vehicle.found(lever=(0.3, 0.0)), vehicle.spot) < 0.6
        vehicle.spot = (180.0, 0.0)
        assert off(vehicle.found(lever=(0.3, 0.0)), vehicle.spot) > 5.0


def test_a_camera_that_dies_and_one_that_never_was(vehicle: Vehicle) -> None:
    b = vehicle.bench
    vehicle.silent = {"rear"}
    vehicle.spot = (85.0, 0.0)
    with vehicle.configured():
        assert off(vehicle.found(), vehicle.spot) < 1.0
        b.wait_diagnosis()
        frames(vehicle, 12)
        says = b.wait_diagnosis("camera/rear: it has sent no usable image; what it would show is hidden")
        assert says.level == b"\x01" and "camera/left" not in b.text()
        assert int(b.value("images_missing/rear")) >= 12
        vehicle.silent = {"rear", "left"}
        while "camera/left: it has sent no usable image for " not in b.text():
            frames(vehicle, 12)
            b.wait_diagnosis()
        # What the others show is still found.
        vehicle.spot = (-90.0, 0.0)
        assert off(vehicle.found(), vehicle.spot) < 1.0
        vehicle.silent = set()
        # A busy machine may be late with images of a camera.
        while "camera/" in b.text():
            frames(vehicle, 20)
            b.wait_diagnosis()
        vehicle.spot = (180.0, 0.0)
        assert off(vehicle.found(), vehicle.spot) < 1.0


def expect(vehicle: Vehicle, text: str) -> None:
    """Send frames, of which DDS may lose the first, until the diagnostics say so."""
    while text not in vehicle.bench.text():
        vehicle.send_frame()
        vehicle.bench.wait_diagnosis()
        print(vehicle.bench.text())


def frames(vehicle: Vehicle, count: int) -> None:
    """Send frames at 10 Hz."""
    for _ in range(count):
        vehicle.send_frame(0.1)
        vehicle.bench.executor.spin_once(timeout_sec=0.1)


def test_a_camera_without_calibration_is_hidden_and_said(vehicle: Vehicle) -> None:
    vehicle.uncalibrated = {"left"}
    with vehicle.configured():
        assert off(vehicle.found(), vehicle.spot) < 1.0
        vehicle.bench.wait_diagnosis("camera/left: no usable camera_info received")
        vehicle.uncalibrated = set(CAMERAS)
        vehicle.restart()
        expect(vehicle, "camera_info_missing: camera front: no usable camera_info received")
        vehicle.uncalibrated = set()


def test_damaged_images_and_those_of_another_size_are_left_out(vehicle: Vehicle) -> None:
    with vehicle.configured():
        vehicle.good_frame()
        accepted = int(vehicle.bench.value("frames_accepted") or 0)
        small = cv2.imencode(".png", scene(pinhole_rays(0.0), (0.0, 0.0))[:64])[1].tobytes()
        vehicle.send_fix(ns := vehicle.step())
        vehicle.send_heading(ns)
        vehicle.send_image(ns, left=b"no image", rear=small)
        b = vehicle.bench
        b.wait_diagnosis(
            "camera/left: not a JPEG", "camera/rear: the image has 96 x 64 pixels, but its calib"
        )
        b.wait(lambda: int(b.value("frames_accepted")) > accepted, what="a pose from the others")
        vehicle.send_fix(ns := vehicle.step())
        vehicle.send_heading(ns)
        vehicle.send_image(ns, **dict.fromkeys(CAMERAS, b"no image"))
        b.wait_diagnosis("image_invalid: camera front: not a JPEG")


def test_a_camera_out_of_step_is_said(vehicle: Vehicle) -> None:
    late = vehicle.images["left"]

    class Late:
        def publish(self, message: CompressedImage) -> None:
            message.header.stamp.nanosec += 70_000_000
            late.publish(message)

        def get_subscription_count(self) -> int:
            return late.get_subscription_count()

    with vehicle.configured():
        vehicle.ns = vehicle.ns // NS * NS
        vehicle.images["left"] = Late()
        text = "observations have no image of it: it is slower, or its stamps are more than 0.05 s"
        # One a second, as their stamps say: a camera whose clock differs is left out.
        while text not in vehicle.bench.text():
            vehicle.send_frame(1.0)
            vehicle.bench.wait_diagnosis()
        assert "camera/left: " in vehicle.bench.text()
        vehicle.images["left"] = late


def test_nothing_is_seen(vehicle: Vehicle) -> None:
    """The only camera looks straight up, where the model's panoramas end."""
    for publishers, kind, name in (
        (vehicle.images, CompressedImage, "image"),
        (vehicle.infos, CameraInfo, "camera_info"),
    ):
        publishers["zenith"] = vehicle.bench.publisher(kind, f"/zenith/{name}")
    vehicle.restart(cameras=["zenith"])
    vehicle.cameras = {"zenith": (0.0, 0.0, 0.0)}
    text = "frames rejected: nothing_seen: the cameras show less than 0.5 % of what the model looks at"
    expect(vehicle, text)
    vehicle.cameras = dict(CAMERAS)
    vehicle.restart()
    vehicle.good_frame()


@pytest.mark.parametrize(
    ("imu", "says"),
    [
        ({"orientation": tilt_quaternion(math.radians(45.0), 0.0)}, "tilted by 45 degrees, more than"),
        ({"orientation_covariance": [-1.0, *[0.0] * 8]}, "the Imu has no orientation"),
        ({"orientation": Quaternion(w=0.0)}, "norm 0, not 1"),
    ],
)
def test_an_imu_of_no_use(vehicle: Vehicle, imu: dict[str, Any], says: str) -> None:
    b = vehicle.bench
    with vehicle.configured(tilt_source="imu"):
        good = vehicle.send_imu
        vehicle.send_imu = lambda ns: good(ns, **imu)  # type: ignore[method-assign]
        # There is a pose without it.
        assert off(vehicle.found(), vehicle.spot) < 1.0
        b.wait_diagnosis("imu: last imu refused: ", says, "no_tilt: no tilt from imu within")
        assert sum(int(v.value) for v in b.status.values if v.key.startswith("imu_rejected/tilt_")) >= 2
        assert int(b.value("frames_without_tilt")) >= 1
        vehicle.send_imu = good  # type: ignore[method-assign]
        vehicle.good_frame()
        b.wait(lambda: "imu: " not in b.text() and "no_tilt" not in b.text(), what="the conditions' end")


def test_an_imu_in_a_frame_that_tf_does_not_know_is_said(vehicle: Vehicle) -> None:
    with vehicle.configured(tilt_source="imu"):
        good = vehicle.send_imu
        head = Imu().header
        head.frame_id = "imu_link"
        vehicle.send_imu = lambda ns: good(ns, header=head)  # type: ignore[method-assign]
        vehicle.good_frame()
        vehicle.bench.wait_diagnosis(
            "imu_frame: imu gives the tilt of imu_link, which is taken as that of base_link"
        )
        vehicle.send_imu = good  # type: ignore[method-assign]


@pytest.mark.skipif(find_spec("tf2_msgs") is None, reason="tf2_msgs is not installed")
def test_places_and_tilts_from_tf(vehicle: Vehicle) -> None:
    """The housing's frame of a camera that the rig file lacks; base_link leans in odom."""
    from tf2_msgs.msg import TFMessage

    latched = QoSProfile(depth=9, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    moving = vehicle.bench.publisher(TFMessage, "/tf")
    static = vehicle.bench.node.create_publisher(TFMessage, "/tf_static", latched)

    def send(publisher: Any, ns: int, parent: str, child: str, at: Sequence[float], turn: Quaternion) -> None:
        one = vehicle.header(TransformStamped(child_frame_id=child), ns)
        one.header.frame_id = parent
        one.transform.translation.x, one.transform.translation.y, one.transform.translation.z = at
        one.transform.rotation = turn
        publisher.publish(TFMessage(transforms=[one]))

    def send_tilt(ns: int) -> None:
        for at in (ns - NS // 50, ns + NS // 50):
            turn = tilt_quaternion(*map(math.radians, vehicle.tilt))
            send(moving, at, "odom", "base_link", (5.0, 3.0, 0.0), turn)

    for publishers, kind, name in (
        (vehicle.images, CompressedImage, "image"),
        (vehicle.infos, CameraInfo, "camera_info"),
    ):
        publishers["eye"] = vehicle.bench.publisher(kind, f"/eye/{name}")
    imu = vehicle.send_imu
    vehicle.cameras = {"front": CAMERAS["front"], "eye": CAMERAS["right"]}
    vehicle.restart(cameras=list(vehicle.cameras), tilt_source="tf")
    vehicle.send_imu, vehicle.tilt = send_tilt, (8.0, -3.0)  # type: ignore[method-assign]
    outputs = moving, static
    vehicle.bench.wait(lambda: all(o.get_subscription_count() for o in outputs), what="tf's subscriptions")
    expect(vehicle, "camera/eye: tf from base_link to eye_optical_frame or eye_housing: ")
    send(static, 0, "base_link", "eye_housing", (0.0, -0.3, 1.5), tilt_quaternion(0.0, 0.0, -math.pi / 2))
    while "camera/" in vehicle.bench.text():
        vehicle.send_frame()
        vehicle.bench.wait_diagnosis()
    for spot in ((-90.0, 0.0), (20.0, -5.0)):
        vehicle.spot = spot
        assert off(vehicle.found(lever=(0.15, -0.15)), spot) < 0.8
    assert "tilt" not in vehicle.bench.text()
    vehicle.send_imu, vehicle.tilt = imu, (0.0, 0.0)  # type: ignore[method-assign]
    vehicle.cameras = dict(CAMERAS)
    vehicle.restart()
    vehicle.good_frame()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cameras": ["front", "front"]}, "cameras names front twice"),
        ({"cameras": ["front/../x"]}, "cameras: 'front/../x' is no name of a camera"),
        ({"cameras": [f"c{k}" for k in range(17)]}, "cameras: a rig of 17 cameras: at most 16"),
        ({"cameras": [""]}, "rig_file is set, but cameras is empty"),
        ({"camera_frame": "eye"}, "camera_frame is for a single camera"),
        ({"camera_yaw_deg": 5.0}, "camera_yaw_deg is for a single camera"),
        ({"panorama_elevation_deg": [90.0, -90.0]}, "panorama_elevation_deg is for a single camera"),
        ({"panorama_elevation_deg": [10.0, 20.0]}, "panorama_elevation_deg must be the elevations"),
        ({"panorama_elevation_deg": [math.nan, 0.0]}, "panorama_elevation_deg must be the elevations"),
        ({"panorama_elevation_deg": [90.0]}, "panorama_elevation_deg must be the elevations"),
    ],
)
def test_configurations_that_make_no_sense(vehicle: Vehicle, wrong: dict[str, Any], says: str) -> None:
    vehicle.change_state(*STOP)
    vehicle.set_parameters(**wrong)
    with pytest.raises(AssertionError):
        vehicle.change_state(Transition.TRANSITION_CONFIGURE)
    vehicle.bench.wait_diagnosis("not_configured: ", says)
    vehicle.set_parameters()
    vehicle.change_state(*START)
    vehicle.good_frame()


def test_the_pair_logger_keeps_the_images_as_they_came(tmp_path: Path) -> None:
    """Compressed ones byte for byte; a raw camera's as JPEG; with tilt, calibration and places."""
    (tmp_path / "rig.yaml").write_text(
        "cameras: {front: {x: 0.3, z: 1.5}, left: {y: 0.3, z: 1.5, yaw_deg: 90}}"
    )
    parameters = {
        "directory": str(tmp_path / "bags"),
        "cameras": ["front", "left"],
        "rig_file": str(tmp_path / "rig.yaml"),
        "base_height_m": 0.3,
        "tilt_source": "imu",
        "qos_reliability": "reliable",
        "min_free_mb": 0,
        "use_odometry": False,
        "max_wait_s": 2.0,
    }
    sent: dict[int, tuple[bytes, np.ndarray]] = {}
    node = NodeProcess(DOMAIN + 1, tmp_path / "log", parameters, module="xview_loc.nodes.pair_logger_node")
    try:
        with bench(DOMAIN + 1) as b:
            front, left = b.publisher(CompressedImage, "/front/image"), b.publisher(Image, "/left/image")
            infos = [b.publisher(CameraInfo, f"/{name}/camera_info") for name in ("front", "left")]
            fix, heading = b.publisher(NavSatFix, "/fix"), b.publisher(Imu, "/heading")
            imu = b.publisher(Imu, "/imu")
            outputs = [front, left, *infos, fix, heading, imu]
            b.wait(lambda: all(o.get_subscription_count() for o in outputs), what="the inputs")
            start = time.time_ns()

            def send(**changed: Any) -> None:
                ns = start + (len(sent) + 1) * NS
                pixels = scene(pinhole_rays(0.0), (3.0 * len(sent), 0.0))
                quality = [cv2.IMWRITE_JPEG_QUALITY, 50 + len(sent) % 50]
                jpeg = cv2.imencode(".jpg", pixels, quality)[1].tobytes()
                sent[ns] = jpeg, pixels
                height = changed.get("height", HEIGHT)
                raw = Image(width=WIDTH, height=height, encoding="rgb8", step=3 * WIDTH)
                raw.data = array.array("B", pixels[:height].tobytes())
                at = NavSatFix(latitude=LAT + 1e-4 * len(sent), longitude=LON)
                at.status.status = 0
                turn = tilt_quaternion(math.radians(5.0), math.radians(-3.0))
                for publisher, message, stamp_ns in (
                    (imu, Imu(orientation=turn), ns - NS // 50),
                    (imu, Imu(orientation=turn), ns + NS // 50),
                    (fix, at, ns),
                    (heading, Imu(orientation=tilt_quaternion(0.0, 0.0, 0.4)), ns),
                    *((info, calibration(**changed.get("info", {})), ns) for info in infos),
                    (front, CompressedImage(format="jpeg", data=array.array("B", jpeg)), ns),
                    (left, raw, ns + 2_000_000),
                ):
                    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, NS)
                    publisher.publish(message)
                b.wait_diagnosis()

            while int(b.value("pairs") or 0) < 5:
                send()
            assert b.text() == "no_map: no map is named: pairs are stored without tiles"
            # An image that cannot be used leaves the rig as it is.
            while int(b.value("pairs") or 0) < 7:
                send(height=HEIGHT - 2)
            while int(b.value("pairs") or 0) < 9:
                send()
            # Another calibration would hold for all pairs of the bag.
            wider = {"k": [20.0, 0.0, (WIDTH - 1) / 2, 0.0, 20.0, (HEIGHT - 1) / 2, 0.0, 0.0, 1.0]}
            while not int(b.value("frames_rejected/camera_info_invalid") or 0):
                send(info=wider)
            assert "changed in a recording: call ~/stop and ~/start" in b.text()
    finally:
        assert node.stop() == 0, node.log
    assert "Traceback" not in node.log, node.log
    bag = PairBag(next((tmp_path / "bags").iterdir()))
    assert len(list(bag.folder.glob("*.mcap"))) <= 2  # one more if a camera's calibration came later
    rig = bag.rig()
    assert rig is not None and rig.height == 0.3 and rig.cameras.keys() == {"front", "left"}
    assert rig.cameras["left"].position == (0.0, 0.3, 1.5)
    # Whatever arrived first, the last pairs have both.
    pair = bag[len(bag) - 1]
    assert pair.tilt is not None and pair.tilt_source == "imu"
    assert (math.degrees(pair.tilt.roll), math.degrees(pair.tilt.pitch)) == pytest.approx((5.0, -3.0))
    images = {image.name: image for image in pair.images}
    assert images["left"].stamp_ns == images["front"].stamp_ns + 2_000_000 == pair.stamp_ns + 1_000_000
    kept = deserialize("sensor_msgs/msg/CompressedImage", images["front"].data).data.tobytes()
    jpeg, pixels = sent[images["front"].stamp_ns]
    assert kept == jpeg
    assert np.abs(pair.decode(rig)["left"].astype(int) - pixels).mean() < 5.0
