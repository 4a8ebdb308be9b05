"""Checks of an installation, a map and a checkpoint, without ROS.

Each check returns a :class:`Finding`. Packages that may be missing are imported inside the checks.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from xview_loc.children import isolated_python
from xview_loc.errors import reason

if TYPE_CHECKING:
    from xview_loc.maps.base import AerialMap, AerialTile, MapOptions
    from xview_loc.models.base import CrossViewModel
    from xview_loc.models.runtimes import Backend

# Required packages of setup.py, and their modules.
PACKAGES = {
    "httpx": "httpx",
    "lightning-fabric": "lightning_fabric",
    "lz4": "lz4",
    "matplotlib": "matplotlib",
    "mcap": "mcap",
    "numpy": "numpy",
    "opencv-python-headless": "cv2",
    "pmtiles": "pmtiles",
    "pyproj": "pyproj",
    "rasterio": "rasterio",
    "rich": "rich",
    "rosbags": "rosbags",
    "ruamel.yaml": "ruamel.yaml",
    "safetensors": "safetensors",
    "simplejpeg": "simplejpeg",
    "torch": "torch",
    "typer": "typer",
    "zstandard": "zstandard",
}
_MESSAGE_PACKAGES = ("diagnostic_msgs", "geometry_msgs", "nav_msgs", "sensor_msgs", "std_msgs")
MESSAGES = (*(f"{name}.msg" for name in _MESSAGE_PACKAGES), "std_srvs.srv")
# GDAL drivers: without the first no map opens; the others are for maps in their formats.
DRIVERS_NEEDED = ("GTiff", "VRT")
DRIVERS_USEFUL = ("COG", "JPEG", "PNG", "WEBP", "JP2OpenJPEG")
# Default of the node's parameter, see config/localizer.yaml.
MIN_VALID_FRACTION = 0.9
CODECS = (".png", ".jpg", ".webp")
TIMED_FRAMES = 5
PROBE_TIMEOUT_S = 60.0
_PROBE = "import rclpy; print(rclpy.get_rmw_implementation_identifier())"


class Level(str, Enum):
    """Severity; with a failure the localizer does not work."""

    ok = "ok"
    warning = "warning"
    failure = "failure"


@dataclass(frozen=True)
class Finding:
    """Result of a check; ``advice`` says what to do, "" for nothing."""

    level: Level
    check: str
    text: str
    advice: str = ""


def advice_for(module: str) -> str:
    """Return how to install a module that cannot be imported."""
    names = {imported: name for name, imported in PACKAGES.items()}
    if module in names:
        return f"pip install {names[module]}"
    return "source /opt/ros/<distribution>/setup.bash, or pip install 'xview_loc[ros]'"


def check_packages() -> list[Finding]:
    """Check Python and the packages that all other checks need."""
    python = Finding(Level.ok, "python", f"{platform.python_version()}, {sys.executable}")
    broken = {}
    for name, module in PACKAGES.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # an incompatible binary may raise any error, not only ImportError
            broken[name] = reason(error)
    if broken:
        text = "; ".join(f"{name}: {why}" for name, why in broken.items())
        return [python, Finding(Level.failure, "packages", text, f"pip install {' '.join(broken)}")]
    shown = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "opencv-python-headless", "rasterio"))
    return [python, Finding(Level.ok, "packages", f"all {len(PACKAGES)} are installed ({shown})")]


def check_installation(
    source: str, model: str | None, checkpoint: Path | None, options: MapOptions
) -> Iterator[Finding]:
    """Check formats, projections, ROS, the tile cache, weights, the map ``source`` and the frame rate.

    Without a ``source`` ("") no map is checked. ``model`` is by default the checkpoint's, or ``ccvpe-small``;
    ``checkpoint`` by default the file shipped with the model.
    """
    yield _torch()
    yield _drivers()
    yield _codecs()
    yield _projections()
    yield from _ros()
    yield _cache(options, needed="{z}" in source)
    net, finding = _weights(model or (None if checkpoint else "ccvpe-small"), checkpoint)
    yield finding
    # Do not export random weights: the export would never be used again.
    trained = finding.level is Level.ok
    tile = None
    if source:
        tile, finding = _map(source, options, net)
        yield finding
    if net is not None:
        import torch

        from xview_loc.models.runtimes import choose_backend

        for device in ("cpu", "cuda:0") if torch.cuda.is_available() else ("cpu",):
            yield from _rate(net, tile, device, choose_backend("auto", device) if trained else "torch")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of the system"  # apt's OpenCV has another package name


def _torch() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(Level.ok, "torch", f"{torch.__version__}, no CUDA device: models run on the CPU")
    names = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    return Finding(Level.ok, "torch", f"{torch.__version__}, CUDA {torch.version.cuda}: {names}")


def _drivers() -> Finding:
    import rasterio

    with rasterio.Env() as env:
        present = env.drivers()
    gdal = f"GDAL {rasterio.__gdal_version__}"
    needed = [name for name in DRIVERS_NEEDED if name not in present]
    missing = [name for name in (*DRIVERS_NEEDED, *DRIVERS_USEFUL) if name not in present]
    if not missing:
        text = f"{gdal} with {', '.join((*DRIVERS_NEEDED, *DRIVERS_USEFUL))}"
        return Finding(Level.ok, "map formats", text)
    advice = "maps in these formats cannot be opened; pip's rasterio has them all"
    level = Level.failure if needed else Level.warning
    return Finding(level, "map formats", f"{gdal} lacks {', '.join(missing)}", advice)


def _codecs() -> Finding:
    """Check that OpenCV decodes the images of tile pyramids."""
    import cv2

    if missing := [suffix for suffix in CODECS if not cv2.haveImageWriter(f"tile{suffix}")]:
        text = f"OpenCV {cv2.__version__} cannot decode {', '.join(missing)}"
        return Finding(Level.warning, "tile formats", text, "tile pyramids in these formats cannot be read")
    return Finding(Level.ok, "tile formats", f"OpenCV {cv2.__version__} decodes {', '.join(CODECS)}")


def _projections() -> Finding:
    """Check GDAL's and pyproj's PROJ, which do not work with a database of another version."""
    advice = "unset PROJ_DATA and PROJ_LIB, which may point to another PROJ's database"
    try:
        from rasterio.warp import transform

        from xview_loc.geodesy import LocalProjection

        # One thousandth of a degree north of 48 N is 111.18 m on the ellipsoid.
        _, north = LocalProjection(48.0, 15.0).forward(48.001, 15.0)
        (x,), _ = transform("EPSG:4326", "EPSG:32633", [15.0], [48.0])
    except Exception as error:  # CRSError, ProjError and CPLE errors have no common base class
        return Finding(Level.failure, "projections", reason(error), advice)
    if abs(float(north) - 111.18) > 0.1 or abs(x - 500_000.0) > 0.1:
        return Finding(Level.failure, "projections", "PROJ computes wrong coordinates", advice)
    return Finding(Level.ok, "projections", "GDAL's PROJ and pyproj's agree with known coordinates")


def _ros() -> Iterator[Finding]:
    if importlib.util.find_spec("rclpy") is None:
        advice = "for the nodes, source /opt/ros/<distribution>/setup.bash"
        yield Finding(Level.warning, "ros", "no rclpy", advice)
        return
    # In a separate process: loading a missing middleware ends the process.
    try:
        probe = subprocess.run(
            isolated_python(_PROBE), capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        text = f"rclpy does not answer within {PROBE_TIMEOUT_S:g} s"
        yield Finding(Level.failure, "ros", text, "check RMW_IMPLEMENTATION and the network configuration")
        return
    if probe.returncode:
        said = " ".join(probe.stderr.split())[-300:]
        advice = "source the setup.bash of the distribution for this Python; check RMW_IMPLEMENTATION"
        yield Finding(Level.failure, "ros", f"rclpy cannot be used: {said}", advice)
        return
    rmw = probe.stdout.strip()
    missing = [name.partition(".")[0] for name in MESSAGES if not _importable(name)]
    distribution = os.environ.get("ROS_DISTRO", "")
    text = f"rclpy {_version('rclpy')} with {rmw}{f', {distribution}' if distribution else ''}"
    if missing:
        wanted = " ".join(f"ros-{distribution or '<distribution>'}-{n.replace('_', '-')}" for n in missing)
        yield Finding(Level.failure, "ros", f"{text}; without {', '.join(missing)}", f"install {wanted}")
    else:
        yield Finding(Level.ok, "ros", text)
    if not _importable("tf2_msgs.msg"):
        advice = "needed only for the parameters publish_tf, camera_frame, antenna_frame and heading_frame"
        yield Finding(Level.warning, "tf", "no tf2_msgs", advice)
    yield _dds_profile(rmw)


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def profile_variables() -> tuple[str, ...]:
    """Return the environment variables that Fast DDS takes its profile from, the preferred one first."""
    if os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy"):  # Fast DDS 2
        return ("FASTRTPS_DEFAULT_PROFILES_FILE",)
    return "FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"


def _dds_profile(rmw: str) -> Finding:
    if "fastrtps" not in rmw:
        return Finding(Level.ok, "dds profile", f"not needed by {rmw}")
    variables = profile_variables()
    name = next((name for name in variables if os.environ.get(name)), None)
    if name is None:
        text = "none: the default settings lose camera images"
        advice = f"export {variables[0]}=<config/fastdds.xml>, also for the camera driver "
        advice += "(localize.launch.py exports it for the node)"
        return Finding(Level.warning, "dds profile", text, advice)
    path = os.environ[name]
    try:
        ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        return Finding(Level.failure, "dds profile", f"{name}: {path}: {reason(error)}", "correct the path")
    return Finding(Level.ok, "dds profile", f"{name}={path}")


def _cache(options: MapOptions, needed: bool) -> Finding:
    """Check the folder of downloaded tiles, which only tile servers need."""
    assert options.cache_dir is not None
    existing = options.cache_dir.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        level = Level.failure if needed else Level.warning
        text = f"{options.cache_dir} cannot be written: {error.strerror}"
        advice = "choose another one with --cache-dir, and map_cache_dir for the node"
        return Finding(level, "tile cache", text, advice)
    free = shutil.disk_usage(existing).free / 1e6
    text = f"{options.cache_dir}, {free:.0f} MB free"
    if free < options.cache_mb:
        advice = f"free some space: the cache may grow to {options.cache_mb:.0f} MB"
        return Finding(Level.warning, "tile cache", text, advice)
    return Finding(Level.ok, "tile cache", text)


def _weights(model: str | None, checkpoint: Path | None) -> tuple[CrossViewModel | None, Finding]:
    """Load the model with its weights; None if they cannot be used."""
    from xview_loc.estimation.observation import LocalizationError
    from xview_loc.models import create_model
    from xview_loc.models.checkpoint import CheckpointError, load_checkpoint, shipped_checkpoint

    path = checkpoint or (shipped_checkpoint(model) if model else None)
    try:
        if path is None:
            assert model is not None
            advice = "give a file with --checkpoint; docs/benchmarks.md says where the authors' are"
            text = f"none is shipped with {model}, so the node would not start"
            return create_model(model), Finding(Level.failure, "checkpoint", text, advice)
        loaded = load_checkpoint(path, model)
        _localizer(loaded.model, None, "cpu", "torch").warm_up()
    except CheckpointError as error:
        advice = "give the model it was made for with --model, or download the file again"
        return None, Finding(Level.failure, "checkpoint", str(error), advice)
    except (LocalizationError, RuntimeError) as error:
        text = f"checkpoint {path} does not work: {reason(error)}"
        return None, Finding(Level.failure, "checkpoint", text, "download the file again")
    except ValueError as error:
        return None, Finding(Level.failure, "checkpoint", str(error), "correct --model")
    text = f"{loaded.model.spec.name}, sha256 {loaded.sha256[:12]}, complete and finite: {path}"
    if loaded.note:
        text += f"; {loaded.note}"
    return loaded.model, Finding(Level.ok, "checkpoint", text)


def _map(source: str, options: MapOptions, net: CrossViewModel | None) -> tuple[AerialTile | None, Finding]:
    """Read an aerial tile for the model; None if there is none."""
    from xview_loc.maps import open_map
    from xview_loc.maps.base import MapError

    try:
        # Without the cache, to ask the server.
        with open_map(source, replace(options, cache_dir=None)) as aerial:
            return _read_map(aerial, options, net)
    except MapError as error:
        advice = "check the file"
        if "{z}" in source:
            # Some servers of a single region answer the request for the whole world with an error.
            advice = "check URL, key and network; or download a covered area with xview-loc map prefetch"
        return None, Finding(Level.failure, "map", str(error), advice)


def _read_map(
    aerial: AerialMap, options: MapOptions, net: CrossViewModel | None
) -> tuple[AerialTile | None, Finding]:
    from xview_loc.maps.base import NoImageryError
    from xview_loc.maps.pyramid import PyramidMap
    from xview_loc.maps.sources import TileId
    from xview_loc.maps.tile_server import HttpSource
    from xview_loc.models import create_model

    facts = aerial.info()
    if facts.bounds is None:
        if not isinstance(aerial, PyramidMap) or not isinstance(aerial.source, HttpSource):
            text = f"{facts.kind}, opened; its coverage is not known, so no tile was read"
            return None, Finding(Level.warning, "map", text)
        started = time.perf_counter()
        found = aerial.source.get([TileId(0, 0, 0)], time.monotonic() + options.deadline_s)
        taken = (time.perf_counter() - started) * 1e3
        what = "imagery" if any(found.values()) else "no imagery, as for a single region"
        text = f"{facts.kind}: answered one request (tile 0/0/0) in {taken:.0f} ms: {what}"
        return None, Finding(Level.ok, "map", text)
    spec = (net or create_model("ccvpe-small")).spec
    south, west, north, east = facts.bounds
    # The covered area may have any shape: try the middle, then half-way to the corners.
    for v, u in ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        place = south + v * (north - south), west + u * (east - west)
        started = time.perf_counter()
        try:
            tile = aerial.tile(*place, spec.tile_px, spec.gsd)
        except NoImageryError:
            continue
        taken = (time.perf_counter() - started) * 1e3
        text = (
            f"{facts.kind}, {facts.resolution_m or math.nan:.3f} m/px (the model's tiles: {spec.gsd:.3f}); "
            f"tile of {tile.size_px} px in {taken:.0f} ms, {tile.valid_fraction:.0%} imagery"
        )
        if tile.valid_fraction < MIN_VALID_FRACTION:
            advice = "the node rejects tiles below min_valid_fraction: use a map that covers more"
            return tile, Finding(Level.warning, "map", text, advice)
        return tile, Finding(Level.ok, "map", text)
    text = f"{facts.kind}, no imagery in the middle and half-way to the corners"
    return None, Finding(Level.warning, "map", text, "check its bounds with xview-loc map info")


def _localizer(net: CrossViewModel, tile: AerialTile | None, device: str, backend: Backend) -> Any:
    """Make a localizer on a single tile; None for noise."""
    import numpy as np

    from xview_loc.estimation.localizer import Localizer
    from xview_loc.maps.base import AerialMap, AerialTile

    side = net.spec.tile_px
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    only = tile or AerialTile(noise, 0.0, 0.0, net.spec.gsd)

    class OneTile(AerialMap):
        def tile(self, lat: float, lon: float, size_px: int, gsd: float) -> AerialTile:
            return only

    return Localizer.open(OneTile(), net, min_valid_fraction=0.0, device=device, backend=backend)


def _rate(net: CrossViewModel, tile: AerialTile | None, device: str, backend: Backend) -> Iterator[Finding]:
    """Measure the frame rate with this backend, or with PyTorch if it is not available."""
    from xview_loc.models.graph import RuntimeUnavailableError

    try:
        yield _rate_of(net, tile, device, backend)
    except RuntimeUnavailableError as error:
        yield Finding(Level.warning, "backend", f"not {backend}: {reason(error)}", "torch is used instead")
        yield _rate_of(net, tile, device, "torch")


def _rate_of(net: CrossViewModel, tile: AerialTile | None, device: str, backend: Backend) -> Finding:
    """Measure the frame rate on an encoded tile, as for most frames of a drive."""
    import numpy as np

    from xview_loc.camera import CameraModel
    from xview_loc.estimation.observation import LocalizationError, Observation

    height, width = net.spec.ground_size
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    camera = CameraModel(width, height, (width, 0, width / 2, 0, width, height / 2, 0, 0, 1))
    place = (tile.lat, tile.lon) if tile else (0.0, 0.0)
    frame = Observation(image, *place, heading=0.0, camera=camera)
    durations = []
    try:
        localizer = _localizer(net, tile, device, backend)
        localizer.localize(frame)
        for _ in range(TIMED_FRAMES):
            started = time.perf_counter()
            localizer.localize(frame)
            durations.append(time.perf_counter() - started)
    except (LocalizationError, RuntimeError) as error:
        return Finding(Level.failure, "rate", f"{net.spec.name} on {device}: {reason(error)}")
    median = statistics.median(durations)
    rate = f"{1.0 / median:.1f} Hz ({median * 1e3:.0f} ms per frame)"
    return Finding(Level.ok, "rate", f"{net.spec.name} with {backend} on {device}: {rate}")
