"""Models with quantized weights: which library does it, what it leaves alone, and how far weights move."""

from __future__ import annotations

import pytest
import torch
from builders import llama_config
from transformers import LlamaForCausalLM

from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.provenance import model_sha256
from quantcache.evaluation.weights import quantize_weights, weights_library

NAMES = [
    pytest.param(f"{library}-{kind}", marks=pytest.mark.skipif(bool(missing), reason=str(missing)))
    for library in ("quanto", "torchao")
    for missing in [compat.missing_quantizer(library)]
    for kind in ("int8", "int4")
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A small Llama with random weights; rows of 96 weights are no multiple of 128."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(head_dim=24)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_weights_move_by_half_a_step_at_most(model: LlamaForCausalLM, name: str) -> None:
    before = {path: value.clone() for path, value in model.state_dict().items()}
    digest = model_sha256(model)
    assert quantize_weights(model, name) == name
    assert model_sha256(model) != digest
    levels = 255 if name.endswith("int8") else 15
    for path, module in model.named_modules():
        if not hasattr(module, "weight") or not path.startswith("model.layers") or module.weight.ndim != 2:
            continue
        found, exact = module.weight.detach().dequantize(), before[f"{path}.weight"]
        # Symmetric steps reach as far as the largest weight of a row on both sides, and one step further on one.
        step = 2 * exact.abs().amax(1, keepdim=True) / (levels - 1)
        error = (found - exact).abs() / step
        assert float(error.max()) <= 1.0 + 1e-3
        assert 0.05 < float(error.mean()) <= 0.3  # 1/4 if all of the row had one step
    for path in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[path], before[path])


@pytest.mark.parametrize(
    ("installed", "expected"),
    [(("quanto", "torchao"), "quanto"), (("torchao",), "torchao"), ((), "quanto")],
    ids=["both", "one", "none"],
)
def test_the_first_library_that_is_installed(
    installed: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {name: None if name in installed else f"needs {name}" for name in ("quanto", "torchao")}
    monkeypatch.setattr(compat, "missing_quantizer", missing.get)
    assert weights_library("int4") == (expected, "int4", missing[expected])
    assert weights_library("torchao-int8") == ("torchao", "int8", missing["torchao"])


def test_what_cannot_be_done_is_refused(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = model_sha256(model)
    for name in ("int3", "gptq-int4", "quanto", ""):
        with pytest.raises(QuantCacheError, match=f"unknown weights '{name}': known are int8, int4, quanto-int8"):
            quantize_weights(model, name)
    monkeypatch.setattr(compat.quantizers, "is_optimum_quanto_available", lambda: False)
    with pytest.raises(QuantCacheError, match="weights 'quanto-int4': needs optimum-quanto"):
        quantize_weights(model, "quanto-int4")
    assert model_sha256(model) == digest
