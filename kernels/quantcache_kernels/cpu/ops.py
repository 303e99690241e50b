"""Encoding and attention, as functions and as torch operators; decoding is in ``decoding``.

Shapes as in :mod:`quantcache_kernels.cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcache_kernels.cpu import structures
from quantcache_kernels.cpu.constants import Constants, in_memory, require
from quantcache_kernels.cpu.library import check, loaded
from quantcache_kernels.cpu.structures import CALL, Encode
from quantcache_kernels.interface import BLOCK, AttentionCall

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of queries, sinks and tails, with their codes in ``abi.h``."""


@dataclass(frozen=True)
class Blocks:
    """Encoded blocks of both sides, and where they lie.

    Attributes:
        key_codes: ``[n, B, W]`` int32, contiguous, like all of these.
        key_gains: ``[n, B, H, 64]`` uint8.
        value_codes: ``[n, B, W']`` int32.
        value_gains: ``[n, B, H, 64]`` uint8.
        block_table: First slot, valid length and slot of the anchor, ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]`` int64, or None.
        end: Slot behind the last encoded token.
    """

    key_codes: Tensor
    key_gains: Tensor
    value_codes: Tensor
    value_gains: Tensor
    block_table: Tensor
    left_padding: Tensor | None
    end: int
    past: Past | None = field(default=None, init=False, repr=False, compare=False)  # of the last call


class Past(NamedTuple):
    """Blocks that a call has found fit to be read with its sinks; the calls that follow do not look at them again.

    Attributes:
        key: The keys' constants.
        value: The values'.
        sinks: As they were given.
        batch: B.
        call: A pointer to the C structure.
        dtype: Of sinks and tail.
        held: What is alive for as long as this is, since the structure points to it.
    """

    key: Constants
    value: Constants
    sinks: tuple[Tensor, Tensor]
    batch: int
    call: Any
    dtype: torch.dtype
    held: tuple[Any, ...]

    def is_of(self, batch: int, key: Constants, value: Constants, keys: Tensor, values: Tensor) -> bool:
        """Whether this was made for a call's constants and sinks."""
        own, others = self.sinks
        same = self.key is key and self.value is value and own is keys and others is values
        return same and self.batch == batch


def _past(batch: int, key: Constants, value: Constants, blocks: Blocks, dense: Sequence[Tensor]) -> Past:
    """The blocks and sinks, checked."""
    past = blocks.past
    if past is not None and past.is_of(batch, key, value, dense[0], dense[1]):
        return past
    heads, count, tokens = key.num_heads, blocks.block_table.shape[0], _dimensions("sinks", dense[0])[2]
    keys, key_dense = _dense("sinks", dense[0], batch, heads, tokens, key.dim)
    values, value_dense = _dense("sinks", dense[1], batch, heads, tokens, value.dim)
    if keys.dtype != values.dtype:
        raise ValueError(f"sinks must be of one dtype, got {keys.dtype} and {values.dtype}")
    call = structures.Past(pointer(key.structure("key")), pointer(value.structure("value")), batch, heads)
    call.blocks, call.num_sinks, call.dense_dtype = count, tokens, DTYPES[keys.dtype]
    call.sinks = key_dense, value_dense
    call.key_codes = require("codes", blocks.key_codes, torch.int32, count, batch, key.words).data_ptr()
    call.value_codes = require("codes", blocks.value_codes, torch.int32, count, batch, value.words).data_ptr()
    call.key_gains = require("gains", blocks.key_gains, torch.uint8, count, batch, heads, BLOCK).data_ptr()
    call.value_gains = require("gains", blocks.value_gains, torch.uint8, count, batch, heads, BLOCK).data_ptr()
    call.block_table = require("block_table", blocks.block_table, torch.int32, count, 3).data_ptr()
    if blocks.left_padding is not None:
        call.left_padding = require("left_padding", blocks.left_padding, torch.int64, batch).data_ptr()
    call.encoded_end = blocks.end
    past = Past(key, value, (dense[0], dense[1]), batch, pointer(call), keys.dtype, (keys, values))
    object.__setattr__(blocks, "past", past)  # all else of them stays as it was found fit
    return past


def _dense(name: str, x: Tensor, *shape: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The same values as C can read them, ``[B, H, tokens, D]`` of any strides with a dense last dimension.

    Args:
        name: What it is, for messages.
        x: The tensor.
        shape: What its shape must be.

    Returns:
        The tensor, or a copy where it is stored otherwise: lazily negated, or with gaps in the last dimension. And
        what ``Dense`` says of it.

    Raises:
        ValueError: The tensor has another shape or dtype, or is not in the CPU's memory.
    """
    if x.shape != shape or x.dtype not in DTYPES:
        raise ValueError(
            f"expected {name} of shape {list(shape)} in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, "
            f"got {list(x.shape)} in {x.dtype}"
        )
    if type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided or x.is_neg():
        x = in_memory(name, x)
    batch, head, token, gap = x.stride()
    if gap != 1:
        x = x.contiguous()
        batch, head, token, _ = x.stride()
    return x, (x.data_ptr(), batch, head, token)


def _dimensions(name: str, x: Tensor) -> torch.Size:
    if x.dim() != 4:
        raise ValueError(f"expected {name} of 4 dimensions, got shape {list(x.shape)}")
    return x.shape


def _readable_mask(mask: Tensor, batch: int, queries: int, slots: int) -> Tensor:
    """A mask over ``slots`` or more, of every row and query: what it broadcasts over gets a stride of zero."""
    shape = list(mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] == 1 and shape[2] in (1, queries)
    if mask.dtype != torch.bool or not fits or shape[3] < slots:
        raise ValueError(
            f"expected a mask of shape [1 or {batch}, 1, 1 or {queries}, {slots} or more] in torch.bool, "
            f"got {shape} in {mask.dtype}"
        )
    mask = in_memory("mask", mask)
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    return mask if shape[:3] == [batch, 1, queries] else mask.expand(batch, 1, queries, shape[3])


def encode(x: Tensor, constants: Constants, block_table: Tensor, left_padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode whole blocks.

    Args:
        x: ``[B, H, n * 64, D]`` float32, bfloat16 or float16, any strides.
        constants: The side's constants.
        block_table: ``[n, 3]`` int32.
        left_padding: ``[B]`` int64, or None.

    Returns:
        Codes ``[n, B, W]`` int32 and gains ``[n, B, H, 64]`` uint8.
    """
    if torch.compiler.is_compiling():
        return torch.ops.quantcache_kernels.cpu_encode(x, block_table, left_padding, *constants.flatten())
    return _encode(x, constants, block_table, left_padding)


def _encode(x: Tensor, constants: Constants, block_table: Tensor, left_padding: Tensor | None) -> tuple[Tensor, Tensor]:
    library = loaded()
    batch, heads, tokens, dim = _dimensions("tokens", x)
    if (heads, dim) != (constants.num_heads, constants.dim):
        raise ValueError(
            f"expected {constants.num_heads} heads of dimension {constants.dim}, got {heads} of dimension {dim}"
        )
    blocks = tokens // BLOCK
    x, dense = _dense("tokens", x, batch, heads, blocks * BLOCK, dim)
    block_table = require("block_table", block_table, torch.int32, blocks, 3)
    codes = torch.empty(blocks, batch, constants.words, dtype=torch.int32, device="cpu")
    gains = torch.empty(blocks, batch, heads, BLOCK, dtype=torch.uint8, device="cpu")
    if left_padding is not None:
        left_padding = require("left_padding", left_padding, torch.int64, batch)
    call = Encode(
        side=pointer(constants.structure("encode")),
        batch=batch,
        heads=heads,
        blocks=blocks,
        dtype=DTYPES[x.dtype],
        x=dense,
        block_table=block_table.data_ptr(),
        left_padding=None if left_padding is None else left_padding.data_ptr(),
        codes=codes.data_ptr(),
        gains=gains.data_ptr(),
        threads=torch.get_num_threads(),
        level=library.level,
    )
    check(library.encode(byref(call)))
    return codes, gains


def attend(
    query: Tensor, key: Constants, value: Constants, blocks: Blocks, dense: Sequence[Tensor], call: AttentionCall
) -> Tensor:
    """Attend on encoded blocks, sinks and tail.

    Args:
        query: ``[B, Hq, Tq, D]`` float32, bfloat16 or float16, any strides.
        key: The keys' constants.
        value: The values' constants.
        blocks: The encoded blocks.
        dense: Keys and values of the sinks ``[B, H, S, D]``, ``[B, H, S, Dv]``, then of the tail, all of one dtype.
        call: The rest of the call; its mask boolean, ``[B or 1, 1, Tq or 1, slots or more]``, or None.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype; zero for a query that may look at nothing.
    """
    mask, sink_logits, scaling, softcap = call.mask, call.sink_logits, call.scaling, call.softcap or 0.0
    causal = call.hides_the_future(query.shape[2] if query.dim() == 4 else 0)
    if torch.compiler.is_compiling():
        return torch.ops.quantcache_kernels.cpu_attend(
            query,
            blocks.key_codes,
            blocks.key_gains,
            blocks.value_codes,
            blocks.value_gains,
            blocks.block_table,
            blocks.left_padding,
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
    library = loaded()
    batch, query_heads, queries, dim = _dimensions("queries", query)
    query, query_dense = _dense("queries", query, batch, query_heads, queries, dim)
    heads = key.num_heads
    if dim != key.dim or heads != value.num_heads or query_heads % heads:
        raise ValueError(
            f"{query_heads} queries of dimension {dim} do not fit {heads} keys of dimension {key.dim} "
            f"and {value.num_heads} values"
        )
    past = _past(batch, key, value, blocks, dense)
    tail = _dimensions("tail", dense[2])[2]
    keys, key_dense = _dense("tail", dense[2], batch, heads, tail, dim)
    values, value_dense = _dense("tail", dense[3], batch, heads, tail, value.dim)
    if not keys.dtype == values.dtype == past.dtype:
        raise ValueError(f"sinks and tail must be of one dtype, got {past.dtype}, {keys.dtype} and {values.dtype}")
    output = query.new_empty((batch, queries, query_heads, value.dim))
    shown = (0, 0, 0)
    if mask is not None:
        mask = _readable_mask(mask, batch, queries, blocks.end + tail)
        shown = mask.data_ptr(), mask.stride(0), mask.stride(2)
    logits = 0
    if sink_logits is not None:
        sink_logits = sink_logits.detach().float().resolve_neg().contiguous()
        logits = require("sink logits", sink_logits, torch.float32, query_heads).data_ptr()
    counts = (query_heads // heads, queries, tail, DTYPES[query.dtype], causal, torch.get_num_threads(), library.level)
    places = (*query_dense, *key_dense, *value_dense, output.data_ptr(), *shown, logits)
    check(library.attend(past.call, CALL.pack(*counts, scaling, softcap, *places)))
    return output


@torch.library.custom_op("quantcache_kernels::cpu_encode", mutates_args=(), device_types="cpu")
def _encode_op(
    x: Tensor, block_table: Tensor, left_padding: Tensor | None, constants: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    return _encode(x, Constants.unflatten(constants, sizes), block_table, left_padding)


@_encode_op.register_fake
def _(
    x: Tensor, block_table: Tensor, left_padding: Tensor | None, constants: list[Tensor], sizes: list[int]
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
    block_table: Tensor,
    left_padding: Tensor | None,
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
        Blocks(key_codes, key_gains, value_codes, value_gains, block_table, left_padding, end),
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
    block_table: Tensor,
    left_padding: Tensor | None,
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
