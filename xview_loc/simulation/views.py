"""What a vehicle's camera sees of a simulated city: panoramas and pinhole views by a polar march.

For each column of the image the height field is sampled along a ray at radii that grow geometrically. The
running maximum of the samples' elevation angles says, for every row at once, at which radius the row's ray
first meets the surface; a few bisections sharpen it. The cost is columns x radii, with no loop over pixels.
Crowns, trunks, posts and cars are solids that are intersected exactly, all (solid, pixel) pairs at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.city import Cars, City, Floats, Image, colour_matrix
from xview_loc.simulation.styles import Style

Ints = NDArray[np.int64]

_RADII = np.geomspace(0.45, 260.0, 160).astype(np.float32)
_TREE_RANGE_M = 90.0
_CAR_RANGE_M = 70.0
_NOISE = 256  # side of the noise textures, a power of two
# A car's body and cabin, in metres: half length, half width, bottom, top, and the centre's shift forward.
_CAR_BOXES = ((2.2, 0.9, 0.22, 0.86, 0.0), (1.25, 0.78, 0.86, 1.46, -0.25))


@dataclass(frozen=True)
class CameraPose:
    """Where the camera is: metres in the city's plane, heading (ENU yaw), height and tilt, radians.

    ``pitch`` is positive with the nose down and ``roll`` with the right side down, as in REP-103.
    """

    east: float
    north: float
    heading: float
    height: float = 1.7
    pitch: float = 0.0
    roll: float = 0.0


@dataclass(frozen=True)
class PanoramaView:
    """An equirectangular image: all round, from ``top_deg`` down to ``bottom_deg`` elevation.

    The border between the two middle columns looks along the heading; columns to the right look clockwise.
    The default, 128 x 512 from +30 to -60 degrees, has square pixels of 0.70 degrees.
    """

    height: int = 128
    width: int = 512
    top_deg: float = 30.0
    bottom_deg: float = -60.0


@dataclass(frozen=True)
class PinholeView:
    """An ideal pinhole image that looks along the heading; ``fov_deg`` is the horizontal field of view."""

    height: int = 256
    width: int = 1024
    fov_deg: float = 80.0

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The 3 x 3 camera matrix K, in pixel-centre coordinates."""
        focal = self.width / 2 / math.tan(math.radians(self.fov_deg) / 2)
        return np.array([[focal, 0, (self.width - 1) / 2], [0, focal, (self.height - 1) / 2], [0, 0, 1]])


@dataclass(frozen=True)
class _Rays:
    """A grid of rays: yaw per column, elevation per row plus an offset per column, radians."""

    yaw: Floats
    top: float
    step: float
    rows: int
    offset: Floats
    full: bool  # the columns go once round


class _Textures:
    """Fixed noise, shared by all renderings: a texture must stay where it is from frame to frame."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.fine = rng.standard_normal((_NOISE, _NOISE)).astype(np.float32).ravel()
        smooth = [
            cv2.GaussianBlur(rng.standard_normal((_NOISE, _NOISE)).astype(np.float32), (0, 0), sigma)
            for sigma in (2.0, 5.0)
        ]
        self.leaves = sum(s / s.std() for s in smooth).astype(np.float32).ravel()
        cloud = sum(
            cv2.resize(
                rng.standard_normal((n, 2 * n)).astype(np.float32), (576, 256), interpolation=cv2.INTER_CUBIC
            )
            for n in (3, 6, 12, 24)
        )
        # The first columns fade into what follows the last, so that the sky closes on itself.
        fade = np.linspace(0.0, 1.0, 64, dtype=np.float32)
        cloud = np.asarray(cloud, np.float32) / 2.0
        cloud[:, :64] = fade * cloud[:, :64] + (1 - fade) * cloud[:, 512:]
        self.cloud = np.ascontiguousarray(cloud[:, :512])


_TEXTURES = _Textures()


def _pixel_index(city: City, east: Floats, north: Floats) -> Ints:
    half, side = city.size_m / 2, city.height.shape[0]
    col = ((east + half) * (1.0 / city.gsd)).astype(np.int32)
    row = ((half - north) * (1.0 / city.gsd)).astype(np.int32)
    np.clip(col, 0, side - 1, out=col)
    np.clip(row, 0, side - 1, out=row)
    return (row * side + col).astype(np.int64)


def _march(
    city: City, pose: CameraPose, rays: _Rays, tan: Floats
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """(range, height of the surface there, is it an object) per ray, (columns, rows) from the bottom up.

    Range is infinite where a ray meets nothing.
    """
    columns, count = len(rays.yaw), len(_RADII)
    cos, sin = np.cos(rays.yaw)[:, None], np.sin(rays.yaw)[:, None]
    heights = city.height.ravel()
    east, north = np.float32(pose.east), np.float32(pose.north)
    sampled = heights[_pixel_index(city, east + cos * _RADII, north + sin * _RADII)]
    slope = (sampled - np.float32(pose.height)) / _RADII
    np.maximum.accumulate(slope, axis=1, out=slope)
    bottom = rays.top - rays.rows * rays.step
    # How many rows, from the bottom, look below each sample's running maximum.
    below = np.floor((np.arctan(slope) - rays.offset[:, None] - bottom) / rays.step + 0.5).astype(np.int32)
    np.clip(below, 0, rays.rows, out=below)
    below += np.arange(columns, dtype=np.int32)[:, None] * (rays.rows + 1)
    passed = np.bincount(below.ravel(), minlength=columns * (rays.rows + 1)).reshape(columns, -1)
    first = np.cumsum(passed, axis=1)[:, : rays.rows]  # first sample that reaches above the ray
    missed = first == count
    first = np.minimum(first, count - 1)
    with np.errstate(divide="ignore"):
        flat = np.where(tan < 0, -np.float32(pose.height) / tan, np.inf)
    surface = np.take_along_axis(sampled, first, axis=1)
    is_object = (surface > 0.05) & ~missed
    distance = np.where(tan < 0, flat, np.inf).astype(np.float32)
    col, row = np.nonzero(is_object)
    if len(col):
        index = first[col, row]
        high, low = _RADII[index], _RADII[np.maximum(index - 1, 0)]
        tangent, c, s = tan[col, row], cos[col, 0], sin[col, 0]
        top = surface[col, row]
        for _ in range(4):
            middle = 0.5 * (low + high)
            height = heights[_pixel_index(city, east + c * middle, north + s * middle)]
            hit = height >= pose.height + middle * tangent
            high = np.where(hit, middle, high)
            low = np.where(hit, low, middle)
            top = np.where(hit, height, top)
        # Ground in front of a wall's foot stays ground.
        ground = distance[col, row] < high
        high = np.where(ground, distance[col, row], high)
        distance[col, row] = high
        surface[col, row] = np.where(ground, 0.0, top)
        is_object[col, row] = ~ground
    return distance, surface, is_object


def _ground_colour(city: City, east: Floats, north: Floats, distance: Floats) -> Floats:
    """Colour (n, 3) of the ground (and roofs) at places (n,), lit."""
    shape = (1, -1)
    half = city.size_m / 2
    col, row = (
        ((east + half) / city.gsd - 0.5).reshape(shape),
        ((half - north) / city.gsd - 0.5).reshape(shape),
    )

    def sample(image: Image, zoom: float) -> NDArray[Any]:
        # OpenCV remaps at most 32767 pixels along an axis.
        parts = [
            cv2.remap(
                image,
                ((col[:, k : k + 30000] + 0.5) * zoom - 0.5).astype(np.float32),
                ((row[:, k : k + 30000] + 0.5) * zoom - 0.5).astype(np.float32),
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )[0]
            for k in range(0, col.shape[1], 30000)
        ]
        return np.concatenate(parts).astype(np.float32)

    colour = sample(city.ground_far, 0.25)
    near = distance < 26.0
    if near.any():
        whole, (col, row) = (col, row), (col[:, near], row[:, near])
        paint = sample(city.marking, 2.0)[:, None] * (1 / 255)
        close = sample(city.ground, 1.0)
        grain = ((east[near] * 24).astype(np.int32) & (_NOISE - 1)) * _NOISE
        grain += (north[near] * 24).astype(np.int32) & (_NOISE - 1)
        fade = np.maximum(0.0, 1.0 - distance[near] / 9.0) * 0.05
        close *= (1.0 + _TEXTURES.fine[grain] * fade)[:, None]
        close += paint * (np.asarray(city.style.marking, np.float32) - close)
        share = np.clip((distance[near] - 14.0) / 12.0, 0.0, 1.0)[:, None]
        colour[near] = share * colour[near] + (1 - share) * close
        col, row = whole
    lit: Floats = colour * (sample(city.light, 1.0)[:, None] * (1 / 255))
    return lit


def _wall_colour(
    city: City, east: Floats, north: Floats, z: Floats, number: Ints, distance: Floats
) -> Floats:
    """Colour (n, 3) of upright faces of ``solids`` rows ``number``."""
    solids, style = city.solids, city.style
    dx, dy = east - solids.centre[number, 0], north - solids.centre[number, 1]
    ax, ay = solids.axis[number, 0], solids.axis[number, 1]
    u, v = dx * ax + dy * ay, -dx * ay + dy * ax
    a, b = solids.half[number, 0], solids.half[number, 1]
    end = (a - np.abs(u)) < (b - np.abs(v))  # an end wall, its normal along the axis
    along = np.where(end, v, u)
    sign = np.where(end, np.sign(u), np.sign(v))
    nx, ny = np.where(end, ax, -ay) * sign, np.where(end, ay, ax) * sign
    azimuth, elevation = np.radians(style.ground_sun)
    sun = (nx * math.sin(azimuth) + ny * math.cos(azimuth)) * math.cos(elevation)
    light = 1.0 - style.ground_shadow * (0.55 - 0.75 * np.maximum(sun, -0.25))
    colour = solids.wall[number].copy()
    floor, spacing = solids.floor_m[number], solids.window_m[number]
    has = floor > 0
    fx = (along / spacing + 0.5) % 1.0
    storey = z / np.where(has, floor, 1.0)
    fz = storey % 1.0
    half = np.where(end, b, a)
    inside = (np.abs(along) < half - 0.5) & (z < solids.height[number] - 0.4)
    ground_floor = storey < 1.0
    shop = (number % 5 == 0) & ground_floor
    window = has & inside & (np.abs(fx - 0.5) < 0.26) & (fz > 0.32) & (fz < 0.82)
    window |= shop & has & inside & (np.abs(fx - 0.5) < 0.43) & (fz > 0.1) & (fz < 0.85)
    door = has & ~shop & (np.abs(along) < 0.65) & (z < 2.2) & ~end
    # Far windows blend into the wall, as a pixel holds more than one.
    sharp = np.clip(1.25 - distance / 110.0, 0.25, 1.0)[:, None]
    sky = np.asarray(style.sky_low, np.float32)
    pane = (
        0.7 * solids.glass[number]
        + 0.3 * sky * ((number * 7 + (storey).astype(np.int64) * 3) % 4 == 0)[:, None]
    )
    colour = np.where(window[:, None], (1 - sharp) * colour + sharp * pane, colour)
    colour = np.where(door[:, None], colour * 0.4, colour)
    colour *= np.where(has & (z < 0.6), 0.78, 1.0)[:, None]
    index = ((along * 5).astype(np.int64) & (_NOISE - 1)) * _NOISE + ((z * 5).astype(np.int64) & (_NOISE - 1))
    colour *= (light * (1.0 + 0.03 * _TEXTURES.fine[index]))[:, None]
    result: Floats = colour.astype(np.float32)
    return result


class _Frame:
    """The image while it is painted: colours and ranges per ray, (columns x rows) from the bottom up."""

    def __init__(self, pose: CameraPose, rays: _Rays, tan: Floats) -> None:
        self.pose, self.rays = pose, rays
        self.cos, self.sin = np.cos(rays.yaw), np.sin(rays.yaw)
        self.tan = tan.ravel()
        self.colour = np.zeros((len(rays.yaw) * rays.rows, 3), np.float32)
        self.distance = np.full(len(rays.yaw) * rays.rows, np.inf, np.float32)

    def pairs(self, dx: Floats, dy: Floats, radius: Floats, low: Floats, high: Floats) -> tuple[Ints, Ints]:
        """(solid, ray) for every ray that may meet an upright solid's bounding cylinder.

        ``dx``, ``dy`` from the camera, ``low``, ``high`` over the ground. Far solids come first.
        """
        rays, columns = self.rays, len(self.rays.yaw)
        reach = np.maximum(np.hypot(dx, dy), 0.05)
        order = np.argsort(-reach)
        dx, dy, reach, radius, low, high = (a[order] for a in (dx, dy, reach, radius, low, high))
        column_step = abs(float(rays.yaw[1] - rays.yaw[0]))
        half = np.where(reach > radius * 1.02, np.arcsin(np.minimum(radius / reach, 1.0)), math.pi)
        # Columns turn clockwise from the first one's yaw.
        turn = (rays.yaw[0] - np.arctan2(dy, dx) + math.pi) % (2 * math.pi) - math.pi
        turn = np.where(turn < -half, turn + 2 * math.pi, turn)
        first = np.ceil((turn - half) / column_step).astype(np.int64)
        wide = np.floor((turn + half) / column_step).astype(np.int64) - first + 1
        wide = np.clip(wide, 0, columns if rays.full else 2 * columns)
        near, far = np.maximum(reach - radius, 0.3), reach + radius
        z0, z1 = low - self.pose.height, high - self.pose.height
        bottom_angle = np.arctan(z0 / np.where(z0 < 0, near, far))
        top_angle = np.arctan(z1 / np.where(z1 > 0, near, far))
        start = rays.top - rays.rows * rays.step
        slack = float(np.abs(rays.offset).max())
        row0 = np.clip(np.floor((bottom_angle - slack - start) / rays.step), 0, rays.rows).astype(np.int64)
        row1 = np.clip(np.ceil((top_angle + slack - start) / rays.step), 0, rays.rows).astype(np.int64)
        tall = np.maximum(row1 - row0, 0)
        size = wide * tall
        solid = np.repeat(np.arange(len(order)), size)
        within = np.arange(len(solid)) - np.repeat(np.cumsum(size) - size, size)
        col = first[solid] + within // np.maximum(tall[solid], 1)
        row = row0[solid] + within % np.maximum(tall[solid], 1)
        if rays.full:
            col %= columns
            ray = col * rays.rows + row
            return order[solid], ray
        # A sector: columns beyond its right edge may be reached the other way round.
        keep = (col >= 0) & (col < columns)
        return order[solid[keep]], (col * rays.rows + row)[keep]

    def put(self, ray: Ints, distance: Floats, colour: Floats) -> None:
        """Paint hits, later ones (nearer solids) over earlier ones, where nothing is in front."""
        visible = distance < self.distance[ray]
        ray = ray[visible]
        self.colour[ray] = colour[visible]
        self.distance[ray] = distance[visible]


def _draw_crowns(frame: _Frame, city: City) -> None:
    trees, pose, style = city.trees, frame.pose, city.style
    dx = (trees.centre[:, 0] - pose.east).astype(np.float32)
    dy = (trees.centre[:, 1] - pose.north).astype(np.float32)
    near = np.flatnonzero(trees.in_ground & (dx * dx + dy * dy < _TREE_RANGE_M**2))
    if len(near) == 0:
        return
    dx, dy, radius, low, top = dx[near], dy[near], trees.radius[near], trees.bottom[near], trees.top[near]
    solid, ray = frame.pairs(dx, dy, radius * 1.12, low, top)
    half = (top - low) / 2
    middle = (top + low) / 2 - np.float32(pose.height)
    col = ray // frame.rays.rows
    # Ellipsoids become unit spheres by scaling the plane and the height.
    inv_r, inv_h = (1 / radius)[solid], (1 / half)[solid]
    ox, oy, oz = -dx[solid] * inv_r, -dy[solid] * inv_r, -middle[solid] * inv_h
    vx, vy, vz = frame.cos[col] * inv_r, frame.sin[col] * inv_r, frame.tan[ray] * inv_h
    a = vx * vx + vy * vy + vz * vz
    b = ox * vx + oy * vy + oz * vz
    nearest = ox * ox + oy * oy + oz * oz - b * b / a  # squared distance of the ray from the centre
    guess = -b / a
    # A ragged outline: leaves from a texture over the direction in which the ray passes the centre.
    px, py, pz = ox + vx * guess, oy + vy * guess, oz + vz * guess
    across = np.arctan2(dy, dx)[solid]
    side = -px * np.sin(across) + py * np.cos(across)
    scale = (radius * 14)[solid]
    index = (((side + 2.0) * scale).astype(np.int64) + near[solid] * 31) & (_NOISE - 1)
    index = index * _NOISE + ((((pz + 2.0) * scale).astype(np.int64) + near[solid] * 57) & (_NOISE - 1))
    leaf = _TEXTURES.leaves[index]
    hit = (nearest < (0.98 + 0.1 * leaf) ** 2) & (guess > 0.3)
    # Light shines through gaps near the outline.
    hit &= ~((leaf > 1.9) & (nearest > 0.3))
    solid, ray, leaf = solid[hit], ray[hit], leaf[hit]
    depth = np.sqrt(np.maximum(1.0 - nearest[hit], 0.0) / a[hit])
    distance = np.maximum(guess[hit] - depth, 0.2)
    nx = ox[hit] + vx[hit] * distance
    ny = oy[hit] + vy[hit] * distance
    nz = oz[hit] + vz[hit] * distance
    azimuth, elevation = np.radians(style.ground_sun)
    cos = math.cos(elevation)
    sun = nx * (math.sin(azimuth) * cos) + ny * (math.cos(azimuth) * cos) + nz * math.sin(elevation)
    light = 0.78 + 0.5 * style.ground_shadow * sun + 0.2 * nz + 0.13 * leaf
    tint = trees.tint[near][solid]
    base = np.asarray(style.foliage_ground, np.float32)
    colour = base * (1.0 + 0.08 * tint)[:, None] + np.array([9, 0, 0], np.float32) * tint[:, None]
    frame.put(ray, distance.astype(np.float32), colour * np.clip(light, 0.2, 1.6)[:, None])


def _draw_posts(frame: _Frame, city: City) -> None:
    """Trunks and lamp posts: upright cylinders."""
    trees, pose = city.trees, frame.pose
    chosen = np.flatnonzero(trees.in_ground)
    centre = np.concatenate([trees.centre[chosen], city.poles])
    lamps = len(city.poles)
    radius = np.concatenate([0.09 + 0.06 * trees.radius[chosen], np.full(lamps, 0.09)]).astype(np.float32)
    top = np.concatenate([trees.bottom[chosen] + 0.8, np.full(lamps, 6.5)]).astype(np.float32)
    dx, dy = (centre - (pose.east, pose.north)).astype(np.float32).T
    near = np.flatnonzero(dx * dx + dy * dy < 60.0**2)
    if len(near) == 0:
        return
    dx, dy, radius, top = dx[near], dy[near], radius[near], top[near]
    is_lamp = near >= len(chosen)
    reach = np.hypot(dx, dy)
    # A post is at least about one column wide, or it would flicker.
    radius = np.maximum(radius, 0.5 * reach * abs(float(frame.rays.yaw[1] - frame.rays.yaw[0])))
    solid, ray = frame.pairs(dx, dy, radius, np.zeros_like(top), top)
    col = ray // frame.rays.rows
    across = dx[solid] * frame.sin[col] - dy[solid] * frame.cos[col]
    along = dx[solid] * frame.cos[col] + dy[solid] * frame.sin[col]
    offset = across / radius[solid]
    distance = along - radius[solid] * np.sqrt(np.maximum(1 - offset * offset, 0))
    z = pose.height + distance * frame.tan[ray]
    hit = (np.abs(offset) < 1.0) & (z > 0) & (z < top[solid]) & (distance > 0.2)
    base = np.where(is_lamp[solid[hit]][:, None], (92.0, 96.0, 98.0), (88.0, 70.0, 54.0))
    colour = (base * (0.85 + 0.3 * offset[hit])[:, None]).astype(np.float32)
    frame.put(ray[hit], distance[hit].astype(np.float32), colour)


def _draw_cars(frame: _Frame, cars: Cars, style: Style) -> None:
    pose = frame.pose
    dx, dy = (cars.centre - (pose.east, pose.north)).astype(np.float32).T
    square = dx * dx + dy * dy
    near = np.flatnonzero((square < _CAR_RANGE_M**2) & (square > 2.6**2))
    if len(near) == 0:
        return
    ax, ay = cars.axis[near].astype(np.float32).T
    scale = cars.scale[near]
    azimuth, elevation = np.radians(style.ground_sun)
    for part, (length, width, bottom, top, shift) in enumerate(_CAR_BOXES):
        a, b = length * scale, width * scale
        cx, cy = dx[near] + ax * shift, dy[near] + ay * shift
        low = np.zeros_like(a) if part == 0 else bottom * scale
        solid, ray = frame.pairs(cx, cy, np.hypot(a, b), low, top * scale)
        col = ray // frame.rays.rows
        c, s, t = frame.cos[col], frame.sin[col], frame.tan[ray]
        ux, uy = ax[solid], ay[solid]
        # The ray in the box's axes: enters where the last of the three slabs is entered.
        ou, ov = -(cx[solid] * ux + cy[solid] * uy), -(-cx[solid] * uy + cy[solid] * ux)
        du, dv = c * ux + s * uy, -c * uy + s * ux
        du, dv = np.where(np.abs(du) < 1e-5, 1e-5, du), np.where(np.abs(dv) < 1e-5, 1e-5, dv)
        t = np.where(np.abs(t) < 1e-5, 1e-5, t)
        u_in, u_out = (-np.sign(du) * a[solid] - ou) / du, (np.sign(du) * a[solid] - ou) / du
        v_in, v_out = (-np.sign(dv) * b[solid] - ov) / dv, (np.sign(dv) * b[solid] - ov) / dv
        z_low, z_high = low[solid] - pose.height, top * scale[solid] - pose.height
        z_in, z_out = np.where(t > 0, z_low, z_high) / t, np.where(t > 0, z_high, z_low) / t
        enter = np.maximum(np.maximum(u_in, v_in), z_in)
        hit = (enter < np.minimum(np.minimum(u_out, v_out), z_out)) & (enter > 0.2)
        solid, ray, distance = solid[hit], ray[hit], enter[hit]
        u, v = ou[hit] + distance * du[hit], ov[hit] + distance * dv[hit]
        z = pose.height + distance * t[hit]
        on_top, on_end = z_in[hit] >= distance, u_in[hit] >= distance
        sign = np.where(on_end, -np.sign(du[hit]), -np.sign(dv[hit]))
        nx = np.where(on_end, ux[hit], -uy[hit]) * sign
        ny = np.where(on_end, uy[hit], ux[hit]) * sign
        sun = np.where(
            on_top,
            math.sin(elevation),
            (nx * math.sin(azimuth) + ny * math.cos(azimuth)) * math.cos(elevation),
        )
        light = np.where(on_top, 1.0, 0.8) * (1 - style.ground_shadow * (0.5 - 0.6 * np.maximum(sun, -0.2)))
        colour = cars.colour[near][solid] * light[:, None]
        size = scale[solid]
        if part == 1:
            edge = np.where(on_end, np.abs(v) / b[solid], np.abs(u) / a[solid])
            pane = ~on_top & (edge < 0.93) & (z < 1.38 * size) & ~(~on_end & (np.abs(u) < 0.06))
            colour = np.where(pane[:, None], np.array([46, 54, 62], np.float32), colour)
        else:
            wheel = ~on_end & (np.hypot(np.abs(u) - 1.35 * size, z - 0.3) < 0.34)
            under = (z < 0.24 * size) & ~on_top
            colour = np.where((wheel | under)[:, None], np.array([24, 24, 26], np.float32), colour)
            lamp = on_end & (np.abs(v) > 0.55 * size) & (np.abs(z - 0.62 * size) < 0.09)
            red = (u < 0)[:, None]
            colour = np.where(
                lamp[:, None], np.where(red, (170.0, 30.0, 30.0), (240.0, 236.0, 220.0)), colour
            )
        frame.put(ray, distance.astype(np.float32), colour.astype(np.float32))


def _sky(rays: _Rays, elevation: Floats, style: Style) -> Floats:
    share = np.clip(elevation / math.radians(35.0), 0.0, 1.0)[..., None]
    low, top = np.asarray(style.sky_low, np.float32), np.asarray(style.sky_top, np.float32)
    colour = low + (top - low) * np.sqrt(share)
    if style.clouds > 0.02:
        x = (rays.yaw * (512 / (2 * math.pi)) % 512).astype(np.float32)[:, None] + np.zeros_like(elevation)
        y = np.clip(elevation * (256 / math.radians(60)), 0, 255).astype(np.float32)
        cloud = cv2.remap(_TEXTURES.cloud, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        cover = np.clip(0.6 * cloud + 1.6 * style.clouds - 0.8, 0.0, 1.0)[..., None]
        colour = colour + cover * (np.float32(225.0) + 14 * cloud[..., None] - colour) * 0.8
    result: Floats = colour.astype(np.float32)
    return result


def _trace(city: City, pose: CameraPose, rays: _Rays, traffic: Cars | None) -> Image:
    """RGB (rows, columns, 3) of a grid of rays, before the camera."""
    style = city.style
    bottom = rays.top - rays.rows * rays.step
    centres = (bottom + (np.arange(rays.rows) + 0.5) * rays.step).astype(np.float32)
    elevation = centres[None, :] + rays.offset[:, None]
    tan = np.tan(elevation)
    distance, surface, is_object = _march(city, pose, rays, tan)
    frame = _Frame(pose, rays, tan)
    frame.colour[:] = _sky(rays, elevation, style).reshape(-1, 3)
    flat = distance.ravel()
    reached = np.flatnonzero(flat < 600.0)
    col = reached // rays.rows
    r = flat[reached]
    east = (np.float32(pose.east) + frame.cos[col] * r).astype(np.float32)
    north = (np.float32(pose.north) + frame.sin[col] * r).astype(np.float32)
    z = pose.height + r * frame.tan[reached]
    number = city.objects.ravel()[_pixel_index(city, east, north)].astype(np.int64) - 1
    wall = is_object.ravel()[reached] & (surface.ravel()[reached] - z > 0.3) & (number >= 0)
    colour = np.empty((len(reached), 3), np.float32)
    ground = ~wall
    if ground.any():
        colour[ground] = _ground_colour(city, east[ground], north[ground], r[ground])
    if wall.any():
        colour[wall] = _wall_colour(city, east[wall], north[wall], z[wall], number[wall], r[wall])
    frame.colour[reached] = colour
    frame.distance[reached] = r
    _draw_crowns(frame, city)
    _draw_posts(frame, city)
    _draw_cars(frame, city.cars, style)
    if traffic is not None:
        _draw_cars(frame, traffic, style)
    seen = np.isfinite(frame.distance)
    veil = np.where(seen, 1.0 - np.exp(-np.where(seen, frame.distance, 0.0) / style.haze_m), 0.0)[:, None]
    frame.colour += veil * (np.asarray(style.sky_low, np.float32) - frame.colour)
    image = frame.colour.reshape(len(rays.yaw), rays.rows, 3)[:, ::-1].transpose(1, 0, 2)
    result: Image = np.clip(image, 0, 255).astype(np.uint8)
    return result


def _expose(image: Image, style: Style, rng: np.random.Generator | None) -> Image:
    """The camera: blur, gain, saturation, noise and drops on the lens."""
    if style.camera_blur > 0.15:
        image = cv2.GaussianBlur(image, (0, 0), style.camera_blur)
    gain = style.camera_gain
    if rng is not None:
        exposure = float(np.exp(0.07 * rng.normal()))
        gain = (gain[0] * exposure, gain[1] * exposure, gain[2] * exposure)
    image = cv2.transform(image, colour_matrix(gain, style.camera_saturation))
    if rng is None:
        return image
    if style.rain > 0.02:
        drops = np.zeros(image.shape[:2], np.uint8)
        for _ in range(rng.poisson(14 * style.rain)):
            centre = (int(rng.integers(image.shape[1])), int(rng.integers(image.shape[0])))
            cv2.circle(drops, centre, int(rng.integers(2, 6) * image.shape[0] / 128), 255, -1)
        soft = cv2.blur(drops, (3, 3))[..., None].astype(np.float32) / 255
        blurred = cv2.GaussianBlur(image, (0, 0), 3.0)
        image = (image + soft * (blurred.astype(np.float32) * 1.06 - image)).clip(0, 255).astype(np.uint8)
    if style.camera_noise > 0.05:
        noise = rng.standard_normal(image.shape, np.float32)
        noise *= style.camera_noise
        image = cv2.add(image, np.round(noise).astype(np.int16), dtype=cv2.CV_8U)
    result: Image = image
    return result


def render_panorama(
    city: City,
    pose: CameraPose,
    view: PanoramaView | None = None,
    *,
    traffic: Cars | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """RGB panorama (height, width, 3) seen from ``pose``.

    ``traffic`` are moving cars, ``rng`` draws the camera's noise (None: a noiseless camera). A tilt moves
    each column up or down; it does not turn upright edges (below 0.03 rad that is under a pixel).
    """
    view = view or PanoramaView()
    turn = (np.arange(view.width) + 0.5) * (2 * math.pi / view.width) - math.pi  # clockwise from the heading
    step = math.radians(view.top_deg - view.bottom_deg) / view.height
    # Nose down: the row that shows the horizon ahead moves up, so a row sees lower there.
    offset = -pose.pitch * np.cos(turn) - pose.roll * np.sin(turn)
    rays = _Rays(
        (pose.heading - turn).astype(np.float32),
        math.radians(view.top_deg),
        step,
        view.height,
        offset.astype(np.float32),
        True,
    )
    return _expose(_trace(city, pose, rays, traffic), city.style, rng)


def render_pinhole(
    city: City,
    pose: CameraPose,
    view: PinholeView | None = None,
    *,
    traffic: Cars | None = None,
    rng: np.random.Generator | None = None,
) -> Image:
    """RGB pinhole image (height, width, 3) that looks along the heading, with the pose's pitch and roll.

    A sector of a panorama at the image's own resolution is traced, then resampled.
    """
    view = view or PinholeView()
    k = view.matrix
    x, y = np.meshgrid(np.arange(view.width), np.arange(view.height))
    right, down = (x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1]
    # Camera -> vehicle axes (forward, left, up), then roll about forward and pitch about left.
    forward, left, up = np.ones_like(right), -right, -down
    cos, sin = math.cos(pose.roll), math.sin(pose.roll)
    left, up = cos * left - sin * up, sin * left + cos * up
    cos, sin = math.cos(pose.pitch), math.sin(pose.pitch)
    forward, up = cos * forward + sin * up, -sin * forward + cos * up
    turn, elevation = np.arctan2(-left, forward), np.arctan2(up, np.hypot(forward, left))
    step = 1.0 / k[0, 0]
    first, top = float(turn.min()) - step, float(elevation.max()) + step
    columns = math.ceil((float(turn.max()) - first) / step) + 2
    rows = math.ceil((top - float(elevation.min())) / step) + 2
    yaw = pose.heading - (first + (np.arange(columns) + 0.5) * step)
    rays = _Rays(yaw.astype(np.float32), top, step, rows, np.zeros(columns, np.float32), False)
    sector = _trace(city, replace(pose, pitch=0.0, roll=0.0), rays, traffic)
    map_x, map_y = (turn - first) / step - 0.5, (top - elevation) / step - 0.5
    image = cv2.remap(sector, map_x.astype(np.float32), map_y.astype(np.float32), cv2.INTER_LINEAR)
    return _expose(image, city.style, rng)


def overhead_view(
    panorama: Image, pose: CameraPose, size_px: int, gsd: float, view: PanoramaView | None = None
) -> tuple[Image, NDArray[np.bool_]]:
    """The panorama's flat-ground part seen from above, north-up: (image, where it shows anything).

    Everything is taken to lie on the ground, so what stands up is smeared outwards.
    """
    view = view or PanoramaView()
    offset = (np.arange(size_px) - (size_px - 1) / 2) * gsd
    east, north = np.meshgrid(offset, -offset)
    turn = (pose.heading - np.arctan2(north, east) + math.pi) % (2 * math.pi)
    tilt = -pose.pitch * np.cos(turn - math.pi) - pose.roll * np.sin(turn - math.pi)
    elevation = -np.arctan2(pose.height, np.hypot(east, north)) - tilt
    step = math.radians(view.top_deg - view.bottom_deg) / view.height
    map_x = turn * (view.width / (2 * math.pi)) - 0.5
    map_y = (math.radians(view.top_deg) - elevation) / step - 0.5
    image = cv2.remap(
        panorama,
        map_x.astype(np.float32),
        map_y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    return image, map_y < view.height - 0.5
