"""A procedural city: one 2.5-D world, seen from above at one time and from the street at another.

The world is a square in the city's own plane (:class:`~xview_loc.geodesy.LocalProjection` about its centre:
x east, y north, metres). Rasters are north-up with ``gsd`` metres per pixel. Trees, cars and lamp posts are
lists of solids, because a height field cannot hold a crown above a trunk.

What differs between the two views on purpose: parked cars, a share of the trees, the wear of markings, the
light, the season, and all moving traffic (which only the street sees).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.transform import Affine

from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.simulation.streets import Street, StreetNetwork, make_streets
from xview_loc.simulation.styles import Rgb, Style, style_for

Array = NDArray[np.float64]
# OpenCV's stubs promise no element type, so these names carry it for the reader only.
Image = NDArray[Any]  # uint8
Floats = NDArray[Any]  # float32

# Ground classes of the material raster.
GRASS, ASPHALT, PAVEMENT, PLAZA, GRAVEL, KERB, PARKING, GARDEN = range(8)

_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates
_TREE_SHARED = 0.88  # share of the trees that both views show
_CAR_SIZE = (4.4, 1.8)
_CAR_COLOURS = np.array(
    [
        (228, 228, 228),
        (30, 30, 34),
        (120, 124, 130),
        (170, 172, 176),
        (150, 30, 30),
        (38, 62, 120),
        (84, 92, 76),
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Solids:
    """Upright objects with straight sides, one row each: what the object raster's ids point at.

    Centre, unit direction of the long axis, half sizes, wall and window colours, and a window grid
    (``floor_m`` 0: no windows).
    """

    centre: Array
    axis: Array
    half: Array
    wall: Floats
    glass: Floats
    floor_m: Floats
    window_m: Floats
    height: Floats


@dataclass(frozen=True)
class Trees:
    """Crowns on trunks, one row each: place, crown radius, top, crown's lower edge, tint, seen from where."""

    centre: Array
    radius: Floats
    top: Floats
    bottom: Floats
    tint: Floats
    in_aerial: NDArray[np.bool_]
    in_ground: NDArray[np.bool_]


@dataclass(frozen=True)
class Cars:
    """Cars, one row each: place, unit direction, colour and scale."""

    centre: Array
    axis: Array
    colour: Floats
    scale: Floats


@dataclass(frozen=True)
class City:
    """A built city; make one with :func:`build_city`.

    ``aerial`` is what the aerial sensor gives, in the city's plane. ``ground`` is the colour of everything
    seen from the street (roofs included) without light, ``marking`` the paint on the road at twice the
    resolution, ``light`` the ground's share of sunlight. ``height`` is in metres over the street (ground is
    flat) and ``objects`` the row of ``solids`` + 1 (0: none). ``cars`` are the street's parked cars.
    """

    seed: int
    style: Style
    projection: LocalProjection
    gsd: float
    aerial: Image
    ground: Image
    ground_far: Image
    marking: Image
    light: Image
    height: Floats
    objects: NDArray[np.uint16]
    solids: Solids
    trees: Trees
    cars: Cars
    poles: Array
    streets: StreetNetwork

    @property
    def size_m(self) -> float:
        """Side of the square world in metres."""
        return self.height.shape[0] * self.gsd

    def to_latlon(self, east: Any, north: Any) -> tuple[Any, Any]:
        """WGS-84 degrees of metres in the city's plane."""
        return self.projection.inverse(east, north)

    def to_enu(self, lat: Any, lon: Any) -> tuple[Any, Any]:
        """(east, north) metres in the city's plane of WGS-84 degrees."""
        return self.projection.forward(lat, lon)

    def to_pixel(self, east: Any, north: Any) -> tuple[Any, Any]:
        """(row, col), pixel centres whole, of metres in the city's plane."""
        half = self.size_m / 2
        return (half - north) / self.gsd - 0.5, (east + half) / self.gsd - 0.5

    def patch(self, east: float, north: float, size_px: int) -> Image:
        """The north-up aerial image (size_px, size_px, 3) centred on a place, at the city's gsd."""
        row, col = self.to_pixel(east, north)
        return cv2.getRectSubPix(self.aerial, (size_px, size_px), (float(col), float(row)))

    def tile(self, east: float, north: float, size_px: int) -> AerialTile:
        """:meth:`patch` as the tile a map would give, for training without a map on disk.

        The tile's own plane and the city's differ by the convergence, 0.1 mrad at 500 m from the centre.
        """
        lat, lon = self.to_latlon(east, north)
        reach = self.size_m / 2 - self.gsd * size_px / 2
        valid = 1.0 if max(abs(east), abs(north)) <= reach else 0.0
        return AerialTile(self.patch(east, north, size_px), float(lat), float(lon), self.gsd, valid)

    def write_geotiff(self, path: str | Path) -> Path:
        """Write the aerial image as a Cloud Optimised GeoTIFF in the place's UTM zone; returns the path.

        The warp from the city's plane to UTM is exact at a 33 x 33 grid and linear between (0.01 mm).
        """
        path = Path(path)
        crs = utm_crs(self.projection.lat, self.projection.lon)
        to_utm = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
        half = self.size_m / 2
        edge = np.linspace(-half, half, 33)
        rim_e = np.concatenate([edge, edge, np.full(33, -half), np.full(33, half)])
        rim_n = np.concatenate([np.full(33, -half), np.full(33, half), edge, edge])
        lat, lon = self.to_latlon(rim_e, rim_n)
        x, y = to_utm.transform(lon, lat)
        left, top = math.floor(x.min()), math.ceil(y.max())
        width = math.ceil((x.max() - left) / self.gsd)
        height = math.ceil((top - y.min()) / self.gsd)
        cols, rows = np.linspace(0, width - 1, 33), np.linspace(0, height - 1, 33)
        grid_x, grid_y = np.meshgrid(left + (cols + 0.5) * self.gsd, top - (rows + 0.5) * self.gsd)
        lon, lat = to_utm.transform(grid_x, grid_y, direction="INVERSE")
        source_row, source_col = self.to_pixel(*self.to_enu(lat, lon))
        down, across = _linear_weights(rows, height), _linear_weights(cols, width)
        image = np.zeros((height, width, 3), np.uint8)
        for start in range(0, height, 1024):  # in bands: OpenCV's warp takes at most 32767 rows of float maps
            band = slice(start, min(start + 1024, height))
            map_x = (down[band] @ source_col @ across.T).astype(np.float32)
            map_y = (down[band] @ source_row @ across.T).astype(np.float32)
            image[band] = cv2.remap(
                self.aerial, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT
            )
        profile = {"driver": "COG", "dtype": "uint8", "count": 3, "width": width, "height": height}
        transform = Affine(self.gsd, 0.0, left, 0.0, -self.gsd, top)
        with rasterio.open(
            path, "w", **profile, crs=crs.to_wkt(), transform=transform, nodata=0, compress="JPEG", quality=92
        ) as file:
            # 0 marks the turned square's empty corners; black paint inside it is lifted to 1.
            inside = image.any(axis=2, keepdims=True)
            file.write(np.where(inside, np.maximum(image, 1), 0).transpose(2, 0, 1))
        return path


def utm_crs(lat: float, lon: float) -> CRS:
    """The WGS-84 UTM zone of a place."""
    zone = int((lon + 180.0) // 6.0) % 60 + 1
    return CRS.from_epsg((32600 if lat >= 0 else 32700) + zone)


def _linear_weights(nodes: Array, count: int) -> Array:
    """(count, len(nodes)) matrix that interpolates linearly from ``nodes`` to 0..count-1."""
    return np.stack([np.interp(np.arange(count), nodes, unit) for unit in np.eye(len(nodes))], axis=1)


class _Canvas:
    """Draws polygons given in ENU metres into rasters of ``gsd``."""

    def __init__(self, half: float, gsd: float) -> None:
        self.half, self.gsd = half, gsd

    def points(self, enu: Array, zoom: int = 1) -> NDArray[np.int32]:
        gsd = self.gsd / zoom
        x = (enu[:, 0] + self.half) / gsd - 0.5
        y = (self.half - enu[:, 1]) / gsd - 0.5
        return np.round(np.stack([x, y], axis=1) * (1 << _SHIFT)).astype(np.int32)

    def fill(
        self, raster: NDArray[Any], polygon: Array, value: Any, zoom: int = 1, smooth: bool = False
    ) -> None:
        line = cv2.LINE_AA if smooth else cv2.LINE_8
        cv2.fillPoly(raster, [self.points(polygon, zoom)], value, line, _SHIFT)

    def disc(self, raster: NDArray[Any], centre: Array, radius: float, value: Any) -> None:
        (point,) = self.points(centre[None])
        cv2.circle(raster, point.tolist(), int(radius / self.gsd * 16), value, -1, cv2.LINE_8, _SHIFT)


def _noise(rng: np.random.Generator, size: int, cell_px: float) -> Floats:
    """Smooth noise (size, size), mean 0 and about unit variance, with features of ``cell_px``."""
    n = max(2, int(size / cell_px) + 2)
    return cv2.resize(
        rng.standard_normal((n, n), np.float32) * 1.3, (size, size), interpolation=cv2.INTER_CUBIC
    )


def _shadow(height: Floats, gsd: float, sun: tuple[float, float]) -> Floats:
    """1 where the sun reaches the surface, 0 in shadow, for a sun at (azimuth, elevation) in degrees."""
    azimuth, elevation = math.radians(sun[0]), math.radians(sun[1])
    # Height of the shadow volume, doubling the distance it was dragged over: log2 passes.
    volume = height.copy()
    drop = gsd * math.tan(elevation)
    step = 1
    while step * drop < float(height.max()):
        dx, dy = -math.sin(azimuth) * step, math.cos(azimuth) * step
        move = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        moved = cv2.warpAffine(volume, move, height.shape[::-1], flags=cv2.INTER_LINEAR)
        np.maximum(volume, moved - step * drop, out=volume)
        step *= 2
    return np.clip(1.0 - (volume - height - 0.2) / 0.4, 0.0, 1.0)


def _rectangle(centre: Array, axis: Array, half: Array) -> Array:
    side = np.array([-axis[1], axis[0]])
    a, b = axis * half[0], side * half[1]
    return np.stack([centre + a + b, centre - a + b, centre - a - b, centre + a - b])


class _Builder:
    """Holds the rasters and lists of a city while it is built."""

    def __init__(self, seed: int, style: Style, half: float, gsd: float) -> None:
        self.style, self.half, self.gsd = style, half, gsd
        self.rng = np.random.default_rng([seed, 2])
        self.size = round(2 * half / gsd)
        self.canvas = _Canvas(half, gsd)
        self.streets = make_streets(style, half, self.rng)
        self.material = np.full((self.size, self.size), GRASS, np.uint8)
        self.height = np.zeros((self.size, self.size), np.float32)
        self.objects = np.zeros((self.size, self.size), np.uint16)
        self.marking = np.zeros((2 * self.size, 2 * self.size), np.uint8)
        # 1 m cells that are taken: 1 street, 2 building.
        self.plan = _Canvas(half, 1.0)
        self.taken = np.zeros((math.ceil(2 * half),) * 2, np.uint8)
        self.solids: list[tuple[Any, ...]] = []
        self.roofs: list[tuple[int, Array, Array, Array, Rgb, float]] = []
        self.trees: list[tuple[float, ...]] = []
        self.slots: list[tuple[float, ...]] = []
        self.poles: list[tuple[float, float]] = []
        self.patches: list[tuple[Array, float]] = []

    def inside(self, points: Array, margin: float = 0.0) -> bool:
        return bool((np.abs(points) < self.half - margin).all(axis=-1).any())

    # -- streets -----------------------------------------------------------------------------------------

    def draw_streets(self) -> None:
        style, canvas = self.style, self.canvas
        shown = [street for street in self.streets.streets if self.inside(street.points, -20.0)]
        for extra, value in ((style.pavement_m, PAVEMENT), (0.3, KERB), (0.0, ASPHALT)):
            for street in shown:
                width = 2 * (street.half_width + extra)
                canvas.fill(self.material, street.strip(0.0, street.length, 0.0, width), value)
                for end in street.nodes:
                    radius = street.half_width + extra + (1.2 if extra < style.pavement_m else 0.0)
                    canvas.disc(self.material, self.streets.nodes[end], radius, value)
        for street in shown:
            outline = street.strip(0.0, street.length, 0.0, 2 * (street.half_width + style.pavement_m))
            self.plan.fill(self.taken, outline, 1)
        for index, street in enumerate(self.streets.streets):
            if self.inside(street.points, -20.0):
                self.furnish_street(index, street)

    def furnish_street(self, index: int, street: Street) -> None:
        style, canvas, rng = self.style, self.canvas, self.rng
        paint = self.marking
        ends = [self.streets.node_clearance(node, index) for node in street.nodes]
        start, stop = ends[0] + 0.8, street.length - ends[1] - 0.8
        if stop - start < 14.0:
            return
        lanes_half = street.lanes * street.lane_m
        free = [start, stop]
        for which, (edge, sign) in enumerate(((start, 1.0), (stop, -1.0))):
            degree = len(self.streets.at_node[street.nodes[which]])
            if degree < 3:
                continue
            crossing = rng.random() < style.zebra
            s = edge + sign * 0.6
            if crossing:
                low, high = sorted((s, s + sign * 3.2))
                self.draw_crossing(street, low, high)
                s += sign * 4.4
            # Only the lanes that drive towards the crossing have a stop line.
            towards = -1.0 if sign < 0 else 1.0
            low, high = sorted((s, s + sign * 0.4))
            canvas.fill(paint, street.strip(low, high, towards * lanes_half / 2, lanes_half), 255, 2, True)
            free[which] = s + sign * 0.8
        low, high = free
        length, gap = style.dash_m
        if street.lanes == 2:
            for lateral in (-0.14, 0.14):
                canvas.fill(paint, street.strip(low, high, lateral, style.line_m), 255, 2, True)
        lines = [0.0] if street.lanes == 1 else [-street.lane_m, street.lane_m]
        for lateral in lines:
            for s in np.arange(low + rng.uniform(0, gap), high - length, length + gap):
                canvas.fill(paint, street.strip(s, s + length, lateral, style.line_m, 4.0), 255, 2, True)
        if style.edge_line >= 0.5 or (street.parking and style.edge_line > 0.2):
            for lateral in (-lanes_half, lanes_half):
                canvas.fill(paint, street.strip(low, high, lateral, style.line_m), 210, 2, True)
        if street.lanes == 2 and high - low > 30:
            for s, lateral, sign in ((high - 9, -lanes_half / 4 * 3, 1), (low + 9, lanes_half / 4 * 3, -1)):
                self.draw_arrow(street, s, lateral, sign)
        if street.parking:
            for side in (-1.0, 1.0):
                lateral = side * (street.half_width - 1.05)
                # Parking bays end before the crossing, with a kerb extension.
                for s in np.arange(low + 3.0, high - 8.0, 5.8):
                    if rng.random() < 0.08:
                        continue
                    (place,) = street.at(s + 2.9, lateral)
                    (direction,) = street.tangent(s + 2.9)
                    self.slots.append((*place, *(-side * -direction), rng.normal(0, 0.04)))
                    if style.crossing == "ladder":
                        bay = street.strip(s - 0.06, s + 0.06, lateral, 2.0)
                        canvas.fill(paint, bay, 190, 2, True)
        for s in np.arange(low, high, 26.0):
            self.poles.append(tuple(street.at(s, (street.half_width + 0.5) * (1 if int(s) % 2 else -1))[0]))
        for side in (-1.0, 1.0):
            if rng.random() < 0.75:
                spacing = style.street_tree_m * rng.uniform(0.8, 1.6)
                for s in np.arange(low + rng.uniform(0, 8), high, spacing):
                    if rng.random() < 0.8:
                        place = street.at(s + rng.normal(0, 0.7), side * (street.half_width + 1.1))[0]
                        self.add_tree(place, rng.uniform(1.4, 2.9), rng.uniform(5.0, 9.0), 2.6)
        # Repairs of the road's surface: both views see them.
        for _ in range(rng.poisson(street.length / 28.0)):
            s, lateral = rng.uniform(2, street.length - 2), rng.uniform(-0.8, 0.8) * lanes_half
            span = rng.uniform(0.8, 4.0) if rng.random() < 0.7 else rng.uniform(8.0, 25.0)
            polygon = street.strip(s, min(s + span, street.length), lateral, rng.uniform(0.7, 2.0))
            self.patches.append((polygon, float(rng.choice([0.72, 0.82, 1.16]))))

    def draw_crossing(self, street: Street, low: float, high: float) -> None:
        canvas, paint, half = self.canvas, self.marking, street.half_width - 0.3
        kind = self.style.crossing
        if kind in ("zebra", "ladder"):
            for lateral in np.arange(-half + 0.3, half, 1.0):
                canvas.fill(paint, street.strip(low, high, lateral, 0.5), 255, 2, True)
        if kind in ("lines", "ladder"):
            for s in (low, high):
                canvas.fill(paint, street.strip(s - 0.13, s + 0.13, 0.0, 2 * half), 255, 2, True)

    def draw_arrow(self, street: Street, s: float, lateral: float, sign: int) -> None:
        (place,), (t,) = street.at(s, lateral), street.tangent(s)
        t = t * sign
        n = np.array([-t[1], t[0]])
        outline = [(0, 0.08), (2.4, 0.08), (2.4, 0.35), (4.0, 0), (2.4, -0.35), (2.4, -0.08), (0, -0.08)]
        polygon = np.array([place + t * (x - 2.0) + n * y for x, y in outline])
        self.canvas.fill(self.marking, polygon, 255, 2, True)

    def add_tree(self, place: Array, radius: float, top: float, bottom: float) -> None:
        top = max(top, bottom + 0.9 * radius)
        col, row = int(place[0] + self.half), int(self.half - place[1])
        if 0 <= row < self.taken.shape[0] and 0 <= col < self.taken.shape[1]:
            low_r, low_c = max(row - 1, 0), max(col - 1, 0)
            if (self.taken[low_r : row + 2, low_c : col + 2] == 2).any():
                return
            self.trees.append((place[0], place[1], radius, top, bottom, self.rng.normal()))

    def off_the_road(self, rows: Array) -> Array:
        """The rows (x, y, ...) that stand on no carriageway, a neighbouring street's included."""
        col = ((rows[:, 0] + self.half) / self.gsd).astype(int).clip(0, self.size - 1)
        row = ((self.half - rows[:, 1]) / self.gsd).astype(int).clip(0, self.size - 1)
        return rows[~np.isin(self.material[row, col], (ASPHALT, KERB))]

    # -- blocks ------------------------------------------------------------------------------------------

    def draw_blocks(self) -> None:
        for ring in self.streets.blocks:
            outline = np.concatenate([side[:-1] for side, _ in ring])
            if not self.inside(outline, -10.0):
                continue
            centre = outline.mean(axis=0)
            if self.rng.random() < self.style.open_blocks:
                self.draw_open_block(ring, centre)
            else:
                self.draw_lots(ring, centre)

    def fill_ground(self, polygon: Array, value: int) -> None:
        """Fill what is not street."""
        points = self.canvas.points(polygon)
        low = np.maximum(points.min(axis=0) >> _SHIFT, 0)
        high = np.minimum((points.max(axis=0) >> _SHIFT) + 2, self.size)
        if (high <= low).any():
            return
        mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
        cv2.fillPoly(mask, [points - (low << _SHIFT)], 1, cv2.LINE_8, _SHIFT)
        window = self.material[low[1] : high[1], low[0] : high[0]]
        street = (window == ASPHALT) | (window == PAVEMENT) | (window == KERB)
        window[(mask == 1) & ~street] = value

    def draw_open_block(self, ring: list[tuple[Array, float]], centre: Array) -> None:
        """A park, a square or a car park."""
        rng = self.rng
        outline = np.concatenate([side[:-1] for side, _ in ring])
        kind = rng.integers(0, 3)
        self.fill_ground(outline, (GRASS, PLAZA, PARKING)[kind])
        if kind < 2:
            for k in range(4):
                a, b = outline[(k * len(outline)) // 4], centre + rng.normal(0, 3, 2)
                d = (b - a) / max(np.hypot(*(b - a)), 1e-6)
                mid, half = (a + b) / 2, np.array([np.hypot(*(b - a)) / 2, 1.3])
                self.fill_ground(_rectangle(mid, d, half), GRAVEL if kind == 0 else PAVEMENT)
            circle = np.linspace(0, 2 * math.pi, 25)[:-1]
            bed = centre + rng.uniform(4, 9) * np.stack([np.cos(circle), np.sin(circle)], axis=1)
            self.fill_ground(bed, PLAZA if kind == 0 else GARDEN)
            for _ in range(int(rng.integers(8, 30) * self.style.yard_trees)):
                weights = rng.uniform(0.2, 0.85)
                place = centre + (outline[rng.integers(len(outline))] - centre) * weights
                self.add_tree(place, rng.uniform(2.0, 4.2), rng.uniform(6, 13), 2.2)
        else:
            (side, width), *_ = ring
            d = (side[-1] - side[0]) / np.hypot(*(side[-1] - side[0]))
            n = np.array([-d[1], d[0]])
            n = n if n @ (centre - side[0]) > 0 else -n
            length = np.hypot(*(side[-1] - side[0]))
            for row in np.arange(width + 12.0, 60.0, 17.0):
                for s in np.arange(20.0, length - 20.0, 2.6):
                    place = side[0] + d * s + n * row
                    line = _rectangle(place + d * 1.3, n, np.array([2.4, 0.07]))
                    if cv2.pointPolygonTest(outline.astype(np.float32), place.tolist(), True) > width + 6:
                        self.canvas.fill(self.marking, line, 220, 2, True)
                        self.slots.append((*place, *n, rng.normal(0, 0.06)))

    def draw_lots(self, ring: list[tuple[Array, float]], centre: Array) -> None:
        """Buildings in a row along each side of a block, each on its own plot."""
        style, rng = self.style, self.rng
        district = rng.uniform(0.75, 1.25)
        court = int(rng.choice([GRASS, GARDEN, GRAVEL, PARKING], p=[0.45, 0.25, 0.15, 0.15]))
        self.fill_ground(np.concatenate([side[:-1] for side, _ in ring]), court)
        pitched_block = rng.random() < style.pitched
        for side, width in ring:
            s = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(side, axis=0).T))])
            position = width + style.pavement_m + rng.uniform(4.0, 9.0)
            while True:
                frontage = style.frontage_m * district * rng.uniform(0.6, 1.6)
                depth = style.depth_m * rng.uniform(0.75, 1.35)
                if position + frontage > s[-1] - width - style.pavement_m - 3.0:
                    break
                mid = position + frontage / 2
                position += frontage + (rng.uniform(2.0, 8.0) if rng.random() < 0.6 else 0.05)
                a, b = (np.array([np.interp(v, s, side[:, k]) for k in (0, 1)]) for v in (mid - 3, mid + 3))
                d = (b - a) / np.hypot(*(b - a))
                n = np.array([-d[1], d[0]])
                n = n if n @ (centre - a) > 0 else -n
                front = (a + b) / 2 + n * (width + style.pavement_m)
                setback = max(0.3, style.setback_m * rng.uniform(0.5, 1.5))
                self.draw_lot(front, d, n, frontage, depth, setback, pitched_block)

    def draw_lot(
        self, front: Array, d: Array, n: Array, frontage: float, depth: float, setback: float, pitched: bool
    ) -> None:
        style, rng = self.style, self.rng
        yard = rng.uniform(4.0, 10.0)
        plot = _rectangle(
            front + n * (setback + depth + yard) / 2,
            d,
            np.array([frontage / 2 + 1.0, (setback + depth + yard) / 2]),
        )
        if not self.inside(plot, -2.0):
            return
        self.fill_ground(plot, int(rng.choice([GRASS, GARDEN, GRAVEL, PLAZA], p=[0.45, 0.2, 0.2, 0.15])))
        if setback > 1.5:
            for lateral, half_width in ((rng.uniform(-0.3, 0.3), 0.7), (rng.choice([-0.45, 0.45]), 1.5)):
                path = front + d * lateral * frontage + n * setback / 2
                self.fill_ground(_rectangle(path, n, np.array([setback / 2 + 0.5, half_width])), PAVEMENT)
            if rng.random() < style.hedges:
                for end in (-1.0, 1.0):
                    place = front + d * end * frontage * 0.28 + n * 0.4
                    self.add_hedge(place, d, np.array([frontage * 0.19, 0.4]))
        for _ in range(rng.poisson(1.4 * style.yard_trees)):
            place = (
                front
                + d * rng.uniform(-0.5, 0.5) * frontage
                + n * (setback + depth + rng.uniform(2, yard + 6))
            )
            self.add_tree(place, rng.uniform(1.5, 4.0), rng.uniform(5, 12), 1.6)
        if rng.random() < style.gap:
            return
        floors = float(np.clip(rng.normal(np.mean(style.floors), np.ptp(style.floors) / 2.5), *style.floors))
        height = 3.1 * round(floors) + rng.uniform(0.2, 1.2)
        roof = rng.integers(0, 5)
        roof_rgb = np.asarray(style.roofs[roof]) * rng.uniform(0.85, 1.15)
        wall = roof if rng.random() < style.facade_match else rng.integers(0, 5)
        wall_rgb = np.asarray(style.walls[wall]) * rng.uniform(0.82, 1.12)
        centre = front + n * (setback + depth / 2)
        slope = rng.uniform(0.45, 0.85) if pitched and rng.random() < 0.85 else 0.0
        self.add_building(centre, d, np.array([frontage / 2, depth / 2]), height, slope, roof_rgb, wall_rgb)
        if rng.random() < 0.35 and frontage > 11:
            wing = np.array([frontage * rng.uniform(0.18, 0.28), rng.uniform(3.0, 6.0)])
            shift = d * rng.choice([-1.0, 1.0]) * (frontage / 2 - wing[0]) + n * (depth / 2 + wing[1] - 0.2)
            self.add_building(
                centre + shift, d, wing, height * rng.uniform(0.4, 0.9), 0.0, roof_rgb, wall_rgb
            )

    def add_building(
        self, centre: Array, d: Array, half: Array, height: float, slope: float, roof: Array, wall: Array
    ) -> None:
        rng = self.rng
        footprint = _rectangle(centre, d, half)
        cells = self.plan.points(footprint)
        low = np.maximum((cells.min(axis=0) >> _SHIFT) - 1, 0)
        high = np.minimum((cells.max(axis=0) >> _SHIFT) + 2, self.taken.shape[0])
        if (high <= low).any():
            return
        mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
        cv2.fillPoly(
            mask, [self.plan.points(_rectangle(centre, d, half - 0.6)) - (low << _SHIFT)], 1, 8, _SHIFT
        )
        window = self.taken[low[1] : high[1], low[0] : high[0]]
        if ((window > 0) & (mask > 0)).sum() > 0.04 * mask.sum() + (2 if half.min() > 4 else 0):
            return
        cv2.fillPoly(window, [cells - (low << _SHIFT)], 2, 8, _SHIFT)
        glass = np.array([60.0, 72.0, 84.0]) * rng.uniform(0.7, 1.3)
        grid = (3.1 * rng.uniform(0.95, 1.05), rng.uniform(2.0, 3.8))
        self.solids.append((*centre, *d, *half, *wall, *glass, *grid, height))
        rgb: Rgb = (float(roof[0]), float(roof[1]), float(roof[2]))
        self.stamp(centre, d, half, height, slope, rgb)
        if slope == 0.0 and half.min() > 4.0:
            for _ in range(rng.integers(0, 3)):  # lift housings and machinery on flat roofs
                place = centre + d * rng.uniform(-0.6, 0.6) * half[0] + rng.normal(0, 0.15) * half[1]
                box = np.array([rng.uniform(0.8, 2.2), rng.uniform(0.8, 1.6)])
                grey = float(rng.uniform(110, 190))
                self.solids.append((*place, *d, *box, *[grey] * 3, *glass, 0.0, 1.0, height + 2.0))
                self.stamp(place, d, box, height + rng.uniform(1.0, 2.4), 0.0, (grey, grey, grey))

    def add_hedge(self, centre: Array, d: Array, half: Array) -> None:
        green = np.asarray(self.style.foliage_ground) * self.rng.uniform(0.6, 0.9)
        height = self.rng.uniform(0.8, 1.5)
        self.solids.append((*centre, *d, *half, *green, *green, 0.0, 1.0, height))
        rgb: Rgb = (float(green[0]), float(green[1]), float(green[2]))
        self.stamp(centre, d, half, height, 0.0, rgb)

    def stamp(self, centre: Array, d: Array, half: Array, height: float, slope: float, roof: Rgb) -> None:
        """Put a solid into the height field and the object raster; its roof is painted later."""
        points = self.canvas.points(_rectangle(centre, d, half)) >> _SHIFT
        low, high = np.maximum(points.min(axis=0), 0), np.minimum(points.max(axis=0) + 2, self.size)
        if (high <= low).any():
            return
        east = (np.arange(low[0], high[0]) + 0.5) * self.gsd - self.half - centre[0]
        north = self.half - (np.arange(low[1], high[1])[:, None] + 0.5) * self.gsd - centre[1]
        u, v = east * d[0] + north * d[1], -east * d[1] + north * d[0]
        inside = (np.abs(u) <= half[0]) & (np.abs(v) <= half[1])
        rise = np.minimum(half[1] - np.abs(v), 5.5) * slope
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        shape = np.where(inside, height + rise, 0.0)
        upper = shape > self.height[window]
        self.height[window][upper] = shape[upper]
        self.objects[window][upper] = len(self.solids)
        self.roofs.append((len(self.solids), centre, d, half, roof, slope))


def _paint(style: Style, colours: dict[int, Rgb], material: Image, rng: np.random.Generator) -> Image:
    table = np.zeros((256, 1, 3), np.uint8)
    for value, rgb in colours.items():
        table[value, 0] = np.clip(rgb, 0, 255)
    return cv2.LUT(cv2.merge([material] * 3), table)


def _colours(style: Style) -> dict[int, Rgb]:
    def scale(rgb: Rgb, factor: float) -> Rgb:
        return rgb[0] * factor, rgb[1] * factor, rgb[2] * factor

    grass = style.grass
    return {
        GRASS: grass,
        ASPHALT: style.asphalt,
        PAVEMENT: style.pavement,
        PLAZA: style.plaza,
        GRAVEL: style.gravel,
        KERB: scale(style.pavement, 1.16),
        PARKING: scale(style.asphalt, 1.15),
        GARDEN: (grass[0] * 0.62, grass[1] * 0.72, grass[2] * 0.6),
    }


def _shade_rgb(image: Image, factor: Floats) -> Image:
    """``image`` times ``factor`` (H, W), clipped."""
    scaled = np.clip(factor * 128.0, 0, 255).astype(np.uint8)
    return cv2.multiply(image, cv2.merge([scaled] * 3), scale=1.0 / 128.0)


def _parked(slots: Array, occupied: float, rng: np.random.Generator) -> Cars:
    chosen = slots[rng.random(len(slots)) < occupied]
    count = len(chosen)
    turn = chosen[:, 4] + np.where(rng.random(count) < 0.15, math.pi, 0.0)
    cos, sin = np.cos(turn), np.sin(turn)
    axis = np.stack(
        [chosen[:, 2] * cos - chosen[:, 3] * sin, chosen[:, 2] * sin + chosen[:, 3] * cos], axis=1
    )
    centre = chosen[:, :2] + axis * rng.normal(0, 0.3, (count, 1))
    return Cars(centre, axis, *car_looks(count, rng))


def car_looks(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Colours (count, 3) and sizes relative to a middle-class car."""
    colour = _CAR_COLOURS[rng.integers(0, len(_CAR_COLOURS), count)]
    colour = np.clip(colour * rng.uniform(0.8, 1.15, (count, 1)), 0, 255).astype(np.float32)
    return colour, rng.uniform(0.88, 1.15, count).astype(np.float32)


def build_city(
    seed: int,
    style: Style | str = "source",
    lat: float = 48.137,
    lon: float = 11.575,
    size_m: float = 1020.0,
    gsd: float = 0.30,
) -> City:
    """Build the city of a seed; the same arguments give the same city.

    ``style`` is a style or the name of one (then varied by the seed, :func:`style_for`); ``(lat, lon)`` is
    the city's centre, ``size_m`` its side and ``gsd`` metres per pixel.
    """
    if isinstance(style, str):
        style = style_for(style, seed)
    if not (size_m >= 150.0 and 0.05 <= gsd <= 1.0):
        raise ValueError(
            f"a city needs a side of at least 150 m and a gsd of 0.05 to 1 m, got {size_m} m, {gsd} m"
        )
    size = round(size_m / gsd)
    build = _Builder(seed, style, size * gsd / 2, gsd)
    build.draw_streets()
    build.draw_blocks()
    rng = np.random.default_rng([seed, 3])

    tree_rows = build.off_the_road(np.array(build.trees or np.zeros((0, 6))))
    draw = rng.random(len(tree_rows))
    trees = Trees(
        centre=tree_rows[:, :2],
        radius=tree_rows[:, 2].astype(np.float32),
        top=tree_rows[:, 3].astype(np.float32),
        bottom=tree_rows[:, 4].astype(np.float32),
        tint=tree_rows[:, 5].astype(np.float32),
        in_aerial=draw < (1 + _TREE_SHARED) / 2,
        in_ground=(draw < _TREE_SHARED) | (draw >= (1 + _TREE_SHARED) / 2),
    )
    slots = np.array(build.slots or np.zeros((0, 5)))
    rows = np.array(build.solids or np.zeros((0, 15)))
    solids = Solids(
        centre=rows[:, 0:2],
        axis=rows[:, 2:4],
        half=rows[:, 4:6],
        wall=np.clip(rows[:, 6:9], 0, 255).astype(np.float32),
        glass=rows[:, 9:12].astype(np.float32),
        floor_m=rows[:, 12].astype(np.float32),
        window_m=rows[:, 13].astype(np.float32),
        height=rows[:, 14].astype(np.float32),
    )
    colours = _colours(style)
    base = _paint(style, colours, build.material, rng)
    for polygon, factor in build.patches:
        level = tuple(float(np.clip(c * factor, 0, 255)) for c in colours[ASPHALT])
        build.canvas.fill(base, polygon, level)
    is_street = cv2.blur((build.material == ASPHALT).astype(np.float32), (3, 3))
    mottle = 0.7 * _noise(rng, size, 4) + 0.7 * _noise(rng, size, 22) + 0.7 * _noise(rng, size, 140)
    base = _shade_rgb(base, 1.0 + mottle * (0.075 - 0.035 * is_street))
    roof_light = _paint_roofs(build, base, style)

    paint = np.asarray(style.marking, np.float32)
    wear = [_noise(rng, size, 3) + _noise(rng, size, 12) for _ in range(2)]
    threshold = float(np.quantile(wear[0][::16, ::16], style.wear))
    painted = cv2.resize(build.marking, (size, size), interpolation=cv2.INTER_AREA)
    aerial = _lay_paint(base, painted, np.clip((wear[0] - threshold) * 1.6, 0.12, 1.0), paint)
    aerial = _render_aerial(build, aerial, roof_light, trees, _parked(slots, 0.55, rng), rng)

    threshold = float(np.quantile(wear[1][::16, ::16], style.wear))
    kept = np.clip((wear[1] - threshold) * 1.6, 0.12, 1.0)
    season = _noise(rng, size, 60)
    ground = _shade_rgb(base, 1.0 + 0.05 * season)
    far = _lay_paint(ground, painted, kept, paint)
    light = _shadow(_with_crowns(build, trees, trees.in_ground), gsd, style.ground_sun)
    marking = cv2.multiply(
        build.marking, cv2.resize((kept * 255).astype(np.uint8), build.marking.shape), scale=1 / 255
    )
    quarter = (size // 4, size // 4)
    return City(
        seed=seed,
        style=style,
        projection=LocalProjection(lat, lon),
        gsd=gsd,
        aerial=aerial,
        ground=ground,
        ground_far=cv2.resize(far, quarter, interpolation=cv2.INTER_AREA),
        marking=marking,
        light=(255 * (1.0 - style.ground_shadow * (1.0 - light))).astype(np.uint8),
        height=build.height,
        objects=build.objects,
        solids=solids,
        trees=trees,
        cars=_parked(slots, 0.55, rng),
        poles=build.off_the_road(np.array(build.poles or np.zeros((0, 2)))),
        streets=build.streets,
    )


def _lay_paint(image: Image, painted: Image, kept: Floats, colour: Floats) -> Image:
    """``image`` with road paint where ``painted``, as far as it is not worn off."""
    result = image.copy()
    where = painted > 0
    share = (painted[where] / 255.0 * kept[where])[:, None]
    result[where] = image[where] * (1 - share) + colour * share
    return result


def _paint_roofs(build: _Builder, base: Image, style: Style) -> Floats:
    """Paint roofs into ``base``; returns the light (H, W) that their slopes get from the aerial sun."""
    azimuth, elevation = np.radians(style.aerial_sun)
    sun = np.array([math.sin(azimuth), math.cos(azimuth)]) * math.cos(elevation)
    light = np.ones(base.shape[:2], np.float32)
    for number, centre, d, half, rgb, slope in build.roofs:
        points = build.canvas.points(_rectangle(centre, d, half)) >> _SHIFT
        low, high = np.maximum(points.min(axis=0), 0), np.minimum(points.max(axis=0) + 2, build.size)
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        own = build.objects[window] == number
        east = (np.arange(low[0], high[0]) + 0.5) * build.gsd - build.half - centre[0]
        north = build.half - (np.arange(low[1], high[1])[:, None] + 0.5) * build.gsd - centre[1]
        v = -east * d[1] + north * d[0]
        texture = np.ones(v.shape, np.float32)
        if slope > 0.0:
            # Courses of tiles along the slope, a ridge, and light by the side that faces the sun.
            side = np.sign(v)
            normal = np.array([-d[1], d[0]])
            facing = float(normal @ sun) * slope / math.hypot(1, slope) * side
            light[window][own] = (
                (math.sin(elevation) / math.hypot(1, slope) + facing) / math.sin(elevation)
            )[own]
            texture = 1.0 + 0.05 * np.sin(v * (2 * math.pi / 1.1)).astype(np.float32)
        else:
            u = east * d[0] + north * d[1]
            rim = np.minimum(half[0] - np.abs(u), half[1] - np.abs(v))
            texture = np.where(rim < 0.45, 1.18, 1.0).astype(np.float32)
        colour = np.clip(np.asarray(rgb, np.float32) * texture[own][:, None], 0, 255)
        noise = base[window][own].astype(np.float32).mean(axis=1, keepdims=True)
        noise = 0.85 + 0.15 * noise / max(float(noise.mean()) if noise.size else 1.0, 1.0)
        base[window][own] = np.clip(colour * noise, 0, 255)
    return light


def _with_crowns(build: _Builder, trees: Trees, chosen: NDArray[np.bool_]) -> Floats:
    """The height field with the chosen trees' crowns as discs: what casts shadows."""
    height = build.height.copy()
    order = np.flatnonzero(chosen)
    order = order[np.argsort(trees.top[order])]
    crowns = np.zeros_like(height)
    for index in order:
        radius, top = float(trees.radius[index]), float(trees.top[index])
        build.canvas.disc(crowns, trees.centre[index], radius * 0.92, top * 0.82)
        build.canvas.disc(crowns, trees.centre[index], radius * 0.55, top)
    return np.maximum(height, crowns)


def _render_aerial(
    build: _Builder, image: Image, roof_light: Floats, trees: Trees, cars: Cars, rng: np.random.Generator
) -> Image:
    """Light, cars, crowns and the aerial sensor."""
    style, size = build.style, build.size
    surface = _with_crowns(build, trees, trees.in_aerial)
    for centre, axis, colour, scale in zip(cars.centre, cars.axis, cars.colour, cars.scale, strict=True):
        half = np.array(_CAR_SIZE) / 2 * scale
        body = tuple(colour.tolist())
        build.canvas.fill(image, _rectangle(centre, axis, half), body)
        glass = _rectangle(centre - axis * 0.25, axis, half * (0.56, 0.86))
        build.canvas.fill(image, glass, (44.0, 50.0, 58.0))
        build.canvas.fill(image, _rectangle(centre - axis * 0.3, axis, half * (0.34, 0.8)), body)
        build.canvas.fill(surface, _rectangle(centre, axis, half), 1.3)
    for place in build.off_the_road(np.array(build.poles or np.zeros((0, 2)))):
        build.canvas.fill(image, _rectangle(place, np.array([1.0, 0.0]), np.array([0.2, 0.2])), (70.0,) * 3)
    leaf = np.asarray(style.foliage_aerial, np.float32)
    azimuth = math.radians(style.aerial_sun[0])
    grain = _noise(rng, 512, 3) + 0.8 * _noise(rng, 512, 7)
    crown_mask = np.zeros((size, size), np.uint8)
    for index in np.flatnonzero(trees.in_aerial):
        radius = float(trees.radius[index])
        row = (build.half - trees.centre[index, 1]) / build.gsd - 0.5
        col = (trees.centre[index, 0] + build.half) / build.gsd - 0.5
        reach = int(radius * 1.25 / build.gsd) + 1
        r0, r1 = max(int(row) - reach, 0), min(int(row) + reach + 1, size)
        c0, c1 = max(int(col) - reach, 0), min(int(col) + reach + 1, size)
        if r1 <= r0 or c1 <= c0:
            continue
        y = (np.arange(r0, r1)[:, None] - row) * (build.gsd / radius)
        x = (np.arange(c0, c1) - col) * (build.gsd / radius)
        gr, gc = (index * 37) % 400, (index * 91) % 400
        texture = grain[gr : gr + r1 - r0, gc : gc + c1 - c0]
        inside = x * x + y * y < (1.0 + 0.16 * texture) ** 2
        bright = 0.92 + 0.34 * (x * math.sin(azimuth) - y * math.cos(azimuth)) + 0.16 * texture
        tint = leaf * (1.0 + 0.07 * float(trees.tint[index])) + np.array([9.0, 0.0, 0.0]) * float(
            trees.tint[index]
        )
        window = image[r0:r1, c0:c1]
        window[inside] = np.clip(tint * bright[..., None], 0, 255)[inside]
        crown_mask[r0:r1, c0:c1][inside] = 1
    shadow = _shadow(surface, build.gsd, style.aerial_sun)
    # Crowns shade themselves in their own texture; here only what stands higher shades them.
    shadow = np.where(crown_mask > 0, np.maximum(shadow, 0.75), cv2.blur(shadow, (3, 3)))
    light = (1.0 - style.aerial_shadow * (1.0 - shadow)) * (0.45 + 0.55 * np.clip(roof_light, 0.0, 1.6))
    image = _shade_rgb(image, np.where(crown_mask > 0, shadow, light).astype(np.float32))
    return _sense_aerial(image, style, rng)


def _sense_aerial(image: Image, style: Style, rng: np.random.Generator) -> Image:
    matrix = colour_matrix(style.aerial_gain, style.aerial_saturation)
    image = cv2.transform(image, matrix)
    if style.aerial_blur > 0.15:
        image = cv2.GaussianBlur(image, (0, 0), style.aerial_blur)
    noise = rng.standard_normal((1024, 1024), np.float32) * style.aerial_noise
    reps = -(-image.shape[0] // 1024)
    grain = np.tile(np.round(noise).astype(np.int16), (reps, reps))[: image.shape[0], : image.shape[1]]
    image = cv2.add(image, cv2.merge([grain] * 3), dtype=cv2.CV_8U)
    _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, round(style.aerial_jpeg)])
    return np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR))


def colour_matrix(gain: Rgb, saturation: float) -> Floats:
    """3 x 3 matrix of a channel gain and a saturation (1: unchanged, 0: grey)."""
    mix = saturation * np.eye(3) + (1.0 - saturation) / 3.0
    return (np.diag(gain) @ mix).astype(np.float32)
