"""Whole drives correct a teacher's labels: forward-backward smoothing, and its fallback."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from xview_loc.adaptation.heat_map_store import HeatMapStore
from xview_loc.adaptation.labels import PseudoLabels, turned
from xview_loc.adaptation.motion import Steps, odometry_gain
from xview_loc.adaptation.parallel_smoothing import smooth_drives
from xview_loc.adaptation.smoothing import Smoothed, smooth, smoothed_beliefs
from xview_loc.datasets.base import Track
from xview_loc.estimation.belief import BeliefGrid
from xview_loc.geodesy import LocalProjection
from xview_loc.models import create_model
from xview_loc.training.trainer import make_fabric

MODEL = create_model("ccvpe-small")
SIDE, GSD = MODEL.spec.aerial_size, MODEL.spec.gsd
START_NS = 1_700_000_000_000_000_000
FIX_STD, CORRELATION_S = 8.0, 40.0


class Maps(HeatMapStore):
    """Heat maps in memory."""

    def __init__(self, likelihoods: dict[int, np.ndarray]) -> None:
        super().__init__(Path("no such folder"), MODEL)
        self.likelihoods = likelihoods

    def __getitem__(self, index: int) -> np.ndarray:
        return self.likelihoods[index]


@dataclass(frozen=True, eq=False)
class World:
    """A drive with its truth: metres (N, 2) from the coarse fixes, and east and north in all."""

    track: Track
    teacher: PseudoLabels
    maps: Maps
    true_from_fix: np.ndarray
    true: np.ndarray

    def errors(self, labels: PseudoLabels) -> np.ndarray:
        return labels.errors_m(self.true_from_fix)

    def smoothed(self, **changes: object) -> Smoothed:
        return smooth(replace(self.track, **changes), self.teacher, self.maps)  # type: ignore[arg-type]

    def smoothed_errors(self, smoothed: Smoothed) -> np.ndarray:
        return self.errors(replace(self.teacher.of(smoothed.index), position=smoothed.position))


def drive(
    count: int = 160, seed: int = 0, wrong: float = 0.3, jump_m: float = 0.0, turned_tiles: bool = False
) -> World:
    """Drive along curves at 8 m/s, one pair per second.

    wrong: share of the heat maps in which another place is likelier. jump_m: shift of the fixes to the east
    for half a minute. turned_tiles: tiles are turned to the heading.
    """
    rng = np.random.default_rng(seed)
    yaw = np.cumsum(0.25 * np.sin(np.arange(count) / 9.0))
    step = 8.0 * np.stack([np.cos(yaw), np.sin(yaw)], 1)
    true = np.cumsum(step, axis=0)
    bias = rng.normal(size=2)
    off = np.zeros((count, 2))
    keep = math.exp(-1.0 / CORRELATION_S)
    for k in range(count):
        bias = keep * bias + math.sqrt(1.0 - keep**2) * rng.normal(size=2)
        off[k] = FIX_STD * bias + 0.5 * rng.normal(size=2)
    off[count // 2 : count // 2 + 30] += (jump_m, 0.0)
    lat, lon = LocalProjection(48.2, 16.37).inverse(*(true + off).T)
    moved = step * (1.0 + 0.01 * rng.normal()) + 0.1 * rng.normal(size=(count, 2))
    moved[0] = math.nan
    track = Track(np.zeros(count, int), START_NS + np.arange(count) * 10**9, lat, lon, moved)

    # Tiles do not lie exactly about the fixes.
    fix = (SIDE - 1) / 2 + rng.uniform(-10, 10, (count, 2))
    turn = yaw if turned_tiles else 0.0 * yaw
    right, up = turned(-off, -turn).T / GSD
    place = fix + np.stack([-up, right], 1)
    store = Maps({})
    rows, cols = (store.grid.origin[a] + store.grid.scale * np.arange(store.side) for a in (0, 1))
    mode = np.zeros((count, 2), np.float32)
    for k in range(count):
        at = place[k] + rng.normal(size=2) * 1.2 / GSD
        other = rng.uniform(20, SIDE - 20, 2)
        share = 0.05 if rng.random() < wrong else 0.9
        likelihood = sum(
            weight * np.exp(-((rows[:, None] - r) ** 2 + (cols[None] - c) ** 2) / (2 * (1.5 / GSD) ** 2))
            for weight, (r, c) in ((share, at), (1.0 - share, other))
        )
        store.likelihoods[k] = (likelihood / likelihood.mean()).astype(np.float32)
        row, col = np.unravel_index(int(likelihood.argmax()), likelihood.shape)
        mode[k] = rows[row], cols[col]
    one = np.ones(count, np.float32)
    teacher = PseudoLabels(
        index=np.arange(count),
        position=mode,
        heading=0 * one,
        fix=fix.astype(np.float32),
        fix_std=FIX_STD * one,
        meters_per_pixel=GSD * one,
        stray_sigmas=one,
        entropy=one,
        peak_mass=one,
        turn=turn.astype(np.float32),
    )
    return World(track, teacher, store, -off, true)


@pytest.fixture(scope="module")
def world() -> World:
    return drive()


@pytest.fixture(scope="module")
def smoothed(world: World) -> Smoothed:
    return world.smoothed()


def test_it_is_what_enumeration_of_all_paths_gives() -> None:
    rng = np.random.default_rng(1)
    cells, count = 3, 4
    likelihoods = rng.uniform(0.1, 3.0, (count, cells, cells))
    variance = np.array([0.0, 0.3, 0.8, 0.5])
    linked = np.array([False, True, True, True])
    steps = Steps(linked, rng.normal(size=(count, 2)), variance)
    corners = np.cumsum(np.where(linked[:, None], steps.mean, 5.0), axis=0)
    posterior = np.zeros((count, cells, cells))
    places = [(row, col) for row in range(cells) for col in range(cells)]
    tap = {0: lambda v: 1.0 - v, 1: lambda v: v / 2.0, 2: lambda v: 0.0}
    for path in itertools.product(places, repeat=count):
        probability = 1.0
        for k, place in enumerate(path):
            probability *= likelihoods[k][place]
            if k:
                down, right = (abs(a - b) for a, b in zip(place, path[k - 1], strict=True))
                probability *= tap[down](variance[k]) * tap[right](variance[k])
        for k, place in enumerate(path):
            posterior[k][place] += probability
    posterior /= posterior.sum((1, 2), keepdims=True)
    seen = []
    for k, others in smoothed_beliefs(corners, steps, lambda k, _: likelihoods[k], cells, 1.0):
        np.testing.assert_allclose(others.corner, corners[k])
        others.multiply(likelihoods[k].astype(np.float32))
        np.testing.assert_allclose(others.probability, posterior[k], atol=2e-4)
        seen.append(k)
    assert sorted(seen) == list(range(count))


def test_a_long_chain_of_normal_distributions_is_the_kalman_smoother() -> None:
    """Over chunks and shifts of the grid."""
    rng = np.random.default_rng(2)
    count, cells, noise, variance = 60, 64, 9.0, 2.0
    step = rng.uniform(-6, 6, (count, 2))
    true = np.cumsum(step + rng.normal(size=(count, 2)) * math.sqrt(variance), axis=0)
    seen = true + rng.normal(size=(count, 2)) * math.sqrt(noise)
    linked = np.arange(count) > 0
    corners = np.zeros((count, 2))
    for k in range(count):
        wanted = seen[k] - (cells - 1) / 2
        moved = corners[k - 1] + step[k] if k else wanted
        corners[k] = moved + (wanted - moved).round()

    def likelihood(k: int, grid: BeliefGrid) -> np.ndarray:
        return grid.normal_likelihood(seen[k], noise * np.eye(2))

    precision = np.eye(count) / noise
    information = seen / noise
    for k in range(1, count):
        pair = np.ix_([k - 1, k], [k - 1, k])
        precision[pair] += np.array([[1, -1], [-1, 1]]) / variance
        information[[k - 1, k]] += np.array([-step[k], step[k]]) / variance
    expected = np.linalg.solve(precision, information)
    steps = Steps(linked, step, np.full(count, variance))
    for k, others in smoothed_beliefs(corners, steps, likelihood, cells, 1.0):
        others.multiply(likelihood(k, others))
        np.testing.assert_allclose(others.mean, expected[k], atol=0.05)
        own = np.linalg.inv(precision)[k, k]
        assert others.covariance[0, 0] - 1 / 12 == pytest.approx(own, rel=0.1)


def test_time_is_linear_and_memory_is_not() -> None:
    count, cells = 1500, 32
    asked = 0

    def likelihood(k: int, grid: BeliefGrid) -> np.ndarray:
        nonlocal asked
        asked += 1
        return np.ones((cells, cells), np.float32)

    steps = Steps(np.arange(count) > 0, np.zeros((count, 2)), np.full(count, 0.2))
    tracemalloc.start()
    seen = [k for k, _ in smoothed_beliefs(np.zeros((count, 2)), steps, likelihood, cells, 1.0)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == list(range(count))[::-1]
    assert asked <= 3 * count
    # All beliefs would be 6 MB.
    assert peak < 1.5e6


def test_smoothing_beats_maxima_of_which_a_third_is_wrong(world: World, smoothed: Smoothed) -> None:
    before, after = world.errors(world.teacher), world.smoothed_errors(smoothed)
    assert (before > 10).mean() > 0.2
    assert after.mean() < 0.15 * before.mean() and (after > 10).mean() == 0.0
    assert smoothed.supported.all() and smoothed.on_map.all()
    # It knows which maxima were wrong, and how sure it is of itself.
    assert smoothed.wrong[before > 6].min() > 0.7 and smoothed.wrong[before < 4].max() < 0.3
    off = smoothed.labels(world.teacher).from_fix - world.true_from_fix
    distance = np.einsum("ni,nij,nj->n", off, np.linalg.inv(smoothed.covariance), off)
    # These heat maps err each for itself, which it does not trust.
    assert 0.25 < distance.mean() < 4.0
    assert np.abs(off.mean(0)).max() < 0.3
    assert np.median(smoothed.std_m) < 1.5


def test_tiles_turned_to_the_heading_give_the_same_labels(world: World, smoothed: Smoothed) -> None:
    other = drive(turned_tiles=True)
    labels = replace(other.teacher, position=other.teacher.at(other.true_from_fix))
    np.testing.assert_allclose(labels.from_fix, other.true_from_fix, atol=1e-3)
    before, after = other.errors(other.teacher), other.smoothed_errors(other.smoothed())
    assert (before > 10).mean() > 0.2
    assert after.mean() < 1.1 * world.smoothed_errors(smoothed).mean()


def test_it_fits_the_scale_and_the_turn_of_odometry(world: World, smoothed: Smoothed) -> None:
    turn = np.exp(1j * np.radians(2.0 / 60.0) * np.arange(len(world.teacher)) + 0.2j) * 1.05
    moved = world.track.moved @ (1.0, 1j) * turn
    drifting = replace(world.track, moved=np.stack([moved.real, moved.imag], 1))
    gain = odometry_gain(drifting, world.true, np.ones(len(turn)))
    np.testing.assert_allclose(gain[40:-40] * turn[40:-40], 1.0, atol=0.03)
    errors = world.smoothed_errors(world.smoothed(moved=drifting.moved))
    assert errors.mean() < world.smoothed_errors(smoothed).mean() + 0.15


@pytest.mark.parametrize("missing", ["all", "some"])
def test_without_odometry_fixes_tell_the_motion(world: World, missing: str) -> None:
    moved = world.track.moved.copy()
    moved[:: 1 if missing == "all" else 7] = math.nan
    errors = world.smoothed_errors(world.smoothed(moved=moved))
    assert errors.mean() < 0.3 * world.errors(world.teacher).mean()
    assert (errors > 10).mean() < 0.03


@pytest.mark.parametrize("odometry", [True, False])
def test_fixes_may_jump(odometry: bool) -> None:
    world = drive(seed=3, jump_m=25.0)
    moved = world.track.moved if odometry else np.full_like(world.track.moved, math.nan)
    errors = world.smoothed_errors(world.smoothed(moved=moved))
    assert errors.mean() < 0.4 * world.errors(world.teacher).mean()


def test_a_gap_splits_a_drive(world: World) -> None:
    """What lies behind it changes nothing before it."""
    count = len(world.teacher)
    rest = world.teacher.rows(np.r_[0:60, 100:count])
    moved = world.track.moved.copy()
    moved[101] = math.nan
    track = replace(world.track, moved=moved)
    both = smooth(track, rest, world.maps)
    assert world.smoothed_errors(both).mean() < 0.2 * world.errors(rest).mean()
    alone = smooth(replace(track, drive=(np.arange(count) > 80).astype(int)), rest, world.maps)
    # Only odometry's gain, which is one vehicle's, reaches over the gap.
    np.testing.assert_allclose(both.position, alone.position, atol=1.0 / GSD)


def test_drives_do_not_touch_each_other(world: World, smoothed: Smoothed) -> None:
    other = drive(count=60, seed=5)
    a, b = world.track, other.track
    track = Track(
        np.r_[a.drive, b.drive + 1],
        np.r_[a.stamp_ns, b.stamp_ns],
        np.r_[a.lat, b.lat],
        np.r_[a.lon, b.lon],
        np.r_[a.moved, b.moved],
    )
    count = len(a.lat)
    teacher = PseudoLabels.joined([world.teacher, replace(other.teacher, index=other.teacher.index + count)])
    maps = Maps(world.maps.likelihoods | {k + count: m for k, m in other.maps.likelihoods.items()})
    both = smooth(track, teacher, maps)
    np.testing.assert_allclose(both.position[:count], smoothed.position, atol=0.05)
    np.testing.assert_allclose(both.position[count:], other.smoothed().position, atol=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_drives_are_smoothed_side_by_side(world: World, workers: int) -> None:
    """Three of them, of different lengths; progress reaches its end."""
    drives = np.repeat([0, 1, 2], [30, len(world.teacher) - 50, 20])
    track = replace(world.track, drive=drives)
    progress: list[tuple[int, int]] = []
    fabric = make_fabric("cpu")
    found = smooth_drives(
        fabric, track, world.teacher, world.maps, workers, lambda *numbers: progress.append(numbers)
    )
    whole = smooth(track, world.teacher, world.maps)
    assert np.array_equal(found.index, whole.index)
    np.testing.assert_allclose(found.position, whole.position, atol=0.05)
    np.testing.assert_array_equal(found.supported, whole.supported)
    done = [number for number, _ in progress]
    assert done == sorted(done) and progress[-1] == (len(world.teacher),) * 2


def test_driven_backwards_in_time_the_places_are_the_same(world: World, smoothed: Smoothed) -> None:
    track, count = world.track, len(world.teacher)
    moved = np.full((count, 2), math.nan)
    moved[1:] = -track.moved[:0:-1]
    back = Track(track.drive, track.stamp_ns, track.lat[::-1], track.lon[::-1], moved)
    teacher = replace(world.teacher.rows(np.arange(count)[::-1]), index=np.arange(count))
    maps = Maps({count - 1 - k: m for k, m in world.maps.likelihoods.items()})
    again = smooth(back, teacher, maps)
    np.testing.assert_allclose(again.position[::-1], smoothed.position, atol=0.25 / GSD)


def test_where_it_has_no_grounds_the_teacher_s_maximum_stays(world: World) -> None:
    count = len(world.teacher)
    alone = world.smoothed(drive=np.arange(count))
    assert not alone.supported.any() and np.isnan(alone.wrong).all() and np.isnan(alone.std_m).all()
    np.testing.assert_array_equal(alone.position, world.teacher.position)
    # Odometry that has nothing to do with the motion.
    nonsense = np.random.default_rng(0).normal(size=(count, 2)) * 8.0
    fallen = world.smoothed(moved=nonsense)
    assert (~fallen.supported).mean() > 0.9
    assert world.smoothed_errors(fallen).mean() <= 1.05 * world.errors(world.teacher).mean()
    # Heat maps that say nothing.
    flat = Maps({k: np.ones_like(m) for k, m in world.maps.likelihoods.items()})
    assert not smooth(world.track, world.teacher, flat).supported.any()


@pytest.mark.parametrize("pairs", [2, 5, 15])
def test_short_drives_are_no_worse(world: World, pairs: int) -> None:
    smoothed = world.smoothed(drive=np.arange(len(world.teacher)) // pairs)
    before, after = world.errors(world.teacher).mean(), world.smoothed_errors(smoothed).mean()
    assert after <= before * (1.0 if pairs < 3 else 0.6 if pairs < 10 else 0.25)


def test_what_is_off_the_map_is_no_label(world: World) -> None:
    """A pair whose tile ends before the place that the rest of the drive knows."""
    off = int(np.argmax(world.true_from_fix[:, 0]))
    assert world.true_from_fix[off, 0] > 5.0
    fix = world.teacher.fix.copy()
    fix[off, 1] = SIDE - 1
    teacher = replace(world.teacher, fix=fix)
    maps = Maps(world.maps.likelihoods | {off: np.ones_like(world.maps.likelihoods[off])})
    smoothed = smooth(world.track, teacher, maps)
    assert np.flatnonzero(~smoothed.on_map).tolist() == [off]
    assert smoothed.labels(teacher).index.tolist() == np.delete(teacher.index, off).tolist()


def test_fixes_and_odometry_alone_average_the_error_of_the_fixes() -> None:
    """Ten minutes of fixes, whose error lasts half a minute; no heat map is looked at."""
    long = drive(600, seed=5)
    found = smooth(long.track, long.teacher, long.maps, by_fixes=True)
    with_maps = long.smoothed_errors(long.smoothed()).mean()
    assert found.usable.all() and found.std_m.max() < FIX_STD
    errors, before = long.smoothed_errors(found), np.linalg.norm(long.true_from_fix, axis=1)
    assert errors.mean() < 0.7 * before.mean() and with_maps < 0.5 * errors.mean()
    # As uncertain as they are wrong, about.
    assert 0.4 < found.std_m.mean() * math.sqrt(math.pi / 2) / errors.mean() < 2.5
