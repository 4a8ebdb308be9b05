"""Files from outside are refused within bounded memory and time, each with one clear line."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peak_memory import peak_mb

from xview_loc.errors import LONGEST, shown
from xview_loc.files import read_hashed, write_hashed
from xview_loc.models import create_model
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

NAME = "ccvpe-small"
WEIGHT = "deconv4.bias"

LOAD = """
import sys
from xview_loc.models.checkpoint import CheckpointError, load_checkpoint
for path in sys.argv[1:]:
    try:
        load_checkpoint(path, "ccvpe-small")
        print("loaded")
    except CheckpointError as error:
        print(error)
"""


def fails(path: Path) -> str:
    with pytest.raises(CheckpointError) as info:
        load_checkpoint(path, NAME)
    message = str(info.value)
    assert message.isprintable() and len(message) < 1500
    return message


def with_metadata(path: Path, text: str) -> Path:
    path.write_bytes(safetensors.torch.save(create_model(NAME).state_dict(), {"xview_loc": text}))
    return path


def described(**changes: object) -> str:
    spec = create_model(NAME).spec.to_json()
    return json.dumps({"format": 1, "model": NAME, "spec": spec, **changes})


def test_checkpoints_that_are_no_files(tmp_path: Path) -> None:
    """A pipe without a writer does not hang, an endless device takes no memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    peak, lines = peak_mb(LOAD, tmp_path / "pipe", "/dev/zero", tmp_path / "link")
    assert lines.count("not a regular file") == 3 and peak < 1000
    assert "cannot be read" in fails(tmp_path)
    assert "cannot be read" in fails(Path("a\0b"))


def test_a_checkpoint_larger_than_any_model_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.pt").open("wb") as file:
        file.truncate(40 << 30)  # takes no disk space
    peak, line = peak_mb(LOAD, tmp_path / "large.pt")
    assert "1074 MB" in line and peak < 1000


def test_a_packed_archive_is_not_unpacked(tmp_path: Path) -> None:
    """A megabyte that would unpack to a gigabyte."""
    torch.save({WEIGHT: torch.zeros(1 << 28)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    (tmp_path / "plain.pt").unlink()
    assert (tmp_path / "packed.pt").stat().st_size < 2 << 20
    peak, line = peak_mb(LOAD, tmp_path / "packed.pt")
    assert "is compressed" in line and peak < 1000


class Huge:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return bytearray, (4 << 30,)


def test_a_pickle_that_asks_for_memory(tmp_path: Path) -> None:
    torch.save({"a": Huge()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"a": Huge()}, protocol=2))
    peak, lines = peak_mb(LOAD, tmp_path / "a.pt", tmp_path / "b.pt")
    assert lines.count("holds no plain state dict") == 2 and peak < 1000


@pytest.mark.parametrize(
    "calibration",
    [
        '{"floor_m": 1e308}',
        '{"floor_m": 1e400}',
        '{"floor_m": NaN}',
        '{"floor_m": -Infinity}',
        '{"floor_m": "1"}',
        '{"floor_m": true}',
        '{"floor_m": null}',
        '{"floor_m": 1' + "0" * 4000 + "}",
        '{"contrast": 1e-300}',
        '{"contrast": 1e300}',
        "[]",
        '"x"',
    ],
    ids=lambda text: text[:24],
)
def test_calibrations_beyond_all_reason(tmp_path: Path, calibration: str) -> None:
    text = described(calibration=0).replace('"calibration": 0', f'"calibration": {calibration}')
    assert "calibration" in (line := fails(with_metadata(tmp_path / "a", text))) or "no xview_loc" in line


def test_metadata_beyond_all_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    spec = create_model(NAME).spec.to_json()
    for gsd in (1e-300, 1e300, "0.5", True, None, [1]):
        assert "spec" in fails(with_metadata(path, described(spec={**spec, "gsd": gsd})))
    nested = described(extra=0).replace('"extra": 0', '"extra": ' + "[" * 100_000 + "]" * 100_000)
    assert "no xview_loc metadata" in fails(with_metadata(path, nested))
    assert "MB of metadata" in fails(with_metadata(path, described(extra="x" * (9 << 20))))
    assert "spec" in fails(with_metadata(path, described(spec={**spec, "x" * 100_000: "\x1b[31m"})))
    assert "holds \\x1b[31m\\nxxx" in fails(
        with_metadata(path, described(model="\x1b[31m\n" + "x" * 100_000)).rename(path)
    )


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    state = {key: value.clone() for key, value in create_model(NAME).state_dict().items()}
    change(state)
    return state


def replaced(value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({WEIGHT: value})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(96).to(torch.float8_e4m3fn), "has type torch.float8_e4m3fn"),
        (torch.zeros(96, dtype=torch.complex64), "has type torch.complex64"),
        (torch.zeros(96).to_sparse(), "no plain values"),
        (torch.zeros(96, device="meta"), "no plain values"),
        (torch.zeros(1).expand(1 << 40), "has shape"),
    ],
    ids=["float8", "complex", "sparse", "meta", "expanded"],
)
def test_weights_that_are_no_plain_numbers(tmp_path: Path, value: torch.Tensor, problem: str) -> None:
    state = weights(replaced(value))
    torch.save(state, tmp_path / "a.pt")
    assert problem in fails(tmp_path / "a.pt")
    if value.dtype in (torch.float8_e4m3fn, torch.complex64):
        spec = {"xview_loc": described()}
        (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save(state, spec))
        assert problem in fails(tmp_path / "a.safetensors")


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    nested: object = []
    for _ in range(50_000):
        nested = [nested]
    for number, content in enumerate(
        ({1: torch.zeros(3)}, {"model": {2: torch.zeros(3)}}, {(1, 2): torch.zeros(3)}, {"a": nested})
    ):
        path = tmp_path / f"{number}.pt"
        if content.get("a") is nested:  # type: ignore[attr-defined]
            deep = b"\x80\x02}X\x01\x00\x00\x00a" + b"](" * 50_000 + b"e" * 50_000 + b"s."
            path.write_bytes(deep)
        else:
            torch.save(content, path)
        assert "no plain state dict" in (line := fails(path)) or "damaged" in line
    hostile = weights(lambda state: state.update({"\x1b]0;title\x07" + "x" * 100_000: torch.zeros(1)}))
    torch.save(hostile, tmp_path / "name.pt")
    assert "1 unexpected weights" in fails(tmp_path / "name.pt")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In the weights, the metadata and the digest itself."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(create_model(NAME), path, {"data": "some pairs"})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (
        whole.index(b"some pairs"),
        whole.index(b"file_sha256") + 20,
        start,
        start + 999,
        len(whole) - 1,
    ):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert "damaged" in fails(path), place
    path.write_bytes(whole)
    loaded = load_checkpoint(path, NAME)
    save_checkpoint(loaded.model, path, loaded.metadata)
    assert path.read_bytes() == whole


def test_hashed_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_hashed(path, b"content")
    assert read_hashed(path) == b"content"
    for damaged in (b"", b"x", path.read_bytes()[:-1], b"C" + path.read_bytes()[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="SHA-256"):
            read_hashed(path)


def test_text_from_outside() -> None:
    assert shown("map") == "map" and shown("Straße 東京") == "Straße 東京"
    assert shown("a\nb\x1b[31m\x00\u202e") == "a\\nb\\x1b[31m\\x00\\u202e"
    assert shown("\ud800") == "\\ud800"
    for long in ("x" * 10_000, "\0" * 10_000, "x" * (LONGEST + 1)):
        assert len(shown(long)) == LONGEST and shown(long).endswith("…")
    assert shown("x" * LONGEST) == "x" * LONGEST
