"""Roll and pitch of a vehicle on its springs: curves, braking, slopes and the bumps of a poor road."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Static tilt, radians per m/s^2.
_ROLL_GAIN, _PITCH_GAIN = math.radians(0.7), math.radians(0.5)
# The body swings about its axes at this frequency, Hz, with this damping.
_FREQUENCY, _DAMPING = 1.4, 0.35
_STEP_S = 0.02
# Streets fall to the side by a constant, and slopes vary with a standard deviation over a length.
_CROSSFALL = math.radians(1.2)
_SLOPE_ROLL, _SLOPE_PITCH, _SLOPE_M = math.radians(0.7), math.radians(1.5), 40.0
# Standard deviation of the road's height, and bumps, metres.
_ROUGH_M, _BUMP_M, _BETWEEN_BUMPS_M = 0.01, (0.03, 0.06), 120.0
_WHEELBASE_M, _TRACK_M = 2.7, 1.6


def body_tilt(
    speed: Array, curvature: Array, step_m: float, moments: Array, rng: np.random.Generator
) -> Array:
    """Return roll and pitch (n, 2), radians as in REP-103, at ``moments`` (n,), seconds in ascending order.

    ``speed`` (m/s) and ``curvature`` (1/m, left: positive) are those of points ``step_m`` apart along the
    route. ``rng`` draws the road.
    """
    times = np.concatenate([[0.0], np.cumsum(step_m / np.maximum(0.5 * (speed[1:] + speed[:-1]), 0.5))])
    acceleration = np.gradient(speed, step_m) * speed
    rest = _road(len(speed), step_m, rng)
    # The body leans outwards in curves, and dips when braking.
    rest += np.stack([_ROLL_GAIN * curvature * speed**2, -_PITCH_GAIN * acceleration], 1)
    clock = np.arange(0.0, float(moments[-1]) + 2 * _STEP_S, _STEP_S)
    wanted = np.stack([np.interp(clock, times, values) for values in rest.T], 1)
    tilt, rate = wanted[0], np.zeros(2)
    omega = 2 * math.pi * _FREQUENCY
    path = np.empty_like(wanted)
    for k, target in enumerate(wanted):
        rate = rate + _STEP_S * (omega * omega * (target - tilt) - 2 * _DAMPING * omega * rate)
        tilt = tilt + _STEP_S * rate
        path[k] = tilt
    return np.stack([np.interp(moments, clock, values) for values in path.T], 1)


def _road(count: int, step_m: float, rng: np.random.Generator) -> Array:
    """Return roll and pitch (count, 2) of the plane through the four wheels at points of the route."""
    slopes = _smooth_noise(count, _SLOPE_M / step_m, rng) * (_SLOPE_ROLL, _SLOPE_PITCH) + (_CROSSFALL, 0.0)
    # Heights under the left and the right wheels.
    height = _ROUGH_M * _smooth_noise(count, 1.0 / step_m, rng)
    along = np.arange(count) * step_m
    for _ in range(rng.poisson(along[-1] / _BETWEEN_BUMPS_M)):
        middle, top = rng.uniform(0.0, along[-1]), rng.uniform(*_BUMP_M)
        shape = np.exp(-0.5 * ((along - middle) / 0.4) ** 2)
        height += top * shape[:, None] * rng.uniform(0.3, 1.0, 2)
    ahead = [np.interp(along + _WHEELBASE_M / 2, along, wheel) for wheel in height.T]
    behind = [np.interp(along - _WHEELBASE_M / 2, along, wheel) for wheel in height.T]
    roll = (ahead[0] + behind[0] - ahead[1] - behind[1]) / (2 * _TRACK_M)
    pitch = (behind[0] + behind[1] - ahead[0] - ahead[1]) / (2 * _WHEELBASE_M)
    return slopes + np.stack([roll, pitch], 1)


def _smooth_noise(count: int, length: float, rng: np.random.Generator) -> Array:
    """Return two series (count, 2) of noise, standard deviation 1, smooth over ``length`` points."""
    reach = math.ceil(3 * length)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / length) ** 2)
    kernel /= np.linalg.norm(kernel)
    white = rng.standard_normal((2, count + 2 * reach))
    return np.stack([np.convolve(series, kernel, mode="valid") for series in white], 1)
