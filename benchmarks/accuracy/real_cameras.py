"""Draw what a model sees of real images: panoramas without the cyclist who takes them, and photographs.

benchmarks/accuracy/real_cameras.py DATA [--out docs/images/real_cameras.jpg]

DATA holds panoramas/gopro_max_*.jpg and ground/lund_*.jpg. Prints the share of each panorama that is seen.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import cv2
import numpy as np

from xview_loc.camera import CameraModel, PanoramaCamera
from xview_loc.images import Image, decode_compressed, encode_jpeg
from xview_loc.rig import Mask, MountedCamera, Rig

LENS = PanoramaCamera(768, 192, math.radians(30.0), math.radians(-60.0))
# The cyclist's outline in a panorama of 1024 x 512 pixels.
CYCLIST = [
    (0, 432), (60, 440), (150, 420), (235, 425), (290, 392), (380, 380), (480, 395), (530, 440), (570, 462),
    (640, 448), (720, 432), (790, 424), (850, 448), (1023, 432), (1023, 511), (0, 511),
]  # fmt: skip
HEIGHT_M = 1.8
# Of the photographs, as their tags say: for an image 36 mm wide.
FOCAL_LENGTH_MM = 35.0


def cyclist(height: int, width: int) -> Mask:
    """Return the mask of the cyclist."""
    small = np.zeros((512, 1024), np.uint8)
    cv2.fillPoly(small, [np.array(CYCLIST)], 255)
    return np.asarray(cv2.resize(small, (width, height)) > 127)


def panorama_rig(image: Image) -> Rig:
    """Return the camera that took a whole panorama."""
    height, width, _ = image.shape
    camera = MountedCamera(PanoramaCamera(width, height), (0.0, 0.0, HEIGHT_M))
    return Rig({"all": camera}, own={"all": cyclist(height, width)})


def photograph_rig(image: Image) -> Rig:
    """Return the camera that took a photograph."""
    height, width, _ = image.shape
    focal = max(height, width) * FOCAL_LENGTH_MM / 36.0
    k = (focal, 0, (width - 1) / 2, 0, focal, (height - 1) / 2, 0, 0, 1)
    return Rig({"all": MountedCamera(CameraModel(width, height, k), (0.0, 0.0, HEIGHT_M))})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    files = [
        *sorted(arguments.data.glob("panoramas/gopro*.jpg")),
        *sorted(arguments.data.glob("ground/l*.jpg")),
    ]
    for file in files:
        image = decode_compressed(file.read_bytes())
        rig = panorama_rig(image) if image.shape[1] == 2 * image.shape[0] else photograph_rig(image)
        panorama, seen = rig.view({"all": image}, LENS)
        print(f"{file.name}: {image.shape[1]} x {image.shape[0]}, {seen.mean():.0%} of the panorama seen")
        rows.append(panorama)
    if arguments.out:
        arguments.out.write_bytes(encode_jpeg(np.vstack([rows[0], rows[1], rows[2]]), 80))


if __name__ == "__main__":
    main()
