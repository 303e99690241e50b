"""A codec of one's own in the cache: int8 with one scale for each token and head, used by generate()."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import BlockCache, SideCodec
from quantcache.coding.blocks import join_blocks, split_blocks
from quantcache.data import demo_model_path, evaluation_text


class TokenInt8:
    """Rounds every token of a head to 255 levels between minus and plus its largest value."""

    def __init__(self, dim: int):
        self.bits = 8 + 16 / dim  # codes, and one float16 scale for D of them

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        blocks = split_blocks(x.float())  # [n, B, H, 64, D]
        scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(2**-24).half()
        return {"codes": (blocks / scales).round().clamp(-127, 127).to(torch.int8), "scales": scales}

    def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        return join_blocks(fields["codes"] * fields["scales"].float())  # [B, H, n * 64, D]

    def tensors(self) -> list[Tensor]:
        return []


def codecs_of(layer: int):
    """How a layer gets its codecs once its first block is due: from tails ``[B, H, T, D]`` of keys and values."""

    def make(device: torch.device, tails: dict[str, Tensor], grid: object) -> dict[str, SideCodec]:
        return {side: TokenInt8(tail.shape[-1]) for side, tail in tails.items()}

    return make, None


model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype="float32", attn_implementation="spectral")
tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
inputs = tokenizer(evaluation_text()[:3500].rsplit(". ", 1)[0] + ".", return_tensors="pt")

cache = BlockCache(model.config, codecs_of)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)

print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
print(cache.memory())
