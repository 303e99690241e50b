"""Attention over a cache's view in float64, written without the code under test."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.backends.view import CacheView, SideView
from quantcache.coding.codec import SpectralCodec


def decoded(side: SideView, view: CacheView) -> Tensor:
    """Every encoded slot decoded in float64, ``[B, H, n * 64, D]``."""
    codec = side.codec
    assert isinstance(codec, SpectralCodec)
    fields = side.store.slice(0, view.num_blocks)
    framed = (codec.decoder.double() @ codec.dequantize(fields).double()).transpose(-1, -2)
    framed = (framed + codec.mean.double()[:, None]).permute(1, 2, 0, 3, 4).flatten(2, 3)
    if codec.frame.is_identity:
        return framed
    slots = (view.block_table[:, :1] + torch.arange(64)).flatten()
    anchors = view.block_table[:, 2].repeat_interleave(64)
    shift = torch.zeros(1, 1, dtype=torch.int64) if view.left_padding is None else view.left_padding[:, None]
    slow = (anchors - shift).double().unsqueeze(-1) * codec.frame.frequencies[: codec.frame.slow_pairs]
    fast = (slots - shift).double().unsqueeze(-1) * codec.frame.frequencies[codec.frame.slow_pairs :]
    angles = torch.cat((slow, fast), dim=-1)[:, None]
    return codec.frame.rotate(framed, angles.cos(), angles.sin())[..., codec.frame.inverse_order]


def attention(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention of queries ``[B, Hq, Tq, D]`` over a view, ``[B, Tq, Hq, Dv]``.

    In float64 it is the truth. In another dtype it is what plain torch makes of the exactly decoded tokens, rounded to
    that dtype: what a kernel that works in that dtype is measured by.
    """
    batch, query_heads, count, dim = query.shape
    assert view.key.sinks is not None
    assert view.value.sinks is not None
    slots = (view.block_table[:, :1] + torch.arange(64)).flatten()
    left_padding = torch.zeros(batch, dtype=torch.int64) if view.left_padding is None else view.left_padding
    sink_count = view.key.sinks.shape[2]
    sink_slots = left_padding[:, None] + torch.arange(sink_count)
    in_blocks = (slots < view.block_table.sum(1).sub(view.block_table[:, 2]).repeat_interleave(64)) & (
        slots >= left_padding[:, None] + sink_count
    )
    tail_slots = torch.arange(view.encoded_end, view.length).expand(batch, -1)
    where = torch.cat((sink_slots, slots.expand(batch, -1), tail_slots), dim=1)  # [B, N]
    there = torch.cat((sink_slots < view.encoded_end, in_blocks, torch.ones_like(tail_slots, dtype=torch.bool)), dim=1)
    keys, values = (
        torch.cat((side.sinks.double(), decoded(side, view), side.tail.double()), dim=2).to(dtype)
        for side in (view.key, view.value)
    )
    allowed = there[:, None, None] & (where[:, None, None] <= (view.length - count + torch.arange(count))[:, None])
    if mask is not None:
        index = where.clamp_max(view.length - 1)[:, None, None].expand(-1, 1, count, -1)
        allowed = there[:, None, None] & mask.expand(batch, -1, -1, -1).gather(-1, index)
    groups = query_heads // keys.shape[1]
    scores = query.to(dtype) @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(dtype).view(1, -1, 1, 1).expand(batch, -1, count, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : values.shape[2]].nan_to_num(0.0)
    return (weights @ values.repeat_interleave(groups, 1)).transpose(1, 2)
