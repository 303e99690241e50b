"""Compile the kernels by NVRTC, keep the result on disk, and launch them through the CUDA driver.

Of CUDA it needs what torch has loaded already: libnvrtc and libcuda. Where NVRTC is missing, nvcc will do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

NVCC = "/usr/local/cuda/bin/nvcc"
SOURCES = Path(__file__).parent / "src"

CODE_KERNELS = ("take_queries", "attend_codes", "merge", "append_tail", "set_places")
"""The kernels of a cache's blocks."""

FOLLOWING = frozenset({"attend_codes", "merge"})
"""Of them those that may begin before the launch in front of them has ended: what they read of it they wait for."""

CONVERSION_KERNELS = ("tiles_from_portable", "portable_from_tiles")
"""The kernels that bring blocks from one layout into the other."""

ENCODER_KERNELS = ("encode",)
"""The kernel that encodes blocks."""


ELF = b"\x7fELF"
"""What machine code begins with."""


NO_CONTEXT = 201
"""What the driver answers a thread that has no context yet."""


MOST_SHARED = 8
"""Attribute of functions: the most shared memory that a block of threads has."""

PROGRAMMATIC = 6
"""Attribute of a launch: whether it may begin before the one in front of it has ended."""


class LaunchAttribute(ctypes.Structure):
    """The driver's ``CUlaunchAttribute``, of a value that is one number."""

    _fields_ = (
        ("which", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )

    def __init__(self, which: int, value: int) -> None:
        super().__init__(which, 0, value)


class LaunchConfig(ctypes.Structure):
    """The driver's ``CUlaunchConfig``."""

    _fields_ = (
        *((f"{name}_{axis}", ctypes.c_uint) for name in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


_FOLLOWS = ctypes.pointer(LaunchAttribute(PROGRAMMATIC, 1))
_Arguments = ctypes.c_void_p * 1


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


def _kept(path: Path) -> bytes | None:
    """Machine code that lies on disk; None where there is none that can be read."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    return found if found.startswith(ELF) else None  # a machine that went down may have left an empty file


def _keep(path: Path, binary: bytes) -> None:
    """Put machine code on disk, whole or not at all, for other processes and their users too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError:  # a home that nobody may write to: compiled again by the next process
        pass


def _library(*names: str) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"none of {', '.join(names)} can be loaded")


@cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    packages = [folder for folder in Path(torch.__file__).parents[1].glob("nvidia/*/lib") if folder.is_dir()]
    for folder in packages:  # NVRTC asks for them by name, and does not look beside itself
        for path in folder.glob(f"libnvrtc-builtins.so.{major}*"):
            with suppress(OSError):
                ctypes.CDLL(str(path))
    names = [str(path) for folder in packages for path in sorted(folder.glob(f"libnvrtc.so.{major}*"))]
    return _library(f"libnvrtc.so.{major}", *names, "libnvrtc.so")  # a name without a version may be any version's


def _compile_by_nvrtc(text: str, options: tuple[str, ...]) -> bytes:
    nvrtc = _nvrtc()

    def check(status: int) -> None:
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CudaError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None))
    try:
        array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        if status:
            check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CudaError(f"the CUDA kernels do not compile: {log.value.decode()}")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _compile_by_nvcc(text: str, options: tuple[str, ...]) -> bytes:
    nvcc = shutil.which("nvcc") or NVCC
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        file.write_text(text, encoding="utf-8")
        done = subprocess.run([nvcc, "-cubin", *options, "-o", out, file], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CudaError(f"nvcc: {done.stderr.strip() or done.stdout.strip()}")
        return out.read_bytes()


def compiled_codes(capability: tuple[int, int], key_trellis: bool, value_trellis: bool, marked: bool = False) -> bytes:
    """The machine code of the kernels of a cache's blocks, from the cache on disk if it is there.

    Args:
        capability: Compute capability.
        key_trellis: Whether the keys' codes are paths through a trellis.
        value_trellis: Whether the values' are.
        marked: Leave marks in the machine code, for counting what it does.

    Returns:
        A cubin.

    Raises:
        CudaError: They do not compile.
    """
    defines = f"-DKEY_TRELLIS={int(key_trellis)}", f"-DVALUE_TRELLIS={int(value_trellis)}"
    return _compiled(capability, source("codes.h"), defines + ("-DMARKED",) * marked)


def compiled_conversion(capability: tuple[int, int]) -> bytes:
    """The machine code of the kernels that convert blocks, from the cache on disk if it is there.

    Args:
        capability: Compute capability.

    Returns:
        A cubin.

    Raises:
        CudaError: They do not compile.
    """
    return _compiled(capability, source("conversion.h"), ())


def compiled_encoder(capability: tuple[int, int], is_trellis: bool) -> bytes:
    """The machine code of the kernel that encodes blocks, from the cache on disk if it is there.

    Args:
        capability: Compute capability.
        is_trellis: Whether codes are paths through a trellis.

    Returns:
        A cubin.

    Raises:
        CudaError: It does not compile.
    """
    return _compiled(capability, source("encode.h"), (f"-DTRELLIS={int(is_trellis)}",))


def _compiled(capability: tuple[int, int], text: str, defines: tuple[str, ...]) -> bytes:
    options = (f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", *defines)
    key = hashlib.sha256("\0".join((text, *options, str(torch.version.cuda))).encode()).hexdigest()[:32]
    folder = _cache_folder()
    path = None if folder is None else folder / f"{key}.cubin"
    kept = None if path is None else _kept(path)
    if kept is not None:
        return kept
    try:
        binary = _compile_by_nvrtc(text, options)
    except CudaError:  # it or a part of it may be missing
        if shutil.which("nvcc") is None and not Path(NVCC).exists():
            raise
        binary = _compile_by_nvcc(text, options)
    if path is not None:
        _keep(path, binary)
    return binary


@cache
def _cuda() -> ctypes.CDLL:
    return _library("libcuda.so.1", "libcuda.so")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"CUDA: {(text.value or b'unknown error').decode()} ({status})")


@cache
def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device.

    Args:
        device: Where the tensors live.

    Returns:
        The reason, or None if they can.
    """
    if device.type != "cuda":
        return f"the CUDA kernels do not run on {device.type} devices"
    if torch.version.hip is not None:
        return "the CUDA kernels do not run on AMD devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"the CUDA kernels need compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    try:
        _cuda()
        if shutil.which("nvcc") is None and not Path(NVCC).exists():
            _nvrtc()
    except CudaError as error:
        return str(error)
    return None


class Kernel:
    """One kernel of a module loaded on one device."""

    def __init__(self, function: ctypes.c_void_p, device: int, follows: bool = False) -> None:
        self.function, self.device, self.follows = function, device, follows
        self.shared_bytes = 48 << 10

    def attribute(self, which: int) -> int:
        """An attribute of the function: 4 is registers, 3 local bytes, 1 shared bytes."""
        value = ctypes.c_int()
        _check(_cuda().cuFuncGetAttribute(ctypes.byref(value), which, self.function))
        return value.value

    def launch(
        self, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        """Launch on a stream of the current device.

        Args:
            grid: Blocks.
            threads: Threads of a block.
            shared_bytes: Dynamic shared memory.
            arguments: The kernel's one argument.
            stream: Raw handle of the stream.

        Raises:
            CudaError: The launch was refused.
        """
        status = self._launch(grid, threads, shared_bytes, arguments, stream)
        if status == NO_CONTEXT:  # in a new thread torch may have had memory for us without a call of CUDA
            _enter_context(self.device)
            status = self._launch(grid, threads, shared_bytes, arguments, stream)
        _check(status)

    def _launch(
        self, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: ctypes.Structure, stream: int
    ) -> int:
        if shared_bytes > self.shared_bytes:
            status: int = _cuda().cuFuncSetAttribute(self.function, MOST_SHARED, shared_bytes)
            if status:
                return status
            self.shared_bytes = shared_bytes
        array = _Arguments(ctypes.addressof(arguments))
        launch = LaunchConfig(*grid, 1, threads, 1, 1, shared_bytes, stream, _FOLLOWS, int(self.follows))
        status = _cuda().cuLaunchKernelEx(ctypes.byref(launch), self.function, array, None)
        return status


def _enter_context(device: int) -> None:
    """Make a device's context, which is torch's too, that of this thread."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_cuda().cuDeviceGet(ctypes.byref(handle), device))
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    _check(_cuda().cuCtxSetCurrent(context))


@cache
def load_codes(device: int, key_trellis: bool, value_trellis: bool) -> dict[str, Kernel]:
    """The kernels of a cache's blocks, loaded on a device, which must be the current one.

    Args:
        device: Index of the device.
        key_trellis: See :func:`compiled_codes`.
        value_trellis: See :func:`compiled_codes`.

    Returns:
        Those of :data:`CODE_KERNELS`.

    Raises:
        CudaError: They do not compile or load.
    """
    binary = compiled_codes(torch.cuda.get_device_capability(device), key_trellis, value_trellis)
    return _loaded(device, binary, *CODE_KERNELS)


@cache
def load_conversion(device: int) -> dict[str, Kernel]:
    """The kernels that convert blocks, loaded on a device, which must be the current one.

    Args:
        device: Index of the device.

    Returns:
        Those of :data:`CONVERSION_KERNELS`.

    Raises:
        CudaError: They do not compile or load.
    """
    return _loaded(device, compiled_conversion(torch.cuda.get_device_capability(device)), *CONVERSION_KERNELS)


@cache
def load_encoder(device: int, is_trellis: bool) -> dict[str, Kernel]:
    """The kernel that encodes blocks, loaded on a device, which must be the current one.

    Args:
        device: Index of the device.
        is_trellis: See :func:`compiled_encoder`.

    Returns:
        Those of :data:`ENCODER_KERNELS`.

    Raises:
        CudaError: They do not compile or load.
    """
    return _loaded(device, compiled_encoder(torch.cuda.get_device_capability(device), is_trellis), *ENCODER_KERNELS)


def _loaded(device: int, binary: bytes, *names: str) -> dict[str, Kernel]:
    torch.cuda.current_stream(device).synchronize()  # there is a context now
    module = ctypes.c_void_p()
    _check(_cuda().cuModuleLoadData(ctypes.byref(module), binary))
    kernels = {}
    for name in names:
        function = ctypes.c_void_p()
        _check(_cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        kernels[name] = Kernel(function, device, name in FOLLOWING)
    return kernels
