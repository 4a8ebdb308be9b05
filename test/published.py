"""The published models' weights, inputs and outputs, where they lie beside the repository."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from xview_loc.models import create_model
from xview_loc.models.base import CrossViewModel

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


def published_name(name: str) -> str:
    """The variants of a model share the published keys, shapes and inputs."""
    return name.removesuffix("-reflect")


@lru_cache(maxsize=1)
def reference_weights() -> Any:
    spec = importlib.util.spec_from_file_location("refweights", REFERENCE / "refweights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_state(name: str, seed: int) -> dict[str, torch.Tensor]:
    """A state dict with all keys of the published file."""
    shapes = json.loads((REFERENCE / f"state_{published_name(name)}.json").read_text())
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    state |= {key: x for key, x in create_model(name).state_dict().items() if not x.is_floating_point()}
    filled = reference_weights().fill_state(state, seed)
    return state | {key: torch.from_numpy(x) for key, x in filled.items()}


@lru_cache(maxsize=1)
def reference_model(name: str, seed: int) -> CrossViewModel:
    model = create_model(name)
    state = published_state(name, seed)
    model.load_state_dict({key: x for key, x in state.items() if not key.startswith(model.ignored_weights)})
    return model


def reference_inputs(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ground, aerial = map(torch.from_numpy, reference_weights().make_inputs(published_name(name), seed))
    return ground, aerial
