"""Gradients at what is read as codes, against those at one vector that is changed whenever its codes are read."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DynamicCache,
    Lfm2Config,
    PreTrainedModel,
    Qwen3NextConfig,
)

from quantcache import calibrate
from quantcache.attention.probe import RecordingCache
from quantcache.calibration import gradients
from quantcache.calibration.gradients import Gathered, gather_gradients
from quantcache.coding.schema import SIDES
from tests.families import FAMILIES, VOCABULARY, Family, random_tokens, shared_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model whose parameters want no gradient."""
    found = copy.deepcopy(shared_model(FAMILIES[0]))
    for parameter in found.parameters():
        parameter.requires_grad_(False)
    return found


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


class NudgedCache(DynamicCache):
    """A cache that hands out one vector changed, to the chunks that begin a residual window behind it or later."""

    def __init__(self, config: Any, place: tuple[int, str, int], nudge: Tensor, residual_length: int):
        super().__init__(config=config)
        self.place, self.nudge, self.residual_length = place, nudge, residual_length

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Cache what is given, and return it changed."""
        first = self.get_seq_length(layer_idx)
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        index, side, token = self.place
        if layer_idx != index or token >= first - self.residual_length:
            return found
        given = dict(zip(SIDES, found, strict=True))
        given[side] = given[side].clone()
        given[side][0, :, token] += self.nudge
        return tuple(given.values())


def loss(logits: Tensor) -> Tensor:
    """Negative log-likelihood of one and the same token at every position."""
    return -logits.log_softmax(-1)[..., 3].sum()


def gathered(
    model: PreTrainedModel, sequence: Tensor, residual_length: int
) -> tuple[dict[int, dict[str, Gathered]], list[int]]:
    """What is gathered at two layers, and the tokens of every pass."""
    passes: list[int] = []

    def on_update(index: int, keys: Tensor, values: Tensor) -> None:
        passes.extend([keys.shape[2]] * (index == 0))

    return gather_gradients(model, sequence, [0, 1], residual_length, loss, on_update), passes


@pytest.mark.parametrize(("tokens", "residual_length"), [(160, 64), (160, 0), (160, 7), (640, 64)])
def test_coded_gradients_are_those_of_what_is_read_as_codes(
    model: PreTrainedModel, tokens: int, residual_length: int
) -> None:
    """They are those at a vector that is changed for those alone who read its codes."""
    sequence = random_tokens(1, tokens)
    found, passes = gathered(model, sequence, residual_length)
    assert set(passes[:-1]) == {64}
    coded = tokens - passes[-1] - residual_length
    for index, side, token in ((0, "key", 1), (0, "value", coded - 1), (1, "key", coded // 2), (1, "value", 5)):
        vectors, gradients, _ = found[index][side]
        assert vectors.shape == gradients.shape == (1, *vectors.shape[1:2], tokens, vectors.shape[3])
        assert not bool(gradients[:, :, coded:].any())
        nudge = torch.zeros_like(vectors[0, :, token], requires_grad=True)
        cache = NudgedCache(model.config, (index, side, token), nudge, residual_length)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in sequence.split(64, 1)]
        (expected,) = torch.autograd.grad(loss(torch.cat(parts, 1)), nudge)
        torch.testing.assert_close(gradients[0, :, token], expected)
        assert bool(expected.any())


@pytest.mark.parametrize("tokens", [24, 160])
def test_read_gradients_are_those_of_one_pass(model: PreTrainedModel, tokens: int) -> None:
    """However it is read in chunks; of a sequence that is too short for codes they are all there is."""
    sequence = random_tokens(2, tokens)
    found, _ = gathered(model, sequence, 64)
    leaves: dict[int, list[Tensor]] = {}

    def record(index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        leaves[index] = [torch.zeros_like(x, requires_grad=True) for x in (keys, values)]
        return keys + leaves[index][0], values + leaves[index][1]

    logits = model(sequence, past_key_values=RecordingCache(model.config, record), use_cache=True).logits
    loss(logits).backward()
    for index, sides in found.items():
        for side, leaf in zip(SIDES, leaves[index], strict=True):
            torch.testing.assert_close(sides[side].read, leaf.grad)
            assert bool(sides[side].coded.any()) == (tokens > 128)


RECURRENT = {
    "bamba": BambaConfig(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, **SIZES),
    "lfm2": Lfm2Config(layer_types=["conv", "full_attention"], **SIZES),
    "qwen3-next": Qwen3NextConfig(
        layer_types=["linear_attention", "full_attention"], head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, **SIZES,
    ),
}  # fmt: skip
"""Models whose recurrent layers start anew with every chunk, or change what a backward pass needs."""


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_read_at_once(name: str) -> None:
    torch.manual_seed(0)
    recurrent = AutoModelForCausalLM.from_config(RECURRENT[name]).eval().requires_grad_(False)
    sequence = random_tokens(1, 160)
    passes: list[int] = []
    found = gather_gradients(recurrent, sequence, [1], 0, loss, lambda _, keys, __: passes.append(keys.shape[2]))
    assert passes == [160]
    assert bool(found[1]["key"].read.any())
    assert not bool(found[1]["key"].coded.any())
    calibration = calibrate(recurrent, [sequence], predict=False, progress=False)
    assert "residual_length" not in calibration.metadata.recipe


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_computing_layers_again_changes_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it that the gradients of a chunk's logits are had before the next chunk is read."""
    model = copy.deepcopy(shared_model(family)).requires_grad_(False)
    sequence = random_tokens(2, 200)
    found, _ = gathered(model, sequence, 16)
    monkeypatch.setattr(gradients, "recomputed_layers", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(gradients, "cut_below_head", lambda *_: contextlib.nullcontext([]))
    expected, _ = gathered(model, sequence, 16)
    for index, sides in expected.items():
        for side, kinds in sides.items():
            for kind, x in kinds._asdict().items():
                torch.testing.assert_close(getattr(found[index][side], kind), x)
            assert bool(kinds.coded.any())


def test_layers_are_computed_again(model: PreTrainedModel) -> None:
    """And called as before once gradients are there; what accelerate put in place of forward stays."""
    calls: list[int] = []
    layers = model.model.layers
    handle = layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    layers[1].forward = replaced = layers[1].forward
    _, passes = gathered(model, random_tokens(1, 160), 64)
    handle.remove()
    assert len(passes) == 3
    assert len(calls) == 2 * len(passes)
    assert "forward" not in vars(layers[0])
    assert vars(layers[1]).pop("forward") is replaced


def test_a_long_sequence_is_read_in_few_passes(model: PreTrainedModel) -> None:
    """Every pass reads all weights, twice."""
    _, passes = gathered(model, random_tokens(1, 1601), 64)
    assert passes == [101] * 15 + [86]
