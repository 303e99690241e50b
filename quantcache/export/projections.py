"""Where an architecture keeps the projections around its key/value cache.

Everything that is not in the table is refused: whatever stands between the value projection, the cache and the output
projection (a norm of the values, a gate on the output) would make absorption wrong, and cannot be seen in the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quantcache.artifact.calibration import Calibration
from quantcache.coding.rope import RopeLayout
from quantcache.common import compat
from quantcache.common.errors import UnsupportedModel

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Layout = Literal["separate", "concatenated", "grouped"]


@dataclass(frozen=True)
class Architecture:
    """How the attention of one architecture names and lays out its projections.

    Attributes:
        module: Path of a layer's attention module; its first part is missing in some checkpoints.
        inputs: Projections of queries, keys and values: three names, or one of a fused projection.
        output: The projection that reads the attention's output.
        layout: ``separate`` projections; ``concatenated`` queries, keys and values of all heads; ``grouped`` by
            key/value head: its queries, its key, its value.
        transposed: Whether weights are ``[in, out]`` (GPT-2's Conv1D).
        rope: How keys rotate where they do.
        norm_offset: What a norm adds to its weight (Gemma's 1).
        sink_logits: Whether the attention weights sum to less than one, so that a mean cannot move to a bias.
    """

    module: str = "model.layers.{}.self_attn"
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    layout: Layout = "separate"
    transposed: bool = False
    rope: RopeLayout = "half"
    norm_offset: float = 0.0
    sink_logits: bool = False


_LLAMA = Architecture()
_COHERE = Architecture(rope="interleaved")
_FUSED = ("query_key_value",)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2"), _LLAMA),
    **dict.fromkeys(("stablelm", "smollm3", "granite", "olmo2"), _LLAMA),
    **dict.fromkeys(("cohere", "glm4"), _COHERE),
    "gemma3_text": Architecture(norm_offset=1.0),
    "gpt_oss": Architecture(sink_logits=True),
    "phi": Architecture(output="dense"),
    "phi3": Architecture(inputs=("qkv_proj",), layout="concatenated"),
    "opt": Architecture("model.decoder.layers.{}.self_attn", output="out_proj", rope="none"),
    "gptj": Architecture("transformer.h.{}.attn", output="out_proj", rope="interleaved"),
    "gpt2": Architecture("transformer.h.{}.attn", ("c_attn",), "c_proj", "concatenated", True, "none"),
    "gpt_neox": Architecture("gpt_neox.layers.{}.attention", _FUSED, "dense", "grouped"),
    "bloom": Architecture("transformer.h.{}.self_attention", _FUSED, "dense", "grouped", rope="none"),
    "falcon": Architecture("transformer.h.{}.self_attention", _FUSED, "dense", "grouped"),
    "mpt": Architecture("transformer.blocks.{}.attn", ("Wqkv",), "out_proj", "concatenated", rope="none"),
}
"""By ``model_type``; tests/integration/test_absorb.py has a model of each."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor; the dtype is None where torch has no name for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Projection:
    """One projection, or its share of a fused one.

    Attributes:
        weight: Name of the weight in the checkpoint.
        bias: Name of the bias, or None.
        rows: Its outputs, head by head.
    """

    weight: str
    bias: str | None
    rows: Tensor


@dataclass(frozen=True)
class Projections:
    """The tensors of one layer that absorption changes.

    Attributes:
        query: Projection of the queries.
        key: Where the keys are computed.
        value: Where the values are computed.
        output: The output projection; its rows are not used.
        norms: Weights of the norms of queries and keys, or None.
        norm_offset: What the norms add to their weights.
        transposed: Whether projections are stored ``[in, out]``.
        takes_mean: Whether the biases can take the values' mean.
        scales_keys: Whether what is between the key projection and the cache is known well enough to scale keys.
    """

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    norms: tuple[str, str] | None
    norm_offset: float
    transposed: bool
    takes_mean: bool
    scales_keys: bool

    def names(self) -> list[str]:
        """All tensors there are."""
        projections = (self.query, self.key, self.value, self.output)
        found = [name for p in projections for name in (p.weight, p.bias) if name is not None]
        return list(dict.fromkeys([*found, *(self.norms or ())]))


def input_rows(layout: Layout, heads: int, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the input projections that are queries, keys and values.

    Args:
        layout: How they are laid out.
        heads: H, key/value heads.
        groups: G, query heads on each of them.
        dim: D, dimension of a head.

    Returns:
        Indices, head by head: ``[H * G * D]``, ``[H * D]`` and ``[H * D]``.
    """
    queries, own = _range(heads * groups * dim), _range(heads * dim)
    if layout == "separate":
        return queries, own, own
    if layout == "concatenated":
        return queries, own + queries.numel(), own + queries.numel() + own.numel()
    grouped = _range(heads * (groups + 2) * dim).view(heads, groups + 2, dim)
    return grouped[:, :groups].flatten(), grouped[:, groups].flatten(), grouped[:, groups + 1].flatten()


def _range(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")


def find_projections(
    config: PreTrainedConfig, calibration: Calibration, tensors: Mapping[str, TensorInfo]
) -> dict[int, Projections]:
    """Find every tensor that is to change, and check it.

    Args:
        config: ``model.config``.
        calibration: A calibration that fits the config.
        tensors: All tensors of the checkpoint or model.

    Returns:
        The projections of every calibrated layer.

    Raises:
        UnsupportedModel: The architecture is unknown, or its weights are quantized or not where they should be.
    """
    architecture = architecture_of(config)
    query_heads = config.get_text_config(decoder=True).num_attention_heads
    rotation = "none" if getattr(config, "alibi", False) else architecture.rope
    found = {}
    for index, layer in calibration.layers.items():
        heads, dim = layer.value.num_heads, layer.value.dim
        if query_heads % heads or layer.key.dim != dim:
            raise UnsupportedModel(
                f"layer {index} has {query_heads} query heads on {heads} value heads, and keys of dimension "
                f"{layer.key.dim} with values of {dim}: absorption needs whole groups and one dimension"
            )
        groups = query_heads // heads
        prefix = _prefix(architecture, index, tensors)
        rows = input_rows(architecture.layout, heads, groups, dim)
        query, key, value = inputs = [
            _projection(prefix + name, own, tensors)
            for name, own in zip(architecture.inputs * (3 // len(architecture.inputs)), rows, strict=True)
        ]
        output = _projection(prefix + architecture.output, _range(0), tensors)
        norms = (f"{prefix}q_norm.weight", f"{prefix}k_norm.weight")
        normed = norms[1] in tensors
        projections = Projections(
            query,
            key,
            value,
            output,
            norms if normed else None,
            architecture.norm_offset,
            architecture.transposed,
            takes_mean=None not in (value.bias, output.bias) and not architecture.sink_logits,
            # qk_layernorm (Phi, StableLM) keeps its norms elsewhere; a rotation that calibration did not recognise
            # may pair any dimensions.
            scales_keys=not getattr(config, "qk_layernorm", False) and layer.rope.layout == rotation,
        )
        axis = 1 if architecture.transposed else 0
        for projection in {p.weight: p for p in inputs}.values():
            size = sum(p.rows.numel() for p in inputs if p.weight == projection.weight)
            _check(tensors, projection.weight, axis, size)
        _check(tensors, output.weight, 1 - axis, query_heads * dim)
        for name in projections.names():
            _check(tensors, name)
        found[index] = projections
    return found


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """How a model lays out its projections.

    Args:
        config: ``model.config``.

    Returns:
        The entry of the table.

    Raises:
        UnsupportedModel: The architecture is unknown, or the config turns on what absorption cannot follow.
    """
    compat.require_decoder(config)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UnsupportedModel(
            f"values of a {config.model_type} model cannot be absorbed: known are {', '.join(sorted(ARCHITECTURES))}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            "the model's weights are quantized (quantization_config is set): absorption needs float weights"
        )
    clip = getattr(config, "clip_qkv", None)
    clip = clip if clip is not None else getattr(getattr(config, "attn_config", None), "clip_qkv", None)
    if clip is not None:
        raise UnsupportedModel(
            f"the model clips its values (clip_qkv is {clip}), so the basis of its values cannot be changed"
        )
    if getattr(config, "new_decoder_architecture", False):
        raise UnsupportedModel(
            "a Falcon model of the new decoder architecture caches a copy of its values for every query head, each "
            "calibrated by itself, but has one projection for all of them"
        )
    return architecture


def _prefix(architecture: Architecture, index: int, tensors: Mapping[str, TensorInfo]) -> str:
    """The start of the names of a layer's attention, with or without the part that base models leave out."""
    full = architecture.module.format(index)
    for module in (full, full.partition(".")[2]):
        if f"{module}.{architecture.output}.weight" in tensors:
            return f"{module}."
    raise UnsupportedModel(f"the model has no tensor {full}.{architecture.output}.weight")


def _projection(name: str, rows: Tensor, tensors: Mapping[str, TensorInfo]) -> Projection:
    bias = f"{name}.bias"
    return Projection(f"{name}.weight", bias if bias in tensors else None, rows)


def _check(tensors: Mapping[str, TensorInfo], name: str, axis: int = 0, size: int | None = None) -> None:
    if name not in tensors:
        raise UnsupportedModel(f"the model has no tensor {name}")
    info = tensors[name]
    if info.dtype not in FLOATS:
        found = info.dtype or "a dtype of its own"
        raise UnsupportedModel(f"{name} is quantized ({found}): absorption needs float weights")
    if size is not None and (len(info.shape) != 2 or info.shape[axis] != size):
        raise UnsupportedModel(f"{name} has shape {list(info.shape)}, expected {size} at dimension {axis}")
