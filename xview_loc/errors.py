"""Errors that the user can correct, and text from outside in messages."""

from __future__ import annotations

# Characters of a message, name or reason from outside that are shown.
LONGEST = 500


class UserError(Exception):
    """Wrong input from the user; the message is one clear line: what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """Return an error's message in one line, or its type's name if it has none."""
    return shown(" ".join(str(error).split())) or type(error).__name__


def shown(value: object, limit: int = LONGEST) -> str:
    """Return a text from outside as it may be logged or shown: at most ``limit`` printable characters.

    Control characters, line breaks, terminal sequences and invisible characters are written as escapes.
    """
    line = escaped(str(value)[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def escaped(text: str, but: str = "") -> str:
    """Return a text with characters that do not print, but those of ``but``, as escapes."""
    return "".join(
        letter if letter.isprintable() or letter in but else letter.encode("unicode_escape").decode()
        for letter in text
    )
