"""Steps of one token that a CUDA graph could repeat: the same launches each time, and the same results as without.

There is no GPU here: kernels run on an emulated warp, and what is "replayed" is the captured function itself.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache

from quantcache import DecodeGraph, SpectralCache, decode_graphs
from quantcache.backends import triton
from quantcache.cache import stages
from quantcache.coding.packing import BLOCK
from quantcache.common.errors import GraphCaptureError, QuantCacheError
from quantcache_kernels.cuda import codes
from tests.builders import scalar_calibration
from tests.families import FAMILIES
from tests.helpers import feed
from tests.kernels import emulation
from tests.kernels.test_waiting import watched

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")


class Again:
    """A graph whose replay is the step itself."""

    def __init__(self, step: Callable[[], Tensor]):
        self.step, self.result = step, torch.empty(0)
        self.earlier: Any = None

    def replay(self) -> None:
        """Carry it out; torch does not see what a graph does."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            self.result.copy_(self.step())

    def pool(self) -> None:
        """No memory."""


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Again]]:
    """``backend="cuda"`` on the CPU, and graphs that are functions; yields those that were captured."""
    captured = []

    def recorded(step: Callable[[], Tensor], earlier: Any, device: torch.device) -> tuple[Again, Tensor]:
        graph = Again(step)
        with torch.inference_mode(False):  # a GPU does not ask in which mode its memory is written to
            graph.result = torch.full((2, 1, model().config.vocab_size), torch.nan, dtype=torch.bfloat16)
        graph.earlier = earlier
        captured.append(graph)
        return graph, graph.result

    monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self, device: "the interpreter takes its time")
    monkeypatch.setattr(stages, "recorded", recorded)
    with emulation.on_the_cpu():
        yield captured


_made: list[torch.nn.Module] = []


def model() -> Any:
    """The small Llama in bfloat16."""
    if not _made:
        _made.append(FAMILIES[0].make(dtype=torch.bfloat16))
    return _made[0]


def tokens(count: int) -> Tensor:
    """Random tokens for two rows."""
    return torch.randint(3, 250, (2, count), generator=torch.Generator().manual_seed(3))


def filled(length: int, padding: tuple[int, ...] = (), residual: int = 4) -> SpectralCache:
    """A cache of two rows."""
    config = model().config
    found = SpectralCache(scalar_calibration(config, 3), config, residual_length=residual, backend="cuda")
    feed(model(), found, tokens(length), [length - 1, 1], padding=padding)
    return found


def same_tokens(one: SpectralCache, other: SpectralCache) -> None:
    """Two caches hold the same."""
    for ours, theirs in zip(one.spectral_layers, other.spectral_layers, strict=True):
        assert ours.spans == theirs.spans
        for side in ("key", "value"):
            assert torch.equal(ours.tails[side], theirs.tails[side])
            mine, other_fields = ours.fields(side), theirs.fields(side)
            assert all(torch.equal(mine[name], field) for name, field in other_fields.items())


@pytest.mark.slow
@pytest.mark.support("decoding steps that a CUDA graph can repeat, emulated")
@pytest.mark.parametrize("padding", [(), (0, 7)])
def test_steps_from_a_graph_are_the_models_own(emulated: list[Again], padding: tuple[int, ...]) -> None:
    length, steps = 4 + BLOCK + 65, 5
    cache = filled(length, padding)
    plain, step = copy.deepcopy(cache), DecodeGraph(model(), cache)
    ids = tokens(length + steps)[:, length:]
    mask = torch.ones(2, length + steps, dtype=torch.long)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    positions = mask.cumsum(-1) - 1
    for i in range(steps):
        here = length + i
        given = (
            {"attention_mask": mask[:, : here + 1], "position_ids": positions[:, here : here + 1]} if padding else {}
        )
        found = step(ids[:, i : i + 1], **given)
        with torch.no_grad():
            expected = model()(ids[:, i : i + 1], past_key_values=plain, use_cache=True, **given).logits
        assert torch.equal(found, expected), i
        assert cache.get_seq_length() == plain.get_seq_length() == here + 1
    same_tokens(cache, plain)
    assert len(cache.spectral_layers[0].spans) == 2, "a block was encoded on the way"
    assert len(emulated) == 1, "which the graph serves too"


@pytest.mark.slow
def test_a_graph_without_room_is_followed_by_another(emulated: list[Again], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FREE_BLOCKS", 0)
    length = 4 + BLOCK + 66
    cache, ids = filled(length), tokens(length + 90)[:, length:]
    step = DecodeGraph(model(), cache)
    for i in range(3):
        step(ids[:, i : i + 1])
    assert (len(emulated), len(cache.spectral_layers[0].spans)) == (1, 2), "there was room for one block more"
    feed(model(), cache, ids[:, 3:80], [77])
    for i in range(80, 83):
        step(ids[:, i : i + 1])
    assert (len(emulated), len(cache.spectral_layers[0].spans)) == (2, 3)
    assert emulated[1].earlier is emulated[0], "whose memory it takes over"
    plain = filled(length)
    feed(model(), plain, ids[:, :83], [1, 1, 1, 77, 1, 1, 1])
    same_tokens(cache, plain)


def test_padding_is_looked_for_again_behind_a_block(emulated: list[Again]) -> None:
    length = 4 + BLOCK + 66
    cache, ids = filled(length, (0, 7)), tokens(length + 6)[:, length:]
    step, mask = DecodeGraph(model(), cache), torch.ones(2, length + 6, dtype=torch.long)
    mask[1, :7] = 0
    positions = mask.cumsum(-1) - 1

    def take(i: int, mask: Tensor) -> None:
        here = slice(length + i, length + i + 1)
        step(ids[:, i : i + 1], attention_mask=mask[:, : here.stop], position_ids=positions[:, here])

    for i in range(2):
        take(i, mask)
    assert len(cache.spectral_layers[0].spans) == 2
    with pytest.raises(
        GraphCaptureError, match="the cuda backend does not serve this step: a query attends to padding"
    ):
        take(2, torch.ones_like(mask))
    assert cache.get_seq_length() == length + 2
    take(2, mask)
    assert cache.get_seq_length() == length + 3


@pytest.mark.slow
def test_a_mask_may_change_from_step_to_step(emulated: list[Again]) -> None:
    length = 4 + BLOCK + 8
    cache, ids = filled(length), tokens(length + 4)[:, length:]
    plain, step, unmasked = copy.deepcopy(cache), DecodeGraph(model(), cache), DecodeGraph(model(), cache.fork())
    hidden: list[list[int] | None] = [None, [], [30, 74], [9]]  # tokens of row 1 that a step does not see
    for i, holes in enumerate(hidden):
        mask = torch.ones(2, length + i + 1, dtype=torch.long)
        mask[1, holes or []] = 0
        given = {} if holes is None else {"attention_mask": mask, "position_ids": torch.full((2, 1), length + i)}
        found = step(ids[:, i : i + 1], **given)
        with torch.no_grad():
            expected = model()(ids[:, i : i + 1], past_key_values=plain, use_cache=True, **given).logits
        assert torch.equal(found, expected), i
        if i < 3:  # a mask that shows all is the same as none
            assert torch.equal(found, unmasked(ids[:, i : i + 1])) == (not holes), i
    same_tokens(cache, plain)


@pytest.mark.slow
def test_a_cache_may_be_used_in_between(emulated: list[Again]) -> None:
    length = 4 + BLOCK + 20
    cache = filled(length)
    step, ids = DecodeGraph(model(), cache), tokens(length + 40)[:, length:]
    for i in range(2):
        step(ids[:, i : i + 1])
    fork = cache.fork()
    other = DecodeGraph(model(), fork)
    first = [step(ids[:, 3:4]), step(ids[:, 4:5])]
    second = [other(ids[:, 3:4]), other(ids[:, 5:6])]  # takes other places than the original
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    cache.crop(-1)
    with torch.no_grad():
        model()(ids[:, 6:7], past_key_values=cache)
    step(ids[:, 7:8])
    plain = filled(length)
    feed(model(), plain, ids[:, [0, 1, 3, 6, 7]], [1] * 5)
    same_tokens(cache, plain)


def test_a_graph_serves_rows_that_have_changed_places(emulated: list[Again]) -> None:
    length = 4 + BLOCK + 20
    cache, ids = filled(length), tokens(length + 5)[:, length:]
    plain, step = copy.deepcopy(cache), DecodeGraph(model(), cache)
    for i in range(5):
        if i > 2:
            for each in (cache, plain):
                each.batch_select_indices(torch.tensor([1, 0]))
        with torch.no_grad():
            expected = model()(ids[:, i : i + 1], past_key_values=plain, use_cache=True).logits
        assert torch.equal(step(ids[:, i : i + 1]), expected), i
    assert len(emulated) == 1
    same_tokens(cache, plain)


def test_steps_may_be_taken_in_inference_mode_and_then_without(emulated: list[Again]) -> None:
    length = 4 + BLOCK + 20
    cache, ids = filled(length), tokens(length + 5)[:, length:]
    plain, step = copy.deepcopy(cache), DecodeGraph(model(), cache)
    for i in range(5):
        with torch.no_grad():
            expected = model()(ids[:, i : i + 1], past_key_values=plain, use_cache=True).logits
        with torch.inference_mode(i < 2):
            found = step(ids[:, i : i + 1], attention_mask=torch.ones(2, length + i + 1, dtype=torch.long))
        assert torch.equal(found, expected), i
    assert len(emulated) == 1


def test_what_cannot_be_captured_is_refused(emulated: list[Again], monkeypatch: pytest.MonkeyPatch) -> None:
    length = 4 + BLOCK + 20
    cache, ids = filled(length), tokens(1)
    step = DecodeGraph(model(), cache)
    with pytest.raises(QuantCacheError, match=r"on 88 tokens takes input_ids of shape \[2, 1\], got \[2, 3\]"):
        step(tokens(3))
    with pytest.raises(QuantCacheError, match=r"takes attention_mask of shape \[2, 89\], got \[2, 5\]"):
        step(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(QuantCacheError, match=r"takes position_ids of shape \[2, 1\], got \[2, 2\]"):
        step(ids, position_ids=torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(QuantCacheError, match="for 1 rows, the cache holds 2"):
        step(ids[:1])
    with pytest.raises(GraphCaptureError, match="layer 0 has encoded nothing yet: it holds 20 tokens"):
        DecodeGraph(model(), filled(20))(ids)
    padded = filled(length, (0, 7))
    with pytest.raises(
        GraphCaptureError, match="the cuda backend does not serve this step: a query attends to padding"
    ):
        DecodeGraph(model(), padded)(ids)
    assert padded.get_seq_length() == length
    for layer in padded.spectral_layers:
        layer.backend = "torch"
    with pytest.raises(
        GraphCaptureError, match="attention by the torch backend depends on lengths that the host knows"
    ):
        DecodeGraph(model(), padded)(ids)
    with pytest.raises(TypeError, match="DecodeGraph needs a SpectralCache, got DynamicCache"):
        DecodeGraph(model(), DynamicCache())
    config = model().config
    with monkeypatch.context() as patch:
        patch.setattr(config, "_attn_implementation", "sdpa")
        with pytest.raises(GraphCaptureError, match='the model attends by sdpa, not by "spectral"'):
            DecodeGraph(model(), cache)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "updating", 1 + threading.get_ident(), raising=False)
        patch.setattr(threading, "enumerate", lambda: [SimpleNamespace(ident=cache.updating)])
        with pytest.raises(QuantCacheError, match="another thread is changing the cache"):
            step(ids)
    step(ids)
    with torch.inference_mode():  # whose tensors may not be written to once it is over
        step(ids)
    step(ids)
    step(ids)
    assert cache.get_seq_length() == length + 4


@pytest.mark.slow
def test_generate_takes_its_steps_from_graphs(emulated: list[Again], caplog: pytest.LogCaptureFixture) -> None:
    length = 4 + BLOCK + 66
    prompt, mask = tokens(length), torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    config = model().config
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}

    def made(backend: str) -> SpectralCache:
        return SpectralCache(scalar_calibration(config, 3), config, residual_length=4, backend=backend)

    with decode_graphs(model()) as same:
        assert same is model()
        assert copy.deepcopy(model()).forward.__func__ is type(model()).forward, "a copy is another model's"
        cache = made("cuda")
        found = model().generate(prompt, past_key_values=cache, **given)
        assert len(emulated) == 1
        step = model().forward.steps[cache]
        assert step is not None
        assert len(cache.spectral_layers[0].spans) == 2
        gone = weakref.ref(cache)
        del cache, step
        gc.collect()
        assert gone() is None, "a graph keeps no cache"
        with caplog.at_level(logging.WARNING, logger="quantcache.cache.graphs"):
            for _ in range(2):
                model().generate(prompt, past_key_values=made("torch"), **(given | {"max_new_tokens": 2}))
        assert [record.getMessage() for record in caplog.records] == [
            "decoding without CUDA graphs: attention by the torch backend depends on lengths that the host knows"
        ]
    assert "forward" not in vars(model())
    assert len(emulated) == 1
    expected = model().generate(prompt, past_key_values=made("cuda"), **given)
    assert torch.equal(found, expected)


@pytest.mark.support("decoding steps that a CUDA graph can repeat, emulated")
@pytest.mark.parametrize("padding", [None, (), (0, 7)])
@pytest.mark.parametrize("in_generate", [False, True])
def test_no_step_between_two_blocks_waits(
    emulated: list[Again], monkeypatch: pytest.MonkeyPatch, padding: tuple[int, ...] | None, in_generate: bool
) -> None:
    length = 4 + BLOCK + 8
    cache = filled(length, padding or ())
    mask, ids = torch.ones(2, length + 4, dtype=torch.long), tokens(length + 4)
    for row, pad in enumerate(padding or ()):
        mask[row, :pad] = 0
    positions = mask.cumsum(-1) - 1
    with torch.no_grad(), decode_graphs(model()), monkeypatch.context() as patch:  # undone before the emulation is
        patch.setitem(codes.LOADERS, "cpu", emulation.Launches())
        forward, step = model().forward, DecodeGraph(model(), cache)
        for here in range(length, length + 4):
            given = {"input_ids": ids[:, here : here + 1]}
            if padding is not None:
                given |= {"attention_mask": mask[:, : here + 1], "position_ids": positions[:, here : here + 1]}
            # What is padding may be looked at when a block has been encoded; the next step is captured.
            with watched() if here > length else nullcontext():
                _ = forward(**given, past_key_values=cache, use_cache=True) if in_generate else step(**given)
    assert len(emulated) == 1
    assert cache.get_seq_length() == length + 4


def test_a_step_is_captured_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another one, torch would capture nothing, and a replay leave the logits as they were."""
    current = [0]
    streams: list[torch.device] = []
    captured: list[tuple[Any, ...]] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    @contextmanager
    def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        captured.append((stream.index, current[0], pool))
        yield

    def stream(device: torch.device) -> torch.device:
        streams.append(device)
        return device

    fakes = {"device": device, "graph": graph, "Stream": stream, "CUDAGraph": SimpleNamespace}
    for name, fake in {**fakes, "current_stream": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    stages._capturing.cache_clear()
    earlier = SimpleNamespace(pool=lambda: "pool")
    for given, index in ((None, 1), (earlier, 1), (None, 0)):
        _, found = stages.recorded(lambda: torch.tensor(current), given, torch.device("cuda", index))
        assert found.tolist() == [index]
    assert current == [0]
    assert captured == [(1, 1, None), (1, 1, "pool"), (0, 0, None)]
    assert len(streams) == 2, "captures share memory on one stream only"
    stages._capturing.cache_clear()


def test_threads_capture_one_after_the_other_and_may_allocate_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """During a capture CUDA fails in every thread what it forbids: another capture, and by default allocations."""
    modes: list[str] = []
    under_way = threading.Semaphore(1)

    @contextmanager
    def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert under_way.acquire(blocking=False), "a thread captures beside another"
        modes.append(capture_error_mode)
        yield
        under_way.release()

    fakes = {"device": nullcontext, "graph": graph, "Stream": lambda device: device, "CUDAGraph": SimpleNamespace}
    for name, fake in {**fakes, "current_stream": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    stages._capturing.cache_clear()
    begun = threading.Barrier(3)

    def capture(number: int) -> Tensor:
        def step() -> Tensor:
            time.sleep(0.05)
            return torch.tensor(number)

        begun.wait()
        return stages.recorded(step, None, torch.device("cuda", 0))[1]

    with ThreadPoolExecutor(3) as threads:
        assert [found.item() for found in threads.map(capture, range(3))] == [0, 1, 2]
    assert modes == ["thread_local"] * 3
    stages._capturing.cache_clear()


def test_a_capture_that_cuda_ends_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph raises what the end of such a capture does before it gives back the stream."""
    current = ["of before"]

    class Capture:
        def __init__(self, graph: Any, stream: str, **given: Any):
            self.stream = stream

        def __enter__(self) -> None:
            current[0] = self.stream

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def waits() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    fakes: dict[str, Any] = {
        "device": nullcontext,
        "graph": Capture,
        "Stream": lambda device: "of captures",
        "CUDAGraph": SimpleNamespace,
        "current_stream": lambda device: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(stages, "_failed", [])
    stages._capturing.cache_clear()
    with pytest.raises(GraphCaptureError, match="the step cannot be captured: RuntimeError: operation failed due to"):
        stages.recorded(waits, None, torch.device("cuda", 0))
    assert current == ["of before"]
    assert len(stages._failed) == 1, "torch's allocator still asks it"
    stages._capturing.cache_clear()


def test_a_model_that_cannot_be_captured_is_not_captured_again(
    emulated: list[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[torch.device] = []

    def recorded(step: Callable[[], Tensor], earlier: Any, device: torch.device) -> Any:
        attempts.append(device)
        raise GraphCaptureError("the step cannot be captured") from RuntimeError("it waits")

    monkeypatch.setattr(stages, "recorded", recorded)
    length = 4 + BLOCK + 20
    ids = tokens(length + 3)[:, length:]
    with torch.no_grad(), decode_graphs(model()):
        for _ in range(2):
            cache = filled(length)
            for i in range(3):
                model()(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            assert cache.get_seq_length() == length + 3
    assert len(attempts) == 1, "torch keeps the memory of every capture that has failed"
