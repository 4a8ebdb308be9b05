"""Tiny copies of VIGOR and KITTI in their original layout."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)

# Lines of the real corrected labels of Chicago, whose names hold the true places.
CHICAGO = (
    "L-1poX8YZAmBZVLMqBu-4w,41.877949,-87.689396,.jpg "
    "satellite_41.877971796211014_-87.68943505304125.png 23.0 -29.0 "
    "satellite_41.877971796211014_-87.68899446364951.png 20.0 300.0 "
    "satellite_41.877643723758375_-87.68943505304125.png -304.0 -32.0 "
    "satellite_41.877643723758375_-87.68899446364951.png -307.0 297.0",
    "fdbS6SU2YFJSxwxwbNI0CQ,41.882558,-87.686052,.jpg "
    "satellite_41.88256481054794_-87.68591033790726.png 6.0 106.0 "
    "satellite_41.88256481054794_-87.68635092729902.png 9.0 -223.0 "
    "satellite_41.8822367380953_-87.68591033790726.png -321.0 103.0 "
    "satellite_41.8822367380953_-87.68635092729902.png -319.0 -225.0",
    "SQ3Gdt7v6_MNusm1fprEAw,41.854104,-87.631759,.jpg "
    "satellite_41.854022507168466_-87.63171784272214.png -82.0 30.0 "
    "satellite_41.8543505796211_-87.63171784272214.png 246.0 33.0 "
    "satellite_41.854022507168466_-87.63215843211388.png -79.0 -299.0 "
    "satellite_41.8543505796211_-87.63215843211388.png 248.0 -296.0",
)


def write_image(path: Path, image: Image) -> Path:
    """Write RGB to a file in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
    return path


CORRECTED = "splits__corrected/{city}/{stem}__corrected.txt"


def write_labels(root: Path, city: str, stem: str, lines: list[str], layout: str = CORRECTED) -> Path:
    """Write one of VIGOR's label files."""
    path = root / layout.format(city=city, stem=stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def vigor_line(number: int, south: float = 0.0, west: float = 0.0) -> str:
    """Return a label line of panorama P<number> on tile T<number>."""
    others = " ".join(f"other{i}.png 0.0 330.0" for i in range(3))
    return f"P{number}.jpg T{number}.png {south} {west} {others}"


def write_vigor_images(root: Path, city: str, line: str, panorama: Image, tile: Image) -> None:
    """Write the images named in a label line."""
    name, positive = line.split()[:2]
    write_image(root / city / "panorama" / name, panorama)
    write_image(root / city / "satellite" / positive, tile)


def make_vigor_target(root: Path, count: int, seed: int = 0) -> None:
    """Write San Francisco and Chicago with ``count`` panoramas of noise each."""
    rng = np.random.default_rng(seed)
    for city in ("SanFrancisco", "Chicago"):
        lines = [vigor_line(i, float(10 * i - 40), float(20 - 7 * i)) for i in range(count)]
        write_labels(root, city, "pano_label_balanced", lines)
        for line in lines:
            panorama, tile = noise(rng, 64, 128), noise(rng, 80, 80)
            write_vigor_images(root, city, line, panorama, tile)


def noise(rng: np.random.Generator, height: int, width: int) -> Image:
    return rng.integers(0, 255, (height, width, 3)).astype(np.uint8)


DAY = "2011_09_26"
DRIVE = f"{DAY}/{DAY}_drive_0005_sync"
# The projection of KITTI's left colour camera on that day, for 1242 x 375 pixels.
PROJECTION = (
    "7.215377e+02 0.000000e+00 6.095593e+02 4.485728e+01 0.000000e+00 7.215377e+02 1.728540e+02 "
    "2.163791e-01 0.000000e+00 0.000000e+00 1.000000e+00 2.745884e-03"
)
# The first lines of the real test2_files.txt.
KITTI_LINES = (
    "2011_09_26/2011_09_26_drive_0005_sync/0000000048.png -0.3455326 -0.9653194 -0.0077375486",
    "2011_09_26/2011_09_26_drive_0005_sync/0000000049.png 0.37390798 0.36219868 -0.75242347",
    "2011_09_26/2011_09_26_drive_0005_sync/0000000050.png 0.933891 0.42439047 0.95673674",
)
KITTI_GSD = 156543.03392 * math.cos(math.radians(49.015)) / 2**19


def kitti_name(number: int) -> str:
    return f"{DRIVE}/{number:010d}.png"


def make_kitti_frame(root: Path, number: int, yaw: float, satellite: Image) -> None:
    """Write a frame of KITTI with the antenna in the middle of the satellite map."""
    write_image(root / "satmap" / kitti_name(number), satellite)
    raw = root / "raw_data"
    drive = raw / DRIVE
    write_image(drive / "image_02" / "data" / f"{number:010d}.png", np.full((375, 1242, 3), 90, np.uint8))
    oxts = drive / "oxts" / "data" / f"{number:010d}.txt"
    oxts.parent.mkdir(parents=True, exist_ok=True)
    fields = [49.015, 8.43, 112.8, 0.02, 0.01, yaw, *[0.0] * 24]
    oxts.write_text(" ".join(str(field) for field in fields) + "\n")
    calibration = raw / DAY / "calib_cam_to_cam.txt"
    calibration.write_text(f"S_rect_02: 1.242000e+03 3.750000e+02\nP_rect_02: {PROJECTION}\n")


def kitti_scene(yaw: float) -> Image:
    """Draw a satellite map with discs: red at the camera, green 15 m ahead of it, blue 8 m to its left."""
    image = np.full((1280, 1280, 3), 60, np.uint8)
    ahead, left = np.array([math.cos(yaw), math.sin(yaw)]), np.array([-math.sin(yaw), math.cos(yaw)])
    camera = 1.08 * ahead - 0.26 * left
    for colour, place in ((RED, camera), (GREEN, camera + 15 * ahead), (BLUE, camera + 8 * left)):
        east, north = place
        centre = (639.5 + east / KITTI_GSD, 639.5 - north / KITTI_GSD)
        paint(image, centre[1], centre[0], colour)
    return image


def paint(image: Image, row: float, col: float, colour: tuple[int, int, int], radius: float = 4.0) -> None:
    """Draw a disc about a position between pixels."""
    top, left = max(0, int(row - radius)), max(0, int(col - radius))
    part = image[top : int(row + radius) + 2, left : int(col + radius) + 2]
    rows, cols = np.mgrid[: part.shape[0], : part.shape[1]]
    part[np.hypot(rows + top - row, cols + left - col) <= radius] = colour
