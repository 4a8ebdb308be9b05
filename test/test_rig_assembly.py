"""Sets of images of several cameras."""

from __future__ import annotations

from contextlib import suppress

import pytest

from xview_loc.vehicle.rig_assembly import CameraImage, RigAssembly, middle_ns
from xview_loc.vehicle.synchronisation import RejectedInput, StampNotNewerError

MS = 1_000_000
T0 = 1_000_000 * MS


class Cameras:
    """Cameras that feed an assembly; ``sets``: what it released, as names and stamps in ms."""

    def __init__(self, *names: str, tolerance_s: float = 0.02) -> None:
        self.assembly = RigAssembly(names, tolerance_s)
        self.sets: list[dict[str, int]] = []
        self.now = 0

    def send(self, name: str, ms: int) -> None:
        self._take(self.assembly.add(CameraImage(name, T0 + ms * MS, "", b"", self.now)))

    def wait(self, ms: int) -> None:
        self.now += ms * MS
        self._take(self.assembly.overdue(self.now))

    def _take(self, sets: list[tuple[CameraImage, ...]]) -> None:
        self.sets += [{image.name: (image.stamp_ns - T0) // MS for image in images} for images in sets]


def test_a_complete_set_is_released_at_once() -> None:
    cameras = Cameras("front", "left", "right")
    for name, ms in (("right", 3), ("front", 0), ("left", 20)):
        assert cameras.sets == []
        cameras.send(name, ms)
    assert cameras.sets == [{"front": 0, "left": 20, "right": 3}]
    assert not cameras.assembly.waiting


def test_images_further_apart_are_of_two_sets() -> None:
    cameras = Cameras("front", "left")
    cameras.send("front", 0)
    cameras.send("left", 21)
    assert cameras.sets == [{"front": 0}]
    cameras.send("front", 30)
    assert cameras.sets == [{"front": 0}, {"front": 30, "left": 21}]


def test_the_next_image_of_a_camera_begins_a_set() -> None:
    cameras = Cameras("front", "left", tolerance_s=0.2)
    cameras.send("front", 0)
    cameras.send("front", 100)
    cameras.send("left", 100)
    assert cameras.sets == [{"front": 0}, {"front": 100, "left": 100}]


def test_an_incomplete_set_waits_for_the_tolerance() -> None:
    cameras = Cameras("front", "left", tolerance_s=0.08)
    cameras.send("front", 0)
    cameras.wait(79)
    assert cameras.sets == []
    cameras.wait(1)
    assert cameras.sets == [{"front": 0}]
    cameras.wait(100)
    assert cameras.sets == [{"front": 0}]


def test_late_images_are_refused_and_begin_no_set() -> None:
    cameras = Cameras("front", "left")
    cameras.send("front", 0)
    cameras.wait(60)
    for ms in (1, 2):
        with pytest.raises(RejectedInput, match="came after the others of its instant were used") as caught:
            cameras.send("left", ms)
        assert caught.value.reason == "image_late"
        cameras.send("front", 100 * ms)
    cameras.send("left", 200)
    assert cameras.sets == [{"front": 0}, {"front": 100}, {"front": 200, "left": 200}]


def test_fast_cameras_are_not_late() -> None:
    cameras = Cameras("front", "left", tolerance_s=0.05)
    for ms in (0, 33, 66):
        cameras.send("front", ms)
        cameras.send("left", ms)
    assert [found["front"] for found in cameras.sets] == [0, 33, 66]


def test_stamps_that_do_not_grow_are_refused() -> None:
    cameras = Cameras("front", "left")
    cameras.send("front", 10)
    with pytest.raises(StampNotNewerError):
        cameras.send("front", 10)


def test_time_may_start_again() -> None:
    cameras = Cameras("front", "left")
    for ms in (5000, 0):
        cameras.send("front", ms)
        cameras.send("left", ms)
    assert cameras.sets == [{"front": 5000, "left": 5000}, {"front": 0, "left": 0}]


def test_faults_name_cameras_that_are_missing() -> None:
    cameras = Cameras("front", "left", "right", "rear")
    for ms in range(0, 2000, 100):
        cameras.send("front", ms)
        if ms < 500:
            cameras.send("left", ms)
        cameras.send("right", ms + 50)
        cameras.wait(100)
    faults = cameras.assembly.faults()
    assert faults["rear"] == "it has sent no usable image"
    assert faults["left"] == "it has sent no usable image for 2 s"
    assert "its stamps are more than 0.02 s (rig_tolerance_s) away" in faults["right"]
    assert cameras.assembly.missing([CameraImage("left", 0, "", b"")]) == ["front", "right", "rear"]


def drive(cameras: Cameras, names: str, *, ahead: dict[str, int], late: dict[str, int]) -> set[str]:
    """Three seconds at 10 Hz; stamps are ``ahead``, images ``late`` by ms. Return why images were refused."""
    reasons = set()
    start = cameras.now // MS
    arrivals = [(ms + late.get(name, 0), ms, name) for ms in range(0, 3000, 100) for name in names.split()]
    for at, ms, name in sorted(arrivals):
        cameras.wait(max(0, start + at - cameras.now // MS))
        try:
            cameras.send(name, ms + ahead.get(name, 0))
        except RejectedInput as error:
            reasons.add(f"{name} {error.reason}")
    cameras.wait(100)
    return reasons


@pytest.mark.parametrize("ahead", [3_600_000, 700, -700, -900_000])
def test_a_camera_with_another_clock_does_not_disturb_the_others(ahead: int) -> None:
    cameras = Cameras("front", "left", "right", "rear")
    reasons = drive(cameras, "front left right rear", ahead={"left": ahead}, late={"right": 3, "rear": 9})
    assert "left image_clock" in reasons
    # With the first images nobody knows which clock is wrong.
    assert cameras.sets[-28:] == [{"front": ms, "right": ms, "rear": ms} for ms in range(200, 3000, 100)]
    way = f"{abs(ahead) / 1000:.1f} s {'ahead of' if ahead > 0 else 'behind'} those of the other cameras"
    assert list(cameras.assembly.faults()) == ["left"] and way in cameras.assembly.faults()["left"]


def test_a_camera_that_arrives_late_is_said() -> None:
    cameras = Cameras("front", "left", "right")
    assert drive(cameras, "front left right", ahead={}, late={"left": 80}) == {"left image_late"}
    text = "after the others of its instant were used: they wait 0.05 s (rig_tolerance_s)"
    assert text in cameras.assembly.faults()["left"]


def test_of_two_clocks_the_fault_names_the_difference() -> None:
    cameras = Cameras("front", "left")
    drive(cameras, "front left", ahead={"left": -900_000}, late={})
    assert "its stamp is 900.0 s before those of images used" in cameras.assembly.faults()["left"]


def test_a_single_stamp_from_the_future_costs_an_observation() -> None:
    cameras = Cameras("front", "left", "right")
    for ms in range(0, 1000, 100):
        for name in ("front", "right", "left"):
            with suppress(RejectedInput):
                cameras.send(name, 60_000 if (name, ms) == ("left", 200) else ms)
        cameras.wait(100)
    assert [len(found) for found in cameras.sets] == [3, 3, 2, 1, 1, *[3] * 6]


@pytest.mark.parametrize("step", [700, 3000])
def test_recordings_may_be_played_fast(step: int) -> None:
    cameras = Cameras("front", "left", "right", "rear")
    for ms in range(0, 10 * step, step):
        for name in ("front", "left", "right", "rear"):
            cameras.send(name, ms)
        cameras.wait(20)
    assert [len(found) for found in cameras.sets] == [4] * 10


def test_a_recording_that_is_played_again_goes_on_at_once() -> None:
    """Also one that jumps on."""
    for jump in (-2900, 60_000):
        cameras = Cameras("front", "left", "right", "rear")
        drive(cameras, "front left right rear", ahead={}, late={})
        seen = len(cameras.sets)
        names = "front left right rear"
        drive(cameras, names, ahead=dict.fromkeys(names.split(), 3000 + jump), late={})
        assert cameras.sets[seen:] == [
            dict.fromkeys(names.split(), ms + 3000 + jump) for ms in range(0, 3000, 100)
        ]


def test_a_camera_that_misses_now_and_then_is_no_fault() -> None:
    cameras = Cameras("front", "left")
    for ms in range(0, 4000, 100):
        cameras.send("front", ms)
        if ms % 300:
            cameras.send("left", ms)
        cameras.wait(60)
    assert len(cameras.sets) == 40
    assert cameras.assembly.faults() == {}


def test_an_observation_is_of_the_middle_of_its_stamps() -> None:
    images = [CameraImage(str(ms), T0 + ms * MS, "", b"") for ms in (20, 0, 2)]
    assert middle_ns(images) == T0 + 10 * MS
