"""Softmax attention over keys that come in pieces: the running sums, and the queries with their mask.

Shapes: B batch, Hq / H query / key-value heads, G = Hq / H, Tq queries, T tokens, D dimension, R = G * Tq rows of
queries that share one key/value head, N keys of a piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.interface import AttentionCall


class OnlineSoftmax:
    """Softmax-weighted sums over keys that come in pieces, in float32.

    Source: M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax" (2018).

    Args:
        query: ``[B, H, R, D]``, for shape and device.
        value_dim: Dv.
    """

    def __init__(self, query: Tensor, value_dim: int):
        shape = (*query.shape[:3], 1)
        self.peak = query.new_full(shape, float("-inf"))
        self.total = query.new_zeros(shape)
        self.sums = {"values": query.new_zeros((*query.shape[:3], value_dim))}

    def add(self, scores: Tensor) -> Tensor:
        """Take in the scores of some keys.

        Args:
            scores: ``[B, H, R, N]``, -inf where a query may not look.

        Returns:
            Unnormalised weights ``[B, H, R, N]``; the caller adds their weighted values to ``sums``.
        """
        peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        safe = torch.where(peak == float("-inf"), 0.0, peak)  # rows that have seen nothing yet
        weights = torch.exp(scores - safe)
        decay = torch.exp(self.peak - safe)
        self.total = self.total * decay + weights.sum(-1, keepdim=True)
        self.sums = {name: value * decay for name, value in self.sums.items()}
        self.peak = peak
        return weights

    def accumulate(self, values: Tensor, name: str = "values") -> None:
        """Add weighted values.

        Args:
            values: ``[B, H, R, Dv]``, weighted by what :meth:`add` returned last.
            name: Which sum they belong to.
        """
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def result(self) -> Tensor:
        """The attention output, ``[B, H, R, Dv]``; zero for rows that saw no key."""
        return self.sums["values"] / torch.where(self.total > 0, self.total, 1.0)


def _bias(never: Tensor) -> Tensor:
    """Minus infinity where a query may not look, 0 elsewhere."""
    return torch.zeros_like(never, dtype=torch.float32).masked_fill_(never, float("-inf"))


class QueryRows:
    """The queries of one call, grouped by key/value head, with their mask.

    Args:
        query: ``[B, Hq, Tq, D]``, a part of the call's queries.
        heads: H.
        length: T.
        call: The rest of the call; its mask is of every query and slot (``guards.fitting_tensors``).
        place: First query of this part, and how many queries the call has.
        encoded_end: Slot behind the last block; 0 without blocks.
    """

    def __init__(
        self,
        query: Tensor,
        heads: int,
        length: int,
        call: AttentionCall,
        place: tuple[int, int],
        encoded_end: int = 0,
    ):
        batch, query_heads, count, dim = query.shape
        self.groups, self.count = query_heads // heads, count
        mask = call.mask
        self.query = query.float().mul(call.scaling).reshape(batch, heads, self.groups * count, dim)  # [B, H, R, D]
        self.softcap = call.softcap
        self.own_slots = length - place[1] + place[0] + torch.arange(count, dtype=torch.int64, device=query.device)
        self.causal = call.hides_the_future(place[1])
        # Blocks and sinks are the past of every query, unless tokens of the queries themselves are among them.
        self.causal_in_blocks = self.causal and length - place[1] < encoded_end
        self.mask = None
        if mask is not None:
            mask = mask[:, :, place[0] : place[0] + count, :length]
            self.mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads, self.groups))

    def scores(self, raw: Tensor, first: int, last: int) -> Tensor:
        """Cap and mask the scores against the slots ``first`` to ``last``.

        Args:
            raw: ``[B, H, R, last - first]``.
            first: First slot.
            last: One past the last slot.

        Returns:
            Scores of the same shape.
        """
        mask = None if self.mask is None else self.mask[..., first:last]
        return self._finish(
            raw, mask, None if not self.causal else torch.arange(first, last, dtype=torch.int64, device=raw.device)
        )

    def scores_at(self, raw: Tensor, slots: Tensor, valid: Tensor | None) -> Tensor:
        """Cap and mask the scores against given slots.

        Args:
            raw: ``[B, H, R, N]``.
            slots: ``[B or 1, N]``.
            valid: Whether a row holds a token there, ``[B or 1, N]``; None if all do.

        Returns:
            Scores of the same shape.
        """
        mask = None
        if self.mask is not None:
            index = slots.clamp_max(self.mask.shape[-1] - 1)[:, None, None, None]
            batch = max(self.mask.shape[0], index.shape[0])
            index = index.expand(batch, *self.mask.shape[1:4], -1)
            mask = self.mask.expand(batch, *self.mask.shape[1:]).gather(-1, index)
        scores = self._finish(raw, mask, slots[:, None, None, None] if self.causal_in_blocks else None)
        return scores if valid is None else scores.masked_fill(~valid[:, None, None], float("-inf"))

    def _finish(self, raw: Tensor, mask: Tensor | None, slots: Tensor | None) -> Tensor:
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        if mask is None and slots is None:
            return raw
        if slots is not None:
            bias = _bias(slots > self.own_slots[:, None])
        elif mask is not None and mask.dtype == torch.bool:
            bias = _bias(~mask)
        else:
            assert mask is not None
            # An additive mask of the dtype's minimum means "never", also for a row that has nothing else to look at.
            bias = mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
            bias = bias.float() if bias.dtype == torch.float64 else bias
        # Added, not filled in: NaN and infinity of a token that may not be seen do what they do in dense attention.
        scores = raw.unflatten(2, (self.groups, self.count)) + bias
        rows: Tensor = scores.flatten(2, 3)
        return rows

    def sink_scores(self, sink_logits: Tensor) -> Tensor:
        """Scores of the attention-sink logits, ``[B, H, R, 1]``."""
        batch, heads = self.query.shape[:2]
        per_head: Tensor = sink_logits.float().reshape(1, heads, self.groups, 1, 1)
        return per_head.expand(batch, -1, -1, self.count, 1).flatten(2, 3)

    def to_output(self, grouped: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, H, R, Dv]`` to ``[B, Tq, Hq, Dv]``."""
        by_query: Tensor = grouped.unflatten(2, (self.groups, self.count))  # [B, H, G, Tq, Dv]
        return by_query.flatten(1, 2).transpose(1, 2).to(dtype).contiguous()
