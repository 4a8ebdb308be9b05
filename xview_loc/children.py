"""Child processes that import what this process imports, and nothing from the current folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def isolated_python(code: str, *arguments: str) -> list[str]:
    """Return the command that runs ``code`` in a new Python.

    Its search path is this process's without the current folder, unless this package itself lies there. The
    package is found also where an import hook led to it, as in an editable install.
    """
    own = str(Path(__file__).absolute().parents[1])
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # the folder is gone
        here = ""
    path = [p for p in sys.path if p and (os.path.realpath(p) != here or os.path.realpath(own) == here)]
    if own not in path:
        path.append(own)
    return [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {path!r}; {code}", *arguments]
