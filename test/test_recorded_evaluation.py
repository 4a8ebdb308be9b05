"""``xview-loc evaluate BAG... --truth``: a recording beside true positions, and what evo reads of it."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from typer.testing import CliRunner

from xview_loc.bags.ros_types import NS, serialize
from xview_loc.cli.commands import app
from xview_loc.estimation.position_filter import FilteredPose, PositionFilter
from xview_loc.evaluation.recording_report import SOURCES, verdict
from xview_loc.evaluation.replay import Poses, Replay, _Velocities
from xview_loc.geodesy import LocalProjection
from xview_loc.maps import open_map
from xview_loc.maps.shift import MapShift
from xview_loc.recordings.tracks import read_timed_track
from xview_loc.simulation.drives import Wheels
from xview_loc.simulation.messages import _odometry
from xview_loc.vehicle.mounting import Mounting
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample

# Of simulated recordings.
START_NS = 1_700_000_000 * 10**9


def xview_loc(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "100"})
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A city, a drive of 100 s through it, and its pairs."""
    folder = tmp_path_factory.mktemp("recorded")
    options = ("--city", 940, "--frames", 100, "--rate", 1, "--size", 400, "--height", 64)
    assert xview_loc("simulate", folder / "sim", *options)[0] == 0
    words = (folder / "sim" / "drive", "--map", folder / "sim" / "city.tif", "--out", folder / "pairs")
    code, output = xview_loc("pairs", *words)
    assert code == 0, output
    return folder


def evaluate(recorded: Path, *more: object, truth: Path | None = None) -> tuple[int, str]:
    words = ["evaluate", recorded / "pairs" / "drive", "--map", recorded / "sim" / "city.tif"]
    positions = (truth,) if truth else (recorded / "sim" / "drive", "--truth-topic", "/truth/fix")
    return xview_loc(*words, "--truth", *positions, *more)


@pytest.fixture(scope="module")
def report(recorded: Path) -> Path:
    code, output = evaluate(recorded, "--out", recorded / "report")
    assert code == 0, output
    assert "Filtered over time, positions are" in output and "times as precise as the coarse fix" in output
    return recorded / "report"


def test_a_recording_is_localised_image_by_image_and_over_time(report: Path) -> None:
    figures = json.loads((report / "metrics.json").read_text())
    assert figures["images"] == figures["images_with_truth"] > 30
    assert figures["filtered"]["mean"] < 2.0 < figures["fix"]["mean"]
    assert figures["filtered"]["frames"] > 30 and 0.0 < figures["filtered"]["nees"] < 20.0
    for source in SOURCES:
        classes = figures[source]["by_speed"]
        # The first and the last image have no speed.
        assert 0 <= figures[source]["frames"] - sum(row["frames"] for row in classes) <= 2
    with (report / "drive" / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["filtered_error"]) for row in rows if row["filtered_error"]]
    assert math.isclose(np.mean(errors), figures["filtered"]["mean"], rel_tol=1e-6)
    assert sum(bool(row["fix_along"]) for row in rows) > 20
    for row in rows:
        parts = float(row["fix_along"] or "nan"), float(row["fix_across"] or "nan")
        if math.isfinite(parts[0]):
            assert math.isclose(math.hypot(*parts), float(row["fix_error"]), rel_tol=1e-5)
    page = (report / "report.html").read_text()
    assert page.count("<img") >= 4 and "95 % ellipse" in page and "Images that show the wrong place" in page


@pytest.mark.skipif(find_spec("evo") is None, reason="evo is not installed")
@pytest.mark.parametrize("source", SOURCES)
def test_evo_reads_the_trajectories_and_gives_the_same_error(report: Path, source: str) -> None:
    below = report / "drive"
    evo = Path(sys.executable).with_name("evo_ape")
    words = [evo, "tum", below / "truth.tum", below / f"{source}.tum", "--t_max_diff", "0.001"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    rmse = float(re.search(r"rmse\s+([\d.]+)", done.stdout).group(1))  # type: ignore[union-attr]
    figures = json.loads((report / "metrics.json").read_text())
    assert math.isclose(rmse, figures[source]["rmse"], rel_tol=0.01)


def test_another_truth_gives_other_errors(recorded: Path, tmp_path: Path) -> None:
    track = read_timed_track(recorded / "sim" / "drive", "/truth/fix")
    lines = ["stamp,lat,lon"]
    for stamp, lat, lon in zip(track.stamp_ns.tolist(), track.lat, track.lon, strict=True):
        north_lat, north_lon = LocalProjection(lat, lon).inverse(0.0, 30.0)
        lines.append(f"{stamp // 10**9}.{stamp % 10**9:09d},{north_lat:.9f},{north_lon:.9f}")
    table = tmp_path / "rtk.csv"
    table.write_text("\n".join(lines))
    code, output = evaluate(recorded, "--out", tmp_path / "report", truth=table)
    assert code == 0 and "worse than the coarse fix" in output, output
    figures = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert abs(figures["filtered"]["median"] - 30.0) < 3.0


def test_what_does_not_fit_is_said_in_one_line(recorded: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.csv"
    late.write_text("stamp,lat,lon\n100,48.1,11.5\n101,48.1,11.5\n")
    code, output = evaluate(recorded, truth=late)
    assert code == 1 and "check that both clocks agree" in output
    bag = recorded / "pairs" / "drive"
    for words, says in (
        ((bag,), "bags need --truth"),
        ((bag, "--truth", late), "bags need --truth"),
        ((bag, bag, "--truth", late, "--map", "x.tif"), "two of the bags have the same name"),
        (("--truth", late), "--truth and --map are for bags of pairs"),
        (
            (recorded / "sim" / "drive", "--truth", late, "--map", recorded / "sim" / "city.tif"),
            "xview-loc pairs",
        ),
    ):
        code, output = xview_loc("evaluate", *words)
        assert code != 0 and says in output, output


def test_a_shifted_map_is_found_and_put_right(recorded: Path, tmp_path: Path) -> None:
    shifted = tmp_path / "shifted.tif"
    with rasterio.open(recorded / "sim" / "city.tif") as city:
        profile, pixels, t = city.profile, city.read(), city.transform
        assert city.crs.is_projected
        profile["transform"] = rasterio.Affine(t.a, t.b, t.c + 2.3, t.d, t.e, t.f - 1.1)
    with rasterio.open(shifted, "w", **profile) as out:
        out.write(pixels)
    bag, truth = recorded / "pairs" / "drive", ("--truth", recorded / "sim" / "drive")
    words = ("map", "align", shifted, bag, *truth, "--truth-topic", "/truth/fix")
    code, output = xview_loc(*words)
    assert code == 0 and "kept in" in output, output
    shift = MapShift(**json.loads(Path(f"{shifted}.shift.json").read_text()))
    assert math.dist((shift.east, shift.north), (2.3, -1.1)) < 0.2
    assert 0.0 < shift.east_std < 0.2 and "east" in output and "south" in output
    # Whatever opens the map takes the shift out.
    assert "2." in xview_loc("map", "info", shifted)[1]
    lat, lon = read_timed_track(recorded / "sim" / "drive", "/truth/fix").at(np.array([START_NS]))
    with open_map(shifted) as right, open_map(recorded / "sim" / "city.tif") as city:
        assert right.info().shift == str(shift)
        a, b = (m.tile(float(lat[0]), float(lon[0]), 160, 0.48).image.astype(float) for m in (right, city))
    assert np.abs(a - b).mean() < 6.0
    # A second look at the map tells the same, as it looks at the map as it is.
    assert str(shift) in " ".join(xview_loc(*words, "--dry-run")[1].split())
    Path(f"{shifted}.shift.json").write_text('{"east": 1000}')
    code, output = xview_loc("map", "info", shifted)
    assert code == 1 and "delete it, or run xview-loc map align" in output


def test_a_map_is_not_aligned_by_few_images(recorded: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    track = read_timed_track(recorded / "sim" / "drive", "/truth/fix")
    rows = zip(track.stamp_ns[:9].tolist(), track.lat, track.lon, strict=False)
    lines = [f"{stamp // 10**9}.{stamp % 10**9:09d},{lat:.9f},{lon:.9f}" for stamp, lat, lon in rows]
    few.write_text("\n".join(["stamp,lat,lon", *lines]))
    bag, city = recorded / "pairs" / "drive", recorded / "sim" / "city.tif"
    code, output = xview_loc("map", "align", city, bag, "--truth", few)
    assert code == 1 and "20 are needed" in output and not Path(f"{city}.shift.json").exists()


def test_a_vehicle_that_stands_keeps_its_place() -> None:
    """Recordings have no pairs then, but odometry."""
    begin = START_NS
    wheels = [Wheels(begin + k * NS // 5, 0.0, 0.0) for k in range(5 * 300)]
    messages = [(one.stamp_ns, serialize("nav_msgs/msg/Odometry", _odometry(one, 0))) for one in wheels]
    odometry = Odometry(1.0)
    moving = PositionFilter(odometry)
    moving.restart(FilteredPose(48.1, 11.6, np.eye(2), 0.0, 0.01, begin))
    bag = SimpleNamespace(odometry=lambda: iter(messages))
    velocities = _Velocities(bag, odometry, moving)  # type: ignore[arg-type]
    velocities.until(begin)
    moving.move(begin, None, HeadingSample(begin, 0.0, 0.01), Mounting())
    velocities.until(begin + 290 * NS)
    far = GnssFix(begin + 290 * NS, 48.1002, 11.6, 0.0, np.diag([100.0, 100.0, 1.0]))
    moving.move(begin + 290 * NS, far, HeadingSample(begin + 290 * NS, 0.0, 0.01), Mounting())
    assert moving.pose is not None
    assert math.hypot(*LocalProjection(48.1, 11.6).forward(moving.pose.lat, moving.pose.lon)) < 2.0
    # No more than a message ahead, however often it is asked.
    for _ in range(100):
        velocities.until(begin + 290 * NS)
    assert odometry.between(begin + 291 * NS, begin + 293 * NS) is None


def straight(errors: dict[str, float], count: int = 50) -> Replay:
    """A drive to the east at 5 m/s, whose poses are so many metres too far to the north."""
    truth = np.stack([5.0 * np.arange(count), np.zeros(count)], 1)
    course, speed = np.zeros(count), np.full(count, 5.0)
    poses = [
        Poses(truth + np.array([0.0, error]), np.tile(np.eye(2), (count, 1, 1)), np.zeros(count))
        for error in errors.values()
    ]
    stamps = np.arange(count) * 10**9
    return Replay("straight", LocalProjection(48.0, 11.0), stamps, truth, course, speed, *poses, [""] * count)


def test_errors_are_split_by_the_true_course() -> None:
    drive = straight({"fix": 10.0, "single": -2.0, "filtered": 1.0})
    along, across = drive.along_across(drive.single)
    np.testing.assert_allclose(along, 0.0, atol=1e-9)
    np.testing.assert_allclose(across, 2.0)  # to the right
    np.testing.assert_allclose(drive.single.sigmas(drive.truth), 2.0)
    assert [i for i, _ in drive.worst(3)] == [0, 4, 8]


def test_the_verdict_says_what_to_do() -> None:
    from xview_loc.evaluation.recording_report import summary

    good = " ".join(verdict(summary([straight({"fix": 10.0, "single": 2.0, "filtered": 1.0})])))
    assert "10.0 times as precise" in good and "adapt" not in good
    wrong = " ".join(verdict(summary([straight({"fix": 10.0, "single": 20.0, "filtered": 15.0})])))
    assert "worse than the coarse fix" in wrong and "Do not use it here" in wrong
    some = straight({"fix": 10.0, "single": math.nan, "filtered": 9.0})
    some.filtered.place[:40] = math.nan
    some.fix.place[:40] += 100.0
    few = " ".join(verdict(summary([some])))
    assert "1.1 times as precise" in few and "10 of 50 images" in few and "No image gave a pose" in few
    lost = straight({"fix": 10.0, "single": 20.0, "filtered": math.nan})
    assert "The filter had no position" in " ".join(verdict(summary([lost])))
