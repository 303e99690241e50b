"""Decoding blocks to the vectors the model cached, for the few operations that want them dense.

A long query on a compressed past (a second turn, a chunked prefill) attends on one tile of decoded blocks after the
other; the whole past is never dense at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.triton.codes import (
    ONE_HALVES,
    arrange_tile,
    gain_of,
    key_levels,
    load_tile,
    rotation,
    second_nibble,
    unpack,
)
from quantcache_kernels.triton.runtime import kernel, tl


@kernel("n", "batch", "heads", "W", "one_half")
def decode_kernel(
    order, partner, sign, turns,
    words, factors, flags, meaning, levels,
    decoder,  # [H, S, D]: transposed, in the unit of the head
    mean,  # [H, D] float32
    units,  # [H] float32
    codes, gains, block_table, left_padding,
    out,  # [B, H, n * 64, D]
    n, batch, heads, W, one_half,
    D: tl.constexpr, DS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
    FRAMED: tl.constexpr, POLYNOMIAL: tl.constexpr, TRELLIS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Some dimensions of one head of one block."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2) % batch
    column = (tl.program_id(2) // batch) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    S: tl.constexpr = 16 * TILES
    slot = tl.arange(0, 16)
    token = tl.arange(0, 64)
    line = block.to(tl.int64) * batch + b
    source = codes + tl.multiple_of(line * W, 2)
    words += head * 4 * S
    factors += head * 4 * S
    meaning += head * ((5 if TRELLIS else 3) if POLYNOMIAL else 2) * S
    turned_with = tl.load(partner + column, mask=inside, other=0)

    result = tl.zeros((64, COLUMNS), tl.float32)
    other = tl.zeros((64, COLUMNS), tl.float32)
    for t in range(TILES):
        flag = tl.load(flags + head * TILES + t)
        if flag != 0:
            fields = arrange_tile(load_tile(source, words, 16 * t + slot, S, TRELLIS), True, TRELLIS)
            x = unpack(fields, flag, factors, 16 * t + slot, one_half, S, TRELLIS)
            if not TRELLIS:
                x += second_nibble(source, words, factors, 16 * t + slot, flag, True, S)
            tile = key_levels(x, meaning, levels, 16 * t + slot, S, POLYNOMIAL, TRELLIS)
            matrix = decoder + (head * S + 16 * t + slot)[:, None] * D
            own = tl.load(matrix + column[None, :], mask=inside[None, :], other=0.0)
            result = tl.dot(tile, own, result, input_precision="ieee")
            if FRAMED:
                with_ = tl.load(matrix + turned_with[None, :], mask=inside[None, :], other=0.0)
                other = tl.dot(tile, with_, other, input_precision="ieee")
    gain = gain_of(tl.load(gains + (line * heads + head) * 64 + token)) * tl.load(units + head)
    result = result * gain[:, None] + tl.load(mean + head * D + column, mask=inside, other=0.0)[None, :]
    if FRAMED:
        other = other * gain[:, None] + tl.load(mean + head * D + turned_with, mask=inside, other=0.0)[None, :]
        anchor = tl.load(block_table + block * 3 + 2).to(tl.int64)
        position = tl.load(block_table + block * 3).to(tl.int64) + token
        if HAS_STARTS:
            start = tl.load(left_padding + b).to(tl.int64)
            anchor -= start
            position -= start
        position = tl.where((column < DS)[None, :], anchor, position[:, None])
        cos, sin = rotation(position, tl.load(turns + column, mask=inside, other=0)[None, :])
        back = tl.load(sign + column, mask=inside, other=0.0)[None, :]
        result = result * cos - other * (sin * back)
    place = ((b * heads + head).to(tl.int64) * n + block) * 64 + token
    target = out + place[:, None] * D + tl.load(order + column, mask=inside, other=0)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside[None, :])


def launch(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    out: Tensor,
) -> None:
    """Launch the kernel; see ``ops.decode_blocks``.

    Args:
        codes: ``[n, B, W]``.
        gains: ``[n, B, H, 64]``.
        block_table: ``[n, 3]``.
        left_padding: ``[B]`` or None.
        tables: Prepared tables.
        sizes: Prepared sizes.
        out: Filled with ``[B, H, n * 64, D]``.
    """
    dim, num_slow, slow_tiles, fast_tiles, framed, is_trellis = sizes
    n, batch, heads, _ = gains.shape
    columns = 64
    decode_kernel[(n, heads, batch * -(-dim // columns))](
        *tables, codes.view(torch.uint32), gains,
        block_table, block_table if left_padding is None else left_padding, out,
        n, batch, heads, codes.shape[2], ONE_HALVES,
        D=dim, DS=num_slow, TILES=slow_tiles + fast_tiles, COLUMNS=columns,
        FRAMED=bool(framed), POLYNOMIAL=tables[7].dtype == torch.float16, TRELLIS=bool(is_trellis),
        HAS_STARTS=left_padding is not None, num_warps=8 if framed else 4,
    )  # fmt: skip
