"""Runtimes that execute a model's exported graph for each image: OpenVINO and ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from xview_loc.errors import reason
from xview_loc.models.base import CrossViewModel
from xview_loc.models.graph import (
    FrameGraph,
    FrameSettings,
    RuntimeUnavailableError,
    example,
    graph_inputs,
    kept_graph,
)

Backend = Literal["auto", "torch", "openvino", "onnxruntime"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "openvino", "onnxruntime")
Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
# Largest accepted difference of a runtime's results on noise from PyTorch's in float32, relative to the
# largest value. In bfloat16, the scores of a barely trained model are off by up to 0.15.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.02}


class Runtime(Protocol):
    """Executes :meth:`CrossViewModel.frame` with its settings built in."""

    def __call__(self, ground: Tensor, tile: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on ``ground`` (1, 3, h, w), normalised, and the tile's tensors, float32 on the CPU."""
        ...


def choose_backend(backend: Backend, device: str | torch.device) -> Backend:
    """Resolve ``auto``: OpenVINO if it is installed and the device is a CPU, else PyTorch."""
    if backend != "auto":
        return backend
    installed = all(importlib.util.find_spec(name) for name in ("openvino", "onnx", "onnxscript"))
    return "openvino" if installed and torch.device(device).type == "cpu" else "torch"


def check_precision(backend: Backend, precision: Precision, device: torch.device) -> None:
    """Raise RuntimeUnavailableError if a backend on a device does not support a precision."""
    if precision == "float16" and device.type == "cpu":
        raise RuntimeUnavailableError("float16 needs a GPU; on a CPU use bfloat16 or float32")
    if backend == "onnxruntime" and precision == "bfloat16":
        raise RuntimeUnavailableError("onnxruntime does not compute in bfloat16: use openvino or torch")


def make_runtime(
    model: CrossViewModel,
    backend: Backend,
    settings: FrameSettings,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
) -> Runtime:
    """Make a runtime (not ``torch``); the first one for given weights and settings takes seconds.

    Raises RuntimeUnavailableError, also if its results on noise differ from PyTorch's.
    """
    device = torch.device(device)
    check_precision(backend, precision, device)
    kind = {"openvino": OpenVinoRuntime, "onnxruntime": OnnxRuntime}[backend]
    graph = kept_graph(model, settings)
    try:
        runtime = kind(graph, precision, device)
    except ImportError as error:
        raise RuntimeUnavailableError(f"{reason(error)}: pip install 'xview_loc[runtimes]'") from None
    except RuntimeError as error:
        raise RuntimeUnavailableError(f"{backend} cannot run {model.spec.name}: {reason(error)}") from None
    differs = parity(runtime, model, settings)
    if not differs <= TOLERANCES[precision]:
        raise RuntimeUnavailableError(
            f"{backend} computes {model.spec.name} wrongly (relative error {differs:.1e}): use torch"
        )
    return runtime


def parity(runtime: Runtime, model: CrossViewModel, settings: FrameSettings) -> float:
    """Return the largest difference from PyTorch's results on noise, relative to each output's maximum."""
    ground, features = example(model, settings)
    with torch.no_grad():
        tile = model.tile_tensors(features)
        expected = FrameGraph(model, settings)(*graph_inputs(ground, tile))
        pairs = list(zip(runtime(ground, tile), expected, strict=True))
    errors = [(ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12) for ours, theirs in pairs]
    return float(torch.stack(errors).max())


class OpenVinoRuntime:
    """OpenVINO on the CPU or, for any other device, on Intel's GPU."""

    def __init__(self, graph: Path, precision: Precision, device: torch.device) -> None:
        import openvino

        hints = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if device.type == "cpu":
            hints["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
            # Pinned threads wait for other processes on their core.
            hints["ENABLE_CPU_PINNING"] = "NO"
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(graph), "CPU" if device.type == "cpu" else "GPU", hints)
        self._request = compiled.create_infer_request()

    def __call__(self, ground: Tensor, tile: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See :class:`Runtime`."""
        inputs = [x.numpy() for x in graph_inputs(ground, tile)]
        outputs = self._request.infer(inputs, share_inputs=True)
        return tuple(torch.from_numpy(outputs[i]) for i in range(len(outputs)))


class OnnxRuntime:
    """ONNX Runtime on the CPU, or on a CUDA device, with TensorRT if its build has it."""

    def __init__(
        self, graph: Path, precision: Precision = "float32", device: str | torch.device = "cpu"
    ) -> None:
        device = torch.device(device)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            tensorrt = {"device_id": device.index or 0, "trt_fp16_enable": precision == "float16"}
            cuda = {"device_id": device.index or 0}
            wanted = (("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", cuda))
            available = onnxruntime.get_available_providers()
            gpu = [(name, given) for name, given in wanted if name in available]
            if not gpu:
                raise RuntimeError("this onnxruntime has no CUDA: pip install onnxruntime-gpu")
            providers = [*gpu, *providers]
        self._session = onnxruntime.InferenceSession(graph, options, providers=providers)
        self._names = [node.name for node in self._session.get_inputs()]

    def __call__(self, ground: Tensor, tile: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See :class:`Runtime`."""
        inputs = [x.numpy() for x in graph_inputs(ground, tile)]
        outputs = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return tuple(torch.from_numpy(cast(Any, output)) for output in outputs)
