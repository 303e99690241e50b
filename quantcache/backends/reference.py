"""Plain torch: attention on packed codes, tile by tile, with an online softmax; what every kernel is tested against.

Scores against encoded keys are formed in the coded coordinates: the query is brought into the frame of each block's
anchor and multiplied by the decoder once, and the values' decoder is applied once to the weighted sum, never to a
cached token. Queries of a prefill on a compressed past are many, and there decoding each tile once is cheaper.

Shapes: B batch, Hq / H query / key-value heads, G = Hq / H, Tq queries, T tokens, D dimension, R = G * Tq rows of
queries that share one key/value head, N slots of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.backends.base import CODE_QUERIES, Backend
from quantcache.backends.online_softmax import OnlineSoftmax, QueryRows
from quantcache.backends.view import CacheView
from quantcache.coding.blocks import SideCodec, block_slots, holds_tokens
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.common.ambient import matmul
from quantcache.common.errors import QuantCacheError
from quantcache_kernels.interface import AttentionCall

TILE_BLOCKS = 8
"""Blocks worked on at once: bounds the extra memory of attention, whatever the context length."""

QUERY_CHUNK = 256
"""Queries of a long prefill that are worked on at once."""


class Reference(Backend):
    """Serves every layer and every call, on every device."""

    name = "torch"
    by_token = True

    def unavailable(self, device: torch.device) -> str | None:
        """Nothing: plain torch runs wherever the tensors are."""
        return None

    def lacks(self, codec: SideCodec, dtype: torch.dtype) -> str | None:
        """Nothing."""
        return None

    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """Nothing."""
        return None

    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend on codes where queries are few and the codecs allow it, else on decoded tiles."""
        return attend(query, view, call, query.shape[2] <= CODE_QUERIES and view.on_codes)


REFERENCE = Reference()


def attend(query: Tensor, view: CacheView, call: AttentionCall, on_codes: bool = True) -> Tensor:
    """Attend on a view that holds encoded blocks.

    Args:
        query: ``[B, Hq, Tq, D]``; the last Tq tokens of the view are the queries' own.
        view: What may be read.
        call: The rest of the call.
        on_codes: Whether to multiply queries with codes; otherwise tiles are decoded.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype.
    """
    total, heads = query.shape[2], view.key.tail.shape[1]
    parts = []
    for first in range(0, max(total, 1), QUERY_CHUNK):
        part = query[:, :, first : first + QUERY_CHUNK]
        rows = QueryRows(part, heads, view.length, call, (first, total), view.encoded_end)
        softmax = OnlineSoftmax(rows.query, view.value.tail.shape[3])
        if call.sink_logits is not None:
            softmax.add(rows.sink_scores(call.sink_logits))
        _attend_sinks(rows, view, softmax)
        parts.append((rows, softmax))
    if on_codes:
        for rows, softmax in parts:
            _attend_codes(rows, softmax, view)
    else:
        _attend_decoded(parts, view)
    for rows, softmax in parts:
        _attend_tail(rows, view, softmax)
    return torch.cat([rows.to_output(softmax.result(), query.dtype) for rows, softmax in parts], dim=1)


def own_precision(query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
    """The same attention over decoded tokens in the model's dtype throughout: how far off that dtype makes it.

    Args:
        query: ``[B, Hq, Tq, D]``.
        view: What may be read.
        call: The rest of the call.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype.
    """
    keys, values = view.dense("key"), view.dense("value")
    rows = QueryRows(query, keys.shape[1], view.length, call, (0, query.shape[2]), view.encoded_end)
    raw = rows.query.to(query.dtype) @ keys.transpose(-1, -2)
    scores = rows.scores(raw, 0, view.length)
    if call.sink_logits is not None:
        scores = torch.cat((scores, rows.sink_scores(call.sink_logits).to(scores.dtype)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : view.length].to(values.dtype)
    return rows.to_output(weights @ values, query.dtype)


def _attend_sinks(rows: QueryRows, view: CacheView, softmax: OnlineSoftmax) -> None:
    keys, values = view.sinks
    if not keys.shape[2]:
        return
    slots = view.sink_slots()
    valid = None if view.left_padding is None else slots < view.encoded_end
    raw = matmul(rows.query, keys.float().transpose(-1, -2))
    softmax.accumulate(matmul(softmax.add(rows.scores_at(raw, slots, valid)), values.float()))
    if view.key.lead is None or view.value.lead is None or view.left_padding is None:
        return
    slots = torch.arange(keys.shape[2], dtype=torch.int64, device=keys.device)[None]
    raw = matmul(rows.query, view.key.lead.float().transpose(-1, -2))
    weights = softmax.add(rows.scores_at(raw, slots, slots < view.left_padding[:, None]))
    softmax.accumulate(matmul(weights, view.value.lead.float()))


def _attend_tail(rows: QueryRows, view: CacheView, softmax: OnlineSoftmax) -> None:
    keys, values = view.key.tail, view.value.tail
    step = TILE_BLOCKS * BLOCK
    for first in range(0, keys.shape[2], step):
        last = min(first + step, keys.shape[2])
        raw = matmul(rows.query, keys[:, :, first:last].float().transpose(-1, -2))
        scores = rows.scores(raw, view.encoded_end + first, view.encoded_end + last)
        softmax.accumulate(matmul(softmax.add(scores), values[:, :, first:last].float()))


def _tile_scores(rows: QueryRows, view: CacheView, block_table: Tensor, raw: Tensor) -> Tensor:
    """Mask the scores against whole blocks, ``[B, H, R, n * 64]``."""
    slots = block_slots(block_table)
    valid = None
    if view.left_padding is not None:
        behind = slots - view.left_padding[:, None]
        valid = (behind < 0) | (behind >= view.sinks[0].shape[2])
    if view.cut:
        inside = holds_tokens(block_table)[None]
        valid = inside if valid is None else valid & inside
    return rows.scores_at(raw, slots[None], valid)


def _attend_decoded(parts: list[tuple[QueryRows, OnlineSoftmax]], view: CacheView) -> None:
    """Attend on the encoded blocks by decoding one tile at a time, once for all queries."""
    assert view.key.codec is not None
    assert view.value.codec is not None
    backend = view.backend or REFERENCE
    for first, last in view.tiles(TILE_BLOCKS):
        block_table = view.block_table[first:last]
        keys = backend.decode(view.key.codec, view.key.store.slice(first, last), block_table, view.frames)
        values = backend.decode(view.value.codec, view.value.store.slice(first, last), block_table, view.frames)
        for tail, decoded in ((view.key.tail, keys), (view.value.tail, values)):
            expected = (*tail.shape[:2], (last - first) * BLOCK, tail.shape[3])
            if decoded.shape != expected:  # torch would spread one row or head over all
                raise QuantCacheError(f"a codec decoded to {list(decoded.shape)}, expected {list(expected)}")
        for rows, softmax in parts:
            scores = _tile_scores(rows, view, block_table, matmul(rows.query, keys.transpose(-1, -2)))
            softmax.accumulate(matmul(softmax.add(scores), values))


def _attend_codes(rows: QueryRows, softmax: OnlineSoftmax, view: CacheView) -> None:
    """Attend on the encoded blocks without decoding them."""
    keys, values = view.spectral_codecs
    for first, last in view.tiles(TILE_BLOCKS):
        block_table = view.block_table[first:last]
        raw = code_scores(rows.query, keys, view.fields("key", first, last), block_table, view.frames)
        weights = softmax.add(_tile_scores(rows, view, block_table, raw))
        coefficients = values.dequantize(view.fields("value", first, last))  # [n, B, H, D, 64]
        per_block = weights.unflatten(-1, (last - first, BLOCK)).permute(3, 0, 1, 2, 4)  # [n, B, H, R, 64]
        softmax.accumulate(matmul(per_block, coefficients.transpose(-1, -2)).sum(0), "codes")
        softmax.accumulate(weights.sum(-1, keepdim=True), "mass")
    in_codes, mass = softmax.sums.pop("codes"), softmax.sums.pop("mass")
    softmax.accumulate(values.synthesize(in_codes) + mass * values.mean[:, None])


def code_scores(
    query: Tensor, codec: SpectralCodec, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None
) -> Tensor:
    """Scores of queries against encoded keys, in the coded coordinates.

    Args:
        query: Scaled queries, ``[B, H, R, D]`` float32.
        codec: The keys' codec.
        fields: n encoded blocks.
        block_table: Where they lie, ``[n, 3]``.
        left_padding: Left padding of every row, ``[B]``, or None.

    Returns:
        ``[B, H, R, n * 64]`` float32.
    """
    frame, slow = codec.frame, codec.frame.num_slow
    coefficients = codec.dequantize(fields)  # [n, B, H, D, 64]
    if frame.is_identity:
        framed = query[None]
    else:
        anchors = block_table[:, 2:].long()
        anchors = anchors if left_padding is None else anchors - left_padding
        framed = frame.enter(query[None], anchors[:, :, None, None], anchors[:, :, None, None])  # [n, B, H, R, D]
    mean = codec.mean[:, :, None]  # [H, D, 1]
    slow_query = framed[..., :slow]
    scores = matmul(matmul(slow_query, codec.decoder[:, :slow, :slow]), coefficients[..., :slow, :])
    scores = scores + matmul(slow_query, mean[:, :slow])
    if frame.num_fast:
        keys = matmul(codec.decoder[:, slow:, slow:], coefficients[..., slow:, :]) + mean[:, slow:]  # [n, B, H, Df, 64]
        first, second = keys.unflatten(-2, (2, -1)).unbind(-3)
        inside = torch.arange(BLOCK, dtype=torch.int64, device=query.device)
        offsets = (block_table[:, :1] - block_table[:, 2:]) + inside
        cos, sin = (turn.mT[:, None, None] for turn in frame.fast_rotation(offsets))  # [n, 1, 1, pairs, 64]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-2)
        scores = scores + matmul(framed[..., slow:], rotated)
    return scores.permute(1, 2, 3, 0, 4).flatten(3)
