"""Everything that depends on the version or the inner workings of transformers."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    cache_utils,
)
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_hqq_available, is_optimum_quanto_available, is_torchao_available

from quantcache.common.errors import ArtifactError, UnsupportedModel
from quantcache.data import demo_model_path


def versions() -> dict[str, str]:
    """Versions that bear on results: quantcache, Python, torch, transformers, huggingface_hub."""
    from quantcache import __version__

    return {
        "quantcache": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
    }


def is_full_attention(layer: Any) -> bool:
    """Whether a stock cache layer keeps the keys and values of all tokens, the kind that quantcache replaces.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for plain full attention, with recurrent states or an indexer's keys beside it too; False for the others,
        which stay as they are.
    """
    return type(layer) in (DynamicLayer, DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer)


def is_window(layer: Any) -> bool:
    """Whether a stock cache layer keeps a window of tokens, and perhaps recurrent states.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for sliding windows and chunks; False for kinds that models bring themselves.
    """
    return type(layer) in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def is_recurrent(layer: Any) -> bool:
    """Whether a stock cache layer holds recurrent states and nothing else.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for linear attention, convolutions and state spaces.
    """
    return type(layer) is LinearAttentionLayer


def is_stateful(layer: Any) -> bool:
    """Whether a stock cache layer holds recurrent states, alone or beside keys and values.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for anything with a recurrence or a convolution.
    """
    return isinstance(layer, LinearAttentionLayer)


def is_placeholder(layer: Any) -> bool:
    """Whether a stock cache layer never holds anything.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for the layers of MLPs, and of attention that reads another layer's keys and values.
    """
    return type(layer).__name__ == "DummyLayer"


def require_decoder(config: PreTrainedConfig) -> None:
    """Refuse encoder-decoder models.

    Args:
        config: The model's config.

    Raises:
        UnsupportedModel: The model has an encoder-decoder cache.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder model; SpectralCache serves decoder-only models"
        )


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads text in both directions and has no cache.

    Args:
        config: The model's config.

    Returns:
        True for what transformers trains as masked language models, unless the config makes a decoder of it.
    """
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_encoder_decoder", False) and not getattr(config, "is_decoder", False)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a model that generates text.

    Args:
        config: The model's config.

    Returns:
        ``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for what only that knows.
    """
    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    images = "AutoModelForImageTextToText" in own or type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model, possibly spread over devices, takes its tokens.

    Args:
        model: The model.

    Returns:
        The device of its input embeddings.
    """
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device


def model_id(model: PreTrainedModel) -> str:
    """What a loaded model is called.

    Args:
        model: The model.

    Returns:
        Its Hub id, or the name of its folder; ``wiki11m`` for the bundled model, wherever it is installed.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.isdir(name):
        bundled = demo_model_path()
        return bundled.name if Path(name).resolve() == bundled.resolve() else Path(name).resolve().as_posix()
    return name


def model_revision(model: PreTrainedModel) -> str | None:
    """The commit that a model was loaded from.

    Args:
        model: The model.

    Returns:
        The commit; None for a model from a folder.
    """
    return getattr(model.config, "_commit_hash", None)


def mask_arguments() -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """The 2D mask and the positions of the forward pass that is just asking a cache for the sizes of its mask.

    transformers tells a cache how many tokens come, never which of them are padding, and most attention functions see
    neither that nor positions. But the one function that prepares masks, for every attention implementation, asks the
    cache first: its arguments are read from the call stack. A custom 4D mask never gets there.

    Returns:
        ``attention_mask`` ``[B, T]`` and ``position_ids``, either may be None; None if somebody else is asking.
    """
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_code.co_name == "_preprocess_mask_arguments":
            mask, positions = (frame.f_locals.get(name) for name in ("attention_mask", "position_ids"))
            plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
            return (mask if plain else None, positions) if plain or mask is None else None
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def tokens_to_remove(argument: int, length: int) -> int:
    """Read ``crop``'s argument as the versions in range do.

    Args:
        argument: Zero or negative: the number of tokens to drop, negated. Positive (deprecated): the length to keep.
        length: The present length.

    Returns:
        How many tokens to drop, between 0 and ``length``.
    """
    drop = length - argument if argument > 0 else -argument
    return max(0, min(drop, length))


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
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _leaves(getattr(tensor, name))


def attention_implementations(model: PreTrainedModel) -> dict[str, str]:
    """Attention implementations of a model and of its parts.

    Args:
        model: The model.

    Returns:
        By name of the sub-config, the model's own under ``""``: what :func:`use_attention` takes.
    """
    subs = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    own = {"": model.config._attn_implementation}
    return own | {name: config._attn_implementation for name, config in subs.items() if config is not None}


def can_change_attention(model: PreTrainedModel) -> bool:
    """Whether a model goes through transformers' attention interface, so that its attention can be replaced.

    Args:
        model: The model.

    Returns:
        False for models with an attention of their own.
    """
    return bool(model._can_set_attn_implementation())


def use_attention(model: PreTrainedModel, implementation: str | dict[str, str]) -> None:
    """Change attention implementations, of a model that lets them be changed.

    Args:
        model: The model.
        implementation: One for all parts, or what :func:`attention_implementations` gave.
    """
    if can_change_attention(model) and attention_implementations(model) != implementation:
        model.set_attn_implementation(implementation)


@dataclass(frozen=True)
class StockLayerState:
    """What a layer of transformers' own holds, ready for a file."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]


def stock_layer_state(layer: Any) -> StockLayerState | None:
    """What a sliding-window or placeholder layer holds.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        Its state; None for layers of other kinds.
    """
    if isinstance(layer, DynamicLayer) and type(layer) is DynamicSlidingWindowLayer:
        numbers = {"tokens": layer.get_seq_length(), "window": layer.sliding_window, "record": layer.record_past}
        if layer.keys is None or layer.values is None:
            return StockLayerState({}, numbers | {"shapes": []})
        tensors = {"keys": layer.keys, "values": layer.values}
        shapes = [list(tensor.shape) for tensor in tensors.values()]
        dtypes = [str(tensor.dtype) for tensor in tensors.values()]
        return StockLayerState(tensors, numbers | {"shapes": shapes, "dtypes": dtypes})
    return StockLayerState({}, {}) if is_placeholder(layer) else None


def stock_layer_shapes(layer: Any, numbers: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a stored layer has.

    Args:
        layer: The empty layer to be filled.
        numbers: What :func:`stock_layer_state` said of the stored one.
        where: What to call it in messages.

    Returns:
        Shapes by name.

    Raises:
        ArtifactError: The stored layer does not fit.
    """
    if type(layer) is not DynamicSlidingWindowLayer:
        return {}
    if numbers.get("window") != layer.sliding_window:
        raise ArtifactError(f"{where} has a window of {numbers.get('window')!r}, the model's is {layer.sliding_window}")
    shapes = numbers.get("shapes")
    if shapes == []:
        return {}
    tokens = numbers.get("tokens")
    if (
        not isinstance(shapes, list)
        or len(shapes) != 2
        or not all(isinstance(shape, list) and len(shape) == 4 for shape in shapes)
        or not all(type(size) is int and size >= 0 for shape in shapes for size in shape)
        or type(tokens) is not int
        or not shapes[0][2] == shapes[1][2] <= tokens < 1 << 40
    ):
        raise ArtifactError(f"{where} has shapes {shapes!r} for {tokens!r} tokens")
    return {"keys": tuple(shapes[0]), "values": tuple(shapes[1])}


def restore_stock_layer(layer: Any, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Fill an empty layer with what another held.

    Args:
        layer: The empty layer.
        tensors: Its tensors.
        numbers: Its other state.
    """
    if not tensors:
        return
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    layer.cumulative_length, layer.record_past = numbers["tokens"], numbers.get("record") is True
