"""What transformers' own tests of its caches ask of a cache and no other file here does, beside a dense cache."""

from __future__ import annotations

import copy
import functools
import re
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from tests.builders import scalar_calibration
from tests.families import FAMILIES, VOCABULARY, Family, random_tokens, shared_model
from tests.helpers import divergence, feed

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, GEMMA3, GPT2 = (next(f for f in FAMILIES if f.name == name) for name in ("llama", "gemma3", "gpt2"))
by_model = pytest.mark.parametrize("family", [LLAMA, GPT2, GEMMA3], ids=str)

LONGER = copy.deepcopy(shared_model(LLAMA).config)
LONGER.num_hidden_layers = 5

growing = pytest.mark.support("layers one by one, early_initialization, properties")


def empty(family: Family) -> SpectralCache:
    """An empty cache that keeps no recent tokens."""
    config = shared_model(family).config
    return SpectralCache(scalar_calibration(config, 3.0), config, residual_length=0)


def dense(family: Family) -> DynamicCache:
    """An empty cache of transformers' own."""
    return DynamicCache(config=shared_model(family).config)


def counted(family: Family, first: int, last: int, sign: int = 1) -> Tensor:
    """Keys or values that tell their slots, ``[1, H, last - first, D]``."""
    dim, heads = family.cached
    return sign * torch.arange(first, last, dtype=torch.float32)[None, None, :, None].expand(1, heads, -1, dim)


def slots(tensor: Tensor) -> list[float]:
    """What :func:`counted` has written."""
    return [float(x) for x in tensor[0, 0, :, 0]]


@growing
@by_model
def test_layers_grow_one_by_one(family: Family) -> None:
    """A prompt longer than the window of Gemma 3, then steps of one and of several tokens, layer after layer."""
    cache, expected = empty(family), dense(family)
    for first, last in ((0, 60), (60, 61), (61, 64)):
        for index in range(len(cache)):
            given = counted(family, first, last), counted(family, first, last, sign=-1)
            ours, theirs = (each.update(*given, index) for each in (cache, expected))
            for a, b in zip(ours, theirs, strict=True):
                assert slots(a) == slots(b)
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert slots(ours.keys) == slots(theirs.keys)
        assert slots(ours.values) == slots(theirs.values)


@growing
@by_model
def test_properties_are_those_of_a_dense_cache(family: Family) -> None:
    caches = empty(family), dense(family)
    dim, heads = family.cached

    def seen(cache: DynamicCache) -> list[object]:
        layers = range(len(cache))
        return [
            *(len(cache), cache.is_initialized, cache.is_sliding, cache.is_compileable, cache.get_seq_length()),
            *([cache.get_max_length(i) for i in layers], [cache.get_seq_length(i) for i in layers]),
            [cache.get_mask_sizes(count, i) for count in (1, 7) for i in layers],
        ]

    found = [[seen(cache)] for cache in caches]
    for cache, states in zip(caches, found, strict=True):
        cache.early_initialization(2, heads, dim, torch.float32, torch.device("cpu"))
        states.append(seen(cache))
        feed(shared_model(family), cache, random_tokens(2, 150), (150,))
        states.append(seen(cache))
    assert found[0] == found[1]
    assert found[0][1][1]


@pytest.mark.support("torch.inference_mode")
@by_model
def test_a_prompt_read_in_inference_mode(family: Family) -> None:
    model, prompt, more = shared_model(family), random_tokens(1, 150, seed=1), random_tokens(1, 80, seed=2)
    cache, expected = empty(family), empty(family)
    feed(model, expected, prompt, (150,))
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
    fork, copied = cache.fork(), copy.deepcopy(cache)
    logits = feed(model, expected, more, (1, 79))
    assert all(torch.equal(feed(model, each, more, (1, 79)), logits) for each in (cache, fork, copied))


@pytest.mark.support("pickle, torch.nn.DataParallel", refused=True)
def test_pickling_names_what_to_use_instead() -> None:
    cache = empty(LLAMA)
    feed(shared_model(LLAMA), cache, random_tokens(1, 80), (80,))
    with pytest.raises(QuantCacheError, match=r"cannot be pickled: use save\(\) and load\(\)"):
        ForkingPickler.dumps(cache)
    shallow = copy.copy(cache)
    assert shallow.layers is cache.layers
    assert type(shallow) is SpectralCache


@pytest.mark.support("pickle, torch.nn.DataParallel", refused=True)
def test_rebuilding_from_dense_tensors_is_refused() -> None:
    """As DataParallel gathers the caches of its replicas: what it gives has lost codes and calibration."""
    cache = empty(LLAMA)
    with pytest.raises(TypeError, match="SpectralCache needs a Calibration, got generator"):
        type(cache)(iter(cache))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": shared_model(LLAMA)}, TypeError, "needs a model's config, or model=, got config=LlamaForCausalLM"),
        ({"config": shared_model(LLAMA).config.to_dict()}, TypeError, "got config=dict"),
        ({"model": shared_model(LLAMA).config}, TypeError, "got model=LlamaConfig"),
        ({"model": torch.nn.DataParallel(shared_model(LLAMA))}, TypeError, "got model=DataParallel"),
        ({"config": LONGER, "model": shared_model(LLAMA)}, QuantCacheError, "disagree: num_hidden_layers is 5 and 2;"),
        ({"config": "llama", "model": shared_model(LLAMA)}, TypeError, "got config=str"),
        ({"residual_length": 64.0}, ValueError, "residual_length must be a whole number from 0 up, got 64.0"),
        ({"residual_length": "64"}, ValueError, "residual_length must be a whole number from 0 up, got '64'"),
        ({"sink_length": None}, ValueError, "sink_length must be a whole number from 0 up, got None"),
        ({"sink_length": True}, ValueError, "sink_length must be a whole number from 0 up, got True"),
        ({"sink_length": -1}, ValueError, "sink_length must be a whole number from 0 up, got -1"),
        ({"min_bits": 1.5}, ValueError, "min_bits must be a whole number from 0 up, got 1.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_a_cache_cannot_be_made_with(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SpectralCache(scalar_calibration(shared_model(LLAMA).config), **arguments)


def test_a_model_and_its_own_config_may_both_be_given() -> None:
    config = copy.deepcopy(shared_model(LLAMA).config)
    config.use_cache = False  # no cache is another for it
    cache = SpectralCache(scalar_calibration(config), config, model=shared_model(LLAMA))
    assert len(cache.spectral_layers) == config.num_hidden_layers


@pytest.mark.support("torch.export", refused=True)
def test_export_is_refused() -> None:
    """By torch: a cache is no container that it knows."""
    inputs = {"input_ids": random_tokens(1, 8), "past_key_values": empty(LLAMA), "use_cache": True}
    with pytest.raises(ValueError, match=r"Unsupported input type .*SpectralCache"):
        torch.export.export(shared_model(LLAMA), (), inputs, strict=False)


# ---------------------------------------------------------------------- caches of encoder-decoders


@functools.cache
def speech_model() -> PreTrainedModel:
    """A small Whisper, whose decoder's layers have the shape of the small GPT-2's."""
    sizes = {"d_model": 128, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "init_std": 0.12}
    config = WhisperConfig(vocab_size=VOCABULARY, max_source_positions=50, pad_token_id=2, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config).eval()


def speak(cache: EncoderDecoderCache, attention: str, steps: tuple[int, ...]) -> Tensor:
    """Logits of tokens said about a sound."""
    model = speech_model()
    model.set_attn_implementation(attention)
    sound = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(1))
    logits = []
    with torch.no_grad():
        for part in random_tokens(2, sum(steps), seed=2).split(list(steps), dim=1):
            output = model(input_features=sound, decoder_input_ids=part, past_key_values=cache)
            logits.append(output.logits.double())
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("attention", ["spectral", "sdpa", "eager"])
def test_the_own_tokens_of_an_encoder_decoder_are_compressed(attention: str) -> None:
    steps = (150, 1, 20)
    own = SpectralCache.self_calibrating(shared_model(GPT2), bits=8, residual_length=0)
    found = speak(EncoderDecoderCache(own, DynamicCache()), attention, steps)
    expected = speak(EncoderDecoderCache(DynamicCache(), DynamicCache()), attention, steps)
    assert all(layer.spans for layer in own.spectral_layers)
    assert divergence(expected, found) < 1e-4


@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
def test_what_an_encoder_says_is_not_compressed(attention: str) -> None:
    """It is no text that grows: our attention would hide some of it, as if it were."""
    for own in (DynamicCache(), empty(GPT2)):
        with pytest.raises(
            UnsupportedModel, match=re.escape("EncoderDecoderCache(SpectralCache(...), DynamicCache())")
        ):
            speak(EncoderDecoderCache(own, empty(GPT2)), attention, (5,))


def test_a_pass_of_an_encoder_decoder_that_fails_late_is_noticed() -> None:
    own = empty(GPT2)
    cache = EncoderDecoderCache(own, DynamicCache())
    speak(cache, "spectral", (9,))
    hook = speech_model().get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speak(cache, "spectral", (3,))
    hook.remove()
    with pytest.raises(QuantCacheError, match="it held 9 tokens and holds 12"):
        speak(cache, "spectral", (3,))
    assert own.rollback() == 9
