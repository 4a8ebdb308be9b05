"""Fixed noise textures, shared by all renderings: a texture stays where it is from frame to frame."""

from __future__ import annotations

import cv2
import numpy as np

from xview_loc.simulation.objects import Floats

SIDE = 256  # of the square textures; a power of two


def _make() -> tuple[Floats, Floats, Floats]:
    """Return fine noise and leaves (SIDE * SIDE,), and clouds (256, 512) that close on themselves."""
    rng = np.random.default_rng(7)
    fine = rng.standard_normal((SIDE, SIDE)).astype(np.float32).ravel()
    smooth = [
        cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)).astype(np.float32), (0, 0), sigma)
        for sigma in (2.0, 5.0)
    ]
    leaves = sum(s / s.std() for s in smooth).astype(np.float32).ravel()
    cloud = sum(
        cv2.resize(
            rng.standard_normal((n, 2 * n)).astype(np.float32), (576, 256), interpolation=cv2.INTER_CUBIC
        )
        for n in (3, 6, 12, 24)
    )
    # The first columns fade into those that follow the last, so that the sky closes on itself.
    fade = np.linspace(0.0, 1.0, 64, dtype=np.float32)
    cloud = np.asarray(cloud, np.float32) / 2.0
    cloud[:, :64] = fade * cloud[:, :64] + (1 - fade) * cloud[:, 512:]
    return fine, leaves, np.ascontiguousarray(cloud[:, :512])


FINE, LEAVES, CLOUDS = _make()
