"""The ``xview-loc`` command."""

from __future__ import annotations

import signal
import sys
import time


def main() -> None:
    """Run the command until it ends or is interrupted: one line then, and exit code 130.

    Imports take seconds, so they are interrupted like the command itself.
    """
    last = -1.0

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        # A second one at once would disturb the tidying up; a later one ends what has caught the first.
        if time.monotonic() > last + 1.0:
            last = time.monotonic()
            raise KeyboardInterrupt

    # Programs started in the background by a shell ignore it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from xview_loc.cli import commands

        commands.main()
    except BaseException:
        # Imports may turn the interruption into an error of their own.
        if last < 0.0:
            raise
        print("xview-loc: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        # Python's end is not worth interrupting.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
