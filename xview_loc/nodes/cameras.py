"""A node's cameras: what they are called, where they are, and the rig that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xview_loc.camera import CameraError, CameraModel, Lens, PanoramaCamera
from xview_loc.errors import shown
from xview_loc.images import Image, ImageError
from xview_loc.nodes.parameters import ParameterError
from xview_loc.nodes.transforms import Transforms
from xview_loc.rig import Mask, MountedCamera, Rig, check_size
from xview_loc.vehicle.messages import rgb_from_cdr
from xview_loc.vehicle.mounted_cameras import (
    FARTHEST_M,
    MOST_PIXELS,
    check_height,
    check_names,
    mount,
    optical,
    rig_frames,
)
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.rig_file import CameraEntry, read_mask, read_rig_file
from xview_loc.vehicle.synchronisation import RejectedInput
from xview_loc.vehicle.transforms import Transform

Decoder = Callable[[Any], NDArray[np.uint8]] | None


@dataclass(frozen=True)
class Frame:
    """The images of one instant, as they came, and what was known when they arrived.

    images: one of each camera of a rig, of which some may be missing, or that of a single camera, named "".
    cameras: the calibrations received by then, by the same names. Images are raw bytes, since rclpy's
    messages cost several copies in the executor's thread.
    """

    stamp_ns: int
    arrived_ns: int
    images: tuple[CameraImage, ...]
    cameras: Mapping[str, CameraModel]

    @property
    def camera(self) -> CameraModel | None:
        """Calibration of a single camera, None if none was received."""
        return self.cameras.get("")


class Cameras:
    """What the parameters and tf say of a node's cameras. Raises ParameterError, UserError.

    names: those of a rig; none of a single camera. elevation_deg: of the edges of a single camera's
    panoramas; None if the parameters do not say. ``problems`` says, by camera, why images of a rig could not
    be used the last time.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.names = _names(params["cameras"])
        self.elevation_deg = _elevation(params["panorama_elevation_deg"])
        self.problems: dict[str, str] = {}
        # The frames that the cameras' calibrations are in.
        self.frames: dict[str, str] = {}
        self._entries: dict[str, CameraEntry] = {}
        self._rig: Rig | None = None
        if self.names:
            single = ("own_mask", "camera_frame", "camera_x", "camera_y", "camera_yaw_deg")
            given = {name: params[name] for name in single}
            for name, value in (given | {"panorama_elevation_deg": self.elevation_deg}).items():
                if value:
                    raise ParameterError(f"{name} is for a single camera: leave it out, or empty cameras")
            if params["rig_file"]:
                self._entries = read_rig_file(params["rig_file"])
        elif params["rig_file"]:
            raise ParameterError("rig_file is set, but cameras is empty: name those to use")
        elif params["own_mask"]:
            self._entries = {"": CameraEntry(None, read_mask(Path(params["own_mask"]).expanduser()))}

    @property
    def unused(self) -> list[str]:
        """The cameras that only the rig file names."""
        return sorted(self._entries.keys() - {*self.names, ""})

    @property
    def unplaced(self) -> list[str]:
        """The cameras of a rig whose places tf must say."""
        return [name for name in self.names if self._entry(name).pose is None]

    def lens_known(self, frame: Frame) -> bool:
        """Return True if calibrations or parameters say what a frame's cameras see."""
        return bool(self.names or self.elevation_deg) or frame.camera is not None

    @property
    def own_mask(self) -> Mask | None:
        """Where a single camera sees the vehicle itself."""
        return self._entry("").own

    def see(
        self,
        frame: Frame,
        transforms: Transforms | None,
        decode_other: Decoder,
        elevation_deg: Callable[[Image], tuple[float, float]] = lambda image: (90.0, -90.0),
    ) -> tuple[dict[str, Image], Rig]:
        """Decode a frame's images to RGB, and return them, by camera, with the rig of all cameras.

        A single camera without a calibration takes panoramas; ``elevation_deg`` says what they show if the
        parameters do not. Cameras of a rig that cannot be used are left out. Raises RejectedInput if none is
        left.
        """
        problems: dict[str, RejectedInput] = {}
        cameras: dict[str, MountedCamera] = {}
        pixels: dict[str, Image] = {}
        images = {image.name: image for image in frame.images}
        left = MOST_PIXELS
        for name in self.names or ("",):
            image: Image | None = None
            try:
                if (camera := frame.cameras.get(name)) is not None:
                    left -= camera.width * camera.height
                    if left < 0:
                        text = f"the cameras have more than {MOST_PIXELS / 1e6:.0f} million pixels together"
                        raise RejectedInput("camera_info_invalid", text)
                if name in images and (name in frame.cameras or not self.names):
                    # A damaged image, or one of another size, hides what the camera would show; the rig
                    # stays the same.
                    try:
                        image = rgb_from_cdr(images[name].type, images[name].data, decode_other)
                        if camera is not None:
                            check_size("", image, camera)
                    except ImageError as error:
                        image, problems[name] = None, RejectedInput("image_invalid", str(error))
                cameras[name] = self._mounted(name, frame, image, transforms, elevation_deg)
            except RejectedInput as error:
                problems.setdefault(name, error)
                continue
            if image is not None:
                pixels[name] = image
        self.problems = {name: str(error) for name, error in problems.items()}
        if not pixels:
            name, first = next((name, error) for name, error in problems.items() if name in images)
            raise RejectedInput(first.reason, f"camera {name}: {first}" if name else str(first))
        return pixels, self._rig_of(cameras)

    def check_mask(self, name: str, size: str) -> None:
        """Raise RejectedInput unless a camera's mask is in the size of its images, WIDTH x HEIGHT."""
        own = self._entry(name).own
        if own is not None and image_size(own) != size:
            text = f"its own_mask has {image_size(own)} pixels, but its images have {size}"
            raise RejectedInput("own_mask_invalid", text)

    def pose(self, name: str, transforms: Transforms | None) -> Transform:
        """Return where a camera's optical frame is in base_link. Raises RejectedInput if tf does not know."""
        entry, p = self._entry(name), self._params
        if entry.pose is not None:
            return entry.pose
        if name:
            frames = rig_frames(name, self.frames.get(name, ""))
        else:
            frames = [p["camera_frame"]] if p["camera_frame"] else []
        if transforms is not None and frames:
            return transforms.optical_pose(frames)
        return optical(Transform.planar(p["camera_x"], p["camera_y"], math.radians(p["camera_yaw_deg"])))

    def _mounted(
        self,
        name: str,
        frame: Frame,
        image: Image | None,
        transforms: Transforms | None,
        elevation_deg: Callable[[Image], tuple[float, float]],
    ) -> MountedCamera:
        camera: Lens | None = frame.cameras.get(name)
        if camera is None:
            if name or image is None:
                raise RejectedInput("camera_info_missing", "no usable camera_info received")
            edges = self.elevation_deg or elevation_deg(image)
            camera = PanoramaCamera(image.shape[1], image.shape[0], *map(math.radians, edges))
        size = f"{camera.width} x {camera.height}"
        self.check_mask(name, size)
        pose = self.pose(name, transforms)
        if not np.abs(pose.translation).max() <= FARTHEST_M:
            text = f"tf says that it is {np.linalg.norm(pose.translation):.0f} m from base_frame"
            raise RejectedInput("extrinsics_invalid", f"{text}: see what moves its frame")
        return mount(camera, pose)

    def _rig_of(self, cameras: dict[str, MountedCamera]) -> Rig:
        """Return the rig of these cameras: the last one if they are the same, as it keeps tables."""
        if self._rig is None or self._rig.cameras != cameras:
            own = {name: mask for name in cameras if (mask := self._entry(name).own) is not None}
            rig = Rig(cameras, self._params["base_height_m"], own)
            try:
                check_height(rig)
            except CameraError as error:
                raise RejectedInput("extrinsics_invalid", str(error)) from None
            self._rig = rig
        return self._rig

    def _entry(self, name: str) -> CameraEntry:
        return self._entries.get(name, CameraEntry())


def image_size(image: NDArray[Any]) -> str:
    """Return WIDTH x HEIGHT."""
    return f"{image.shape[1]} x {image.shape[0]}"


def _names(given: list[str]) -> tuple[str, ...]:
    """Return the names of a rig's cameras. Raises ParameterError."""
    names = tuple(filter(None, given))
    try:
        check_names(names)
    except CameraError as error:
        raise ParameterError(f"cameras: {error}") from None
    for name in names:
        if names.count(name) > 1:
            raise ParameterError(f"cameras names {name} twice")
    return names


def _elevation(given: Sequence[float]) -> tuple[float, float] | None:
    """Return a panorama's elevations, degrees; None if they are not given. Raises ParameterError."""
    if len(given) != 2 or not all(-90.0 <= angle <= 90.0 for angle in given) or given[0] < given[1]:
        wanted = "the elevations of the upper and the lower edge, such as [90.0, -90.0]"
        raise ParameterError(f"panorama_elevation_deg must be {wanted}, not {shown(list(given), 80)}")
    top, bottom = given
    return (top, bottom) if top > bottom else None
