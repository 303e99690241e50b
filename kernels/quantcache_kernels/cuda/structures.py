"""The kernels' arguments, as attention.h declares them."""

from __future__ import annotations

import ctypes

from torch import Tensor

Pointer = ctypes.c_void_p


class AttentionArguments(ctypes.Structure):
    """``AttentionArguments`` of attention.h."""

    _fields_ = (
        *((name, Pointer) for name in ("rows", "queries", "heads", "starts", "partial", "stats")),
        ("tables", ctypes.c_uint32 * 14),
        *((name, ctypes.c_int) for name in ("batch", "num_heads", "group", "dim", "tokens", "anchors", "per_split")),
        *((name, ctypes.c_int) for name in ("row_bytes", "query_bytes", "key_room", "value_room")),
    )


class MergeArguments(ctypes.Structure):
    """``MergeArguments`` of attention.h."""

    _fields_ = (
        *((name, Pointer) for name in ("partial", "stats", "dense", "dense_lse", "decoder", "mean", "out", "lse")),
        *((name, ctypes.c_int) for name in ("lines", "num_heads", "group", "dim", "coefficients", "splits")),
    )

    @property
    def shared_bytes(self) -> int:
        """Shared memory that ``merge`` takes."""
        return 4 * (20 * self.dim + self.coefficients + 32)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
