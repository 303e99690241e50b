"""The ``"spectral"`` attention function: attends on packed codes, tile by tile, with an online softmax.

Scores against encoded keys are formed in the coded coordinates: the query is brought into the frame of each block's
anchor and multiplied by the decoder once, and the values' decoder is applied once to the weighted sum, never to a
cached token. Queries of a prefill on a compressed past are many, and there decoding each tile once is cheaper.

Shapes: B batch, Hq / H query / key-value heads, G = Hq / H, Tq queries, T tokens, D dimension, R = G * Tq rows of
queries that share one key/value head, N slots of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantcache.attention import guards
from quantcache.attention.lazy import LazyKV
from quantcache.backends import kernels as backends
from quantcache.backends.online_softmax import OnlineSoftmax, QueryRows
from quantcache.backends.view import CacheView
from quantcache.coding.codec import SpectralCodec, block_slots
from quantcache.coding.packing import BLOCK
from quantcache.common.ambient import matmul, without_autocast
from quantcache.common.errors import UnsupportedModel
from quantcache.common.registration import ATTENTION_NAME

TILE_BLOCKS = 8
"""Blocks worked on at once: bounds the extra memory of attention, whatever the context length."""

CODE_QUERIES = 16
"""Up to this many queries attend on codes; more are cheaper against decoded tiles."""

QUERY_CHUNK = 256
"""Queries of a long prefill that are worked on at once."""


def register_attention() -> None:
    """Register ``"spectral"`` with transformers as an attention and as a mask; safe to repeat."""
    AttentionInterface.register(ATTENTION_NAME, spectral_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@torch.compiler.disable  # a compiled model calls it as it is: nothing is gained by tracing it, and much recompiled
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
        kwargs: What else the model passes: ``indices`` ``[B, Tq, N]`` are the slots that an indexer lets each query
            see; position_ids, sliding_window and the like are not needed.

    Returns:
        ``[B, Tq, Hq, Dv]``, and None for the attention weights.

    Raises:
        UnsupportedModel: The model adds a position bias to the scores, or sinks or blocks of its own.
        QuantCacheError: Queries, mask, sink logits or soft cap do not fit what is cached.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} adds a position bias, which spectral attention does not support"
        )
    for name in ("block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__} passes {name}, which spectral attention does not support")
    # Decoders that know eager attention only may not say that they are causal: what comes from a cache is.
    cached = isinstance(key, LazyKV)
    causal = (cached or getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if kwargs.get("indices") is not None:
        attention_mask = _selected(kwargs["indices"], attention_mask, key.shape[2], causal)
    softcap = guards.fitting_softcap(softcap)
    view = key.view_ if isinstance(key, LazyKV) and isinstance(value, LazyKV) and key.view_ is value.view_ else None
    if view is not None:
        guards.require_query(query, view.key.tail)
        attention_mask = guards.fitting_mask(attention_mask, query, view.length)
    if view is None or not view.num_blocks or dropout:
        # Nothing is encoded yet, or the layer is not ours (sliding window, no cache): plain tensors.
        if view is not None:
            key, value = view.dense("key"), view.dense("value")
        if softcap is None and s_aux is None and _fused_takes(query, key, value):
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal
            )
        else:
            output = dense_attention(query, key, value, attention_mask, scaling, causal, softcap, s_aux, dropout)
    else:
        output = spectral_attention(query, view, attention_mask, scaling, causal, softcap, s_aux)
    if view is not None:
        view.layer.finish()
    return output, None


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
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=indices.device)
        mask = mask.tril(tokens - queries) if causal else mask
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


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
    mask, s_aux = guards.fitting_mask(mask, query, key.shape[2]), guards.fitting_sink_logits(s_aux, query)
    scaling, softcap = guards.fitting_scaling(scaling, query), guards.fitting_softcap(softcap)
    outputs = []
    keys, values = key.float(), value.float()
    for first in range(0, max(query.shape[2], 1), QUERY_CHUNK):
        part = query[:, :, first : first + QUERY_CHUNK]
        rows = QueryRows(part, key.shape[1], key.shape[2], mask, scaling, causal, softcap, (first, query.shape[2]))
        scores = rows.scores(matmul(rows.query, keys.transpose(-1, -2)), 0, key.shape[2])
        if s_aux is not None:
            scores = torch.cat((scores, rows.sink_scores(s_aux)), dim=-1)
        # A query that may look nowhere (left padding) looks everywhere: finite, and nobody reads its output.
        dead = scores.amax(-1, keepdim=True) == float("-inf")
        weights = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1)[..., : key.shape[2]]
        weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
        outputs.append(rows.to_output(matmul(weights, values), query.dtype))
    return torch.cat(outputs, dim=1)


@without_autocast
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
    assert view.key.sinks is not None
    assert view.value.sinks is not None
    guards.require_query(query, view.key.tail)
    mask, s_aux = guards.fitting_mask(mask, query, view.length), guards.fitting_sink_logits(s_aux, query)
    scaling, softcap = guards.fitting_scaling(scaling, query), guards.fitting_softcap(softcap)
    on_codes = (
        query.shape[2] <= CODE_QUERIES
        and isinstance(view.key.codec, SpectralCodec)
        and isinstance(view.value.codec, SpectralCodec)
        and not view.shifted
    )
    if on_codes:

        def beside(small: CacheView, small_mask: Tensor | None) -> tuple[Tensor, Tensor]:
            more = (scaling, causal, softcap, s_aux)
            plain = plain_attention(query.float(), small, small_mask, *more)
            return plain, own_precision(query, small, small_mask, *more)

        output = backends.attend_view(query, view, mask, scaling, causal, softcap, s_aux, beside)
        if output is not None:
            return output
    return plain_attention(query, view, mask, scaling, causal, softcap, s_aux, on_codes)


def plain_attention(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None = None,
    scaling: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    on_codes: bool = True,
) -> Tensor:
    """:func:`spectral_attention` in plain torch, on codes or on decoded tiles."""
    total, heads = query.shape[2], view.key.tail.shape[1]
    parts = []
    for first in range(0, max(total, 1), QUERY_CHUNK):
        part = query[:, :, first : first + QUERY_CHUNK]
        rows = QueryRows(part, heads, view.length, mask, scaling, causal, softcap, (first, total))
        softmax = OnlineSoftmax(rows.query, view.value.tail.shape[3])
        if s_aux is not None:
            softmax.add(rows.sink_scores(s_aux))
        _attend_sinks(rows, view, softmax)
        parts.append((rows, softmax))
    if on_codes:
        _attend_codes(*parts[0], view)
    else:
        _attend_decoded(parts, view)
    for rows, softmax in parts:
        _attend_tail(rows, view, softmax)
    return torch.cat([rows.to_output(softmax.result(), query.dtype) for rows, softmax in parts], dim=1)


def own_precision(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None = None,
    scaling: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The same attention over decoded tokens in the model's dtype throughout: how far off that dtype makes it."""
    keys, values = view.dense("key"), view.dense("value")
    rows = QueryRows(query, keys.shape[1], view.length, mask, scaling, causal, softcap, (0, query.shape[2]))
    raw = rows.query.to(query.dtype) @ keys.transpose(-1, -2)
    scores = rows.scores(raw, 0, view.length)
    if s_aux is not None:
        scores = torch.cat((scores, rows.sink_scores(s_aux).to(scores.dtype)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : view.length].to(values.dtype)
    return rows.to_output(weights @ values, query.dtype)


def _attend_sinks(rows: QueryRows, view: CacheView, softmax: OnlineSoftmax) -> None:
    keys, values = view.key.sinks, view.value.sinks
    assert keys is not None
    assert values is not None
    if not keys.shape[2]:
        return
    slots = view.sink_slots()
    valid = None if view.starts is None else slots < view.encoded_end
    raw = matmul(rows.query, keys.float().transpose(-1, -2))
    softmax.accumulate(matmul(softmax.add(rows.scores_at(raw, slots, valid)), values.float()))
    if view.key.lead is None or view.value.lead is None or view.starts is None:
        return
    slots = torch.arange(keys.shape[2], dtype=torch.int64, device=keys.device)[None]
    raw = matmul(rows.query, view.key.lead.float().transpose(-1, -2))
    weights = softmax.add(rows.scores_at(raw, slots, slots < view.starts[:, None]))
    softmax.accumulate(matmul(weights, view.value.lead.float()))


def _attend_tail(rows: QueryRows, view: CacheView, softmax: OnlineSoftmax) -> None:
    keys, values = view.key.tail, view.value.tail
    step = TILE_BLOCKS * BLOCK
    for first in range(0, keys.shape[2], step):
        last = min(first + step, keys.shape[2])
        raw = matmul(rows.query, keys[:, :, first:last].float().transpose(-1, -2))
        scores = rows.scores(raw, view.encoded_end + first, view.encoded_end + last)
        softmax.accumulate(matmul(softmax.add(scores), values[:, :, first:last].float()))


def _tile_scores(rows: QueryRows, view: CacheView, places: Tensor, raw: Tensor) -> Tensor:
    """Mask the scores against whole blocks, ``[B, H, R, n * 64]``."""
    slots = block_slots(places)
    valid = None
    if view.starts is not None:
        assert view.key.sinks is not None
        behind = slots - view.starts[:, None]
        valid = (behind < 0) | (behind >= view.key.sinks.shape[2])
    if view.cut:
        inside = (slots < (places[:, 0] + places[:, 1]).repeat_interleave(BLOCK))[None]
        valid = inside if valid is None else valid & inside
    return rows.scores_at(raw, slots[None], valid)


def _attend_decoded(parts: list[tuple[QueryRows, OnlineSoftmax]], view: CacheView) -> None:
    """Attend on the encoded blocks by decoding one tile at a time, once for all queries."""
    assert view.key.codec is not None
    assert view.value.codec is not None
    backend = view.layer.backend
    for first, last in view.tiles(TILE_BLOCKS):
        places = view.places[first:last]
        keys = backends.decode(view.key.codec, view.key.store.slice(first, last), places, view.frames, backend)
        values = backends.decode(view.value.codec, view.value.store.slice(first, last), places, view.frames, backend)
        for rows, softmax in parts:
            scores = _tile_scores(rows, view, places, matmul(rows.query, keys.transpose(-1, -2)))
            softmax.accumulate(matmul(softmax.add(scores), values))


def _attend_codes(rows: QueryRows, softmax: OnlineSoftmax, view: CacheView) -> None:
    """Attend on the encoded blocks without decoding them."""
    keys, values = view.key.codec, view.value.codec
    assert isinstance(keys, SpectralCodec)
    assert isinstance(values, SpectralCodec)
    for first, last in view.tiles(TILE_BLOCKS):
        places = view.places[first:last]
        raw = code_scores(rows.query, keys, view.key.store.slice(first, last), places, view.frames)
        weights = softmax.add(_tile_scores(rows, view, places, raw))
        coefficients = values.dequantize(view.value.store.slice(first, last))  # [n, B, H, D, 64]
        per_block = weights.unflatten(-1, (last - first, BLOCK)).permute(3, 0, 1, 2, 4)  # [n, B, H, R, 64]
        softmax.accumulate(matmul(per_block, coefficients.transpose(-1, -2)).sum(0), "codes")
        softmax.accumulate(weights.sum(-1, keepdim=True), "mass")
    in_codes, mass = softmax.sums.pop("codes"), softmax.sums.pop("mass")
    softmax.accumulate(values.synthesize(in_codes) + mass * values.mean[:, None])


def code_scores(
    query: Tensor, codec: SpectralCodec, fields: dict[str, Tensor], places: Tensor, starts: Tensor | None
) -> Tensor:
    """Scores of queries against encoded keys, in the coded coordinates.

    Args:
        query: Scaled queries, ``[B, H, R, D]`` float32.
        codec: The keys' codec.
        fields: n encoded blocks.
        places: Their places, ``[n, 3]``.
        starts: Left padding of every row, ``[B]``, or None.

    Returns:
        ``[B, H, R, n * 64]`` float32.
    """
    frame, slow = codec.frame, codec.frame.num_slow
    coefficients = codec.dequantize(fields)  # [n, B, H, D, 64]
    if frame.is_identity:
        framed = query[None]
    else:
        anchors = places[:, 2:].long()
        anchors = anchors if starts is None else anchors - starts
        framed = frame.enter(query[None], anchors[:, :, None, None], anchors[:, :, None, None])  # [n, B, H, R, D]
    mean = codec.mean[:, :, None]  # [H, D, 1]
    slow_query = framed[..., :slow]
    scores = matmul(matmul(slow_query, codec.decoder[:, :slow, :slow]), coefficients[..., :slow, :])
    scores = scores + matmul(slow_query, mean[:, :slow])
    if frame.num_fast:
        keys = matmul(codec.decoder[:, slow:, slow:], coefficients[..., slow:, :]) + mean[:, slow:]  # [n, B, H, Df, 64]
        first, second = keys.unflatten(-2, (2, -1)).unbind(-3)
        offsets = (places[:, :1] - places[:, 2:]) + torch.arange(BLOCK, dtype=torch.int64, device=query.device)
        angles = offsets.to(torch.float64)[:, None] * frame.frequencies[frame.slow_pairs :, None]  # [n, pairs, 64]
        cos, sin = angles.cos().float()[:, None, None], angles.sin().float()[:, None, None]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-2)
        scores = scores + matmul(framed[..., slow:], rotated)
    return scores.permute(1, 2, 3, 0, 4).flatten(3)
