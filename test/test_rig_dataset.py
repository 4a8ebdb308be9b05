"""Upright panoramas that a model gets from pairs: of a rig, of a tilted panorama, of one pinhole camera."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from map_fixtures import texture

from xview_loc.bags.recovery import BagError
from xview_loc.bags.ros_types import header, message, serialize
from xview_loc.bags.writer import BagLimits
from xview_loc.camera import CameraModel
from xview_loc.datasets.base import DatasetError
from xview_loc.datasets.pairs import PairDataset
from xview_loc.images import decode_compressed
from xview_loc.maps.base import AerialTile
from xview_loc.models.inputs import denormalise, ground_image
from xview_loc.models.specs import ModelSpec
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.rig import MountedCamera, Rig, directions, facing, rotation_matrix, tilt_matrix
from xview_loc.simulation.rigs import looking
from xview_loc.training.turned_panoramas import turn_back, turn_panoramas
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.tilt import TiltSample
from xview_loc.vehicle.transforms import Transform

LAT, LON = 48.2, 16.37
T0 = 1_700_000_000 * 10**9
SPEC = ModelSpec("stub", "panorama", (64, 256), 64, 0.5, bins=8, elevation_deg=(30.0, -60.0))
PINHOLE = ModelSpec(
    "pin", "pinhole", (48, 128), 64, 0.5, bins=8, aerial_up="left", intrinsics=(64.0, 64.0, 63.5, 23.5)
)
TILT = TiltSample(T0, math.radians(6.0), math.radians(-5.0))
HEADING = 0.7
KIND = "sensor_msgs/msg/CompressedImage"
# 106 degrees wide and high.
CAMERA = CameraModel(320, 320, (120.0, 0, 159.5, 0, 120.0, 159.5, 0, 0, 1))
YAWS = {"front": 0.0, "left": math.pi / 2, "rear": math.pi, "right": -math.pi / 2}


@pytest.fixture(scope="module")
def world() -> np.ndarray:
    """What is seen from one place, in all directions; the middle looks along the vehicle's x axis."""
    noise = np.random.default_rng(0).normal(size=(512, 1024, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(np.hstack([noise] * 3), (0, 0), 16.0)[:, 1024:2048]
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def look(world: np.ndarray, rays: np.ndarray, tilt: TiltSample | None) -> np.ndarray:
    """Return what a vehicle of this tilt sees along ``rays`` (h, w, 3) of its axes."""
    level = rays @ tilt_matrix(tilt.roll, tilt.pitch).T if tilt else rays
    x, y, z = np.moveaxis(level / np.linalg.norm(level, axis=-1, keepdims=True), -1, 0)
    column = (0.5 - np.arctan2(y, x) / (2 * math.pi)) * 1024 - 0.5
    row = (0.5 - np.arcsin(z) / math.pi) * 512 - 0.5
    pixels = column.astype(np.float32), row.astype(np.float32)
    return cv2.remap(world, *pixels, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def photograph(world: np.ndarray, yaw: float, tilt: TiltSample | None) -> np.ndarray:
    column, row = np.meshgrid(np.arange(320.0), np.arange(320.0))
    optical = np.stack([(column - 159.5) / 120.0, (row - 159.5) / 120.0, np.ones((320, 320))], -1)
    return look(world, optical @ rotation_matrix(facing(yaw)).T, tilt)


def panorama(world: np.ndarray, tilt: TiltSample | None) -> np.ndarray:
    turn, up = np.meshgrid(
        (0.5 - (np.arange(1024) + 0.5) / 1024) * 2 * math.pi, (0.5 - (np.arange(512) + 0.5) / 512) * math.pi
    )
    rays = np.stack([np.cos(up) * np.cos(turn), np.cos(up) * np.sin(turn), np.sin(up)], -1)
    return look(world, rays, tilt)


def jpeg(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1])


def taken(name: str, image: np.ndarray) -> CameraImage:
    data = np.frombuffer(jpeg(image), np.uint8)
    value = message(KIND, header=header(T0, name), format="jpeg", data=data)
    return CameraImage(name, T0, KIND, serialize(KIND, value))


def about(axis: int, angle: float) -> list[float]:
    turn = [0.0, 0.0, 0.0, math.cos(angle / 2)]
    turn[axis] = math.sin(angle / 2)
    return turn


def rig(names: Mapping[str, float] = YAWS) -> Rig:
    return Rig({name: MountedCamera(CAMERA, (0.0, 0.0, 1.6), facing(yaw)) for name, yaw in names.items()})


def write(
    folder: Path,
    *pairs: Pair,
    rig: Rig | None = None,
    facts: Mapping[str, Any] | None = None,
    tile_px: int = 64,
) -> Path:
    writer = PairWriter(folder, facts or {}, BagLimits(min_free_bytes=0), rig)
    for pair in pairs:
        writer.add(pair, AerialTile(texture(tile_px, tile_px), LAT, LON, 0.5, 1.0))
    writer.close()
    return folder


def pair(**fields: Any) -> Pair:
    defaults = {"image_format": "", "image_bytes": b"", "heading": HEADING}
    return Pair(**{"stamp_ns": T0, "lat": LAT, "lon": LON, **defaults, **fields})


def ground(folder: Path, index: int = 0, spec: ModelSpec = SPEC) -> np.ndarray:
    """The image that the model gets, (h, w, 3) in [0, 255]."""
    return 255.0 * denormalise(PairDataset([folder], spec)[index]["ground"], spec)


def wanted(world: np.ndarray) -> np.ndarray:
    """The same of a level panorama of the model's elevations."""
    return ground_image(world[512 // 3 : 512 * 5 // 6], SPEC, heading=HEADING, camera=None)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def test_a_tilted_rig_makes_an_upright_panorama(world: np.ndarray, tmp_path: Path) -> None:
    images = tuple(taken(name, photograph(world, yaw, TILT)) for name, yaw in YAWS.items())
    folder = write(
        tmp_path / "a", pair(images=images, tilt=TILT), pair(images=images, stamp_ns=T0 + 1), rig=rig()
    )
    # The cameras see down to 53 degrees, less between them.
    assert difference(ground(folder)[:40], wanted(world)[:40]) < 4.0
    assert difference(ground(folder, 1)[:40], wanted(world)[:40]) > 10.0  # taken as level


def test_a_missing_camera_leaves_the_mean_colour(world: np.ndarray, tmp_path: Path) -> None:
    images = tuple(taken(name, photograph(world, yaw, None)) for name, yaw in YAWS.items() if name != "rear")
    folder = write(tmp_path / "a", pair(images=images, heading=math.pi / 2), rig=rig())
    sample = PairDataset([folder], SPEC)[0]["ground"]
    # North is in the middle, and the vehicle looks there: south, at both ends, is not seen.
    unseen = torch.cat([sample[:, :40, :20], sample[:, :40, -20:]], 2)
    assert unseen.abs().max() < 0.02
    assert sample[:, 20:40, 40:-40].abs().mean() > 0.2
    turned = turn_panoramas({"ground": sample[None], "heading": torch.zeros(1)}, np.array([100]))
    assert torch.equal(turn_back(turned)["ground"][0], sample)


@pytest.mark.parametrize("yaw", [0.0, 2.0])
def test_a_tilted_panorama_is_levelled_and_cut(world: np.ndarray, tmp_path: Path, yaw: float) -> None:
    """Twice as wide as high, it shows all directions; the model wants a part of them."""
    turned = np.roll(panorama(world, TILT), round(yaw / (2 * math.pi) * 1024), 1)
    tilted = pair(image_format="jpeg", image_bytes=jpeg(turned), tilt=TILT)
    level = replace(tilted, stamp_ns=T0 + 1, tilt=None, image_bytes=jpeg(world))
    folder = write(tmp_path / "a", tilted, facts=Mounting(camera_yaw=yaw).facts())
    assert difference(ground(folder), wanted(world)) < 4.0
    assert difference(ground(write(tmp_path / "b", level)), wanted(world)) < 4.0


def test_panoramas_in_the_model_s_elevations_stay_as_they_are(world: np.ndarray, tmp_path: Path) -> None:
    strip = decode_compressed(jpeg(world[171:427]))
    folder = write(tmp_path / "a", pair(image_format="jpeg", image_bytes=jpeg(world[171:427])))
    as_it_is = ground_image(strip, SPEC, heading=HEADING, camera=None)
    assert difference(ground(folder), as_it_is) < 0.01


def test_what_panoramas_show_may_be_said(world: np.ndarray, tmp_path: Path) -> None:
    """A strip from 45 to -45 degrees, of which the model takes the part from 30 degrees down."""
    strip = pair(image_format="jpeg", image_bytes=jpeg(world[128:384]))
    strip = replace(strip, camera=CAMERA)  # some drivers of panoramic cameras send one
    folder = write(tmp_path / "a", strip, facts={"panorama_elevation_deg": [45, -45]})
    assert difference(ground(folder)[:52], wanted(world)[:52]) < 4.0
    level = pair(image_format="jpeg", image_bytes=jpeg(world))
    unknown = write(tmp_path / "unknown", level, facts={"panorama_elevation_deg": [0.0, 0.0]})
    assert difference(ground(unknown), wanted(world)) < 4.0
    assert difference(ground(folder)[56:], np.array([124, 116, 104])) < 1.0
    for given in ([10], "x", [0, 10], [math.nan, 0], {"a": 1}):
        with pytest.raises(BagError, match="has no usable panorama_elevation_deg"):
            PairDataset([write(tmp_path / str(given), strip, facts={"panorama_elevation_deg": given})], SPEC)


def test_a_panorama_may_be_mounted_askew(world: np.ndarray, tmp_path: Path) -> None:
    """The pair logger stores what tf says; it acts as a tilt of the vehicle would."""
    turns = [
        Transform(np.zeros(3), np.array(q)) for q in (about(1, TILT.pitch), about(0, TILT.roll), facing(0.0))
    ]
    quaternion = (turns[0] @ turns[1] @ turns[2]).rotation.tolist()
    askew = pair(image_format="jpeg", image_bytes=jpeg(panorama(world, TILT)))
    folder = write(tmp_path / "a", askew, facts={"camera_rotation": quaternion})
    assert difference(ground(folder), wanted(world)) < 4.0
    for given in ([0, 0, 0, 0], [1, 0, 0], "abcd", [math.nan, 0, 0, 1]):
        with pytest.raises(BagError, match="has no usable camera_rotation, a quaternion"):
            PairDataset([write(tmp_path / str(given), askew, facts={"camera_rotation": given})], SPEC)


def test_a_single_camera_has_a_mask(world: np.ndarray, tmp_path: Path) -> None:
    """Where the roof and the rider are, the model sees nothing."""
    own = np.zeros((256, 1024), bool)
    own[200:] = True
    writer = PairWriter(tmp_path / "a", {}, BagLimits(min_free_bytes=0), own_mask=own)
    whole = world[171 : 171 + 256]
    for k, image in enumerate((whole, whole[::2, ::2])):
        one = pair(stamp_ns=T0 + k, image_format="jpeg", image_bytes=jpeg(image))
        writer.add(one, AerialTile(texture(64, 64), LAT, LON, 0.5, 1.0))
    writer.close()
    seen = ground(tmp_path / "a")
    assert difference(seen[:48], wanted(world)[:48]) < 4.0
    assert difference(seen[52:], np.array([124, 116, 104])) < 1.0
    with pytest.raises(BagError, match=r"pair 1 .*: the camera has a mask of 1024 x 256 pixels, but images"):
        ground(tmp_path / "a", 1)
    own[:] = True
    writer = PairWriter(tmp_path / "all", {}, BagLimits(min_free_bytes=0), own_mask=own)
    writer.add(pair(image_format="jpeg", image_bytes=jpeg(world)), None)
    writer.close()
    with pytest.raises(BagError, match=r"the mask in .* cannot be used: .* hides the whole image"):
        PairDataset([tmp_path / "all"], SPEC)


def test_one_pinhole_camera_is_a_rig_of_one(world: np.ndarray, tmp_path: Path) -> None:
    for name, yaw in (("ahead", 0.0), ("left", 1.0)):
        image = photograph(world, yaw, TILT)
        single = pair(image_format="jpeg", image_bytes=jpeg(image), camera=CAMERA, tilt=TILT)
        bag = write(tmp_path / f"single {name}", single, facts=Mounting(camera_yaw=yaw).facts())
        of_rig = pair(images=(taken("front", image),), tilt=TILT)
        one = ground(write(tmp_path / f"rig {name}", of_rig, rig=rig({"front": yaw})))
        assert difference(ground(bag), one) < 0.01
        seen = np.abs(one - (124, 116, 104)).max(-1) > 2.0
        assert 0.1 < seen[:40].mean() < 0.4
        assert difference(one[seen], wanted(world)[seen]) < 5.0


def test_the_middle_of_the_cameras_is_where_the_panorama_is_seen_from(
    world: np.ndarray, tmp_path: Path
) -> None:
    """The antenna is 2 m ahead of base_link, the cameras are 1 m behind: 3 m, 6 pixels."""
    cameras = {
        "front": MountedCamera(CAMERA, (-0.5, 0.3, 1.6)),
        "up": MountedCamera(CAMERA, (-1.5, -0.3, 1.6)),
    }
    images = (taken("front", photograph(world, 0.0, None)),)
    folder = write(
        tmp_path / "a", pair(images=images, heading=0.0), rig=Rig(cameras), facts=Mounting((2.0, 0.0)).facts()
    )
    row, col = PairDataset([folder], SPEC)[0]["fix"].tolist()
    assert (row, col) == pytest.approx((31.5, 31.5 - 6.0), abs=1e-3)


def test_copies_in_other_processes(world: np.ndarray, tmp_path: Path) -> None:
    images = tuple(taken(name, photograph(world, yaw, TILT)) for name, yaw in YAWS.items())
    dataset = PairDataset([write(tmp_path / "a", pair(images=images, tilt=TILT), rig=rig())], SPEC)
    first = dataset[0]
    again = pickle.loads(pickle.dumps(dataset))[0]
    assert torch.equal(first["ground"], again["ground"])


def test_drives_of_one_vehicle_share_its_look_up_tables(world: np.ndarray, tmp_path: Path) -> None:
    """They are megabytes for each tilt, and a data loader's worker opens all drives."""
    images = tuple(taken(name, photograph(world, yaw, TILT)) for name, yaw in YAWS.items())
    one = pair(images=images, tilt=TILT)
    folders = [write(tmp_path / str(k), one, rig=rig()) for k in range(6)]
    spec = replace(SPEC, ground_size=(128, 512))

    def held(count: int) -> int:
        data = PairDataset(folders[:count], spec)
        tracemalloc.start()
        for k in range(count):
            assert data[k]["index"] == k
        try:
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    held(1)  # the lens's directions stay in memory
    assert held(6) < 1.5 * held(2)
    # Another vehicle keeps its own rig.
    turned = {name: yaw + 1.0 for name, yaw in YAWS.items()}
    other = write(tmp_path / "other", one, rig=rig(turned))
    both = PairDataset([folders[0], other], SPEC)
    assert torch.equal(both[0]["ground"], PairDataset([folders[0]], SPEC)[0]["ground"])
    assert torch.equal(both[1]["ground"], PairDataset([other], SPEC)[0]["ground"])
    assert not torch.equal(both[0]["ground"], both[1]["ground"])


@pytest.mark.parametrize("yaw", [0.0, 2.0])
@pytest.mark.parametrize("cameras", ["one", "rig"])
def test_pairs_for_a_model_of_tiles_turned_to_the_heading(
    world: np.ndarray, tmp_path: Path, yaw: float, cameras: str
) -> None:
    """A single camera is what looks; a rig looks along the vehicle's x axis."""
    if cameras == "rig":
        yaws = {name: at + yaw for name, at in YAWS.items()}
        images = tuple(taken(name, photograph(world, at, TILT)) for name, at in yaws.items())
        folder = write(tmp_path / "a", pair(images=images, tilt=TILT), rig=rig(yaws), tile_px=92)
        looking = 0.0
    else:
        image, looking = jpeg(photograph(world, yaw, TILT)), yaw
        one = pair(image_format="jpeg", image_bytes=image, camera=CAMERA, tilt=TILT)
        facts = Mounting(camera=(2.0, 1.0), camera_yaw=yaw).facts()
        folder = write(tmp_path / "a", one, facts=facts, tile_px=92)
    c, s = math.cos(looking), math.sin(looking)
    level = directions(PINHOLE.lens) @ np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    assert difference(ground(folder, spec=PINHOLE), look(world, level, None)) < 4.0
    sample = PairDataset([folder], PINHOLE)[0]
    assert float(sample["turn"]) == pytest.approx(HEADING + looking, abs=1e-6)
    assert sample["intrinsics"].tolist() == [[64.0, 0.0, 63.5], [0.0, 64.0, 23.5], [0.0, 0.0, 1.0]]
    tile = AerialTile(texture(92, 92), LAT, LON, 0.5, 1.0).rotated(HEADING + looking, 64)
    assert difference(255.0 * denormalise(sample["aerial"], PINHOLE), tile.image) < 0.6
    ahead, left = (2.0, 1.0) if cameras == "one" else (0.0, 0.0)
    h = HEADING
    east, north = ahead * math.cos(h) - left * math.sin(h), ahead * math.sin(h) + left * math.cos(h)
    assert sample["fix"].tolist() == pytest.approx(tile.enu_to_pixel(east, north), abs=1e-3)


def test_pairs_that_do_not_fit_a_model_of_turned_tiles(world: np.ndarray, tmp_path: Path) -> None:
    image = jpeg(photograph(world, 0.0, None))
    one = pair(image_format="jpeg", image_bytes=image, camera=CAMERA)
    with pytest.raises(DatasetError, match=r"have 64 px .*, pin needs 92 px at 0.5 m/px: .* --model pin"):
        PairDataset([write(tmp_path / "small", one)], PINHOLE)[0]
    folder = write(tmp_path / "north", replace(one, heading=None), tile_px=92)
    with pytest.raises(BagError, match=r"pair 0 of .* has no heading, .*, and pin needs tiles turned to it"):
        PairDataset([folder], PINHOLE)[0]
    folder = write(tmp_path / "raw", replace(one, camera=None), tile_px=92)
    with pytest.raises(BagError, match=r"pair 0 of .*: its image has no calibration, and pin needs one"):
        PairDataset([folder], PINHOLE)[0]


def test_a_photograph_without_calibration_is_no_panorama(world: np.ndarray, tmp_path: Path) -> None:
    one = pair(image_format="jpeg", image_bytes=jpeg(photograph(world, 0.0, None)), camera=None)
    with pytest.raises(BagError, match=r"pair 0 of .*: an image of .* is no panorama from .*: publish its"):
        ground(write(tmp_path / "a", one), spec=SPEC)


@pytest.mark.parametrize("told", [True, False])
def test_a_camera_may_be_turned_afterwards(world: np.ndarray, tmp_path: Path, told: bool) -> None:
    """What else the bag says of the mounting stays."""
    stored = Mounting(antenna=(1.0, 0.0), camera=(2.0, 0.5), camera_yaw=0.3)
    facts = stored.facts()
    if told:  # it looks down, too
        facts["camera_rotation"] = list(looking(math.degrees(0.3), 10.0))
    one = pair(image_format="jpeg", image_bytes=jpeg(photograph(world, 0.3, None)), camera=CAMERA)
    before = write(tmp_path / "a", one, facts=facts, tile_px=92)
    import_bag(before, tmp_path / "b", None, ImportOptions(camera_yaw=-0.2))
    bag = PairBag(tmp_path / "b")
    assert Mounting.of(bag.session()) == replace(stored, camera_yaw=-0.2)
    down = 10.0 if told else 0.0
    wanted = rotation_matrix(looking(math.degrees(-0.2), down))
    assert rotation_matrix(bag.camera_rotation()) == pytest.approx(wanted, abs=1e-9)


def test_pairs_that_do_not_fit_say_so(world: np.ndarray, tmp_path: Path) -> None:
    image = photograph(world, 0.0, None)
    small = pair(images=(taken("front", image[:100]),))
    with pytest.raises(BagError, match=r"pair 0 of .*: the image of camera front has 320 x 100 pixels"):
        PairDataset([write(tmp_path / "small", small, rig=rig())], SPEC)[0]
    single = pair(image_format="jpeg", image_bytes=jpeg(image[:100]), camera=CAMERA)
    with pytest.raises(BagError, match=r"pair 0 of .*: the image has 320 x 100 pixels, but its calibration"):
        PairDataset([write(tmp_path / "single", single)], SPEC)[0]
    up = MountedCamera(CAMERA, rotation=(0.0, 0.0, 0.0, 1.0))
    sky = write(tmp_path / "sky", pair(images=(taken("up", image),)), rig=Rig({"up": up}))
    low = replace(SPEC, elevation_deg=(-10.0, -60.0))
    with pytest.raises(BagError, match=r"the cameras show less than 0\.5 % of what"):
        PairDataset([sky], low)[0]
