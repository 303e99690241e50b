"""Compile the Triton kernels for GPUs that are not there, exactly as a launch would, and read what came out.

Triton compiles without a GPU if it is told which one to compile for. A stub stands in for the driver, launches stop
once the kernel is compiled, and arguments stay on the CPU: everything else, the wrappers' choice of variants and
Triton's specialisation of arguments included, is what runs on a GPU. It needs a process without ``TRITON_INTERPRET=1``:

    PYTHONPATH=.:kernels:benchmarks python -m tests.kernels.compiling --target 90 --only llama-8b:attend
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quantcache import SpectralCache, backends
from tests.helpers import attend_by_kernel
from tests.kernels.cases import ATTENTION, BASE, TRELLIS, TRITON, Case, fill

HALF = replace(BASE, dtype=torch.bfloat16, widths=3)

GEOMETRIES = {
    "llama-8b": replace(HALF, dim=128, groups=4, theta=5e5),
    "qwen2.5-7b": replace(HALF, dim=128, groups=7, theta=1e6),
    "qwen3-14b-Tq4": replace(HALF, dim=128, groups=5, theta=1e6, queries=4),
    "gemma-2": replace(HALF, dim=256, groups=2, theta=1e4, softcap=50.0),
    "gemma-3": replace(HALF, dim=256, groups=2, theta=1e6),
    "D64": replace(HALF, dim=64, groups=4, theta=1e4),
}
GEOMETRIES |= {
    f"{name}-trellis": replace(GEOMETRIES[name], coding=("trellis", "trellis")) for name in ("llama-8b", "gemma-2")
}
"""Models' head geometries. ``widths`` is what all coefficients get; kernels do not depend on it but for wide codes."""


@dataclass
class Compiled:
    """One variant of a kernel.

    Attributes:
        kernel: Its name.
        case: The first case that asked for it.
        target: Compute capability, such as 90.
        key: Triton's key of the variant.
        seconds: What compiling took.
        registers: Of a thread.
        stack: Bytes of a thread's stack: what did not fit in registers.
        local: Local loads and stores in the kernel's longest loop.
        loop: Instructions in that loop.
        front_end: Whether that is all that it has passed.
        error: Why it did not compile; empty if it did.

    ``local`` and ``loop`` are read for attention alone: disassembling costs half as much again as compiling.
    """

    kernel: str
    case: str
    target: int
    key: str = ""
    seconds: float = 0.0
    registers: int = 0
    stack: int = 0
    local: int = 0
    loop: int = 0
    front_end: bool = False
    error: str = ""


class StubDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """A device of its own for each capability: Triton keeps kernels by device."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        """The only stream."""
        return 0


@contextmanager
def stopped_launches(
    capability: int, wanted: Callable[[str, str], bool]
) -> Iterator[list[tuple[str, str, Any, float]]]:
    """Let every launch end before it launches.

    Args:
        capability: What to compile for.
        wanted: Whether a variant, given a kernel's name and a key, is to be compiled.

    Yields:
        A list that every launch adds to: name and key of each new variant, what compiling gave (a kernel, an
        exception, or None where it was not wanted), and the seconds that it took.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from quantcache_kernels.triton import ops, runtime

    run = JITFunction.run
    before = (ops.unavailable, runtime.unavailable, runtime.on_cuda)
    found: list[tuple[str, str, Any, float]] = []
    seen: set[tuple[str, str]] = set()

    def hook(*, key: Any, fn: Any, **more: Any) -> bool:
        variant = (fn.name.rpartition(".")[2], str(key))
        if variant in seen:
            return True
        seen.add(variant)
        found.append((*variant, None, 0.0))
        return not wanted(*variant)

    def stopped(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        count, started = len(found), time.perf_counter()
        try:
            result = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            result = error
        if len(found) > count:
            found[-1] = (*found[-1][:2], result, time.perf_counter() - started)
        elif isinstance(result, Exception):
            raise result

    driver.set_active(StubDriver(capability))
    JITFunction.run = stopped
    ops.unavailable = runtime.unavailable = lambda device: None
    runtime.on_cuda = lambda device: True
    knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = None
        JITFunction.run = run
        ops.unavailable, runtime.unavailable, runtime.on_cuda = before


class FrontEndPassed(Exception):
    """A kernel is in Triton's intermediate representation, type-checked and verified."""


@contextmanager
def front_end_only() -> Iterator[None]:
    """Stop compiling behind what the target has no say in: a tenth of the work, and where most mistakes show."""
    from triton.backends.nvidia.compiler import CUDABackend

    def stop(*args: Any, **kwargs: Any) -> None:
        raise FrontEndPassed

    whole = CUDABackend.__dict__["make_ttgir"]
    CUDABackend.make_ttgir = staticmethod(stop)
    try:
        yield
    finally:
        CUDABackend.make_ttgir = whole


class Novelties:
    """Picks variants that have what no earlier one of their kernel has.

    That is a value of any parameter, two switches that stand so for the first time, or a switch beside other types of
    arguments. It is two thirds of all variants; the others compile what has been compiled, in another company.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[str, ...]] = set()
        self.picked: dict[tuple[str, str], bool] = {}

    def __call__(self, kernel: str, key: str) -> bool:
        """Whether a variant is one of them."""
        if (kernel, key) not in self.picked:
            new = {(kernel, *each) for each in self._features(key)} - self.seen
            self.seen |= new
            self.picked[kernel, key] = bool(new)
        return self.picked[kernel, key]

    @staticmethod
    def _features(key: str) -> set[tuple[str, ...]]:
        found = re.findall(r"\('([^']*)', ((?:[^()]|\([^()]*\))*)\)", key)
        if not found:
            return {(key,)}
        values = [f"{place} {kind} {value}" for place, (kind, value) in enumerate(found)]
        switches = [v for v, (kind, value) in zip(values, found, strict=True) if value in ("True", "False", "'ieee'")]
        types = " ".join(kind for kind, _ in found if kind.startswith("*"))
        pairs = itertools.combinations(switches, 2)
        return {*((each,) for each in values), *pairs, *((types, each) for each in switches)}


def launch_all(case: Case) -> None:
    """Encode both sides, attend and decode: whatever of it the kernels take."""
    if TRITON.leaves(case):
        return
    filled = fill(replace(case, tokens=min(case.tokens, 300)), "auto")  # plain torch takes its time for paths
    filled.layer.backend = "triton"
    view = filled.layer.snapshot()
    attend_by_kernel(filled.query, view, filled.mask, case.softcap, filled.s_aux)
    for side in (view.key, view.value):
        assert side.codec is not None
        backends.find("triton").decode(side.codec, side.store.slice(0, 1), view.block_table[:1], view.left_padding)
        new = side.tail.new_zeros(*side.tail.shape[:2], 64, side.tail.shape[3])
        backends.find("triton").encode(side.codec, new, view.block_table[:1], view.left_padding)


Wanted = Callable[[str, str, str], bool]
"""Whether to compile a variant, given the case, the kernel and Triton's key."""


def compile_cases(names: list[str], capability: int, wanted: Wanted = lambda *variant: True) -> list[Compiled]:
    """Compile what some cases launch.

    Args:
        names: The cases.
        capability: What to compile for.
        wanted: What to compile.

    Returns:
        Every variant, with figures if it was compiled.
    """
    result, cases, case = [], ATTENTION | TRELLIS | GEOMETRIES, ""
    with stopped_launches(capability, lambda kernel, key: wanted(case, kernel, key)) as found:
        for case in names:
            count = len(found)
            launch_all(cases[case])
            for kernel, key, made, seconds in found[count:]:
                one = Compiled(kernel, case, capability, key, seconds)
                if isinstance(made, FrontEndPassed):
                    one.front_end = True
                elif isinstance(made, Exception):
                    one.error = f"{type(made).__name__}: {made}"
                elif made is not None:
                    read_binary(one, made.asm["cubin"])
                result.append(one)
    return result


def compile_one(variant: Compiled) -> Compiled:
    """Compile one variant, in a process of a pool."""
    same = (variant.kernel, variant.key)
    found = compile_cases([variant.case], variant.target, lambda case, *other: other == same)
    return next(each for each in found if (each.kernel, each.key) == same)


def variants_while_decoding(steps: int) -> dict[str, int]:
    """How many variants of every kernel a model's layers ask for while they decode.

    Args:
        steps: Decoding steps behind a prefill of 100 tokens, and as many behind a turn of 820 tokens more, so that
            layers have few blocks, then fifteen, sixteen and more. Every layer attends and, now and then, encodes.

    Returns:
        Variants by kernel.
    """
    from gpu_run import llama_config
    from realistic import realistic_calibration

    config = llama_config(layers=4, hidden_size=512, num_attention_heads=4, num_key_value_heads=1)
    with stopped_launches(90, lambda *variant: False) as found:
        cache = SpectralCache(realistic_calibration(config), config, backend="triton")
        for count in (100, *[1] * steps, 820, *[1] * steps):
            for layer in cache.spectral_layers:
                layer.update(*(torch.zeros(1, 1, count, 128, dtype=torch.bfloat16) for _ in range(2)))
                if layer.spans and count == 1:
                    query = torch.zeros(1, 4, count, 128, dtype=torch.bfloat16)
                    attend_by_kernel(query, layer.snapshot())
                layer.flush()
    return dict(Counter(kernel for kernel, *_ in found))


def tool(name: str) -> str:
    """A program of NVIDIA's that comes with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_binary(found: Compiled, binary: bytes) -> None:
    """Fill in registers, stack and the main loop."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [tool("cuobjdump"), "-res-usage", *["-sass"] * (found.kernel == "attend_kernel"), path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    found.registers, found.stack = int(registers), int(stack)
    found.loop, found.local = main_loop(text)


def main_loop(sass: str) -> tuple[int, int]:
    """Instructions, and local loads and stores among them, of the longest loop in a disassembly."""
    code = [
        (int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);\s+/\* 0x", sass)
    ]
    places = {address: index for index, (address, _) in enumerate(code)}
    longest = (0, 0)
    for end, (_, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        first = places.get(int(jump[1], 16), end) if jump else end
        if first < end:  # a jump to itself is the padding behind the code
            body = [each for _, each in code[first : end + 1]]
            longest = max(longest, (len(body), sum(bool(re.search(r"\b(LDL|STL)\b", each)) for each in body)))
    return longest


Picks = list[tuple[str, str]]
"""Regular expressions of cases and of their kernels."""


def picks_of(only: list[str], target: int) -> Picks:
    """What ``--only`` asks for of a target: all that names it or none."""
    found = []
    for pick in only:
        own, _, rest = pick.rpartition("/")
        if own in ("", str(target)):
            case, _, kernels = rest.partition(":")
            found.append((case, kernels))
    return found


def main() -> None:
    """Compile, print one line of JSON for each variant, and fail if one did not compile."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--target", type=int, nargs="+", default=[90])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="regular expressions of case names, or CASE:KERNEL or TARGET/CASE:KERNEL",
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--front-end", action="store_true", help="stop behind what the target has no say in")
    parser.add_argument("--novel", action="store_true", help="leave out variants that combine what others have")
    parser.add_argument(
        "--steps", type=int, help="count variants over this many decoding steps; alone, compile nothing"
    )
    options = parser.parse_args()
    if options.steps:
        print(json.dumps(variants_while_decoding(options.steps)))
        if not options.front_end:
            return

    failed = False
    for target in options.target:
        novel, picks = Novelties(), picks_of(options.only, target)
        names = [name for name in GEOMETRIES | ATTENTION | TRELLIS if any(re.search(pick, name) for pick, _ in picks)]

        def picked(case: str, kernel: str, key: str, novel: Novelties = novel, picks: Picks = picks) -> bool:
            if options.novel and not novel(kernel, key):
                return False
            return any(re.search(pick, case) and re.search(kernels, kernel) for pick, kernels in picks)

        with front_end_only() if options.front_end else nullcontext():
            for found in compiled(names, target, picked, options.jobs):
                failed |= bool(found.error)
                print(json.dumps({k: v for k, v in vars(found).items() if k != "key"}), flush=True)
    sys.exit(failed)


def compiled(names: list[str], target: int, wanted: Wanted, jobs: int) -> Iterator[Compiled]:
    """What :func:`compile_cases` makes of some cases, by several processes if asked for, as it comes."""
    if jobs == 1:
        yield from (each for each in compile_cases(names, target, wanted) if wanted(each.case, each.kernel, each.key))
        return
    listed = compile_cases(names, target, lambda *variant: False)
    variants = [each for each in listed if wanted(each.case, each.kernel, each.key)]
    print(f"sm_{target}: {len(variants)} variants", file=sys.stderr, flush=True)
    # A forked process would wait for ever for the OpenMP threads that torch has started in this one.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, variants)


if __name__ == "__main__":
    main()
