"""Encoding: from keys or values as the model caches them to packed codes and gains, one pass over the input.

A program encodes one head of one block: frame, centring and transform into registers, the root mean square, the gain
search against the Lloyd-Max boundaries, the corrected gain, the packed fields. Of a trellis it stops after the gain
search, and leaves the rest to trellis.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.triton import runtime, trellis
from quantcache_kernels.triton.codes import rotation
from quantcache_kernels.triton.packing import store_codes, store_gains, warps
from quantcache_kernels.triton.runtime import BLOCK, jit, kernel, power_of_two, tl

SCRATCH = 64 << 20
"""Bytes of coefficients that are in memory at once, between the kernels of a trellis."""


@kernel("batch", "W")
def encode_kernel(
    x,  # [B, H, n * 64, D]
    block_table, left_padding,
    order, partner, sign, turns,
    encoder,  # [H, S, D] float32
    mean,  # [H, D] float32
    weights,  # [H, S] float32
    widths, offsets,  # [H, S] int32
    search,  # [H, 2, S] float32: bins per unit, and the first bin's place
    counts,  # [H] int32: coded dimensions
    levels, boundaries, bins,  # all codebooks, width 1 to 8
    factors,  # [FACTORS] float32: the gain search
    codes,  # [n, B, W] int32
    gains,  # [n, B, H, 64] uint8
    coefficients,  # [n, B, H, 64, S] float32, of a trellis
    steps,  # [n, B, H, 64] float32, likewise: the gain that the search has found
    x_batch, x_head, x_token, x_dim, batch, W,
    D: tl.constexpr, DS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, FACTORS: tl.constexpr,
    FRAMED: tl.constexpr, HAS_STARTS: tl.constexpr, TRELLIS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one block."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    token = tl.arange(0, 64)
    slot = tl.arange(0, SP)
    real = slot < S
    source = x + b.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    source += (block * 64 + token).to(tl.int64)[:, None] * x_token
    first = tl.load(block_table + block * 3)
    anchor = tl.load(block_table + block * 3 + 2)
    if HAS_STARTS:
        start = tl.load(left_padding + b).to(tl.int32)
        first -= start
        anchor -= start

    y = tl.zeros((64, SP), tl.float32)
    for dim0 in range(0, D, 16):  # wholly slow or wholly fast: both parts are multiples of 16
        dim = dim0 + tl.arange(0, 16)
        inside = dim < D
        own = tl.load(order + dim, mask=inside, other=0)
        vectors = tl.load(source + own[None, :] * x_dim, mask=inside[None, :], other=0.0).to(tl.float32)
        if FRAMED:
            other = tl.load(order + tl.load(partner + dim, mask=inside, other=0), mask=inside, other=0)
            with_ = tl.load(source + other[None, :] * x_dim, mask=inside[None, :], other=0.0).to(tl.float32)
            turns_ = tl.load(turns + dim, mask=inside, other=0)[None, :]
            ahead = tl.load(sign + dim, mask=inside, other=0.0)[None, :]
            if dim0 < DS:
                cos, sin = rotation(tl.zeros((1, 1), tl.int64) + anchor, turns_)
                cos, sin = tl.broadcast_to(cos, (64, 16)), tl.broadcast_to(sin, (64, 16))
            else:
                cos, sin = rotation((first + token).to(tl.int64)[:, None], turns_)
            vectors = vectors * cos + with_ * (sin * ahead)
        vectors -= tl.load(mean + head * D + dim, mask=inside, other=0.0)[None, :]
        matrix = tl.load(
            encoder + (head * S + slot)[None, :] * D + dim[:, None], mask=inside[:, None] & real[None, :], other=0.0
        )
        y = tl.dot(vectors, matrix, y, input_precision=PRECISION)

    place = head * S + slot
    width = tl.load(widths + place, mask=real, other=0)
    coded = (width > 0)[None, :]
    rms = tl.sqrt(tl.sum(tl.where(coded, y * y, 0.0), axis=1) / tl.load(counts + head).to(tl.float32))
    book = ((1 << width) - 2)[None, :]
    scale = tl.load(search + head * 2 * S + slot, mask=real, other=0.0)[None, :]
    origin = tl.load(search + head * 2 * S + S + slot, mask=real, other=0.0)[None, :]
    weight = tl.load(weights + place, mask=real, other=0.0)[None, :]

    # The gain search: how much of a token's energy the best gain explains, for every factor.
    best = tl.zeros((64,), tl.float32) + tl.load(factors)
    most = tl.full((64,), -1.0, tl.float32)
    gain = tl.zeros((64,), tl.float32)
    for f in range(FACTORS):
        factor = tl.load(factors + f)
        code = nearest(y, rms * factor, width, book, coded, scale, origin, boundaries, bins)
        level = tl.load(levels + (book + code), mask=coded, other=0.0)
        cross = tl.sum(level * weight * y, axis=1)
        energy = tl.sum(level * weight * level, axis=1)
        found = tl.maximum(tl.where(energy > 0, cross / energy, 0.0), 0.0)
        saved = found * cross
        better = saved > most
        best = tl.where(better, factor, best)
        gain = tl.where(better, found, gain)
        most = tl.where(better, saved, most)

    line = block.to(tl.int64) * batch + b
    row = (line * heads + head) * 64 + token
    if TRELLIS:
        tl.store(coefficients + row[:, None] * S + slot[None, :], y, mask=real[None, :])
        tl.store(steps + row, rms * best)
    else:
        store_gains(gains + row, gain)
        code = nearest(y, rms * best, width, book, coded, scale, origin, boundaries, bins)
        offset = tl.load(offsets + place, mask=real, other=0)
        store_codes(codes + line * W, tl.trans(code).to(tl.uint32), offset, width, SP)


@jit
def nearest(y, step, width, book, coded, scale, origin, boundaries, bins):
    """Codes ``[64, S]``: how many boundaries lie below y / step.

    A uniform grid of bins, finer than the boundaries, gives the number of boundaries below the bin; at most one more
    lies inside it.
    """
    u = tl.where(step[:, None] > 0, y / step[:, None], 0.0)
    last = ((4 << width) - 1).to(tl.float32)[None, :]
    index = tl.minimum(tl.maximum(tl.floor(u * scale + origin), 0.0), last).to(tl.int32)
    code = tl.load(bins + ((4 << width) - 8)[None, :] + index, mask=coded, other=0)
    return code + (u > tl.load(boundaries + (book + code), mask=coded, other=0.0)).to(tl.int32)


def launch(
    x: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    codes: Tensor,
    gains: Tensor,
) -> None:
    """Launch the kernel; see ``ops.encode_blocks``.

    Args:
        x: ``[B, H, n * 64, D]``.
        block_table: ``[n, 3]``.
        left_padding: ``[B]`` or None.
        tables: Prepared tables.
        sizes: Prepared sizes.
        codes: Filled with codes.
        gains: Filled with gains.
    """
    is_trellis = bool(sizes[-1])
    if not is_trellis:
        _launch(x, block_table, left_padding, tables, sizes, codes, gains, gains, gains)
        return
    tables, trellis_tables = tables[: -trellis.TABLES], tables[-trellis.TABLES :]
    # Coefficients go through memory, of some blocks at a time. Fours of them keep pointers aligned: those that are not
    # would be variants of their own to Triton.
    lines = x.shape[0] * x.shape[1] * BLOCK
    count = 4 * max(1, SCRATCH // (16 * lines * sizes[2]))
    coefficients, steps = (
        torch.empty(min(count, codes.shape[0]) * lines * width, dtype=torch.float32, device=x.device)
        for width in (sizes[2], 1)
    )
    for first in range(0, codes.shape[0], count):
        some = slice(first, first + count)
        part = x[:, :, first * BLOCK : (first + count) * BLOCK]
        _launch(part, block_table[some], left_padding, tables, sizes, codes[some], gains[some], coefficients, steps)
        trellis.launch(coefficients, steps, tables, trellis_tables, sizes, codes[some], gains[some])


def _launch(
    x: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    codes: Tensor,
    gains: Tensor,
    coefficients: Tensor,
    steps: Tensor,
) -> None:
    dim, num_slow, slots, payload, framed, is_trellis = sizes
    encode_kernel[(codes.shape[0], x.shape[1], x.shape[0])](
        x, block_table, block_table if left_padding is None else left_padding, *tables,
        codes, gains, coefficients, steps,
        *x.stride(), x.shape[0], payload,
        D=dim, DS=num_slow, S=slots, SP=power_of_two(slots), FACTORS=tables[-1].shape[0], FRAMED=bool(framed),
        HAS_STARTS=left_padding is not None, TRELLIS=bool(is_trellis),
        # Three TF32 products are as accurate as float32 here, and 128 multiplications per element go to tensor cores.
        PRECISION="tf32x3" if runtime.on_cuda(x.device) else "ieee", num_warps=warps(slots),
    )  # fmt: skip
