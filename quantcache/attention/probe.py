"""Looking into a model while it runs: what reaches its cache, and how its keys are rotated.

The layout of a model's rotation is measured, not looked up by family. One and the same token is put at many positions,
alone in its row, so that nothing but the rotation tells its keys apart; the candidate rotation that makes the cached
keys equal is the model's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from quantcache.artifact import cache_layout
from quantcache.attention.function import ATTENTION_NAME, spectral_attention_forward
from quantcache.coding.rope import Frame, Rope
from quantcache.common import compat
from quantcache.common.ambient import in_float64
from quantcache.common.errors import UnsupportedModel

PROBE_LENGTH = 160
RECURRENT_STEP = 5
PROBE_TOLERANCE = 0.02
"""Largest relative mismatch of un-rotated keys that still counts as equal (bfloat16 keys reach 0.005)."""


class RecordingCache(DynamicCache):
    """A DynamicCache that hands every update's keys and values to a callback.

    Args:
        config: The model's config.
        on_update: Called with (layer index, keys, values); may return replacements.
    """

    def __init__(self, config: Any, on_update: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]):
        super().__init__(config=config)
        self.on_update = on_update

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Pass new keys and values through the callback, then cache them."""
        replaced = self.on_update(layer_idx, key_states, value_states)
        if replaced is not None:
            key_states, value_states = replaced
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, inside the context.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def recorded_queries(
    model: PreTrainedModel,
    on_query: Callable[[int, Tensor], None],
    on_output: Callable[[int, Tensor], None] | None = None,
) -> Iterator[None]:
    """Hand the queries of every attention call to a callback, inside the context.

    Args:
        model: The model; its attention implementation is restored afterwards.
        on_query: Called with (layer index, queries ``[B, Hq, Tq, D]``).
        on_output: Called with (layer index, attention output ``[B, Tq, Hq, Dv]``).

    Yields:
        Nothing.

    Raises:
        UnsupportedModel: The model does not go through transformers' attention interface.
    """
    seen: set[int] = set()

    def attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any):
        index = getattr(module, "layer_idx", None)
        if index is not None:
            seen.add(index)
            on_query(index, query)
        result = spectral_attention_forward(module, query, *args, **kwargs)
        if index is not None and on_output is not None:
            on_output(index, result[0])
        return result

    with replaced_attention(model, attention):
        yield
    if not seen:
        raise UnsupportedModel(
            f"{type(model).__name__} does not call attention through transformers' attention interface, so its queries "
            "cannot be observed: use metric='fisher'"
        )


_replacement: ContextVar[Callable[..., Any] | None] = ContextVar("replacement", default=None)
"""What a model calls in place of attention, each thread its own: transformers' table of names is everybody's."""


def _replaced(*args: Any, **kwargs: Any) -> Any:
    """Call what replaces attention in this thread; plain attention where another one has replaced the model's."""
    return (_replacement.get() or spectral_attention_forward)(*args, **kwargs)


@contextlib.contextmanager
def replaced_attention(model: PreTrainedModel, attention: Callable[..., Any]) -> Iterator[None]:
    """Have a model call another attention function in this thread, inside the context.

    Args:
        model: The model; its attention implementation is restored afterwards.
        attention: Called as transformers' attention interface does, with masks as ``sdpa`` gets them.

    Yields:
        Nothing.
    """
    name = "quantcache_recording"
    AttentionInterface.register(name, _replaced)
    AttentionMaskInterface.register(name, sdpa_mask)
    outer, previous = _replacement.get(), compat.attention_implementations(model.config)
    try:
        _replacement.set(attention)
        model.set_attn_implementation(name)
        yield
    finally:
        _replacement.set(outer)
        model.set_attn_implementation(previous)


def run(model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache, position_ids: Tensor | None = None) -> Any:
    """One forward pass that fills a cache.

    Args:
        model: The model.
        input_ids: ``[B, T]``.
        cache: The cache to pass.
        position_ids: Positions of the tokens, ``[B, T]``; the model's own count if None.

    Returns:
        The model's output.
    """
    device = compat.input_device(model)
    more = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    plain = compat.uncompiled(model)  # a graph of what looks on would serve nobody else
    return plain(input_ids=input_ids.to(device), **compat.cache_argument(plain, cache), use_cache=True, **more)


@torch.no_grad()
def attends(model: PreTrainedModel) -> bool:
    """Whether a model's attention, as it is set, can do all that the model asks of it.

    Args:
        model: The model.

    Returns:
        False if its layers ask for something that spectral attention refuses, such as a position bias.
    """
    try:
        with evaluating(model):
            run(model, _some_token(model), DynamicCache(config=model.config))
    except UnsupportedModel:
        return False
    return True


def attend_on_codes(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, str]] | None:
    """Let a model that uses ``sdpa`` attend on codes, if it can.

    Args:
        model: The model, changed in place.

    Returns:
        Its attention implementations before and since; None if it stays as it was.
    """
    before = compat.attention_implementations(model.config)
    if set(before.values()) != {"sdpa"}:
        return None
    compat.use_attention(model, ATTENTION_NAME)
    served = False
    try:
        served = attends(model)
    finally:
        if not served:
            compat.use_attention(model, before)
    return (before, compat.attention_implementations(model.config)) if served else None


@torch.no_grad()
def observed_values(model: PreTrainedModel, layers: list[int]) -> dict[int, tuple[int, int]]:
    """Heads and dimension of the values that reach the cache, which a config need not tell.

    Args:
        model: The model.
        layers: Layers to look at.

    Returns:
        Hkv and Dv of those layers that were updated.
    """
    found: dict[int, tuple[int, int]] = {}

    def record(index: int, key: Tensor, value: Tensor) -> None:
        found[index] = (value.shape[1], value.shape[3])

    run(model, _some_token(model), RecordingCache(model.config, record))
    return {index: found[index] for index in layers if index in found}


@torch.no_grad()
def detect_ropes(model: PreTrainedModel, layers: list[int]) -> dict[int, Rope]:
    """Measure how each layer's keys are rotated.

    Args:
        model: The model.
        layers: Layers to look at.

    Returns:
        A rotation for each; ``Rope()`` for layers without RoPE, and for layers whose keys no known rotation explains
        (absolute position embeddings, ALiBi, unknown layouts): those are coded as they are cached.

    Raises:
        UnsupportedModel: A layer never updates the cache with keys ``[B, H, T, D]``.
    """
    candidates = _candidates(model)
    ropes = dict.fromkeys(layers, Rope())
    for positions, keys in _probes(model):
        for index in (index for index in layers if not ropes[index].rotary_dim):
            if index not in keys:
                raise UnsupportedModel(f"layer {index} of {type(model).__name__} never updated its key/value cache")
            ropes[index] = _best_rope(keys[index], positions, candidates)
        if all(rope.rotary_dim for rope in ropes.values()):
            break
    return ropes


def _probes(model: PreTrainedModel) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Positions ``[T]``, and the keys of one token at them by layer, ``[H, T, D]``.

    First from rows of a single token, each told its position. Then, for models that count positions themselves, from a
    prompt of the repeated token: its hidden states are equal too, unless attention sees how many tokens there are (a
    sink logit in the softmax does).
    """
    keys: dict[int, Tensor] = {}

    def record(index: int, key: Tensor, value: Tensor) -> None:
        keys[index] = in_float64((key.transpose(0, 2) if key.shape[2] == 1 else key)[0])

    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or PROBE_LENGTH
    every = torch.arange(min(PROBE_LENGTH, limit), dtype=torch.int64, device="cpu")
    # A recurrence without its kernels pads every row to a chunk of hundreds of tokens: fewer rows do.
    some = every[::RECURRENT_STEP] if any(map(compat.is_stateful, cache_layout.stock_layers(model.config))) else every
    token = _some_token(model)
    told = "position_ids" in inspect.signature(model.forward).parameters
    seen = False
    for positions, position_ids in [*([(some, some[:, None])] if told else []), (every, None)]:
        keys.clear()
        token_ids = token.repeat(1, len(every)) if position_ids is None else token.repeat(len(position_ids), 1)
        try:
            run(model, token_ids, RecordingCache(model.config, record), position_ids=position_ids)
        except ValueError as error:  # its own words say what cache it wants
            raise UnsupportedModel(f"{type(model).__name__} cannot run with a DynamicCache: {error}") from error
        if keys:
            seen = True
            yield positions, keys
    if not seen:
        raise UnsupportedModel(
            f"{type(model).__name__} does not use the cache it is given, so there is nothing to compress (with PEFT's "
            "prefix tuning, give the base model a SpectralCache.from_dynamic_cache() of the prefix)"
        )


def _some_token(model: PreTrainedModel) -> Tensor:
    """A token that is not a special one, ``[1, 1]``."""
    text_config = model.config.get_text_config(decoder=True)
    special: set[Any] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text_config, name, None)
        special.update(value if isinstance(value, list | tuple) else [value])
    token = next(i for i in range(text_config.vocab_size // 2, text_config.vocab_size) if i not in special)
    return torch.tensor([[token]], dtype=torch.int64, device="cpu")


def _candidates(model: PreTrainedModel) -> list[Rope]:
    """Every rotation that the frequencies found in the model allow."""
    found: list[tuple[float, ...]] = []
    for name, tensor in [*model.named_buffers(), *_plain_tensors(model)]:
        if name.endswith("inv_freq") and tensor.ndim == 1 and tensor.numel() and tensor.device.type != "meta":
            frequencies = tuple(tensor.cpu().double().tolist())
            if frequencies not in found:
                found.append(frequencies)
    declared = {cache_layout.rope_from_config(model.config.get_text_config(decoder=True), 0).inv_freq}
    found += [frequencies for frequencies in declared if frequencies and frequencies not in found]
    return [Rope(layout, frequencies) for frequencies in found for layout in ("half", "interleaved")]


def _plain_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Frequencies that a module keeps as a plain attribute."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield name, value


def _best_rope(keys: Tensor, positions: Tensor, candidates: list[Rope]) -> Rope:
    """The candidate that makes the keys ``[H, T, D]`` of one repeated token equal at all positions ``[T]``."""
    positions = positions.to(keys.device)
    errors = {Rope(): _spread(keys)}
    for rope in candidates:
        if rope.rotary_dim <= keys.shape[-1]:
            frame = Frame(keys.shape[-1], rope, device=keys.device)
            errors[rope] = _spread(frame.enter(keys, positions, positions))
    best = min(errors, key=lambda rope: errors[rope])
    return best if errors[best] < PROBE_TOLERANCE else Rope()


def _spread(keys: Tensor) -> float:
    """Relative deviation of keys ``[H, T, D]`` from their mean over positions.

    Model-computed angles are rounded to float32 and rotations to the model's dtype, so equality is to a tolerance.
    """
    mean = keys.mean(1, keepdim=True)
    return float((keys - mean).norm() / keys.norm().clamp_min(1e-30))
