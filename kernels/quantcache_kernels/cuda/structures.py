"""The kernels' arguments, as their sources declare them, and what they have in memory beside them."""

from __future__ import annotations

import ctypes

from torch import Tensor

Pointer = ctypes.c_void_p

ROOM_BYTES = 384 + 512 + 512
"""Of a warp's shared memory beside codes, queries and sums (room.h): barriers, codes of gains, gains, peaks."""

BARRIER_BYTES = 128
"""In front of a head's constants (room.h)."""

BLOCK_BYTES = 1 << 10
"""Of shared memory that the device keeps for itself of every block of threads."""

EXTRA_BYTES = 64
"""Of a unit's queries behind their fragments: eight units and eight offsets."""


class Rows(ctypes.Structure):
    """``Rows`` of rows.h."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("heads", "chunks", "rows", "count", "total"))


class Queries(ctypes.Structure):
    """``Queries`` of rows.h."""

    _fields_ = (
        ("data", Pointer),
        *((name, ctypes.c_longlong) for name in ("batch_stride", "head_stride", "query_stride")),
        ("place", Rows),
        ("is_bfloat16", ctypes.c_int),
        ("scaling", ctypes.c_float),
    )


Strides = ctypes.c_longlong * 3
"""Of a tensor, in elements: batch, head and token."""


class Places(ctypes.Structure):
    """``Places`` of places.h."""

    _fields_ = (
        *((name, Pointer) for name in ("keys", "key_gains", "values", "value_gains")),
        *((name, Pointer) for name in ("block_table", "origins", "first_seen")),
        ("near", Pointer * 4),
        ("strides", Strides * 4),
        *((name, ctypes.c_int) for name in ("blocks", "units", "per_split", "splits", "encoded_end")),
    )


class PlacesArguments(ctypes.Structure):
    """``PlacesArguments`` of near.h."""

    _fields_ = (("places", Places), ("there", Pointer), ("tail_tokens", Pointer), ("tokens", ctypes.c_int))


class MergeArguments(ctypes.Structure):
    """``MergeArguments`` of merge.h."""

    _fields_ = (
        *((name, Pointer) for name in ("partial", "stats", "dense", "dense_lse", "decoder", "mean", "out")),
        ("there", Pointer),
        ("place", Rows),
        *((name, ctypes.c_int) for name in ("lines", "dim", "coefficients", "splits", "dense_splits", "is_bfloat16")),
    )

    @property
    def shared_bytes(self) -> int:
        """Shared memory that ``merge`` takes."""
        return 4 * (20 * self.dim + self.coefficients + 33)


class CodesArguments(ctypes.Structure):
    """``CodesArguments`` of codes.h."""

    _fields_ = (
        ("places", Places),
        *((name, Pointer) for name in ("there", "queries")),
        *((name, Pointer) for name in ("key_heads", "value_heads", "key_terms", "value_terms")),
        *((name, Pointer) for name in ("fast_decoder", "fast_mean", "rotation", "mask")),
        *((name, Pointer) for name in ("partial", "stats")),
        *((name, ctypes.c_longlong) for name in ("key_step", "value_step", "gain_step", "query_step")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "chunks", "rows", "count", "paired")),
        *((name, ctypes.c_int) for name in ("key_bytes", "value_bytes", "query_bytes", "key_room", "value_room")),
        *((name, ctypes.c_int) for name in ("constant_room", "warp_room")),
        *((name, ctypes.c_int) for name in ("slow_tiles", "fast_tiles", "fast_steps", "value_tiles")),
        *((name, ctypes.c_int) for name in ("mask_batch", "mask_query", "mask_length")),
        ("softcap", ctypes.c_float),
        ("one", ctypes.c_uint),
    )


class QueryArguments(ctypes.Structure):
    """``QueryArguments`` of queries.h."""

    _fields_ = (
        ("queries", Queries),
        *((name, Pointer) for name in ("frame", "matrix", "mean", "units")),
        ("places", Places),
        *((name, Pointer) for name in ("there", "out")),
        *((name, ctypes.c_int) for name in ("paired", "lines", "dim", "slow", "slow_tiles", "fast")),
        *((name, ctypes.c_int) for name in ("query_bytes", "unit_bits")),
        ("base", ctypes.c_float),
    )


class NearArguments(ctypes.Structure):
    """``NearArguments`` of near.h."""

    _fields_ = (
        ("queries", Queries),
        ("places", Places),
        *((name, Pointer) for name in ("there", "tail_tokens", "mask", "sink_logits", "out", "lse")),
        *((name, ctypes.c_int) for name in ("dim", "value_dim", "sinks", "tail", "causal")),
        *((name, ctypes.c_int) for name in ("lines", "splits")),
        *((name, ctypes.c_int) for name in ("mask_batch", "mask_query", "mask_length", "logits_are_bfloat16")),
        ("softcap", ctypes.c_float),
    )


class TakeArguments(ctypes.Structure):
    """``TakeArguments`` of near.h."""

    _fields_ = (
        ("near", NearArguments),
        ("turned", QueryArguments),
        *((name, ctypes.c_int) for name in ("near_blocks", "turn_blocks")),
    )


class AppendArguments(ctypes.Structure):
    """``AppendArguments`` of near.h."""

    _fields_ = (
        *((name, Pointer) for name in ("key", "value", "there", "tail_tokens")),
        ("strides", Strides * 2),
        *((name, ctypes.c_int) for name in ("heads", "count", "vectors", "dim", "value_dim", "tail")),
    )


class ConversionArguments(ctypes.Structure):
    """``ConversionArguments`` of conversion.h."""

    _fields_ = (
        *((name, Pointer) for name in ("portable", "tiles", "slots", "places", "maps")),
        *((name, ctypes.c_int) for name in ("portable_words", "tile_words", "count", "trellis", "values")),
    )


class Book(ctypes.Structure):
    """``Book`` of encoding.h."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("scale", "last")),
        *((name, ctypes.c_uint32) for name in ("bins", "rows")),
        *((name, ctypes.c_float) for name in ("search_scale", "search_last")),
        *((name, ctypes.c_uint32) for name in ("search", "reserved")),
    )


class Ladder(ctypes.Structure):
    """``Ladder`` of encoding.h."""

    _fields_ = (("level", ctypes.c_float), *((name, ctypes.c_float * 3) for name in ("at", "adds", "squares")))


class EncodeArguments(ctypes.Structure):
    """``EncodeArguments`` of encoding.h."""

    _fields_ = (
        *((name, Pointer) for name in ("x", "block_table", "origins", "pairs", "mean", "matrix", "slots", "counts")),
        *((name, Pointer) for name in ("places", "maps", "tables", "factors", "out", "gains")),
        ("strides", ctypes.c_longlong * 4),
        *((name, ctypes.c_int) for name in ("batch", "heads", "dim", "slow", "tiles", "slow_tiles")),
        *((name, ctypes.c_int) for name in ("tile_words", "rounds", "passes", "values", "near_width", "near_words")),
        ("books", Book * 9),
        ("ladders", Ladder * 4),
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
