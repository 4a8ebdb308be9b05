"""Another user of the machine, in folders that both can write to: what they plant is not trusted."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from xview_loc.bags.writer import BagWriter
from xview_loc.datasets.pairs import RecordCache
from xview_loc.estimation.deployment_record import DeploymentRecord, RecordError, Weights
from xview_loc.files import whole_folder, write_whole
from xview_loc.maps.sources import TileId
from xview_loc.maps.tile_server import TileCache
from xview_loc.models.checkpoint import load_model
from xview_loc.models.graph import FrameSettings, RuntimeUnavailableError, kept_graph

OTHER = "54321"
AS_OTHER = ["setpriv", "--reuid", OTHER, "--regid", OTHER, "--clear-groups", "--"]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="becoming another user needs root and setpriv",
)


def by_other(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script as the other user, its arguments are $1 and so on."""
    command = [*AS_OTHER, "sh", "-c", f"umask 0; {script}", "sh", *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)


def plant(script: str, *arguments: Path) -> None:
    done = by_other(script, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp: everyone can write, and delete only their own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@pytest.fixture
def own(shared: Path) -> Path:
    """This user's folder, which the other one can look into."""
    folder = shared / "own"
    folder.mkdir(0o755)
    return folder


@pytest.mark.parametrize("script", ["mkdir $1/xview_loc", "ln -s $2 $1/xview_loc"])
def test_a_cache_of_graphs_is_not_shared(
    shared: Path, own: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "graphs").mkdir()
    models = [own / "graphs" / f"{number}.onnx" for number in range(50)]
    for path in models:
        path.write_text("a model of this user")
    plant(script, shared, own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
    with pytest.raises(RuntimeUnavailableError, match=r"another user can write to .*xview_loc"):
        kept_graph(load_model("ccvpe-small").model, FrameSettings())
    assert all(path.exists() for path in models)


def test_a_planted_record_is_not_followed(shared: Path, own: Path) -> None:
    mine, folder = own / "mine.json", shared / "xview_loc"
    record = DeploymentRecord("ccvpe-small", "", Weights("/weights", "00", "deploy"))
    record.save(mine)
    assert DeploymentRecord.load(mine) == record
    plant("mkdir $1; cat $2 > $1/localizer.json; ln -s $2 $1/link.json", folder, mine)
    for name in ("localizer.json", "link.json"):
        with pytest.raises(RecordError, match=f"another user can write to {folder}"):
            DeploymentRecord.load(folder / name)
    # A link is replaced; where it leads to stays.
    before = mine.read_bytes()
    DeploymentRecord("ggcvt-vigor", "", Weights("/others", "11")).save(folder / "link.json")
    assert mine.read_bytes() == before


def test_what_is_written_belongs_to_its_user(own: Path) -> None:
    """Also where the environment allows everyone everything."""
    before = os.umask(0)
    try:
        path = own / "xview_loc" / "localizer.json"
        record = DeploymentRecord("ccvpe-small", "", Weights("", ""))
        record.save(path)
        write_whole(own / "file", b"content")
    finally:
        os.umask(before)
    assert DeploymentRecord.load(path) == record
    for target in (path, own / "file"):
        assert by_other('echo > "$1"', target).returncode != 0
        assert by_other('rm -f "$1"', target).returncode != 0


@pytest.mark.parametrize("script", ["mkdir $1/.partial", "ln -s $2 $1/.partial"])
def test_a_bag_is_not_made_where_others_can_reach(shared: Path, own: Path, script: str) -> None:
    (own / "drive").mkdir()
    (own / "drive" / "recording").write_text("a bag of this user")
    plant(script, shared, own)
    with (
        pytest.raises(PermissionError, match=r"another user can write to it.*\.partial"),
        whole_folder(shared / "drive") as partial,
    ):
        BagWriter(partial, {}).close()
    assert (own / "drive" / "recording").exists()
    assert not (shared / "drive").exists()


def test_a_cache_of_tiles_that_others_can_write(
    shared: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tile, cache = TileId(3, 4, 5), shared / "tiles" / "map"
    with caplog.at_level(logging.WARNING):
        TileCache(own / "tiles" / "map", 10).write(tile, b"image")
        TileCache(own / "tiles" / "map", 10)
    assert not caplog.messages
    assert by_other('cat "$1"', *own.rglob("*.tile")).returncode != 0
    target = own / "target"
    target.write_text("a file of this user")
    plant("mkdir -p $1/3/4; ln -s $2 $1/3/4/5.tile; mkfifo $1/tile_side", cache, target)
    with caplog.at_level(logging.WARNING):
        tiles = TileCache(cache, 10)
    assert len(caplog.messages) == 1
    assert f"another user can write to {cache}" in caplog.messages[0]
    assert tiles.read(tile, None) is None
    tiles.write(tile, b"image")
    assert tiles.read(tile, None) == b"image"
    assert target.read_text() == "a file of this user"
    assert tiles.read_side() is None


def test_temporary_records_have_no_name(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    cache = RecordCache(np.dtype([("x", "f8")]))
    cache.put(0, np.zeros(1, cache._dtype)[0])
    assert list(shared.iterdir()) == []
