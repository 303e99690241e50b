"""Every way of generating, against dense caches: exact where nothing is quantized, else fake-quantized."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.common.errors import QuantCacheError
from tests.families import FAMILIES, MAX_POSITIONS, Family, random_tokens, shared_model
from tests.helpers import error, feed
from tests.reference import reference_cache

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"llama": "RoPE with grouped queries", "gpt2": "no RoPE", "gemma3": "sliding and full layers"}
MODELS = [family for family in FAMILIES if family.name in KINDS]

LLAMA, GEMMA3 = (next(f for f in MODELS if f.name == name) for name in ("llama", "gemma3"))


def marks(family: Family, row: str | None = None, quick: bool = True) -> list[pytest.MarkDecorator]:
    """Marks of a model's case: rows of the support table, and whether it is left to CI."""
    rows = [pytest.mark.support(each) for each in (KINDS[family.name], row) if each is not None]
    return rows if quick else [*rows, pytest.mark.slow]


by_model = pytest.mark.parametrize("family", [pytest.param(each, marks=marks(each), id=each.name) for each in MODELS])
mostly_llama = pytest.mark.parametrize(
    "family", [pytest.param(each, marks=marks(each, quick=each is LLAMA), id=each.name) for each in MODELS]
)

PROMPT_LENGTH = 122
"""Ten tokens before the second block is full, so that every generation encodes one on its way."""
NEW_TOKENS = 14

ROUNDING = 2e-5
"""Bound of the relative difference between two float32 runs of a whole model that read the same codes."""

CLOSE = 2e-3
"""The same for runs that encode on their way: a value between two codes may round to either. Wrong tokens cost 0.1."""


@functools.cache
def calibration_of(family: Family) -> Calibration:
    """A calibration of the family's shared model, at 3 bits.

    Its codes are scalar: the attentions that are compared differ in rounding, which moves one code now and then, but
    the whole rest of a path through a trellis, and untrained models choose among tokens by less than that.
    """
    return calibrate(shared_model(family), random_tokens(4, 256), predict=False, progress=False).with_coding("scalar")


@functools.cache
def model_of(family: Family, attention: str) -> PreTrainedModel:
    """The family's model with an attention implementation, shared by all tests."""
    return family.make(attention=attention)


@functools.cache
def draft_of(family: Family) -> PreTrainedModel:
    """A draft model that the family's model agrees with now and then.

    Its windows are as long as its context: transformers 5.17 cannot crop a draft's own cache past a window.
    """
    windows = {"sliding_window": MAX_POSITIONS} if "sliding_window" in family.config else {}
    model = dataclasses.replace(family, config=family.config | windows).make(attention="sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def quantized(family: Family, **options: Any) -> SpectralCache:
    """An empty cache at 3 bits that keeps no recent tokens."""
    return SpectralCache(calibration_of(family), shared_model(family).config, **{"residual_length": 0, **options})


def passthrough(family: Family) -> SpectralCache:
    """An empty cache whose blocks stay in the model's dtype."""
    return quantized(family, key_bits="dense", value_bits="dense")


def reference(family: Family, left_padding: Sequence[int] = (), **options: Any) -> DynamicCache:
    """The fake-quantized dense cache that :func:`quantized` must be equal to."""
    given = torch.tensor(left_padding) if left_padding else None
    return reference_cache(quantized(family, **options), shared_model(family).config, given)


def dense(family: Family) -> DynamicCache:
    """An empty cache of transformers' own."""
    return DynamicCache(config=shared_model(family).config)


def generate(
    family: Family, cache: DynamicCache, attention: str, prompt: Tensor | None = None, **options: Any
) -> Tensor:
    """Tokens generated after a prompt, the prompt included."""
    torch.manual_seed(3)
    prompt = random_tokens(1, PROMPT_LENGTH, seed=11) if prompt is None else prompt
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2, **options}
    options = {name: value(family) if name == "assistant_model" else value for name, value in options.items()}
    return model_of(family, attention).generate(prompt, past_key_values=cache, **options)


LOOPING = random_tokens(1, 31, seed=12).repeat(1, 4)[:, :PROMPT_LENGTH]
PADDED = {"attention_mask": (torch.arange(PROMPT_LENGTH) >= torch.tensor([0, 9, 70])[:, None]).long()}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "return-sequences": {"do_sample": True, "num_return_sequences": 3},
    "assisted": {"assistant_model": draft_of, "num_assistant_tokens": 5},
    "assisted-sampling": {"assistant_model": draft_of, "num_assistant_tokens": 5, "do_sample": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 4, "prompt": LOOPING},
    "chunked-prefill": {"prefill_chunk_size": 50},
    "batch": {"prompt": random_tokens(3, PROMPT_LENGTH, seed=13)},
    "padded-batch": {"prompt": random_tokens(3, PROMPT_LENGTH, seed=13), **PADDED},
    "padded-beams": {"prompt": random_tokens(3, PROMPT_LENGTH, seed=13), **PADDED, "num_beams": 2},
}

ROWS = {
    "greedy": "greedy",
    "sampling": "sampling",
    "beams": "beam search",
    "sampled-beams": "beam sampling",
    "return-sequences": "num_return_sequences",
    "assisted": "assisted decoding with a draft model",
    "assisted-sampling": "assisted decoding with a draft model",
    "prompt-lookup": "prompt lookup",
    "chunked-prefill": "chunked prefill",
    "batch": "batches",
    "padded-batch": "left-padded batches",
    "padded-beams": "left-padded batches",
}
"""Rows of the support table."""

MOST = ("greedy", "assisted", "padded-batch")
"""What models other than Llama are asked where CI does not ask them all."""

by_model_and_mode = pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(each, mode, marks=marks(each, ROWS[mode], each is LLAMA or mode in MOST), id=f"{each}-{mode}")
        for mode in MODES
        for each in MODELS
    ],
)


def starts_of(mode: str) -> tuple[int, ...]:
    """Left padding of every row that a mode feeds to the model."""
    options = MODES[mode]
    if "attention_mask" not in options:
        return ()
    pads = options["attention_mask"].argmax(-1)
    return tuple(pads.repeat_interleave(options.get("num_beams", 1)).tolist())


# ---------------------------------------------------------------------- generate()


@by_model_and_mode
def test_passthrough_generates_what_the_dense_cache_does(family: Family, mode: str) -> None:
    expected = generate(family, dense(family), "sdpa", **MODES[mode])
    assert expected.shape[1] == PROMPT_LENGTH + NEW_TOKENS
    for attention in ("spectral", "sdpa"):
        cache = passthrough(family)
        assert torch.equal(generate(family, cache, attention, **MODES[mode]), expected), attention
        assert all(layer.spans for layer in cache.spectral_layers)


@functools.cache
def expected_tokens(family: Family, mode: str, left_padding: tuple[int, ...]) -> Tensor:
    """What the fake-quantized cache generates."""
    return generate(family, reference(family, left_padding), "sdpa", **MODES[mode])


@by_model_and_mode
def test_codes_generate_what_the_fake_quantized_cache_does(family: Family, mode: str) -> None:
    expected = expected_tokens(family, mode, starts_of(mode))
    cache = quantized(family)
    assert torch.equal(generate(family, cache, "spectral", **MODES[mode]), expected)
    assert all(layer.spans for layer in cache.spectral_layers)


@by_model_and_mode
def test_every_attention_generates_the_same_from_codes(family: Family, mode: str) -> None:
    expected = expected_tokens(family, mode, starts_of(mode))
    for attention in ("sdpa", "eager") if mode in ("greedy", "assisted", "padded-batch") else ("sdpa",):
        assert torch.equal(generate(family, quantized(family), attention, **MODES[mode]), expected), attention


# ---------------------------------------------------------------------- operations on a cache

STEPS = (122, 1, 20, 1)


@mostly_llama
def test_eight_bits_mostly_agree_with_the_dense_cache(family: Family) -> None:
    tokens = generate(family, dense(family), "sdpa", random_tokens(4, PROMPT_LENGTH, seed=14), do_sample=True)
    steps = (PROMPT_LENGTH, *[1] * NEW_TOKENS)
    expected = feed(model_of(family, "sdpa"), dense(family), tokens, steps).argmax(-1)
    found = feed(model_of(family, "spectral"), quantized(family, bits=8), tokens, steps).argmax(-1)
    assert (found == expected)[:, PROMPT_LENGTH:].float().mean() > 0.9


Read = Callable[[DynamicCache, Tensor, Sequence[int]], None]
"""Feeds tokens to a model through a cache, in steps, and notes the logits."""


def compare(
    family: Family,
    act: Callable[[DynamicCache, Read], None],
    left_padding: Sequence[int] = (),
    **options: Any,
) -> None:
    """Run the same actions on a spectral cache and on its reference, and compare all logits they lead to.

    Args:
        family: The model.
        act: What to do with a cache.
        left_padding: Left padding, for the reference.
        options: Options of the cache.
    """
    for backend, attentions in (("auto", ("spectral", "sdpa")), ("torch", ("spectral",))):
        options["backend"] = backend
        expected = logits_of(model_of(family, "sdpa"), reference(family, left_padding, **options), act)
        for attention in attentions:
            found = logits_of(model_of(family, attention), quantized(family, **options), act)
            assert error(found, expected) < CLOSE * float(expected.std()), (attention, backend)


def logits_of(model: PreTrainedModel, cache: DynamicCache, act: Callable[[DynamicCache, Read], None]) -> Tensor:
    """All logits that some actions on a cache lead to, ``[N, V]``."""
    logits: list[Tensor] = []

    def read(cache: DynamicCache, tokens: Tensor, steps: Sequence[int]) -> None:
        logits.append(feed(model, cache, tokens, steps).flatten(0, 1))

    act(cache, read)
    return torch.cat(logits)


CROPS = {"llama": (1, 20, 40, 64, 75, 120), "gpt2": (40, 120), "gemma3": (40, 120)}
"""Tokens removed from 150: none or a part of a block, one and a part of another; crops know no rotation."""
FEW_CROPS = (("llama", 20), ("llama", 75), ("gemma3", 120))
"""Those that are not left to CI."""


@pytest.mark.support("crop, inside an encoded block too")
@pytest.mark.parametrize(
    ("family", "removed"),
    [
        pytest.param(
            family, removed, marks=marks(family, quick=(family.name, removed) in FEW_CROPS), id=f"{family}-{removed}"
        )
        for family in MODELS
        for removed in CROPS[family.name]
    ],
)
def test_crop(family: Family, removed: int) -> None:
    def act(cache: DynamicCache, read: Read) -> None:
        cache.activate_past_recording()  # as assisted decoding does: a sliding window would forget what crop needs
        length = 0
        steps = ((150, removed), (1, 0), (3, 1), (70, 0), (15, 9), (1, 0), (40, 30), (1, 0), (38, 0), (2, 0))
        for count, drop in steps:
            read(cache, random_tokens(1, count, seed=length), (count,))
            cache.crop(-drop)
            length += count - drop
            assert cache.get_seq_length() == length

    compare(family, act)


@pytest.mark.support("crop, inside an encoded block too")
@pytest.mark.parametrize("kept", [0, 2, 4, 5])
def test_crop_to_the_sinks(kept: int) -> None:
    def act(cache: DynamicCache, read: Read) -> None:
        read(cache, random_tokens(1, 150, seed=21), (150,))
        cache.crop(kept - 150)
        read(cache, random_tokens(1, 90, seed=22), (89, 1))

    compare(MODELS[0], act)


@pytest.mark.support("reset() and reuse")
@by_model
def test_reset_and_reuse(family: Family) -> None:
    model, cache = model_of(family, "spectral"), quantized(family)
    feed(model, cache, random_tokens(2, 150, seed=24), (150,))
    cache.reset()
    assert cache.get_seq_length() == 0
    tokens = random_tokens(3, 144, seed=25)
    assert torch.equal(feed(model, cache, tokens, STEPS), feed(model, quantized(family), tokens, STEPS))


@pytest.mark.support("batch_repeat_interleave, batch_select_indices, reorder_cache")
@mostly_llama
def test_rows_are_repeated_selected_and_reordered(family: Family) -> None:
    def act(cache: DynamicCache, read: Read) -> None:
        read(cache, random_tokens(2, 140, seed=26), (140,))
        cache.batch_repeat_interleave(2)
        read(cache, random_tokens(4, 70, seed=27), (1, 68, 1))
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        read(cache, random_tokens(3, 2, seed=28), (1, 1))
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.reorder_cache(torch.tensor([1, 1]))
        read(cache, random_tokens(2, 70, seed=29), (69, 1))

    compare(family, act)


@pytest.mark.support("copy.deepcopy")
@mostly_llama
def test_prefix_is_reused_by_deep_copies(family: Family) -> None:
    def act(cache: DynamicCache, read: Read) -> None:
        read(cache, random_tokens(1, 140, seed=30), (140,))
        first, second = copy.deepcopy(cache), copy.deepcopy(cache)
        read(first, random_tokens(1, 80, seed=31), (79, 1))
        if family.name != "gemma3":  # a sliding window forgets what crop would need
            first.crop(-50)
        read(second, random_tokens(1, 80, seed=32), (1, 79))
        read(first, random_tokens(1, 3, seed=33), (1, 2))
        read(cache, random_tokens(1, 66, seed=34), (65, 1))
        assert cache.get_seq_length() == 206

    compare(family, act)


@pytest.mark.support("copy.deepcopy")
def test_deep_copy_shares_the_constants() -> None:
    cache = quantized(MODELS[0])
    feed(model_of(MODELS[0], "spectral"), cache, random_tokens(1, 140, seed=30), (140,))
    other = copy.deepcopy(cache)
    assert other.calibration is cache.calibration
    for mine, its in zip(cache.spectral_layers, other.spectral_layers, strict=True):
        assert mine.codecs["key"] is its.codecs["key"]
        assert mine.stores["key"].buffers["codes"].data_ptr() != its.stores["key"].buffers["codes"].data_ptr()


@pytest.mark.support("multi-turn chat on one cache")
@mostly_llama
def test_chat_continues_on_one_cache(family: Family) -> None:
    conversations = []
    for attention, cache in (("sdpa", reference(family)), ("spectral", quantized(family)), ("sdpa", quantized(family))):
        tokens = random_tokens(1, PROMPT_LENGTH, seed=35)
        for turn in range(3):
            tokens = generate(family, cache, attention, tokens)
            tokens = torch.cat((tokens, random_tokens(1, 20, seed=36 + turn)), dim=1)
        conversations.append(tokens)
    assert torch.equal(conversations[0], conversations[1])
    assert torch.equal(conversations[0], conversations[2])


@mostly_llama
def test_beams_start_from_a_repeated_prefix(family: Family) -> None:
    prefix, rest = random_tokens(1, PROMPT_LENGTH, seed=37), random_tokens(1, 5, seed=38)
    found = []
    for attention, cache in (("sdpa", reference(family)), ("spectral", quantized(family)), ("sdpa", quantized(family))):
        feed(model_of(family, attention), cache, prefix, (PROMPT_LENGTH,))
        cache.batch_repeat_interleave(3)
        found.append(generate(family, cache, attention, torch.cat((prefix, rest), dim=1), num_beams=3))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.support("from a filled DynamicCache")
@by_model
def test_dynamic_cache_is_compressed_afterwards(family: Family) -> None:
    model, tokens = model_of(family, "sdpa"), random_tokens(2, 150, seed=39)
    filled, expected = dense(family), quantized(family)
    feed(model, filled, tokens, (150,))
    feed(model, expected, tokens, (150,))
    before = [(keys.clone(), values.clone()) for keys, values, _ in filled]
    found = SpectralCache.from_dynamic_cache(filled, calibration_of(family), model.config, residual_length=0)
    for (keys, values, _), (old_keys, old_values) in zip(filled, before, strict=True):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)
    more, steps = random_tokens(2, 4, seed=40), (1, 3)
    assert torch.equal(feed(model, found, more, steps), feed(model, expected, more, steps))
    assert filled.get_seq_length() == 150


@pytest.mark.support("from a filled DynamicCache")
@pytest.mark.parametrize("with_config", [False, True])
def test_layers_with_a_window_that_a_dynamic_cache_was_made_of(with_config: bool) -> None:
    """They know of no more tokens than they keep: the cache was said to be interrupted."""
    model, tokens = model_of(GEMMA3, "sdpa"), random_tokens(1, 150, seed=39)
    expected = quantized(GEMMA3, residual_length=500)
    feed(model, expected, tokens[:, :140], (140,))
    edited = DynamicCache(expected, config=model.config if with_config else None)
    found = SpectralCache.from_dynamic_cache(edited, calibration_of(GEMMA3), model.config, residual_length=500)
    more, own = tokens[:, 140:], dense(GEMMA3)
    assert torch.equal(feed(model, found, more, (1, 9)), feed(model, copy.deepcopy(expected), more, (1, 9)))
    model(tokens[:, :140], past_key_values=own)  # deepcopy refuses such tensors
    found = SpectralCache.from_dynamic_cache(own, calibration_of(GEMMA3), model.config, residual_length=500)
    assert torch.equal(feed(model, found, more, (1, 9)), feed(model, expected, more, (1, 9)))


@pytest.mark.support("from a filled DynamicCache", refused=True)
def test_caches_that_hold_keys_otherwise_are_refused() -> None:
    """Of a static cache all of its room was packed, zeros too."""
    model, tokens = model_of(LLAMA, "sdpa"), random_tokens(1, 90, seed=39)
    cut = dense(LLAMA)
    filled = StaticCache(config=model.config, max_cache_len=120)
    for cache in (cut, filled):
        with torch.no_grad():
            model(tokens, past_key_values=cache)

    def pack(cache: Any) -> SpectralCache:
        return SpectralCache.from_dynamic_cache(cache, calibration_of(LLAMA), model.config)

    for other in (filled, EncoderDecoderCache(cut, dense(LLAMA))):
        with pytest.raises(TypeError, match=f"needs a DynamicCache, got {type(other).__name__}"):
            pack(other)
    cut.layers[1] = filled.layers[1]
    with pytest.raises(QuantCacheError, match="layer 1, a StaticLayer, holds keys of 120 tokens after 90 tokens"):
        pack(cut)
    cut.layers[1] = copy.deepcopy(cut.layers[0])
    cut.layers[1].crop(-3)
    with pytest.raises(QuantCacheError, match="layers hold different numbers of tokens: 87, 90"):
        pack(cut)


# ---------------------------------------------------------------------- gradients


def gradients(model: PreTrainedModel, cache: DynamicCache | None, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients of the summed log-likelihood of some tokens, in training mode."""
    model.zero_grad()
    model.train()
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.support("gradients through a compressed past")
@pytest.mark.parametrize("trained", ["all", "queries"])
@pytest.mark.parametrize("attention", ["spectral", "sdpa", "eager"])
@by_model
def test_gradients_through_a_compressed_past(family: Family, attention: str, trained: str) -> None:
    if trained == "queries" and family.name == "gpt2":
        pytest.skip("queries, keys and values are one projection")
    tokens, more = random_tokens(2, 150, seed=41), random_tokens(2, 20, seed=42)
    stock = "sdpa" if attention == "spectral" else attention
    found = []
    for model, cache in (
        (family.make(attention=stock), reference(family)),
        (family.make(attention=attention), quantized(family)),
    ):
        last = f"layers.{model.config.num_hidden_layers - 1}.self_attn.q_proj"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained == "all" or last in name)
        feed(model, cache, tokens, (150,))
        found.append(gradients(model, cache, more))
        assert cache.get_seq_length() == 170
    assert not any(tail.requires_grad for layer in cache.spectral_layers for tail in layer.tails.values())
    expected, ours = found
    assert ours.keys() == expected.keys()
    assert ours
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= ROUNDING * gradient.norm(), name


@pytest.mark.support("gradient checkpointing")
@by_model
def test_gradient_checkpointing_leaves_the_cache_alone(family: Family) -> None:
    tokens = random_tokens(2, 40, seed=43)
    expected = gradients(family.make(attention="spectral"), None, tokens)
    model, cache = family.make(attention="spectral"), quantized(family)
    # Two names of one thing: the first is the newer transformers'.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for name, gradient in gradients(model, cache, tokens).items():
        assert (gradient - expected[name]).norm() <= ROUNDING * expected[name].norm(), name
