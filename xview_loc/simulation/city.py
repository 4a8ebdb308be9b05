"""A procedural city: one 2.5-D world, seen from above at one time and from the street at another.

The world is a square in the city's own plane (:class:`~xview_loc.geodesy.LocalProjection` about its centre:
x east, y north, metres). Rasters are north-up with ``gsd`` metres per pixel. Trees, cars and lamp posts are
lists, because a height field cannot hold a crown above a trunk.

The two views differ on purpose: in parked cars, some of the trees, the wear of road paint, the light and the
season. Only the street view shows moving traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from xview_loc.files import write_whole
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.simulation.layout import Layout
from xview_loc.simulation.objects import Array, Boxes, Cars, Floats, Image, Trees, park_cars
from xview_loc.simulation.streets import StreetNetwork
from xview_loc.simulation.styles import Style, style_for
from xview_loc.simulation.surfaces import (
    lay_paint,
    noise,
    paint_ground,
    paint_roofs,
    render_aerial,
    shade,
    sunlight_on,
    unworn,
    with_crowns,
)


@dataclass(frozen=True)
class City:
    """A built city; make one with :func:`build_city`.

    Rasters have ``gsd`` metres per pixel. ``aerial`` (H, W, 3) is the image of the aerial sensor, ``height``
    the metres over the street (the ground is flat), and ``objects`` the row of ``boxes`` + 1 that each pixel
    shows, 0 for none. The street view has the colour of ``ground`` and roofs without light (H, W, 3), the
    same with road paint at a quarter of the resolution (``ground_far``), road paint (``marking``, 0..255) at
    twice the resolution, sunlight on the ground (``light``, 0..255), and its parked ``cars``. ``poles`` are
    the places of lamp posts (n, 2), ENU metres.
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
    boxes: Boxes
    trees: Trees
    cars: Cars
    poles: Array
    streets: StreetNetwork

    @property
    def size_m(self) -> float:
        """Side of the square world in metres."""
        return self.height.shape[0] * self.gsd

    def to_latlon(self, east: Any, north: Any) -> tuple[Any, Any]:
        """Convert ENU metres in the city's plane to WGS-84 degrees."""
        return self.projection.inverse(east, north)

    def to_enu(self, lat: Any, lon: Any) -> tuple[Any, Any]:
        """Convert WGS-84 degrees to (east, north) metres in the city's plane."""
        return self.projection.forward(lat, lon)

    def to_pixel(self, east: Any, north: Any) -> tuple[Any, Any]:
        """Convert metres in the city's plane to (row, col); pixel centres are whole numbers."""
        half = self.size_m / 2
        return (half - north) / self.gsd - 0.5, (east + half) / self.gsd - 0.5

    def patch(self, east: float, north: float, size_px: int) -> Image:
        """Return the north-up aerial image (size_px, size_px, 3) centred on a place."""
        row, col = self.to_pixel(east, north)
        return cv2.getRectSubPix(self.aerial, (size_px, size_px), (float(col), float(row)))

    def tile(self, east: float, north: float, size_px: int) -> AerialTile:
        """Return :meth:`patch` as a map's tile, for training without a map on disk.

        The planes of tile and city differ by the meridian convergence, 0.1 mrad at 500 m from the centre.
        """
        lat, lon = self.to_latlon(east, north)
        reach = self.size_m / 2 - self.gsd * size_px / 2
        valid = 1.0 if max(abs(east), abs(north)) <= reach else 0.0
        return AerialTile(self.patch(east, north, size_px), float(lat), float(lon), self.gsd, valid)

    def write_geotiff(self, path: str | Path) -> Path:
        """Write the aerial image as a Cloud Optimised GeoTIFF in the local UTM zone; return the path.

        The warp from the city's plane to UTM is exact on a 33 x 33 grid, interpolated between (0.01 mm).
        """
        path = Path(path)
        zone = int((self.projection.lon + 180.0) // 6.0) % 60 + 1
        crs = CRS.from_epsg((32600 if self.projection.lat >= 0 else 32700) + zone)
        to_utm = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
        edge = np.linspace(-self.size_m / 2, self.size_m / 2, 33)
        lat, lon = self.to_latlon(*np.meshgrid(edge, edge))
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
            image[band] = cv2.remap(self.aerial, map_x, map_y, cv2.INTER_CUBIC)
        profile = {"driver": "COG", "dtype": "uint8", "count": 3, "width": width, "height": height}
        transform = Affine(self.gsd, 0.0, left, 0.0, -self.gsd, top)
        with MemoryFile() as memory:
            with memory.open(
                **profile, crs=crs.to_wkt(), transform=transform, nodata=0, compress="JPEG", quality=92
            ) as file:
                # 0 marks the empty corners of the turned square; black pixels inside become 1.
                inside = image.any(axis=2, keepdims=True)
                file.write(np.where(inside, np.maximum(image, 1), 0).transpose(2, 0, 1))
            write_whole(path, memory.read())
        return path


def _linear_weights(nodes: Array, count: int) -> Array:
    """Return the (count, len(nodes)) matrix that interpolates linearly from ``nodes`` to 0..count-1."""
    return np.stack([np.interp(np.arange(count), nodes, unit) for unit in np.eye(len(nodes))], axis=1)


def build_city(
    seed: int,
    style: Style | str = "source",
    lat: float = 48.137,
    lon: float = 11.575,
    size_m: float = 1020.0,
    gsd: float = 0.30,
) -> City:
    """Build a city; the same arguments give the same city.

    ``style`` is a style, or the name of one that the seed varies (:func:`style_for`). ``(lat, lon)`` is the
    centre, ``size_m`` the side, and ``gsd`` the metres per pixel. Raises ValueError for a size or ``gsd`` out
    of range.
    """
    if isinstance(style, str):
        style = style_for(style, seed)
    if not (size_m >= 150.0 and 0.05 <= gsd <= 1.0):
        raise ValueError(
            f"a city needs a side of at least 150 m and a gsd of 0.05 to 1 m, got {size_m} m, {gsd} m"
        )
    size = round(size_m / gsd)
    layout = Layout(seed, style, size, gsd)
    rng = np.random.default_rng([seed, 3])
    trees = layout.planted(rng)
    slots = np.array(layout.slots or np.zeros((0, 5)))
    poles = layout.off_the_road(np.array(layout.poles or np.zeros((0, 2))))
    base = paint_ground(layout, rng)
    roof_light = paint_roofs(layout, base)
    aerial_wear, ground_wear = (unworn(rng, size, style.wear) for _ in range(2))
    painted = cv2.resize(layout.marking, (size, size), interpolation=cv2.INTER_AREA)
    aerial = lay_paint(base, painted, aerial_wear, style)
    aerial = render_aerial(layout, aerial, roof_light, trees, park_cars(slots, rng), poles, rng)

    ground = shade(base, 1.0 + 0.05 * noise(rng, size, 60))
    far = lay_paint(ground, painted, ground_wear, style)
    light = sunlight_on(with_crowns(layout, trees, trees.in_ground), gsd, style.ground_sun)
    kept = cv2.resize((ground_wear * 255).astype(np.uint8), layout.marking.shape)
    return City(
        seed=seed,
        style=style,
        projection=LocalProjection(lat, lon),
        gsd=gsd,
        aerial=aerial,
        ground=ground,
        ground_far=cv2.resize(far, (size // 4, size // 4), interpolation=cv2.INTER_AREA),
        marking=cv2.multiply(layout.marking, kept, scale=1 / 255),
        light=(255 * (1.0 - style.ground_shadow * (1.0 - light))).astype(np.uint8),
        height=layout.height,
        objects=layout.objects,
        boxes=layout.built(),
        trees=trees,
        cars=park_cars(slots, rng),
        poles=poles,
        streets=layout.streets,
    )
