"""Many queries at once on a compressed past, where a dense copy of it is made for them: what GPUs do, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
