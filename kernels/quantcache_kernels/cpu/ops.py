"""The two operations, as functions and as torch operators.

Shapes as in :mod:`quantcache_kernels.cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.cpu.constants import Constants
from quantcache_kernels.cpu.library import Library, find
from quantcache_kernels.cpu.structures import Attend, Dense, Encode

BLOCK = 64
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of queries, sinks and tails, with their codes in ``abi.h``."""

_ERRORS = {1: "out of memory", 2: "a block begins more than 64 tokens behind its anchor"}


@dataclass
class Blocks:
    """Encoded blocks of both sides, and where they lie.

    Attributes:
        key_codes: ``[n, B, W]`` int32, contiguous, like all of these.
        key_gains: ``[n, B, H, 64]`` uint8.
        value_codes: ``[n, B, W']`` int32.
        value_gains: ``[n, B, H, 64]`` uint8.
        places: First slot, valid length and slot of the anchor, ``[n, 3]`` int32.
        starts: Left padding of every row, ``[B]`` int64, or None.
        end: Slot behind the last encoded token.
    """

    key_codes: Tensor
    key_gains: Tensor
    value_codes: Tensor
    value_gains: Tensor
    places: Tensor
    starts: Tensor | None
    end: int


def _library() -> Library:
    library, reason = find()
    if library is None:
        raise RuntimeError(reason)
    return library


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CPU kernel failed: {_ERRORS.get(status, status)}")


def _require(tensor: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
        )
    return tensor


def _dense(x: Tensor) -> Dense:
    batch, head, token, _ = x.stride()
    return Dense(x.data_ptr(), batch, head, token)


def _readable(x: Tensor) -> Tensor:
    """The same values with a dense last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def encode(x: Tensor, constants: Constants, places: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode whole blocks.

    Args:
        x: ``[B, H, n * 64, D]`` float32, bfloat16 or float16, any strides.
        constants: The side's constants.
        places: ``[n, 3]`` int32.
        starts: ``[B]`` int64, or None.

    Returns:
        Codes ``[n, B, W]`` int32 and gains ``[n, B, H, 64]`` uint8.
    """
    if torch.compiler.is_compiling():
        return torch.ops.quantcache_kernels.cpu_encode(x, places, starts, *constants.flatten())
    return _encode(x, constants, places, starts)


def _encode(x: Tensor, constants: Constants, places: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    library = _library()
    batch, heads, tokens, dim = x.shape
    if (heads, dim) != (constants.num_heads, constants.dim):
        raise ValueError(
            f"expected {constants.num_heads} heads of dimension {constants.dim}, got {heads} of dimension {dim}"
        )
    blocks = tokens // BLOCK
    x, places = _readable(x), _require(places, torch.int32, blocks, 3)
    codes = torch.empty(blocks, batch, constants.words, dtype=torch.int32, device="cpu")
    gains = torch.empty(blocks, batch, heads, BLOCK, dtype=torch.uint8, device="cpu")
    call = Encode(
        pointer(constants.structure("encode")),
        batch,
        heads,
        blocks,
        DTYPES[x.dtype],
        _dense(x),
        places.data_ptr(),
        None if starts is None else _require(starts, torch.int64, batch).data_ptr(),
        codes.data_ptr(),
        gains.data_ptr(),
        torch.get_num_threads(),
        library.level,
    )
    _check(library.encode(byref(call)))
    return codes, gains


def attend(
    query: Tensor,
    key: Constants,
    value: Constants,
    blocks: Blocks,
    dense: Sequence[Tensor],
    mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scaling: float,
    softcap: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Attend on encoded blocks, sinks and tail.

    Args:
        query: ``[B, Hq, Tq, D]`` float32, bfloat16 or float16, any strides.
        key: The keys' constants.
        value: The values' constants.
        blocks: The encoded blocks.
        dense: Keys and values of the sinks ``[B, H, S, D]``, ``[B, H, S, Dv]``, then of the tail, all of one dtype.
        mask: Whether a query may look at a slot, ``[B or 1, 1, Tq, slots]`` bool, or None.
        sink_logits: One logit of each query head that joins the softmax, ``[Hq]``, or None.
        scaling: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 leaves them.
        causal: Whether a query may not see the tail behind itself; the tail's last Tq tokens are the queries' own.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype; zero for a query that may look at nothing.
    """
    if torch.compiler.is_compiling():
        return torch.ops.quantcache_kernels.cpu_attend(
            query,
            blocks.key_codes,
            blocks.key_gains,
            blocks.value_codes,
            blocks.value_gains,
            blocks.places,
            blocks.starts,
            blocks.end,
            list(dense),
            mask,
            sink_logits,
            scaling,
            softcap,
            causal,
            *key.flatten(),
            *value.flatten(),
        )
    return _attend(query, key, value, blocks, dense, mask, sink_logits, scaling, softcap, causal)


def _attend(
    query: Tensor,
    key: Constants,
    value: Constants,
    blocks: Blocks,
    dense: Sequence[Tensor],
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float,
    causal: bool,
) -> Tensor:
    library = _library()
    query = _readable(query)
    batch, query_heads, queries, dim = query.shape
    heads, count = key.num_heads, blocks.places.shape[0]
    if dim != key.dim or heads != value.num_heads or query_heads % heads:
        raise ValueError(
            f"{query_heads} queries of dimension {dim} do not fit {heads} keys of dimension {key.dim} "
            f"and {value.num_heads} values"
        )
    dense = [_readable(x) for x in dense]
    dtype = dense[0].dtype
    for x, side, like in zip(dense, (key, value, key, value), (dense[0], dense[0], dense[2], dense[2]), strict=True):
        if x.dtype != dtype or x.shape != (batch, heads, like.shape[2], side.dim):
            raise ValueError(f"sinks or tail have shape {list(x.shape)} and dtype {x.dtype}")
    output = torch.empty(batch, queries, query_heads, value.dim, dtype=query.dtype, device="cpu")
    call = Attend(
        pointer(key.structure("key")),
        pointer(value.structure("value")),
        batch,
        heads,
        query_heads // heads,
        queries,
        count,
        dense[0].shape[2],
        dense[2].shape[2],
        DTYPES[query.dtype],
        DTYPES[dtype],
        causal,
        scaling,
        softcap,
        _dense(query),
    )
    for i, x in enumerate(dense):
        call.dense[i] = _dense(x)
    call.key_codes = _require(blocks.key_codes, torch.int32, count, batch, key.words).data_ptr()
    call.value_codes = _require(blocks.value_codes, torch.int32, count, batch, value.words).data_ptr()
    call.key_gains = _require(blocks.key_gains, torch.uint8, count, batch, heads, BLOCK).data_ptr()
    call.value_gains = _require(blocks.value_gains, torch.uint8, count, batch, heads, BLOCK).data_ptr()
    call.places = _require(blocks.places, torch.int32, count, 3).data_ptr()
    if blocks.starts is not None:
        call.starts = _require(blocks.starts, torch.int64, batch).data_ptr()
    if mask is not None:
        mask = _readable(mask)
        if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[-1] < blocks.end + dense[2].shape[2]:
            raise ValueError(f"a mask of shape {list(mask.shape)} and dtype {mask.dtype} is not supported")
        call.mask, call.mask_query_stride = mask.data_ptr(), mask.stride(2)
        call.mask_batch_stride = 0 if mask.shape[0] == 1 else mask.stride(0)
    call.encoded_end = blocks.end
    if sink_logits is not None:
        sink_logits = _require(sink_logits.detach().float().contiguous(), torch.float32, query_heads)
        call.sink_logits = sink_logits.data_ptr()
    call.output = output.data_ptr()
    call.threads, call.level = torch.get_num_threads(), library.level
    _check(library.attend(byref(call)))
    return output


@torch.library.custom_op("quantcache_kernels::cpu_encode", mutates_args=(), device_types="cpu")
def _encode_op(
    x: Tensor, places: Tensor, starts: Tensor | None, constants: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    return _encode(x, Constants.unflatten(constants, sizes), places, starts)


@_encode_op.register_fake
def _(
    x: Tensor, places: Tensor, starts: Tensor | None, constants: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = x.shape
    blocks, words = tokens // BLOCK, sizes[5]
    codes = x.new_empty((blocks, batch, words), dtype=torch.int32)
    return codes, x.new_empty((blocks, batch, heads, BLOCK), dtype=torch.uint8)


@torch.library.custom_op("quantcache_kernels::cpu_attend", mutates_args=(), device_types="cpu")
def _attend_op(
    query: Tensor,
    key_codes: Tensor,
    key_gains: Tensor,
    value_codes: Tensor,
    value_gains: Tensor,
    places: Tensor,
    starts: Tensor | None,
    end: int,
    dense: list[Tensor],
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float,
    causal: bool,
    key_constants: list[Tensor],
    key_sizes: list[int],
    value_constants: list[Tensor],
    value_sizes: list[int],
) -> Tensor:
    return _attend(
        query,
        Constants.unflatten(key_constants, key_sizes),
        Constants.unflatten(value_constants, value_sizes),
        Blocks(key_codes, key_gains, value_codes, value_gains, places, starts, end),
        dense,
        mask,
        sink_logits,
        scaling,
        softcap,
        causal,
    )


@_attend_op.register_fake
def _(
    query: Tensor,
    key_codes: Tensor,
    key_gains: Tensor,
    value_codes: Tensor,
    value_gains: Tensor,
    places: Tensor,
    starts: Tensor | None,
    end: int,
    dense: list[Tensor],
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scaling: float,
    softcap: float,
    causal: bool,
    key_constants: list[Tensor],
    key_sizes: list[int],
    value_constants: list[Tensor],
    value_sizes: list[int],
) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value_sizes[1]))
