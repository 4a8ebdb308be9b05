"""``xview-loc export``: what a model does for every image, as an ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xview_loc.cli.console import UsageError, console
from xview_loc.cli.evaluate import Heading


def export(
    out: Annotated[Path, typer.Option(help="Where the graph goes, such as frame.onnx.")],
    model: Annotated[str, typer.Option(help="Model's name.")] = "ccvpe-small",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; default: the shipped ones.")] = None,
    heading: Annotated[Heading, typer.Option(help="Is the heading known?")] = Heading.known,
) -> None:
    """Write the graph that a node with backend onnxruntime or openvino executes, and compare it with PyTorch.

    A node makes its own; this one is for other programs. See docs/performance.md for inputs and outputs.
    """
    from xview_loc.files import write_whole
    from xview_loc.models.checkpoint import load_model
    from xview_loc.models.graph import FrameSettings, export
    from xview_loc.models.runtimes import OnnxRuntime, parity

    net = load_model(model, checkpoint).model
    known = heading is Heading.known
    if net.spec.bins == 0 and not known:
        raise UsageError(f"{net.spec.name} needs a known heading")
    if "intrinsics" in net.extra_inputs:
        raise UsageError(f"{net.spec.name} is built for one camera, which a node alone knows")
    inputs = (("meters_per_pixel", (net.spec.gsd,)),) if net.extra_inputs else ()
    settings = FrameSettings(0.0 if known else None, not known, inputs)
    write_whole(out, export(net, settings))
    error = parity(OnnxRuntime(out), net, settings)
    console.print(
        f"wrote {out}; of PyTorch's results its own differ by {error:.1e} (relative)",
        highlight=False,
        soft_wrap=True,
    )
