"""Layers stay in step: whatever is interrupted, whichever thread asks, and however rows are named."""

from __future__ import annotations

import _thread
import copy
import functools
import gc
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quantcache.artifact.calibration import Calibration
from quantcache.cache import passes
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.passes import ForwardPass, Outcome
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.schema import SIDES
from quantcache.common.errors import QuantCacheError, RowError
from tests.builders import scalar_calibration
from tests.families import FAMILIES, Family, random_tokens, shared_model
from tests.helpers import feed

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, GPT2, GEMMA3 = (next(f for f in FAMILIES if f.name == name) for name in ("llama", "gpt2", "gemma3"))


@functools.cache
def calibration_of(family: Family) -> Calibration:
    """A stand-in of the family's geometry."""
    return scalar_calibration(shared_model(family).config, 3.0)


def empty(family: Family = LLAMA, **options: Any) -> SpectralCache:
    """An empty cache that keeps no recent tokens."""
    return SpectralCache(calibration_of(family), shared_model(family).config, **{"residual_length": 0, **options})


def filled(tokens: int = 132, rows: int = 1, family: Family = LLAMA) -> SpectralCache:
    """A cache of random tokens."""
    cache = empty(family)
    feed(shared_model(family), cache, random_tokens(rows, tokens, seed=1), (tokens,))
    return cache


def go_on(cache: DynamicCache, count: int = 5, rows: int = 1, family: Family = LLAMA, model: Any = None) -> Tensor:
    """Logits of further tokens."""
    return feed(model or shared_model(family), cache, random_tokens(rows, count, seed=2), (count,))


def held(cache: SpectralCache) -> list[Tensor]:
    """What every layer holds, decoded."""
    return [x for keys, values, _ in copy.deepcopy(cache) for x in (keys, values) if x is not None]


# ---------------------------------------------------------------------- passes that fail late


def fail(raised: type[BaseException]) -> Callable[..., None]:
    """A hook that raises."""

    def hook(*_: object) -> None:
        raise raised("simulated")

    return hook


PLACES: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "last attention": lambda model, hook: model.model.layers[-1].self_attn.register_forward_hook(hook),
    "last MLP": lambda model, hook: model.model.layers[-1].mlp.register_forward_pre_hook(hook),
    "norm": lambda model, hook: model.model.norm.register_forward_pre_hook(hook),
    "head": lambda model, hook: model.lm_head.register_forward_pre_hook(hook),
    "behind the head": lambda model, hook: model.lm_head.register_forward_hook(hook),
    "the model's own hook": lambda model, hook: model.register_forward_hook(hook),
}


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", PLACES)
def test_a_pass_that_fails_after_its_last_layer(place: str, raised: type[BaseException], attention: str) -> None:
    model, cache = LLAMA.make(attention=attention), empty(residual_length=64)
    feed(model, cache, random_tokens(1, 132, seed=1), (132,))
    expected = go_on(cache.fork(), model=model)
    handle = PLACES[place](model, fail(raised))
    with pytest.raises(raised) as kept:  # whether or not somebody still holds the traceback
        go_on(cache, model=model)
    if raised is KeyboardInterrupt:
        del kept
    handle.remove()
    for _ in range(2):
        with pytest.raises(QuantCacheError, match=r"held 132 tokens and holds 137, because a forward pass was interr"):
            go_on(cache, model=model)
    assert cache.rollback() == 132
    assert torch.equal(go_on(cache, model=model), expected)


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_first_pass_that_fails_late(layers: int) -> None:
    """Of one layer too, whose length agrees with itself."""
    config = copy.deepcopy(shared_model(LLAMA).config)
    config.num_hidden_layers, config.layer_types = layers, None
    model = type(shared_model(LLAMA))(config).eval()
    cache = SpectralCache(scalar_calibration(config, 3.0), config)
    handle = model.model.norm.register_forward_pre_hook(fail(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go_on(cache, model=model)
    handle.remove()
    with pytest.raises(QuantCacheError, match="held 0 tokens and holds 5"):
        go_on(cache, model=model)
    assert cache.rollback() == 0
    fresh = SpectralCache(scalar_calibration(config, 3.0), config)
    assert torch.equal(go_on(cache, model=model), go_on(fresh, model=model))


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
def test_generate_that_fails_in_its_third_step() -> None:
    model, cache, calls = LLAMA.make(), empty(), []

    def third(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(third)
    prompt = random_tokens(1, 20, seed=3)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)
    handle.remove()
    expected = model.generate(prompt, past_key_values=empty(), max_new_tokens=5, do_sample=False)
    with pytest.raises(QuantCacheError, match="held 21 tokens and holds 22"):
        model.generate(expected[:, :23], past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert cache.rollback() == 21
    found = model.generate(expected[:, :22], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
@pytest.mark.parametrize("family", [GPT2, GEMMA3], ids=str)
def test_other_models_that_fail_late(family: Family) -> None:
    model, cache = family.make(), filled(family=family)
    handle = model.lm_head.register_forward_pre_hook(fail(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go_on(cache, model=model)
    handle.remove()
    with pytest.raises(QuantCacheError, match="held 132 tokens and holds 137"):
        go_on(cache, model=model)
    if family is GEMMA3:
        with pytest.raises(QuantCacheError, match=r"holds 137 tokens and cannot be rolled back to 132: call reset\(\)"):
            cache.rollback()
        cache.reset()
        assert torch.equal(go_on(cache, model=model), go_on(empty(family), model=model))
    else:
        assert cache.rollback() == 132
        assert torch.equal(go_on(cache, model=model), go_on(filled(family=family), model=model))


class Wrapper(nn.Module):
    """Somebody's module around a model, which survives one failure inside."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: DynamicCache, tries: int = 1) -> Tensor:
        for _ in range(tries - 1):
            with pytest.raises(KeyboardInterrupt):
                self.model(tokens, None, None, cache)
        return self.model(tokens, None, None, cache).logits


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
def test_a_model_inside_another_module_and_positional_arguments() -> None:
    model, cache, tokens = LLAMA.make(), filled(), random_tokens(1, 5, seed=2)
    wrapper = Wrapper(model)
    with torch.no_grad():
        expected = wrapper(tokens, cache.fork())
        assert torch.equal(wrapper(tokens, cache=cache.fork()), expected)
        handle = model.lm_head.register_forward_pre_hook(fail(KeyboardInterrupt))
        with pytest.raises(QuantCacheError, match="held 132 tokens and holds 137"):
            wrapper(tokens, cache, 2)
        handle.remove()
        assert cache.rollback() == 132
        assert torch.equal(wrapper(tokens, cache), expected)


@pytest.mark.support("a forward pass that fails after its last layer")
def test_passes_that_return_are_never_refused() -> None:
    """Though somebody keeps a frame or a traceback from inside them, or hooks catch errors of their own."""
    model, cache, kept = LLAMA.make(), filled(), []

    def caught(*_: object) -> None:
        try:
            raise ValueError
        except ValueError as error:
            kept.append((error, sys._getframe()))

    model.lm_head.register_forward_hook(caught)
    expected = filled()
    for _ in range(3):
        assert torch.equal(go_on(cache, model=model), go_on(expected))
    assert len(kept) == 3
    assert cache.forward_pass is not None
    assert cache.forward_pass.outcome() is Outcome.RETURNED
    assert cache.fork().forward_pass is None


@pytest.mark.support("a forward pass that fails after its last layer")
def test_frames_kept_in_cycles_and_collected_later() -> None:
    model, cache, expected = LLAMA.make(), filled(), filled()

    def careless(*_: object) -> None:
        frame = sys._getframe()  # a variable of the frame that it is
        assert frame is not None

    model.lm_head.register_forward_hook(careless)
    for _ in range(2):
        assert torch.equal(go_on(cache, model=model), go_on(expected))
        gc.collect()


@pytest.mark.support("a forward pass that fails after its last layer")
@pytest.mark.parametrize("place", ["here", "in another thread"])
def test_an_error_kept_in_a_cycle_and_collected(place: str) -> None:
    """As where it lies in a variable; ``gc.collect()`` is what people do once memory has run out."""
    model, cache = LLAMA.make(), filled()
    handle = model.lm_head.register_forward_pre_hook(fail(torch.OutOfMemoryError))

    def attempt() -> None:
        try:
            go_on(cache, model=model)
        except torch.OutOfMemoryError as error:
            kept = error  # a variable of a frame that the error knows
            assert kept is not None

    with ThreadPoolExecutor(1) as pool:
        attempt() if place == "here" else pool.submit(attempt).result(20)
        gc.collect()
        handle.remove()
        with pytest.raises(QuantCacheError, match="a forward pass was interrupted"):
            go_on(cache, model=model)
        assert cache.rollback() == 132
        assert torch.equal(go_on(cache), go_on(filled()))


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
def test_a_pass_that_failed_in_a_thread_whose_error_is_kept() -> None:
    model, cache = LLAMA.make(), filled()
    handle = model.lm_head.register_forward_pre_hook(fail(ValueError))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(go_on, cache, model=model)
        assert isinstance(future.exception(20), ValueError)
        handle.remove()
        with pytest.raises(QuantCacheError, match="another thread"):
            go_on(cache)
        assert cache.rollback() == 132
        assert torch.equal(go_on(cache), go_on(filled()))


@pytest.mark.support("a forward pass that fails after its last layer")
def test_nothing_of_a_pass_outlives_it() -> None:
    model, cache = LLAMA.make(), filled()
    go_on(cache, model=model)
    assert isinstance(cache.forward_pass, ForwardPass)
    assert cache.forward_pass._mark is not None
    assert cache.forward_pass._mark() is None
    assert not model._forward_hooks
    assert passes.watch(cache, 0) is None, "no call of a module was given the cache"


def test_a_mark_that_goes_when_no_code_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the interpreter's end: nothing is printed, and the pass counts as over."""
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    forward_pass = ForwardPass(0, 0)
    marks = [passes._Mark(forward_pass, sys._getframe())]
    _thread.start_new_thread(marks.clear, ())  # a thread in which no line of Python runs
    limit = time.monotonic() + 10
    while not (forward_pass.ended or complaints) and time.monotonic() < limit:
        time.sleep(0.001)
    assert forward_pass.ended
    assert not complaints


@pytest.mark.support("interrupted operations on a cache", refused=True)
def test_a_model_of_more_layers_than_the_cache() -> None:
    """It says what is wrong, and the cache goes on with its own model."""
    family = replace(LLAMA, name="deeper", config=LLAMA.config | {"num_hidden_layers": 4})
    cache = filled()
    with pytest.raises(QuantCacheError, match=r"of layer 2, the cache has 2 layers: it was made for another model"):
        feed(family.make(), cache, random_tokens(1, 3), (3,))
    assert cache.rollback() == 132
    assert torch.equal(go_on(cache), go_on(filled()))


@pytest.mark.support("a forward pass that fails after its last layer", refused=True)
def test_after_a_failed_pass_nothing_is_built_on_it(tmp_path: Path) -> None:
    model, cache = LLAMA.make(), filled(rows=2)
    before = held(cache)
    model.lm_head.register_forward_pre_hook(fail(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go_on(cache, rows=2, model=model)
    for use in (
        cache.fork,
        lambda: copy.deepcopy(cache),
        lambda: cache.save(tmp_path / "prefix"),
        lambda: list(cache),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_select_indices([0]),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(QuantCacheError, match=r"forward pass was interrupted.*call rollback\(\) or reset\(\)"):
            use()
    assert not list(tmp_path.iterdir())
    assert cache.memory().tokens == 137
    assert cache.rollback() == 132
    assert all(map(torch.equal, held(cache), before))


class Interrupted(KeyboardInterrupt):
    """What a test raises."""


def interrupted_at(action: Callable[[], object], event: int) -> int:
    """Run something and raise at one of the lines of Python that it executes; gives how many there were."""
    count, previous = 0, sys.gettrace()

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        nonlocal count
        if kind == "line":
            count += 1
            if count == event:
                sys.settrace(previous)
                raise Interrupted
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    return count


@pytest.mark.support("interrupted operations on a cache")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a line of a finalizer was hit
@pytest.mark.parametrize("operation", ["pass", "reorder", "select", "repeat", "crop", "fork"])
def test_interrupts_at_any_line(operation: str) -> None:
    """Whatever had happened is undone, done, or noticed by the next call."""
    model, cache, tokens = shared_model(LLAMA), filled(rows=2), random_tokens(2, 1, seed=2)

    def forward(cache: SpectralCache) -> Tensor:
        return model(input_ids=tokens[: cache.spectral_layers[0].tails["key"].shape[0]], past_key_values=cache).logits

    act: Callable[[SpectralCache], object] = {
        "pass": forward,
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "select": lambda cache: cache.batch_select_indices([1]),
        "repeat": lambda cache: cache.batch_repeat_interleave(1),
        "crop": lambda cache: cache.crop(-70),
        "fork": lambda cache: cache.fork(),
    }[operation]
    seen: Counter[str] = Counter()
    with torch.no_grad():
        interrupted_at(lambda: act(cache.fork()), 0)
        lines = interrupted_at(lambda: act(cache.fork()), 0)
        done = cache.fork()
        act(done)
        undone, done = forward(cache.fork()), forward(done) if operation != "pass" else None
        for event in range(1, lines, max(1, lines // 50)):
            copied = cache.fork()
            try:
                interrupted_at(lambda copied=copied: act(copied), event)
                continue  # it came to nothing
            except Interrupted:
                pass
            try:
                found = forward(copied)
            except QuantCacheError:
                assert operation == "pass"
                assert copied.rollback() == 132
                found = forward(copied)
                seen["refused"] += 1
            else:
                seen["undone or done"] += 1
            assert torch.equal(found, undone) or (done is not None and torch.equal(found, done)), event
            assert copied.get_seq_length() in (133, 63)
    assert seen["undone or done"]
    assert seen["refused"] or operation != "pass"


@pytest.mark.support("interrupted operations on a cache")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("family", [LLAMA, GEMMA3], ids=str)
@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.crop(-2),
    ],
    ids=["reorder", "select", "repeat", "crop"],
)
def test_operations_change_all_layers_or_none(
    operation: Callable[[SpectralCache], None],
    family: Family,
    raised: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = empty(family)
    cache.activate_past_recording()
    feed(shared_model(family), cache, random_tokens(2, 132, seed=1), (132,))
    cache.crop(0)
    before, copied = held(cache), copy.deepcopy(cache)
    calls: list[int] = []
    for kind, name in itertools.product({type(layer) for layer in cache.layers}, ("reorder_cache", "crop")):
        real = getattr(kind, name)

        def last(self: Any, argument: Any, real: Any = real) -> Any:
            calls.append(1)
            if len(calls) == len(cache.layers):
                raise raised("simulated")
            return real(self, argument)

        monkeypatch.setattr(kind, name, last)
    with pytest.raises(raised):
        operation(cache)
    monkeypatch.undo()
    assert all(map(torch.equal, held(cache), before))
    operation(copied)
    operation(cache)
    assert all(map(torch.equal, held(cache), held(copied)))


@pytest.mark.support("interrupted operations on a cache", refused=True)
def test_an_interrupted_reset_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, real = filled(), SpectralLayer.reset

    def reset(self: SpectralLayer) -> None:
        if self.index == 1:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(SpectralLayer, "reset", reset)
    with pytest.raises(KeyboardInterrupt):
        cache.reset()
    monkeypatch.undo()
    with pytest.raises(QuantCacheError, match=r"reset\(\) was interrupted"):
        go_on(cache)
    cache.reset()
    assert torch.equal(go_on(cache), go_on(empty()))


# ---------------------------------------------------------------------- rows

ROWS: dict[str, tuple[Any, list[int]]] = {
    "tensor": (torch.tensor([2, 0]), [2, 0]),
    "int32": (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
    "list": ([2, 0, 0], [2, 0, 0]),
    "tuple": ((1, 2), [1, 2]),
    "array": (np.array([1, 0]), [1, 0]),
    "negative": (torch.tensor([-1, 0]), [2, 0]),
    "negative list": ([-1, -3], [2, 0]),
    "negative array": (np.array([-2]), [1]),
    "mask": (torch.tensor([True, False, True]), [0, 2]),
    "list of bools": ([False, True, True], [1, 2]),
    "array of bools": (np.array([True, False, False]), [0]),
    "slice": (slice(1, None), [1, 2]),
    "range": (range(2), [0, 1]),
}


@pytest.mark.support("rows named by tensors, arrays, lists, masks and negative numbers")
@pytest.mark.parametrize("family", [LLAMA, GEMMA3], ids=str)
@pytest.mark.parametrize("form", ROWS)
def test_rows_are_chosen_as_transformers_chooses_them(form: str, family: Family) -> None:
    indices, rows = ROWS[form]
    tokens = random_tokens(3, 150, seed=4)
    model, dense = shared_model(family), DynamicCache(config=shared_model(family).config)
    cache = empty(family, key_bits="dense", value_bits="dense")
    for each in (cache, dense):
        feed(model, each, tokens, (150,))
    ordered = cache.fork()
    ordered.reorder_cache(torch.tensor(rows))
    for each in (cache, dense):
        each.batch_select_indices(indices)
    for (keys, values, _), (theirs, their_values, _), (others, _, _) in zip(cache, dense, ordered, strict=True):
        assert keys.shape == theirs.shape
        assert values.shape == their_values.shape
        assert torch.equal(keys, others)
    reordered = filled(rows=3, family=family)
    reordered.reorder_cache(indices)
    assert {layer.tails["key"].shape[0] for layer in reordered.spectral_layers} == {len(rows)}
    layer = filled(rows=3).spectral_layers[0]
    layer.batch_select_indices(indices)
    assert layer.tails["key"].shape[0] == len(rows)


@pytest.mark.support("rows named by tensors, arrays, lists, masks and negative numbers", refused=True)
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda cache: cache.batch_select_indices([0, 3]), r"rows \[0, 3\] of a batch of 3: index 3 is out of bounds"),
        (lambda cache: cache.batch_select_indices(torch.tensor([-4])), r"rows \[-4\] of a batch of 3"),
        (lambda cache: cache.reorder_cache(torch.tensor([5])), r"rows \[5\] of a batch of 3"),
        (lambda cache: cache.batch_select_indices(torch.tensor([True])), r"rows \[True\] of a batch of 3"),
        (lambda cache: cache.batch_select_indices([True] * 4), r"rows \[True, True, True, True\] of a batch of 3"),
        (lambda cache: cache.batch_select_indices(1), "one dimension of indices, got 1"),
        (lambda cache: cache.batch_select_indices([[0], [1]]), "one dimension of indices"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0.5])), "batch of 3"),
        (lambda cache: cache.batch_select_indices(None), "one dimension of indices, got None"),
        (lambda cache: cache.batch_repeat_interleave(-1), "cannot repeat the rows of a batch of 3 -1 times"),
        (lambda cache: cache.batch_repeat_interleave([1, 2]), r"batch of 3 \[1, 2\] times"),
        (lambda cache: cache.batch_repeat_interleave(1.5), "batch of 3 1.5 times"),
    ],
)
def test_rows_that_are_not_there(use: Callable[[Any], None], message: str) -> None:
    cache = filled(rows=3)
    before = held(cache)
    for each in (cache, cache.spectral_layers[1]):
        with pytest.raises(RowError, match=message) as caught:
            use(each)
        assert isinstance(caught.value, IndexError)
    assert all(map(torch.equal, held(cache), before))
    use(empty())  # transformers' own layers do nothing either where there is nothing


@pytest.mark.support("crop, inside an encoded block too")
@pytest.mark.parametrize("number", [-1.5, 1.5, torch.tensor(-2.0), "3", None, torch.tensor([-1, -2])])
def test_a_crop_by_no_whole_number(number: Any) -> None:
    """Of a fraction the whole part was taken: 1.5 left one token."""
    cache = filled(rows=2)
    before = held(cache)
    with pytest.raises(TypeError):
        cache.crop(number)
    assert all(map(torch.equal, held(cache), before))
    length = cache.get_seq_length()
    for drop in (-1, torch.tensor(-2), np.int64(-3), torch.tensor([-1])):
        cache.crop(drop)
        length += int(drop)
        assert cache.get_seq_length() == length


@pytest.mark.support("rows named by tensors, arrays, lists, masks and negative numbers")
@pytest.mark.parametrize("repeats", [2, 0, torch.tensor(2), torch.tensor([1, 0, 3]), [1, 0, 3], np.array([2, 1, 1])])
def test_rows_are_repeated_as_torch_repeats_them(repeats: Any) -> None:
    cache = filled(rows=3)
    expected = torch.arange(3).repeat_interleave(torch.as_tensor(repeats))
    ordered = cache.fork()
    ordered.reorder_cache(expected)
    cache.batch_repeat_interleave(repeats)
    assert cache.spectral_layers[0].tails["key"].shape[0] == len(expected)
    assert all(map(torch.equal, held(cache), held(ordered)))


# ---------------------------------------------------------------------- threads

HEADS, DIM, STREAM = 2, 64, 2000


class Feeder(nn.Module):
    """Gives a cache the next of a fixed stream of keys and values, as a model's forward pass would."""

    def __init__(self, layers: int):
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.stream = [
            {side: torch.randn(1, HEADS, STREAM, DIM, generator=generator) for side in SIDES} for _ in range(layers)
        ]

    def forward(self, past_key_values: SpectralCache, count: int) -> None:
        first = past_key_values.get_seq_length()
        for index, layer in enumerate(past_key_values.spectral_layers):
            new = [self.stream[index][side][:, :, first : first + count] for side in SIDES]
            past_key_values.update(*new, index)
            if layer.get_seq_length() != first + count:
                raise QuantCacheError("another thread has changed the cache before the pass began")
            layer.flush()

    def is_prefix(self, cache: SpectralCache) -> bool:
        """Whether all layers of a cache hold the first T tokens of the stream."""
        length = cache.get_seq_length()
        return all(
            layer.get_seq_length() == length
            and (not length or torch.equal(layer.snapshot().dense(side), tokens[side][:, :, :length]))
            for layer, tokens in zip(cache.spectral_layers, self.stream, strict=True)
            for side in SIDES
        )


def side_by_side(
    writer: Callable[[], None], others: list[Callable[[], str]], seconds: float, outcomes: set[str]
) -> Counter[str]:
    """Run a writer and others in threads; what came of the others, and of errors that are not the library's own.

    A busy machine gets more time, until each of some outcomes has been seen.
    """
    seen: Counter[str] = Counter()
    start, interval = time.monotonic(), sys.getswitchinterval()

    def is_over() -> bool:
        passed = time.monotonic() - start
        return passed > seconds and (all(seen[each] for each in outcomes) or passed > 20 * seconds)

    def run(action: Callable[[], str | None], name: str) -> None:
        while not is_over():
            try:
                seen[action() or f"{name} went on"] += 1
            except QuantCacheError:
                seen[f"{name} refused"] += 1
            except BaseException as error:
                seen[f"{name}: {type(error).__name__}: {error}"] += 1
                raise
            time.sleep(1e-4)

    threads = [threading.Thread(target=run, args=(writer, "writer"))]
    threads += [threading.Thread(target=run, args=(other, "other")) for other in others]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    return seen


@pytest.mark.slow
@pytest.mark.support("copies taken while another thread extends the cache")
def test_copies_are_of_one_moment(tmp_path: Path) -> None:
    cache = empty(key_bits="dense", value_bits="dense")
    feeder, numbers = Feeder(len(cache.layers)), iter(range(1 << 30))
    assert cache.calibration is not None

    def write() -> None:
        feeder(past_key_values=cache, count=(65, 1, 130)[next(numbers) % 3])
        if cache.get_seq_length() > 700:
            cache.crop(-550)
        time.sleep(1e-3)

    def checked(copied: SpectralCache) -> str:
        whole = feeder.is_prefix(copied)
        feeder(past_key_values=copied, count=70)  # and it can go on without disturbing anybody
        return "whole" if whole and feeder.is_prefix(copied) else "torn"

    def save() -> str:
        path = tmp_path / str(threading.get_ident())
        cache.save(path)
        return checked(SpectralCache.load(path, cache.calibration))  # type: ignore[arg-type]

    def read() -> str:
        layers = [(keys, values) for keys, values, _ in cache]
        length = layers[0][0].shape[2] if layers[0][0] is not None else 0
        whole = not length or all(
            torch.equal(tensor, tokens[side][:, :, :length])
            for pair, tokens in zip(layers, feeder.stream, strict=True)
            for side, tensor in zip(SIDES, pair, strict=True)
        )
        return "whole" if whole and cache.memory().tokens >= 0 else "torn"

    others = [lambda: checked(cache.fork()), lambda: checked(copy.deepcopy(cache)), save, read]
    seen = side_by_side(write, others, 1.5, {"whole", "writer went on"})
    assert set(seen) <= {"whole", "other refused", "writer went on"}, seen
    assert seen["whole"]
    assert seen["writer went on"]
    assert feeder.is_prefix(cache)


@pytest.mark.support("two threads, one cache", refused=True)
def test_operations_beside_a_pass_are_refused_or_whole() -> None:
    cache = empty(key_bits="dense", value_bits="dense")
    feeder, numbers = Feeder(len(cache.layers)), iter(range(1 << 30))

    def write() -> None:
        try:
            feeder(past_key_values=cache, count=65)
        except QuantCacheError:
            cache.rollback()
            raise
        if cache.get_seq_length() > 700:
            cache.reset()

    operations = [
        lambda: cache.crop(-3),
        lambda: cache.reorder_cache([0]),
        lambda: cache.batch_select_indices([True]),
        lambda: cache.batch_repeat_interleave(1),
        cache.reset,
        cache.rollback,
    ]

    def operate() -> str:
        operations[next(numbers) % len(operations)]()
        return "operated"

    seen = side_by_side(write, [operate, operate], 1.5, {"writer went on", "operated"})
    assert set(seen) <= {"writer went on", "writer refused", "other refused", "operated"}, seen
    assert seen["writer went on"]
    assert seen["operated"]
    cache.rollback()
    assert feeder.is_prefix(cache)


@pytest.mark.support("two threads, one cache", refused=True)
def test_what_may_be_asked_in_the_middle_of_another_threads_pass() -> None:
    model, cache = LLAMA.make(), filled()
    met, go = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        met.set()
        assert go.wait(20)

    model.lm_head.register_forward_pre_hook(pause)  # all layers have their tokens
    thread = threading.Thread(target=go_on, args=(cache,), kwargs={"model": model})
    thread.start()
    assert met.wait(20)
    try:
        for use in (cache.fork, cache.reset, cache.rollback, lambda: cache.crop(-1), lambda: copy.deepcopy(cache)):
            with pytest.raises(QuantCacheError, match="another thread is in a forward pass"):
                use()
        assert cache.memory().tokens == 137
    finally:
        go.set()
        thread.join(20)
    assert cache.fork().get_seq_length() == 137
    assert torch.equal(go_on(cache, 3), go_on_twice())


def go_on_twice() -> Tensor:
    """What a cache gives that nobody has disturbed."""
    cache = filled()
    go_on(cache)
    return go_on(cache, 3)


@pytest.mark.support("two threads, one cache")
def test_a_thread_that_ended_in_the_middle_leaves_the_cache_to_others() -> None:
    cache = filled()
    vars(cache)["updating"] = threading.get_ident() + 1  # as an interrupt on the way out of an operation leaves it
    cache.crop(-1)
    assert "updating" not in vars(cache)
    assert cache.get_seq_length() == 131
