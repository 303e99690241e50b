"""The second model's recipe: the same every time, and what is saved is what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import second_model
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from quantcache import data
from quantcache.evaluation.provenance import model_sha256


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A text that repeats itself, for windows of 32 tokens."""
    monkeypatch.setattr(second_model, "CONTEXT", 32)
    return torch.arange(8).repeat(40)


def trained(tokens: Tensor, steps: int) -> tuple[Qwen3ForCausalLM, float]:
    """A model of 16 tokens, and its last loss."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(second_model.config(16, 0, 1))
    return model, second_model.train(model, tokens, steps)


def test_training_learns_and_repeats(tokens: Tensor) -> None:
    first, loss = trained(tokens, 8)
    again, other = trained(tokens, 8)
    assert loss == other
    assert model_sha256(first) == model_sha256(again)
    assert loss < trained(tokens, 1)[1] / 2
    assert second_model.perplexity(first, tokens[:64]) < 8  # of 8 tokens that take turns


def test_what_is_saved_is_what_was_measured(tokens: Tensor, tmp_path: Path) -> None:
    model, _ = trained(tokens, 2)
    second_model.round_parameters(model)
    before = second_model.perplexity(model, tokens[:64])
    tokenizer = AutoTokenizer.from_pretrained(data.demo_model_path())
    for _ in range(2):  # an earlier model of that name gives way
        second_model.save(model, tokenizer, tmp_path / "model")
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert second_model.perplexity(loaded, tokens[:64]) == before
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_embeddings_keep_what_they_can() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(400, 256, generator=generator, dtype=torch.float64)
    wide = plane @ torch.linalg.qr(torch.randn(384, 256, generator=generator, dtype=torch.float64))[0].T
    narrow = second_model.start(wide)
    assert narrow.shape == (400, 256)
    scale = narrow.square().sum() / wide.square().sum()
    torch.testing.assert_close(narrow @ narrow.T, scale * (wide @ wide.T))  # all products, up to the scale


def test_rate_rises_and_falls() -> None:
    rates = [second_model.rate_at(step, 100) for step in range(100)]
    assert max(rates) == rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] < 0.001
