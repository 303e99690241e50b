"""How far long work has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EVERY = 60.0
"""Seconds between two lines at least."""


def progress_bar(wanted: bool = True) -> Progress:
    """A bar on stderr that leaves nothing behind; where stderr is no terminal, a line for each minute of work.

    Args:
        wanted: Show anything at all.

    Returns:
        The bar, to be used as a context manager.
    """
    console = Console(stderr=True)
    if wanted and not console.is_terminal:
        return _Lines(console=console, disable=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not wanted)


class _Lines(Progress):
    """Says where its tasks stand in lines, for those who read a log hours later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._began = self._told = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Add to what is done of a task."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task."""
        super().update(task_id, **changes)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        """Write a line, unless the last one is not long ago."""
        now = time.monotonic()
        if now - self._told < EVERY:
            return
        self._told = now
        task = self._tasks[task_id]
        total = "" if task.total is None else f" of {task.total:,.0f}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            line = f"{task.description}: {task.completed:,.0f}{total} after {(now - self._began) / 60:,.0f} min"
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Spare the reader transformers' progress bars, inside the context.

    Yields:
        Nothing.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
