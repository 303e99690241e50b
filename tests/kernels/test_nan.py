"""NaN and infinity come out of every kernel where they come out of plain torch, and of dense attention."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantcache.attention.function import dense_attention, spectral_attention
from quantcache.backends import BackendName
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.packing import BLOCK
from tests.kernels.cases import KERNELS, Case, Filled, Kernel, causal_mask, replace, select, shared

pytestmark = pytest.mark.support("NaN and infinity in keys or values")

ROWS, QUERIES = 2, 3
TOKENS = 4 + 2 * BLOCK + 40
BASE = Case(tokens=TOKENS, heads=2, groups=2, queries=QUERIES, pads=(0, 0), widths=3)
BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.fixture(params=[name for name in KERNELS if name.startswith("cpu")])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """One instruction set of the CPU kernels, in use."""
    found = KERNELS[request.param]
    if missing := found.missing():
        pytest.skip(missing)
    undo = select(found)
    yield found
    undo()


def kinds(x: Tensor) -> Tensor:
    """0 for finite numbers, 1 for NaN, 2 and 3 for the infinities."""
    return x.isnan() + 2 * (x == float("inf")) + 3 * (x == -float("inf"))


def plant(layer: SpectralLayer, query: Tensor, what: str, bad: float) -> None:
    """Make one element of the second row bad."""
    if what == "query":
        query[1, 2, 1, 5] = bad
        return
    side, part = what.split()
    held = layer.tails if part in ("past", "own") else layer.sinks
    token = {"past": 3, "own": -2, "sink": 2}[part]
    held[side] = held[side].clone()
    held[side][1, 0, token, 5] = bad


WHAT = ("query", *(f"{side} {part}" for side in ("key", "value") for part in ("sink", "past", "own")))

CASES = (
    BASE,
    replace(BASE, softcap=3.0),
    replace(BASE, sinks=True, dim=40, value_dim=72),
    replace(BASE, dtype=torch.bfloat16, widths=0),
    replace(BASE, rope="none"),
)
"""Soft cap, sink logits, half precision, no codes, and dimensions that do not fill a vector."""


@functools.cache
def planted(case: Case, what: str, bad: float) -> Filled:
    """A case with one bad element: leave it as you found it."""
    found = copy.deepcopy(shared(case))
    plant(found.layer, found.query, what, bad)
    return found


def attend(found: Filled, case: Case, mask: Tensor | None, backend: BackendName) -> Tensor:
    """Attention with one backend."""
    found.layer.backend = backend
    view = found.layer.snapshot()
    return spectral_attention(found.query, view, mask, softcap=case.softcap, s_aux=found.s_aux)


@functools.cache
def expected(case: Case, what: str, bad: float, holes: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """A mask, plain torch's output and that of dense attention."""
    found, mask = planted(case, what, bad), causal_mask(TOKENS, QUERIES, (0, 0))
    if holes:
        mask = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.7)
    view = found.layer.snapshot()
    dense = dense_attention(
        found.query, view.dense("key"), view.dense("value"), mask, softcap=case.softcap, s_aux=found.s_aux
    )
    given = mask if holes else None
    return given, attend(found, case, given, "torch"), dense


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", WHAT)
def test_they_are_where_dense_attention_has_them(kernel: Kernel, what: str, bad: float) -> None:
    for case in CASES:
        for holes in (False, True):
            mask, plain, dense = expected(case, what, bad, holes)
            ours = attend(planted(case, what, bad), case, mask, kernel.backend)
            assert torch.equal(kinds(ours), kinds(plain)), case
            assert ours[0].isfinite().all(), "one row's is no other row's"
            if what == "query" and case.softcap:
                continue  # in the codes' coordinates infinity is NaN before the soft cap makes it finite
            assert torch.equal(ours.isfinite(), dense.isfinite()), case
            if what != "query" and not (what.startswith("key") and bad == -float("inf")):
                assert not ours[1].isfinite().all() or case.softcap, case


@pytest.mark.parametrize("bad", BAD)
def test_hidden_tokens_count_as_in_dense_attention(kernel: Kernel, bad: float) -> None:
    """What nobody sees: a NaN value makes every output NaN (0 times NaN), as it does in torch; a key likewise."""
    for what in ("key past", "value past", "key sink", "value sink"):
        found = planted(BASE, what, bad)
        mask = torch.ones(1, 1, QUERIES, TOKENS, dtype=torch.bool)
        mask[..., : 4 + 2 * BLOCK + 9] = False
        view = found.layer.snapshot()
        dense = dense_attention(found.query, view.dense("key"), view.dense("value"), mask)
        plain, ours = (attend(found, BASE, mask, backend) for backend in ("torch", kernel.backend))
        assert torch.equal(kinds(ours), kinds(plain)), what
        assert torch.equal(ours.isfinite(), dense.isfinite()), what


@pytest.mark.parametrize("bad", BAD)
def test_queries_that_see_nothing_and_bad_sink_logits(kernel: Kernel, bad: float) -> None:
    found = copy.deepcopy(shared(BASE))
    query = found.query.clone()
    query[1, 2, 1, 5] = bad
    logits = torch.randn(4)
    logits[1] = bad
    mask = torch.zeros(1, 1, QUERIES, TOKENS, dtype=torch.bool)
    for given, sees, s_aux in ((query, mask, None), (found.query, None, logits), (query, mask, logits)):
        found.layer.backend = "torch"
        plain = spectral_attention(given, found.layer.snapshot(), sees, s_aux=s_aux)
        found.layer.backend = kernel.backend
        ours = spectral_attention(given, found.layer.snapshot(), sees, s_aux=s_aux)
        assert torch.equal(kinds(ours), kinds(plain))
