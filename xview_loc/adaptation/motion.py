"""How a vehicle moved from pair to pair, and how sure that is: from odometry, and from its coarse fixes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.datasets.base import Track

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

# A receiver's errors stay alike for about so long, seconds; beside that each fix has some of its own, m.
FIX_CORRELATION_S = 30.0
_FIX_NOISE_M = 0.7
# Without odometry, so long a time says nothing of where it went.
_LONGEST_S = 20.0
# Odometry's own noise: variance of a step, m^2, and what each metre driven adds, m^2 / m.
_STEP_VARIANCE, _VARIANCE_PER_M = 0.2**2, 0.02
# What odometry and two fixes say of a step contradicts where they are so many standard deviations apart.
_SIGMAS = 5.0
# Where only fixes say how it moved, its velocity is constant but for accelerations like this, m / s^2.
_ACCELERATION, _TOP_SPEED = 2.0, 15.0
# The errors of such velocities last longer than a step.
_VELOCITY_INFLATION = 2.0
# Odometry's scale and heading are fitted over so many metres on either side; how far off they may be.
_GAIN_REACH_M, _GAIN_STD = 300.0, 0.3


@dataclass(frozen=True, eq=False)
class Steps:
    """From the pair before to each pair (N,).

    linked: whether anything is known of it; False begins a new chain. mean: (N, 2), metres east and north.
    variance: (N,), on each axis, m^2.
    """

    linked: NDArray[np.bool_]
    mean: Array
    variance: Array

    @property
    def length(self) -> Array:
        """Metres (N,)."""
        return np.asarray(np.hypot(*self.mean.T), np.float64)


def steps_along(track: Track, fix_std: Array, gain: Complex | None = None, looseness: float = 1.0) -> Steps:
    """What odometry and fixes together say; odometry alone is much surer where there is any.

    A fix's error is a slow random walk, so that two fixes in a row tell a step better than a place. Without
    odometry their velocities are smoothed, which also bridges a jump of theirs. ``fix_std`` (N,): metres.
    ``gain`` (N,): what odometry's steps are multiplied with; ``looseness``: what their variance is.
    """
    seconds = np.diff(track.stamp_ns, prepend=track.stamp_ns[0]) / 1e9
    same = (np.diff(track.drive, prepend=-1) == 0) & (seconds > 0.0)
    walked = 2.0 * np.maximum(fix_std, np.roll(fix_std, 1)) ** 2 * np.minimum(seconds / FIX_CORRELATION_S, 1)
    fix_variance = walked + 2.0 * _FIX_NOISE_M**2
    fix_steps = track.fix_steps
    linked = same & (seconds <= _LONGEST_S)
    mean, variance = np.zeros((len(same), 2)), np.zeros(len(same))
    for start, end in chains(linked):
        own = slice(start + 1, end)
        if end - start > 1:
            mean[own], variance[own] = _smoothed_velocity(fix_steps[own], fix_variance[own], seconds[own])
    driven = track.moved if gain is None else _turned(track.moved, gain)
    known = same & np.isfinite(driven).all(1)
    noise = (_STEP_VARIANCE + _VARIANCE_PER_M * np.hypot(*driven[known].T)) * looseness
    off = ((driven - fix_steps)[known] ** 2).sum(1)
    weight = np.where(off > _SIGMAS**2 * (noise + fix_variance[known]), 0.0, noise / fix_variance[known])
    mean[known] = (driven[known] + weight[:, None] * fix_steps[known]) / (1.0 + weight[:, None])
    variance[known] = noise / (1.0 + weight)
    return Steps(linked | known, mean, variance)


def chains(linked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, end) of each stretch of pairs that steps link."""
    starts = np.flatnonzero(~linked)
    return [(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(linked)], strict=True)]


def _smoothed_velocity(steps: Array, variance: Array, seconds: Array) -> tuple[Array, Array]:
    """Steps and their variances from a constant-velocity model: a Kalman filter and smoother over them."""
    velocity, spread = np.zeros(2), _TOP_SPEED**2
    before: list[tuple[Array, float]] = []
    after: list[tuple[Array, float]] = []
    for step, step_variance, dt in zip(steps, variance, seconds, strict=True):
        spread += _ACCELERATION**2 * dt if before else 0.0
        before.append((velocity, spread))
        innovation, noise = step / dt - velocity, step_variance / dt**2
        # A jump of the fix tells no velocity.
        if innovation @ innovation <= _SIGMAS**2 * (spread + noise):
            share = spread / (spread + noise)
            velocity, spread = velocity + share * innovation, (1.0 - share) * spread
        after.append((velocity, spread))
    smooth = [after[-1]]
    for (mean, own), (predicted, wide) in zip(after[-2::-1], before[:0:-1], strict=True):
        share = own / wide
        later, tight = smooth[-1]
        smooth.append((mean + share * (later - predicted), own + share**2 * (tight - wide)))
    velocities = np.array([mean for mean, _ in reversed(smooth)])
    spreads = np.array([own for _, own in reversed(smooth)])
    within = _ACCELERATION**2 * seconds**3 / 12.0
    return velocities * seconds[:, None], _VELOCITY_INFLATION * spreads * seconds**2 + within


def odometry_gain(track: Track, place: Array, weight: Array) -> Complex:
    """What odometry's steps are to be multiplied with (N,), a complex number each: its scale and its turn.

    Fitted to places along the way: least squares over all within 300 m on either side, held at one as far as
    these say nothing. place: (N, 2), metres. weight: (N,), one over its variance, m^2.
    """
    known = np.isfinite(track.moved).all(1)
    step = np.where(known, track.moved @ (1.0, 1j), 0.0).astype(np.complex128)
    # No window reaches from one drive into another.
    between = 3.0 * _GAIN_REACH_M * np.cumsum(np.diff(track.drive, prepend=track.drive[0]) != 0)
    reckoned, driven = np.cumsum(step), np.cumsum(np.abs(step)) + between
    # Over what odometry did not see, a stretch lies anywhere from the one before.
    seen, stretch = np.asarray(place @ (1.0, 1j), np.complex128), np.cumsum(~known)
    gain = np.ones(len(step), np.complex128)
    least = _GAIN_STD**-2
    for k in np.flatnonzero(known):
        first, last = np.searchsorted(driven, (driven[k] - _GAIN_REACH_M, driven[k] + _GAIN_REACH_M))
        share = weight[first:last]
        own, other = (
            _about_means(x[first:last], share, stretch[first:last] - stretch[first]) for x in (reckoned, seen)
        )
        gain[k] = ((share * own.conj()) @ other + least) / (share @ np.abs(own) ** 2 + least)
    return gain


def _about_means(values: Complex, weight: Array, group: NDArray[np.int64]) -> Complex:
    total = np.bincount(group, weight)
    real, imaginary = (np.bincount(group, weight * part) for part in (values.real, values.imag))
    return values - ((real + 1j * imaginary) / np.maximum(total, 1e-12))[group]


def _turned(moved: Array, gain: Complex) -> Array:
    driven = (moved @ (1.0, 1j)) * gain
    return np.stack([driven.real, driven.imag], 1)
