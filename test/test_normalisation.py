"""What reaches a model's first layers: RGB in [0, 1] or normalised as ImageNet, as its spec says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_fixtures import tiny_models
from benchmark_fixtures import make_vigor_target, noise
from map_fixtures import texture
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from xview_loc.cli.commands import main
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.localizer import Localizer, tile_store
from xview_loc.estimation.observation import Observation
from xview_loc.images import encode_jpeg
from xview_loc.maps.base import AerialTile
from xview_loc.models import create_model, graph, runtimes
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import save_checkpoint
from xview_loc.models.inputs import denormalise, normalise
from xview_loc.models.specs import Normalisation
from xview_loc.recordings.pair import Pair
from xview_loc.recordings.pair_writer import PairWriter

MODELS: list[tuple[str, Normalisation]] = [("ggcvt-tiny", "unit"), ("ccvpe-tiny", "imagenet")]
# Black and white by ImageNet's statistics, of the channels where they are largest.
DARKEST, LIGHTEST = -0.485 / 0.229, (1 - 0.406) / 0.225


class Texture:
    """A map of noise that is the same everywhere."""

    def tile(self, lat: float, lon: float, size: int, gsd: float) -> AerialTile:
        return AerialTile(texture(size, size), lat, lon, gsd)


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture
def seen() -> Iterator[list[Tensor]]:
    """The images that reach any layer of any model, in order."""
    images: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[object, ...]) -> None:
        image = inputs[0] if inputs else None
        if isinstance(module, nn.Conv2d) and isinstance(image, Tensor) and image.shape[1] == 3:
            images.append(image.detach())

    with register_module_forward_pre_hook(note):
        yield images


def check(images: list[Tensor], normalisation: Normalisation) -> None:
    """Check images with dark and light pixels."""
    assert images
    for image in images:
        least, most = float(image.min()), float(image.max())
        if normalisation == "unit":
            assert 0.0 <= least < most <= 1.0
        else:
            assert DARKEST - 1e-3 < least < -1.0 and 1.0 < most < LIGHTEST + 1e-3


def build(model: CrossViewModel, backend: runtimes.Backend = "torch") -> Localizer:
    return Localizer(tile_store(Texture(), model), model, search_radius_m=None, backend=backend)  # type: ignore[arg-type]


def localize(localizer: Localizer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 256, 3), np.uint8)
    localizer.localize(Observation(image, 48.2, 16.37, heading=0.3))


@pytest.mark.parametrize(("name", "normalisation"), MODELS)
def test_every_colour_is_normalised_and_back(name: str, normalisation: Normalisation) -> None:
    spec = create_model(name).spec
    assert spec.normalisation == normalisation
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 64, 3)
    tensor = normalise(image, spec)
    assert tensor.shape == (1, 3, 4, 64) and tensor.dtype == torch.float32
    check([tensor], normalisation)
    if normalisation == "unit":
        assert tensor.min() == 0.0 and tensor.max() == 1.0
    np.testing.assert_allclose(denormalise(tensor[0], spec) * 255, image, atol=1e-3)


@pytest.mark.parametrize(("name", "normalisation"), MODELS)
def test_localizer(name: str, normalisation: Normalisation, seen: list[Tensor]) -> None:
    localizer = build(create_model(name))
    localizer.warm_up()
    localize(localizer)
    check(seen, normalisation)


def test_exported_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    given: list[Tensor] = []

    def note(ground: Tensor, tile: tuple[Tensor, ...]) -> list[Tensor]:
        given.append(ground)
        return graph.graph_inputs(ground, tile)

    def export_here(model: CrossViewModel, settings: graph.FrameSettings, path: Path) -> None:
        path.write_bytes(graph.export(model, settings))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(graph, "_export_elsewhere", export_here)
    monkeypatch.setattr(runtimes, "graph_inputs", note)
    localizer = build(create_model("ggcvt-tiny"), "onnxruntime")
    localizer.warm_up()
    seen = request.getfixturevalue("seen")  # from here on: an export traces layers without values
    localizer.forget_tiles()
    localize(localizer)
    assert len(given) > 2  # those of the comparison with PyTorch, and the frame's
    check([*given, *seen], "unit")


def published(name: str, folder: Path) -> Path:
    """Random weights as GGCVT's authors save them."""
    path = folder / f"{name}.pt"
    torch.save(nn.DataParallel(create_model(name)).state_dict(), path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["xview-loc", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


@pytest.mark.parametrize(("name", "normalisation"), MODELS)
def test_evaluate(
    name: str,
    normalisation: Normalisation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_vigor_target(tmp_path, 2)
    checkpoint = str(published(name, tmp_path))
    words = ["--model", name, "--checkpoint", checkpoint, "--device", "cpu"]
    words += ["--dataset", "vigor", "--root", str(tmp_path), "--split", "cross-test"]
    run(monkeypatch, "evaluate", *words)
    lines = [line for line in capsys.readouterr().out.splitlines() if "read as" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{checkpoint}: read as {name}: removed module. from ")
    assert f"normalisation {normalisation}" in lines[0]
    check(seen, normalisation)


def write_pairs(folder: Path, count: int) -> str:
    rng = np.random.default_rng(0)
    writer = PairWriter(folder, {"vehicle": "test"})
    tile = AerialTile(noise(rng, 160, 160), 48.2, 16.37, create_model("ggcvt-tiny").spec.gsd)
    for number in range(count):
        image = encode_jpeg(noise(rng, 64, 256), 90)
        writer.add(Pair(number * 10**9, "jpeg", image, 48.2, 16.37, heading=0.4), tile)
    writer.close()
    return str(folder)


@pytest.mark.parametrize("source", ["pairs", "vigor"])
def test_adapt(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Teacher, students and the report's heat maps alike."""
    if source == "pairs":
        data = write_pairs(tmp_path / "pairs", 5)
    else:
        make_vigor_target(tmp_path, 3)
        data = f"vigor:{tmp_path}:cross-test"
    name = "ggcvt-tiny"
    words = ["--model", name, "--checkpoint", str(published(name, tmp_path)), "--accelerator", "cpu"]
    words += ["--epochs", "1", "--batch-size", "1", "--held-out", "0.4"]
    run(monkeypatch, "adapt", data, "--out", str(tmp_path / "run"), *words)
    assert capsys.readouterr().out.count("read as ggcvt-tiny: removed module. from ") == 1
    check(seen, "unit")


def test_a_swap_changes_the_normalisation(tmp_path: Path, seen: list[Tensor]) -> None:
    """From weights in [0, 1] to some of an earlier version, and back."""
    model = create_model("ggcvt-tiny")
    first = build(model)
    swap = CheckpointSwap(Deployed(first), build)
    localize(first)
    earlier = create_model("ggcvt-tiny")
    earlier.spec = replace(earlier.spec, normalisation="imagenet")
    path = tmp_path / "earlier.safetensors"
    save_checkpoint(earlier, path)
    check(seen, "unit")
    for change, normalisation in ((lambda: swap.load(path), "imagenet"), (swap.rollback, "unit")):
        now = change().result(60).localizer
        seen.clear()
        localize(now)
        check(seen, normalisation)
    swap.close()
