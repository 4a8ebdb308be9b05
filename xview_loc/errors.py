"""The root of the errors that a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used; the message is one clear line that says what to do."""


def reason(error: BaseException) -> str:
    """What an error says, in one line; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
