"""``xview-loc deploy``: activate a checkpoint on a running localizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xview_loc.cli.console import console


def deploy(
    checkpoint: Annotated[Path, typer.Argument(help="Weights; the node must see the same path.")],
    to: Annotated[str, typer.Option(help="Name of the localizer node.")] = "/localizer",
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds to wait for the node, which may export a graph.")
    ] = 300.0,
) -> None:
    """Activate a checkpoint on a running localizer, which verifies it first, and wait for the verdict.

    A refused checkpoint changes nothing. To go back: ros2 service call /localizer/rollback
    std_srvs/srv/Trigger.
    """
    from xview_loc.nodes.deployment import deploy as activate

    console.print(activate(checkpoint.resolve(), to, timeout), soft_wrap=True)
