"""docs/benchmarks.md: every command runs, on trees of a few made images and with models of fewer features."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_fixtures import tiny_published_models
from benchmark_fixtures import (
    CHICAGO,
    KITTI_LINES,
    make_kitti_frame,
    noise,
    write_labels,
    write_vigor_images,
)
from torch import Tensor
from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.models import create_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
# Twelve pairs do not fill more batches.
FEWER = ["--epochs", "1", "--batch-size", "2"]


def page_commands() -> list[list[str]]:
    """Return the page's commands, one list of words for each."""
    text = PAGE.read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    xview-loc (.*)$", text, re.MULTILINE)]


def make_vigor(root: Path, layout: str) -> None:
    """Write the target area: fourteen panoramas, by real label lines."""
    rng = np.random.default_rng(0)
    for city, count in (("SanFrancisco", 5), ("Chicago", 9)):
        lines = (3 * CHICAGO)[:count]
        write_labels(root, city, "pano_label_balanced", list(lines), layout)
        for line in CHICAGO:
            write_vigor_images(root, city, line, noise(rng, 64, 128), noise(rng, 80, 80))


def make_kitti(root: Path) -> None:
    """Write the target area: fourteen frames, by real lines."""
    rng = np.random.default_rng(0)
    for line in KITTI_LINES:
        make_kitti_frame(root, int(Path(line.split()[0]).stem), 0.4, noise(rng, 1280, 1280))
    (root / "test2_files.txt").write_text("".join(f"{line}\n" for line in (5 * KITTI_LINES)[:14]))


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay out a file as CCVPE's authors do, and GGCVT's for KITTI."""
    return state


def data_parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay out a file as GGCVT's authors do for VIGOR, with weights that locating does not need."""
    extra = {"SatFeatureNet.conf0.1.weight": torch.rand(1, 256, 3, 3)}
    return {f"module.{key}": value for key, value in {**state, **extra}.items()}


@pytest.mark.parametrize(
    ("model", "file", "layout", "data"),
    [
        ("ccvpe-vigor-reflect", "ccvpe-vigor.pt", plain, "splits__corrected/{city}/{stem}__corrected.txt"),
        ("ggcvt-vigor", "ggcvt-vigor.pth", data_parallel, "splits_new/{city}/{stem}.txt"),
        ("ccvpe-kitti", "ccvpe-kitti.pt", plain, ""),
        ("ggcvt-kitti", "ggcvt-kitti.pth", plain, ""),
    ],
    ids=["ccvpe-vigor", "ggcvt-vigor", "ccvpe-kitti", "ggcvt-kitti"],
)
def test_the_pages_commands_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    file: str,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    data: str,
) -> None:
    torch.manual_seed(0)
    if data:
        make_vigor(tmp_path / "data" / "VIGOR", data)
    else:
        make_kitti(tmp_path / "data" / "KITTI")
    monkeypatch.chdir(tmp_path)
    own = [words for words in page_commands() if model in words]
    assert [words[0] for words in own if "unknown" not in words] == ["evaluate", "adapt", "evaluate"]
    for words in own:
        here = [word.replace("/data/", f"{tmp_path}/data/") for word in words]
        more = FEWER if words[0] == "adapt" else ["--out", "errors.json"]
        with tiny_published_models():
            if not Path(file).exists():
                torch.save(layout(create_model(model).state_dict()), file)
            done = CliRunner().invoke(app, [*here, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        if words[0] == "evaluate":
            errors = json.loads(Path("errors.json").read_text())
            assert errors["model"] == model and errors["summary"]["samples"] == 3
            assert np.isfinite(errors["summary"]["distance_m_mean"])
        else:
            assert "verdict" in done.output


def test_every_command_of_the_page_is_run() -> None:
    run = ("ccvpe-vigor-reflect", "ggcvt-vigor", "ccvpe-kitti", "ggcvt-kitti")
    assert len(page_commands()) == 14
    assert all(sum(model in words for model in run) == 1 for words in page_commands())
