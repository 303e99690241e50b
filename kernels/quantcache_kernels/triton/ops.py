"""The three operations as torch.library ops: shapes for tracing, launches for running.

Constants come from ``constants.prepare``, as lists of tensors and sizes, which is what an op's schema can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.triton import attention, decode, encode
from quantcache_kernels.triton.attention import Call, KeySizes, KeyTables, ValueSizes, ValueTables
from quantcache_kernels.triton.runtime import BLOCK, launch_on, unavailable


def _check(device: torch.device) -> None:
    reason = unavailable(device)
    if reason is not None:
        raise RuntimeError(reason)


@torch.library.custom_op("quantcache_kernels::encode_blocks", mutates_args=())
def encode_blocks(
    x: Tensor, block_table: Tensor, left_padding: Tensor | None, tables: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Encode whole blocks.

    Args:
        x: Keys or values as the model caches them, ``[B, H, n * 64, D]``, any strides.
        block_table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None.
        tables: ``PreparedSide.encode.tensors``.
        sizes: ``PreparedSide.encode.sizes``.

    Returns:
        Codes ``[n, B, W]`` int32 and gains ``[n, B, H, 64]`` uint8.
    """
    _check(x.device)
    batch, heads, length, _ = x.shape
    codes = torch.empty(length // BLOCK, batch, sizes[3], dtype=torch.int32, device=x.device)
    gains = torch.empty(length // BLOCK, batch, heads, BLOCK, dtype=torch.uint8, device=x.device)
    with launch_on(x.device):
        encode.launch(x, block_table, left_padding, tables, sizes, codes, gains)
    return codes, gains


@encode_blocks.register_fake
def _(
    x: Tensor, block_table: Tensor, left_padding: Tensor | None, tables: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    n = x.shape[2] // BLOCK
    codes = x.new_empty(n, x.shape[0], sizes[3], dtype=torch.int32)
    return codes, x.new_empty(n, x.shape[0], x.shape[1], BLOCK, dtype=torch.uint8)


@torch.library.custom_op("quantcache_kernels::decode_blocks", mutates_args=())
def decode_blocks(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode blocks to the vectors the model cached.

    Args:
        codes: ``[n, B, W]`` int32.
        gains: ``[n, B, H, 64]`` uint8.
        block_table: ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None.
        tables: ``PreparedSide.decode.tensors``.
        sizes: ``PreparedSide.decode.sizes``.
        dtype: dtype of the result.

    Returns:
        ``[B, H, n * 64, D]``, slots beyond a block's valid length included.
    """
    _check(codes.device)
    n, batch, heads, _ = gains.shape
    out = torch.empty(batch, heads, n * BLOCK, sizes[0], dtype=dtype, device=codes.device)
    with launch_on(codes.device):
        decode.launch(codes.contiguous(), gains.contiguous(), block_table, left_padding, tables, sizes, out)
    return out


@decode_blocks.register_fake
def _(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    n, batch, heads, _ = gains.shape
    return gains.new_empty(batch, heads, n * BLOCK, sizes[0], dtype=dtype)


@torch.library.custom_op("quantcache_kernels::attend", mutates_args=())
def attend(
    query: Tensor,
    packed: list[Tensor],
    dense: list[Tensor],
    block_table: Tensor,
    left_padding: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    key_tables: list[Tensor],
    key_sizes: list[int],
    value_tables: list[Tensor],
    value_sizes: list[int],
    encoded_end: int,
    scaling: float,
    softcap: float | None,
    causal: bool,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over packed blocks, sinks and recent tokens.

    Args:
        query: ``[B, Hq, Tq, D]``, any strides.
        packed: The blocks: codes ``[n, B, W]`` int32 and gains ``[n, B, H, 64]`` uint8 of the keys, then of the values.
        dense: Sinks of keys ``[B, H, S, D]`` and values ``[B, H, S, Dv]``, then the tokens behind the last block,
            ``[B, H, t, D]`` and ``[B, H, t, Dv]``; the last Tq of them are the queries' own.
        block_table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None. A row's sinks are its first valid tokens, and it sees
            blocks from the slot behind them on.
        mask: Which slots a query may see besides, ``[B or 1, 1, Tq, T]`` bool, or None.
        sink_logits: Logits that join the softmax without a value, ``[Hq]``, or None.
        key_tables: ``PreparedSide.keys.tensors`` of the keys.
        key_sizes: ``PreparedSide.keys.sizes`` of the keys.
        value_tables: ``PreparedSide.values.tensors`` of the values.
        value_sizes: ``PreparedSide.values.sizes`` of the values.
        encoded_end: Slot behind the last block.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores, or None.
        causal: Whether queries see only what precedes them.
        paired: Whether blocks 2i and 2i + 1 share an anchor throughout, as they do unless a crop cut one.

    Returns:
        Output ``[B, Tq, Hq, Dv]`` in the query's dtype, and the log-sum-exp of the scores ``[B, H, G * Tq]``, float32.
    """
    _check(query.device)
    call = Call(
        query, [each.contiguous() for each in packed], dense, block_table,
        left_padding, None if mask is None else mask.contiguous(), sink_logits,
        KeyTables.of(key_tables), KeySizes(*key_sizes), ValueTables.of(value_tables), ValueSizes(*value_sizes),
        encoded_end, scaling, softcap, causal, paired,
    )  # fmt: skip
    made = attention.plan(call)
    with launch_on(query.device):
        attention.launch(call, made)
    return made.out.to(query.dtype), made.lse


@attend.register_fake
def _(
    query: Tensor,
    packed: list[Tensor],
    dense: list[Tensor],
    block_table: Tensor,
    left_padding: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    key_tables: list[Tensor],
    key_sizes: list[int],
    value_tables: list[Tensor],
    value_sizes: list[int],
    encoded_end: int,
    scaling: float,
    softcap: float | None,
    causal: bool,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, count, _ = query.shape
    heads = dense[0].shape[1]
    lse = query.new_empty(batch, heads, query_heads // heads * count, dtype=torch.float32)
    return query.new_empty(batch, count, query_heads, value_sizes[0]), lse
