"""The node on real input: an orthophoto of Vienna, street photographs and a real receiver's errors.

Node and publisher are separate processes.
"""

from __future__ import annotations

import array
import math
from pathlib import Path

import cv2
import numpy as np
import pyproj
import pytest
import rasterio
from geometry_msgs.msg import PoseWithCovarianceStamped, QuaternionStamped
from map_fixtures import TileServer, reproject_geotiff, write_mbtiles, write_pmtiles
from ros_harness import NodeProcess, bench, pick_domain
from sensor_msgs.msg import CameraInfo, CompressedImage, NavSatFix
from stub_node import GSD, PEAK, SIZE

from xview_loc.geodesy import snap_to_grid
from xview_loc.maps import open_map
from xview_loc.maps.base import MapOptions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VIENNA = DATA / "aerial" / "vienna_ortho_2023_30cm.tif"
pytestmark = pytest.mark.skipif(not VIENNA.exists(), reason="the real data is not beside the repository")

DOMAIN = pick_domain() + 1
FRAMES = 12
FORMS = ("geotiff", "mbtiles", "pmtiles", "xyz")
SOURCES = ("EPSG:31256", "EPSG:3857")
# The others start a node for another map only, which test_the_same_ground_from_every_map covers.
QUICK = {("geotiff", "EPSG:31256"), ("xyz", "EPSG:3857")}


def place_of(crs: str, x: float, y: float) -> tuple[float, float]:
    lon, lat = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    return lat, lon


def plane(lat: float, lon: float) -> pyproj.Proj:
    return pyproj.Proj(proj="tmerc", lat_0=lat, lon_0=lon, k=1, ellps="WGS84")


def receiver_error() -> np.ndarray:
    """Return east and north errors of fixes on arrival (n, 2), metres: fix minus precise position."""
    folder = DATA / "tracks" / "comma2k19"
    fixes, times = np.load(folder / "live_gnss_ublox_value"), np.load(folder / "live_gnss_ublox_t")
    positions, frame_times = np.load(folder / "frame_positions"), np.load(folder / "frame_times")
    inside = (times > frame_times[0]) & (times < frame_times[-1])
    ecef = [np.interp(times[inside], frame_times, positions[:, k]) for k in range(3)]
    lon, lat, _ = pyproj.Transformer.from_crs("EPSG:4978", "EPSG:4979", always_xy=True).transform(*ecef)
    azimuth, _, distance = pyproj.Geod(ellps="WGS84").inv(lon, lat, fixes[inside, 1], fixes[inside, 0])
    azimuth = np.radians(azimuth)
    return np.stack([distance * np.sin(azimuth), distance * np.cos(azimuth)], axis=1)


def drive() -> list[tuple[float, float]]:
    """Return the receiver's fixes (lat, lon) along a diagonal through the orthophoto."""
    with rasterio.open(VIENNA) as source:
        lat, lon = place_of(source.crs.to_string(), *source.xy(source.height // 2, source.width // 2))
    error = receiver_error()
    error = error[np.linspace(0, len(error) - 1, FRAMES).astype(int)]
    along = np.linspace(-130.0, 130.0, FRAMES)
    lons, lats = plane(lat, lon)(along + error[:, 0], 0.7 * along + error[:, 1], inverse=True)
    return list(zip(lats, lons, strict=True))


def shift(a: np.ndarray, b: np.ndarray) -> float:
    """Return the offset between two nearly equal images in pixels, by least squares."""
    first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float) for image in (a, b))
    down, right = (g[8:-8, 8:-8].ravel() for g in np.gradient((first + second) / 2.0))
    difference = (first - second)[8:-8, 8:-8].ravel()
    # A linear fit is valid for images of the same content only.
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.99 and np.abs(difference).mean() < 4.0
    return math.hypot(*np.linalg.lstsq(np.stack([down, right], axis=1), difference, rcond=None)[0])


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """All forms of the map in all projections: {(form, projection): source}."""
    folder = tmp_path_factory.mktemp("maps")
    sources = {"EPSG:31256": VIENNA, "EPSG:3857": reproject_geotiff(VIENNA, folder / "3857.tif", "EPSG:3857")}
    found: dict[tuple[str, str], str] = {}
    servers = []
    for crs, tif in sources.items():
        name = crs[5:]
        found["geotiff", crs] = str(tif)
        found["mbtiles", crs] = str(write_mbtiles(folder / f"{name}.mbtiles", tif, (18, 19)))
        found["pmtiles", crs] = str(write_pmtiles(folder / f"{name}.pmtiles", tif, (18, 19)))
        servers.append(TileServer(tif, max_zoom=19).__enter__())
        found["xyz", crs] = servers[-1].url
    yield found
    for server in servers:
        server.__exit__(None, None, None)


def test_the_receivers_error_is_a_real_one():
    size = np.hypot(*receiver_error().T)
    assert len(size) > 500 and 0.5 < size.mean() < 5.0


@pytest.mark.parametrize("crs", SOURCES)
@pytest.mark.parametrize("form", FORMS)
def test_the_same_ground_from_every_map(maps, form, crs):
    """Tiles lie where the tiles of the original orthophoto lie, to a tenth of a pixel (3 cm)."""
    if (form, crs) == ("geotiff", "EPSG:31256"):
        # The original itself: against its pixels, read at projected positions.
        with open_map(VIENNA) as aerial, rasterio.open(VIENNA) as source:
            tile = aerial.tile(*drive()[4], 256, 0.3)
            rows, cols = np.mgrid[0:256, 0:256]
            lon, lat = plane(tile.lat, tile.lon)((cols - 127.5) * 0.3, (127.5 - rows) * 0.3, inverse=True)
            to_source = pyproj.Transformer.from_crs("EPSG:4326", source.crs, always_xy=True)
            x, y = to_source.transform(lon, lat)
            col, row = ~source.transform @ (x.ravel(), y.ravel())
            expected = cv2.remap(
                np.moveaxis(source.read(), 0, -1),
                (col.reshape(256, 256) - 0.5).astype(np.float32),
                (row.reshape(256, 256) - 0.5).astype(np.float32),
                cv2.INTER_CUBIC,
            )
        pairs = [(tile.image, expected)]
    else:
        with (
            open_map(VIENNA) as original,
            open_map(maps[form, crs], MapOptions(cache_dir=None)) as other,
        ):
            pairs = [
                (original.tile(*p, 256, 0.3).image, other.tile(*p, 256, 0.3).image) for p in drive()[::3]
            ]
    worst = max(shift(a, b) for a, b in pairs)
    print(f"{form} {crs}: tiles {worst:.3f} px apart")
    assert worst < 0.1


@pytest.mark.parametrize(
    ("form", "crs"),
    [
        pytest.param(form, crs, marks=() if (form, crs) in QUICK else pytest.mark.slow)
        for form in FORMS
        for crs in SOURCES
    ],
)
def test_every_frame_gets_its_pose_in_the_right_place(maps, form, crs, tmp_path):
    parameters = {
        "map": maps[form, crs],
        "model": "stub",
        # The first frame has a pose already.
        **dict(zip(("datum_lat", "datum_lon"), drive()[0], strict=True)),
        "qos_reliability": "reliable",
        "search_radius_m": 30.0,
        "map_cache_dir": str(tmp_path / "cache"),
    }
    node = NodeProcess(DOMAIN, tmp_path / "node.txt", parameters)
    try:
        worst = run_drive(node)
    finally:
        code = node.stop()
    assert code == 0 and "Traceback" not in node.log, node.log
    print(f"{form} {crs}: {FRAMES} of {FRAMES} frames, worst {worst * 100:.2f} cm")
    assert worst < 0.05


@pytest.mark.parametrize(
    ("model", "backend"),
    [("ccvpe-small", "auto"), pytest.param("ccvpe-vigor", "torch", marks=pytest.mark.slow)],
)
def test_the_real_architecture_answers_every_frame(maps, tmp_path, model, backend):
    parameters = {
        "map": maps["geotiff", "EPSG:31256"],
        "model": model,
        "backend": backend,
        # The images are of another place.
        "min_confidence": 0.0,
        # The first frame has a pose already.
        **dict(zip(("datum_lat", "datum_lon"), drive()[0], strict=True)),
        "qos_reliability": "reliable",
    }
    node = NodeProcess(DOMAIN, tmp_path / "node.txt", parameters)
    try:
        run_drive(node)
    finally:
        code = node.stop()
    assert code == 0 and "Traceback" not in node.log, node.log


@pytest.mark.parametrize(
    ("pictures", "seen"),
    [
        pytest.param("panoramas/gopro_max_*.jpg", (0.5, 0.95), id="panoramas with a cyclist"),
        pytest.param("panoramas/pinhole_*.jpg", (0.02, 0.2), id="photographs of a road"),
        pytest.param("ground/lund_*.jpg", (0.02, 0.2), id="photographs of streets"),
    ],
)
def test_real_cameras_are_levelled_and_cut(maps, tmp_path, pictures, seen):
    files = sorted(DATA.glob(pictures))
    height, width, _ = cv2.imread(str(files[0])).shape
    parameters = {
        "map": maps["geotiff", "EPSG:31256"],
        "model": "ccvpe-small",
        # The images are of another place.
        "min_confidence": 0.0,
        **dict(zip(("datum_lat", "datum_lon"), drive()[0], strict=True)),
        "qos_reliability": "reliable",
        "max_wait_s": 5.0,
        "roll_deg": 4.0,
        "pitch_deg": -2.0,
    }
    camera = None
    if "gopro" in pictures:
        # The cyclist fills the lower part.
        mask = np.zeros((height, width), np.uint8)
        mask[height * 3 // 4 :] = 255
        cv2.imwrite(str(tmp_path / "cyclist.png"), mask)
        parameters["own_mask"] = str(tmp_path / "cyclist.png")
    else:
        # As their tags say: 35 mm, for an image 36 mm wide.
        focal = width * 35.0 / 36.0
        k = [focal, 0.0, (width - 1) / 2, 0.0, focal, (height - 1) / 2, 0.0, 0.0, 1.0]
        camera = CameraInfo(width=width, height=height, k=k, distortion_model="plumb_bob")
    node = NodeProcess(DOMAIN, tmp_path / "node.txt", parameters)
    try:
        run_drive(node, files, camera, seen)
    finally:
        code = node.stop()
    assert code == 0 and "Traceback" not in node.log and "rejected" not in node.log, node.log


def run_drive(
    node: NodeProcess,
    files: list[Path] | None = None,
    camera: CameraInfo | None = None,
    seen: tuple[float, float] | None = None,
) -> float:
    """Publish the drive, waiting for each frame's pose. Return the stub's largest error in metres.

    files, camera: other images, and their calibration. seen: least and greatest share of the panorama that
    they show.
    """
    files = files or sorted((DATA / "ground").glob("lund_*.jpg"))
    photographs = [array.array("B", file.read_bytes()) for file in files]
    worst = 0.0
    with bench(DOMAIN) as b:
        if camera is not None:
            calibration = b.publisher(CameraInfo, "camera_info")
            while not b.value("camera_info_received"):
                calibration.publish(camera)
                b.wait_diagnosis()
        images = b.publisher(CompressedImage, "image")
        fixes = b.publisher(NavSatFix, "fix")
        headings = b.publisher(QuaternionStamped, "heading")
        poses = b.listen(PoseWithCovarianceStamped, "/localizer/pose")
        answers = b.listen(NavSatFix, "/localizer/fix")
        b.wait(
            lambda: (
                all(p.get_subscription_count() for p in (images, fixes, headings))
                and b.node.count_publishers("/localizer/fix")
            ),
            60.0,
            "the node",
        )
        for index, (lat, lon) in enumerate(drive()):
            stamp = b.node.get_clock().now().to_msg()
            fix = NavSatFix(latitude=lat, longitude=lon)
            fix.header.stamp = stamp
            fix.position_covariance[0] = fix.position_covariance[4] = 25.0
            fix.position_covariance_type = NavSatFix.COVARIANCE_TYPE_DIAGONAL_KNOWN
            fix.status.status = 0
            heading = QuaternionStamped()
            heading.header.stamp = stamp
            image = CompressedImage(format="jpeg", data=photographs[index % len(photographs)])
            image.header.stamp = stamp
            fixes.publish(fix)
            headings.publish(heading)
            images.publish(image)
            b.wait(lambda n=index: len(answers) > n and len(poses) > n, 60.0, f"the pose of frame {index}")
            assert answers[-1].header.stamp == stamp and poses[-1].header.stamp == stamp
            centre = snap_to_grid(lat, lon, SIZE * GSD / 4.0)
            middle = (SIZE - 1) / 2.0
            east, north = plane(*centre)(answers[-1].longitude, answers[-1].latitude)
            off = east - (PEAK[1] - middle) * GSD, north - (middle - PEAK[0]) * GSD
            worst = max(worst, math.hypot(*off))
        assert node.alive()
        if seen is not None:
            b.wait_diagnosis()
            assert seen[0] < float(b.value("seen")) < seen[1]
    return worst
