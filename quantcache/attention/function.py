"""The ``"spectral"`` attention function: what transformers calls, checked and handed to a backend.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, T tokens, D dimension.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantcache import backends
from quantcache.attention import guards, traced
from quantcache.attention.lazy import LazyKV
from quantcache.attention.masks import spectral_mask as spectral_mask
from quantcache.attention.traced import TracedKV
from quantcache.backends import AttentionCall
from quantcache.backends.base import CODE_QUERIES
from quantcache.backends.online_softmax import QueryRows
from quantcache.backends.reference import QUERY_CHUNK
from quantcache.backends.view import CacheView
from quantcache.common.ambient import matmul, without_autocast
from quantcache.common.errors import UnsupportedModel
from quantcache.common.registration import ATTENTION_NAME

FLEX_NAME = "flex_attention"
"""transformers' name of torch's flex attention."""

DECODING_DEVICES = {"cuda"}
"""Types of devices on which many queries attend on a dense copy of a layer's past."""

DENSE_BYTES = 1 << 30
"""Largest such copy; of longer caches tiles are decoded."""

UNSUPPORTED = ("position_bias", "block_indices", "sinks")
"""Arguments of few models that are refused: they change scores in a way that no backend knows."""

CAUSAL_MASK_BYTES = 1 << 27
"""Largest causal mask that torch's fused attention is given; more queries attend in parts."""


def register_attention() -> None:
    """Register ``"spectral"`` with transformers as an attention and as a mask; safe to repeat.

    ``"flex_attention"`` learns to read compressed caches.
    """
    AttentionInterface.register(ATTENTION_NAME, spectral_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, spectral_mask)
    if AttentionInterface().get(FLEX_NAME) is flex_attention_forward:
        AttentionInterface.register(FLEX_NAME, _flex_attention_forward)


def _flex_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """transformers' flex attention; torch compiles it at once, and no lazy tensor can be in a graph."""
    key, value = (each.materialize() if isinstance(each, LazyKV) else each for each in (key, value))
    return flex_attention_forward(module, query, key, value, *args, **kwargs)


def spectral_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The attention module.
        query: ``[B, Hq, Tq, D]``.
        key: ``[B, H, T, D]``, lazy from a spectral layer, plain from any other.
        value: ``[B, H, T, Dv]``, likewise.
        attention_mask: Broadcasts to ``[B, Hq, Tq, T]``, boolean (True: attend) or additive; None is causal.
        scaling: Factor of the scores; D^-½ if None.
        dropout: Dropout probability (plain tensors only).
        is_causal: Whether a missing mask means causal; the module's own setting if None.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        s_aux: One attention-sink logit for each query head, ``[Hq]``: joins the softmax, carries no value.
        indices: Slots that an indexer lets each query see, ``[B, Tq, N]``.
        kwargs: What else the model passes: position_ids, sliding_window and the like are not needed, and those of
            :data:`UNSUPPORTED` refused.

    Returns:
        ``[B, Tq, Hq, Dv]``, and None for the attention weights.

    Raises:
        UnsupportedModel: The model adds a position bias to the scores, or sinks or blocks of its own.
        QuantCacheError: Queries, mask, sink logits or soft cap do not fit what is cached.
    """
    if torch.compiler.is_dynamo_compiling():
        options = {
            "attention_mask": attention_mask,
            "scaling": scaling,
            "dropout": dropout,
            "is_causal": is_causal,
            "softcap": softcap,
            "s_aux": s_aux,
            "indices": indices,
        }
        return _traced(module, query, key, value, options | kwargs), None
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__} passes {name}, which spectral attention does not support")
    # Decoders that know eager attention only may not say that they are causal: what comes from a cache is.
    cached = isinstance(key, LazyKV)
    causal = is_causal if is_causal is not None else cached or getattr(module, "is_causal", True)
    if indices is not None:
        attention_mask = _selected(indices, attention_mask, key.shape[2], causal)
    call = guards.fitting_call(query, attention_mask, scaling, causal, softcap, s_aux)
    if isinstance(key, LazyKV) and isinstance(value, LazyKV) and key.view_ is value.view_:
        return _attended(module, query, key.view_, call, dropout), None
    return _attended_dense(module, query, key, value, call, dropout), None  # a sliding window's, or without a cache


def _attended(module: Any, query: Tensor, view: CacheView, call: AttentionCall, dropout: float) -> Tensor:
    """Attention on a view, whose layer may then encode."""
    guards.require_query(query, view.key.tail)
    call = guards.fitting_tensors(call, query, view.length)
    if view.num_blocks and not dropout and not (_fused_knows(call) and _decoded_whole(query, view)):
        output = backends.attend(query, view, call)
    else:  # nothing is encoded yet, or it is decoded
        dense = view.dense("key", by_kernels=True), view.dense("value", by_kernels=True)
        output = _attended_dense(module, query, *dense, call, dropout)
    if view.flush is not None:
        view.flush()
    return output


def _attended_dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, dropout: float
) -> Tensor:
    """Attention on plain keys and values, by torch's fused attention where that knows the call."""
    if not (_fused_knows(call) and _fused_takes(query, key, value)):
        return dense_attention(query, key, value, *call, dropout=dropout)
    mask, count, length = call.mask, query.shape[2], key.shape[2]
    if mask is not None:
        mask = guards.in_fitting_dtype(mask, query)
    if mask is not None or not call.causal or not 1 < count < length:
        return _fused(module, query, key, value, mask, call, dropout)
    outputs, most = [], max(1, CAUSAL_MASK_BYTES // length)
    for first in range(0, count, most):  # torch's own causal mask counts from the first token
        last = min(first + most, count)
        seen = length - count + last
        mask = _causal_mask(last - first, seen, query.device)
        part = query[:, :, first:last], key[:, :, :seen], value[:, :, :seen]
        outputs.append(_fused(module, *part, mask, call, dropout))
    return torch.cat(outputs, dim=1)


def _fused(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall, dropout: float
) -> Tensor:
    """torch's fused attention, as transformers calls it."""
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=call.scaling, is_causal=call.causal
    )
    return output


def _traced(module: Any, query: Tensor, key: Any, value: Any, options: dict[str, Any]) -> Tensor:
    """Attention while a model is traced: an operator in its graph where that serves, a graph break elsewhere.

    Args:
        module: As of :func:`spectral_attention_forward`, like all others.
        query: Its query.
        key: Its key.
        value: Its value.
        options: Its other arguments, by name.
    """
    mask, scaling, is_causal, s_aux = (options[name] for name in ("attention_mask", "scaling", "is_causal", "s_aux"))
    served = isinstance(key, TracedKV) and isinstance(value, TracedKV) and traced.takes(query, s_aux)
    served = served and key.dense_ is value.dense_ and not key.dense_
    served = served and not options["dropout"] and not isinstance(scaling, Tensor)
    if not served or any(options.get(name) is not None for name in ("indices", *UNSUPPORTED)):
        return _untraced(module, query, key, value, options)
    output: Tensor = torch.ops.quantcache.attend(
        key.cache_.handle,
        query,
        mask,
        getattr(mask, "shown_", None),
        options.get("position_ids"),
        s_aux,
        key.layer_,
        mask is None or hasattr(mask, "shown_"),
        value.dim_,
        getattr(module, "num_key_value_groups", 1),
        scaling,
        is_causal if is_causal is not None else key.packed_ or getattr(module, "is_causal", True),
        options["softcap"],
    )
    return output


@torch.compiler.disable
def _untraced(module: Any, query: Tensor, key: Any, value: Any, options: dict[str, Any]) -> Tensor:
    return spectral_attention_forward(module, query, *traced.untraced(key, value), **options)[0]


@torch.library.impl("quantcache::attend", "CompositeExplicitAutograd", lib=traced.operators)
def _attend(
    handle: Tensor,
    query: Tensor,
    mask: Tensor | None,
    shown: Tensor | None,
    positions: Tensor | None,
    s_aux: Tensor | None,
    layer: int,
    known: bool,
    value_dim: int,
    groups: int,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    cache, module = traced.cache_of(handle), SimpleNamespace(num_key_value_groups=groups)
    view = cache.note_arrivals(layer, query.shape[2], shown, positions, known)
    call = guards.fitting_call(query, mask, scaling, causal, softcap, s_aux)
    if view is None:
        key, value = cache.last_output(layer)
        return _attended_dense(module, query, key, value, call, 0.0).contiguous()
    return _attended(module, query, view, call, 0.0).contiguous()


def _selected(indices: Tensor, mask: Tensor | None, tokens: int, causal: bool) -> Tensor:
    """The mask of sparse attention: of the keys that a mask shows, those that an indexer chose.

    Args:
        indices: Slots chosen for each query, ``[B, Tq, N]``; negative ones choose nothing.
        mask: ``[B or 1, 1 or Hq, Tq, T]``, boolean or additive, or None.
        tokens: T.
        causal: What a missing mask means.

    Returns:
        A mask of the same kind; boolean where there was none.
    """
    batch, queries, _ = indices.shape
    chosen = torch.zeros(batch, queries, tokens + 1, dtype=torch.bool, device=indices.device)
    slots = torch.where(indices < 0, tokens, indices).long()  # one more slot takes those that choose nothing
    chosen = chosen.scatter(-1, slots, True)[:, None, :, :tokens]
    if mask is None:
        return chosen & _causal_mask(queries, tokens, indices.device) if causal else chosen
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """What the last of some tokens may see as queries, ``[1, 1, Tq, T]`` bool."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)[None, None]


def _decoded_whole(query: Tensor, view: CacheView) -> bool:
    """Whether so many queries come that a dense copy of a layer's past is made for them, which is gone afterwards.

    Plain torch would decode it too, a tile at a time and in some fifteen launches each, which a GPU waits for.
    """
    keys, values = view.key.tail, view.value.tail
    held = view.length * keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
    return (
        query.device.type in DECODING_DEVICES
        and query.shape[2] > CODE_QUERIES
        and query.dtype == keys.dtype == values.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and held * query.element_size() <= DENSE_BYTES
    )


def _fused_knows(call: AttentionCall) -> bool:
    """Whether torch's fused attention has what a call asks for."""
    return call.softcap is None and call.sink_logits is None


def _fused_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's fused attention takes these dtypes: one, or any that autocast makes one."""
    return query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type)


@without_autocast
def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Differentiable attention over plain tensors, for the variants that torch's fused attention lacks.

    Args:
        query: ``[B, Hq, Tq, D]``.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, Dv]``.
        mask: As in :func:`spectral_attention_forward`.
        scaling: Factor of the scores; D^-½ if None.
        causal: What a missing mask means.
        softcap: See :func:`spectral_attention_forward`.
        s_aux: See :func:`spectral_attention_forward`.
        dropout: Dropout probability.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype.
    """
    guards.require_query(query, key)
    call = guards.fitting_call(query, mask, scaling, causal, softcap, s_aux)
    call = guards.fitting_tensors(call, query, key.shape[2])
    outputs = []
    keys, values = key.float(), value.float()
    for first in range(0, max(query.shape[2], 1), QUERY_CHUNK):
        part = query[:, :, first : first + QUERY_CHUNK]
        rows = QueryRows(part, key.shape[1], key.shape[2], call, (first, query.shape[2]))
        scores = rows.scores(matmul(rows.query, keys.transpose(-1, -2)), 0, key.shape[2])
        if call.sink_logits is not None:
            scores = torch.cat((scores, rows.sink_scores(call.sink_logits)), dim=-1)
        # A query that may look nowhere (left padding) looks everywhere: finite, and nobody reads its output.
        dead = scores.amax(-1, keepdim=True) == float("-inf")
        weights = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1)[..., : key.shape[2]]
        weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
        outputs.append(rows.to_output(matmul(weights, values), query.dtype))
    return torch.cat(outputs, dim=1)


def spectral_attention(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None,
    scaling: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention over a view that holds encoded blocks.

    Args:
        query: ``[B, Hq, Tq, D]``; the last Tq tokens of the view are the queries' own.
        view: What may be read.
        mask: As in :func:`spectral_attention_forward`.
        scaling: Factor of the scores; D^-½ if None.
        causal: What a missing mask means.
        softcap: See :func:`spectral_attention_forward`.
        s_aux: See :func:`spectral_attention_forward`.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype.
    """
    guards.require_query(query, view.key.tail)
    call = guards.fitting_call(query, mask, scaling, causal, softcap, s_aux)
    return backends.attend(query, view, guards.fitting_tensors(call, query, view.length))
