"""Many queries at once on a compressed past, where a dense copy of it is made for them: what GPUs do, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantcache import SpectralCache
from quantcache.attention import function
from quantcache.attention.lazy import LazyKV
from quantcache.backends import REFERENCE, AttentionCall, reference
from quantcache.backends.view import CacheView
from tests.builders import scalar_calibration
from tests.families import FAMILIES, random_tokens
from tests.kernels import truth
from tests.kernels.cases import Case, fill

LONG = Case(tokens=300, heads=2, queries=40, dtype=torch.bfloat16)

CASES = {
    "causal": LONG,
    "padded": replace(LONG, pads=(0, 33), strided=True),
    "cut": replace(LONG, cut=True),
    "trellis": replace(LONG, coding=("trellis", "trellis")),
    "no-sinks": replace(LONG, sink_length=0),
    "float16": replace(LONG, dtype=torch.float16),
}


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU does what a GPU does, and nothing else attends."""

    def refused(*args: object) -> None:
        raise AssertionError("tiles are decoded")

    monkeypatch.setattr(function, "DECODING_DEVICES", {"cpu"})
    monkeypatch.setattr(type(REFERENCE), "attend", refused)


def attend(case: Case, view: CacheView, query: torch.Tensor, mask: torch.Tensor | None, **more: Any) -> torch.Tensor:
    """What a model's attention layer is given."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // case.heads, is_causal=True, training=False)
    key, value = LazyKV(view, "key"), LazyKV(view, "value")
    return function.spectral_attention_forward(module, query, key, value, mask, **more)[0]


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_attention_is_as_exact_as_on_a_dense_cache(case: Case, decoding: None) -> None:
    filled = fill(case)
    view = filled.layer.snapshot()
    expected = truth.attention(filled.query, view, filled.mask)
    own = truth.attention(filled.query, view, filled.mask, dtype=case.dtype)
    found = attend(case, view, filled.query, filled.mask)
    assert (found.shape, found.dtype) == (expected.shape, case.dtype)
    theirs, allowed = (float((x.double() - expected).norm()) for x in (found, own))
    assert theirs <= 2 * allowed + 1e-6 * float(expected.norm()), (theirs, allowed)


@pytest.mark.parametrize("on_codes", [True, False], ids=["codes", "decoded"])
def test_plain_torch_serves_every_part_of_many_queries(on_codes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERY_CHUNK", 8)
    filled = fill(Case(heads=2, queries=20))
    view = filled.layer.snapshot()
    expected = truth.attention(filled.query, view, None)
    found = reference.attend(filled.query, view, AttentionCall(None, view.key.tail.shape[3] ** -0.5), on_codes)
    for part in (slice(0, 8), slice(8, 16), slice(16, 20)):
        difference = (found[:, part].double() - expected[:, part]).norm()
        assert difference <= 1e-5 * expected[:, part].norm(), part


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_queries_without_a_mask_see_what_precedes_them_before_anything_is_encoded(queries: int) -> None:
    """Torch's own causal mask would begin with the first token, not with the first query."""
    case = Case(tokens=40, heads=2, queries=queries)
    filled = fill(case)
    view = filled.layer.snapshot()
    assert not view.num_blocks
    found = attend(case, view, filled.query, None)
    expected = function.dense_attention(
        filled.query.double(), view.dense("key").double(), view.dense("value").double(), None
    )
    own = function.dense_attention(filled.query, view.dense("key"), view.dense("value"), None)
    theirs, allowed = (float((x.double() - expected).norm()) for x in (found, own))
    assert theirs <= 2 * allowed + 1e-6 * float(expected.norm()), (theirs, allowed)


@pytest.mark.parametrize("rows", [1, 7, 39, 40])
def test_masks_that_hide_the_future_stay_small(rows: int, decoding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries on a long past would need one of as many elements as both have in product."""
    filled = fill(LONG)
    view = filled.layer.snapshot()
    expected = truth.attention(filled.query, view, None)
    own = truth.attention(filled.query, view, None, dtype=LONG.dtype)
    fused, sizes = function.sdpa_attention_forward, []

    def watched(
        module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
    ) -> Any:
        sizes.append(mask.numel())
        return fused(module, query, key, value, mask, **more)

    monkeypatch.setattr(function, "sdpa_attention_forward", watched)
    monkeypatch.setattr(function, "CAUSAL_MASK_BYTES", rows * view.length)
    found = attend(LONG, view, filled.query, None)
    assert len(sizes) == -(-40 // rows)
    assert max(sizes) <= rows * view.length
    theirs, allowed = (float((x.double() - expected).norm()) for x in (found, own))
    assert theirs <= 2 * allowed + 1e-6 * float(expected.norm()), (theirs, allowed)


@pytest.mark.parametrize("kind", [SpectralCache, DynamicCache])
def test_a_turn_on_a_past_needs_no_mask(kind: type[DynamicCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is hidden but the future; its logits are those that a mask gives."""
    model = FAMILIES[0].make().eval()
    model.set_attn_implementation("spectral")
    calibration, tokens = scalar_calibration(model.config, 4.0), random_tokens(2, 400)
    seen: list[torch.Tensor | None] = []
    checked = function.guards.fitting_call

    def watched(query: torch.Tensor, mask: torch.Tensor | None, *more: Any) -> AttentionCall:
        seen.append(mask)
        return checked(query, mask, *more)

    monkeypatch.setattr(function.guards, "fitting_call", watched)

    def read(*hidden: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        cache = SpectralCache(calibration, model.config) if kind is SpectralCache else kind(config=model.config)
        seen.clear()
        for part in tokens.split((300, 100), dim=1):
            shown = torch.ones(2, cache.get_seq_length() + part.shape[1], dtype=torch.int64)
            shown[0, list(hidden)] = 0
            last = mask if mask is not None and cache.get_seq_length() else shown
            logits = model(input_ids=part, attention_mask=last, past_key_values=cache).logits
        return logits

    plain = read()
    assert all(each is None for each in seen)
    causal = torch.ones(100, 400, dtype=torch.bool).tril(300).expand(2, 1, 100, 400)
    assert torch.equal(read(mask=causal), plain)
    padded = read(0, 1, 2)
    assert [None if each is None else each.shape[2] for each in seen] == [300, 300, 100, 100]
    assert not torch.equal(padded[0], plain[0])


def test_few_queries_wide_dtypes_and_long_caches_are_served_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "DECODING_DEVICES", {"cpu"})
    filled = fill(LONG)
    view = filled.layer.snapshot()
    assert function._decoded_whole(filled.query, view)
    assert not function._decoded_whole(filled.query[:, :, :16], view)
    assert not function._decoded_whole(filled.query.float(), view)
    monkeypatch.setattr(function, "DENSE_BYTES", view.length * 2 * 2 * (64 + 64) - 1)
    assert not function._decoded_whole(filled.query, view)
    monkeypatch.setattr(function, "DENSE_BYTES", view.length * 2 * 2 * (64 + 64))
    assert function._decoded_whole(filled.query, view)


@torch.inference_mode()
def test_a_model_reads_its_prompt_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are no further from float32's than twice those of tiles are; what has been read is encoded as ever."""
    model = FAMILIES[0].make(dtype=torch.bfloat16).eval()
    model.set_attn_implementation("spectral")
    calibration, tokens = scalar_calibration(model.config, 4.0), random_tokens(2, 400)

    def read() -> tuple[torch.Tensor, list[int]]:
        cache = SpectralCache(calibration, model.config)
        chunks = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split(50, dim=1)]
        assert cache.get_seq_length() == 400
        return torch.cat(chunks, dim=1).float(), [len(layer.spans) for layer in cache.spectral_layers]

    tiles, blocks = read()
    with monkeypatch.context() as patch:
        patch.setattr(function, "DECODING_DEVICES", {"cpu"})
        whole, same_blocks = read()
    model.float()
    exact, _ = read()
    assert same_blocks == blocks
    assert not torch.equal(whole, tiles)
    assert (whole - exact).norm() <= 2 * (tiles - exact).norm()
