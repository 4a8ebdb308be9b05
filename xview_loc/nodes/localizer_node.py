"""The ``localizer`` node: takes images, fixes and headings, publishes poses on the aerial map.

The executor's thread collects inputs and pairs them by their stamps. One worker thread decodes, localises and
publishes.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import rclpy
import torch

from xview_loc.camera import CameraError, CameraModel
from xview_loc.errors import shown
from xview_loc.estimation.fix_check import FixCheck
from xview_loc.estimation.heat_map import TileScores
from xview_loc.estimation.localizer import Limits, Localizer
from xview_loc.estimation.match_check import MatchCheck
from xview_loc.estimation.observation import (
    LocalizationError,
    LowImageryError,
    Observation,
    PoseEstimate,
)
from xview_loc.estimation.position_filter import FilteredPose, FilterOptions, PositionFilter
from xview_loc.images import Image, ImageError
from xview_loc.maps.base import MapError, NoImageryError
from xview_loc.models.base import CrossViewModel
from xview_loc.models.graph import RuntimeUnavailableError
from xview_loc.models.inputs import is_upright
from xview_loc.models.panoramas import panorama_elevation
from xview_loc.models.runtimes import choose_backend
from xview_loc.nodes import parameters
from xview_loc.nodes.checkpoints import Checkpoints
from xview_loc.nodes.diagnostics import LOG_INTERVAL_S, WARN
from xview_loc.nodes.inputs import Input
from xview_loc.nodes.outputs import FARTHEST_M, Outputs
from xview_loc.nodes.place_finder import PlaceFinder
from xview_loc.nodes.process import run
from xview_loc.nodes.requests import Requests
from xview_loc.nodes.vehicle_node import PairedFrame, VehicleNode
from xview_loc.rig import LEAST_SEEN, NOTHING_SEEN, WHOLE
from xview_loc.vehicle import messages as input_messages
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample, RejectedInput

# Longest wait for an aerial tile, which goes on loading for later images. Shorter with the filter, whose pose
# waits for the heat map.
TILE_WAIT_S, TILE_WAIT_WITH_FILTER_S = 1.0, 0.2
# ... and in a search without fixes, which has no pose that could wait.
SEARCH_TILE_WAIT_S = 10.0
# How long fixes agree with each other before one is the datum.
DATUM_AFTER_S = 3.0
# Why a frame is rejected after an error: the first that fits.
_REASONS: dict[type[Exception], str] = {
    ImageError: "image_invalid",
    CameraError: "camera_info_invalid",
    NoImageryError: "no_imagery",
    MapError: "map_unavailable",
}


class _NewestFrame:
    """Calls ``work`` with the newest frame in a thread of its own, so that the executor never waits."""

    def __init__(self, work: Callable[[PairedFrame], None]) -> None:
        """``work`` must not raise."""
        self._work = work
        self._slot: PairedFrame | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="localize", daemon=True)
        self._thread.start()

    def put(self, frame: PairedFrame) -> bool:
        """Hand over a frame; return True if it replaced a waiting one."""
        with self._changed:
            dropped = self._slot is not None
            self._slot = frame
            self._changed.notify()
        return dropped

    @property
    def closing(self) -> bool:
        """True once the thread is to end."""
        return self._closed

    def close(self) -> None:
        """Finish the current frame, drop the waiting one, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._slot is None and not self._closed:
                    self._changed.wait()
                if self._closed or self._slot is None:
                    return
                frame, self._slot = self._slot, None
            self._work(frame)


class LocalizerNode(VehicleNode):
    """Lifecycle node; config/localizer.yaml lists its parameters, docs/diagnostics.md what it reports."""

    table = parameters.LOCALIZER
    ok_message = "localising"

    def __init__(self) -> None:
        self._outputs: Outputs | None = None
        self._filter: PositionFilter | None = None
        self._finder: PlaceFinder | None = None
        super().__init__("localizer")
        self._checkpoints = Checkpoints(self, self._health, self._permissions, self._listen_to_odometry)
        self._requests = Requests(
            self,
            self._health,
            lambda: self._finder if self._state == "active" else None,
            lambda: None if self._outputs is None else self._outputs.datum,
            self._forget_heading,
        )

    def configure(self) -> None:
        """Open the map, load the model, create the outputs."""
        p = self._params
        if p["torch_threads"]:
            torch.set_num_threads(p["torch_threads"])
        model = self._checkpoints.load()
        self._spec = model.spec
        self._health.forget("seen")
        self._health.clear("no_panorama")
        if not p["map"]:
            raise parameters.ParameterError("parameter map is empty: name an aerial map")
        self._open_map(model.spec.tile_px, model.spec.gsd, model.half_extent_m / 2)
        localizer = self._first_localizer(model)
        self._limits = self._new_limits()
        self._match, self._fix_check = MatchCheck(), FixCheck()
        self._heading_replaced = False
        self._filter = self._finder = None
        if p["filter"]:
            self._filter = PositionFilter(self._odometry, self._filter_options())
            # Tiles overlap by half: what lies at their edges is matched worse.
            self._finder = PlaceFinder(self, self._health, self._odometry, model.half_extent_m, self._filter)
        if p["publish_tf"] != "none":
            self.listen_to_tf("publish_tf is set")
        self._outputs = Outputs(self, p, self._health, self._transforms)
        self._checkpoints.open(
            localizer,
            self._build_localizer,
            self._odometry,
            # The default spacing of tile centres, so that these move as much as the displaced positions.
            model.half_extent_m / 2,
            self._outputs.publish_comparison,
        )

    def check_parameters(self, values: dict[str, Any]) -> None:
        """Refuse a missing checkpoint, too."""
        if not self._checkpoints.storing:
            super().check_parameters(values)
            self._checkpoints.check(values)

    def apply_parameters(self, values: dict[str, Any]) -> None:
        """Change limits, filter and checkpoints; the rest is read where it is used."""
        super().apply_parameters(values)
        self._limits = self._new_limits()
        if self._filter is not None:
            self._filter.options = self._filter_options()
        self._checkpoints.apply(values)

    def _filter_options(self) -> FilterOptions:
        p = self._params
        return FilterOptions(p["filter_outlier"], p["filter_drift_m"], p["filter_decorrelation_m"])

    def _new_limits(self) -> Limits:
        p = self._params
        radius, floor = p["search_radius_m"], p["covariance_floor_m"]
        return Limits(
            None if radius < 0 else radius or "covariance",
            p["min_valid_fraction"],
            None if floor < 0 else floor,
        )

    def make_worker(self) -> _NewestFrame:
        """Return a worker that takes the newest image."""
        return _NewestFrame(self._localize_safely)

    def wants_heading(self) -> bool:
        """Return False if all headings are searched."""
        return bool(self._params["heading_mode"] != "unknown")

    def needs_fix(self) -> bool:
        """Return False while the filter knows the position, or can search for it."""
        if self._filter is None or self._finder is None:
            return True
        return not (self._filter.started or self._finder.possible)

    def needs_heading(self) -> bool:
        """Return False if the model searches all headings while that of odometry is not known."""
        return not (self.takes_course() and self._spec.bins > 0 and self._spec.aerial_up == "north")

    def hand_over(self, paired: PairedFrame) -> bool:
        """Give it to the worker, a heading that disagrees replaced by that of odometry and fixes."""
        better = None
        if paired.heading is not None and self._course is not None and self._checks.heading_fault:
            better = self._course.at(paired.frame.stamp_ns)
        elif not self._checks.heading_fault:
            self._heading_replaced = False
        if better is not None:
            paired = replace(paired, heading=better)
            if not self._heading_replaced:
                self._heading_replaced = True
                self.get_logger().warning("the heading of odometry and fixes is used instead")
                if self._filter is not None and paired.fix is not None:
                    # The wrong heading has carried it away.
                    self._filter.lose()
        if self.wants_heading():
            measured = better is None and not self.takes_course()
            source = "measured" if measured else "course"
            self._health.value("heading_from", "none" if paired.heading is None else source)
        return super().hand_over(paired)

    def extra_inputs(self) -> list[Input]:
        """Add odometry for the filter, a shadow trial or the heading."""
        inputs = super().extra_inputs()
        wanted = self._needs_odometry() or self.get_parameter("shadow_checkpoint").value
        return [*inputs, self._odometry_input()] if wanted else inputs

    def _needs_odometry(self) -> bool:
        return bool(self._params["filter"] or self.takes_course())

    def _odometry_input(self) -> Input:
        return Input("odom", self._on_odom, self._params["odom_source"])

    def _listen_to_odometry(self, for_candidate: bool) -> None:
        """Subscribe to odometry of an active node, or end that, as a shadow trial begins or ends."""
        wanted = self._needs_odometry() or for_candidate
        if self._inputs is not None and wanted != ("odom" in self._inputs):
            if wanted:
                self._inputs.listen(self._odometry_input())
            else:
                self._inputs.unlisten("odom")

    def stopped(self) -> None:
        """End a search, and remember the place."""
        if self._finder is not None:
            self._finder.stop()

    def before_report(self) -> None:
        """Say nothing of a search that does not go on."""
        if self._finder is None or not (self._finder.possible and self._requests.enabled):
            self._health.clear("searching")

    def release(self) -> None:
        """Close the outputs, and abandon a change of checkpoint."""
        self._checkpoints.close()
        if self._outputs is not None:
            self._outputs.close()
            self._outputs = None

    def _first_localizer(self, model: CrossViewModel) -> Localizer:
        """Build and warm up a localizer; later checkpoints use its backend too."""
        self._backend = choose_backend(self._params["backend"], self._params["device"])
        try:
            localizer = self._build_localizer(model)
            localizer.warm_up()
        except RuntimeUnavailableError as error:
            if self._params["backend"] != "auto" or self._backend == "torch":
                raise
            self.get_logger().warning(f"torch instead of {self._backend}: {error}")
            self._backend = "torch"
            localizer = self._build_localizer(model)
            localizer.warm_up()
        self._health.value("backend", f"{self._backend} {self._params['precision']}")
        return localizer

    def _build_localizer(self, model: CrossViewModel) -> Localizer:
        """Build a localizer with the open map and the parameters' settings."""
        p = self._params
        assert self._tiles is not None
        prior = {"known": 0.0, "prior": p["heading_prior_deg"], "unknown": None}[p["heading_mode"]]
        localizer = Localizer(
            self._tiles,
            model,
            heading_prior_deg=prior,
            turn_step_deg=p["turn_step_deg"],
            device=p["device"],
            backend=self._backend,
            precision=p["precision"],
            tile_wait_s=TILE_WAIT_WITH_FILTER_S if p["filter"] else TILE_WAIT_S,
        )
        if not self.needs_heading():
            # Made now, so that it is tried and warm with the first.
            _ = localizer.of_all_headings
        return localizer

    def _localizer(self, paired: PairedFrame) -> Localizer:
        """Return the localizer in use, or that of all headings if the frame lacks one.

        Read once for a frame: a change of checkpoint takes effect between two frames.
        """
        assert self._checkpoints.swap is not None
        localizer = self._checkpoints.swap.active.localizer
        return localizer.of_all_headings if self.wants_heading() and paired.heading is None else localizer

    def _on_odom(self, message: Any) -> None:
        self._read_velocity(message)
        frame, base = input_messages.velocity_frame(message), self._params["base_frame"]
        if frame and frame != base:
            text = f"odom gives velocities of {frame}; they are used as velocities of {base}"
            if self._health.condition("odom_frame", WARN, text):
                self.get_logger().warning(shown(text), throttle_duration_sec=LOG_INTERVAL_S)
        else:
            self._health.clear("odom_frame")

    def _on_image(self, name: str, message: bytes) -> None:
        if self._requests.enabled:
            super()._on_image(name, message)
        else:
            self._health.count("images_ignored")
            self._last_image_at = time.monotonic()

    # The worker's thread

    def _localize_safely(self, paired: PairedFrame) -> None:
        """Localise a frame, and count it as rejected for the reason of any error."""
        try:
            self._localize(paired)
        except RejectedInput as error:
            self._reject(error.reason, str(error))
        except tuple(_REASONS) as error:
            self._reject(next(key for kind, key in _REASONS.items() if isinstance(error, kind)), str(error))
        except LocalizationError as error:
            # HeadingRequiredError -> heading_required
            name = type(error).__name__.removesuffix("Error")
            self._reject(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), str(error))
        except Exception as error:
            # The node must survive a bug.
            if rclpy.ok():
                self._reject("internal_error", f"{type(error).__name__}: {error}")

    def _localize(self, paired: PairedFrame) -> None:
        outputs, shadow = self._outputs, self._checkpoints.shadow
        assert outputs is not None and shadow is not None
        image, seen, mounting = self._look(paired)
        fix, heading = paired.fix, paired.heading
        moving = self._filter
        if moving is not None and self._checks.odometry_fault:
            # One of the two would carry the filter away: it starts anew once they agree.
            moving.lose()
            moving = None
            self._health.clear("searching")
        localizer = self._localizer(paired)
        limits = self._doubtful() if self._fix_check.fault else self._limits
        if moving is not None:
            # A covariance that is not believed would pin the filter to the fix.
            given = replace(fix, covariance=None) if fix is not None and self._fix_check.fault else fix
            used = moving.move(paired.frame.stamp_ns, given, heading, mounting)
            if used is not given:
                fix, limits = used, self._limits
                self._warn_of_unused_fix(paired)
            if self._finder is not None and self._lost(self._finder, moving, paired):
                self._search(self._finder, paired, localizer, image, mounting)
        if fix is None:
            raise RejectedInput("fix_missing", "no usable fix, and the filter has no position either")
        self._prefetch(fix)
        observation = self._observation(paired, fix, image, mounting)
        try:
            localizer.limits = limits
            estimate = localizer.localize(observation)
            if fix is paired.fix and self._begins_to_doubt(observation, estimate, localizer):
                if moving is not None:
                    moving.lose()
                    moving = None
                localizer.limits = self._doubtful()
                estimate = localizer.localize(observation)
            if moving is not None:
                moving.observe(estimate, mounting, heading is not None)
        finally:
            # Odometry has moved the filter on, also if this image gives no heat map.
            if moving is not None and (filtered := moving.pose) is not None:
                outputs.publish_filtered(filtered)
        try:
            self._compare_with_chance(estimate, observation)
            self._check_confidence(estimate, localizer, seen)
            if self._course is not None and not estimate.at_search_border:
                self._course.add_estimate(_base_fix(estimate, mounting))
            self._publish(outputs, paired, fix, mounting, estimate)
        finally:
            # After the pose, which must not wait for it, and also if the pose is withheld.
            if heading is not None or not self.wants_heading():
                shadow.saw(observation, paired.fix, heading, mounting)
            if self._finder is not None and moving is not None and moving.doubtful and paired.fix is None:
                with suppress(RejectedInput, MapError, LocalizationError, ImageError):
                    self._search(self._finder, paired, localizer, image, mounting, beside=True)

    def _lost(self, finder: PlaceFinder, moving: PositionFilter, paired: PairedFrame) -> bool:
        """Return True if the filter has neither a position nor a fix to start from: it must be searched."""
        if (pose := moving.pose) is not None:
            if not moving.doubtful and finder.settled(pose):
                assert self._checkpoints.swap is not None
                self._checkpoints.swap.active.localizer.forget_tiles()
            return False
        if paired.fix is None:
            return True
        if not finder.enabled or not self._odometry.covers(paired.frame.stamp_ns):
            return False  # a single image is better than none
        finder.around(paired.fix)
        return True

    def _search(
        self,
        finder: PlaceFinder,
        paired: PairedFrame,
        localizer: Localizer,
        image: Image,
        mounting: Mounting,
        beside: bool = False,
    ) -> None:
        """Go on with the search for the place. Raises RejectedInput while no pose is known.

        beside: the filter has one, which is doubtful, and goes on.
        """
        stamp_ns = paired.frame.stamp_ns
        if beside and not self.needs_heading():
            # The heading may be what is wrong.
            paired = replace(paired, heading=None)
            localizer = self._localizer(paired)
        localizer.limits = self._limits
        place = GnssFix(stamp_ns, 0.0, 0.0, 0.0, None)
        observation = self._observation(paired, place, image, mounting)
        wait_s = TILE_WAIT_WITH_FILTER_S if beside else SEARCH_TILE_WAIT_S

        def score(lat: float, lon: float) -> TileScores | None:
            if isinstance(self._worker, _NewestFrame) and self._worker.closing:
                raise RejectedInput("stopped", "the search was interrupted")
            try:
                return localizer.score(replace(observation, lat=lat, lon=lon), wait_s)
            except (LowImageryError, NoImageryError):
                return None

        def take(found: FilteredPose) -> None:
            self.get_logger().info(f"the place was found at {found.lat:.6f} {found.lon:.6f}")
            if not self.needs_heading() and found.heading is not None and paired.heading is None:
                self._take_heading(found)
            if self._outputs is not None and self._outputs.datum is None:
                self._outputs.set_datum(found.lat, found.lon)

        heading = paired.heading if self._params["heading_mode"] == "known" else None
        calibration = localizer.calibration
        finder.step(stamp_ns, heading, score, calibration, mounting, take=take, beside=beside)
        raise RejectedInput("searching", "the place was found; poses begin with the next image")

    def _forget_heading(self) -> None:
        """Forget a heading of odometry that was found with a place, which is wrong."""
        if self._course is not None:
            self._course.forget_found()

    def _take_heading(self, pose: FilteredPose) -> None:
        """Let odometry's heading begin with that of a pose."""
        if self._course is not None and pose.heading is not None:
            std = math.sqrt(pose.heading_variance)
            self._course.add_heading(HeadingSample(pose.stamp_ns, pose.heading, std))

    def _look(self, paired: PairedFrame) -> tuple[Image, float, Mounting]:
        """Return the image that the model takes, the share of it that is seen, and where it was taken.

        A rig's view is that from its centre.
        """
        frame, spec, mounting = paired.frame, self._spec, self._mounting()
        shows = partial(panorama_elevation, spec=spec)
        images, rig = self._cameras.see(frame, self._transforms, self._decode_other, shows)
        self._check_panorama(frame, images.get(""))
        tilt = self._tilt.of(paired)
        angles = {"roll": tilt.roll, "pitch": tilt.pitch}
        if is_upright(rig, spec, **angles):
            return images[""], 1.0, mounting
        image, mask = rig.view(images, spec.lens, **angles)
        seen = float(mask.mean())
        if seen < LEAST_SEEN:
            raise RejectedInput("nothing_seen", f"{NOTHING_SEEN}: check their places and own_mask")
        self._health.value("seen", f"{seen:.2f}")
        x, y, _ = rig.centre.tolist()
        return image, seen, replace(mounting, camera=(x, y), camera_yaw=rig.direction(spec.lens))

    def _observation(self, paired: PairedFrame, fix: GnssFix, image: Any, mounting: Mounting) -> Observation:
        lens = self._spec.lens
        camera = lens if isinstance(lens, CameraModel) else None
        at_frame = replace(fix, stamp_ns=paired.frame.stamp_ns)
        return Observation.of(image, at_frame, paired.heading, mounting, camera)

    def _doubtful(self) -> Limits:
        """Return the limits for a fix whose covariance is not believed."""
        return replace(self._limits, search_radius_m=None)

    def _begins_to_doubt(
        self, observation: Observation, estimate: PoseEstimate, localizer: Localizer
    ) -> bool:
        """Compare a fix with the heat map; return True if its covariance is no longer believed."""
        doubted = self._fix_check.fault
        if localizer.calibration.contrast is None or self._limits.search_radius_m != "covariance":
            self._fix_check = FixCheck()
        else:
            self._fix_check.add(estimate.heat_map, observation)
        self._show_fault("fix_disagrees", self._fix_check.fault)
        return bool(self._fix_check.fault and not doubted)

    def _compare_with_chance(self, estimate: PoseEstimate, observation: Observation) -> None:
        self._match.add(estimate, observation)
        self._show_fault("no_match", self._match.fault)

    def _check_confidence(self, estimate: PoseEstimate, localizer: Localizer, seen: float) -> None:
        """Raise RejectedInput if an estimate is not confident enough; ``seen``: share of the panorama."""
        least = self._params["min_confidence"]
        if least < 0.0:
            # The checkpoint's is that of whole panoramas: a part is less sure, and its covariance says so.
            least = localizer.calibration.min_confidence if seen >= WHOLE else 0.0
        if estimate.confidence < least:
            text = f"confidence {estimate.confidence:.3f} is below {least:.3g}"
            raise RejectedInput("low_confidence", text)

    def _publish(
        self, outputs: Outputs, paired: PairedFrame, fix: GnssFix, mounting: Mounting, estimate: PoseEstimate
    ) -> None:
        if outputs.datum is None:
            # A wrong datum would stay until the end: not the first fix, which may be a receiver's old one.
            if self._agreeing.seconds < DATUM_AFTER_S:
                text = f"the origin of the map frame waits for fixes that agree for {DATUM_AFTER_S:g} s"
                raise RejectedInput("datum_pending", f"{text} (or set datum_lat and datum_lon)")
            outputs.set_datum(fix.lat, fix.lon)
        elif (away := outputs.from_datum_m(estimate.lat, estimate.lon)) > FARTHEST_M:
            text = f"the origin of the map frame is {away / 1e3:.0f} km away, further than a plane reaches"
            raise RejectedInput("datum_far", f"{text}: set datum_lat and datum_lon, or configure again")
        if estimate.at_search_border:
            self._health.count("frames_at_search_border")
            text = "the estimate lies on the edge of the search area; the true position may be outside"
            self._health.condition("search_border", WARN, text, for_s=3.0)
        outputs.publish_estimate(paired, fix, mounting, estimate)
        self._health.accepted()
        outputs.publish_status(paired, estimate)

    def _warn_of_unused_fix(self, paired: PairedFrame) -> None:
        if self._filter is not None and self._filter.doubtful:
            text = "neither fixes nor heat maps have supported the filter's position for a while"
        elif paired.fix is None:
            text = "no usable fix: the filter goes on with odometry and heat maps"
        else:
            text = "the fix lies far from the filter's position, around which images are searched instead"
        self._health.condition("filter", WARN, text, for_s=3.0)


def _base_fix(estimate: PoseEstimate, mounting: Mounting) -> GnssFix:
    """Return base_link's position by an image."""
    lat, lon, covariance = estimate.lat, estimate.lon, np.zeros((3, 3))
    if estimate.heading is not None:
        lat, lon = mounting.base_from_camera(lat, lon, mounting.heading(estimate.heading))
    covariance[:2, :2] = estimate.covariance
    return GnssFix(estimate.stamp_ns, lat, lon, 0.0, covariance)


def main(args: list[str] | None = None) -> int:
    """Run the node until a signal ends it; return the exit code."""
    return run(LocalizerNode, args)


if __name__ == "__main__":
    sys.exit(main())
