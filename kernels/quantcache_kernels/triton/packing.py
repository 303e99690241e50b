"""What the encoders begin and end with: some slots' coefficients, and gains and codes as they are stored."""

from __future__ import annotations

from quantcache_kernels.triton.codes import GAIN_CENTER, GAIN_STEPS
from quantcache_kernels.triton.runtime import jit, power_of_two, tl


@jit
def load_slots(coefficients, slot, S: tl.constexpr):
    """Coefficients ``[64, slots]`` of one head of one block; those past S are zero."""
    token = tl.arange(0, 64)
    return tl.load(coefficients + (token * S)[:, None] + slot[None, :], mask=(slot < S)[None, :], other=0.0)


@jit
def store_gains(where, gain):
    """Store the codes of gains; see quantcache.coding.gains.quantize_gain."""
    exponent = tl.log2(tl.maximum(gain, 1e-30)) * GAIN_STEPS + GAIN_CENTER
    exponent = tl.minimum(tl.maximum(tl.floor(exponent + 0.5), 0.0), 255.0)
    tl.store(where, exponent.to(tl.uint8))


@jit
def store_codes(words, code, offset, width, SLOTS: tl.constexpr):
    """Store codes ``[SLOTS, 64]`` of slots with these first words and widths."""
    wide = width >= 4
    store_field(words, code >> tl.maximum(width - 4, 0).to(tl.uint32)[:, None], offset, wide, SLOTS, 4)
    store_field(words, code, offset + 8, width == 8, SLOTS, 4)
    offset += tl.where(wide, 8, 0)
    store_field(words, code >> (width & 1).to(tl.uint32)[:, None], offset, (width & 2) > 0, SLOTS, 2)
    store_field(words, code, offset + 2 * (width & 2), (width & 1) > 0, SLOTS, 1)


@jit
def store_field(words, code, offset, present, SLOTS: tl.constexpr, FIELD: tl.constexpr):
    """Store the lowest ``FIELD`` bits of codes ``[SLOTS, 64]`` of those slots that have the field."""
    if tl.max(present.to(tl.int32), axis=0) > 0:
        shift = (tl.arange(0, 32 // FIELD) * FIELD).to(tl.uint32)[None, :, None]
        bits = (code & ((1 << FIELD) - 1)).reshape(SLOTS, 32 // FIELD, 2 * FIELD) << shift
        packed = tl.sum(bits, axis=1).to(tl.int32, bitcast=True)
        column = tl.arange(0, 2 * FIELD)
        tl.store(words + offset[:, None] + column[None, :], packed, mask=present[:, None])


CHUNK_WARPS = 8
"""Warps of a program that goes over a head's slots of a block, :func:`chunk_of` at a time."""


def chunk_of(slots: int) -> int:
    """How many slots such a program has in its registers at once."""
    return min(power_of_two(slots), 32)
