"""Tails grow in place: what is written, what stays as it was, and how much is allocated for it."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantcache
from quantcache.attention.function import spectral_attention_forward
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.cache.tails import TailBuffer
from quantcache.coding.growth import TAIL_GROWTH, largest_capacity, tail_capacity
from quantcache.coding.schema import SIDES
from tests.builders import llama_config, scalar_calibration
from tests.helpers import few

HEADS, DIM, ROWS = 2, 32, 2
CONFIG = llama_config(DIM, layers=1, kv_heads=HEADS)


def empty(**options: Any) -> SpectralCache:
    """A cache of one layer."""
    return SpectralCache(scalar_calibration(CONFIG, 3.0), CONFIG, **options)


def tokens(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Keys and values of some tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, HEADS, count, DIM, generator=generator).to(dtype) for _ in SIDES]


def append(layer: SpectralLayer, count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Append tokens as a model does whose attention is ours."""
    found = layer.update(*tokens(count, seed, dtype))
    layer.flush()
    return found


def filled(count: int = 150, steps: int = 3, **options: Any) -> SpectralLayer:
    """A layer after a prompt and some steps."""
    layer = empty(**options).spectral_layers[0]
    append(layer, count, 0)
    for step in range(steps):
        append(layer, 1, 1000 + step)
    return layer


def addresses(layer: SpectralLayer) -> list[int]:
    """Where the tails' memory is."""
    return [layer.tails[side].untyped_storage().data_ptr() for side in SIDES]


def read(layer: SpectralLayer) -> list[Tensor]:
    """Everything that is cached, copied."""
    return [layer.snapshot().dense(side).clone() for side in SIDES]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Fail unless all tensors are equal."""
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float32]), ids=str)
@pytest.mark.parametrize("residual", [0, 7, 64])
@pytest.mark.parametrize("prompt", [1, 40, 150])
def test_few_steps_allocate_and_the_rule_says_how_much(prompt: int, residual: int, dtype: torch.dtype) -> None:
    layer = empty(residual_length=residual).spectral_layers[0]
    append(layer, prompt, 0, dtype)
    before, moved, given = addresses(layer), 0, tokens(prompt, 0, dtype)
    for count in range(prompt + 1, prompt + 400):
        append(layer, 1, count, dtype)
        given = [torch.cat(pair, dim=2) for pair in zip(given, tokens(1, count, dtype), strict=True)]
        moved += addresses(layer) != before
        before = addresses(layer)
        tail = layer.tails["key"]
        room = tail.untyped_storage().nbytes() // (ROWS * HEADS * DIM * dtype.itemsize)
        assert room == tail_capacity(count, prompt, 4, residual)
        assert tail.shape[2] <= room <= largest_capacity(tail.shape[2], TAIL_GROWTH)
        assert_same([layer.tails[side] for side in SIDES], [x[:, :, layer.state.blocks.end :] for x in given])
    assert moved <= {0: 200, 7: 160, 64: 70}[residual]


def test_views_stay_what_they_were() -> None:
    layer, seen = filled(), []
    for step in range(140):
        lazy = layer.update(*tokens(1 + step % 3, step))
        parts = [lazy[0].view_.side(side).tail for side in SIDES]
        seen.append((parts, [part.clone() for part in parts]))
        layer.flush()
    for found, expected in seen:
        assert_same(found, expected)


OTHERS: dict[str, Callable[[SpectralLayer], SpectralLayer]] = {
    "fork": SpectralLayer.fork,
    "fork of a fork": lambda layer: layer.fork().fork(),
    "deepcopy": lambda layer: layer.__deepcopy__({}),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("other", OTHERS)
def test_both_append(other: str, first: int) -> None:
    """Whoever comes first goes on where both were, and neither sees what is the other's."""
    layer = filled()
    pair = [layer, OTHERS[other](layer)]
    assert layer.state.buffer is not None
    for step in range(90):
        for place in (first, 1 - first):
            append(pair[place], 1, 7 * step + place)
    for place in (0, 1):
        alone = filled()
        for step in range(90):
            append(alone, 1, 7 * step + place)
        assert_same(read(pair[place]), read(alone))


def test_a_fork_of_the_cache_that_is_dropped_leaves_its_space_taken() -> None:
    cache = empty()
    cache.update(*tokens(150, 0), 0)
    cache.layers[0].flush()
    cache.update(*tokens(1, 1), 0)
    fork, before = cache.fork(), read(cache.spectral_layers[0])
    fork.update(*tokens(1, 2), 0)
    assert addresses(fork.spectral_layers[0]) == addresses(cache.spectral_layers[0])
    del fork
    cache.update(*tokens(1, 3), 0)
    assert_same(read(cache.spectral_layers[0]), [torch.cat(p, 2) for p in zip(before, tokens(1, 3), strict=True)])


def test_of_many_threads_one_goes_on() -> None:
    for attempt in range(20):
        layer = filled(64, 2)
        forks = [layer.fork() for _ in range(4)]
        barrier = threading.Barrier(4)

        def work(place: int, forks: Any = forks, barrier: Any = barrier) -> None:
            barrier.wait()
            append(forks[place], 1, place)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place, fork in enumerate(forks):
            assert_same([fork.tails[s][:, :, -1:] for s in SIDES], tokens(1, place)), attempt
            assert_same([fork.tails[s][:, :, :-1] for s in SIDES], [layer.tails[s] for s in SIDES])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fresh", [False, True], ids=["same buffer", "new buffer"])
@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_interrupted_step_is_in_as_a_whole_or_leaves_no_trace(
    raised: type[BaseException], fresh: bool, count: int
) -> None:
    """Whatever line of ours it is interrupted at, of those that write and of those that say so."""
    original, states = filled(70), []

    def fork() -> SpectralLayer:
        layer = original.__deepcopy__({})
        append(layer, 1, 4)  # its buffer has room for more
        return layer

    twins = [fork(), fork()]
    append(twins[True], count, 5)
    before = [read(twin) for twin in twins]
    for twin in twins:
        append(twin, 1, 6)
    after = [read(twin) for twin in twins]
    for line in itertools.count():
        layer = fork()
        if fresh:
            layer.state = layer.state._replace(buffer=None)  # a new one copies both tails first
        if not interrupted(lambda layer=layer: layer.update(*tokens(count, 5)), raised, line):
            break
        states.append(layer.get_seq_length() == before[True][0].shape[2])
        assert_same(read(layer), before[states[-1]])
        append(layer, 1, 6)
        assert_same(read(layer), after[states[-1]])
    assert states.count(False) > 30  # else nothing was interrupted before the step was in
    assert states.count(True) > 5


def interrupted(step: Callable[[], object], raised: type[BaseException], line: int) -> bool:
    """Run a step that is interrupted before its ``line``-th line of ours; False where it has fewer."""
    seen, place = itertools.count(), str(Path(quantcache.__file__).parent)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(place):
            return None
        if event == "line" and next(seen) == line:
            raise raised("simulated")
        return trace

    sys.settrace(trace)
    with contextlib.suppress(raised):
        step()
    sys.settrace(None)
    return next(seen) > line


STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "as a model gives it": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "with gaps": lambda x: torch.stack((x, -x), dim=-1)[..., 0],
    "part of more": lambda x: torch.cat((x + 1, x, x - 1), dim=2)[:, :, 1 : 1 + x.shape[2]],
    "lazily negated": lambda x: torch.complex(x, -x).conj().imag,
    "one for all heads": lambda x: x[:, :1].expand(x.shape),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("stored", STORED)
def test_how_a_token_is_stored_makes_no_difference(stored: str, count: int) -> None:
    layer = filled(70)
    before, new = read(layer), [STORED[stored](x) for x in tokens(count, 5)]
    layer.update(*new)
    assert_same(read(layer), [torch.cat((old, x.clone()), dim=2) for old, x in zip(before, new, strict=True)])


CHANGES: dict[str, Callable[[SpectralLayer], object]] = {
    "append": lambda layer: append(layer, 1, 8),
    "encode": lambda layer: append(layer, 300, 8),
    "crop": lambda layer: layer.crop(-1),
    "crop a block": lambda layer: layer.crop(-100),
    "crop all": lambda layer: layer.crop(-layer.get_seq_length()),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(1),
    "offload": lambda layer: layer.offload(),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_layer_leaves_its_copies_alone(change: str) -> None:
    layer = filled()
    fork, before = layer.fork(), read(layer)
    CHANGES[change](layer)
    expected = read(layer) if layer.is_initialized else [x[:, :, :0] for x in tokens(1, 0)]
    append(layer, 1, 8)
    assert_same(read(fork), before)
    assert_same(read(layer), [torch.cat(pair, 2) for pair in zip(expected, tokens(1, 8), strict=True)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_stays_what_it_was(change: str) -> None:
    """Whoever has a layer's state has it of one moment: the layer puts others in its place."""
    layer = filled()
    state, before, length = layer.state, read(layer), layer.get_seq_length()
    CHANGES[change](layer)
    assert layer.state is not state
    other = filled(70)
    other.state = state
    assert_same(read(other), before)
    assert (state.length, other.get_seq_length()) == (length, length)


def test_between_inference_mode_and_autograd() -> None:
    """Buffers of inference mode are not written to outside; what autograd has kept may be written behind."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    layer, twin = empty().spectral_layers[0], empty().spectral_layers[0]
    for each in (layer, twin):
        with torch.inference_mode():
            append(each, 40, 0)
            append(each, 1, 1)
        append(each, 1, 2)
        append(each, 1, 3)
    query = torch.randn(ROWS, 2 * HEADS, 1, DIM, requires_grad=True)
    gradients = []
    for each, goes_on in ((layer, True), (twin, False)):
        lazy = each.update(*tokens(1, 4))
        output, _ = spectral_attention_forward(module, query, *lazy, None)
        if goes_on:
            with torch.no_grad():
                address = addresses(each)
                append(each, 1, 5)
                assert addresses(each) == address
        gradients.append(torch.autograd.grad(output.square().sum(), query)[0])
    assert torch.equal(*gradients)
    with torch.inference_mode():
        for seed in range(6, 60):
            append(layer, 1, seed)
    append(layer, 1, 60)
    assert layer.get_seq_length() == 40 + 1 + 2 + 1 + 1 + 54 + 1


def test_a_buffer_belongs_to_the_newest_tails() -> None:
    start = {side: x[:, :, :8] for side, x in zip(SIDES, tokens(8, 0), strict=True)}
    one = dict(zip(SIDES, tokens(1, 1), strict=True))
    buffer = TailBuffer(start, 1)
    first = buffer.append(start, one)
    assert first is not None
    assert buffer.append(start, one) is None  # taken
    assert buffer.append({side: tail.clone() for side, tail in first.items()}, one) is None  # not its own
    assert buffer.capacity == 9
    assert buffer.append(first, one) is None  # full
