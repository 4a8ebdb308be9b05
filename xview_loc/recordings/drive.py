"""The drive of a bag of pairs: fixes, headings and odometry at the pairs."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xview_loc.bags.recovery import BagError
from xview_loc.geodesy import steps_between
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.vehicle.course import MAX_STD, headings_of_drive, stands
from xview_loc.vehicle.keyframes import SPEED_AGE_NS
from xview_loc.vehicle.mounting import Mounting

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True, eq=False)
class Drive:
    """The pairs of a bag in their order, N rows.

    lat, lon: coarse fixes of the antenna, degrees. heading: the vehicle's true-north ENU yaw, radians, NaN if
    unknown. reckoned_std: standard deviation of headings that were not measured, but come from odometry and
    fixes, radians; NaN for others. moved: step of the vehicle's origin since the previous pair by odometry,
    metres east + i north; NaN if unknown.
    """

    stamp_ns: NDArray[np.int64]
    lat: Array
    lon: Array
    heading: Array
    reckoned_std: Array
    moved: Complex

    @property
    def headings_text(self) -> str:
        """Say how many headings are known, and where they come from."""
        reckoned = np.isfinite(self.reckoned_std)
        unknown = int(np.isnan(self.heading).sum())
        parts = [f"{len(self.heading) - unknown - int(reckoned.sum())} measured"]
        if reckoned.any():
            degrees = math.degrees(float(np.median(self.reckoned_std[reckoned])))
            parts.append(f"{int(reckoned.sum())} from odometry and fixes (+-{degrees:.1f} deg)")
        return ", ".join([*parts, *([f"{unknown} unknown"] if unknown else [])])


def read_drive(bag: PairBag, mounting: Mounting) -> Drive:
    """Read a bag's drive. Raises BagError.

    Headings are recorded for all pairs of a bag or for none: without any, they are reckoned where possible.
    """
    poses = bag.poses()
    stamps = np.array([stamp for stamp, *_ in poses], np.int64)
    numbers = [(*place, math.nan if yaw is None else yaw) for _, *place, yaw in poses]
    lat, lon, sigma, heading = np.array(numbers, np.float64).reshape(-1, 4).T.copy()
    path = _read_odometry(bag, stamps)
    std = np.full(len(poses), math.nan)
    if len(poses) and np.isnan(heading).all():
        seconds = (stamps - stamps[0]) / 1e9
        fixes = np.cumsum(steps_between(lat, lon) @ (1.0, 1j))
        antenna = path.place + complex(*mounting.antenna) * np.exp(1j * path.yaw)
        for rows in path.stretches():
            columns = path.yaw[rows], antenna[rows], fixes[rows], sigma[rows], seconds[rows]
            found, spread = headings_of_drive(*columns)
            heading[rows] = np.where(spread <= MAX_STD, found, math.nan)
            std[rows] = np.where(spread <= MAX_STD, spread, math.nan)
    # From odometry's axes to true north, by the mean of the angles at both ends.
    turn = np.exp(1j * (heading - path.yaw))
    moved = np.full(len(poses), complex(math.nan, math.nan))
    moved[1:] = path.steps * np.exp(1j * np.angle(turn[1:] + turn[:-1]))
    return Drive(stamps, lat, lon, heading, std, moved)


def find_headings(bag: PairBag, mounting: Mounting) -> tuple[Drive | None, str]:
    """Return the drive of a bag without measured headings, None of others, and say what is known of headings.

    A damaged bag has no drive.
    """
    try:
        if len(bag) and bag[0].heading is not None:
            return None, "measured"
        drive = read_drive(bag, mounting)
    except BagError:
        return None, "unknown, the bag is damaged"
    return drive, drive.headings_text


@dataclass(frozen=True, eq=False)
class _Path:
    """Yaw, radians, and place, metres, at the pairs (N,) by odometry, in axes of its own; NaN without any.

    ``gaps`` counts the gaps in odometry so far: a step over one is unknown.
    """

    yaw: Array
    place: Complex
    gaps: Array

    @property
    def steps(self) -> Complex:
        """Steps (N - 1,) to the next pair; NaN if unknown."""
        return np.where(np.diff(self.gaps) == 0, np.diff(self.place), math.nan)

    def stretches(self) -> list[slice]:
        """Return the pairs between which all steps are known, at least two each."""
        ends = [0, *(1 + np.flatnonzero(np.isnan(self.steps))), len(self.yaw)]
        return [slice(a, b) for a, b in pairwise(ends) if b - a > 1]


def _read_odometry(bag: PairBag, stamps: NDArray[np.int64]) -> _Path:
    # Arrays, as hours of odometry are millions of messages.
    times, velocities = array("q"), (array("d"), array("d"), array("d"))
    for one in bag.velocities():
        times.append(one.stamp_ns)
        for column, value in zip(velocities, (one.forward, one.left, one.yaw_rate), strict=True):
            column.append(value)
    if len(times) < 2:
        unknown = np.full(len(stamps), math.nan)
        return _Path(unknown, unknown.astype(np.complex128), unknown)
    order = np.argsort(times, kind="stable")
    # Nodes record odometry after the first pair: held for a moment at both ends.
    order = np.concatenate([order[:1], order, order[-1:]])
    known = np.array(times)[order]
    known[[0, -1]] += np.array([-1, 1]) * SPEED_AGE_NS
    forward, left, rate = (np.array(column)[order] for column in velocities)
    standing = stands(forward, left, rate)
    if standing.any():
        # Then it is the gyroscope's error.
        rate = rate - np.median(rate[standing])
    seconds = (known - known[0]) / 1e9
    lasted = np.diff(seconds)
    # Motion within a gap is unknown, and so is every step that touches one.
    gaps = lasted * 1e9 > 2 * SPEED_AGE_NS
    lasted[gaps] = 0.0
    turned = lasted * (rate[1:] + rate[:-1]) / 2
    yaw = np.concatenate([[0.0], np.cumsum(turned)])
    speed = forward + 1j * left
    steps = lasted * (speed[1:] + speed[:-1]) / 2 * np.exp(1j * (yaw[1:] + yaw[:-1]) / 2)
    at = (stamps - known[0]) / 1e9

    def at_pairs(steps: Array) -> Array:
        return np.interp(at, seconds, np.concatenate([[0.0], np.cumsum(steps)]), math.nan, math.nan)

    place = at_pairs(steps.real) + 1j * at_pairs(steps.imag)
    return _Path(at_pairs(turned), place, at_pairs(gaps.astype(np.float64)))
