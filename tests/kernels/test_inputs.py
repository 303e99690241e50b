"""Tensors that attention and the CPU kernels cannot read as they come: expanded, resolved or refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.attention.function import dense_attention, spectral_attention, spectral_attention_forward
from quantcache.backends import AttentionCall
from quantcache.backends.cpu import constants as constants_of
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.codec import SpectralCodec
from quantcache.common.errors import QuantCacheError
from quantcache_kernels import cpu
from quantcache_kernels.cpu.library import find
from quantcache_kernels.triton import runtime
from tests.helpers import attend_by_kernel, implementation
from tests.kernels.cases import TRITON_DEVICE, Case, codecs, shared, vectors

ROOT = Path(__file__).resolve().parent.parent.parent

needs_library = pytest.mark.skipif(find()[0] is None, reason=f"no CPU kernels: {find()[1]}")
needs_triton = pytest.mark.skipif(
    TRITON_DEVICE.type != "cpu" or runtime.unavailable(TRITON_DEVICE) is not None, reason="Triton runs elsewhere or not"
)
every_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_library)])

ROWS, HEADS, QUERIES, TOKENS = 2, 4, 3, 172
CASE = Case(tokens=TOKENS, heads=2, groups=2, queries=QUERIES, pads=(0, 0))


def filled(backend: str = "torch", case: Case = CASE) -> tuple[SpectralLayer, Tensor]:
    """A layer of two blocks, and queries."""
    layer = deepcopy(shared(case).layer)
    layer.backend = backend
    return layer, shared(case).query.clone()


def random_mask(*shape: int) -> Tensor:
    """A boolean mask that lets every query see about half."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.5


# ---------------------------------------------------------------------- masks

SHAPES = {
    "all": (1, 1, 1, TOKENS),
    "rows": (ROWS, 1, 1, TOKENS),
    "queries": (1, 1, QUERIES, TOKENS),
    "heads": (1, HEADS, 1, TOKENS),
    "rows and heads": (ROWS, HEADS, 1, TOKENS),
    "keys": (ROWS, 1, QUERIES, 1),
    "2D": (QUERIES, TOKENS),
    "1D": (TOKENS,),
    "longer": (ROWS, 1, 1, TOKENS + 9),
}


@pytest.mark.support("masks that broadcast over rows, heads, queries or keys")
@every_backend
@pytest.mark.parametrize("name", SHAPES)
def test_masks_broadcast_as_in_torch(backend: str, name: str) -> None:
    layer, query = filled(backend)
    mask = random_mask(*SHAPES[name])
    whole = mask[..., :TOKENS].expand(ROWS, -1 if mask.dim() == 4 else 1, QUERIES, TOKENS).contiguous()
    found = spectral_attention(query, layer.snapshot(), mask)
    assert torch.equal(found, spectral_attention(query, layer.snapshot(), whole))
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for dtype in (torch.float32, torch.float64):
        layer.backend = "torch"
        plain = spectral_attention(query, layer.snapshot(), whole)
        assert torch.equal(spectral_attention(query, layer.snapshot(), additive.to(dtype)), plain)


@pytest.mark.support("masks that broadcast over rows, heads, queries or keys")
@pytest.mark.parametrize("name", SHAPES)
def test_masks_broadcast_before_anything_is_encoded(name: str) -> None:
    layer = SpectralLayer(lambda device, *_: codecs(CASE, device), None, 4, 1000)
    keys, values = layer.update(*vectors(CASE, TOKENS).values())
    query, mask = 0.2 * torch.randn(ROWS, HEADS, QUERIES, 64), random_mask(*SHAPES[name])
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    found = spectral_attention_forward(module, query, keys, values, mask)[0]
    dense = [x.materialize().repeat_interleave(2, 1) for x in (keys, values)]
    whole = mask[..., :TOKENS].expand(ROWS, HEADS, QUERIES, TOKENS)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *dense, attn_mask=whole)
    torch.testing.assert_close(found, expected.transpose(1, 2))


PAST, NEW = slice(0, TOKENS - QUERIES), slice(TOKENS - QUERIES, TOKENS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.support("masks that broadcast over rows, heads, queries or keys")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "all recent"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_additive_masks_are_of_any_dtype(dtype: torch.dtype, softcap: float | None, packed: bool) -> None:
    """torch's fused attention reads a float32 mask beside float64 queries as float64, and beyond its end."""
    layer = SpectralLayer(lambda device, *_: codecs(CASE, device), None, 4, 0 if packed else 1000)
    for part in (PAST, NEW):
        keys, values = layer.update(*(x[:, :, part].to(dtype) for x in vectors(CASE, TOKENS).values()))
        if part is PAST:
            layer.flush()
    assert bool(layer.spans) == packed
    query, mask = 0.2 * torch.randn(ROWS, HEADS, QUERIES, 64).to(dtype), random_mask(ROWS, 1, QUERIES, TOKENS)
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    expected = spectral_attention_forward(module, query, keys, values, mask, softcap=softcap)[0]
    for each in DTYPES:
        for least in (torch.finfo(each).min, float("-inf")):
            additive = torch.zeros(mask.shape, dtype=each).masked_fill(~mask, least)
            found = spectral_attention_forward(module, query, keys, values, additive, softcap=softcap)[0]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("softcap", [None, 1e6])
@pytest.mark.parametrize("kind", ["plain", "all recent", "packed", "gradients"])
def test_without_a_mask_the_last_query_sees_the_last_token(kind: str, softcap: float | None) -> None:
    """Torch's own causal mask counts from the first token."""
    layer = SpectralLayer(lambda device, *_: codecs(CASE, device), None, 4, 1000 if kind == "all recent" else 0)
    past, new = ({side: x[:, :, part] for side, x in vectors(CASE, TOKENS).items()} for part in (PAST, NEW))
    layer.update(**{f"{side}_states": x for side, x in past.items()})
    layer.flush()
    if kind == "gradients":
        new["value"].requires_grad_()
    keys, values = layer.update(*new.values())
    dense = [x.detach().clone() for x in (keys, values)]
    if kind == "plain":
        keys, values = dense
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    query, mask = 0.2 * torch.randn(ROWS, HEADS, QUERIES, 64), torch.ones(QUERIES, TOKENS, dtype=torch.bool)
    found = spectral_attention_forward(module, query, keys, values, None, softcap=softcap)[0]
    dense = [x.repeat_interleave(2, 1) for x in dense]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *dense, attn_mask=mask.tril(TOKENS - QUERIES))
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "too few queries": (lambda: random_mask(1, 1, 2, TOKENS), r"shape \[1, 1, 2, 172\], 3 queries"),
    "too many queries": (lambda: random_mask(1, 1, 5, TOKENS), r"shape \[1, 1, 5, 172\], 3 queries"),
    "another batch": (lambda: random_mask(3, 1, 1, TOKENS), r"shape \[3, 1, 1, 172\], .* of 2 rows"),
    "key/value heads": (lambda: random_mask(1, 2, 1, TOKENS), r"shape \[1, 2, 1, 172\], .* 4 heads"),
    "too few keys": (lambda: random_mask(1, 1, QUERIES, TOKENS - 1), r"171\], .* on 172 tokens"),
    "five dimensions": (lambda: random_mask(1, 1, 1, 1, TOKENS), r"shape \[1, 1, 1, 1, 172\]"),
    "integers": (lambda: torch.ones(1, 1, 1, TOKENS, dtype=torch.int64), r"torch.int64, it must be boolean"),
    "complex": (lambda: torch.ones(1, 1, 1, TOKENS, dtype=torch.complex64), r"torch.complex64, it must be boolean"),
    "meta": (lambda: random_mask(1, 1, 1, TOKENS).to("meta"), r"on meta, the queries are on cpu"),
}


@pytest.mark.support("masks that do not fit", refused=True)
@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_do_not_fit_are_refused_everywhere(name: str) -> None:
    make, message = REFUSED[name]
    layer, query = filled("auto")
    view = layer.snapshot()
    with pytest.raises(QuantCacheError, match=message):
        spectral_attention(query, view, make())
    with pytest.raises(QuantCacheError, match=message):
        dense_attention(query, view.dense("key"), view.dense("value"), make())
    assert attend_by_kernel(query, view, make()) is None
    fresh = SpectralLayer(lambda device, *_: codecs(CASE, device), None, 4, 1000)
    keys, values = fresh.update(*vectors(CASE, TOKENS).values())
    with pytest.raises(QuantCacheError, match=message):
        spectral_attention_forward(torch.nn.Module(), query, keys, values, make())


# ---------------------------------------------------------------------- queries, sink logits, soft cap, scaling


@pytest.mark.support("masks that do not fit", refused=True)
@every_backend
def test_queries_that_do_not_fit_are_refused(backend: str) -> None:
    layer, query = filled(backend)
    view = layer.snapshot()
    for wrong in (query[:1], query[:, :3], query[..., :32], query.to("meta"), query.long(), query[0]):
        with pytest.raises(QuantCacheError, match=r"the queries have shape .* the cache holds keys of 2 rows, 2 heads"):
            spectral_attention(wrong, view, None)
    assert spectral_attention(query[:, :, :0], view, None).shape == (ROWS, 0, HEADS, 64)


@every_backend
def test_sink_logits_soft_cap_and_scaling_are_checked(backend: str) -> None:
    layer, query = filled(backend)
    view, logits = layer.snapshot(), torch.randn(HEADS)
    plain = spectral_attention(query, view, None, s_aux=logits)
    assert not torch.equal(plain, spectral_attention(query, view, None))
    assert torch.equal(plain, spectral_attention(query, view, None, s_aux=logits.view(1, HEADS, 1, 1)))
    assert torch.equal(plain, spectral_attention(query, view, None, s_aux=logits, softcap=0.0))
    assert torch.equal(plain, spectral_attention(query, view, None, s_aux=logits, scaling=torch.tensor(0.125)))
    for wrong in (logits[:2], torch.randn(2 * HEADS), logits.to("meta"), logits.long()):
        with pytest.raises(QuantCacheError, match=r"the attention-sink logits have shape .* 4 query heads on cpu"):
            spectral_attention(query, view, None, s_aux=wrong)
    for cap in (-1.0, float("nan"), float("inf")):
        with pytest.raises(QuantCacheError, match="soft cap of scores must be a positive number or None, got"):
            spectral_attention(query, view, None, softcap=cap)
    with pytest.raises(QuantCacheError, match="factor of scores must be a finite number, got inf"):
        spectral_attention(query, view, None, scaling=float("inf"))


def test_gradients_of_sink_logits_are_not_lost() -> None:
    layer, query = filled("auto")
    logits = torch.randn(HEADS, requires_grad=True)
    spectral_attention(query, layer.snapshot(), None, s_aux=logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


# ---------------------------------------------------------------------- how tensors are stored


def conjugated(x: Tensor) -> Tensor:
    """The same values as the lazily negated imaginary part of a lazily conjugated tensor, with gaps between them."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def copies(x: Tensor) -> dict[str, Tensor]:
    """The same values, stored otherwise."""
    padded = torch.cat((x, x), dim=-1)
    found = {
        "gaps": torch.stack((x, x), dim=-1)[..., 0],
        "part": padded[..., : x.shape[-1]],
        "offset": padded.flatten()[x.shape[-1] :].as_strided(x.shape, padded.stride()),
    }
    if x.is_floating_point():
        found["negated"] = torch._neg_view(-x)
    if x.dtype == torch.float32:
        found["conjugated"] = conjugated(x)
    if x.dim() == 4:
        found["heads last"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    return found


@pytest.mark.support("lazily negated, strided and expanded tensors")
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_tensors_are_stored_makes_no_difference(backend: str, dtype: torch.dtype) -> None:
    layer, query = filled(backend, Case(**{**vars(CASE), "dtype": dtype}))
    view, logits, mask = layer.snapshot(), torch.randn(HEADS), random_mask(ROWS, 1, QUERIES, TOKENS)
    expected = spectral_attention(query, view, mask, s_aux=logits)
    assert all(torch.equal(copy, query) for copy in copies(query).values())
    for name, copy in copies(query).items():
        assert torch.equal(spectral_attention(copy, view, mask, s_aux=logits), expected), name
    for name, copy in copies(logits).items():
        assert torch.equal(spectral_attention(query, view, mask, s_aux=copy), expected), name
    for name, copy in copies(mask).items():
        assert torch.equal(spectral_attention(query, view, copy, s_aux=logits), expected), name
    one = query[:1, :1, :1].expand(query.shape)
    assert torch.equal(spectral_attention(one, view, mask), spectral_attention(one.clone(), view, mask))
    for name in copies(view.key.tail) if backend == "cpu" else ():  # torch's products round by how they are stored
        for side in (view.key, view.value):
            assert side.sinks is not None
            side.tail, side.sinks = copies(side.tail.clone())[name], copies(side.sinks.clone())[name]
        assert torch.equal(spectral_attention(query, view, mask, s_aux=logits), expected), name


@needs_triton
@pytest.mark.support("lazily negated, strided and expanded tensors")
@pytest.mark.support("masks that broadcast over rows, heads, queries or keys")
def test_how_tensors_are_stored_makes_no_difference_to_triton() -> None:
    layer, query = filled("triton", Case(tokens=69, dim=16, groups=2, queries=2, widths=1, theta=1.0))
    view, logits, mask = layer.snapshot(), torch.randn(2), random_mask(1, 1, 1, 69)
    expected = spectral_attention(query, view, mask.expand(1, 1, 2, 69).contiguous(), s_aux=logits)
    tail = view.key.tail
    for stored, given, sinks, seen in (
        (tail, copies(query)["negated"], copies(logits)["gaps"], mask),
        (copies(tail)["heads last"], copies(query)["gaps"], copies(logits)["negated"], copies(mask)["gaps"]),
    ):
        view.key.tail = stored
        assert torch.equal(spectral_attention(given, view, seen, s_aux=sinks), expected)


@pytest.mark.support("lazily negated, strided and expanded tensors")
@every_backend
@pytest.mark.parametrize("side", ["key", "value"])
def test_how_tokens_are_stored_makes_no_difference_to_their_codes(backend: Any, side: str) -> None:
    codec = codecs(CASE)[side]
    block_table = torch.tensor([[4, 64, 4], [68, 64, 4]], dtype=torch.int32)
    x = vectors(CASE, 128)[side].float().contiguous()
    same = x[:, :1, :1].expand(x.shape)
    for given, others in ((x, copies(x)), (same.clone(), {"expanded": same})):
        expected = implementation(backend).encode(codec, given, block_table, None)
        for name, copy in others.items():
            found = implementation(backend).encode(codec, copy, block_table, None)
            assert all(torch.equal(found[field], expected[field]) for field in expected), name


# ---------------------------------------------------------------------- the C interface itself


def arguments(layer: SpectralLayer, query: Tensor) -> dict[str, Any]:
    """Arguments of ``cpu.attend``."""
    view = layer.snapshot()
    sides = [view.key, view.value]
    assert all(isinstance(side.codec, SpectralCodec) for side in sides)
    constants = [constants_of(side.codec) for side in sides]
    return {
        "query": query,
        "key": constants[0],
        "value": constants[1],
        "blocks": cpu.Blocks(*view.packed(), view.block_table, None, view.encoded_end),
        "dense": [view.key.sinks, view.value.sinks, view.key.tail, view.value.tail],
        "call": AttentionCall(None, 0.125, causal=False),
    }


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """A change of one argument, one of the blocks' tensors, or one of the dense tensors."""

    def apply(call: dict[str, Any]) -> None:
        if name.isdigit():
            call["dense"][int(name)] = change(call["dense"][int(name)])
        elif name in vars(call["blocks"]):
            call["blocks"] = replace(call["blocks"], **{name: change(getattr(call["blocks"], name))})
        elif name in call["call"]._fields:
            call["call"] = call["call"]._replace(**{name: change(getattr(call["call"], name))})
        else:
            call[name] = change(call[name])

    return apply


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "query of 3 dimensions": (changed("query", lambda q: q[0]), "expected queries of 4 dimensions"),
    "query of another batch": (changed("query", lambda q: q[:1]), r"expected sinks of shape \[1, "),
    "query dimension": (changed("query", lambda q: q[..., :8]), "do not fit"),
    "query heads": (changed("query", lambda q: q[:, :3]), "do not fit"),
    "query dtype": (changed("query", lambda q: q.double()), "torch.float64"),
    "query on meta": (changed("query", lambda q: q.to("meta")), "in the CPU's memory"),
    "codes": (changed("key_codes", lambda x: x[..., :-1].contiguous()), "expected codes"),
    "value codes": (changed("value_codes", lambda x: x[:1]), "expected codes"),
    "codes with gaps": (changed("key_codes", lambda x: torch.stack((x, x), -1)[..., 0]), "contiguous"),
    "codes on meta": (changed("key_codes", lambda x: x.to("meta")), "in the CPU's memory"),
    "gains": (changed("key_gains", lambda x: x[:, :, :1].contiguous()), "expected gains"),
    "gains dtype": (changed("value_gains", lambda x: x.int()), "expected gains"),
    "places dtype": (changed("block_table", lambda x: x.long()), "expected block_table"),
    "block_table": (changed("block_table", lambda x: x[:, :2].contiguous()), "expected block_table"),
    "a place behind the end": (changed("block_table", lambda x: x + 64), "lie outside"),
    "a place before the start": (changed("block_table", lambda x: x - 9), "lie outside"),
    "a long place": (changed("block_table", lambda x: x + torch.tensor([0, 1, 0], dtype=torch.int32)), "lie outside"),
    "end": (changed("end", lambda x: x - 1), "lie outside"),
    "left_padding": (changed("left_padding", lambda x: torch.zeros(5, dtype=torch.int64)), "expected left_padding"),
    "starts dtype": (changed("left_padding", lambda x: torch.zeros(ROWS, dtype=torch.int32)), "expected left_padding"),
    "negative starts": (changed("left_padding", lambda x: torch.full((ROWS,), -3)), "lie outside"),
    "sinks of another batch": (changed("0", lambda x: x[:1]), "expected sinks"),
    "sinks of other lengths": (changed("1", lambda x: x[:, :, :2]), "expected sinks"),
    "tail heads": (changed("2", lambda x: x[:, :1]), "expected tail"),
    "tail dimension": (changed("3", lambda x: x[..., :8]), "expected tail"),
    "tail dtype": (changed("3", lambda x: x.bfloat16()), "one dtype"),
    "tail on meta": (changed("3", lambda x: x.to("meta")), "in the CPU's memory"),
    "sparse tail": (changed("2", lambda x: x.to_sparse()), "in the CPU's memory"),
    "mask queries": (changed("mask", lambda x: random_mask(1, 1, 2, TOKENS)), "expected a mask"),
    "mask heads": (changed("mask", lambda x: random_mask(1, 4, 1, TOKENS)), "expected a mask"),
    "mask rows": (changed("mask", lambda x: random_mask(3, 1, 1, TOKENS)), "expected a mask"),
    "short mask": (changed("mask", lambda x: random_mask(1, 1, 1, TOKENS - 1)), "expected a mask"),
    "mask dtype": (changed("mask", lambda x: torch.ones(1, 1, 1, TOKENS)), "expected a mask"),
    "mask on meta": (changed("mask", lambda x: random_mask(1, 1, 1, TOKENS).to("meta")), "in the CPU's memory"),
    "sink logits": (changed("sink_logits", lambda x: torch.zeros(3)), "expected sink logits"),
    "constants of other heads": (
        changed("key", lambda x: cpu.Constants((3, *x.sizes[1:]), x.tensors, x.decoder)),
        "do not fit",
    ),
    "constants that are cut": (
        changed("key", lambda x: cpu.Constants(x.sizes, {**x.tensors, "gains": x.tensors["gains"][:9]}, x.decoder)),
        "expected gains",
    ),
    "constants of another dtype": (
        changed(
            "value", lambda x: cpu.Constants(x.sizes, {**x.tensors, "mean": x.tensors["mean"].double()}, x.decoder)
        ),
        "expected mean",
    ),
}


@needs_library
@pytest.mark.parametrize("name", WRONG)
def test_the_c_interface_is_given_nothing_that_does_not_fit(name: str) -> None:
    change, message = WRONG[name]
    call = arguments(*filled())
    assert cpu.attend(**call).isfinite().all()
    change(call)
    with pytest.raises((ValueError, RuntimeError), match=message):
        cpu.attend(**call)


@needs_library
def test_encoding_is_given_nothing_that_does_not_fit() -> None:
    codec = codecs(CASE)["key"]
    constants = constants_of(codec)
    block_table = torch.tensor([[4, 64, 4]], dtype=torch.int32)
    x = vectors(CASE, 64)["key"].float()
    cpu.encode(x, constants, block_table, None)
    wrong: dict[str, tuple[Any, ...]] = {
        "expected tokens of 4 dimensions": (x[0], block_table, None),
        "expected 2 heads of dimension 64": (x[:, :1], block_table, None),
        r"expected tokens of shape \[2, 2, 0, 64\]": (x[:, :, :63], block_table, None),
        "torch.float64": (x.double(), block_table, None),
        "in the CPU's memory": (x.to("meta"), block_table, None),
        "expected block_table": (x, block_table.repeat(2, 1), None),
        "expected left_padding": (x, block_table, torch.zeros(3, dtype=torch.int64)),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            cpu.encode(given[0], constants, *given[1:])


@needs_library
def test_decoding_is_given_nothing_that_does_not_fit() -> None:
    codec = codecs(CASE)["key"]
    constants = constants_of(codec)
    block_table = torch.tensor([[4, 64, 4]], dtype=torch.int32)
    fields = codec.encode(vectors(CASE, 64)["key"].float(), block_table, None)
    codes, gains, none = fields["codes"], fields["gains"], None
    cpu.decode(codes, gains, constants, block_table, none)
    wrong: dict[str, tuple[Any, ...]] = {
        "expected codes of 3 dimensions": (codes[0], gains, block_table, none),
        r"expected codes .* \[1, 2, \d+\] of torch.int32, got \[1, 2, 9\]": (
            codes[..., :9].contiguous(),
            gains,
            block_table,
            none,
        ),
        "of torch.int32, got .* of torch.int64": (codes.long(), gains, block_table, none),
        "expected codes as a contiguous": (torch.stack((codes, codes), -1)[..., 0], gains, block_table, none),
        "expected codes in the CPU's memory": (codes.to("meta"), gains, block_table, none),
        "expected gains": (codes, gains[:, :1].contiguous(), block_table, none),
        "expected gains .* of torch.uint8": (codes, gains.int(), block_table, none),
        "expected gains in the CPU's memory": (codes, gains.to("meta"), block_table, none),
        r"expected block_table .* got \[2, 3\]": (codes, gains, block_table.repeat(2, 1), none),
        "expected block_table .* of torch.int64": (codes, gains, block_table.long(), none),
        "expected left_padding": (codes, gains, block_table, torch.zeros(3, dtype=torch.int64)),
        "expected left_padding .* of torch.int32": (codes, gains, block_table, torch.zeros(2, dtype=torch.int32)),
    }
    for message, (words, scales, *rest) in wrong.items():
        with pytest.raises(ValueError, match=message):
            cpu.decode(words, scales, constants, *rest)
    for places in ([[3, 64, 4]], [[69, 64, 4]], [[-(2**31), 64, 2**31 - 1]]):
        with pytest.raises(RuntimeError, match="begins more than 64 tokens behind its anchor"):
            cpu.decode(codes, gains, constants, torch.tensor(places, dtype=torch.int32), none)
    cut = cpu.Constants(constants.sizes, constants.tensors, constants.decoder[:, :9])
    with pytest.raises(ValueError, match="expected decoder"):
        cpu.decode(codes, gains, cut, block_table, none)
    nothing = cpu.decode(codes[:0], gains[:0], constants, block_table[:0], none)
    assert nothing.shape == (2, 2, 0, 64)


# ---------------------------------------------------------------------- threads and memory


@needs_library
@pytest.mark.support("two threads, two caches, one model")
def test_threads_share_constants_that_stay() -> None:
    """The first calls of several threads race to make a codec's constants: all must use what the first one made."""
    interval = sys.getswitchinterval()
    layer, query = filled("cpu")
    expected = spectral_attention(query, layer.snapshot(), None)
    try:
        sys.setswitchinterval(1e-6)
        for _ in range(8):
            blocks = layer.state.blocks._replace(codecs=dict(codecs(CASE)))
            layer.state = layer.state._replace(blocks=blocks)
            view, seen = layer.snapshot(), []
            barrier = threading.Barrier(4)

            def work(view: Any = view, seen: Any = seen, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                output = spectral_attention(query, view, None)
                constants = [constants_of(side.codec) for side in (view.key, view.value)]
                structures = [constants[0].structure("key"), constants[1].structure("value")]
                seen.append((output, *map(id, constants), *map(id, structures)))

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(seen) == 4
            assert len({ids for _, *ids in ((o, *i) for o, *i in seen) for ids in [tuple(ids)]}) == 1
            assert all(torch.equal(output, expected) for output, *_ in seen)
    finally:
        sys.setswitchinterval(interval)


OUT_OF_MEMORY = """
import resource, sys
import torch
from quantcache_kernels import cpu
from quantcache_kernels.interface import AttentionCall

given = torch.load(sys.argv[1])
key, value = (cpu.Constants.unflatten(*given[side]) for side in ("key", "value"))
few, many = (torch.randn(1, 128, n, 128, generator=torch.Generator().manual_seed(n)) for n in (1, 16))

def attend(query, threads):
    torch.set_num_threads(threads)
    call = AttentionCall(None, 0.1, causal=False)
    return cpu.attend(query, key, value, cpu.Blocks(*given["blocks"]), given["dense"], call)

def limited(query, threads, room):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + room, resource.RLIM_INFINITY))
    try:
        attend(query, threads)
    except RuntimeError as error:
        print("refused:", error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

before = attend(few, 1)
limited(many, 1, 2 << 20)  # room for the output, not for the scratch
assert torch.equal(attend(few, 1), before), "another result after it"
after = attend(many, 1)  # this thread's scratch has grown now, the other's has not
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)  # the other thread is there
limited(many, 2, 2 << 20)
assert torch.equal(attend(many, 2), after)
assert torch.equal(attend(few, 2), before)
print("done")
"""


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves all addresses")
@pytest.mark.support("out of memory inside a kernel")
def test_out_of_memory_inside_a_kernel_is_an_error_and_no_more(tmp_path: Path) -> None:
    call = arguments(*filled("cpu", Case(tokens=700, dim=128, heads=2, groups=64, widths=2)))
    given = {side: call[side].flatten() for side in ("key", "value")}
    blocks = list(vars(call["blocks"]).values())
    torch.save({**given, "blocks": blocks, "dense": call["dense"]}, tmp_path / "given.pt")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "kernels"),
        "OMP_NUM_THREADS": "2",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    found = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / "given.pt")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.splitlines() == [*["refused: CPU kernel failed: out of memory"] * 2, "done"]
