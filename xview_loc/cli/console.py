"""What every command prints with, and how it says that it was called wrongly."""

from __future__ import annotations

import re

from rich.console import Console

from xview_loc.errors import UserError

console = Console()


class UsageError(UserError):
    """The command's words are off; the message is one clear line."""


def parse_cities(text: str) -> range:
    """Seeds from ``7`` or ``0-23`` (both ends included)."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    cities = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not cities:
        raise UsageError(f"cities are written 7 or 0-23, not {text!r}")
    return cities
