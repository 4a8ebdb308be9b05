"""Runtimes other than PyTorch: equal poses, graphs kept on disk, and clear errors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from stub_node import StubModel
from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.errors import UserError
from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import Observation, PoseEstimate
from xview_loc.maps import open_map
from xview_loc.maps.base import AerialMap
from xview_loc.maps.store import TileStore
from xview_loc.models import create_model, graph, runtimes
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import CheckpointError, load_model, save_checkpoint, weights_digest
from xview_loc.models.graph import GRAPHS_KEPT, FrameSettings, RuntimeUnavailableError, kept_graph
from xview_loc.models.runtimes import OnnxRuntime, OpenVinoRuntime, choose_backend, make_runtime, parity
from xview_loc.simulation.city import City, build_city
from xview_loc.simulation.drives import DriveOptions, Frame, drive

METRES_PER_DEGREE = 111_200.0
EXPORT, EXPORT_ELSEWHERE = graph.export, graph._export_elsewhere
EXPORTED: dict[tuple[str, FrameSettings], bytes] = {}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of graphs for this module.

    The first graph is exported in a process of its own. The others are exported here, and once each, which
    saves importing PyTorch again.
    """
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert kept_graph(load_model("ccvpe-small").model, FrameSettings()).is_file()
        patch.setattr(graph, "_export_elsewhere", export_here)
        patch.setattr(graph, "export", export_once)
        yield


def export_here(model: CrossViewModel, settings: FrameSettings, path: Path) -> None:
    path.write_bytes(export_once(model, settings))


def export_once(model: CrossViewModel, settings: FrameSettings) -> bytes:
    key = weights_digest(model), settings
    if key not in EXPORTED:
        EXPORTED[key] = EXPORT(model, settings)
    return EXPORTED[key]


@pytest.fixture(scope="module")
def city() -> City:
    return build_city(7, "source", size_m=420.0)


@pytest.fixture(scope="module")
def tif(city: City, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return city.write_geotiff(tmp_path_factory.mktemp("city") / "city.tif")


@pytest.fixture(scope="module")
def world(city: City, tif: Path) -> Iterator[tuple[AerialMap, list[Frame]]]:
    """The city's map and a drive through it."""
    frames = list(drive(city, 5, seed=2, options=DriveOptions(rate_hz=0.5)))
    with open_map(str(tif)) as aerial:
        yield aerial, frames


def open_localizer(aerial: AerialMap, model: CrossViewModel, **options: Any) -> Localizer:
    return Localizer(TileStore(aerial, model.spec.tile_px, model.spec.gsd), model, **options)


def poses(world: tuple[AerialMap, list[Frame]], name: str, prior: float | None = 0.0, **options: Any) -> Any:
    aerial, frames = world
    opened = open_localizer(aerial, load_model(name).model, heading_prior_deg=prior, **options)
    return [opened.localize(observed(frame)) for frame in frames]


def observed(frame: Frame) -> Observation:
    assert frame.image is not None
    return Observation(frame.image, frame.fix.lat, frame.fix.lon, heading=frame.heading)


def largest_distance(ours: list[PoseEstimate], theirs: list[PoseEstimate]) -> float:
    return max(
        math.hypot(a.lat - b.lat, (a.lon - b.lon) * math.cos(math.radians(a.lat))) * METRES_PER_DEGREE
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        ("ccvpe-small", 0.0),
        ("ccvpe-small", None),
        pytest.param("ggcvt-small", 0.0, marks=pytest.mark.slow),  # another export, of 10 s and more
    ],
)
def test_every_runtime_finds_the_same_places(world: Any, name: str, prior: float | None) -> None:
    expected = poses(world, name, prior)
    for backend in ("openvino", "onnxruntime"):
        ours = poses(world, name, prior, backend=backend)
        assert largest_distance(ours, expected) < 0.01
        for a, b in zip(ours, expected, strict=True):
            assert a.confidence == pytest.approx(b.confidence, rel=1e-2)
            assert a.heading == pytest.approx(b.heading, abs=1e-3)
            np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_half_precision_moves_estimates_by_centimetres(world: Any, backend: str) -> None:
    expected = poses(world, "ccvpe-small")
    ours = poses(world, "ccvpe-small", backend=backend, precision="bfloat16")
    moved = [largest_distance([a], [b]) for a, b in zip(ours, expected, strict=True)]
    assert max(moved) > 0.0 and np.median(moved) < 0.25


def test_graphs_are_kept_by_weights_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[bytes] = []

    def export(model: Any, settings: FrameSettings, path: Path) -> None:
        exported.append(b"graph %d" % len(exported))
        path.write_bytes(exported[-1])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(graph, "_export_elsewhere", export)
    model = load_model("ccvpe-small").model
    first = kept_graph(model, FrameSettings())
    assert kept_graph(load_model("ccvpe-small").model, FrameSettings()) == first
    assert exported == [first.read_bytes()]
    kept_graph(model, FrameSettings(None, orientation=True))
    for _ in range(GRAPHS_KEPT - 1):
        with torch.no_grad():
            next(model.parameters()).mul_(2.0)
        kept_graph(model, FrameSettings())
    assert len(exported) == GRAPHS_KEPT + 1
    assert {path.read_bytes() for path in first.parent.iterdir()} == set(exported[1:])


def test_missing_runtimes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("ccvpe-small").model
    with pytest.raises(RuntimeUnavailableError, match="float16 needs a GPU"):
        make_runtime(model, "openvino", FrameSettings(), "float16")
    with pytest.raises(RuntimeUnavailableError, match="bfloat16: use openvino or torch"):
        make_runtime(model, "onnxruntime", FrameSettings(), "bfloat16")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        with pytest.raises(RuntimeUnavailableError, match="pip install"):
            make_runtime(model, "openvino", FrameSettings())
    with pytest.raises(RuntimeUnavailableError, match="cannot run"):
        make_runtime(model, "onnxruntime", FrameSettings(), device="cuda:0")
    monkeypatch.setattr(graph, "_export_elsewhere", EXPORT_ELSEWHERE)
    monkeypatch.setattr(graph, "EXPORT_TIMEOUT_S", 0.01)
    with pytest.raises(RuntimeUnavailableError, match="took more than"):
        make_runtime(model, "openvino", FrameSettings(72.0))


def test_a_runtime_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OpenVinoRuntime.__call__

    def wrong(self: OpenVinoRuntime, *inputs: Any) -> Any:
        logits, *rest = honest(self, *inputs)
        return (logits * 1.01, *rest)

    monkeypatch.setattr(OpenVinoRuntime, "__call__", wrong)
    with pytest.raises(RuntimeUnavailableError, match=r"wrongly \(relative error 1.0e-02\): use torch"):
        make_runtime(load_model("ccvpe-small").model, "openvino", FrameSettings())


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", torch.device("cpu")) == "openvino"
    assert choose_backend("auto", torch.device("cuda")) == "torch"
    assert choose_backend("onnxruntime", torch.device("cpu")) == "onnxruntime"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", torch.device("cpu")) == "torch"


def test_a_change_of_weights_reaches_the_runtime(world: Any, tmp_path: Path) -> None:
    aerial, frames = world
    image = observed(frames[0])

    def opened(model: CrossViewModel) -> Localizer:
        return open_localizer(aerial, model, backend="openvino")

    swap = CheckpointSwap(Deployed(opened(load_model("ccvpe-small").model)), opened)
    before = swap.active.localizer.localize(image)
    torch.manual_seed(3)
    other = create_model("ccvpe-small")
    save_checkpoint(other, tmp_path / "other.safetensors")
    swap.load(tmp_path / "other.safetensors").result()
    after = swap.active.localizer.localize(image)
    alone = open_localizer(aerial, other).localize(image)
    assert largest_distance([after], [alone]) < 0.01 < largest_distance([after], [before])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "kept_graph", fails)
        save_checkpoint(create_model("ccvpe-small"), tmp_path / "third.safetensors")
        with pytest.raises(CheckpointError, match=r"third.safetensors fails its trial: no exporter"):
            swap.load(tmp_path / "third.safetensors").result()
    assert largest_distance([swap.active.localizer.localize(image)], [alone]) < 0.01
    swap.close()


def fails(*arguments: Any) -> None:
    raise RuntimeUnavailableError("no exporter")


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["export", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_an_exported_graph_has_metadata_and_computes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "frame.onnx"
    printed = command("--model", "ccvpe-small", "--heading", "unknown", "--out", str(out))
    assert float(printed.split("PyTorch's by")[1].split()[0]) < 1e-4
    session = onnxruntime.InferenceSession(out)
    metadata = session.get_modelmeta().custom_metadata_map
    model = load_model("ccvpe-small").model
    assert metadata["opset"] == "20" and metadata["weights"] == weights_digest(model)
    assert json.loads(metadata["spec"]) == json.loads(json.dumps(model.spec.to_json()))
    assert [node.name for node in session.get_inputs()][:2] == ["ground", "tile_0"]
    assert session.get_inputs()[0].shape == [1, 64, 256, 3]
    # Logits, four levels, the orientation field.
    assert [node.name for node in session.get_outputs()] == [f"output_{i}" for i in range(6)]
    assert parity(OnnxRuntime(out), model, FrameSettings(None, orientation=True)) < 1e-4


def test_wrong_uses_of_export_are_named(tmp_path: Path) -> None:
    for words, said in (
        (["--model", "ggcvt-small", "--heading", "unknown"], "ggcvt-small needs a known heading"),
        (["--model", "ccvpe-vigor"], "no weights are shipped for ccvpe-vigor"),
        (["--checkpoint", str(tmp_path / "none.safetensors")], "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            command("--out", str(tmp_path / "frame.onnx"), *words)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporting process does not know the stub."""
    monkeypatch.setattr(graph, "_export_elsewhere", EXPORT_ELSEWHERE)
    with pytest.raises(RuntimeUnavailableError, match=r"stub cannot be exported: .* unknown model 'stub'"):
        make_runtime(StubModel("panorama"), "openvino", FrameSettings())


def test_a_node_serves_without_the_runtime_that_auto_would_take(tif: Path, tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from ros_harness import NodeProcess, bench, pick_domain

    domain = pick_domain()
    node = NodeProcess(domain, tmp_path / "log", {"map": str(tif), "model": "stub", "backend": "auto"})
    try:
        with bench(domain) as b:
            b.wait(lambda: b.value("backend") == "torch float32", what="the backend's name")
            assert "torch instead of openvino: stub cannot be exported" in node.log
    finally:
        assert node.stop() == 0
    assert "Traceback" not in node.log
