"""The command line's streams: output is escaped, and a failing stream ends in a one-line error."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

from quantcache.common.plaintext import one_line, printable


class StdoutFailed(Exception):
    """The result could not be written."""


class Shown:
    """A renderable whose text has nothing in it that a terminal obeys.

    Args:
        item: What to show.
    """

    def __init__(self, item: RenderableType):
        self.item = item

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render with controls written out; rich's own styles stay."""
        for segment in console.render(self.item, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n\t"), segment.style)


class _Closed(io.StringIO):
    """Stands for a stdout that was closed from the start."""

    def write(self, text: str) -> int:
        """Refuse."""
        raise OSError(errno.EBADF, "it is closed")


def prepare_streams() -> None:
    """Make sure of three open streams that can take any character."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # A closed descriptor would be given to the next file that is opened, and output would land in it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # whoever replaced it knows best
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def print_result(text: str) -> None:
    """Print JSON on stdout, in ASCII where stdout takes no more.

    Args:
        text: One line of JSON.

    Raises:
        StdoutFailed: Stdout cannot be written.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join(char if char.isascii() else json.dumps(char)[1:-1] for char in text)
    with writing_stdout():
        print(text)


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """Write to stdout, and know at the end that it has arrived.

    Yields:
        Nothing.

    Raises:
        StdoutFailed: What was written has not arrived.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise  # a file's, not the stream's
        drop_stdout()
        raise StdoutFailed("" if error.errno == errno.EPIPE else f"stdout: {error.strerror or error}") from error


def drop_stdout() -> None:
    """Send what is still to be written to stdout nowhere: Python would try it again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def report_error(message: str) -> None:
    """Print the one line that an error ends in.

    Args:
        message: What went wrong.
    """
    report("error", message)


def report(kind: str, message: str) -> None:
    """Print a line on stderr, if anybody reads it.

    Args:
        kind: ``error``, ``warning`` or ``note``.
        message: Line without a line break.
    """
    with contextlib.suppress(OSError, ValueError):
        print(f"{kind}:", one_line(message), file=sys.stderr, flush=True)
