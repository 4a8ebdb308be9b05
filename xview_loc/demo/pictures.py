"""Pictures of localised drives, for the demos' pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nav_msgs.msg import OccupancyGrid
from numpy.typing import NDArray

from xview_loc.demo.live import Track
from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map

Array = NDArray[np.float64]
COARSE = "tab:orange"


def draw_map(track: Track, map_path: Path) -> Figure:
    """Truth, coarse fixes and estimates over the aerial image, in metres about the drive's middle."""
    figure = Figure(figsize=(9, 9))
    axes = figure.add_subplot()
    _draw_track(axes, track, map_path)
    axes.set(ylabel="north, m")
    axes.legend(loc="upper right")
    return figure


def draw_maps(tracks: Mapping[str, Track], map_path: Path) -> Figure:
    """The same route driven several times, side by side, no wider than it is."""
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, len(tracks), sharex=True, sharey=True)
    for axes, (title, track) in zip(panels, tracks.items(), strict=True):
        low, high = _draw_track(axes, track, map_path, spokes=True)
        axes.set(title=title, xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    width = 6.0
    figure.set_size_inches(width * len(tracks), width * (high[1] - low[1]) / (high[0] - low[0]) + 0.8)
    panels[0].set(ylabel="north, m")
    panels[-1].legend(loc="best", fontsize=8, facecolor="0.6")
    return figure


def _draw_track(axes: Axes, track: Track, map_path: Path, spokes: bool = False) -> tuple[Array, Array]:
    """Draw a track over the square of the map about it; ``spokes``: each estimate's line to its truth.

    Returns the south-western and north-eastern corner (2,), metres, of what there is to see.
    """
    truth = np.array(list(track.truth.values()))
    plane = LocalProjection(*truth.mean(0))
    reach = max(float(np.abs(plane.forward(*truth.T)).max()) + 40.0, 80.0)
    with open_map(str(map_path)) as aerial:
        tile = aerial.tile(plane.lat, plane.lon, 1000, 2 * reach / 1000)
    axes.imshow(tile.image, extent=(-reach, reach, -reach, reach))
    shown = []
    for label, look, colour, places in (
        ("truth", "-", "white", track.truth),
        ("coarse fix", ".-", COARSE, track.fix),
        ("estimate", ".", "cyan", track.estimate),
    ):
        east, north = plane.forward(*np.array([places[s] for s in sorted(places)]).T)
        axes.plot(east, north, look, color=colour, linewidth=1.5, markersize=5, label=label)
        shown.append(np.stack([east, north], axis=1))
    for stamp in track.estimate.keys() & track.truth.keys() if spokes else ():
        ends = np.array([track.truth[stamp], track.estimate[stamp]])
        axes.plot(*plane.forward(*ends.T), color="cyan", linewidth=0.7)
    axes.set(xlabel="east, m", xlim=(-reach, reach), ylim=(-reach, reach))
    every = np.concatenate(shown)
    return np.maximum(every.min(0) - 30.0, -reach), np.minimum(every.max(0) + 30.0, reach)


def draw_errors(coarse: Mapping[int, float], own: Mapping[int, float]) -> Figure:
    """Errors (metres by stamp) over time."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.add_subplot()
    start = min(own)
    for label, colour, errors in (("coarse fix", COARSE, coarse), ("estimate", "tab:blue", own)):
        axes.plot([(s - start) / 1e9 for s in errors], list(errors.values()), color=colour, label=label)
    axes.set(xlabel="time, s", ylabel="distance from the truth, m", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_distribution(
    errors: Mapping[str, Array], colours: Mapping[str, str], half_extent_m: float
) -> Figure:
    """Share of the frames that lie within so many metres of the truth, up to ``half_extent_m``."""
    figure = Figure(figsize=(9, 4))
    axes = figure.add_subplot()
    for name, values in errors.items():
        share = np.arange(1, len(values) + 1) / len(values)
        axes.step(np.sort(values), share, where="post", color=colours[name], label=name)
    axes.set(xlabel="distance from the truth, m", ylabel="share of the frames")
    axes.set(xlim=(0, half_extent_m), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_change(errors: Mapping[str, Array], colours: Mapping[str, str]) -> Figure:
    """Errors of the first and the second drive frame by frame, and by how much each has changed."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, values in errors.items():
        above.plot(values, color=colours[name], linewidth=1, label=name)
    above.set(ylabel="distance from\nthe truth, m", ylim=(0, None))
    above.legend(loc="upper right")
    before, after = errors.values()
    change = after - before
    frames = np.arange(len(change))
    below.bar(frames, change, 1.0, color=np.where(change < 0, "tab:green", "tab:red"))
    below.axhline(0.0, color="black", linewidth=0.8)
    below.set(xlabel="frame", ylabel="second less first, m\n(green: nearer)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def draw_heat_map(
    track: Track, grid: OccupancyGrid, stamp: int, map_path: Path, datum: LocalProjection
) -> Figure:
    """A heat map, taken at ``stamp``, over its aerial tile, in map-frame metres."""
    info = grid.info
    cells = np.array(grid.data, np.float32).reshape(info.height, info.width)
    side = info.width * info.resolution
    left, bottom = info.origin.position.x, info.origin.position.y
    extent = (left, left + side, bottom, bottom + side)
    with open_map(str(map_path)) as aerial:
        tile = aerial.tile(*datum.inverse(left + side / 2, bottom + side / 2), 512, side / 512)
    figure = Figure(figsize=(9, 4.5))
    for index, axes in enumerate(figure.subplots(1, 2, sharex=True, sharey=True)):
        axes.imshow(tile.image, extent=extent)
        if index:
            axes.imshow(np.flipud(cells), extent=extent, cmap="inferno", alpha=0.65)
        for label, colour, marker, places in (
            ("truth", "white", "o", track.truth),
            ("coarse fix", COARSE, "x", track.fix),
            ("estimate", "cyan", "+", track.estimate),
        ):
            if stamp in places:
                east, north = datum.forward(*places[stamp])
                axes.plot(
                    east, north, marker, color=colour, markersize=9, fillstyle="none", label=label, ls=""
                )
        axes.set(xlabel="east, m", xlim=extent[:2], ylim=extent[2:])
    axes.legend(loc="lower left", fontsize=8)
    return figure
