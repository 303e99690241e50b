"""What a model's cache and weights consist of, from its config alone: the model is built without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from quantcache.accounting.memory import LayerSize, SideSize
from quantcache.artifact import cache_layout, tracing
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.checks import stand_in_config
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.sources import model_source

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
        name: A ``config.json``, a folder that has one, a GGUF file, a Hub id, or ``wiki11m`` and its like.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Allow model code from the Hub.

    Returns:
        The config.

    Raises:
        FileNotFoundError: The GGUF file does not exist.
        QuantCacheError: The config is missing, cannot be read, or is an encoder-decoder's.
    """
    source = model_source(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise QuantCacheError(
            f"cannot load the config of {name}: {first[0] if first else type(error).__name__}"
        ) from error
    if not isinstance(config, PreTrainedConfig):
        raise QuantCacheError(f"cannot load the config of {name}: it is a {type(config).__name__}")
    compat.require_decoder(config)
    return config


def read_geometry(config: PreTrainedConfig) -> Geometry:
    """The layers of a model's cache.

    Args:
        config: ``model.config``.

    Returns:
        Its layers.

    Raises:
        UnsupportedModel: The model has layers whose bytes are not known, or cannot be built from its config.
    """
    stock = cache_layout.stock_layers(config)
    traced = tracing.traced_layers(config)
    text = config.get_text_config(decoder=True)
    foreign = cache_layout.cross_attention_layers(config)  # as long as the image, which nobody has told
    layers = []
    layer: Any
    for index, layer in enumerate(stock):
        if compat.is_placeholder(layer) or compat.is_recurrent(layer) or index in foreign:
            continue
        grows = compat.is_full_attention(layer)
        if not grows and not compat.is_window(layer):
            raise UnsupportedModel(f"memory cannot be estimated: layer {index} is a {type(layer).__name__}")
        holder = layer if traced is None else traced[index]
        shape = (cache_layout.kv_geometry(text, index),) * 2 if traced is None else tracing.held_shape(holder)
        if shape is None:
            continue
        window = None if grows else layer.sliding_window
        layers.append(LayerSize(SideSize(*shape[0]), SideSize(*shape[1]), grows, window))
        indexer = getattr(holder, "indexer_keys", None)
        if indexer is not None:
            layers.append(LayerSize(SideSize(1, indexer.shape[-1]), SideSize(0, 0), blocks=False))
    states = sum(state.nbytes for layer in traced or () for state in compat.recurrent_states(layer))
    return Geometry(tuple(layers), states, "declared" if traced is None else "traced")


def window_layers(calibration: Calibration) -> list[LayerSize]:
    """The sliding-window layers of a calibrated model, which a cache keeps as they are.

    Args:
        calibration: A calibration; what it knows of the model's config is all that is needed.

    Returns:
        Those whose heads and dimensions it tells.
    """
    attributes = calibration.metadata.cache_config
    layers: list[Any] = cache_layout.stock_layers(stand_in_config(attributes))
    found = []
    for index, layer in enumerate(layers):
        shape = [attributes.get(name) for name in ("num_key_value_heads", "head_dim")]
        heads, dim = (each[index] if isinstance(each, list) else each for each in shape)
        if compat.is_window(layer) and heads and dim:
            found.append(LayerSize(SideSize(heads, dim), SideSize(heads, dim), False, layer.sliding_window))
    return found
