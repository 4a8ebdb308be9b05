"""Drives through a simulated city: images, fixes, headings, odometry and the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.errors import UserError
from xview_loc.geodesy import wrap_angle
from xview_loc.rig import MountedCamera, Rig
from xview_loc.simulation.city import City
from xview_loc.simulation.objects import Cars, Image, car_looks
from xview_loc.simulation.rigs import VehiclePose, render_rig
from xview_loc.simulation.suspension import body_tilt
from xview_loc.simulation.views import CameraPose, PanoramaView, PinholeView, render_camera, render_panorama

Array = NDArray[np.float64]

# Borders in the west, south, east and north, metres from the city's centre.
Area = tuple[float, float, float, float]

_STEP_M = 0.5  # between points of the route
_MARGIN_M = 70.0  # between the route and the border, so that no tile reaches beyond the city
_WHEELS_HZ = 10.0  # least rate of odometry
_TURN_S = 0.6  # over which yaw rates are averaged: routes have kinks that no vehicle drives


class RouteError(UserError, ValueError):
    """There is no street to drive on."""


@dataclass(frozen=True)
class DriveOptions:
    """Parameters of a drive and its sensors; metres, seconds, radians.

    The error of fixes is a Gauss-Markov bias plus white noise. The bias has a standard deviation per axis of
    ``bias_open_m`` under an open sky, up to ``bias_canyon_m`` between tall buildings, and the correlation
    time ``bias_time_s``. With ``dynamics`` the vehicle tilts in curves, when braking, on slopes and bumps;
    without, only by noise, ``tilt``. None: with dynamics if the drive's view is a rig. ``yaw_rate_bias`` is
    the standard deviation of the gyroscope's constant error, rad/s.
    """

    rate_hz: float = 5.0
    top_speed: float = 12.0
    lateral_acceleration: float = 2.2
    acceleration: float = 1.5
    bias_open_m: float = 4.0
    bias_canyon_m: float = 18.0
    bias_time_s: float = 40.0
    fix_noise_m: float = 0.5
    heading_bias: float = math.radians(1.5)
    heading_noise: float = math.radians(1.0)
    speed_scale: float = 0.01
    speed_noise: float = 0.05
    yaw_rate_noise: float = 0.005
    yaw_rate_bias: float = math.radians(1.0) / 60.0
    tilt: float = math.radians(0.6)
    height_noise_m: float = 0.04
    attitude_bias: float = math.radians(0.3)
    attitude_noise: float = math.radians(0.2)
    dynamics: bool | None = None


@dataclass(frozen=True)
class Truth:
    """True state of the vehicle: metres in the city's plane, degrees, true-north ENU yaw, m/s, rad/s.

    ``roll`` and ``pitch`` are positive with the right side and the nose down, radians. The place is that of
    the camera, with a rig that of ``base_link``.
    """

    east: float
    north: float
    lat: float
    lon: float
    heading: float
    speed: float
    yaw_rate: float
    roll: float = 0.0
    pitch: float = 0.0


@dataclass(frozen=True)
class Fix:
    """A receiver's fix in degrees, with the covariance (2, 2) it claims, ENU m^2."""

    lat: float
    lon: float
    covariance: Array


@dataclass(frozen=True)
class Wheels:
    """What wheel odometry and a gyroscope measure, m/s forward and rad/s; stamp in nanoseconds."""

    stamp_ns: int
    speed: float
    yaw_rate: float


@dataclass(frozen=True)
class Frame:
    """All measurements of one instant, and the truth.

    ``heading`` is the measured true-north ENU yaw with standard deviation ``heading_std``, radians; ``roll``
    and ``pitch`` come from an inertial unit, with standard deviation ``tilt_std``. ``wheels`` are measured
    at least ten times a second, since the frame before and last at this one. A rig has ``images``, one of
    each camera, instead of ``image``.
    """

    stamp_ns: int
    image: Image | None
    truth: Truth
    fix: Fix
    heading: float
    heading_std: float
    wheels: tuple[Wheels, ...]
    roll: float = 0.0
    pitch: float = 0.0
    tilt_std: float = 0.0
    images: dict[str, Image] = field(default_factory=dict)


def sky_blocked(city: City, east: float, north: float) -> float:
    """Return the share (0..1) of the sky behind buildings: mean elevation of the skyline / 90 degrees."""
    yaw = np.linspace(0, 2 * math.pi, 24, endpoint=False)[:, None]
    radius = np.geomspace(3.0, 90.0, 24)
    row, col = city.to_pixel(east + radius * np.cos(yaw), north + radius * np.sin(yaw))
    row, col = (np.clip(np.round(x), 0, city.height.shape[0] - 1).astype(int) for x in (row, col))
    height = city.height[row, col]
    return float(np.arctan(height / radius).max(axis=1).mean() / (math.pi / 2))


def plan_route(city: City, length_m: float, rng: np.random.Generator, area: Area | None = None) -> Array:
    """Return points (n, 2), 0.5 m apart, along the right-hand lane of streets chosen at random.

    With ``area``, only streets that lie entirely inside it are driven. Raises RouteError if there is no such
    street, or none far enough from the border of the city.
    """
    streets, reach = city.streets.streets, city.size_m / 2 - _MARGIN_M
    usable = {i for i, s in enumerate(streets) if np.abs(s.points).max() < reach}
    if not usable:
        # In a small city, take any street whose middle is inside, and cut the route at the border.
        usable = {i for i, s in enumerate(streets) if np.abs(s.at(s.length / 2)).max() < reach}
    if not usable:
        raise RouteError(f"a city of {city.size_m:.0f} m has no street {_MARGIN_M:.0f} m inside its border")
    if area is not None:
        low, high = area[:2], area[2:]
        usable = {i for i in usable if ((streets[i].points >= low) & (streets[i].points <= high)).all()}
        if not usable:
            raise RouteError(f"no street lies within {area} (west, south, east, north, metres)")
    index = int(rng.choice(sorted(usable)))
    node = streets[index].nodes[0]
    pieces, total, visits = [], 0.0, dict.fromkeys(usable, 0)
    while total < length_m:
        street = streets[index]
        forward = street.nodes[0] == node
        s = np.arange(0.0, street.length, _STEP_M)
        # The rightmost lane; driven backwards, it lies on the other side of the centre line.
        lateral = -(street.lanes - 0.5) * street.lane_m
        pieces.append(street.at(s, lateral) if forward else street.at(s, -lateral)[::-1])
        visits[index] += 1
        total += street.length
        node = street.nodes[1] if forward else street.nodes[0]
        onward = [i for i in city.streets.at_node[node] if i in usable and i != index]
        if onward:
            weight = np.array([0.2 ** visits[i] for i in onward])
            index = int(rng.choice(onward, p=weight / weight.sum()))
        # In a dead end, turn round and drive back.
    points = np.concatenate(pieces)
    points = points[(np.abs(points) < reach + _MARGIN_M / 2).all(axis=1)]
    for width in (13, 9):  # round off the corners
        points = np.stack([_smooth(points[:, k], width) for k in (0, 1)], axis=1)
    s = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    even = np.arange(0.0, min(float(s[-1]), length_m), _STEP_M)
    return np.stack([np.interp(even, s, points[:, k]) for k in (0, 1)], axis=1)


def _smooth(values: Array, width: int) -> Array:
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _speed_profile(route: Array, options: DriveOptions) -> tuple[Array, Array]:
    """Return speed in m/s and yaw in radians at each point of the route."""
    step = np.gradient(route, axis=0)
    yaw = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    curvature = np.abs(np.gradient(_smooth(yaw, 7))) / _STEP_M
    speed = np.minimum(options.top_speed, np.sqrt(options.lateral_acceleration / np.maximum(curvature, 1e-3)))
    speed = np.maximum(speed, 1.5)
    gain = 2 * options.acceleration * _STEP_M
    for i in range(1, len(speed)):
        speed[i] = min(speed[i], math.sqrt(speed[i - 1] ** 2 + gain))
    for i in range(len(speed) - 2, -1, -1):
        speed[i] = min(speed[i], math.sqrt(speed[i + 1] ** 2 + gain))
    return speed, yaw


def traffic_near(city: City, east: float, north: float, time_s: float, seed: int) -> Cars:
    """Return the cars that move along the streets around a place; the seed fixes the flow of each street."""
    centres, axes, picks = [], [], []
    for index, street in enumerate(city.streets.streets):
        if np.hypot(*(street.points - (east, north)).T).min() > 80.0:
            continue
        rng = np.random.default_rng([seed, index])
        for _ in range(rng.poisson(city.style.traffic * street.length / 45.0)):
            sign = 1.0 if rng.random() < 0.5 else -1.0
            s = (rng.uniform(0, street.length) + sign * rng.uniform(4.0, 11.0) * time_s) % street.length
            lane = int(rng.integers(0, street.lanes)) + 0.5
            centres.append(street.at(s, -sign * lane * street.lane_m)[0])
            axes.append(street.tangent(s)[0] * sign)
            picks.append(rng.integers(0, 1 << 30))
    looks = [car_looks(1, np.random.default_rng(int(pick))) for pick in picks]
    colour = np.array([colour for (colour,), _ in looks], np.float32).reshape(-1, 3)
    scale = np.array([scale for _, (scale,) in looks], np.float32)
    place = np.array(centres).reshape(-1, 2)
    # Keep cars from driving into the vehicle.
    clear = np.hypot(*(place - (east, north)).T) > 5.5
    return Cars(place[clear], np.array(axes).reshape(-1, 2)[clear], colour[clear], scale[clear])


def drive(
    city: City,
    frames: int,
    seed: int = 0,
    *,
    options: DriveOptions | None = None,
    view: PanoramaView | PinholeView | Rig | None = PanoramaView(),  # noqa: B008 - frozen
    area: Area | None = None,
) -> Iterator[Frame]:
    """Drive along random streets for a number of frames; the same arguments give the same frames.

    ``view`` is the camera or the rig, or None for a drive without images. ``area`` keeps the drive to the
    streets in it. Raises RouteError if there is none.
    """
    options = options or DriveOptions()
    rng = np.random.default_rng([seed, city.seed, 4])
    camera_rng, attitude_rng, road_rng, wheels_rng = (
        np.random.default_rng([seed, city.seed, n]) for n in (5, 6, 7, 8)
    )
    period = 1.0 / options.rate_hz
    route = plan_route(city, frames * period * options.top_speed + 10.0, rng, area)
    speeds, yaws = _speed_profile(route, options)
    # Times at the points of the route; frames are evenly spaced in time.
    times = np.concatenate([[0.0], np.cumsum(_STEP_M / np.maximum(0.5 * (speeds[1:] + speeds[:-1]), 0.5))])
    s_of_time = np.arange(len(route)) * _STEP_M
    keep = math.exp(-period / options.bias_time_s)
    innovation = math.sqrt(1.0 - keep * keep)
    bias = rng.normal(size=2)
    heading_bias = rng.normal() * options.heading_bias
    speed_scale = 1.0 + rng.normal() * options.speed_scale
    gyro_bias = wheels_rng.normal() * options.yaw_rate_bias
    wheel_steps = max(1, math.ceil(_WHEELS_HZ / options.rate_hz))
    wheel_period = period / wheel_steps

    def turning(time_s: float) -> float:
        before, after = np.interp((time_s - _TURN_S / 2, time_s + _TURN_S / 2), times, yaws)
        return float(after - before) / _TURN_S

    wander, tilt = float(rng.normal()) * 0.2, rng.normal(size=2) * options.tilt
    dynamics = isinstance(view, Rig) if options.dynamics is None else options.dynamics
    if dynamics:
        curvature = np.gradient(_smooth(yaws, 7)) / _STEP_M
        tilts = body_tilt(speeds, curvature, _STEP_M, np.arange(frames, dtype=np.float64) * period, road_rng)
    attitude_bias = attitude_rng.normal(size=2) * options.attitude_bias
    ground = view.height if isinstance(view, Rig) else city.style.camera_height_m
    blocked = sky_blocked(city, *route[0])
    for k in range(frames):
        time_s = k * period
        position = np.interp(min(time_s, times[-1]), times, s_of_time) / _STEP_M
        i = min(int(position), len(route) - 2)
        f = position - i
        yaw = float((1 - f) * yaws[i] + f * yaws[i + 1])
        wander = 0.97 * wander + 0.05 * rng.normal()
        tilt = 0.9 * tilt + math.sqrt(1 - 0.81) * options.tilt * rng.normal(size=2)
        place = (1 - f) * route[i] + f * route[i + 1]
        east = float(place[0] - wander * math.sin(yaw))
        north = float(place[1] + wander * math.cos(yaw))
        speed = float((1 - f) * speeds[i] + f * speeds[i + 1])
        yaw_rate = turning(time_s)
        lat, lon = (float(v) for v in city.to_latlon(east, north))
        # `yaw` is in the axes of the plane; true north differs by the meridian convergence.
        heading = wrap_angle(yaw - city.projection.convergence(lat, lon))
        roll, pitch = map(float, tilts[k] if dynamics else tilt[::-1])
        truth = Truth(east, north, lat, lon, heading, speed, yaw_rate, roll, pitch)

        bias = keep * bias + innovation * rng.normal(size=2)
        blocked = 0.9 * blocked + 0.1 * sky_blocked(city, east, north)
        canyon = min(1.0, blocked / 0.45)
        sigma = options.bias_open_m + canyon * (options.bias_canyon_m - options.bias_open_m)
        error = sigma * bias + options.fix_noise_m * rng.normal(size=2)
        fix_lat, fix_lon = (float(v) for v in city.to_latlon(east + error[0], north + error[1]))
        variance = sigma**2 + options.fix_noise_m**2
        measured = wrap_angle(heading + heading_bias + options.heading_noise * rng.normal())
        wheels = []
        for left in range(0 if k == 0 else wheel_steps - 1, -1, -1):
            # The last one's noise comes from the frames' own random numbers.
            noise, moment = (wheels_rng, time_s - left * wheel_period) if left else (rng, time_s)
            moving = float(np.interp(moment, times, speeds)) * speed_scale
            turned = turning(moment) + gyro_bias
            moving += options.speed_noise * noise.normal()
            turned += options.yaw_rate_noise * noise.normal()
            wheels.append(Wheels(round(moment * 1e9), moving, turned))
        measured_tilt = attitude_bias + (roll, pitch) + options.attitude_noise * attitude_rng.normal(size=2)
        height = ground + options.height_noise_m * rng.normal()
        pose = (east, north, yaw, height, pitch, roll)
        image, images = None, {}
        if view is not None:
            traffic = traffic_near(city, east, north, time_s, seed)
            seen: dict[str, Any] = {"traffic": traffic, "rng": camera_rng}
        if isinstance(view, Rig):
            images = render_rig(city, VehiclePose(*pose), view, **seen)
        elif isinstance(view, PanoramaView) and not dynamics:
            image = render_panorama(city, CameraPose(*pose), view, **seen)
        elif view is not None:
            image = render_camera(city, CameraPose(*pose), MountedCamera(view.camera), **seen)
        yield Frame(
            stamp_ns=round(time_s * 1e9),
            image=image,
            truth=truth,
            fix=Fix(fix_lat, fix_lon, np.eye(2) * variance),
            heading=measured,
            heading_std=math.hypot(options.heading_bias, options.heading_noise),
            wheels=tuple(wheels),
            roll=float(measured_tilt[0]),
            pitch=float(measured_tilt[1]),
            tilt_std=math.hypot(options.attitude_bias, options.attitude_noise),
            images=images,
        )
