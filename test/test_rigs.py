"""Rigs of cameras in the simulated city: the panorama they make is that of one camera in their middle."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from checkerboard import corners, found, paved

from xview_loc.camera import PanoramaCamera
from xview_loc.rig import MountedCamera, Rig, tilt_matrix
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.rigs import RIGS, VehiclePose, make_rig, render_rig
from xview_loc.simulation.views import CameraPose, PanoramaView, render_panorama

ELEVATION = (math.radians(30.0), math.radians(-60.0))
LENS = PanoramaCamera(512, 128, *ELEVATION)
LEVEL, TILTED = (0.0, 0.0), (math.radians(6.0), math.radians(-6.0))
PLACE = VehiclePose(20.0, 10.0, 0.3)


@pytest.fixture(scope="module")
def board() -> City:
    return paved()


@pytest.fixture(scope="module")
def city() -> City:
    return build_city(5, "source", size_m=420.0)


def middle(pose: VehiclePose, rig: Rig) -> CameraPose:
    """Level pose of the middle of a rig's cameras."""
    forward, left, up = tilt_matrix(pose.roll, pose.pitch) @ rig.centre
    cos, sin = math.cos(pose.heading), math.sin(pose.heading)
    east, north = pose.east + cos * forward - sin * left, pose.north + sin * forward + cos * left
    return CameraPose(east, north, pose.heading, pose.height + up)


@pytest.mark.parametrize("name", RIGS)
def test_cameras_are_where_vehicles_have_them(name: str) -> None:
    rig = make_rig(name, 0.5)
    assert len(rig.cameras) == {"one": 1, "three": 3, "four": 4, "six": 6, "eight": 8}[name]
    for mounted in rig.cameras.values():
        assert 0.5 <= math.dist(mounted.position, rig.centre) <= 1.5 or name == "one"
        assert 1.2 <= mounted.position[2] <= 1.9
        looks = mounted.axes[:, 2]
        assert -0.3 < looks[2] < 0.0, "cameras look slightly down"
        # Away from the vehicle's middle, except where the rig is one camera.
        assert looks[:2] @ (np.array(mounted.position) - rig.centre)[:2] >= 0.0
        assert mounted.camera.width == 320


@pytest.mark.parametrize("name", RIGS)
@pytest.mark.parametrize("tilt", [LEVEL, TILTED], ids=["level", "tilted"])
def test_corners_of_a_checkerboard_are_where_the_middle_sees_them(
    board: City, name: str, tilt: tuple[float, float]
) -> None:
    rig, (roll, pitch) = make_rig(name), tilt
    pose = VehiclePose(3.0, -7.0, 0.4, roll=roll, pitch=pitch)
    fine = PanoramaCamera(2048, 512, *ELEVATION)
    panorama, mask = rig.view(render_rig(board, pose, rig), fine, roll=roll, pitch=pitch)
    points = corners(middle(pose, rig))
    pixels, _ = fine.project(points @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    window = cv2.erode(mask.astype(np.uint8), np.ones((25, 25)))
    at = np.clip(np.rint(pixels).astype(int), 0, (2047, 511))
    far = np.linalg.norm(points, axis=1)
    clear = window[at[:, 1], at[:, 0]].astype(bool) & (far > 3.5) & (far < 7.5)
    assert clear.sum() >= 4
    direct = render_panorama(board, middle(pose, rig), PanoramaView(512, 2048))
    seen = found(direct, pixels[clear])
    assert np.median(np.linalg.norm(seen - pixels[clear], axis=1)) < 0.25
    # Found in twice the resolution that models take at most.
    error = np.linalg.norm(found(panorama, pixels[clear]) - seen, axis=1) / 2
    assert np.median(error) < 0.15 and np.percentile(error, 90) < 0.5, error


@pytest.mark.parametrize("name", RIGS)
def test_a_tilted_rig_makes_the_level_panorama_of_its_middle(city: City, name: str) -> None:
    rig = make_rig(name)
    pose = replace(PLACE, roll=TILTED[0], pitch=TILTED[1])
    images = render_rig(city, pose, rig)
    direct = render_panorama(city, middle(pose, rig), PanoramaView(512, 2048))
    direct = cv2.resize(direct, (512, 128), interpolation=cv2.INTER_AREA).astype(int)

    def error(roll: float, pitch: float) -> float:
        panorama, mask = rig.view(images, LENS, roll=roll, pitch=pitch)
        return float(np.abs(panorama - direct)[mask].mean())

    assert error(*TILTED) < 8.0
    assert error(*TILTED) < 0.6 * error(*LEVEL)


def test_exposures_differ_between_cameras(city: City) -> None:
    rig = make_rig("three", 0.25)
    plain = render_rig(city, PLACE, rig)
    exposed = render_rig(city, PLACE, rig, rng=np.random.default_rng(3))
    gains = [exposed[name].mean() / plain[name].mean() for name in rig.cameras]
    assert np.ptp(gains) > 0.02 and all(0.7 < gain < 1.4 for gain in gains)


def test_vehicles_lean_out_of_curves_and_dip_when_braking(city: City) -> None:
    options = DriveOptions(rate_hz=10.0, dynamics=True)
    frames = list(drive(city, 1200, 1, options=options, view=None))
    truth = [frame.truth for frame in frames]
    roll, pitch = np.array([(t.roll, t.pitch) for t in truth]).T
    sideways = np.array([t.speed * t.yaw_rate for t in truth])
    braking = -np.gradient([t.speed for t in truth], 0.1)
    assert roll[sideways > 1.0].mean() > roll[sideways < -1.0].mean() + math.radians(1.0)
    assert pitch[braking > 1.0].mean() > pitch[braking < -1.0].mean() + math.radians(0.5)
    assert math.radians(0.7) < roll.std() < math.radians(2.5) and np.abs(roll).max() < math.radians(9.0)
    assert math.radians(0.7) < pitch.std() < math.radians(2.5) and np.abs(pitch).max() < math.radians(9.0)
    measured = np.array([(frame.roll, frame.pitch) for frame in frames])
    error = measured - np.stack([roll, pitch], 1)
    assert 0.0 < np.sqrt((error**2).mean()) < 3 * frames[0].tilt_std
    # Everything else is as in a drive without.
    plain = list(drive(city, 1200, 1, options=replace(options, dynamics=False), view=None))
    for with_dynamics, without in zip(frames, plain, strict=True):
        assert (with_dynamics.fix.lat, with_dynamics.heading) == (without.fix.lat, without.heading)
    assert max(abs(frame.truth.roll) for frame in plain) < math.radians(3.0)


def test_a_drive_with_a_rig_sees_what_the_rig_would(city: City) -> None:
    rig = make_rig("three", 0.25)
    frames = list(drive(city, 12, 1, options=DriveOptions(rate_hz=1.0), view=rig))
    assert all(frame.image is None and list(frame.images) == ["front", "left", "right"] for frame in frames)
    assert max(abs(frame.truth.roll) for frame in frames) > math.radians(1.0), "rigs tilt by default"
    truth = frames[-1].truth
    pose = VehiclePose(truth.east, truth.north, truth.heading, roll=truth.roll, pitch=truth.pitch)
    images = render_rig(city, pose, rig)
    for name, image in frames[-1].images.items():
        assert image.shape == (90, 160, 3)
        # Traffic, exposure and noise are the drive's.
        assert np.corrcoef(image.mean(-1).ravel(), images[name].mean(-1).ravel())[0, 1] > 0.9


def test_panoramas_of_a_tilting_vehicle_are_exact(city: City) -> None:
    """Levelled by the true tilt they are as level ones."""
    options = DriveOptions(rate_hz=1.0, dynamics=True, height_noise_m=0.0)
    view = PanoramaView(256, 512, 90.0, -90.0)
    frames = list(drive(city, 10, 1, options=options, view=view))
    rig = Rig({"all": MountedCamera(view.camera)}, height=1.7)
    errors = []
    for frame in frames:
        truth, image = frame.truth, frame.image
        assert image is not None
        tilt = {"roll": truth.roll, "pitch": truth.pitch}
        upright, _ = rig.view({"all": image}, LENS, **tilt)
        pose = CameraPose(truth.east, truth.north, truth.heading, city.style.camera_height_m)
        level = render_panorama(city, pose, PanoramaView(128, 512))
        blurred = [cv2.GaussianBlur(i, (0, 0), 2.0).mean(-1).ravel() for i in (upright, level)]
        errors.append(1.0 - np.corrcoef(*blurred)[0, 1])
    assert np.median(errors) < 0.02, errors


def test_all_cameras_see_the_same_cars(city: City) -> None:
    """Also a car beside the vehicle, nearer to one camera than to another."""
    pose = VehiclePose(0.0, 0.0, 0.0)
    rig = make_rig("four", 0.5)
    red = np.array([[230.0, 10.0, 10.0]], np.float32)
    no_cars = replace(city.cars, centre=city.cars.centre + 1e4)
    empty = replace(city, cars=no_cars, height=np.zeros_like(city.height))

    def reddish(forward: float, left: float) -> dict[str, int]:
        car = replace(
            no_cars,
            centre=np.array([[forward, left]]),
            axis=np.array([[1.0, 0.0]]),
            colour=red,
            scale=np.ones(1, np.float32),
        )
        images = render_rig(empty, pose, rig, traffic=car)
        return {n: int((i[..., 0].astype(int) - i[..., 1] > 60).sum()) for n, i in images.items()}

    beside = reddish(0.2, -2.8)  # 1.85 m from the right camera
    assert beside["right"] > beside["front"] > 100 and beside["rear"] > 100
    # Where the vehicle is itself no car can be.
    assert max(reddish(1.0, 0.0).values()) < 20  # roofs far away
