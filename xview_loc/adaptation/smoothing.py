"""Smooth labels along whole drives, from all of a drive's heat maps, its odometry and its fixes.

Forward-backward smoothing of a hidden Markov model. Its state is the position on a grid that moves with the
vehicle: one :class:`BeliefGrid` runs forwards, another one backwards, and their product is the belief given
the whole drive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.adaptation.heat_map_store import CELL_M, HeatMapStore
from xview_loc.adaptation.labels import PairTable, PseudoLabels
from xview_loc.adaptation.motion import Steps, chains, odometry_gain, steps_along
from xview_loc.datasets.base import Track
from xview_loc.estimation.belief import BeliefGrid, Grid
from xview_loc.vehicle.course import FIX_CORRELATION_S

Array = NDArray[np.float64]

# Cells per side of the grid.
_CELLS = 128
# Probability that a heat map shows only wrong places, and the distance within which errors are correlated.
_OUTLIER, _DECORRELATION_M = 0.2, 10.0
# Probability that odometry is entirely wrong: the vehicle may then be anywhere on the grid.
_LOST = 1e-5
# Standard deviation of a fix that comes without one, metres, and the floor of a fix's likelihood.
FIX_STD, _MIN_LIKELIHOOD = 15.0, np.float32(1e-4)
# A maximum further off than this is wrong.
_WRONG_M = 5.0
# Half the time over which the fixes' median offset centres the grid.
_CENTRED_S = 60.0
# Factor on odometry's variance in the first pass, before its gain is fitted to the heat maps.
_LOOSE = 4.0
# Number of neighbours, on either side, over which support is averaged, and its least value (a logarithm).
_NEIGHBOURS, _SUPPORT = 20, 0.1

Likelihood = Callable[[int, BeliefGrid], Grid]


@dataclass(frozen=True, eq=False)
class Smoothed(PairTable):
    """Positions of pairs given their whole drives, one row per pair.

    ``position`` is (row, col) in tile pixels, ``heading`` as in :class:`PseudoLabels`, ``covariance`` (N, 2,
    2) ENU, m^2, and ``wrong`` the probability that the teacher's maximum is more than five metres off.
    ``supported`` is False where the rest of the drive predicts heat maps no better than coarse fixes do:
    position is then the teacher's maximum, covariance and ``wrong`` are NaN. ``on_map``: the position lies on
    the heat map.
    """

    position: NDArray[np.float32]
    heading: NDArray[np.float32]
    covariance: NDArray[np.float32]
    wrong: NDArray[np.float32]
    supported: NDArray[np.bool_]
    on_map: NDArray[np.bool_]

    @property
    def std_m(self) -> Array:
        """Standard deviation (N,) along an axis, metres; NaN where unsupported."""
        return np.sqrt(np.trace(self.covariance.astype(np.float64), axis1=1, axis2=2) / 2.0)

    @property
    def uncertainty_m(self) -> float:
        """Mean of :attr:`std_m` over the usable pairs; NaN if there are none."""
        return float(self.std_m[self.usable].mean()) if self.usable.any() else math.nan

    @property
    def mostly_usable(self) -> bool:
        """True if at least half of the pairs are usable; otherwise something is wrong with the drives."""
        return 2 * int(self.usable.sum()) >= len(self)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Mask (N,) of the pairs whose position is supported and on the map."""
        return self.supported & self.on_map

    def labels(self, teacher: PseudoLabels) -> PseudoLabels:
        """Replace the poses of the teacher's labels of the same pairs; unusable pairs are left out."""
        return replace(teacher, position=self.position, heading=self.heading).rows(self.usable)


def smooth(
    track: Track,
    teacher: PseudoLabels,
    heat_maps: HeatMapStore,
    on_pairs: Callable[[int, int], object] = lambda done, of: None,
    *,
    by_fixes: bool = False,
) -> Smoothed:
    """Smooth the teacher's labels along the drives of ``track``, which holds all pairs of their source.

    ``by_fixes``: from fixes and odometry alone; every pair is then supported.

    The scale and heading of odometry are fitted to the fixes, and after a first pass to its result. Time and
    disk space grow with the number of pairs, memory for beliefs with its square root. ``on_pairs`` receives
    the numbers of pairs done and in all.
    """
    drives = _Drives(track.rows(teacher.index), teacher, heat_maps, by_fixes)
    odometry = np.isfinite(drives.track.moved).any()
    done, total = count(1), len(teacher) * (2 if odometry else 1)

    def on_pair() -> None:
        on_pairs(next(done), total)

    gain = None
    if odometry:
        weight = drives.fix_weight / drives.fix_std**2
        first = odometry_gain(drives.track, drives.fix, weight)
        rough = drives.smoothed(steps_along(drives.track, drives.fix_std, first, _LOOSE), on_pair)
        # Nearby positions share errors, which bounds the covariance from below.
        weight = 1.0 / (np.trace(rough.covariance, axis1=1, axis2=2) / 2.0 + 0.5)
        gain = odometry_gain(drives.track, rough.position, weight)
    return drives.table(drives.smoothed(steps_along(drives.track, drives.fix_std, gain), on_pair))


@dataclass(frozen=True, eq=False)
class _Beliefs:
    """Beliefs given whole drives, as in :class:`Smoothed` but in the plane of :class:`_Drives`.

    ``support`` (N,) is the logarithm of how much likelier a pair's heat map is given the rest of the drive
    than given its coarse fix, averaged over neighbours.
    """

    position: Array
    covariance: Array
    wrong: Array
    support: Array


class _Drives:
    """Fixes, maxima and heat maps of pairs along drives in one plane, in the rows of ``teacher``.

    The plane is unrolled along the drives: steps between fixes are summed, each in its own true-north axes.
    """

    def __init__(
        self, track: Track, teacher: PseudoLabels, heat_maps: HeatMapStore, by_fixes: bool = False
    ) -> None:
        self.track, self._teacher, self._heat_maps, self._by_fixes = track, teacher, heat_maps, by_fixes
        self.fix = np.cumsum(track.fix_steps, axis=0)
        self.maximum = self.fix + teacher.from_fix
        self.fix_std = np.where(np.isnan(teacher.fix_std), FIX_STD, teacher.fix_std).astype(np.float64)
        seconds = np.diff(track.stamp_ns, prepend=track.stamp_ns[0]) / 1e9
        # Weights of a random walk of the fixes' error in the limit of small steps; the ends of a chain get
        # one half more.
        self.fix_weight = np.clip(seconds / FIX_CORRELATION_S / 2.0, 0.0, 0.5)

    def smoothed(self, steps: Steps, on_pair: Callable[[], object]) -> _Beliefs:
        """Run both passes over all chains."""
        corners = self._corners(steps)
        begins = ~steps.linked
        ends = np.append(begins[1:], True)
        fix_weight = np.where(begins, 0.0, self.fix_weight) + 0.5 * begins + 0.5 * ends
        weight = np.minimum(1.0, np.where(begins, 1.0, steps.length / _DECORRELATION_M))
        out = _Beliefs(*(np.zeros((len(self.fix), *shape)) for shape in ((2,), (2, 2), (), ())))

        def likelihood(k: int, grid: BeliefGrid) -> Grid:
            both = self._heat_map(k, grid) ** weight[k] * self._fix(k, grid) ** fix_weight[k]
            return np.asarray(both, np.float32)

        for k, others in smoothed_beliefs(corners, steps, likelihood, _CELLS, CELL_M):
            heat_map, fix = self._heat_map(k, others), self._fix(k, others)
            others.multiply(fix, fix_weight[k])
            alone = (fix * heat_map).sum(dtype=np.float64) / fix.sum(dtype=np.float64)
            # Off its tile a heat map is one everywhere, which supports nothing.
            out.support[k] = math.log(others.multiply(heat_map, weight[k]) / max(alone, 1.0))
            out.position[k], out.covariance[k] = _summary(others)
            out.wrong[k] = 1.0 - others.probability[_within(others, self.maximum[k])].sum(dtype=np.float64)
            on_pair()
        return replace(out, support=_neighbour_means(out.support, begins))

    def table(self, beliefs: _Beliefs) -> Smoothed:
        """Convert to tile pixels, with the teacher's maxima where there is no support."""
        teacher, grid = self._teacher, self._heat_maps.grid
        supported = (beliefs.support > _SUPPORT) | self._by_fixes
        moved = teacher.at(beliefs.position - self.fix)
        position = np.where(supported[:, None], moved, teacher.position)
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
        """Return the centres (N, 2) of cells (0, 0), which move by the steps plus whole cells.

        The middle of the grid follows the summed steps, plus their median offset from the fixes of the
        surrounding two minutes: neither a jump of the fixes nor drift of the odometry carries it away.
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
        """Return the likelihood of each cell; one where the heat map does not reach."""
        try:
            heat_map = None if self._by_fixes else self._heat_maps[int(self._teacher.index[k])]
        except KeyError:
            heat_map = None
        if heat_map is None:
            return np.ones_like(grid.probability)
        pixels, one = self._heat_maps.grid, self._teacher.rows(np.array([k]))
        step = grid.cell_m / (float(one.meters_per_pixel[0]) * pixels.scale)
        row, col = (one.at((grid.corner - self.fix[k])[None])[0] - pixels.origin) / pixels.scale
        # How column and row of the heat map grow with the grid's, eastwards and northwards.
        cos, sin = step * math.cos(one.turn[0]), step * math.sin(one.turn[0])
        seen = grid.resampled(heat_map, np.array([[cos, sin, col], [sin, -cos, row]]))
        return np.asarray((1.0 - _OUTLIER) * seen + _OUTLIER, np.float32)

    def _fix(self, k: int, grid: BeliefGrid) -> Grid:
        # At least a cell wide: a precise fix would fall between the cells.
        variance = self.fix_std[k] ** 2 + grid.cell_m**2
        return np.maximum(grid.normal_likelihood(self.fix[k], variance * np.eye(2)), _MIN_LIKELIHOOD)


def smoothed_beliefs(
    corners: Array, steps: Steps, likelihood: Likelihood, cells: int, cell_m: float
) -> Iterator[tuple[int, BeliefGrid]]:
    """Yield each pair's number k and the belief given all *other* pairs of its chain, last pair first.

    Multiplied with ``likelihood(k, belief)``, it becomes the belief given all pairs. ``corners`` (N, 2) are
    the centres of cell (0, 0), which moves by the steps plus whole cells. A chain of n pairs holds about
    2 sqrt(n) beliefs at a time and evaluates each likelihood three times.
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
    """Return the mean within the likeliest circle, and the covariance of the whole belief about it.

    The mean of a whole belief with two modes would lie between them, where the vehicle is not.
    """
    side = 2 * round(_WRONG_M / 2 / belief.cell_m) + 1
    dense = cv2.blur(belief.probability, (side, side), borderType=cv2.BORDER_CONSTANT)
    row, col = np.unravel_index(int(dense.argmax()), dense.shape)
    near = _within(belief, belief.corner + np.array([col, row]) * belief.cell_m)
    position = BeliefGrid(belief.probability * near, belief.corner, belief.cell_m).mean
    off = belief.mean - position
    return position, belief.covariance + np.outer(off, off)


def _within(belief: BeliefGrid, position: Array) -> NDArray[np.bool_]:
    """Mask of the cells within five metres of a position."""
    x, y = belief.axes
    return np.asarray(np.hypot(x - position[0], (y - position[1])[:, None]) <= _WRONG_M, bool)


def _neighbour_means(values: Array, begins: NDArray[np.bool_]) -> Array:
    """Average each value with its neighbours in the chain."""
    out = np.zeros_like(values)
    for start, end in chains(~begins):
        total = np.concatenate([[0.0], np.cumsum(values[start:end])])
        k = np.arange(end - start)
        first, last = np.maximum(k - _NEIGHBOURS, 0), np.minimum(k + _NEIGHBOURS + 1, end - start)
        out[start:end] = (total[last] - total[first]) / (last - first)
    return out
