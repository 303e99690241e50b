"""What the GPU's compiler made of a kernel: instructions of its loops, from the disassembly."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = (
    "PRMT",
    "LOP3",
    "SHF",
    "IMMA",
    "MUFU",
    "FFMA",
    "FADD",
    "FMUL",
    "LDS",
    "STS",
    "LDL",
    "STL",
    "MOV",
    "IMAD",
    "LDG",
)
"""Operations that tell what a loop does."""

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")


def cuobjdump() -> str:
    """The disassembler: CUDA's, or the one in Triton's package."""
    found = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    if Path(found).exists():
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def functions(cubin: bytes) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of every kernel.

    Args:
        cubin: Machine code.

    Returns:
        Instructions by the kernel's name.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in text.splitlines():
        if "Function :" in line:
            name = line.split(":")[1].strip()
            found[name] = []
        elif name and (match := LINE.match(line)):
            found[name].append((int(match[1], 16), match[2]))
    return found


def loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of every loop: the branches that go back."""
    spans = []
    for address, text in instructions:
        target = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\d,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))", text)
        if target and target[1] and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    return spans


def operations(instructions: list[tuple[int, str]]) -> Counter[str]:
    """How often every operation occurs."""
    names = (re.sub(r"^@!?U?P\d+\s+", "", text).split()[0].split(".")[0] for _, text in instructions)
    return Counter(names)


def tile_loops(cubin: bytes) -> list[dict[str, Any]]:
    """The loops of ``attend``, outermost last.

    Args:
        cubin: Machine code.

    Returns:
        Of every loop its instructions and, of those, the ones that tell what it does.
    """
    body = functions(cubin)["attend"]
    rows = []
    for first, last in sorted(loops(body), key=lambda span: span[1] - span[0]):
        inside = [x for x in body if first <= x[0] <= last]
        counts = operations(inside)
        kinds = {kind: counts[kind] for kind in KINDS}
        rows.append({"at": first, "instructions": len(inside), **{k: v for k, v in kinds.items() if v}})
    return rows
