"""``xview-loc pairs photos``: photographs with EXIF and XMP tags become pairs."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("geopic_tag_reader", reason="the extra photos is not installed")

from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.datasets.pairs import PairDataset
from xview_loc.models.specs import SPECS
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.simulation.city import build_city

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def xview_loc(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "120"})
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


def write(path: Path, size: tuple[int, int], xmp: dict[str, str] | None = None, **exif: str) -> None:
    """A photograph of noise with tags; ``size``: width, height."""
    import pyexiv2

    rng = np.random.default_rng(len(path.name))
    small = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(small, size, interpolation=cv2.INTER_CUBIC))
    image = pyexiv2.Image(str(path))
    image.modify_exif({key.replace("__", "."): value for key, value in exif.items()})
    if xmp:
        image.modify_xmp(xmp)
    image.close()


def tags(lat: str = "48/1 8/1 1908/100", second: int = 0, **more: str) -> dict[str, str]:
    return {
        "Exif__GPSInfo__GPSLatitudeRef": "N",
        "Exif__GPSInfo__GPSLatitude": lat,
        "Exif__GPSInfo__GPSLongitudeRef": "E",
        "Exif__GPSInfo__GPSLongitude": "11/1 34/1 3480/100",
        "Exif__Photo__DateTimeOriginal": f"2024:05:01 10:00:{second:02d}",
        "Exif__Photo__OffsetTimeOriginal": "+00:00",
        **more,
    }


SPHERE = {
    "Xmp.GPano.ProjectionType": "equirectangular",
    "Xmp.GPano.UsePanoramaViewer": "True",
    "Xmp.GPano.PoseHeadingDegrees": "90",
    "Xmp.GPano.PosePitchDegrees": "5",
    "Xmp.GPano.PoseRollDegrees": "-3",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    below = tmp_path / "photos"
    (below / "more").mkdir(parents=True)
    write(below / "b.jpg", (512, 256), SPHERE, **tags(second=20))
    write(below / "a.jpg", (512, 256), SPHERE, **tags(second=10))
    flat = {
        "Exif__Image__Make": "SONY",
        "Exif__Image__Model": "FDR-X1000V",
        "Exif__Photo__FocalLength": "28/10",
        "Exif__GPSInfo__GPSImgDirection": "180/1",
        "Exif__GPSInfo__GPSImgDirectionRef": "T",
    }
    write(below / "more" / "flat.JPG", (640, 360), **tags(second=30, **flat))
    write(below / "untagged.jpg", (640, 360))
    write(below / "half.jpg", (512, 128), SPHERE, **tags(second=40))
    (below / "damaged.jpg").write_bytes((below / "a.jpg").read_bytes()[:2000])
    return below


def test_panoramas_and_photographs_become_pairs(folder: Path, tmp_path: Path) -> None:
    city = build_city(7, "source", size_m=600.0)
    aerial = city.write_geotiff(tmp_path / "city.tif")
    out = tmp_path / "pairs"
    code, output = xview_loc("pairs", "photos", folder, "--map", aerial, "--out", out)
    assert code == 0, output
    assert "panoramas: 2 pairs" in output and "photographs: 1 pairs" in output
    assert "left out: 1, no position" in output and "not of the whole sphere" in output
    assert "left out: 1, the JPEG image" in output
    bag = PairBag(out / "panoramas")
    first, second = bag[0], bag[1]
    assert second.stamp_ns - first.stamp_ns == 10 * 10**9
    # A panorama's middle looks along PoseHeadingDegrees: to the east.
    assert first.heading == pytest.approx(0.0, abs=1e-9) and first.heading_std == pytest.approx(
        math.radians(10)
    )
    assert first.lat == pytest.approx(48 + 8 / 60 + 19.08 / 3600, abs=1e-7)
    assert first.tilt is not None and (first.tilt.roll, first.tilt.pitch) == pytest.approx(
        (math.radians(-3), math.radians(-5))
    )
    assert bag.session()["panorama_elevation_deg"] == [90.0, -90.0]
    pair = PairBag(out / "photographs")[0]
    assert pair.camera is not None and pair.camera.width == 640
    assert pair.heading == pytest.approx(-math.pi / 2)
    sample = PairDataset([out / "panoramas"], SPECS["ccvpe-small"])[0]
    assert sample["ground"].shape[-2:] == SPECS["ccvpe-small"].ground_size


def test_a_table_says_what_tags_do_not(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    lines = ["file,stamp,lat,lon,heading,sigma", "a.jpg,1700000000.5,48.2,16.3,270,2", "b.jpg,,,,0,"]
    table.write_text("\n".join(lines))
    out = tmp_path / "pairs"
    code, output = xview_loc("pairs", "photos", folder, "--out", out, "--table", table)
    assert code == 0 and "without a tile: 3" in output, output
    first, second = PairBag(out / "panoramas")[0], PairBag(out / "panoramas")[1]
    assert first.stamp_ns == 1_700_000_000_500_000_000 and (first.lat, first.lon) == (48.2, 16.3)
    assert first.heading is not None and abs(first.heading) == pytest.approx(math.pi)
    assert first.fix_covariance is not None and first.fix_covariance[0, 0] == pytest.approx(4.0)
    assert second.heading == pytest.approx(math.pi / 2)
    code, output = xview_loc("pairs", "photos", folder, "--out", out)
    assert code == 1 and "is there already" in output
    table.write_text("file,lat\na.jpg,north\n")
    code, output = xview_loc("pairs", "photos", folder, "--out", tmp_path / "x", "--table", table)
    assert code == 1 and "row 1 has values that are no numbers" in output


def test_a_folder_without_usable_photographs_is_refused(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = xview_loc("pairs", "photos", empty, "--out", tmp_path / "pairs")
    assert code == 1 and "has no photographs" in output
    (folder / "untagged.jpg").rename(empty / "untagged.jpg")
    code, output = xview_loc("pairs", "photos", empty, "--out", tmp_path / "pairs")
    assert code == 1 and "none of 1 photographs can be used: 1 no position" in output


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not here")
def test_real_panoramas_and_photographs(tmp_path: Path) -> None:
    code, output = xview_loc("pairs", "photos", REAL / "panoramas", "--out", tmp_path / "pairs")
    assert code == 0 and "panoramas: 2 pairs" in output and "photographs: 2 pairs" in output, output
    panorama = PairBag(tmp_path / "pairs" / "panoramas")[0]
    assert panorama.lat == pytest.approx(49.00689, abs=1e-5)
    assert panorama.heading == pytest.approx(math.radians(90.0 - 349.0 + 360.0), abs=1e-6)
    code, output = xview_loc("pairs", "photos", REAL / "ground", "--out", tmp_path / "ground")
    assert code == 1 and "no time, neither in its tags nor in the table" in output
