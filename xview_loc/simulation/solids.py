"""Crowns, posts and cars in a street view: upright solids, intersected exactly with the rays near them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.city import City
from xview_loc.simulation.objects import Cars, Floats
from xview_loc.simulation.styles import Style

Ints = NDArray[np.int64]

SIDE = 256  # of the square noise textures; a power of two
_TREE_RANGE_M = 90.0
_CAR_RANGE_M = 70.0
# A car's body and cabin, in metres: half length, half width, bottom, top, and the centre's shift forward.
_CAR_BOXES = ((2.2, 0.9, 0.22, 0.86, 0.0), (1.25, 0.78, 0.86, 1.46, -0.25))


def _make() -> tuple[Floats, Floats, Floats]:
    """Make noise textures, which stay where they are from frame to frame.

    Returns fine noise and leaves (SIDE * SIDE,), and clouds (256, 512) that close on themselves.
    """
    rng = np.random.default_rng(7)
    fine = rng.standard_normal((SIDE, SIDE)).astype(np.float32).ravel()
    smooth = [
        cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)).astype(np.float32), (0, 0), sigma)
        for sigma in (2.0, 5.0)
    ]
    leaves = sum(s / s.std() for s in smooth).astype(np.float32).ravel()
    cloud = sum(
        cv2.resize(
            rng.standard_normal((n, 2 * n)).astype(np.float32), (576, 256), interpolation=cv2.INTER_CUBIC
        )
        for n in (3, 6, 12, 24)
    )
    # The first columns fade into those that follow the last, so that the sky closes on itself.
    fade = np.linspace(0.0, 1.0, 64, dtype=np.float32)
    cloud = np.asarray(cloud, np.float32) / 2.0
    cloud[:, :64] = fade * cloud[:, :64] + (1 - fade) * cloud[:, 512:]
    return fine, leaves, np.ascontiguousarray(cloud[:, :512])


FINE, LEAVES, CLOUDS = _make()


@dataclass(frozen=True)
class RayGrid:
    """Rays from one point: yaw per column, elevation per row plus an offset per column, radians.

    The origin is in metres in the city's plane and over the ground. ``top`` is the elevation of the upper
    edge of the first row without offset, ``step`` the angle between rows. The columns of a ``full`` grid go
    once round. ``vehicle`` is the place of the vehicle, where no other car can be; None: the origin.
    """

    east: float
    north: float
    height: float
    yaw: Floats
    top: float
    step: float
    rows: int
    offset: Floats
    full: bool
    vehicle: tuple[float, float] | None = None

    @property
    def bottom(self) -> float:
        """Elevation of the lower edge of the last row, without offset."""
        return self.top - self.rows * self.step

    @property
    def column_step(self) -> float:
        """Angle between columns."""
        return abs(float(self.yaw[1] - self.yaw[0]))


class StreetImage:
    """An image being drawn: colour and range per ray, column by column from the bottom up."""

    def __init__(self, rays: RayGrid, tan: Floats) -> None:
        self.rays = rays
        self.cos, self.sin = np.cos(rays.yaw), np.sin(rays.yaw)
        self.tan = tan.ravel()
        self.colour = np.zeros((len(rays.yaw) * rays.rows, 3), np.float32)
        self.distance = np.full(len(rays.yaw) * rays.rows, np.inf, np.float32)

    def pairs(self, dx: Floats, dy: Floats, radius: Floats, low: Floats, high: Floats) -> tuple[Ints, Ints]:
        """Return (solid, ray) of every ray that may meet the bounding cylinder of an upright solid.

        ``dx`` and ``dy`` are from the camera, ``low`` and ``high`` over the ground. Far solids come first.
        """
        rays, columns = self.rays, len(self.rays.yaw)
        reach = np.maximum(np.hypot(dx, dy), 0.05)
        order = np.argsort(-reach)
        dx, dy, reach, radius, low, high = (a[order] for a in (dx, dy, reach, radius, low, high))
        column_step = rays.column_step
        half = np.where(reach > radius * 1.02, np.arcsin(np.minimum(radius / reach, 1.0)), math.pi)
        # Columns turn clockwise from the yaw of the first.
        turn = (rays.yaw[0] - np.arctan2(dy, dx) + math.pi) % (2 * math.pi) - math.pi
        turn = np.where(turn < -half, turn + 2 * math.pi, turn)
        first = np.ceil((turn - half) / column_step).astype(np.int64)
        wide = np.floor((turn + half) / column_step).astype(np.int64) - first + 1
        wide = np.clip(wide, 0, columns if rays.full else 2 * columns)
        near, far = np.maximum(reach - radius, 0.3), reach + radius
        z0, z1 = low - rays.height, high - rays.height
        bottom_angle = np.arctan(z0 / np.where(z0 < 0, near, far))
        top_angle = np.arctan(z1 / np.where(z1 > 0, near, far))
        slack, start = float(np.abs(rays.offset).max()), rays.bottom
        row0 = np.clip(np.floor((bottom_angle - slack - start) / rays.step), 0, rays.rows).astype(np.int64)
        row1 = np.clip(np.ceil((top_angle + slack - start) / rays.step), 0, rays.rows).astype(np.int64)
        tall = np.maximum(row1 - row0, 0)
        size = wide * tall
        solid = np.repeat(np.arange(len(order)), size)
        within = np.arange(len(solid)) - np.repeat(np.cumsum(size) - size, size)
        col = first[solid] + within // np.maximum(tall[solid], 1)
        row = row0[solid] + within % np.maximum(tall[solid], 1)
        if rays.full:
            return order[solid], col % columns * rays.rows + row
        # In a sector, drop what lies beyond its edges.
        keep = (col >= 0) & (col < columns)
        return order[solid[keep]], (col * rays.rows + row)[keep]

    def near(self, centre: Floats, reach: float) -> tuple[Ints, Floats, Floats]:
        """Return the rows of ``centre`` (n, 2) within reach, metres, and their places from the camera."""
        dx, dy = (centre - (self.rays.east, self.rays.north)).astype(np.float32).T
        near = np.flatnonzero(dx * dx + dy * dy < reach**2)
        return near, dx[near], dy[near]

    def put(self, ray: Ints, distance: Floats, colour: Floats) -> None:
        """Paint hits where nothing is in front; later, nearer solids go over earlier ones."""
        visible = distance < self.distance[ray]
        ray = ray[visible]
        self.colour[ray] = colour[visible]
        self.distance[ray] = distance[visible]


def draw_crowns(image: StreetImage, city: City) -> None:
    """Draw the crowns of trees: ellipsoids with ragged outlines."""
    trees, rays, style = city.trees, image.rays, city.style
    near, dx, dy = image.near(trees.centre, _TREE_RANGE_M)
    shown = trees.in_ground[near]
    near, dx, dy = near[shown], dx[shown], dy[shown]
    radius, low, top = trees.radius[near], trees.bottom[near], trees.top[near]
    solid, ray = image.pairs(dx, dy, radius * 1.12, low, top)
    half = (top - low) / 2
    middle = (top + low) / 2 - np.float32(rays.height)
    col = ray // rays.rows
    # Ellipsoids become unit spheres by scaling the plane and the height.
    inv_r, inv_h = (1 / radius)[solid], (1 / half)[solid]
    ox, oy, oz = -dx[solid] * inv_r, -dy[solid] * inv_r, -middle[solid] * inv_h
    vx, vy, vz = image.cos[col] * inv_r, image.sin[col] * inv_r, image.tan[ray] * inv_h
    a = vx * vx + vy * vy + vz * vz
    b = ox * vx + oy * vy + oz * vz
    nearest = ox * ox + oy * oy + oz * oz - b * b / a  # squared distance of the ray from the centre
    guess = -b / a
    # A ragged outline: the texture of leaves depends on where the ray passes the centre.
    px, py, pz = ox + vx * guess, oy + vy * guess, oz + vz * guess
    across = np.arctan2(dy, dx)[solid]
    side = -px * np.sin(across) + py * np.cos(across)
    scale = (radius * 14)[solid]
    index = (((side + 2.0) * scale).astype(np.int64) + near[solid] * 31) & (SIDE - 1)
    index = index * SIDE + ((((pz + 2.0) * scale).astype(np.int64) + near[solid] * 57) & (SIDE - 1))
    leaf = LEAVES[index]
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
    image.put(ray, distance.astype(np.float32), colour * np.clip(light, 0.2, 1.6)[:, None])


def draw_posts(image: StreetImage, city: City) -> None:
    """Draw trunks and lamp posts: upright cylinders."""
    trees, rays = city.trees, image.rays
    chosen = np.flatnonzero(trees.in_ground)
    centre = np.concatenate([trees.centre[chosen], city.poles])
    lamps = len(city.poles)
    radius = np.concatenate([0.09 + 0.06 * trees.radius[chosen], np.full(lamps, 0.09)]).astype(np.float32)
    top = np.concatenate([trees.bottom[chosen] + 0.8, np.full(lamps, 6.5)]).astype(np.float32)
    near, dx, dy = image.near(centre, 60.0)
    is_lamp = near >= len(chosen)
    # A post narrower than a column would flicker.
    radius, top = np.maximum(radius[near], 0.5 * np.hypot(dx, dy) * rays.column_step), top[near]
    solid, ray = image.pairs(dx, dy, radius, np.zeros_like(top), top)
    col = ray // rays.rows
    across = dx[solid] * image.sin[col] - dy[solid] * image.cos[col]
    along = dx[solid] * image.cos[col] + dy[solid] * image.sin[col]
    offset = across / radius[solid]
    distance = along - radius[solid] * np.sqrt(np.maximum(1 - offset * offset, 0))
    z = rays.height + distance * image.tan[ray]
    hit = (np.abs(offset) < 1.0) & (z > 0) & (z < top[solid]) & (distance > 0.2)
    base = np.where(is_lamp[solid[hit]][:, None], (92.0, 96.0, 98.0), (88.0, 70.0, 54.0))
    colour = (base * (0.85 + 0.3 * offset[hit])[:, None]).astype(np.float32)
    image.put(ray[hit], distance[hit].astype(np.float32), colour)


def draw_cars(image: StreetImage, cars: Cars, style: Style) -> None:
    """Draw cars: a body and a cabin, each a box."""
    rays = image.rays
    near, dx, dy = image.near(cars.centre, _CAR_RANGE_M)
    own_x, own_y = np.subtract(rays.vehicle or (rays.east, rays.north), (rays.east, rays.north))
    clear = (dx - own_x) ** 2 + (dy - own_y) ** 2 > 2.6**2
    near, dx, dy = near[clear], dx[clear], dy[clear]
    ax, ay = cars.axis[near].astype(np.float32).T
    scale = cars.scale[near]
    azimuth, elevation = np.radians(style.ground_sun)
    for part, (length, width, bottom, top, shift) in enumerate(_CAR_BOXES):
        a, b = length * scale, width * scale
        cx, cy = dx + ax * shift, dy + ay * shift
        low = np.zeros_like(a) if part == 0 else bottom * scale
        solid, ray = image.pairs(cx, cy, np.hypot(a, b), low, top * scale)
        col = ray // rays.rows
        c, s, t = image.cos[col], image.sin[col], image.tan[ray]
        ux, uy = ax[solid], ay[solid]
        # The ray in the axes of the box: it enters the box where it enters the last of three slabs.
        ou, ov = -(cx[solid] * ux + cy[solid] * uy), -(-cx[solid] * uy + cy[solid] * ux)
        du, dv = c * ux + s * uy, -c * uy + s * ux
        du, dv = np.where(np.abs(du) < 1e-5, 1e-5, du), np.where(np.abs(dv) < 1e-5, 1e-5, dv)
        t = np.where(np.abs(t) < 1e-5, 1e-5, t)
        u_in, u_out = (-np.sign(du) * a[solid] - ou) / du, (np.sign(du) * a[solid] - ou) / du
        v_in, v_out = (-np.sign(dv) * b[solid] - ov) / dv, (np.sign(dv) * b[solid] - ov) / dv
        z_low, z_high = low[solid] - rays.height, top * scale[solid] - rays.height
        z_in, z_out = np.where(t > 0, z_low, z_high) / t, np.where(t > 0, z_high, z_low) / t
        enter = np.maximum(np.maximum(u_in, v_in), z_in)
        hit = (enter < np.minimum(np.minimum(u_out, v_out), z_out)) & (enter > 0.2)
        solid, ray, distance = solid[hit], ray[hit], enter[hit]
        u, v = ou[hit] + distance * du[hit], ov[hit] + distance * dv[hit]
        z = rays.height + distance * t[hit]
        on_top, on_end = z_in[hit] >= distance, u_in[hit] >= distance
        sign = np.where(on_end, -np.sign(du[hit]), -np.sign(dv[hit]))
        nx = np.where(on_end, ux[hit], -uy[hit]) * sign
        ny = np.where(on_end, uy[hit], ux[hit]) * sign
        side = (nx * math.sin(azimuth) + ny * math.cos(azimuth)) * math.cos(elevation)
        sun = np.where(on_top, math.sin(elevation), side)
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
            light_rgb = np.where(red, (170.0, 30.0, 30.0), (240.0, 236.0, 220.0))
            colour = np.where(lamp[:, None], light_rgb, colour)
        image.put(ray, distance.astype(np.float32), colour.astype(np.float32))
