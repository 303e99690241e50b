"""The trellis: its path is the best there is, and decoding by words is the convolution it is defined by."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantcache.packing import BLOCK, pack, unpack
from quantcache.trellis import (
    CODES,
    branch_subsets,
    code_distortions,
    search,
    subset_words,
    subsets_of_path,
    union_levels,
)


@pytest.mark.parametrize("states", CODES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_path_is_better(states: int, width: int) -> None:
    generator = torch.Generator().manual_seed(10 * states + width)
    levels = torch.tensor(union_levels(width), dtype=torch.float32)
    tokens = 8
    values = 1.2 * torch.randn(20, tokens, generator=generator)
    weights = 0.1 + torch.rand(20, tokens, generator=generator)
    path = search(values, weights, levels, states)
    every = torch.tensor(list(itertools.product((0, 1), repeat=tokens)), dtype=torch.uint8)
    subsets = subsets_of_path(every, states)  # [256, tokens]
    by_subset = torch.stack([(values[..., None] - levels[s::4]).square().amin(-1) * weights for s in range(4)])
    costs = by_subset.permute(1, 2, 0)[:, None].expand(-1, len(every), -1, -1)
    best = costs.gather(-1, subsets[None, :, :, None].expand(len(values), -1, -1, -1)).sum((-1, -2)).amin(-1)
    found = ((values - path.quantized).square() * weights).sum(-1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


@given(st.sampled_from(sorted(CODES)), st.integers(0, 2**32 - 1))
def test_words_are_the_convolution(states: int, seed: int) -> None:
    bits = torch.randint(0, 2, (3, BLOCK), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    c1, c0 = (unpack(plane, 1) for plane in subset_words(pack(bits, 1), states))
    assert torch.equal(2 * c1 + c0, subsets_of_path(bits, states).int())


@pytest.mark.parametrize("states", CODES)
def test_branches_are_the_convolution(states: int) -> None:
    bits = torch.randint(0, 2, (50,), generator=torch.Generator().manual_seed(states))
    state, subsets = 0, []
    for bit in bits.tolist():
        oldest, state = state // (states // 2), (2 * state + bit) % states
        subsets.append(int(branch_subsets(states)[state, oldest]))
    assert subsets == subsets_of_path(bits, states).tolist()


@pytest.mark.parametrize("width", range(1, 9))
def test_union_levels_ascend_and_are_symmetric(width: int) -> None:
    levels = torch.tensor(union_levels(width), dtype=torch.float64)
    assert len(levels) == 2 << width
    assert bool((levels.diff() > 0).all())
    torch.testing.assert_close(levels, -levels.flip(0))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_distortion_is_what_is_recorded(width: int) -> None:
    values = torch.randn(4096, BLOCK, generator=torch.Generator().manual_seed(7))
    levels = torch.tensor(union_levels(width), dtype=torch.float32)
    errors = (values - search(values, torch.ones_like(values), levels).quantized).square().mean(-1)
    deviation = float(errors.std()) / len(errors) ** 0.5
    assert abs(float(errors.mean()) - code_distortions("trellis")[width]) < 5 * deviation
