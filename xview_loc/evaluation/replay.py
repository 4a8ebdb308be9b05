"""Replay recordings through localizer and filter, as on a vehicle, beside true positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xview_loc.bags.recovery import BagError
from xview_loc.bags.ros_types import deserialize
from xview_loc.camera import CameraError, CameraModel
from xview_loc.datasets.pairs import PairDataset
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError, Observation, PoseEstimate
from xview_loc.estimation.position_filter import PositionFilter
from xview_loc.geodesy import LocalProjection
from xview_loc.images import ImageError
from xview_loc.maps.base import MapError, MapUnavailableError
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import ODOMETRY, TOPICS
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.tracks import TimedTrack
from xview_loc.rig import WHOLE
from xview_loc.statistics import mahalanobis
from xview_loc.vehicle.messages import VelocityReader
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample, RejectedInput

Array = NDArray[np.float64]

# Longest gap that odometry is interpolated over, seconds; as in the node.
_ODOMETRY_GAP_S = 1.0
# Time over which the truth's motion is taken, seconds, and shortest step that has a direction, metres.
_MOTION_S, _LEAST_STEP_M = 1.0, 1.0
# Number of failures of the map in a row after which it is given up.
_FAILURES = 5
# How often the filter follows odometry between pairs; a stamp that never comes.
_FOLLOW_NS, _NEVER = 5 * 10**9, 1 << 62
# Distance between images shown, metres.
_APART_M = 20.0


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses of base_link, N rows; NaN where there is none.

    place (N, 2): metres east and north. covariance (N, 2, 2): m^2. heading (N,): ENU yaw, radians.
    """

    place: Array
    covariance: Array
    heading: Array

    @classmethod
    def unknown(cls, count: int) -> Poses:
        """Return poses to be filled in."""
        return cls(*(np.full((count, *shape), math.nan) for shape in ((2,), (2, 2), ())))

    def errors(self, truth: Array) -> Array:
        """Return distances (N,) from true places (N, 2), metres."""
        return np.hypot(*(self.place - truth).T)

    def sigmas(self, truth: Array) -> Array:
        """Return Mahalanobis distances (N,) of true places (N, 2)."""
        offsets = self.place - truth
        known = np.isfinite(offsets[:, 0]) & np.isfinite(self.covariance[:, 0, 0])
        distances = np.full(len(offsets), math.nan)
        distances[known] = [
            mahalanobis(offset, covariance)
            for offset, covariance in zip(offsets[known], self.covariance[known], strict=True)
        ]
        return distances


@dataclass(frozen=True, eq=False)
class Replay:
    """A recording of N pairs, localised image by image and over time.

    plane: that of all places, true north. stamp_ns (N,). truth (N, 2): base_link's true places, NaN if
    unknown. course, speed (N,): of the truth, radians and m/s; NaN where it is not known, or the vehicle
    stands. fix: of the receiver, moved to base_link. single: of each image by itself, at its own fix.
    filtered: of the filter. refused: why an image gave no pose of its own, "" if it did.
    """

    name: str
    plane: LocalProjection
    stamp_ns: NDArray[np.int64]
    truth: Array
    course: Array
    speed: Array
    fix: Poses
    single: Poses
    filtered: Poses
    refused: list[str]

    def worst(self, count: int) -> list[tuple[int, float]]:
        """Return (row, error in metres) of the images that mislead most by themselves, apart."""
        errors = self.single.errors(self.truth)
        found: list[tuple[int, float]] = []
        for i in np.argsort(-np.nan_to_num(errors, nan=-1.0))[: 20 * count]:
            near = (np.hypot(*(self.truth[i] - self.truth[k])) < _APART_M for k, _ in found)
            if errors[i] > 0.0 and not any(near):
                found.append((int(i), float(errors[i])))
        return found[:count]

    def along_across(self, poses: Poses) -> tuple[Array, Array]:
        """Return errors (N,) ahead and to the right of the true course, metres."""
        error, course = poses.place - self.truth, self.course
        cos, sin = np.cos(course), np.sin(course)
        return error[:, 0] * cos + error[:, 1] * sin, error[:, 0] * sin - error[:, 1] * cos


def replay(
    name: str,
    dataset: PairDataset,
    bag: PairBag,
    localizer: Localizer,
    truth: TimedTrack,
    *,
    use_heading: bool = True,
    on_pair: Callable[[], object] = lambda: None,
) -> Replay:
    """Localise the pairs of a bag in their order.

    dataset: of this bag alone, for the localizer's model. truth: true positions of the antenna. use_heading:
    False to search all headings, as the localizer must. Damaged pairs are refused. Raises BagError if the
    odometry is damaged or no image can be used, MapUnavailableError if the map fails again and again.
    """
    stamps = np.array([stamp for stamp, *_ in bag.poses()], np.int64)
    places = np.stack(truth.at(stamps), 1)
    known = places[np.isfinite(places[:, 0])]
    if not len(known):
        raise BagError(
            f"the true positions have none at the time of {bag.folder}: check that both clocks agree"
        )
    plane = LocalProjection(*known[0])
    count = len(stamps)
    fix, single, filtered = (Poses.unknown(count) for _ in range(3))
    course, speed = _motion(truth, stamps, plane)
    true_places = np.full((count, 2), math.nan)
    result = Replay(name, plane, stamps, true_places, course, speed, fix, single, filtered, [])
    odometry = Odometry(_ODOMETRY_GAP_S)
    moving = PositionFilter(odometry)
    velocities, outage = _Velocities(bag, odometry, moving), _Outage()
    for i in range(count):
        velocities.until(int(stamps[i]))
        on_pair()
        try:
            pair, image, mounting, seen = dataset.look(i)
        except (BagError, CameraError, ImageError) as error:
            result.refused.append(f"not usable: {error}")
            continue
        if math.isfinite(places[i, 0]):
            result.truth[i] = _base(plane.forward(*places[i]), mounting, _heading(pair))
        heading = _heading(pair) if use_heading else None
        inputs = _Inputs(pair, image, mounting, seen, heading)
        result.refused.append(_localise(result, i, inputs, localizer, moving, outage))
    if all(reason.startswith("not usable") for reason in result.refused):
        raise BagError(f"{bag.folder}: no image can be used, the first one is {result.refused[0]}")
    return result


def _motion(truth: TimedTrack, stamps: NDArray[np.int64], plane: LocalProjection) -> tuple[Array, Array]:
    """Return true directions and speeds (N,), from half a second before to half a second after."""
    half = round(_MOTION_S * 1e9 / 2.0)
    before, after = (np.stack(plane.forward(*truth.at(stamps + d)), 1) for d in (-half, half))
    step = after - before
    speed = np.hypot(*step.T) / _MOTION_S
    moving = speed * _MOTION_S >= _LEAST_STEP_M
    return np.where(moving, np.arctan2(step[:, 1], step[:, 0]), math.nan), speed


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a node would get of a pair; seen: share of the model's image that the cameras show."""

    pair: Pair
    image: NDArray[np.uint8]
    mounting: Mounting
    seen: float
    heading: HeadingSample | None


class _Outage:
    """Gives up on a map that fails again and again."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def failed(self, error: MapError) -> None:
        """Count a failure. Raises MapUnavailableError."""
        if isinstance(error, MapUnavailableError):
            self._in_a_row += 1
            if self._in_a_row >= _FAILURES:
                raise error

    def worked(self) -> None:
        """Forget the failures before."""
        self._in_a_row = 0


def look_again(
    i: int,
    dataset: PairDataset,
    localizer: Localizer,
    use_heading: bool,
    antenna: tuple[float, float] | None = None,
) -> tuple[Observation, PoseEstimate, Mounting]:
    """Localise one pair by itself. Raises as dataset and localizer.

    antenna: its true place (lat, lon), degrees, instead of the pair's fix.
    """
    pair, image, mounting, _ = dataset.look(i)
    fix = _fix(pair)
    if antenna is not None:
        fix = replace(fix, lat=antenna[0], lon=antenna[1])
    heading = _heading(pair) if use_heading else None
    observation = Observation.of(image, fix, heading, mounting, _camera(localizer))
    return observation, localizer.localize(observation), mounting


def _camera(localizer: Localizer) -> CameraModel | None:
    lens = localizer.spec.lens
    return lens if isinstance(lens, CameraModel) else None


def _localise(
    result: Replay, i: int, inputs: _Inputs, localizer: Localizer, moving: PositionFilter, outage: _Outage
) -> str:
    """Fill in row ``i``; return why the image gave no pose of its own, "" if it did."""
    camera, refused = _camera(localizer), ""
    pair, image, mounting, heading = inputs.pair, inputs.image, inputs.mounting, inputs.heading
    fix = _fix(pair)
    result.fix.place[i] = _base(result.plane.forward(fix.lat, fix.lon), mounting, _heading(pair))
    if fix.covariance is not None:
        result.fix.covariance[i] = fix.covariance[:2, :2]
    used = moving.move(pair.stamp_ns, fix, heading, mounting)
    # As the node: the checkpoint's confidence is that of whole panoramas.
    least = localizer.calibration.min_confidence if inputs.seen >= WHOLE else 0.0
    estimate: PoseEstimate | None = None
    try:
        estimate = localizer.localize(Observation.of(image, fix, heading, mounting, camera))
        outage.worked()
        if estimate.confidence < least:
            refused = "low confidence"
        else:
            _fill_in(result.single, i, estimate, mounting, result.plane)
    except (LocalizationError, ImageError) as error:
        refused = str(error)
    except MapError as error:
        outage.failed(error)
        refused = str(error)
    if used is not fix:
        estimate = None
        with suppress(LocalizationError, MapError, ImageError):
            if used is not None:
                estimate = localizer.localize(Observation.of(image, used, heading, mounting, camera))
    if estimate is not None:
        moving.observe(estimate, mounting, heading is not None)
    if (pose := moving.pose) is not None:
        result.filtered.place[i] = result.plane.forward(pose.lat, pose.lon)
        result.filtered.covariance[i] = pose.covariance
        result.filtered.heading[i] = math.nan if pose.heading is None else pose.heading
    return refused


def _fill_in(
    poses: Poses, i: int, estimate: PoseEstimate, mounting: Mounting, plane: LocalProjection
) -> None:
    lat, lon, covariance = estimate.lat, estimate.lon, estimate.covariance
    if estimate.heading is not None:
        heading = mounting.heading(estimate.heading)
        lat, lon = mounting.base_from_camera(lat, lon, heading)
        covariance = mounting.base_covariance(covariance, heading, estimate.heading_variance)
        poses.heading[i] = heading
    poses.place[i] = plane.forward(lat, lon)
    poses.covariance[i] = covariance


def _fix(pair: Pair) -> GnssFix:
    covariance = None
    if pair.fix_covariance is not None:
        covariance = np.zeros((3, 3))
        covariance[:2, :2] = pair.fix_covariance[:2, :2]
    return GnssFix(pair.stamp_ns, pair.lat, pair.lon, pair.altitude, covariance)


def _heading(pair: Pair) -> HeadingSample | None:
    if pair.heading is None:
        return None
    return HeadingSample(pair.stamp_ns, pair.heading, pair.heading_std)


def _base(antenna: tuple[float, float], mounting: Mounting, heading: HeadingSample | None) -> Array:
    """Return base_link's place from the antenna's; the same without a heading."""
    lever = (0.0, 0.0) if heading is None else in_enu(mounting.antenna, heading.yaw)
    return np.array(antenna) - lever


class _Velocities:
    """Gives a bag's odometry to the filter: up to each pair, and a message further.

    A vehicle that stands gives no pairs: the filter follows its odometry meanwhile.
    """

    def __init__(self, bag: PairBag, odometry: Odometry, moving: PositionFilter) -> None:
        self._odometry, self._moving, self._reader = odometry, moving, VelocityReader()
        self._messages: Iterator[tuple[int, bytes]] = bag.odometry()
        self._given_ns = self._followed_ns = 0

    def until(self, stamp_ns: int) -> None:
        """Give all up to the first after a stamp."""
        while self._given_ns <= stamp_ns:
            logged_ns, data = next(self._messages, (_NEVER, b""))
            self._given_ns = logged_ns
            if not data:
                return
            with suppress(RejectedInput):
                velocity = self._reader.read(deserialize(TOPICS[ODOMETRY], data))
                if velocity is not None:
                    self._odometry.add(velocity)
            if logged_ns - self._followed_ns > _FOLLOW_NS and logged_ns < stamp_ns:
                if self._followed_ns:
                    self._moving.move(logged_ns, None, None, Mounting())
                self._followed_ns = logged_ns
