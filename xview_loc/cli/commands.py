"""All commands of ``xview-loc``, and how their errors are shown."""

from __future__ import annotations

import sys

import typer

from xview_loc.cli import (
    adapt,
    bags,
    bootstrap,
    calibrate,
    deploy,
    doctor,
    evaluate,
    export,
    maps,
    simulate,
    train,
)
from xview_loc.cli.console import PlainConsole, UsageError
from xview_loc.doctor import advice_for
from xview_loc.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Cross-view localisation.")
app.add_typer(maps.app, name="map")
app.add_typer(bags.bag_app, name="bag")
app.add_typer(bags.pairs_app, name="pairs")
app.command()(train.train)
app.command()(bootstrap.bootstrap)
app.command()(adapt.adapt)
app.command()(adapt.ablate)
app.command()(evaluate.evaluate)
app.command()(calibrate.calibrate)
app.command()(export.export)
app.command()(deploy.deploy)
app.command()(doctor.doctor)
app.command()(simulate.simulate)


def main() -> None:
    """Run the command. Errors are printed in one line; the exit code is 1, or 2 for wrong usage."""
    try:
        app()
    except (UserError, OSError) as error:
        PlainConsole(stderr=True).print(f"xview-loc: {error}", soft_wrap=True)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except ModuleNotFoundError as error:
        # A missing module of this package is a bug, not an incomplete installation.
        if error.name is None or error.name.startswith("xview_loc"):
            raise
        text = f"xview-loc: cannot import {error.name}: {advice_for(error.name)}"
        PlainConsole(stderr=True).print(text, soft_wrap=True)
        raise SystemExit(1) from None
    except Exception as error:
        if not _lacks_memory(error):
            raise
        print(
            "xview-loc: there is not enough memory: free some, or repeat the command with a smaller "
            "--batch-size or fewer --workers, if it has them",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _lacks_memory(error: Exception) -> bool:
    # PyTorch, oneDNN, OpenCV and the loader of libraries have errors of their own.
    words = ("allocate memory", "out of memory", "insufficient memory", "could not create a primitive")
    text = str(error).lower()
    # A library that is loaded too late lacks static TLS, however much memory is free.
    return isinstance(error, MemoryError) or ("static tls" not in text and any(w in text for w in words))
