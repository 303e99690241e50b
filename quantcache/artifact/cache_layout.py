"""What a config says of a model's cache: kinds of layers, heads and dimensions, and what can be compressed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantcache.coding.rope import Rope
from quantcache.common import compat
from quantcache.common.errors import NothingToCompress, UnsupportedModel

_CACHE_ATTRIBUTES = (
    "num_hidden_layers",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "num_kv_shared_layers",
    "kv_sharing_modes",
    "number_of_conv_states",
    "cross_attention_layers",
    "num_key_value_heads",
    "head_dim",
)
"""Attributes of a text config that decide a cache's layers and geometry."""

_PER_LAYER = ("sliding_window", "attention_chunk_size", "number_of_conv_states")
"""Those of them that a cache's layer takes from a config of the layer's own."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies change with the length of the context."""

# ---------------------------------------------------------------------- what a config declares


def layer_configs(text_config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config of every layer; transformers refuses to read from the whole what differs between layers.

    Args:
        text_config: ``config.get_text_config(decoder=True)``.

    Returns:
        One config for each layer; only one where all layers are alike.
    """
    if not getattr(text_config, "is_heterogeneous", False):
        return [text_config]
    return list(text_config.per_layer_config)


def declared(text_config: PreTrainedConfig, name: str) -> Any:
    """What a config says of its layers.

    Args:
        text_config: ``config.get_text_config(decoder=True)``.
        name: Attribute to look up.

    Returns:
        Its value, None if there is none; a list with one value for each layer where they differ.
    """
    values = [getattr(each, name, None) for each in layer_configs(text_config)]
    return values[0] if all(value == values[0] for value in values) else values


def largest(text_config: PreTrainedConfig, *names: str) -> int | None:
    """The largest number that a config declares under any of some names, for any layer.

    Args:
        text_config: ``config.get_text_config(decoder=True)``.
        names: Attributes, of which the first that is declared counts.

    Returns:
        The number; None if it declares none.
    """
    for name in names:
        value = declared(text_config, name)
        numbers = [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, int)]
        if numbers:
            return max(numbers)
    return None


def kv_geometry(text_config: PreTrainedConfig, layer: int = 0) -> tuple[int, int]:
    """Number of key/value heads and head dimension that a text config declares for a layer.

    Some models cache something else: see :func:`cached_shapes`.

    Args:
        text_config: ``config.get_text_config(decoder=True)``.
        layer: Index of the layer.

    Returns:
        Hkv and D.

    Raises:
        UnsupportedModel: The config declares no heads.
    """
    configs = layer_configs(text_config)
    config = configs[layer if len(configs) > 1 else 0]
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    dim = getattr(config, "head_dim", None)
    if dim is None and isinstance(heads, int) and heads and isinstance(hidden, int):
        dim = hidden // heads
    if not isinstance(heads, int) or not heads or not dim:
        raise UnsupportedModel(
            f"the config of a {config.model_type} model declares {heads!r} attention heads and a head dimension of "
            f"{dim!r}: the shape of its cache cannot be computed from them"
        )
    return getattr(config, "num_key_value_heads", None) or heads, dim


def cache_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The attributes of a model's config that decide its cache.

    Args:
        config: ``model.config``.

    Returns:
        JSON-ready attributes, those that the text config has; lists with one entry for each layer where layers differ.
    """
    text_config = config.get_text_config(decoder=True)
    found = {name: declared(text_config, name) for name in _CACHE_ATTRIBUTES}
    try:
        shapes = [kv_geometry(text_config, layer) for layer in range(len(layer_configs(text_config)))]
    except UnsupportedModel:
        shapes = []
    for place, name in enumerate(("num_key_value_heads", "head_dim")):
        values = [shape[place] for shape in shapes]
        found[name] = None if not values else values[0] if len(set(values)) == 1 else values
    found["model_type"] = text_config.model_type
    return {name: value for name, value in found.items() if value is not None}


def config_from_cache_config(attributes: dict[str, Any]) -> PreTrainedConfig:
    """A config that gives the same cache layers as the one :func:`cache_config` was taken from.

    Args:
        attributes: What :func:`cache_config` returned.

    Returns:
        A bare config.
    """
    config: Any = PreTrainedConfig()
    shared, types = attributes.get("num_kv_shared_layers"), attributes.get("layer_types")
    if shared and types and "kv_sharing_modes" not in attributes:  # transformers 5.17 leaves such layers out
        own = len(types) - shared
        attributes = {**attributes, "kv_sharing_modes": [None] * own + ["reuse"] * shared}
    overrides: dict[int | str, dict[str, Any]] = {}
    for name in _CACHE_ATTRIBUTES:
        value = attributes.get(name)
        if name in _PER_LAYER and isinstance(value, list):
            for index, each in enumerate(value):
                overrides.setdefault(index, {})[name] = each
        elif value is not None:
            # Set one by one: a bare config's constructor refuses layer types that only a model's own config knows.
            setattr(config, name, value)
    if overrides:
        config.per_layer_config = overrides
    bare: PreTrainedConfig = config
    return bare


def rope_from_config(text_config: PreTrainedConfig, layer: int) -> Rope:
    """The rotation that a config declares for a layer, without looking at the model.

    Only for stand-ins: calibration measures the layout on the model itself.

    Args:
        text_config: ``config.get_text_config(decoder=True)``.
        layer: Index of the layer.

    Returns:
        A half-split rotation; ``Rope()`` if the config has no RoPE parameters.
    """
    configs = layer_configs(text_config)
    config = configs[layer if len(configs) > 1 else 0]
    parameters = getattr(config, "rope_parameters", None) or {}
    rotary_dim = getattr(config, "rotary_dim", None)  # all that GPT-J and CodeGen declare
    if not parameters and not rotary_dim:
        return Rope()
    layer_types = getattr(config, "layer_types", None)
    more: dict[str, Any] = {}
    if layer_types and layer_types[layer] in parameters:
        more["layer_type"] = layer_types[layer]
        parameters = parameters[layer_types[layer]]
        if parameters is None:  # a layer without RoPE among others that have it
            return Rope()
    _, dim = kv_geometry(text_config, layer)
    rotary = rotary_dim or int(dim * parameters.get("partial_rotary_factor", 1.0)) // 2 * 2
    theta = parameters.get("rope_theta", 10_000.0)
    kind = parameters.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS and kind not in LENGTH_DEPENDENT:
        inv_freq = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **more)[0]
        return Rope("half", tuple(inv_freq.double().tolist()))
    return Rope("half", tuple(theta ** (-2.0 * i / rotary) for i in range(rotary // 2)))


def length_of_constant_rotation(config: PreTrainedConfig) -> int | None:
    """How long a text may get before the keys of its first tokens are rotated otherwise than in a shorter one.

    Args:
        config: ``model.config``.

    Returns:
        The largest number of tokens at which nothing has changed; None where rotations do not depend on the length.
    """
    limits = []
    for each in layer_configs(config.get_text_config(decoder=True)):
        parameters = getattr(each, "rope_parameters", None) or {}
        for one in (parameters, *parameters.values()):
            if isinstance(one, dict) and one.get("rope_type") in LENGTH_DEPENDENT:
                own = one.get("original_max_position_embeddings") if one["rope_type"] == "longrope" else None
                limits.append(own or getattr(each, "max_position_embeddings", None) or 0)
    # transformers leaves a "dynamic" rotation as a longer text has made it for a text of exactly the limit.
    return min(limits) - 1 if limits else None


# ---------------------------------------------------------------------- which layers there are


def stock_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of transformers' own cache for a model.

    Args:
        config: ``model.config``.

    Returns:
        Empty layers.

    Raises:
        UnsupportedModel: The config is an encoder-decoder's, or transformers makes no cache from it.
    """
    compat.require_decoder(config)
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(
            f"transformers cannot build a key/value cache from the config of a {config.model_type} model: {reason}"
        ) from error


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers whose cache grows with the whole text.

    Args:
        config: ``model.config``.

    Returns:
        Layer indices; without the layers that hold another input's tokens, such as an image's.
    """
    layers = stock_layers(config)
    others = cross_attention_layers(config)
    return [index for index, layer in enumerate(layers) if compat.is_full_attention(layer) and index not in others]


def cross_attention_layers(config: PreTrainedConfig) -> set[int]:
    """Indices of the layers whose keys and values are of another input than the text (Llama 3.2 Vision's images).

    Args:
        config: ``model.config``.

    Returns:
        Layer indices.
    """
    return set(getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ())


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether some layers attend on what another layer has cached (Gemma 3n, Gemma 4).

    Args:
        config: Any config, also of a composite model.

    Returns:
        True if so.
    """
    text_config = config.get_text_config(decoder=True)
    modes = getattr(text_config, "kv_sharing_modes", None) or ()
    return bool(getattr(text_config, "num_kv_shared_layers", None)) or any(modes)


def compressible_layers(config: PreTrainedConfig) -> list[int]:
    """The layers that a SpectralCache compresses: the one check of all that calibrates or makes caches.

    Args:
        config: ``model.config``.

    Returns:
        Layer indices, at least one.

    Raises:
        NothingToCompress: No layer grows with the text in a way that quantcache knows; the message says what they are.
        UnsupportedModel: The config is an encoder-decoder's, or transformers makes no cache from it.
    """
    found = full_attention_layers(config)
    if found:
        return found
    raise NothingToCompress(
        f"a {config.model_type} model has nothing to compress: {_why_nothing(config)}; use the model's own cache"
    )


def _why_nothing(config: PreTrainedConfig) -> str:
    """What layers a cache has, where none of them can be compressed."""
    layers = stock_layers(config)
    windows = [layer for layer in layers if compat.is_window(layer)]
    recurrent = [layer for layer in layers if compat.is_recurrent(layer)]
    known = [*windows, *recurrent, *(layer for layer in layers if compat.is_placeholder(layer))]
    unknown = [layer for layer in layers if not any(layer is each for each in known)]
    parts = []
    if windows:
        sizes = sorted({layer.sliding_window for layer in windows})
        parts.append(f"{len(windows)} layers keep a sliding window of {' or '.join(map(str, sizes))} tokens")
    if recurrent:
        parts.append(f"{len(recurrent)} layers hold recurrent states of fixed size")
    for name, count in Counter(type(layer).__name__ for layer in unknown).items():
        parts.append(f"{count} layers are of type {name}, which quantcache does not support")
    return " and ".join(parts) or "its cache has no layers"
