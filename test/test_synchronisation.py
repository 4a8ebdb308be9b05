"""Fixes and headings at an image's stamp, and how images wait for them."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from xview_loc.vehicle.fix_gate import JumpGate
from xview_loc.vehicle.pairing import Paired, Pairing
from xview_loc.vehicle.synchronisation import (
    NS,
    GnssFix,
    HeadingSample,
    History,
    RejectedInput,
    StampNotNewerError,
    blend_fix,
    blend_heading,
)
from xview_loc.vehicle.tilt import TiltSample


def fix(t: float, lat: float, lon: float = 16.0) -> GnssFix:
    return GnssFix(round(t * NS), lat, lon, 0.0, None)


def fixes(*samples: GnssFix, max_age_s: float = 1.0) -> History[GnssFix]:
    history = History("fix", blend_fix, max_age_s)
    for sample in samples:
        history.add(sample)
    return history


def test_interpolates_between_neighbours():
    assert fixes(fix(1.0, 48.0), fix(2.0, 49.0)).at(round(1.25 * NS)).lat == pytest.approx(48.25)


def test_interpolates_across_the_antimeridian():
    between = fixes(fix(1.0, 0.0, 179.9), fix(2.0, 0.0, -179.9)).at(round(1.75 * NS))
    assert between.lon == pytest.approx(-179.95)


def test_heading_takes_the_shorter_arc():
    history = History("heading", blend_heading, 1.0)
    history.add(HeadingSample(1 * NS, math.radians(170.0), 0.1))
    history.add(HeadingSample(2 * NS, math.radians(-170.0), 0.1))
    assert abs(history.at(round(1.5 * NS)).yaw) == pytest.approx(math.pi)


def test_extrapolates_no_further_than_the_last_two_lie_apart():
    history = fixes(fix(1.0, 48.0), fix(1.2, 48.2), max_age_s=1.0)
    assert history.at(round(1.3 * NS)).lat == pytest.approx(48.3)
    assert history.at(round(2.1 * NS)).lat == pytest.approx(48.4)


def test_does_not_extrapolate_over_a_gap():
    assert fixes(fix(1.0, 48.0), fix(5.0, 49.0)).at(round(5.5 * NS)).lat == 49.0


def test_a_far_neighbour_is_not_used():
    assert fixes(fix(1.0, 48.0), fix(5.0, 49.0)).at(round(1.5 * NS)).lat == 48.0


def test_missing_and_stale_are_told_apart():
    with pytest.raises(RejectedInput) as missing:
        fixes().at(NS)
    with pytest.raises(RejectedInput) as stale:
        fixes(fix(1.0, 48.0)).at(3 * NS)
    assert (missing.value.reason, stale.value.reason) == ("fix_missing", "fix_stale")


def test_jitter_is_refused_and_a_restart_is_seen():
    history = fixes(fix(10.0, 48.0))
    with pytest.raises(StampNotNewerError):
        history.add(fix(9.9, 48.0))
    assert not history.went_back(round(9.9 * NS))
    assert history.went_back(NS)


def moved(t: float, north_m: float, sigma_m: float = 0.0) -> GnssFix:
    covariance = np.eye(3) * sigma_m**2 if sigma_m else None
    return GnssFix(round(t * NS), 48.0 + north_m / 111_200.0, 16.0, 0.0, covariance)


def refused(gate: JumpGate, fix: GnssFix) -> bool:
    try:
        gate.admit(fix)
    except RejectedInput as error:
        assert error.reason == "fix_jump"
        return True
    return False


def test_fixes_that_jump_are_refused_and_those_that_come_back_are_not():
    gate = JumpGate(40.0)
    drive = [moved(t, 12.0 * t) for t in range(10)]
    assert not any(refused(gate, fix) for fix in drive)
    assert all(refused(gate, moved(t, 12.0 * t + 100.0)) for t in range(10, 15))
    assert gate.admit(moved(15, 180.0)) == 0.0
    # As far to the other side is not back.
    assert refused(gate, moved(16, 292.0)) and refused(gate, moved(17, 20.0))


def test_a_jump_that_stays_is_believed_and_told():
    gate = JumpGate(40.0)
    gate.admit(moved(0, 0.0))
    assert all(refused(gate, moved(1 + t, 200.0 + 10.0 * t)) for t in range(10))
    assert gate.admit(moved(11, 300.0)) == pytest.approx(200.0, abs=1.0)
    assert gate.admit(moved(12, 310.0)) == 0.0


def test_jumps_that_do_not_agree_are_not_believed():
    gate = JumpGate(40.0)
    gate.admit(moved(0, 0.0))
    assert all(refused(gate, moved(t, 3000.0 * (t % 2 + 1))) for t in range(1, 40))


def test_no_alarm_between_tall_buildings_at_speed_or_after_a_tunnel():
    gate = JumpGate(40.0)
    rng = np.random.default_rng(0)
    # 5 Hz; an error that wanders by tens of metres within seconds, and steps of 30 m.
    wander = np.cumsum(rng.normal(0, 4.0, 300)) + 30.0 * (np.arange(300) // 50 % 2)
    assert not any(refused(gate, moved(0.2 * k, 2.4 * k + wander[k])) for k in range(300))
    assert not refused(gate, moved(120.0, 720.0 + wander[-1] + 1200.0))
    assert not any(refused(gate, moved(121.0 + t, 1920.0 + wander[-1] + 45.0 * t)) for t in range(5))


def test_a_fix_that_says_how_bad_it_is_may_jump_and_so_may_the_next():
    gate = JumpGate(40.0)
    gate.admit(moved(0, 0.0, 10.0))
    assert not refused(gate, moved(1, 160.0, 40.0))
    assert not refused(gate, moved(2, 0.0, 10.0))
    assert refused(gate, moved(3, 160.0, 10.0))


def test_an_honest_outlier_does_not_lock_accurate_fixes_out():
    gate = JumpGate(40.0)
    gate.admit(moved(0, 0.0, 3.0))
    assert not refused(gate, moved(20, 800.0, 200.0))  # at the end of a tunnel, 500 m off
    assert not any(refused(gate, moved(t, 300.0 + 15.0 * (t - 20), 3.0)) for t in range(21, 40))


def test_no_limit_no_refusal():
    gate = JumpGate(0.0)
    assert not any(refused(gate, moved(t, 1000.0 * (t % 2))) for t in range(5))


@dataclass(frozen=True)
class Picture:
    stamp_ns: int


class Driver:
    """Feeds a pairing; times and stamps in seconds."""

    def __init__(self, *, capacity: int = 16, use_heading: bool = False, use_tilt: bool = False) -> None:
        self.restarts: list[tuple[str, int]] = []
        self.pairing: Pairing[Picture] = Pairing(
            max_fix_age_s=1.0,
            max_heading_age_s=0.5,
            fix_max_jump_m=40.0,
            max_wait_s=0.1,
            use_heading=use_heading,
            use_tilt=use_tilt,
            on_restart=lambda name, dropped: self.restarts.append((name, dropped)),
            capacity=capacity,
        )

    def image(self, t: float, now: float) -> None:
        self.pairing.add_frame(Picture(round(t * NS)), round(now * NS))

    def heading(self, t: float) -> None:
        self.pairing.add_heading(HeadingSample(round(t * NS), 0.1, 0.05))

    def ready(self, now: float, fix_required: bool = True) -> list[float | str]:
        results = self.pairing.ready(round(now * NS), fix_required=fix_required)
        return [r.frame.stamp_ns / NS if isinstance(r, Paired) else r.reason for r in results]


def test_an_image_waits_for_later_samples_or_its_time_limit():
    driver = Driver(use_heading=True)
    driver.pairing.add_fix(moved(1.0, 0.0))
    driver.heading(1.0)
    driver.image(1.1, now=0.0)
    driver.image(1.2, now=0.05)
    driver.pairing.add_fix(moved(1.15, 0.0))
    assert driver.ready(0.05) == []
    driver.heading(1.15)
    assert driver.ready(0.05) == [1.1] and driver.pairing.waiting == 1
    assert driver.ready(0.15) == [1.2] and driver.pairing.waiting == 0


def test_an_image_gets_the_tilt_at_its_stamp_and_goes_without_if_there_is_none():
    driver = Driver(use_tilt=True)
    for t in (1.0, 2.0, 3.0):
        driver.pairing.add_fix(moved(t, 0.0))
    driver.pairing.add_tilt(TiltSample(NS, 0.1, 0.0))
    driver.image(1.25, now=0.0)
    assert driver.ready(0.0) == []
    driver.pairing.add_tilt(TiltSample(round(1.5 * NS), 0.2, -0.1))
    (paired,) = driver.pairing.ready(0)
    assert paired.tilt == TiltSample(round(1.25 * NS), pytest.approx(0.15), pytest.approx(-0.05))
    driver.image(2.5, now=0.0)
    (paired,) = driver.pairing.ready(NS)
    assert paired.frame == Picture(round(2.5 * NS)) and paired.tilt is None


def test_waiting_images_are_bounded():
    driver = Driver(capacity=4)
    driver.pairing.add_fix(moved(0.5, 0.0))
    for i in range(6):
        driver.image(0.6 + i / 100, now=0.0)
    assert driver.ready(0.0) == [0.6, 0.61]


def test_an_image_without_samples_is_rejected_for_what_it_lacks():
    driver = Driver(use_heading=True)
    driver.image(1.0, now=0.0)
    driver.image(2.0, now=0.0)
    driver.heading(2.0)
    assert driver.ready(1.0) == ["fix_missing", "fix_missing"]
    driver.image(3.0, now=0.0)
    assert driver.ready(1.0, fix_required=False) == ["heading_stale"]
    driver.image(4.0, now=0.0)
    driver.heading(4.0)
    assert driver.ready(1.0, fix_required=False) == [4.0]


def test_images_beside_fixes_that_jump_are_not_paired_with_them():
    driver = Driver()
    driver.pairing.add_fix(moved(1.0, 0.0))
    with pytest.raises(RejectedInput, match="jumped 500 m"):
        driver.pairing.add_fix(moved(2.0, 500.0))
    driver.image(1.5, now=0.0)
    driver.image(2.5, now=0.0)
    assert driver.ready(1.0) == [1.5, "fix_stale"]


def test_places_that_fixes_jumped_between_are_not_interpolated():
    driver = Driver()
    driver.pairing.add_fix(moved(0.0, 0.0))
    for t in range(10):
        with pytest.raises(RejectedInput):
            driver.pairing.add_fix(moved(0.9 + t, 500.0))
    assert driver.pairing.add_fix(moved(10.9, 500.0)) == pytest.approx(500.0, abs=1.0)
    driver.image(10.5, now=0.0)
    (paired,) = driver.pairing.ready(NS)
    assert isinstance(paired, Paired) and paired.fix is not None
    assert paired.fix.lat == moved(10.9, 500.0).lat


@pytest.mark.parametrize("what", ["fix", "heading", "image"])
def test_stamps_that_go_back_start_everything_again(what: str):
    driver = Driver(use_heading=True)
    driver.pairing.add_fix(moved(10.0, 0.0))
    driver.heading(10.0)
    driver.image(10.1, now=0.0)
    add = {
        "fix": lambda t: driver.pairing.add_fix(moved(t, 5000.0)),
        "heading": driver.heading,
        "image": lambda t: driver.image(t, now=0.0),
    }
    for name, again in add.items():  # jitter is refused alone
        with pytest.raises(StampNotNewerError, match=name):
            again(9.9)
    assert driver.restarts == [] and driver.pairing.waiting == 1
    add[what](1.0)
    assert driver.restarts == [(what, 1)]
    for name in add.keys() - {what}:
        add[name](1.0)
    assert driver.ready(1.0) == [1.0] and len(driver.restarts) == 1
