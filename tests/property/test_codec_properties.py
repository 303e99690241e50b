"""Properties of packing, gains, allocation and encoding over all inputs."""

from __future__ import annotations

import functools

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcache.artifact.calibration import Calibration
from quantcache.backends import BackendName
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.allocation import Group, allocate
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import GAIN_STEPS, dequantize_gain, quantize_gain
from quantcache.coding.packing import BLOCK, MAX_WIDTH, pack, unpack
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, CodecSettings
from tests.builders import llama_config, random_side, scalar_calibration
from tests.property.effort import examples

widths = st.integers(0, MAX_WIDTH)
weights = st.floats(0, 1e6, allow_subnormal=False)


@settings(max_examples=examples(60))
@given(data=st.data(), width=widths, rows=st.integers(1, 4))
def test_unpacking_inverts_packing(data: st.DataObject, width: int, rows: int) -> None:
    row = st.lists(st.integers(0, 2**width - 1), min_size=BLOCK, max_size=BLOCK)
    codes = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.int32)
    words = pack(codes, width)
    assert words.shape == (rows, 2 * width)
    assert torch.equal(unpack(words, width), codes)


@settings(max_examples=examples(60))
@given(data=st.data(), width=st.integers(1, MAX_WIDTH))
def test_packing_inverts_unpacking(data: st.DataObject, width: int) -> None:
    """Every word pattern is the code of something: no bit is wasted."""
    word = st.integers(-(2**31), 2**31 - 1)
    words = torch.tensor(data.draw(st.lists(word, min_size=2 * width, max_size=2 * width)), dtype=torch.int32)
    assert torch.equal(pack(unpack(words, width), width), words)


gains = st.floats(0, 2.0**127, width=32)


@settings(max_examples=examples(200))
@given(low=gains, high=gains)
def test_gain_codes_are_monotone(low: float, high: float) -> None:
    low, high = sorted((low, high))
    codes = quantize_gain(torch.tensor([low, high]))
    assert codes[0] <= codes[1]
    values = dequantize_gain(codes)
    assert values[0] <= values[1]


@settings(max_examples=examples(200))
@given(exponent=st.floats(-3.97, 3.95))
def test_gain_is_rounded_by_half_a_step(exponent: float) -> None:
    gain = torch.tensor(2.0**exponent)
    ratio = float(dequantize_gain(quantize_gain(gain)) / gain)
    assert 2 ** (-0.5 / GAIN_STEPS) * (1 - 1e-5) <= ratio <= 2 ** (0.5 / GAIN_STEPS) * (1 + 1e-5)


def cost(groups: list[Group], allocation: list[int]) -> float:
    """Σ weight * D(width)."""
    return sum(g.weight * gaussian_codebook(w).distortion for g, w in zip(groups, allocation, strict=True))


@settings(max_examples=examples(100))
@given(
    group_weights=st.lists(weights, min_size=1, max_size=20),
    size=st.integers(1, 16),
    bits=st.lists(st.floats(0, 8), min_size=2, max_size=2),
)
def test_more_bits_take_none_from_anybody(group_weights: list[float], size: int, bits: list[float]) -> None:
    groups = [Group(weight, size) for weight in group_weights]
    less, more = (allocate(groups, b) for b in sorted(bits))
    assert all(a <= b for a, b in zip(less, more, strict=True))


sized = st.builds(Group, weights, st.integers(1, 40))


@settings(max_examples=examples(150))
@given(groups=st.lists(sized, min_size=1, max_size=20), bits=st.lists(st.floats(0, 8), min_size=2, max_size=2))
def test_more_bits_never_cost_more(groups: list[Group], bits: list[float]) -> None:
    low, high = sorted(bits)
    less, more = allocate(groups, low), allocate(groups, high)
    total = sum(g.size for g in groups)
    for rate, allocation in ((low, less), (high, more)):
        assert sum(g.size * w for g, w in zip(groups, allocation, strict=True)) <= rate * total + 1e-5
    assert cost(groups, more) <= cost(groups, less) * (1 + 1e-12)


@settings(max_examples=examples(100))
@given(
    groups=st.lists(sized, min_size=1, max_size=20), bits=st.floats(0, 8), scale=st.sampled_from([2.0**-40, 2.0**30])
)
def test_unit_of_the_weights_does_not_matter(groups: list[Group], bits: float, scale: float) -> None:
    assert allocate([Group(g.weight * scale, g.size) for g in groups], bits) == allocate(groups, bits)


@settings(max_examples=examples(100))
@given(groups=st.lists(sized, min_size=1, max_size=20), bits=st.floats(0, 8), min_bits=st.integers(0, 8))
def test_heavier_groups_of_one_size_get_no_less(groups: list[Group], bits: float, min_bits: int) -> None:
    assume(bits >= min_bits)
    allocation = allocate(groups, bits, min_bits)
    assert min(allocation) >= min_bits
    for a, width in zip(groups, allocation, strict=True):
        for b, other in zip(groups, allocation, strict=True):
            if a.size == b.size and a.weight > b.weight:
                assert width >= other


@settings(max_examples=examples(50))
@given(scale=st.floats(-30, 30), seed=st.integers(0, 2**31), outlier=st.booleans())
def test_coding_costs_no_more_than_dropping(scale: float, seed: int, outlier: bool) -> None:
    """Whatever the vectors, the decoded one is at least as near, in the metric, as the mean is."""
    codec, analysis = value_codec()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, BLOCK, 32, generator=generator) * 10.0**scale
    if outlier:
        x[..., 5] *= 1e6
    place = torch.tensor([[0, BLOCK, 0]], dtype=torch.int32)
    decoded = codec.decode(codec.encode(x, place, None), place, None).double()
    assert torch.isfinite(decoded).all()
    error = ((x.double() - decoded) @ analysis).square().sum(-1)
    power = ((x.double() - codec.mean.double()[:, None]) @ analysis).square().sum(-1)
    # Half a step of the gain, and float32.
    assert (error <= power * (1 + (2 ** (1 / 32) - 1) ** 2 + 1e-5)).all()


@functools.cache
def value_codec() -> tuple[SpectralCodec, Tensor]:
    """A codec of values of mixed widths, and its transposed analysis transform."""
    mixed = torch.tensor([5, 4, 3, 3, 2, 2, 1, 0]).repeat_interleave(4).expand(2, -1)
    side = random_side(2, 32, mixed)
    return SpectralCodec(side, Rope(), CodecSettings(coding="scalar")), side.analysis.double().transpose(-1, -2)


@functools.cache
def calibration() -> Calibration:
    """A small calibration, shared: its codecs are made once."""
    return scalar_calibration(llama_config(32, layers=1), 3.0)


TOKENS = 420


@functools.cache
def tokens(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys and values of one layer."""
    generator = torch.Generator().manual_seed(seed)
    return {side: torch.randn(2, 2, TOKENS, 32, generator=generator).to(dtype) for side in SIDES}


def fed(chunks: list[int], seed: int, dtype: torch.dtype, backend: BackendName, finish: bool) -> SpectralLayer:
    """A layer given the same tokens in chunks."""
    layer = SpectralCache(calibration(), residual_length=16, backend=backend).spectral_layers[0]
    given = tokens(seed, dtype)
    first = 0
    for count in [*chunks, TOKENS]:
        last = min(first + count, TOKENS)
        if last > first:
            layer.update(given["key"][:, :, first:last], given["value"][:, :, first:last])
            if finish:
                layer.flush()
        first = last
    layer.flush()
    return layer


@settings(max_examples=examples(20))
@given(
    chunks=st.lists(st.integers(1, 200) | st.just(1) | st.just(BLOCK), max_size=40),
    seed=st.integers(0, 2),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    backend=st.sampled_from(["auto", "torch"]),
    finish=st.booleans(),
)
def test_codes_do_not_depend_on_how_tokens_arrive(
    chunks: list[int], seed: int, dtype: torch.dtype, backend: BackendName, finish: bool
) -> None:
    found, expected = fed(chunks, seed, dtype, backend, finish), fed([], seed, dtype, backend, True)
    assert found.spans == expected.spans
    assert len(found.spans) == (TOKENS - 4 - 16) // BLOCK
    for side in SIDES:
        assert torch.equal(found.tails[side], expected.tails[side])
        assert torch.equal(found.sinks[side], expected.sinks[side])
        count = found.stores[side].count
        ours, theirs = (layer.stores[side].slice(0, count) for layer in (found, expected))
        for name, buffer in ours.items():
            assert torch.equal(buffer, theirs[name])
