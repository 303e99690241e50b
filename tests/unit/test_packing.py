"""The bit layout of packed codes, against an oracle that sets one bit at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcache.coding.packing import BLOCK, FIELDS, MAX_WIDTH, pack, unpack

# The layout as kernels rely on it, written down a second time: bits of each field, most significant field first.
LAYOUT = {0: [], 1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}
WIDTHS = range(MAX_WIDTH + 1)


def random_codes(width: int, *shape: int) -> Tensor:
    """Random codes of all values that a width allows."""
    return torch.randint(0, 1 << width, (*shape, BLOCK), dtype=torch.int32)


def words_bit_by_bit(codes: list[int], width: int) -> list[int]:
    """The words of one dimension as unsigned integers, set one bit at a time."""
    words = [0] * (2 * width)
    for token, code in enumerate(codes):
        remaining, offset = width, 0
        for field in LAYOUT[width]:
            remaining -= field
            for bit in range(field):
                value = code >> (remaining + bit) & 1
                words[offset + token % (2 * field)] |= value << (field * (token // (2 * field)) + bit)
            offset += 2 * field
    return words


def test_field_table() -> None:
    assert {width: list(fields) for width, fields in enumerate(FIELDS)} == LAYOUT


@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_of_every_code(width: int) -> None:
    codes = (torch.arange(BLOCK)[None] + torch.arange(1 << width)[:, None]) % (1 << width)
    restored = unpack(pack(codes, width), width)
    assert restored.dtype == torch.int32
    assert torch.equal(restored, codes.int())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_round_trip_of_shapes_and_dtypes(width: int, dtype: torch.dtype) -> None:
    codes = random_codes(width, 3, 1, 5).to(dtype)
    words = pack(codes, width)
    assert words.shape == (3, 1, 5, 2 * width)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, width).to(dtype), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_of_non_contiguous_codes(width: int) -> None:
    codes = random_codes(width, 6).T.contiguous().T[::2]
    words = pack(codes, width)
    spread = torch.stack([words, words], dim=-1).flatten(-2)[..., ::2]
    assert torch.equal(unpack(spread, width), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_layout_bit_by_bit(width: int) -> None:
    codes = random_codes(width, 4)
    found = [[word & 0xFFFFFFFF for word in row] for row in pack(codes, width).tolist()]
    assert found == [words_bit_by_bit(row, width) for row in codes.tolist()]


def test_layout_of_three_bits_by_hand() -> None:
    codes = torch.zeros(BLOCK, dtype=torch.int32)
    codes[0], codes[5], codes[63] = 0b101, 0b011, 0b110
    # Two high bits in four words, 16 tokens each; the low bit in two words, 32 tokens each.
    words = [0b10, 0b01 << 2, 0, 0b11 << 30, 1, 1 << 2]
    assert [word & 0xFFFFFFFF for word in pack(codes, 3).tolist()] == words


def test_all_ones_set_every_bit() -> None:
    for width in range(1, MAX_WIDTH + 1):
        assert bool((pack(torch.full((BLOCK,), (1 << width) - 1), width) == -1).all())
