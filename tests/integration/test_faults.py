"""What goes wrong at run time: one clear error, or what dense attention would do, and a cache that can go on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.attention.probe import recorded_queries
from quantcache.backends import Backend
from quantcache.backends.padding import Arrivals
from quantcache.backends.store import BlockStore
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.coding.schema import SIDES
from quantcache.common.errors import QuantCacheError
from tests.builders import held_bytes, scalar_calibration
from tests.families import FAMILIES, MAX_POSITIONS, Family, random_tokens, shared_model
from tests.helpers import error, feed, few, left_padding
from tests.reference import reference_cache

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [family for family in FAMILIES if family.name in ("llama", "gpt2", "gemma3")]
LLAMA, GPT2 = MODELS[0], next(family for family in MODELS if family.name == "gpt2")
by_model = pytest.mark.parametrize("family", MODELS, ids=str)

CLOSE = 2e-3
"""See test_generate.py: runs that encode on their way may round to another code."""


@functools.cache
def calibration_of(family: Family) -> Calibration:
    """A stand-in of the family's geometry."""
    return scalar_calibration(shared_model(family).config, 3.0)


def empty(family: Family = LLAMA, **options: Any) -> SpectralCache:
    """An empty cache that keeps no recent tokens."""
    return SpectralCache(calibration_of(family), shared_model(family).config, **{"residual_length": 0, **options})


def filled(tokens: int = 150, rows: int = 1, family: Family = LLAMA) -> SpectralCache:
    """A cache of random tokens."""
    cache = empty(family)
    feed(shared_model(family), cache, random_tokens(rows, tokens, seed=1), (tokens,))
    return cache


def go_on(cache: DynamicCache, count: int = 80, seed: int = 2, rows: int = 1, family: Family = LLAMA) -> Tensor:
    """Logits of further tokens."""
    return feed(shared_model(family), cache, random_tokens(rows, count, seed=seed), (count,))


def kv(tokens: int, rows: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Keys and values for a layer of the first model."""
    generator = torch.Generator().manual_seed(seed)
    return {side: torch.randn(rows, 2, tokens, 64, generator=generator).to(dtype) for side in SIDES}


def give(layer: SpectralLayer, new: dict[str, Tensor], arrivals: Arrivals | None = None) -> None:
    """Append to a layer as a model whose attention is ours does."""
    layer.update(new["key"], new["value"], arrivals=arrivals)
    layer.flush()


# ---------------------------------------------------------------------- what cannot be encoded


@pytest.mark.support("NaN and infinity in keys or values", refused=True)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", SIDES)
def test_nothing_infinite_is_encoded(side: str, bad: float) -> None:
    layer = empty().spectral_layers[1]
    tokens = kv(100, rows=3)
    tokens[side][2, 1, 40, 7] = bad
    layer.update(**{f"{name}_states": tensor for name, tensor in tokens.items()})
    message = (
        rf"layer 1: the model gave {side}s that are not finite, first for token 40 of row 2 \(head 1, torch.float32\)"
    )
    for _ in range(2):
        with pytest.raises(QuantCacheError, match=message):
            layer.flush()
    assert not layer.spans
    assert torch.equal(layer.tails[side].nan_to_num(9.0), tokens[side].nan_to_num(9.0))
    layer.reset()
    give(layer, kv(100))
    assert layer.get_seq_length() == 100


@pytest.mark.support("NaN and infinity in keys or values")
def test_until_then_they_do_what_they_do_to_dense_attention() -> None:
    model, tokens = LLAMA.make(), random_tokens(2, 60, seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(tokens[1, 30])] = float("nan")
    tokens[0] = torch.where(tokens[0] == tokens[1, 30], 5, tokens[0])
    ours, dense = (feed(model, c, tokens, (59, 1)) for c in (empty(), DynamicCache(config=model.config)))
    assert torch.equal(ours.isnan(), dense.isnan())
    assert dense[1, 31:].isnan().all()
    assert dense[0].isfinite().all(), "one row's NaN is no other row's"


@pytest.mark.support("NaN and infinity in keys or values")
def test_padding_and_dense_sides_may_hold_anything() -> None:
    layer, clean = (empty().spectral_layers[0] for _ in range(2))
    tokens = kv(100, rows=2)
    padded = left_padding((30, 0), 100, 100)
    give(clean, tokens, padded)
    dirty = {side: tensor.clone() for side, tensor in tokens.items()}
    for tensor in dirty.values():
        tensor[0, :, :30] = float("nan")
    give(layer, dirty, padded)
    for side in SIDES:
        ours, theirs = (each.snapshot().dense(side) for each in (layer, clean))
        assert torch.equal(ours[0, :, 30:], theirs[0, :, 30:])
        assert torch.equal(ours[1], theirs[1])
    layer = empty(key_bits="dense", value_bits="dense").spectral_layers[0]
    give(layer, dirty)
    assert torch.equal(layer.snapshot().dense("key").isnan(), dirty["key"].isnan())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_spoils_no_path_through_a_trellis(bad: float) -> None:
    """Tokens that share a block with it are coded as if it were zeros."""
    layers = []
    for padding in (bad, 0.0):
        trellis = SpectralCache(
            calibration_of(LLAMA).with_coding("trellis"), shared_model(LLAMA).config, residual_length=0
        )
        layers.append(trellis.spectral_layers[0])
        tokens = kv(100, rows=2)
        for tensor in tokens.values():
            tensor[0, :, :30] = padding
        give(layers[-1], tokens, left_padding((30, 0), 100, 100))
        assert layers[-1].spans
    for side in SIDES:
        ours, theirs = (each.snapshot().dense(side) for each in layers)
        assert torch.equal(ours[0, :, 30:], theirs[0, :, 30:])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.support("float16 overflow")
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
def test_float16_near_its_limit_stays_finite(attention: str, bits: float) -> None:
    """Keys and values of up to 65,504 are decoded to numbers that float16 can hold."""
    plain = calibration_of(LLAMA)
    sides = [
        {side: dataclasses.replace(layer.side(side), spectrum=layer.side(side).spectrum * 1e9) for side in SIDES}
        for layer in plain.layers.values()
    ]
    layers = {i: dataclasses.replace(layer, **sides[i]) for i, layer in plain.layers.items()}
    layer = SpectralCache(Calibration(layers, plain.metadata), residual_length=0, bits=bits).spectral_layers[0]
    tokens = {side: (tensor.sign() * 65_504).half() for side, tensor in kv(100, dtype=torch.float16).items()}
    give(layer, tokens)
    assert layer.spans
    for side in SIDES:
        dense = layer.snapshot().dense(side)
        assert dense.dtype == torch.float16
        assert dense.isfinite().all()
    keys, values = layer.update(*(tensor[:, :, :1] * 1e-4 for tensor in tokens.values()))
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    query = torch.full((1, 2, 1, 64), 1e-3).half()
    if attention == "spectral":
        from quantcache.attention.function import spectral_attention_forward as attend
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend
    assert attend(module, query, keys, values, None, scaling=1e-4)[0].isfinite().all()


@pytest.mark.support("float16 overflow", refused=True)
def test_float16_overflow_is_refused() -> None:
    layer = empty().spectral_layers[0]
    tokens = {side: (tensor * 1e5).half() for side, tensor in kv(100).items()}
    with pytest.raises(QuantCacheError, match=r"keys that are not finite.*torch.float16"):
        give(layer, tokens)


# ---------------------------------------------------------------------- odd lengths


@pytest.mark.support("zero-length input")
@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
def test_updates_without_tokens_change_nothing(attention: str) -> None:
    layer, expected = (empty().spectral_layers[0] for _ in range(2))
    tokens, nothing = kv(100), kv(0)
    give(layer, nothing)
    assert layer.get_seq_length() == 0
    for first, last in ((0, 10), (10, 90), (90, 100)):
        new = {side: tensor[:, :, first:last] for side, tensor in tokens.items()}
        give(layer, new)
        give(layer, nothing)
        give(expected, new)
    assert layer.spans == expected.spans
    for side in SIDES:
        assert torch.equal(layer.snapshot().dense(side), expected.snapshot().dense(side))


@pytest.mark.support("zero-length input", refused=True)
def test_empty_prompts_are_refused_by_generate() -> None:
    model, nothing = shared_model(LLAMA), torch.zeros(1, 0, dtype=torch.int64)
    for cache in (empty(), DynamicCache(config=model.config)):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model.generate(nothing, past_key_values=cache, max_new_tokens=3)


@pytest.mark.support("1-token prompts, and prompts shorter than the sinks")
@pytest.mark.parametrize(
    ("family", "length"),
    [
        pytest.param(family, length, id=f"{family}-{length}", marks=[pytest.mark.slow] if length in (2, 3, 4) else [])
        for family, lengths in zip(MODELS, ((1, 2, 3, 4, 5), (1, 4), (3, 5)), strict=True)
        for length in lengths
    ],
)
def test_short_prompts(family: Family, length: int) -> None:
    model, prompt = shared_model(family), random_tokens(2, length, seed=4)
    options = {"max_new_tokens": 75, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cache = empty(family, key_bits="dense", value_bits="dense")
    found = model.generate(prompt, past_key_values=cache, **options)
    expected = family.make(attention="sdpa").generate(prompt, **options)
    assert torch.equal(found, expected)
    assert all(layer.spans for layer in cache.spectral_layers)


@pytest.mark.support("contexts beyond max_position_embeddings")
def test_contexts_beyond_the_declared_length() -> None:
    model, tokens = shared_model(LLAMA), random_tokens(1, MAX_POSITIONS + 200, seed=5)
    cache = empty(residual_length=64)
    reference = reference_cache(empty(residual_length=64), model.config)
    steps = (MAX_POSITIONS - 10, 20, 1, 189)
    found, expected = (feed(model, c, tokens, steps) for c in (cache, reference))
    assert cache.get_seq_length() == MAX_POSITIONS + 200
    assert error(found, expected) < CLOSE * float(expected.std())


@pytest.mark.support("contexts beyond max_position_embeddings", refused=True)
def test_learned_positions_end_where_they_do_for_a_dense_cache() -> None:
    model, tokens = shared_model(GPT2), random_tokens(1, MAX_POSITIONS + 1, seed=5)
    for cache in (empty(GPT2), DynamicCache(config=model.config)):
        feed(model, cache, tokens[:, :-1], (MAX_POSITIONS,))
        with pytest.raises(IndexError):
            feed(model, cache, tokens[:, -1:], (1,))


# ---------------------------------------------------------------------- what does not continue the cache


@pytest.mark.support("another batch size mid-way", refused=True)
def test_another_batch_size() -> None:
    cache = filled(rows=2)
    expected = go_on(copy.deepcopy(cache), rows=2)
    with pytest.raises(QuantCacheError, match="layer 0: the cache holds keys of batch size 2, the new ones have 3"):
        go_on(cache, rows=3)
    assert torch.equal(go_on(cache, rows=2), expected)
    cache = filled()
    with pytest.raises(QuantCacheError, match="batch size 1, the new ones have 3: repeat or select"):
        shared_model(LLAMA).generate(random_tokens(1, 160), past_key_values=cache, max_new_tokens=2, num_beams=3)


@pytest.mark.support("another dtype mid-way", refused=True)
def test_another_dtype() -> None:
    cache = filled()
    expected = go_on(copy.deepcopy(cache))
    with pytest.raises(QuantCacheError, match=r"keys of dtype torch.float32, the new ones have torch.bfloat16"):
        feed(LLAMA.make(dtype=torch.bfloat16), cache, random_tokens(1, 5), (5,))
    assert torch.equal(go_on(cache), expected)
    cache.reset()
    feed(LLAMA.make(dtype=torch.bfloat16), cache, random_tokens(1, 5), (5,))
    assert cache.spectral_layers[0].tails["key"].dtype == torch.bfloat16


@pytest.mark.support("a model that moves to another device")
@pytest.mark.gpu
def test_the_cache_follows_its_model() -> None:
    cache, model = filled(), LLAMA.make().cuda()
    expected = go_on(copy.deepcopy(cache))
    tokens = random_tokens(1, 80, seed=2).cuda()
    found = feed(model, cache, tokens, (80,)).cpu()
    assert {layer.tails["key"].device.type for layer in cache.spectral_layers} == {"cuda"}
    assert {layer.codecs["key"].mean.device.type for layer in cache.spectral_layers} == {"cuda"}
    assert error(found, expected) < CLOSE * float(expected.std())


@pytest.mark.support("a model that moves to another device", refused=True)
def test_a_cache_fitted_to_its_prompt_cannot_move() -> None:
    cache = SpectralCache.self_calibrating(shared_model(LLAMA), residual_length=0)
    feed(shared_model(LLAMA), cache, random_tokens(1, 150, seed=1), (150,))
    with pytest.raises(QuantCacheError, match="a self-calibrating cache cannot follow its model to meta"):
        cache.spectral_layers[0].update(*(torch.zeros(1, 2, 1, 64, device="meta") for _ in SIDES))
    assert cache.get_seq_length() == 150


# ---------------------------------------------------------------------- failures on the way


def state_of(cache: SpectralCache) -> list[Any]:
    """Everything a cache holds, copied."""
    return [
        (list(layer.spans), layer.get_seq_length(), [layer.snapshot().dense(side).clone() for side in SIDES])
        for layer in cache.spectral_layers
    ]


def assert_same_state(found: list[Any], expected: list[Any]) -> None:
    """Fail unless two caches held the same."""
    for (spans, length, sides), (their_spans, their_length, their_sides) in zip(found, expected, strict=True):
        assert (spans, length) == (their_spans, their_length)
        assert all(torch.equal(a, b) for a, b in zip(sides, their_sides, strict=True))


FAILURES: dict[str, tuple[object, str]] = {
    "tails": (Tensor, "narrow"),
    "encoding": (Backend, "encode"),
    "growth": (BlockStore, "_copied"),
    "append": (BlockStore, "appended"),
}


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize(
    "raised",
    [
        pytest.param(torch.OutOfMemoryError, marks=pytest.mark.support("out of memory while a cache grows")),
        pytest.param(KeyboardInterrupt, marks=pytest.mark.support("KeyboardInterrupt inside a forward pass")),
    ],
)
def test_a_layer_changes_at_once_or_not_at_all(
    raised: type[BaseException], where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, twin = (empty().spectral_layers[0] for _ in range(2))
    for each in (layer, twin):
        give(each, kv(196))  # three full blocks, no room
    bytes_before, before = held_bytes(layer), [layer.snapshot().dense(side).clone() for side in SIDES]
    target, name = FAILURES[where]
    original, calls = getattr(target, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise raised("simulated")
        return original(*args, **kwargs)

    done = 0
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing)
        try:
            layer.update(*kv(64, seed=1).values())
            done = 64
            layer.flush()
        except raised:
            assert layer.get_seq_length() == 196 + done
            assert [layer.snapshot().dense(side)[:, :, :196].equal(x) for side, x in zip(SIDES, before, strict=True)]
            if not done:
                assert held_bytes(layer) == bytes_before
    assert len(calls) >= min(call, 2), "nothing has failed"
    if not done:
        layer.update(*kv(64, seed=1).values())
    layer.flush()
    give(twin, kv(64, seed=1))
    assert layer.spans == twin.spans
    for side in SIDES:
        assert torch.equal(layer.snapshot().dense(side), twin.snapshot().dense(side))
        for field, buffer in twin.stores[side].slice(0, 4).items():
            assert torch.equal(layer.stores[side].slice(0, 4)[field], buffer)


class Interrupting:
    """Raises in the middle of a forward pass, once."""

    def __init__(self, model: PreTrainedModel, layer: int, raised: type[BaseException]):
        self.handle = model.model.layers[layer].mlp.register_forward_hook(self)
        self.raised = raised

    def __call__(self, *_: object) -> None:
        self.handle.remove()
        raise self.raised("simulated")


@pytest.mark.parametrize(
    "raised",
    [
        pytest.param(torch.OutOfMemoryError, marks=pytest.mark.support("out of memory while a cache grows")),
        pytest.param(KeyboardInterrupt, marks=pytest.mark.support("KeyboardInterrupt inside a forward pass")),
    ],
)
@pytest.mark.parametrize("tokens", [1, 30, 70])
def test_after_an_interrupted_forward_pass(raised: type[BaseException], tokens: int) -> None:
    model, cache = LLAMA.make(), filled(132)
    expected = go_on(copy.deepcopy(cache), tokens)
    before = state_of(cache)
    Interrupting(model, 0, raised)
    with pytest.raises(raised):
        feed(model, cache, random_tokens(1, tokens, seed=2), (tokens,))
    for _ in range(2):
        with pytest.raises(
            QuantCacheError, match=r"some layers hold 132 tokens and others \d+, because a forward pass"
        ):
            go_on(cache, tokens)
    assert cache.rollback() == 132
    if tokens < 64:  # else the first layer has encoded its new tokens, and a cut leaves codes
        assert_same_state(state_of(cache), before)
        assert torch.equal(go_on(cache, tokens), expected)
    cache.reset()
    assert torch.equal(go_on(cache), go_on(empty()))


@pytest.mark.support("KeyboardInterrupt inside a forward pass")
def test_after_an_interrupted_prompt() -> None:
    model, cache = LLAMA.make(), empty()
    Interrupting(model, 0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, random_tokens(1, 30, seed=2), (30,))
    with pytest.raises(QuantCacheError, match=r"held 0 tokens and holds 30, because a forward pass was interrupted"):
        go_on(cache)
    with pytest.raises(QuantCacheError, match=r"call rollback\(\) or reset\(\)"):
        go_on(cache)
    assert cache.rollback() == 0
    assert torch.equal(go_on(cache), go_on(empty()))


@pytest.mark.support("KeyboardInterrupt inside a forward pass", refused=True)
def test_sliding_windows_cannot_be_rolled_back() -> None:
    family = next(family for family in MODELS if family.name == "gemma3")
    model, cache = family.make(), filled(family=family)
    Interrupting(model, 0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, random_tokens(1, 3, seed=2), (3,))
    with pytest.raises(QuantCacheError, match="some layers hold 150 tokens and others 153"):
        go_on(cache, 3, family=family)
    with pytest.raises(QuantCacheError, match=r"holds 153 tokens and cannot be rolled back to 150: call reset\(\)"):
        cache.rollback()


@pytest.mark.parametrize(("kind", "name"), [(PreTrainedModel, "eval"), (torch.nn.Parameter, "requires_grad_")])
def test_an_interrupted_calibration_leaves_the_model_as_it_was(
    kind: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, real, calls = LLAMA.make().train(), getattr(kind, name), itertools.count(1)

    def interrupted(*args: Any) -> Any:
        result = real(*args)
        if next(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(kind, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, random_tokens(1, 64), progress=False)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------------- threads


@pytest.mark.support("two threads, two caches, one model")
@pytest.mark.parametrize("family", few(MODELS, MODELS[:1]), ids=str)
def test_two_threads_with_a_cache_each(family: Family) -> None:
    model = family.make()
    calibration = scalar_calibration(model.config, 2.0)  # its codecs are still to be made, by whoever is first
    prompts = [random_tokens(1, 120, seed=seed) for seed in (1, 2)]

    def work(prompt: Tensor) -> Tensor:
        cache = SpectralCache(calibration, model.config, residual_length=0)
        return model.generate(prompt, past_key_values=cache, max_new_tokens=30, do_sample=False)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, prompts))
    assert all(torch.equal(tokens, work(prompt)) for tokens, prompt in zip(found, prompts, strict=True))


def test_two_threads_that_look_at_a_model_each() -> None:
    """transformers' table of attention functions is one for all: a calibration had the queries of another model."""
    models, tokens = (LLAMA.make(), LLAMA.make()), random_tokens(1, 9, seed=1)
    seen: tuple[list[int], list[int]] = [], []
    with torch.no_grad(), recorded_queries(models[0], lambda index, query: seen[0].append(query.shape[2])):

        def look() -> weakref.ref[Any]:
            def note(index: int, query: Tensor) -> None:
                seen[1].append(query.shape[2])

            with torch.no_grad(), recorded_queries(models[1], note):
                models[1](input_ids=tokens)
            models[0](input_ids=tokens)  # somebody else's request
            return weakref.ref(note)

        with ThreadPoolExecutor(1) as pool:
            noted = pool.submit(look).result(20)
        models[0](input_ids=tokens[:, :5])
    assert seen[0] == [5] * models[0].config.num_hidden_layers
    gc.collect()
    assert noted() is None, "what it has gathered would stay in memory"


@pytest.mark.support("two threads, one cache", refused=True)
@pytest.mark.parametrize("place", ["between layers", "inside an update"])
def test_two_threads_with_one_cache(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The intruder is refused; so is the other from then on, whose tokens may no longer be what it thinks."""
    model, cache = LLAMA.make(), filled(40)
    met, go = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        met.set()
        assert go.wait(20)

    if place == "between layers":
        model.model.layers[0].mlp.register_forward_hook(pause)
    else:
        update = SpectralLayer.update

        def slow(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("first"):
                pause()
            return update(*args, **kwargs)

        monkeypatch.setattr(SpectralLayer, "update", slow)
    with ThreadPoolExecutor(1, thread_name_prefix="first") as pool:
        first = pool.submit(feed, model, cache, random_tokens(1, 1, seed=2), (1,))
        assert met.wait(20)
        with pytest.raises(QuantCacheError, match=r"another thread is in one|two threads use it at once"):
            go_on(cache, 1)
        go.set()
        with pytest.raises(QuantCacheError, match=r"call rollback\(\) or reset\(\)"):
            first.result(20)
    assert cache.rollback() == 40
    assert torch.equal(go_on(cache), go_on(filled(40)))


@pytest.mark.support("two threads, one cache")
def test_a_cache_may_be_handed_from_thread_to_thread() -> None:
    cache, expected = filled(), filled()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(go_on, cache).result()
    assert torch.equal(found, go_on(expected))
    assert torch.equal(go_on(cache, seed=3), go_on(expected, seed=3))
