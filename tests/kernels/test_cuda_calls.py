"""Prepared calls of the CUDA kernels, on an emulated warp: what steps change, and what nobody may share or keep."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from quantcache.backends import cuda, cuda_blocks
from quantcache.backends.reference import REFERENCE
from quantcache.backends.view import CacheView
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.packing import BLOCK
from quantcache_kernels.cuda import calls, room
from quantcache_kernels.cuda import codes as kernels
from quantcache_kernels.cuda.near import NEAR_TOKENS, NearTokens
from quantcache_kernels.cuda.places import Blocks
from quantcache_kernels.interface import AttentionCall
from tests.kernels.cases import Case, fill, on_device
from tests.kernels.test_cuda_blocks import CUDA, emulated, in_bfloat16  # noqa: F401


@pytest.fixture
def layer(emulated: None) -> SpectralLayer:  # noqa: F811
    """A layer of two blocks and a tail, whose attention is emulated."""
    filled = fill(in_bfloat16(Case(tokens=180, heads=2, sink_length=4, coding=("trellis", "trellis"))))
    return on_device(filled.layer, CUDA)


def attend(view: CacheView, query: Tensor, call: AttentionCall, anew: bool = False) -> Tensor:
    """One call on a view, which has been prepared before or is prepared anew."""
    blocks = cuda._blocks(view)
    if anew:
        blocks = Blocks(blocks.packed, blocks.table, blocks.starts, blocks.end, blocks.paired)
    sides = (cuda_blocks.prepared(side.codec) for side in (view.key, view.value))
    return kernels.attend(query, blocks, NearTokens(*view.dense_parts()), *sides, call)


def test_a_step_says_what_it_changes(layer: SpectralLayer) -> None:
    torch.manual_seed(0)
    batch, heads, _, dim = layer.tails["key"].shape
    prepared = None
    for step, more in enumerate((1, 1, NEAR_TOKENS)):  # the last of them takes another split
        layer.update(*(torch.randn(batch, heads, more, dim, dtype=torch.bfloat16) for _ in range(2)))
        view = layer.snapshot()
        query = torch.randn(batch, 1, 2 * heads, dim + 8 * step, dtype=torch.bfloat16)[..., :dim].transpose(1, 2)
        masks = (torch.rand(rows, 1, 1, view.length + step) < 0.7 for rows in (1, batch))
        for mask in (None, *masks):
            call = AttentionCall(mask, 0.1)
            assert torch.equal(attend(view, query, call), attend(view, query, call, anew=True))
        found = cuda._blocks(view).calls
        assert len(found) == 2, "with a mask and without"
        assert prepared is None or found == prepared
        prepared = found


def test_a_call_under_way_is_nobody_elses(layer: SpectralLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    view, call = layer.snapshot(), AttentionCall(None, 0.1)
    batch, heads, _, dim = layer.tails["key"].shape
    one, other = torch.randn(2, batch, heads, 1, dim).bfloat16()
    alone = [attend(view, query, call, anew=True) for query in (one, other)]
    launch, within = calls.PreparedCall.launch, []

    def interrupted(self: calls.PreparedCall, query: Tensor, *given: object) -> Tensor:
        if query is one:
            within.append(attend(view, other, call))  # as another thread would
        return launch(self, query, *given)

    attend(view, other, call)
    monkeypatch.setattr(calls.PreparedCall, "launch", interrupted)
    assert torch.equal(attend(view, one, call), alone[0])
    assert torch.equal(within[0], alone[1])


def test_what_is_prepared_goes_with_its_blocks(layer: SpectralLayer) -> None:
    batch, heads, _, dim = layer.tails["key"].shape
    view = layer.snapshot()
    attend(view, torch.randn(batch, heads, 1, dim).bfloat16(), AttentionCall(None, 0.1))
    held = weakref.ref(cuda._blocks(view))
    gc.disable()
    try:
        del view
        layer.update(*(torch.randn(batch, heads, 2 * BLOCK, dim).bfloat16() for _ in range(2)))
        layer.flush()
        layer.snapshot()
        assert held() is None, "it would hold the memory of blocks that have moved, until somebody collects garbage"
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sink_logits_of_any_dtype_are_taken(layer: SpectralLayer, dtype: torch.dtype) -> None:
    batch, heads, _, dim = layer.tails["key"].shape
    query, logits = torch.randn(batch, 2 * heads, 1, dim).bfloat16(), torch.randn(2 * heads).to(dtype)
    found, expected = (
        attend(layer.snapshot(), query, AttentionCall(None, 0.1, sink_logits=each)) for each in (logits, logits.float())
    )
    assert torch.equal(found, expected)


def test_there_may_be_nothing_but_blocks(emulated: None) -> None:  # noqa: F811
    filled = fill(in_bfloat16(Case(tokens=2 * BLOCK, sink_length=0)))
    view = on_device(filled.layer, CUDA).snapshot()
    assert view.key.tail.shape[2] == 0
    call = AttentionCall(None, 0.1)
    found, expected = attend(view, filled.query, call), REFERENCE.attend(filled.query, filled.layer.snapshot(), call)
    assert float((found.double() - expected.double()).norm()) <= 0.01 * float(expected.double().norm())


@pytest.mark.parametrize("queries", [3, 5])
def test_queries_are_turned_to_as_many_anchors_as_there_are(
    queries: int,
    emulated: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On few processors a block of threads goes over several groups of them."""
    filled = fill(in_bfloat16(Case(tokens=1100, heads=4, groups=1, widths=1, queries=queries)))
    view, call = on_device(filled.layer, CUDA).snapshot(), AttentionCall(None, 0.1, causal=False)
    device, found = room.device_of(torch.device("cpu")), []
    for processors in (1, 132):
        monkeypatch.setattr(room, "device_of", lambda _, n=processors: device._replace(processors=n))
        blocks = cuda._blocks(view)
        sides = (cuda_blocks.prepared(side.codec) for side in (view.key, view.value))
        found.append(kernels.attend(filled.query, blocks, NearTokens(*view.dense_parts()), *sides, call, splits=2))
        (prepared,) = blocks.calls.values()
        groups = -(-blocks.units // (calls.TURNED_ROWS >> (queries - 1).bit_length()))
        assert (prepared._turn_blocks < groups) == (processors == 1)
        blocks.calls.clear()
    assert torch.equal(*found)
