"""Decode attention on packed codes: what a call needs, and its launch.

Shapes: B batch, H key/value heads, G query heads of a group, S coefficients, D dimension, N anchors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.cuda.driver import load
from quantcache_kernels.cuda.layout import ANCHOR, Layout, column_tiles, make_tables
from quantcache_kernels.cuda.structures import AttentionArguments, MergeArguments, Rows, pointer

WARPS_PER_PROCESSOR = 12
"""Warps that shared memory has room for at 3 bits."""


@dataclass
class Plan:
    """The launches of one call: arguments, sizes, and every tensor whose address they hold.

    Attributes:
        attention: Arguments of ``attend``.
        merge: Arguments of ``merge``.
        splits: Parts of the context.
        shared_bytes: Dynamic shared memory of ``attend``.
        out: Where the result goes, ``[B, H, G, D]`` float32.
        lse: Its logarithm of the sum of exponentials, base 2, ``[B, H, G]``.
        partial: What ``attend`` leaves for ``merge``: weighted sums, ``[splits, B H, G, S]``.
        stats: And their peaks (base 2) and sums, ``[splits, B H, G, 2]``.
        held: What is read.
        precise: Whether queries and weights have twice eight bits.
    """

    attention: AttentionArguments
    merge: MergeArguments
    splits: int
    shared_bytes: int
    out: Tensor
    lse: Tensor
    partial: Tensor
    stats: Tensor
    held: list[Tensor]
    precise: bool

    @property
    def parts(self) -> int:
        """Tiles of eight columns of queries."""
        return column_tiles(self.attention.group, self.precise)


def choose_splits(anchors: int, lines: int, warps: int) -> int:
    """Into how many parts a context is best cut.

    On an H200, four times as many warps as run at once took 15 % less time than one for each place (they even out what
    heads and schedulers differ by), as long as a warp still had four anchors; where they would have fewer, filling the
    device once was best.

    Args:
        anchors: N.
        lines: B H.
        warps: How many warps the device runs at once.

    Returns:
        The number of splits, at least 1.
    """
    once = max(1, warps // lines)
    many = min(4 * warps // lines, anchors // 4)
    return many if many >= 2 * once else once


def plan(
    rows: Tensor,
    queries: Tensor,
    layout: Layout,
    levels: Sequence[Sequence[float]],
    decoder: Tensor,
    mean: Tensor,
    group: int,
    tokens: int,
    *,
    starts: Tensor | None = None,
    dense: Tensor | None = None,
    dense_lse: Tensor | None = None,
    warps: int = 132 * WARPS_PER_PROCESSOR,
    splits: int | None = None,
    precise: bool = True,
) -> Plan:
    """Arguments of a call.

    Args:
        rows: Packed codes, ``[N, B, row_bytes]`` uint8.
        queries: From :meth:`Layout.pack_queries`, ``[N, B, H, query_bytes]`` uint8.
        layout: Where everything lies.
        levels: Codebooks of every width from 0 to 8.
        decoder: What a sum of levels is multiplied by, ``[H, S (sorted), D]``.
        mean: ``[H, D]`` float32.
        group: G, at most 8.
        tokens: Tokens that are encoded.
        starts: First visible token of every row, ``[B]`` int32, or None.
        dense: Attention over the tokens that are not encoded, ``[B, H, G, D]`` float32, or None.
        dense_lse: Its logarithm of the sum of exponentials, base 2, ``[B, H, G]``.
        warps: How many warps the device runs at once.
        splits: Parts of the context, or None for :func:`choose_splits`.
        precise: Whether the queries were packed in twice eight bits.

    Returns:
        The plan.
    """
    anchors, batch = rows.shape[:2]
    anchors = min(anchors, -(-tokens // ANCHOR))
    if not 1 <= group <= 8:
        raise ValueError(f"the CUDA kernel takes groups of 1 to 8 query heads, got {group}")
    dim = decoder.shape[-1]
    if dim > 256 or dim % 64:
        raise ValueError(f"the CUDA kernel takes head dimensions 64, 128, 192 and 256, got {dim}")
    lines = batch * layout.heads
    per_split = -(-anchors // min(splits or choose_splits(anchors, lines, warps), anchors))
    splits = -(-anchors // per_split)
    device = rows.device
    partial = torch.empty(splits, lines, group, layout.coefficients, dtype=torch.float32, device=device)
    stats = torch.empty(splits, lines, group, 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, layout.heads, group, dim, dtype=torch.float32, device=device)
    lse = torch.empty(batch, layout.heads, group, dtype=torch.float32, device=device)
    heads = layout.table()
    key_room, value_room = int(heads[:, 1].max()), int(heads[:, 3].max())
    query_bytes = layout.query_bytes(group, precise)
    accumulators = layout.coefficients * 16 * column_tiles(group, precise) * (1 if precise else 2)
    shared = 128 + key_room + query_bytes + value_room + accumulators
    decoder, mean = layout.scaled_decoder(decoder, levels), mean.float().contiguous()
    heads = heads.to(device)
    attention = AttentionArguments(
        *map(pointer, (rows, queries, heads, starts, partial, stats)),
        (ctypes.c_uint32 * 14)(*make_tables(levels)),
        batch, layout.heads, group, layout.coefficients, tokens, anchors, per_split,
        layout.row_bytes(), query_bytes, key_room, value_room,
    )  # fmt: skip
    merge = MergeArguments(
        *map(pointer, (partial, stats, dense, dense_lse, decoder, mean, out, lse)), None,
        Rows(layout.heads, 1, group, 1, group), lines, dim, layout.coefficients, splits, int(dense is not None), 0,
    )  # fmt: skip
    held = [t for t in (rows, queries, heads, starts, dense, dense_lse, decoder, mean) if t is not None]
    return Plan(attention, merge, splits, shared, out, lse, partial, stats, held, precise)


def launch(call: Plan, *, merge: bool = True) -> None:
    """Launch a call on the current stream of the tensors' device.

    Args:
        call: The plan; its ``out`` and ``lse`` are written.
        merge: Whether to merge the splits (else only ``partial`` and ``stats`` are written).
    """
    device = call.out.device
    with torch.cuda.device(device):
        kernels = load(device.index or 0, call.precise, call.parts)
        stream = torch.cuda.current_stream(device).cuda_stream
        lines, dim = call.merge.lines, call.merge.dim
        kernels["attend"].launch((call.splits, lines), 32, call.shared_bytes, call.attention, stream)
        if merge:
            grid = call.merge.place.rows, lines
            kernels["merge"].launch(grid, 4 * dim, call.merge.shared_bytes, call.merge, stream)
