"""Styles of simulated cities: the numbers that make the domain gap between two cities.

Colours are roughly linear RGB in 0..255. Every field is a number, a tuple of numbers or a name, so that
styles can be blended (:func:`blend`) and varied (:func:`vary`) field by field.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[float, float, float]
Palette = tuple[Rgb, ...]


def _palette(codes: str) -> Palette:
    """Return the colours of hexadecimal codes."""
    return tuple((float(r), float(g), float(b)) for r, g, b in map(bytes.fromhex, codes.split()))


_ROOFS, _WALLS = map(_palette, ("984c38 804236 706e70 96928c 605652", "d6c8aa c6a884 cececa aa6852 bcbca4"))


@dataclass(frozen=True)
class Style:
    """Look of a city, its light, its aerial sensor and the vehicle's camera.

    Layout: ``block_m`` is the mean distance of parallel streets, ``jitter`` the displacement of crossings as
    a share of a block, ``bend_m`` the largest sideways bend of streets, ``missing`` the share of side streets
    left out. Every ``avenue_every``-th street is wide.
    Streets: widths in metres; ``dash_m`` is (length, gap) of the centre line; ``zebra`` is the share of
    junction arms with a crossing, ``crossing`` its look; ``edge_line`` of at least 0.5 draws a line along the
    kerb; ``wear`` is the share of a marking worn off.
    Buildings: ``floors`` is (least, most), ``pitched`` the share with pitched roofs, ``frontage_m`` the mean
    width, ``gap`` the share of lots left open, ``facade_match`` the share of facades matched to the roof.
    Light: azimuths are clockwise from north, elevations above the horizon, in degrees; a shadow takes away
    the share ``*_shadow`` of the light. ``haze_m`` is the range at which 63 % of the contrast is gone.
    Sensors: blur in pixels (standard deviation), noise in grey levels, gain per colour channel.
    """

    name: str
    # layout
    block_m: float = 95.0
    jitter: float = 0.18
    bend_m: float = 22.0
    missing: float = 0.15
    avenue_every: float = 4.0
    # streets
    lane_m: float = 3.2
    pavement_m: float = 3.0
    parking: float = 0.6
    dash_m: tuple[float, float] = (3.0, 6.0)
    line_m: float = 0.16
    zebra: float = 0.7
    crossing: str = "zebra"
    edge_line: float = 0.0
    wear: float = 0.25
    # buildings
    floors: tuple[float, float] = (2.0, 5.0)
    pitched: float = 0.6
    frontage_m: float = 16.0
    depth_m: float = 12.0
    setback_m: float = 3.0
    gap: float = 0.15
    facade_match: float = 0.5
    # green
    street_tree_m: float = 13.0
    yard_trees: float = 1.0
    hedges: float = 0.4
    open_blocks: float = 0.12
    # materials
    asphalt: Rgb = (96.0, 96.0, 100.0)
    pavement: Rgb = (158.0, 154.0, 146.0)
    marking: Rgb = (232.0, 232.0, 226.0)
    grass: Rgb = (98.0, 122.0, 66.0)
    gravel: Rgb = (160.0, 148.0, 126.0)
    plaza: Rgb = (178.0, 166.0, 150.0)
    roofs: Palette = _ROOFS
    walls: Palette = _WALLS
    foliage_aerial: Rgb = (66.0, 98.0, 48.0)
    foliage_ground: Rgb = (78.0, 112.0, 52.0)
    # light
    aerial_sun: tuple[float, float] = (160.0, 48.0)
    aerial_shadow: float = 0.5
    ground_sun: tuple[float, float] = (215.0, 38.0)
    ground_shadow: float = 0.4
    sky_top: Rgb = (96.0, 150.0, 214.0)
    sky_low: Rgb = (200.0, 216.0, 230.0)
    clouds: float = 0.3
    haze_m: float = 450.0
    # aerial sensor
    aerial_blur: float = 0.5
    aerial_noise: float = 2.5
    aerial_jpeg: float = 88.0
    aerial_gain: Rgb = (1.0, 1.0, 1.0)
    aerial_saturation: float = 1.0
    # vehicle camera
    camera_height_m: float = 1.7
    camera_blur: float = 0.45
    camera_noise: float = 3.0
    camera_gain: Rgb = (1.0, 1.0, 1.0)
    camera_saturation: float = 1.0
    rain: float = 0.0
    traffic: float = 0.5


SOURCE = Style("source")

TARGET = Style(
    "target",
    block_m=78.0,
    jitter=0.26,
    bend_m=34.0,
    missing=0.24,
    avenue_every=5.0,
    lane_m=2.9,
    pavement_m=2.1,
    parking=0.8,
    dash_m=(1.6, 3.2),
    line_m=0.13,
    zebra=0.45,
    crossing="lines",
    edge_line=1.0,
    wear=0.5,
    floors=(3.0, 8.0),
    pitched=0.25,
    frontage_m=21.0,
    depth_m=15.0,
    setback_m=1.2,
    gap=0.1,
    facade_match=0.2,
    street_tree_m=20.0,
    yard_trees=0.6,
    hedges=0.2,
    open_blocks=0.08,
    asphalt=(128.0, 116.0, 108.0),
    pavement=(168.0, 148.0, 128.0),
    marking=(226.0, 194.0, 112.0),
    grass=(146.0, 130.0, 78.0),
    gravel=(178.0, 152.0, 118.0),
    plaza=(170.0, 140.0, 118.0),
    roofs=_palette("b8b2a8 a4988a 606a74 ac724e cec8be"),
    walls=_palette("c49474 dec494 949296 ceb0a8 7e685c"),
    foliage_aerial=(112.0, 104.0, 54.0),
    foliage_ground=(158.0, 120.0, 50.0),
    aerial_sun=(235.0, 36.0),
    aerial_shadow=0.58,
    ground_sun=(110.0, 55.0),
    ground_shadow=0.12,
    sky_top=(172.0, 176.0, 182.0),
    sky_low=(208.0, 208.0, 208.0),
    clouds=0.9,
    haze_m=160.0,
    aerial_blur=0.9,
    aerial_noise=5.0,
    aerial_jpeg=62.0,
    aerial_gain=(0.94, 0.92, 1.02),
    aerial_saturation=0.75,
    camera_blur=0.7,
    camera_noise=6.5,
    camera_gain=(0.98, 0.92, 0.84),
    camera_saturation=0.85,
    rain=0.35,
    traffic=0.8,
)

VALIDATION = replace(
    SOURCE,
    name="validation",
    block_m=110.0,
    jitter=0.22,
    bend_m=12.0,
    lane_m=3.5,
    pavement_m=2.4,
    crossing="ladder",
    wear=0.4,
    dash_m=(4.5, 4.5),
    floors=(1.0, 3.0),
    pitched=0.85,
    frontage_m=13.0,
    depth_m=10.0,
    setback_m=5.5,
    gap=0.2,
    facade_match=0.35,
    yard_trees=1.5,
    hedges=0.6,
    asphalt=(74.0, 76.0, 84.0),
    pavement=(136.0, 134.0, 136.0),
    grass=(112.0, 138.0, 84.0),
    roofs=_palette("585458 744e42 464c56 847662 68625c"),
    foliage_aerial=(84.0, 106.0, 70.0),
    foliage_ground=(116.0, 124.0, 58.0),
    aerial_sun=(190.0, 58.0),
    ground_sun=(280.0, 24.0),
    ground_shadow=0.3,
    sky_top=(132.0, 164.0, 206.0),
    haze_m=260.0,
    aerial_blur=0.7,
    aerial_noise=4.0,
    aerial_jpeg=75.0,
    aerial_gain=(1.04, 1.0, 0.95),
    camera_noise=4.5,
    camera_gain=(0.9, 0.94, 1.02),
    clouds=0.6,
)

STYLES = {style.name: style for style in (SOURCE, TARGET, VALIDATION)}
# How far cities stray from the named style; the source is varied widely, for training.
_STRENGTH = {"source": 1.0, "target": 0.25, "validation": 0.25}

# Fields that vary by an absolute amount: (standard deviation at strength 1, least, most).
_SPREAD: dict[str, tuple[float, float, float]] = {
    "jitter": (0.06, 0.05, 0.3),
    "missing": (0.1, 0.0, 0.35),
    "parking": (0.25, 0.0, 1.0),
    "zebra": (0.25, 0.0, 1.0),
    "edge_line": (0.6, 0.0, 1.0),
    "wear": (0.2, 0.0, 0.7),
    "pitched": (0.3, 0.0, 1.0),
    "facade_match": (0.3, 0.0, 1.0),
    "gap": (0.08, 0.0, 0.4),
    "hedges": (0.25, 0.0, 0.8),
    "open_blocks": (0.05, 0.02, 0.3),
    "clouds": (0.4, 0.0, 1.0),
    "rain": (0.15, 0.0, 0.6),
    "traffic": (0.3, 0.0, 1.0),
    "aerial_blur": (0.3, 0.0, 1.5),
    "camera_blur": (0.3, 0.0, 1.2),
    "aerial_shadow": (0.12, 0.05, 0.75),
    "ground_shadow": (0.15, 0.0, 0.7),
    "camera_height_m": (0.15, 1.2, 2.6),
    "aerial_jpeg": (10.0, 40.0, 98.0),
}


def _mix(a: Any, b: Any, t: float) -> Any:
    if isinstance(a, str):
        return a if t < 0.5 else b
    if isinstance(a, tuple):
        return tuple(_mix(x, y, t) for x, y in zip(a, b, strict=True))
    return (1.0 - t) * a + t * b


def blend(a: Style, b: Style, t: float) -> Style:
    """Return the style at a share ``t`` (0..1) of the way from ``a`` to ``b``, to set the domain gap.

    Numbers and colours are interpolated; names (the look of crossings) switch at one half. Raises ValueError
    for another ``t``.
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"a blend lies between 0 and 1, got {t}")
    values = {f.name: _mix(getattr(a, f.name), getattr(b, f.name), t) for f in fields(Style)}
    values["name"] = {0.0: a.name, 1.0: b.name}.get(t, f"{a.name}-{b.name}-{t:g}")
    return Style(**values)


def _vary_colour(colour: Rgb, rng: np.random.Generator, strength: float) -> Rgb:
    brightness = 1.0 + 0.14 * strength * rng.normal()
    tint = 1.0 + 0.035 * strength * rng.normal(size=3)
    r, g, b = np.clip(np.asarray(colour) * brightness * tint, 12.0, 245.0).tolist()
    return r, g, b


def vary(style: Style, rng: np.random.Generator, strength: float = 1.0) -> Style:
    """Return a random style around ``style``; ``strength`` 1 is the spread of the training cities, 0 none."""
    values: dict[str, Any] = {}
    for field in fields(Style):
        name, value = field.name, getattr(style, field.name)
        if name == "name":
            continue
        if name == "crossing":
            draw, other = rng.random(), str(rng.choice(["zebra", "ladder", "lines"]))
            values[name] = other if draw < 0.5 * strength else value
        elif name in ("aerial_gain", "camera_gain"):
            gain = np.asarray(value) * (1.0 + 0.12 * strength * rng.normal())
            values[name] = tuple(
                np.clip(gain * (1.0 + 0.05 * strength * rng.normal(size=3)), 0.5, 1.5).tolist()
            )
        elif field.type == "Rgb":
            values[name] = _vary_colour(value, rng, strength)
        elif field.type == "Palette":
            values[name] = tuple(_vary_colour(colour, rng, strength) for colour in value)
        elif name in ("aerial_sun", "ground_sun"):
            azimuth = (value[0] + 60.0 * strength * rng.normal()) % 360.0
            values[name] = (azimuth, float(np.clip(value[1] + 9.0 * strength * rng.normal(), 18.0, 68.0)))
        elif name in _SPREAD:
            spread, least, most = _SPREAD[name]
            values[name] = float(np.clip(value + spread * strength * rng.normal(), least, most))
        elif isinstance(value, tuple):
            factor = float(np.exp(0.15 * strength * rng.normal()))
            values[name] = tuple(v * factor for v in value)
        else:
            values[name] = value * float(np.exp(0.12 * strength * rng.normal()))
    return replace(style, **values)


def style_for(name: str, seed: int) -> Style:
    """Return the named style as varied for a city: "source" strays far from its mean, the others a little.

    Raises ValueError for an unknown name.
    """
    if name not in STYLES:
        raise ValueError(f"unknown style {name!r}; choose from {', '.join(STYLES)}")
    rng = np.random.default_rng([seed, sum(name.encode()), 1])
    return vary(STYLES[name], rng, _STRENGTH[name])


def colour_matrix(gain: Rgb, saturation: float) -> NDArray[np.float32]:
    """Return the 3 x 3 matrix of a gain per channel and a saturation (1: unchanged, 0: grey)."""
    mix = saturation * np.eye(3) + (1.0 - saturation) / 3.0
    return (np.diag(gain) @ mix).astype(np.float32)
