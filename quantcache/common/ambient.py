"""Shields this library's arithmetic against torch's global settings, and against devices without float64.

Tensors state their dtype and device where they are made, so that default dtype and default device do not matter. What
is left is here: autocast, and matrix products in less than float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FULL_PRECISION = ("none", "ieee")
"""Settings of a backend under which products of float32 matrices are float32 throughout."""

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Device types that tensors of a cache may be on and that autocast may be on for."""


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Compute in the dtypes that are written down, inside the context.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """A function that computes in the dtypes that are written down in it.

    Args:
        function: Function to wrap.

    Returns:
        The same function, outside of autocast.
    """

    @functools.wraps(function)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():  # asked once, not for each type of device: steps are short
            return function(*args, **kwargs)
        with no_autocast():
            return function(*args, **kwargs)

    return shielded


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of float32 matrices in full float32, whatever the program allows for the sake of speed.

    Args:
        a: ``[..., N, K]``.
        b: ``[..., K, M]``.

    Returns:
        ``[..., N, M]``.
    """
    product: Tensor
    if a.dtype == torch.float32 and _is_reduced(a.device.type):
        product = (a.double() @ b.double()).float()
    else:
        product = a @ b
    return product


def float64_device(device: torch.device | str) -> torch.device:
    """Where float64 of a device is kept and computed.

    Args:
        device: The device.

    Returns:
        The device, or the CPU in place of one that has no float64 (Apple's GPUs).
    """
    found = torch.device(device)
    return torch.device("cpu") if found.type == "mps" else found


def in_float64(x: Tensor) -> Tensor:
    """A tensor in float64, on its :func:`float64_device`.

    Args:
        x: Any shape.

    Returns:
        The same shape.
    """
    return x.to(float64_device(x.device)).double()


def _is_reduced(device: str) -> bool:
    """Whether float32 products are rounded to TF32 or bfloat16 on a type of device."""
    if device == "cuda":
        return torch.backends.cuda.matmul.fp32_precision not in FULL_PRECISION
    if device in ("cpu", "xpu"):
        return torch.backends.mkldnn.matmul.fp32_precision not in FULL_PRECISION  # type: ignore[attr-defined]
    return False


def default_device() -> AbstractContextManager[Any]:
    """A context in which tensors of code that states no device are on the CPU, as where nobody has changed that."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextlib.contextmanager
def standard_settings() -> Iterator[None]:
    """Run a model with torch's settings as they are when nobody has changed them, inside the context.

    Autocast and the default device are of the thread. The default dtype and the precision of products are of the
    process: if they have been changed, other threads see them changed back for as long.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_autocast())
        stack.enter_context(default_device())
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            precision = backend.fp32_precision
            if precision not in FULL_PRECISION:
                backend.fp32_precision = "ieee"
                stack.callback(_restore_precision, backend, precision)
        yield


def _restore_precision(backend: Any, precision: str) -> None:
    """Give a backend its precision back, inherited from torch's common setting if that is where it was from."""
    backend.fp32_precision = "none"
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision
