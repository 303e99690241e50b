"""Integer rate allocation: budgets, optimality against brute force, and which sides share a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quantcache.coding.allocation import Group, allocate, allocate_layers, width_groups
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, CodecSettings, LayerCalibration, Rate
from tests.builders import random_side


def cost(groups: Sequence[Group], widths: Sequence[int]) -> float:
    """What an allocation minimises: Σ weight * D(width)."""
    return sum(g.weight * gaussian_codebook(w).distortion for g, w in zip(groups, widths, strict=True))


def spent(groups: Sequence[Group], widths: Sequence[int]) -> int:
    """Bits that an allocation spends."""
    return sum(g.size * w for g, w in zip(groups, widths, strict=True))


def brute_force(groups: Sequence[Group], bits: float, min_bits: int, max_bits: int) -> float:
    """The least cost of all allocations within the budget."""
    budget = bits * sum(g.size for g in groups) + 1e-9
    choices = itertools.product(range(min_bits, max_bits + 1), repeat=len(groups))
    return min(cost(groups, widths) for widths in choices if spent(groups, widths) <= budget)


def random_groups(count: int, sizes: Sequence[int], seed: int) -> list[Group]:
    """Groups with weights over six orders of magnitude."""
    random = np.random.default_rng(seed)
    return [Group(float(10 ** random.uniform(-3, 3)), int(random.choice(sizes))) for _ in range(count)]


@pytest.mark.parametrize("bits", [0, 0.1, 1, 2.5, 3, 3.3, 4.75, 7.99, 8])
@pytest.mark.parametrize("sizes", [(8,), (1, 3, 8, 16)], ids=["equal", "unequal"])
def test_budget_is_kept_and_used(bits: float, sizes: tuple[int, ...]) -> None:
    groups = random_groups(40, sizes, seed=1)
    widths = allocate(groups, bits)
    total = sum(g.size for g in groups)
    assert all(0 <= w <= MAX_WIDTH for w in widths)
    left = bits * total - spent(groups, widths)
    assert left >= -1e-6
    open_sizes = [g.size for g, w in zip(groups, widths, strict=True) if w < MAX_WIDTH]
    assert left < min(open_sizes, default=1), "another bit would have fitted"


@pytest.mark.parametrize("bits", [3, 0.29, 1.1, 4.35])
def test_budget_is_not_lost_to_rounding(bits: float) -> None:
    # In floating point 0.29 * 100 is 28.999999999999996, 1.1 * 100 is 110.00000000000001, 4.35 * 100 is below 435.
    groups = [Group(1.0, 1)] * 100
    assert spent(groups, allocate(groups, bits)) == round(100 * bits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limits", [(0, 4), (1, 4), (0, MAX_WIDTH)], ids=["0-4", "1-4", "0-8"])
@pytest.mark.parametrize("bits", [1.0, 2.2, 3.5])
def test_optimal_for_equal_sizes(seed: int, limits: tuple[int, int], bits: float) -> None:
    groups = random_groups(4, (2,), seed)
    widths = allocate(groups, bits, *limits)
    assert spent(groups, widths) <= bits * 8
    assert min(widths) >= limits[0]
    assert max(widths) <= limits[1]
    assert cost(groups, widths) == pytest.approx(brute_force(groups, bits, *limits), rel=1e-12)


def lower_bound(groups: Sequence[Group], bits: float) -> float:
    """What no allocation within the budget can beat: the Lagrangian dual, at its best multiplier."""
    distortion = np.array([gaussian_codebook(w).distortion for w in range(MAX_WIDTH + 1)])
    weights, sizes = (np.array([getattr(g, name) for g in groups], dtype=float) for name in ("weight", "size"))
    costs, spending = weights[:, None] * distortion, sizes[:, None] * np.arange(MAX_WIDTH + 1)
    multipliers = -np.diff(costs, axis=1) / sizes[:, None]
    return max(
        float((costs + m * spending).min(1).sum() - m * bits * sizes.sum()) for m in (0.0, *multipliers.flatten())
    )


@pytest.mark.parametrize("bits", [1.0, 2.4, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_near_optimal_for_unequal_sizes(seed: int, bits: float) -> None:
    groups = random_groups(100, (1, 2, 5), seed)
    widths = allocate(groups, bits)
    # Let the first bit that did not fit gain r for each of its group's dimensions. All bits taken before gained at
    # least r and no other gains more, so the optimum is at most r times what was then left better than greedy: less
    # than that whole step, which was never taken.
    steps = [gaussian_codebook(w).distortion - gaussian_codebook(w + 1).distortion for w in range(MAX_WIDTH)]
    refused = max(g.weight * steps[w] for g, w in zip(groups, widths, strict=True) if w < MAX_WIDTH)
    assert lower_bound(groups, bits) * (1 - 1e-9) <= cost(groups, widths) <= lower_bound(groups, bits) + refused


@pytest.mark.parametrize("bits", [1.5, 3.0])
def test_monotone_in_weight(bits: float) -> None:
    groups = sorted(random_groups(60, (4,), seed=3), key=lambda g: g.weight)
    assert (np.diff(allocate(groups, bits)) >= 0).all()
    assert len(set(allocate(groups, bits))) > 3


@pytest.mark.parametrize("size", [1, 8])
def test_reverse_water_filling(size: int) -> None:
    """At the optimum no group's next bit is worth more than the bit that any other group got last."""
    groups = random_groups(200, (size,), seed=5)
    widths = allocate(groups, 3.0)
    worth = [gaussian_codebook(w).distortion - gaussian_codebook(w + 1).distortion for w in range(MAX_WIDTH)]
    following = [g.weight * worth[w] for g, w in zip(groups, widths, strict=True) if w < MAX_WIDTH]
    last = [g.weight * worth[w - 1] for g, w in zip(groups, widths, strict=True) if w]
    assert max(following) <= min(last) * (1 + 1e-12)
    assert 0 in widths


@pytest.mark.parametrize("min_bits", range(4))
def test_min_bits(min_bits: int) -> None:
    groups = random_groups(30, (1, 2), seed=4)
    widths = allocate(groups, 3.0, min_bits)
    assert min(widths) == min_bits
    assert spent(groups, widths) <= 3 * sum(g.size for g in groups)


def test_zero_weights_are_allowed() -> None:
    assert allocate([Group(0.0, 4), Group(1.0, 4), Group(0.0, 4)], 2.0) == [0, 6, 0]


@pytest.mark.parametrize(
    ("bits", "min_bits", "message"),
    [
        (8.5, 0, "8, got 8.5"),
        (-1.0, 0, "got -1.0"),
        (1.0, 2, r"min_bits \(2\) and 8, got 1.0"),
        (math.nan, 0, "got nan"),
        (math.inf, 0, "got inf"),
        (2.0, -1, "-1"),
        (2.0, 9, "9"),
    ],
)
def test_rates_out_of_range(bits: float, min_bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate([Group(1.0, 1)], bits, min_bits)


ROPE = Rope("half", tuple(10_000.0 ** (-i / 16) for i in range(16)))


def layers(scales: Sequence[float] = (1.0, 30.0)) -> dict[int, LayerCalibration]:
    """Layers without widths: keys of 32 dimensions, values of 24; spectra differ between layers, sides and heads."""
    found = {}
    for index, scale in enumerate(scales):
        key, value = random_side(2, 32, None, (16, 16), seed=index), random_side(2, 24, None, seed=9 + index)
        key.spectrum.mul_(scale)
        key.spectrum[1].mul_(5.0)
        value.spectrum.mul_(0.1 * scale)
        found[index] = LayerCalibration(ROPE, key, value)
    return found


def mean_width(*widths: torch.Tensor | None) -> float:
    """Mean over all elements of some width tensors."""
    given = [w.double().flatten() for w in widths if w is not None]
    return float(torch.cat(given).mean())


def test_joint_budget_favours_what_costs_most() -> None:
    done = allocate_layers(layers(), Rate(3.0), CodecSettings(), joint=True)
    everything = [done[i].side(side).widths for i in done for side in SIDES]
    assert 3 - 8 / (2 * 2 * (32 + 24)) <= mean_width(*everything) <= 3
    assert mean_width(done[1].key.widths) > mean_width(done[0].key.widths) > mean_width(done[0].value.widths)
    assert mean_width(done[0].key.widths[1]) > mean_width(done[0].key.widths[0])


def test_separate_budgets_per_layer_and_side() -> None:
    done = allocate_layers(layers(), Rate(3.0), CodecSettings(), joint=False)
    for layer in done.values():
        for side in SIDES:
            widths = layer.side(side).widths
            assert 3 - 8 / widths.numel() < mean_width(widths) <= 3


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_a_side_with_its_own_budget(joint: bool) -> None:
    done = allocate_layers(layers(), Rate(3.0, key_bits=2.0, value_bits=5.0), CodecSettings(), joint)
    assert mean_width(*(layer.key.widths for layer in done.values())) == pytest.approx(2.0, abs=8 / 128)
    assert mean_width(*(layer.value.widths for layer in done.values())) == pytest.approx(5.0, abs=8 / 96)


def test_dense_side_takes_no_budget() -> None:
    done = allocate_layers(layers(), Rate(3.0, key_bits="dense"), CodecSettings(), joint=True)
    assert all(layer.key.widths is None for layer in done.values())
    assert mean_width(*(layer.value.widths for layer in done.values())) == pytest.approx(3.0, abs=8 / 96)


def test_layer_profile_shares_widths_between_heads() -> None:
    per_layer = allocate_layers(layers(), Rate(3.0), CodecSettings(profile="layer"), joint=True)
    per_head = allocate_layers(layers(), Rate(3.0), CodecSettings(profile="head"), joint=True)
    for index in per_layer:
        for side in SIDES:
            shared = per_layer[index].side(side).widths
            assert torch.equal(shared[0], shared[1])
    assert not torch.equal(per_head[0].key.widths[0], per_head[0].key.widths[1])


@pytest.mark.parametrize("group_size", [1, 8, 12, 64])
def test_groups_do_not_straddle_slow_and_fast(group_size: int) -> None:
    layer = layers()[0]
    settings = CodecSettings(group_size=group_size)
    for side, edges in (("key", {16}), ("value", set())):
        groups = width_groups(layer, side, settings)
        dims = [d for group in groups for d in range(group.start, group.stop)]
        assert dims == list(range(layer.side(side).dim))
        assert max(group.stop - group.start for group in groups) <= group_size
        assert edges <= {group.start for group in groups}
    done = allocate_layers(layers(), Rate(2.5), settings, joint=True)[0]
    for group in width_groups(layer, "key", settings):
        assert (done.key.widths[:, group] == done.key.widths[:, group][:, :1]).all()


def test_widths_follow_the_spectrum() -> None:
    done = allocate_layers(layers((1.0,)), Rate(3.0), CodecSettings(group_size=1), joint=True)[0]
    assert (done.value.widths.int().diff(dim=-1) <= 0).all()  # the spectrum of a value descends
    assert done.value.widths.dtype == torch.uint8
