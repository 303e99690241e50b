"""Encoding: from keys or values as the model caches them to packed codes and gains.

The first kernel makes the coefficients: frame, centring and transform. They go through memory, of some blocks at a
time. The second, a program for each head of each block, goes over them some slots at a time, so that it need not hold
them all: the root mean square, the gain search against the Lloyd-Max boundaries, the corrected gain, the packed fields.
Of a trellis it stops after the gain search, and leaves the rest to trellis.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.triton import runtime, trellis
from quantcache_kernels.triton.codes import rotation
from quantcache_kernels.triton.packing import CHUNK_WARPS, chunk_of, load_slots, store_codes, store_gains
from quantcache_kernels.triton.runtime import BLOCK, jit, kernel, power_of_two, tl

SCRATCH = 64 << 20
"""Bytes of coefficients that are in memory at once, between the kernels."""


@kernel("batch")
def coefficient_kernel(
    x,  # [B, H, n * 64, D]
    block_table, left_padding,
    order, partner, sign, turns,
    encoder,  # [H, S, D] float32
    mean,  # [H, D] float32
    coefficients,  # [n, B, H, 64, S] float32
    x_batch, x_head, x_token, x_dim, batch,
    D: tl.constexpr, DS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    FRAMED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coefficients of one head of one block."""
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

    line = (block.to(tl.int64) * batch + b) * heads + head
    coefficients += line * 64 * S
    tl.store(coefficients + (token * S)[:, None] + slot[None, :], y, mask=real[None, :])


@kernel("batch", "W")
def gain_kernel(
    coefficients,  # [n, B, H, 64, S] float32
    weights,  # [H, S] float32
    widths, offsets,  # [H, S] int32
    search,  # [H, 2, S] float32: bins per unit, and the first bin's place
    counts,  # [H] int32: coded dimensions
    levels, boundaries, bins,  # all codebooks, width 1 to 8
    factors,  # [FACTORS] float32: the gain search
    codes,  # [n, B, W] int32
    gains,  # [n, B, H, 64] uint8
    steps,  # [n, B, H, 64] float32, of a trellis: the gain that the search has found
    batch, W,
    S: tl.constexpr, CHUNK: tl.constexpr, FACTORS: tl.constexpr, TRELLIS: tl.constexpr,
):  # fmt: skip
    """Gains and packed fields of one head of one block; of a trellis the steps."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.arange(0, 64)
    line = block.to(tl.int64) * batch + b
    row = (line * tl.num_programs(1) + head) * 64
    coefficients += row * S
    weights += head * S
    widths += head * S
    search += head * 2 * S

    squares = tl.zeros((64, CHUNK), tl.float32)
    for first in range(0, S, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        y = load_slots(coefficients, slot, S)
        coded = tl.load(widths + slot, mask=slot < S, other=0) > 0
        squares += tl.where(coded[None, :], y * y, 0.0)
    rms = tl.sqrt(tl.sum(squares, axis=1) / tl.load(counts + head).to(tl.float32))

    # The gain search: how much of a token's energy the best gain explains, for every factor. Slots are added up lane by
    # lane, so that lanes are added up once for a factor.
    most, gain, step = tl.zeros_like(rms) - 1.0, tl.zeros_like(rms), rms * tl.load(factors)
    for f in range(FACTORS):
        tried = rms * tl.load(factors + f)
        crosses, energies = tl.zeros((64, CHUNK), tl.float32), tl.zeros((64, CHUNK), tl.float32)
        for first in range(0, S, CHUNK):
            slot = first + tl.arange(0, CHUNK)
            y = load_slots(coefficients, slot, S)
            width = tl.load(widths + slot, mask=slot < S, other=0)
            code = nearest(y, tried, width, grid_of(width, slot, search, S), boundaries, bins)
            level = tl.load(levels + (((1 << width) - 2)[None, :] + code), mask=(width > 0)[None, :], other=0.0)
            weighted = level * tl.load(weights + slot, mask=slot < S, other=0.0)[None, :]
            crosses += weighted * y
            energies += weighted * level
        cross, energy = tl.sum(crosses, axis=1), tl.sum(energies, axis=1)
        fits = energy > 0
        found = tl.maximum(tl.where(fits, cross, 0.0) / tl.where(fits, energy, 1.0), 0.0)
        better = found * cross > most  # not of what is not a number
        most = tl.where(better, found * cross, most)
        gain, step = tl.where(better, found, gain), tl.where(better, tried, step)

    if TRELLIS:
        tl.store(steps + row + token, step)
    else:
        store_gains(gains + row + token, gain)
        for first in range(0, S, CHUNK):
            slot = first + tl.arange(0, CHUNK)
            y = load_slots(coefficients, slot, S)
            width = tl.load(widths + slot, mask=slot < S, other=0)
            code = nearest(y, step, width, grid_of(width, slot, search, S), boundaries, bins)
            offset = tl.load(offsets + head * S + slot, mask=slot < S, other=0)
            store_codes(codes + line * W, tl.trans(code).to(tl.uint32), offset, width, CHUNK)


@jit
def grid_of(width, slot, search, S: tl.constexpr):
    """Of the bins of some slots, how many there are in a unit, where the first one is, and the last one's number."""
    scale = tl.load(search + slot, mask=slot < S, other=0.0)
    origin = tl.load(search + S + slot, mask=slot < S, other=0.0)
    return scale[None, :], origin[None, :], ((4 << width) - 1).to(tl.float32)[None, :]


@jit
def nearest(y, step, width, grid, boundaries, bins):
    """Codes ``[64, slots]``: how many boundaries lie below y / step.

    A uniform grid of bins, finer than the boundaries, gives the number of boundaries below the bin; at most one more
    lies inside it.
    """
    scale, origin, last = grid
    coded = (width > 0)[None, :]
    u = tl.where(step[:, None] > 0, y / step[:, None], 0.0)
    index = tl.minimum(tl.maximum(tl.floor(u * scale + origin), 0.0), last).to(tl.int32)
    code = tl.load(bins + (((4 << width) - 8)[None, :] + index), mask=coded, other=0)
    above = tl.load(boundaries + (((1 << width) - 2)[None, :] + code), mask=coded, other=0.0)
    return code + (u > above).to(tl.int32)


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
    dim, num_slow, slots, payload, framed, passes = sizes
    end = len(tables) - (trellis.TABLES if passes else 0)
    transform, search, path = tables[:6], tables[6:end], tables[end:]
    chunk, factors = chunk_of(slots), search[-1].shape[0]
    # Fours of blocks keep pointers aligned: those that are not would be variants of their own to Triton.
    lines = x.shape[0] * x.shape[1] * BLOCK
    count = 4 * max(1, SCRATCH // (16 * lines * slots))
    coefficients, steps = (
        torch.empty(min(count, codes.shape[0]) * lines * width, dtype=torch.float32, device=x.device)
        for width in (slots, 1)
    )
    starts = block_table if left_padding is None else left_padding
    for first in range(0, codes.shape[0], count):
        some = slice(first, first + count)
        part = x[:, :, first * BLOCK : (first + count) * BLOCK]
        grid = codes[some].shape[0], x.shape[1], x.shape[0]
        coefficient_kernel[grid](
            part, block_table[some], starts, *transform, coefficients, *part.stride(), x.shape[0],
            D=dim, DS=num_slow, S=slots, SP=power_of_two(slots), FRAMED=bool(framed),
            HAS_STARTS=left_padding is not None,
            # Three TF32 products are as accurate as float32 here, and all multiplications go to tensor cores.
            PRECISION="tf32x3" if runtime.on_cuda(x.device) else "ieee", num_warps=8,
        )  # fmt: skip
        gain_kernel[grid](
            coefficients, *search, codes[some], gains[some], steps, x.shape[0], payload,
            S=slots, CHUNK=chunk, FACTORS=factors, TRELLIS=bool(passes), num_warps=CHUNK_WARPS,
        )  # fmt: skip
        if passes:
            trellis.launch(coefficients, steps, search[:3], path, passes, codes[some], gains[some])
