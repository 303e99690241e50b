"""Codebooks of few levels as bytes of half-precision numbers, for looking them up; see ``look_up`` in src/decoding.h.

``prmt`` takes four nibbles to four bytes of eight: the lower three bits choose, and where the fourth is set, the chosen
byte's sign fills the result. So eight levels are one instruction for their upper bytes and one for their lower ones.
Sixteen are two: the other eight have their own bytes, the selector's fourth bit is turned around, and what either
finds where it should not is the sign of a byte that the tables know, except for the highest bit, which is the sign of
the first's. Both of a place's two levels must have it in common, in either byte:

- the level's sign is among the lower three bits of the place, which therefore has its highest two bits swapped;
- the sign of lower bytes is met by choice of the levels' unit, which is free.

Of 32 levels the 16 magnitudes are looked up, and of 16 levels of scalar codes the eight: the sign is a bit of the code.
Half of the bits of a trellis' places are known only when it is decoded, and to turn the place around where the sign is
negative would take as long as the other eight levels do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

PLACES = 5
"""Bits that a place in a codebook may have for that; a trellis of k bits has places of k + 1."""

STEPS = 2048
"""Units that are tried."""


@cache
def level_tables(levels: Sequence[float], is_trellis: bool) -> tuple[list[int], float]:
    """Tables of a codebook of up to 32 levels.

    Args:
        levels: Ascending and symmetric about zero; a power of two of them.
        is_trellis: Whether it is the union codebook of a trellis.

    Returns:
        Unsigned words (upper bytes of eight levels, their lower bytes, both of the eight others), and the levels' unit.
    """
    bits = (len(levels) - 1).bit_length()
    book = torch.tensor(levels, dtype=torch.float64, device="cpu")
    magnitudes = has_signs(bits, is_trellis)
    if magnitudes:
        book, bits = book[len(levels) // 2 :], bits - 1
    order = torch.arange(len(book), dtype=torch.int64, device="cpu")
    if bits == 4 and not magnitudes:
        order = swapped(order, 3, 2)
    elif bits == 4 and not is_trellis:
        order = swapped(order, 0, 3)
    exact = torch.zeros(16, dtype=torch.float64, device="cpu")
    exact[order] = book
    factors = 1 + torch.arange(STEPS, dtype=torch.float64, device="cpu") / STEPS
    rounded = (exact * factors[:, None]).half()
    halves = (rounded.view(torch.int16).to(torch.int64) & 0xFFFF).unflatten(1, (2, 8))
    errors = (rounded.double() / factors[:, None] - exact).square().sum(1)
    if bits == 4:
        errors[((halves[:, 0] ^ halves[:, 1]) & 0x8080).any(1)] = math.inf
    best = int(errors.argmin())
    assert math.isfinite(float(errors[best]))
    first, second = halves[best]
    second = (second ^ (first >> 7 & 0x0101) * 0x7F) & 0x7F7F if bits == 4 else torch.zeros_like(second)
    words = [
        sum(int(x >> shift & 255) << 8 * i for i, x in enumerate(half[four : four + 4]))
        for half in (first, second)
        for shift in (8, 0)
        for four in (0, 4)
    ]
    return words, float(1 / factors[best])


def stored_codes(codes: Tensor, stored: int, width: int, is_trellis: bool) -> Tensor:
    """Codes as half a tile whose levels are looked up has them; see above.

    Args:
        codes: Without path bits, int64.
        stored: Bits of the half.
        width: Bits of the code.
        is_trellis: Whether they are those of a trellis.

    Returns:
        The same shape.
    """
    places, top = width + is_trellis, width - is_trellis - 1
    if has_signs(places, is_trellis):  # the magnitude, and whether the sign is negative
        negative = (codes >> top ^ 1) & 1
        codes = (codes ^ -negative) & ((1 << top) - 1)
        if is_trellis or stored < PLACES:
            return codes | negative << top
        return (swapped(codes, 0, 3) if places == PLACES else codes) << 1 | negative
    if places == PLACES - 1:
        codes = swapped(codes, top, top - 1)
    return codes if is_trellis or stored < PLACES else codes << 1


def has_signs(places: int, is_trellis: bool) -> bool:
    """Whether looked-up levels of a codebook are magnitudes, and their sign is a bit of the code.

    Args:
        places: Bits of a place in it.
        is_trellis: Whether it is the union codebook of a trellis.

    Returns:
        The answer.
    """
    return places == PLACES or (places == PLACES - 1 and not is_trellis)


def swapped(codes: Tensor, one: int, other: int) -> Tensor:
    """Codes with two bits in each other's place."""
    differs = (codes >> one ^ codes >> other) & 1
    return codes ^ (differs << one | differs << other)
