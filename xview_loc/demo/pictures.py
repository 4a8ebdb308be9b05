"""Figures of localised drives, for the pages of the demos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray

from xview_loc.demo.live import FILTERED, FIX, SINGLE, DriveLog
from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map

Array = NDArray[np.float64]
# Distinct for colour-blind readers too, over aerial images as on white.
TRUTH = "truth"
COLOURS = {TRUTH: "white", FIX: "#e69f00", SINGLE: "#56b4e9", FILTERED: "#6a0064"}
# Style, width and marker's size on a map: beads on the truth's broad band, and a line through them.
LOOKS = {TRUTH: ("-", 5.0, 0.0), FIX: (".-", 1.0, 5.0), SINGLE: (".", 0.0, 10.0), FILTERED: ("-", 2.0, 0.0)}
MARKERS = {TRUTH: "o", FIX: "x", SINGLE: "+", FILTERED: "d"}


def draw_maps(drives: Mapping[str, DriveLog], map_path: Path) -> Figure:
    """Draw drives along the same route over the aerial image, side by side and cropped to the route."""
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, len(drives), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, log) in zip(panels, drives.items(), strict=True):
        low, high = _draw_drive(axes, log, map_path)
        axes.set(title=title, xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    width = max(6.0, 9.0 / len(drives))
    figure.set_size_inches(width * len(drives), width * (high[1] - low[1]) / (high[0] - low[0]) + 0.8)
    panels[0].set(ylabel="north, m")
    panels[-1].legend(loc="best", fontsize=8, facecolor="0.6")
    return figure


def _draw_drive(axes: Axes, log: DriveLog, map_path: Path) -> tuple[Array, Array]:
    """Draw a drive over the map around it, with a line from each single-frame estimate to its truth.

    Returns the south-western and the north-eastern corner (2,) of the drive, metres.
    """
    truth = np.array(list(log.truth.values()))
    plane = LocalProjection(*truth.mean(0))
    half_extent = max(float(np.abs(plane.forward(*truth.T)).max()) + 40.0, 80.0)
    with open_map(str(map_path)) as aerial:
        tile = aerial.tile(plane.lat, plane.lon, 1000, 2 * half_extent / 1000)
    axes.imshow(tile.image, extent=(-half_extent, half_extent, -half_extent, half_extent))
    for stamp in log.estimate.keys() & log.truth.keys():
        ends = np.array([log.truth[stamp], log.estimate[stamp]])
        axes.plot(*plane.forward(*ends.T), color=COLOURS[SINGLE], linewidth=0.7)
    shown = []
    for name, places in {TRUTH: log.truth, **log.named}.items():
        if places:
            east, north = plane.forward(*np.array([places[s] for s in sorted(places)]).T)
            style, width, size = LOOKS[name]
            axes.plot(east, north, style, color=COLOURS[name], linewidth=width, markersize=size, label=name)
            shown.append(np.stack([east, north], axis=1))
    axes.set(xlabel="east, m", xlim=(-half_extent, half_extent), ylim=(-half_extent, half_extent))
    every = np.concatenate(shown)
    return np.maximum(every.min(0) - 30.0, -half_extent), np.minimum(every.max(0) + 30.0, half_extent)


def draw_errors(named: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw errors (metres by stamp) over time."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.add_subplot()
    start = min(named[SINGLE])
    for name, errors in named.items():
        look: Any = {"color": COLOURS[name], "linewidth": 1.5, "label": name}
        axes.plot([(s - start) / 1e9 for s in errors], list(errors.values()), **look)
    axes.set(xlabel="time, s", ylabel="distance from the truth, m", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_distribution(errors: Mapping[str, Array], colours: Mapping[str, str], largest_m: float) -> Figure:
    """Draw the cumulative share of frames over the error, up to ``largest_m``."""
    figure = Figure(figsize=(9, 4))
    axes = figure.add_subplot()
    for name, values in errors.items():
        share = np.arange(1, len(values) + 1) / len(values)
        axes.step(np.sort(values), share, where="post", color=colours[name], label=name)
    axes.set(xlabel="distance from the truth, m", ylabel="share of frames")
    axes.set(xlim=(0, largest_m), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_change(errors: Mapping[str, Array], colours: Mapping[str, str]) -> Figure:
    """Draw the errors of the first and the second drive frame by frame, and their change."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, values in errors.items():
        above.plot(values, color=colours[name], linewidth=1, label=name)
    above.set(ylabel="distance from\nthe truth, m", ylim=(0, None))
    above.legend(loc="upper right")
    before, after = errors.values()
    change = after - before
    below.bar(np.arange(len(change)), change, 1.0, color=np.where(change < 0, "tab:green", "tab:red"))
    below.axhline(0.0, color="black", linewidth=0.8)
    below.set(xlabel="frame", ylabel="second minus first, m\n(green: closer)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def _cells(grid: OccupancyGrid) -> Array:
    return np.array(grid.data, np.float64).reshape(grid.info.height, grid.info.width)


def spread_m(grid: OccupancyGrid) -> float:
    """Return the standard deviation of the positions in a heat map, metres."""
    cells = _cells(grid)
    places = np.indices(cells.shape).reshape(2, -1)
    return float(grid.info.resolution * np.sqrt(np.cov(places, aweights=cells.ravel()).trace()))


def draw_heat_map(log: DriveLog, stamp: int, map_path: Path, datum: LocalProjection) -> Figure:
    """Draw the heat map of the frame at ``stamp`` over its aerial tile, in metres of the map frame."""
    grid = log.heat_maps[stamp]
    info = grid.info
    side = info.width * info.resolution
    left, bottom = info.origin.position.x, info.origin.position.y
    # Turned about its lower left corner, with tiles that are turned to the heading.
    turn = 2.0 * math.atan2(info.origin.orientation.z, info.origin.orientation.w)
    cos, sin = math.cos(turn), math.sin(turn)
    x, y = left + side / 2 * (cos - sin), bottom + side / 2 * (cos + sin)
    half = side / 2 * (abs(cos) + abs(sin))
    extent = (x - half, x + half, y - half, y + half)
    with open_map(str(map_path)) as aerial:
        tile = aerial.tile(*datum.inverse(x, y), 512, 2 * half / 512)
    figure = Figure(figsize=(9, 4.5))
    left_axes, right_axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes in (left_axes, right_axes):
        axes.imshow(tile.image, extent=extent)
        axes.set(xlabel="east, m", xlim=extent[:2], ylim=extent[2:])
    own = (left, left + side, bottom, bottom + side)
    drawn = right_axes.imshow(np.flipud(_cells(grid)), extent=own, cmap="inferno", alpha=0.65)
    drawn.set_transform(Affine2D().rotate_around(left, bottom, turn) + right_axes.transData)
    right_axes.set(xlim=extent[:2], ylim=extent[2:])
    for name, places in {TRUTH: log.truth, **log.named}.items():
        if stamp in places:
            look: Any = {"color": COLOURS[name], "markersize": 9, "fillstyle": "none", "markeredgewidth": 2}
            left_axes.plot(*datum.forward(*places[stamp]), MARKERS[name], linestyle="", label=name, **look)
    left_axes.legend(loc="best", fontsize=8, facecolor="0.6")
    return figure
