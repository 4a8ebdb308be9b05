"""Parameters of the nodes: name, default, description and range, one table for each node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node

from xview_loc.errors import reason
from xview_loc.maps.base import MapOptions, api_key, default_cache_dir
from xview_loc.models import MODEL_NAMES
from xview_loc.models.specs import TURN_STEP_DEG
from xview_loc.vehicle.input_types import AUTO, COURSE, choices

# As in models.runtimes, whose import would load torch into nodes that need no model.
BACKENDS = ("auto", "torch", "openvino", "onnxruntime")
PRECISIONS = ("float32", "bfloat16", "float16")


class ParameterError(ValueError):
    """A parameter has an unusable value; the message is one clear line."""


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``range`` is inclusive, ``choices`` lists the allowed strings.

    live: set while the node is configured, it applies at once. Others are refused then.
    start_only: can only be given when the process starts.
    """

    name: str
    default: Any
    description: str
    range: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    live: bool = False
    start_only: bool = False


# Parameters that need cleanup and configure, live ones, and those of the start.
P = Parameter
L = partial(Parameter, live=True)
S = partial(Parameter, start_only=True)
# Parameters of every node with a map and a vehicle's inputs.
_MAP: tuple[Parameter, ...] = (
    S("autostart", True, "Configure and activate on start; otherwise wait for lifecycle requests."),
    P("map", "", "Aerial map: GeoTIFF or other GDAL image, .mbtiles, .pmtiles, or a URL with {z}/{x}/{y}."),
    P("map_headers", [""], "HTTP headers for the tile server, each 'Name: value'."),
    P("map_api_key_env", "", "Environment variable XVIEW_LOC_... with the key for {key} in the map's URL."),
    S("allow_remote_maps", False, "Let whoever sets parameters name servers, and send them headers and key."),
    P("map_cache_dir", "", "Folder that caches downloaded tiles; empty: ~/.cache/xview_loc/tiles."),
    P("map_offline", False, "Use cached tiles only, never the network."),
    P("map_max_zoom", 0, "Deepest zoom level of the tile server; 0: as the source declares.", (0, 30)),
    P("map_deadline_s", 10.0, "Longest time to load one aerial tile, seconds.", (0.1, 120.0)),
    P(
        "snap_m",
        0.0,
        "Spacing of tile centres, metres; 0: a quarter of what is searched or stored.",
        (0.0, 1000.0),
    ),
)
_INPUTS: tuple[Parameter, ...] = (
    P("image_transport", AUTO, "Type of the image topic; auto: as published.", choices=choices("image")),
    L("rectified", False, "Images are free of distortion: P of camera_info is their camera matrix."),
    P(
        "heading_source",
        AUTO,
        "Type of the heading topic; auto: as published; degrees: a Float64, clockwise from north; course: no "
        "topic, but odometry's turns, aligned with the course of the fixes.",
        choices=(*choices("heading"), COURSE),
    ),
    P("odom_source", AUTO, "Type of the odom topic; auto: as published.", choices=choices("odom")),
    L("heading_std_deg", 3.0, "Standard deviation of headings that come without one, degrees.", (0.0, 180.0)),
    L("magnetic_declination_deg", 0.0, "Declination, degrees east; 0 for a true heading.", (-180.0, 180.0)),
    L("heading_offset_deg", 0.0, "Added to the heading, degrees counter-clockwise.", (-180.0, 180.0)),
    L("heading_clockwise", False, "The yaw is a compass azimuth: clockwise from north, not ENU's from east."),
    L("heading_reject", False, "Reject frames while the heading disagrees with the course of the fixes."),
    L("fix_min_status", 0, "Least NavSatStatus: -2 unknown, -1 none, 0 fix, 1 SBAS, 2 GBAS.", (-2, 2)),
    L("fix_max_sigma_m", 0.0, "Largest horizontal sigma of a fix, metres; 0: no limit.", (0.0, 10000.0)),
    L("fix_max_jump_m", 40.0, "Largest jump beyond driving at 50 m/s, metres; 0: no limit.", (0.0, 10000.0)),
    L("max_fix_age_s", 2.0, "Largest time between an image and the fix used for it, seconds.", (0.0, 60.0)),
    L("max_heading_age_s", 0.5, "Largest time between an image and its heading, or tilt, s.", (0.0, 60.0)),
    L(
        "max_wait_s",
        0.1,
        "Longest time an image waits for a later fix, heading and tilt, seconds.",
        (0.0, 5.0),
    ),
    L("max_image_delay_s", 2.0, "Image age, by the node's clock, that raises a warning, s.", (0.0, 3600.0)),
    P("qos_reliability", "best_effort", "Reliability of subscriptions.", choices=("best_effort", "reliable")),
    P("qos_depth", 5, "Queue length of the subscriptions.", (1, 1000)),
)
_CAMERAS: tuple[Parameter, ...] = (
    P(
        "cameras",
        [""],
        "Cameras of a rig, each with topics NAME/image and NAME/camera_info; empty: a single one.",
    ),
    S("rig_file", "", "YAML file with places and masks of a rig's cameras; what it lacks is read from tf."),
    L("rig_tolerance_s", 0.05, "Largest time between images that are used together, seconds.", (0.0, 1.0)),
    P("base_height_m", 0.0, "Height of base_frame above the ground, metres; for rigs.", (0.0, 10.0)),
    S("own_mask", "", "Image, white where a single camera sees the vehicle itself; empty: none."),
    P(
        "panorama_elevation_deg",
        [0.0, 0.0],
        "Elevations of a panorama's edges, degrees; 0, 0: 90, -90 if it is 2:1, else the model's.",
    ),
    P(
        "tilt_source",
        "none",
        "Roll and pitch of the vehicle; none: as roll_deg, pitch_deg; imu: topic imu; tf: from tilt_frame.",
        choices=("none", "imu", "tf"),
    ),
    P(
        "tilt_frame",
        "odom",
        "Frame whose z axis points up, in which tf moves base_frame, for tilt_source tf.",
    ),
    L(
        "roll_deg",
        0.0,
        "Roll if tilt_source gives none, degrees; positive with the right side down.",
        (-30.0, 30.0),
    ),
    L(
        "pitch_deg",
        0.0,
        "Pitch if tilt_source gives none, degrees; positive with the nose down.",
        (-30.0, 30.0),
    ),
)
_MOUNTING: tuple[Parameter, ...] = (
    P("base_frame", "base_link", "Frame of the vehicle."),
    L("antenna_x", 0.0, "Position of the antenna, metres forward of base_link.", (-100.0, 100.0)),
    L("antenna_y", 0.0, "Position of the antenna, metres left of base_link.", (-100.0, 100.0)),
    L("camera_x", 0.0, "Position of the camera, metres forward of base_link.", (-100.0, 100.0)),
    L("camera_y", 0.0, "Position of the camera, metres left of base_link.", (-100.0, 100.0)),
    L("camera_yaw_deg", 0.0, "Angle of the image's centre column, degrees left of forward.", (-180.0, 180.0)),
    P("camera_frame", "", "Frame to read the camera's pose from tf instead; empty: none."),
    P("antenna_frame", "", "Frame to read the antenna's position from tf instead; empty: none."),
    P("heading_frame", "", "Frame of the heading's sensor, to read its yaw from tf; empty: none."),
)
LOCALIZER: tuple[Parameter, ...] = (
    *_MAP,
    *_INPUTS,
    P("model", "ccvpe-small", "Name of the model."),
    L("checkpoint", "", "File of weights; empty: the shipped ones (models named -small)."),
    L("checkpoint_persist", True, "Start with the checkpoint deployed last, unless this file says another."),
    S(
        "checkpoint_dirs",
        [""],
        "Folders of checkpoints that may be set or deployed; empty: operations.md.",
    ),
    P("allow_untrained", False, "For tests: run with random weights where none are shipped."),
    P("device", "cpu", "PyTorch device, for example cpu or cuda:0."),
    P(
        "backend",
        "auto",
        "Runtime that executes the model for each image; auto: openvino if it works here, else torch.",
        choices=BACKENDS,
    ),
    P(
        "precision",
        "float32",
        "Precision of that runtime; bfloat16 not with onnxruntime, float16 on GPUs only.",
        choices=PRECISIONS,
    ),
    P("torch_threads", 0, "Number of threads of the model; 0: PyTorch's default.", (0, 256)),
    P(
        "heading_mode",
        "known",
        "known: trust the heading; prior: search around it; unknown: search all headings, subscribe to none.",
        choices=("known", "prior", "unknown"),
    ),
    P("heading_prior_deg", 72.0, "Half width of the search in mode prior, degrees.", (0.0, 180.0)),
    P(
        "turn_step_deg",
        TURN_STEP_DEG,
        "Step in which tiles of pinhole models are turned, degrees, so that they can be kept; 0: none.",
        (0.0, 20.0),
    ),
    L(
        "search_radius_m",
        0.0,
        "Search radius around the fix, metres; 0: three sigma of the fix; negative: no limit.",
        (-1.0, 1000.0),
    ),
    L(
        "covariance_floor_m",
        -1.0,
        "Standard deviation added to the heat map's, metres; negative: the checkpoint's.",
        (-1.0, 100.0),
    ),
    L("min_valid_fraction", 0.9, "Least share of a tile with imagery.", (0.0, 1.0)),
    L("min_confidence", -1.0, "Least confidence of ~/pose; negative: the checkpoint's.", (-1.0, 1.0)),
    P(
        "datum_lat",
        math.nan,
        "Latitude of the map frame's origin, degrees; nan: first fix or place found.",
    ),
    P(
        "datum_lon",
        math.nan,
        "Longitude of the map frame's origin, degrees; nan: first fix or place found.",
    ),
    *_MOUNTING,
    *_CAMERAS,
    P(
        "filter",
        False,
        "Publish ~/odometry_filtered_pose: heat maps and fixes fused over time, moved by odom's twist.",
    ),
    L("filter_outlier", 0.1, "Filter: probability that a heat map lacks the true position.", (0.001, 0.999)),
    L("filter_drift_m", 2.0, "Filter: sigma of the odometry's error after 100 m, metres.", (0.01, 100.0)),
    L(
        "filter_decorrelation_m",
        10.0,
        "Filter: distance after which the errors of heat maps are independent, metres.",
        (0.1, 1000.0),
    ),
    P(
        "start_lat",
        math.nan,
        "Where the vehicle is at the start if there is no fix, degrees; nan: as remembered.",
    ),
    P("start_lon", math.nan, "The same, longitude."),
    L(
        "start_radius_m",
        100.0,
        "Radius searched around the start, or where the way was lost, without fixes, metres; 0: none.",
        (0.0, 500.0),
    ),
    L("place_persist", True, "Remember the place for a start without a fix."),
    L("shadow_checkpoint", "", "Candidate to compare with checkpoint, without using its poses; empty: none."),
    L("shadow_every", 5, "Shadow: compare every n-th frame, if 10 m were driven since the last.", (1, 100)),
    L("shadow_frames", 200, "Shadow: number of frames compared before the verdict.", (100, 10000)),
    L(
        "shadow_policy",
        "report",
        "Shadow: report the verdict, or also promote a better candidate to checkpoint.",
        choices=("report", "promote"),
    ),
    P("map_frame", "map", "Frame of ~/pose and ~/heat_map."),
    P("odom_frame", "odom", "Frame in which odometry moves base_frame, for publish_tf."),
    P(
        "publish_tf",
        "none",
        "map_to_odom: from filter and the tf odom_frame -> base_frame; map_to_base: for want of odometry.",
        choices=("none", "map_to_odom", "map_to_base"),
    ),
    L("transform_tolerance", 1.0, "How far map_to_odom is dated ahead of the image, seconds.", (0.0, 60.0)),
    L("heat_map_rate", 1.0, "Largest rate of ~/heat_map in Hz; 0: never.", (0.0, 100.0)),
    L("overlay_rate", 5.0, "Largest rate of ~/overlay in Hz; 0: never.", (0.0, 100.0)),
)
PAIR_LOGGER: tuple[Parameter, ...] = (
    *_MAP,
    *_INPUTS,
    P("directory", "~/xview_loc_pairs", "Folder in which each recording makes a bag of its own."),
    P("record_on_start", True, "Record as soon as active; otherwise wait for ~/start."),
    P("vehicle", "", "Name of the vehicle, kept with the recording."),
    P("map_licence", "", "Licence of the imagery, kept with the recording; empty: the map's attribution."),
    P(
        "model",
        "ccvpe-small",
        "Name of the model that the stored aerial tiles are cut for.",
        choices=MODEL_NAMES,
    ),
    P("use_heading", True, "Log the heading, and only frames that have one."),
    P("use_odometry", True, "Log odom as it comes, and take the distance and standing from its speed."),
    # Written when a recording begins.
    *(replace(p, live=False) for p in _MOUNTING),
    *_CAMERAS,
    L("keyframe_distance_m", 2.0, "Distance between keyframes in metres; 0: not used.", (0.0, 1000.0)),
    L("keyframe_interval_s", 0.0, "Driving time between keyframes in seconds; 0: not used.", (0.0, 3600.0)),
    L("keyframe_turn_deg", 15.0, "Turn between keyframes in degrees; 0: not used.", (0.0, 180.0)),
    L(
        "max_width",
        2048,
        "Raw images of a single camera without own_mask have at most this width, pixels; 0: any.",
        (0, 100000),
    ),
    L("jpeg_quality", 95, "Quality at which raw images are compressed.", (1, 100)),
    P("split_mb", 1024, "Size at which a new file begins, in MB; 0: never.", (0, 1000000)),
    P("split_s", 0.0, "Time after which a new file begins, in seconds; 0: never.", (0.0, 86400.0)),
    P("quota_mb", 0, "Most that one recording may take; 0: no limit.", (0, 100000000)),
    P("min_free_mb", 2048, "What must stay free on the disk.", (0, 100000000)),
    P(
        "when_full",
        "stop",
        "At the quota or the free-space floor: stop recording, or delete the oldest file.",
        choices=("stop", "delete_oldest"),
    ),
)


def declare(node: Node, parameters: tuple[Parameter, ...]) -> dict[str, str]:
    """Declare the parameters on the node, with descriptions and ranges.

    Returns what is wrong with values given at the start, by name: their type, or they are out of range.
    """
    faults = {}
    for p in parameters:
        descriptor = ParameterDescriptor(description=p.description, read_only=p.start_only)
        constraints = ["one of " + ", ".join(p.choices)] if p.choices else []
        if not p.live:
            constraints.append("given at the start" if p.start_only else "set while unconfigured")
        descriptor.additional_constraints = "; ".join(constraints)
        if p.range and isinstance(p.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=p.range[0], to_value=p.range[1])]
        elif p.range:
            low, high = (int(v) for v in p.range)
            descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
        try:
            node.declare_parameter(p.name, p.default, descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            faults[p.name] = reason(error)
            node.declare_parameter(p.name, p.default, descriptor, ignore_override=True)
    return faults


def check_choices(parameters: tuple[Parameter, ...], values: Mapping[str, Any]) -> None:
    """Raise ParameterError if one of ``values`` is not among its parameter's choices."""
    for p in parameters:
        if p.choices and p.name in values and values[p.name] not in p.choices:
            raise ParameterError(f"{p.name} is {values[p.name]!r}; choose from {', '.join(p.choices)}")


def check_live(
    parameters: tuple[Parameter, ...], values: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Raise ParameterError if ``values`` change a parameter of a configured node that is not live."""
    for p in parameters:
        if p.name in values and not p.live and not _same(values[p.name], current[p.name]):
            raise ParameterError(f"{p.name} needs cleanup and configure")


def _same(a: Any, b: Any) -> bool:
    return bool(a == b or (a != a and b != b))


def read(node: Node, parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    """Return the current values; ParameterError if one is unusable."""
    values = {p.name: node.get_parameter(p.name).value for p in parameters}
    check_choices(parameters, values)
    if "datum_lat" in values and math.isfinite(values["datum_lat"]) != math.isfinite(values["datum_lon"]):
        raise ParameterError("set both datum_lat and datum_lon, or neither")
    if "start_lat" in values:
        start = values["start_lat"], values["start_lon"]
        if math.isfinite(start[0]) != math.isfinite(start[1]):
            raise ParameterError("set both start_lat and start_lon, or neither")
        if abs(start[0]) > 90.0 or abs(start[1]) > 180.0:
            raise ParameterError("start_lat and start_lon must be degrees: at most 90 and 180")
    if values.get("publish_tf") == "map_to_odom":
        if not values["filter"]:
            raise ParameterError("publish_tf: map_to_odom sends the filter's pose: set filter: true as well")
        if len({values["map_frame"], values["odom_frame"], values["base_frame"]}) < 3:
            raise ParameterError("map_frame, odom_frame and base_frame must differ")
    return values


def map_options(values: Mapping[str, Any]) -> MapOptions:
    """Return the options of the parameters ``map_*``. Raises ParameterError, MapOpenError."""
    headers = {}
    for line in filter(None, values["map_headers"]):
        name, colon, value = line.partition(":")
        if not colon:
            raise ParameterError("map_headers must each read 'Name: value'")
        headers[name.strip()] = value.strip()
    return MapOptions(
        headers=headers,
        api_key=api_key(values["map_api_key_env"]),
        max_zoom=values["map_max_zoom"] or None,
        deadline_s=values["map_deadline_s"],
        offline=values["map_offline"],
        confined=not values["allow_remote_maps"],
        cache_dir=Path(values["map_cache_dir"] or default_cache_dir()).expanduser(),
    )
