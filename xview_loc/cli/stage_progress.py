"""Show how far each stage of a long command is."""

from __future__ import annotations

import os
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xview_loc.cli.console import console


class StageProgress:
    """Show each stage as a progress bar on a terminal, else print a line at every tenth.

    Only the first process shows anything.
    """

    def __init__(self) -> None:
        self.first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        speed = TextColumn("{task.fields[rate]}")
        self._bars = Progress(
            *columns, speed, console=console, disable=not (self.first and console.is_terminal)
        )
        self._tasks: dict[str, Any] = {}
        self._printed: dict[str, int] = {}

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` pairs or steps of a stage are done."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, rate="")
        task = self._tasks[stage]
        speed = self._bars.tasks[task].speed
        self._bars.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "")
        tenth = 10 * done // total
        if self.first and not console.is_terminal and tenth != self._printed.get(stage):
            self._printed[stage] = tenth
            print(f"{stage}: {done} of {total}", flush=True)
