"""The commands' consoles, and the error for wrong usage."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from xview_loc.errors import UserError, escaped


class PlainConsole(Console):
    """Shows text as it is: no markup, no emoji codes, and terminal sequences as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a text; called for what is printed and for the cells of tables."""
        return super().render_str(escaped(text, but="\n\t"), **options)


console = PlainConsole()


class UsageError(UserError):
    """Wrong arguments or options (exit code 2)."""
