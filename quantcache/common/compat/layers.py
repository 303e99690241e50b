"""transformers' own cache layers: their kinds, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from quantcache.common.errors import ArtifactError


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


def release_left(layer: Any) -> None:
    """Let go of tokens that an update of several has pushed out of a layer's window.

    What transformers keeps is a view of the window and of all that came before it, a long prompt for instance. After a
    step that is one token, which the next step lets go of.

    Args:
        layer: A layer of a ``DynamicCache``, just updated; none but those with a window are looked at.
    """
    if not is_window(layer) or layer.record_past:  # which needs them for crop()
        return
    for name in ("keys", "values"):
        held = getattr(layer, name)
        if held.shape[2] and held.untyped_storage().nbytes() > held.nbytes:
            setattr(layer, name, held.clone(memory_format=torch.contiguous_format))


def recount(layer: Any, tokens: int) -> None:
    """Tell a layer with a window how many tokens it has seen, if all it was given is what a window keeps of them.

    ``DynamicCache(iterable)`` makes such layers, also of what iterating over a cache gives.

    Args:
        layer: A layer of a ``DynamicCache``.
        tokens: T.
    """
    if is_window(layer) and layer.is_initialized:
        held = layer.keys.shape[2]
        if held == layer.cumulative_length == min(tokens, layer.sliding_window - 1):
            layer.cumulative_length = tokens


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


def is_plain(layer: Any) -> bool:
    """Whether a stock cache layer holds keys and values and nothing else.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for full attention and sliding windows without states or an indexer's keys beside them, and for layers that
        never hold anything; False for kinds that models bring themselves.
    """
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or is_placeholder(layer)


def recurrent_states(layer: Any) -> list[torch.Tensor]:
    """What a stock cache layer holds of its recurrence and convolutions.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        The tensors; none where there is no such thing, or nothing yet.
    """
    found = (getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states"))
    return [state for states in found for state in states.values() if isinstance(state, torch.Tensor)]


def is_placeholder(layer: Any) -> bool:
    """Whether a stock cache layer never holds anything.

    Args:
        layer: A layer of a ``DynamicCache``.

    Returns:
        True for the layers of MLPs, and of attention that reads another layer's keys and values.
    """
    return type(layer).__name__ == "DummyLayer"


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
