"""Sizes: what a cache says it holds, what it does hold, and what the formula foretells."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from quantcache.accounting.measuring import measure
from quantcache.accounting.memory import CacheMemory, bits_per_encoded_element
from quantcache.accounting.predicting import predict
from quantcache.artifact.calibration import Calibration
from quantcache.attention import traced
from quantcache.backends import BackendName
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.growth import capacity, num_blocks
from tests.builders import (
    held_bytes,
    hide_present_objects,
    layer_storages,
    live_storages,
    llama_config,
    scalar_calibration,
    storages,
)
from tests.helpers import few, left_padding

MAX_SLACK = 0.12
MIN_COMPRESSION = 4.3
"""At 3.0 bits and 8,192 tokens, everything but the shared constants counted."""


@functools.cache
def synthetic(head_dim: int = 64, layers: int = 2, kv_heads: int = 2, bits: float = 3.0) -> Calibration:
    """A calibration of the right geometry, shared by all tests."""
    return scalar_calibration(llama_config(head_dim, layers, kv_heads), bits)


def append(cache: SpectralCache, count: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    """Append random tokens to every layer, as one forward pass does."""
    for index, constants in cache.calibration.layers.items():
        layer = cache.layers[index]
        layer.update(
            torch.randn(batch, constants.key.num_heads, count, constants.key.dim).to(dtype),
            torch.randn(batch, constants.value.num_heads, count, constants.value.dim).to(dtype),
        )
        layer.flush()


def fill(cache: SpectralCache, tokens: int, prefill: int | None, batch: int = 1) -> None:
    """Append a prefill, then single tokens."""
    first = tokens if prefill is None else prefill
    append(cache, first, batch)
    for _ in range(tokens - first):
        append(cache, 1, batch)


def assert_counts_what_is_held(cache: SpectralCache) -> CacheMemory:
    """The record's total is the sum of the storages of all that the layers hold."""
    memory = cache.memory()
    assert memory.total == sum(held_bytes(layer) for layer in cache.layers)
    assert memory.total == sum(
        (memory.codes, memory.gains, memory.sinks, memory.residual, memory.dense, memory.bookkeeping, memory.slack)
    )
    assert memory.tokens == cache.get_seq_length()
    return memory


# ------------------------------------------------------------------ measured


def test_kinds_by_hand() -> None:
    """500 tokens of 2 layers of 2 heads of 64 in bfloat16: 6 blocks, 4 sinks, 112 recent tokens."""
    cache = SpectralCache(synthetic())
    append(cache, 500)
    memory = assert_counts_what_is_held(cache)
    per_token = 2 * 2 * 2 * 64  # layers, sides, heads, dimensions
    widths = sum(int(layer.side(s).widths.sum()) for layer in synthetic().layers.values() for s in ("key", "value"))
    assert memory.tokens == 500
    assert memory.codes == 6 * 64 * widths // 8
    assert memory.gains == 6 * 64 * 2 * 2 * 2
    assert memory.sinks == 4 * per_token * 2
    assert memory.residual == (500 - 4 - 6 * 64) * per_token * 2
    assert memory.bookkeeping == 6 * 12 * 2
    assert memory.dense == memory.slack == 0
    assert memory.encoded_elements == 6 * 64 * per_token
    assert memory.elements == 500 * per_token
    assert memory.bits_per_element == pytest.approx(3.0 + 8 / 64, abs=8 / (per_token / 8))
    assert memory.bits_per_element_total == 8 * memory.total / memory.elements
    assert memory.bfloat16_bytes == 2 * memory.elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"key_bits": "dense"}, {"value_bits": "dense", "bits": 5.5}], ids=str)
def test_total_is_the_storage_held(dtype: torch.dtype, options: dict[str, float | str]) -> None:
    cache = SpectralCache(synthetic(), **options)
    assert cache.memory() == CacheMemory(tokens=0)
    for count in (300, 1, 1, 63, 1, 40):
        append(cache, count, batch=2, dtype=dtype)
        assert_counts_what_is_held(cache)
    for _ in range(130):
        append(cache, 1, batch=2, dtype=dtype)
    grown = assert_counts_what_is_held(cache)
    assert bool(grown.dense) == ("dense" in options.values())
    for remove in (3, 70, 100, 200, 160):
        cache.crop(-remove)
        cropped = assert_counts_what_is_held(cache)
        assert cropped.total <= grown.total
        append(cache, 5, batch=2, dtype=dtype)
        assert_counts_what_is_held(cache)
    cache.batch_repeat_interleave(2)
    assert_counts_what_is_held(cache)
    cache.reorder_cache(torch.tensor([3, 0]))
    assert_counts_what_is_held(cache)
    cache.reset()
    assert cache.memory() == CacheMemory(tokens=0)


def test_row_starts_are_counted() -> None:
    cache = SpectralCache(synthetic())
    constants = synthetic().layers[0].key
    keys = torch.randn(2, constants.num_heads, 200, constants.dim)
    cache.layers[0].update(keys, keys, arrivals=left_padding((0, 30), 200, 200))
    cache.layers[0].flush()
    assert cache.layers[0].state.blocks.left_padding.tolist() == [0, 30]
    memory = assert_counts_what_is_held(cache)
    assert memory.bookkeeping == 2 * 12 + 2 * 8 + 2 * 2 * 4 * (200 - 132)  # places, starts, what is known of the tail
    assert memory.sinks == 2 * 2 * 2 * 4 * keys[0, :, 0].nbytes  # sinks and what lies before the first block


def test_constants_are_shared_and_listed_apart() -> None:
    calibration = scalar_calibration(llama_config(64))
    caches = [SpectralCache(calibration) for _ in range(2)]
    for cache in caches:
        append(cache, 200)
    first, second = (cache.memory() for cache in caches)
    held = [t for codec in calibration.codecs.values() for t in codec.tensors() if t.numel()]
    assert first == second
    assert first.constants == sum(size for _, size in storages(held))
    assert storages(caches[0].layers[1].codecs["key"].tensors()) == storages(
        caches[1].layers[1].codecs["key"].tensors()
    )


def test_memory_of_other_caches() -> None:
    config = llama_config(64, 2)
    cache = DynamicCache(config=config)
    cache.update(torch.randn(1, 2, 10, 64), torch.randn(1, 2, 10, 64), 0)
    assert measure(cache).dense == measure(cache).total == 2 * 2 * 10 * 64 * 4
    assert measure(cache).elements == 2 * 2 * 10 * 64


def test_record_as_json_and_as_table() -> None:
    cache = SpectralCache(synthetic())
    append(cache, 300)
    memory = cache.memory()
    record = json.loads(json.dumps(memory.to_dict()))
    assert record["total"] == memory.total
    assert record["bits_per_element"] == memory.bits_per_element
    assert record["bfloat16_bytes"] == memory.bfloat16_bytes
    assert f"{memory.total:,}" in str(memory)
    assert f"bfloat16_bytes{memory.bfloat16_bytes:>22,}" in str(memory)
    assert f"{memory.bits_per_element_total:.3f}" in str(memory)
    assert CacheMemory(tokens=0).bits_per_element == CacheMemory(tokens=0).bits_per_element_total == 0.0


# ------------------------------------------------------------------ foretold


@pytest.mark.parametrize(
    ("tokens", "prefill", "batch"),
    [
        *[(tokens, None, 1) for tokens in (1, 4, 67, 68, 69, 131, 132, 133, 196, 500, 2049)],
        *[(tokens, 1, 2) for tokens in (2, 132, 133, 700)],
        *[(tokens, 131, 1) for tokens in (132, 195, 196, 1500)],
        *[(tokens, 1500, 2) for tokens in (1500, 1501, 1700, 2700)],
    ],
)
def test_prediction_is_exact(tokens: int, prefill: int | None, batch: int) -> None:
    calibration = synthetic(32, layers=1, kv_heads=1)
    cache = SpectralCache(calibration)
    fill(cache, tokens, prefill, batch)
    assert_predicted(cache, predict(calibration, tokens, batch=batch, prefill=prefill))


def assert_predicted(cache: SpectralCache, predicted: CacheMemory) -> None:
    """A prediction equals the measurement in every field but the constants, which it leaves out."""
    found = assert_counts_what_is_held(cache).to_dict()
    expected = predicted.to_dict()
    assert expected.pop("constants") == 0
    for name in ("constants", "gains_above", "gains_below"):
        found.pop(name)
    assert found == expected


@pytest.mark.parametrize("sizes", [(0, 0), (0, 64), (1, 13), (4, 0), (200, 300)], ids=str)
@pytest.mark.parametrize("options", [{}, {"value_bits": "dense"}, {"bits": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prediction_of_other_settings(
    sizes: tuple[int, int], options: dict[str, float | str], dtype: torch.dtype
) -> None:
    sinks, residual = sizes
    calibration = synthetic(32).with_bits(**{"bits": 3.0, **options})
    cache = SpectralCache(calibration, sink_length=sinks, residual_length=residual)
    append(cache, 600, batch=2, dtype=dtype)
    for _ in range(70):
        append(cache, 1, batch=2, dtype=dtype)
    predicted = predict(
        calibration,
        670,
        batch=2,
        sink_length=sinks,
        residual_length=residual,
        element_bytes=dtype.itemsize,
        prefill=600,
    )
    assert_predicted(cache, predicted)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("prefill", few([None, 1, 4000], [None]), ids=["at-once", "token-by-token", "half-and-half"])
def test_eight_thousand_tokens(head_dim: int, prefill: int | None) -> None:
    calibration = synthetic(head_dim, layers=1)
    cache = SpectralCache(calibration)
    fill(cache, 8192, prefill)
    memory = cache.memory()
    assert_predicted(cache, predict(calibration, 8192, prefill=prefill))
    assert memory.bfloat16_bytes == 2 * 2 * 2 * head_dim * 8192
    assert memory.bfloat16_bytes / memory.total >= MIN_COMPRESSION
    assert memory.slack <= MAX_SLACK * memory.total
    assert memory.bits_per_element <= 3.0 + 8 / head_dim


def test_eight_thousand_tokens_in_two_rows() -> None:
    calibration = synthetic(64, layers=1)
    cache = SpectralCache(calibration)
    fill(cache, 8192, None, batch=2)
    assert_predicted(cache, predict(calibration, 8192, batch=2))
    assert cache.memory().bfloat16_bytes / cache.memory().total >= MIN_COMPRESSION


@pytest.mark.parametrize("head_dim", [64, 128])
def test_compression_holds_at_every_longer_length(head_dim: int) -> None:
    """By the formula, which the tests above show to be exact, whatever the store's slack happens to be."""
    for tokens in range(8192, 8192 + 64 * 40, 61):
        for prefill in (1, 1000, tokens):
            memory = predict(synthetic(head_dim), tokens, prefill=prefill)
            assert memory.bfloat16_bytes / memory.total >= MIN_COMPRESSION


@pytest.mark.parametrize("residual", [0, 64])
def test_slack_at_every_length(residual: int) -> None:
    for tokens in range(1, 3000):
        memory = predict(synthetic(64), tokens, residual_length=residual, prefill=1)
        assert memory.slack <= MAX_SLACK * memory.total


def test_slack_after_crops() -> None:
    """With no residual and few blocks left there is little else for slack to hide in."""
    cache = SpectralCache(synthetic(), residual_length=0)
    for keep in (900, 700, 530, 400, 333, 270, 205, 140, 75, 70):
        append(cache, keep + 64 - cache.get_seq_length() if keep > cache.get_seq_length() else 1)
        cache.crop(keep - cache.get_seq_length())
        memory = assert_counts_what_is_held(cache)
        assert memory.tokens == keep
        assert memory.slack <= MAX_SLACK * memory.total


def test_blocks_and_capacity() -> None:
    assert [num_blocks(t, 4, 64) for t in (0, 131, 132, 195, 196)] == [0, 0, 1, 1, 2]
    assert num_blocks(64, 0, 0) == 1
    assert [capacity(n, 0) for n in (0, 1, 2, 31, 32, 33, 34, 35)] == [0, 1, 2, 31, 32, 34, 34, 36]
    assert capacity(100, 100) == 100
    assert capacity(101, 100) == 106


def test_bits_per_encoded_element() -> None:
    layers = synthetic(64).layers
    widths = torch.cat([layer.side(s).widths.flatten() for layer in layers.values() for s in ("key", "value")])
    assert bits_per_encoded_element(layers) == pytest.approx(float(widths.double().mean()) + 8 / 64, rel=1e-12)
    halves = synthetic(64).with_bits(3.0, value_bits="dense")
    keys = torch.cat([layer.key.widths.flatten() for layer in halves.layers.values()])
    assert bits_per_encoded_element(halves.layers) == pytest.approx(float(keys.double().mean()) + 8 / 64, rel=1e-12)
    assert bits_per_encoded_element(synthetic(64).with_bits(3.0, key_bits="dense", value_bits="dense").layers) == 0.0


# ------------------------------------------------------------------ alive


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("steps", [(1000,), (1000, *([1] * 130)), (150, 700, 3)], ids=["prefill", "decode", "chunks"])
def test_nothing_else_is_kept_alive(steps: Sequence[int], backend: BackendName) -> None:
    """New storages in the process are exactly what memory() reports, and the model's K/V are freed once encoded."""
    calibration = scalar_calibration(llama_config(64))
    hide_present_objects()
    cache = SpectralCache(calibration, backend=backend)
    inputs: list[weakref.ref[Tensor]] = []
    for count in steps:
        for index in calibration.layers:
            keys, values = (torch.randn(1, 2, count, 64, dtype=torch.bfloat16) for _ in range(2))
            inputs += [weakref.ref(keys), weakref.ref(values)]
            lazy = cache.layers[index].update(keys, values)
            del keys, values
            cache.layers[index].flush()
            del lazy
    assert not [ref for ref in inputs if ref() is not None]
    assert_alive(cache)
    cache.crop(-200)
    assert_alive(cache)


def assert_alive(cache: SpectralCache) -> None:
    """Every new storage is counted, as the cache's or as a constant; nothing is counted that does not exist."""
    memory = assert_counts_what_is_held(cache)
    alive = live_storages() - storages([traced._PAGE])  # there before every cache
    calibration = [
        t
        for layer in cache.calibration.layers.values()
        for side in (layer.key, layer.value)
        for t in vars(side).values()
    ]
    codecs = [t for codec in cache.calibration.codecs.values() for t in codec.tensors()]
    reused = storages(codecs) & storages(calibration)
    assert sum(size for _, size in alive) == memory.total + memory.constants - sum(size for _, size in reused)


def test_dense_copies_of_a_stock_consumer_die_with_it() -> None:
    cache = SpectralCache(synthetic())
    append(cache, 500)
    layer = cache.layers[0]
    hide_present_objects()
    keys, values = layer.update(torch.randn(1, 2, 1, 64).bfloat16(), torch.randn(1, 2, 1, 64).bfloat16())
    for lazy in (keys, values):
        assert (lazy + 0.0).shape == (1, 2, 501, 64)
    assert sum(size for _, size in live_storages() - layer_storages(layer)) == 2 * (2 * 501 * 64 * 2)
    del keys, values, lazy
    assert not live_storages() - layer_storages(layer)
    assert_counts_what_is_held(cache)
