"""What else can be asked of generate() and of a model's forward pass, against dense caches."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from tests.builders import scalar_calibration, storages, tensors_in
from tests.families import FAMILIES, VOCABULARY, Family, random_tokens, shared_model
from tests.helpers import error, feed, few
from tests.integration.test_geometry import LAYOUTS
from tests.reference import reference_cache

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [family for family in FAMILIES if family.name in ("llama", "gpt2", "gemma3")]
LLAMA, GEMMA3 = MODELS[0], next(family for family in MODELS if family.name == "gemma3")
by_model = pytest.mark.parametrize("family", MODELS, ids=str)

PROMPT = random_tokens(2, 122, seed=11)
NEW_TOKENS = 18

ROUNDING = 2e-5
"""See test_generate.py: two float32 runs of a whole model that read the same codes."""


@functools.cache
def calibration_of(family: Family) -> Calibration:
    """A stand-in of the family's geometry."""
    return scalar_calibration(shared_model(family).config, 3.0)


def quantized(family: Family, **options: Any) -> SpectralCache:
    """An empty cache that keeps no recent tokens."""
    return SpectralCache(calibration_of(family), shared_model(family).config, **{"residual_length": 0, **options})


def reference(family: Family) -> DynamicCache:
    """The fake-quantized dense cache that :func:`quantized` must be equal to."""
    return reference_cache(quantized(family), shared_model(family).config)


def generate(model: PreTrainedModel, cache: DynamicCache | None, **options: Any) -> Any:
    """Greedy tokens and what else was asked for."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options}
    if "inputs_embeds" not in options:
        options["inputs"] = PROMPT
    mask = torch.ones(PROMPT.shape, dtype=torch.int64)
    return model.generate(attention_mask=mask, past_key_values=cache, **options)


# ---------------------------------------------------------------------- arguments of generate()


@pytest.mark.support("use_cache=False")
@by_model
def test_without_a_cache_our_attention_is_the_model_s_own(family: Family) -> None:
    found = generate(family.make(attention="spectral"), None, use_cache=False)
    expected = generate(family.make(attention="sdpa"), None, use_cache=False)
    assert found.past_key_values is None
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.support("use_cache=False", refused=True)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_cache_that_is_given_the_whole_text_again(beams: int) -> None:
    """A checkpoint that says use_cache=False, as training leaves it, made every token behind the first a wrong one."""
    model, cache = LLAMA.make(), quantized(LLAMA)
    model.generation_config.use_cache = False
    with pytest.raises(QuantCacheError, match=r"use_cache=False, .*pass use_cache=True"):
        generate(model, cache, num_beams=beams)
    assert cache.get_seq_length() == PROMPT.shape[1]
    expected = generate(LLAMA.make(), quantized(LLAMA), num_beams=beams).sequences
    assert torch.equal(generate(model, quantized(LLAMA), num_beams=beams, use_cache=True).sequences, expected)


@pytest.mark.support("multi-turn chat on one cache", refused=True)
@pytest.mark.parametrize("given", ["ids", "embeddings", "mask"])
def test_a_prompt_that_is_cached_already(given: str) -> None:
    """As when a prompt is read once and answered from several forks: transformers puts it behind itself, and says
    nothing."""
    model, cache = LLAMA.make(), quantized(LLAMA)
    model(PROMPT, past_key_values=cache)
    mask = torch.ones_like(PROMPT)
    mask[:1, : 0 if given != "mask" else 9] = 0  # one that is all ones is left out
    embedded = {"inputs_embeds": model.get_input_embeddings()(PROMPT).detach()} if given == "embeddings" else {}
    held = PROMPT.shape[1]
    # transformers reads 2 p - n tokens of p where n are cached: all, many, two, one, none.
    for length in (held, held - 40, held // 2 + 1, (held + 1) // 2, 9):
        asked = {name: each[:, :length] for name, each in (embedded | {"attention_mask": mask}).items()}
        ids = None if embedded else PROMPT[:, :length]
        with pytest.raises(QuantCacheError, match=rf"holds {held} tokens already, .* a prompt of {length}: .*a new"):
            model.generate(ids, past_key_values=cache.fork(), max_new_tokens=2, **asked)
    fork = cache.fork()
    fork.crop(-1)
    found = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), past_key_values=fork, max_new_tokens=3)
    assert fork.get_seq_length() == PROMPT.shape[1] + 2 == found.shape[1] - 1


@pytest.mark.parametrize("length", [1, 2, 51])
def test_a_prompt_of_which_one_token_would_be_read(length: int) -> None:
    """Of p tokens behind n = 2 p - 1 transformers gives the cache one, as in every step of an answer."""
    model, cache, held = LLAMA.make(), quantized(LLAMA), 2 * length - 1
    model(PROMPT[:1, :held], past_key_values=cache)
    with pytest.raises(QuantCacheError, match=rf"holds {held} tokens already, .* a prompt of {length}:"):
        model.generate(PROMPT[:1, :length], past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == held
    model.generate(PROMPT[:1, : 2 * length], past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 2 * length + 1


@pytest.mark.support("multi-turn chat on one cache", refused=True)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("new", [1, 60, 200])
def test_assisted_decoding_that_begins_the_text_again(new: int, masked: bool) -> None:
    """In a later turn: transformers read all of the text behind itself, and a short answer was a wrong one unsaid."""
    model, cache = LLAMA.make(), quantized(LLAMA)
    first = model.generate(PROMPT[:1], past_key_values=cache, max_new_tokens=4, do_sample=False)
    turn, held = torch.cat((first, random_tokens(1, new, seed=12)), dim=1), cache.get_seq_length()
    asked = {"max_new_tokens": 1, "do_sample": False} | ({"attention_mask": torch.ones_like(turn)} if masked else {})
    expected = model.generate(turn, past_key_values=cache.fork(), **asked)
    refusal, found = "", None
    try:
        found = model.generate(turn, past_key_values=cache.fork(), prompt_lookup_num_tokens=3, **asked)
    except QuantCacheError as error:
        refusal = str(error)
    if found is not None:  # a version of transformers that reads what is new
        assert torch.equal(found, expected)
    else:
        assert f"holds {held} tokens already" in refusal
        assert "prompt_lookup_num_tokens" in refusal


@pytest.mark.support("return_dict_in_generate, output_scores and output_logits")
@by_model
def test_scores_and_logits(family: Family) -> None:
    more = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    cache = quantized(family)
    found = generate(family.make(attention="spectral"), cache, **more)
    expected = generate(family.make(attention="sdpa"), reference(family), **more)
    assert found.past_key_values is cache
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = (torch.stack(getattr(output, name)) for output in (found, expected))
        assert error(ours, theirs) < 100 * ROUNDING * float(theirs.std())
    assert [states[-1].shape for states in found.hidden_states] == [s[-1].shape for s in expected.hidden_states]


@pytest.mark.support("inputs_embeds")
@by_model
def test_prompts_of_embeddings(family: Family) -> None:
    found, expected = (
        generate(model, cache, inputs_embeds=model.get_input_embeddings()(PROMPT).detach())
        for model, cache in (
            (family.make(attention="spectral"), quantized(family)),
            (family.make(attention="sdpa"), reference(family)),
        )
    )
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.support("output_attentions")
@by_model
def test_eager_attention_gives_its_weights(family: Family) -> None:
    model = family.make(attention="eager")
    found = generate(model, quantized(family), output_attentions=True)
    expected = generate(model, reference(family), output_attentions=True)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) < 100 * ROUNDING


@pytest.mark.support("output_attentions")
def test_without_eager_attention_there_are_no_weights() -> None:
    """As with sdpa: transformers gives none, and warns."""
    found, stock = (
        generate(LLAMA.make(attention=attention), cache, output_attentions=True, max_new_tokens=2)
        for attention, cache in (("spectral", quantized(LLAMA)), ("sdpa", DynamicCache(config=LLAMA.make().config)))
    )
    assert [len(weights) for weights in found.attentions] == [len(weights) for weights in stock.attentions]
    assert not any(found.attentions)


@pytest.mark.support("cache_implementation= and a cache together", refused=True)
def test_two_caches_are_refused() -> None:
    static = {"cache_implementation": "static"}
    for options in (static, {"generation_config": GenerationConfig(**static)}):
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(shared_model(LLAMA), quantized(LLAMA), **options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("length", [30, 122])
def test_static_caches(name: str, length: int) -> None:
    """A prompt's keys are followed by those that are yet to come."""
    family = next(each for each in FAMILIES if each.name == name)
    options = {
        "inputs": PROMPT[:, :length],
        "max_new_tokens": 4,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options |= {"do_sample": False, "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones(2, length, dtype=torch.int64)}
    expected = family.make(attention="eager").generate(**options)
    for implementation in ("static", "dynamic"):
        cached = {"cache_implementation": implementation, "disable_compile": True}
        found = family.make(attention="spectral").generate(**options, **cached)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert error(ours, theirs) < 100 * ROUNDING * float(theirs.std()), implementation


@pytest.mark.parametrize("length", [30, 150])
def test_the_last_queries_of_a_prompt_come_alone(length: int) -> None:
    """Behind the last layer that caches anything Gemma 4 computes only what it is asked for."""
    family = next(family for family in LAYOUTS if family.name == "gemma4-sharing")
    tokens = random_tokens(2, length, seed=3)
    with torch.no_grad():
        expected = family.make(attention="eager")(tokens).logits[:, -5:]
        model = family.make(attention="spectral")
        calibration = scalar_calibration(model.config)
        dense = SpectralCache(calibration, model.config, residual_length=0, key_bits="dense", value_bits="dense")
        for cache in (None, DynamicCache(config=model.config), dense):
            found = model(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=5).logits
            assert error(found, expected) < 100 * ROUNDING * float(expected.std())


@pytest.mark.support("iteration over dense keys and values")
@by_model
def test_iteration_gives_dense_tensors(family: Family) -> None:
    model, cache, dense = shared_model(family), quantized(family), reference(family)
    for each in (cache, dense):
        feed(model, each, PROMPT, (122,))
    for layer in dense.layers:
        if not isinstance(layer, DynamicSlidingWindowLayer):
            layer.quantize()
    assert len(cache) == len(dense)
    for ours, theirs in zip(cache, dense, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert type(a) is type(b)
            assert a is None or error(a.double(), b.double()) <= ROUNDING * float(b.double().norm())


# ---------------------------------------------------------------------- models whose caches are special

_HYBRID = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.12,
}

HYBRIDS = [
    Family(
        "lfm2",
        "lfm2",
        _HYBRID | {"layer_types": ["conv", "full_attention", "full_attention"]},
        {},
        (32, 2),
    ),
    Family(
        "qwen3-next",
        "qwen3_next",
        _HYBRID
        | {"head_dim": 32, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
        {},
        (32, 2),
    ),
]


@pytest.mark.support("linear and full attention layers")
@pytest.mark.parametrize("family", few(HYBRIDS, HYBRIDS[:1]), ids=str)
def test_recurrent_layers_stay_as_they_are(family: Family) -> None:
    stock, ours = family.make(attention="sdpa"), family.make(attention="spectral")
    cache = quantized(family)
    assert 0 < len(cache.spectral_layers) < len(cache.layers)
    expected = generate(stock, reference(family)).sequences
    assert torch.equal(generate(ours, cache).sequences, expected)
    assert all(layer.spans for layer in cache.spectral_layers)
    assert torch.equal(generate(stock, quantized(family)).sequences, expected)
    dense = generate(stock, None).sequences
    passing = quantized(family, key_bits="dense", value_bits="dense")
    assert torch.equal(generate(ours, passing).sequences, dense)
    fork = passing.fork()
    tokens = random_tokens(2, 3, seed=3)
    copied = copy.deepcopy(passing)
    assert torch.equal(feed(ours, fork, tokens, (1, 1, 1)), feed(ours, copied, tokens, (1, 1, 1)))


@pytest.mark.support("linear and full attention layers")
@pytest.mark.parametrize("family", HYBRIDS, ids=str)
def test_recurrent_states_are_counted(family: Family) -> None:
    model, cache, tokens = family.make(), quantized(family), random_tokens(2, 150, seed=3)

    def held() -> int:
        states = [{**vars(layer), "codecs": None} for layer in cache.layers]
        return sum(size for _, size in storages(tensors_in(states)))

    assert cache.memory().total == 0
    for count in (130, 1, 19):
        feed(model, cache, tokens[:, :count], (count,))
        assert cache.memory().total == held()
    cache.batch_select_indices([1])
    assert cache.memory().total == held()
    cache = cache.fork()
    assert cache.memory().total == held()


@pytest.mark.support("fork()")
@pytest.mark.parametrize("counts", [(300,), (40, 300), (1, 299), (200, 5, 1, 30)], ids=str)
def test_what_has_left_a_window_is_let_go(counts: tuple[int, ...]) -> None:
    """transformers' window is a view of the whole prompt: a cache, and a fork such as a stored prefix, has its own."""
    family = next(family for family in FAMILIES if family.name == "gemma3")
    model, cache, tokens = shared_model(family), quantized(family), random_tokens(2, sum(counts), seed=4)
    feed(model, cache, tokens, counts)
    dim, heads = family.cached
    window = 2 * heads * (model.config.sliding_window - 1) * dim * 4
    for other in (cache, cache.fork()):
        sliding = [layer for layer in other.layers if compat.is_window(layer)]
        assert [each.untyped_storage().nbytes() for layer in sliding for each in (layer.keys, layer.values)] == [
            window
        ] * (2 * len(sliding))
        assert other.memory().dense == 2 * window * len(sliding)
    more = random_tokens(2, 60, seed=5)
    fork = cache.fork()
    assert torch.equal(feed(model, fork, more, (1, 59)), feed(model, cache, more, (1, 59)))


def test_a_layer_that_records_its_past_keeps_it() -> None:
    family = next(family for family in FAMILIES if family.name == "gemma3")
    cache = quantized(family)
    cache.activate_past_recording()
    feed(shared_model(family), cache, random_tokens(2, 300, seed=4), (300,))
    layer = next(layer for layer in cache.layers if compat.is_window(layer))
    assert layer.keys.shape[2] == 300
    cache.crop(-3)
    assert layer.keys.shape[2] == layer.sliding_window - 1


@pytest.mark.support("longrope, whose model switches caches")
def test_longrope_goes_on_with_a_cache_of_its_own() -> None:
    """Past the switch the model starts a dense cache from nothing: right, and no longer compressed."""
    phi3 = next(family for family in FAMILIES if family.name == "phi3")
    switch, pairs = 130, 24
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 7.9}
    rope |= {"short_factor": [1.0] * pairs, "long_factor": [4.0] * pairs, "original_max_position_embeddings": switch}
    config = phi3.config | {"original_max_position_embeddings": switch, "rope_parameters": rope}
    family = dataclasses.replace(phi3, name="phi3-longrope", config=config)
    stock, ours = family.make(attention="sdpa"), family.make(attention="spectral")
    for new_tokens, kind in ((switch - 122 + 1, SpectralCache), (30, DynamicCache)):
        options = {"max_new_tokens": new_tokens}
        passing = generate(ours, quantized(family, key_bits="dense", value_bits="dense"), **options)
        assert torch.equal(passing.sequences, generate(stock, None, **options).sequences)
        found = generate(ours, quantized(family), **options)
        assert torch.equal(found.sequences, generate(stock, reference(family), **options).sequences)
        assert type(found.past_key_values) is kind


LOOKING_AHEAD = {
    "a decoder of its own kind": ("bert", {}),
    "an encoder with a head": ("electra", {}),
    "a switch of the config": ("llama", {"is_causal": False, "num_key_value_heads": 2}),
    "a decoder that is one": ("bert", {"is_decoder": True}),
}


@pytest.mark.support("prompts that look ahead")
@pytest.mark.parametrize(("model_type", "more"), LOOKING_AHEAD.values(), ids=LOOKING_AHEAD)
@pytest.mark.parametrize("pads", [0, 3])
def test_a_prompt_that_looks_ahead(model_type: str, more: dict[str, Any], pads: int) -> None:
    """A missing mask does not say whether tokens see those after them: some models' attention claims to be causal."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **sizes, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    mask = (torch.arange(PROMPT.shape[1]) >= torch.tensor([[0], [pads]])).long()
    feeding = {"input_ids": PROMPT, "attention_mask": mask, "use_cache": True}
    with torch.no_grad():
        expected = model(past_key_values=DynamicCache(config=config), **feeding).logits
        for attention in ("spectral", "sdpa"):
            model.set_attn_implementation(attention)
            for residual in (0, 256):  # all of a prompt is read exactly, whatever becomes of it
                cache = SpectralCache.self_calibrating(model, residual_length=residual)
                found = model(past_key_values=cache, **feeding).logits
                torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
