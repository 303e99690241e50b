"""Attention on the tokens that are not encoded, in plain torch: what the merge kernel joins with the blocks.

Shapes: B batch, H key/value heads, G query heads of a group, Tq queries, R = G Tq rows of queries with the query index
running fastest, N tokens that are not encoded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantcache_kernels.interface import AttentionCall

NOTHING = -1e29
"""Logarithm of the weight where nothing is seen: above that of a split that has seen nothing, so that zero wins."""


def near_attention(
    query: Tensor,
    dense: tuple[Tensor, Tensor, Tensor, Tensor],
    left_padding: Tensor | None,
    call: AttentionCall,
    encoded_end: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Attention on sinks and recent tokens, with the sink logits.

    Args:
        query: Scaled, ``[B, H, R, D]`` float32.
        dense: Sinks of keys and values, ``[B, H, S, D]``, then the tokens behind the last block.
        left_padding: Left padding of every row, ``[B]``, or None; a row's sinks begin there.
        call: The rest of the call.
        encoded_end: Slot behind the last block.
        count: Tq.

    Returns:
        ``[B, H, R, Dv]`` float32, and the logarithm of the sum of exponentials, base 2, ``[B, H, R]``.
    """
    key_sinks, value_sinks, key_tail, value_tail = dense
    device, tail, heads = query.device, key_tail.shape[2], query.shape[1]
    keys, values = torch.cat((key_sinks, key_tail), dim=2), torch.cat((value_sinks, value_tail), dim=2)
    scores = query @ keys.float().transpose(-1, -2)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = _seen(key_sinks.shape[2], tail, left_padding, call, encoded_end, count, device)
    if seen is not None:
        scores = scores.unflatten(2, (-1, count)).masked_fill(~seen[:, None, None], float("-inf")).flatten(2, 3)
    if call.sink_logits is not None:
        logits = call.sink_logits.float().view(1, heads, -1, 1, 1).expand(scores.shape[0], -1, -1, count, 1)
        scores = torch.cat((scores, logits.flatten(2, 3)), dim=-1)
    lse = scores.logsumexp(-1)
    weights = (scores[..., : keys.shape[2]] - lse.clamp_min(NOTHING).unsqueeze(-1)).exp()
    return weights @ values.float(), (lse * math.log2(math.e)).clamp_min(NOTHING)


def _seen(
    sinks: int,
    tail: int,
    left_padding: Tensor | None,
    call: AttentionCall,
    encoded_end: int,
    count: int,
    device: torch.device,
) -> Tensor | None:
    """Which tokens a query sees, ``[B or 1, Tq or 1, N]``; None for all."""
    causal = call.hides_the_future(count)
    if left_padding is None and call.mask is None and not causal:
        return None
    offsets = torch.arange(sinks, dtype=torch.int64, device=device)[None]
    sink_slots = offsets if left_padding is None else left_padding[:, None] + offsets
    tail_slots = torch.arange(encoded_end, encoded_end + tail, dtype=torch.int64, device=device)
    slots = torch.cat((sink_slots, tail_slots.expand(sink_slots.shape[0], -1)), dim=1)  # [B or 1, N]
    there = torch.cat((sink_slots < encoded_end, torch.ones_like(slots[:, sinks:], dtype=torch.bool)), dim=1)
    seen = there[:, None]
    if causal:
        own = torch.arange(encoded_end + tail - count, encoded_end + tail, dtype=torch.int64, device=device)
        seen = seen & (slots[:, None] <= own[:, None])
    if call.mask is not None:
        mask = call.mask[:, 0]
        batch = max(mask.shape[0], slots.shape[0])
        index = slots.clamp_max(mask.shape[2] - 1)[:, None].expand(batch, mask.shape[1], -1)
        seen = seen & mask.expand(batch, -1, -1).gather(2, index)
    return seen
