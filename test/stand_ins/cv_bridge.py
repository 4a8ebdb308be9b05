"""Stands in for cv_bridge, which pip cannot install: two encodings unknown to ours, and its faults."""

from __future__ import annotations

from typing import Any

import numpy as np


class CvBridge:
    def imgmsg_to_cv2(self, message: Any, encoding: str = "passthrough") -> np.ndarray:
        if message.encoding not in ("inverted", "bad"):
            raise RuntimeError(f"[{message.encoding}] is not a color format")
        # As cv_bridge does: rows are taken to have no padding.
        shape = (message.height, message.width)
        raw = np.ndarray(shape, np.uint8, buffer=bytes(message.data))
        if encoding == "passthrough":
            return raw
        return 255 - (raw if message.encoding == "bad" else np.repeat(raw[..., None], 3, 2))
