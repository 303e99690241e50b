"""Ctrl-C: one line and out, whatever the program is doing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def leave_at_once(number: int, frame: Any) -> None:
    """Handle Ctrl-C while there is nothing to be cleared away: one line, and out."""
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


class Interrupted:
    """Whether Ctrl-C was pressed: imports that it breaks into raise something else in place of KeyboardInterrupt."""

    seen = False


def unwind(number: int, frame: Any) -> NoReturn:
    """Handle Ctrl-C while there may be something to be cleared away."""
    Interrupted.seen = True
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C unwind the stack inside the context, so that half-written files are cleared away.

    Yields:
        Nothing.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not leave_at_once:
        yield
        return
    try:
        signal.signal(signal.SIGINT, unwind)
        yield
    finally:
        signal.signal(signal.SIGINT, leave_at_once)
