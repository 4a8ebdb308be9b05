"""The vehicle's roll and pitch, as the parameter ``tilt_source`` says: fixed, from an Imu, or from tf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import Imu

from xview_loc.nodes.cameras import Frame
from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.nodes.inputs import Input
from xview_loc.nodes.parameters import ParameterError
from xview_loc.nodes.transforms import Transforms
from xview_loc.vehicle.pairing import Paired, Pairing
from xview_loc.vehicle.synchronisation import RejectedInput, StampNotNewerError
from xview_loc.vehicle.tilt import TiltSample, tilt_from_imu, tilt_of
from xview_loc.vehicle.transforms import TransformError

SHOWN_S = 3.0


class TiltInput:
    """Gives the pairing the tilts that are measured. For the executor's thread, but :meth:`of`.

    listen_to_tf: as of the node; refuse: called with an input's name and the error that refused it. Raises
    ParameterError if tf is wanted and cannot be had.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        pairing: Pairing[Frame],
        health: Health,
        listen_to_tf: Callable[[str], Transforms],
        refuse: Callable[[str, RejectedInput], None],
    ) -> None:
        self._params, self._pairing, self._health, self._refuse = params, pairing, health, refuse
        # Of another source, before.
        for condition in ("imu", "imu_frame", "tilt"):
            health.clear(condition)
        self._transforms: Transforms | None = None
        if self.source == "tf":
            self._transforms = listen_to_tf("tilt_source is set")
            self._transforms.on_new.append(self._on_tf)
        elif self.source == "imu":
            # Without tf the Imu's axes are the vehicle's.
            with suppress(ParameterError):
                self._transforms = listen_to_tf("tilt_source is set")

    @property
    def source(self) -> str:
        """Where tilts come from: none, imu or tf."""
        return str(self._params["tilt_source"])

    def inputs(self) -> list[Input]:
        """Return what to listen to."""
        return [Input("imu", self._on_imu)] if self.source == "imu" else []

    def of(self, paired: Paired[Frame]) -> TiltSample:
        """Return the tilt in a frame: as measured, else as the parameters say."""
        roll, pitch = (math.radians(self._params[name]) for name in ("roll_deg", "pitch_deg"))
        return paired.tilt or TiltSample(paired.frame.stamp_ns, roll, pitch)

    def show_missing(self, paired: Paired[Frame]) -> None:
        """Count a frame for which the source says no tilt, and show it."""
        if self.source != "none" and paired.tilt is None:
            self._health.count("frames_without_tilt")
            roll, pitch = (f"{self._params[name]:g}" for name in ("roll_deg", "pitch_deg"))
            text = f"no tilt from {self.source} within max_heading_age_s of the image"
            text += f": roll_deg {roll} and pitch_deg {pitch} are used"
            self._health.condition("no_tilt", WARN, text, for_s=SHOWN_S)

    def _on_imu(self, message: Imu) -> None:
        self._pairing.add_tilt(tilt_from_imu(message, self._mounting(message.header.frame_id)))
        self._health.clear("imu")

    def _mounting(self, frame: str) -> NDArray[np.float64]:
        """Return the rotation matrix from an Imu's frame to base_frame; the identity if tf does not know."""
        base, matrix = self._params["base_frame"], np.eye(3)
        if frame and frame != base:
            try:
                if self._transforms is None:
                    raise TransformError("tf2_msgs cannot be imported")
                matrix = self._transforms.buffer.lookup(base, frame).matrix
            except TransformError as error:
                text = f"imu gives the tilt of {frame}, which is taken as that of {base}: {error}"
                self._health.condition("imu_frame", WARN, text)
                return matrix
        self._health.clear("imu_frame")
        return matrix

    def _on_tf(self) -> None:
        assert self._transforms is not None  # it calls this
        up, base = self._params["tilt_frame"], self._params["base_frame"]
        try:
            stamp, pose = self._transforms.buffer.latest(up, base)
            if not stamp:
                raise TransformError("it is static; set roll_deg and pitch_deg instead")
            # Other frames may move more often.
            with suppress(StampNotNewerError):
                self._pairing.add_tilt(tilt_of(stamp, pose.matrix))
            self._health.clear("tilt")
        except TransformError as error:
            self._refuse("tilt", RejectedInput("tilt_missing", f"tf from {up} to {base}: {error}"))
        except RejectedInput as error:
            self._refuse("tilt", error)
