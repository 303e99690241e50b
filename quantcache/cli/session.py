"""What all verbs share: where output goes, and how errors end."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType

from quantcache.cli.pages import WrongUsage
from quantcache.cli.terminal import Shown, print_result, report, report_error, writing_stdout
from quantcache.common.errors import QuantCacheError
from quantcache.common.grid import Prose
from quantcache.common.interrupts import INTERRUPTED, Interrupted
from quantcache.common.jsonfile import to_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from quantcache.evaluation.cells import Cells, Key


class Session:
    """One run of a verb: collects the result, which is printed at its end."""

    def __init__(self) -> None:
        self.data: dict[str, Any] | None = None
        self.shown: tuple[RenderableType, ...] = ()

    def finish(self, data: dict[str, Any], *shown: RenderableType) -> None:
        """Set the result.

        Args:
            data: What ``--json`` prints.
            shown: What people are shown instead.
        """
        self.data, self.shown = data, shown


@contextlib.contextmanager
def session(as_json: bool, debug: bool) -> Iterator[Session]:
    """Run a verb's body with stdout kept for its result, and errors turned into one line.

    Args:
        as_json: Print the result as JSON.
        debug: Let exceptions through.

    Yields:
        Where the body leaves its result.

    Raises:
        typer.Exit: After an error, with status 1; after Ctrl-C, with status 130.
        WrongUsage: The body refuses an option; so does typer.BadParameter.
    """
    run = Session()
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield run
    except KeyboardInterrupt as error:
        report_error(str(error) or "interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if Interrupted.seen:
            report_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        if debug or isinstance(error, typer.Exit | typer.BadParameter | WrongUsage):
            raise
        report_error(describe(error))
        raise typer.Exit(1) from None
    if run.data is None:
        return
    if as_json:
        print_result(to_json(run.data))
        return
    # Rich assumes 80 columns where it cannot ask, and would fold tables that go to a file or a pipe.
    # A model's text must come out as it is: no markup, no folding.
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if known else 120, highlight=False, markup=False)
    console.width = console.width or 120  # COLUMNS=0 says that nobody knows; rich would print nothing
    with writing_stdout():
        for item in run.shown:
            folds = not isinstance(item, str) or (isinstance(item, Prose) and sys.stdout.isatty())
            console.print(Shown(item), soft_wrap=not folds)


def describe(error: Exception) -> str:
    """One line about an exception.

    Args:
        error: Any exception.

    Returns:
        Its message; with its type in front where it was not raised on purpose.
    """
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        copied = f" to {error.filename2}" if error.filename2 else ""  # and which of both it is about is not known
        return f"{error.filename}{copied}: {error.strerror}"
    if isinstance(error, QuantCacheError | OSError | ValueError | ImportError) and message:
        return message
    name = type(error).__name__
    return f"{name}: {message} (--debug shows where)" if message else f"{name} (--debug shows where)"


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    report("warning", str(message))


def show_cells(cells: Cells, bar: Progress) -> None:
    """Show a run's cells on a progress bar, a line for each suite.

    Args:
        cells: Its callbacks are set.
        bar: Bar to add the lines to.
    """
    tasks: dict[str, TaskID] = {}

    def plan(suite: str, count: int) -> None:
        tasks[suite] = bar.add_task(suite, total=count)

    def done(key: Key) -> None:
        if key[0] in tasks:
            bar.update(tasks[key[0]], advance=1, description=f"{key[0]} {key[1]}")

    cells.on_plan, cells.on_done = plan, done
