"""Models to absorb into, and a process without quantcache that runs what came of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests import warm
from tests.families import FAMILIES, MAX_POSITIONS, OTHERS, Family

_SMALL = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.12}
_LLAMA = FAMILIES[0].config

VARIANTS = (
    Family("llama-biases", "llama", {**_LLAMA, "attention_bias": True}, {}, (64, 2)),
    Family("llama-mha", "llama", {**_LLAMA, "num_key_value_heads": 4}, {}, (64, 4)),
    Family("llama-mqa", "llama", {**_LLAMA, "num_key_value_heads": 1}, {}, (64, 1)),
    Family(
        "cohere-norms",
        "cohere",
        {**_SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "use_qk_norm": True, "logit_scale": 1.0},
        {},
        (32, 2),
    ),
    Family(
        "stablelm-norms",
        "stablelm",
        {**_SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "qk_layernorm": True, "use_qkv_bias": True}
        | {"max_position_embeddings": MAX_POSITIONS},
        {},
        (32, 2),
    ),
)
"""Models whose configs change what is absorbed where."""

ABSORBABLE = tuple(f for f in FAMILIES + OTHERS if f.model_type != "deepseek_v3") + VARIANTS


@torch.no_grad()
def trained_looking(family: Family) -> PreTrainedModel:
    """A model whose biases and norms are not as they were initialised: all zeros and ones would hide mistakes.

    Args:
        family: Its family.

    Returns:
        The model, in float32.
    """
    model = family.make(attention=family.implementations[family.implementations[0] == "spectral"])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


_SCRIPT = """
import sys
sys.modules["quantcache"] = sys.modules["quantcache_kernels"] = None  # importing them fails from here on
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
tokens = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(5))
for argument in sys.argv[1:]:
    attention, folder = argument.split(":", 1)
    more = {"attn_implementation": attention, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **more).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.float().contiguous()
        mask = torch.ones_like(tokens)
        generated = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=2)
    save_file({"logits": logits, "generated": generated.contiguous()}, folder + ".outputs")
"""


def run_without_quantcache(folders: Sequence[tuple[str, Path]]) -> list[dict[str, Tensor]]:
    """Logits and greedy continuations of models, in one process where ``import quantcache`` fails.

    Args:
        folders: Attention implementation and folder of each model.

    Returns:
        ``logits`` ``[2, 40, V]`` and ``generated`` ``[2, 45]`` of each.
    """
    arguments = [f"{attention}:{folder}" for attention, folder in folders]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [*warm.python(), "-c", _SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [load_file(f"{folder}.outputs") for _, folder in folders]
