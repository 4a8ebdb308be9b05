"""The xview-loc command, run as a user runs it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from map_fixtures import TileServer, texture, write_geotiff

from xview_loc.cli.commands import main
from xview_loc.maps import open_map
from xview_loc.maps.base import MapOptions
from xview_loc.maps.store import TileStore
from xview_loc.recordings.tracks import TrackError, read_track

LAT, LON = 48.2, 16.37
ROOT = Path(__file__).resolve().parent.parent
HANGING = """
from pathlib import Path
from xview_loc.maps import base, open_map, store, tile_server

tile_server.SOCKET_TIMEOUT_S = 1000.0
aerial = open_map({url!r}, base.MapOptions(cache_dir=Path({cache!r}), deadline_s=1000.0))
tiles = store.TileStore(aerial, 64, 0.5)
try:
    tiles.around(48.0, 16.0, wait_s=1.0)
except base.MapUnavailableError as error:
    print(error)
tiles.close()
aerial.close()
"""


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


def process(*arguments: str) -> Done:
    """Run the command as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "xview_loc.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["xview-loc", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return Done(exit.value.code or 0, *capsys.readouterr())

    return call


def gpx(path: Path) -> Path:
    points = "".join(f'<trkpt lat="{LAT + i * 1e-5}" lon="{LON}"/>' for i in range(30))
    path.write_text(
        f'<gpx xmlns="http://www.topografix.com/GPX/1/1"><trk><trkseg>{points}</trkseg></trk></gpx>'
    )
    return path


def test_info(tmp_path):
    tif = write_geotiff(tmp_path / "a.tif", texture(200, 300), LAT, LON, 0.25, "EPSG:32633")
    done = process("map", "info", str(tif))
    assert done.code == 0, done.err
    assert "EPSG:32633" in done.out and "0.250 m/px" in done.out


@pytest.mark.parametrize("by", ["bbox", "track"])
def test_prefetched_tiles_serve_the_drive_offline(run, tmp_path, by):
    cache = tmp_path / "cache"
    area = (
        ["--bbox", f"{LAT - 2e-4},{LON - 2e-4},{LAT + 2e-4},{LON + 2e-4}"]
        if by == "bbox"
        else ["--track", str(gpx(tmp_path / "a.gpx")), "--radius", "20"]
    )
    with TileServer(None) as server:
        url = server.url
        done = run("map", "prefetch", url, *area, "--cache-dir", str(cache))
        assert done.code == 0, done.err
        assert "tiles" in done.out
    with open_map(url, MapOptions(cache_dir=cache, offline=True)) as offline:
        assert offline.tile(LAT + 1e-4, LON, 160, 0.48).valid_fraction == 1.0


@pytest.mark.parametrize("server_is", [{}, {"side": 512}, {"max_zoom": 18}, {"side": 512, "max_zoom": 18}])
def test_offline_needs_what_prefetch_got(run, tmp_path, server_is):
    """Whatever the server's tiles are like, and anywhere in the box, its edges included."""
    tif = write_geotiff(tmp_path / "a.tif", texture(900, 900), LAT, LON, 0.2, "EPSG:32633")
    cache, half = tmp_path / "cache", 1.5e-4
    box = f"{LAT - half},{LON - half},{LAT + half},{LON + half}"
    with TileServer(tif, **server_is) as server:
        url = server.url
        model = ["--model", "ccvpe-vigor", "--max-zoom", "20"]
        done = run("map", "prefetch", url, "--bbox", box, "--cache-dir", str(cache), *model)
        assert done.code == 0, done.err
    options = MapOptions(cache_dir=cache, offline=True, max_zoom=20)
    with open_map(url, options) as offline:
        store = TileStore(offline, 512, 0.14)
        for east in (-half, 0.0, half):
            for north in (-half, 0.0, half):
                assert store.around(LAT + north, LON + east).valid_fraction == 1.0
        store.close()


def test_track_from_a_bag():
    bag = ROOT.parent / "shared" / "data" / "tracks" / "robot_localization_test1.bag"
    if not bag.exists():
        pytest.skip("the shared bag is not here")
    points = read_track(bag)
    assert len(points) > 100
    assert max(lat for lat, _ in points) - min(lat for lat, _ in points) < 0.01


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gpx", "<gpx><trk>", "cannot read"),
        ("a.gpx", "<gpx/>", "no positions"),
        ("a.gpx", '<gpx><wpt lat="x" lon="1"/></gpx>', "valid lat and lon"),
        ("a.bag", "rubbish", "cannot read"),
        ("a.mcap", "rubbish", "cannot read"),
    ],
)
def test_bad_tracks(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TrackError, match=message):
        read_track(path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["map", "info", "/nowhere.tif"], 1, "nowhere.tif"),
        (["map", "prefetch", "/nowhere.tif", "--bbox", "1,2,1,2"], 1, "nowhere.tif"),
        (
            ["map", "prefetch", "http://127.0.0.1:9/{z}/{x}/{y}.png", "--bbox", "1,179.9,1,-179.9"],
            2,
            "too large",
        ),
        (["map", "prefetch", "http://127.0.0.1:9/{z}/{x}/{y}.png", "--bbox", "1,2,1,2"], 1, "cannot reach"),
        (["map", "info", "http://h/{z}/{x}/{y}", "--api-key-env", "HOME"], 2, "begins with XVIEW_LOC_"),
        (["map", "info", "http://h/{z}/{x}/{y}", "--api-key-env", "XVIEW_LOC_NO_SUCH"], 2, "is not set"),
        (["map", "prefetch", "http://127.0.0.1:9/{z}/{x}/{y}.png"], 2, "either --bbox or --track"),
        (["map", "prefetch", "http://127.0.0.1:9/{z}/{x}/{y}.png", "--bbox", "1,2,x,4"], 2, "four numbers"),
        (["map", "prefetch", "http://127.0.0.1:9/{z}/{x}/{y}.png", "--track", "none.gpx"], 1, "no such file"),
        (["map", "info", "http://h/{z}/{x}/{y}", "--header", "nonsense"], 2, "Name: value"),
    ],
)
def test_bad_input_is_one_line(run, arguments, code, message):
    done = run(*arguments)
    assert done.code == code
    assert message in done.err and len(done.err.strip().splitlines()) == 1


def test_a_process_ends_with_one_line_and_an_exit_code():
    done = process("map", "info", "/nowhere.tif")
    assert done.code == 1
    assert "nowhere.tif" in done.err and len(done.err.strip().splitlines()) == 1


def test_a_process_does_not_wait_for_a_hanging_server(tmp_path):
    """Neither closing the store and the map nor the interpreter's exit waits for a request's timeout."""
    with TileServer(None) as server:
        server.fault = "hang"
        code = HANGING.format(url=server.url, cache=str(tmp_path))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not answered" in done.stdout
