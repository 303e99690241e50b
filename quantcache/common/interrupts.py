"""Ctrl-C and SIGTERM end the program, whatever it is doing."""

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


class Terminated(SystemExit):
    """SIGTERM unwinds the stack, and the program ends with the status that shells have for it."""


def end(number: int, frame: Any) -> NoReturn:
    """Handle SIGTERM while there may be something to be cleared away."""
    raise Terminated(128 + number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the stack inside the context, so that half-written files are cleared away.

    Whoever handles these signals in a way of its own goes on doing so.

    Yields:
        Nothing.
    """
    usual = {signal.SIGINT: (leave_at_once, unwind), signal.SIGTERM: (signal.SIG_DFL, end)}
    here = threading.current_thread() is threading.main_thread()
    before = {number: old for number, (old, _) in usual.items() if here and signal.getsignal(number) is old}
    try:
        for number in before:
            signal.signal(number, usual[number][1])
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
