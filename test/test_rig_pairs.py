"""Pairs of a rig: every camera's image as it came, calibration and extrinsics once, tilt with every pair."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from map_fixtures import texture
from rosbags.highlevel import AnyReader

from xview_loc.bags.recovery import BagError, bag_files, recover_bag
from xview_loc.bags.ros_types import header, message, serialize
from xview_loc.bags.writer import BagLimits, BagWriter
from xview_loc.camera import CameraError, CameraModel, PanoramaCamera
from xview_loc.geodesy import LocalProjection
from xview_loc.images import ImageError
from xview_loc.maps.base import AerialTile
from xview_loc.recordings.importer import import_bag
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import TOPICS
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.rig import FORWARD, MountedCamera, Rig
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.tilt import TiltSample

PLANE = LocalProjection(48.2, 16.37)
T0 = 1_700_000_000 * 10**9
NO_FLOOR = BagLimits(min_free_bytes=0)
SIDE = 120, 90
PINHOLE = CameraModel(*SIDE, (60.0, 0, 59.5, 0, 60.0, 44.5, 0, 0, 1), (0.01, 0.0, 0.0, 0.0))
FISHEYE = CameraModel(*SIDE, (40.0, 0, 59.5, 0, 40.0, 44.5, 0, 0, 1), (0.01, 0, 0, 0), "equidistant")


def turned(yaw: float) -> tuple[float, float, float, float]:
    """The optical frame of a camera that looks ``yaw`` left of the vehicle's x axis."""
    x, y, z, w = FORWARD
    s, c = math.sin(yaw / 2), math.cos(yaw / 2)
    return (c * x - s * y, c * y + s * x, c * z + s * w, c * w - s * z)


def rig_of(**cameras: MountedCamera) -> Rig:
    own = np.zeros((SIDE[1], SIDE[0]), bool)
    own[80:] = True
    return Rig(cameras, 0.3, {"front": own} if "front" in cameras else {})


def three() -> Rig:
    return rig_of(
        front=MountedCamera(PINHOLE, (1.0, 0.0, 1.5), turned(0.0)),
        left=MountedCamera(FISHEYE, (0.0, 0.5, 1.4), turned(math.radians(120))),
        right=MountedCamera(PINHOLE, (0.0, -0.5, 1.4), turned(math.radians(-120))),
    )


def picture(k: int, name: str) -> bytes:
    return bytes(cv2.imencode(".jpg", texture(SIDE[1], SIDE[0], 10 * k + len(name)))[1])


def taken(name: str, stamp_ns: int, content: bytes) -> CameraImage:
    kind = "sensor_msgs/msg/CompressedImage"
    data = np.frombuffer(content, np.uint8)
    image = message(kind, header=header(stamp_ns, f"{name}_optical"), format="jpeg", data=data)
    return CameraImage(name, stamp_ns, kind, serialize(kind, image))


def pair(k: int, *names: str, **changes: Any) -> Pair:
    lat, lon = PLANE.inverse(2.0 * k, 0.0)
    stamp = T0 + k * 10**8
    images = tuple(taken(name, stamp + len(name) * 10**6, picture(k, name)) for name in names)
    tilt = TiltSample(stamp, 0.01 * k, -0.02)
    base = Pair(
        stamp, "", b"", lat, lon, heading=0.3, heading_std=0.02, images=images, tilt=tilt, tilt_source="imu"
    )
    return replace(base, **changes)


def tile() -> AerialTile:
    return AerialTile(texture(64, 64, 5), 48.2, 16.37, 0.5, 1.0)


def write(folder: Path, *pairs: Pair, rig: Rig | None = None, limits: BagLimits = NO_FLOOR) -> Path:
    writer = PairWriter(folder, {}, limits, rig)
    for one in pairs:
        writer.add(one, tile())
    writer.close()
    assert writer.pairs == len(pairs)
    return folder


def test_every_image_comes_back_as_it_came(tmp_path: Path) -> None:
    names = ("front", "left", "right")
    written = [pair(0, *names), pair(1, "left"), pair(2, *names, heading=None), pair(3, "front", "right")]
    folder = write(tmp_path / "bag", *written, rig=three())
    bag = PairBag(folder)
    assert len(bag) == 4
    for k, want in enumerate(written):
        got = bag[k]
        assert got.images == want.images and got.image_bytes == b""
        assert got.tilt == want.tilt and got.tilt_source == "imu"
        assert got.heading == (None if k == 2 else pytest.approx(0.3)) and got.camera is None
        assert bag.tile(k) is not None
    rig, wanted = bag.rig(), three()
    assert rig is not None and rig.height == 0.3 and list(rig.cameras) == ["front", "left", "right"]
    for name, mounted in wanted.cameras.items():
        assert rig.cameras[name].camera == mounted.camera
        assert rig.cameras[name].position == mounted.position
        assert rig.cameras[name].rotation == pytest.approx(mounted.rotation)
    assert list(rig.own) == ["front"] and np.array_equal(rig.own["front"], wanted.own["front"])
    assert pickle.loads(pickle.dumps(bag))[1].images == written[1].images
    decoded = bag[0].decode(rig)
    assert {name: image.shape for name, image in decoded.items()} == dict.fromkeys(names, (90, 120, 3))


def test_other_programs_read_calibration_and_extrinsics(tmp_path: Path) -> None:
    """Once a file, as standard messages."""
    write(tmp_path / "bag", *(pair(k, "front", "left", "right") for k in range(5)), rig=three())
    with AnyReader([tmp_path / "bag"]) as reader:
        counts = {c.topic: c.msgcount for c in reader.connections}
        (tf,) = [c for c in reader.connections if c.topic == "/tf_static"]
        ((_, _, data),) = reader.messages(connections=[tf])
        transforms: Any = reader.deserialize(data, tf.msgtype)
        frames = {t.child_frame_id: t for t in transforms.transforms}
    assert counts["/pair/front/image"] == counts["/pair/tilt"] == counts["/pair/tile"] == 5
    assert counts["/pair/left/camera_info"] == counts["/pair/front/own_mask"] == counts["/session"] == 1
    assert frames.keys() == {"front", "left", "right"}
    assert frames["left"].header.frame_id == "base_link" and frames["left"].transform.translation.y == 0.5


def test_every_file_has_the_rig(tmp_path: Path) -> None:
    folder = tmp_path / "bag"
    limits = BagLimits(split_seconds=0.95, min_free_bytes=0)
    write(folder, *(pair(k, "front", "left", "right") for k in range(30)), rig=three(), limits=limits)
    files = bag_files(folder)
    assert len(files) == 3
    files[0].unlink()
    left = PairBag(folder)
    rig = left.rig()
    assert 10 < len(left) < 30 and rig is not None and rig.cameras.keys() == three().cameras.keys()


def test_a_rig_that_is_known_later(tmp_path: Path) -> None:
    """A camera without a calibration until the middle of the drive: its images are of use from the start."""
    whole = three()
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR, cameras=whole.cameras)
    writer.set_rig(Rig({name: whole.cameras[name] for name in ("front", "right")}, 0.3))
    writer.add(pair(0, "front", "right"), tile())
    writer.set_rig(whole)
    writer.add(pair(1, "front", "left", "right"), tile())
    writer.close()
    assert len(bag_files(tmp_path / "bag")) == 2
    bag = PairBag(tmp_path / "bag")
    rig = bag.rig()
    assert rig is not None and list(rig.cameras) == ["front", "left", "right"]
    assert [len(bag[k].decode(rig)) for k in range(2)] == [2, 3]
    with pytest.raises(CameraError, match="camera rear is not one that the bag was begun with"):
        writer.set_rig(Rig({"rear": whole.cameras["left"]}))
    unknown = PairWriter(tmp_path / "unknown", {}, NO_FLOOR, cameras=whole.cameras)
    unknown.add(pair(0, "left"), tile())
    unknown.close()
    with pytest.raises(BagError, match=r"the rig in .* cannot be used: no camera has a camera_info"):
        PairBag(tmp_path / "unknown").rig()


def test_images_without_a_calibration_are_copied(tmp_path: Path) -> None:
    """As when the calibration was in a chunk that a recovery had to skip."""
    whole = three()
    known = Rig({name: whole.cameras[name] for name in ("front", "right")}, 0.3)
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR, known, cameras=whole.cameras)
    writer.add(pair(0, "front", "left", "right"), None)
    writer.close()
    result = import_bag(tmp_path / "bag", tmp_path / "copy", None)
    copy = PairBag(tmp_path / "copy")
    rig = copy.rig()
    assert result is not None and result.pairs == 1 and rig is not None
    assert list(rig.cameras) == ["front", "right"] and copy.cameras == ["front", "left", "right"]
    assert copy[0].images == PairBag(tmp_path / "bag")[0].images


def test_a_pair_torn_apart_is_no_pair(tmp_path: Path) -> None:
    """A recording that was killed between two images of a pair."""
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR, three())
    writer.add(pair(0, "front", "left", "right"), tile())
    (torn,) = pair(1, "front").images
    writer.bag.write("/pair/front/image", T0 + 10**8, torn.data)
    writer.bag.flush()
    recover_bag(tmp_path / "bag", tmp_path / "saved")
    writer.close()
    saved = PairBag(tmp_path / "saved")
    assert len(saved) == 1 and len(saved[0].images) == 3 and saved.rig() is not None


def test_a_single_camera_has_a_tilt_and_no_rig(tmp_path: Path) -> None:
    tilt = TiltSample(T0, 0.1, -0.02)
    one = pair(0, image_format="jpeg", image_bytes=picture(0, "a"), camera=PINHOLE, tilt=tilt)
    unknown = replace(one, stamp_ns=T0 + 10**9, tilt=None, tilt_source="")
    bag = PairBag(write(tmp_path / "bag", one, unknown))
    assert bag.rig() is None and not bag[0].images and bag[0].image_bytes == one.image_bytes
    assert (bag[0].tilt, bag[0].tilt_source) == (tilt, "imu")
    assert (bag[1].tilt, bag[1].tilt_source) == (None, "")
    assert bag[0].camera == PINHOLE


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ({"../../etc": MountedCamera(PINHOLE)}, "'../../etc' is no name of a camera"),
        ({"a\x1b[31mb\n": MountedCamera(PINHOLE)}, r"'a\\x1b\[31mb\\n' is no name of a camera"),
        ({"": MountedCamera(PINHOLE)}, "'' is no name"),
        ({"x" * 65: MountedCamera(PINHOLE)}, "is no name"),
        ({f"c{k}": MountedCamera(PINHOLE) for k in range(17)}, "a rig of 17 cameras: at most 16"),
        ({"all": MountedCamera(PanoramaCamera(200, 100))}, "camera all of the rig takes panoramas"),
        ({"far": MountedCamera(PINHOLE, (0.0, 1e9, 0.0))}, "camera far is not on the vehicle"),
    ],
)
def test_rigs_that_cannot_be_recorded(
    tmp_path: Path, cameras: dict[str, MountedCamera], message: str
) -> None:
    with pytest.raises(CameraError, match=message):
        PairWriter(tmp_path / "bag", {}, NO_FLOOR, Rig(cameras))
    assert not (tmp_path / "bag").exists()


class Forged:
    """A bag of one pair of a rig, some of whose messages are exchanged or left out."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._patch = monkeypatch

    def write(self, changes: dict[str, tuple[str, Any] | None]) -> PairBag:
        original, extra = BagWriter.write, {t: v for t, v in changes.items() if v is not None}

        def forged(writer: BagWriter, topic: str, stamp: int, data: bytes, **options: Any) -> None:
            if topic not in changes:
                original(writer, topic, stamp, data, **options)
            elif topic in extra:
                original(writer, topic, stamp, serialize(*extra[topic]), **options)

        with self._patch.context() as patch:
            patch.setattr(BagWriter, "write", forged)
            writer = PairWriter(self.folder, {}, NO_FLOOR, three())
            writer.add(pair(0, "front", "left", "right"), tile())
            writer.close()
        return PairBag(self.folder)


def extrinsics(**poses: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[str, Any]:
    result = []
    for name, (place, turn) in poses.items():
        translation, rotation = (
            message(f"geometry_msgs/msg/{kind}", **dict(zip("xyzw", values, strict=False)))
            for kind, values in (("Vector3", place), ("Quaternion", turn))
        )
        pose = message("geometry_msgs/msg/Transform", translation=translation, rotation=rotation)
        kind = "geometry_msgs/msg/TransformStamped"
        result.append(message(kind, header=header(T0, "base_link"), child_frame_id=name, transform=pose))
    return "tf2_msgs/msg/TFMessage", message("tf2_msgs/msg/TFMessage", transforms=result)


def encoded(data: bytes) -> tuple[str, Any]:
    kind = "sensor_msgs/msg/CompressedImage"
    return kind, message(kind, header=header(T0, "x"), format="png", data=np.frombuffer(data, np.uint8))


def png(width: int, height: int, value: int = 0) -> bytes:
    return bytes(cv2.imencode(".png", np.full((height, width), value, np.uint8))[1])


PLACE, TURN = (0.0, 0.0, 1.5), FORWARD
ALL = dict.fromkeys(("front", "left", "right"), (PLACE, TURN))


@pytest.mark.parametrize(
    ("topic", "value", "message"),
    [
        ("/tf_static", None, "/tf_static has no transform from base_link to camera front"),
        ("/tf_static", extrinsics(front=(PLACE, TURN)), "no transform from base_link to camera left"),
        ("/tf_static", extrinsics(**{**ALL, "left": (PLACE, (math.nan,) * 4)}), "quaternion .* unusable"),
        ("/tf_static", extrinsics(**{**ALL, "left": (PLACE, (0.0,) * 4)}), "quaternion .* unusable"),
        ("/tf_static", extrinsics(**{**ALL, "left": ((math.inf, 0.0, 0.0), TURN)}), "unusable"),
        ("/tf_static", extrinsics(**{**ALL, "left": ((1e200, 0.0, 0.0), TURN)}), "not on the vehicle"),
        ("/pair/front/own_mask", encoded(png(30, 20)), "a mask of 30 x 20 pixels, but images of 120 x 90"),
        ("/pair/front/own_mask", encoded(png(30_000, 30_000)), "30000 x 30000 pixels, at most 0 million"),
        ("/pair/front/own_mask", encoded(png(120, 90, 255)), "hides the whole image"),
        ("/pair/front/own_mask", encoded(b"<html>"), "a text document"),
        ("/session", ("std_msgs/msg/String", message("std_msgs/msg/String", data='{"base_height": 1e9}')),
         "base_link cannot be 1000000000.0 m above the ground"),
    ],
)  # fmt: skip
def test_rigs_that_cannot_be_used_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topic: str, value: tuple[str, Any] | None, message: str
) -> None:
    bag = Forged(tmp_path / "bag", monkeypatch).write({topic: value})
    with pytest.raises(BagError, match=rf"^the rig in .* cannot be used: .*{message}") as caught:
        bag.rig()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert [image.name for image in bag[0].images] == ["front", "left", "right"]


def test_names_of_cameras_from_strangers(tmp_path: Path) -> None:
    for number, names in enumerate((["a\x1b[2Jb"], ["a b"], [f"c{k}" for k in range(5000)])):
        folder = tmp_path / str(number)
        kinds = {f"/pair/{name}/image": TOPICS["/pair/image"] for name in names} | TOPICS
        BagWriter(folder, kinds, NO_FLOOR).close()
        with pytest.raises(
            BagError, match=r"the rig in .* cannot be used: .*(is no name|at most 16)"
        ) as caught:
            PairBag(folder)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("tilt", [math.nan, math.inf, -1.6])
def test_a_tilt_of_no_vehicle_is_damage(tmp_path: Path, tilt: float) -> None:
    bag = PairBag(
        write(tmp_path / "bag", pair(0, "left"), pair(1, "left", tilt=TiltSample(0, tilt, 0.0)), rig=three())
    )
    assert bag[0].tilt == TiltSample(T0, 0.0, -0.02)
    with pytest.raises(BagError, match=r"pair 1 of .* is damaged: no vehicle has a roll of "):
        bag[1]


def test_images_are_no_larger_than_their_calibration(tmp_path: Path) -> None:
    images = {
        0: taken("front", T0, png(20_000, 20_000)),
        1: taken("left", T0, picture(0, "left")[:500]),
        2: taken("left", T0, png(64, 64)),
    }
    bag = PairBag(write(tmp_path / "bag", *(pair(k, images=(images[k],)) for k in images), rig=three()))
    rig = bag.rig()
    assert rig is not None
    with pytest.raises(ImageError, match="camera front: the image has 20000 x 20000 pixels"):
        bag[0].decode(rig)
    with pytest.raises(ImageError, match="camera left: the JPEG image is truncated"):
        bag[1].decode(rig)
    with pytest.raises(
        ImageError, match="camera left has 64 x 64 pixels, but its calibration is for 120 x 90"
    ):
        rig.view(bag[2].decode(rig), PanoramaCamera(256, 64, 0.5, -1.0))
    with pytest.raises(ImageError, match="camera front: it has no calibration"):
        pair(3, "front").decode(rig_of(left=three().cameras["left"]))
