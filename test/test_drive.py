"""The drive of a bag of pairs: headings that were not measured, and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from xview_loc.bags.ros_types import header, message, quaternion, serialize
from xview_loc.bags.writer import BagLimits
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.recordings.drive import Drive, read_drive
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.pair_writer import PairWriter
from xview_loc.vehicle.mounting import Mounting, Offset, in_enu

T0 = 1_700_000_000 * 10**9
PLANE = LocalProjection(48.2, 16.37)
SPEED, RATE_HZ, PAIRS = 6.0, 10, 60
JPEG = bytes(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1])


def yaw_at(seconds: float) -> float:
    """Straight on, a left turn of 90 degrees within three seconds, and straight on."""
    return 0.5 + math.pi / 2 * float(np.clip((seconds - 30.0) / 3.0, 0.0, 1.0))


_TIMES = np.arange(-1.0, PAIRS + 2.0, 0.01)
_PLACES = np.cumsum(0.01 * SPEED * np.exp(1j * np.array([yaw_at(t) for t in _TIMES])))


def place_at(seconds: float) -> complex:
    return complex(np.interp(seconds, _TIMES, _PLACES))


def twist(seconds: float) -> bytes:
    return _odometry(seconds, SPEED, (yaw_at(seconds + 0.05) - yaw_at(seconds - 0.05)) * 10.0)


def pose(seconds: float) -> bytes:
    """As visual odometry says it: a pose, in axes of its own, and no twist."""
    return _odometry(seconds, 0.0, 0.0, place_at(seconds) * np.exp(-0.5j), yaw_at(seconds) - 0.5)


def _odometry(seconds: float, speed: float, rate: float, place: complex = 0j, yaw: float = 0.0) -> bytes:
    kind = "geometry_msgs/msg/"
    origin = message(f"{kind}Point", x=place.real, y=place.imag, z=0.0)
    linear, angular = (message(f"{kind}Vector3", x=x, y=0.0, z=z) for x, z in ((speed, 0.0), (0.0, rate)))
    odometry = message(
        "nav_msgs/msg/Odometry",
        header=header(T0 + round(seconds * 1e9), "odom"),
        child_frame_id="base_link",
        pose=message(
            f"{kind}PoseWithCovariance",
            pose=message(f"{kind}Pose", position=origin, orientation=quaternion(yaw)),
            covariance=np.zeros(36),
        ),
        twist=message(
            f"{kind}TwistWithCovariance",
            twist=message(f"{kind}Twist", linear=linear, angular=angular),
            covariance=np.zeros(36),
        ),
    )
    return serialize("nav_msgs/msg/Odometry", odometry)


def drive(
    folder: Path,
    says: Callable[[float], bytes] = twist,
    *,
    gap: tuple[float, float] = (math.inf, math.inf),
    antenna: Offset = (0.0, 0.0),
    pairs: int = PAIRS,
    heading: Callable[[float], float | None] = lambda seconds: None,
) -> Drive:
    """Record a pair a second, and odometry after the first pair as the node does, without that in the gap."""
    mounting = Mounting(antenna=antenna)
    with closing(PairWriter(folder, mounting.facts(), BagLimits(min_free_bytes=0))) as writer:
        for second in range(pairs):
            lever = in_enu(antenna, yaw_at(second))
            at = place_at(second) + complex(*lever)
            lat, lon = PLANE.inverse(at.real, at.imag)
            stamp = T0 + second * 10**9
            writer.add(
                Pair(stamp, "jpeg", JPEG, lat, lon, 0.0, np.diag([9.0, 9.0, 9.0]), heading(second)), None
            )
            for tenth in range(1, RATE_HZ + 1):
                seconds = second + tenth / RATE_HZ - 0.03
                if not gap[0] <= seconds <= gap[1]:
                    writer.add_odometry(T0 + round(seconds * 1e9), says(seconds))
    return read_drive(PairBag(folder), mounting)


def off_deg(found: Drive) -> np.ndarray:
    return np.degrees([abs(wrap_angle(h - yaw_at(k))) for k, h in enumerate(found.heading)])


@pytest.mark.parametrize("says", [twist, pose])
@pytest.mark.parametrize("antenna", [(0.0, 0.0), (-3.0, 1.0)])
def test_all_pairs_of_a_drive_get_headings_and_steps(
    tmp_path: Path, says: Callable[[float], bytes], antenna: Offset
) -> None:
    found = drive(tmp_path / "bag", says, antenna=antenna)
    assert off_deg(found).max() < 3.0 and np.degrees(found.reckoned_std).max() < 8.0
    true = np.diff([place_at(k) for k in range(PAIRS)])
    assert np.isnan(found.moved[0]) and np.abs(found.moved[1:] - true).max() < 0.5
    assert found.headings_text.startswith(f"0 measured, {PAIRS} from odometry and fixes (+-")


def test_a_gap_in_odometry_splits_the_drive(tmp_path: Path) -> None:
    """In the turn: nothing is known of it, but of what comes before and after."""
    found = drive(tmp_path / "bag", gap=(28.5, 36.0))
    known = np.isfinite(found.heading)
    assert 45 <= known.sum() < PAIRS and off_deg(found)[known].max() < 3.0
    assert np.isnan(found.moved[30:36]).all()
    assert f"{PAIRS - known.sum()} unknown" in found.headings_text


def test_measured_headings_are_kept(tmp_path: Path) -> None:
    found = drive(tmp_path / "bag", heading=lambda seconds: yaw_at(seconds) + 0.1)
    assert np.degrees(np.abs(off_deg(found) - math.degrees(0.1))).max() < 1e-3
    assert found.headings_text == f"{PAIRS} measured"


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_short_drives_have_no_headings(tmp_path: Path, pairs: int) -> None:
    found = drive(tmp_path / "bag", pairs=pairs)
    assert len(found.heading) == pairs and not np.isfinite(found.heading).any()
