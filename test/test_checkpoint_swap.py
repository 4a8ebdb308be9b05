"""Changing weights under a localizer that goes on serving."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from map_fixtures import texture

from xview_loc.estimation.checkpoint_swap import CheckpointSwap, Deployed
from xview_loc.estimation.localizer import Localizer, tile_store
from xview_loc.estimation.observation import Observation
from xview_loc.maps.base import AerialTile
from xview_loc.models import create_model, graph
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import CheckpointError, load_model, save_checkpoint, shipped_checkpoint

NAME = "ccvpe-small"
LAT, LON = 48.2, 16.37


class Texture:
    """A map of noise that is the same everywhere."""

    def tile(self, lat: float, lon: float, size: int, gsd: float) -> AerialTile:
        return AerialTile(texture(size, size), lat, lon, gsd)


@pytest.fixture(scope="module")
def shipped() -> CrossViewModel:
    return load_model(NAME).model


def build(model: CrossViewModel) -> Localizer:
    return Localizer(tile_store(Texture(), model), model, search_radius_m=None)  # type: ignore[arg-type]


def observation() -> Observation:
    image = np.random.default_rng(0).integers(0, 255, (64, 256, 3), np.uint8)
    return Observation(image, LAT, LON, heading=0.3)


def place(localizer: Localizer) -> tuple[float, float]:
    estimate = localizer.localize(observation())
    return estimate.lat, estimate.lon


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Random weights, whose estimate is another one."""
    torch.manual_seed(3)
    save_checkpoint(create_model(NAME), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def swap_of(model: CrossViewModel) -> CheckpointSwap:
    return CheckpointSwap(Deployed(build(model), "shipped", "0" * 64), build)


def test_weights_change_and_come_back(shipped: CrossViewModel, other: Path) -> None:
    swap = swap_of(shipped)
    first, before = swap.active, place(swap.active.localizer)
    now = swap.load(other).result(60)
    assert swap.active is now and now.path == str(other) and str(now).endswith(now.sha256[:12])
    assert place(now.localizer) != before
    assert swap.rollback().result(60) is first and place(swap.active.localizer) == before
    assert swap.rollback().result(60) is now
    assert now.with_note == str(now)
    torch.save(shipped.state_dict(), other.with_suffix(".pt"))
    published = swap.load(other.with_suffix(".pt")).result(60)
    assert place(published.localizer) != place(now.localizer)
    assert published.with_note == f"{published}, read as {NAME}: normalisation imagenet, padding reflect"
    swap.close()


def test_what_was_prepared_replaces_only_what_it_was_compared_with(
    shipped: CrossViewModel, other: Path
) -> None:
    swap = swap_of(shipped)
    first = swap.active
    prepared = swap.prepare(other).result(60)
    assert swap.active is first
    assert swap.use(prepared, instead_of=first).result(60) is prepared is swap.active
    swap.rollback().result(60)
    with pytest.raises(CheckpointError, match=r"other\.safetensors .* is not activated"):
        swap.use(prepared, instead_of=prepared).result(60)
    assert swap.active is first
    swap.close()


def test_tiles_are_encoded_before_the_change(shipped: CrossViewModel, other: Path) -> None:
    swap = swap_of(shipped)
    place(swap.active.localizer)
    localizer = swap.load(other).result(60).localizer
    seen: list[int] = []
    model = localizer._model
    model.encode_aerial = lambda aerial: seen.append(1)  # type: ignore[method-assign, assignment, return-value]
    place(localizer)
    assert not seen
    swap.close()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_frames_go_before_the_loading_thread(shipped: CrossViewModel, other: Path) -> None:
    niceness: list[int] = []

    def notes(model: CrossViewModel) -> Localizer:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return build(model)

    swap = CheckpointSwap(Deployed(build(shipped), "shipped", "0" * 64), notes)
    swap.load(other).result(60)
    swap.close()
    assert niceness[0] > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_the_checkpoint_in_use_is_not_built_again(shipped: CrossViewModel, other: Path) -> None:
    built: list[int] = []
    swap = CheckpointSwap(Deployed(build(shipped)), lambda model: built.append(1) or build(model))  # type: ignore[func-returns-value]
    now = swap.load(other).result(60)
    assert swap.load(other).result(60) is now and len(built) == 1
    swap.close()


def spoiled(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = create_model(NAME)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        change(state)
        header = {"format": 1, "model": NAME, "spec": model.spec.to_json()}
        path.write_bytes(safetensors.torch.save(state, {"xview_loc": json.dumps(header)}))

    return write


def described(**changes: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = create_model(NAME)
        header = {"format": 1, "model": NAME, "spec": model.spec.to_json(), **changes}
        path.write_bytes(safetensors.torch.save(model.state_dict(), {"xview_loc": json.dumps(header)}))

    return write


class Bomb:
    """Would create a file when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, ("bomb-went-off", "w"))


WHOLE = shipped_checkpoint(NAME)
assert WHOLE is not None
BYTES = WHOLE.read_bytes()
WEIGHT = "deconv1.weight"
SPEC = create_model(NAME).spec
BAD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"x"),
    "text": lambda path: path.write_text("these are no weights"),
    "truncated": lambda path: path.write_bytes(BYTES[: len(BYTES) // 2]),
    "without its last byte": lambda path: path.write_bytes(BYTES[:-1]),
    "header torn": lambda path: path.write_bytes(BYTES[:8] + b"{" * 64 + BYTES[72:]),
    "huge header": lambda path: path.write_bytes(b"\xff" * 8 + BYTES[8:]),
    "pickled code": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "torch file with code": lambda path: torch.save({"weights": Bomb()}, path),
    "torch file of another model": lambda path: torch.save({"conv.weight": torch.zeros(3)}, path),
    "torch zip torn": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "another model": lambda path: save_checkpoint(create_model("ggcvt-small"), path),
    "no metadata": lambda path: path.write_bytes(safetensors.torch.save(create_model(NAME).state_dict())),
    "another format": described(format=99),
    "another ground sample distance": described(spec=replace(SPEC, gsd=0.5).to_json()),
    "another size": described(spec=replace(SPEC, aerial_size=512).to_json()),
    "spec of rubbish": described(spec={"name": NAME}),
    "NaN": spoiled(lambda state: state[WEIGHT].fill_(float("nan"))),
    "infinity": spoiled(lambda state: state[WEIGHT].view(-1)[0].fill_(float("inf"))),
    "overflows": spoiled(lambda state: [v.fill_(3e38) for k, v in state.items() if k.endswith("weight")]),
    "a weight missing": spoiled(lambda state: state.pop(WEIGHT)),
    "a weight too many": spoiled(lambda state: state.update(extra=torch.zeros(2))),
    "a wrong shape": spoiled(lambda state: state.update({WEIGHT: torch.zeros(2, 2)})),
    "whole numbers": spoiled(lambda state: state.update({WEIGHT: state[WEIGHT].long()})),
}


@pytest.fixture(scope="module")
def serving(shipped: CrossViewModel) -> Iterator[CheckpointSwap]:
    swap = swap_of(shipped)
    yield swap
    swap.close()


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints_change_nothing(kind: str, serving: CheckpointSwap, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    BAD[kind](path)
    first = serving.active
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        serving.load(path).result(60)
    assert "\n" not in str(caught.value)
    assert serving.active is first and not Path("bomb-went-off").exists()
    with pytest.raises(CheckpointError, match="no previous checkpoint"):
        serving.rollback().result(60)


def test_closing_ends_an_export_under_way(
    shipped: CrossViewModel, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exports(model: CrossViewModel) -> Localizer:
        return Localizer(tile_store(Texture(), model), model, backend="onnxruntime")  # type: ignore[arg-type]

    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\necho $$ > pid.part && mv pid.part pid\nexec sleep 1000\n")
    endless.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(graph.sys, "executable", str(endless))
    swap = CheckpointSwap(Deployed(build(shipped), "shipped", "0" * 64), exports)
    first, change = swap.active, swap.load(other)
    while not Path("pid").exists():
        assert not change.done(), change.exception()
        time.sleep(0.01)
    swap.close()
    with pytest.raises(CheckpointError, match="cancelled"):
        change.result(0)
    assert swap.active is first
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_no_frame_sees_mixed_weights(shipped: CrossViewModel, other: Path) -> None:
    """Ten changes while another thread localises: every estimate is one model's or the other's."""
    swap = swap_of(shipped)
    possible = {place(swap.active.localizer), place(swap.load(other).result(60).localizer)}
    assert len(possible) == 2
    seen, stop = [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            seen.append(place(swap.active.localizer))

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(10):
        swap.rollback().result(60)
        count = len(seen)
        while len(seen) < count + 2:
            stop.wait(0.001)
    stop.set()
    thread.join()
    assert set(seen) == possible and len(seen) >= 20
    swap.close()
