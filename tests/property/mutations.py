"""Damage and malice for files: what a fuzz test does to safetensors and JSON."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

HOSTILE_NAMES = (
    "../../escape",
    "/etc/passwd",
    "layers.0.key.mean/../../x",
    "__class__",
    "a" * 10_000,
    "\0",
    "con:",
    "",
)

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 64, 1 << 31, 1 << 63, 1 << 200, -(1 << 63), 0.5, 1e308, -1e308, 1e-320),
    *("", "joint", "half", "none", "1.0", "__import__('os').system('true')", "\ud7ff", "x" * 100_000),
    *([], {}, [[]], [None], {"": {}}, [1] * 10_000, [0.9, "x"], ["__reduce__"]),
)

FIELDS = {"dtype", "shape", "data_offsets"}
"""What safetensors says of a tensor."""

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "NOPE")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, extend, overwrite or move bytes, most often near the start, where headers are.

    Args:
        data: A file.
        rng: Source of chance.

    Returns:
        The damaged file.
    """
    found = bytearray(data)
    reach = rng.choice((min(len(found), 16), min(len(found), 2000), len(found)))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        kind, place = rng.randrange(6), rng.randrange(max(1, reach))
        if kind <= 1 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del found[place:]
        elif kind == 3:
            found[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 4:
            found[place : place + 8] = rng.choice((b"\0", b"\xff")) * 8
        else:
            size = rng.randrange(1, 200)
            source = rng.randrange(max(1, len(found)))
            found[place : place + size] = found[source : source + size]
    return bytes(found)


def rewritten_json(data: bytes, rng: random.Random) -> bytes:
    """Change values of a JSON document, or wrap it in something that is hard to parse.

    Args:
        data: The document.
        rng: Source of chance.

    Returns:
        The new document.
    """
    kind = rng.randrange(12)
    if kind == 0:
        return b"[" * 200_000
    if kind == 1:
        return b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    if kind == 2:
        return data.replace(b'"bits"', b'"bits": NaN, "x"', 1)
    if kind == 3:
        return data.replace(b": 3", b": " + b"9" * rng.choice((400, 5000)), 1)
    if kind == 4:
        return data.rstrip().removesuffix(b"}") + b"," + data.lstrip().removeprefix(b"{")
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        _change(document, rng)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _change(document: Any, rng: random.Random) -> None:
    """Replace, drop or add one entry somewhere in nested objects and lists."""
    while True:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = document[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            document = inner
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del document[key]
        elif kind == 1 and isinstance(document, dict):
            document[rng.choice(HOSTILE_NAMES)] = document.pop(key)
        elif kind == 2 and len(keys) > 1:
            other = rng.choice(keys)
            document[key], document[other] = document[other], document[key]
        else:
            document[key] = rng.choice(HOSTILE_VALUES)
        return


FLOATS = (0.0, -1.0, 1e-300, 1e-38, 1e-20, 1e-6, 1e3, 1e9, 1e18, 1e30, 3e38, 1e300, float("nan"), float("inf"))


def rewritten_values(data: bytes, rng: random.Random) -> bytes:
    """Overwrite elements of a safetensors file, a few or a run of them.

    Args:
        data: The file.
        rng: Source of chance.

    Returns:
        The new file.
    """
    (size,) = struct.unpack("<Q", data[:8])
    found = bytearray(data)
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 8))):
        entry = header[rng.choice(names)]
        first, last = (8 + size + offset for offset in entry["data_offsets"])
        form = {"F32": "<f", "F64": "<d"}.get(entry["dtype"], "<B")
        width = struct.calcsize(form)
        value = rng.randrange(10) if form == "<B" else min(rng.choice(FLOATS), 3e38 if form == "<f" else 1e300)
        start = rng.randrange((last - first) // width)
        for place in range(start, min(start + rng.choice((1, 1, 16, 10_000)), (last - first) // width)):
            struct.pack_into(form, found, first + place * width, value)
    return bytes(found)


def rewritten_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file: names, dtypes, shapes, offsets, metadata, or its claimed length.

    Args:
        data: The file.
        rng: Source of chance.

    Returns:
        The new file.
    """
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, size + 1, size - 1, 1 << 30, 1 << 60, (1 << 64) - 1))) + data[8:]
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        name, other = rng.choice(names), rng.choice(names)
        entry = header.get(name)
        kind = rng.randrange(8)
        pair = (entry, header.get(other))
        if not all(isinstance(e, dict) and e.keys() >= FIELDS and isinstance(e["shape"], list) for e in pair):
            continue
        if kind == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 1:
            entry["shape"] = rng.choice(([1 << 40], [1 << 31, 1 << 31], [0], [-1], [], entry["shape"][::-1], [[1]]))
        elif kind == 2:
            entry["data_offsets"] = rng.choice(([0, 1 << 60], [8, 4], [0, 0], [-4, 0], header[other]["data_offsets"]))
        elif kind == 3:
            for field in FIELDS:
                entry[field], header[other][field] = header[other][field], entry[field]
        elif kind == 4:
            header[rng.choice(HOSTILE_NAMES)] = header.pop(name)
        elif kind == 5:
            del header[name]
        elif kind == 6:
            header["__metadata__"] = rng.choice(
                ({}, {"format": "tf"}, {"x" * 1000: "y" * 1_000_000}, [], {"a": {"b": 1}})
            )
        else:
            _change(entry, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]
