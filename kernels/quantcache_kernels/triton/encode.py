"""Encoding: from keys or values as the model caches them to packed codes and gains, one pass over the input.

A program encodes one head of one block: frame, centring and transform into registers, the root mean square, the gain
search against the Lloyd-Max boundaries, the corrected gain, the packed fields.
"""

from __future__ import annotations

from torch import Tensor

from quantcache_kernels.triton import runtime
from quantcache_kernels.triton.codes import GAIN_CENTER, GAIN_STEPS, angle
from quantcache_kernels.triton.runtime import jit, kernel, power_of_two, tl


@kernel("batch", "W")
def encode_kernel(
    x,  # [B, H, n * 64, D]
    places, starts,
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
    x_batch, x_head, x_token, x_dim, batch, W,
    D: tl.constexpr, DS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, FACTORS: tl.constexpr,
    FRAMED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one block."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    token = tl.arange(0, 64)
    slot = tl.arange(0, SP)
    real = slot < S
    source = x + b.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    source += (block * 64 + token).to(tl.int64)[:, None] * x_token
    first = tl.load(places + block * 3)
    anchor = tl.load(places + block * 3 + 2)
    if HAS_STARTS:
        start = tl.load(starts + b).to(tl.int32)
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
    exponent = tl.log2(tl.maximum(gain, 1e-30)) * GAIN_STEPS + GAIN_CENTER
    exponent = tl.minimum(tl.maximum(tl.floor(exponent + 0.5), 0.0), 255.0)
    tl.store(gains + (line * heads + head) * 64 + token, exponent.to(tl.uint8))

    code = tl.trans(nearest(y, rms * best, width, book, coded, scale, origin, boundaries, bins)).to(tl.uint32)
    offset = tl.load(offsets + place, mask=real, other=0)
    words = codes + line * W
    wide = width >= 4
    store_field(words, code >> tl.maximum(width - 4, 0).to(tl.uint32)[:, None], offset, wide, SP, 4)
    store_field(words, code, offset + 8, width == 8, SP, 4)
    offset += tl.where(wide, 8, 0)
    store_field(words, code >> (width & 1).to(tl.uint32)[:, None], offset, (width & 2) > 0, SP, 2)
    store_field(words, code, offset + 2 * (width & 2), (width & 1) > 0, SP, 1)


@jit
def rotation(position, turns):
    """Cosines and sines ``[64, 16]`` of positions ``[64 or 1, 1]``."""
    turned = angle(position, turns)
    return tl.broadcast_to(tl.cos(turned), (64, 16)), tl.broadcast_to(tl.sin(turned), (64, 16))


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


@jit
def store_field(words, code, offset, present, SP: tl.constexpr, FIELD: tl.constexpr):
    """Store the lowest ``FIELD`` bits of codes ``[SP, 64]`` of those slots that have the field."""
    if tl.max(present.to(tl.int32), axis=0) > 0:
        shift = (tl.arange(0, 32 // FIELD) * FIELD).to(tl.uint32)[None, :, None]
        bits = (code & ((1 << FIELD) - 1)).reshape(SP, 32 // FIELD, 2 * FIELD) << shift
        packed = tl.sum(bits, axis=1).to(tl.int32, bitcast=True)
        column = tl.arange(0, 2 * FIELD)
        tl.store(words + offset[:, None] + column[None, :], packed, mask=present[:, None])


def launch(
    x: Tensor,
    places: Tensor,
    starts: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    codes: Tensor,
    gains: Tensor,
) -> None:
    """Launch the kernel; see ``ops.encode_blocks``.

    Args:
        x: ``[B, H, n * 64, D]``.
        places: ``[n, 3]``.
        starts: ``[B]`` or None.
        tables: Prepared tables.
        sizes: Prepared sizes.
        codes: Filled with codes.
        gains: Filled with gains.
    """
    dim, num_slow, slots, payload, framed = sizes
    padded = power_of_two(slots)
    encode_kernel[(codes.shape[0], x.shape[1], x.shape[0])](
        x, places, places if starts is None else starts, *tables, codes, gains, *x.stride(), x.shape[0], payload,
        D=dim, DS=num_slow, S=slots, SP=padded, FACTORS=tables[-1].shape[0], FRAMED=bool(framed),
        HAS_STARTS=starts is not None,
        # Three TF32 products are as accurate as float32 here, and 128 multiplications per element go to tensor cores.
        PRECISION="tf32x3" if runtime.on_cuda(x.device) else "ieee", num_warps=8 if padded <= 64 else 16,
    )  # fmt: skip
