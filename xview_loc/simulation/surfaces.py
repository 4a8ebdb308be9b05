"""Surfaces of a simulated city: ground and roof colours, road paint, shadows, and the aerial image."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.simulation.layout import ASPHALT, Layout
from xview_loc.simulation.objects import CAR_SIZE, Array, Cars, Floats, Image, Trees, rectangle
from xview_loc.simulation.styles import Style, colour_matrix


def noise(rng: np.random.Generator, size: int, cell_px: float) -> Floats:
    """Return smooth noise (size, size) of mean 0 and about unit variance, with features of ``cell_px``."""
    n = max(2, int(size / cell_px) + 2)
    coarse = rng.standard_normal((n, n), np.float32) * 1.3
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def sunlight_on(height: Floats, gsd: float, sun: tuple[float, float]) -> Floats:
    """Return the share of sunlight (0..1) on a surface, for a sun at (azimuth, elevation) in degrees."""
    azimuth, elevation = math.radians(sun[0]), math.radians(sun[1])
    # The height up to which there is shadow: each pass doubles the distance over which it is cast.
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


def paint_ground(layout: Layout, rng: np.random.Generator) -> Image:
    """Return the colour of the ground without light and road paint; repairs of the road are in it."""
    colours = layout.material_colours()
    table = np.zeros((256, 1, 3), np.uint8)
    for value, rgb in colours.items():
        table[value, 0] = np.clip(rgb, 0, 255)
    image = cv2.LUT(cv2.merge([layout.material] * 3), table)
    for polygon, factor in layout.patches:
        layout.canvas.fill(image, polygon, np.clip(np.multiply(colours[ASPHALT], factor), 0, 255).tolist())
    is_street = cv2.blur((layout.material == ASPHALT).astype(np.float32), (3, 3))
    mottle = sum(0.7 * noise(rng, layout.size, cell_px) for cell_px in (4, 22, 140))
    return shade(image, 1.0 + mottle * (0.075 - 0.035 * is_street))


def shade(image: Image, factor: Floats) -> Image:
    """Multiply an image by ``factor`` (H, W), and clip."""
    scaled = np.clip(factor * 128.0, 0, 255).astype(np.uint8)
    return cv2.multiply(image, cv2.merge([scaled] * 3), scale=1.0 / 128.0)


def unworn(rng: np.random.Generator, size: int, worn: float) -> Floats:
    """Return how much paint is left (size, size), 0.12..1, if the share ``worn`` of a marking is worn off."""
    wear = noise(rng, size, 3) + noise(rng, size, 12)
    threshold = float(np.quantile(wear[::16, ::16], worn))
    return np.clip((wear - threshold) * 1.6, 0.12, 1.0)


def lay_paint(image: Image, painted: Image, kept: Floats, style: Style) -> Image:
    """Return a copy of the image with road paint where ``painted`` (0..255), of which ``kept`` is left."""
    colour = np.asarray(style.marking, np.float32)
    result = image.copy()
    where = painted > 0
    share = (painted[where] / 255.0 * kept[where])[:, None]
    result[where] = image[where] * (1 - share) + colour * share
    return result


def paint_roofs(layout: Layout, image: Image) -> Floats:
    """Paint roofs into an image; return the light (H, W) that their slopes get from the aerial sun."""
    azimuth, elevation = np.radians(layout.style.aerial_sun)
    sun = np.array([math.sin(azimuth), math.cos(azimuth)]) * math.cos(elevation)
    light = np.ones(image.shape[:2], np.float32)
    for number, centre, d, half, rgb, slope in layout.roofs:
        window = layout.canvas.window(rectangle(centre, d, half))
        u, v = layout.canvas.along(centre, d, window)
        own = layout.objects[window] == number
        texture = np.ones(v.shape, np.float32)
        if slope > 0.0:
            # Courses of tiles along the slope, a ridge, and light by the side that faces the sun.
            side = np.sign(v)
            normal = np.array([-d[1], d[0]])
            facing = float(normal @ sun) * slope / math.hypot(1, slope) * side
            lit = (math.sin(elevation) / math.hypot(1, slope) + facing) / math.sin(elevation)
            light[window][own] = lit[own]
            texture = 1.0 + 0.05 * np.sin(v * (2 * math.pi / 1.1)).astype(np.float32)
        else:
            rim = np.minimum(half[0] - np.abs(u), half[1] - np.abs(v))
            texture = np.where(rim < 0.45, 1.18, 1.0).astype(np.float32)
        colour = np.clip(np.asarray(rgb, np.float32) * texture[own][:, None], 0, 255)
        grain = image[window][own].astype(np.float32).mean(axis=1, keepdims=True)
        grain = 0.85 + 0.15 * grain / max(float(grain.mean()) if grain.size else 1.0, 1.0)
        image[window][own] = np.clip(colour * grain, 0, 255)
    return light


def with_crowns(layout: Layout, trees: Trees, chosen: NDArray[np.bool_]) -> Floats:
    """Return the height field with the crowns of the chosen trees as discs, for casting shadows."""
    height = layout.height.copy()
    order = np.flatnonzero(chosen)
    crowns = np.zeros_like(height)
    for index in order[np.argsort(trees.top[order])]:
        radius, top = float(trees.radius[index]), float(trees.top[index])
        layout.canvas.disc(crowns, trees.centre[index], radius * 0.92, top * 0.82)
        layout.canvas.disc(crowns, trees.centre[index], radius * 0.55, top)
    return np.maximum(height, crowns)


def render_aerial(
    layout: Layout,
    image: Image,
    roof_light: Floats,
    trees: Trees,
    cars: Cars,
    poles: Array,
    rng: np.random.Generator,
) -> Image:
    """Add cars, posts, crowns and light to the ground, and return what the aerial sensor makes of it."""
    style = layout.style
    surface = with_crowns(layout, trees, trees.in_aerial)
    _draw_cars(layout, image, surface, cars)
    for place in poles:
        layout.canvas.fill(image, rectangle(place, np.array([1.0, 0.0]), np.array([0.2, 0.2])), (70.0,) * 3)
    crowns = _draw_crowns(layout, image, trees, rng)
    sunlight = sunlight_on(surface, layout.gsd, style.aerial_sun)
    # The texture of crowns holds their own shade, so that only higher objects shade them here.
    sunlight = np.where(crowns, np.maximum(sunlight, 0.75), cv2.blur(sunlight, (3, 3)))
    light = (1.0 - style.aerial_shadow * (1.0 - sunlight)) * (0.45 + 0.55 * np.clip(roof_light, 0.0, 1.6))
    image = shade(image, np.where(crowns, sunlight, light).astype(np.float32))
    return _sense_aerial(image, style, rng)


def _draw_cars(layout: Layout, image: Image, surface: Floats, cars: Cars) -> None:
    """Draw cars into an image and the surface that casts shadows."""
    for centre, axis, colour, scale in zip(cars.centre, cars.axis, cars.colour, cars.scale, strict=True):
        half = np.array(CAR_SIZE) / 2 * scale
        body = tuple(colour.tolist())
        layout.canvas.fill(image, rectangle(centre, axis, half), body)
        glass = rectangle(centre - axis * 0.25, axis, half * (0.56, 0.86))
        layout.canvas.fill(image, glass, (44.0, 50.0, 58.0))
        layout.canvas.fill(image, rectangle(centre - axis * 0.3, axis, half * (0.34, 0.8)), body)
        layout.canvas.fill(surface, rectangle(centre, axis, half), 1.3)


def _draw_crowns(layout: Layout, image: Image, trees: Trees, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw crowns into an image; return the pixels (H, W) that show them."""
    style, size = layout.style, layout.size
    leaf = np.asarray(style.foliage_aerial, np.float32)
    azimuth = math.radians(style.aerial_sun[0])
    grain = noise(rng, 512, 3) + 0.8 * noise(rng, 512, 7)
    shown = np.zeros((size, size), bool)
    for index in np.flatnonzero(trees.in_aerial):
        radius, hue = float(trees.radius[index]), float(trees.tint[index])
        row = (layout.half - trees.centre[index, 1]) / layout.gsd - 0.5
        col = (trees.centre[index, 0] + layout.half) / layout.gsd - 0.5
        reach = int(radius * 1.25 / layout.gsd) + 1
        r0, r1 = max(int(row) - reach, 0), min(int(row) + reach + 1, size)
        c0, c1 = max(int(col) - reach, 0), min(int(col) + reach + 1, size)
        if r1 <= r0 or c1 <= c0:
            continue
        y = (np.arange(r0, r1)[:, None] - row) * (layout.gsd / radius)
        x = (np.arange(c0, c1) - col) * (layout.gsd / radius)
        gr, gc = (index * 37) % 400, (index * 91) % 400
        texture = grain[gr : gr + r1 - r0, gc : gc + c1 - c0]
        inside = x * x + y * y < (1.0 + 0.16 * texture) ** 2
        bright = 0.92 + 0.34 * (x * math.sin(azimuth) - y * math.cos(azimuth)) + 0.16 * texture
        tint = leaf * (1.0 + 0.07 * hue) + np.array([9.0, 0.0, 0.0]) * hue
        image[r0:r1, c0:c1][inside] = np.clip(tint * bright[..., None], 0, 255)[inside]
        shown[r0:r1, c0:c1][inside] = True
    return shown


def _sense_aerial(image: Image, style: Style, rng: np.random.Generator) -> Image:
    image = cv2.transform(image, colour_matrix(style.aerial_gain, style.aerial_saturation))
    if style.aerial_blur > 0.15:
        image = cv2.GaussianBlur(image, (0, 0), style.aerial_blur)
    speckle = rng.standard_normal((1024, 1024), np.float32) * style.aerial_noise
    reps = -(-image.shape[0] // 1024)
    grain = np.tile(np.round(speckle).astype(np.int16), (reps, reps))[: image.shape[0], : image.shape[1]]
    image = cv2.add(image, cv2.merge([grain] * 3), dtype=cv2.CV_8U)
    _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, round(style.aerial_jpeg)])
    return np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR))
