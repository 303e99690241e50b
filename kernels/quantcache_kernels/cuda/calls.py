"""The launches of a call of attention, prepared once for blocks that stay as they are.

A step changes a few of their arguments: where queries and results are, and what the tail holds. Making the others again
would take the CPU longer than a short context takes the GPU.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, G = Hq / H, R = G Tq rows of queries that share a head, the
query index running fastest, D dimension, S slots of a side, n blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcache_kernels.cuda.blocks import LANES, TILE
from quantcache_kernels.cuda.constants import PreparedCodes
from quantcache_kernels.cuda.launching import Launched, stream_of
from quantcache_kernels.cuda.memory import Memory
from quantcache_kernels.cuda.near import NEAR_THREADS, NearTokens, readable
from quantcache_kernels.cuda.places import Blocks, Lasting
from quantcache_kernels.cuda.room import Room
from quantcache_kernels.cuda.structures import (
    EXTRA_BYTES,
    CodesArguments,
    MergeArguments,
    Places,
    Queries,
    QueryArguments,
    Rows,
    TakeArguments,
    pointer,
)
from quantcache_kernels.interface import BLOCK, AttentionCall

LOG2_E = math.log2(math.e)

ROWS = 8
"""Rows of queries that a tile has columns for; more of them read the codes again."""

TURNED_ROWS, STEP = 32, 36
"""As in queries.h."""

TURN_BLOCKS = 3
"""Blocks of threads that turn queries on a multiprocessor at once (near.h)."""

ONE_HALVES = 0x3C003C00
"""As in decoding.h."""

KINDS = (torch.bfloat16, torch.float32)
"""Of numbers that the kernels read as they are given."""


class Cut(NamedTuple):
    """How a context is divided.

    Attributes:
        splits: Parts of it, at most.
        per_split: Units of each.
        warps: Of a block of threads, which have a part each.
    """

    splits: int
    per_split: int
    warps: int


class PreparedCall:
    """Launches for queries of one shape on some blocks.

    Args:
        query: ``[B, Hq, Tq, D]``: its shape and dtype.
        blocks: The blocks, readable; whoever calls keeps them.
        near: Sinks and tail: their dimensions.
        keys: The keys' constants.
        values: The values'.
        call: The call: whether it has a mask and the like, its scaling and soft cap.
        splits: As of ``codes.attend``.
        lasting: As of ``codes.attend``, with its room.
    """

    def __init__(
        self,
        query: Tensor,
        blocks: Blocks,
        near: NearTokens,
        keys: PreparedCodes,
        values: PreparedCodes,
        call: AttentionCall,
        splits: int | None,
        lasting: Lasting | None,
    ) -> None:
        batch, query_heads, count, dim = query.shape
        heads, total = keys.layout.heads, query_heads // keys.layout.heads * count
        place = Rows(heads, -(-total // ROWS), rows_of(total), count, total)
        rows, lines = place.rows, lines_of(batch, total, heads)
        slots, value_dim = TILE * values.layout.tiles, values.mean.shape[1]
        self._constants = keys, values  # kept: the arguments say where they are
        self._device, self._lasting, self._rows, self._lines = query.device, lasting, rows, lines
        self._out_shape, self._out_dtype = (batch, count, query_heads, value_dim), query.dtype
        room, units = room_of(keys, values, rows, query.device), blocks.units if lasting is None else lasting.units
        cut = cut_of(room, units, lines, splits, lasting)
        there = None if lasting is None else lasting.there.data_ptr()
        # Where blocks lie now would not last.
        places = blocks.places(near, cut.per_split) if lasting is None else Places()
        query_bytes, softcap, logits = query_bytes_of(keys, rows), call.softcap or 0.0, call.sink_logits
        queries = Queries(place=place, is_bfloat16=is_bfloat16(query.dtype), scaling=call.scaling)
        unit_bits = (rows - 1).bit_length()
        turn_blocks = room.device.even(-(-units // (TURNED_ROWS >> unit_bits)), lines, TURN_BLOCKS)
        matrix, mean, units_of_keys = map(pointer, keys.matrix)
        to_turn = QueryArguments(
            queries=queries,
            frame=pointer(keys.frame),
            matrix=matrix,
            mean=mean,
            units=units_of_keys,
            places=places,
            there=there,
            paired=blocks.paired,
            lines=lines,
            dim=dim,
            slow=dim - keys.num_fast,
            slow_tiles=keys.layout.slow_tiles,
            fast=keys.num_fast,
            query_bytes=query_bytes,
            unit_bits=unit_bits,
            base=1.0 if softcap else LOG2_E,
        )
        fast_decoder, fast_mean, rotation = map(pointer, keys.fast)
        self._codes = CodesArguments(
            places=places,
            there=there,
            key_heads=pointer(keys.heads),
            value_heads=pointer(values.heads),
            key_terms=pointer(keys.terms),
            value_terms=pointer(values.terms),
            fast_decoder=fast_decoder,
            fast_mean=fast_mean,
            rotation=rotation,
            key_step=4 * batch * keys.layout.words,
            value_step=4 * batch * values.layout.words,
            gain_step=batch * heads * BLOCK,
            query_step=lines * query_bytes,
            batch=batch,
            heads=heads,
            chunks=place.chunks,
            rows=rows,
            count=count,
            paired=blocks.paired,
            key_bytes=4 * keys.layout.words,
            value_bytes=4 * values.layout.words,
            query_bytes=query_bytes,
            key_room=keys.room,
            value_room=values.room,
            constant_room=room.constants,
            warp_room=room.warp,
            slow_tiles=keys.layout.slow_tiles,
            fast_tiles=keys.fast_tiles,
            fast_steps=keys.num_fast // TILE,
            value_tiles=values.layout.tiles,
            softcap=softcap,
            one=ONE_HALVES,
        )
        to_near = near.arguments(queries, places, (there, pointer(near.tail_tokens), None, None, None, None))
        to_near.causal, to_near.lines, to_near.softcap = call.hides_the_future(count), lines, softcap
        to_near.logits_are_bfloat16 = logits is not None and logits.dtype == torch.bfloat16
        self._merge = MergeArguments(
            decoder=pointer(values.decoder),
            mean=pointer(values.mean),
            there=there,
            place=place,
            lines=lines,
            dim=value_dim,
            coefficients=slots,
            splits=cut.splits,
            is_bfloat16=is_bfloat16(query.dtype),
        )
        self._take = TakeArguments(near=to_near, turned=to_turn, turn_blocks=turn_blocks)
        self._near, self._turn = self._take.near, self._take.turned
        self._near_place: list[Any] | None = None  # not known yet
        self._near_splits = -1
        self._turn_bytes = 4 * STEP * (dim - keys.num_fast) + 4 * (rows * dim + ROWS + 2 * TURNED_ROWS)
        self._turn_blocks, self._merge_bytes = turn_blocks, self._merge.shared_bytes
        self._grid, self._threads = (-(-cut.splits // cut.warps), lines), 32 * cut.warps
        self._code_bytes = room.constants + cut.warps * room.warp
        vectors = lines * rows  # of every split
        self._sizes = units * lines * query_bytes, 4 * cut.splits * vectors * slots, 8 * cut.splits * vectors

    def launch(self, query: Tensor, near: NearTokens, call: AttentionCall, kernels: Mapping[str, Launched]) -> Tensor:
        """Attend.

        Args:
            query: Of the shape and dtype that this is prepared for, any strides.
            near: Sinks and tail; the last Tq tokens are the queries' own.
            call: With a mask and with logits only if prepared for them.
            kernels: The kernels of the device, which is the current one.

        Returns:
            ``[B, Tq, Hq, Dv]`` in the query's dtype.
        """
        query, near = readable(query), self._find_near(near)
        mask, logits = call.mask, call.sink_logits
        for queries in (self._near.queries, self._turn.queries):
            queries.data = query.data_ptr()
            queries.batch_stride, queries.head_stride, queries.query_stride, _ = query.stride()
        if mask is not None:
            mask = self._find_mask(mask)
        if logits is not None:
            logits = logits.contiguous() if logits.dtype in KINDS else logits.float()
            self._near.sink_logits = logits.data_ptr()
        lasting = self._lasting
        memory = Memory() if lasting is None else lasting.memory  # held until everything is launched
        self._find_room(memory)
        out = None if lasting is None else lasting.out
        if out is None:
            out = torch.empty(self._out_shape, dtype=self._out_dtype, device=self._device)
        if lasting is not None:
            lasting.out = out
        self._merge.out = out.data_ptr()
        stream, splits = stream_of(self._device), self._near_splits
        take_blocks = (splits + self._turn_blocks) * self._lines
        take_bytes = max(self._turn_bytes, near.shared_bytes(self._rows))
        kernels["take_queries"].launch((take_blocks, 1), NEAR_THREADS, take_bytes, self._take, stream)
        kernels["attend_codes"].launch(self._grid, self._threads, self._code_bytes, self._codes, stream)
        grid, threads = (self._rows, self._lines), 4 * self._merge.dim
        kernels["merge"].launch(grid, threads, self._merge_bytes, self._merge, stream)
        return out

    def _find_near(self, near: NearTokens) -> NearTokens:
        """Say where sinks and tail are, and how long the tail is."""
        place = [(part.data_ptr(), part.stride()) for part in near.parts]
        if place != self._near_place:
            given, near = near, near.readable()
            self._near_place = place if near is given else None
            if self._lasting is None:
                for i, part in enumerate(near.parts):
                    self._near.places.near[i] = part.data_ptr()
                    self._near.places.strides[i][:] = part.stride()[:3]
        self._near.tail = near.key_tail.shape[2]
        if near.splits != self._near_splits:
            splits = near.splits
            self._near_splits = self._near.splits = self._merge.dense_splits = splits
            self._take.near_blocks = splits * self._lines
            vectors, value_dim = self._lines * self._rows, self._merge.dim
            self._room = _offsets((*self._sizes, 4 * splits * vectors * value_dim, 4 * splits * vectors))
        return near

    def _find_mask(self, mask: Tensor) -> Tensor:
        """Say where a mask is, whose memory is to be held until everything is launched."""
        mask = mask.contiguous()
        for found in (self._codes, self._near):
            found.mask = mask.data_ptr()
            found.mask_batch, found.mask_query, found.mask_length = mask_strides(mask)
        return mask

    def _find_room(self, memory: Memory) -> None:
        """Say where the kernels leave what they hand each other."""
        *offsets, total = self._room
        first = memory.first(total, self._device)
        turned, partial, stats, near_out, near_lse = (first + offset for offset in offsets)
        self._turn.out = self._codes.queries = turned
        self._codes.partial = self._merge.partial = partial
        self._codes.stats = self._merge.stats = stats
        self._near.out = self._merge.dense = near_out
        self._near.lse = self._merge.dense_lse = near_lse


def cut_of(room: Room, units: int, lines: int, splits: int | None = None, lasting: Lasting | None = None) -> Cut:
    """How a context is divided.

    Args:
        room: Shared memory of the call.
        units: Of the context.
        lines: Of the call.
        splits: Parts that are wanted; None for what is best for the device.
        lasting: Launches that are to serve more units than there are: room for as many parts as ever, the first call's
            warps, and where parts end is found in memory.

    Returns:
        The division.
    """
    if lasting is not None:
        return Cut(room.most_splits(units, lines), 0, lasting.warps)
    per_split = -(-units // splits) if splits else room.units_of_a_split(units, lines)
    found = -(-units // per_split)
    return Cut(found, per_split, room.warps_of_a_block(found * (room.device.processors if splits else lines)))


def rows_of(total: int) -> int:
    """Rows of queries of a chunk, of so many that share a head."""
    return -(-total // -(-total // ROWS))


def query_bytes_of(keys: PreparedCodes, rows: int) -> int:
    """Bytes of a unit's queries, of so many rows."""
    return LANES * rows * (keys.layout.slow_tiles + keys.num_fast // TILE) + EXTRA_BYTES


def room_of(keys: PreparedCodes, values: PreparedCodes, rows: int, device: torch.device) -> Room:
    """Shared memory of ``attend_codes`` with so many rows of queries."""
    return Room.of(keys, values, rows, query_bytes_of(keys, rows), device)


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


def mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """Bytes from row to row and from query to query of a contiguous mask, and its length."""
    shared = mask.shape[0] == 1, mask.shape[2] == 1
    return 0 if shared[0] else mask.stride(0), 0 if shared[1] else mask.stride(2), mask.shape[3]


def is_bfloat16(dtype: torch.dtype) -> bool:
    """Whether numbers are of bfloat16; else they are of float32."""
    if dtype not in KINDS:
        raise ValueError(f"the CUDA kernels take numbers of bfloat16 and float32, got {dtype}")
    return dtype == torch.bfloat16


def _offsets(sizes: tuple[int, ...]) -> list[int]:
    """Where places of so many bytes begin in common memory, each at a multiple of 256, then how much that is in all."""
    return list(itertools.accumulate((-(-size // 256) * 256 for size in sizes), initial=0))
