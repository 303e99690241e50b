"""A codec of the caller's own in a :class:`quantcache.BlockCache`: the public example, and what else caches do."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import llama_config
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from quantcache import BlockCache, QuantCacheError, SideCodec
from quantcache.coding.blocks import join_blocks, split_blocks

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_own_codec.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the example leaves behind."""
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def codecs_of(example: dict[str, Any]) -> Any:
    return example["codecs_of"]


@pytest.mark.support("a codec of one's own (BlockCache)")
def test_the_example_generates_what_a_dense_cache_does(
    example: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs, cache = example["model"], example["inputs"], example["cache"]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    dense = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(example["output"], dense)
    memory = cache.memory()
    assert memory.encoded_elements > 0.8 * memory.elements
    assert memory.bits_per_element == 8 + 16 / 64 == cache.layers[0].codecs["key"].bits
    assert sum(1 for line in EXAMPLE.read_text("utf-8").split("\n\n\nmodel =")[0].splitlines() if line.strip()) < 40


def test_the_page_shows_the_example() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "own-codec.md").read_text("utf-8")
    code = EXAMPLE.read_text("utf-8")
    shown = page.split("```python\n")[1].split("\n\n\ncache =")[0]
    assert shown in code


@pytest.fixture(scope="module", params=[(96, torch.float32), (64, torch.bfloat16)], ids=["d96-float32", "d64-bfloat16"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    dim, dtype = request.param
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(head_dim=dim, layers=2, kv_heads=2)).to(dtype).eval()


def logits(model: LlamaForCausalLM, cache: Any, ids: Tensor, chunk: int = 50) -> Tensor:
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
    return torch.cat(parts, 1).float()


@pytest.mark.support("a codec of one's own (BlockCache)")
def test_any_attention_reads_it(model: LlamaForCausalLM, codecs_of: Any) -> None:
    ids = torch.arange(230)[None] % 31
    found = {}
    for attention in ("spectral", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        cache = BlockCache(model.config, codecs_of, residual_length=16)
        found[attention] = logits(model, cache, ids)
        assert cache.memory().encoded_elements > 0
    dense = logits(model, DynamicCache(config=model.config), ids)
    error = {name: float((each - dense).norm() / dense.norm()) for name, each in found.items()}
    assert min(error.values()) > 0
    # What an attention adds must not show beside what int8 has left out.
    assert max(error.values()) < 2 * min(error.values()) + 2 * torch.finfo(model.dtype).eps, error


@pytest.mark.support("a codec of one's own (BlockCache)")
def test_operations_on_a_cache(model: LlamaForCausalLM, codecs_of: Any) -> None:
    model.set_attn_implementation("spectral")
    ids = torch.arange(460).view(2, 230) % 31
    more = ids[:, :7]
    cache = BlockCache(model.config, codecs_of, residual_length=16)
    logits(model, cache, ids)
    expected = logits(model, copy.deepcopy(cache), more)
    assert torch.equal(logits(model, cache.fork(), more), expected)
    swapped = cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(logits(model, swapped, more.flip(0)), expected.flip(0))
    cut = cache.fork()
    cut.crop(-100)  # inside a block
    assert cut.get_seq_length() == 130
    assert torch.equal(cut.layers[0].keys[:, :, :130], cache.layers[0].keys[:, :, :130])


def test_one_side_of_ones_own_and_the_other_dense(model: LlamaForCausalLM) -> None:
    class Kept:
        """Keeps what it is given."""

        bits = None

        def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
            return {"whole": split_blocks(x)}

        def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
            return join_blocks(fields["whole"])

        def tensors(self) -> list[Tensor]:
            return []

    def make(device: torch.device, tails: dict[str, Tensor], grid: object) -> dict[str, SideCodec]:
        return {"key": Kept(), "value": Kept()}

    ids = torch.arange(230)[None] % 31
    model.set_attn_implementation("sdpa")
    cache = BlockCache(model.config, lambda layer: (make, None), residual_length=16)
    assert torch.equal(logits(model, cache, ids), logits(model, DynamicCache(config=model.config), ids))
    memory = cache.memory()
    assert (memory.codes, memory.encoded_elements, memory.bits_per_element) == (0, 0, 0.0)
    assert memory.dense > 0
    assert memory.total - memory.bookkeeping == memory.elements * model.dtype.itemsize + memory.slack


def test_a_shape_that_does_not_fit_is_refused_at_once(model: LlamaForCausalLM, codecs_of: Any) -> None:
    def check(keys: Tensor, values: Tensor) -> None:
        raise QuantCacheError(f"made for 32 dimensions, got {keys.shape[-1]}")

    cache = BlockCache(model.config, lambda layer: (codecs_of(layer)[0], check))
    with pytest.raises(QuantCacheError, match="made for 32 dimensions, got"):
        logits(model, cache, torch.arange(10)[None])
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ["spectral", "sdpa"])
@pytest.mark.parametrize("dim", [0, 1], ids=["one row", "one head"])
def test_what_decodes_to_another_shape_is_an_error(dim: int, attention: str, model: LlamaForCausalLM) -> None:
    """Torch would spread it over all rows and heads."""

    class Narrow:
        bits = None

        def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
            return {"whole": split_blocks(x)}

        def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
            return join_blocks(fields["whole"]).narrow(dim, 0, 1)

        def tensors(self) -> list[Tensor]:
            return []

    def make(device: torch.device, tails: dict[str, Tensor], grid: object) -> dict[str, SideCodec]:
        return {"key": Narrow(), "value": Narrow()}

    model.set_attn_implementation(attention)
    cache = BlockCache(model.config, lambda layer: (make, None), residual_length=16)
    with pytest.raises((QuantCacheError, RuntimeError), match=r"expected|same slice shapes"):
        logits(model, cache, torch.arange(460).view(2, 230) % 31)
