"""A small city with its pairs and a drive through it, and models small enough to be trained in a test."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from xview_loc import models
from xview_loc.cli.commands import main
from xview_loc.datasets import SimulatedDataset, simulated
from xview_loc.maps import open_map
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.ccvpe import CONFIGS as CCVPE_CONFIGS
from xview_loc.models.ggcvt import CONFIGS as GGCVT_CONFIGS
from xview_loc.models.ggcvt import GGCVT
from xview_loc.models.specs import ModelSpec
from xview_loc.recordings.importer import ImportOptions, import_bag
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, drive
from xview_loc.simulation.messages import write_bag
from xview_loc.simulation.views import PanoramaView

SPEC = CCVPE_CONFIGS["ccvpe-small"].spec
# What simulated_pairs opens, as the command line writes it.
PAIRS = "simulated:target:3:40"

_CCVPE_TINY = replace(
    CCVPE_CONFIGS["ccvpe-small"],
    # Backbones of stride 8: three levels, and two columns of features in a heading bin.
    spec=replace(SPEC, name="ccvpe-tiny", aerial_size=80),
    satellite_descriptor=64,
    ground_channels=(2, 1, 1),
    shifts=(4, 2, 2),
    up=(16, 8),
    conv=(32, 32),
    up_orientation=(8, 8),
    conv_orientation=(32, 32),
    taps=(2, 0),
    width=0.25,
    groups=3,
)
_PINHOLE_TINY = replace(
    _CCVPE_TINY,
    spec=replace(CCVPE_CONFIGS["ccvpe-pinhole-small"].spec, name="ccvpe-pinhole-tiny", aerial_size=80),
    ground_channels=(2, 2, 1),
    shifts=(8, 8, 4),
)
_GGCVT_SMALL = GGCVT_CONFIGS["ggcvt-small"]
_GGCVT_TINY = replace(
    _GGCVT_SMALL,
    spec=replace(_GGCVT_SMALL.spec, name="ggcvt-tiny", aerial_size=128),
    channels=(8, 16, 32),
)
_GGCVT_PINHOLE_TINY = replace(
    GGCVT_CONFIGS["ggcvt-kitti"],
    spec=replace(
        _PINHOLE_TINY.spec, name="ggcvt-pinhole-tiny", aerial_size=128, bins=0, normalisation="unit"
    ),
    search_m=40.0,
    channels=(8, 16, 32),
)


@contextmanager
def tiny_published_models() -> Iterator[None]:
    """Replace the published models by ones of fewer features, on smaller images of the same extent."""
    with pytest.MonkeyPatch.context() as patch:
        for name, ccvpe in CCVPE_CONFIGS.items():
            if ccvpe.spec.name != "ccvpe-small":
                spec = _smaller(ccvpe.spec, 80, bins=_CCVPE_TINY.spec.bins)
                config = replace(_CCVPE_TINY, spec=spec, padding=ccvpe.padding)
                patch.setitem(models._CONSTRUCTORS, name, partial(CCVPE, config))
        for name, ggcvt in GGCVT_CONFIGS.items():
            if ggcvt.spec.name != "ggcvt-small":
                smaller = replace(ggcvt, spec=_smaller(ggcvt.spec, 128), channels=_GGCVT_TINY.channels)
                patch.setitem(models._CONSTRUCTORS, name, partial(GGCVT, smaller))
        yield


def _smaller(spec: ModelSpec, side: int, **changes: int) -> ModelSpec:
    gsd = spec.gsd * spec.aerial_size / side
    return replace(spec, ground_size=SPEC.ground_size, aerial_size=side, gsd=gsd, **changes)


@contextmanager
def tiny_models() -> Iterator[None]:
    """Add ``ccvpe-tiny`` and ``ggcvt-tiny``, for panoramas of ``ccvpe-small``, and both ``-pinhole-tiny``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._CONSTRUCTORS, "ccvpe-tiny", partial(CCVPE, _CCVPE_TINY))
        patch.setitem(models._CONSTRUCTORS, "ccvpe-pinhole-tiny", partial(CCVPE, _PINHOLE_TINY))
        patch.setitem(models._CONSTRUCTORS, "ggcvt-pinhole-tiny", partial(GGCVT, _GGCVT_PINHOLE_TINY))
        patch.setitem(models._CONSTRUCTORS, "ggcvt-tiny", partial(GGCVT, _GGCVT_TINY))
        yield


def xview_loc(*words: object) -> str:
    """Run a command in this process, which knows the tiny models; return what it prints."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["xview-loc", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code, errors.getvalue()
    return output.getvalue()


def small_city() -> City:
    return build_city(3, "target", size_m=500.0)


def simulated_pairs(spec: ModelSpec, cache: Path, half_extent_m: float = math.inf) -> SimulatedDataset:
    """The pairs that :func:`render_pairs` left in ``cache``, on a model's tiles."""
    folder = cache / "xview_loc" / "simulated"
    return SimulatedDataset("target", range(3, 4), 40, spec, half_extent_m=half_extent_m, cache_dir=folder)


def render_pairs(city: City, cache: Path) -> None:
    """Render forty pairs of a city into ``cache``, a folder as XDG_CACHE_HOME names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "build_city", lambda seed, style: city)
        simulated_pairs(SPEC, cache).prepare()


def write_drive(city: City, folder: Path) -> None:
    """Record 70 seconds as ``folder/drive`` and import them as ``folder/pairs``."""
    frames = drive(city, 70, 0, options=DriveOptions(rate_hz=1.0), view=PanoramaView(64, 256))
    write_bag(frames, folder / "drive")
    topics = {"image": "/image", "fix": "/fix", "heading": "/heading", "odom": "/odom"}
    chosen = ImportOptions(topics=topics, spec=SPEC)
    with open_map(str(city.write_geotiff(folder / "city.tif"))) as aerial:
        import_bag(folder / "drive", folder / "pairs", aerial, chosen, lambda share: None)
