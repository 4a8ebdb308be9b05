"""Finds a rig in an ordinary recording: the cameras' topics, their calibration, and where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection

from xview_loc.bags.recovery import BagError
from xview_loc.camera import CameraError, CameraModel
from xview_loc.errors import reason, shown
from xview_loc.recordings.rig_messages import BASE_FRAME, TF_STATIC, make_rig
from xview_loc.rig import Rig
from xview_loc.vehicle.input_types import INPUT_TYPES
from xview_loc.vehicle.messages import camera_from_info
from xview_loc.vehicle.mounted_cameras import check_height, check_names, mount, optical_pose, rig_frames
from xview_loc.vehicle.rig_file import CameraEntry
from xview_loc.vehicle.synchronisation import RejectedInput
from xview_loc.vehicle.transforms import (
    LONGEST_NAME,
    MOST_FRAMES,
    Transform,
    TransformBuffer,
    TransformError,
)

_ByTopic = dict[str, list[Connection]]
# Every camera that has images and a calibration.
ALL = "all"
_COMPRESSED = "/compressed"
# Messages of a camera_info among which one must be usable.
_INFOS = 20


@dataclass(frozen=True)
class RecordedCamera:
    """The connections of a camera's images, all of one topic and type, and of its calibration."""

    images: list[Connection]
    info: list[Connection]


def find_cameras(connections: Sequence[Connection], wanted: Sequence[str]) -> dict[str, RecordedCamera]:
    """Return the cameras ``wanted``, by name: NAME, NAME=TOPIC of its images, or ``all``.

    A camera is named after the namespace of its images, which has its calibration too, on ``camera_info``.
    Raises BagError if one is missing, or if its images are on several topics.
    """
    images, infos = _of_input(connections, "image"), _of_input(connections, "camera_info")
    found = _by_name(images, infos)
    cameras: dict[str, RecordedCamera] = {}
    for word in found if list(wanted) == [ALL] else wanted:
        name, _, topic = word.partition("=")
        topics = {topic: images[topic]} if topic in images else found.get(name, {}) if not topic else {}
        if name in cameras:
            raise BagError(f"camera {shown(name, 80)} is named twice")
        if not topics:
            lacks = f"are no images on {shown(topic, 200)}" if topic else f"is no camera {shown(name, 80)}"
            raise BagError(f"there {lacks}; {_summary(found, connections)}")
        if len(topics) > 1:
            several = shown(", ".join(topics))
            raise BagError(f"camera {name} has several topics, choose one with {name}=TOPIC: {several}")
        (chosen,) = topics.values()
        info = _info_topic(chosen[0].topic)
        if info not in infos:
            raise BagError(f"camera {shown(name, 80)} has no {shown(info, 200)}")
        cameras[name] = RecordedCamera(chosen, infos[info])
    shared = Counter(camera.images[0].topic for camera in cameras.values())
    if twice := [topic for topic, count in shared.items() if count > 1]:
        raise BagError(f"two cameras have the topic {shown(twice[0], 200)}")
    if not cameras:
        raise BagError(f"there is no camera; {_summary(found, connections)}")
    try:
        check_names(cameras)
    except CameraError as error:
        raise BagError(str(error)) from None
    return cameras


def uncalibrated(connections: Sequence[Connection]) -> list[str]:
    """Return the topics of images that have no ``camera_info`` beside them, sorted."""
    infos = _of_input(connections, "camera_info")
    return sorted(topic for topic in _of_input(connections, "image") if _info_topic(topic) not in infos)


def read_rig(
    reader: AnyReader,
    cameras: Mapping[str, RecordedCamera],
    transforms: StaticTransforms,
    entries: Mapping[str, CameraEntry],
    rectified: bool,
    base_height: float,
) -> Rig:
    """Return the rig of a recording's cameras. Raises BagError.

    entries: what a rig file says of them; what it lacks is read from ``/tf_static``. rectified: images are
    free of distortion. base_height: of ``base_link`` above the ground, metres.
    """
    if strangers := [name for name in entries if name not in cameras]:
        names = ", ".join(cameras)
        raise BagError(f"the rig file has a camera {shown(strangers[0], 80)}, but the rig has only {names}")
    rig, own = {}, {}
    try:
        for name, camera in cameras.items():
            model, frame = _calibration(reader, name, camera, rectified)
            entry = entries.get(name, CameraEntry())
            rig[name] = mount(model, entry.pose or transforms.optical_pose(name, frame))
            if entry.own is not None:
                own[name] = entry.own
        made = make_rig(rig, own, base_height)
        check_height(made)
    except CameraError as error:
        raise BagError(str(error)) from None
    return made


class StaticTransforms:
    """What a recording says on ``/tf_static``; nothing before it is read."""

    def __init__(self) -> None:
        self._buffer = TransformBuffer()
        # Why transforms cannot be used, by the frame whose pose they are.
        self._unusable: dict[str, str] = {}
        self._damage = ""

    def read(self, reader: AnyReader) -> None:
        """Read all of a recording's, up to the first damage."""
        connections = [c for c in reader.connections if c.topic == TF_STATIC]
        if not connections:
            return
        try:
            for connection, _, data in reader.messages(connections=connections):
                message: Any = reader.deserialize(data, connection.msgtype)
                for one in message.transforms:
                    self._add(one)
        except Exception as error:  # damaged bytes raise anything
            self._damage = f"; {TF_STATIC} is damaged: {reason(error)}"

    def _add(self, one: Any) -> None:
        try:
            pose = Transform.of(one.transform)
            self._buffer.add(0, one.header.frame_id, one.child_frame_id, pose, static=True)
        except TransformError as error:
            if len(self._unusable) < MOST_FRAMES and len(one.child_frame_id) <= LONGEST_NAME:
                self._unusable[one.child_frame_id.lstrip("/")] = str(error)

    def pose(self, frame: str) -> Transform:
        """Return the pose of a frame in ``base_link``. Raises TransformError."""
        frame = frame.lstrip("/")
        if frame in self._unusable:
            raise TransformError(self._unusable[frame])
        try:
            return self._buffer.lookup(BASE_FRAME, frame)
        except TransformError as error:
            raise TransformError(f"{error}{self._damage}") from None

    def optical_pose(self, name: str, frame: str) -> Transform:
        """Return the pose of a camera's optical frame; ``frame``: its calibration's. Raises BagError."""
        try:
            return optical_pose(self.pose, rig_frames(name, frame))
        except TransformError as error:
            frames = " or ".join(dict.fromkeys(rig_frames(name, frame)))
            text = f"camera {name}: {TF_STATIC} has no transform from {BASE_FRAME} to {frames}"
            raise BagError(f"{shown(text)} ({reason(error)}): say it in a rig file") from None


def _calibration(
    reader: AnyReader, name: str, camera: RecordedCamera, rectified: bool
) -> tuple[CameraModel, str]:
    """Return a camera's first usable calibration and its frame. Raises BagError without one."""
    problem = "it has no messages"
    try:
        for connection, _, data in islice(reader.messages(connections=camera.info), _INFOS):
            message: Any = reader.deserialize(data, connection.msgtype)
            try:
                return camera_from_info(message, rectified), message.header.frame_id
            except RejectedInput as error:
                problem = str(error)
    except Exception as error:  # damaged bytes raise anything
        problem = reason(error)
    raise BagError(f"camera {name} has no usable {camera.info[0].topic}: {problem}")


def _by_name(images: _ByTopic, infos: _ByTopic) -> dict[str, dict[str, list[Connection]]]:
    """Return the cameras that have a calibration beside their images: by name, and by topic of the images."""
    namespaces: dict[str, dict[str, list[Connection]]] = {}
    for topic, connections in images.items():
        base = topic.removesuffix(_COMPRESSED)
        if _info_topic(topic) in infos:
            topics = namespaces.setdefault(base.rpartition("/")[0], {})
            # Of the same images, compressed ones: they came so, or are smaller.
            if base not in topics or topic != base:
                topics[base] = connections
    last = Counter(namespace.rpartition("/")[2] for namespace in namespaces)
    names = {}
    for namespace, topics in namespaces.items():
        short = namespace.rpartition("/")[2]
        name = short if last[short] == 1 else namespace.strip("/").replace("/", "_")
        names[name or "camera"] = topics
    return dict(sorted(names.items()))


def _summary(found: Iterable[str], connections: Sequence[Connection]) -> str:
    text = f"cameras with images and camera_info: {', '.join(found) or 'none'}"
    if topics := uncalibrated(connections):
        text += f"; images without a camera_info beside them: {', '.join(topics)}"
    return shown(text)


def _of_input(connections: Sequence[Connection], name: str) -> _ByTopic:
    """Return an input's connections by topic; of a topic with several types, those of the preferred one."""
    topics: _ByTopic = {}
    for kind in INPUT_TYPES[name].values():
        chosen: _ByTopic = {}
        for connection in connections:
            if connection.msgtype == kind and connection.topic not in topics:
                chosen.setdefault(connection.topic, []).append(connection)
        topics |= chosen
    return topics


def _info_topic(topic: str) -> str:
    return topic.removesuffix(_COMPRESSED).rpartition("/")[0] + "/camera_info"
