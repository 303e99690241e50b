"""The CUDA kernels loaded on a device and launched, by the CUDA driver that torch has loaded already."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from quantcache_kernels.cuda.compiler import CudaError, compiled, has_nvcc, library, nvrtc

CODE_KERNELS = ("take_queries", "attend_codes", "merge", "append_tail", "set_places")
"""The kernels of a cache's blocks."""

FOLLOWING = frozenset({"attend_codes", "merge"})
"""Of them those that may begin before the launch in front of them has ended, from Hopper on: what they read of it they
wait for."""

CONVERSION_KERNELS = ("tiles_from_portable", "portable_from_tiles")
"""The kernels that bring blocks from one layout into the other."""

ENCODER_KERNELS = ("encode",)
"""The kernel that encodes blocks."""

KERNELS = {"codes.h": CODE_KERNELS, "conversion.h": CONVERSION_KERNELS, "encode.h": ENCODER_KERNELS}
"""By source."""

NO_CONTEXT = 201
"""What the driver answers a thread that has no context yet."""

STATIC_SHARED, LOCAL, REGISTERS, MOST_SHARED = 1, 3, 4, 8
"""Attributes of functions: bytes of shared memory that the source declares, bytes of local memory and registers of a
thread, and the most dynamic shared memory that a launch may have."""

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


@cache
def _cuda() -> ctypes.CDLL:
    return library("libcuda.so.1", "libcuda.so")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"CUDA: {(text.value or b'unknown error').decode()} ({status})")


@cache
def unavailable(device: torch.device) -> str | None:
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
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    try:
        _cuda()
        if not has_nvcc():
            nvrtc()
    except CudaError as error:
        return str(error)
    return None


class Kernel:
    """One kernel of a module loaded on one device."""

    def __init__(self, function: ctypes.c_void_p, device: int, follows: bool = False) -> None:
        self.function, self.device, self.follows = function, device, follows

    def attribute(self, which: int) -> int:
        """An attribute of the function, such as :data:`REGISTERS`."""
        value = ctypes.c_int()
        _check(_cuda().cuFuncGetAttribute(ctypes.byref(value), which, self.function))
        return value.value

    def allow_shared_memory(self, size: int) -> None:
        """Let launches have so many bytes of dynamic shared memory; without, they have 48 KB."""
        _check(_cuda().cuFuncSetAttribute(self.function, MOST_SHARED, size))

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
        array = _Arguments(ctypes.addressof(arguments))
        launch = LaunchConfig(*grid, 1, threads, 1, 1, shared_bytes, stream, _FOLLOWS, int(self.follows))
        status: int = _cuda().cuLaunchKernelEx(ctypes.byref(launch), self.function, array, None)
        return status


def _enter_context(device: int) -> None:
    """Make a device's context, which is torch's too, that of this thread."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_cuda().cuDeviceGet(ctypes.byref(handle), device))
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    _check(_cuda().cuCtxSetCurrent(context))


@cache
def load(device: int, name: str, *defines: str) -> dict[str, Kernel]:
    """The kernels of one source, loaded on a device, which must be the current one.

    Args:
        device: Index of the device.
        name: The source, of :data:`KERNELS`.
        *defines: As of :func:`quantcache_kernels.cuda.compiler.compiled`.

    Returns:
        The kernels by name.

    Raises:
        CudaError: The source does not compile, or the machine code does not load.
    """
    return _loaded(device, compiled(torch.cuda.get_device_capability(device), name, *defines), *KERNELS[name])


def _loaded(device: int, binary: bytes, *names: str) -> dict[str, Kernel]:
    torch.cuda.current_stream(device).synchronize()  # there is a context now
    module = ctypes.c_void_p()
    _check(_cuda().cuModuleLoadData(ctypes.byref(module), binary))
    kernels = {}
    following = FOLLOWING if torch.cuda.get_device_capability(device) >= (9, 0) else frozenset()
    there: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    for name in names:
        function = ctypes.c_void_p()
        _check(_cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        kernels[name] = kernel = Kernel(function, device, name in following)
        # Once for all launches: what one of them set for itself, another thread's would have found too little.
        kernel.allow_shared_memory(there - kernel.attribute(STATIC_SHARED))
    return kernels
