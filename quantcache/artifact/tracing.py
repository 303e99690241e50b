"""What really reaches a model's cache: read off the model, which is built and run without weights."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, PreTrainedConfig

from quantcache.artifact.cache_layout import declared, full_attention_layers, kv_geometry
from quantcache.common import compat
from quantcache.common.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[tuple[int, int], tuple[int, int]]
"""(heads, dimension) of a layer's keys and of its values."""


def empty_model(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A model without weights, in bfloat16 on the meta device.

    Args:
        config: Its config.
        attention: Attention implementation; transformers' choice if None.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnsupportedModel: transformers has no model of this kind that generates text.
    """
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        with contextlib.suppress(StrictDataclassError):  # some configs insist on having one
            part.pad_token_id = None  # some models would look for padding among tokens that have no values here
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = compat.auto_class(config).from_config(config, dtype=torch.bfloat16, **options)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "Unrecognized configuration class" in reason:
            reason = "transformers has no causal language model of this type"
        raise UnsupportedModel(f"a {config.model_type} model cannot be built from its config: {reason}") from error
    model.train(False)
    return model


def traced_layers(config: PreTrainedConfig) -> list[Any] | None:
    """The cache's layers after a forward pass of one token without weights.

    Args:
        config: The model's config.

    Returns:
        The layers, their tensors on the meta device; None if the model cannot do one.

    Raises:
        UnsupportedModel: The model cannot be built from its config.
    """
    for attention in (None, "eager"):
        try:
            model = empty_model(config, attention)
            if model._can_set_experts_implementation():
                model.set_experts_implementation("batched_mm")  # the others choose experts by looking at values
            cache = DynamicCache(config=config)
            token = torch.zeros(1, 1, dtype=torch.long, device="meta")
            with torch.no_grad():
                model(input_ids=token, **compat.cache_argument(model, cache), use_cache=True)
        except UnsupportedModel:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError):
            continue  # it branches on values somewhere
        return list(cache.layers)
    return None


def held_shape(layer: Any) -> Shape | None:
    """(heads, dimension) of the keys and the values that a layer holds.

    Args:
        layer: A layer of a cache.

    Returns:
        Both; None if it holds none.
    """
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return None
    return (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])


def cached_shapes(config: PreTrainedConfig) -> dict[int, Shape]:
    """What the layers that grow with the text cache: as declared, or read off the model where it caches otherwise.

    Args:
        config: The model's config.

    Returns:
        Shapes by layer.

    Raises:
        UnsupportedModel: Neither the config nor a forward pass without weights tells.
    """
    layers = full_attention_layers(config)
    text = config.get_text_config(decoder=True)
    plain = not any(declared(text, name) for name in ("kv_lora_rank", "multi_query", "global_head_dim"))
    if plain and isinstance(declared(text, "num_attention_heads"), int | list):
        return {index: (kv_geometry(text, index),) * 2 for index in layers}
    traced = traced_layers(config) or []
    shapes = {index: shape for index in layers if index < len(traced) and (shape := held_shape(traced[index]))}
    latent, rotated = (declared(text, name) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    if not traced and isinstance(latent, int) and isinstance(rotated, int):
        shapes = dict.fromkeys(layers, ((1, latent), (1, rotated)))
    if len(shapes) < len(layers):
        missing = [index for index in layers if index not in shapes]
        raise UnsupportedModel(
            f"quantcache does not know the key/value shapes of layers {missing} of a {config.model_type} model"
        )
    return shapes
