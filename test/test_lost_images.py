"""Images that are missing between the stamps of a camera."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from xview_loc.vehicle.lost_images import LostImages

START = 1_700_000_000 * 10**9
COUNT = 2000


def judge(stamps_s: Iterable[float]) -> tuple[int, list[str]]:
    """How many images are missing between these stamps, and what was said after each."""
    images = LostImages()
    faults, missing = [], 0
    for stamp in stamps_s:
        missing += images.add(START + round(stamp * 1e9))
        faults.append(images.fault)
    return missing, faults


def camera(rate_hz: float, jitter: float = 0.05) -> np.ndarray:
    """Stamps of a camera with a fixed rate. jitter: share of the interval, sigma."""
    return (np.arange(COUNT) + np.random.default_rng(1).normal(0.0, jitter, COUNT)) / rate_hz


@pytest.mark.parametrize("rate_hz", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_missing_images_are_counted_and_said(rate_hz: float, share: float) -> None:
    kept = np.random.default_rng(2).random(COUNT) >= share
    missing, faults = judge(camera(rate_hz)[kept])
    # Not while the rate is learned, and where so many are missing that it looks like a pause or a new rate.
    assert 0.85 * (~kept).sum() < missing <= (~kept).sum()
    said = [fault for fault in faults[200:] if fault]
    assert len(said) > 0.8 * len(faults[200:])
    figures = [int(fault.split("%")[0]) / 100.0 for fault in said]
    assert abs(np.mean(figures) - share) < 0.05
    assert f"every {1000.0 / rate_hz:.0f} ms" in said[0] or rate_hz == 1.0
    assert all(word in said[0] for word in ("DDS", "image_size", "qos_depth", "driver"))


def test_bursts_are_counted_and_the_fault_ends_with_them() -> None:
    stamps = camera(10.0)
    # 20 of every 100 in a row, in the first half.
    kept = (np.arange(COUNT) % 100 < 80) | (np.arange(COUNT) > COUNT / 2)
    missing, faults = judge(stamps[kept])
    assert missing == (~kept).sum()
    assert faults[300] and not any(faults[-500:])


@pytest.mark.parametrize("jitter", [0.0, 0.05, 0.1, 0.3])
def test_jitter_raises_no_alarm(jitter: float) -> None:
    missing, faults = judge(np.maximum.accumulate(camera(10.0, jitter) + np.arange(COUNT) * 1e-6))
    assert missing <= 2 and not any(faults)


def test_what_dds_says_it_lost_is_said_at_any_rate() -> None:
    images = LostImages()
    for k in range(3):
        images.lose(30)
        images.add(START + 3_700_000_000 * k)
    assert "DDS lost 90 of the last 93 images" in images.lost_by_dds and "qos_depth" in images.lost_by_dds
    for k in range(3, 103):
        images.add(START + 3_700_000_000 * k)
    assert not images.lost_by_dds


def stop_and_go() -> np.ndarray:
    """A camera that is triggered once a metre, on a vehicle that drives at 0 to 14 m/s."""
    seconds = np.arange(0.0, 600.0, 0.001)
    speed = np.clip(8.0 + 6.0 * np.sin(seconds / 20.0) + 3.0 * np.sin(seconds / 7.0), 0.0, None)
    driven = np.cumsum(speed * 0.001)
    return seconds[np.searchsorted(driven, np.arange(1.0, driven[-1]))]


RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize(
    "intervals",
    [
        pytest.param(np.diff(stop_and_go()), id="triggered by distance"),
        pytest.param(RANDOM.exponential(0.1, COUNT), id="triggered by events"),
        pytest.param(np.maximum(0.1, RANDOM.gamma(4.0, 0.03, COUNT)), id="a driver that is too slow"),
        pytest.param(np.repeat([1 / 30, 1 / 15, 1 / 30, 1 / 10, 1 / 30] * 5, 150), id="exposure in the dark"),
        pytest.param(np.repeat([1 / 30, 1 / 15] * 40, 20), id="a rate that changes every second"),
        pytest.param(np.tile([0.033, 0.05], COUNT // 2), id="two intervals by turns"),
        pytest.param(np.where(np.arange(COUNT) % 50 == 49, 5.0, 0.1), id="pauses"),
        pytest.param(np.full(COUNT, 5.0), id="an image every five seconds"),
    ],
)
def test_a_camera_without_a_fixed_rate_raises_no_alarm(intervals: np.ndarray) -> None:
    missing, faults = judge(np.cumsum(intervals))
    assert missing == 0 and not any(faults)
