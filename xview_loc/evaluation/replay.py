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
from xview_loc.camera import CameraModel
from xview_loc.datasets.pairs import PairDataset
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError, Observation, PoseEstimate
from xview_loc.estimation.position_filter import PositionFilter
from xview_loc.geodesy import LocalProjection
from xview_loc.images import ImageError
from xview_loc.maps.base import MapError
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_messages import ODOMETRY, TOPICS
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.tracks import TimedTrack
from xview_loc.statistics import mahalanobis
from xview_loc.vehicle.messages import VelocityReader
from xview_loc.vehicle.mounting import Mounting, in_enu
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample, RejectedInput

Array = NDArray[np.float64]

# Longest gap that odometry is interpolated over, seconds; as in the node.
_ODOMETRY_GAP_S = 1.0
# A step of the truth shorter than this has no direction, metres.
_LEAST_STEP_M = 0.3
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
    unknown. fix: of the receiver, moved to base_link. single: of each image by itself, at its own fix.
    filtered: of the filter. refused: why an image gave no pose of its own, "" if it did.
    """

    name: str
    plane: LocalProjection
    stamp_ns: NDArray[np.int64]
    truth: Array
    fix: Poses
    single: Poses
    filtered: Poses
    refused: list[str]

    @property
    def course(self) -> Array:
        """True directions of motion (N,), radians; NaN where the vehicle stands, or the truth is unknown."""
        step = np.gradient(self.truth, axis=0) if len(self.truth) > 1 else np.full_like(self.truth, math.nan)
        moved = np.hypot(*step.T) >= _LEAST_STEP_M
        return np.where(moved, np.arctan2(step[:, 1], step[:, 0]), math.nan)

    @property
    def speed(self) -> Array:
        """True speeds (N,), m/s; NaN where the truth is unknown."""
        if len(self.truth) < 2:
            return np.full(len(self.truth), math.nan)
        seconds = (self.stamp_ns - self.stamp_ns[0]) / 1e9
        return np.hypot(*np.gradient(self.truth, seconds, axis=0).T)

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
    False to search all headings, as the localizer must. Raises BagError if the odometry is damaged; damaged
    pairs are refused.
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
    true_places = np.full((count, 2), math.nan)
    result = Replay(bag.folder.name, plane, stamps, true_places, fix, single, filtered, [])
    odometry = Odometry(_ODOMETRY_GAP_S)
    moving, velocities = PositionFilter(odometry), _Velocities(bag, odometry)
    for i in range(count):
        velocities.until(int(stamps[i]))
        try:
            pair, image, mounting = dataset.look(i)
        except BagError as error:
            result.refused.append(str(error))
            continue
        finally:
            on_pair()
        heading = _heading(pair) if use_heading else None
        result.truth[i] = _base(plane.forward(*places[i]), mounting, heading)
        refused = _localise(result, i, pair, image, mounting, heading, localizer, moving)
        result.refused.append(refused)
    return result


def look_again(
    i: int,
    dataset: PairDataset,
    localizer: Localizer,
    use_heading: bool,
    place: tuple[float, float] | None = None,
) -> tuple[NDArray[np.uint8], PoseEstimate]:
    """Localise one pair by itself; return its image and estimate. Raises as dataset and localizer.

    place: where the camera is, degrees; default: as the pair's fix says.
    """
    pair, image, mounting = dataset.look(i)
    heading = _heading(pair) if use_heading else None
    observation = Observation.of(image, _fix(pair), heading, mounting, _camera(localizer))
    if place is not None:
        observation = replace(observation, lat=place[0], lon=place[1])
    return image, localizer.localize(observation)


def camera_places(
    dataset: PairDataset, bag: PairBag, truth: TimedTrack
) -> Iterator[tuple[float, float] | None]:
    """Yield the true (lat, lon) of each pair's camera, degrees; None if it is not known.

    truth: true positions of the antenna; without a heading, they are taken as the camera's.
    """
    stamps = np.array([stamp for stamp, *_ in bag.poses()], np.int64)
    for i, (lat, lon) in enumerate(zip(*truth.at(stamps), strict=True)):
        place: tuple[float, float] | None = None
        if math.isfinite(lat):
            with suppress(BagError):
                pair, _, mounting = dataset.look(i)
                place = float(lat), float(lon)
                if pair.heading is not None:
                    place = mounting.camera_from_antenna(*place, pair.heading)
        yield place


def _camera(localizer: Localizer) -> CameraModel | None:
    lens = localizer.spec.lens
    return lens if isinstance(lens, CameraModel) else None


def _localise(
    result: Replay,
    i: int,
    pair: Pair,
    image: NDArray[np.uint8],
    mounting: Mounting,
    heading: HeadingSample | None,
    localizer: Localizer,
    moving: PositionFilter,
) -> str:
    """Fill in row ``i``; return why the image gave no pose of its own, "" if it did."""
    camera, fix, refused = _camera(localizer), _fix(pair), ""
    result.fix.place[i] = _base(result.plane.forward(fix.lat, fix.lon), mounting, heading)
    if fix.covariance is not None:
        result.fix.covariance[i] = fix.covariance[:2, :2]
    used = moving.move(pair.stamp_ns, fix, heading, mounting)
    estimate: PoseEstimate | None = None
    try:
        estimate = localizer.localize(Observation.of(image, fix, heading, mounting, camera))
        if estimate.confidence < localizer.calibration.min_confidence:
            refused = f"confidence {estimate.confidence:.3f} is too low"
        else:
            _fill_in(result.single, i, estimate, mounting, result.plane)
    except (LocalizationError, MapError, ImageError) as error:
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
    """Gives a bag's odometry to the filter, up to each pair's stamp and a little further."""

    def __init__(self, bag: PairBag, odometry: Odometry) -> None:
        self._odometry, self._reader = odometry, VelocityReader()
        self._messages: Iterator[tuple[int, bytes]] = bag.odometry()
        self._next = next(self._messages, None)

    def until(self, stamp_ns: int) -> None:
        """Give all up to the first after a stamp."""
        while self._next is not None:
            logged_ns, data = self._next
            with suppress(RejectedInput):
                velocity = self._reader.read(deserialize(TOPICS[ODOMETRY], data))
                if velocity is not None:
                    self._odometry.add(velocity)
            self._next = next(self._messages, None)
            if logged_ns > stamp_ns:
                return
