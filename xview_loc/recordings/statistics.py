"""Summarises a bag of pairs in figures and a picture."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from xview_loc.bags.recovery import BagError
from xview_loc.geodesy import LocalProjection
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.vehicle.tilt import TiltSample

_Range = tuple[float, float]
# Sources of tilts that are told apart.
_SOURCES, _OTHERS = 8, "others"


@dataclass(frozen=True)
class PairStatistics:
    """Figures of a bag of pairs; metres, seconds, degrees.

    bounds: south, west, north, east. fix_sigma_m: median of the fixes' standard deviation along the larger
    axis, NaN without one. images: pairs with an image, by camera of a rig. tilts: by their source, the number
    of pairs with a tilt, and its least and greatest roll and pitch, radians.
    """

    pairs: int
    tiles: int
    without_tile: int
    damaged: int
    length_m: float
    seconds: float
    bounds: tuple[float, float, float, float]
    fix_sigma_m: float
    places: list[tuple[float, float]]
    images: Counter[str]
    tilts: dict[str, tuple[int, _Range, _Range]]


def pair_statistics(bag: PairBag) -> PairStatistics:
    """Summarise a bag of pairs. Raises BagError if no pair can be read."""
    places: list[tuple[float, float]] = []
    stamps: list[int] = []
    sigmas: list[float] = []
    tiles: set[str] = set()
    images: Counter[str] = Counter()
    tilts: dict[str, list[TiltSample]] = {}
    without_tile = damaged = 0
    length = 0.0
    for index in range(len(bag)):
        try:
            pair = bag[index]
        except BagError:
            damaged += 1
            continue
        if places:
            length += math.hypot(*LocalProjection(*places[-1]).forward(pair.lat, pair.lon))
        places.append((pair.lat, pair.lon))
        stamps.append(pair.stamp_ns)
        without_tile += not pair.tile_id
        tiles |= {pair.tile_id} - {""}
        images.update(image.name for image in pair.images)
        if pair.tilt is not None:
            # Sources come from the bag: a stranger's may have any number.
            source = pair.tilt_source if len(tilts) < _SOURCES else _OTHERS
            tilts.setdefault(source, []).append(pair.tilt)
        if pair.fix_covariance is not None:
            sigmas.append(math.sqrt(max(pair.fix_covariance[0, 0], pair.fix_covariance[1, 1])))
    if not places:
        raise BagError(f"{bag.folder} holds no pairs that can be read")
    lats, lons = zip(*places, strict=True)
    return PairStatistics(
        pairs=len(places),
        tiles=len(tiles),
        without_tile=without_tile,
        damaged=damaged,
        length_m=length,
        seconds=(max(stamps) - min(stamps)) / 1e9,
        bounds=(min(lats), min(lons), max(lats), max(lons)),
        fix_sigma_m=sorted(sigmas)[len(sigmas) // 2] if sigmas else math.nan,
        places=places,
        images=images,
        tilts={source: _tilt_range(samples) for source, samples in tilts.items()},
    )


def _tilt_range(samples: list[TiltSample]) -> tuple[int, _Range, _Range]:
    rolls, pitches = [sample.roll for sample in samples], [sample.pitch for sample in samples]
    return len(samples), (min(rolls), max(rolls)), (min(pitches), max(pitches))


def draw_places(bag: PairBag, statistics: PairStatistics) -> Figure:
    """Draw the pairs' positions, in metres about their middle, over their tiles."""
    box = statistics.bounds
    middle = LocalProjection((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    figure = Figure(figsize=(8, 8))
    axes = figure.add_subplot()
    drawn: set[str] = set()
    for index in range(len(bag)):
        try:
            name = bag[index].tile_id
            tile = bag.tile(index) if name not in drawn else None
        except BagError:
            continue
        if tile is None:
            continue
        drawn.add(name)
        x, y = middle.forward(tile.lat, tile.lon)
        half = tile.size_px * tile.gsd / 2
        step = max(1, tile.size_px // 128)
        axes.imshow(tile.image[::step, ::step], extent=(x - half, x + half, y - half, y + half))
    east, north = middle.forward(*np.array(statistics.places).T)
    axes.plot(east, north, ".-", color="tab:orange", markersize=3, linewidth=0.8)
    margin = 40.0
    axes.set(
        xlabel="east, m",
        ylabel="north, m",
        xlim=(float(east.min()) - margin, float(east.max()) + margin),
        ylim=(float(north.min()) - margin, float(north.max()) + margin),
        title=f"{statistics.pairs} pairs along {statistics.length_m / 1000:.2f} km",
    )
    axes.set_aspect("equal")
    return figure
