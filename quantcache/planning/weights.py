"""Bytes of a model's weights in the formats they are distributed in, scales and zero points included.

Matrices are the weights of linear layers and of stacked experts, each seen as rows of inputs. Embeddings and everything
that is not a matrix stay in 16 bits, except where a format says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Kind = Literal["matrix", "output", "embedding", "other"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a model.

    Attributes:
        kind: ``matrix`` (of a linear layer or of an expert), ``output`` (what gives the logits), ``embedding``, or
            ``other``.
        rows: Output features, of all experts together; 1 for tensors that are not matrices.
        columns: Input features; all elements of tensors that are not matrices.
        dims: Number of its dimensions.
        experts: Matrices stacked in it.
    """

    kind: Kind
    rows: int
    columns: int
    dims: int
    experts: int = 1

    @property
    def elements(self) -> int:
        """Elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class WeightsFormat:
    """A way of storing weights.

    Attributes:
        name: As given on the command line.
        layout: What is stored, in one line.
        matrix: Bytes of a matrix, from its shape.
        others: Bytes of any other tensor.
        use: How transformers runs it, in one line.
    """

    name: str
    layout: str
    matrix: Callable[[Weight], int]
    others: Callable[[Weight], int]
    use: str


def list_weights(model: PreTrainedModel) -> list[Weight]:
    """Every tensor of a model, tied ones once.

    Args:
        model: The model; it may lie on the meta device.

    Returns:
        One entry for each tensor of its state dict.
    """
    linear = {id(m.weight): isinstance(m, Conv1D) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    output: Any = model.get_output_embeddings()
    head = None if output is None else id(output.weight)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    found: dict[int, Weight] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        shape, transposed = tuple(tensor.shape), linear.get(id(tensor), False)
        kind: Kind = "other"
        if id(tensor) == head:
            kind = "output"
        elif id(tensor) in embeddings and tensor.dim() == 2:
            kind = "embedding"
        elif id(tensor) in linear or (tensor.dim() == 3 and id(tensor) not in convolutions):
            kind = "matrix"
        if kind == "other":
            found[id(tensor)] = Weight("other", 1, tensor.numel(), tensor.dim())
            continue
        columns = shape[0] if transposed else shape[-1]
        experts = shape[0] if len(shape) == 3 else 1
        found[id(tensor)] = Weight(kind, tensor.numel() // columns, columns, tensor.dim(), experts)
    return list(found.values())


def weights_bytes(weights: list[Weight], form: str) -> int:
    """Bytes of a model's weights.

    Args:
        weights: What :func:`list_weights` returned.
        form: A name in :data:`WEIGHTS_FORMATS`.

    Returns:
        Bytes.
    """
    known = WEIGHTS_FORMATS[form]
    return sum(known.matrix(weight) if weight.kind == "matrix" else known.others(weight) for weight in weights)


def _sixteen(weight: Weight) -> int:
    return 2 * weight.elements


def _int8(weight: Weight) -> int:
    return weight.elements + 2 * weight.rows


def _groups(weight: Weight) -> int:
    """Groups of 128 neighbouring inputs, the last of each row possibly smaller."""
    return weight.rows * math.ceil(weight.columns / 128)


def _int4(weight: Weight) -> int:
    return math.ceil(weight.elements / 2) + 4 * _groups(weight)


def _awq(weight: Weight) -> int:
    return math.ceil(weight.elements / 2) + 2 * _groups(weight) + math.ceil(_groups(weight) / 2)


def _gptq(weight: Weight) -> int:
    return _awq(weight) + 4 * weight.columns * weight.experts


def _nf4(weight: Weight) -> int:
    blocks = math.ceil(weight.elements / 64)
    # 16 and 256 levels and the mean of the scales in float32, once for each tensor.
    return math.ceil(weight.elements / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def _gguf(block_bytes: int) -> Callable[[Weight], int]:
    def size(weight: Weight) -> int:
        if weight.kind == "other":
            return (4 if weight.dims < 2 else 2) * weight.elements  # llama.cpp keeps vectors in float32
        if weight.columns % 32:
            return _sixteen(weight)
        if weight.kind == "output":
            wide = weight.columns % 256 == 0
            return weight.elements // 256 * 210 if wide else weight.elements // 32 * 34  # Q6_K, Q8_0
        return weight.elements // 32 * block_bytes

    return size


_DEQUANTIZED = "transformers turns a GGUF file into dense weights when it loads it: this is what llama.cpp holds"

WEIGHTS_FORMATS: dict[str, WeightsFormat] = {
    form.name: form
    for form in (
        WeightsFormat("bf16", "16 bits for every element", _sixteen, _sixteen, "as it is"),
        WeightsFormat(
            "int8",
            "matrices: 8 bits and a 16-bit scale for each output; the rest in 16 bits",
            _int8,
            _sixteen,
            "TorchAoConfig with Int8WeightOnlyConfig",
        ),
        WeightsFormat(
            "int4-g128",
            "matrices: 4 bits, a 16-bit scale and a 16-bit zero point for 128 inputs; the rest in 16 bits",
            _int4,
            _sixteen,
            "TorchAoConfig with Int4WeightOnlyConfig(group_size=128)",
        ),
        WeightsFormat(
            "gptq",
            "matrices: 4 bits, a 16-bit scale and a 4-bit zero point for 128 inputs, a 32-bit group index for each "
            "input; the rest in 16 bits",
            _gptq,
            _sixteen,
            "a GPTQ checkpoint, group size 128",
        ),
        WeightsFormat(
            "awq",
            "matrices: 4 bits, a 16-bit scale and a 4-bit zero point for 128 inputs; the rest in 16 bits",
            _awq,
            _sixteen,
            "an AWQ checkpoint, group size 128",
        ),
        WeightsFormat(
            "gguf-q4_0",
            "matrices and embeddings: 18 bytes for 32 elements; output Q6_K (210 bytes for 256); vectors float32",
            _gguf(18),
            _gguf(18),
            _DEQUANTIZED,
        ),
        WeightsFormat(
            "gguf-q5_1",
            "matrices and embeddings: 24 bytes for 32 elements; output Q6_K (210 bytes for 256); vectors float32",
            _gguf(24),
            _gguf(24),
            _DEQUANTIZED,
        ),
        WeightsFormat(
            "nf4",
            "matrices: 4 bits, an 8-bit scale for 64 elements, a 32-bit scale for 256 of those (double quantisation); "
            "the rest in 16 bits",
            _nf4,
            _sixteen,
            "BitsAndBytesConfig with load_in_4bit, nf4 and bnb_4bit_use_double_quant",
        ),
    )
}
"""Formats of weights, by name. Layouts are those of torchao, GPTQ and AWQ checkpoints, llama.cpp and bitsandbytes."""
