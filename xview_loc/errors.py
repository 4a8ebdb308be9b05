"""Base class of errors that the user can correct."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input from the user; the message is one clear line: what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """Return an error's message in one line, or its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
