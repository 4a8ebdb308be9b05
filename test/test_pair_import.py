"""Pairs from ordinary recordings, the dataset on them, and the commands."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from map_fixtures import texture, write_geotiff
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore
from ruamel.yaml import YAML
from typer.testing import CliRunner

from xview_loc.bags.recovery import BagError, bag_files
from xview_loc.bags.ros_types import camera_info, deserialize
from xview_loc.bags.writer import BagLimits
from xview_loc.cli.commands import app
from xview_loc.cli.console import UsageError
from xview_loc.datasets import DatasetError
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialTile, MapUnavailableError
from xview_loc.maps.store import TileStore
from xview_loc.models import create_model
from xview_loc.models.specs import SPECS
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.recordings.tracks import read_timed_track
from xview_loc.simulation.city import build_city
from xview_loc.simulation.drives import drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView
from xview_loc.vehicle.keyframes import KeyframeRule
from xview_loc.vehicle.mounting import Mounting

ROOT = Path(__file__).resolve().parent.parent
REAL_BAG = ROOT.parent / "shared/data/tracks/robot_localization_test1.bag"
LAT, LON = 48.2, 16.37
PLANE = LocalProjection(LAT, LON)
T0 = 1_700_000_000 * 10**9
SPEC = create_model("ccvpe-small").spec
OPTIONS = ImportOptions(spec=SPEC)


@pytest.fixture(scope="module")
def aerial_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geotiff(
        tmp_path_factory.mktemp("map") / "map.tif", texture(900, 900), LAT, LON, 0.4, "EPSG:32633"
    )


def record(
    path: Path,
    form: str,
    *,
    image: str = "raw",
    heading: bool = True,
    compass: bool = False,
    jump: tuple[int, int] = (0, 0),
    calibrated: tuple[int, float] | None = None,
) -> Path:
    """A drive east, 1.1 m a frame, ten frames a second, as somebody else's tools would have recorded it.

    From the first frame of ``jump`` to the second, its fixes lie 500 m away. With ``compass``, it has
    azimuths as well, 10 degrees off the Imu's heading, and wheels that give a twist. From the first frame of
    ``calibrated`` on, camera_info comes with each image, with this focal length.
    """
    store = get_typestore(Stores.ROS1_NOETIC if form == "ros1" else Stores.ROS2_HUMBLE)
    types = store.types
    if form == "ros1":
        writer = Writer1(path)
    else:
        plugin = StoragePlugin.MCAP if form == "mcap" else StoragePlugin.SQLITE3
        writer = Writer2(path, version=8, storage_plugin=plugin)
    kinds = {
        "/cam/image": "sensor_msgs/msg/Image" if image == "raw" else "sensor_msgs/msg/CompressedImage",
        "/gps/fix": "sensor_msgs/msg/NavSatFix",
        "/imu": "sensor_msgs/msg/Imu",
    }
    if not heading:
        del kinds["/imu"]
    if compass:
        kinds |= {"/compass": "std_msgs/msg/Float64", "/wheels": "geometry_msgs/msg/TwistStamped"}
    if calibrated:
        kinds |= {"/cam/camera_info": "sensor_msgs/msg/CameraInfo"}
    with writer:
        connections = {t: writer.add_connection(t, kind, typestore=store) for t, kind in kinds.items()}
        for k in range(30):
            stamp = T0 + k * 10**8

            def write(topic: str, at: int, **fields: object) -> None:
                seconds, nanoseconds = divmod(at, 10**9)
                sequence = {"seq": 0} if form == "ros1" else {}
                time = types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
                head = types["std_msgs/msg/Header"](stamp=time, frame_id="x", **sequence)
                if topic != "/compass":
                    fields["header"] = head
                message = types[kinds[topic]](**fields)
                serialize = store.serialize_ros1 if form == "ros1" else store.serialize_cdr
                writer.write(connections[topic], at, serialize(message, kinds[topic]))

            for late in (0, 5 * 10**7):  # twice as often as the images
                off = 500.0 if jump[0] <= k < jump[1] else 0.0
                lat, lon = PLANE.inverse(1.1 * (k + late / 1e8), off)
                write(
                    "/gps/fix",
                    stamp + late,
                    status=types["sensor_msgs/msg/NavSatStatus"](status=0 if k != 9 else -1, service=1),
                    latitude=lat,
                    longitude=lon,
                    altitude=100.0,
                    position_covariance=np.diag([4.0, 4.0, 9.0]).reshape(9),
                    position_covariance_type=2,
                )
                if heading:
                    zero = types["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
                    turn = types["geometry_msgs/msg/Quaternion"](
                        x=0.0, y=0.0, z=math.sin(0.1), w=math.cos(0.1)
                    )
                    write(
                        "/imu",
                        stamp + late,
                        orientation=turn,
                        orientation_covariance=np.diag([1.0, 1.0, 0.01]).reshape(9),
                        angular_velocity=zero,
                        angular_velocity_covariance=np.zeros(9),
                        linear_acceleration=zero,
                        linear_acceleration_covariance=np.zeros(9),
                    )
            if compass:
                zero, speed = (types["geometry_msgs/msg/Vector3"](x=v, y=0.0, z=0.0) for v in (0.0, 11.0))
                write("/compass", stamp, data=90.0 - math.degrees(0.2) + 350.0)
                write("/wheels", stamp, twist=types["geometry_msgs/msg/Twist"](linear=speed, angular=zero))
            if calibrated and k >= calibrated[0]:
                given = calibrated[1], 0.0, 127.5, 0.0, calibrated[1], 31.5, 0.0, 0.0, 1.0
                lens = camera_info(None, 256, 64, given if calibrated[1] else [0.0] * 9, [], "plumb_bob")
                fields = {f.name: getattr(lens, f.name) for f in dataclasses.fields(lens)}
                region = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
                del fields["header"]
                write("/cam/camera_info", stamp, **{**fields, "roi": region})
            pixels = texture(64, 256, k)
            if image == "raw":
                write(
                    "/cam/image", stamp, height=64, width=256, encoding="rgb8", is_bigendian=0, step=768,
                    data=pixels.reshape(-1) if k != 20 else pixels.reshape(-1)[:100],
                )  # fmt: skip
            else:
                data = cv2.imencode(".jpg", pixels)[1].reshape(-1)
                write("/cam/image", stamp, format="jpeg", data=data if k != 20 else data[:100])
    if form == "humble":
        make_humble(path)
    return path


def make_humble(bag: Path) -> None:
    """Turn an SQLite bag into what ROS 2 Humble writes: older versions, and no message definitions."""
    (file,) = bag.glob("*.db3")
    database = sqlite3.connect(file)
    database.executescript(
        """
        DROP TABLE message_definitions;
        ALTER TABLE topics DROP COLUMN type_description_hash;
        UPDATE schema SET schema_version = 3, ros_distro = 'humble';
        """
    )
    database.close()
    yaml = YAML(typ="safe")
    content = yaml.load(bag / "metadata.yaml")
    information = content["rosbag2_bagfile_information"]
    information["version"] = 5
    for name in ("custom_data", "ros_distro"):
        del information[name]
    for topic in information["topics_with_message_count"]:
        del topic["topic_metadata"]["type_description_hash"]
    yaml.dump(content, bag / "metadata.yaml")
    with pytest.raises(AnyReaderError, match="no type definitions"):
        AnyReader([bag]).open()


@pytest.mark.parametrize(
    ("form", "image"),
    [("mcap", "compressed"), ("sqlite3", "raw"), ("humble", "raw"), ("ros1", "compressed")],
)
def test_recordings_of_every_kind(aerial_path: Path, tmp_path: Path, form: str, image: str) -> None:
    source = record(tmp_path / ("a.bag" if form == "ros1" else "a"), form, image=image)
    shares: list[float] = []
    with open_map(str(aerial_path)) as aerial:
        result = import_bag(source, tmp_path / "out" / "a", aerial, OPTIONS, shares.append)
        assert result is not None and import_bag(source, tmp_path / "out" / "a", aerial, OPTIONS) is None
    # Every second frame, where the wheels say nothing; the damaged image is one of them.
    assert result.pairs == 14 and result.without_tile == 0
    assert result.dropped == {"image_invalid": 1, "fix_status": 2}
    assert result.read == {"image": 30, "fix": 60, "heading": 60}
    assert min(shares) >= 0.0 and max(shares) <= 1.0
    pairs = PairBag(tmp_path / "out" / "a")
    stamps = [pairs[k].stamp_ns for k in range(len(pairs))]
    assert stamps == [T0 + k * 10**8 for k in range(0, 30, 2) if k != 20]
    for k, stamp in enumerate(stamps):
        pair, tile = pairs[k], pairs.tile(k)
        assert math.hypot(*LocalProjection(pair.lat, pair.lon).forward(
            *PLANE.inverse(1.1 * (stamp - T0) / 1e8, 0.0))) < 0.01  # fmt: skip
        assert pair.heading == pytest.approx(0.2) and pair.heading_std == pytest.approx(0.1)
        assert tile is not None and tile.size_px == SPEC.aerial_size
    # Every fix of the recording but two without a position.
    assert len(read_timed_track(source).stamp_ns) == 58
    sent = texture(64, 256, 4)
    if image == "compressed":
        assert pairs[2].image_bytes == cv2.imencode(".jpg", sent)[1].tobytes()
    else:
        assert np.abs(pairs[2].image().astype(int) - sent).mean() < 6.0


@pytest.mark.parametrize("form", ["mcap", "ros1"])
def test_azimuths_and_twists_are_read_from_topics_chosen(tmp_path: Path, form: str) -> None:
    bag = record(tmp_path / ("a.bag" if form == "ros1" else "a"), form, compass=True)
    # Not chosen, a Float64 and a twist may be anything.
    assert import_bag(bag, tmp_path / "plain", None, OPTIONS) is not None
    plain = PairBag(tmp_path / "plain")
    assert plain[0].heading == pytest.approx(0.2) and not list(plain.odometry())
    chosen = replace(OPTIONS, topics={"heading": "/compass", "odom": "/wheels"})
    assert import_bag(bag, tmp_path / "chosen", None, chosen) is not None
    pairs = PairBag(tmp_path / "chosen")
    assert pairs[0].heading == pytest.approx(0.2 + math.radians(10.0))
    speeds = [deserialize("nav_msgs/msg/Odometry", data).twist.twist.linear.x for _, data in pairs.odometry()]
    assert speeds == [11.0] * 30


def test_fixes_that_jump_make_no_pairs(tmp_path: Path) -> None:
    source = record(tmp_path / "a", "mcap", jump=(12, 17))
    result = import_bag(source, tmp_path / "out", None, OPTIONS)
    assert result is not None and result.pairs == 14 and result.dropped["fix_jump"] == 10
    pairs = PairBag(tmp_path / "out")
    for pair in (pairs[k] for k in range(len(pairs))):
        east, north = PLANE.forward(pair.lat, pair.lon)
        assert (east, north) == pytest.approx((1.1 * (pair.stamp_ns - T0) / 1e8, 0.0), abs=0.01)
    believed = import_bag(source, tmp_path / "all", None, replace(OPTIONS, fix_max_jump_m=0.0))
    assert believed is not None and believed.dropped["fix_jump"] == 0


def test_tiles_that_cannot_be_read_are_counted(
    aerial_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = record(tmp_path / "a", "mcap")
    around, failures = TileStore.around, 2

    def failing(store: TileStore, *arguments: float) -> AerialTile:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise MapUnavailableError("the disk is broken")
        return around(store, *arguments)

    monkeypatch.setattr(TileStore, "around", failing)
    words = ["pairs", source, "--map", aerial_path, "--out", tmp_path / "out", "--model", "ccvpe-small"]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    assert "14 pairs, 2 of them without a tile (2 could not be read: the disk is broken)" in done.stdout
    pairs = PairBag(tmp_path / "out" / "a")
    assert [pairs.tile(k) is None for k in range(4)] == [True, True, False, False]
    failures = 3
    with pytest.raises(MapUnavailableError):
        CliRunner().invoke(
            app, [str(w) for w in words] + ["--out", str(tmp_path / "no")], catch_exceptions=False
        )


def test_missing_tiles_are_filled_in_later(aerial_path: Path, tmp_path: Path) -> None:
    source = record(tmp_path / "a", "mcap")
    first = import_bag(source, tmp_path / "bare" / "a", None, OPTIONS)
    assert first is not None and first.without_tile == first.pairs == 14
    with pytest.raises(DatasetError, match=r"has no tile: .* --map MAP --model ccvpe-small --out NEW"):
        PairDataset([tmp_path / "bare" / "a"], SPEC)[0]
    with open_map(str(aerial_path)) as aerial:
        second = import_bag(tmp_path / "bare" / "a", tmp_path / "full" / "a", aerial, OPTIONS)
        # Tiles stay those of the model that they were cut for, unless another one is named.
        ggcvt = ImportOptions(spec=SPECS["ggcvt-small"])
        import_bag(tmp_path / "full" / "a", tmp_path / "larger", aerial, ggcvt)
        import_bag(tmp_path / "larger", tmp_path / "same", aerial, ImportOptions())
    for name in ("larger", "same"):
        assert PairBag(tmp_path / name).tile_sizes() == {(192, 0.48)}
        assert PairBag(tmp_path / name).session()["model"] == "ggcvt-small"
    assert second is not None and (second.pairs, second.without_tile) == (14, 0)
    bare, full = PairBag(tmp_path / "bare" / "a"), PairBag(tmp_path / "full" / "a")
    assert all(bare[k].image_bytes == full[k].image_bytes for k in range(14))
    assert all(full.tile(k) is not None for k in range(14))


def test_images_before_the_first_calibration_are_left_out(tmp_path: Path) -> None:
    """They would be taken for panoramas; without a calibration that says anything, images are panoramas."""
    source = record(tmp_path / "late", "mcap", calibrated=(10, 200.0))
    result = import_bag(source, tmp_path / "pairs", None, OPTIONS)
    assert result is not None and result.dropped["camera_info_missing"] == 10
    bag = PairBag(tmp_path / "pairs")
    assert len(bag) == result.pairs < 14 and all(bag[k].camera is not None for k in range(len(bag)))
    assert bag[0].stamp_ns >= T0 + 10**9
    source = record(tmp_path / "zeros", "mcap", calibrated=(0, 0.0))
    result = import_bag(source, tmp_path / "zeros-pairs", None, OPTIONS)
    assert result is not None and result.pairs == 14 and not result.dropped["camera_info_invalid"]
    source = record(tmp_path / "a", "mcap")
    pinhole = replace(OPTIONS, spec=SPECS["ccvpe-pinhole-small"])
    with pytest.raises(BagError, match="has no camera_info, and ccvpe-pinhole-small needs it"):
        import_bag(source, tmp_path / "pinhole", None, pinhole)
    with pytest.raises(BagError, match="ccvpe-pinhole-small needs tiles turned to the heading"):
        import_bag(source, tmp_path / "north", None, replace(pinhole, use_heading=False))


def test_what_panoramas_show_may_be_said_afterwards(tmp_path: Path) -> None:
    import_bag(record(tmp_path / "a", "mcap"), tmp_path / "pairs", None, OPTIONS)
    words = ["pairs", tmp_path / "pairs", "--out", tmp_path / "new", "--panorama-elevation"]
    command(*words, 60, -90)
    assert PairBag(tmp_path / "new" / "pairs").session()["panorama_elevation_deg"] == [60.0, -90.0]
    with pytest.raises(UsageError, match="--panorama-elevation takes two angles"):
        command(*words, -90, 60)


@pytest.mark.parametrize("antenna", [5, "xy", [1.0, 2.0, 3.0], [None, 1.0]])
def test_a_mounting_from_a_stranger_is_one_line(tmp_path: Path, antenna: Any) -> None:
    writer = PairWriter(tmp_path / "pairs", {"antenna": antenna}, BagLimits(min_free_bytes=0))
    writer.add(Pair(T0, "jpeg", b"", 48.2, 16.37), None)
    writer.close()
    says = "the mounting in the session of .* cannot be used"
    with pytest.raises(BagError, match=says):
        import_bag(tmp_path / "pairs", tmp_path / "new", None, ImportOptions())
    with pytest.raises(BagError, match=says):
        PairDataset([tmp_path / "pairs"], SPEC)


def test_interrupted_imports_start_over(tmp_path: Path) -> None:
    source = record(tmp_path / "a", "mcap")

    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_bag(source, tmp_path / "out" / "a", None, OPTIONS, interrupt)
    assert not (tmp_path / "out" / "a").exists()
    result = import_bag(source, tmp_path / "out" / "a", None, OPTIONS)
    assert result is not None and result.pairs == 14
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_unusable_recordings_say_why(tmp_path: Path) -> None:
    no_heading = record(tmp_path / "a", "mcap", heading=False)
    with pytest.raises(BagError, match="no topic for heading"):
        import_bag(no_heading, tmp_path / "out" / "a", None, OPTIONS)
    result = import_bag(no_heading, tmp_path / "out" / "b", None, replace(OPTIONS, use_heading=False))
    assert result is not None and result.pairs > 10 and PairBag(tmp_path / "out" / "b")[0].heading is None
    with pytest.raises(BagError, match="no image topic /camera"):
        import_bag(no_heading, tmp_path / "out" / "c", None, replace(OPTIONS, topics={"image": "/camera"}))
    (tmp_path / "x.bag").write_bytes(b"no bag")
    (tmp_path / "x.tif").write_bytes(b"no bag")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "x.bag", tmp_path / "x.tif", tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(BagError, match="cannot read"):
            import_bag(path, tmp_path / "out" / "d", None, OPTIONS)


def test_of_several_topics_the_one_named_as_the_input_is_taken(tmp_path: Path) -> None:
    """A simulated drive has the truth beside what the vehicle measured."""
    frames = list(drive(build_city(7, "source", size_m=200.0), 10, view=PanoramaView(32, 128)))
    write_bag(frames, tmp_path / "drive")
    result = import_bag(tmp_path / "drive", tmp_path / "pairs", None, OPTIONS)
    assert result is not None and result.pairs > 2
    first, pair = frames[0], PairBag(tmp_path / "pairs")[0]
    assert pair.heading is not None
    assert (pair.lat, pair.lon, pair.heading) == pytest.approx((first.fix.lat, first.fix.lon, first.heading))
    assert pair.lat != pytest.approx(first.truth.lat, abs=1e-8)


@pytest.mark.skipif(not REAL_BAG.exists(), reason="the real recording is not beside the repository")
def test_a_real_recording_without_images(tmp_path: Path) -> None:
    options = replace(OPTIONS, topics={"heading": "/imu/data"})
    with pytest.raises(BagError, match=r"no images to pair \(messages: [1-9]\d+ of fix, [1-9]\d+ of heading"):
        import_bag(REAL_BAG, tmp_path / "out", None, options)


@pytest.fixture(scope="module")
def imported(aerial_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    with open_map(str(aerial_path)) as aerial:
        import_bag(record(folder / "raw", "mcap"), folder / "pairs", aerial, OPTIONS)
    return folder / "pairs"


def test_dataset_decodes_in_workers(imported: Path) -> None:
    dataset = PairDataset([imported, imported], SPEC)
    assert len(dataset) == 28
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=2, shuffle=True)
    seen = torch.cat([batch["index"] for batch in loader])
    assert sorted(seen.tolist()) == list(range(28))
    one = dataset[15]
    twin = dataset[1]
    assert one["ground"].shape == (3, 64, 256) and one["aerial"].shape == (3, 160, 160)
    assert torch.equal(one["ground"], twin["ground"]) and torch.equal(one["fix"], twin["fix"])
    assert bool(one["heading_known"])
    # Tiles snap to a quarter of their size: the fix is near the middle.
    assert (one["fix"] - 79.5).abs().max() < 160 / 8 + 1
    with pytest.raises(IndexError):
        dataset[28]


def test_dataset_refuses_tiles_of_another_model(imported: Path) -> None:
    with pytest.raises(DatasetError, match="ccvpe-vigor needs 512 px"):
        PairDataset([imported], create_model("ccvpe-vigor").spec)[0]
    # Larger than its 512 px, since they are turned to the heading.
    with pytest.raises(DatasetError, match="ccvpe-kitti needs 726 px"):
        PairDataset([imported], create_model("ccvpe-kitti").spec)[0]


def command(*arguments: object) -> str:
    """Run a command in this process; return what it prints."""
    done = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_commands(aerial_path: Path, tmp_path: Path) -> None:
    one, two = record(tmp_path / "one", "mcap"), record(tmp_path / "two.bag", "ros1")
    out = tmp_path / "pairs"
    words = ["--map", aerial_path, "--out", out, "--model", "ccvpe-small"]
    words += ["--camera-yaw", 90, "--antenna", -1.5, 0.2]
    done = command("pairs", one, two, *words)
    assert done.count("14 pairs") == 2 and "dropped: 1 image_invalid" in done
    mounting = Mounting.of(PairBag(out / "one").session())
    assert mounting == Mounting(antenna=(-1.5, 0.2), camera_yaw=math.pi / 2)
    assert command("pairs", one, two, *words).count("already imported") == 2
    info = command("pairs", "info", out / "one")
    assert "14, 0 without a tile" in info and "2.0 m (median" in info
    picture = cv2.imread(str(out / "one_pairs.png"))
    assert picture is not None and picture.std() > 20
    data = bag_files(out / "one")[0].read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "cut_0.mcap").write_bytes(data[: -len(data) // 3])
    with pytest.raises(BagError, match="run xview-loc bag recover"):
        command("pairs", "info", tmp_path / "cut")
    assert "messages recovered" in command("bag", "recover", tmp_path / "cut")
    # As a user runs it: one that cannot be read is reported, and the others are imported all the same.
    wrong = subprocess.run(
        [
            sys.executable,
            "-m",
            "xview_loc.cli",
            "pairs",
            tmp_path / "nowhere",
            one,
            "--out",
            tmp_path / "new",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert wrong.returncode == 1 and "cannot read" in wrong.stdout and "14 pairs" in wrong.stdout
    assert "1 of 2 recordings" in wrong.stderr and "Traceback" not in wrong.stderr


def test_keyframe_distance_is_an_option(tmp_path: Path) -> None:
    source = record(tmp_path / "a", "mcap")
    options = replace(OPTIONS, keyframes=KeyframeRule(distance_m=5.0))
    result = import_bag(source, tmp_path / "out", None, options)
    assert result is not None and result.pairs + result.dropped["image_invalid"] == 6
