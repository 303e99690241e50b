"""What padding asks of a layer's blocks: sinks that lie elsewhere in every row, and keys coded where they stand.

Shapes: B rows, H heads, n blocks, S sinks, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.backends import Backend, padding
from quantcache.backends.padding import Grid
from quantcache.backends.store import BlockStore
from quantcache.coding.blocks import SideCodec
from quantcache.coding.packing import BLOCK


def with_sinks(sinks: Tensor, chunk: Tensor, left_padding: Tensor, slot: int) -> Tensor:
    """Fill in those tokens of a chunk that are sinks of their row.

    Args:
        sinks: The sinks so far, ``[B, H, S, D]``.
        chunk: Tokens, ``[B, H, any, D]``.
        left_padding: Slot of every row's first token, ``[B]``.
        slot: Slot of the chunk's first token.

    Returns:
        The sinks.
    """
    if not chunk.shape[2] or not sinks.shape[2]:
        return sinks
    offsets = torch.arange(sinks.shape[2], dtype=torch.int64, device=sinks.device)
    index = left_padding[:, None] + offsets - slot  # [B, S]
    inside = ((index >= 0) & (index < chunk.shape[2]))[:, None, :, None]
    index = index.clamp(0, chunk.shape[2] - 1)[:, None, :, None].expand(sinks.shape)
    return torch.where(inside, chunk.gather(2, index), sinks)


def shifts_of(trail: Tensor | None, grid: Grid, keys: BlockStore, first: int, last: int) -> Tensor | None:
    """What is to be taken from the slots of some tokens for their positions, where one number a row does not do.

    Args:
        trail: See :func:`quantcache.backends.padding.extended`.
        grid: Where the rows lie.
        keys: The keys' blocks so far.
        first: First token, counted from the last block's end.
        last: One past the last token.

    Returns:
        ``[B, last - first]`` int64; None where the grid says it for all tokens, the encoded ones included.
    """
    if trail is None:
        return None
    shifts = padding.filled(trail, grid)[:, first:last]
    frames = torch.zeros_like(shifts[:, 0]) if grid.frames is None else grid.frames
    return shifts if "shifts" in keys.buffers or bool((shifts != frames[:, None]).any()) else None


def moved_rows(
    keys: BlockStore,
    codec: SideCodec,
    block_table: Tensor,
    grids: tuple[Grid, Grid],
    dtype: torch.dtype,
    backend: Backend,
) -> BlockStore:
    """Code the keys once more of rows that begin elsewhere than was thought: so far they held nothing but padding.

    Args:
        keys: The keys' blocks.
        codec: Their codec.
        block_table: Where they lie, ``[n, 3]``.
        grids: Where the rows lay, and where they lie.
        dtype: The model's.
        backend: Who encodes, in whose layout the blocks are.

    Returns:
        The blocks; the same store where no row has moved.
    """
    old, new = (grid.frames for grid in grids)
    if not keys.count or old is None or new is None or "shifts" in keys.buffers:
        return keys
    rows = (old != new).nonzero().flatten()
    if not len(rows):
        return keys
    fields = keys.slice(0, keys.count)
    chosen = {name: each[:, rows] for name, each in fields.items()}
    held = codec.decode(backend.to_portable(codec, chosen), block_table, old[rows])
    again = backend.encode(codec, held.to(dtype), block_table, new[rows])
    return keys.mapped_fields({name: each.index_copy(1, rows, again[name]) for name, each in fields.items()})


def with_shifts(keys: BlockStore, grid: Grid, rows: int, device: torch.device) -> BlockStore:
    """Let the keys' blocks say of each token what is to be taken from its slot for its position.

    Args:
        keys: The keys' blocks.
        grid: Where the rows lie.
        rows: B.
        device: Where they are.

    Returns:
        Blocks with a field ``shifts``, ``[n, B, 64]`` int32; the same store if it is empty or has one.
    """
    if not keys.count or "shifts" in keys.buffers:
        return keys
    shifts = padding.plain(grid, rows, 0, BLOCK, device)[:, 0]
    fields = keys.slice(0, keys.count)
    return keys.mapped_fields({**fields, "shifts": shifts.expand(keys.count, rows, BLOCK)})
