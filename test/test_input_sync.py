"""Fixes and headings at an image's stamp."""

import math

import pytest

from xview_loc.input_sync import (
    NS,
    GnssFix,
    HeadingSample,
    History,
    SyncError,
    WaitingRoom,
    blend_fix,
    blend_heading,
)


def fix(t: float, lat: float, lon: float = 16.0) -> GnssFix:
    return GnssFix(round(t * NS), lat, lon, 0.0, None)


def fixes(*samples: GnssFix, max_age_s: float = 1.0) -> History[GnssFix]:
    history = History("fix", blend_fix, max_age_s)
    for sample in samples:
        assert history.add(sample)
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
    with pytest.raises(SyncError) as missing:
        fixes().at(NS)
    with pytest.raises(SyncError) as stale:
        fixes(fix(1.0, 48.0)).at(3 * NS)
    assert (missing.value.reason, stale.value.reason) == ("missing", "stale")


def test_jitter_is_refused_and_a_restart_is_seen():
    history = fixes(fix(10.0, 48.0))
    assert not history.add(fix(9.9, 48.0))
    assert not history.went_back(round(9.9 * NS))
    assert history.went_back(NS)


def test_an_image_waits_for_a_later_sample_or_its_time_limit():
    room: WaitingRoom[str] = WaitingRoom(0.1)
    room.add("a", 100, now_ns=0)
    room.add("b", 200, now_ns=NS // 20)
    assert room.ready(lambda stamp: stamp <= 50, NS // 20) == []
    assert room.ready(lambda stamp: stamp <= 150, NS // 20) == ["a"]
    assert room.ready(lambda stamp: False, NS) == ["b"]
    assert len(room) == 0


def test_waiting_images_are_bounded():
    room: WaitingRoom[int] = WaitingRoom(10.0, capacity=4)
    for i in range(6):
        room.add(i, i, 0)
    assert room.ready(lambda stamp: False, 0) == [0, 1]
