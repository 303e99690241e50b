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


class CodesArguments(ctypes.Structure):
    """``CodesArguments`` of codes.h."""

    _fields_ = (
        *((name, Pointer) for name in ("keys", "key_gains", "values", "value_gains", "queries")),
        *((name, Pointer) for name in ("key_heads", "value_heads", "key_terms", "value_terms")),
        *((name, Pointer) for name in ("fast_decoder", "fast_mean", "rotation", "block_table", "first_seen", "mask")),
        *((name, Pointer) for name in ("partial", "stats")),
        *((name, ctypes.c_int) for name in ("blocks", "batch", "heads", "chunks", "rows", "count")),
        *((name, ctypes.c_int) for name in ("per_split", "paired")),
        *((name, ctypes.c_int) for name in ("key_bytes", "value_bytes", "query_bytes", "key_room", "value_room")),
        *((name, ctypes.c_int) for name in ("slow_tiles", "fast_tiles", "fast", "value_tiles")),
        *((name, ctypes.c_int) for name in ("mask_batch", "mask_query", "mask_length")),
        ("softcap", ctypes.c_float),
        ("one", ctypes.c_uint),
    )


class QueryArguments(ctypes.Structure):
    """``QueryArguments`` of queries.h."""

    _fields_ = (
        *((name, Pointer) for name in ("query", "order", "partner", "sign", "turns", "matrix", "norms")),
        *((name, Pointer) for name in ("block_table", "origins", "out")),
        *((name, ctypes.c_int) for name in ("units", "paired", "lines", "heads", "lines_per_row", "rows")),
        *((name, ctypes.c_int) for name in ("dim", "slow", "slow_tiles", "fast", "query_bytes")),
        ("base", ctypes.c_float),
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
