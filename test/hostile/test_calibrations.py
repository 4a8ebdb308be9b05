"""Calibrations that no camera has: refused with a count and one line, and no pose comes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")

from localizer_rig import running
from ros_harness import pick_domain
from sensor_msgs.msg import CameraInfo, RegionOfInterest

from xview_loc.camera import CameraModel
from xview_loc.images import ImageError
from xview_loc.models.inputs import ground_image
from xview_loc.models.specs import ModelSpec
from xview_loc.vehicle.messages import camera_from_info
from xview_loc.vehicle.synchronisation import RejectedInput

K = [30.0, 0.0, 32.0, 0.0, 30.0, 16.0, 0.0, 0.0, 1.0]
MANY = 4_000_000_000


def k(index: int, value: float) -> dict[str, Any]:
    """Intrinsics of which one differs."""
    return {"k": [value if i == index else v for i, v in enumerate(K)]}


def region(**more: int) -> dict[str, Any]:
    return {"roi": RegionOfInterest(**more)}


BAD: list[dict[str, Any]] = [
    *(k(0, value) for value in (math.nan, math.inf, 0.0, -30.0, 1e300, 1e-300, 5e-324)),
    *(k(2, value) for value in (math.nan, 1e300)),
    k(1, 1e300),
    k(3, 5.0),
    k(6, 1.0),
    k(8, 0.0),
    {"k": [0.0] * 9},
    *({"width": width, "height": height} for width, height in ((0, 32), (64, 0), (MANY, MANY))),
    *({"d": [0.0] * count} for count in (3, 100_000)),
    *({"d": [value] * 5} for value in (math.nan, math.inf, 1e300, 1e10)),
    {"d": [1e300] * 4, "distortion_model": "equidistant"},
    *({"distortion_model": name} for name in ("x" * 100_000, "\n", "omni")),
    {"binning_x": MANY, "binning_y": MANY},
    region(x_offset=MANY, y_offset=MANY),
    region(x_offset=MANY, y_offset=MANY, width=64, height=32),
    region(width=MANY, height=1),
    region(x_offset=60, width=64, height=32),
]


def info(**more: Any) -> CameraInfo:
    return CameraInfo(**{"width": 64, "height": 32, "k": K, "d": [0.0] * 5, **more})


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:40])
def test_it_is_refused_in_one_line(bad: dict[str, Any]) -> None:
    with pytest.raises(RejectedInput) as caught:
        camera_from_info(info(**bad))
    assert caught.value.reason == "camera_info_invalid"
    # A name is cut where it is shown.
    assert len(str(caught.value).replace("x" * 100_000, "")) < 300


def test_a_rotation_is_not_used() -> None:
    assert camera_from_info(info(r=[math.nan] * 9)) == camera_from_info(info())


@pytest.mark.parametrize("distortion", [(1e5,) * 5, (-1e5, 0, 0, 0), (0, 0, 1e4, 1e4)])
def test_a_distortion_that_leaves_nothing_of_the_image(distortion: tuple[float, ...]) -> None:
    camera = CameraModel(64, 32, tuple(K), distortion)
    spec = ModelSpec("stub", "pinhole", (32, 64), 64, 0.5, 8, "left", intrinsics=(30.0, 30.0, 32.0, 16.0))
    for _ in range(2):
        with pytest.raises(ImageError, match="show less than"):
            ground_image(np.full((32, 64, 3), 128, np.uint8), spec, heading=None, camera=camera)


def test_the_running_localizer_refuses_them_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "localizer").mkdir()
    with running(pick_domain(), tmp_path / "localizer") as rig:
        b = rig.bench
        with rig.configured(model="stub-pinhole", qos_depth=1000):
            rig.send_info(rig.step())
            rig.good_frame()
            poses, lines = len(rig.poses), rig.node.log.count("\n")
            key = "camera_info_rejected/camera_info_invalid"
            for count, bad in enumerate(BAD, 1):
                ns = rig.step()
                rig.info.publish(rig.header(info(**bad), ns))
                rig.send_fix(ns)
                rig.send_heading(ns)
                rig.send_image(ns)
                if count % 4 == 0 or count == len(BAD):
                    # A busy node would be left behind by the stamps, which go on by seconds.
                    b.wait(lambda count=count: b.value(key) == str(count), what="the refusals")
            b.wait(lambda: int(b.value("frames_rejected/camera_info_missing") or 0) >= len(BAD) - 1)
            assert len(rig.poses) == poses
            assert rig.node.log.count("\n") < lines + len(BAD)
            # Back to a good one, and to another size in the middle of the drive.
            rig.send_info(rig.step())
            rig.good_frame()
            rig.send_info(rig.step(), width=128, height=64)
            rig.send_frame()
            b.wait_diagnosis("image_invalid", "its calibration is for 128 x 64")
            rig.send_info(rig.step())
            rig.good_frame()
