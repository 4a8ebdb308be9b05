"""Errors of estimates, on drives and on datasets with true poses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xview_loc.datasets.base import PoseDataset, Readable, load_readable
from xview_loc.errors import UserError
from xview_loc.estimation.heat_map import HeatMap, HeatMapError
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError, Observation, PoseEstimate
from xview_loc.geodesy import LocalProjection, wrap_angle
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import CrossViewModel, HeatMaps
from xview_loc.statistics import coverage, coverage_of_axis, mahalanobis

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DriveErrors:
    """Distances of fix and estimate from the truth, metres, one value for each frame of a drive.

    ``longitudinal`` and ``lateral`` are the estimate's signed error ahead and to the right of the estimated
    heading, ``longitudinal_sigmas`` and ``lateral_sigmas`` the same in standard deviations.
    ``mahalanobis`` is the truth's distance in standard deviations of the estimate's covariance.
    All but ``fix`` are NaN for frames that the localizer refused.
    """

    fix: Array
    estimate: Array
    longitudinal: Array
    lateral: Array
    longitudinal_sigmas: Array
    lateral_sigmas: Array
    mahalanobis: Array

    @classmethod
    def joined(cls, drives: Iterable[DriveErrors]) -> DriveErrors:
        """Join the frames of several drives."""
        parts = list(drives)
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def coverage(self, probability: float) -> float:
        """Return the share of estimates whose covariance ellipse of ``probability`` contains the truth."""
        return coverage(self.mahalanobis[np.isfinite(self.mahalanobis)], probability)

    def coverage_by_axis(self, probability: float) -> tuple[float, float]:
        """Return the shares of longitudinal and of lateral errors in the interval of ``probability``."""
        sigmas = self.longitudinal_sigmas, self.lateral_sigmas
        along, across = (coverage_of_axis(z[np.isfinite(z)], probability) for z in sigmas)
        return along, across

    @property
    def nees(self) -> float:
        """Mean squared Mahalanobis distance; 2 for honest normal errors in the plane."""
        return float(np.nanmean(self.mahalanobis**2))


@dataclass(frozen=True)
class Errors:
    """Mean, median and 95th percentile of distances in metres, over ``frames`` of them.

    ``longitudinal_...`` and ``lateral_...`` are those of the parts in the camera's viewing direction and
    across it: with a front camera, along and across the road. NaN if unknown.
    """

    frames: int
    mean: float
    median: float
    p95: float
    longitudinal_mean: float = math.nan
    longitudinal_median: float = math.nan
    lateral_mean: float = math.nan
    lateral_median: float = math.nan

    @classmethod
    def of(cls, distances: Array, parts: tuple[Array, Array] | None = None) -> Errors:
        """Summarise finite distances, and their longitudinal and lateral ``parts``; NaN if there are none."""
        known = np.isfinite(distances)
        if not known.any():
            return cls(0, math.nan, math.nan, math.nan)
        finite = distances[known]
        median, p95 = np.percentile(finite, [50, 95])
        split = [np.abs(part[known]) for part in parts or ()]
        further = [float(figure(part)) for part in split for figure in (np.mean, np.median)]
        return cls(len(finite), float(finite.mean()), float(median), float(p95), *further)


def distance_m(lat: float, lon: float, true_lat: float, true_lon: float) -> float:
    """Return the metres between two positions (degrees) at most a few kilometres apart."""
    return math.hypot(*LocalProjection(true_lat, true_lon).forward(lat, lon))


def localize_each(
    localizer: Localizer, frames: Iterable[tuple[Observation, tuple[float, float]]]
) -> Iterator[tuple[PoseEstimate, tuple[float, float]]]:
    """Yield the pose and the true (lat, lon) of each observation that the localizer does not refuse."""
    for observation, truth in frames:
        with suppress(LocalizationError):
            yield localizer.localize(observation), truth


def localize_drive(
    localizer: Localizer, frames: Iterable[tuple[Observation, tuple[float, float]]]
) -> DriveErrors:
    """Localise each observation by itself and compare it with its true (lat, lon)."""
    rows = []
    for observation, (lat, lon) in frames:
        row = [distance_m(observation.lat, observation.lon, lat, lon)]
        try:
            pose = localizer.localize(observation)
        except LocalizationError:
            row += [math.nan] * 6
        else:
            offset = np.array(LocalProjection(lat, lon).forward(pose.lat, pose.lon))
            yaw = math.nan if pose.heading is None else pose.heading
            axes = np.array([[math.cos(yaw), math.sin(yaw)], [math.sin(yaw), -math.cos(yaw)]])
            parts = axes @ offset
            sigmas = np.sqrt(np.diag(axes @ pose.covariance @ axes.T))
            row += [math.hypot(*offset), *parts, *(parts / sigmas), mahalanobis(offset, pose.covariance)]
        rows.append(row)
    return DriveErrors(*np.array(rows).reshape(-1, len(fields(DriveErrors))).T)


class EvaluationError(UserError):
    """A model or dataset that cannot be evaluated; the message is one clear line."""


@dataclass(frozen=True)
class PoseErrors:
    """A model's errors on the samples of a dataset that could be read, one value for each, in their order.

    ``index`` is the sample's in the dataset. ``distance_m`` is the distance of the finest map's maximum from
    the truth; ``longitudinal_m`` and ``lateral_m`` are the same error, signed, ahead and to the right of the
    true heading, NaN unless tiles are turned to it. ``heading_deg`` is the signed error of the orientation
    field at the maximum, counter-clockwise seen from above, NaN for a model without a field or with a given
    heading. ``probability`` is that of the map's pixel at the truth, ``nll`` the negative logarithm of its
    density, in nats, per square metre (outside the map 0 and infinity). ``mahalanobis`` is the truth's
    distance from the sub-pixel peak, by the localizer's covariance; ``longitudinal_sigmas`` and
    ``lateral_sigmas`` are its parts along and across the tile's rows, in their standard deviations, NaN
    unless tiles are turned. ``encode_ms`` and ``match_ms`` are times for the aerial tile and for the rest:
    the batch's, divided by its size.
    """

    index: NDArray[np.int64]
    distance_m: Array
    longitudinal_m: Array
    lateral_m: Array
    heading_deg: Array
    probability: Array
    nll: Array
    mahalanobis: Array
    longitudinal_sigmas: Array
    lateral_sigmas: Array
    encode_ms: Array
    match_ms: Array

    def within(self, metres: float) -> float:
        """Return the share of samples with an error below ``metres``."""
        return float((self.distance_m < metres).mean())

    def coverage(self, probability: float) -> float:
        """Return the share of samples whose covariance ellipse of ``probability`` contains the truth."""
        return coverage(self.mahalanobis, probability)

    def summary(self) -> dict[str, float]:
        """Return figures over all samples; longitudinal, lateral and heading errors only if there are any."""
        figures: dict[str, float] = {"samples": len(self.distance_m)}
        for name in ("distance_m", "longitudinal_m", "lateral_m", "heading_deg"):
            errors = Errors.of(np.abs(getattr(self, name)))
            if errors.frames:
                figures |= {f"{name}_mean": errors.mean, f"{name}_median": errors.median}
        figures |= {f"within_{metres}_m": self.within(metres) for metres in (1, 3, 5)}
        figures |= {f"coverage_{percent}": self.coverage(percent / 100) for percent in (50, 68, 95)}
        for name in ("longitudinal", "lateral"):
            deviations = getattr(self, f"{name}_sigmas")
            if np.isfinite(deviations).all():
                shares = {p: coverage_of_axis(deviations, p / 100) for p in (50, 68, 95)}
                figures |= {f"{name}_coverage_{percent}": share for percent, share in shares.items()}
        figures["nll_mean"] = float(self.nll.mean())
        times = ("encode_ms", "match_ms")
        return figures | {f"{name}_p50": float(np.median(getattr(self, name))) for name in times}


def _raise(error: UserError) -> NoReturn:
    raise error


@torch.inference_mode()
def evaluate(
    model: CrossViewModel,
    dataset: PoseDataset,
    heading_prior_deg: float | None,
    *,
    batch_size: int = 1,
    workers: int = 0,
    every: int = 1,
    on_batch: Callable[[int], object] = lambda samples: None,
    on_heat_map: Callable[[HeatMap, tuple[float, float]], object] = lambda heat_map, truth: None,
    on_unreadable: Callable[[UserError], object] = _raise,
) -> PoseErrors:
    """Match the samples of ``dataset``, without a search disc, and compare with their true poses.

    With a ``heading_prior_deg`` (see :meth:`CrossViewModel.match`) of 0, no orientation field is computed.
    With a ``batch_size`` of 1 the times are latencies. ``workers`` are processes that load data; only each
    ``every``-th sample is matched. ``on_batch`` is called with each batch's number of samples,
    ``on_heat_map`` with each sample's heat map, on a tile at latitude and longitude 0, and true (lat, lon).
    A sample that cannot be read is left out: ``on_unreadable`` is called with its error, and by default
    raises it. Raises EvaluationError if heat maps are not finite, the dataset is empty or no sample can be
    read.
    """
    if not len(dataset):
        raise EvaluationError(f"{dataset.name} has no samples")
    device = next(model.parameters()).device
    orientation = model.spec.bins > 0 and heading_prior_deg != 0
    model.eval()
    rows: list[dict[str, float]] = []
    first: UserError | None = None
    samples = Readable(dataset, range(0, len(dataset), every))
    for loaded, errors in load_readable(samples, batch_size, workers):
        for error in errors:
            on_unreadable(error)
        on_batch(len(errors))
        if loaded is None:
            first = first or errors[0]
            continue
        batch = {name: value.to(device) for name, value in loaded.items()}
        count = len(batch["aerial"])
        extra: dict[str, Any] = {name: batch[name] for name in model.extra_inputs}
        start = _now(device)
        features = model.encode_aerial(batch["aerial"])
        encoded = _now(device)
        maps = model.match(batch["ground"], features, heading_prior_deg, orientation=orientation, **extra)
        matched = _now(device)
        times = {"encode_ms": (encoded - start) / count, "match_ms": (matched - encoded) / count}
        for i in range(count):
            index = int(loaded["index"][i])
            try:
                heat_map, truth, row = _errors(model, maps, loaded, i)
            except HeatMapError as error:
                raise EvaluationError(f"{model.spec.name} on sample {index}: {error}") from None
            on_heat_map(heat_map, truth)
            rows.append({"index": index} | row | times)
        on_batch(count)
    if not rows:
        raise EvaluationError(f"no sample of {dataset.name} can be read; the first: {first}")
    return PoseErrors(**{f.name: np.array([row[f.name] for row in rows]) for f in fields(PoseErrors)})


def _errors(
    model: CrossViewModel, maps: HeatMaps, batch: dict[str, Tensor], i: int
) -> tuple[HeatMap, tuple[float, float], dict[str, float]]:
    """Return heat map, true (lat, lon) and errors (without times) of sample ``i`` of a batch."""
    size, gsd = model.spec.aerial_size, float(batch["meters_per_pixel"][i])
    # The tile's position on earth and its image do not matter.
    tile = AerialTile(np.broadcast_to(np.uint8(0), (size, size, 3)), 0.0, 0.0, gsd)
    logits = maps.logits[i].float().cpu().numpy()
    heat_map = HeatMap.from_logits(logits, maps.grid, tile, calibration=model.calibration)
    truth = batch["position"][i].numpy().astype(np.float64)
    true_heading = float(batch["heading"][i])
    down, right = (np.array(heat_map.to_tile(*heat_map.peak_pixel)) - truth) * gsd
    ahead = to_the_right = heading = math.nan
    if model.spec.aerial_up == "left":
        # The heading is counted clockwise from the tile's top edge.
        cos, sin = math.cos(true_heading), math.sin(true_heading)
        ahead, to_the_right = right * sin - down * cos, right * cos + down * sin
    if maps.orientation is not None:
        at_row, at_col = (round(x) for x in heat_map.to_tile(*heat_map.peak_pixel))
        cos, sin = maps.orientation[i, :, at_row, at_col].tolist()
        sense = -1.0 if model.spec.aerial_up == "left" else 1.0
        heading = math.degrees(wrap_angle(sense * (math.atan2(sin, cos) - true_heading)))
    tempered = logits / model.calibration.temperature(heat_map.contrast)
    row, col = (round(float(x)) for x in (truth - maps.grid.origin) / maps.grid.scale)
    log_probability = -math.inf
    if 0 <= row < tempered.shape[0] and 0 <= col < tempered.shape[1]:
        # From the logits, since a small probability would underflow.
        shares = torch.from_numpy(tempered).double().flatten().log_softmax(0).view(tempered.shape)
        log_probability = float(shares[row, col])
    offset = np.subtract(tile.pixel_to_enu(*truth), heat_map.to_enu(*heat_map.peak))
    covariance = heat_map.covariance(model.calibration.floor_m)
    deviations = offset / np.sqrt(np.diag(covariance))
    along, across = deviations if model.spec.aerial_up == "left" else (math.nan, math.nan)
    errors = {
        "distance_m": math.hypot(down, right),
        "longitudinal_m": ahead,
        "lateral_m": to_the_right,
        "heading_deg": heading,
        "probability": math.exp(log_probability),
        "nll": 2.0 * math.log(heat_map.metres_per_pixel) - log_probability,
        "mahalanobis": mahalanobis(offset, covariance),
        "longitudinal_sigmas": along,
        "lateral_sigmas": across,
    }
    return heat_map, tile.pixel_to_latlon(*truth), errors


def _now(device: torch.device) -> float:
    """Return the time in milliseconds, after waiting for the device's pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
