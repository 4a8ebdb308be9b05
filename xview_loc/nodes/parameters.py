"""The nodes' parameters: name, default, meaning and range, in one table for each node."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from xview_loc.maps.base import MapOptions
from xview_loc.models.runtimes import BACKENDS, PRECISIONS


class ParameterError(ValueError):
    """A parameter has a value that cannot be used; one clear line."""


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``range`` is inclusive, ``choices`` lists the strings allowed."""

    name: str
    default: Any
    description: str
    range: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()


P = Parameter
# What every node with a map and a vehicle's inputs has.
_MAP: tuple[Parameter, ...] = (
    P("autostart", True, "Configure and activate on start; otherwise wait for lifecycle requests."),
    P("map", "", "Aerial map: GeoTIFF or any GDAL dataset, .mbtiles, .pmtiles, or a URL with {z}/{x}/{y}."),
    P("map_headers", [""], "HTTP headers for a tile server, each 'Name: value'."),
    P("map_api_key_env", "", "Name of the environment variable whose value replaces {key} in the map's URL."),
    P("map_cache_dir", "", "Folder of the disk cache for downloaded tiles; empty: ~/.cache/xview_loc/tiles."),
    P("map_offline", False, "Use the disk cache alone, never the network."),
    P("map_max_zoom", 0, "Deepest zoom level of the tile server; 0: what the source says.", (0, 30)),
    P("map_deadline_s", 10.0, "Longest wait for one aerial tile, in seconds.", (0.1, 120.0)),
    P(
        "snap_m",
        0.0,
        "Spacing of the tile centres in metres; 0: a quarter of the part of a tile that is searched.",
        (0.0, 1000.0),
    ),
)
_INPUTS: tuple[Parameter, ...] = (
    P("image_transport", "raw", "Type of the image topic.", choices=("raw", "compressed")),
    P("heading_source", "imu", "Type of the heading topic.", choices=("imu", "quaternion", "pose")),
    P(
        "heading_std_deg",
        3.0,
        "Heading's standard deviation where its message has none, degrees.",
        (0.0, 180.0),
    ),
    P(
        "magnetic_declination_deg",
        0.0,
        "Where the heading's north lies east of true north, degrees; 0 if the heading is true.",
        (-180.0, 180.0),
    ),
    P(
        "fix_min_status",
        0,
        "Least NavSatStatus.status of a fix: -2 unknown, -1 none, 0 fix, 1 SBAS, 2 GBAS.",
        (-2, 2),
    ),
    P("fix_max_sigma_m", 0.0, "Largest horizontal standard deviation of a fix; 0: no limit.", (0.0, 10000.0)),
    P(
        "fix_max_jump_m",
        40.0,
        "Largest jump between fixes, metres, beyond 50 m/s of driving; 0: no limit.",
        (0.0, 10000.0),
    ),
    P("max_fix_age_s", 2.0, "Largest distance in time from an image to the fix used for it.", (0.0, 60.0)),
    P("max_heading_age_s", 0.5, "Same for the heading.", (0.0, 60.0)),
    P("max_wait_s", 0.1, "How long an image waits for a fix and a heading later than itself.", (0.0, 5.0)),
    P(
        "max_image_delay_s",
        2.0,
        "Age by the node's clock above which images are warned about.",
        (0.0, 3600.0),
    ),
    P(
        "qos_reliability",
        "best_effort",
        "Reliability asked of the inputs.",
        choices=("best_effort", "reliable"),
    ),
    P("qos_depth", 5, "Queue length of the inputs.", (1, 1000)),
)
LOCALIZER: tuple[Parameter, ...] = (
    *_MAP,
    *_INPUTS,
    P("model", "ccvpe-vigor", "Model's name."),
    P(
        "checkpoint",
        "",
        "Weights' file; empty: the model's shipped ones, or random ones to try the plumbing.",
    ),
    P("device", "cpu", "PyTorch device, such as cpu or cuda:0."),
    P(
        "backend",
        "auto",
        "What executes the model for each image; auto: openvino where it is installed and works, else torch.",
        choices=BACKENDS,
    ),
    P(
        "precision",
        "float32",
        "What it computes in: bfloat16 not with onnxruntime, float16 on GPUs alone.",
        choices=PRECISIONS,
    ),
    P("torch_threads", 0, "Threads the model may use; 0: PyTorch's own default.", (0, 256)),
    P(
        "heading_mode",
        "known",
        "known: trust the heading; prior: search about it; unknown: search all, subscribe none.",
        choices=("known", "prior", "unknown"),
    ),
    P(
        "heading_prior_deg",
        72.0,
        "Half width of the search about the heading in mode prior, degrees.",
        (0.0, 180.0),
    ),
    P(
        "search_radius_m",
        0.0,
        "Radius about the fix to search, metres; 0: three sigma of the fix; negative: no limit.",
        (-1.0, 1000.0),
    ),
    P(
        "covariance_floor_m",
        -1.0,
        "Standard deviation added to the heat map's, metres; negative: what the checkpoint says.",
        (-1.0, 100.0),
    ),
    P("min_valid_fraction", 0.9, "Least share of the tile that has imagery.", (0.0, 1.0)),
    P("min_confidence", 0.0, "Least confidence of a pose that is published.", (0.0, 1.0)),
    P("datum_lat", math.nan, "Latitude of the map frame's origin, degrees; nan: the first fix used."),
    P("datum_lon", math.nan, "Longitude of the map frame's origin, degrees; nan: the first fix used."),
    P("antenna_x", 0.0, "Antenna's position on the vehicle: metres forward of base_link.", (-100.0, 100.0)),
    P("antenna_y", 0.0, "Antenna's position: metres left of base_link.", (-100.0, 100.0)),
    P("camera_x", 0.0, "Camera's position on the vehicle: metres forward of base_link.", (-100.0, 100.0)),
    P("camera_y", 0.0, "Camera's position: metres left of base_link.", (-100.0, 100.0)),
    P(
        "camera_yaw_deg",
        0.0,
        "Where the image's centre column looks, degrees left of forward.",
        (-180.0, 180.0),
    ),
    P("camera_frame", "", "Read the camera's pose on the vehicle from tf, for this frame, instead."),
    P("antenna_frame", "", "Read the antenna's position from tf, for this frame, instead."),
    P(
        "filter",
        False,
        "Publish ~/odometry_filtered_pose too: heat maps and fixes over time, moved on by odom's twist.",
    ),
    P(
        "filter_outlier",
        0.1,
        "Filter: probability that a heat map shows nothing but a wrong place.",
        (0.001, 0.999),
    ),
    P(
        "filter_drift_m",
        2.0,
        "Filter: standard deviation of the odometry's error after 100 m, metres.",
        (0.01, 100.0),
    ),
    P(
        "filter_decorrelation_m",
        10.0,
        "Filter: metres after which a heat map's mistakes are no longer those of the last one.",
        (0.1, 1000.0),
    ),
    P("shadow_checkpoint", "", "Candidate to compare with checkpoint, unused otherwise; empty: none."),
    P("shadow_every", 5, "Shadow: compare on every n-th frame, where 10 m were driven.", (1, 100)),
    P("shadow_frames", 200, "Shadow: frames to compare before the verdict.", (100, 10000)),
    P(
        "shadow_policy",
        "report",
        "Shadow: say what the verdict is, or put a better candidate in use as well.",
        choices=("report", "promote"),
    ),
    P("map_frame", "map", "Frame of ~/pose and ~/heat_map."),
    P("base_frame", "base_link", "Vehicle's frame: ~/pose is its pose, ~/fix its position."),
    P(
        "publish_tf",
        False,
        "Broadcast map_frame -> base_frame on tf; leave it to a filter where there is one.",
    ),
    P("heat_map_rate", 1.0, "Largest rate of ~/heat_map in Hz; 0: never.", (0.0, 100.0)),
    P("overlay_rate", 5.0, "Largest rate of ~/overlay in Hz; 0: never.", (0.0, 100.0)),
)
PAIR_LOGGER: tuple[Parameter, ...] = (
    *_MAP,
    *_INPUTS,
    P("directory", "~/xview_loc_pairs", "Folder in which each recording makes a bag of its own."),
    P("record_on_start", True, "Record as soon as active; otherwise wait for ~/start."),
    P("vehicle", "", "Name of the vehicle, kept with the recording."),
    P("map_licence", "", "Licence of the imagery, kept with the recording; empty: the map's attribution."),
    P("tile_px", 512, "Side of the stored aerial tiles in pixels: the model's, or more.", (16, 4096)),
    P("tile_gsd", 0.14, "Their ground sample distance, m/px: the model's.", (0.01, 10.0)),
    P("use_heading", True, "Log the heading, and only frames that have one."),
    P("use_odometry", True, "Log odom as it comes, and take the distance and standing from its speed."),
    P(
        "camera_yaw_deg",
        0.0,
        "Where the image's centre column looks, degrees left of forward.",
        (-180.0, 180.0),
    ),
    P("keyframe_distance_m", 2.0, "A pair after so many metres; 0: not by distance.", (0.0, 1000.0)),
    P("keyframe_interval_s", 0.0, "A pair after so many seconds of driving; 0: not by time.", (0.0, 3600.0)),
    P("keyframe_turn_deg", 15.0, "A pair after a turn by so many degrees; 0: not by turns.", (0.0, 180.0)),
    P("jpeg_quality", 95, "Quality at which raw images are compressed.", (1, 100)),
    P("split_mb", 1024, "A new file after so many MB; 0: never.", (0, 1000000)),
    P("split_s", 0.0, "A new file after so many seconds; 0: never.", (0.0, 86400.0)),
    P("quota_mb", 0, "Most that one recording may take; 0: no limit.", (0, 100000000)),
    P("min_free_mb", 2048, "What must stay free on the disk.", (0, 100000000)),
    P(
        "when_full",
        "stop",
        "At the quota or the free-space floor: stop recording, or delete the oldest file.",
        choices=("stop", "delete_oldest"),
    ),
)


def declare(node: Node, parameters: tuple[Parameter, ...]) -> None:
    """Declare all on the node, with descriptions and ranges."""
    for p in parameters:
        descriptor = ParameterDescriptor(description=p.description)
        if p.choices:
            descriptor.additional_constraints = "one of " + ", ".join(p.choices)
        if p.range and isinstance(p.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=p.range[0], to_value=p.range[1])]
        elif p.range:
            low, high = (int(v) for v in p.range)
            descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
        node.declare_parameter(p.name, p.default, descriptor)


def check_choices(parameters: tuple[Parameter, ...], values: Mapping[str, Any]) -> None:
    """ParameterError where one of ``values`` is none of its parameter's choices."""
    for p in parameters:
        if p.choices and p.name in values and values[p.name] not in p.choices:
            raise ParameterError(f"{p.name} is {values[p.name]!r}; choose from {', '.join(p.choices)}")


def read(node: Node, parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    """All values now; ParameterError where one cannot be used."""
    values = {p.name: node.get_parameter(p.name).value for p in parameters}
    check_choices(parameters, values)
    if "datum_lat" in values and math.isfinite(values["datum_lat"]) != math.isfinite(values["datum_lon"]):
        raise ParameterError("set both datum_lat and datum_lon, or neither")
    return values


def map_options(values: Mapping[str, Any]) -> MapOptions:
    """Return the options of the parameters ``map_*``. Raises ParameterError."""
    headers = {}
    for line in filter(None, values["map_headers"]):
        name, colon, value = line.partition(":")
        if not colon:
            raise ParameterError("map_headers must each read 'Name: value'")
        headers[name.strip()] = value.strip()
    variable = values["map_api_key_env"]
    if variable and variable not in os.environ:
        raise ParameterError(f"environment variable {variable} is not set")
    folder = values["map_cache_dir"]
    cache: dict[str, Any] = {"cache_dir": Path(folder)} if folder else {}
    return MapOptions(
        headers=headers,
        api_key=os.environ[variable] if variable else None,
        max_zoom=values["map_max_zoom"] or None,
        deadline_s=values["map_deadline_s"],
        offline=values["map_offline"],
        **cache,
    )
