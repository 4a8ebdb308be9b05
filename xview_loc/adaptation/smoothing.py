"""Pseudo ground truth of whole drives: what all of a drive's heat maps, its odometry and its fixes agree on.

Forward-backward smoothing of a hidden Markov model, whose state is the place on a grid that moves along
with the vehicle: one :class:`BeliefGrid` runs forwards, another backwards, and their product is the belief
from the whole drive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.heat_map_store import CELL_M, HeatMapStore
from xview_loc.adaptation.labels import PairTable, PseudoLabels
from xview_loc.adaptation.motion import FIX_CORRELATION_S, Steps, chains, odometry_gain, steps_along
from xview_loc.datasets.base import Track
from xview_loc.estimation.belief import BeliefGrid, Grid

Array = NDArray[np.float64]

_CELLS = 128
# How often a heat map shows nothing but a wrong place. Maps nearer to each other than so many metres are
# wrong together.
_OUTLIER, _DECORRELATION_M = 0.2, 10.0
# How often odometry is all wrong: then the vehicle may be anywhere on the grid.
_LOST = 1e-5
# Of a fix that comes without a standard deviation, metres; what fixes say of places far from them.
_FIX_STD, _LEAST_LIKELIHOOD = 15.0, np.float32(1e-4)
# Further off than this, a maximum is wrong.
_WRONG_M = 5.0
# Over so many seconds on either side the middle of the fixes' offsets centres the grid.
_CENTRED_S = 60.0
# Before odometry's gain is known from the heat maps as well, its variance counts for so much more.
_LOOSE = 4.0
# A pair's surroundings, so many pairs on either side, tell whether smoothing is of use there: heat maps are
# likelier where the rest of the drive has them by this factor at least (logarithm, mean).
_SURROUNDINGS, _SUPPORT = 20, 0.1

Likelihood = Callable[[int, BeliefGrid], Grid]


@dataclass(frozen=True, eq=False)
class Smoothed(PairTable):
    """Where the pairs were taken according to their whole drives.

    position: float32 (N, 2), (row, col) in tile pixels. heading: float32 (N,), radians, as labels have it.
    covariance: float32 (N, 2, 2), ENU, m^2. wrong: float32 (N,), the probability that the teacher's maximum
    is more than five metres off. supported: (N,), False where the rest of the drive tells no better where
    heat maps are high than coarse fixes do: there the position is the teacher's maximum. on_map: (N,),
    whether the position lies on the heat map. Where it is the teacher's, covariance and ``wrong`` are
    not-a-number: nothing is known of them.
    """

    position: NDArray[np.float32]
    heading: NDArray[np.float32]
    covariance: NDArray[np.float32]
    wrong: NDArray[np.float32]
    supported: NDArray[np.bool_]
    on_map: NDArray[np.bool_]

    @property
    def std_m(self) -> Array:
        """Standard deviation along an axis, (N,), metres; not-a-number where nothing is known of it."""
        return np.sqrt(np.trace(self.covariance.astype(np.float64), axis1=1, axis2=2) / 2.0)

    @property
    def has_grounds(self) -> bool:
        """Whether most pairs have a label from their drive; otherwise something is wrong with the drives."""
        return 2 * int(self.usable.sum()) >= len(self)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether there are grounds for a pair's place, and it is on the map, (N,)."""
        return self.supported & self.on_map

    def labels(self, teacher: PseudoLabels) -> PseudoLabels:
        """The teacher's labels of the same pairs with these poses, where these are usable."""
        return replace(teacher, position=self.position, heading=self.heading).rows(self.usable)


def smooth(
    track: Track,
    teacher: PseudoLabels,
    heat_maps: HeatMapStore,
    on_pairs: Callable[[int, int], object] = lambda done, of: None,
) -> Smoothed:
    """Smooth the drives of a source's ``track`` at the pairs that the teacher has labels of.

    Time and disk grow with the number of pairs, memory for beliefs with its square root. Odometry's scale
    and heading are fitted to the fixes, and after one pass to the places that the heat maps give.
    ``on_pairs`` is told how many pairs are done, of how many.
    """
    drives = _Drives(track.rows(teacher.index), teacher, heat_maps)
    odometry = np.isfinite(drives.track.moved).any()
    passes = 2 if odometry else 1
    done = 0

    def on_pair() -> None:
        nonlocal done
        done += 1
        on_pairs(done, passes * len(teacher))

    gain = None
    if odometry:
        weight = drives.fix_weight / drives.fix_std**2
        first = odometry_gain(drives.track, drives.fix, weight)
        rough = drives.smoothed(steps_along(drives.track, drives.fix_std, first, _LOOSE), on_pair)
        # A covariance is no less than what nearby places have in common.
        weight = 1.0 / (np.trace(rough.covariance, axis1=1, axis2=2) / 2.0 + 0.5)
        gain = odometry_gain(drives.track, rough.place, weight)
    return drives.table(drives.smoothed(steps_along(drives.track, drives.fix_std, gain), on_pair))


@dataclass(frozen=True, eq=False)
class _Beliefs:
    """place: (N, 2). covariance: (N, 2, 2). wrong: (N,). support: (N,), how much likelier a pair's heat map
    is where the rest of the drive has it than about its coarse fix, a logarithm, and a mean with its
    neighbours."""

    place: Array
    covariance: Array
    wrong: Array
    support: Array


class _Drives:
    """Pairs along drives, row by row of ``teacher``: fixes, maxima and heat maps in one plane.

    The plane is unrolled along the drives: steps between fixes are added up in their own true-north axes.
    """

    def __init__(self, track: Track, teacher: PseudoLabels, heat_maps: HeatMapStore) -> None:
        self.track, self._teacher, self._heat_maps = track, teacher, heat_maps
        self.fix = np.cumsum(track.fix_steps, axis=0)
        self.maximum = self.fix + teacher.from_fix
        self.fix_std = np.where(np.isnan(teacher.fix_std), _FIX_STD, teacher.fix_std).astype(np.float64)
        seconds = np.diff(track.stamp_ns, prepend=track.stamp_ns[0]) / 1e9
        # The random walk of a fix's error, in the limit of small steps, weighs each place with this, and the
        # first and the last of a chain with a half more.
        self.fix_weight = np.clip(seconds / FIX_CORRELATION_S / 2.0, 0.0, 0.5)

    def smoothed(self, steps: Steps, on_pair: Callable[[], object]) -> _Beliefs:
        count = len(self.fix)
        corners = self._corners(steps)
        begins = ~steps.linked
        ends = np.append(begins[1:], True)
        fix_weight = np.where(begins, 0.0, self.fix_weight) + 0.5 * begins + 0.5 * ends
        weight = np.minimum(1.0, np.where(begins, 1.0, steps.length / _DECORRELATION_M))
        out = _Beliefs(np.zeros((count, 2)), np.zeros((count, 2, 2)), np.zeros(count), np.zeros(count))

        def likelihood(k: int, grid: BeliefGrid) -> Grid:
            return np.asarray(
                self._heat_map(k, grid) ** weight[k] * self._fix(k, grid) ** fix_weight[k], np.float32
            )

        for k, others in smoothed_beliefs(corners, steps, likelihood, _CELLS, CELL_M):
            heat_map, fix = self._heat_map(k, others), self._fix(k, others)
            others.multiply(fix, fix_weight[k])
            alone = (fix * heat_map).sum(dtype=np.float64) / fix.sum(dtype=np.float64)
            # Off its tile a heat map tells nothing, so that this is one: no grounds either.
            out.support[k] = math.log(others.multiply(heat_map, weight[k]) / max(alone, 1.0))
            out.place[k], out.covariance[k] = _summary(others)
            out.wrong[k] = 1.0 - others.probability[_within(others, self.maximum[k])].sum(dtype=np.float64)
            on_pair()
        return replace(out, support=_chain_means(out.support, begins))

    def table(self, beliefs: _Beliefs) -> Smoothed:
        """In tile pixels, with the teacher's maxima where smoothing has no grounds."""
        teacher, grid = self._teacher, self._heat_maps.grid
        supported = beliefs.support > _SUPPORT
        east, north = ((beliefs.place - self.fix) / teacher.meters_per_pixel[:, None]).T
        position = np.where(
            supported[:, None], teacher.fix + np.stack([-north, east], 1), teacher.position
        ).astype(np.float32)
        cell = (position - grid.origin) / grid.scale
        on_map = np.all((cell >= -0.5) & (cell <= self._heat_maps.side - 0.5), axis=1)
        covariance = np.where(supported[:, None, None], beliefs.covariance, np.nan)
        return Smoothed(
            teacher.index,
            position,
            teacher.heading,
            covariance.astype(np.float32),
            np.where(supported, beliefs.wrong.clip(0.0, 1.0), np.nan).astype(np.float32),
            np.asarray(supported),
            np.asarray(on_map),
        )

    def _corners(self, steps: Steps) -> Array:
        """Centres (N, 2) of cells (0, 0), which move by the steps and by whole cells.

        The grid's middle is the way that the steps add up to, moved to where most fixes of the minutes about
        have it, so that neither a jump of the fixes nor odometry's drift carries the grid away.
        """
        reckoned = np.cumsum(np.where(steps.linked[:, None], steps.mean, self.track.fix_steps), axis=0)
        offset, half = self.fix - reckoned, (_CELLS - 1) / 2 * CELL_M
        seconds = (self.track.stamp_ns - self.track.stamp_ns[0]) / 1e9
        corners = np.zeros_like(self.fix)
        for start, end in chains(steps.linked):
            times = seconds[start:end]
            first = start + np.searchsorted(times, times - _CENTRED_S)
            last = start + np.searchsorted(times, times + _CENTRED_S, "right")
            for k in range(start, end):
                wanted = reckoned[k] + np.median(offset[first[k - start] : last[k - start]], axis=0) - half
                moved = wanted if k == start else corners[k - 1] + steps.mean[k]
                corners[k] = moved + ((wanted - moved) / CELL_M).round() * CELL_M
        return corners

    def _heat_map(self, k: int, grid: BeliefGrid) -> Grid:
        """Likelihood of each cell, one where the heat map tells nothing."""
        try:
            heat_map = self._heat_maps[int(self._teacher.index[k])]
        except KeyError:
            return np.ones_like(grid.probability)
        pixels, gsd = self._heat_maps.grid, float(self._teacher.meters_per_pixel[k])
        step = grid.cell_m / (gsd * pixels.scale)
        right, up = (grid.corner - self.fix[k]) / gsd
        row, col = (self._teacher.fix[k] + (-up, right) - pixels.origin) / pixels.scale
        # Of places that its tile does not show it tells nothing.
        seen = grid.resampled(heat_map, np.array([[step, 0.0, col], [0.0, -step, row]]), outside=1.0)
        return np.asarray((1.0 - _OUTLIER) * seen + _OUTLIER, np.float32)

    def _fix(self, k: int, grid: BeliefGrid) -> Grid:
        # At least a cell wide, or a precise fix would fall between the cells.
        variance = self.fix_std[k] ** 2 + grid.cell_m**2
        return np.maximum(grid.normal_likelihood(self.fix[k], variance * np.eye(2)), _LEAST_LIKELIHOOD)


def smoothed_beliefs(
    corners: Array, steps: Steps, likelihood: Likelihood, cells: int, cell_m: float
) -> Iterator[tuple[int, BeliefGrid]]:
    """What all *other* pairs of its chain tell of each pair's place, from the last pair to the first.

    Yields the pair's number k, and a belief which, multiplied with ``likelihood(k, belief)``, is all pairs'.

    corners: (N, 2), cell (0, 0)'s centre for each pair: moving along with the steps but for whole cells. Of a
    chain of n pairs about 2 sqrt(n) beliefs are held at a time; each likelihood is asked for thrice.
    """

    def flat(k: int) -> BeliefGrid:
        return BeliefGrid(np.full((cells, cells), cells**-2, np.float32), corners[k], cell_m)

    def moved(belief: BeliefGrid, multiplied: int, step: int, sign: int, to: int) -> BeliefGrid:
        after = BeliefGrid(belief.probability, belief.corner, cell_m)
        after.multiply(likelihood(multiplied, after))
        after.move(sign * steps.mean[step], float(steps.variance[step]), corners[to])
        after.blend(_LOST)
        return after

    for start, end in reversed(chains(steps.linked)):
        chunk = math.isqrt(end - start) + 1
        kept = [flat(start)]
        belief = kept[0]
        for k in range(start, end - 1):
            belief = moved(belief, k, k + 1, 1, k + 1)
            if (k + 1 - start) % chunk == 0:
                kept.append(belief)
        backward = flat(end - 1)
        for number in reversed(range(len(kept))):
            first = start + number * chunk
            forward = [kept[number]]
            for k in range(first, min(first + chunk, end) - 1):
                forward.append(moved(forward[-1], k, k + 1, 1, k + 1))
            for k in reversed(range(first, first + len(forward))):
                if k + 1 < end:
                    backward = moved(backward, k + 1, k + 1, -1, k)
                others = BeliefGrid(forward[k - first].probability, corners[k], cell_m)
                others.multiply(backward.probability)
                yield k, others


def _summary(belief: BeliefGrid) -> tuple[Array, Array]:
    """The mean about the place where a circle holds most, and the covariance of all about it.

    The mean of all would lie between two places that are both likely, where it is not.
    """
    side = 2 * round(_WRONG_M / 2 / belief.cell_m) + 1
    dense = cv2.blur(belief.probability, (side, side), borderType=cv2.BORDER_CONSTANT)
    row, col = np.unravel_index(int(dense.argmax()), dense.shape)
    near = _within(belief, belief.corner + np.array([col, row]) * belief.cell_m)
    place = BeliefGrid(belief.probability * near, belief.corner, belief.cell_m).mean
    off = belief.mean - place
    return place, belief.covariance + np.outer(off, off)


def _within(belief: BeliefGrid, place: Array) -> NDArray[np.bool_]:
    x, y = belief.axes
    return np.asarray(np.hypot(x - place[0], (y - place[1])[:, None]) <= _WRONG_M, bool)


def _chain_means(values: Array, begins: NDArray[np.bool_]) -> Array:
    """Each value's mean with its neighbours in the chain."""
    out = np.zeros_like(values)
    for start, end in chains(~begins):
        total = np.concatenate([[0.0], np.cumsum(values[start:end])])
        k = np.arange(end - start)
        first, last = np.maximum(k - _SURROUNDINGS, 0), np.minimum(k + _SURROUNDINGS + 1, end - start)
        out[start:end] = (total[last] - total[first]) / (last - first)
    return out
