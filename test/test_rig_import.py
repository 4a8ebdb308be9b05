"""Pairs of a rig from ordinary recordings, of simulated drives and as other programs record them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from typer.testing import CliRunner

from xview_loc.bags.recovery import BagError
from xview_loc.bags.ros_types import STORE, stamp_ns
from xview_loc.cli.commands import app
from xview_loc.cli.console import UsageError
from xview_loc.images import decode_compressed, encode_jpeg
from xview_loc.maps import open_map
from xview_loc.recordings.importer import ImportOptions, ImportResult, import_bag
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.rig import Rig
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive
from xview_loc.simulation.messages import START_NS, write_bag
from xview_loc.simulation.rigs import make_rig
from xview_loc.vehicle.keyframes import KeyframeRule
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.rig_file import CameraEntry, read_rig_file

MS = 1_000_000
OPTIONS = ImportOptions(
    topics={"fix": "/fix", "heading": "/heading"},
    cameras=("all",),
    imu="/imu",
    keyframes=KeyframeRule(distance_m=0.01),
)
COUNT = 12


@pytest.fixture(scope="module")
def city() -> City:
    return build_city(5, "source", size_m=300.0)


@pytest.fixture(scope="module")
def rig() -> Rig:
    return make_rig("three", 0.25)


@pytest.fixture(scope="module")
def frames(city: City, rig: Rig) -> list[Frame]:
    return list(drive(city, COUNT, seed=2, options=DriveOptions(rate_hz=2.0), view=rig))


@pytest.fixture(scope="module")
def recording(frames: list[Frame], rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording") / "drive"
    write_bag(frames, folder, rig=rig)
    return folder


# What becomes of a message: (topic, type, message) as it is to be recorded, or None.
Change = Callable[[str, str, Any, int], tuple[str, str, Any] | None]


def altered(source: Path, out: Path, change: Change, form: str = "mcap") -> Path:
    """Record the messages of a bag again, as other programs would have."""
    store = get_typestore(Stores.ROS1_NOETIC) if form == "ros1" else STORE
    if form == "ros1":
        definition = "geometry_msgs/TransformStamped[] transforms"
        store.register(get_types_from_msg(definition, "tf2_msgs/msg/TFMessage"))
    plugin = StoragePlugin.SQLITE3 if form == "sqlite3" else StoragePlugin.MCAP
    writer = Writer1(out) if form == "ros1" else Writer2(out, version=8, storage_plugin=plugin)
    connections: dict[tuple[str, str], Any] = {}
    number: dict[str, int] = {}
    with AnyReader([source]) as reader, writer:
        for connection, stamp, data in reader.messages():
            number[connection.topic] = number.get(connection.topic, -1) + 1
            value = reader.deserialize(data, connection.msgtype)
            changed = change(connection.topic, connection.msgtype, value, number[connection.topic])
            if changed is None:
                continue
            topic, kind, value = changed
            if (topic, kind) not in connections:
                connections[topic, kind] = writer.add_connection(topic, kind, typestore=store)
            if hasattr(value, "header"):
                stamp = stamp_ns(value.header)
            serialize = store.serialize_ros1 if form == "ros1" else store.serialize_cdr
            value = reborn(store, value) if form == "ros1" else value
            writer.write(connections[topic, kind], stamp, serialize(value, kind))
    return out


def reborn(store: Any, value: Any) -> Any:
    """A message of ROS 2 as one of ROS 1: headers have a sequence number, some fields other names."""
    if isinstance(value, list):
        return [reborn(store, one) for one in value]
    kind = getattr(value, "__msgtype__", None)
    if kind is None:
        return value
    fields = {k: reborn(store, v) for k, v in vars(value).items() if not k.startswith("__")}
    if kind == "std_msgs/msg/Header":
        fields["seq"] = 0
    if kind == "sensor_msgs/msg/CameraInfo":
        fields = {k.upper() if k in "dkrp" else k: v for k, v in fields.items()}
    return store.types[kind](**fields)


def same(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
    return topic, kind, value


def imported(source: Path, out: Path, **changes: Any) -> tuple[ImportResult, PairBag]:
    result = import_bag(source, out, None, replace(OPTIONS, **changes))
    assert result is not None
    return result, PairBag(out)


def test_a_simulated_rig(recording: Path, rig: Rig, frames: list[Frame], city: City, tmp_path: Path) -> None:
    with open_map(str(city.write_geotiff(tmp_path / "city.tif"))) as aerial:
        result = import_bag(recording, tmp_path / "pairs", aerial, OPTIONS)
    bag = PairBag(tmp_path / "pairs")
    assert result is not None and result.pairs == len(bag) == COUNT and not result.dropped
    assert not result.without_camera and result.without_tilt == result.without_tile == 0
    stored = bag.rig()
    assert stored is not None and list(stored.cameras) == sorted(rig.cameras)
    for name, mounted in rig.cameras.items():
        assert stored.cameras[name].camera == mounted.camera
        assert stored.cameras[name].position == pytest.approx(mounted.position)
        assert stored.cameras[name].axes == pytest.approx(mounted.axes)
    with AnyReader([recording]) as reader:
        jpegs = {
            (c.topic.split("/")[1], stamp): data
            for c, stamp, data in reader.messages()
            if c.topic.endswith("compressed")
        }
    for k, frame in enumerate(frames):
        pair = bag[k]
        assert pair.stamp_ns == START_NS + frame.stamp_ns and pair.tilt_source == "imu"
        assert pair.tilt is not None
        assert (pair.tilt.roll, pair.tilt.pitch) == pytest.approx((frame.roll, frame.pitch))
        assert pair.heading == pytest.approx(frame.heading)
        # Byte for byte.
        assert {i.name: i.data for i in pair.images} == {n: jpegs[n, pair.stamp_ns] for n in rig.cameras}
    assert Mounting.of(bag.session()).camera == pytest.approx(tuple(rig.centre[:2]))


@pytest.mark.parametrize("form", ["sqlite3", "ros1"])
def test_recordings_of_every_kind(recording: Path, rig: Rig, tmp_path: Path, form: str) -> None:
    """Under a namespace, one camera raw, and frames that are named as ROS 1 did."""

    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic == "/tf_static":
            for one in value.transforms:
                one.child_frame_id = f"/{one.child_frame_id}"
        if topic == "/left/image/compressed":
            pixels = decode_compressed(value.data)
            kind = "sensor_msgs/msg/Image"
            height, width = pixels.shape[:2]
            value = STORE.types[kind](
                header=value.header, height=height, width=width, encoding="rgb8", is_bigendian=0,
                step=3 * width, data=pixels.reshape(-1),
            )  # fmt: skip
            topic = "/left/image"
        name = topic.split("/")[1]
        return (f"/sensors{topic}" if name in rig.cameras else topic), kind, value

    source = altered(recording, tmp_path / ("a.bag" if form == "ros1" else "a"), change, form)
    result, bag = imported(source, tmp_path / "pairs")
    assert result.pairs == COUNT and not result.dropped and not result.without_camera
    stored = bag.rig()
    assert stored is not None
    for name, mounted in rig.cameras.items():
        assert stored.cameras[name].camera == mounted.camera
        assert stored.cameras[name].axes == pytest.approx(mounted.axes)
    before = PairBag(imported(recording, tmp_path / "before")[1].folder)
    images, originals = bag[3].decode(stored), before[3].decode(stored)
    for name, image in images.items():
        assert np.abs(image.astype(int) - originals[name]).mean() < (2.0 if name == "left" else 0.01)


def test_images_within_the_tolerance_make_one_pair(recording: Path, tmp_path: Path) -> None:
    """Cameras that are 20 ms apart belong together; 80 ms they do not."""

    def late(by_ms: int) -> Change:
        def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
            if topic.startswith("/left/image"):
                stamp = value.header.stamp
                ns = stamp.sec * 10**9 + stamp.nanosec + by_ms * MS
                stamp.sec, stamp.nanosec = divmod(ns, 10**9)
            return topic, kind, value

        return change

    near, _ = imported(altered(recording, tmp_path / "near", late(20)), tmp_path / "near pairs")
    assert near.pairs == COUNT and not near.without_camera
    far, bag = imported(altered(recording, tmp_path / "far", late(80)), tmp_path / "far pairs")
    assert far.without_camera == {"front": COUNT, "left": COUNT, "right": COUNT}
    assert far.pairs == 2 * COUNT
    assert [len(bag[k].images) for k in range(4)] == [2, 1, 2, 1]


def test_cameras_that_fail_are_counted(recording: Path, tmp_path: Path) -> None:
    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any] | None:
        if topic.startswith("/left/image") and number >= 5:
            return None
        if topic.startswith("/right/image") and number == 2:
            value.data = value.data[:200]
        if topic.startswith("/front/image") and number == 3:
            value.data = np.frombuffer(encode_jpeg(np.zeros((20, 30, 3), np.uint8), 90), np.uint8)
        if topic == "/imu" and number >= 8:
            return None
        return topic, kind, value

    source = altered(recording, tmp_path / "a", change)
    words = ["pairs", source, "--cameras", "all", "--imu", "/imu", "--tilt", 3, -2, "--distance", 0.01]
    done = command(*words, "--out", tmp_path / "pairs")
    assert f"{COUNT} pairs" in done
    for line in (
        f"without an image of camera left: {COUNT - 5}", "without an image of camera right: 1",
        "without an image of camera front: 1", "dropped: 1 right/image_invalid",
        "dropped: 1 front/image_invalid", "without a tilt from /imu: 3",
    ):  # fmt: skip
        assert line in done
    bag = PairBag(tmp_path / "pairs" / "a")
    assert [image.name for image in bag[2].images] == ["front", "left"]
    last = bag[COUNT - 1]
    assert last.tilt is not None and last.tilt_source == "fixed"
    assert (last.tilt.roll, last.tilt.pitch) == pytest.approx((math.radians(3), math.radians(-2)))
    printed = command("pairs", "info", tmp_path / "pairs" / "a")
    assert "left: 5 images, 160 x 90, rational_polynomial" in printed
    assert "front: 11 images" in printed and "unknown" not in printed
    assert "3 from fixed: roll 3.0 to 3.0, pitch -2.0 to -2.0 degrees" in printed and "9 from imu" in printed


def test_cameras_are_chosen_by_name_and_topic(recording: Path, tmp_path: Path) -> None:
    _, bag = imported(recording, tmp_path / "two", cameras=("right", "nose=/front/image/compressed"))
    stored = bag.rig()
    assert stored is not None and list(stored.cameras) == ["nose", "right"]
    assert [image.name for image in bag[0].images] == ["nose", "right"]


def test_places_and_masks_from_a_file(recording: Path, tmp_path: Path) -> None:
    """As the nodes read them; the transforms of the others are the recording's."""
    mask = np.zeros((90, 160), np.uint8)
    mask[70:] = 255
    cv2.imwrite(str(tmp_path / "bonnet.png"), mask)
    (tmp_path / "rig.yaml").write_text(
        "cameras:\n  front: {own_mask: bonnet.png}\n  left: {x: 0.5, y: 1.0, z: 2.0, yaw_deg: 90}\n"
    )
    entries = read_rig_file(tmp_path / "rig.yaml")
    _, bag = imported(recording, tmp_path / "pairs", rig_file=entries, base_height_m=0.25)
    stored, original = bag.rig(), make_rig("three", 0.25)
    assert stored is not None and stored.height == 0.25
    assert np.array_equal(stored.own["front"], mask > 0) and list(stored.own) == ["front"]
    assert stored.cameras["left"].position == (0.5, 1.0, 2.0)
    assert stored.cameras["left"].axes[:, 2] == pytest.approx([0.0, 1.0, 0.0], abs=1e-9)
    assert stored.cameras["front"].position == pytest.approx(original.cameras["front"].position)


def test_a_single_camera_has_a_mask_and_a_tilt(recording: Path, frames: list[Frame], tmp_path: Path) -> None:
    """As a rig of one, if its panoramas are wanted; its other topics are chosen as ever."""
    cv2.imwrite(str(tmp_path / "mask.png"), np.vstack([np.zeros((60, 160)), np.full((30, 160), 255)]))
    words = ["--image", "/front/image/compressed", "--camera-info", "/front/camera_info", "--imu", "/imu"]
    words += ["--own-mask", str(tmp_path / "mask.png"), "--distance", "0.01"]
    command("pairs", recording, "--out", tmp_path / "pairs", *words)
    bag = PairBag(tmp_path / "pairs" / "drive")
    mask = bag.own_mask()
    assert bag.rig() is None and mask is not None and mask.sum() == 30 * 160 and len(bag) == COUNT
    assert bag[3].camera == make_rig("three", 0.25).cameras["front"].camera
    assert bag[3].tilt is not None and bag[3].tilt.roll == pytest.approx(frames[3].roll)
    cv2.imwrite(str(tmp_path / "mask.png"), 255 * np.eye(60, 160))
    wrong = CliRunner().invoke(app, ["pairs", str(recording), "--out", str(tmp_path / "again"), *words])
    assert wrong.exit_code != 0
    assert "drive: the mask of the vehicle has 160 x 60 pixels, but the images have 160 x 90" in wrong.stdout


def test_an_imu_without_a_place_is_said(recording: Path, tmp_path: Path) -> None:
    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic == "/imu":
            value.header.frame_id = "imu_link"
        return topic, kind, value

    source = altered(recording, tmp_path / "a", change)
    done = command("pairs", source, "--cameras", "all", "--imu", "/imu", "--out", tmp_path / "pairs")
    assert "the Imu's frame imu_link is not in /tf_static" in done
    assert "Imu's" not in command(
        "pairs", recording, "--cameras", "all", "--imu", "/imu", "--out", tmp_path / "plain"
    )


def test_tilts_of_an_imu_that_is_mounted_otherwise(
    recording: Path, frames: list[Frame], tmp_path: Path
) -> None:
    """Turned to the left: its roll is the vehicle's pitch."""

    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic == "/tf_static":
            one = value.transforms[0]
            half = math.sqrt(0.5)
            turn = type(one.transform.rotation)(x=0.0, y=0.0, z=half, w=half)
            pose = replace(one.transform, rotation=turn)
            value.transforms.append(replace(one, child_frame_id="imu_link", transform=pose))
        if topic == "/imu":
            q, half = value.orientation, math.sqrt(0.5)
            value.header.frame_id = "imu_link"
            value.orientation = type(q)(
                x=half * (q.x + q.y), y=half * (q.y - q.x), z=half * (q.z + q.w), w=half * (q.w - q.z)
            )
        return topic, kind, value

    _, bag = imported(altered(recording, tmp_path / "a", change), tmp_path / "pairs")
    for k, frame in enumerate(frames):
        tilt = bag[k].tilt
        assert tilt is not None
        assert (tilt.roll, tilt.pitch) == pytest.approx((frame.roll, frame.pitch), abs=1e-6)


def test_frames_of_cameras_that_look_along_x(recording: Path, rig: Rig, tmp_path: Path) -> None:
    """Some robots publish the pose of the housing: x forward, z up. Others do not say optical."""

    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic == "/tf_static":
            for one in value.transforms:
                one.child_frame_id = one.child_frame_id.replace("_optical", "")
                if one.child_frame_id == "front_frame":
                    # Nose 4 degrees down, as the rig's camera.
                    half = math.radians(4.0) / 2
                    kind_of = type(one.transform.rotation)
                    one.transform.rotation = kind_of(x=0.0, y=math.sin(half), z=0.0, w=math.cos(half))
        if topic.endswith("camera_info"):
            value.header.frame_id = value.header.frame_id.replace("_optical", "")
        return topic, kind, value

    _, bag = imported(altered(recording, tmp_path / "a", change), tmp_path / "pairs")
    stored = bag.rig()
    assert stored is not None
    for name, mounted in rig.cameras.items():
        assert stored.cameras[name].axes == pytest.approx(mounted.axes, abs=1e-6)


def test_frames_that_calibrations_do_not_name(recording: Path, rig: Rig, tmp_path: Path) -> None:
    """As in the nodes, NAME_optical_frame is the camera's."""

    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic.endswith("camera_info"):
            value.header.frame_id = "camera"
        return topic, kind, value

    _, bag = imported(altered(recording, tmp_path / "a", change), tmp_path / "pairs")
    stored = bag.rig()
    assert stored is not None and stored.cameras.keys() == rig.cameras.keys()
    for name, mounted in rig.cameras.items():
        assert stored.cameras[name].axes == pytest.approx(mounted.axes, abs=1e-6)


def test_pairs_of_a_rig_get_their_tiles_later(recording: Path, city: City, tmp_path: Path) -> None:
    _, bare = imported(recording, tmp_path / "bare")
    with open_map(str(city.write_geotiff(tmp_path / "city.tif"))) as aerial:
        moved = ImportOptions(antenna=(-1.0, 0.5))
        result = import_bag(tmp_path / "bare", tmp_path / "full", aerial, moved)
    full = PairBag(tmp_path / "full")
    with (
        open_map(str(tmp_path / "city.tif")) as aerial,
        pytest.raises(BagError, match="has several cameras, with places of their own"),
    ):
        import_bag(tmp_path / "bare", tmp_path / "turned", aerial, ImportOptions(camera_yaw=1.0))
    # The antenna is elsewhere, the cameras are where they were.
    assert Mounting.of(full.session()) == Mounting((-1.0, 0.5), Mounting.of(bare.session()).camera)
    assert result is not None and (result.pairs, result.without_tile) == (COUNT, 0)
    stored = full.rig()
    assert stored is not None and stored.cameras.keys() == {"front", "left", "right"}
    for k in range(COUNT):
        assert full[k].images == bare[k].images and full[k].tilt == bare[k].tilt
        assert bare.tile(k) is None and full.tile(k) is not None


@pytest.mark.parametrize(
    "words", [["--cameras", "all"], ["--tilt", 1, 2], ["--imu", "/imu"], ["--fix", "/fix"]]
)
def test_pairs_are_not_made_anew(recording: Path, tmp_path: Path, words: list[Any]) -> None:
    """What they were made with holds; an option that would do nothing is refused."""
    imported(recording, tmp_path / "bare")
    with pytest.raises(BagError, match="1 of 1 recordings"):
        command("pairs", tmp_path / "bare", "--out", tmp_path / "full", *words)
    with pytest.raises(BagError, match="bare is a bag of pairs: only --map"):
        import_bag(tmp_path / "bare", tmp_path / "other", None, OPTIONS)
    assert not (tmp_path / "full" / "bare").exists()


def without(prefix: str) -> Change:
    return lambda topic, kind, value, number: None if topic.startswith(prefix) else (topic, kind, value)


def transforms(edit: Callable[[Any], None]) -> Change:
    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic == "/tf_static":
            (one,) = [t for t in value.transforms if t.child_frame_id.startswith("left")]
            edit(one.transform)
        return topic, kind, value

    return change


def calibration(**fields: Any) -> Change:
    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        return topic, kind, replace(value, **fields) if topic == "/left/camera_info" else value

    return change


def renamed(name: str) -> Change:
    return lambda topic, kind, value, number: (topic.replace("/left/", f"/{name}/"), kind, value)


def many(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
    if topic.startswith(("/left/", "/right/")):
        topic = f"{topic[:2]}{number}/{topic.split('/', 2)[2]}"
    return topic, kind, value


NAN = {"x": math.nan, "y": 0.0, "z": 0.0, "w": 1.0}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (same, {"cameras": ("front", "rear")}, "there is no camera rear; cameras .*: front, left, right$"),
        (same, {"cameras": ("front", "front")}, "camera front is named twice"),
        (same, {"cameras": ("a=/front/image/compressed", "front")}, "two cameras have the topic /front/im"),
        (same, {"cameras": ("a=/nowhere",)}, "are no images on /nowhere"),
        (same, {"cameras": ("../x=/front/image/compressed",)}, r"'\.\./x' is no name of a camera"),
        (same, {"cameras": ("\x1b[2J\n",)}, r"no camera \\x1b\[2J\\n"),
        (same, {"rig_file": {"frnt": CameraEntry()}}, "a camera frnt, but the rig has only front, left, r"),
        (same, {"imu": "/imu/data"}, "no Imu on /imu/data; its Imus: /imu$"),
        (without("/left/camera_info"), {"cameras": ("left",)}, "no camera left; .* beside them: /left/image"),
        (without("/left/camera_info"), {"cameras": ("a=/left/image/compressed",)}, "a has no /left/camera_"),
        (without("/tf_static"), {}, "camera front: .* no transform from base_link to front_optical_frame"),
        (transforms(lambda t: vars(t.rotation).update(NAN)), {}, "camera left: .*nan.* is unusable"),
        (transforms(lambda t: vars(t.translation).update(y=1e12)), {}, "camera left is not on the vehicle"),
        (calibration(k=np.zeros(9)), {}, "camera left has no usable /left/camera_info: .* not calibrated"),
        (calibration(width=2**32 - 1), {}, "camera left has no usable .*at most 67 million"),
        (calibration(distortion_model="\x1b[31m"), {}, r"camera left has no usable .*\\x1b\[31m"),
        (renamed("9left"), {}, "'9left' is no name of a camera"),
        (many, {}, "a rig of 25 cameras: at most 16"),
    ],
)  # fmt: skip
def test_rigs_that_cannot_be_read_say_why(
    recording: Path, tmp_path: Path, change: Change, options: dict[str, Any], message: str
) -> None:
    source = altered(recording, tmp_path / "a", change)
    with pytest.raises(BagError, match=message) as caught:
        import_bag(source, tmp_path / "pairs", None, replace(OPTIONS, **options))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
    assert not (tmp_path / "pairs").exists()


def test_damaged_transforms_are_no_crash(recording: Path, tmp_path: Path) -> None:
    """A drive of a single camera needs none; a rig says which it lacks."""

    def change(topic: str, kind: str, value: Any, number: int) -> tuple[str, str, Any]:
        if topic == "/tf_static":
            return topic, "std_msgs/msg/String", STORE.types["std_msgs/msg/String"](data="\x00" * 50)
        return topic, kind, value

    source = altered(recording, tmp_path / "a", change)
    with pytest.raises(BagError, match=r"camera front: .* \(.*/tf_static is damaged"):
        import_bag(source, tmp_path / "rig", None, OPTIONS)
    topics = {**OPTIONS.topics, "image": "/front/image/compressed", "camera_info": "/front/camera_info"}
    result, bag = imported(source, tmp_path / "single", cameras=(), topics=topics)
    assert result.pairs == COUNT and bag[0].tilt is not None


def test_several_cameras_lead_to_the_option(recording: Path, tmp_path: Path) -> None:
    with pytest.raises(BagError, match="several topics for image, choose one, or all with --cameras all"):
        import_bag(recording, tmp_path / "pairs", None, replace(OPTIONS, cameras=()))


def test_cameras_that_are_no_part_of_the_rig_are_said(recording: Path, tmp_path: Path) -> None:
    """Nobody who asks for all cameras shall miss one without a word."""
    source = altered(recording, tmp_path / "a", without("/left/camera_info"))
    done = command("pairs", source, "--cameras", "all", "--out", tmp_path / "pairs")
    assert "  not used, as no camera_info is beside them: /left/image/compressed\n" in done
    words = ["--cameras", "front,right", "--distance", 0.01, "--out", tmp_path / "some"]
    some = command("pairs", source, *words)
    assert "not used" not in some
    assert f"tilt         {COUNT} unknown" in command("pairs", "info", tmp_path / "some" / "a")
    bare = altered(recording, tmp_path / "b", lambda *m: None if m[0].endswith("info") else same(*m))
    with pytest.raises(BagError, match=r"no camera; cameras .*: none; images without .*: /front/image"):
        import_bag(bare, tmp_path / "none", None, OPTIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cameras", "all", "--camera-yaw", 90], "are for a single camera: leave them out"),
        (["--cameras", "front,,left"], "has an empty name"),
        (["--base-height", 1], "are for a rig: name its --cameras"),
        (["--tilt", 40, 0], "at most 30 degrees either way"),
        (["--tilt", "nan", 0], "at most 30 degrees either way"),
    ],
)
def test_options_that_do_not_fit(recording: Path, tmp_path: Path, words: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command("pairs", recording, "--out", tmp_path, *words)


def command(*arguments: object) -> str:
    """Run a command in this process; return what it prints."""
    done = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_a_recording_s_rig_is_the_same_whatever_is_imported(recording: Path, tmp_path: Path) -> None:
    """The session says where panoramas are seen from, as readers of single cameras expect it."""
    done = command("pairs", recording, "--cameras", "all", "--out", tmp_path, "--antenna", -1.0, 0.0)
    assert "pairs" in done
    session = PairBag(tmp_path / "drive").session()
    assert session["antenna"] == [-1.0, 0.0] and session["camera_yaw"] == 0.0
    assert json.dumps(session["camera"]) == json.dumps(make_rig("three").centre[:2].tolist())
