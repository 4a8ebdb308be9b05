"""Pairs: which frames are kept, and that a bag gives back what was written, at random and in parts."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from map_fixtures import texture
from mcap.reader import make_reader
from rosbags.highlevel import AnyReader

from xview_loc.bags.recovery import BagError, bag_files, recover_bag
from xview_loc.bags.ros_types import deserialize, header, message, quaternion, serialize
from xview_loc.bags.writer import BagLimits
from xview_loc.camera import CameraModel
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models.specs import ModelSpec
from xview_loc.recordings.drive import find_headings
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import CONVENTIONS, TOPICS, decode_tile, encode_tile
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.vehicle.keyframes import KeyframeRule, Keyframes
from xview_loc.vehicle.mounting import Mounting, in_enu

LAT, LON = 48.2, 16.37
PLANE = LocalProjection(LAT, LON)
T0 = 1_700_000_000 * 10**9
NO_FLOOR = BagLimits(min_free_bytes=0)
CAMERA = CameraModel(640, 480, (500.0, 0, 320.0, 0, 500.0, 240.0, 0, 0, 1), (0.1, -0.02, 0.0, 0.0))


def jpeg(seed: int) -> bytes:
    return bytes(cv2.imencode(".jpg", texture(48, 64, seed))[1])


def pair(k: int, **changes: object) -> Pair:
    lat, lon = PLANE.inverse(2.0 * k, 0.0)
    base = Pair(
        stamp_ns=T0 + k * 10**8,
        image_format="jpeg",
        image_bytes=jpeg(k),
        lat=lat,
        lon=lon,
        altitude=170.0,
        fix_covariance=np.diag([4.0, 9.0, 25.0]),
        heading=0.3 - 0.01 * k,
        heading_std=0.02,
        camera=CAMERA,
    )
    return dataclasses.replace(base, **changes)


def tile(k: int) -> AerialTile:
    lat, lon = PLANE.inverse(20.0 * k, 5.0)
    valid = np.ones((64, 64), bool)
    valid[: 2 * k] = False
    image = np.where(valid[..., None], texture(64, 64, 100 + k), 0).astype(np.uint8)
    return AerialTile(image, lat, lon, 0.5, float(valid.mean()), 0.0, valid)


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "bag"
    writer = PairWriter(folder, {"vehicle": "cart"}, NO_FLOOR)
    for k in range(40):
        writer.add(pair(k), tile(k // 10) if k != 17 else None)
        writer.add_odometry(T0 + k * 10**8, odometry(k))
    writer.close()
    return folder


def odometry(k: int, speed: float | None = None) -> bytes:
    zero = message("geometry_msgs/msg/Vector3", x=float(k) if speed is None else speed, y=0.0, z=0.0)
    pose = message(
        "geometry_msgs/msg/Pose",
        position=message("geometry_msgs/msg/Point", x=0.0, y=0.0, z=0.0),
        orientation=quaternion(0.0),
    )
    value = message(
        "nav_msgs/msg/Odometry",
        header=header(T0 + k * 10**8, "odom"),
        child_frame_id="base_link",
        pose=message("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=np.zeros(36)),
        twist=message(
            "geometry_msgs/msg/TwistWithCovariance",
            twist=message("geometry_msgs/msg/Twist", linear=zero, angular=zero),
            covariance=np.zeros(36),
        ),
    )
    return serialize("nav_msgs/msg/Odometry", value)


def test_pairs_come_back_as_they_were(bag: Path) -> None:
    pairs = PairBag(bag)
    assert len(pairs) == 40
    for k in (31, 0, 17, 39):
        got, want = pairs[k], pair(k)
        assert (got.stamp_ns, got.image_bytes, got.image_format) == (
            want.stamp_ns,
            want.image_bytes,
            "jpeg",
        )
        assert (got.lat, got.lon, got.altitude) == (want.lat, want.lon, 170.0)
        assert np.array_equal(got.fix_covariance, want.fix_covariance)
        assert got.heading == pytest.approx(want.heading, abs=1e-12)
        assert got.heading_std == pytest.approx(0.02) and got.camera == CAMERA
        assert got.image().shape == (48, 64, 3)
        stored = pairs.tile(k)
        if k == 17:
            assert stored is None and got.tile_id == ""
            continue
        original = tile(k // 10)
        assert stored is not None and stored.key == original.key == got.tile_id
        assert np.array_equal(stored.image, original.image)
        assert stored.valid_fraction == original.valid_fraction
    speeds = [deserialize(TOPICS["/odom"], data).twist.twist.linear.x for _, data in pairs.odometry()]
    assert speeds == list(range(40))
    assert pairs.raw_image(7).endswith(jpeg(7)[-40:])
    session = pairs.session()
    assert session["vehicle"] == "cart" and session["conventions"] == CONVENTIONS
    with pytest.raises(IndexError):
        pairs[40]


def test_tiles_are_stored_once_each(bag: Path) -> None:
    with AnyReader([bag]) as reader:
        counts = {c.topic: c.msgcount for c in reader.connections}
        assert {c.topic: c.msgtype for c in reader.connections} == TOPICS
    assert counts["/tile/image"] == counts["/tile/georeference"] == 4
    assert counts["/pair/image"] == counts["/odom"] == 40 and counts["/session"] == 1


def test_every_file_stands_for_itself(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "bag", {}, BagLimits(split_seconds=0.95, min_free_bytes=0))
    for k in range(40):
        writer.add(pair(k), tile(0))
    writer.close()
    files = bag_files(tmp_path / "bag")
    assert len(files) == 4
    # Any one of them can be lost.
    for k in (0, 2):
        files[k].unlink()
    left = PairBag(tmp_path / "bag")
    assert 10 < len(left) < 30 and left.session()["format"] == 1
    assert all(left.tile(k) is not None for k in range(len(left)))


def test_time_that_starts_again_keeps_pairs_apart(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR)
    for lap in range(2):
        for k in range(5):
            writer.add(pair(k, altitude=float(lap)), tile(0))
    writer.close()
    pairs = PairBag(tmp_path / "bag")
    assert sorted(pairs[k].altitude for k in range(10)) == [0.0] * 5 + [1.0] * 5
    assert all(pairs.tile(k) is not None for k in range(10))


def test_what_is_not_known_stays_unknown(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR)
    writer.add(pair(0, heading=None, fix_covariance=None, camera=None), None)
    writer.add(pair(1, fix_covariance=np.eye(2)), None)
    writer.close()
    got = PairBag(tmp_path / "bag")[0]
    assert got.heading is None and got.fix_covariance is None and got.camera is None
    covariance = PairBag(tmp_path / "bag")[1].fix_covariance
    assert covariance is not None and np.array_equal(covariance[:2, :2], np.eye(2))


def test_a_bag_can_be_sent_to_another_process(bag: Path) -> None:
    pairs = PairBag(bag)
    assert pairs[3].lat == pickle.loads(pickle.dumps(pairs))[3].lat


def damage_chunk(folder: Path, number: int) -> bytes:
    """Flip a bit of a chunk of a bag of one file; return the file."""
    (path,) = bag_files(folder)
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        summary = make_reader(file).get_summary()
    assert summary is not None and len(summary.chunk_indexes) > number
    data[summary.chunk_indexes[number].chunk_start_offset + 300] ^= 4
    path.write_bytes(data)
    return bytes(data)


def test_damage_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR)
    for k in range(8):
        writer.add(pair(k), tile(0))
        writer.bag.flush()
    writer.close()
    data = damage_chunk(tmp_path / "bag", 5)
    pairs = PairBag(tmp_path / "bag")
    with pytest.raises(BagError, match=r"pair 5 .* is damaged"):
        pairs[5]
    assert all(pairs[k].image_bytes == jpeg(k) for k in (0, 4, 6, 7)) and pairs.tile(7) is not None
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "cut_0.mcap").write_bytes(data[: len(data) // 2])
    with pytest.raises(BagError, match="run xview-loc bag recover"):
        PairBag(tmp_path / "cut")
    recover_bag(tmp_path / "cut", tmp_path / "saved")
    with pytest.raises(BagError, match="holds no"):
        PairBag(tmp_path / "nothing").session()


def test_damage_leaves_pairs_without_reckoned_headings(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "bag", {}, NO_FLOOR)
    for k in range(8):
        writer.add(pair(k, heading=None, camera=None), tile(0))
        writer.bag.flush()
    writer.close()
    damage_chunk(tmp_path / "bag", 5)
    spec = ModelSpec("stub", "panorama", (24, 96), 64, 0.5, 8)
    source = PairDataset([tmp_path / "bag"], spec)
    assert len(source) == 8
    assert source.remarks == [f"{tmp_path / 'bag'}: headings: unknown, the bag is damaged"]
    found = find_headings(PairBag(tmp_path / "bag"), Mounting())
    assert found == (None, "unknown, the bag is damaged")


@pytest.mark.parametrize("k", range(3))
def test_tiles_keep_their_pixels_and_their_holes(k: int) -> None:
    one = tile(k)
    georeference = {
        "lat": one.lat, "lon": one.lon, "gsd": one.gsd, "valid_fraction": one.valid_fraction, "rotation": 0.0
    }  # fmt: skip
    back = decode_tile(encode_tile(one), georeference)
    assert np.array_equal(back.image, one.image) and back.key == one.key
    assert (back.valid is None) == (k == 0)
    if back.valid is not None:
        assert np.array_equal(back.valid, one.valid)
    with pytest.raises(ValueError, match="not a JPEG"):
        decode_tile(b"no image", georeference)


def along(step_m: float, count: int = 100, **rule: float) -> list[int]:
    """Frames picked, ten a second, on a straight drive of so many metres a frame, by the fixes alone."""
    keyframes = Keyframes(KeyframeRule(**rule))
    return [k for k in range(count) if keyframes.wants(T0 + k * 10**8, *PLANE.inverse(step_m * k, 0.0), 0.0)]


def test_keyframes_by_distance() -> None:
    assert along(0.501) == list(range(0, 100, 4))
    assert along(3.0) == list(range(100))
    assert along(0.5, distance_m=0.0) == [0]


def test_keyframes_by_time_and_by_turn() -> None:
    assert along(0.2, distance_m=0.0, interval_s=2.0) == list(range(0, 100, 20))
    keyframes = Keyframes(KeyframeRule(distance_m=0.0, turn=math.radians(15)))
    # A slow turn across the border of the circle.
    picked = [
        k
        for k in range(60)
        if keyframes.wants(
            T0 + k * 10**8, LAT, LON, math.remainder(3.0 + math.radians(2.0 * k), 2 * math.pi), speed=1.0
        )
    ]
    assert picked == list(range(0, 60, 8))


def test_no_keyframes_while_standing() -> None:
    rng = np.random.default_rng(0)
    rule = KeyframeRule(distance_m=2.0, interval_s=1.0, turn=0.1)
    keyframes = Keyframes(rule)
    wander = np.cumsum(rng.normal(0, 0.3, (300, 2)), axis=0)  # the fix of a vehicle that stands
    picked = [
        k
        for k in range(300)
        if keyframes.wants(T0 + k * 10**8, *PLANE.inverse(*wander[k]), rng.normal(), speed=0.02)
    ]
    assert picked == [0]
    # Without odometry a little noise is stood, too.
    keyframes = Keyframes(rule)
    noise = rng.uniform(-0.3, 0.3, (300, 2))
    assert sum(keyframes.wants(T0 + k * 10**8, *PLANE.inverse(*noise[k]), 0.1 * k) for k in range(300)) == 1


def test_wheels_measure_the_distance() -> None:
    """At 1 m/s a keyframe every 2 s, though the fix jumps by tens of metres."""
    rng = np.random.default_rng(1)
    keyframes = Keyframes(KeyframeRule())
    picked = [
        k
        for k in range(100)
        if keyframes.wants(T0 + k * 10**8, *PLANE.inverse(*rng.normal(0, 20, 2)), 0.0, speed=1.0)
    ]
    assert picked == list(range(0, 100, 20))
    assert keyframes.wants(T0 - 10**9, LAT, LON, 0.0, speed=1.0)  # a bag that starts again


def test_lever_arms_are_taken_out(tmp_path: Path) -> None:
    """In a bend, with the antenna 3 m behind the camera: the same as with fixes of the camera itself."""
    spec = ModelSpec("stub", "panorama", (32, 64), 64, 0.5, bins=8)
    mounting = Mounting((-1.0, 0.5), (2.0, 0.0), 0.2)
    shows = {"panorama_elevation_deg": [90.0, -90.0]}
    writers = {
        "antenna": PairWriter(tmp_path / "antenna", {**mounting.facts(), **shows}, NO_FLOOR),
        "camera": PairWriter(tmp_path / "camera", {"camera_yaw": 0.2, **shows}, NO_FLOOR),
    }
    cameras = []
    for k in range(20):
        # 0.8 m a frame around a circle of 20 m.
        turn = 0.04 * k
        east, north = 20.0 * math.sin(turn), 20.0 * (1.0 - math.cos(turn))
        cameras.append(np.array([east, north]) + in_enu(mounting.camera, turn))
        for name, writer in writers.items():
            lever = np.array(in_enu(getattr(mounting, name), turn))
            lat, lon = PLANE.inverse(east + lever[0], north + lever[1])
            writer.add_odometry(T0 + k * 10**8, odometry(k, 8.0))
            writer.add(dataclasses.replace(pair(k), lat=lat, lon=lon, heading=turn, camera=None), tile(0))
    for writer in writers.values():
        writer.close()
    own, plain = (PairDataset([tmp_path / name], spec) for name in writers)
    for k in range(20):
        np.testing.assert_allclose(own[k]["fix"], plain[k]["fix"], atol=1e-4)  # pixels
        assert torch.equal(own[k]["ground"], plain[k]["ground"])
    track = own.track()
    np.testing.assert_allclose(track.lat, plain.track().lat, atol=1e-9)
    np.testing.assert_allclose(track.lon, plain.track().lon, atol=1e-9)
    np.testing.assert_allclose(track.moved[1:], np.diff(cameras, axis=0), atol=2e-3)
    # Without the lever arm the steps are those of the vehicle's origin, and the places are the fixes'.
    assert np.abs(plain.track().moved[1:] - np.diff(cameras, axis=0)).max() > 0.05
