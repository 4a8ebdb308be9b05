"""The street network of a simulated city: bent, oblique streets between jittered crossings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.styles import Style

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Street:
    """One street between two crossings; ``points`` (n, 2) is its centre line in ENU metres."""

    nodes: tuple[int, int]
    points: Array
    lanes: int  # in each direction
    half_width: float  # of the carriageway with its parking lanes, metres
    parking: bool
    lane_m: float
    s: Array = field(repr=False)  # arc length at each point

    @property
    def length(self) -> float:
        """Length of the centre line in metres."""
        return float(self.s[-1])

    def at(self, s: Array | float, lateral: Array | float = 0.0) -> Array:
        """Return points (n, 2) at arc length ``s``, ``lateral`` metres to the left of the centre line."""
        s = np.atleast_1d(np.asarray(s, float))
        tangent = self.tangent(s)
        x = np.interp(s, self.s, self.points[:, 0]) - tangent[:, 1] * lateral
        y = np.interp(s, self.s, self.points[:, 1]) + tangent[:, 0] * lateral
        return np.stack([x, y], axis=1)

    def tangent(self, s: Array | float) -> Array:
        """Return unit directions (n, 2) at arc length ``s``."""
        s = np.atleast_1d(np.asarray(s, float))
        a, b = np.clip(s - 1.5, 0.0, self.length), np.clip(s + 1.5, 0.0, self.length)
        dx = np.interp(b, self.s, self.points[:, 0]) - np.interp(a, self.s, self.points[:, 0])
        dy = np.interp(b, self.s, self.points[:, 1]) - np.interp(a, self.s, self.points[:, 1])
        norm = np.maximum(np.hypot(dx, dy), 1e-9)
        return np.stack([dx / norm, dy / norm], axis=1)

    def strip(self, s0: float, s1: float, lateral: float, width: float, step: float = 2.0) -> Array:
        """Return the polygon (n, 2) of the band of ``width`` around ``lateral`` between two arc lengths."""
        s = np.linspace(s0, s1, max(2, int((s1 - s0) / step) + 1))
        left, right = self.at(s, lateral + width / 2), self.at(s, lateral - width / 2)
        return np.concatenate([left, right[::-1]])


@dataclass(frozen=True)
class StreetNetwork:
    """Crossings (n, 2), streets, the streets that meet at each crossing, and the blocks between them.

    A block is a list of its sides, counter-clockwise: (points along the centre line (n, 2), half width of the
    street in metres).
    """

    nodes: Array
    streets: list[Street]
    at_node: list[list[int]]
    blocks: list[list[tuple[Array, float]]]

    def node_clearance(self, node: int, street: int) -> float:
        """Return the metres along ``street`` from a crossing's centre to the edge of the widest other."""
        own = self.streets[street]
        start = own.nodes[0] == node
        d0 = own.tangent(0.0 if start else own.length)[0] * (1.0 if start else -1.0)
        clearance = 0.0
        for other_index in self.at_node[node]:
            if other_index == street:
                continue
            other = self.streets[other_index]
            d1 = other.tangent(0.0 if other.nodes[0] == node else other.length)[0]
            d1 = d1 * (1.0 if other.nodes[0] == node else -1.0)
            cos, sin = float(d0 @ d1), abs(float(d0[0] * d1[1] - d0[1] * d1[0]))
            if sin < 0.35:
                reach = 0.0 if cos < 0 else own.half_width * 2.0  # straight on: no clearance
            else:
                # Where the two kerbs meet.
                reach = (other.half_width + own.half_width * cos) / sin
            clearance = max(clearance, reach)
        return clearance


def make_streets(style: Style, half_size: float, rng: np.random.Generator) -> StreetNetwork:
    """Return a random network that covers the square of +-``half_size`` metres and continues beyond it."""
    block = style.block_m
    reach = half_size * 1.5 + block
    count = math.ceil(2 * reach / block) + 1
    # Uneven spacing, so that no two blocks are alike.
    spacing = block * rng.uniform(0.7, 1.3, size=(2, count))
    lines = np.cumsum(spacing, axis=1)
    lines -= lines[:, count // 2 : count // 2 + 1] + rng.uniform(-0.5, 0.5, (2, 1)) * block
    base = np.stack(np.meshgrid(lines[0], lines[1], indexing="ij"), axis=-1)
    base = base + style.jitter * block * rng.uniform(-1, 1, base.shape)
    angle = rng.uniform(0, math.pi / 2)
    phases, waves = rng.uniform(0, 2 * math.pi, 4), rng.uniform(260.0, 520.0, 4)

    def warp(p: Array) -> Array:
        x, y = p[..., 0], p[..., 1]
        u = x + style.bend_m * np.sin(2 * math.pi * y / waves[0] + phases[0])
        u = u + 0.5 * style.bend_m * np.sin(2 * math.pi * (x + y) / waves[1] + phases[1])
        v = y + style.bend_m * np.sin(2 * math.pi * x / waves[2] + phases[2])
        v = v + 0.5 * style.bend_m * np.sin(2 * math.pi * (x - y) / waves[3] + phases[3])
        cos, sin = math.cos(angle), math.sin(angle)
        return np.stack([cos * u - sin * v, sin * u + cos * v], axis=-1)

    every = max(2, round(style.avenue_every))
    offset = rng.integers(0, every, 2)
    streets: list[Street] = []
    nodes = warp(base.reshape(-1, 2))
    at_node: list[list[int]] = [[] for _ in nodes]
    sides: dict[tuple[int, int], tuple[Array, float]] = {}
    line_parking = rng.random((2, count)) < style.parking
    for axis in (0, 1):
        for i in range(count):
            avenue = i % every == offset[axis]
            for j in range(count - 1):
                first = (i, j) if axis == 0 else (j, i)
                second = (i, j + 1) if axis == 0 else (j + 1, i)
                a, b = first[0] * count + first[1], second[0] * count + second[1]
                t = np.linspace(0.0, 1.0, max(8, int(block / 2.5)))[:, None]
                points = warp((1 - t) * base[first] + t * base[second])
                s = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
                lanes = 2 if avenue else 1
                parking = bool(line_parking[axis, i])
                half_width = lanes * style.lane_m + (2.2 if parking else 0.35)
                built = avenue or rng.random() >= style.missing
                sides[(a, b)] = (points, half_width if built else 2.0)
                if not built or np.abs(points).min(axis=0).max() > reach:
                    continue
                at_node[a].append(len(streets))
                at_node[b].append(len(streets))
                streets.append(Street((a, b), points, lanes, half_width, parking, style.lane_m, s))
    blocks = []
    for i in range(count - 1):
        for j in range(count - 1):
            p, q = i * count + j, (i + 1) * count + j
            bottom, right = sides[(p, q)], sides[(q, q + 1)]
            top, left = sides[(p + 1, q + 1)], sides[(p, p + 1)]
            ring = [bottom, right, (top[0][::-1], top[1]), (left[0][::-1], left[1])]
            if np.abs(np.concatenate([side[0] for side in ring])).min(axis=0).max() < half_size + block:
                blocks.append(ring)
    return StreetNetwork(nodes, streets, at_node, blocks)
