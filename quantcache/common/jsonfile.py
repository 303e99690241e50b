"""JSON: read strictly and within bounds, written complete or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

MOST_BYTES = 4 << 20
"""Size of a description that is read; the largest of real models have some 200 KB."""

MOST_DEPTH = 32
"""Nesting of a description that is read."""


def read_json(path: Path) -> Any:
    """Read a description that may come from a stranger.

    Args:
        path: JSON file of at most 4 MiB.

    Returns:
        What it holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or not what :func:`parse_json` takes.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    return parse_json(content.decode("utf-8"))


def parse_json(text: str) -> Any:
    """Parse a description that may come from a stranger.

    Args:
        text: JSON of at most 4 MiB.

    Returns:
        What it holds.

    Raises:
        ValueError: It is not JSON, is too large or too deep, says a thing twice, or has numbers or characters that
            JSON or UTF-8 cannot hold.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels") from None
    level = [data]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return data
    raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it says {twice!r:.60} twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"it has the number {name}, which is not JSON")


def _inside(data: Any) -> list[Any]:
    """What a value holds, after a look at its characters."""
    if isinstance(data, dict):
        return [*data, *data.values()]
    if isinstance(data, str) and not data.isascii():
        data.encode("utf-8")  # lone surrogates are refused
    return data if isinstance(data, list) else []


def to_json(data: Any) -> str:
    """Serialize a result; numbers that JSON cannot hold (infinite, not a number) become null.

    Args:
        data: Dicts, lists, strings and numbers.

    Returns:
        Indented JSON; characters that a terminal would obey, and halves of characters, are escaped.
    """
    text = json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    return "\n".join("".join(map(_escaped, line)) if not line.isprintable() else line for line in text.split("\n"))


def _escaped(char: str) -> str:
    """A character inside JSON; line feeds of the layout are not among them."""
    return char if char.isprintable() else json.dumps(char)[1:-1]


def finite(data: Any) -> Any:
    """A copy of a result in which numbers that JSON cannot hold are None.

    Args:
        data: Dicts, lists, strings and numbers.

    Returns:
        Dicts, lists and values of the same structure.
    """
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """Write a result, complete or not at all.

    Args:
        path: The file; its folder must exist.
        data: Dicts, lists, strings and numbers.
    """
    write_file(path, (to_json(data) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all.

    Args:
        path: The file; its folder must exist.
        content: What is to be in it.
    """
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # temporary files are made readable by their owner only
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
