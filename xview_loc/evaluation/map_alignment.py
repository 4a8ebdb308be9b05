"""Measure the constant shift of a map, from images at known places."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from xview_loc.bags.recovery import BagError
from xview_loc.camera import CameraError
from xview_loc.datasets.pairs import PairDataset
from xview_loc.errors import UserError
from xview_loc.estimation.belief import BeliefGrid
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError
from xview_loc.evaluation.replay import look_again
from xview_loc.geodesy import LocalProjection
from xview_loc.images import ImageError
from xview_loc.maps.base import MapError, MapUnavailableError
from xview_loc.maps.shift import MapShift
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.tracks import TimedTrack

# Shifts that are tried: up to this far, in cells of this side, metres.
_FARTHEST_M, _CELL_M = 12.0, 0.1
# Probability that an image shows only wrong places, and distance after which images are independent, metres.
_OUTLIER, _APART_M = 0.3, 10.0
# Least number of independent images.
_LEAST_IMAGES = 20


class AlignmentError(UserError):
    """A map cannot be aligned; the message is one clear line."""


class MapAlignment:
    """Probabilities of a map's shift, from the heat maps of images at known places."""

    def __init__(self) -> None:
        side = 2 * round(_FARTHEST_M / _CELL_M) + 1
        self._log = np.zeros((side, side))
        self._images, self._independent = 0, 0.0
        self._refused: Counter[str] = Counter()

    def add(
        self,
        dataset: PairDataset,
        bag: PairBag,
        localizer: Localizer,
        truth: TimedTrack,
        *,
        use_heading: bool = True,
        on_pair: Callable[[], object] = lambda: None,
    ) -> None:
        """Take the pairs of a bag whose true places are known; arguments as of :func:`replay`.

        The localizer must not limit its search. Raises MapUnavailableError.
        """
        last: LocalProjection | None = None
        stamps = np.array([stamp for stamp, *_ in bag.poses()], np.int64)
        for i, (lat, lon) in enumerate(zip(*truth.at(stamps), strict=True)):
            on_pair()
            if not math.isfinite(lat):
                continue
            antenna = float(lat), float(lon)
            driven = math.inf if last is None else math.hypot(*last.forward(*antenna))
            if driven < _CELL_M:
                continue
            try:
                observation, estimate, _ = look_again(i, dataset, localizer, use_heading, antenna)
            except MapUnavailableError:
                raise
            except (BagError, CameraError, ImageError, LocalizationError, MapError) as error:
                self._refused[str(error)] += 1
                continue
            last, plane = LocalProjection(*antenna), LocalProjection(observation.lat, observation.lon)
            grid = BeliefGrid(np.ones(self._log.shape, np.float32), np.full(2, -_FARTHEST_M), _CELL_M)
            likelihood = grid.heat_map_likelihood(estimate.heat_map, plane)
            weight = min(1.0, driven / _APART_M)
            self._log += weight * np.log((1.0 - _OUTLIER) * likelihood + _OUTLIER)
            self._images, self._independent = self._images + 1, self._independent + weight

    def shift(self) -> MapShift:
        """Return the shift. Raises AlignmentError if it cannot be told."""
        if self._independent < _LEAST_IMAGES:
            text = (
                f"only {self._images} images at known places can be used, worth {self._independent:.0f} that "
            )
            text += f"are {_APART_M:.0f} m apart: {_LEAST_IMAGES} are needed"
            if self._refused:
                why, count = self._refused.most_common(1)[0]
                text += f"; {count} were refused: {why}"
            raise AlignmentError(text)
        grid = BeliefGrid(
            np.exp(self._log - self._log.max()).astype(np.float32), np.full(2, -_FARTHEST_M), _CELL_M
        )
        grid.probability /= grid.probability.sum()
        east, north = map(float, grid.mean)
        east_std, north_std = map(float, np.sqrt(np.diag(grid.covariance)))
        if max(east_std, north_std) > 1.0 or max(abs(east), abs(north)) > _FARTHEST_M - 1.0:
            raise AlignmentError(
                f"the images do not agree on a shift of at most {_FARTHEST_M:.0f} m: check that the true "
                "positions are of this recording, and adapt the model to the area first"
            )
        return MapShift(east, north, east_std, north_std, self._images)
