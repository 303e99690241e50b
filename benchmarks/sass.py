"""What the GPU's compiler made of a kernel: instructions of its loops, from the disassembly."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantcache_kernels.cuda.layout import ANCHOR, CLASSES, TILE, stored_width

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


@cache
def disassembled(cubin: bytes) -> str:
    """What the disassembler tells of machine code: what kernels take, and their instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump(), "-res-usage", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(cubin: bytes) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of every kernel.

    Args:
        cubin: Machine code.

    Returns:
        Instructions by the kernel's name.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in disassembled(cubin).splitlines():
        if "Function :" in line:
            name = line.split(":")[1].strip()
            found[name] = []
        elif name and (match := LINE.match(line)):
            found[name].append((int(match[1], 16), match[2]))
    return found


def resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """What every kernel takes.

    Args:
        cubin: Machine code.

    Returns:
        By the kernel's name: ``registers`` of a thread, bytes of its ``stack``, number of ``local`` loads and stores.
    """
    found = {}
    counts = {name: operations(body) for name, body in functions(cubin).items()}
    for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", disassembled(cubin)):
        local = counts[name]["LDL"] + counts[name]["STL"]
        found[name] = {"registers": int(registers), "stack": int(stack), "local": local}
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


@dataclass(frozen=True)
class AnchorCost:
    """Instructions of a warp for one anchor of one head of the CUDA kernel.

    Attributes:
        body: What does not depend on the widths.
        keys: For a tile of keys, by stored width.
        values: For a tile of values, likewise.
    """

    body: int
    keys: dict[int, int]
    values: dict[int, int]

    def lane_operations(self, keys: Sequence[int], values: Sequence[int]) -> float:
        """Operations of a lane for one coefficient of one token.

        Args:
            keys: Widths of a head's tiles of keys, those without bits included.
            values: Likewise.

        Returns:
            The mean over keys and values.
        """
        count = self.body
        for costs, widths in ((self.keys, keys), (self.values, values)):
            count += sum(costs[stored_width(width)] for width in widths if width)
        return 32 * count / (ANCHOR * TILE * (len(keys) + len(values)))


def anchor_cost(cubin: bytes) -> AnchorCost:
    """Count ``attend``'s instructions between one anchor and the next.

    The loop over anchors holds one loop for every width of keys, then of values, in the order of ``layout.CLASSES``:
    those with products for tensor cores. Everything else counts once, also what only a first or a last anchor needs;
    left out are the loops that scale all sums anew when a score is a thousand times larger than those before.

    Args:
        cubin: Machine code.

    Returns:
        The counts.

    Raises:
        ValueError: The loops are not those of this kernel.
    """
    body = functions(cubin)["attend"]
    spans = loops(body)

    def within(span: tuple[int, int]) -> list[tuple[int, str]]:
        return [each for each in body if span[0] <= each[0] <= span[1]]

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    inmost = [span for span in spans if not any(holds(span, other) for other in spans)]
    tiles = sorted(span for span in inmost if operations(within(span))["IMMA"])
    around = [span for span in spans if tiles and all(holds(span, tile) for tile in tiles)]
    if len(tiles) != 2 * len(CLASSES) or not around:
        raise ValueError(f"attend has {len(tiles)} loops with products of tiles, expected {2 * len(CLASSES)}")
    anchors = min(around, key=lambda span: span[1] - span[0])
    rescaling = [
        span for span in inmost if holds(anchors, span) and span not in tiles and operations(within(span))["STS"]
    ]
    apart = [each for span in (*tiles, *rescaling) for each in within(span)]
    counts = [len(within(tile)) for tile in tiles]
    keys, values = counts[: len(CLASSES)], counts[len(CLASSES) :]
    return AnchorCost(
        len(within(anchors)) - len(apart),
        dict(zip(CLASSES, keys, strict=True)),
        dict(zip(CLASSES, values, strict=True)),
    )
