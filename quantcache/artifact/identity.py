"""Whether a calibration belongs to a model: samples of weights, rotation and name.

Geometry is compared elsewhere and decides what can be computed; identity decides what it is worth. A calibration of
other weights gives worse fidelity than none, and nothing in its outputs says so.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quantcache.artifact import cache_layout
from quantcache.artifact.card import is_repo_id
from quantcache.coding.schema import LayerCalibration, Metadata
from quantcache.common import compat
from quantcache.common.errors import CalibrationMismatch, CalibrationWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINGERPRINT = "fingerprint"
"""Key of the samples in an artifact's ``base_model``."""

SAMPLES = 16
"""Elements of each weight that are kept."""

PLACES = 4
"""Places in the model, spread over its layers, of which two neighbouring projections are sampled."""

EMBEDDING_ROWS = 1024
"""Tokens whose embeddings may be sampled: further ones come and go when embeddings are resized."""

MAX_WEIGHTS = 64
"""Weights in a fingerprint that is read."""

ROUNDING = 2.0**-8
"""Relative difference that casts between float32, bfloat16 and float16 leave: each rounds by 2^-9 at most."""

SUBNORMAL = 1e-6
"""Absolute difference that float16 leaves of weights near zero."""

FREQUENCY_TOLERANCE = 0.01
"""Relative difference of frequencies that still count as the same; buffers in bfloat16 differ by 0.004."""

_PROJECTION = re.compile(r"(^|[._])(k_proj|v_proj|key|value|qkv\w*|kv\w*|c_attn|query_key_value|Wqkv)([._]|$)")

_WRAPPED = "base_model.model."
"""What begins the names in fingerprints that were taken through PEFT's wrapper."""

Fingerprint = dict[str, dict[str, list[Any]]]
"""Shape of each sampled weight, and the sampled elements."""

ReadWeight = Callable[[str], Tensor | None]
"""Gives a weight by its name."""


def weight_samples(model: PreTrainedModel) -> Fingerprint:
    """A few elements of a few weights: two checkpoints of one architecture differ in them.

    Casts to another dtype leave them what they are within rounding, which a digest would not. Weights that are
    quantized, split or not in memory are left out. LoRA counts as if it was merged.

    Args:
        model: Model with its weights loaded; offloaded weights are left out.

    Returns:
        Samples by name of the parameter, ready for JSON; empty where no weight is plain.
    """
    parameters, read = compat.weights(model)
    names = {name: parameter for name, parameter in parameters.items() if _is_plain(parameter)}
    embedding = _embedding_name(model, parameters)
    projections = [name for name in names if name != embedding and _PROJECTION.search(name)]
    others = projections or [name for name in names if name != embedding]
    last = max(len(others) - 2, 0)
    chosen = {round(last * place / (PLACES - 1)) for place in range(PLACES)}
    wanted = [others[i] for i in sorted({i for first in chosen for i in (first, first + 1)}) if i < len(others)]
    if embedding in names:
        wanted.insert(0, str(embedding))
    return {
        name: {
            "shape": list(weight.shape),
            "values": _sample(weight, tuple(weight.shape), name == embedding),
        }
        for name in wanted
        if (weight := read(name)) is not None
    }


def with_projections(base_model: dict[str, Any], read: ReadWeight) -> dict[str, Any]:
    """What an artifact says of its model, for a copy of the model whose projections have been rewritten.

    Args:
        base_model: The artifact's section of that name.
        read: Gives a weight of the copy by its name; None for one that it does not have.

    Returns:
        A copy whose fingerprint has the new projections of keys and values, and leaves out those that are not there.
    """
    if FINGERPRINT not in base_model:
        return base_model
    found = {}
    for name, entry in base_model[FINGERPRINT].items():
        if not _PROJECTION.search(name):
            found[name] = entry
            continue
        weight = read(name)
        if weight is not None and list(weight.shape) == entry["shape"]:
            found[name] = {**entry, "values": _sample(weight, tuple(weight.shape), False)}
    return {**base_model, FINGERPRINT: found}


def other_projection(base_model: dict[str, Any], read: ReadWeight) -> str | None:
    """:func:`other_weight` of projections alone, for whoever reads a weight from a file to look at it.

    Args:
        base_model: The artifact's section of that name, with the fingerprint.
        read: Gives a weight by its name; None for one that is not there.

    Returns:
        As :func:`other_weight`.
    """
    return other_weight(base_model, lambda name: read(name) if _PROJECTION.search(name) else None)


def is_fingerprint(value: Any) -> bool:
    """Whether a JSON value has the form of a fingerprint."""
    if not isinstance(value, dict) or len(value) > MAX_WEIGHTS:
        return False
    for entry in value.values():
        shape, values = (entry.get("shape"), entry.get("values")) if isinstance(entry, dict) else (None, None)
        if not isinstance(shape, list) or not isinstance(values, list) or len(values) > SAMPLES or len(shape) < 2:
            return False
        if not all(type(size) is int and 0 < size < 1 << 40 for size in shape):
            return False
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30 for v in values):
            return False
    return True


def check_identity(
    layers: dict[int, LayerCalibration],
    metadata: Metadata,
    model: PreTrainedModel | PreTrainedConfig,
    strict: bool,
) -> None:
    """Say so where a calibration was made for another model of the same geometry.

    Args:
        layers: Constants of the calibration, by layer index.
        metadata: Its model, codec and recipe.
        model: The model, or where none is at hand its config: then only rotation and name are compared.
        strict: Refuse instead of warning.

    Raises:
        CalibrationMismatch: With ``strict``, the calibration is of another model.
    """
    given = model if isinstance(model, PreTrainedConfig) else model.config
    reasons = [other_rotation(layers, given)]
    differs = None if isinstance(model, PreTrainedConfig) else other_weights(metadata.base_model, model)
    if differs:
        reasons.append(f"the weights of {differs} differ")
    if differs != "":  # the same weights may go by another name
        reasons.append(other_name(metadata.base_model, given))
    found = "; ".join(reason for reason in reasons if reason)
    if not found:
        return
    message = f"the calibration was made for another model: {found}"
    if strict:
        raise CalibrationMismatch(message)
    warnings.warn(
        f"{message}. Output quality will be lower than with the model's own calibration; strict=True refuses it",
        CalibrationWarning,
        stacklevel=4,
    )


def other_weights(base_model: dict[str, Any], model: PreTrainedModel) -> str | None:
    """Compare a model's weights with an artifact's fingerprint.

    Args:
        base_model: The artifact's section of that name, with the fingerprint.
        model: Model to compare with.

    Returns:
        The first weight that differs, ``""`` if none does, None where nothing can be compared.
    """
    parameters, read = compat.weights(model)
    for name in _recorded(base_model):
        if read(name) is None and _is_adapted(name, compat.unwrapped(model)):
            return name
    return other_weight(base_model, read, _embedding_name(model, parameters))


def other_weight(base_model: dict[str, Any], read: ReadWeight, embedding: str | None = None) -> str | None:
    """Compare weights with an artifact's fingerprint.

    Args:
        base_model: The artifact's section of that name, with the fingerprint.
        read: Gives a weight by its name; None for one that is not to be compared.
        embedding: Name of the input embeddings, which may have been resized.

    Returns:
        The first weight that differs, ``""`` if none does, None where nothing can be compared.
    """
    compared = False
    for name, entry in _recorded(base_model).items():
        parameter = read(name)
        if parameter is None or not _is_plain(parameter):
            continue
        shape, resizable = tuple(entry["shape"]), name == embedding
        if tuple(parameter.shape[resizable:]) != shape[resizable:]:
            return name
        if resizable and parameter.shape[0] < min(shape[0], EMBEDDING_ROWS):
            continue
        pairs = list(zip(entry["values"], _sample(parameter, shape, resizable), strict=False))
        compared |= bool(pairs)
        if not all(abs(a - b) <= ROUNDING * max(abs(a), abs(b)) + SUBNORMAL for a, b in pairs):
            return name
    return "" if compared else None


def other_rotation(layers: dict[int, LayerCalibration], config: PreTrainedConfig) -> str | None:
    """Compare the frequencies that a calibration's keys were rotated with to those that a config declares.

    Args:
        layers: Constants of the calibration, by layer index.
        config: ``model.config``.

    Returns:
        How they differ; None if they do not, or where a config does not say enough.
    """
    text_config = config.get_text_config(decoder=True)
    for index, layer in layers.items():
        ours = sorted(layer.rope.inv_freq) if layer.rope.rotary_dim else []
        theirs = sorted(declared_frequencies(text_config, index)) if ours else []
        pairs = zip(ours, theirs, strict=True) if len(ours) == len(theirs) else ()
        if not all(math.isclose(a, b, rel_tol=FREQUENCY_TOLERANCE, abs_tol=1e-12) for a, b in pairs):
            return (
                f"keys of layer {index} were rotated by {ours[0]:.3g} to {ours[-1]:.3g} radians per token, this model "
                f"rotates them by {theirs[0]:.3g} to {theirs[-1]:.3g}"
            )
    return None


def declared_frequencies(text_config: PreTrainedConfig, layer: int) -> tuple[float, ...]:
    """Radians per token of every rotary pair that a config declares for a layer.

    Args:
        text_config: ``config.get_text_config(decoder=True)``.
        layer: Index of the layer.

    Returns:
        The frequencies; none where they depend on the length, or the config does not say.
    """
    try:
        parameters = getattr(text_config, "rope_parameters", None) or {}
        kinds = getattr(text_config, "layer_types", None) or ()
        own = parameters.get(kinds[layer]) if layer < len(kinds) else None
        if (own or parameters).get("rope_type") in cache_layout.LENGTH_DEPENDENT:
            return ()
        return cache_layout.rope_from_config(text_config, layer).inv_freq
    except Exception:  # configs need not be those of transformers' own models
        return ()


def other_name(base_model: dict[str, Any], config: PreTrainedConfig) -> str | None:
    """Compare Hub ids.

    A folder's name says nothing, and a repository of the same name under another owner is most often a mirror.

    Args:
        base_model: What the artifact says of its model.
        config: ``model.config``.

    Returns:
        How they differ; None if they do not, or if either is not a Hub id.
    """
    ours, theirs = base_model.get("id"), str(getattr(config, "_name_or_path", "") or "")
    if not is_repo_id(ours) or not is_repo_id(theirs) or os.path.isdir(theirs):
        return None
    mine, other = (str(name).rpartition("/")[2].casefold() for name in (ours, theirs))
    quantized = getattr(config, "quantization_config", None) is not None
    if mine == other or (quantized and other.startswith(mine)):
        return None
    return f"it was made on {ours}, this model is {theirs}"


def _recorded(base_model: dict[str, Any]) -> Fingerprint:
    """The fingerprint of an artifact, by the names that weights have in the model itself."""
    return {name.removeprefix(_WRAPPED): entry for name, entry in (base_model.get(FINGERPRINT) or {}).items()}


def _is_plain(parameter: Tensor) -> bool:
    """Whether a weight is whole, in memory and in a dtype that values can be read in."""
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and parameter.dtype in kinds
    return plain and not parameter.is_meta and parameter.ndim >= 2 and parameter.numel() >= SAMPLES


def _is_adapted(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is missing because an adapter (PEFT's LoRA and the like) is at work on one side alone."""
    stem, _, last = name.rpartition(".")
    modules = dict(model.named_modules())
    if stem.endswith(f".{compat.ADAPTED}"):
        plain = stem.removesuffix(f".{compat.ADAPTED}")
        return hasattr(modules.get(plain), last)
    adapter = modules.get(stem)
    return f"{stem}.{compat.ADAPTED}" in modules and not getattr(adapter, "disable_adapters", False)


def _embedding_name(model: PreTrainedModel, parameters: dict[str, Tensor]) -> str | None:
    """Name of the input embeddings."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, parameter in parameters.items() if parameter is weight), None)


def _sample(parameter: Tensor, shape: tuple[int, ...], is_embedding: bool) -> list[float]:
    """The sampled elements of a weight, with six significant digits."""
    rows, columns = shape[0], math.prod(shape[1:])
    if is_embedding:
        rows = min(rows, EMBEDDING_ROWS)
    steps = torch.arange(SAMPLES, dtype=torch.int64, device="cpu")
    at = (steps * rows // SAMPLES) * columns + steps * 37 % columns
    found = parameter.detach().reshape(-1)[at.to(parameter.device)].to(device="cpu", dtype=torch.float64)
    return [float(f"{value:.6g}") for value in found.tolist()]
