"""The second model's recipe: what it takes over, the same training every time, and what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import second_model
import torch
from builders import llama_config
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

from quantcache import data
from quantcache.evaluation.provenance import model_sha256

CONTEXT = 32


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A text that repeats itself."""
    monkeypatch.setattr(second_model, "CONTEXT", CONTEXT)
    return torch.arange(8).repeat(40)


def llama() -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(head_dim=16, tie_word_embeddings=True)).eval()


def test_all_weights_are_taken_over_and_sizes_kept(tokens: Tensor) -> None:
    first = llama()
    model = second_model.converted(first, tokens[:CONTEXT])
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in first.state_dict().items())
    assert {name.split(".")[-2] for name in set(found) - set(first.state_dict())} == {"q_norm", "k_norm"}
    own: dict[str, Tensor] = {}
    for path, module in [*first.named_modules(), *model.named_modules()]:
        if path.endswith(("q_proj", "k_proj", "q_norm", "k_norm")):
            module.register_forward_hook(lambda _, __, output, path=path: own.update({path: output}))
    with torch.no_grad():
        first(tokens[None, :CONTEXT])
        before = {p: x.unflatten(-1, (-1, 16)).square().mean(-1).sqrt() for p, x in own.items()}
        model(tokens[None, :CONTEXT])
    for path, size in before.items():
        normed = own[path.replace("_proj", "_norm")].square().mean(-1).sqrt()
        torch.testing.assert_close(normed, size.mean().expand_as(normed), rtol=1e-3, atol=0)  # of one size everywhere
        assert float(size.std()) > 0.01 * float(size.mean())  # which they had not


def test_training_learns_and_repeats(tokens: Tensor) -> None:
    def trained(steps: int) -> tuple[Qwen3ForCausalLM, float]:
        model = second_model.converted(llama(), tokens[:CONTEXT])
        return model, second_model.train(model, tokens, steps)

    (first, loss), (again, other) = trained(12), trained(12)
    assert loss == other
    assert model_sha256(first) == model_sha256(again)
    untrained = second_model.converted(llama(), tokens[:CONTEXT])
    assert second_model.perplexity(first, tokens[:64]) < 0.9 * second_model.perplexity(untrained, tokens[:64])


def test_what_is_saved_is_what_was_trained(tokens: Tensor, tmp_path: Path) -> None:
    model = second_model.converted(llama(), tokens[:CONTEXT])
    rounded = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(data.demo_model_path())
    for _ in range(2):  # an earlier model of that name gives way
        second_model.save(model, tokenizer, tmp_path / "model")
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(value, rounded[name]) for name, value in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rate_rises_and_falls() -> None:
    rates = [second_model.rate_at(step, 100) for step in range(100)]
    rise = round(100 * second_model.WARMUP)
    assert max(rates) == rates[rise - 1] == 1
    assert rates[:rise] == sorted(rates[:rise])
    assert rates[rise:] == sorted(rates[rise:], reverse=True)
    assert rates[0] == pytest.approx(1 / rise)
    assert rates[-1] < 0.001
