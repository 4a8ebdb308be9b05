"""``xview-loc doctor``: check the installation, a map and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from xview_loc.cli.console import console
from xview_loc.cli.maps import Headers, KeyEnv, map_options
from xview_loc.doctor import Finding, Level, check_installation, check_packages

_STYLES = {Level.ok: "green", Level.warning: "yellow", Level.failure: "red"}


def doctor(
    map: Annotated[str, typer.Option(help="GeoTIFF, .mbtiles, .pmtiles or a tile URL.")] = "",
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; default: the model's own.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Disk cache of the node.")] = None,
    header: Headers = None,
    api_key_env: KeyEnv = "",
) -> None:
    """Check the installation, a map and a checkpoint. The exit code is 1 if a check failed."""
    findings: Iterable[Finding] = check_packages()
    if all(finding.level is not Level.failure for finding in findings):
        options = map_options(header, api_key_env, cache_dir)
        findings = chain(findings, check_installation(map, model, checkpoint, options))
    failed = False
    for finding in findings:
        line = Text(f"{finding.level.value:<9}", style=_STYLES[finding.level])
        line.append(f"{finding.check:<14}{finding.text}", style="default")
        if finding.advice:
            line.append(f" -> {finding.advice}", style="default")
        console.print(line, soft_wrap=True)
        failed |= finding.level is Level.failure
    if failed:
        raise typer.Exit(1)
