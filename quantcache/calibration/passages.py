"""Passages that two texts share, found without keeping either: a small sample of hashed stretches of the one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from quantcache.common.errors import QuantCacheError

WINDOW = 64
"""Bytes of a passage, with capitals and runs of white space evened out."""

SKETCH_SIZE = 512
"""Hashes kept of a text."""

DIGITS = 12
"""Hexadecimal digits of a hash."""

_SKETCH = re.compile(f"([0-9a-f]{{{DIGITS}}})*")


def _hashes(text: str) -> Iterator[str]:
    """Hash of every passage of a text, in order."""
    plain = " ".join(text.lower().split()).encode("utf-8")
    for first in range(len(plain) - WINDOW + 1):
        yield hashlib.blake2b(plain[first : first + WINDOW], digest_size=DIGITS // 2).hexdigest()


def sketch(text: str) -> str:
    """A sample of a text's passages that does not depend on where in a text they stand.

    Source: A. Broder, "On the resemblance and containment of documents" (1997): the smallest hashes.

    Args:
        text: Plain text of any length.

    Returns:
        The smallest hashes, ascending, ``DIGITS`` hexadecimal digits each; empty for a text shorter than a passage.
    """
    return "".join(sorted(set(_hashes(text)))[:SKETCH_SIZE])


def shared(known: str, text: str) -> tuple[int, int]:
    """How many sampled passages of one text occur in another.

    Args:
        known: A text's :func:`sketch`.
        text: Text to search.

    Returns:
        Number of hashes found, and number of hashes in the sketch.

    Raises:
        QuantCacheError: ``known`` is malformed.
    """
    if not isinstance(known, str) or not _SKETCH.fullmatch(known):
        raise QuantCacheError(f"a sketch of passages must be hashes of {DIGITS} hexadecimal digits, got {known!r:.60}")
    hashes = {known[first : first + DIGITS] for first in range(0, len(known), DIGITS)}
    return len(hashes.intersection(_hashes(text))), len(hashes)
