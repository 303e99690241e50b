"""JSON: read strictly and within bounds, as the types that it should have; written complete or not at all."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from quantcache.common.writing import write_file

MAX_BYTES = 4 << 20
"""Size of a description that is read; the largest of real models have some 200 KB."""

MAX_RESULT_BYTES = 256 << 20
"""Size of a result, a list of questions or an index of weights that is read."""

MAX_DEPTH = 32
"""Nesting of what is read."""

LARGEST = 1e300
"""No measurement is beyond this, and sums of such numbers would overflow."""

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
    """Read JSON that may come from a stranger.

    Args:
        path: The file.
        most: Bytes that are read at most.

    Returns:
        What it holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is too large, or not what :func:`parse_json` takes.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    return parse_json(content, most)


def parse_json(text: str | bytes, most: int = MAX_BYTES) -> Any:
    """Parse JSON that may come from a stranger.

    Args:
        text: The JSON, UTF-8 where it is bytes.
        most: Bytes or characters that are taken at most.

    Returns:
        What it holds.

    Raises:
        ValueError: It is not JSON, is too large or too deep, says a thing twice, or has numbers or characters that
            JSON or UTF-8 cannot hold.
    """
    if len(text) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8")
        data = json.loads(plain, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return data
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


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


def as_type(kind: Any, value: Any, name: str = "") -> Any:
    """A value of some type, from parsed JSON: every part of it is checked.

    Args:
        kind: A dataclass, ``str``, ``int``, ``float``, ``bool``, ``Any``, a ``Literal``, a list, a tuple of any length,
            or a dict of such, or a union of one of them with None or a ``Literal``.
        value: The JSON.
        name: What messages call it; empty for the whole.

    Returns:
        The value. Fields that a dataclass does not have are left out, those with defaults may be missing.

    Raises:
        ValueError: The first flaw, with the place where it is.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        if not any(value == each and type(value) is type(each) for each in arguments):
            raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r:.60}")
        return value
    if origin in (types.UnionType, typing.Union):
        literals = [each for part in arguments if typing.get_origin(part) is typing.Literal for each in part.__args__]
        if (value is None and type(None) in arguments) or (isinstance(value, str) and value in literals):
            return value
        plain = (each for each in arguments if each is not type(None) and typing.get_origin(each) is not typing.Literal)
        return as_type(next(plain), value, name)
    if dataclasses.is_dataclass(kind):
        return _as_dataclass(kind, value, name)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r:.60}")
        return origin(as_type(arguments[0], item, f"{name}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r:.60}")
        return {key: as_type(arguments[1], item, f"{name}[{key!r}]") for key, item in value.items()}
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {_WORDS[kind]}, got {value!r:.60}")
    if kind in (int, float) and not abs(value) < LARGEST:
        raise ValueError(f"{name} must be a number below {LARGEST:g}, got {value!r:.60}")
    return float(value) if kind is float else value


_hints = functools.cache(typing.get_type_hints)


def _as_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'it'} must be an object, got {value!r:.60}")
    hints, none = _hints(kind), dataclasses.MISSING
    fields = dataclasses.fields(kind)
    missing = [
        each.name for each in fields if each.name not in value and each.default is none and each.default_factory is none
    ]
    if missing:
        raise ValueError(f"{name or 'it'} lacks {', '.join(missing)}")
    inside = f"{name}." if name else ""
    given = [each.name for each in fields if each.name in value]
    return kind(**{each: as_type(hints[each], value[each], f"{inside}{each}") for each in given})


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
