"""Draw one estimate: aerial tile, heat map, coarse fix, search disc, estimate, ellipse, heading."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from xview_loc.estimation.heat_map import HeatMap
from xview_loc.estimation.observation import PoseEstimate
from xview_loc.maps.base import AerialTile

FIX_COLOUR = (255, 60, 40)
ESTIMATE_COLOUR = (40, 255, 90)
SEARCH_COLOUR = (255, 255, 255)
ELLIPSE_SIGMAS = 2.0
HEAT_OPACITY = 0.65

# Fractional bits of the fixed-point drawing coordinates.
_BITS = 4
_ANGLES = np.linspace(0.0, 2.0 * math.pi, 64, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])


def draw_overlay(estimate: PoseEstimate, lat: float, lon: float, size_px: int = 640) -> NDArray[np.uint8]:
    """Return an RGB picture, uint8 (size_px, size_px, 3), of the tile as the model saw it.

    The heat map is drawn relative to its peak; its square root, so that lesser modes show. A cross marks the
    coarse fix at ``lat``, ``lon`` (degrees), a thin circle the search disc, a dot the estimate, with its
    two-sigma ellipse and an arrow along its heading.
    """
    tile = estimate.tile
    scale = size_px / tile.size_px
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = np.array(cv2.resize(tile.image, (size_px, size_px), interpolation=how), np.uint8)
    picture = _blend_heat(picture, estimate.heat_map, scale)
    if (search := estimate.heat_map.search) is not None:
        centre = np.array(tile.projection.forward(search.lat, search.lon))
        circle = centre[:, None] + _CIRCLE * search.radius_m
        _polyline(picture, tile, circle, scale, SEARCH_COLOUR, 1)
    thickness = max(1, round(size_px / 320))
    _cross(picture, _point(tile, *tile.projection.forward(lat, lon), scale), size_px / 45, thickness)
    east, north = tile.projection.forward(estimate.lat, estimate.lon)
    values, vectors = np.linalg.eigh(estimate.covariance)
    axes = vectors * (ELLIPSE_SIGMAS * np.sqrt(np.maximum(values, 0.0)))
    ellipse = np.array([[east], [north]]) + axes @ _CIRCLE
    _polyline(picture, tile, ellipse, scale, ESTIMATE_COLOUR, thickness)
    here = _point(tile, east, north, scale)
    if estimate.heading is not None:
        length = size_px / 12 * tile.gsd / scale
        cos, sin = math.cos(estimate.heading), math.sin(estimate.heading)
        tip = _point(tile, east + length * cos, north + length * sin, scale)
        cv2.arrowedLine(picture, here, tip, ESTIMATE_COLOUR, thickness, cv2.LINE_AA, _BITS, 0.3)
    radius = max(2.5, size_px / 130)
    for colour, reach in (((0, 0, 0), radius + 1.0), (ESTIMATE_COLOUR, radius)):
        cv2.circle(picture, here, round(reach * 2**_BITS), colour, -1, cv2.LINE_AA, _BITS)
    return picture


def _blend_heat(picture: NDArray[np.uint8], heat_map: HeatMap, scale: float) -> NDArray[np.uint8]:
    size = picture.shape[0]
    strength = np.sqrt(heat_map.probability / max(float(heat_map.probability.max()), 1e-30))
    # Heat-map pixel -> picture pixel, both counted by their centres.
    zoom = heat_map.grid.scale * scale
    origin_row, origin_col = ((value + 0.5) * scale - 0.5 for value in heat_map.grid.origin)
    placement = np.array([[zoom, 0.0, origin_col], [0.0, zoom, origin_row]])
    strength = cv2.warpAffine(strength.astype(np.float32), placement, (size, size), flags=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap(np.rint(strength * 255.0).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    opacity = HEAT_OPACITY * strength
    return np.asarray(
        cv2.blendLinear(picture, np.ascontiguousarray(colours), 1.0 - opacity, opacity), np.uint8
    )


def _point(tile: AerialTile, east: float, north: float, scale: float) -> tuple[int, int]:
    """Convert metres from the tile's centre to fixed-point (x, y) on the picture."""
    row, col = tile.enu_to_pixel(east, north)
    limit = 2.0**20  # so that distant positions do not overflow
    x, y = (min(max((float(value) + 0.5) * scale - 0.5, -limit), limit) for value in (col, row))
    return round(x * 2**_BITS), round(y * 2**_BITS)


def _polyline(
    picture: NDArray[np.uint8],
    tile: AerialTile,
    places: NDArray[np.float64],
    scale: float,
    colour: tuple[int, int, int],
    thickness: int,
) -> None:
    """Draw a closed line through ``places`` (2, N), metres east and north from the tile's centre."""
    points = np.array([_point(tile, east, north, scale) for east, north in places.T], np.int32)
    cv2.polylines(picture, [points], True, colour, thickness, cv2.LINE_AA, _BITS)


def _cross(picture: NDArray[np.uint8], centre: tuple[int, int], arm: float, thickness: int) -> None:
    reach = round(arm * 2**_BITS)
    x, y = centre
    for colour, width in (((0, 0, 0), thickness + 2), (FIX_COLOUR, thickness)):
        for sign in (-1, 1):
            ends = (x - reach, y - sign * reach), (x + reach, y + sign * reach)
            cv2.line(picture, *ends, colour, width, cv2.LINE_AA, _BITS)
