"""Attention on the tokens that are not encoded, and how new ones join them: the CUDA kernels on an emulated warp."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quantcache_kernels.cuda import calls
from quantcache_kernels.cuda.near import MAX_SPLITS, NEAR_THREADS, NEAR_TOKENS, NearTokens, append_arguments
from quantcache_kernels.cuda.places import Blocks, Starts
from quantcache_kernels.cuda.structures import Queries, Rows, TakeArguments, pointer
from tests.kernels import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        held: Tokens of the tail.
        room: Tokens that it has room for.
        sinks: Sinks of every row.
        dim: D.
        value_dim: Dv.
        groups: Query heads of a head.
        count: Queries.
        pads: Left padding of every row.
        causal: Whether a query sees only what precedes it.
        mask: Whether there is a mask, with random holes.
        softcap: Soft cap of the scores.
        logits: Dtype of sink logits, if there are any.
        dtype: Of the queries.
        encoded_end: Slot behind the last block.
    """

    held: int = 40
    room: int = 128
    sinks: int = 4
    dim: int = 64
    value_dim: int = 64
    groups: int = 3
    count: int = 1
    pads: tuple[int, ...] = (0,)
    causal: bool = True
    mask: bool = False
    softcap: float | None = None
    logits: torch.dtype | None = None
    dtype: torch.dtype = torch.bfloat16
    encoded_end: int = 196


BASE = Case()

CASES = {
    "base": BASE,
    "full": replace(BASE, held=128),
    "one-token": replace(BASE, held=1, sinks=0),
    "more-rounds-than-splits": replace(BASE, held=MAX_SPLITS * NEAR_TOKENS + 70, room=MAX_SPLITS * NEAR_TOKENS + 300),
    "many-sinks": replace(BASE, sinks=70),
    "queries": replace(BASE, count=5, held=70),
    "queries-that-see-all": replace(BASE, count=3, causal=False),
    "queries-in-float32": replace(BASE, count=2, dtype=torch.float32),
    "D16-Dv256": replace(BASE, dim=16, value_dim=256, groups=8),
    "D256-Dv80": replace(BASE, dim=256, value_dim=80, groups=2),
    "padded": replace(BASE, pads=(0, 7, 195)),
    "padded-to-the-tail": replace(BASE, pads=(0, 230), count=2, mask=True),
    "mask": replace(BASE, count=3, mask=True, pads=(0, 0)),
    "softcap": replace(BASE, softcap=1.5),
    "softcap-logits": replace(BASE, softcap=1.5, logits=torch.float32, count=2),
    "logits": replace(BASE, logits=torch.bfloat16, held=128, mask=True),
}


@dataclass
class Inputs:
    """What a case's seed gives; behind the tail's tokens lies NaN."""

    case: Case
    query: Tensor
    near: NearTokens
    mask: Tensor | None
    logits: Tensor | None

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """Draw them."""
        random = torch.Generator().manual_seed(5)
        batch, heads = len(case.pads), 2

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        query = (2 * drawn(batch, case.count, heads * case.groups, case.dim)).to(case.dtype).transpose(1, 2)
        sinks = [drawn(batch, heads, case.sinks, dim).bfloat16() for dim in (case.dim, case.value_dim)]
        tails = [drawn(case.room, batch, heads, dim).bfloat16() for dim in (case.dim, case.value_dim)]
        for tail in tails:
            tail[case.held :] = torch.nan
        tokens = torch.tensor([case.held], dtype=torch.int32)
        near = NearTokens(*sinks, *(tail.permute(1, 2, 0, 3) for tail in tails), tokens)
        mask = None
        if case.mask:
            slots = torch.arange(case.encoded_end + case.room)
            shown = (slots >= torch.tensor(case.pads)[:, None])[:, None].expand(-1, case.count, -1)
            mask = (shown & (torch.rand(shown.shape, generator=random) < 0.7))[:, None].contiguous()
            mask[0, :, 0] = False  # a query that may look at nothing
        logits = None if case.logits is None else drawn(heads * case.groups).to(case.logits)
        return cls(case, query, near, mask, logits)

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """In plain torch: ``[B, H, R, Dv]``, and the logarithm of the sum of exponentials, base 2."""
        case, (key_sinks, value_sinks, key_tail, value_tail) = self.case, self.near.parts
        batch, count = len(case.pads), case.count
        query = self.query.to(dtype).unflatten(1, (2, -1)).flatten(2, 3) * case.dim**-0.5
        keys = torch.cat((key_sinks, key_tail[:, :, : case.held]), dim=2).to(dtype)
        values = torch.cat((value_sinks, value_tail[:, :, : case.held]), dim=2).to(dtype)
        scores = query @ keys.transpose(-1, -2)
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        sinks = torch.tensor(case.pads)[:, None] + torch.arange(case.sinks)
        tail = torch.arange(case.encoded_end, case.encoded_end + case.held).expand(batch, -1)
        slots = torch.cat((sinks, tail), dim=1)
        seen = torch.cat((sinks < case.encoded_end, torch.ones_like(tail, dtype=torch.bool)), dim=1)[:, None]
        if self.mask is not None:
            seen = seen & self.mask[:, 0].gather(2, slots[:, None].expand(-1, count, -1))
        elif case.causal:
            own = torch.arange(case.held - count, case.held) + case.encoded_end
            seen = seen & (slots[:, None] <= own[:, None])
        seen = seen.expand(-1, count, -1)[:, None].repeat(1, 1, case.groups, 1)
        scores = scores.masked_fill(~seen, -math.inf)
        if self.logits is not None:
            logits = self.logits.to(dtype).view(1, 2, -1, 1).repeat_interleave(count, dim=2)
            scores = torch.cat((scores, logits.expand(batch, -1, -1, -1)), dim=-1)
        dead = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores, dim=-1).masked_fill(dead, 0.0)[..., : keys.shape[2]]
        return weights @ values, scores.logsumexp(-1) / math.log(2)

    def found(self) -> tuple[Tensor, Tensor]:
        """By the kernel, its splits merged."""
        case, near = self.case, self.near
        batch, heads, total = len(case.pads), 2, case.groups * case.count
        chunks = -(-total // calls.ROWS)
        place = Rows(heads, chunks, -(-total // chunks), case.count, total)
        lines, shape = batch * chunks * heads, (batch, chunks, heads, place.rows)
        out = torch.full((near.splits, *shape, case.value_dim), torch.nan)
        lse = torch.full((near.splits, *shape), torch.nan)
        origins = torch.tensor(case.pads, dtype=torch.int32) if any(case.pads) else None
        half = self.query.dtype == torch.bfloat16
        queries = Queries(self.query.data_ptr(), *self.query.stride()[:3], place, half, case.dim**-0.5)
        starts = None if origins is None else Starts(origins, origins)
        nothing = torch.zeros(0, 3, dtype=torch.int32)
        places = Blocks([nothing] * 4, nothing, starts, case.encoded_end, True).places(near, 0)
        addresses = tuple(map(pointer, (near.tail_tokens, self.mask, self.logits, out, lse)))
        given = near.arguments(queries, places, (None, *addresses))
        given.lines, given.softcap = lines, case.softcap or 0.0
        given.causal = case.causal and self.mask is None and case.count > 1
        if self.mask is not None:
            given.mask_batch, given.mask_query, given.mask_length = calls.mask_strides(self.mask)
        given.logits_are_bfloat16 = case.logits == torch.bfloat16
        blocks = near.splits * lines
        kernel = emulation.emulated(CPU, False, False)["take_queries"]
        taken = TakeArguments(near=given, near_blocks=blocks)
        kernel.launch((blocks, 1), NEAR_THREADS, near.shared_bytes(place.rows), taken, 0)
        shares = torch.softmax(lse.double() * math.log(2), dim=0)
        merged, lse = (shares[..., None] * out).sum(0), lse.double().mul(math.log(2)).logsumexp(0) / math.log(2)
        return tuple(each.transpose(1, 2).flatten(2, 3)[:, :, :total] for each in (merged, lse))


@pytest.mark.parametrize("name", CASES)
def test_weights_and_sums_are_those_of_plain_torch(name: str) -> None:
    inputs = Inputs.of(CASES[name])
    expected, lse = inputs.exact(torch.float64)
    (own, own_lse), (found, found_lse) = inputs.exact(torch.float32), inputs.found()
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 2 * float((own - expected).norm()) + 1e-6 * float(expected.norm())
    nothing = lse == -math.inf
    assert bool((found[nothing] == 0).all())
    assert bool((found_lse[nothing] < -5e28).all()), "less than anything that is seen"
    rest = ~nothing
    allowed = 2 * (own_lse - lse)[rest].norm() + 1e-6 * lse[rest].norm()
    assert float((found_lse - lse)[rest].norm()) <= float(allowed)


def test_what_is_hidden_may_be_anything() -> None:
    inputs = Inputs.of(replace(BASE, count=2, mask=True, pads=(0, 0)))
    assert inputs.mask is not None
    inputs.mask[1, :, :, 3] = inputs.mask[1, :, :, BASE.encoded_end + 9] = False
    right = inputs.found()
    for part, token in zip(inputs.near.parts, (3, 3, 9, 9), strict=True):
        part[1, :, token] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(inputs.found(), right, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_seen_is_not_lost(bad: float) -> None:
    for part, token in enumerate((2, 2, 9, 9)):
        inputs = Inputs.of(replace(BASE, pads=(0, 0)))
        right = inputs.found()[0]
        inputs.near.parts[part][1, 0, token, 5] = bad
        found, expected = inputs.found()[0], inputs.exact(torch.float32)[0]
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found[0], right[0])


@pytest.mark.parametrize("count", [1, 3])
def test_new_tokens_go_where_the_device_says(count: int) -> None:
    random = torch.Generator().manual_seed(1)
    made = torch.randn(2, count, 3, 96, generator=random).bfloat16()
    key, value = made[..., :64].transpose(1, 2), made[..., 64:].transpose(1, 2)  # as projections leave them
    empty = torch.empty(2, 3, 0, 64).bfloat16(), torch.empty(2, 3, 0, 32).bfloat16()
    memory = [torch.full((70, 2, 3, dim), 7.0).bfloat16() for dim in (64, 32)]
    tokens = torch.tensor([count], dtype=torch.int32)
    near = NearTokens(*empty, *(each.permute(1, 2, 0, 3) for each in memory), tokens)
    nothing = torch.zeros(0, 3, dtype=torch.int32)
    places = Blocks([nothing] * 4, nothing, None, 0, True).places(near, 0)
    there = torch.frombuffer(bytearray(places), dtype=torch.uint8)
    given = append_arguments(key, value, near, there.data_ptr())
    kernel = emulation.emulated(CPU, False, False)["append_tail"]
    for held in (0, 11, 70 - count, 70):
        before = [each.clone() for each in memory]
        tokens.fill_(held + count)
        kernel.launch((given.vectors, 2), 32, 0, given, 0)
        for tokens_of, old, new in zip(memory, before, (key, value), strict=True):
            if held + count <= 70:
                old[held : held + count] = new.permute(2, 0, 1, 3)
            assert torch.equal(tokens_of, old), "nothing is written behind the room there is"
