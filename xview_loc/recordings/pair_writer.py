"""Writes bags of pairs: in every file the session, the rig, and the tiles of its pairs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xview_loc import __version__
from xview_loc.bags.ros_types import header, message, serialize
from xview_loc.bags.writer import BagLimits, BagWriter
from xview_loc.camera import CameraError
from xview_loc.maps.base import AerialTile
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import (
    CAMERA,
    CONVENTIONS,
    FORMAT,
    IMAGE,
    ODOMETRY,
    OWN_MASK,
    SESSION,
    TILE,
    TOPICS,
    image_message,
    pair_messages,
    tile_messages,
)
from xview_loc.recordings.rig_messages import (
    check_rig,
    image_topic,
    mask_message,
    rig_messages,
    rig_topics,
)
from xview_loc.rig import Mask, Rig
from xview_loc.vehicle.mounted_cameras import check_names

# Topics of a single camera.
_SINGLE = (IMAGE, CAMERA, OWN_MASK)


class PairWriter:
    """Writes a new bag of pairs; any thread may call it. Errors are :class:`BagWriter`'s."""

    def __init__(
        self,
        folder: Path,
        session: Mapping[str, Any],
        limits: BagLimits | None = None,
        rig: Rig | None = None,
        own_mask: Mask | None = None,
        cameras: Iterable[str] = (),
    ) -> None:
        """``session``: facts about the recording (vehicle, map, licence ...), JSON values.

        ``rig``: what takes the images of pairs with several; ``cameras``: the names of all its cameras, if
        not all of them are known yet, see :meth:`set_rig`. ``own_mask``: where a single camera sees the
        vehicle itself. Raises CameraError if the cameras cannot be recorded.
        """
        if rig is not None:
            check_rig(rig.cameras)
        self._cameras = list(cameras) or list(rig.cameras if rig else ())
        check_names(self._cameras)
        self._types = dict(TOPICS)
        if self._cameras:
            images = {image_topic(name): TOPICS[IMAGE] for name in self._cameras}
            several = {topic: kind for topic, kind in TOPICS.items() if topic not in _SINGLE}
            self._types = several | images | rig_topics(self._cameras)
        self._rig, self._own_mask = rig, own_mask
        # What a pair's last message is written to: a pair that has it is complete.
        self._last_topic = TILE if self._cameras else IMAGE
        self.bag = BagWriter(folder, self._types, limits)
        # Written at the beginning of each file; may be completed before the first.
        self.session = {
            "format": FORMAT,
            "software": f"xview_loc {__version__}",
            "conventions": CONVENTIONS,
            **session,
        }
        self._lock = threading.Lock()
        self._file = ""
        self._tiles: dict[str, int] = {}
        self._last_stamp = 0
        self._pairs = 0

    @property
    def pairs(self) -> int:
        """Number of pairs written; without those of a file that was deleted under the writer."""
        return self.bag.count(self._last_topic) if self.bag.lost else self._pairs

    def set_rig(self, rig: Rig) -> None:
        """Say what takes the images, before the first pair; it may lack cameras that are not known yet.

        Setting it again begins a new file. Raises CameraError if it cannot be recorded.
        """
        check_rig(rig.cameras)
        if strangers := [name for name in rig.cameras if name not in self._cameras]:
            raise CameraError(f"camera {strangers[0]} is not one that the bag was begun with")
        with self._lock:
            if self._file:
                self.bag.split()
            self._rig = rig

    def add(self, pair: Pair, tile: AerialTile | None, raw_image: bytes | None = None) -> None:
        """Write a pair and, the first time in each file, its tile.

        ``raw_image``: CDR bytes of the image's CompressedImage, written unchanged; default: made from the
        pair's image.
        """
        stamp = pair.stamp_ns
        with self._lock:
            if stamp <= self._last_stamp:
                # Time started again, and a pair's stamp must be unique within a file.
                self.bag.split()
            self._begin(stamp)
            tile_stamp, tile_id = 0, ""
            if tile is not None:
                tile_id = tile.key
                tile_stamp = self._tiles.get(tile_id, 0) or self._add_tile(tile, stamp)
            for topic, value in pair_messages(pair):
                self._write(topic, stamp, value)
            for camera_image in pair.images:
                self.bag.write(image_topic(camera_image.name), stamp, camera_image.data, may_split=False)
            # The tile was written with the stamp of the first pair in the file that uses it.
            self._write(TILE, stamp, header(tile_stamp, tile_id))
            if not self._cameras:
                if not raw_image:
                    image = image_message(header(stamp, ""), pair.image_format, pair.image_bytes)
                    raw_image = serialize(TOPICS[IMAGE], image)
                self.bag.write(IMAGE, stamp, raw_image, may_split=False)
            self._last_stamp = stamp
            self._pairs += 1

    def add_odometry(self, stamp: int, data: bytes) -> None:
        """Write the CDR bytes of a ``nav_msgs/Odometry`` unchanged."""
        with self._lock:
            self._begin(stamp)
            self.bag.write(ODOMETRY, stamp, data, may_split=False)

    def split(self) -> None:
        """Begin a new file."""
        with self._lock:
            self.bag.split()

    def close(self) -> None:
        """Complete the bag."""
        with self._lock:
            self.bag.close()

    def _begin(self, stamp: int) -> None:
        """Split if it is due, which here tears no pair apart.

        Each file of the bag can be read alone: it has the session, the rig and the tiles of its pairs.
        """
        self.bag.split_if_due()
        if self.bag.current_file != self._file:
            self._file = self.bag.current_file
            self._tiles = {}
            facts = self.session if self._rig is None else {**self.session, "base_height": self._rig.height}
            self._write(SESSION, stamp, message(TOPICS[SESSION], data=json.dumps(facts)))
            for topic, value in rig_messages(self._rig, stamp) if self._rig else ():
                self._write(topic, stamp, value)
            if self._own_mask is not None:
                self._write(OWN_MASK, stamp, mask_message(self._own_mask, stamp))

    def _add_tile(self, tile: AerialTile, stamp: int) -> int:
        for topic, value in tile_messages(tile, stamp):
            self._write(topic, stamp, value)
        self._tiles[tile.key] = stamp
        return stamp

    def _write(self, topic: str, stamp: int, value: Any) -> None:
        self.bag.write(topic, stamp, serialize(self._types[topic], value), may_split=False)
