"""Export a model's per-image computation as an ONNX graph that other runtimes can execute.

An export takes seconds and much memory, so it runs in a process of its own and the graph is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xview_loc import __version__
from xview_loc.camera import CameraModel
from xview_loc.children import isolated_python
from xview_loc.errors import UserError, reason
from xview_loc.files import others_can_write, write_whole
from xview_loc.models.base import CrossViewModel
from xview_loc.models.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from xview_loc.models.inputs import normalise

LOG = logging.getLogger(__name__)
OPSET = 20
EXPORT_TIMEOUT_S = 600.0
GRAPHS_KEPT = 8
# Event of the current thread that cancels its export.
EXPORT_CANCELLED: ContextVar[threading.Event | None] = ContextVar("export_cancelled", default=None)


class RuntimeUnavailableError(UserError):
    """A model that cannot be exported or executed as asked; the message is one clear line."""


@dataclass(frozen=True)
class FrameSettings:
    """Arguments of :meth:`CrossViewModel.match` that are the same for every image, built into a graph.

    ``inputs`` are name and values (nested tuples, a batch of one) of each of the model's extra inputs.
    """

    heading_prior_deg: float | None = 0.0
    orientation: bool = False
    inputs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, model: CrossViewModel, heading_prior_deg: float | None) -> FrameSettings:
        """Return those of a localizer, for images of the model's lens and tiles of its resolution."""
        spec, lens = model.spec, model.spec.lens
        values: dict[str, Any] = {"meters_per_pixel": (spec.gsd,)}
        if isinstance(lens, CameraModel):
            values["intrinsics"] = (tuple(map(tuple, lens.matrix.tolist())),)
        inputs = tuple((name, values[name]) for name in sorted(model.extra_inputs))
        return cls(spec.matching_prior(heading_prior_deg), heading_prior_deg != 0, inputs)

    def extra(self) -> dict[str, Tensor]:
        """Return the extra inputs of :meth:`CrossViewModel.match`."""
        return {name: torch.tensor(values) for name, values in self.inputs}


class FrameGraph(nn.Module):
    """A model's :meth:`~CrossViewModel.frame` for images and tile tensors with channels last, as stored."""

    def __init__(self, model: CrossViewModel, settings: FrameSettings) -> None:
        super().__init__()
        self._model = model
        self._settings = settings
        self._inputs = model.frame_inputs(**settings.extra())

    def forward(self, ground: Tensor, *tile: Tensor) -> tuple[Tensor, ...]:
        """Run the model on ``ground`` (1, h, w, 3) and the tile's tensors (1, h, w, C)."""
        image, *rest = (x.permute(0, 3, 1, 2) for x in (ground, *tile))
        prior, orientation = self._settings.heading_prior_deg, self._settings.orientation
        return self._model.frame(image, rest, prior, orientation=orientation, **self._inputs)


def graph_inputs(ground: Tensor, tile: Sequence[Tensor]) -> list[Tensor]:
    """Return the inputs of a :class:`FrameGraph`; channels-last tensors are not copied."""
    return [x.permute(0, 2, 3, 1).contiguous() for x in (ground, *tile)]


def example(model: CrossViewModel, settings: FrameSettings) -> tuple[Tensor, Any]:
    """Return an image of noise (1, 3, h, w) and the precomputed features of a tile of noise."""
    rng, spec = np.random.default_rng(0), model.spec
    sizes = (spec.ground_size, (spec.aerial_size, spec.aerial_size))
    ground, aerial = (normalise(rng.integers(0, 256, (*size, 3), np.uint8), spec) for size in sizes)
    with torch.no_grad():
        return ground, model.precompute(model.encode_aerial(aerial), orientation=settings.orientation)


def export(model: CrossViewModel, settings: FrameSettings) -> bytes:
    """Export the :class:`FrameGraph` of a model in ONNX.

    Inputs are named ``ground``, ``tile_0`` ..., outputs ``output_0`` ... The metadata holds model, spec,
    settings, weights' digest and opset. Raises RuntimeUnavailableError if the exporter is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError(f"{reason(error)}: pip install 'xview_loc[runtimes]'") from None
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ground, features = example(model, settings)
    inputs = graph_inputs(ground, model.tile_tensors(features))
    names = ["ground", *(f"tile_{i}" for i in range(len(inputs) - 1))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = torch.onnx.export(
            FrameGraph(model, settings).eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            verbose=False,
            # Takes as long as the export, and runtimes optimise anyway.
            optimize=False,
        )
    assert program is not None
    graph = program.model_proto
    renamed = {output.name: f"output_{number}" for number, output in enumerate(graph.graph.output)}
    for output in graph.graph.output:
        output.name = renamed[output.name]
    for names in (names for node in graph.graph.node for names in (node.input, node.output)):
        names[:] = [renamed.get(name, name) for name in names]
    metadata = {
        "model": model.spec.name,
        "spec": json.dumps(model.spec.to_json()),
        "settings": json.dumps(asdict(settings)),
        "weights": weights_digest(model),
        "opset": str(OPSET),
        "xview_loc": __version__,
    }
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)
    return bytes(graph.SerializeToString())


def kept_graph(model: CrossViewModel, settings: FrameSettings) -> Path:
    """Return the graph's file in ``~/.cache/xview_loc/graphs``; if there is none, export it in a new process.

    The folder is the user's alone. A damaged file is made anew; the GRAPHS_KEPT files used last are kept.
    Raises RuntimeUnavailableError.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(json.dumps([asdict(settings), torch.__version__, model.spec.to_json()]).encode())
    digest.update(weights_digest(model).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xview_loc" / "graphs"
    name = f"{model.spec.name}-{digest.hexdigest()[:16]}"
    try:
        _make_private(folder)
        path = _sound_graph(folder, name) or _new_graph(folder, name, model, settings)
        path.touch()
        by_use = sorted(folder.glob("*.onnx"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in by_use[GRAPHS_KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeUnavailableError(f"cannot keep graphs in {folder}: {reason(error)}") from None
    return path


def _make_private(folder: Path) -> None:
    # Whoever can write to the folder above could put another one in its place.
    above = folder.parent
    above.mkdir(parents=True, exist_ok=True, mode=0o755)
    if above.lstat().st_uid == above.stat().st_uid == os.getuid():
        above.chmod(above.stat().st_mode & ~stat.S_IWOTH)
    if others_can_write(above):
        raise PermissionError(f"another user can write to {above}")
    folder.mkdir(exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError("it belongs to another user")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def _sound_graph(folder: Path, name: str) -> Path | None:
    """Return the file NAME-DIGEST.onnx whose content has that digest, and delete any other of the name."""
    for path in folder.glob(f"{name}-*.onnx"):
        own = path.stat().st_uid == os.getuid()
        if own and path.name == _hashed_name(name, path):
            return path
        LOG.warning("%s is damaged and is made anew", path)
        path.unlink(missing_ok=True)
    return None


def _new_graph(folder: Path, name: str, model: CrossViewModel, settings: FrameSettings) -> Path:
    exported = folder / f"{name}-{secrets.token_hex(4)}.new"
    try:
        _export_elsewhere(model, settings, exported)
        return exported.replace(folder / _hashed_name(name, exported))
    finally:
        exported.unlink(missing_ok=True)


def _hashed_name(name: str, path: Path) -> str:
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.onnx"


def _export_elsewhere(model: CrossViewModel, settings: FrameSettings, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        save_checkpoint(model, checkpoint)
        code = f"from {__name__} import main; sys.exit(main(*sys.argv[1:]))"
        words = str(checkpoint), str(path.absolute()), json.dumps(asdict(settings))
        with subprocess.Popen(
            isolated_python(code, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                errors = _wait_for_export(process, model.spec.name)
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise RuntimeUnavailableError(f"{model.spec.name} cannot be exported: {last[0]}")


def _wait_for_export(process: subprocess.Popen[str], name: str) -> str:
    deadline = time.monotonic() + EXPORT_TIMEOUT_S
    cancelled = EXPORT_CANCELLED.get()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.1)[1]
        if cancelled is not None and cancelled.is_set():
            raise RuntimeUnavailableError(f"exporting {name} was cancelled")
        if time.monotonic() > deadline:
            raise RuntimeUnavailableError(f"exporting {name} took more than {EXPORT_TIMEOUT_S:.0f} s")


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def main(checkpoint: str, out: str, settings: str) -> int:
    """Export a checkpoint's model: what the process started by :func:`kept_graph` runs."""
    given = json.loads(settings)
    given["inputs"] = _tuples(given["inputs"])
    try:
        write_whole(Path(out), export(load_checkpoint(checkpoint).model, FrameSettings(**given)))
    except (UserError, OSError) as error:
        print(reason(error), file=sys.stderr)
        return 1
    return 0
