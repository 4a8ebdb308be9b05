"""``xview-loc deploy``: another checkpoint for a running localizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xview_loc.cli.console import UsageError, console


def deploy(
    checkpoint: Annotated[Path, typer.Argument(help="Weights; the node must see them under this path.")],
    to: Annotated[str, typer.Option(help="The localizer's name.")] = "/localizer",
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for it.")] = 60.0,
) -> None:
    """Put a checkpoint in use on a running localizer, which verifies it first, and wait for the verdict.

    Refused, the one before serves on. To go back: ros2 service call /localizer/rollback
    std_srvs/srv/Trigger.
    """
    try:
        from xview_loc.nodes.deployment import deploy as put_in_use
    except ImportError as error:
        raise UsageError(f"deploy needs ROS 2's Python packages ({error})") from None
    console.print(put_in_use(checkpoint.resolve(), to, timeout), soft_wrap=True)
