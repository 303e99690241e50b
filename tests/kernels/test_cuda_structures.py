"""The CUDA kernels' arguments in Python are as their sources declare them: one swapped field is wrong numbers."""

from __future__ import annotations

import ctypes
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import quantcache_kernels.cuda
from quantcache_kernels.cuda import structures

SOURCES = Path(quantcache_kernels.cuda.__file__).parent / "src"

STRUCTURES: dict[str, Any] = {
    name: kind
    for name, kind in inspect.getmembers(structures, inspect.isclass)
    if issubclass(kind, ctypes.Structure) and kind.__module__ == structures.__name__
}

KINDS: dict[str, Any] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "u32": ctypes.c_uint32,
    "long long": ctypes.c_longlong,
    **STRUCTURES,
}


def declared(name: str) -> list[tuple[str, Any, list[str]]]:
    """Fields of a structure in the sources: name, ctypes' type (a pointer is a pointer) and sizes of an array."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(SOURCES.glob("*.h")))
    found = re.findall(rf"^struct {name} {{(.*?)^}};", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{name} is declared {len(found)} times"
    fields = []
    for line in re.sub(r"//[^\n]*", "", found[0]).split(";"):
        declaration = re.fullmatch(r"\s*(?:const )?(long long|\w+)(\*?) (.*)", line.strip())
        if declaration is not None:
            kind, star, names = declaration.groups()
            for each in names.split(","):
                field, *sizes = re.findall(r"[\w +]+", each)
                fields.append((field.strip(), structures.Pointer if star else KINDS[kind], sizes))
    return fields


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_those_of_the_sources(name: str) -> None:
    fields = declared(name)
    assert [field for field, *_ in fields] == [field for field, *_ in STRUCTURES[name]._fields_]
    for (field, kind, sizes), (_, own) in zip(fields, STRUCTURES[name]._fields_, strict=True):
        for size in sizes:
            assert own._length_ == int(size) if size.isdigit() else own._length_ > 0, f"{name}.{field}"
            own = own._type_
        assert own is kind, f"{name}.{field} is {own.__name__}"
