"""Checkpoint files: our safetensors with JSON metadata, and the authors' published state dicts."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from xview_loc.errors import UserError, reason, shown
from xview_loc.files import read_regular, write_whole
from xview_loc.models import MODEL_NAMES, create_model
from xview_loc.models.base import GSD_BOUNDS, NORMALISATIONS, Calibration, CrossViewModel
from xview_loc.models.specs import ModelSpec

_FORMAT = 1
_METADATA_KEY = "xview_loc"
# Largest file that is read: four times the largest model's weights.
MAX_BYTES = 1 << 30
_MAX_METADATA_BYTES = 8 << 20
# Key in the metadata of the file's own SHA-256, computed with this in its place.
_DIGEST_KEY, _NO_DIGEST = "file_sha256", "0" * 64
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# First bytes of files by torch.save: a zip archive, or a pickle (before PyTorch 1.6).
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")
# Keys of the state dict in published files that wrap it.
_WRAPPERS = ("state_dict", "model")
# Prefix of every key in the state dict of a DataParallel.
_PARALLEL = "module."


class CheckpointError(UserError):
    """A file that is not a usable checkpoint of the model asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model (evaluation mode), its metadata and the SHA-256 (hex) of the file it came from.

    ``note`` is a line for the log on how a published file was read, and what was assumed as it does not say;
    "" for our own files.
    """

    model: CrossViewModel
    metadata: dict[str, Any]
    sha256: str
    note: str = ""


def save_checkpoint(
    model: CrossViewModel, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> str:
    """Write ``model`` to ``path`` as safetensors and return the file's SHA-256 (hex).

    ``metadata`` is a mapping of JSON values (parent's SHA-256, data, hyper-parameters, metrics ...). Its
    ``format``, ``model``, ``spec`` and ``calibration`` are replaced by the model's own. The file carries its
    own digest, checked when it is loaded, and is written atomically. Raises CheckpointError on weights that
    are not finite, TypeError or ValueError on metadata that JSON cannot hold (NaN included), OSError if the
    file cannot be written.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _check_finite(path, state)
    own = {
        "format": _FORMAT,
        "model": model.spec.name,
        "spec": model.spec.to_json(),
        "calibration": asdict(model.calibration),
    }
    # First, so that the first place that holds its value is its own.
    content = {_DIGEST_KEY: "", **(metadata or {}), **own}
    content[_DIGEST_KEY] = _NO_DIGEST
    data = safetensors.torch.save(state, {_METADATA_KEY: json.dumps(content, allow_nan=False)})
    digest = hashlib.sha256(data).hexdigest()
    data = data.replace(_NO_DIGEST.encode(), digest.encode(), 1)
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def load_checkpoint(path: str | os.PathLike[str], expected_model: str | None = None) -> Checkpoint:
    """Read one of our checkpoints, or a published ``.pt``/``.pth`` state dict; code in it is never run.

    ``expected_model`` is the model's name. Published files carry none, so they need it; in ours it is checked
    if given. The model gets the file's spec, published ones its own. The weights of a DataParallel are
    accepted too. Raises CheckpointError on any unusable file.
    """
    path = Path(path)
    data = read_checkpoint(path)
    notes: list[str] = []
    # Safetensors start with eight bytes of header length, which may equal a magic number, then a brace.
    published = data.startswith(_TORCH_MAGIC) and data[8:9] != b"{"
    if published:
        if expected_model is None:
            raise CheckpointError(f"checkpoint {path} does not say which model it holds; name the model")
        state = read_torch(path, data)
        metadata: dict[str, Any] = {"model": expected_model}
        if all(key.startswith(_PARALLEL) for key in state):
            state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
            notes.append(f"removed {_PARALLEL} from {len(state)} keys")
    else:
        state, metadata = _read_safetensors(path, data)
        if expected_model is not None and metadata["model"] != expected_model:
            raise CheckpointError(
                f"checkpoint {path} holds {shown(metadata['model'], 80)}, not {expected_model}"
            )
    try:
        model = create_model(metadata["model"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path}: {reason(error)}") from None
    ignored = [what for what in model.ignored_weights if any(key.startswith(what) for key in state)]
    if ignored:
        notes.append(f"ignored {', '.join(what.rstrip('.') for what in ignored)}")
    state = {key: value for key, value in state.items() if not key.startswith(model.ignored_weights)}
    _check_state(path, state, model)
    model.load_state_dict(state)
    if "spec" in metadata:
        model.spec = _checked_spec(path, metadata["spec"], model.spec)
    metadata["spec"] = model.spec.to_json()
    if "calibration" in metadata:
        try:
            model.calibration = Calibration(**metadata["calibration"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} has an unusable calibration: {reason(error)}") from None
    notes += [f"normalisation {model.spec.normalisation}", *model.assumed]
    note = f"read as {model.spec.name}: {', '.join(notes)}" if published else ""
    return Checkpoint(model, metadata, hashlib.sha256(data).hexdigest(), note)


def read_checkpoint(path: Path) -> bytes:
    """Return the content of a checkpoint file; pipes and devices are not read. Raises CheckpointError."""
    try:
        data = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        problem = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint {shown(path)} cannot be read: {problem}") from None
    if not data:
        raise CheckpointError(f"checkpoint {path} is empty")
    return data


def shipped_checkpoint(name: str) -> Path | None:
    """Return the file of the weights shipped for the model ``name``, None if there are none."""
    path = Path(__file__).parent / "weights" / f"{name}.safetensors"
    # Not of a name that leads to another folder.
    return path if name in MODEL_NAMES and path.exists() else None


def load_model(name: str, path: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Load the checkpoint at ``path``, by default the one shipped for the model ``name``.

    Raises CheckpointError as :func:`load_checkpoint` does, and if no weights are shipped.
    """
    path = path or shipped_checkpoint(name)
    if path is None and name in MODEL_NAMES:
        shipped = " or ".join(other for other in MODEL_NAMES if shipped_checkpoint(other))
        raise CheckpointError(
            f"no weights are shipped for {name}: give a checkpoint (docs/benchmarks.md says where the "
            f"authors' are), or choose {shipped}"
        )
    if path is None:
        raise CheckpointError(f"unknown model {shown(repr(name), 80)}; choose from {', '.join(MODEL_NAMES)}")
    return load_checkpoint(path, name)


def weights_digest(model: CrossViewModel) -> str:
    """Return the SHA-256 (hex) of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_torch(path: Path, data: bytes) -> dict[str, Tensor]:
    """Read the state dict in the content ``data`` of a ``.pt`` or ``.pth`` file; code in it is never run.

    Raises CheckpointError, which names ``path``.
    """
    _check_archive(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # weights_only raises this on everything but plain tensors and containers.
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds pickled code, which is never run; "
            "save its plain state dict instead"
        ) from None
    except Exception as error:  # a damaged archive raises anything, EOFError to RuntimeError
        raise CheckpointError(f"checkpoint {path} is damaged: {reason(error)}") from None
    if isinstance(content, dict):
        wrapped = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
        content = next(wrapped, content)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(f"checkpoint {path} holds no plain state dict")
    return dict(content)


def _check_archive(path: Path, data: bytes) -> None:
    """Raise CheckpointError if a file by torch.save would take more memory than its own size."""
    if b"bytearray" in data:  # the one object that a plain pickle may create with any size
        raise CheckpointError(f"checkpoint {path} holds no plain state dict")
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception as error:  # a damaged archive raises anything
        raise CheckpointError(f"checkpoint {path} is damaged: {reason(error)}") from None
    if packed:
        raise CheckpointError(f"checkpoint {path} is compressed, as torch.save never does; save it again")


def _read_safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"checkpoint {path} is neither a complete safetensors file nor a PyTorch one: {reason(error)}"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds weights of an unknown type: {reason(error)}"
        ) from None
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        text = json.loads(data[8:start])["__metadata__"][_METADATA_KEY]
        if len(text) > _MAX_METADATA_BYTES:
            raise CheckpointError(f"checkpoint {path} has {len(text) / 1e6:.0f} MB of metadata")
        metadata = json.loads(text, parse_constant=_finite, parse_float=_finite)
        complete = isinstance(metadata["model"], str) and isinstance(metadata["spec"], dict)
        version = metadata["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        complete = False
    if not complete:
        raise CheckpointError(f"checkpoint {path} carries no xview_loc metadata")
    if version != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {shown(version, 80)}; this version reads format {_FORMAT}"
        )
    # Files of earlier versions carry none.
    if (digest := metadata.pop(_DIGEST_KEY, None)) is not None:
        actual = hashlib.sha256(data[:start].replace(str(digest).encode(), _NO_DIGEST.encode(), 1))
        actual.update(memoryview(data)[start:])
        if actual.hexdigest() != digest:
            raise CheckpointError(
                f"checkpoint {path} is damaged: its content does not have the SHA-256 that it carries; "
                "copy or make it again"
            )
    return state, metadata


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _check_state(path: Path, state: Mapping[str, Tensor], model: CrossViewModel) -> None:
    name = model.spec.name
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        counts = [
            f"{len(keys)} {what} weights (first: {shown(keys[0], 80)})"
            for keys, what in ((missing, "missing"), (unexpected, "unexpected"))
            if keys
        ]
        raise CheckpointError(f"checkpoint {path} does not fit {name}: {', '.join(counts)}")
    for key, value in state.items():
        own = wanted[key]
        problem = ""
        if value.shape != own.shape:
            problem = f"shape {tuple(value.shape)}, not {tuple(own.shape)}"
        elif value.layout != torch.strided or value.is_meta:
            problem = "no plain values (it is sparse or without data)"
        elif value.is_floating_point() != own.is_floating_point() or (
            value.is_floating_point() and value.dtype not in _FLOATS
        ):
            problem = f"type {value.dtype}, not {own.dtype}"
        if problem:
            raise CheckpointError(f"checkpoint {path} does not fit {name}: {key} has {problem}")
    _check_finite(path, state)


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if not value.isfinite().all():
            raise CheckpointError(f"checkpoint {path}: {key} has weights that are not finite")


def _checked_spec(path: Path, data: dict[str, Any], own: ModelSpec) -> ModelSpec:
    """Return the file's spec; only gsd and normalisation may differ from the model's own."""
    try:
        # Checkpoints made before these fields existed lack them.
        own_view = {"elevation_deg": own.elevation_deg, "intrinsics": own.intrinsics}
        spec = ModelSpec.from_json({**own_view, **data})
        valid = replace(spec, gsd=own.gsd, normalisation=own.normalisation) == own
        valid = valid and type(spec.gsd) in (int, float) and GSD_BOUNDS[0] <= spec.gsd <= GSD_BOUNDS[1]
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"checkpoint {path} has a spec that does not fit {own.name}: {shown(data)}")
    if spec.normalisation not in tuple(NORMALISATIONS):
        known = " or ".join(NORMALISATIONS)
        raise CheckpointError(
            f"checkpoint {path}: normalisation is {known}, not {shown(repr(spec.normalisation), 80)}"
        )
    return spec
