"""Attention on a cache's blocks: one call.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, G = Hq / H, R = G Tq rows of queries that share a head, the
query index running fastest, D dimension, S slots of a side, n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantcache_kernels.cuda import structures
from quantcache_kernels.cuda.blocks import LANES, TILE
from quantcache_kernels.cuda.constants import PreparedCodes
from quantcache_kernels.cuda.driver import load_codes
from quantcache_kernels.cuda.launching import Launched, on_device, stream_of
from quantcache_kernels.cuda.memory import Memory
from quantcache_kernels.cuda.near import NEAR_THREADS, NearTokens, append_arguments, readable
from quantcache_kernels.cuda.places import Blocks, Lasting
from quantcache_kernels.cuda.room import Room
from quantcache_kernels.cuda.structures import (
    CodesArguments,
    MergeArguments,
    Places,
    PlacesArguments,
    Queries,
    QueryArguments,
    Rows,
    TakeArguments,
    pointer,
)
from quantcache_kernels.interface import AttentionCall

LOG2_E = math.log2(math.e)

ROWS = 8
"""Rows of queries that a tile has columns for; more of them read the codes again."""

MAX_LINES = (1 << 16) - 1
"""Of a launch: the second dimension of a grid ends there."""

TURNED_ROWS, STEP = 32, 36
"""As in queries.h."""

ONE_HALVES = 0x3C003C00
"""As in decoding.h."""

KINDS = (torch.bfloat16, torch.float32)
"""Of numbers that the kernels read as they are given."""


def _on_cuda(device: torch.device, key_trellis: bool, value_trellis: bool) -> Mapping[str, Launched]:
    return load_codes(device.index or 0, key_trellis, value_trellis)


LOADERS: dict[str, Callable[[torch.device, bool, bool], Mapping[str, Launched]]] = {"cuda": _on_cuda}
"""By type of device, who finds the kernels for codings of keys and values; tests add an emulation."""


def attend(
    query: Tensor,
    blocks: Blocks,
    near: NearTokens,
    keys: PreparedCodes,
    values: PreparedCodes,
    call: AttentionCall,
    splits: int | None = None,
    lasting: Lasting | None = None,
) -> Tensor:
    """Attention over packed blocks, sinks and recent tokens.

    Args:
        query: ``[B, Hq, Tq, D]``, any strides.
        blocks: The blocks.
        near: Sinks and the tokens behind the last block; the last Tq of them are the queries' own.
        keys: The keys' constants.
        values: The values'.
        call: The rest of the call.
        splits: Parts of the context, whose warps go together as far as they fit; None for what is best for the device.
        lasting: What launches need that are to serve more blocks than these; its ``out`` is written. None for a call by
            itself.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype, float32 or bfloat16.
    """
    device, (batch, query_heads, count, dim) = query.device, query.shape
    heads = keys.layout.heads
    total = query_heads // heads * count
    chunks = -(-total // ROWS)
    place = Rows(heads, chunks, rows_of(total), count, total)
    rows, lines = place.rows, lines_of(batch, total, heads)
    slots, value_dim = TILE * values.layout.tiles, values.mean.shape[1]
    near, query = near.readable(), readable(query)
    blocks = blocks.readable()

    room, units, there = room_of(keys, values, rows, device), blocks.units, None
    query_bytes = query_bytes_of(keys, rows)
    per_split = -(-units // splits) if splits else room.units_of_a_split(units, lines)
    warps = room.warps_of_a_block(-(-units // per_split) * (room.device.processors if splits else lines))
    places = blocks.places(near, per_split)
    splits = places.splits
    if lasting is not None:
        if lasting.room is None:
            lasting.room, lasting.lines, lasting.warps = room, lines, warps
            announce(lasting, blocks, near, keys, values)
        units, splits, there = lasting.units, room.most_splits(lasting.units, lines), lasting.there.data_ptr()
        places, warps = Places(), lasting.warps  # these here would not last

    vectors = lines * rows  # of every split
    sizes = units * lines * query_bytes, 4 * splits * vectors * slots, 8 * splits * vectors
    near_sizes = 4 * near.splits * vectors * value_dim, 4 * near.splits * vectors
    memory = Memory() if lasting is None else lasting.memory  # held until everything is launched
    turned, partial, stats, *found = memory.places((*sizes, *near_sizes), device)
    out = None if lasting is None else lasting.out
    if out is None:
        out = torch.empty(batch, count, query_heads, value_dim, dtype=query.dtype, device=device)
    if lasting is not None:
        lasting.out = out
    mask = None if call.mask is None else call.mask.contiguous()
    logits = None if call.sink_logits is None else call.sink_logits.contiguous()
    if logits is not None and logits.dtype not in KINDS:
        logits = logits.float()
    strides, softcap = (0, 0, 0) if mask is None else _mask_strides(mask), call.softcap or 0.0
    queries = Queries(query.data_ptr(), *query.stride()[:3], place, _is_half(query), call.scaling)
    to_turn = QueryArguments(
        queries, *map(pointer, (keys.frame, *keys.matrix)), places, there, turned,
        blocks.paired, lines, dim, dim - keys.num_fast, keys.layout.slow_tiles, keys.num_fast, query_bytes,
        -(-(1 << 16) // rows), 1.0 if softcap else LOG2_E,
    )  # fmt: skip
    to_attend = CodesArguments(
        places, there, turned,
        *map(pointer, (keys.heads, values.heads, keys.terms, values.terms, *keys.fast, mask)), partial, stats,
        batch, heads, chunks, rows, count, blocks.paired,
        4 * keys.layout.words, 4 * values.layout.words, query_bytes, keys.room, values.room, room.constants, room.warp,
        keys.layout.slow_tiles, keys.fast_tiles, keys.num_fast // TILE, values.layout.tiles,
        *strides, softcap, ONE_HALVES,
    )  # fmt: skip
    to_near = near.arguments(queries, places, (there, pointer(near.tail_tokens), *map(pointer, (mask, logits)), *found))
    to_near.causal, to_near.lines = call.hides_the_future(count), lines
    to_near.mask_batch, to_near.mask_query, to_near.mask_length = strides
    to_near.logits_are_half, to_near.softcap = logits is not None and _is_half(logits), softcap
    to_merge = MergeArguments(
        partial, stats, *found, *map(pointer, (values.decoder, values.mean, out)), None, there,
        place, lines, value_dim, slots, splits, near.splits, _is_half(out),
    )  # fmt: skip
    turned_groups = -(-units // (TURNED_ROWS // rows))
    to_take = TakeArguments(to_near, to_turn, near.splits * lines, turned_groups)
    turn_bytes = 2 * STEP * (dim - keys.num_fast) + 4 * (rows * dim + ROWS + TURNED_ROWS)
    take_bytes, take_blocks = max(turn_bytes, near.shared_bytes(rows)), (near.splits + turned_groups) * lines
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        stream = stream_of(device)
        kernels["take_queries"].launch((take_blocks, 1), NEAR_THREADS, take_bytes, to_take, stream)
        grid = -(-splits // warps), lines
        kernels["attend_codes"].launch(grid, 32 * warps, room.constants + warps * room.warp, to_attend, stream)
        kernels["merge"].launch((rows, lines), 4 * value_dim, to_merge.shared_bytes, to_merge, stream)
    return out


def rows_of(total: int) -> int:
    """Rows of queries of a chunk, of so many that share a head."""
    return -(-total // -(-total // ROWS))


def query_bytes_of(keys: PreparedCodes, rows: int) -> int:
    """Bytes of a unit's queries, of so many rows."""
    return LANES * rows * (keys.layout.slow_tiles + keys.num_fast // TILE) + structures.EXTRA_BYTES


def room_of(keys: PreparedCodes, values: PreparedCodes, rows: int, device: torch.device) -> Room:
    """Shared memory of ``attend_codes`` with so many rows of queries."""
    return Room.of(keys, values, query_bytes_of(keys, rows), device)


def lines_of(batch: int, rows: int, heads: int) -> int:
    """Lines of queries of a call (rows.h), which the grids of its launches have.

    Args:
        batch: B.
        rows: R.
        heads: H.

    Returns:
        Their number.
    """
    return batch * -(-rows // ROWS) * heads


def announce(
    lasting: Lasting,
    blocks: Blocks,
    near: NearTokens,
    keys: PreparedCodes,
    values: PreparedCodes,
    tokens: int | None = None,
) -> None:
    """Tell launches that outlive a block where everything is now, and how long the tail is.

    Args:
        lasting: Where they find it.
        blocks: The blocks, readable; whoever calls keeps them.
        near: Sinks and tail, readable and kept likewise.
        keys: The keys' constants: they say which module is loaded.
        values: The values'.
        tokens: What the tail holds; None leaves the device's count as it is.
    """
    device = lasting.there.device
    places = blocks.places(near, lasting.units_of_a_split(blocks.units))
    count = None if tokens is None else pointer(near.tail_tokens)
    arguments = PlacesArguments(places, pointer(lasting.there), count, tokens or 0)
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        kernels["set_places"].launch((1, 1), 32, 0, arguments, stream_of(device))


def append(
    key: Tensor, value: Tensor, near: NearTokens, keys: PreparedCodes, values: PreparedCodes, lasting: Lasting
) -> None:
    """Put new tokens into a tail of which only the device knows where it is and how long.

    Args:
        key: ``[B, H, Tnew, D]`` bfloat16.
        value: ``[B, H, Tnew, Dv]``.
        near: The tail, and how many tokens it has, these included.
        keys: The keys' constants: they say which module is loaded.
        values: The values'.
        lasting: Where the place of the tail is.
    """
    key, value, device = readable(key), readable(value), key.device
    arguments = append_arguments(key, value, near, lasting.there.data_ptr())
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        kernels["append_tail"].launch((arguments.vectors, 2), 32, 0, arguments, stream_of(device))


def _is_half(tensor: Tensor) -> bool:
    """Whether numbers are of bfloat16; else they are of float32."""
    if tensor.dtype not in KINDS:
        raise ValueError(f"the CUDA kernels take numbers of bfloat16 and float32, got {tensor.dtype}")
    return tensor.dtype == torch.bfloat16


def _mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """Bytes from row to row and from query to query of a contiguous mask, and its length."""
    shared = mask.shape[0] == 1, mask.shape[2] == 1
    return 0 if shared[0] else mask.stride(0), 0 if shared[1] else mask.stride(2), mask.shape[3]
