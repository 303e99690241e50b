"""The CUDA kernels' machine code: compiled by NVRTC, kept on disk.

NVRTC comes with torch. Where it is missing, nvcc will do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

NVCC = "/usr/local/cuda/bin/nvcc"
SOURCES = Path(__file__).parent / "src"


class CudaError(RuntimeError):
    """A call of the driver or the compiler failed."""


def source(name: str) -> str:
    """Kernels as one text, without includes.

    Args:
        name: ``"codes.h"``, ``"conversion.h"`` or ``"encode.h"``.

    Returns:
        The text.
    """
    lines: list[str] = []
    seen: set[str] = set()

    def take(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        text = (SOURCES / name).read_text(encoding="utf-8")
        if name == "warp.h":
            text = text.replace('#else\n#include "emulated_warp.h"\n', "")
        for line in text.splitlines():
            if line.startswith('#include "'):
                take(line.split('"')[1])
            elif not line.startswith("#pragma once"):
                lines.append(line)

    take(name)
    return "\n".join(lines) + "\n"


def _cache_folder() -> Path | None:
    """Where machine code is kept; None where the user has no home."""
    root = os.environ.get("QUANTCACHE_CUDA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache") / "quantcache" / "cuda"
    except RuntimeError:
        return None


def _digest(binary: bytes) -> bytes:
    return hashlib.sha256(binary).digest()


def _kept(path: Path) -> bytes | None:
    """Machine code that lies on disk; None where there is none that can be read.

    It ends with its digest: a machine that went down, or a disk, may have left less of it or something else.
    """
    try:
        found = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    binary, digest = found[:-size], found[-size:]
    return binary if binary and digest == _digest(binary) else None


def _keep(path: Path, binary: bytes) -> None:
    """Put machine code on disk, whole or not at all, for other processes and their users too."""
    # A home that nobody may write to, or that is full: compiled again by the next process.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            made = Path(file.name)
            try:
                file.write(binary + _digest(binary))
                file.close()
                made.chmod(0o644)
                made.replace(path)
            except BaseException:
                made.unlink(missing_ok=True)
                raise


def library(*names: str) -> ctypes.CDLL:
    """Load a library.

    Args:
        *names: File names, the first that can be loaded wins.

    Returns:
        The library.

    Raises:
        CudaError: None can be loaded.
    """
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"none of {', '.join(names)} can be loaded")


@cache
def nvrtc() -> ctypes.CDLL:
    """The compiler's library, of the version of CUDA that torch is built for."""
    major = (torch.version.cuda or "13").split(".")[0]
    packages = [folder for folder in Path(torch.__file__).parents[1].glob("nvidia/*/lib") if folder.is_dir()]
    for folder in packages:  # NVRTC asks for them by name, and does not look beside itself
        for path in folder.glob(f"libnvrtc-builtins.so.{major}*"):
            with suppress(OSError):
                ctypes.CDLL(str(path))
    names = [str(path) for folder in packages for path in sorted(folder.glob(f"libnvrtc.so.{major}*"))]
    return library(f"libnvrtc.so.{major}", *names, "libnvrtc.so")  # a name without a version may be any version's


def _compile_by_nvrtc(text: str, options: tuple[str, ...]) -> bytes:
    own = nvrtc()

    def check(status: int) -> None:
        if status:
            own.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CudaError(f"NVRTC: {own.nvrtcGetErrorString(status).decode()}")

    program = ctypes.c_void_p()
    check(own.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None))
    try:
        array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = own.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        if status:
            check(own.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(own.nvrtcGetProgramLog(program, log))
            raise CudaError(f"the CUDA kernels do not compile: {log.value.decode()}")
        check(own.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        check(own.nvrtcGetCUBIN(program, binary))
        return binary.raw
    finally:
        own.nvrtcDestroyProgram(ctypes.byref(program))


def has_nvcc() -> bool:
    """Whether nvcc is here."""
    return shutil.which("nvcc") is not None or Path(NVCC).exists()


@cache
def _nvcc_version() -> str:
    done = subprocess.run([shutil.which("nvcc") or NVCC, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _compile_by_nvcc(text: str, options: tuple[str, ...]) -> bytes:
    nvcc = shutil.which("nvcc") or NVCC
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        file.write_text(text, encoding="utf-8")
        done = subprocess.run([nvcc, "-cubin", *options, "-o", out, file], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CudaError(f"nvcc: {done.stderr.strip() or done.stdout.strip()}")
        return out.read_bytes()


def compiled(capability: tuple[int, int], name: str, *defines: str) -> bytes:
    """The machine code of some kernels, from the cache on disk if it is there.

    Args:
        capability: Compute capability.
        name: Their source, as of :func:`source`.
        *defines: What it is told, such as ``"TRELLIS=1"``.

    Returns:
        A cubin.

    Raises:
        CudaError: The source does not compile.
    """
    text = source(name)
    architecture = f"--gpu-architecture=sm_{capability[0]}{capability[1]}"
    options = (architecture, "--std=c++17", *(f"-D{define}" for define in defines))
    try:
        return _compiled_once(_compile_by_nvrtc, f"NVRTC {torch.version.cuda}", text, options)
    except CudaError:  # it or a part of it may be missing
        if not has_nvcc():
            raise
    return _compiled_once(_compile_by_nvcc, _nvcc_version(), text, options)


def _compiled_once(
    compile_: Callable[[str, tuple[str, ...]], bytes], compiler: str, text: str, options: tuple[str, ...]
) -> bytes:
    """What a compiler makes, or has made: another's machine code, or another version's, is not taken for it."""
    key = hashlib.sha256("\0".join((text, *options, compiler)).encode()).hexdigest()[:32]
    folder = _cache_folder()
    path = None if folder is None else folder / f"{key}.cubin"
    kept = None if path is None else _kept(path)
    if kept is not None:
        return kept
    binary = compile_(text, options)
    if path is not None:
        _keep(path, binary)
    return binary
