"""Tracing the rays of a street view: a polar march over the height field, surface colours, and the sky.

For each column of the image the height field is sampled along a ray, at radii that grow geometrically. The
running maximum of the samples' elevation angles gives, for all rows at once, the radius at which each ray
first meets the surface; a few bisections sharpen it. The cost is columns x radii, with no loop over pixels.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.city import City
from xview_loc.simulation.objects import Cars, Floats, Image
from xview_loc.simulation.solids import (
    CLOUDS,
    FINE,
    SIDE,
    Ints,
    RayGrid,
    StreetImage,
    draw_cars,
    draw_crowns,
    draw_posts,
)
from xview_loc.simulation.styles import Style

_RADII = np.geomspace(0.45, 260.0, 160).astype(np.float32)


def _pixel_index(city: City, east: Floats, north: Floats) -> Ints:
    half, side = city.size_m / 2, city.height.shape[0]
    col = ((east + half) * (1.0 / city.gsd)).astype(np.int32)
    row = ((half - north) * (1.0 / city.gsd)).astype(np.int32)
    np.clip(col, 0, side - 1, out=col)
    np.clip(row, 0, side - 1, out=row)
    return (row * side + col).astype(np.int64)


def _march(city: City, rays: RayGrid, tan: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return range, height of the surface, and whether it is an object, (columns, rows) from the bottom up.

    The range is infinite where a ray meets nothing.
    """
    columns, count = len(rays.yaw), len(_RADII)
    cos, sin = np.cos(rays.yaw)[:, None], np.sin(rays.yaw)[:, None]
    heights = city.height.ravel()
    east, north = np.float32(rays.east), np.float32(rays.north)
    sampled = heights[_pixel_index(city, east + cos * _RADII, north + sin * _RADII)]
    slope = (sampled - np.float32(rays.height)) / _RADII
    np.maximum.accumulate(slope, axis=1, out=slope)
    # Number of rows, from the bottom, that look below the running maximum of each sample.
    below = np.floor((np.arctan(slope) - rays.offset[:, None] - rays.bottom) / rays.step + 0.5).astype(
        np.int32
    )
    np.clip(below, 0, rays.rows, out=below)
    below += np.arange(columns, dtype=np.int32)[:, None] * (rays.rows + 1)
    passed = np.bincount(below.ravel(), minlength=columns * (rays.rows + 1)).reshape(columns, -1)
    first = np.cumsum(passed, axis=1)[:, : rays.rows]  # first sample that reaches above the ray
    missed = first == count
    first = np.minimum(first, count - 1)
    with np.errstate(divide="ignore"):
        distance = np.where(tan < 0, -np.float32(rays.height) / tan, np.inf).astype(np.float32)
    surface = np.take_along_axis(sampled, first, axis=1)
    is_object = (surface > 0.05) & ~missed
    col, row = np.nonzero(is_object)
    if len(col):
        index = first[col, row]
        high, low = _RADII[index], _RADII[np.maximum(index - 1, 0)]
        tangent, c, s = tan[col, row], cos[col, 0], sin[col, 0]
        top = surface[col, row]
        for _ in range(4):
            middle = 0.5 * (low + high)
            height = heights[_pixel_index(city, east + c * middle, north + s * middle)]
            hit = height >= rays.height + middle * tangent
            high = np.where(hit, middle, high)
            low = np.where(hit, low, middle)
            top = np.where(hit, height, top)
        # Ground in front of the foot of a wall stays ground.
        ground = distance[col, row] < high
        high = np.where(ground, distance[col, row], high)
        distance[col, row] = high
        surface[col, row] = np.where(ground, 0.0, top)
        is_object[col, row] = ~ground
    return distance, surface, is_object


def _ground_colour(city: City, east: Floats, north: Floats, distance: Floats) -> Floats:
    """Return the lit colour (n, 3) of ground and roofs at places (n,)."""
    row, col = city.to_pixel(east, north)

    def sample(image: Image, zoom: float, chosen: Any = slice(None)) -> NDArray[Any]:
        x, y = (((v[chosen] + 0.5) * zoom - 0.5).astype(np.float32) for v in (col, row))
        # OpenCV remaps at most 32767 pixels along an axis.
        parts = [
            cv2.remap(
                image,
                x[None, k : k + 30000],
                y[None, k : k + 30000],
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )[0]
            for k in range(0, len(x), 30000)
        ]
        return np.concatenate(parts).astype(np.float32)

    colour = sample(city.ground_far, 0.25)
    near = distance < 26.0
    if near.any():
        paint = sample(city.marking, 2.0, near)[:, None] * (1 / 255)
        close = sample(city.ground, 1.0, near)
        grain = ((east[near] * 24).astype(np.int32) & (SIDE - 1)) * SIDE
        grain += (north[near] * 24).astype(np.int32) & (SIDE - 1)
        fade = np.maximum(0.0, 1.0 - distance[near] / 9.0) * 0.05
        close *= (1.0 + FINE[grain] * fade)[:, None]
        close += paint * (np.asarray(city.style.marking, np.float32) - close)
        share = np.clip((distance[near] - 14.0) / 12.0, 0.0, 1.0)[:, None]
        colour[near] = share * colour[near] + (1 - share) * close
    return np.asarray(colour * (sample(city.light, 1.0)[:, None] * (1 / 255)))


def _wall_colour(
    city: City, east: Floats, north: Floats, z: Floats, number: Ints, distance: Floats
) -> Floats:
    """Return the lit colour (n, 3) of upright faces of the boxes ``number``."""
    boxes, style = city.boxes, city.style
    dx, dy = east - boxes.centre[number, 0], north - boxes.centre[number, 1]
    ax, ay = boxes.axis[number, 0], boxes.axis[number, 1]
    u, v = dx * ax + dy * ay, -dx * ay + dy * ax
    a, b = boxes.half[number, 0], boxes.half[number, 1]
    end = (a - np.abs(u)) < (b - np.abs(v))  # an end wall, its normal along the axis
    along = np.where(end, v, u)
    sign = np.where(end, np.sign(u), np.sign(v))
    nx, ny = np.where(end, ax, -ay) * sign, np.where(end, ay, ax) * sign
    azimuth, elevation = np.radians(style.ground_sun)
    sun = (nx * math.sin(azimuth) + ny * math.cos(azimuth)) * math.cos(elevation)
    light = 1.0 - style.ground_shadow * (0.55 - 0.75 * np.maximum(sun, -0.25))
    colour = boxes.wall[number].copy()
    floor, spacing = boxes.floor_m[number], boxes.window_m[number]
    has = floor > 0
    fx = (along / spacing + 0.5) % 1.0
    storey = z / np.where(has, floor, 1.0)
    fz = storey % 1.0
    half = np.where(end, b, a)
    inside = (np.abs(along) < half - 0.5) & (z < boxes.height[number] - 0.4)
    shop = (number % 5 == 0) & (storey < 1.0)
    window = has & inside & (np.abs(fx - 0.5) < 0.26) & (fz > 0.32) & (fz < 0.82)
    window |= shop & has & inside & (np.abs(fx - 0.5) < 0.43) & (fz > 0.1) & (fz < 0.85)
    door = has & ~shop & (np.abs(along) < 0.65) & (z < 2.2) & ~end
    # Far windows blend into the wall: a pixel holds more than one.
    sharp = np.clip(1.25 - distance / 110.0, 0.25, 1.0)[:, None]
    sky = np.asarray(style.sky_low, np.float32)
    bright = (number * 7 + storey.astype(np.int64) * 3) % 4 == 0
    pane = 0.7 * boxes.glass[number] + 0.3 * sky * bright[:, None]
    colour = np.where(window[:, None], (1 - sharp) * colour + sharp * pane, colour)
    colour = np.where(door[:, None], colour * 0.4, colour)
    colour *= np.where(has & (z < 0.6), 0.78, 1.0)[:, None]
    index = ((along * 5).astype(np.int64) & (SIDE - 1)) * SIDE + ((z * 5).astype(np.int64) & (SIDE - 1))
    colour *= (light * (1.0 + 0.03 * FINE[index]))[:, None]
    return np.asarray(colour, np.float32)


def _sky(rays: RayGrid, elevation: Floats, style: Style) -> Floats:
    share = np.clip(elevation / math.radians(35.0), 0.0, 1.0)[..., None]
    low, top = np.asarray(style.sky_low, np.float32), np.asarray(style.sky_top, np.float32)
    colour = low + (top - low) * np.sqrt(share)
    if style.clouds > 0.02:
        x = (rays.yaw * (512 / (2 * math.pi)) % 512).astype(np.float32)[:, None] + np.zeros_like(elevation)
        y = np.clip(elevation * (256 / math.radians(60)), 0, 255).astype(np.float32)
        cloud = cv2.remap(CLOUDS, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        cover = np.clip(0.6 * cloud + 1.6 * style.clouds - 0.8, 0.0, 1.0)[..., None]
        colour = colour + cover * (np.float32(225.0) + 14 * cloud[..., None] - colour) * 0.8
    return np.asarray(colour, np.float32)


def trace(city: City, rays: RayGrid, traffic: Cars | None) -> Image:
    """Return the RGB image (rows, columns, 3) of a grid of rays, before the effects of the camera."""
    style = city.style
    centres = (rays.bottom + (np.arange(rays.rows) + 0.5) * rays.step).astype(np.float32)
    elevation = centres[None, :] + rays.offset[:, None]
    tan = np.tan(elevation)
    distance, surface, is_object = _march(city, rays, tan)
    image = StreetImage(rays, tan)
    image.colour[:] = _sky(rays, elevation, style).reshape(-1, 3)
    flat = distance.ravel()
    reached = np.flatnonzero(flat < 600.0)
    col = reached // rays.rows
    r = flat[reached]
    east = (np.float32(rays.east) + image.cos[col] * r).astype(np.float32)
    north = (np.float32(rays.north) + image.sin[col] * r).astype(np.float32)
    z = rays.height + r * image.tan[reached]
    number = city.objects.ravel()[_pixel_index(city, east, north)].astype(np.int64) - 1
    wall = is_object.ravel()[reached] & (surface.ravel()[reached] - z > 0.3) & (number >= 0)
    colour = np.empty((len(reached), 3), np.float32)
    ground = ~wall
    if ground.any():
        colour[ground] = _ground_colour(city, east[ground], north[ground], r[ground])
    if wall.any():
        colour[wall] = _wall_colour(city, east[wall], north[wall], z[wall], number[wall], r[wall])
    image.colour[reached] = colour
    image.distance[reached] = r
    draw_crowns(image, city)
    draw_posts(image, city)
    draw_cars(image, city.cars, style)
    if traffic is not None:
        draw_cars(image, traffic, style)
    seen = np.isfinite(image.distance)
    veil = np.where(seen, 1.0 - np.exp(-np.where(seen, image.distance, 0.0) / style.haze_m), 0.0)[:, None]
    image.colour += veil * (np.asarray(style.sky_low, np.float32) - image.colour)
    pixels = image.colour.reshape(len(rays.yaw), rays.rows, 3)[:, ::-1].transpose(1, 0, 2)
    return np.asarray(np.clip(pixels, 0, 255).astype(np.uint8))
