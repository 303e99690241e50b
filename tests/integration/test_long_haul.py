"""Caches that live long, and many that live shortly: memory by formula, time in line, nothing left behind.

The short form is part of every run; ``make soak`` runs the long one.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from quantcache.accounting.predicting import predict
from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.growth import capacity, num_blocks
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES, Coding
from tests.builders import hide_present_objects, live_storages, llama_config
from tests.families import Family, random_tokens
from tests.helpers import feed, few
from tests.property.effort import SOAK, report

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 100_000 if SOAK else 1_000
CYCLES = 10_000 if SOAK else 200
LAST_STEPS = 40

TINY = Family(
    "tiny",
    "llama",
    {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1 << 17,
    },
    {},
    (32, 1),
)


@pytest.mark.slow
@pytest.mark.support("memory is the formula's throughout")
@pytest.mark.support("time of a step grows linearly")
@pytest.mark.support("logits are those of a cache built in one go")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("coding", get_args(Coding))
def test_one_token_at_a_time(coding: Coding) -> None:
    model = TINY.make()
    calibration = Calibration.synthetic(model.config, 3.0).with_coding(coding)
    cache, whole = (SpectralCache(calibration, model.config) for _ in range(2))
    tokens = random_tokens(1, TOKENS, seed=1)
    started, seconds, worst = time.monotonic(), [], 0.0
    given: list[tuple[Tensor, Tensor]] = []
    update = cache.update

    def recorded(keys: Tensor, values: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        given.append((keys, values))
        return update(keys, values, *args, **more)

    cache.update = recorded
    with torch.no_grad():
        for count, step in enumerate(tokens[:, : TOKENS - LAST_STEPS].split(1, dim=1), 1):
            begin = time.perf_counter()
            model(step, past_key_values=cache)
            seconds.append(time.perf_counter() - begin)
            if count % (TOKENS // 30) == 0 and count > 200:
                held = cache.memory().total
                formula = predict(calibration, count, element_bytes=4, prefill=1).total
                worst = max(worst, abs(held / formula - 1))
    # The same keys and values at once: computed together they would be rounded otherwise.
    whole.update(*(torch.cat(side, dim=2) for side in zip(*given, strict=True)), 0)
    whole.spectral_layers[0].flush()
    ours, theirs = (feed(model, each, tokens[:, -LAST_STEPS:], [1] * LAST_STEPS) for each in (cache, whole))
    layer, other = cache.spectral_layers[0], whole.spectral_layers[0]
    assert layer.spans == other.spans
    assert len(layer.spans) == num_blocks(TOKENS, 4, 64) > 10
    first = first_difference(layer, other)
    share = float((ours == theirs).float().mean())
    # Medians of the first and the last quarter: on a line through nothing seven times as long, noise allowed for.
    quarter = len(seconds) // 4
    early, late = (statistics.median(part) for part in (seconds[:quarter], seconds[-quarter:]))
    figures = {
        "tokens": TOKENS,
        "worst_memory_error": worst,
        "room": layer.stores["key"].capacity / capacity(len(layer.spans), 0),
        "step_seconds_early": early,
        "step_seconds_late": late,
        "equal_logits": share,
        "equal_codes": first is None,
        "seconds": time.monotonic() - started,
    }
    report(f"one token at a time, {coding} codes", figures)
    assert worst <= 0.02, figures
    assert first is None, first
    assert share == 1.0, figures
    assert late <= 14 * early, figures


def first_difference(layer: object, other: object) -> str | None:
    """The first field in which two layers' blocks differ."""
    count = len(layer.spans)
    for side in SIDES:
        ours, theirs = (each.stores[side].slice(0, count) for each in (layer, other))
        for name, buffer in ours.items():
            if not torch.equal(buffer, theirs[name]):
                block = int((buffer != theirs[name]).flatten(1).any(1).nonzero()[0])
                return f"{name} of the {side}s in block {block}"
    return None


@pytest.mark.support("creating and dropping caches leaks nothing")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("coding", few(get_args(Coding), ["scalar"]))
def test_caches_come_and_go(coding: Coding) -> None:
    config = llama_config(32, layers=2)
    calibration = Calibration.synthetic(config, 3.0).with_coding(coding)
    tokens = [torch.randn(1, 2, 4 + 64 + 2 * BLOCK, 32) for _ in SIDES]

    def cycle(index: int) -> Tensor:
        """Fill a cache, fork, copy, crop and drop it."""
        cache = SpectralCache(calibration, config)
        for layer in range(2):
            keys, _ = cache.update(*tokens, layer)
            assert keys.shape[2] == tokens[0].shape[2]
        fork = cache.fork()
        fork.crop(-(index % 150))
        for layer in range(2):
            fork.update(*(tensor[:, :, :70] for tensor in tokens), layer)
        return fork.spectral_layers[0].tails["key"].sum()

    for index in range(20):
        cycle(index)
    hide_present_objects()
    before, objects = live_storages(), len(gc.get_objects())
    begin = resident()
    for index in range(CYCLES):
        cycle(index)
    gc.collect()
    grown = resident() - begin
    figures = {"cycles": CYCLES, "resident_bytes": grown, "objects": len(gc.get_objects()) - objects}
    report(f"caches come and go, {coding} codes", figures)
    assert live_storages() == before
    assert abs(figures["objects"]) < 100, figures
    assert grown < 32 << 20, figures


def resident() -> int:
    """Bytes of the process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
