"""What every command prints with, and how it says that it was called wrongly."""

from __future__ import annotations

from rich.console import Console

from xview_loc.errors import UserError

console = Console()


class UsageError(UserError):
    """The command's words are off; the message is one clear line."""
