"""``estimate_memory``: the bytes of real caches, from the config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

import quantcache
from benchmarks import tables
from quantcache.accounting.measuring import measure
from quantcache.accounting.memory import PLACE_BYTES, CacheMemory
from quantcache.artifact import cache_layout, tracing
from quantcache.artifact.calibration import Calibration
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.growth import GROWTH, TAIL_GROWTH, capacity, largest_capacity, num_blocks, tail_capacity
from quantcache.coding.packing import BLOCK
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.evaluation.methods import parse_methods
from quantcache.planning import formats, geometry, memory, weights
from quantcache.planning.memory import cache_memory, estimate_memory, largest_cache
from tests.builders import llama_config, scalar_calibration
from tests.families import FAMILIES, OTHERS, Family, marks_of_rest, shared_model
from tests.helpers import few

pytestmark = pytest.mark.usefixtures("traced_once")

ROOT = Path(__file__).resolve().parent.parent.parent
EVERY = FAMILIES + OTHERS
BY_NAME = {family.name: family for family in EVERY}

YOUNGER = ("kvarn", "int4-token-head", "q4_0", "q8_0")
"""Formats that a committed record may lack: they came after it."""


def shapes(family: Family) -> list[tuple[int, int]]:
    """(heads, dimension) of keys and values as the table of families states them."""
    dim, heads = family.cached
    rope = family.config.get("qk_rope_head_dim")
    return [(heads, dim), (heads, rope or dim)]


def fill(cache: Any, count: int, batch: int, sides: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """One update of every layer, and what attention does once it has read the new tokens."""
    for index in range(len(cache.layers)):
        new = [torch.zeros(batch, heads, count, dim, dtype=dtype) for heads, dim in sides]
        cache.update(*(tensor.normal_() for tensor in new), index)
        if isinstance(cache.layers[index], SpectralLayer):
            cache.layers[index].flush()


def held(cache: Any) -> CacheMemory:
    """What a cache holds, shared constants apart."""
    return replace(measure(cache), constants=0)


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name, marks=marks_of_rest(f)) for f in EVERY])
def test_dense_cache_of_every_family(family: Family) -> None:
    """The model itself fills the cache: whatever reaches it is counted."""
    model = shared_model(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.full((3, 50), 7), past_key_values=cache, use_cache=True)
    assert estimate_memory(model.config, "bf16", 50, 3, dtype=torch.float32) == held(cache)
    assert geometry.read_geometry(model.config).basis == "traced"


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt-neox", "gemma2", "gemma3", "deepseek-v3", "falcon-mqa"])
@pytest.mark.parametrize("batch", [1, 3])
def test_spectral_cache_of_families(name: str, batch: int) -> None:
    family = BY_NAME[name]
    config = shared_model(family).config
    calibration = calibration_like(config, family)
    known = geometry.read_geometry(config)
    for tokens in (1, 131, 132, 333):
        cache = SpectralCache(calibration, config)
        fill(cache, tokens, batch, shapes(family), torch.bfloat16)
        found = cache_memory(formats.parse_format("spectral-3"), known, tokens, batch)
        assert found == held(cache)
        assert found == cache_memory(formats.parse_format("spectral-3"), known, tokens, batch, calibration=calibration)


def calibration_like(config: PreTrainedConfig, family: Family) -> Calibration:
    """A stand-in calibration; a Llama's of the same shapes where the config does not declare what is cached."""
    key, value = shapes(family)
    if cache_layout.kv_geometry(config) == (key[0], key[1]) == (value[0], value[1]):
        return scalar_calibration(config)
    base, other = (scalar_calibration(llama_config(dim, len(family.ropes), heads)) for heads, dim in (key, value))
    layers = {index: replace(layer, value=other.layers[index].value) for index, layer in base.layers.items()}
    return Calibration(layers, replace(base.metadata, cache_config={})).with_bits(3)


@pytest.mark.parametrize(("bits", "sinks", "residual"), [(3, 4, 64), (2.5, 0, 0), (3.3, 1, 100), (0, 4, 64), (8, 4, 0)])
def test_every_rate_and_growth(bits: float, sinks: int, residual: int) -> None:
    """A prefill, then one token at a time: stores grow, and the estimate knows by how much."""
    config = llama_config(64)
    calibration = scalar_calibration(config, bits)
    cache = SpectralCache(calibration, config, sink_length=sinks, residual_length=residual)
    lengths: dict[str, int] = {"sink_length": sinks, "residual_length": residual, "prefill": 1200}
    fill(cache, 1200, 2, [(2, 64)] * 2, torch.float32)
    for tokens in range(1201, 1400):
        fill(cache, 1, 2, [(2, 64)] * 2, torch.float32)
        if tokens % 23 == 0 or 1265 < tokens < 1275:
            found = estimate_memory(config, f"spectral-{bits}", tokens, 2, dtype=torch.float32, **lengths)
            assert found == held(cache)


def test_dense_sides_of_a_calibration_are_counted() -> None:
    config = llama_config(64)
    calibration = scalar_calibration(config).with_bits(3, value_bits="dense")
    with pytest.raises(QuantCacheError, match="tokens must be a whole number from 1 up, got 0"):
        estimate_memory(config, "spectral-3", 0, calibration=calibration)
    cache = SpectralCache(calibration, config, bits=2)
    fill(cache, 900, 1, [(2, 64)] * 2, torch.bfloat16)
    assert estimate_memory(config, "spectral-2", 900, calibration=calibration) == held(cache)


SIMULATED = [form.name for form in formats.list_formats() if form.scheme.simulated]


@pytest.mark.parametrize(
    "name", few(SIMULATED, [name for name in SIMULATED if "kvarn" not in name] + ["kvarn-k4v2-64"])
)
def test_simulated_formats_are_counted_as_measured(name: str) -> None:
    config, form = llama_config(64), formats.parse_format(name)
    (method,) = parse_methods([form.name], config, None)
    cache = method.make_cache()
    fill(cache, 700, 2, [(2, 64)] * 2, torch.bfloat16)
    assert estimate_memory(config, form.name, 700, 2) == held(cache)
    found = formats.bits_per_element(form, geometry.read_geometry(config))
    assert found == pytest.approx(measure(cache).bits_per_element, rel=1e-9)


def test_fp8_cache() -> None:
    config = llama_config(64)
    (method,) = parse_methods(["fp8"], config, None)
    cache = method.make_cache()
    fill(cache, 300, 2, [(2, 64)] * 2, torch.bfloat16)
    assert estimate_memory(config, "fp8", 300, 2).total == held(cache).total


def test_sizes_are_those_of_the_committed_measurements() -> None:
    """Caches that were fed in chunks, the first one longer by the sinks."""
    _, record = tables.newest_parts(ROOT, "fidelity")["residual_64"]
    settings, entries = record["settings"], record["metrics"]["residual_64"]
    tokens, chunk = settings["context"], settings["chunk"]
    first = chunk + settings["sinks"]
    known = geometry.read_geometry(geometry.load_config("wiki11m"))
    coded = num_blocks(tokens, settings["sinks"], 64)
    tail_spare = tail_capacity(tokens, first, settings["sinks"], 64) - (tokens - settings["sinks"] - BLOCK * coded)
    # transformers' quantized caches code everything anew with every whole chunk; what the last one brought is left.
    feeding = {"spectral": {"prefill": first}, "quantized": {"prefill": tokens - (tokens - first) % chunk}}
    for form in formats.list_formats():
        if form.name == "fp8" and not compat.HAS_FP8_CACHE:
            continue  # the record has transformers' own
        if form.name not in entries:
            assert form.scheme.stem.startswith(YOUNGER), form.name
            continue
        entry = entries[form.name]
        found = cache_memory(form, known, tokens, element_bytes=4, **feeding.get(form.layout, {}))
        # Of a simulated rival only the places of blocks are counted with the room that they have grown to.
        blocks = num_blocks(tokens, settings["sinks"], 64, form.blocks_at_once)
        grown = PLACE_BYTES * len(known.layers) * (capacity(blocks, 0) - blocks) if form.scheme.simulated else 0
        # Chunks, unlike single tokens, leave tails without any.
        spare = tail_spare * 4 * sum(layer.elements for layer in known.layers) if form.layout == "spectral" else 0
        assert found.total + grown - spare == entry["cache_bytes"], form.name
        bits = formats.bits_per_element(form, known)
        assert form.layout == "dense" or bits == pytest.approx(entry["bits_per_element"], abs=1e-3), form.name


@pytest.mark.parametrize("name", formats.FORMAT_NAMES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_bound_holds_at_every_length(name: str, family: str) -> None:
    """Whatever the first update brought, the cache never exceeds the bound, which never decreases."""
    form, known = formats.parse_format(name), geometry.read_geometry(shared_model(BY_NAME[family]).config)
    if form.layout == "quantized" and family == "gemma2":
        with pytest.raises(UnsupportedModel, match="transformers' quantized cache supports only full-attention models"):
            largest_cache(form, known, 100, 1)
        return
    bounds = [largest_cache(form, known, tokens, 2) for tokens in range(1, 700)]
    assert bounds == sorted(bounds)
    for tokens in range(1, 700, 13):
        for prefill in {1, tokens // 2 or 1, tokens}:
            assert cache_memory(form, known, tokens, 2, prefill=prefill).total <= bounds[tokens - 1]


@pytest.mark.parametrize("growth", [GROWTH, TAIL_GROWTH])
def test_largest_capacity(growth: int) -> None:
    for count in range(200):
        assert max(capacity(count, first, growth) for first in range(count + 1)) <= largest_capacity(count, growth)
    assert largest_capacity(growth + 1, growth) == capacity(growth + 1, growth, growth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spectral-9", 10), "spectral-9: bits must lie between 0 and 8, got 9"),
        (("kivi-9", 10), "kivi-9: bits must be a whole number from 1 to 8, got 9"),
        (("quanto-3", 10), "quanto-3: bits must be one of 2, 4, got 3"),
        (("zip", 10), "unknown format 'zip': known are dense, fp8"),
        (("pca-3", 10), "unknown format 'pca-3': known are dense, fp8"),
        (("spectral-nan", 10), "bits must lie between 0 and 8, got nan"),
        (("dense", -5), "tokens must be a whole number from 1 up, got -5"),
        (("dense", 10, 0), "batch must be a whole number from 1 up, got 0"),
        (("dense", 10.5), "tokens must be a whole number from 1 up, got 10.5"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(QuantCacheError) as caught:
        estimate_memory(llama_config(64), *arguments)
    assert message in str(caught.value)


def test_estimate_memory_is_public() -> None:
    assert quantcache.estimate_memory is estimate_memory
    for prefill in (11, 1.5, True):
        with pytest.raises(QuantCacheError, match=f"prefill must be a whole number between .*, got {prefill}"):
            quantcache.estimate_memory("wiki11m", "dense", 10, prefill=prefill)  # type: ignore[arg-type]
    with pytest.raises(QuantCacheError, match="dtype must be torch's or its name, such as 'bfloat16', got 'float31'"):
        quantcache.estimate_memory("wiki11m", "dense", 10, dtype="float31")
    single = quantcache.estimate_memory("wiki11m", "dense", 10, dtype=torch.float32)
    assert quantcache.estimate_memory("wiki11m", "dense", 10, dtype="float32") == single
    by_name = quantcache.estimate_memory("wiki11m", "dense", 100)
    assert by_name == quantcache.estimate_memory("wiki11m", "bf16", 100)
    assert by_name.total == 100 * 6 * 2 * 2 * 64 * 2


# ------------------------------------------------------------------ weights and constants


@pytest.mark.parametrize("family", EVERY, ids=str)
def test_weights_in_bfloat16(family: Family) -> None:
    model = family.make(dtype=torch.bfloat16)
    real = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    found = weights.list_weights(tracing.empty_model(model.config))
    assert weights.weights_bytes(found, "bf16") == sum(real.values())


def packed(out: int, inputs: int) -> dict[str, list[torch.Tensor]]:
    """The tensors that hold one matrix in each format, as the format's own tools lay them out."""
    empty, half, word, byte = torch.empty, torch.float16, torch.int32, torch.uint8
    groups = inputs // 128
    scales = empty(groups, out, dtype=half)
    blocks = out * inputs // 64
    gptq = [empty(inputs // 8, out, dtype=word), empty(groups, out // 8, dtype=word), scales]
    state = [empty(blocks, dtype=byte), empty(blocks // 256), empty(256), empty(16), empty(1)]
    return {
        "bf16": [empty(out, inputs, dtype=torch.bfloat16)],
        "int8": [empty(out, inputs, dtype=torch.int8), empty(out, dtype=torch.bfloat16)],
        "int4-g128": [empty(out, inputs // 2, dtype=byte), empty(groups, out, 2, dtype=torch.bfloat16)],
        "gptq": [*gptq, empty(inputs, dtype=word)],
        "awq": [empty(inputs, out // 8, dtype=word), empty(groups, out // 8, dtype=word), scales],
        "gguf-q4_0": [empty(out, inputs // 32, 2 + 16, dtype=byte)],
        "gguf-q5_1": [empty(out, inputs // 32, 2 + 2 + 4 + 16, dtype=byte)],
        "nf4": [empty(out * inputs // 2, 1, dtype=byte), *state],
    }


@pytest.mark.parametrize("name", weights.WEIGHTS_FORMATS)
def test_a_matrix_in_every_format(name: str) -> None:
    matrix = weights.Weight("matrix", rows=512, columns=1024, dims=2)
    assert weights.weights_bytes([matrix], name) == sum(tensor.nbytes for tensor in packed(512, 1024)[name])


@pytest.mark.parametrize("name", weights.WEIGHTS_FORMATS)
def test_a_model_in_every_format(name: str) -> None:
    """A Llama by hand: which tensors a format packs, and which stay as they are."""
    hidden, inner, vocabulary, layers = 256, 512, 640, 2
    config = llama_config(64, layers, 2)
    config.update({"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary})
    config.tie_word_embeddings = False
    found = weights.weights_bytes(weights.list_weights(tracing.empty_model(config)), name)
    sizes = [(256, hidden), (128, hidden), (128, hidden), (hidden, 256), (inner, hidden), (inner, hidden)]
    matrices = sum(sum(t.nbytes for t in packed(*size)[name]) for size in [*sizes, (hidden, inner)]) * layers
    vectors = (2 * layers + 1) * hidden
    if name.startswith("gguf"):
        embedding = sum(t.nbytes for t in packed(vocabulary, hidden)[name])
        assert found == matrices + embedding + vocabulary * hidden // 256 * 210 + 4 * vectors
    else:
        assert found == matrices + 2 * (2 * vocabulary * hidden + vectors)


def test_experts_are_packed_and_tied_weights_counted_once() -> None:
    config = shared_model(BY_NAME["mixtral"]).config
    experts = [w for w in weights.list_weights(tracing.empty_model(config)) if w.experts > 1]
    assert {(w.kind, w.experts, w.rows, w.columns) for w in experts} == {
        ("matrix", 4, 4 * 2 * 128, 96),
        ("matrix", 4, 4 * 96, 128),
    }
    tied = tracing.empty_model(geometry.load_config("wiki11m"))
    assert [w.kind for w in weights.list_weights(tied) if w.kind in ("embedding", "output")] == ["output"]


def test_constants_of_ours(demo_model: PreTrainedModel) -> None:
    """Shared constants are as many bytes as the formula says, to 5 %; kernels' tables come on top."""
    for head_dim in (64, 128):
        config = llama_config(head_dim)
        cache = SpectralCache(scalar_calibration(config), config, backend="torch")
        fill(cache, 200, 1, [(2, head_dim)] * 2, torch.float32)
        found = memory.constants_bytes(formats.parse_format("spectral-3"), geometry.read_geometry(config))
        assert found == pytest.approx(measure(cache).constants, rel=0.05)
