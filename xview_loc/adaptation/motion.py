"""Motion of a vehicle from pair to pair, with its variance, from odometry and coarse fixes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.datasets.base import Track
from xview_loc.vehicle.course import fix_step_variance

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

# Longest step that fixes alone can bridge.
_LONGEST_S = 20.0
# Noise of odometry: variance per step, m^2, and per metre driven, m^2 / m.
_STEP_VARIANCE, _VARIANCE_PER_M = 0.2**2, 0.02
# Standard deviations beyond which a fix's step contradicts odometry or the smoothed velocity.
_SIGMAS = 5.0
# Without odometry: standard deviation of the acceleration, m / s^2, and of the velocity at first, m / s.
_ACCELERATION, _TOP_SPEED = 2.0, 15.0
# Factor on the variance of these velocities, whose errors last longer than a step.
_VELOCITY_INFLATION = 2.0
# Distance, on either side, over which odometry's scale and heading are fitted; standard deviation of their
# prior.
_GAIN_REACH_M, _GAIN_STD = 300.0, 0.3


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps from the previous pair to each pair: mean (N, 2), metres east and north, variance per axis, m^2.

    ``linked`` is False where the step is unknown, which begins a new chain.
    """

    linked: NDArray[np.bool_]
    mean: Array
    variance: Array

    @property
    def length(self) -> Array:
        """Lengths (N,), metres."""
        return np.asarray(np.hypot(*self.mean.T), np.float64)


def from_drives(track: Track) -> bool:
    """Return True if most pairs are linked to the previous one: by odometry, or within 20 s by fixes."""
    _, linked = links(track)
    return bool(2 * linked.sum() >= len(linked))


def links(track: Track) -> tuple[Array, NDArray[np.bool_]]:
    """Return the seconds (N,) since the previous pair, and whether the step from it is known."""
    seconds = np.diff(track.stamp_ns, prepend=track.stamp_ns[0]) / 1e9
    same = (np.diff(track.drive, prepend=-1) == 0) & (seconds > 0.0)
    return seconds, same & ((seconds <= _LONGEST_S) | np.isfinite(track.moved).all(1))


def steps_along(track: Track, fix_std: Array, gain: Complex | None = None, looseness: float = 1.0) -> Steps:
    """Fuse odometry, much the more precise where there is any, with the steps between fixes.

    Without odometry, velocities from fixes are smoothed, which also bridges a jump of the fixes. ``fix_std``
    (N,) is in metres, ``gain`` (N,) multiplies odometry's steps, ``looseness`` their variance.
    """
    seconds, linked = links(track)
    fix_variance = fix_step_variance(np.maximum(fix_std, np.roll(fix_std, 1)), seconds)
    fix_steps = track.fix_steps
    mean, variance = np.zeros((len(linked), 2)), np.zeros(len(linked))
    for start, end in chains(linked & (seconds <= _LONGEST_S)):
        own = slice(start + 1, end)
        if end - start > 1:
            mean[own], variance[own] = _smoothed_velocity(fix_steps[own], fix_variance[own], seconds[own])
    driven = track.moved
    if gain is not None:
        turned = (driven @ (1.0, 1j)) * gain
        driven = np.stack([turned.real, turned.imag], 1)
    known = linked & np.isfinite(driven).all(1)
    noise = (_STEP_VARIANCE + _VARIANCE_PER_M * np.hypot(*driven[known].T)) * looseness
    off = ((driven - fix_steps)[known] ** 2).sum(1)
    weight = np.where(off > _SIGMAS**2 * (noise + fix_variance[known]), 0.0, noise / fix_variance[known])
    mean[known] = (driven[known] + weight[:, None] * fix_steps[known]) / (1.0 + weight[:, None])
    variance[known] = noise / (1.0 + weight)
    return Steps(linked, mean, variance)


def chains(linked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (start, end) of each run of linked pairs."""
    starts = np.flatnonzero(~linked)
    return [(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(linked)], strict=True)]


def _smoothed_velocity(steps: Array, variance: Array, seconds: Array) -> tuple[Array, Array]:
    """Smooth steps with a constant-velocity model (Kalman filter and smoother); return them and variances."""
    velocity, spread = np.zeros(2), _TOP_SPEED**2
    before: list[tuple[Array, float]] = []
    after: list[tuple[Array, float]] = []
    for step, step_variance, dt in zip(steps, variance, seconds, strict=True):
        spread += _ACCELERATION**2 * dt if before else 0.0
        before.append((velocity, spread))
        innovation, noise = step / dt - velocity, step_variance / dt**2
        # A jump of the fix measures no velocity.
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


def odometry_gain(track: Track, position: Array, weight: Array) -> Complex:
    """Fit the complex factors (N,) on odometry's steps, its scale and its turn, to positions along the way.

    Weighted least squares over 300 m on either side, with a prior at one. ``weight`` (N,) are the inverse
    variances of ``position`` (N, 2), 1 / m^2.
    """
    known = np.isfinite(track.moved).all(1)
    step = np.where(known, track.moved @ (1.0, 1j), 0.0).astype(np.complex128)
    # No window reaches from one drive into another.
    between = 3.0 * _GAIN_REACH_M * np.cumsum(np.diff(track.drive, prepend=track.drive[0]) != 0)
    reckoned, driven = np.cumsum(step), np.cumsum(np.abs(step)) + between
    # A gap in odometry begins a new stretch, at an unknown position from the previous one.
    seen, stretch = np.asarray(position @ (1.0, 1j), np.complex128), np.cumsum(~known)
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
    """Subtract the weighted mean of its group from each value."""
    total = np.bincount(group, weight)
    real, imaginary = (np.bincount(group, weight * part) for part in (values.real, values.imag))
    return values - ((real + 1j * imaginary) / np.maximum(total, 1e-12))[group]
