"""Digests by which a saved cache knows the calibration and the model that it was filled with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.coding.schema import SIDES
from quantcache.common import compat
from quantcache.common.errors import CalibrationMismatch, QuantCacheError
from quantcache.common.tensor_file import content_bytes

WEIGHT_SAMPLES = 64
"""Elements of every parameter that go into a model's fingerprint."""

_SETTINGS = (
    *("rope_parameters", "no_rope_layers", "rms_norm_eps", "num_experts_per_tok"),
    *("attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier"),
)
"""What a config can say otherwise of the same weights, and change what they cache."""


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Where something lies in the memory of one process, as Python writes it."""


def calibration_digest(calibration: Calibration) -> str:
    """Digest of everything that gives codes their meaning.

    Args:
        calibration: The calibration, at some bits.

    Returns:
        SHA-256 in hex.
    """
    settings = asdict(calibration.metadata.codec)
    if settings["coding"] == "scalar":
        del settings["coding"]  # files written before there was a choice have the digest without it
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for index, layer in calibration.layers.items():
        digest.update(json.dumps([index, layer.rope.layout, layer.rope.inv_freq]).encode())
        for side in SIDES:
            for name, tensor in sorted(vars(layer.side(side)).items()):
                digest.update(f"{side}.{name}{None if tensor is None else list(tensor.shape)}".encode())
                if tensor is not None:
                    digest.update(content_bytes(tensor))
    return digest.hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """Digest of a sample of a model's weights: two checkpoints of one architecture differ in it.

    Args:
        model: The model, or a wrapper of torch.compile or PEFT around it: names are those in the model itself.

    Returns:
        SHA-256 in hex.

    Raises:
        QuantCacheError: Some weights are not in memory.
        TypeError: It is not a model.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"a model is needed to be identified by its weights, got {type(model).__name__}")
    return _sampled(compat.unwrapped(model))


def _sampled(model: torch.nn.Module) -> str:
    """The digest, under the names that a module's weights have in it."""
    digest = hashlib.sha256()
    samples, weights = [], [*_plain(model.named_parameters()), *_packed(model)]
    for name, parameter in weights:
        if parameter.is_meta:
            raise QuantCacheError(
                f"{name} is offloaded, so the model cannot be identified by its weights: leave out model=, or prefixes="
            )
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // WEIGHT_SAMPLES)][:WEIGHT_SAMPLES].float())
    devices = {sample.device for sample in samples}
    fetched = {device: iter(_fetched([each for each in samples if each.device == device])) for device in devices}
    for (name, parameter), sample in zip(weights, samples, strict=True):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(content_bytes(next(fetched[sample.device])))
    return digest.hexdigest()


def _plain(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; of one that is made of others (quanto, torchao) those, and in their names how they are read."""
    for name, tensor in named:
        if not compat.is_packed(tensor):
            yield name, tensor
            continue
        parts, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        kind = _ADDRESS.sub("", f"{type(tensor).__name__}{context}")
        yield from _plain((f"{name}.{kind}.{part}", getattr(tensor, part)) for part in parts)


def _packed(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Weights that are no parameters, by name: buffers of integers (GPTQ, AWQ), and what torch's modules give."""
    given = [
        (f"{place}.weight", module.weight())
        for place, module in model.named_modules()
        if callable(getattr(type(module), "weight", None))
    ]
    return [(name, weight.int_repr() if weight.is_quantized else weight) for name, weight in given] + [
        (f"{place}.{name}", buffer)
        for place, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
        and buffer.ndim > 1
        and not buffer.is_floating_point()
        and buffer.dtype != torch.bool
    ]


def model_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's config says that its weights do not show, and that what it caches depends on.

    Args:
        model: The model.

    Returns:
        JSON-ready values by name, those that the config has.
    """
    text_config = model.config.get_text_config(decoder=True)
    found: dict[str, Any] = {name: cache_layout.declared(text_config, name) for name in _SETTINGS}
    if cache_layout.length_of_constant_rotation(model.config) is not None:
        found["max_position_embeddings"] = cache_layout.declared(text_config, "max_position_embeddings")
    found["adapters"] = compat.adapters_at_work(model) or None
    settings: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return {name: value for name, value in settings.items() if value is not None}


def check_model(description: dict[str, Any], model: PreTrainedModel, path: Path) -> None:
    """Refuse a saved cache of other weights, or of the same weights used otherwise.

    Args:
        description: The file's, from :func:`quantcache.cache.files.read_description`.
        model: Model that will continue the cache.
        path: The file, for messages.

    Raises:
        CalibrationMismatch: The file was written by another model.
    """
    theirs = description.get("model")
    # Before 0.3 the names were a wrapper's own.
    if theirs is not None and theirs != (ours := model_digest(model)) and theirs != _sampled(model):
        raise CalibrationMismatch(f"{path} was filled by model {str(theirs)[:12]}, this one is {ours[:12]}")
    differs = _difference(description.get("settings"), model_settings(model))
    if differs is not None:
        name, there, here = differs
        raise CalibrationMismatch(f"{path} was filled by a model with {name} {there!r}, this one has {here!r}")


def _difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first value that two descriptions give otherwise; what only one of them names does not count."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return None if theirs is None or theirs == ours else (name, theirs, ours)
    found = (_difference(theirs[key], ours[key], f"{name}.{key}" if name else key) for key in theirs if key in ours)
    return next(filter(None, found), None)


def _fetched(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of one device in CPU memory, with one copy: to ask for each would wait for the device each time."""
    return torch.cat(tensors).cpu().split([len(tensor) for tensor in tensors])
