"""Models with quantized weights, for measuring a compressed cache on top of them."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from quantcache.common import compat
from quantcache.common.errors import QuantCacheError

KINDS = ("int8", "int4")
LIBRARIES = ("quanto", "torchao")
"""Those that may quantize weights, the one preferred first."""

GROUP_SIZES = (128, 64, 32)
"""Weights of a row that share a scale at 4 bits with torchao: the largest that divides the row, else all of it."""


def weights_library(name: str) -> tuple[str, Literal["int8", "int4"], str | None]:
    """Find what quantizes weights.

    Args:
        name: ``int8`` or ``int4``, after ``quanto-`` or ``torchao-`` if one of these is wanted.

    Returns:
        The library, the kind, and what is missing to use it (None if nothing is).

    Raises:
        QuantCacheError: The name is unknown.
    """
    wanted, _, kind = name.rpartition("-")
    if kind not in KINDS or wanted not in ("", *LIBRARIES):
        known = [*KINDS, *(f"{library}-{kind}" for library in LIBRARIES for kind in KINDS)]
        raise QuantCacheError(f"unknown weights {name!r}: known are {', '.join(known)}")
    missing = {library: compat.missing_quantizer(library) for library in LIBRARIES}
    found = wanted or next((library for library in LIBRARIES if missing[library] is None), LIBRARIES[0])
    return found, kind, missing[found]  # type: ignore[return-value]


def require_quantizer(name: str) -> tuple[str, Literal["int8", "int4"]]:
    """Refuse weights that nothing can quantize here.

    Args:
        name: See :func:`weights_library`.

    Returns:
        The library and the kind.

    Raises:
        QuantCacheError: The name is unknown, or the library is not installed.
    """
    library, kind, missing = weights_library(name)
    if missing:
        raise QuantCacheError(f"weights {name!r}: {missing}")
    return library, kind


def quantize_weights(model: PreTrainedModel, name: str) -> str:
    """Quantize the weights of a model's linear layers; embeddings and the output head stay as they are.

    The scheme is the library's own: quanto rounds to symmetric int8 per row or int4 in groups of 128; torchao to int8
    per row or int4 in :data:`GROUP_SIZES`.

    Args:
        model: Changed in place.
        name: See :func:`weights_library`.

    Returns:
        Library and kind, such as ``quanto-int4``.

    Raises:
        QuantCacheError: The name is unknown, or the library is not installed.
    """
    library, kind = require_quantizer(name)
    head = model.get_output_embeddings()
    kept = [path for path, module in model.named_modules() if module is head]
    if library == "quanto":
        _with_quanto(model, kind, kept)
    else:
        _with_torchao(model, kind, kept)
    return f"{library}-{kind}"


def _with_quanto(model: PreTrainedModel, kind: str, kept: list[str]) -> None:
    from optimum import quanto

    quanto.quantize(model, weights={"int8": quanto.qint8, "int4": quanto.qint4}[kind], exclude=kept)
    quanto.freeze(model)


def _with_torchao(model: PreTrainedModel, kind: str, kept: list[str]) -> None:
    from torchao import quantization

    int4 = getattr(torch, "int4")  # noqa: B009 - torch's type stubs lack it
    done = set(kept)

    def linear(size: int) -> list[str]:
        return [
            path
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and path not in done and module.in_features % size == 0
        ]

    granularities = [(size, quantization.PerGroup(size)) for size in GROUP_SIZES] + [(1, quantization.PerAxis(0))]
    for size, granularity in granularities if kind == "int4" else granularities[-1:]:
        paths = linear(size)
        config = (
            quantization.Int8WeightOnlyConfig()
            if kind == "int8"
            else quantization.IntxWeightOnlyConfig(weight_dtype=int4, granularity=granularity)
        )
        quantization.quantize_(model, config, filter_fn=lambda _, path, paths=paths: path in paths)
        done.update(paths)
