"""The commands' console, and the error for wrong usage."""

from __future__ import annotations

from rich.console import Console

from xview_loc.errors import UserError

console = Console()


class UsageError(UserError):
    """Wrong arguments or options (exit code 2)."""
