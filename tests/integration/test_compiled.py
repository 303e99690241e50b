"""torch.compile: what it compiles of a decode step, how often, and that nothing is computed otherwise."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from quantcache.attention.function import spectral_mask
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common.errors import QuantCacheError
from tests.builders import scalar_calibration
from tests.families import FAMILIES, Family, random_tokens
from tests.helpers import ROUNDING, error, feed
from tests.integration.test_geometry import LAYOUTS
from tests.property.effort import report

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

BY_NAME = {family.name: family for family in (*FAMILIES, *LAYOUTS)}
KINDS = ("full_attention", "full_attention")  # the last has the keys and values of the one before
SHARING = BY_NAME["gemma4-sharing"].config | {"num_hidden_layers": len(KINDS), "layer_types": list(KINDS)}
BY_NAME["gemma4-sharing"] = dataclasses.replace(BY_NAME["gemma4-sharing"], config=SHARING)
PROMPT = random_tokens(2, 122, seed=11)  # the first block is encoded, the next is due in ten tokens

CPP = shutil.which(os.environ.get("CXX", "g++"))


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before or after; pytest would keep and format every event that torch traces."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@functools.cache
def model_of(name: str, attention: str | None = None, layers: int | None = None) -> PreTrainedModel:
    """A model to be compiled, of fewer layers where that will do: tracing takes its time for each."""
    family: Family = BY_NAME[name]
    if layers is not None:
        family = dataclasses.replace(family, config=family.config | {"num_hidden_layers": layers})
    return family.make(attention=attention)


def cache_for(model: PreTrainedModel, coding: str = "scalar", **options: Any) -> SpectralCache:
    """An empty cache that keeps no recent tokens."""
    calibration = scalar_calibration(model.config, 3.0)
    if coding != "scalar":
        calibration = calibration.with_coding(coding)
    return SpectralCache(calibration, model.config, **{"residual_length": 0, **options})


def graphs() -> int:
    """How many graphs have been compiled so far."""
    return counters["stats"]["unique_graphs"]


def breaks() -> int:
    """How many graph breaks have been met so far."""
    return sum(counters["graph_break"].values())


def step_by_step(
    model: Callable[..., Any], cache: DynamicCache, tokens: Tensor, **arguments: Tensor
) -> tuple[Tensor, list[int]]:
    """Logits of tokens that come one by one, and how many graphs there were after each."""
    logits, compiled = [], []
    first = cache.get_seq_length()
    with torch.no_grad():
        for index, step in enumerate(tokens.split(1, dim=1)):
            end = first + index + 1
            more = {
                name: value[:, (0 if "mask" in name else end - 1) : end].clone() for name, value in arguments.items()
            }
            logits.append(model(step.clone(), past_key_values=cache, **more).logits)
            compiled.append(graphs())
    return torch.cat(logits, dim=1), compiled


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
@pytest.mark.skipif(CPP is None, reason="inductor needs a compiler")
def test_inductor() -> None:
    """torch's default; the others look at the tracing alone, which is the same."""
    model = model_of("llama", layers=1)
    cache = cache_for(model)
    feed(model, cache, PROMPT, (122,))
    tokens, plain = random_tokens(2, 14, seed=5), copy.deepcopy(cache)
    found, compiled = step_by_step(torch.compile(model, fullgraph=True), cache, tokens)
    expected, _ = step_by_step(model, plain, tokens)
    assert error(found, expected) <= ROUNDING * float(expected.std())
    assert len(cache.spectral_layers[0].spans) == 2
    assert compiled[0] == compiled[-1] == 1
    report("torch.compile with inductor", {"graphs": compiled[-1], "graph_breaks": breaks()})


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
def test_a_graph_serves_all_tokens_blocks_and_caches() -> None:
    model = model_of("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = random_tokens(2, 90, seed=5)
    for coding, bits in (("scalar", {}), ("trellis", {}), ("scalar", {"residual_length": 16, "sink_length": 0})):
        cache = cache_for(model, coding, **bits)
        feed(model, cache, PROMPT, (122,))
        before, plain = len(cache.spectral_layers[0].spans), copy.deepcopy(cache)
        found, _ = step_by_step(compiled, cache, tokens)
        assert torch.equal(found, step_by_step(model, plain, tokens)[0])
        assert len(cache.spectral_layers[0].spans) >= before + 2
        for each in (cache, plain):
            each.crop(-70)
        found, _ = step_by_step(compiled, cache, tokens[:, :12])
        assert torch.equal(found, step_by_step(model, plain, tokens[:, :12])[0])
        for each in (cache, plain):
            each.reset()
        found, _ = step_by_step(compiled, cache, tokens[:, :4])
        assert torch.equal(found, step_by_step(model, plain, tokens[:, :4])[0])
        assert (graphs(), breaks()) == (1, 0)
    report("torch.compile with eager", {"graphs": graphs(), "graph_breaks": breaks()})


@pytest.mark.parametrize(
    ("count", "options", "needed"),
    [
        (1, {}, False),
        (1, {"allow_is_causal_skip": False}, True),  # a mask function of the model's own
        (1, {"local_size": 4}, True),
        (1, {"attention_mask": torch.tensor([[False] + [True] * 8])}, True),
        (2, {}, True),
    ],
    ids=["one query", "other functions", "window", "padding", "two queries"],
)
def test_one_query_without_padding_needs_no_mask(count: int, options: dict[str, Any], needed: bool) -> None:
    def mask() -> Tensor | None:
        return spectral_mask(
            batch_size=1, q_length=count, kv_length=9, q_offset=9 - count, mask_function=causal_mask_function, **options
        )

    traced = torch.compile(mask, backend="eager", fullgraph=True)()
    assert (traced is not None) == needed
    assert needed or mask() is None  # transformers itself makes none where nothing is traced


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
@pytest.mark.parametrize("name", ["gemma3", "gemma4-sharing"])
def test_families(name: str) -> None:
    model = model_of(name)
    cache = cache_for(model)
    feed(model, cache, PROMPT, (122,))
    plain = copy.deepcopy(cache)
    tokens = random_tokens(2, 13, seed=5)
    found, compiled = step_by_step(torch.compile(model, backend="eager"), cache, tokens)
    expected, _ = step_by_step(model, plain, tokens)
    assert error(found, expected) <= ROUNDING * float(expected.std())  # transformers masks windows otherwise
    assert len(cache.spectral_layers[0].spans) == 2
    assert compiled[2] == compiled[-1], compiled


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
def test_autocast() -> None:
    model = copy.deepcopy(model_of("llama", layers=1))
    cache, tokens = cache_for(model), random_tokens(2, 3, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed(model, cache, PROMPT, (122,))
        plain = copy.deepcopy(cache)
        expected, _ = step_by_step(model, plain, tokens)
        model.model.layers[0].compile(backend="eager")  # it alone: every frame around a graph break is traced anew
        assert torch.equal(step_by_step(model, cache, tokens)[0], expected)
    assert graphs()


@pytest.mark.slow
@pytest.mark.support("torch.compile with any attention")
def test_stock_attention_reads_dense_tensors() -> None:
    model = model_of("llama", "sdpa", layers=1)
    cache = cache_for(model)
    feed(model, cache, PROMPT, (122,))
    plain = copy.deepcopy(cache)
    tokens = random_tokens(2, 13, seed=5)
    found, compiled = step_by_step(torch.compile(model, backend="eager"), cache, tokens)
    assert torch.equal(found, step_by_step(model, plain, tokens)[0])
    assert compiled[2] == compiled[-1], compiled


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
def test_padded_rows_are_coded_from_where_they_begin() -> None:
    model = model_of("llama", layers=1)
    tokens = random_tokens(2, 140, seed=5)
    mask = torch.ones(2, 140, dtype=torch.long)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    plain, cache = cache_for(model), cache_for(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    steps = []
    for run, each in ((model, plain), (compiled, cache)):
        given = {"attention_mask": mask[:, :58], "position_ids": positions[:, :58]}
        with torch.no_grad():
            run(tokens[:, :58], past_key_values=each, **given)
        steps.append(step_by_step(run, each, tokens[:, 58:], attention_mask=mask, position_ids=positions))
    (expected, _), (found, counts) = steps
    assert torch.equal(found, expected)
    for ours, theirs in zip(cache.spectral_layers, plain.spectral_layers, strict=True):
        assert len(ours.spans) == 2
        assert ours.state.blocks.left_padding is not None
        assert ours.state.blocks.left_padding.tolist() == theirs.state.blocks.left_padding.tolist() == [9, 0]
    assert counts[3] == counts[-1], counts
    assert breaks() == 0


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
def test_tokens_under_a_custom_mask_are_coded_at_their_positions() -> None:
    """Documents side by side: each begins at position 0, which no 2D mask says."""
    model, tokens = model_of("llama", layers=1), random_tokens(1, 210, seed=5)
    positions = torch.arange(210)[None] % 70
    mask = torch.ones(3, 70, 70, dtype=torch.bool).tril()
    side_by_side = torch.block_diag(*mask).bool()[None, None]
    found = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = cache_for(model)
        with torch.no_grad():
            run(tokens, attention_mask=side_by_side, position_ids=positions, past_key_values=cache)
        layer = cache.spectral_layers[0]
        layer.flush()
        found.append(layer.fields("key"))
    assert found[0]["shifts"].unique().tolist() == [0, 70, 140]
    assert all(torch.equal(found[1][name], each) for name, each in found[0].items())


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
@pytest.mark.parametrize("trained", ["", "q_proj"])
def test_gradients_pass(trained: str) -> None:
    model = copy.deepcopy(model_of("llama", layers=1))
    model.requires_grad_(not trained)
    weight = next(each for name, each in model.named_parameters() if (trained or "k_proj") in name).requires_grad_()
    cache = cache_for(model)
    feed(model, cache, PROMPT, (122,))
    found = []
    for compiled in (False, True):
        if compiled:
            model.model.layers[0].compile(backend="eager")
        logits = model(random_tokens(2, 3, seed=5), past_key_values=cache.fork()).logits
        found.append(torch.autograd.grad(logits.pow(2).sum(), weight)[0])
        assert bool(graphs()) == compiled
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
def test_what_nobody_reads_is_cached() -> None:
    """Compilers drop what has no effect that they know of."""
    model = model_of("llama", layers=1)
    cache = cache_for(model)
    feed(model, cache, PROMPT, (122,))
    plain, step = copy.deepcopy(cache), random_tokens(2, 1, seed=5)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def read(tokens: Tensor) -> int:
        model(tokens, past_key_values=cache)
        return cache.get_seq_length()

    with torch.inference_mode():
        assert [read(step) for _ in range(12)] == list(range(123, 135))
    step_by_step(model, plain, step.repeat(1, 12))
    layer, other = cache.spectral_layers[0], plain.spectral_layers[0]
    assert len(layer.spans) == 2
    assert torch.equal(layer.fields("key")["codes"], other.fields("key")["codes"])
    assert torch.equal(layer.tails["value"], other.tails["value"])


@pytest.mark.slow
@pytest.mark.support("torch.compile of the decode step")
def test_errors_are_the_same_and_leave_the_cache_as_it_was() -> None:
    model = model_of("llama", layers=1)
    cache = cache_for(model)
    feed(model, cache, PROMPT, (122,))
    plain, compiled = copy.deepcopy(cache), torch.compile(model, backend="eager")
    tokens = random_tokens(2, 3, seed=5)
    messages = []
    for run, each in ((model, plain), (compiled, cache)):
        with pytest.raises(QuantCacheError) as raised:
            run(tokens[:1, :1], past_key_values=each)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert cache.get_seq_length() == 122
    found, _ = step_by_step(compiled, cache, tokens)
    assert torch.equal(found, step_by_step(model, plain, tokens)[0])


@pytest.mark.slow
@pytest.mark.support("torch.compile in generate()")
def test_generate_with_a_compiled_forward() -> None:
    model = copy.deepcopy(model_of("llama", layers=1))
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": None}
    # Each is encoded a block on its way.
    prompts = random_tokens(1, 126, seed=3), random_tokens(1, 60, seed=4), random_tokens(1, 65, seed=5)
    expected = [model.generate(each, past_key_values=cache_for(model), **options) for each in prompts]
    model.forward = torch.compile(model.forward, backend="eager")
    counts = []
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(prompt, past_key_values=cache_for(model), **options), wanted)
        counts.append(graphs())
    # One graph for a first prompt, one for prompts of any length, one for the tokens of all of them.
    assert counts == [2, 3, 3]
    assert breaks() == 0


@pytest.mark.support("torch.compile in generate()")
def test_generate_leaves_caches_that_grow_uncompiled() -> None:
    model = model_of("llama", layers=1)
    prompt, options = random_tokens(1, 90, seed=3), {"max_new_tokens": 4, "do_sample": False}
    settings = CompileConfig(backend="eager")
    settings._compile_all_devices = True
    found = model.generate(
        prompt, past_key_values=cache_for(model), cache_implementation=None, compile_config=settings, **options
    )
    assert torch.equal(found, model.generate(prompt, past_key_values=cache_for(model), **options))
    assert graphs() == 0
