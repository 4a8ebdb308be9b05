"""Checkpoints are read back as saved, and every unusable file gives one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from xview_loc.models import create_model
from xview_loc.models.base import Calibration, CrossViewModel
from xview_loc.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_model,
    save_checkpoint,
    shipped_checkpoint,
)

NAME = "ccvpe-small"


@pytest.fixture(scope="module")
def model() -> CrossViewModel:
    torch.manual_seed(0)
    return create_model(NAME)


@pytest.fixture
def saved(model: CrossViewModel, tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save_checkpoint(model, path)
    return path


def fails(path: Path, expected_model: str | None = NAME) -> str:
    with pytest.raises(CheckpointError) as info:
        load_checkpoint(path, expected_model)
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def same_weights(a: CrossViewModel, b: CrossViewModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def altered(
    model: CrossViewModel, path: Path, metadata: object = None, **changes: torch.Tensor | None
) -> Path:
    """Save the model with some weights (dots written __) replaced, added or, if None, left out."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in changes.items():
        state.pop(key.replace("__", "."), None)
        if value is not None:
            state[key.replace("__", ".")] = value
    if metadata is None:
        metadata = {"format": 1, "model": NAME, "spec": model.spec.to_json()}
    safetensors.torch.save_file(state, path, {"xview_loc": json.dumps(metadata)})
    return path


def test_round_trip(model: CrossViewModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"parent": "ab" * 32, "data": ["a.mcap"], "hyper_parameters": {"lr": 1e-4}, "model": "another"}
    digest = save_checkpoint(model, path, metadata)
    loaded = load_checkpoint(path, NAME)

    assert same_weights(loaded.model, model)
    assert not loaded.model.training
    assert loaded.model.spec == model.spec
    assert loaded.sha256 == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    calibration = {"contrast": None, "floor_m": 0.5, "min_confidence": 0.0}
    own = {"model": NAME, "spec": model.spec.to_json(), "calibration": calibration}
    assert json.dumps(loaded.metadata, sort_keys=True) == json.dumps(
        {**metadata, "format": 1, **own}, sort_keys=True
    )
    assert same_weights(load_checkpoint(path).model, model)
    assert path.stat().st_size <= 12e6


def test_a_header_length_may_look_like_a_pickle(model: CrossViewModel, tmp_path: Path) -> None:
    """The first byte of the header's length is the one that starts a pickle."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, {"padding": ""})
    padding = (0x80 - path.read_bytes()[0]) % 256
    save_checkpoint(model, path, {"padding": "-" * padding})
    assert path.read_bytes()[0] == 0x80
    assert load_checkpoint(path, NAME).metadata["padding"] == "-" * padding


def test_spec_comes_from_the_file(tmp_path: Path) -> None:
    model = create_model(NAME)
    model.spec = replace(model.spec, gsd=0.25)
    save_checkpoint(model, tmp_path / "a")
    assert load_checkpoint(tmp_path / "a").model.spec.gsd == 0.25

    model.spec = replace(model.spec, bins=20)
    save_checkpoint(model, tmp_path / "b")
    assert "spec" in fails(tmp_path / "b")


def test_normalisation_comes_from_the_file(tmp_path: Path) -> None:
    """Without the field it is ImageNet's, as all models were trained when files had none."""
    for name, published in (("ccvpe-small", "imagenet"), ("ggcvt-small", "unit")):
        model, path = create_model(name), tmp_path / name
        save_checkpoint(model, path)
        assert load_checkpoint(path).model.spec.normalisation == published
        spec = model.spec.to_json()
        assert spec.pop("normalisation") == published
        for change, loaded in (({}, "imagenet"), ({"normalisation": "unit"}, "unit")):
            altered(model, path, {"format": 1, "model": name, "spec": {**spec, **change}})
            assert load_checkpoint(path).model.spec.normalisation == loaded
        assert load_model(name).model.spec.normalisation == "imagenet"  # the shipped weights
        torch.save(model.state_dict(), path)
        assert load_checkpoint(path, name).model.spec.normalisation == published
        for unknown in ("unti", None, ["unit"]):
            metadata = {"format": 1, "model": name, "spec": {**spec, "normalisation": unknown}}
            assert "normalisation is imagenet or unit, not" in fails(altered(model, path, metadata), name)


def test_calibration_comes_from_the_file(tmp_path: Path) -> None:
    model = create_model(NAME)
    model.calibration = Calibration(9.5, 0.4)
    save_checkpoint(model, tmp_path / "a", {"calibration": {"contrast": 1.0, "floor_m": 7.0}})
    assert load_checkpoint(tmp_path / "a").model.calibration == Calibration(9.5, 0.4)


@pytest.mark.parametrize("bad", [{"contrast": -1.0}, {"floor_m": -0.1}, {"temperature": 2.0}, [1.0], "hot"])
def test_an_unusable_calibration_is_refused(model: CrossViewModel, tmp_path: Path, bad: object) -> None:
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": 1, "model": NAME, "spec": model.spec.to_json(), "calibration": bad}
    safetensors.torch.save_file(state, tmp_path / "a", {"xview_loc": json.dumps(metadata)})
    assert "calibration" in fails(tmp_path / "a")


@pytest.mark.parametrize(("wrapper", "legacy"), [(None, False), ("state_dict", True), ("model", False)])
def test_published_state_dict(
    model: CrossViewModel, tmp_path: Path, wrapper: str | None, legacy: bool
) -> None:
    path = tmp_path / "model.pt"
    state = model.state_dict()
    content = {wrapper: state, "epoch": 3} if wrapper else state
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(path, NAME)
    assert same_weights(loaded.model, model)
    assert loaded.metadata["model"] == NAME
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.note == f"read as {NAME}: normalisation imagenet, padding reflect"
    assert "name the model" in fails(path, None)


def test_published_files_of_ggcvt_give_the_same_maps(tmp_path: Path) -> None:
    """As its trainers save it: in a DataParallel, and the KITTI model with a rotation beside it."""
    torch.manual_seed(1)
    model = create_model("ggcvt-small")
    state = model.state_dict()
    parallel = nn.DataParallel(model).state_dict()
    rotation = {"coe_R": torch.tensor(-5.0), "coe_T": torch.tensor(-3.0)}
    inputs = torch.rand(1, 3, *model.spec.ground_size), torch.rand(1, 3, *[model.spec.aerial_size] * 2)

    def maps(net: CrossViewModel) -> torch.Tensor:
        with torch.no_grad():
            gsd = torch.tensor([net.spec.gsd])
            return net.match(inputs[0], net.encode_aerial(inputs[1]), 0.0, meters_per_pixel=gsd).logits

    expected = maps(model)
    removed, ignored = f"removed module. from {len(state)} keys, ", "ignored coe_R, coe_T, "
    for content, legacy, done in (
        (state, False, ""),
        (state, True, ""),
        ({"state_dict": state}, False, ""),
        (parallel, False, removed),
        (parallel, True, removed),
        ({"epoch": 3, "state_dict": parallel}, False, removed),
        ({**state, **rotation}, False, ignored),
        (
            {**parallel, **{f"module.{key}": value for key, value in rotation.items()}},
            True,
            removed.replace(str(len(state)), str(len(state) + 2)) + ignored,
        ),
    ):
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
        loaded = load_checkpoint(tmp_path / "model.pth", "ggcvt-small")
        assert torch.equal(maps(loaded.model), expected)
        assert loaded.note == f"read as ggcvt-small: {done}normalisation unit"
    half = {(f"module.{key}" if key.startswith("GrdEnc") else key): value for key, value in state.items()}
    torch.save(half, tmp_path / "half.pt")
    assert "unexpected weights (first: module.GrdEnc" in fails(tmp_path / "half.pt", "ggcvt-small")
    save_checkpoint(model, tmp_path / "ours.safetensors")
    assert load_checkpoint(tmp_path / "ours.safetensors").note == ""


def test_write_is_atomic(
    model: CrossViewModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(create_model(NAME), saved)
    assert saved.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_no_file(tmp_path: Path) -> None:
    assert "does not exist" in fails(tmp_path / "missing.safetensors")
    assert "cannot be read" in fails(tmp_path)
    (tmp_path / "empty").touch()
    assert "is empty" in fails(tmp_path / "empty")


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"hello\n" * 100,
        b"\x89PNG\r\n\x1a\n" + bytes(1000),
        b"\xff" * 100,
        b"PK\x03\x04junk",
        b"\x80\x02",
    ],
    ids=["one byte", "text", "image", "binary", "zip", "pickle"],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    assert "is neither" in fails(tmp_path / "file.pt") or "damaged" in fails(tmp_path / "file.pt")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy"])
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
def test_truncated(model: CrossViewModel, saved: Path, tmp_path: Path, kind: str, share: float) -> None:
    if kind != "safetensors":
        torch.save(model.state_dict(), saved, _use_new_zipfile_serialization=kind == "torch")
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    fails(saved)


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": Intruder(mark)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Intruder(mark), protocol=2))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pt")
    for name in "abc":
        assert "never run" in fails(tmp_path / f"{name}.pt")
    assert not mark.exists()


def test_no_state_dict(tmp_path: Path) -> None:
    for content in ([torch.zeros(3)], {"epoch": 3}, torch.zeros(3), {"model": {"a": 1}}, {1: torch.zeros(3)}):
        torch.save(content, tmp_path / "other.pt")
        assert "no plain state dict" in fails(tmp_path / "other.pt")


def test_wrong_model(model: CrossViewModel, saved: Path, tmp_path: Path) -> None:
    assert "holds ccvpe-small, not ccvpe-vigor" in fails(saved, "ccvpe-vigor")
    torch.save(model.state_dict(), tmp_path / "small.pt")
    assert "does not fit ccvpe-vigor" in fails(tmp_path / "small.pt", "ccvpe-vigor")
    assert "unknown model" in fails(tmp_path / "small.pt", "ccvpe-large")
    spec = model.spec.to_json()
    unknown = altered(model, tmp_path / "unknown", {"format": 1, "model": "ccvpe-large", "spec": spec})
    assert "unknown model" in fails(unknown, None)


def test_weights_that_do_not_fit(model: CrossViewModel, tmp_path: Path) -> None:
    bias = "deconv4__bias"
    path = tmp_path / "model.safetensors"
    assert "1 missing weights (first: deconv4.bias)" in fails(altered(model, path, **{bias: None}))
    assert "1 unexpected weights (first: extra)" in fails(altered(model, path, extra=torch.zeros(2)))
    assert "has shape (3,), not (96,)" in fails(altered(model, path, **{bias: torch.zeros(3)}))
    assert "has type" in fails(altered(model, path, **{bias: torch.zeros(96, dtype=torch.int64)}))
    for value in (float("nan"), float("inf")):
        weights = torch.zeros(96)
        weights[7] = value
        assert "deconv4.bias has weights that are not finite" in fails(
            altered(model, path, **{bias: weights})
        )


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = create_model(NAME)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(model, tmp_path / "bad")
    assert list(tmp_path.iterdir()) == []


def test_model_names_are_listed() -> None:
    with pytest.raises(CheckpointError, match="unknown model 'ccvpe-smal'; choose from ccvpe-vigor, "):
        load_model("ccvpe-smal")
    with pytest.raises(CheckpointError, match="no weights are shipped for ccvpe-vigor: give a checkpoint"):
        load_model("ccvpe-vigor")


def test_metadata_that_does_not_fit(model: CrossViewModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    spec = model.spec.to_json()
    safetensors.torch.save_file(model.state_dict(), path)
    assert "no xview_loc metadata" in fails(path)
    assert "no xview_loc metadata" in fails(altered(model, path, metadata={"model": NAME}))
    assert "no xview_loc metadata" in fails(altered(model, path, metadata=[1]))
    assert "format 2" in fails(altered(model, path, metadata={"format": 2, "model": NAME, "spec": spec}))
    odd = [("gsd", -1.0), ("gsd", "x"), ("extra", 1), ("elevation_deg", 7), ("elevation_deg", [90, -90])]
    for broken in ({}, *({**spec, name: value} for name, value in odd)):
        metadata = {"format": 1, "model": NAME, "spec": broken}
        assert "spec that does not fit" in fails(altered(model, path, metadata=metadata))


def test_the_name_of_a_model_is_no_path(tmp_path: Path) -> None:
    shipped = shipped_checkpoint("ccvpe-small")
    assert shipped is not None
    shutil.copy(shipped, tmp_path / "own.safetensors")
    name = os.path.relpath(tmp_path / "own", shipped.parent)
    with pytest.raises(CheckpointError, match="unknown model"):
        load_model(name)
