"""Untrusted text made safe to show: control characters and markup are escaped."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from quantcache.common.errors import QuantCacheError

_OBEYED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories of controls, direction marks, halves of characters, private use, line and paragraph breaks."""

_MARKS = re.compile(r"([\\`*\[\]<>|])")


_SIGNATURES = {
    b"\x1f\x8b": "it is compressed by gzip: unpack it",
    b"(\xb5/\xfd": "it is compressed by zstd: unpack it",
    b"PK\x03\x04": "it is a zip archive, as office documents are: save it as plain text",
    b"PAR1": 'it is Parquet: save its texts as plain text, or as JSON lines with a "text"',
    b"%PDF": "it is a PDF: save it as plain text",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}
"""How files begin that people have texts in, and what is to be done with them."""


def printable(text: str, keep: str = "") -> str:
    """Write out the characters that a terminal would obey instead of showing them.

    Args:
        text: Text that may come from a stranger.
        keep: Characters to leave, such as a line feed.

    Returns:
        The text with ``\\x1b`` in place of an escape, and so on.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in _OBEYED else ascii(char)[1:-1] for char in text
    )


def one_line(text: str) -> str:
    """A message on one line.

    Args:
        text: Text of any number of lines.

    Returns:
        The message with white space folded, and nothing in it that a terminal obeys.
    """
    return printable(" ".join(text.split()))


def markdown(value: object) -> str:
    """A value as plain text of a Markdown page, in a table too.

    Args:
        value: Shown by its ``str()``.

    Returns:
        One line without markup.
    """
    return _MARKS.sub(r"\\\1", one_line(str(value)))


def read_utf8(content: bytes, name: str | Path) -> str:
    """Decode a text.

    Args:
        content: Bytes of a whole file.
        name: What the error calls it.

    Returns:
        The text, without the mark that some editors put before it.

    Raises:
        QuantCacheError: The text is not UTF-8.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wrong = content[error.start : error.start + 1].hex()
        known = (told for start, told in _SIGNATURES.items() if content.startswith(start))
        flaw = next(known, f"{error.reason} 0x{wrong} at byte {error.start}")
        raise QuantCacheError(f"{name} is not UTF-8 text: {flaw}") from error
