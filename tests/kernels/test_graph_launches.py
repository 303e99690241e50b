"""What the steps of a CUDA graph launch: always the same, and it serves however many blocks come on the way.

There is no GPU here: kernels run on an emulated warp, or not at all where only their arguments count.
"""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.attention.function import spectral_attention_forward
from quantcache.cache import stages
from quantcache.coding.packing import BLOCK
from quantcache_kernels.cuda import codes
from quantcache_kernels.cuda.driver import CODE_KERNELS
from tests.kernels import emulation
from tests.kernels.test_graphs import Again, filled, model, same_tokens
from tests.kernels.test_graphs import emulated as emulated
from tests.kernels.test_waiting import watched

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")


@pytest.mark.support("decoding steps that a CUDA graph can repeat, emulated")
@pytest.mark.parametrize("padding", [(), (0, 7)])
def test_all_steps_launch_the_same(
    emulated: list[Again], monkeypatch: pytest.MonkeyPatch, padding: tuple[int, ...]
) -> None:
    length = 4 + BLOCK + 4
    cache = filled(length, padding)
    layers, launches = cache.spectral_layers, emulation.Launches(["set_places"])
    assert [layer.tails["key"].shape[2] for layer in layers] == [4] * len(layers), "a block has just been encoded"
    period = stages.Period(model(), cache, bool(padding))
    heads, dim = model().config.num_key_value_heads, model().config.head_dim
    key, value = (torch.randn(2, 1, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    query = torch.randn(2, 1, 2 * heads, dim, dtype=torch.bfloat16).transpose(1, 2)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    if padding:
        period.mask[1, :, :, :7] = False

    def step() -> list[tuple[Any, ...]]:
        launches.clear()
        longer = period.claimed()
        assert longer is not None
        period.counts.add_(1)
        with operations, watched() if step_one else nullcontext():
            for index in range(len(layers)):
                given = period.cache.update(key, value, index)
                spectral_attention_forward(module, query, *given, period.mask, dim**-0.5)
        period.note(longer)
        return list(launches.seen)

    operations, step_one = emulation.Operations(), None
    with torch.no_grad():
        codes.LOADERS["cpu"] = launches
        assert len(step()) == 5 * len(layers), "the first ones say once where everything lies"
        operations.seen.clear()
        for number in range(1, 2 * BLOCK + 3):
            if number % BLOCK == 0:
                assert period.counts.tolist() == [layer.tails["key"].shape[2] for layer in layers]
                assert period.claimed() is None, "the next block is due"
                before = [weakref.ref(layer.stores["key"].buffers["codes"]) for layer in layers]
                for layer in layers:
                    for tail in layer.tails.values():
                        tail.zero_()  # no launch has brought tokens
                    layer.flush()
                launches.clear()
                assert period.follow(cache)
                assert [name for name, *_ in launches.seen] == ["set_places"] * len(layers), "it says so again"
                gc.collect()
                assert all(old() is None for old in before), "storage that has been outgrown is given back"
            found = step()
            assert len(found) == 4 * len(layers), "a token, queries and other tokens, codes, their merge"
            step_one = step_one or found
            assert found == step_one, f"step {number} launches something else"
    assert operations.seen == [], "torch does nothing, so it allocates nothing"
    assert len(layers[0].spans) == 3


@pytest.mark.slow
@pytest.mark.support("decoding steps that a CUDA graph can repeat, emulated")
@pytest.mark.parametrize("padding", [(), (0, 7)])
def test_what_was_launched_before_a_block_serves_what_comes_behind_it(
    emulated: list[Again], padding: tuple[int, ...]
) -> None:
    """Kernels are given nothing but what they were given in the second step, however many blocks there are since."""
    cache = filled(4 + BLOCK + 66, padding)
    twin, layers, launches = copy.deepcopy(cache), cache.spectral_layers, emulation.Launches(CODE_KERNELS)
    period = stages.Period(model(), cache, bool(padding))
    heads, dim = model().config.num_key_value_heads, model().config.head_dim
    key, value = (torch.zeros(2, heads, 1, dim, dtype=torch.bfloat16) for _ in range(2))
    query = torch.zeros(2, 2 * heads, 1, dim, dtype=torch.bfloat16)
    generator, module = torch.Generator().manual_seed(1), torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    if padding:
        period.mask[1, :, :, :7] = False

    def attended(one: Any, index: int, mask: Tensor | None) -> Tensor:
        return spectral_attention_forward(module, query, *one.update(key, value, index), mask, dim**-0.5)[0]

    outputs: list[Tensor] = []
    prompts = {4: 70, 6: 280}  # tokens that come in between, before a step: 1 and 3 blocks more
    with torch.no_grad():
        for number in range(8):
            if number in prompts:
                new = [torch.randn(2, heads, prompts[number], dim, generator=generator).bfloat16() for _ in range(2)]
                for layer in (*layers, *twin.spectral_layers):
                    layer.update(*new)
                    layer.flush()
            longer = period.claimed()
            assert (longer is None) == (number in (2, *prompts)), number
            if longer is None:
                assert period.follow(cache)
                longer = period.claimed()
            assert longer is not None
            for each in (key, value, query):
                each.copy_(torch.randn(each.shape, generator=generator))
            period.counts.add_(1)
            if number < 2:
                launches.clear()
                codes.LOADERS["cpu"] = launches
                outputs = [attended(period.cache, index, period.mask) for index in range(len(layers))]
                codes.LOADERS["cpu"] = emulation.emulated
            else:
                launches.replay()
            period.note(longer)
            shown = period.mask[..., : cache.get_seq_length()] if padding else None
            for index, output in enumerate(outputs):
                assert torch.equal(output, attended(twin, index, shown)), number
            for layer in (*layers, *twin.spectral_layers):
                layer.flush()
    assert len(layers[0].spans) == 7
    same_tokens(cache, twin)
