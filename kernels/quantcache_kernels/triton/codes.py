"""Device functions: from packed words to levels, in the registers where the tensor cores want them.

The trick that carries all of it: two codes ride in the halves of one 32-bit register from the packed word to the
matrix product, and a ten-bit code with the exponent of 1.0 put above it *is* a half-precision number. Nothing is
converted and nothing is shuffled. For values the two halves are tokens t and t + 32 of one dimension, as a word holds
them; for keys, whose contraction runs over dimensions, the words of two neighbouring slots are interleaved first.

Fields: see quantcache/coding/packing.py. Word ``c`` of an f-bit field holds tokens ``c + 2 f j`` at bits ``f j``.

A trellis (quantcache/coding/trellis.py) has one bit more in its codes than in memory: the subsets of all tokens, made
of the plane of path bits, are a 2-bit field like any other, below the fields that are read.
"""

from __future__ import annotations

import math

from quantcache_kernels.triton.runtime import constant, jit, tl

GAIN_STEPS = constant(32.0)  # gain codes in an octave
GAIN_CENTER = constant(128.0)  # gain code of 1.0

LOG2_E = constant(math.log2(math.e))  # from exponents of e to those of 2
LN_2 = constant(math.log(2.0))  # and back
NOTHING_SEEN = constant(-1e30)  # peak of a row without scores: finite, so that differences of peaks are numbers

ONE_HALVES = 0x3C003C00
"""Two 1.0 in half precision; see :func:`unpack`."""


@jit
def rotation(position, turns):
    """Cosines and sines of the angles of int64 positions, at revolutions per token in units of 2^-64.

    Whole revolutions and quarters are taken off as integers. What is left is within ±π/4, where a short series does;
    the sines of a library also keep an array in local memory for the angles of more than 10^5 that never come here.
    """
    fraction = ((position * turns) >> 32).to(tl.int32)  # the product wraps: whole revolutions vanish
    quarter = (fraction + (1 << 29)) >> 30  # wraps likewise
    angle = (fraction - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-9  # 2π / 2^32
    square = angle * angle
    sin = angle + angle * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = square * square * (4.166664568298827e-2 + square * (2.443315711809948e-5 * square - 1.388731625493765e-3))
    cos = 1.0 - (0.5 * square - cos)
    odd = (quarter & 1) != 0
    sin, cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@jit
def gain_of(code):
    """Gains of 8-bit logarithmic codes; see quantcache.coding.gains.dequantize_gain."""
    value = code.to(tl.float32)
    return tl.where(value > 0, tl.exp2((value - GAIN_CENTER) * (1.0 / GAIN_STEPS)), 0.0)


@jit
def load_words(words, first, FIELD: tl.constexpr):
    """Words of one field of some slots ``[N]``: ``[N, 2 FIELD]``; of other fields where a slot has no such field."""
    first = tl.multiple_of(first, 2)  # fields are 2, 4 or 8 words long
    return tl.load(words + first[:, None] + tl.arange(0, 2 * FIELD)[None, :])


@jit
def load_tile(words, table, slot, S: tl.constexpr, TRELLIS: tl.constexpr):
    """Words of a tile's slots: 4-, 2- and 1-bit field, ``[16, 8]``, ``[16, 4]`` and ``[16, 2]``, and a path's bits."""
    four = load_words(words, tl.load(table + slot), 4)
    two = load_words(words, tl.load(table + S + slot), 2)
    one = load_words(words, tl.load(table + 2 * S + slot), 1)
    if TRELLIS:
        return four, two, one, load_words(words, tl.load(table + 3 * S + slot), 1)
    else:
        return four, two, one


@jit
def convolve(own, other, is_even):
    """c1 of a trellis' tokens as a plane of bits, the convolution of the path with octal 13; c0 is ``own << 1``.

    Args:
        own: Words of the path's bits, of even tokens or of odd ones.
        other: The words of the tokens between those.
        is_even: 1 where ``own`` has the even tokens, else 0.

    Returns:
        Words of the same tokens as ``own``.
    """
    # A token before this one is in the other word, at the same bit for odd tokens and one bit further down for even.
    return own ^ (other << is_even) ^ (other << (is_even + 1))


@jit
def subset_field(path):
    """The subsets 2 c1 + c0 as a 2-bit field ``[16, 4]``, of the words ``[16, 2]`` of a path's bits."""
    even, odd = path.split()
    column = tl.arange(0, 4)[None, :]
    is_even = 1 - (column & 1).to(tl.uint32)
    own = tl.where(is_even != 0, even[:, None], odd[:, None])
    c1 = convolve(own, tl.where(is_even != 0, odd[:, None], even[:, None]), is_even)
    # A word of this field has every fourth token: those at even bits of a plane, or those at odd bits. Where the bits
    # of c1 are then in place, those of c0 lie at the bits of the path itself.
    earlier = 1 - (column >> 1).to(tl.uint32)
    return ((c1 << earlier) & 0xAAAAAAAA) | ((own << earlier) & 0x55555555)


@jit
def interleave(words):
    """Words of 16 slots ``[16, N]`` to registers that pair neighbouring slots: row 2 i + h has tokens of half h."""
    even, odd = words.reshape(8, 2, words.shape[1]).permute(0, 2, 1).split()
    low = (even & 0xFFFF) | (odd << 16)
    high = (even >> 16) | (odd & 0xFFFF0000)
    return tl.join(low, high).permute(0, 2, 1).reshape(16, words.shape[1])


@jit
def arrange_tile(fields, PAIRS: tl.constexpr, TRELLIS: tl.constexpr):
    """What :func:`load_tile` gave as :func:`unpack` takes it: interleaved where slots are contracted, with subsets."""
    four, two, one = fields[0], fields[1], fields[2]
    if PAIRS:
        four, two, one = interleave(four), interleave(two), interleave(one)
    if TRELLIS:
        subsets = subset_field(fields[3])
        if PAIRS:
            subsets = interleave(subsets)
        return four, two, one, subsets
    else:
        return four, two, one


@jit
def spread(word, FIELD: tl.constexpr):
    """Both halves' codes of a field, right-aligned in them: ``[16, 2 FIELD]`` to ``[16, 32]``."""
    shift = (tl.arange(0, 16 // FIELD) * FIELD).to(tl.uint32)[None, :, None]
    mask: tl.constexpr = ((1 << FIELD) - 1) * 0x10001
    return ((word[:, None, :] >> shift) & mask).reshape(16, 32)


@jit
def spread_top(word):
    """Both halves' codes of a 4-bit field moved to bits 6 to 9, among other bits: ``[16, 8]`` to ``[16, 4, 8]``."""
    step = tl.arange(0, 4)[None, :, None]
    left = tl.maximum(6 - 4 * step, 0).to(tl.uint32)
    right = tl.maximum(4 * step - 6, 0).to(tl.uint32)
    return tl.where(step < 2, word[:, None, :] << left, word[:, None, :] >> right)


@jit
def unpack(fields, flags, factors, slot, one_half, S: tl.constexpr, TRELLIS: tl.constexpr):
    """Codes of a tile, the highest bit at bit 9 of its half, under the exponent of 1.0.

    Args:
        fields: 4-, 2- and 1-bit field, ``[16, 8]``, ``[16, 4]`` and ``[16, 2]``, and a trellis' subsets, ``[16, 4]``.
        flags: Which fields some slot of the tile has.
        factors: What selects the 4-bit field of slots that have one, and takes the others to their place, ``[4, S]``;
            zero where a slot lacks a field.
        slot: Slot of every row, ``[16]``.
        one_half: :data:`ONE_HALVES`: a variable, because a second constant would cost an instruction each time.
        S: Slots.
        TRELLIS: Whether the codes are those of a trellis.

    Returns:
        ``[16, 32]`` uint32.
    """
    x = tl.zeros((16, 32), tl.uint32) + one_half
    if flags & 1:
        mask = tl.load(factors + slot).to(tl.uint32)[:, None]
        x = (spread_top(fields[0]).reshape(16, 32) & mask) | one_half
    if flags & 2:
        x += spread(fields[1], 2) * tl.load(factors + S + slot).to(tl.uint32)[:, None]
    if flags & 4:
        x += spread(fields[2], 1) * tl.load(factors + 2 * S + slot).to(tl.uint32)[:, None]
    if TRELLIS:
        x += spread(fields[3], 2) * tl.load(factors + 3 * S + slot).to(tl.uint32)[:, None]
    return x


@jit
def levels_of(x, meaning, levels, slot, S: tl.constexpr, POLYNOMIAL: tl.constexpr, TRELLIS: tl.constexpr):
    """Levels of both halves of :func:`unpack`'s codes, two tensors ``[16, 32]``.

    The two halves are worked on step by step together: the compiler then keeps them in one register.
    """
    if POLYNOMIAL:
        low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        center = tl.load(meaning + slot)[:, None]
        low += center
        high += center
        cubic, quintic = tl.load(meaning + S + slot)[:, None], tl.load(meaning + 2 * S + slot)[:, None]
        if TRELLIS:
            seventh, ninth = tl.load(meaning + 3 * S + slot)[:, None], tl.load(meaning + 4 * S + slot)[:, None]
            # x + x p rounds once where x (1 + p) would round twice.
            square = low * low
            low += low * (square * (cubic + square * (quintic + square * (seventh + square * ninth))))
            square = high * high
            high += high * (square * (cubic + square * (quintic + square * (seventh + square * ninth))))
        else:
            square = low * low
            low = low * (1 + square * (cubic + square * quintic))
            square = high * high
            high = high * (1 + square * (cubic + square * quintic))
        return low, high
    else:
        shift = tl.load(meaning + slot).to(tl.uint32)[:, None]
        first = tl.load(meaning + S + slot)[:, None]
        low = tl.load(levels + (((x & 0x3FF) >> shift).to(tl.int32) + first))
        high = tl.load(levels + ((((x >> 16) & 0x3FF) >> shift).to(tl.int32) + first))
        return low, high


@jit
def value_levels(x, meaning, levels, slot, S: tl.constexpr, POLYNOMIAL: tl.constexpr, TRELLIS: tl.constexpr):
    """Levels of a tile of values, ``[16, 64]``: column 2 c + h is token c + 32 h."""
    low, high = levels_of(x, meaning, levels, slot, S, POLYNOMIAL, TRELLIS)
    return tl.join(low, high).reshape(16, 64)


@jit
def key_levels(x, meaning, levels, slot, S: tl.constexpr, POLYNOMIAL: tl.constexpr, TRELLIS: tl.constexpr):
    """Levels of a tile of interleaved keys, tokens first, ``[64, 16]``."""
    low, high = levels_of(x, meaning, levels, slot, S, POLYNOMIAL, TRELLIS)
    return tl.join(low.reshape(8, 64), high.reshape(8, 64)).permute(1, 0, 2).reshape(64, 16)


@jit
def second_nibble(words, table, factors, slot, flags, PAIRS: tl.constexpr, S: tl.constexpr):
    """What the lower half of 8-bit codes adds to :func:`unpack`'s codes, ``[16, 32]`` uint32.

    Loaded only where a tile has such codes: they are too rare to be waited for in advance.
    """
    x = tl.zeros((16, 32), tl.uint32)
    if flags & 8:
        word = load_words(words, tl.load(table + 3 * S + slot), 4)
        if PAIRS:
            word = interleave(word)
        x = spread(word, 4) * tl.load(factors + 3 * S + slot).to(tl.uint32)[:, None]
    return x


@jit
def tanh(x):
    """Hyperbolic tangent to float32 accuracy, without a library that not every backend has."""
    y = tl.abs(x)
    decayed = tl.exp2(y * -2.8853900817779268)
    square = y * y
    series = 0.05396825396825397 - square * 0.021869488536155202
    series = 1.0 - square * (0.3333333333333333 - square * (0.13333333333333333 - square * series))
    value = tl.where(y < 0.3, y * series, (1.0 - decayed) / (1.0 + decayed))
    return tl.where(x < 0, -value, value)
