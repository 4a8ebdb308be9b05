"""Bags, tracks and data sets from strangers: pipes, sizes, absurd numbers and names that lead elsewhere."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xview_loc.bags.recovery import BagError, check_files, recover_bag
from xview_loc.bags.writer import BagLimits, BagWriter
from xview_loc.datasets.benchmark import read_image, read_lines, read_numbers
from xview_loc.errors import UserError
from xview_loc.recordings import tracks
from xview_loc.recordings.pair_reader import PairBag
from xview_loc.recordings.tracks import TrackError, read_timed_track, read_track

READERS: dict[str, Callable[[Path], object]] = {
    "a.gpx": read_track,
    "a.csv": read_timed_track,
    "a.mcap": read_track,
    "a.bag": read_track,
    "a.txt": read_lines,
    "a.npy": read_numbers,
    "a.jpg": lambda path: read_image(path, "a list"),
}


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refused(lambda: READERS[name](tmp_path / name))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "not a regular file" in refused(lambda: READERS[name](tmp_path / name))


@pytest.mark.parametrize("name", ["a.gpx", "a.csv", "a.txt", "a.npy", "a.jpg"])
def test_files_beyond_all_size(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(40 << 30)  # takes no disk space
    assert "at most 268 MB are read" in refused(lambda: READERS[name](tmp_path / name))


def test_bags_of_pipes(tmp_path: Path) -> None:
    (tmp_path / "bag").mkdir()
    os.mkfifo(tmp_path / "bag" / "bag_0.mcap")
    for read in (
        lambda: read_track(tmp_path / "bag"),
        lambda: PairBag(tmp_path / "bag"),
        lambda: check_files(tmp_path / "bag"),
    ):
        assert "not a regular file" in refused(read)
    with pytest.raises((BagError, OSError), match=r"not a regular file|holds no"):
        recover_bag(tmp_path / "bag", tmp_path / "out")


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "bag"
    BagWriter(folder, {"/a": "sensor_msgs/msg/NavSatFix"}, BagLimits(min_free_bytes=0)).close()
    check_files(folder)
    text = (folder / "metadata.yaml").read_text()
    for name in ("../other/bag_0.mcap", "/etc/passwd", "a/../../x"):
        (folder / "metadata.yaml").write_text(text.replace("bag_0.mcap", name))
        assert "names a file outside its folder" in refused(lambda: read_track(folder))
    for broken in ("{", "[" * 100_000, "a: &a [x]\nb: *c", "\0", "1"):
        (folder / "metadata.yaml").write_text(broken)
        assert "cannot read" in refused(lambda: read_track(folder))


@pytest.mark.parametrize(
    "row",
    [
        "1" + "0" * 30 + ",1,1",
        "1" + "0" * 5000 + ",1,1",
        "-5,1,1",
        "1,1e308,1",
        "1,nan,1",
        '1,1,"' + "x" * 200_000,
    ],
    ids=["stamp", "digits", "negative", "lat", "nan", "field"],
)
def test_absurd_rows(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.csv").write_text(f"stamp,lat,lon\n{row}\n")
    assert "row 1 has no valid stamp" in refused(lambda: read_timed_track(tmp_path / "a.csv"))


def test_a_gpx_file_that_expands(tmp_path: Path) -> None:
    entities = '<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 10}">'
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    )
    (tmp_path / "a.gpx").write_text(f"<!DOCTYPE gpx [{entities}]><gpx><name>&j;</name></gpx>")
    with pytest.raises(TrackError):
        read_track(tmp_path / "a.gpx")
    (tmp_path / "a.gpx").write_text("<gpx>" + "<a>" * 200_000 + "</a>" * 200_000 + "</gpx>")
    with pytest.raises(TrackError):
        read_track(tmp_path / "a.gpx")
    assert tracks.MAX_TRACK_BYTES <= 1 << 30


def test_arrays_that_are_damaged_or_claim_terabytes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (9_999_999_999_999,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    for content in (buffer.getvalue() + bytes(8), buffer.getvalue().replace(b"}", b" "), b"\x93NUMPY", b"x"):
        (tmp_path / "a.npy").write_bytes(content)
        assert "is not a .npy file" in refused(lambda: read_numbers(tmp_path / "a.npy"))
