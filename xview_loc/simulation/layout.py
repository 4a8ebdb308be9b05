"""Layout of a simulated city: what lies where on the ground, how high it is, and what stands there."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from xview_loc.simulation.objects import Array, Boxes, Canvas, Trees, rectangle
from xview_loc.simulation.streets import Street, make_streets
from xview_loc.simulation.styles import Style

# Ground classes of the material raster.
GRASS, ASPHALT, PAVEMENT, PLAZA, GRAVEL, KERB, PARKING, GARDEN = range(8)

_TREE_SHARED = 0.88  # share of the trees that both views show


class Layout:
    """The plan of a city: rasters of material, road paint, height and objects, and lists of objects.

    ``size`` is the side in pixels of ``gsd`` metres, ``half`` half the side in metres.
    """

    def __init__(self, seed: int, style: Style, size: int, gsd: float) -> None:
        self.style, self.size, self.gsd = style, size, gsd
        self.half = half = size * gsd / 2
        self.rng = np.random.default_rng([seed, 2])
        self.canvas = Canvas(half, gsd, size)
        self.streets = make_streets(style, half, self.rng)
        self.material = np.full((size, size), GRASS, np.uint8)
        self.height = np.zeros((size, size), np.float32)
        self.objects = np.zeros((size, size), np.uint16)
        self.marking = np.zeros((2 * size, 2 * size), np.uint8)
        # Cells of 1 m that are taken: 1 by a street, 2 by a building.
        self.plan = Canvas(half, 1.0, math.ceil(2 * half))
        self.taken = np.zeros((self.plan.size,) * 2, np.uint8)
        self.boxes: list[tuple[Any, ...]] = []
        self.roofs: list[tuple[int, Array, Array, Array, Any, float]] = []
        self.trees: list[tuple[float, ...]] = []
        self.slots: list[tuple[float, ...]] = []
        self.poles: list[tuple[float, float]] = []
        self.patches: list[tuple[Array, float]] = []
        self._draw_streets()
        self._draw_blocks()

    def material_colours(self) -> dict[int, Any]:
        """Return the colour of each ground class."""
        style = self.style
        return {
            GRASS: style.grass,
            ASPHALT: style.asphalt,
            PAVEMENT: style.pavement,
            PLAZA: style.plaza,
            GRAVEL: style.gravel,
            KERB: np.multiply(style.pavement, 1.16),
            PARKING: np.multiply(style.asphalt, 1.15),
            GARDEN: np.multiply(style.grass, (0.62, 0.72, 0.6)),
        }

    def planted(self, rng: np.random.Generator) -> Trees:
        """Return the trees that stand on no carriageway; ``rng`` draws which view shows which."""
        rows = self.off_the_road(np.array(self.trees or np.zeros((0, 6))))
        draw = rng.random(len(rows))
        radius, top, bottom, tint = rows[:, 2:6].T.astype(np.float32)
        in_aerial = draw < (1 + _TREE_SHARED) / 2
        in_ground = (draw < _TREE_SHARED) | ~in_aerial
        return Trees(rows[:, :2], radius, top, bottom, tint, in_aerial, in_ground)

    def built(self) -> Boxes:
        """Return the boxes in the order of the object raster."""
        rows = np.array(self.boxes or np.zeros((0, 15)))
        return Boxes(
            centre=rows[:, 0:2],
            axis=rows[:, 2:4],
            half=rows[:, 4:6],
            wall=np.clip(rows[:, 6:9], 0, 255).astype(np.float32),
            glass=rows[:, 9:12].astype(np.float32),
            floor_m=rows[:, 12].astype(np.float32),
            window_m=rows[:, 13].astype(np.float32),
            height=rows[:, 14].astype(np.float32),
        )

    def _inside(self, points: Array, margin: float) -> bool:
        """Return True if a point (n, 2) lies at least ``margin`` metres inside the border."""
        return bool((np.abs(points) < self.half - margin).all(axis=-1).any())

    def _draw_streets(self) -> None:
        style, canvas = self.style, self.canvas
        shown = {i: s for i, s in enumerate(self.streets.streets) if self._inside(s.points, -20.0)}
        for extra, value in ((style.pavement_m, PAVEMENT), (0.3, KERB), (0.0, ASPHALT)):
            for street in shown.values():
                width = 2 * (street.half_width + extra)
                canvas.fill(self.material, street.strip(0.0, street.length, 0.0, width), value)
                for end in street.nodes:
                    radius = street.half_width + extra + (1.2 if extra < style.pavement_m else 0.0)
                    canvas.disc(self.material, self.streets.nodes[end], radius, value)
        for street in shown.values():
            outline = street.strip(0.0, street.length, 0.0, 2 * (street.half_width + style.pavement_m))
            self.plan.fill(self.taken, outline, 1)
        for index, street in shown.items():
            self._furnish_street(index, street)

    def _furnish_street(self, index: int, street: Street) -> None:
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
            s = edge + sign * 0.6
            if rng.random() < style.zebra:
                low, high = sorted((s, s + sign * 3.2))
                self._draw_crossing(street, low, high)
                s += sign * 4.4
            # Only the lanes that drive towards the crossing have a stop line.
            low, high = sorted((s, s + sign * 0.4))
            canvas.paint(paint, street.strip(low, high, sign * lanes_half / 2, lanes_half))
            free[which] = s + sign * 0.8
        low, high = free
        length, gap = style.dash_m
        if street.lanes == 2:
            for lateral in (-0.14, 0.14):
                canvas.paint(paint, street.strip(low, high, lateral, style.line_m))
        for lateral in [0.0] if street.lanes == 1 else [-street.lane_m, street.lane_m]:
            for s in np.arange(low + rng.uniform(0, gap), high - length, length + gap):
                canvas.paint(paint, street.strip(s, s + length, lateral, style.line_m, 4.0))
        if style.edge_line >= 0.5 or (street.parking and style.edge_line > 0.2):
            for lateral in (-lanes_half, lanes_half):
                canvas.paint(paint, street.strip(low, high, lateral, style.line_m), 210)
        if street.lanes == 2 and high - low > 30:
            for s, lateral, sign in ((high - 9, -lanes_half / 4 * 3, 1), (low + 9, lanes_half / 4 * 3, -1)):
                self._draw_arrow(street, s, lateral, sign)
        if street.parking:
            for side in (-1.0, 1.0):
                lateral = side * (street.half_width - 1.05)
                # Parking bays end before the crossing, with a kerb extension.
                for s in np.arange(low + 3.0, high - 8.0, 5.8):
                    if rng.random() < 0.08:
                        continue
                    (place,) = street.at(s + 2.9, lateral)
                    (direction,) = street.tangent(s + 2.9)
                    self.slots.append((*place, *(side * direction), rng.normal(0, 0.04)))
                    if style.crossing == "ladder":
                        bay = street.strip(s - 0.06, s + 0.06, lateral, 2.0)
                        canvas.paint(paint, bay, 190)
        for s in np.arange(low, high, 26.0):
            self.poles.append(tuple(street.at(s, (street.half_width + 0.5) * (1 if int(s) % 2 else -1))[0]))
        for side in (-1.0, 1.0):
            if rng.random() < 0.75:
                spacing = style.street_tree_m * rng.uniform(0.8, 1.6)
                for s in np.arange(low + rng.uniform(0, 8), high, spacing):
                    if rng.random() < 0.8:
                        place = street.at(s + rng.normal(0, 0.7), side * (street.half_width + 1.1))[0]
                        self._add_tree(place, rng.uniform(1.4, 2.9), rng.uniform(5.0, 9.0), 2.6)
        # Repairs of the road surface, seen in both views.
        for _ in range(rng.poisson(street.length / 28.0)):
            s, lateral = rng.uniform(2, street.length - 2), rng.uniform(-0.8, 0.8) * lanes_half
            span = rng.uniform(0.8, 4.0) if rng.random() < 0.7 else rng.uniform(8.0, 25.0)
            polygon = street.strip(s, min(s + span, street.length), lateral, rng.uniform(0.7, 2.0))
            self.patches.append((polygon, float(rng.choice([0.72, 0.82, 1.16]))))

    def _draw_crossing(self, street: Street, low: float, high: float) -> None:
        canvas, paint, half = self.canvas, self.marking, street.half_width - 0.3
        kind = self.style.crossing
        if kind in ("zebra", "ladder"):
            for lateral in np.arange(-half + 0.3, half, 1.0):
                canvas.paint(paint, street.strip(low, high, lateral, 0.5))
        if kind in ("lines", "ladder"):
            for s in (low, high):
                canvas.paint(paint, street.strip(s - 0.13, s + 0.13, 0.0, 2 * half))

    def _draw_arrow(self, street: Street, s: float, lateral: float, sign: int) -> None:
        (place,), (t,) = street.at(s, lateral), street.tangent(s)
        t = t * sign
        n = np.array([-t[1], t[0]])
        outline = [(0, 0.08), (2.4, 0.08), (2.4, 0.35), (4.0, 0), (2.4, -0.35), (2.4, -0.08), (0, -0.08)]
        polygon = np.array([place + t * (x - 2.0) + n * y for x, y in outline])
        self.canvas.paint(self.marking, polygon)

    def _add_tree(self, place: Array, radius: float, top: float, bottom: float) -> None:
        top = max(top, bottom + 0.9 * radius)
        col, row = int(place[0] + self.half), int(self.half - place[1])
        if min(row, col) >= 0 and max(row, col) < self.plan.size:
            if (self.taken[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2] == 2).any():
                return
            self.trees.append((place[0], place[1], radius, top, bottom, self.rng.normal()))

    def off_the_road(self, rows: Array) -> Array:
        """Return the rows (x, y, ...) that stand on no carriageway, of this or a neighbouring street."""
        col = ((rows[:, 0] + self.half) / self.gsd).astype(int).clip(0, self.size - 1)
        row = ((self.half - rows[:, 1]) / self.gsd).astype(int).clip(0, self.size - 1)
        return rows[~np.isin(self.material[row, col], (ASPHALT, KERB))]

    def _draw_blocks(self) -> None:
        for ring in self.streets.blocks:
            outline = np.concatenate([side[:-1] for side, _ in ring])
            if not self._inside(outline, -10.0):
                continue
            centre = outline.mean(axis=0)
            if self.rng.random() < self.style.open_blocks:
                self._draw_open_block(ring, centre)
            else:
                self._draw_lots(ring, centre)

    def _fill_ground(self, polygon: Array, value: int) -> None:
        """Fill the part of a polygon that is no street."""
        window = self.canvas.window(polygon)
        ground = self.material[window]
        street = (ground == ASPHALT) | (ground == PAVEMENT) | (ground == KERB)
        ground[self.canvas.mask(polygon, window) & ~street] = value

    def _draw_open_block(self, ring: list[tuple[Array, float]], centre: Array) -> None:
        """Draw a park, a square or a car park."""
        rng = self.rng
        outline = np.concatenate([side[:-1] for side, _ in ring])
        kind = rng.integers(0, 3)
        self._fill_ground(outline, (GRASS, PLAZA, PARKING)[kind])
        if kind < 2:
            for k in range(4):
                a, b = outline[(k * len(outline)) // 4], centre + rng.normal(0, 3, 2)
                d = (b - a) / max(np.hypot(*(b - a)), 1e-6)
                mid, half = (a + b) / 2, np.array([np.hypot(*(b - a)) / 2, 1.3])
                self._fill_ground(rectangle(mid, d, half), GRAVEL if kind == 0 else PAVEMENT)
            circle = np.linspace(0, 2 * math.pi, 25)[:-1]
            bed = centre + rng.uniform(4, 9) * np.stack([np.cos(circle), np.sin(circle)], axis=1)
            self._fill_ground(bed, PLAZA if kind == 0 else GARDEN)
            for _ in range(int(rng.integers(8, 30) * self.style.yard_trees)):
                weights = rng.uniform(0.2, 0.85)
                place = centre + (outline[rng.integers(len(outline))] - centre) * weights
                self._add_tree(place, rng.uniform(2.0, 4.2), rng.uniform(6, 13), 2.2)
        else:
            (side, width), *_ = ring
            length = np.hypot(*(side[-1] - side[0]))
            d = (side[-1] - side[0]) / length
            n = np.array([-d[1], d[0]])
            n = n if n @ (centre - side[0]) > 0 else -n
            for row in np.arange(width + 12.0, 60.0, 17.0):
                for s in np.arange(20.0, length - 20.0, 2.6):
                    place = side[0] + d * s + n * row
                    line = rectangle(place + d * 1.3, n, np.array([2.4, 0.07]))
                    if cv2.pointPolygonTest(outline.astype(np.float32), place.tolist(), True) > width + 6:
                        self.canvas.paint(self.marking, line, 220)
                        self.slots.append((*place, *n, rng.normal(0, 0.06)))

    def _draw_lots(self, ring: list[tuple[Array, float]], centre: Array) -> None:
        """Draw a row of buildings along each side of a block, each on its own plot."""
        style, rng = self.style, self.rng
        district = rng.uniform(0.75, 1.25)
        court = int(rng.choice([GRASS, GARDEN, GRAVEL, PARKING], p=[0.45, 0.25, 0.15, 0.15]))
        self._fill_ground(np.concatenate([side[:-1] for side, _ in ring]), court)
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
                self._draw_lot(front, d, n, frontage, depth, setback, pitched_block)

    def _draw_lot(
        self, front: Array, d: Array, n: Array, frontage: float, depth: float, setback: float, pitched: bool
    ) -> None:
        style, rng = self.style, self.rng
        yard = rng.uniform(4.0, 10.0)
        reach = setback + depth + yard
        plot = rectangle(front + n * reach / 2, d, np.array([frontage / 2 + 1.0, reach / 2]))
        if not self._inside(plot, -2.0):
            return
        self._fill_ground(plot, int(rng.choice([GRASS, GARDEN, GRAVEL, PLAZA], p=[0.45, 0.2, 0.2, 0.15])))
        if setback > 1.5:
            for lateral, half_width in ((rng.uniform(-0.3, 0.3), 0.7), (rng.choice([-0.45, 0.45]), 1.5)):
                path = front + d * lateral * frontage + n * setback / 2
                self._fill_ground(rectangle(path, n, np.array([setback / 2 + 0.5, half_width])), PAVEMENT)
            if rng.random() < style.hedges:
                for end in (-1.0, 1.0):
                    place = front + d * end * frontage * 0.28 + n * 0.4
                    green = np.asarray(style.foliage_ground) * rng.uniform(0.6, 0.9)
                    height, half = rng.uniform(0.8, 1.5), np.array([frontage * 0.19, 0.4])
                    self._add_box(place, d, half, height, (*green, *green, 0.0, 1.0, height), green)
        for _ in range(rng.poisson(1.4 * style.yard_trees)):
            place = front + d * rng.uniform(-0.5, 0.5) * frontage
            place = place + n * (setback + depth + rng.uniform(2, yard + 6))
            self._add_tree(place, rng.uniform(1.5, 4.0), rng.uniform(5, 12), 1.6)
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
        self._add_building(centre, d, np.array([frontage / 2, depth / 2]), height, slope, roof_rgb, wall_rgb)
        if rng.random() < 0.35 and frontage > 11:
            wing = np.array([frontage * rng.uniform(0.18, 0.28), rng.uniform(3.0, 6.0)])
            shift = d * rng.choice([-1.0, 1.0]) * (frontage / 2 - wing[0]) + n * (depth / 2 + wing[1] - 0.2)
            height *= rng.uniform(0.4, 0.9)
            self._add_building(centre + shift, d, wing, height, 0.0, roof_rgb, wall_rgb)

    def _add_building(
        self, centre: Array, d: Array, half: Array, height: float, slope: float, roof: Array, wall: Array
    ) -> None:
        rng = self.rng
        footprint = rectangle(centre, d, half)
        window = self.plan.window(footprint)
        mask = self.plan.mask(rectangle(centre, d, half - 0.6), window)
        if not mask.size:
            return
        if (mask & (self.taken[window] > 0)).sum() > 0.04 * mask.sum() + (2 if half.min() > 4 else 0):
            return
        self.plan.fill(self.taken, footprint, 2)
        glass = np.array([60.0, 72.0, 84.0]) * rng.uniform(0.7, 1.3)
        grid = (3.1 * rng.uniform(0.95, 1.05), rng.uniform(2.0, 3.8))
        self._add_box(centre, d, half, height, (*wall, *glass, *grid, height), roof, slope)
        if slope == 0.0 and half.min() > 4.0:
            for _ in range(rng.integers(0, 3)):  # lift housings and machinery on flat roofs
                place = centre + d * rng.uniform(-0.6, 0.6) * half[0] + rng.normal(0, 0.15) * half[1]
                box = np.array([rng.uniform(0.8, 2.2), rng.uniform(0.8, 1.6)])
                grey = np.full(3, rng.uniform(110, 190))
                look = (*grey, *glass, 0.0, 1.0, height + 2.0)
                self._add_box(place, d, box, height + rng.uniform(1.0, 2.4), look, grey)

    def _add_box(
        self,
        centre: Array,
        d: Array,
        half: Array,
        height: float,
        look: tuple[float, ...],
        roof: Array,
        slope: float = 0.0,
    ) -> None:
        """Put a box into the height field and the object raster; its roof is painted later.

        ``look`` holds the columns of :class:`Boxes` from the wall on.
        """
        self.boxes.append((*centre, *d, *half, *look))
        window = self.canvas.window(rectangle(centre, d, half))
        along, across = self.canvas.along(centre, d, window)
        if along.size == 0:
            return
        inside = (np.abs(along) <= half[0]) & (np.abs(across) <= half[1])
        rise = np.minimum(half[1] - np.abs(across), 5.5) * slope
        shape = np.where(inside, height + rise, 0.0)
        upper = shape > self.height[window]
        self.height[window][upper] = shape[upper]
        self.objects[window][upper] = len(self.boxes)
        self.roofs.append((len(self.boxes), centre, d, half, roof, slope))
