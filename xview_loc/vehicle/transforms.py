"""Transforms between a vehicle's frames over time, as tf publishes them. Free of ROS."""

from __future__ import annotations

import bisect
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.rig import rotation_matrix
from xview_loc.vehicle.synchronisation import NS, RESTART_NS

Array = NDArray[np.float64]
# What a buffer holds: frames, poses of each (1 kHz for 10 s), and characters of a frame's name.
MOST_FRAMES, MOST_POSES, LONGEST_NAME = 1000, 10_000, 256


class TransformError(LookupError):
    """A transform is unusable or unknown; the message is one clear line."""


@dataclass(frozen=True, eq=False)
class Transform:
    """Pose of a frame in another. translation: (3,), metres. rotation: unit quaternion (4,), x, y, z, w."""

    translation: Array
    rotation: Array

    @classmethod
    def of(cls, message: Any) -> Transform:
        """Convert a ``geometry_msgs/Transform``. Raises TransformError unless it is finite and a rotation."""
        t, q = message.translation, message.rotation
        translation, rotation = np.array([t.x, t.y, t.z]), np.array([q.x, q.y, q.z, q.w])
        norm = float(np.linalg.norm(rotation))
        if not (np.isfinite(translation).all() and abs(norm - 1.0) < 0.1):  # NaN as well
            raise TransformError(f"translation {translation} or quaternion {rotation} is unusable")
        return cls(translation, rotation / norm)

    @classmethod
    def planar(cls, x: float, y: float, yaw: float) -> Transform:
        """Return a pose in the plane: metres, radians."""
        return cls(np.array([x, y, 0.0]), np.array([0.0, 0.0, math.sin(yaw / 2.0), math.cos(yaw / 2.0)]))

    @property
    def matrix(self) -> Array:
        """Rotation matrix (3, 3); its columns are the frame's axes."""
        return rotation_matrix(self.rotation)

    @property
    def yaw(self) -> float:
        """Direction of the frame's x axis in the plane, radians."""
        return self.direction(0)

    def direction(self, axis: int) -> float:
        """Return the direction of an axis of the frame in the plane, radians; axis: 0 x, 1 y, 2 z."""
        east, north = self.matrix[:2, axis]
        return math.atan2(north, east)

    def inverse(self) -> Transform:
        """Return the pose of the other frame in this one."""
        return Transform(-(self.matrix.T @ self.translation), self.rotation * [-1.0, -1.0, -1.0, 1.0])

    def __matmul__(self, other: Transform) -> Transform:
        """Chain: the pose of ``other``'s frame, which is given in this one."""
        a, b = self.rotation, other.rotation
        vector = a[3] * b[:3] + b[3] * a[:3] + np.cross(a[:3], b[:3])
        rotation = np.append(vector, a[3] * b[3] - a[:3] @ b[:3])
        translation = self.translation + self.matrix @ other.translation
        return Transform(translation, rotation / np.linalg.norm(rotation))

    def blend(self, other: Transform, share: float) -> Transform:
        """Interpolate from this pose (share 0) to ``other`` (1), the rotation at a constant rate."""
        a, b = self.rotation, other.rotation
        cosine = float(a @ b)
        if cosine < 0.0:  # the shorter way
            b, cosine = -b, -cosine
        angle = math.acos(min(1.0, cosine))
        rotation = (1.0 - share) * a + share * b
        if angle > 1e-6:
            rotation = math.sin((1.0 - share) * angle) * a + math.sin(share * angle) * b
        translation = (1.0 - share) * self.translation + share * other.translation
        return Transform(translation, rotation / np.linalg.norm(rotation))


@dataclass
class _Edge:
    """Poses of a frame in its parent, in the order of their stamps; a static one holds at any time."""

    parent: str
    static: bool
    stamps: list[int] = field(default_factory=list)
    poses: list[Transform] = field(default_factory=list)

    def add(self, stamp_ns: int, pose: Transform, keep_ns: int) -> None:
        if self.static or (self.stamps and stamp_ns < self.stamps[-1] - RESTART_NS):
            # Time started again.
            self.stamps, self.poses = [], []
        at = bisect.bisect_left(self.stamps, stamp_ns)
        if at < len(self.stamps) and self.stamps[at] == stamp_ns:
            self.poses[at] = pose
            return
        self.stamps.insert(at, stamp_ns)
        self.poses.insert(at, pose)
        old = bisect.bisect_left(self.stamps, self.stamps[-1] - keep_ns)
        old = max(old, len(self.stamps) - MOST_POSES)
        del self.stamps[:old], self.poses[:old]

    def at(self, child: str, stamp_ns: int) -> Transform:
        if self.static:
            return self.poses[0]
        after = bisect.bisect_left(self.stamps, stamp_ns)
        if after < len(self.stamps) and self.stamps[after] == stamp_ns:
            return self.poses[after]
        if after in (0, len(self.stamps)):
            gap = abs(stamp_ns - self.stamps[max(0, after - 1)]) / NS
            which = "begins {:.3f} s after" if after == 0 else "ends {:.3f} s before"
            raise TransformError(f"{self.parent} -> {child} {which.format(gap)} the wanted stamp")
        before = self.stamps[after - 1]
        share = (stamp_ns - before) / (self.stamps[after] - before)
        return self.poses[after - 1].blend(self.poses[after], share)


class TransformBuffer:
    """The transforms of the last seconds, and the static ones. Thread-safe."""

    def __init__(self, keep_s: float = 10.0) -> None:
        """``keep_s``: how long transforms are kept, by their stamps."""
        self._keep_ns = round(keep_s * NS)
        # By the child's name.
        self._edges: dict[str, _Edge] = {}
        self._lock = threading.Lock()

    def add(self, stamp_ns: int, parent: str, child: str, pose: Transform, static: bool = False) -> str:
        """Keep a pose of ``child`` in ``parent``.

        A frame has one parent: another one replaces it, with its history. Returns the name of the parent
        replaced, else "". A stamp more than half a second before the last one restarts the history. Raises
        TransformError if a name is empty or too long, both are the same, or there are too many frames.
        """
        parent, child = parent.lstrip("/"), child.lstrip("/")
        if not parent or not child or parent == child:
            raise TransformError(f"a transform from {parent!r} to {child!r} makes no sense")
        if max(len(parent), len(child)) > LONGEST_NAME:
            raise TransformError(f"a frame's name has more than {LONGEST_NAME} characters")
        with self._lock:
            edge = self._edges.get(child)
            if edge is None and len(self._edges) >= MOST_FRAMES:
                raise TransformError(f"tf has more than {MOST_FRAMES} frames")
            replaced = "" if edge is None or edge.parent == parent else edge.parent
            if edge is None or replaced or edge.static != static:
                edge = self._edges[child] = _Edge(parent, static)
            edge.add(stamp_ns, pose, self._keep_ns)
        return replaced

    def lookup(self, target: str, source: str, stamp_ns: int | None = None) -> Transform:
        """Return the pose of frame ``source`` in ``target`` at a stamp; None: the last one known to all.

        Poses are interpolated, never extrapolated. Raises TransformError.
        """
        with self._lock:
            down, up = self._ways(target, source)
            if stamp_ns is None:
                stamp_ns = self._last_stamp(up + down)
            return self._chain(down, stamp_ns).inverse() @ self._chain(up, stamp_ns)

    def latest(self, target: str, source: str) -> tuple[int, Transform]:
        """Return the last stamp known to all frames between two, 0 if all are static, and the pose then.

        As :meth:`lookup` without a stamp. Raises TransformError.
        """
        with self._lock:
            down, up = self._ways(target, source)
            stamp_ns = self._last_stamp(up + down)
            return stamp_ns, self._chain(down, stamp_ns).inverse() @ self._chain(up, stamp_ns)

    def _ways(self, target: str, source: str) -> tuple[list[str], list[str]]:
        """Return the frames from ``target``, and from ``source``, up to their common ancestor."""
        target, source = target.lstrip("/"), source.lstrip("/")
        from_target, from_source = self._ancestors(target), self._ancestors(source)
        common = next((frame for frame in from_source if frame in from_target), None)
        if common is None:
            raise TransformError(f"frames {target} and {source} are not connected")
        return from_target[: from_target.index(common)], from_source[: from_source.index(common)]

    def _last_stamp(self, frames: list[str]) -> int:
        return min((edge.stamps[-1] for f in frames if not (edge := self._edges[f]).static), default=0)

    def _ancestors(self, frame: str) -> list[str]:
        """Return the frame, its parent, and so on up to the root."""
        if frame not in self._edges and all(edge.parent != frame for edge in self._edges.values()):
            raise TransformError(f"frame {frame!r} is unknown")
        frames = [frame]
        while (edge := self._edges.get(frames[-1])) is not None:
            if edge.parent in frames:
                raise TransformError(f"frames form a loop: {' -> '.join([*frames, edge.parent])}")
            frames.append(edge.parent)
        return frames

    def _chain(self, frames: list[str], stamp_ns: int) -> Transform:
        """Return the pose of the first frame in the parent of the last."""
        pose = Transform.planar(0.0, 0.0, 0.0)
        for frame in frames:
            pose = self._edges[frame].at(frame, stamp_ns) @ pose
        return pose
