"""What a launch needs beside its arguments: the kernel, the device and the stream."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Launched(Protocol):
    """A kernel."""

    def launch(
        self, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        """See :meth:`quantcache_kernels.cuda.driver.Kernel.launch`."""
        ...


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a device is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """Raw handle of a device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
