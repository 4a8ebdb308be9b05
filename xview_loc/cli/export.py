"""``xview-loc export``: write a model's per-image computation as an ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xview_loc.cli.console import console
from xview_loc.cli.evaluate import Heading, KnownHeading, ModelName, Weights, load


def export(
    out: Annotated[Path, typer.Option(help="File of the graph, such as frame.onnx.")],
    model: ModelName = "ccvpe-small",
    checkpoint: Weights = None,
    heading: KnownHeading = Heading.known,
) -> None:
    """Write the graph that a node with backend onnxruntime or openvino executes, and compare it with PyTorch.

    Nodes export their own graphs; this one is for other programs. Inputs and outputs: docs/performance.md.
    """
    from xview_loc.files import check_writable, write_whole
    from xview_loc.models.graph import FrameSettings, export
    from xview_loc.models.runtimes import OnnxRuntime, parity

    check_writable(out)
    net = load(model, checkpoint, heading).model
    known = heading is Heading.known
    settings = FrameSettings.of(net, 0.0 if known else None)
    write_whole(out, export(net, settings))
    error = parity(OnnxRuntime(out), net, settings)
    console.print(
        f"wrote {out}; results differ from PyTorch's by {error:.1e} (relative)",
        highlight=False,
        soft_wrap=True,
    )
