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
from itertools import pairwise
from pathlib import Path

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


@dataclass(frozen=True)
class TileCost:
    """Instructions of a warp for a tile.

    Attributes:
        tile: What is done once.
        halves: For half of it, by its kind (``HeadTiles`` in codes.h).
    """

    tile: int
    halves: dict[int, int]

    def of(self, kinds: int) -> int:
        """Instructions for a tile whose second half's kind stands four bits above the first's; 0 for no tile."""
        return self.tile + sum(self.halves[kind] for kind in (kinds & 15, kinds >> 4) if kind) if kinds else 0


@dataclass(frozen=True)
class UnitCost:
    """Instructions of a warp for a unit, two blocks of 64 tokens, of one head.

    Attributes:
        body: What is done once.
        block: What the fast dimensions of a block take beside passes.
        fast_pass: What a pass over some fast dimensions does beside decoding, by their number: 32 or 48.
        mean: What the means of sixteen fast dimensions take.
        slow: For tiles of slow dimensions of keys.
        fast: For tiles of fast dimensions of a block in a pass, by the pass's dimensions.
        values: For tiles of values.
    """

    body: int
    block: int
    fast_pass: dict[int, int]
    mean: int
    slow: TileCost
    fast: dict[int, TileCost]
    values: TileCost

    def instructions(self, keys: Sequence[int], slow_tiles: int, fast: int, values: Sequence[int]) -> int:
        """Instructions of a warp for a unit.

        Args:
            keys: Kinds of the tiles of keys of a head, the second half's four bits above the first's.
            slow_tiles: How many of them are of slow dimensions.
            fast: Fast dimensions.
            values: Kinds of the tiles of values.

        Returns:
            The number.
        """
        count = self.body + 2 * self.block + fast // 16 * self.mean
        count += sum(map(self.slow.of, keys[:slow_tiles])) + sum(map(self.values.of, values))
        for first in range(0, fast, 48):
            size = 32 if fast - first <= 32 else 48
            count += 2 * (self.fast_pass[size] + sum(map(self.fast[size].of, keys[slow_tiles:])))
        return count


FETCH, ALL_COLUMNS = 14, 15
"""Marks in ``attend_codes`` beside those of widths."""


def unit_cost(cubin: bytes) -> UnitCost:
    """Count the instructions of ``attend_codes`` from one unit to the next, on the ways that lead through its marks.

    There are neither masks nor soft caps, and no score is a thousand times larger than those before.

    Args:
        cubin: Machine code with marks.

    Returns:
        The counts, without the marks.

    Raises:
        ValueError: The loops are not those of this kernel.
    """
    body = functions(cubin)["attend_codes"]
    ways = _ways(body)
    marks = {a: int(text.split()[-1], 16).bit_length() - 1 for a, text in body if operations([(a, text)])["PMTRIG"]}
    spans = loops(body)

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    def has_products(span: tuple[int, int]) -> bool:
        return bool(operations([each for each in body if span[0] <= each[0] <= span[1]])["HMMA"])

    inmost = sorted(s for s in spans if has_products(s) and not any(holds(s, other) for other in spans))
    if len(inmost) != 4:
        raise ValueError(f"attend_codes has {len(inmost)} inmost loops with products, expected 4")
    fast, slow, means, values = inmost  # of means the steps, of the others the halves of tiles

    def around(span: tuple[int, int]) -> list[tuple[int, int]]:
        return sorted((s for s in spans if holds(s, span)), key=lambda span: span[1] - span[0])

    outer = around(fast)
    if len(outer) < 4 or [all(holds(s, each) for each in inmost) for s in outer[:4]] != [False, False, False, True]:
        raise ValueError("the loops around that of fast dimensions are not those of tiles, passes, blocks and units")
    fast_tiles, passes, blocks, units = outer[:4]

    def without(span: tuple[int, int]) -> dict[int, list[int]]:
        """Where a loop is left as soon as it is reached."""
        inside = range(span[0], span[1] + 1)
        left = {to for at, found in ways.items() if at in inside for to in found if to not in inside}
        return ways | {span[0]: sorted(left)}

    places = [a for a, kind in marks.items() if kind == FETCH and units[0] < a < units[1]]  # of keys, then of values
    stops = [units[0], *places, units[1]]
    if len(places) != 4:
        raise ValueError(f"{len(places)} places fetch blocks, expected two of keys and two of values")
    once = sum(_shortest(without(blocks), *pair) for pair in pairwise(stops)) - len(places)
    some = {at: [to for to in found if marks.get(to) != ALL_COLUMNS] for at, found in ways.items()}
    sizes = ((32, some, 0), (48, ways, 1))

    def tile_cost(half: tuple[int, int], taken: dict[int, list[int]], more: int = 0) -> TileCost:
        tile = around(half)[0]
        once = _longest(taken | {half[0]: without(half)[half[0]]}, *tile) + 1
        return TileCost(once, _half_costs(taken, half, marks, more))

    return UnitCost(
        once,
        _longest(without(passes), *blocks),
        {
            size: _longest(taken | {fast_tiles[0]: without(fast_tiles)[fast_tiles[0]]}, *passes) + 1 - more
            for size, taken, more in sizes
        },
        _longest(ways, *means) + 1,
        tile_cost(slow, ways),
        {size: tile_cost(fast, taken, more) for size, taken, more in sizes},
        tile_cost(values, ways),
    )


def _ways(body: list[tuple[int, str]]) -> dict[int, list[int]]:
    """By the address of an instruction, where the next one may be."""
    found: dict[int, list[int]] = {}
    for (address, text), following in zip(body, [a for a, _ in body[1:]] + [-1], strict=True):
        name = next(iter(operations([(address, text)])))
        always = not re.match(r"@|.*\bBRA(?:\.\w+)*\s+!?U?P\d", text)
        to = [int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)] if name == "BRA" else []
        if name == "BRX":
            raise ValueError("a jump table: where it leads is not in the disassembly")
        if not (always and name in ("BRA", "EXIT")) and following >= 0:
            to.append(following)
        found[address] = to
    return found


def _shortest(ways: dict[int, list[int]], start: int, stop: int) -> int:
    """Instructions from one address to the one before another, on the shortest way."""
    seen, edge, count = {start}, [start], 0
    while edge:
        if stop in edge:
            return count
        edge = list({to for at in edge for to in ways[at]} - seen)
        seen |= set(edge)
        count += 1
    raise ValueError(f"no way leads from {start:#x} to {stop:#x}")


def _longest(ways: dict[int, list[int]], start: int, stop: int) -> int:
    """The same on the longest way that goes forward only."""
    best = {start: 0}
    for at in sorted(ways):
        if start <= at < stop and at in best:
            for to in ways[at]:
                if at < to <= stop:
                    best[to] = max(best.get(to, 0), best[at] + 1)
    if stop not in best:
        raise ValueError(f"no way leads from {start:#x} to {stop:#x}")
    return best[stop]


def _half_costs(
    ways: dict[int, list[int]], span: tuple[int, int], marks: dict[int, int], more_marks: int = 0
) -> dict[int, int]:
    """Instructions of a loop over the halves of a tile, by their kind, whose code has a mark."""
    places = {marks[a]: a for a in sorted(marks) if span[0] <= a <= span[1] and marks[a] < FETCH}
    return {  # with the branch at the end, without marks
        kind: _shortest(ways, span[0], at) + _longest(ways, at, span[1]) - more_marks for kind, at in places.items()
    }
