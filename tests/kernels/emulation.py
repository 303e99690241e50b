"""The CUDA kernels on an emulated warp: their source, compiled by the host's compiler, in the place of a GPU's."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantcache_kernels.cuda import codes, conversion, encoding
from quantcache_kernels.cuda.compiler import SOURCES
from quantcache_kernels.cuda.driver import CODE_KERNELS, CONVERSION_KERNELS, ENCODER_KERNELS

COMPILER = shutil.which("g++") or shutil.which("clang++")

FOLDER = Path(__file__).resolve().parents[2] / "build" / "emulated"

# Checked functions take the jumps from one lane's stack to another's for errors.
FLAGS: tuple[str, ...] = ("-O1", "-U_FORTIFY_SOURCE", "-std=c++17", "-shared", "-fPIC")

if os.environ.get("QUANTCACHE_SANITIZE") and COMPILER is not None:
    # Every access of a kernel must lie in a tensor and be aligned; what a GPU does otherwise cannot be caught there. Of
    # the lanes' stacks the sanitizer knows nothing.
    FLAGS += ("-g", "-fsanitize=address,alignment", "-fno-sanitize-recover=all")
    FLAGS += ("-mllvm", "-asan-stack=0") if "clang" in COMPILER else ("--param", "asan-stack=0")


@functools.cache
def library() -> ctypes.CDLL:
    """All variants of the kernels; compiled once for every state of the sources."""
    assert COMPILER is not None
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    key = hashlib.sha256("\0".join((COMPILER, *FLAGS)).encode() + sources).hexdigest()[:24]
    target = FOLDER / f"{key}.so"
    if not target.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "kernels.so"
            subprocess.run([COMPILER, *FLAGS, "-o", made, SOURCES / "emulated.cpp"], check=True)
            made.replace(target)
    return ctypes.CDLL(str(target))


class Emulated:
    """A kernel of :mod:`quantcache_kernels.cuda.driver` that runs here and now."""

    def __init__(self, name: str, variant: str = "") -> None:
        self.name = name
        self.function = getattr(library(), f"emulate_{name}{variant and '_'}{variant}")

    def launch(
        self, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        """Run all blocks."""
        sizes = (shared_bytes,) if self.name == "merge" else (grid[0], shared_bytes)
        if self.name in ("attend_codes", "encode"):
            sizes = grid[0], threads, shared_bytes
        assert self.function(ctypes.byref(arguments), *sizes) == 0, "some lanes wait for others that have left"


def emulated(device: torch.device, key_trellis: bool, value_trellis: bool) -> Mapping[str, Emulated]:
    """The kernels for codings of keys and values."""
    names = ("scalar", "trellis")
    variant = f"{names[key_trellis]}_{names[value_trellis]}"
    return {name: Emulated(name, variant) for name in CODE_KERNELS}


def emulated_conversion(device: torch.device) -> Mapping[str, Emulated]:
    """The kernels that convert blocks."""
    return {name: Emulated(name) for name in CONVERSION_KERNELS}


def emulated_encoder(device: torch.device, is_trellis: bool) -> Mapping[str, Emulated]:
    """The kernel that encodes blocks, for a coding."""
    return {name: Emulated(name, ("scalar", "trellis")[is_trellis]) for name in ENCODER_KERNELS}


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Let ``backend="cuda"`` run on the CPU inside the context.

    Yields:
        Nothing.
    """
    assert "cpu" not in codes.LOADERS, "an earlier test has left the emulation in place"
    codes.LOADERS["cpu"] = emulated
    conversion.LOADERS["cpu"] = emulated_conversion
    encoding.LOADERS["cpu"] = emulated_encoder
    try:
        yield
    finally:
        del codes.LOADERS["cpu"], conversion.LOADERS["cpu"], encoding.LOADERS["cpu"]


@contextmanager
def backwards() -> Iterator[None]:
    """Let the last warp and its last lane go first inside the context.

    Yields:
        Nothing.
    """
    library().emulate_backwards(1)
    try:
        yield
    finally:
        library().emulate_backwards(0)


@contextmanager
def copies(in_bulk: bool, late: bool) -> Iterator[None]:
    """Let copies into shared memory be made otherwise inside the context.

    Args:
        in_bulk: By one lane in bulk, as from Hopper on, or by all lanes in pieces.
        late: Let them land when somebody waits for them, not at once.

    Yields:
        Nothing.
    """
    library().emulate_copies(int(in_bulk), int(late))
    try:
        yield
    finally:
        library().emulate_copies(1, 0)


class Launches:
    """Kernels that note what they are launched with; those in ``emulate`` run, too."""

    def __init__(self, emulate: Collection[str] = ()):
        self.seen: list[tuple[Any, ...]] = []
        self.kept: list[tuple[Any, ...]] = []
        self.emulate = emulate

    def __call__(self, device: torch.device, *trellis: bool) -> Mapping[str, Any]:
        """Kernels by name, in place of a loader."""
        found = emulated(device, *trellis)
        return {name: _Noted(self, name, kernel) for name, kernel in found.items()}

    def clear(self) -> None:
        """Forget all of them."""
        self.seen.clear()
        self.kept.clear()

    def replay(self) -> None:
        """Launch the same again, as a graph does: grids, pointers and numbers are what they were."""
        for kernel, *given in self.kept:
            kernel.launch(*given)


class _Noted:
    def __init__(self, notes: Launches, name: str, kernel: Any):
        self.notes, self.name, self.kernel = notes, name, kernel

    def launch(self, grid: Any, threads: int, shared: int, arguments: ctypes.Structure, stream: int) -> None:
        """Note everything: pointers and numbers are the argument's bytes."""
        self.notes.seen.append((self.name, grid, threads, shared, bytes(arguments), stream))
        own = type(arguments).from_buffer_copy(arguments)
        self.notes.kept.append((self.kernel, grid, threads, shared, own, stream))
        if self.name in self.notes.emulate:
            self.kernel.launch(grid, threads, shared, arguments, stream)


class Operations(TorchDispatchMode):
    """Notes every operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note it."""
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
