"""A target-area pair: a ground image, or those of a rig, and the vehicle's state when it was taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xview_loc.bags.ros_types import deserialize
from xview_loc.camera import CameraModel
from xview_loc.errors import reason
from xview_loc.images import Image, ImageError, check_complete, check_size, decode_compressed
from xview_loc.rig import Rig
from xview_loc.vehicle.rig_assembly import CameraImage
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample
from xview_loc.vehicle.tilt import TiltSample


@dataclass(frozen=True, eq=False)
class Pair:
    """One target-area pair without ground truth.

    image_format, image_bytes: as in ``sensor_msgs/CompressedImage``; empty if the pair is of a rig: then
    ``images`` are CompressedImages of all its cameras, or of those that had one. lat, lon: the coarse fix in
    degrees, with its 2x2 or 3x3 ENU covariance in m^2 (None if unknown). heading: true-north ENU yaw of the
    vehicle, radians, None if unknown. camera: None if no calibration was received. tile_id: key of the aerial
    tile, "" without one. tilt: the vehicle's, None if unknown; tilt_source: where it comes from, such as
    "imu".
    """

    stamp_ns: int
    image_format: str
    image_bytes: bytes
    lat: float
    lon: float
    altitude: float = 0.0
    fix_covariance: NDArray[np.float64] | None = None
    heading: float | None = None
    heading_std: float = 0.0
    camera: CameraModel | None = None
    tile_id: str = ""
    images: tuple[CameraImage, ...] = ()
    tilt: TiltSample | None = None
    tilt_source: str = ""

    @classmethod
    def of(
        cls,
        stamp_ns: int,
        image_format: str,
        image_bytes: bytes,
        fix: GnssFix,
        heading: HeadingSample | None,
        camera: CameraModel | None,
    ) -> Pair:
        """Make a pair of a vehicle's inputs at the image's stamp."""
        yaw, std = (None, 0.0) if heading is None else (heading.yaw, heading.std)
        place = fix.lat, fix.lon, fix.altitude, fix.covariance
        return cls(stamp_ns, image_format, image_bytes, *place, yaw, std, camera)

    def image(self) -> Image:
        """Decode the ground image to RGB. Raises ImageError if it is damaged."""
        return decode_compressed(self.image_bytes)

    def decode(self, rig: Rig) -> dict[str, Image]:
        """Decode the images of a rig's cameras to RGB. Raises ImageError if one is damaged or too large."""
        decoded = {}
        for image in self.images:
            try:
                if image.name not in rig.cameras:
                    raise ImageError("it has no calibration")
                content = deserialize(image.type, image.data).data.tobytes()
                camera = rig.cameras[image.name].camera
                check_complete(content)
                check_size(content, camera.width * camera.height)
                decoded[image.name] = decode_compressed(content)
            except Exception as error:  # damaged bytes raise anything
                raise ImageError(f"camera {image.name}: {reason(error)}") from None
        return decoded
