"""transformers' quantized caches, and the packages that they need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, QuantizedCache, cache_utils
from transformers.utils import is_hqq_available, is_optimum_quanto_available, is_torchao_available

from quantcache.common.compat.wrappers import is_packed

HAS_FP8_CACHE = hasattr(cache_utils, "Fp8QuantizedLayer")
"""Whether transformers' QuantizedCache has an fp8 back end (5.23 has, 5.17 has not)."""


def missing_quantizer(backend: str) -> str | None:
    """What is missing to quantize with a library that transformers can use.

    Args:
        backend: ``quanto``, ``hqq`` or ``torchao``.

    Returns:
        A clause, None if nothing is.
    """
    package, available = {
        "quanto": ("optimum-quanto", is_optimum_quanto_available),
        "hqq": ("hqq", is_hqq_available),
        "torchao": ("torchao", is_torchao_available),
    }[backend]
    return None if available() else f"needs {package}"


def quantized_cache(backend: str, config: PreTrainedConfig, **options: Any) -> Cache:
    """transformers' own quantized cache.

    Args:
        backend: ``quanto``, ``hqq`` or ``fp8``.
        config: The model's config.
        options: Further arguments of ``QuantizedCache``.

    Returns:
        An empty cache.

    Raises:
        ImportError: The back end's package is too old.
        ValueError: The model has layers that are not full attention, or the back end refuses an option.
    """
    return QuantizedCache(backend, config, **options)


def quantized_parts(layer: Any) -> list[tuple[torch.Size, list[torch.Tensor], list[torch.Tensor]]]:
    """What a layer of transformers' quantized cache stores, its residual apart.

    Args:
        layer: A cache layer.

    Returns:
        For keys and values: the shape they stand for, tensors of codes, tensors of scales and zero points. Empty for
        layers of other kinds.
    """
    parts = []
    for stored in (getattr(layer, "_quantized_keys", None), getattr(layer, "_quantized_values", None)):
        if stored is None:
            continue
        if isinstance(stored, torch.Tensor):  # quanto
            leaves = list(_leaves(stored))
            shape = stored.shape
        elif isinstance(stored[1], dict):  # hqq
            leaves = [stored[0], stored[1]["scale"], stored[1]["zero"]]
            shape = torch.Size(stored[1]["shape"])
        else:  # fp8
            parts.append((stored[0].shape, [stored[0]], [stored[1]]))
            continue
        codes = [leaf for leaf in leaves if not leaf.is_floating_point()]
        parts.append((shape, codes, [leaf for leaf in leaves if leaf.is_floating_point()]))
    return parts


def _leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor subclass."""
    if not is_packed(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _leaves(getattr(tensor, name))
