"""Tiny random models of many families, built from their configs: the table that the integration tests run over.

Weights are drawn wide enough that attention is far from uniform: with the usual initialisation every key weighs alike,
and no error in the keys could be seen in the logits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantcache.attention.function import register_attention

VOCABULARY = 256
MAX_POSITIONS = 1024

_GLOBAL, _WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny model of one family, and what is known of it.

    Attributes:
        name: How tests call it.
        model_type: transformers' name of the family.
        config: Arguments of its config beyond the common ones; ``hidden_size`` and so on.
        ropes: (layout, number of rotary dimensions) of the keys of every layer that grows with the context.
        cached: Dimension of a key and number of key/value heads, as they reach the cache.
        implementations: Attention implementations that transformers offers for it, ours included.
        tweak: Changes the freshly drawn weights.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    ropes: dict[int, tuple[str, int]]
    cached: tuple[int, int]
    implementations: tuple[str, ...] = ("spectral", "sdpa", "eager")
    tweak: Callable[[PreTrainedModel], None] | None = None

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A new model with random weights.

        Args:
            seed: Seed of the weights.
            attention: Attention implementation; the family's first by default.
            dtype: The model's dtype; the weights are drawn in float32.

        Returns:
            The model, in evaluation mode.
        """
        return copy.deepcopy(self._drawn(seed, attention or self.implementations[0])).to(dtype)

    @functools.cache  # noqa: B019 (families last as long as the tests)
    def _drawn(self, seed: int, attention: str) -> PreTrainedModel:
        """The model itself, of which everybody gets a copy: to draw one takes three times as long."""
        register_attention()
        tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = AutoConfig.for_model(self.model_type, **{"vocab_size": VOCABULARY, **tokens, **self.config})
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention,
                experts_implementation="eager",  # the others know no float64
                dtype=torch.float32,
            )
            if self.tweak is not None:
                with torch.no_grad():
                    self.tweak(model)
        # A random model would end a generation by chance; every test says itself how many tokens it wants.
        model.generation_config.eos_token_id = None
        return model.eval()


def _large_key_biases(model: PreTrainedModel) -> None:
    """Key biases as large as the keys, as trained Qwen2 models have them: key means far from zero."""
    for module in model.modules():
        if hasattr(module, "k_proj"):
            module.k_proj.bias.normal_(0.0, 4.0)


def _sinks(model: PreTrainedModel) -> None:
    """Attention-sink logits that take a share of the softmax worth noticing."""
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.normal_(1.0, 1.0)


def _small(head_dim: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2, **more: Any) -> dict[str, Any]:
    """The config of a small model in the words that most families share."""
    return {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.12,
        **more,
    }


def _implied(head_dim: int, heads: int = 2, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    """The config of a small model whose family derives the head dimension from the hidden size."""
    config = _small(head_dim, heads, kv_heads or heads, **more) | {"hidden_size": head_dim * heads}
    del config["head_dim"]
    return config


def _each(layers: int, layout: str, rotary_dim: int) -> dict[int, tuple[str, int]]:
    """The same rotation in every layer."""
    return {index: (layout, rotary_dim) for index in range(layers)}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

FAMILIES = (
    Family("llama", "llama", _small(), _each(2, "half", 64), (64, 2)),
    Family("llama3-rope", "llama", _small(128, rope_parameters=_LLAMA3), _each(2, "half", 128), (128, 2)),
    Family("mistral", "mistral", _small(128, sliding_window=None), _each(2, "half", 128), (128, 2)),
    Family("qwen2", "qwen2", _implied(64, 4, 2), _each(2, "half", 64), (64, 2), tweak=_large_key_biases),
    Family("qwen3", "qwen3", _small(128), _each(2, "half", 128), (128, 2)),
    Family(
        "phi3",
        "phi3",
        _implied(96, 2, 1, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        _each(2, "half", 48),
        (96, 1),
    ),
    Family(
        "gemma2",
        "gemma2",
        _small(64, layers=4, sliding_window=48, query_pre_attn_scalar=64, attn_logit_softcapping=5.0),
        {1: ("half", 64), 3: ("half", 64)},
        (64, 2),
        ("spectral", "eager"),
    ),
    Family(
        "gemma3",
        "gemma3_text",
        _small(256, 2, 1, sliding_window=48, query_pre_attn_scalar=16, layer_types=[_WINDOW, _GLOBAL]),
        {1: ("half", 256)},
        (256, 1),
    ),
    Family(
        "gpt2",
        "gpt2",
        {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": MAX_POSITIONS, "initializer_range": 0.12}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        _each(2, "none", 0),
        (64, 2),
    ),
    Family(
        "gpt-neox",
        "gpt_neox",
        _implied(80, 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        _each(2, "half", 20),
        (80, 2),
    ),
    Family("cohere", "cohere", _implied(64, 4, 2, logit_scale=1.0), _each(2, "interleaved", 64), (64, 2)),
    Family(
        "mixtral",
        "mixtral",
        _small(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        _each(2, "half", 64),
        (64, 2),
    ),
    Family(
        "qwen3-moe",
        "qwen3_moe",
        _small(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
        _each(2, "half", 64),
        (64, 2),
    ),
    Family(
        "gpt-oss",
        "gpt_oss",
        _small(layers=3, sliding_window=48, num_local_experts=4, num_experts_per_tok=2)
        | {"layer_types": [_WINDOW, _GLOBAL, _GLOBAL]},
        {1: ("half", 64), 2: ("half", 64)},
        (64, 2),
        ("spectral", "eager"),
        tweak=_sinks,
    ),
    Family(
        "glm4",
        "glm4",
        _small(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        _each(2, "interleaved", 32),
        (64, 2),
    ),
    Family(
        "opt",
        "opt",
        {
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "init_std": 0.12,
        },
        _each(2, "none", 0),
        (64, 2),
    ),
    Family(
        "phi",
        "phi",
        _implied(64, 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        _each(2, "half", 32),
        (64, 2),
    ),
    Family(
        "stablelm",
        "stablelm",
        _implied(64, 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        _each(2, "half", 16),
        (64, 2),
    ),
    Family(
        "smollm3",
        "smollm3",
        _implied(64, 4, 2, no_rope_layers=[1, 0]),
        {0: ("half", 64), 1: ("none", 0)},
        (64, 2),
    ),
    Family("granite", "granite", _implied(64, 4, 2, attention_multiplier=0.1), _each(2, "half", 64), (64, 2)),
    Family("olmo2", "olmo2", _implied(64, 4, 2), _each(2, "half", 64), (64, 2)),
)
"""Families that go through transformers' attention interface."""


OTHERS = (
    Family(
        "falcon-mqa",
        "falcon",
        {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.12},
        _each(2, "half", 64),
        (64, 1),
        ("sdpa", "eager"),
    ),
    Family(
        "falcon-alibi",
        "falcon",
        {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.12}
        | {"alibi": True, "multi_query": False},
        _each(2, "none", 0),
        (64, 2),
        ("sdpa",),
    ),
    Family(
        "bloom",
        "bloom",
        {"hidden_size": 128, "n_head": 2, "n_layer": 2, "initializer_range": 0.12},
        _each(2, "none", 0),
        (64, 2),
        ("eager",),
    ),
    Family(
        "mpt",
        "mpt",
        {"d_model": 128, "n_heads": 2, "n_layers": 2, "max_seq_len": MAX_POSITIONS, "initializer_range": 0.12},
        _each(2, "none", 0),
        (64, 2),
        ("eager",),
    ),
    Family(
        "gptj",
        "gptj",
        {"n_embd": 128, "n_head": 2, "n_layer": 2, "n_positions": MAX_POSITIONS, "rotary_dim": 32}
        | {"initializer_range": 0.12},
        _each(2, "interleaved", 32),
        (64, 2),
        ("eager",),
    ),
    Family(
        "deepseek-v3",
        "deepseek_v3",
        _implied(32, 4, q_lora_rank=48, kv_lora_rank=72, n_routed_experts=4, num_experts_per_tok=2)
        | {"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 48, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 64, "first_k_dense_replace": 1},
        _each(2, "none", 0),
        (72, 1),
    ),
)
"""Families whose attention is their own, or whose cache holds something else than keys and values."""


TYPICAL = ("llama", "gemma2", "gpt2", "gpt-oss", "gptj", "deepseek-v3")
"""One family of every kind: rotated halves, windows with a soft cap, no rotation, sink logits, pairs, latents."""


def marks_of_rest(family: Family) -> list[pytest.MarkDecorator]:
    """The mark that leaves a family's cases to CI where those of the typical ones say most of what there is to say."""
    return [] if family.name in TYPICAL else [pytest.mark.slow]


@functools.cache
def shared_model(family: Family) -> PreTrainedModel:
    """The family's model in float32, shared by all tests: leave it as you found it.

    Args:
        family: The family.

    Returns:
        The model.
    """
    return family.make()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them special.

    Args:
        batch: B.
        length: T.
        seed: Their seed.

    Returns:
        ``[B, T]``.
    """
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
