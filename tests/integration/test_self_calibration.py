"""A cache without an artifact fits itself to its first prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantcache import SpectralCache
from tests.families import FAMILIES, random_tokens, shared_model
from tests.helpers import divergence, feed, few

STEPS = (150, 1, 1, 60)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("llama", "gpt2", "gemma3")], ids=lambda f: f.name)
def test_more_bits_are_nearer_to_dense(family) -> None:
    model, tokens = shared_model(family), random_tokens(1, sum(STEPS), seed=3)
    dense = feed(model, SpectralCache.self_calibrating(model, residual_length=10_000), tokens, STEPS)
    found = []
    for bits in (1, 3, 8):
        cache = SpectralCache.self_calibrating(model, bits, residual_length=0)
        found.append(divergence(dense, feed(model, cache, tokens, STEPS)))
        # Widths are whole bits of groups of 2 coefficients, so the mean may fall short of what was asked for.
        dim = cache.spectral_layers[0].tails["key"].shape[3]
        assert bits - 0.5 <= cache.memory().bits_per_element - 8 / dim <= bits
    assert found[0] > found[1] > found[2]


def test_padding_does_not_enter_the_fit() -> None:
    model = shared_model(next(f for f in FAMILIES if f.name == "llama"))
    tokens = random_tokens(1, 150, seed=4)
    alone, padded = (SpectralCache.self_calibrating(model, residual_length=0) for _ in range(2))
    feed(model, alone, tokens, (150,))
    feed(model, padded, torch.cat((torch.zeros_like(tokens[:, :20]), tokens), dim=1), (170,), padding=(20,))
    for ours, theirs in zip(padded.spectral_layers, alone.spectral_layers, strict=True):
        for side in ("key", "value"):
            assert torch.allclose(ours.codecs[side].mean, theirs.codecs[side].mean, atol=1e-3)


@pytest.mark.parametrize("text", few([2, 5], [5]))
def test_padding_alone_is_nothing_to_fit_to(text: int) -> None:
    """Where a short prompt is padded to a fixed length: blocks wait for text, or its few tokens would stand for all."""
    model = shared_model(next(f for f in FAMILIES if f.name == "llama"))
    tokens, steps = random_tokens(1, 200 + text + 100, seed=4), (200 + text, *(1,) * 100)
    exact, cache = (SpectralCache.self_calibrating(model, residual_length=n) for n in (10_000, 0))
    dense, found = (feed(model, each, tokens, steps, padding=(200,))[:, 200 + text :] for each in (exact, cache))
    assert [len(layer.spans) for layer in cache.spectral_layers] == [4, 4]
    assert divergence(dense, found) < 0.05


@pytest.mark.parametrize("forget", [lambda cache: cache.reset(), lambda cache: cache.crop(-148)], ids=["reset", "crop"])
def test_the_next_prompt_has_a_fit_of_its_own(forget: Callable[[SpectralCache], None]) -> None:
    """Once nothing is encoded any more; it was coded as the first prompt had been."""
    model = shared_model(next(f for f in FAMILIES if f.name == "llama"))
    first, second = random_tokens(1, 150, seed=4), random_tokens(1, 150, seed=5)
    used, fresh = (SpectralCache.self_calibrating(model, residual_length=0) for _ in range(2))
    feed(model, used, first, (150,))
    forget(used)
    kept = first[:, : used.get_seq_length()]
    if kept.shape[1]:
        feed(model, fresh, kept, (kept.shape[1],))
    found, expected = (feed(model, cache, second, (140, 10)) for cache in (used, fresh))
    assert torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("bits", [-1, 9])
def test_rate_out_of_range(bits: float) -> None:
    with pytest.raises(ValueError, match="bits must lie between 0 and 8"):
        SpectralCache.self_calibrating(shared_model(FAMILIES[0]), bits)


def test_what_it_does_not_take() -> None:
    with pytest.raises(
        ValueError, match="quality needs a calibration, and a self-calibrating cache has none: give bits"
    ):
        SpectralCache.self_calibrating(shared_model(FAMILIES[0]), quality="small")
    with pytest.raises(TypeError, match="self_calibrating needs a loaded model, got 'wiki11m'"):
        SpectralCache.self_calibrating("wiki11m")
