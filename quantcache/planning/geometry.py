"""What a model's cache and weights consist of, from its config alone: the model is built without weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from quantcache import compat
from quantcache.accounting import LayerSize, SideSize
from quantcache.data import demo_model_path
from quantcache.errors import QuantCacheError, UnsupportedModel

BUNDLED_MODEL = "wiki11m"

Basis = Literal["traced", "declared"]


@dataclass(frozen=True)
class Geometry:
    """The layers of a model's cache.

    Attributes:
        layers: One entry for each layer that holds keys and values, with no codes; ``blocks`` marks those that grow
            with the whole context, which quantcache compresses.
        state_bytes: Bytes for each row that recurrent layers hold at any length.
        basis: ``traced``: heads and dimensions were read off a forward pass without weights. ``declared``: they are
            those that the config declares, because the model cannot be run without weights.
    """

    layers: tuple[LayerSize, ...]
    state_bytes: int
    basis: Basis

    @property
    def elements(self) -> int:
        """Elements of one token in the layers that grow with the context."""
        return sum(layer.elements for layer in self.layers if layer.blocks)

    def dense(self) -> list[LayerSize]:
        """The layers of transformers' own cache."""
        return [replace(layer, blocks=False) for layer in self.layers]


def load_config(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model.

    Args:
        name: A ``config.json``, a folder that has one, a Hub id, or ``wiki11m``.
        revision: Hub revision.
        trust_remote_code: Allow model code from the Hub.

    Returns:
        The config.

    Raises:
        QuantCacheError: There is none, it cannot be read, or it is an encoder-decoder's.
    """
    source = demo_model_path() if str(name) == BUNDLED_MODEL else name
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise QuantCacheError(f"no config of {name}: {first[0] if first else type(error).__name__}") from error
    if not isinstance(config, PreTrainedConfig):
        raise QuantCacheError(f"no config of {name}: it is a {type(config).__name__}")
    compat.require_decoder(config)
    return config


def empty_model(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A model without weights, in bfloat16 on the meta device.

    Args:
        config: Its config.
        attention: Attention implementation; transformers' choice if None.

    Returns:
        The model, in evaluation mode.

    Raises:
        UnsupportedModel: transformers has no causal language model of this kind.
    """
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        part.pad_token_id = None  # some models would look for padding among tokens that have no values here
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        if "Unrecognized configuration class" in reason:
            reason = "transformers has no causal language model of this kind"
        raise UnsupportedModel(f"a {config.model_type} model cannot be built from its config: {reason}") from error
    return model.eval()


def read_geometry(config: PreTrainedConfig) -> Geometry:
    """The layers of a model's cache.

    Args:
        config: The model's config.

    Returns:
        Its layers.

    Raises:
        UnsupportedModel: It has layers whose bytes are not known, or cannot be built from its config.
    """
    compat.require_decoder(config)
    stock = DynamicCache(config=config).layers
    traced = _traced(config)
    if traced is None:
        heads, dim = compat.kv_geometry(config.get_text_config(decoder=True))
        shapes: Sequence[Shape | None] = [((heads, dim), (heads, dim))] * len(stock)
    else:
        shapes = [_shape(layer) for layer in traced]
    layers = []
    layer: Any
    for index, (layer, shape) in enumerate(zip(stock, shapes, strict=True)):
        if shape is None or type(layer).__name__ == "DummyLayer":
            continue
        grows = compat.is_full_attention(layer)
        if not grows and type(layer) is not DynamicSlidingWindowLayer:
            raise UnsupportedModel(f"layer {index} is a {type(layer).__name__}, whose bytes cannot be foretold")
        window = None if grows else layer.sliding_window
        layers.append(LayerSize(SideSize(*shape[0]), SideSize(*shape[1]), grows, window))
    states = sum(_state_bytes(layer) for layer in traced or ())
    return Geometry(tuple(layers), states, "declared" if traced is None else "traced")


Shape = tuple[tuple[int, int], tuple[int, int]]


def _traced(config: PreTrainedConfig) -> list[Any] | None:
    """The cache's layers after a forward pass of one token without weights; None if the model cannot do one."""
    for attention in (None, "eager"):
        try:
            model = empty_model(config, attention)
            if model._can_set_experts_implementation():
                model.set_experts_implementation("batched_mm")  # the others choose experts by looking at values
            cache = DynamicCache(config=config)
            token = torch.zeros(1, 1, dtype=torch.long, device="meta")
            with torch.no_grad():
                model(input_ids=token, past_key_values=cache, use_cache=True)
        except UnsupportedModel:
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            continue  # it branches on values somewhere
        return list(cache.layers)
    return None


def _shape(layer: Any) -> Shape | None:
    """(Hkv, D) of the keys and the values that a layer holds."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return None
    return (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])


def _state_bytes(layer: Any) -> int:
    """Bytes of a recurrent layer's states for one row."""
    states = [getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states")]
    return sum(tensor.nbytes for held in states for tensor in held.values() if isinstance(tensor, torch.Tensor))
