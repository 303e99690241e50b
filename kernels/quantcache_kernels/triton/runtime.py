"""Triton where it is installed, and a clear error on the first call where it is not.

Everything that needs Triton imports it from here, so that the package can be imported anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from quantcache_kernels.interface import BLOCK as BLOCK

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform, or not wanted
    triton = None
    tl = None


def jit(function: Callable[..., Any], varying: tuple[str, ...] = ()) -> Any:
    """``triton.jit``, or a stand-in that raises when it is launched.

    Args:
        function: The kernel, or a function that kernels call.
        varying: See :func:`kernel`.

    Returns:
        The compiled-on-first-use kernel.
    """
    if triton is not None:
        return triton.jit(function, do_not_specialize=varying)

    class Missing:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Triton is not installed: pip install 'quantcache[triton]'")

    return Missing()


def kernel(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """:func:`jit` for a kernel some of whose integers change from step to step or from layer to layer.

    Triton compiles an integer that is 1, and one that is a multiple of 16, into kernels of their own. That is seconds
    for each, in the middle of a generation.

    Args:
        varying: The integers, by name, that it shall not look at.

    Returns:
        The decorator.
    """
    return functools.partial(jit, varying=varying)


def constant(value: float) -> Any:
    """A number that kernels may use as a global, or the number itself without Triton.

    Args:
        value: The number.

    Returns:
        A ``tl.constexpr``.
    """
    return value if tl is None else tl.constexpr(value)


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` makes the kernels run on the CPU, operation by operation."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device: torch.device) -> str | None:
    """Why kernels cannot run on a device.

    Args:
        device: Where the tensors live.

    Returns:
        The reason, or None if they can.
    """
    if triton is None:
        return "Triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "Triton runs on the CPU only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton does not support {device.type} devices"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device.

    Args:
        device: A device with an index, or the CPU.

    Returns:
        Their number; 4 for the interpreter.
    """
    if device.type == "cuda":  # ROCm answers here too
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return int(getattr(properties, "gpu_subslice_count", 0) or 64)
    return 4


def on_cuda(device: torch.device) -> bool:
    """Whether a device is one of NVIDIA's."""
    return device.type == "cuda" and torch.version.hip is None


def power_of_two(count: int, least: int = 16) -> int:
    """The smallest power of two that is no less than ``count`` and ``least``."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def operand_type(dtype: torch.dtype) -> Any:
    """What matrix products of tensors of a dtype are fed with.

    Args:
        dtype: float32, float16 or bfloat16.

    Returns:
        The Triton type; the interpreter, whose numpy has no bfloat16, multiplies in float32.
    """
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not interpreting() else tl.float32


def stored_type(dtype: torch.dtype) -> torch.dtype:
    """What kernels store results of a dtype in: the interpreter would cut float32 down to bfloat16 without rounding."""
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


def launch_on(device: torch.device) -> Any:
    """A context in which Triton launches on a tensor's device."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()
